"""dQ alone, for deterministic gradients: one CTA a tile of queries of one head, walking over the key blocks.

S and dP are computed a second time, seven products instead of five, and nothing is added atomically. The alternatives
cost more memory or make CTAs wait for each other: one dQ buffer for each CTA that is running (FlashAttention-2), or
additions in turn (FlashAttention-3).
"""

from functools import partial
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr
from cutlass.memory import SmemAllocator

from cute_fa.device.arguments import CommonArguments
from cute_fa.device.backward_arguments import BackwardArguments
from cute_fa.device.block_range import BlockRange, block_range
from cute_fa.device.dtypes import CUTE_DTYPE
from cute_fa.device.fragments import as_operand_a, rows_and_columns
from cute_fa.device.heads import head_matrix
from cute_fa.device.positions import distances_between, row_positions
from cute_fa.device.range_walk import BlockList, RangeWalk, hidden_columns, poisoned
from cute_fa.device.registers import narrow
from cute_fa.device.score import Score, probabilities, score_gradients
from cute_fa.device.seqlen import SeqlenInfo
from cute_fa.device.visibility import Window, hidden_keys
from fa2_sm80.backward.config import Fa2BackwardConfig
from fa2_sm80.common.block_ring import BlockRing
from fa2_sm80.common.copies import (
    SMEM_ALIGNMENT,
    FragmentLoader,
    FragmentStore,
    SmemTile,
    TileLoader,
    lane_offset,
    store_tile,
)
from fa2_sm80.common.products import WarpPlace, WarpProduct, register_column, register_row
from fa2_sm80.common.walk import walk
from fa2_sm80.common.warp_grid import WarpGrid


class QueryGradientTiles(NamedTuple):
    """All tiles of one CTA in shared memory; dQ leaves over Q."""

    q: SmemTile
    dout: SmemTile
    k: SmemTile
    v: SmemTile


class TileRing(BlockRing):
    """K and V by whole tiles."""

    def __init__(
        self, stages: int, load_k: TileLoader, load_v: TileLoader, blocks: BlockRange, window: Window, seqlen_k: Int32
    ):
        super().__init__(stages, blocks, window, blocks.total)
        self.loads, self.seqlen_k, self.tile_n = (load_k.load, load_v.load), seqlen_k, load_k.smem.rows

    def load(self, block: Int32, stage: Int32, first: bool):
        """Only the first block can reach beyond the keys."""
        rows_left = self.seqlen_k - block * self.tile_n if first else None
        for load in self.loads:
            load(block, stage, rows_left)


