"""One tile of rows, a row being one query of one head, in the registers of one warp: scores, softmax, P·V."""

from typing import NamedTuple, Optional

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr

from cute_fa.device.dtypes import CUTE_DTYPE
from cute_fa.device.fragments import as_operand_a, rows_and_columns
from cute_fa.device.registers import narrow
from cute_fa.device.row_descales import ValueUnits, column_factors, scale_columns
from cute_fa.device.score import Score, apply_score, distances
from cute_fa.device.seqlen import SeqlenInfo
from cute_fa.device.softmax import HALF, MOST_IN_A_LOOP, WIDE, OnlineSoftmax, scale_row
from cute_fa.device.tree_mask import DraftWords, hide_drafts
from cute_fa.device.visibility import Window, mask_scores
from fa2_sm80.common.block_ring import BlockRing
from fa2_sm80.common.copies import FragmentLoader, SmemTile, lane_offset
from fa2_sm80.common.products import WarpPlace, WarpProduct, register_row
from fa2_sm80.common.warp_grid import WarpGrid
from fa2_sm80.split.codes import CodeLoader, output_columns
from fa2_sm80.split.config import WARP_ROWS, Fa2SplitConfig


class SplitTiles(NamedTuple):
    """Tiles of one CTA in shared memory, of codes with half as many columns of 16 bits; ``merge``, for the parts of O
    and their LSE, takes the place of all. ``factors`` (tile_m): what rows of Q are divided by, or None; ``descales``
    (tile_n, stages): of the keys' rows of K and of V, each or None."""

    q: SmemTile
    k: SmemTile
    v: SmemTile
    merge: cute.Pointer
    factors: Optional[cute.Tensor]
    descales: tuple[Optional[cute.Tensor], Optional[cute.Tensor]]


