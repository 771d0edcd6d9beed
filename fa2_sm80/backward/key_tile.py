"""One tile of keys in registers: Sᵀ, Pᵀ, dSᵀ of each step, and the sums dK and dV."""

from collections.abc import Callable
from typing import NamedTuple, Optional

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, Uint32, const_expr
from cutlass.cute.arch import inline_ptx

from cute_fa.device.arguments import CommonArguments
from cute_fa.device.dtypes import CUTE_DTYPE
from cute_fa.device.fragments import as_operand_a, rows_and_columns
from cute_fa.device.positions import distances_between, row_positions
from cute_fa.device.range_walk import BlockList, hidden_columns
from cute_fa.device.registers import narrow, opaque
from cute_fa.device.score import Score, probabilities, score_gradients
from cute_fa.device.seqlen import SeqlenInfo
from cute_fa.device.visibility import hidden_queries
from fa2_sm80.backward.config import Fa2BackwardConfig
from fa2_sm80.common.copies import ColumnPart, FragmentLoader, FragmentStore, SmemTile, lane_offset
from fa2_sm80.common.products import WarpPlace, WarpProduct, register_column, register_row


class BackwardTiles(NamedTuple):
    """All tiles of one CTA in shared memory. ``stats``: (LSE, D) of the queries of every stage, fp32; ``ds``: dSᵀ,
    ``p``: Pᵀ, None where they stay in registers."""

    k: SmemTile
    v: SmemTile
    q: SmemTile
    dout: SmemTile
    ds: Optional[SmemTile]
    p: Optional[SmemTile]
    stats: cute.Pointer


