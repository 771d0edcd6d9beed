"""Instructions of the other pipes: how many a quarter takes, alone and beside wgmma, and after how long a result is
there.

Streams of two warps a quarter, eight independent chains each. Alone they give ``fp32_lanes`` (FFMA), ``alu_lanes``
(FMNMX), ``imad_lanes``, ``mufu_lanes`` (EX2) and ``convert_lanes`` (F2FP). FFMA and FADD exist with one, two and three
register reads; beside wgmma of another warpgroup either all lose the same share of their rate, which is then
``slots_lost``, or those with more reads lose more: then the quarter has ``register_ports`` reads a cycle, of which
running wgmma take ``register_tensor``. One chain of one warp: ``mufu_latency``, ``shuffle_latency`` and
``shared_latency``.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import mean, median
from typing import Any, NamedTuple, Optional

import cutlass
import cutlass.cute as cute
import torch
from cutlass import BFloat16, Boolean, Float32, Int32, Int64, Uint32, const_expr
from cutlass.cute.arch import inline_ptx
from cutlass.cute.nvgpu import warpgroup
from cutlass.memory import SmemAllocator

from cute_fa.device.fake_arguments import fake_tensor, fake_vector
from cute_fa.semantics.types import DType, SmArch
from perf.microbench.benchmark import (
    QUARTERS,
    WARP,
    WARPGROUP,
    Measured,
    Row,
    Timed,
    TimedKernel,
    device,
    each,
    measured_each,
    note,
    picked,
    repeat,
    run,
    slopes,
)
from perf.microbench.products import M, Product, columns, operands, smem_bytes

NAME = "streams"
UNROLL = 128  # instructions of a warp in the timed loop's body
CHAINS = 8
WARPS = 2  # of a stream, in each quarter
PRODUCTS = 32  # wgmma of a group
_COUNTS = (32, 288)
# PTX of one instruction of a chain, x being its value, y and z what does not change; and its register reads.
INSTRUCTIONS = {
    "ffma3": ("fma.rn.f32 {$w0}, {$r1}, {$r2}, {$r0};", 3),
    "ffma2": ("fma.rn.f32 {$w0}, {$r1}, 0f3F000000, {$r0};", 2),
    "fadd1": ("add.rn.f32 {$w0}, {$r0}, 0f3F800000;", 1),
    "fmnmx": ("max.f32 {$w0}, {$r0}, {$r1};", 2),
    "imad": ("mad.lo.u32 {$w0}, {$r0}, {$r1}, {$r2};", 3),
    "mufu": ("{ .reg .f32 t; neg.f32 t, {$r0}; ex2.approx.ftz.f32 {$w0}, t; }", 1),
    "convert": ("cvt.rn.bf16x2.f32 {$w0}, {$r0}, {$r1};", 2),
    "shuffle": ("shfl.sync.bfly.b32 {$w0}, {$r0}, 1, 31, -1;", 1),
    "shared": ("ld.shared.b32 {$w0}, [{$r0}];", 1),
}
LANES = {"fp32_lanes": "ffma2", "alu_lanes": "fmnmx", "imad_lanes": "imad", "mufu_lanes": "mufu"}
LANES["convert_lanes"] = "convert"
LATENCIES = {"mufu_latency": "mufu", "shuffle_latency": "shuffle", "shared_latency": "shared"}
BY_READS = ("fadd1", "ffma2", "ffma3")


@dataclass(frozen=True)
class Stream(TimedKernel):
    """``kind``: of ``INSTRUCTIONS``, in ``chains`` of each of ``warps``. ``beside``: columns of the wgmma m64nNk16 that
    another warpgroup issues meanwhile, None for none; ``registers``: whether their A lies in registers."""

    kind: str
    chains: int = CHAINS
    warps: int = WARPS * QUARTERS
    beside: int | None = None
    registers: bool = False

    @property
    def threads(self) -> int:
        """Of the stream: the CTA's first ones."""
        return self.warps * WARP

    def build(self):
        stream = cute.runtime.make_fake_stream(use_tvm_ffi_env_stream=True)
        products = None
        if self.beside:
            tensors = (fake_tensor(BFloat16, rows, columns(DType.BF16), aligned=8) for rows in (M, self.beside))
            products = Products(*tensors, fake_tensor(Float32, M, self.beside), fake_vector(Int64))
        values = fake_tensor(Uint32, self.threads, 3 * self.chains)
        return StreamKernel(self), (Arguments(Int32(0), fake_vector(Int64), values, products), stream)