class QueryGradientTile:
    """The registers of one tile of queries and what is done to them; a warp owns whole rows."""

    def __init__(
        self,
        config: Fa2BackwardConfig,
        smem: QueryGradientTiles,
        info: SeqlenInfo,
        m_start: Int32,
        common: CommonArguments,
        score: Score,
    ):
        c, tiles, dtype = config, config.query_kernel, CUTE_DTYPE[config.dtype]
        self.config, self.dtype, self.info, self.m_start = c, dtype, info, m_start
        self.window, self.score = common.window, score
        rows = tiles.tile_m // tiles.num_warps
        self.place = WarpPlace(WarpGrid(tiles.num_warps), rows, 0)
        self.scores = WarpProduct(dtype, rows, tiles.tile_n, c.head_dim_padded)
        self.dprobabilities = WarpProduct(dtype, rows, tiles.tile_n, c.head_dim_v_padded)
        self.dq = WarpProduct(dtype, rows, c.head_dim_padded, tiles.tile_n)
        row_lanes = {tile.panel: lane_offset(tile, rows_first=True) for tile in (smem.q, smem.v)}
        column_lanes = {tile.panel: lane_offset(tile, rows_first=False) for tile in (smem.q, smem.v)}
        self.load_q = FragmentLoader(smem.q, row_lanes[smem.q.panel], self.place.first_row)
        self.load_dout = FragmentLoader(smem.dout, row_lanes[smem.v.panel], self.place.first_row)
        self.load_k = FragmentLoader(smem.k, column_lanes[smem.q.panel], Int32(0))
        self.load_v = FragmentLoader(smem.v, column_lanes[smem.v.panel], Int32(0))
        self.load_k_rows = FragmentLoader(smem.k, row_lanes[smem.q.panel], Int32(0), True)
        self.acc = self.dq.accumulator()
        self.rows = tiles.rows_per_thread
        self.lse_log2 = cute.make_rmem_tensor(self.rows, Float32)
        self.delta = cute.make_rmem_tensor(self.rows, Float32)
        self.query_positions = None
        if c.q_positions:
            queries = [register_row(r) for r in range(self.rows)]
            self.query_positions = row_positions(common.q_positions, m_start + self.place.row, queries)
            self.key_positions = common.k_positions

    @cute.jit
    def load_statistics(self, stats: cute.Tensor, first_tile: Int32, head: Int32):
        """LSE and D of this thread's rows, from ``stats`` (tiles, heads, 2 · tile_m)."""
        tile_m = self.config.tile_m
        for r in cutlass.range_constexpr(self.rows):
            row = self.m_start + self.place.row + register_row(r)
            lse, delta = Float32.inf, Float32(0.0)
            if row < self.info.seqlen_q:
                tile, inside = first_tile + row // tile_m, row % tile_m
                lse, delta = stats[tile, head, inside], stats[tile, head, tile_m + inside]
            self.lse_log2[r], self.delta[r] = lse, delta

    @cute.jit
    def step(
        self,
        ring: TileRing,
        iteration: Int32,
        right_edge: cutlass.Constexpr[bool],
        left_edge: cutlass.Constexpr[bool],
    ):
        """One key block: dQ += dS·K."""
        ring.wait(iteration)
        block, stage = ring.blocks.block(iteration, ring.window), ring.stage(iteration)
        acc_s, acc_dp = self.scores.accumulator(), self.dprobabilities.accumulator()
        self.scores.add(acc_s, self.scores.from_smem(self.load_q, 0), self.load_k, stage, False)
        n_start = block * self.config.query_kernel.tile_n
        if const_expr(self.config.ranges):
            distance, hidden = self.listed_positions(ring.blocks, iteration, n_start, right_edge)
        else:
            distance, hidden = self.positions(n_start, right_edge, left_edge)
        s = rows_and_columns(acc_s)
        derivatives = probabilities(self.score, s, lambda r, c: self.lse_log2[r], distance, hidden)
        from_dout = self.dprobabilities.from_smem(self.load_dout, 0)
        self.dprobabilities.add(acc_dp, from_dout, self.load_v, stage, False)
        score_gradients(s, rows_and_columns(acc_dp), lambda r, c: self.delta[r], derivatives, distance, None)
        ds = cute.make_rmem_tensor_like(acc_dp, self.dtype)
        narrow(acc_dp, ds)
        self.dq.add(self.acc, self.dq.from_registers(as_operand_a(ds)), self.load_k_rows, stage, True)
        ring.release(iteration)

    def positions(self, n_start: Int32, right_edge: bool, left_edge: bool):
        """|i + D − j| of a register (r, c), for ALiBi, and whether it is masked; None where not needed."""
        # i + D − j is diagonal + row − column
        first_key = n_start + self.place.column
        diagonal = self.info.seqlen_k - self.info.seqlen_q + self.m_start + self.place.row - first_key
        distance, hidden = None, None
        if const_expr(self.config.alibi):
            position = Float32(diagonal)

            def distance(r: int, c: int):
                return cute.math.absf(position + float(register_row(r) - register_column(c)))

        if const_expr(right_edge or left_edge):
            keys_left = self.info.seqlen_k - first_key
            hidden_in_row = [
                hidden_keys(self.window, diagonal + register_row(r), first_key, keys_left, left_edge)
                for r in range(self.rows)
            ]

            def hidden(r: int, c: int):
                return hidden_in_row[r](register_column(c))

        return distance, hidden

    def listed_positions(self, blocks: BlockList, iteration: Int32, n_start: Int32, masked: bool):
        """As :meth:`positions`, under a range plan: distances are |i − j|, or between given positions."""
        tiles = self.config.query_kernel
        distance, hidden = None, None
        if self.query_positions is not None:
            columns = [register_column(c) for c in range(tiles.tile_n // 4)]
            first_key = n_start + self.place.column
            distance = distances_between(self.query_positions, self.key_positions, first_key, columns)
        elif self.config.alibi:
            diagonal = Float32(self.m_start + self.place.row - (n_start + self.place.column))

            def distance(r: int, c: int):
                return cute.math.absf(diagonal + float(register_row(r) - register_column(c)))

        if masked:
            rows = [self.place.row + register_row(r) for r in range(self.rows)]
            bits = [blocks.mask_row(iteration, row, tiles.tile_m, tiles.tile_n) for row in rows]
            hidden_in_row = [hidden_columns(of_row, self.place.column) for of_row in bits]

            def hidden(r: int, c: int):
                return hidden_in_row[r](register_column(c))

        return distance, hidden


class QueryGradientKernel:
    """Device code of the dQ kernel of one :class:`Fa2BackwardConfig`."""

    def __init__(self, config: Fa2BackwardConfig):
        self.config, self.tiles = config, config.query_kernel
        self.dtype = CUTE_DTYPE[config.dtype]

    @cute.kernel
    def kernel(self, args: BackwardArguments):
        c, tiles = self.config, self.tiles
        tidx, _, _ = cute.arch.thread_idx()
        m_block, head, batch = self.tile(args)
        info = args.common.info(batch)
        m_start = m_block * tiles.tile_m
        if m_start < info.rows_q:
            blocks = self.blocks(args, info, m_block)
            head_kv = head // (args.common.q.shape[-2] // args.common.k.shape[-2])
            q = head_matrix(args.common.q, head, batch, info.offset_q, c.cu_seqlens_q)
            dout = head_matrix(args.dout, head, batch, info.offset_q, c.cu_seqlens_q)
            k = head_matrix(args.common.k, head_kv, batch, info.offset_k, c.cu_seqlens_k)
            v = head_matrix(args.common.v, head_kv, batch, info.offset_k, c.cu_seqlens_k)
            smem = self.smem_tiles()
            rows_left = info.seqlen_q - m_start
            load_q = TileLoader(q, smem.q, c.head_dim, tidx, tiles.num_threads).load
            load_dout = TileLoader(dout, smem.dout, c.head_dim_v, tidx, tiles.num_threads).load
            if blocks.total > 0:
                load_q(m_block, 0, rows_left)
                load_dout(m_block, 0, rows_left)
            load_k = TileLoader(k, smem.k, c.head_dim, tidx, tiles.num_threads, c.ranges)
            load_v = TileLoader(v, smem.v, c.head_dim_v, tidx, tiles.num_threads, c.ranges)
            ring = TileRing(tiles.stages, load_k, load_v, blocks, args.common.window, info.seqlen_k)
            ring.prologue(Int32(0))
            slopes = (args.common.alibi_slopes[batch, head],) * tiles.rows_per_thread if const_expr(c.alibi) else None
            score = Score.of(args.common.softmax_scale, args.common.softcap, slopes)
            tile = QueryGradientTile(c, smem, info, m_start, args.common, score)
            if const_expr(c.ranges):
                tile.acc.fill(poisoned(blocks))
            tile.load_statistics(args.scratch.stats, args.first_tile(info, batch, c.tile_m), head)
            walk(blocks.ranges(c.window_left), partial(tile.step, ring))

            m_block, head, batch = self.tile(args)
            info = args.common.info(batch)
            tile.acc.store(tile.acc.load() * score.gradient_scale)
            narrowed = cute.make_rmem_tensor_like(tile.acc, self.dtype)
            narrow(tile.acc, narrowed)
            # a warp's rows of dQ take the place of the rows of Q that it alone has read
            FragmentStore(smem.q, tile.place.first_row).store(smem.q, narrowed)
            cute.arch.sync_threads()
            dq = head_matrix(args.dq, head, batch, info.offset_q, c.cu_seqlens_q)
            store_tile(smem.q, dq, m_block, info.rows_q - m_block * tiles.tile_m, c.head_dim, tidx, tiles.num_threads)

    def blocks(self, args: BackwardArguments, info: SeqlenInfo, m_block: Int32) -> BlockRange | BlockList:
        """The key blocks of a tile of queries."""
        tiles = self.tiles
        if const_expr(self.config.ranges):
            return RangeWalk.of(args.dq_walk, args.seqlen_q, tiles.tile_m).blocks(m_block)
        m_start = m_block * tiles.tile_m
        return block_range(args.common.window, info.seqlen_q, info.seqlen_k, m_start, tiles.tile_m, tiles.tile_n)

    def smem_tiles(self) -> QueryGradientTiles:
        c, tiles, allocator = self.config, self.tiles, SmemAllocator()

        def allocate(rows: int, columns: int, stages: int = 1) -> SmemTile:
            layout = cute.make_layout(stages * rows * columns)
            return SmemTile(allocator.allocate_tensor(self.dtype, layout, SMEM_ALIGNMENT).iterator, rows, columns)

        return QueryGradientTiles(
            q=allocate(tiles.tile_m, c.head_dim_padded),
            dout=allocate(tiles.tile_m, c.head_dim_v_padded),
            k=allocate(tiles.tile_n, c.head_dim_padded, tiles.stages),
            v=allocate(tiles.tile_n, c.head_dim_v_padded, tiles.stages),
        )

    @cute.jit
    def tile(self, args: BackwardArguments):
        """(m_block, head, batch) of this CTA, as the forward orders them."""
        index, _, _ = cute.arch.block_idx()
        m_blocks, heads = args.m_blocks(self.tiles.tile_m), args.common.q.shape[-2]
        m_block = index % m_blocks
        if const_expr(self.config.window_right):
            m_block = m_blocks - 1 - m_block
        if const_expr(self.config.ranges):
            m_block = RangeWalk.of(args.dq_walk, args.seqlen_q, self.tiles.tile_m).tile(m_block)
            return m_block, index // m_blocks, Int32(0)
        return m_block, index // m_blocks % heads, index // m_blocks // heads
