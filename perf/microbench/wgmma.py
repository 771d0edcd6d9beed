"""wgmma alone: how often the tensor cores take one, and how long the last of a group takes.

``tensor_flops``: of m64n256k16. ``wgmma_least``: interval of the smallest, m64n8k16 with A in registers. (With A in
shared memory its 2 KB and B's 256 bytes take 18 cycles at 128 bytes a cycle, which would be a measurement of that.)
``wgmma_tail``: what a m64n64k16 that is waited for takes over one in a stream.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
import torch
from cutlass import Float32, Int32, Int64
from cutlass.cute.nvgpu import warpgroup
from cutlass.memory import SmemAllocator

from cute_fa.device.dtypes import CUTE_DTYPE
from cute_fa.device.fake_arguments import fake_tensor
from cute_fa.semantics.types import DType, SmArch
from perf.microbench.benchmark import (
    WARP,
    WARPGROUP,
    Measured,
    Row,
    Timed,
    TimedKernel,
    each,
    measured_each,
    note,
    repeat,
    run,
    slopes,
)
from perf.microbench.products import M, Product, columns, operands, smem_bytes

NAME = "wgmma"
UNROLL = 32  # wgmma in the timed loop's body
STREAM = (4, 1)  # (wgmma of a group, groups that may be pending): nothing is waited for that matters
ALONE = (1, 0)
_COUNTS = (32, 160)


@dataclass(frozen=True)
class Chain(TimedKernel):
    """One warpgroup: groups of ``per_commit`` wgmma m64nNk16 (e4m3: k32) into one accumulator, each behind the last but
    ``pending``. ``registers``: whether A lies there."""

    n: int
    registers: bool = False
    dtype: DType = DType.BF16
    per_commit: int = STREAM[0]
    pending: int = STREAM[1]

    def build(self):
        stream = cute.runtime.make_fake_stream(use_tvm_ffi_env_stream=True)
        element = CUTE_DTYPE[self.dtype]
        operands = (fake_tensor(element, rows, columns(self.dtype), aligned=8) for rows in (M, self.n))
        output = fake_tensor(Float32, M, self.n)
        return ChainKernel(self), (Arguments(Int32(0), fake_tensor(Int64, 1, 4), *operands, output), stream)


class Arguments(NamedTuple):
    """``cycles``: of each warp."""

    count: Int32
    cycles: cute.Tensor
    a: cute.Tensor
    b: cute.Tensor
    out: cute.Tensor


class ChainKernel:
    """Device code of :class:`Chain`."""

    def __init__(self, config: Chain):
        self.config = config

    @cute.jit
    def __call__(self, args: Arguments, stream):
        smem = smem_bytes(self.config.n)
        self.kernel(args).launch(grid=(1, 1, 1), block=(WARPGROUP, 1, 1), smem=smem, stream=stream)

    @cute.kernel
    def kernel(self, args: Arguments):
        c = self.config
        thread, _, _ = cute.arch.thread_idx()
        product = Product(c.dtype, c.n, c.registers, SmemAllocator())
        product.fill(args.a, args.b, thread, WARPGROUP)
        cute.arch.sync_threads()
        product.begin(thread)
        issue = product.issue
        warpgroup.fence()
        begin = cute.arch.clock64()
        for _ in cutlass.range(args.count, unroll=1):
            for step in cutlass.range_constexpr(UNROLL):
                issue(step)
                if cutlass.const_expr((step + 1) % c.per_commit == 0):
                    warpgroup.commit_group()
                    warpgroup.wait_group(c.pending)
        warpgroup.wait_group(0)
        end = cute.arch.clock64()
        product.store(args.out)
        if thread % WARP == 0:
            args.cycles[0, thread // WARP] = end - begin


def launch(config: Chain, count: int, a: torch.Tensor, b: torch.Tensor) -> Timed:
    """``count`` turns of 32 wgmma with A (64, columns) and B (n, columns); the output is (64, n)."""
    cycles = torch.zeros(1, 4, dtype=torch.int64, device=a.device)
    out = torch.zeros(M, config.n, device=a.device)
    seconds = run(config, count, cycles, a, b, out)
    return Timed(cycles, out, seconds)


def chains(arch: SmArch) -> list[Chain]:
    """What is measured."""
    sizes = (8, 16, 32, 64, 128, 256)
    streams = [Chain(arch, n, registers) for registers in (False, True) for n in sizes]
    return [*streams, Chain(arch, 64, False, DType.BF16, *ALONE), Chain(arch, 256, False, DType.E4M3)]


def measure(arch: SmArch) -> Iterator[Row]:
    for chain in chains(arch):
        a, b = operands(chain.dtype, chain.n)
        rows = []
        for row in repeat(NAME, chain, _COUNTS, lambda count, c=chain, a=a, b=b: launch(c, count, a, b)):
            rows.append(row)
            yield row
        if turns := slopes(rows):
            where = "registers" if chain.registers else "shared memory"
            groups = "in a stream" if chain.pending else "each waited for"
            cycles = median(turns) / UNROLL
            yield note(NAME, f"wgmma m64n{chain.n} {chain.dtype.value}, A in {where}, {groups}: {cycles:.1f} cycles")


def constants(rows: list[Row]) -> dict[str, Measured]:
    def interval(n: int, registers: bool, depth: tuple[int, int] = STREAM) -> list[float]:
        per_commit, pending = depth
        chain = {"n": n, "registers": registers, "dtype": "bf16", "per_commit": per_commit, "pending": pending}
        return [cycles / UNROLL for cycles in slopes(rows, kernel=NAME, **chain)]

    return measured_each(
        tensor_flops=each(lambda cycles: 2 * M * 256 * 16 / cycles, interval(256, False)),
        wgmma_least=interval(8, True),
        wgmma_tail=each(lambda alone, stream: alone - stream, interval(64, False, ALONE), interval(64, False)),
    )
