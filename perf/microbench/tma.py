"""TMA loads: a warp keeps a ring of boxes in flight and does nothing with them.

One box at a time on one SM takes a latency and the time of its bytes: ``tma_latency`` is what is left of the time at no
bytes, without what the waiting warp takes to wake (:mod:`perf.microbench.barriers`) and ``tma_setup``, which no kernel
tells from it. Four boxes of 32 KB: ``tma_bytes``; four of 8 KB by each of four warps, in pieces of 1 KB:
``tma_interval``. From all SMs, by events: ``l2`` out of 16 MB, with and without multicast, ``hbm`` out of 1 GB.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
import torch
from cutlass import BFloat16, Boolean, Float32, Int16, Int32, Int64, const_expr
from cutlass.cute.arch import inline_ptx
from cutlass.cute.nvgpu import cpasync
from cutlass.memory import SmemAllocator

from cute_fa.device.fake_arguments import fake_tensor, fake_vector
from cute_fa.device.tma_boxes import TmaTensor, swizzle_atom
from cute_fa.engine import worlds
from cute_fa.semantics.types import SmArch
from perf.microbench import barriers
from perf.microbench.benchmark import (
    WARP,
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

NAME = "tma"
ROW_BYTES = 128
COLUMNS = ROW_BYTES // 2  # of a box, in bf16
SETUP = 100  # tma_setup of the packaged GPUs
L2_BYTES, HBM_BYTES = 2**24, 2**30
# Turns of a ring of four, and as many boxes of others, on one SM and on all.
_COUNTS, _LONG_COUNTS = (16, 80), (64, 640)
_SIZES = (8 * 1024, 16 * 1024, 32 * 1024)
PIECES = (8 * 1024, 4, False, 8, 4)


@dataclass(frozen=True)
class Loads(TimedKernel):
    """``boxes`` of ``box_bytes`` are in flight of each of ``warps``, each loaded by ``pieces`` instructions.
    ``multicast``: in clusters of two each CTA loads half of a box for both, with a box less in flight."""

    box_bytes: int
    boxes: int
    multicast: bool = False
    pieces: int = 1
    warps: int = 1

    @property
    def cluster(self) -> int:
        return 2 if self.multicast else 1

    @property
    def rows(self) -> int:
        """Of what one instruction loads."""
        return self.box_bytes // ROW_BYTES // self.cluster // self.pieces

    def build(self):
        stream = cute.runtime.make_fake_stream(use_tvm_ffi_env_stream=True)
        buffer = fake_tensor(BFloat16, cute.sym_int(), COLUMNS, aligned=8)
        arguments = Arguments(Int32(0), fake_vector(Int64, 2), buffer, fake_vector(Float32, 2), Int32(0))
        return LoadsKernel(self), (arguments, stream)


class Arguments(NamedTuple):
    """``buffer`` (rows, 64): a power of 2 of boxes. ``sums`` (CTAs, threads): of what each finds in its warp's ring in
    the end."""

    count: Int32
    cycles: cute.Tensor
    buffer: cute.Tensor
    sums: cute.Tensor
    ctas: Int32


class LoadsKernel:
    """Device code of :class:`Loads`."""

    def __init__(self, config: Loads):
        self.config = config

    @cute.jit
    def __call__(self, args: Arguments, stream):
        c = self.config
        op = cpasync.CopyBulkTensorTileG2SMulticastOp() if c.multicast else cpasync.CopyBulkTensorTileG2SOp()
        box = cute.make_composed_layout(
            swizzle_atom(BFloat16, COLUMNS).inner, 0, cute.make_layout((c.rows, COLUMNS), stride=(COLUMNS, 1))
        )
        atom, coordinates = cpasync.make_tiled_tma_atom(op, args.buffer, box, (c.rows, COLUMNS))
        tma = TmaTensor(atom, coordinates)
        self.kernel(args, tma).launch(
            grid=(args.ctas, 1, 1),
            block=(WARP * c.warps, 1, 1),
            cluster=(2, 1, 1) if c.multicast else None,
            smem=c.warps * c.boxes * c.box_bytes + 2048,
            stream=stream,
        )

    @cute.kernel
    def kernel(self, args: Arguments, tma: TmaTensor):
        c = self.config
        thread, _, _ = cute.arch.thread_idx()
        cta, _, _ = cute.arch.block_idx()
        allocator = SmemAllocator()
        warp, lane = cute.arch.make_warp_uniform(thread // WARP), thread % WARP
        elements = c.boxes * c.box_bytes // 2
        ring = allocator.allocate_tensor(BFloat16, cute.make_layout(c.warps * elements), 1024).iterator
        barriers = allocator.allocate_array(Int64, 2 * c.boxes * c.warps)
        self.initialize(barriers)
        ring, full = ring + warp * elements, barriers + warp * c.boxes
        empty = full + c.warps * c.boxes
        issue, release = self.steps(tma, ring, full, empty, cta % c.cluster, lane == 0)
        box, step = cta // c.cluster * c.warps + warp, args.ctas // c.cluster * c.warps
        boxes = args.buffer.shape[0] // (c.box_bytes // ROW_BYTES)
        first = c.boxes - (1 if c.multicast else 0)
        for stage in cutlass.range_constexpr(first):
            issue(stage, box)
            box = (box + step) & (boxes - 1)
        phase = Int32(0)
        begin = cute.arch.clock64()
        for _ in cutlass.range(args.count, unroll=1):
            for stage in cutlass.range_constexpr(c.boxes):
                cute.arch.mbarrier_wait(full + stage, phase)
                target = stage
                if const_expr(c.multicast):
                    # the stage before: its release by the other CTA has had time to come
                    release(stage)
                    target = (stage - 1) % c.boxes
                    cute.arch.mbarrier_wait(empty + target, phase ^ (1 if stage == 0 else 0))
                issue(target, box)
                box = (box + step) & (boxes - 1)
            phase ^= 1
        end = cute.arch.clock64()
        for stage in cutlass.range_constexpr(first):
            cute.arch.mbarrier_wait(full + stage, phase)
        total = Float32(0)
        found = cute.make_tensor(ring, cute.make_layout(elements))
        for i in cutlass.range(lane, elements, WARP, unroll=1):
            total += found[i].to(Float32)
        args.sums[cta, thread] = total
        if const_expr(c.multicast):
            cute.arch.cluster_arrive()
            cute.arch.cluster_wait()
        cycles = args.cycles
        if lane == 0:
            cycles[cta, warp] = end - begin

    @cute.jit
    def initialize(self, barriers: cute.Pointer):
        """The mbarriers of full stages of all warps, then those of empty ones."""
        c = self.config
        half = c.warps * c.boxes
        if cute.arch.thread_idx()[0] == 0:
            for i in cutlass.range_constexpr(2 * half):
                cute.arch.mbarrier_init(barriers + i, 1 if i < half else c.cluster)
        cute.arch.mbarrier_init_fence()
        if const_expr(c.multicast):
            cute.arch.cluster_arrive()
            cute.arch.cluster_wait()
        cute.arch.sync_threads()

    def steps(self, tma: TmaTensor, ring, full: cute.Pointer, empty: cute.Pointer, rank: Int32, leader: Boolean):
        """How a box is loaded into a stage, and how a stage is released in all CTAs."""
        c = self.config
        swizzle, layout = (
            swizzle_atom(BFloat16, COLUMNS).inner,
            cute.make_layout((c.rows, COLUMNS), stride=(COLUMNS, 1)),
        )
        parts = c.cluster * c.pieces  # of a box

        def issue(stage: int, box: Int32):
            inline_ptx(
                "mbarrier.arrive.expect_tx.shared.b64 _, [{$r0}], {$r1};",
                read_only_args=[(full + stage).toint(), Int32(c.box_bytes)],
                predicate=leader,
            )
            for piece in range(c.pieces):
                part = rank * c.pieces + piece
                pointer = ring + stage * (c.box_bytes // 2) + part * (c.rows * COLUMNS)
                target = cute.make_tensor(cute.recast_ptr(pointer, swizzle, dtype=BFloat16), layout)
                source = cute.local_tile(tma.coordinates, (c.rows, COLUMNS), (box * parts + part, 0))
                target, source = cpasync.tma_partition(
                    tma.atom, 0, cute.make_layout(1), cute.group_modes(target, 0, 2), cute.group_modes(source, 0, 2)
                )
                mask = {"mcast_mask": Int16(3)} if c.multicast else {}
                cute.copy(tma.atom, source, target, tma_bar_ptr=full + stage, **mask)

        def release(stage: int):
            for other in range(c.cluster):
                address = inline_ptx(
                    "mapa.shared::cluster.u32 {$w0}, {$r0}, {$r1};",
                    write_only_types=[Int32],
                    read_only_args=[(empty + stage).toint(), Int32(other)],
                )
                inline_ptx(
                    "mbarrier.arrive.shared::cluster.b64 _, [{$r0}];", read_only_args=[address], predicate=leader
                )

        return issue, release


def launch(config: Loads, count: int, ctas: int, buffer: torch.Tensor) -> Timed:
    """``count`` turns of the ring in each of ``ctas`` CTAs over a bf16 buffer (rows, 64) of a power of 2 of boxes."""
    cycles = torch.zeros(ctas, config.warps, dtype=torch.int64, device=buffer.device)
    sums = torch.zeros(ctas, WARP * config.warps, device=buffer.device)
    seconds = run(config, count, cycles, buffer, sums, ctas)
    return Timed(cycles, sums, seconds)


def runs(arch: SmArch, sms: int) -> list[tuple[Loads, int, int]]:
    """What is measured: the kernel, how many CTAs, bytes of the buffer."""
    alone = [Loads(arch, size, boxes) for size in _SIZES for boxes in (1, 2, 3, 4)] + [Loads(arch, *PIECES)]
    together = [Loads(arch, size, 4, multicast) for multicast in (False, True) for size in _SIZES]
    ctas = sms // 2 * 2
    found = [(loads, 1, L2_BYTES) for loads in alone] + [(loads, ctas, L2_BYTES) for loads in together]
    found += [(loads, 2, L2_BYTES) for loads in together if loads.multicast]
    return [*found, (Loads(arch, _SIZES[-1], 4), ctas, HBM_BYTES)]


def measure(arch: SmArch) -> Iterator[Row]:
    at = device()
    buffers = {
        size: torch.ones(size // ROW_BYTES, COLUMNS, dtype=torch.bfloat16, device=at) for size in (L2_BYTES, HBM_BYTES)
    }
    for loads, ctas, size in runs(arch, worlds.num_sms(torch.device(at))):
        counts = tuple(count * 4 // loads.boxes for count in (_COUNTS if ctas <= 2 else _LONG_COUNTS))
        more = {"ctas": ctas, "buffer": size}
        rows = []
        for row in repeat(NAME, loads, counts, lambda n, c=loads, s=ctas, b=size: launch(c, n, s, buffers[b]), **more):
            rows.append(row)
            yield row
        if ctas > 2 and (turns := slopes(rows, "seconds")):
            rate = ctas * loads.boxes * loads.box_bytes / median(turns) / 1e12
            how = "multicast to two" if loads.multicast else "each for itself"
            yield note(NAME, f"TMA, boxes of {loads.box_bytes} out of {size} bytes, {how}: {rate:.2f} TB/s arrive")


def constants(rows: list[Row]) -> dict[str, Measured]:
    def box(figure: str, kilobytes: int, boxes: int, pieces: int = 1, **more) -> list[float]:
        conditions = {"box_bytes": kilobytes * 1024, "boxes": boxes, "multicast": False, "pieces": pieces, **more}
        return [value / boxes for value in slopes(rows, figure, kernel=NAME, **conditions)]

    def rate(buffer: int) -> list[float]:
        """TB/s of all SMs."""
        ctas = max((row["ctas"] for row in picked(rows, kernel=NAME)), default=0)
        seconds = box("seconds", 32, 4, ctas=ctas, buffer=buffer)
        return [ctas * 32 * 1024 / each_box / 1e12 for each_box in seconds]

    def latency(small: float, large: float, wake: float) -> float:
        """Of no bytes: 8 KB take a third of the difference to 32 KB."""
        return small - (large - small) / 3 - SETUP - wake

    wakes = barriers.constants(rows).get("wake")
    small, large = (box("cycles", size, 1, ctas=1) for size in (8, 32))
    return measured_each(
        tma_latency=each(latency, small, large, [wakes.value] * len(small)) if wakes else [],
        tma_bytes=[32 * 1024 / cycles for cycles in box("cycles", 32, 4, ctas=1)],
        tma_interval=[cycles / (8 * 4) for cycles in box("cycles", 8, 4, pieces=8)],  # of four warps
        l2=rate(L2_BYTES),
        hbm=rate(HBM_BYTES),
    )
