"""What FA2's kernels are made of: mma.sync and ldmatrix of a warp, loads from global memory.

mma.sync m16n8k16 in eight chains of each of two warps a quarter: ``mma_sync_flops``; in one chain of one warp:
``mma_sync_latency``. ldmatrix.x4 of as many warps, without bank conflicts: ``shared_bytes``. A chain of loads, each of
the address that the last one brought, past the L1: ``global_latency``, in the middle between that of 4 MB, in the L2,
and of 1 GB, in memory, which the spread reaches to.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
import torch
from cutlass import Int32, Int64, Uint32, const_expr
from cutlass.cute.arch import inline_ptx
from cutlass.memory import SmemAllocator

from cute_fa.device.fake_arguments import fake_tensor, fake_vector
from cute_fa.semantics.types import SmArch
from perf.microbench.benchmark import (
    QUARTERS,
    WARP,
    Measured,
    Row,
    Timed,
    TimedKernel,
    device,
    measured_each,
    repeat,
    run,
    slopes,
)

NAME = "warps"
UNROLL = 64  # instructions of a warp in the timed loop's body
LOADS = 16  # in that of a chase
CHAINS, WARPS = 8, 2 * QUARTERS
OPERANDS = 6  # registers of A and B of a mma.sync
MATRIX_BYTES = 512  # that a ldmatrix.x4 reads
_FLOPS = 2 * 16 * 8 * 16
_COUNTS = (32, 160)
_STRIDE = 4096 + 128  # bytes from one load's line to the next one's
L2_BYTES, MEMORY_BYTES = 2**22, 2**30


@dataclass(frozen=True)
class Matrices(TimedKernel):
    """``kind``: mma or ldmatrix, of which each of ``warps`` has so many ``chains``."""

    kind: str
    chains: int = CHAINS
    warps: int = WARPS

    @property
    def threads(self) -> int:
        return self.warps * WARP

    def build(self):
        stream = cute.runtime.make_fake_stream(use_tvm_ffi_env_stream=True)
        inputs = fake_tensor(Uint32, self.threads, OPERANDS)
        chains = fake_tensor(Uint32, self.threads, 4 * self.chains)
        return MatricesKernel(self), (MatricesArguments(Int32(0), fake_vector(Int64), inputs, chains), stream)


class MatricesArguments(NamedTuple):
    """``cycles``: of each warp. ``operands`` (threads, 6): registers of A and B. ``results`` (threads, 4 · chains): of
    mma what is added to and what comes of it; of ldmatrix the last that was read."""

    count: Int32
    cycles: cute.Tensor
    operands: cute.Tensor
    results: cute.Tensor


class MatricesKernel:
    """Device code of :class:`Matrices`."""

    def __init__(self, config: Matrices):
        self.config = config

    @cute.jit
    def __call__(self, args: MatricesArguments, stream):
        c = self.config
        self.kernel(args).launch(
            grid=(1, 1, 1), block=(c.threads, 1, 1), smem=c.warps * MATRIX_BYTES + 128, stream=stream
        )

    @cute.kernel
    def kernel(self, args: MatricesArguments):
        c, results, cycles = self.config, args.results, args.cycles
        thread, _, _ = cute.arch.thread_idx()
        state = [[results[thread, 4 * chain + i] for i in range(4)] for chain in range(c.chains)]
        operands = [args.operands[thread, i] for i in range(OPERANDS)]
        if const_expr(c.kind == "ldmatrix"):
            address = self.rows(thread)
            state = [[address] * 4 for _ in range(c.chains)]
        begin = cute.arch.clock64()
        for _ in cutlass.range(args.count, unroll=1):
            for _ in cutlass.range_constexpr(UNROLL // CHAINS):
                for link in cutlass.range_constexpr(CHAINS):
                    chain = link % c.chains
                    state[chain] = self.following(state[chain], operands)
        end = cute.arch.clock64()
        for chain in cutlass.range_constexpr(c.chains):
            for i in cutlass.range_constexpr(4):
                results[thread, 4 * chain + i] = state[chain][i]
        if thread % WARP == 0:
            cycles[thread // WARP] = end - begin

    def following(self, registers: list, operands: list) -> list:
        """The four registers of a chain after one more instruction."""
        if self.config.kind == "mma":
            text = (
                "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {{$w0}, {$w1}, {$w2}, {$w3}}, "
                "{{$r0}, {$r1}, {$r2}, {$r3}}, {{$r4}, {$r5}}, {{$r6}, {$r7}, {$r8}, {$r9}};"
            )
            read = [*operands, *registers]
        else:
            text = "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{$w0}, {$w1}, {$w2}, {$w3}}, [{$r0}];"
            read = [registers[0]]
        return list(inline_ptx(text, write_only_types=[Uint32] * 4, read_only_args=read))

    @cute.jit
    def rows(self, thread: Int32):
        """The address of a lane's row, 16 bytes of those of its warp. The first eight rows hold the addresses of all,
        so that a lane reads its own."""
        lane = thread % WARP
        words = SmemAllocator().allocate_array(Uint32, self.config.warps * MATRIX_BYTES // 4)
        words += thread // WARP * (MATRIX_BYTES // 4)
        address = Uint32((words + 4 * lane).toint())
        (words + lane).store(address)
        for i in cutlass.range_constexpr(1, MATRIX_BYTES // 4 // WARP):
            (words + (WARP * i + lane)).store(Uint32(0))
        cute.arch.sync_warp()
        return address


@dataclass(frozen=True)
class Chase(TimedKernel):
    """Loads of one thread, each of the address that the last one brought; with ``copies`` by cp.async to shared memory
    and from there."""

    copies: bool = False

    def build(self):
        stream = cute.runtime.make_fake_stream(use_tvm_ffi_env_stream=True)
        arguments = ChaseArguments(Int32(0), fake_vector(Int64), fake_vector(Int64), fake_vector(Int64))
        return ChaseKernel(self), (arguments, stream)


class ChaseArguments(NamedTuple):
    """``place``: the address to begin with, then the one to go on with. ``buffer``: what addresses are of."""

    count: Int32
    cycles: cute.Tensor
    place: cute.Tensor
    buffer: cute.Tensor


class ChaseKernel:
    """Device code of :class:`Chase`."""

    def __init__(self, config: Chase):
        self.config = config

    @cute.jit
    def __call__(self, args: ChaseArguments, stream):
        self.kernel(args).launch(grid=(1, 1, 1), block=(1, 1, 1), smem=128, stream=stream)

    @cute.kernel
    def kernel(self, args: ChaseArguments):
        cycles, place = args.cycles, args.place
        line = SmemAllocator().allocate_array(Int64, 2, byte_alignment=16)
        text, read = "ld.global.cg.u64 {$w0}, [{$r0}];", []
        if const_expr(self.config.copies):
            text = (
                "cp.async.cg.shared.global [{$r1}], [{$r0}], 16; cp.async.commit_group; cp.async.wait_group 0; "
                "ld.shared.u64 {$w0}, [{$r1}];"
            )
            read = [line.toint()]
        address = place[0]
        begin = cute.arch.clock64()
        for _ in cutlass.range(args.count, unroll=1):
            for _ in cutlass.range_constexpr(LOADS):
                address = inline_ptx(text, write_only_types=[Int64], read_only_args=[address, *read])
        end = cute.arch.clock64()
        place[0] = address
        cycles[0] = end - begin


def chase_buffer(size: int) -> torch.Tensor:
    """int64 words of so many bytes, in which a line every 4224 bytes holds the address of the next, the last that of
    the first."""
    buffer = torch.zeros(size // 8, dtype=torch.int64, device=device())
    lines = buffer[: size // _STRIDE * (_STRIDE // 8)].view(-1, _STRIDE // 8)
    addresses = buffer.data_ptr() + _STRIDE * torch.arange(len(lines), device=buffer.device)
    lines[:, 0] = addresses.roll(-1)
    return buffer


def launch_chase(config: Chase, count: int, place: torch.Tensor, buffer: torch.Tensor) -> Timed:
    """``count`` turns of 16 loads from the address in ``place`` on, which is replaced."""
    cycles = torch.zeros(1, dtype=torch.int64, device=buffer.device)
    return Timed(cycles, place, run(config, count, cycles, place, buffer))


def launch(config: Matrices, count: int, inputs: torch.Tensor, results: torch.Tensor) -> Timed:
    """``count`` turns of 64 instructions a warp; arguments as the kernel takes them, 32-bit words."""
    cycles, results = torch.zeros(config.warps, dtype=torch.int64, device=inputs.device), results.clone()
    return Timed(cycles, results, run(config, count, cycles, inputs, results))


def matrices(arch: SmArch) -> list[Matrices]:
    """What is measured."""
    return [Matrices(arch, kind, *size) for kind in ("mma", "ldmatrix") for size in ((), (1, 1))]


def measure(arch: SmArch) -> Iterator[Row]:
    for config in matrices(arch):
        inputs, results = (
            torch.zeros(config.threads, columns, dtype=torch.int32, device=device())
            for columns in (OPERANDS, 4 * config.chains)
        )
        yield from repeat(NAME, config, _COUNTS, lambda n, c=config, i=inputs, r=results: launch(c, n, i, r))
    for size in (L2_BYTES, MEMORY_BYTES):
        buffer = chase_buffer(size)
        for config in (Chase(arch), Chase(arch, copies=True)):
            place = torch.tensor([buffer.data_ptr()], device=buffer.device)
            run_once = lambda n, c=config, p=place, b=buffer: launch_chase(c, n, p, b)  # noqa: E731
            yield from repeat(NAME, config, _COUNTS, run_once, bytes=size)


def constants(rows: list[Row]) -> dict[str, Measured]:
    def cycles(**conditions) -> list[float]:
        """Of one instruction of each warp."""
        return [turn / UNROLL for turn in slopes(rows, kernel=NAME, **conditions)]

    found = measured_each(
        mma_sync_flops=[_FLOPS * WARPS / turn for turn in cycles(kind="mma", chains=CHAINS)],
        mma_sync_latency=cycles(kind="mma", chains=1),
        shared_bytes=[MATRIX_BYTES * WARPS / turn for turn in cycles(kind="ldmatrix", chains=CHAINS)],
    )
    loads = [slopes(rows, kernel=NAME, copies=False, bytes=size) for size in (L2_BYTES, MEMORY_BYTES)]
    if all(loads):
        near, far = (median(turns) / LOADS for turns in loads)
        found["global_latency"] = Measured((near + far) / 2, (far - near) / (far + near))
    return found
