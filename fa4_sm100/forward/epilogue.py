"""The epilogue's warpgroup: O out of tensor memory, normalised, through shared memory by TMA, and LSE."""

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, Uint32, const_expr
from cutlass.cute.arch import inline_ptx

from cute_fa.device import tensor_memory
from cute_fa.device.dtypes import CUTE_DTYPE
from cute_fa.device.forward_arguments import Boxes
from cute_fa.device.registers import narrow_pair
from cute_fa.device.ring import RingState, ring_next, ring_start
from cute_fa.device.score import Score
from cute_fa.device.softmax import normalisation
from cute_fa.device.tile_work import TileWork, kv_head
from cute_fa.device.tma_boxes import BoxCopy, panel_bytes
from cute_fa.device.unseen_tiles import write_unseen_tiles
from fa4_sm100.forward.config import TILE_M, WARPGROUP
from fa4_sm100.forward.cta import Cta
from fa4_sm100.forward.row import Row

BARRIER = 1  # named barrier of the warpgroup
CHUNK = 16  # bytes that a thread stores at once, and the unit of swizzles


class Epilogue:
    """Four warps, a row of a tile a thread. The store runs on behind the next tile."""

    def __init__(self, cta: Cta, thread: Int32):
        """``thread``: which of the 128."""
        self.cta, self.config, self.common, self.tma = cta, cta.config, cta.common, cta.tma
        self.storage, self.rings, self.thread = cta.storage, cta.rings, thread
        self.tensor = tensor_memory.own_lanes(cta.tensor, cute.arch.make_warp_uniform(thread // 32))
        self.row = Row(cta.config, thread)
        self.boxes, self.dtype = Boxes.of(cta.config), CUTE_DTYPE[cta.config.out_dtype]

    @cute.jit
    def run(self):
        """Walk over the CTA's tiles."""
        config, make_work, store_tile, scheduler = self.config, self.cta.work, self.store_tile, self.cta.scheduler()
        valid, tile, advance = scheduler.valid, scheduler.tile, scheduler.next
        rows = ring_start()
        state = scheduler.first()
        while valid(state):
            work = make_work(tile(state))
            for q_tile in cutlass.range_constexpr(config.q_tiles):
                store_tile(q_tile, work, rows.phase)
            rows = ring_next(rows, 1)
            state = advance(state)
        if const_expr(config.own_output):  # shared memory must outlive the stores that read it
            cute.arch.cp_async_bulk_wait_group(0, read=True)
        if const_expr(config.ranges):
            write_unseen_tiles(self.common, config, self.thread, WARPGROUP)

    @cute.jit
    def store_tile(self, q_tile: cutlass.Constexpr[int], work: TileWork, phase: Int32):
        """O and LSE of a tile's rows."""
        c, rings, to_smem, to_global = self.config, self.rings, self.to_smem, self.to_global
        first_token = self.cta.first_token(work, q_tile)
        place = RingState(Int32(q_tile), phase)
        rings["stats"].wait(place)
        slots = self.storage.stats + (2 * q_tile * TILE_M + self.thread)
        stats = cute.make_tensor(slots, cute.make_layout(2, stride=TILE_M))
        total, reference = stats[0], stats[1]
        rings["stats"].release(place.stage)
        factor, lse = self.normalisation(total, reference, work)
        counts = first_token + self.row.token < work.info.seqlen_q
        self.store_lse(lse if counts else -Float32.inf, work, first_token)

        rings["o"].wait(place)
        tensor_memory.after_sync()
        for first in cutlass.range_constexpr(0, c.head_dim_v_padded, c.output_columns):
            self.wait_for_memory()
            columns = min(c.output_columns, c.head_dim_v_padded - first)
            to_smem(q_tile, first, columns, factor, counts)
            if const_expr(first + columns == c.head_dim_v_padded):
                tensor_memory.before_sync()
                rings["o"].release(place.stage)
            cute.arch.fence_proxy("async.shared", space="cta")
            self.sync()
            if self.thread < 32 and first_token < work.info.rows_q:
                to_global(q_tile, first, columns, work, first_token)
        if const_expr(not c.own_output):
            if self.thread < 32:
                cute.arch.cp_async_bulk_wait_group(0, read=True)
                rings[f"q{q_tile}"].release(Int32(0))

    def normalisation(self, total: Float32, reference: Float32, work: TileWork):
        """Factor of the row's O, and its LSE."""
        c, common = self.config, self.common
        head = kv_head(common, c.pack_gqa, work.tile.head)
        offset = Score.of(common.softmax_scale, common.softcap).offset_log2
        sink = self.row.per_head(common.learnable_sink, work.tile.head * c.pack_gqa)
        value_scale = common.descales.of_values(work.tile.batch, head)
        return normalisation(total, reference, Float32(0.0) if offset is None else offset, sink, value_scale)

    @cute.jit
    def store_lse(self, lse: Float32, work: TileWork, first_token: Int32):
        """Of the thread's row; rows that do not count get −inf."""
        target, info = self.common.lse, work.info
        token = first_token + self.row.token
        head = work.tile.head * self.config.pack_gqa + self.row.head
        if self.row.exists() and token < info.rows_q:
            if const_expr(self.config.cu_seqlens_q):
                target[head, info.offset_q + token] = lse
            else:
                target[work.tile.batch, head, token] = lse

    def wait_for_memory(self):
        """Until the store before has read the memory that the next one needs."""
        if const_expr(self.config.own_output or self.config.head_dim_v_padded > self.config.output_columns):
            cute.arch.cp_async_bulk_wait_group(0, read=True)
            self.sync()

    def to_smem(self, q_tile: int, first: int, columns: int, factor: Float32, counts: Boolean):
        """``columns`` of O from column ``first`` on, in the output's dtype; rows that do not count become 0."""
        c = self.config
        width = panel_bytes(c.head_dim_v_padded * c.out_dtype.bytes)
        row = self.storage.out[q_tile].toint() + self.thread * width
        swizzle = (self.thread * width // 128) % (width // CHUNK) * CHUNK
        source = self.tensor + c.output_column + q_tile * c.head_dim_v_padded + first
        step = 32 if columns % 32 == 0 else 16
        for column in range(0, columns, step):
            values = tensor_memory.load(source + column, step)
            tensor_memory.wait_loads()
            values = [cutlass.select_(counts, value * factor, Float32(0.0)) for value in values]
            words = [narrow_pair(values[i], values[i + 1], self.dtype) for i in range(0, step, 2)]
            for chunk in range(0, step // 2, 4):
                panel, byte = divmod((column + 2 * chunk) * c.out_dtype.bytes, width)
                _store(row + panel * TILE_M * width + (byte ^ swizzle), words[chunk : chunk + 4])

    def to_global(self, q_tile: int, first: int, columns: int, work: TileWork, first_token: Int32):
        """Start the store, by one warp."""
        c, box = self.config, self.boxes.out
        outer = () if c.cu_seqlens_q else (work.tile.batch,)
        copy = BoxCopy(self.tma.out, box, TILE_M, work.tile.head * c.pack_gqa, outer, columns // box.columns)
        with cute.arch.elect_one():
            row, rows_left = work.info.offset_q + first_token, work.info.rows_q - first_token
            copy.store(self.storage.out[q_tile], row, rows_left, first // box.columns)
            cute.arch.cp_async_bulk_commit_group()

    def sync(self):
        """Among the warpgroup's threads."""
        cute.arch.barrier(barrier_id=BARRIER, number_of_threads=WARPGROUP)


def _store(address: Int32, words: list[Uint32]):
    """16 bytes to shared memory."""
    inline_ptx("st.shared.v4.b32 [{$r0}], {{$r1}, {$r2}, {$r3}, {$r4}};", read_only_args=[address, *words])
