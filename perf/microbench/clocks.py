"""The clock that the GPU holds under load: wgmma of random data on all SMs, alone and beside exponentials.

Two warpgroups of each SM issue m64n128k16, and for each of them as many exponentials and FFMA as attention has scores
for so much work at head_dim 64, 128 and 256. The clock is clock64 over globaltimer, of the last of ten launches of a
tenth of a second each; ``clock`` is that of the three head_dims. NVML's figures meanwhile are in the notes.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple, Optional

import cutlass
import cutlass.cute as cute
import torch
from cutlass import BFloat16, Float32, Int32, Int64
from cutlass.cute.arch import inline_ptx
from cutlass.cute.nvgpu import warpgroup
from cutlass.memory import SmemAllocator

from cute_fa.device.fake_arguments import fake_tensor, fake_vector
from cute_fa.engine import worlds
from cute_fa.engine.compiler import compiled
from cute_fa.semantics.types import DType, SmArch
from perf.device import Clocks, CudaDevice
from perf.microbench.benchmark import WARPGROUP, Measured, Row, Timed, TimedKernel, device, measured_each, picked, run
from perf.microbench.products import M, Product, columns, operands, smem_bytes

NAME = "clocks"
N = 128
WARPGROUPS = 2
PRODUCTS = 8  # wgmma of a group
CHAINS = 8
HEAD_DIMS = (64, 128, 256)
_LAUNCHES, _SECONDS = 10, 0.1
_GLANCE_S = 0.02
_TURN_CYCLES = WARPGROUPS * PRODUCTS * N / 2  # at 4096 FLOP/clk
_USUAL_CLOCK = 1.5e9


@dataclass(frozen=True)
class Load(TimedKernel):
    """``head_dim``: of the attention whose share of exponentials there is, None for none."""

    head_dim: Optional[int] = None

    @property
    def exponentials(self) -> int:
        """Of a thread for a group of wgmma. Attention has 4 · head_dim FLOP a score."""
        flops = 2 * M * N * 16 * PRODUCTS
        return flops // (4 * self.head_dim * WARPGROUP) if self.head_dim else 0

    def build(self):
        stream = cute.runtime.make_fake_stream(use_tvm_ffi_env_stream=True)
        inputs = (fake_tensor(BFloat16, rows, columns(DType.BF16), aligned=8) for rows in (M, N))
        values = fake_tensor(Float32, cute.sym_int(), WARPGROUPS * WARPGROUP, CHAINS)
        out = fake_tensor(Float32, cute.sym_int(), WARPGROUPS, M, N)
        return LoadKernel(self), (Arguments(Int32(0), Int32(0), fake_vector(Int64, 2), *inputs, values, out), stream)


class Arguments(NamedTuple):
    """``cycles`` (CTAs, 2): cycles and nanoseconds. ``values`` (CTAs, threads, 8): what exponentials begin with, and
    where they end; ``out`` (CTAs, warpgroups, 64, 128)."""

    count: Int32
    ctas: Int32
    cycles: cute.Tensor
    a: cute.Tensor
    b: cute.Tensor
    values: cute.Tensor
    out: cute.Tensor


class LoadKernel:
    """Device code of :class:`Load`."""

    def __init__(self, config: Load):
        self.config = config

    @cute.jit
    def __call__(self, args: Arguments, stream):
        threads = WARPGROUPS * WARPGROUP
        self.kernel(args).launch(grid=(args.ctas, 1, 1), block=(threads, 1, 1), smem=smem_bytes(N), stream=stream)

    @cute.kernel
    def kernel(self, args: Arguments):
        thread, _, _ = cute.arch.thread_idx()
        cta, _, _ = cute.arch.block_idx()
        product = Product(DType.BF16, N, False, SmemAllocator())
        product.fill(args.a, args.b, thread, WARPGROUPS * WARPGROUP)
        product.begin(thread % WARPGROUP)
        x, values, cycles = [args.values[cta, thread, i] for i in range(CHAINS)], args.values, args.cycles
        cute.arch.sync_threads()
        issue, store = product.issue, product.store
        warpgroup.fence()
        began, begin = cute.arch.globaltimer(), cute.arch.clock64()
        for _ in cutlass.range(args.count, unroll=1):
            for step in cutlass.range_constexpr(PRODUCTS):
                issue(step)
            warpgroup.commit_group()
            for _ in cutlass.range_constexpr(self.config.exponentials // CHAINS):
                for i in cutlass.range_constexpr(CHAINS):
                    x[i] = _following(x[i])
            warpgroup.wait_group(1)
        warpgroup.wait_group(0)
        ended, end = cute.arch.globaltimer(), cute.arch.clock64()
        if thread == 0:
            cycles[cta, 0] = end - begin
            cycles[cta, 1] = ended - began
        store(args.out[cta, thread // WARPGROUP, None, None])
        for i in cutlass.range_constexpr(CHAINS):
            values[cta, thread, i] = x[i]


def _following(x: Float32) -> Float32:
    """2 − 2 · 2^x, which alternates between two numbers, so that the bits of the pipes do."""
    return inline_ptx(
        "{ .reg .f32 power; ex2.approx.ftz.f32 power, {$r0}; fma.rn.f32 {$w0}, power, {$r1}, {$r2}; }",
        write_only_types=[Float32],
        read_only_args=[x, Float32(-2), Float32(2)],
    )


class Loaded(NamedTuple):
    """Tensors of a launch; see :class:`Arguments`."""

    cycles: torch.Tensor
    a: torch.Tensor
    b: torch.Tensor
    values: torch.Tensor
    out: torch.Tensor


def tensors(ctas: int) -> Loaded:
    """Those of a launch of so many CTAs, with random numbers."""
    at = device()
    values = torch.rand(ctas, WARPGROUPS * WARPGROUP, CHAINS, device=at)
    cycles, out = torch.zeros(ctas, 2, dtype=torch.int64, device=at), torch.zeros(ctas, WARPGROUPS, M, N, device=at)
    return Loaded(cycles, *operands(DType.BF16, N), values, out)


def launch(config: Load, count: int, loaded: Loaded) -> Timed:
    """``count`` groups of 8 wgmma of each warpgroup. ``cycles`` (CTAs, 2): cycles and nanoseconds."""
    seconds = run(config, count, len(loaded.cycles), *loaded)
    return Timed(loaded.cycles, loaded.out, seconds)


def measure(arch: SmArch) -> Iterator[Row]:
    gpu = CudaDevice()
    loaded = tensors(worlds.num_sms(torch.device(device())))
    count = int(_SECONDS * _USUAL_CLOCK / _TURN_CYCLES)
    for head_dim in (None, *HEAD_DIMS):
        kernel, seen, done = compiled(Load(arch, head_dim)), [], torch.cuda.Event()
        for _ in range(_LAUNCHES):
            kernel.launch((count, len(loaded.cycles), *loaded))
        done.record()
        while not done.query():
            seen.append(gpu.clocks())
            time.sleep(_GLANCE_S)
        yield row(head_dim, loaded.cycles.cpu(), seen[len(seen) // 2 :])


def row(head_dim: int | None, cycles: torch.Tensor, seen: list[Clocks]) -> Row:
    """What a launch and NVML say; ``seen``: while the clock was steady."""
    ghz = (cycles[:, 0] / cycles[:, 1]).median().item()
    told = {name: [getattr(clocks, name) for clocks in seen] for name in ("sm_mhz", "watts", "celsius")}
    nvml = {name: median(values) for name, values in told.items() if values and None not in values}
    load = f"exponentials of head_dim {head_dim}" if head_dim else "nothing"
    said = ", ".join(f"{name} {value:.0f}" for name, value in nvml.items()) or "silent"
    note = f"wgmma beside {load}: {ghz:.3f} GHz by clock64 over globaltimer; NVML: {said}"
    return {"kernel": NAME, "head_dim": head_dim, "ghz": ghz, **nvml, "note": note}


def constants(rows: list[Row]) -> dict[str, Measured]:
    found = [load for head_dim in HEAD_DIMS for load in picked(rows, kernel=NAME, head_dim=head_dim)]
    return measured_each(clock=[load["ghz"] for load in found])