class Products(NamedTuple):
    """Operands and result of the wgmma beside a stream; ``turns``: how many groups of them, and their cycles."""

    a: cute.Tensor
    b: cute.Tensor
    out: cute.Tensor
    turns: cute.Tensor


class Arguments(NamedTuple):
    """``cycles``: of each warp of the stream. ``values`` (threads, 3 · chains): x, y and z of each chain, of which x is
    replaced; of chains through shared memory it is not used."""

    count: Int32
    cycles: cute.Tensor
    values: cute.Tensor
    products: Optional[Products]


class StreamKernel:
    """Device code of :class:`Stream`."""

    def __init__(self, config: Stream):
        self.config = config

    @cute.jit
    def __call__(self, args: Arguments, stream):
        c = self.config
        threads = c.threads + (WARPGROUP if c.beside else 0)
        smem = 4 * c.threads * c.chains + 1024 + (smem_bytes(c.beside) if c.beside else 0)
        self.kernel(args).launch(grid=(1, 1, 1), block=(threads, 1, 1), smem=smem, stream=stream)

    @cute.kernel
    def kernel(self, args: Arguments):
        c = self.config
        thread, _, _ = cute.arch.thread_idx()
        allocator = SmemAllocator()
        if const_expr(c.beside is None):
            self.stream(args, thread, allocator, None)
        else:
            product = Product(DType.BF16, c.beside, c.registers, allocator)
            done = allocator.allocate_array(Int64, 1)
            product.fill(args.products.a, args.products.b, thread, c.threads + WARPGROUP)
            if thread == 0:
                cute.arch.mbarrier_init(done, c.warps)
            cute.arch.mbarrier_init_fence()
            cute.arch.sync_threads()
            stream, multiply = self.stream, self.multiply
            if cute.arch.make_warp_uniform(thread // WARP) < c.warps:
                stream(args, thread, allocator, done)
            else:
                multiply(args.products, product, thread - c.threads, done)

    @cute.jit
    def stream(self, args: Arguments, thread: Int32, allocator: SmemAllocator, done):
        """The chains of a thread."""
        c, values, cycles = self.config, args.values, args.cycles
        text, _ = INSTRUCTIONS[c.kind]
        x, y, z = ([values[thread, c.chains * part + i] for i in range(c.chains)] for part in range(3))
        if const_expr(c.kind == "shared"):
            # words that hold their own address, a thread's in a bank of its own
            words = allocator.allocate_array(Uint32, c.threads * c.chains)
            x = [Uint32((words + (i * c.threads + thread)).toint()) for i in range(c.chains)]
            for i in cutlass.range_constexpr(c.chains):
                (words + (i * c.threads + thread)).store(x[i])
        begin = cute.arch.clock64()
        for _ in cutlass.range(args.count, unroll=1):
            for _ in cutlass.range_constexpr(UNROLL // CHAINS):
                for link in cutlass.range_constexpr(CHAINS):
                    i = link % c.chains
                    x[i] = inline_ptx(text, write_only_types=[Uint32], read_only_args=[x[i], y[i], z[i]])
        end = cute.arch.clock64()
        for i in cutlass.range_constexpr(c.chains):
            values[thread, i] = x[i]
        if thread % WARP == 0:
            cycles[thread // WARP] = end - begin
            if const_expr(done is not None):
                cute.arch.mbarrier_arrive(done)

    @cute.jit
    def multiply(self, args: Products, product: Product, thread: Int32, done: cute.Pointer):
        """Groups of wgmma until all warps of the stream are done."""
        product.begin(thread)
        issue, turns = product.issue, args.turns
        warpgroup.fence()
        finished, count = Boolean(False), Int64(0)
        begin = cute.arch.clock64()
        while not finished:
            for step in cutlass.range_constexpr(PRODUCTS):
                issue(step)
            warpgroup.commit_group()
            warpgroup.wait_group(1)
            count += 1
            finished = cute.arch.mbarrier_test_wait(done, 0)
        warpgroup.wait_group(0)
        end = cute.arch.clock64()
        product.store(args.out)
        if thread == 0:
            turns[0] = count
            turns[1] = end - begin


def launch(config: Stream, count: int, values: torch.Tensor) -> Timed:
    """``count`` turns of 128 instructions a warp; ``values`` as the kernel takes them, 32-bit words. The output is what
    comes of them; ``figures`` beside wgmma: how many groups of 32 were done, and their cycles."""
    cycles = torch.zeros(config.warps, dtype=torch.int64, device=values.device)
    values = values.clone()
    if config.beside is None:
        return Timed(cycles, values, run(config, count, cycles, values, None))
    a, b = operands(DType.BF16, config.beside)
    out, turns = torch.zeros(M, config.beside, device=a.device), torch.zeros_like(cycles[:2])
    seconds = run(config, count, cycles, values, (a, b, out, turns))
    groups, product_cycles = turns.tolist()
    return Timed(cycles, values, seconds, {"groups": groups, "product_cycles": product_cycles})


def streams(arch: SmArch) -> list[Stream]:
    """What is measured."""
    found = [Stream(arch, kind) for kind in {*LANES.values(), *BY_READS}]
    found += [Stream(arch, kind, 1, 1) for kind in ("ffma3", *LATENCIES.values())]
    if arch.has_wgmma:
        kinds = (*BY_READS, "fmnmx", "imad", "mufu")
        found += [Stream(arch, kind, beside=128, registers=rs) for kind in kinds for rs in (False, True)]
    return sorted(found, key=str)


def measure(arch: SmArch) -> Iterator[Row]:
    rows = []
    for config in streams(arch):
        values = torch.rand(config.threads, 3 * config.chains, device=device()).view(torch.int32)
        for row in repeat(NAME, config, _COUNTS, lambda count, c=config, v=values: launch(c, count, v)):
            rows.append(row)
            yield row
    if turns := slopes(rows, kind="ffma3", chains=1):
        yield note(NAME, f"FFMA: its result after {median(turns) / UNROLL:.1f} cycles")
    for config in streams(arch):
        if config.beside and (text := remark(config, rows)):
            yield note(NAME, text)


def remark(config: Stream, rows: list[Row]) -> str | None:
    """What a stream and the wgmma beside it do to each other."""
    beside = {"beside": config.beside, "registers": config.registers}
    alone, less = _rates(rows, config.kind), _rates(rows, config.kind, **beside)
    if not (alone and less):
        return None
    found = picked(rows, kind=config.kind, **beside)
    pace = median(row["product_cycles"] / row["groups"] for row in found) / PRODUCTS
    a, share = "registers" if config.registers else "shared memory", median(less) / median(alone)
    return (
        f"{config.kind} beside wgmma n{config.beside}, A in {a}: {share:.3f} of its {median(alone):.3f} a cycle and "
        f"quarter, and a wgmma in {pace:.1f} cycles"
    )


def _rates(rows: list[Row], kind: str, **conditions: Any) -> list[float]:
    """Instructions a cycle and quarter."""
    turns = slopes(rows, kernel=NAME, kind=kind, chains=CHAINS, **{"beside": None, **conditions})
    return [UNROLL * WARPS / cycles for cycles in turns]


def constants(rows: list[Row]) -> dict[str, Measured]:
    def latency(kind: str) -> list[float]:
        return [cycles / UNROLL for cycles in slopes(rows, kernel=NAME, kind=kind, chains=1)]

    lanes = {name: [WARP * rate for rate in _rates(rows, kind)] for name, kind in LANES.items()}
    latencies = {name: latency(kind) for name, kind in LATENCIES.items()}
    alone = [_rates(rows, kind) for kind in BY_READS]
    pairs = [[_rates(rows, kind, beside=128, registers=rs) for rs in (False, True)] for kind in BY_READS]
    beside = [each(lambda *both: mean(both), *pair) for pair in pairs]
    competing = each(lambda *rates: _competition(rates[:3], rates[3:]), *alone, *beside)
    of_tensor = {name: [values[name] for values in competing if name in values] for name in _COMPETITION}
    return measured_each(**lanes, **latencies, **of_tensor)


_COMPETITION = ("register_ports", "register_tensor", "slots_lost")
# Shares of the rate: what a stream with three reads loses over one with one, if ports are short; and what a stream
# loses whose rate is taken for that of the ports.
_SHORT = 0.05


def _competition(alone: tuple[float, ...], beside: tuple[float, ...]) -> dict[str, float]:
    """What wgmma take, from instructions a cycle with one, two and three register reads. Without a shortage of ports
    the model's rule of them is off, which 0 stands for."""
    lost = [1 - less / more for more, less in zip(alone, beside, strict=True)]
    if lost[2] - lost[0] < _SHORT:
        return {"register_ports": 0.0, "slots_lost": max(0.0, mean(lost))}
    ports = 3 * alone[2]
    left = mean(reads * rate for reads, rate, share in zip((1, 2, 3), beside, lost, strict=True) if share > _SHORT)
    return {"register_ports": ports, "register_tensor": ports - left, "slots_lost": 0.0}