class KeyTile:
    """The registers of one tile of keys and what is done to them."""

    def __init__(
        self,
        config: Fa2BackwardConfig,
        smem: BackwardTiles,
        info: SeqlenInfo,
        n_start: Int32,
        common: CommonArguments,
    ):
        c, dtype = config, CUTE_DTYPE[config.dtype]
        self.config, self.dtype, self.smem = config, dtype, smem
        self.info, self.n_start, self.window = info, n_start, common.window

        rows, columns = c.tile_n // c.scores.rows, c.tile_m // c.scores.columns
        place = self.place = WarpPlace(c.scores, rows, columns)
        self.scores = WarpProduct(dtype, rows, columns, c.head_dim_padded)
        self.dprobabilities = WarpProduct(dtype, rows, columns, c.head_dim_v_padded)
        self.register_rows = rows // 8
        self.key_positions = None
        if c.k_positions:
            first_key = n_start + place.row
            keys = [register_row(r) for r in range(self.register_rows)]
            self.key_positions = row_positions(common.k_positions, first_key, keys)
            self.query_positions = common.q_positions
        first_query = place.first_column if const_expr(c.scores.columns > 1) else 0
        tiles = [tile for tile in smem[:-1] if tile is not None]
        row_lanes = {tile.panel: lane_offset(tile, rows_first=True) for tile in tiles}
        column_lanes = {tile.panel: lane_offset(tile, rows_first=False) for tile in tiles}
        self.load_k = FragmentLoader(smem.k, row_lanes[smem.k.panel], place.first_row)
        self.load_v = FragmentLoader(smem.v, row_lanes[smem.v.panel], place.first_row)
        self.load_q = FragmentLoader(smem.q, column_lanes[smem.q.panel], first_query)
        self.load_dout = FragmentLoader(smem.dout, column_lanes[smem.dout.panel], first_query)
        if const_expr(c.ds_in_smem):
            self.to_columns = FragmentStore(smem.ds, place.first_row, place.part)

        # dV = Pᵀ·dO and dK = dSᵀ·Q
        rows = c.tile_n // c.keys.rows
        columns_k, columns_v = c.head_dim_padded // c.keys.columns, c.head_dim_v_padded // c.keys.columns
        self.dk, self.dv = (WarpProduct(dtype, rows, columns, c.tile_m) for columns in (columns_k, columns_v))
        self.place_dk, self.place_dv = WarpPlace(c.keys, rows, columns_k), WarpPlace(c.keys, rows, columns_v)
        self.acc_dk, self.acc_dv = self.dk.accumulator(), self.dv.accumulator()
        self.load_q_rows = FragmentLoader(smem.q, row_lanes[smem.q.panel], Int32(0), True, self.place_dk.part)
        self.load_dout_rows = FragmentLoader(smem.dout, row_lanes[smem.dout.panel], Int32(0), True, self.place_dv.part)
        if const_expr(not c.p_in_registers):
            self.load_p = FragmentLoader(smem.p, row_lanes[smem.p.panel], self.place_dk.first_row)
            self.load_ds_rows = FragmentLoader(smem.ds, row_lanes[smem.ds.panel], self.place_dk.first_row)

        # dQ = dS·K
        if const_expr(not c.deterministic):
            rows, columns = c.tile_m // c.queries.rows, c.head_dim_padded // c.queries.columns
            depth = c.tile_n // c.queries.depth
            place = self.place_dq = WarpPlace(c.queries, rows, columns, depth)
            self.dq = WarpProduct(dtype, rows, columns, depth)
            rows_of_dq = ColumnPart(place.first_row, rows) if const_expr(c.queries.rows > 1) else None
            self.load_ds = FragmentLoader(smem.ds, column_lanes[smem.ds.panel], place.first_depth, True, rows_of_dq)
            self.load_k_rows = FragmentLoader(smem.k, row_lanes[smem.k.panel], place.first_depth, True, place.part)
            self.dq_address = cute.make_rmem_tensor(1, Int64)
        self.stats = opaque(smem.stats.toint() + self.place.column * 4)
        self.dslope = cute.make_rmem_tensor(1, Float32)
        self.dslope.fill(0.0)

    @cute.jit
    def step(
        self,
        m_start: Int32,
        stage: Int32,
        score: Score,
        masked: cutlass.Constexpr[bool],
        left_edge: cutlass.Constexpr[bool],
        bits: cutlass.Constexpr = None,
        dq_offset: Optional[Int64] = None,
    ):
        """One query block of one head. ``masked``: a key may lie beyond the sequence, or to the right of what a query
        sees; ``left_edge``: to the left, too. Under a range plan ``bits`` of :meth:`mask_rows` say what is hidden, and
        the block's dQ lies ``dq_offset`` bytes behind ``dq_address``."""
        c = self.config
        acc_s, acc_dp = self.scores.accumulator(), self.dprobabilities.accumulator()
        self.scores.add(acc_s, self.scores.from_smem(self.load_k, 0), self.load_q, stage, False)
        if const_expr(c.ranges):
            distance, hidden = self.listed_positions(m_start, bits)
        else:
            distance, hidden = self.positions(m_start, masked, left_edge)
        s = rows_and_columns(acc_s)
        derivatives = probabilities(score, s, self.statistics(stage, 0), distance, hidden)
        from_v = self.dprobabilities.from_smem(self.load_v, 0)
        self.dprobabilities.add(acc_dp, from_v, self.load_dout, stage, False)
        dslope = self.dslope if const_expr(c.slopes_gradient) else None
        score_gradients(s, rows_and_columns(acc_dp), self.statistics(stage, 1), derivatives, distance, dslope)
        p, ds = (cute.make_rmem_tensor_like(acc, self.dtype) for acc in (acc_s, acc_dp))
        narrow(acc_s, p)
        narrow(acc_dp, ds)
        if const_expr(c.ds_in_smem):
            self.to_columns.store(self.smem.ds, ds, anew=not c.p_in_registers)
        if const_expr(c.p_in_registers):
            p_rows, ds_rows = self.dv.from_registers(as_operand_a(p)), self.dk.from_registers(as_operand_a(ds))
        else:
            self.to_columns.store(self.smem.p, p, anew=True)
            p_rows, ds_rows = self.dv.from_smem(self.load_p, 0), self.dk.from_smem(self.load_ds_rows, 0)
        if const_expr(c.ds_in_smem):
            cute.arch.sync_threads()
        self.dv.add(self.acc_dv, p_rows, self.load_dout_rows, stage, True)
        self.dk.add(self.acc_dk, ds_rows, self.load_q_rows, stage, True)
        if const_expr(not c.deterministic):
            acc = self.dq.accumulator()
            self.dq.add(acc, self.dq.from_smem(self.load_ds, 0, transposed=True), self.load_k_rows, 0, True)
            address = self.dq_address[0] if const_expr(dq_offset is None) else self.dq_address[0] + dq_offset
            add_to_memory(acc, address, 32 * c.queries.rows * c.queries.columns)

    def positions(self, m_start: Int32, masked: bool, left_edge: bool):
        """|i + D − j| of a register (r, c) of Sᵀ, for ALiBi, and whether it is masked; None where not needed."""
        # i + D − j is diagonal + column − row
        first_key = self.n_start + self.place.row
        diagonal = self.info.seqlen_k - self.info.seqlen_q + m_start + self.place.column - first_key
        distance, hidden = None, None
        if const_expr(self.config.alibi):
            position = Float32(diagonal)

            def distance(r: int, c: int):
                return cute.math.absf(position + float(register_column(c) - register_row(r)))

        if const_expr(masked):
            window, seqlen_k, columns = self.window, self.info.seqlen_k, self.config.tile_m
            hidden_in_row = [
                hidden_queries(window, row - diagonal, first_key + row, seqlen_k, columns, left_edge)
                for row in map(register_row, range(self.register_rows))
            ]

            def hidden(r: int, c: int):
                return hidden_in_row[r](register_column(c))

        return distance, hidden

    def mask_rows(self, blocks: BlockList, iteration: Int32) -> list[cute.Tensor]:
        """The bits of a masked block of a range plan, for the thread's keys and its warp's queries."""
        c, place = self.config, self.place
        rows = [place.row + register_row(r) for r in range(self.register_rows)]
        part = (place.first_column, self.scores.columns) if c.scores.columns > 1 else ()
        return [blocks.mask_row(iteration, row, c.tile_n, c.tile_m, *part) for row in rows]

    def listed_positions(self, m_start: Int32, bits):
        """As :meth:`positions`, under a range plan: distances are |i − j|, or between given positions."""
        distance, hidden = None, None
        if self.key_positions is not None:
            columns = [register_column(c) for c in range(self.scores.columns // 4)]
            first_query = m_start + self.place.column
            distance = distances_between(self.key_positions, self.query_positions, first_query, columns)
        elif self.config.alibi:
            diagonal = Float32(m_start + self.place.column - (self.n_start + self.place.row))

            def distance(r: int, c: int):
                return cute.math.absf(diagonal + float(register_column(c) - register_row(r)))

        if bits is not None:
            hidden_in_row = [hidden_columns(of_row, self.place.column % 32) for of_row in bits]

            def hidden(r: int, c: int):
                return hidden_in_row[r](register_column(c))

        return distance, hidden

    def statistics(self, stage: Int32, which: int) -> Callable:
        """LSE (0) or D (1) of the query of register column c."""
        address = self.stats + stage * (8 * self.config.tile_m)
        values = []
        for block in range(self.scores.columns // 8):
            offset = which * 4 * self.config.tile_m + 32 * block
            values += inline_ptx(
                "ld.shared.v2.f32 {{$w0}, {$w1}}, [{$r0}+" + str(offset) + "];",
                write_only_types=[Float32] * 2,
                read_only_args=[address],
            )
        return lambda r, c: values[c]

    @cute.jit
    def to_smem(self, scale: Float32):
        """dK times ``scale``, and dV, in the input's dtype, over K and V, once all warps are done with these."""
        self.acc_dk.store(self.acc_dk.load() * scale)
        for acc, tile, place in (
            (self.acc_dk, self.smem.k, self.place_dk),
            (self.acc_dv, self.smem.v, self.place_dv),
        ):
            narrowed = cute.make_rmem_tensor_like(acc, self.dtype)
            narrow(acc, narrowed)
            FragmentStore(tile, place.first_row, place.part).store(tile, narrowed)


def add_to_memory(acc: cute.Tensor, address: Int64, threads: int):
    """Atomically add an accumulator's registers to fp32 in global memory: register e of thread t at e · threads + t, so
    that a warp's additions are one line of 128 bytes. Threads beyond begin anew: they add another part of the sum."""
    # the thread index is read here again, and unsigned: kept over the loop it would cost two registers
    address = address + Int64(Uint32(cute.arch.thread_idx()[0] % threads * 4))
    for e in range(cute.size(acc)):
        inline_ptx(
            f"red.relaxed.gpu.global.add.f32 [{{$r0}}+{e * threads * 4}], {{$r1}};",
            read_only_args=[address, acc[e]],
        )
