"""A consumer warpgroup: 64 keys of the tile, all steps over the queries."""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Uint32, const_expr
from cutlass.cute.arch import inline_ptx
from cutlass.cute.nvgpu import warpgroup

from cute_fa.device.backward_arguments import BackwardArguments
from cute_fa.device.dtypes import CUTE_DTYPE
from cute_fa.device.fragments import as_warpgroup_operand_a
from cute_fa.device.registers import narrow
from cute_fa.device.ring import Ring, RingState, ring_next, ring_start
from cute_fa.device.score import Score
from fa3_sm90.backward.config import CONSUMERS, Fa3BackwardConfig
from fa3_sm90.backward.products import Products
from fa3_sm90.backward.query_sums import QuerySumsWriter
from fa3_sm90.backward.storage import Storage
from fa3_sm90.backward.walk import QueryWalk, part
from fa3_sm90.backward.work import KeyWork
from fa3_sm90.common.wgmma import WARPGROUP, WGMMA_M

CONSUMER_BARRIER = 1
PANEL_BYTES = 128


class Consumer(QueryWalk):
    """Products are issued as soon as their operands are there, so that the tensor cores have work while a warpgroup is
    at its exponentials and gradients: S and dP; dV, beside which dSᵀ is handed on; dQ and dK, beside which dQ is handed
    on. dSᵀ, which all warpgroups' dQ needs, is the one thing that they exchange: a barrier a step.
    """

    def __init__(
        self,
        config: Fa3BackwardConfig,
        args: BackwardArguments,
        storage: Storage,
        rings: dict[str, Ring],
        sums: QuerySumsWriter,
        index: Int32,
        thread: Int32,
    ):
        """``index``: of the warpgroup; ``thread``: within it."""
        super().__init__(config, args, storage, index * WGMMA_M, thread)
        c, self.index, self.rings, self.sums = config, index, rings, sums
        self.products = Products(c, storage, index)
        self.dtype = CUTE_DTYPE[c.dtype]
        self.dslope = cute.make_rmem_tensor(1, Float32)
        # stmatrix: a lane's row and 16 bytes of it, in a panel of 64 queries with a swizzle of 128 bytes
        row, half = index * WGMMA_M + thread // 32 * 16 + thread % 16, thread % 32 // 16
        place = row * PANEL_BYTES + ((half ^ (row & 7)) << 4)
        self.ds_address = cute.arch.make_warp_uniform(storage.ds.toint()) + place

    @cute.jit
    def run(self, work: KeyWork):
        """dK and dV of the tile in the accumulators, not scaled; dQ of all steps handed on, and the slopes' gradients
        stored."""
        products, rings, args = self.products, self.rings, self.args
        products.acc_dk.fill(0.0)
        products.acc_dv.fill(0.0)
        self.dslope.fill(0.0)
        state = ring_start()
        rings["k"].wait(state)
        rings["v"].wait(state)
        score = Score.of(args.common.softmax_scale, args.common.softcap)
        head, store_dslope = self.head, self.store_dslope
        for index in cutlass.range(work.heads, unroll=1):
            state = head(work, score, work.first_head + index, state)
            if const_expr(self.config.slopes_gradient):
                store_dslope(work, work.first_head + index)

    @cute.jit
    def store_dslope(self, work: KeyWork, head: Int32):
        """A warp's part of the gradient of a head's slope."""
        dslope = cute.arch.warp_reduction_sum(self.dslope[0])
        part = work.n_block * self.config.slope_parts + self.index * 4 + self.thread // 32
        parts, lane = self.args.scratch.dslopes, self.thread % 32
        if lane == 0:
            parts[work.batch, head, part] = dslope
        self.dslope[0] = Float32(0.0)

    @cute.jit
    def step(
        self,
        work: KeyWork,
        score: Score,
        iteration: Int32,
        state: RingState,
        masked: cutlass.Constexpr[bool],
        left_edge: cutlass.Constexpr[bool],
    ) -> RingState:
        """One block of queries of one head."""
        c, products, rings = self.config, self.products, self.rings
        s, dp, dq = products.accumulators()
        p, ds = (cute.make_rmem_tensor_like(acc, self.dtype) for acc in (s, dp))
        rings["q"].wait(state)
        warpgroup.fence()
        products.start_scores(s, state.stage)
        rings["dout"].wait(state)
        products.start_dp(dp, state.stage)
        distance, hidden = self.positions(work, work.blocks.block(iteration) * c.tile_m, masked, left_edge)
        warpgroup.wait_group(1)  # S
        dslope = self.dslope if c.slopes_gradient else None
        # At head_dim 128 all of P at once would spill with a softcap's derivatives or the slopes' gradients.
        by_shares = c.softcap or c.slopes_gradient
        if const_expr(not by_shares):
            for share in cutlass.range_constexpr(self.shares):
                self.probabilities(s, share, score, state.stage, distance, hidden)
            warpgroup.wait_group(0)  # dP
        for share in cutlass.range_constexpr(self.shares):
            derivatives = None
            if const_expr(by_shares):
                derivatives = self.probabilities(s, share, score, state.stage, distance, hidden)
                if const_expr(share == 0):
                    warpgroup.wait_group(0)
            self.gradients(s, dp, share, state.stage, derivatives, distance, dslope)
            of_s, of_dp, of_p, of_ds = (part(fragment, share, self.shares) for fragment in (s, dp, p, ds))
            narrow(of_s, of_p)
            narrow(of_dp, of_ds)
        self.store_ds(ds, state.stage)
        warpgroup.fence()
        products.start_dv(as_warpgroup_operand_a(p), state.stage)
        cute.arch.fence_proxy("async.shared", space="cta")
        cute.arch.barrier(barrier_id=CONSUMER_BARRIER, number_of_threads=WARPGROUP * CONSUMERS)
        products.start_dq(dq, state.stage)
        products.start_dk(as_warpgroup_operand_a(ds), state.stage)
        warpgroup.wait_group(1)  # dQ, and dV
        rings["dout"].release(state.stage)
        self.sums.put(dq)
        warpgroup.wait_group(0)
        rings["q"].release(state.stage)
        return ring_next(state, c.stages)

    def store_ds(self, ds: cute.Tensor, stage: Int32):
        """dSᵀ to shared memory. Of 16 queries, number n of a panel, the 16 bytes are the first ones' with bits 5 and 6
        flipped as n has them: one address in a register, where computed ones took eight."""
        c, words = self.config, cute.recast_tensor(ds, Uint32)
        address = self.ds_address + stage * (c.tile_n * c.tile_m * c.dtype.bytes)
        for share in range(c.tile_m // 16):
            panel, column = divmod(share, PANEL_BYTES // 32)
            inline_ptx(
                f"stmatrix.sync.aligned.m8n8.x4.shared.b16 [{{$r0}}+{panel * c.tile_n * PANEL_BYTES}], "
                "{{$r1}, {$r2}, {$r3}, {$r4}};",
                read_only_args=[address ^ (32 * column), *(words[4 * share + e] for e in range(4))],
            )
