"""fp32 sums into global memory, in the L2: of one word a lane, of four (from sm_90 on), and of 8 KB by a bulk copy.

Two CTAs an SM, or one with bulk copies, add to 64 KB each of their own, again and again; by events. ``l2_reductions``:
of four words, before sm_90 of one. All rates are notes, too.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
import torch
from cutlass import Float32, Int32, Int64, const_expr
from cutlass.cute.arch import inline_ptx
from cutlass.memory import SmemAllocator

from cute_fa.device.fake_arguments import fake_tensor, fake_vector
from cute_fa.engine import worlds
from cute_fa.semantics.types import SmArch
from perf.microbench.benchmark import (
    WARP,
    Measured,
    Row,
    Timed,
    TimedKernel,
    device,
    measured_each,
    note,
    picked,
    repeat,
    run,
    slopes,
)

NAME = "reductions"
REGION_BYTES = 2**16  # of a CTA, which a turn adds to once
BULK_BYTES = 2**13
PENDING = 4  # bulk copies that may be under way
_COUNTS = (64, 576)
# Threads of a CTA and CTAs of an SM by kind.
KINDS = {"f32": (256, 2), "v4": (256, 2), "bulk": (WARP, 1)}


@dataclass(frozen=True)
class Sums(TimedKernel):
    """``kind``: one of ``KINDS``."""

    kind: str

    @property
    def threads(self) -> int:
        return KINDS[self.kind][0]

    def build(self):
        stream = cute.runtime.make_fake_stream(use_tvm_ffi_env_stream=True)
        sums = fake_tensor(Float32, cute.sym_int(), REGION_BYTES // 4, aligned=4)
        return SumsKernel(self), (Arguments(Int32(0), fake_vector(Int64), sums), stream)


class Arguments(NamedTuple):
    """``cycles``: of each CTA. ``sums`` (CTAs, words of a region): each turn adds 1 to each."""

    count: Int32
    cycles: cute.Tensor
    sums: cute.Tensor


class SumsKernel:
    """Device code of :class:`Sums`."""

    def __init__(self, config: Sums):
        self.config = config

    @cute.jit
    def __call__(self, args: Arguments, stream):
        smem = BULK_BYTES + 128 if self.config.kind == "bulk" else 0
        self.kernel(args).launch(
            grid=(args.sums.shape[0], 1, 1), block=(self.config.threads, 1, 1), smem=smem, stream=stream
        )

    @cute.kernel
    def kernel(self, args: Arguments):
        thread, _, _ = cute.arch.thread_idx()
        cta, _, _ = cute.arch.block_idx()
        region = args.sums[cta, None].iterator.toint()
        add = self.adding(thread)
        begin = cute.arch.clock64()
        for _ in cutlass.range(args.count, unroll=1):
            add(region)
        if const_expr(self.config.kind == "bulk"):
            inline_ptx("cp.async.bulk.wait_group 0;")
        end = cute.arch.clock64()
        cycles = args.cycles
        if thread == 0:
            cycles[cta] = end - begin

    def adding(self, thread: Int32):
        """How 1 is added to all words of a region."""
        kind, threads = self.config.kind, self.config.threads
        if kind == "bulk":
            ones = self.ones(thread)

            def add(region: Int64):
                for offset in range(0, REGION_BYTES, BULK_BYTES):
                    inline_ptx(
                        f"cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [{{$r0}}+{offset}], [{{$r1}}], "
                        f"{BULK_BYTES};",
                        read_only_args=[region, ones],
                        predicate=thread == 0,
                    )
                    inline_ptx(f"cp.async.bulk.commit_group; cp.async.bulk.wait_group {PENDING};")

            return add
        form, width = ("add.v4.f32", 16) if kind == "v4" else ("add.f32", 4)
        value = "{{$r1}, {$r1}, {$r1}, {$r1}}" if kind == "v4" else "{$r1}"

        def add(region: Int64):
            for offset in range(0, REGION_BYTES, threads * width):
                place = f"[{{$r0}}+{offset}]"
                inline_ptx(
                    f"red.relaxed.gpu.global.{form} {place}, {value};",
                    read_only_args=[region + (thread * width).to(Int64), Float32(1)],
                )

        return add

    @cute.jit
    def ones(self, thread: Int32):
        """The address of 8 KB of ones in shared memory."""
        words = SmemAllocator().allocate_array(Float32, BULK_BYTES // 4, byte_alignment=128)
        for i in cutlass.range(thread, BULK_BYTES // 4, self.config.threads, unroll=1):
            (words + i).store(Float32(1))
        cute.arch.fence_proxy("async.shared", space="cta")
        cute.arch.sync_threads()
        return words.toint()


def launch(config: Sums, count: int, ctas: int) -> Timed:
    """``count`` turns of each CTA. The output is (CTAs, words)."""
    cycles = torch.zeros(ctas, dtype=torch.int64, device=device())
    sums = torch.zeros(ctas, REGION_BYTES // 4, device=device())
    seconds = run(config, count, cycles, sums)
    return Timed(cycles, sums, seconds)


def kinds(arch: SmArch) -> list[Sums]:
    """What is measured."""
    return [Sums(arch, kind) for kind in KINDS if arch.number >= 90 or kind == "f32"]


def measure(arch: SmArch) -> Iterator[Row]:
    sms = worlds.num_sms(torch.device(device()))
    for config in kinds(arch):
        ctas = sms * KINDS[config.kind][1]
        rows = []
        for row in repeat(NAME, config, _COUNTS, lambda n, c=config, g=ctas: launch(c, n, g), ctas=ctas):
            rows.append(row)
            yield row
        if rates := _rates(rows, config.kind):
            yield note(NAME, f"fp32 sums, {config.kind}: {median(rates):.2f} TB/s")


def _rates(rows: list[Row], kind: str) -> list[float]:
    """TB/s."""
    ctas = max((row["ctas"] for row in picked(rows, kernel=NAME, kind=kind)), default=0)
    return [ctas * REGION_BYTES / turn / 1e12 for turn in slopes(rows, "seconds", kernel=NAME, kind=kind)]


def constants(rows: list[Row]) -> dict[str, Measured]:
    return measured_each(l2_reductions=_rates(rows, "v4") or _rates(rows, "f32"))