class RowTile:
    """The registers of one warp: 16 rows and its share of each key block."""

    def __init__(
        self,
        config: Fa2SplitConfig,
        smem: SplitTiles,
        info: SeqlenInfo,
        first_row: Int32,
        gqa_ratio: Int32,
        window: Window,
        score: Score,
    ):
        """``first_row``: of the tile; row r is query r // gqa_ratio of the group's head r % gqa_ratio."""
        c, dtype = config, CUTE_DTYPE[config.product_dtype]
        self.config, self.dtype, self.info, self.window, self.score = c, dtype, info, window, score
        keys = c.tile_n // c.key_warps
        self.place = WarpPlace(WarpGrid(c.row_warps, c.key_warps), WARP_ROWS, keys)
        self.scores = WarpProduct(dtype, WARP_ROWS, keys, c.head_dim_padded)
        self.output = WarpProduct(dtype, WARP_ROWS, c.head_dim_v_padded, keys)
        first_key = self.place.first_column
        self.load_q = FragmentLoader(smem.q, lane_offset(smem.q, rows_first=True), self.place.first_row)
        self.load_k = FragmentLoader(smem.k, lane_offset(smem.k, rows_first=False), first_key)
        self.load_v = FragmentLoader(smem.v, lane_offset(smem.v, rows_first=True), first_key, transpose=True)
        if const_expr(c.widens):
            self.load_k = CodeLoader(self.load_k, CUTE_DTYPE[c.dtype_k], c.shifted[0])
            self.load_v = CodeLoader(self.load_v, CUTE_DTYPE[c.dtype_v], c.shifted[1])
        self.acc = self.output.accumulator()
        exponents = HALF if const_expr(c.keeps_small_probabilities) else WIDE
        # elsewhere a loop costs ptxas no copies of O, and a branch predicates the products: 461 → 469 on sm_90a, one
        # token, 533 → 575 on sm_80 with 16 queries
        branches = c.head_dim_v_padded > MOST_IN_A_LOOP and c.arch.number >= 100
        self.softmax = OnlineSoftmax(2, score.scale_log2, exponents, row_wise=c.batch_invariant, branches=branches)
        self.factors: Optional[list[Float32]] = None  # of the scores of each row
        if const_expr(c.scales_rows):
            self.factors = [smem.factors[self.place.row + register_row(r)] for r in range(2)]
        self.k_descales, self.v_descales = smem.descales
        self.units: Optional[ValueUnits] = None  # of the output's rows
        if const_expr(c.v_row_descale):
            self.units = ValueUnits(2)
        self.rows = [first_row + self.place.row + register_row(r) for r in range(2)]
        self.queries = [row // gqa_ratio for row in self.rows]
        self.drafts: tuple[DraftWords, ...] = ()  # that each row sees, under a tree mask
        # coordinates of thread 0, every other thread's lie one constant offset away
        identity = cute.make_identity_tensor((WARP_ROWS, keys))
        self.columns = rows_and_columns(self.scores.mma.get_slice(0).partition_C(identity))

    @cute.jit
    def step(
        self,
        ring: BlockRing,
        iteration: Int32,
        right_edge: cutlass.Constexpr[bool],
        left_edge: cutlass.Constexpr[bool],
    ):
        """One key block: S = Q·Kᵀ, mask, softmax, O += P·V."""
        ring.wait(iteration)
        stage = ring.stage(iteration)
        acc = self.scores.accumulator()
        self.scores.add(acc, self.scores.from_smem(self.load_q, 0), self.load_k, stage, False)
        scores = rows_and_columns(acc)
        if const_expr(self.factors is not None):
            for r in cutlass.range_constexpr(2):
                scale_row(scores, r, self.factors[r])
        if const_expr(self.config.k_row_descale):
            scale_columns(scores, self.column_factors(self.k_descales, stage))
        first_key = ring.blocks.block(iteration, self.window) * self.config.tile_n + self.place.column
        diagonals = [self.info.seqlen_k - self.info.seqlen_q + query - first_key for query in self.queries]
        distance = distances(diagonals, self.columns) if const_expr(self.config.alibi) else None
        apply_score(self.score, scores, distance, self.config.batch_invariant)
        keys_left = self.info.seqlen_k - first_key
        mask_scores(scores, self.columns, diagonals, keys_left, self.window, first_key, right_edge, left_edge)
        if const_expr(self.config.tree_mask):
            hide_drafts(scores, self.columns, keys_left - self.info.seqlen_q, self.drafts)
        if const_expr(self.config.v_row_descale):
            factors = self.column_factors(self.v_descales, stage)
            self.units.grow(scores, rows_and_columns(self.acc), factors, True)
        self.softmax.update(scores, rows_and_columns(self.acc), True)
        if const_expr(self.config.v_row_descale):
            self.units.scale(scores, factors)
        p = cute.make_rmem_tensor_like(acc, self.dtype)
        narrow(acc, p)
        self.output.add(self.acc, self.output.from_registers(as_operand_a(p)), self.load_v, stage, True)
        ring.release(iteration)

    def column_factors(self, descales: cute.Tensor, stage: Int32) -> cute.Tensor:
        """The descales of the thread's columns of a block of keys."""
        return column_factors(descales[None, stage], self.columns, self.place.column)

    @cute.jit
    def to_smem(self, merge: cute.Pointer, offset_log2, value_scale: Optional[Float32]):
        """The warp's normalised O and its LSE, in natural logarithms, into its part of shared memory, fp32.
        ``value_scale``: factor of all values, or None."""
        c = self.config
        acc = rows_and_columns(self.acc)
        if const_expr(c.v_row_descale):
            self.units.leave(acc)
        lse = self.softmax.finalize(acc, offset_log2, None, value_scale)
        rows = self.place.first_column // (c.tile_n // c.key_warps) * c.tile_m + self.place.row
        out, lses = merged_parts(c, merge)
        lane = cute.arch.lane_idx()
        for r in cutlass.range_constexpr(2):
            row = rows + register_row(r)
            for column in cutlass.range_constexpr(0, cute.size(acc, mode=[1]), 2):
                if const_expr(c.widens):
                    places = output_columns(column // 2, lane)
                else:
                    first = column // 2 * 8 + lane % 4 * 2
                    places = [first, first + 1]
                out[row, places[0]] = acc[r, column]
                out[row, places[1]] = acc[r, column + 1]
            if lane % 4 == 0:
                lses[row] = lse[r]


def merged_parts(config: Fa2SplitConfig, merge: cute.Pointer) -> tuple[cute.Tensor, cute.Tensor]:
    """(O (parts · tile_m, head_dim_v), LSE (parts · tile_m)) of the warps that share rows, a part after the other."""
    c = config
    rows = c.key_warps * c.tile_m
    out = cute.make_tensor(merge, cute.make_ordered_layout((rows, c.head_dim_v_padded), order=(1, 0)))
    return out, cute.make_tensor(merge + rows * c.head_dim_v_padded, cute.make_layout(rows))
