"""The consumers of the kernel for dK and dV, over the same 64 keys and all steps over the queries."""

import itertools
from typing import ClassVar

import cutlass
import cutlass.cute as cute
from cutlass import Float16, Float32, Int32
from cutlass.cute.nvgpu import warpgroup

from cute_fa.device.backward_arguments import BackwardArguments
from cute_fa.device.block_range import MaskedRange
from cute_fa.device.dtypes import CUTE_DTYPE
from cute_fa.device.fragments import as_warpgroup_operand_a, share_of_columns
from cute_fa.device.registers import narrow
from cute_fa.device.ring import Ring, RingState, ring_next, ring_start
from cute_fa.device.score import Score
from fa3_sm90.backward.walk import QueryWalk, part
from fa3_sm90.backward.work import KeyWork
from fa3_sm90.backward_split.config import TILE, Fa3SplitBackwardConfig
from fa3_sm90.backward_split.handover import Handover
from fa3_sm90.backward_split.storage import KeyStorage
from fa3_sm90.common.products import ScoreProduct, SumProduct, tiles


class OneGradient(QueryWalk):
    """Base of both: a warpgroup with the sums of dV or of dK, and its side of the handover."""

    own: ClassVar[str]  # whose rows its scores have: "k", or "v"

    def __init__(
        self,
        config: Fa3SplitBackwardConfig,
        args: BackwardArguments,
        storage: KeyStorage,
        rings: dict[str, Ring],
        thread: Int32,
    ):
        """``thread``: within the warpgroup."""
        super().__init__(config, args, storage, Int32(0), thread)
        c, self.rings, self.dtype = config, rings, CUTE_DTYPE[config.dtype]
        shapes = {"k": (c.head_dim_padded, 1), "v": (c.head_dim_v_padded, 1)}
        shapes |= {"q": (c.head_dim_padded, c.stages), "dout": (c.head_dim_v_padded, c.stages)}
        of = {name: tiles(getattr(storage, name), self.dtype, TILE, *shape) for name, shape in shapes.items()}
        met, summed = ("q", "dout") if self.own == "k" else ("dout", "q")
        self.scores = ScoreProduct(self.dtype, of[self.own][None, None, 0], of[met])
        self.sums = SumProduct(self.dtype, of[summed])
        self.handover = Handover(storage.p, rings["p"], thread)

    @cute.jit
    def run(self, work: KeyWork):
        """The gradient of the tile in its accumulator, not scaled."""
        head, args = self.head, self.args
        self.sums.acc.fill(0.0)
        state = ring_start()
        self.rings[self.own].wait(state)
        score = Score.of(args.common.softmax_scale, args.common.softcap)
        for index in cutlass.range(work.heads, unroll=1):
            state = head(work, score, work.first_head + index, state)


class ValueGradients(OneGradient):
    """The warpgroup of dV: P out of S, for itself and for the other."""

    own = "k"

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
        rings, s = self.rings, self.scores.accumulator()
        p = cute.make_rmem_tensor_like(s, self.dtype)
        rings["q"].wait(state)
        warpgroup.fence()
        self.scores.start(s, state.stage)
        distance, hidden = self.positions(work, work.blocks.block(iteration) * TILE, masked, left_edge)
        warpgroup.wait_group(0)
        handed = self.narrowed(s, p, score, state.stage, distance, hidden)
        rings["q"].release(state.stage)
        self.handover.put(handed, state.stage)
        rings["dout"].wait(state)
        warpgroup.fence()
        self.sums.start(as_warpgroup_operand_a(p), state.stage)
        warpgroup.wait_group(0)
        rings["dout"].release(state.stage)
        return ring_next(state, self.config.stages)

    def narrowed(self, s: cute.Tensor, p: cute.Tensor, score: Score, stage: Int32, distance, hidden) -> cute.Tensor:
        """P, narrowed, out of S; returns what is handed on, in fp16: P, or with a softcap P times its derivatives, of
        which no more than a share's are alive. Handed on in bf16, P would be rounded as coarsely as dS is after it:
        dK's error was 1.22 times FlashAttention-4's."""
        same = self.dtype is Float16 and not self.config.softcap
        handed = p if same else cute.make_rmem_tensor_like(p, Float16)
        for share in range(self.shares):
            derivatives = self.probabilities(s, share, score, stage, distance, hidden)
            of_s, of_p, of_handed = (part(fragment, share, self.shares) for fragment in (s, p, handed))
            of_s.store(of_s.load() * 2.0**self.config.probability_shift)
            narrow(of_s, of_p)
            if derivatives is not None:
                self.fold(s, share, derivatives)
            if not same:
                narrow(of_s, of_handed)
        return handed

    def fold(self, p: cute.Tensor, share: int, derivatives: cute.Tensor):
        """P times the softcap's derivatives in place of P in a share."""
        own = share_of_columns(p, share, self.shares)
        for r, c in itertools.product(range(2), range(4)):
            own[r, c] = own[r, c] * derivatives[r, c]


class KeyGradients(OneGradient):
    """The warpgroup of dK: dS out of dP, with the other's P; a score that is hidden has none."""

    own = "v"

    def ranges(self, work: KeyWork) -> list[MaskedRange]:
        """All blocks alike."""
        return [MaskedRange(Int32(0), work.blocks.total, False, False)]

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
        rings, dp = self.rings, self.scores.accumulator()
        p, ds = (cute.make_rmem_tensor_like(dp, dtype) for dtype in (Float16, self.dtype))
        rings["dout"].wait(state)
        warpgroup.fence()
        self.scores.start(dp, state.stage)
        self.handover.take(p, state)
        warpgroup.wait_group(0)
        wide = cute.make_rmem_tensor_like(dp)
        wide.store(p.load().to(Float32))
        self.gradients_of(wide, dp, state.stage)
        rings["dout"].release(state.stage)
        narrow(dp, ds)
        warpgroup.fence()
        self.sums.start(as_warpgroup_operand_a(ds), state.stage)
        warpgroup.wait_group(0)
        rings["q"].release(state.stage)
        return ring_next(state, self.config.stages)

    def gradients_of(self, p: cute.Tensor, dp: cute.Tensor, stage: Int32):
        """dS in place of dP; P and D are scaled, so that an fma takes the scale back."""
        scale = 2.0**-self.config.probability_shift
        for share in range(self.shares):
            delta = self.statistics(1, stage, share)
            own_p, own_dp = (share_of_columns(fragment, share, self.shares) for fragment in (p, dp))
            for r, c in itertools.product(range(2), range(4)):
                own_dp[r, c] = own_p[r, c] * (own_dp[r, c] * scale - delta[c])
