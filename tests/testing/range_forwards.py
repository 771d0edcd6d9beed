"""Tests of range plans that the forwards which walk over tiles of queries by TMA have in common: a family's test class
inherits them."""

from typing import ClassVar

import pytest
import torch

import cute_fa
from cute_fa.api.range_plan import RangePlan
from cute_fa.device.tiled_forward import TiledForward
from cute_fa.device.tiling import ceil_div
from cute_fa.engine.table import TABLE
from cute_fa.semantics.errors import CuteFaError
from cute_fa.semantics.problem import AttentionProblem
from cute_fa.semantics.types import DType, SmArch
from cute_fa.semantics.walk_layout import Header
from tests.testing.loads import recorded_loads
from tests.testing.range_reference import RangeInputs
from tests.testing.range_walks import CAUSAL, FULL, INVERSE, Ranges, Walk
from tests.testing.simulated import unwritten_is_nan

POSITIONED = {"alibi": True, "positions": True}
# (head dims, dtype, features, (total_q, total_k), ranges, how the simulated machine works)
CASES = {
    "plain": ((64, 64), torch.bfloat16, {}, (501, 341), 12, {"num_sms": 2, "late": True}),
    "cap and sink": ((96, 96), torch.float16, {"softcap": 5.0, "sink": True}, (307, 262), 30, {"num_sms": 1}),
    "positions": ((64, 64), torch.bfloat16, POSITIONED, (500, 505), 5, {"schedule_seed": 1}),
    "rows as positions": ((128, 128), torch.bfloat16, {"alibi": True, "sink": True}, (149, 270), 100, {"num_sms": 1}),
    "values narrower": ((192, 128), torch.float16, {"softcap": 20.0, "alibi": True}, (151, 205), 8, {"late": True}),
    "widest": ((256, 256), torch.bfloat16, {}, (140, 199), 8, {"num_sms": 1, "schedule_seed": 2}),
}


class RangeForwardTests:
    """``kernel``: what is tested, for ``arch``."""

    kernel: ClassVar[type[TiledForward]]
    arch: ClassVar[SmArch]

    def run(self, ranges: Ranges, given: RangeInputs, **machine) -> tuple[torch.Tensor, torch.Tensor]:
        """(out, lse) of one call with device ranges; ``machine``: options of the simulation."""
        family, plan = self.kernel.family, (ranges.q, ranges.k, ranges.types)
        with cute_fa.simulate(self.arch, **machine), unwritten_is_nan():
            tensors = (given.q, given.k, given.v)
            return cute_fa.range_attention(*tensors, *plan, return_lse=True, family=family, **given.options())

    def config(self, ranges: Ranges, **fields):
        """The kernel's config for a plan's lengths."""
        return self.kernel.configure(self.problem(ranges, **fields))

    def problem(self, ranges: Ranges, **fields) -> AttentionProblem:
        lengths = {"seqlen_q": ranges.total_q, "seqlen_k": ranges.total_k}
        sizes = {"batch": 1, "num_heads": 2, "num_heads_kv": 1, "head_dim": 64, "softmax_scale": 0.125}
        sizes |= {"dtype": DType.BF16, "arch": self.arch, "ranges": True, "head_dim_v": 64}
        return AttentionProblem(**lengths | sizes | fields)

    @pytest.mark.sampled
    @pytest.mark.parametrize("case", CASES)
    def test_random_plans(self, case):
        head_dims, dtype, features, totals, n, machine = CASES[case]
        ranges = Ranges.random(n, *totals, seed=n, longest=None if n < 10 else 150)
        given = RangeInputs.make(ranges, (2, 1), head_dims, dtype, peaked=True, **features)
        result = given.check(*self.run(ranges, given, **machine))
        assert result.ok, result

    def test_a_first_block_without_a_mask(self):
        """All keys of whole blocks are seen: nothing has a mask but mask tile 0, which hides nothing."""
        ranges = Ranges.of([(0, 512, 128, 384, FULL)], 512, 384)
        with cute_fa.simulate(self.arch):
            assert ranges.walk(self.config(ranges).walk_shape)[Header.MASK_TILES] == 1
        given = RangeInputs.make(ranges, peaked=True)
        result = given.check(*self.run(ranges, given, num_sms=1))
        assert result.ok, result

    @pytest.mark.parametrize("sink", [False, True])
    def test_tiles_without_keys(self, sink):
        """The second and the last tile of rows see nothing, and some rows of the others."""
        ranges = Ranges.of([(20, 200, 30, 150, CAUSAL), (600, 740, 0, 77, INVERSE)], 1100, 150)
        given = RangeInputs.make(ranges, (3, 3), sink=sink)
        out, lse = self.run(ranges, given, num_sms=2)
        unseen = ~given.mask.any(1)
        rows = self.config(ranges).tile_tokens
        whole = [not given.mask[first : first + rows].any() for first in range(0, 1100, rows)]
        assert whole[-1] and not whole[0] and sum(whole) >= 2
        assert (out[unseen] == 0).all()
        assert (lse[:, unseen] == (given.learnable_sink[:, None] if sink else -torch.inf)).all()
        result = given.check(out, lse)
        assert result.ok, result

    def test_tiles_for_which_there_is_no_room(self, monkeypatch):
        """Their rows are NaN, all others as they should be."""
        ranges = Ranges.of([(0, 700, 3, 250, kind) for kind in (CAUSAL, INVERSE)], 700, 260)
        shape = self.config(ranges).walk_shape
        given = RangeInputs.make(ranges, peaked=True)
        monkeypatch.setattr(RangePlan, "_check_room", lambda *_: None)
        with cute_fa.simulate(self.arch, num_sms=2), unwritten_is_nan():
            plan = (ranges.q, ranges.k, ranges.types)
            plan = RangePlan.build(*plan, total_q=700, total_k=260, mask_capacity=4)
            tensors = (given.q, given.k, given.v)
            out, lse = cute_fa.range_attention(*tensors, plan=plan, return_lse=True, family=self.kernel.family)
            room = ceil_div(700, shape[0]) * ceil_div(260, shape[1])
            walk = Walk.read(plan.walk("queries", shape), 700, shape, room)
        lost = torch.tensor([tile.masked is None for tile in walk.tiles]).repeat_interleave(shape[0])[:700]
        assert lost.any() and not lost.all()
        assert out[lost].isnan().all() and lse[:, lost].isnan().all()
        exact, exact_lse = given.attention()
        out, lse = torch.where(lost[:, None, None], exact, out), torch.where(lost, exact_lse, lse)
        result = given.check(out, lse)
        assert result.ok, result

    def test_blocks_of_the_walk_alone_are_loaded_and_the_longest_list_first(self):
        """By one CTA, which takes the tiles in their order."""
        ranges = Ranges.of([(0, 90, 0, 300, CAUSAL), (300, 700, 0, 700, CAUSAL), (900, 1300, 3, 430, FULL)], 1300, 700)
        given = RangeInputs.make(ranges, (1, 1), (64, 32))  # V differs from K in its shape, so that loads tell
        config = self.config(ranges, num_heads=1, head_dim_v=32)
        with recorded_loads() as loads:
            self.run(ranges, given, num_sms=1)
        loaded = {d: [x.start[1] // config.tile_n for x in loads if x.extents[:2] == (d, 700)] for d in (64, 32)}
        with cute_fa.simulate(self.arch):
            tensor = ranges.walk(config.walk_shape)
        room = ceil_div(1300, config.tile_tokens) * ceil_div(700, config.tile_n)
        walk = Walk.read(tensor, 1300, config.walk_shape, room)
        lists = [walk.tiles[tile].masked + walk.tiles[tile].covered for tile in walk.order]
        assert len(lists[0]) > len(lists[walk.filled - 1]) > 0 and walk.order != sorted(walk.order)
        assert loaded[64] == loaded[32] == [block for blocks in lists for block in blocks]

    def test_the_same_tiles_for_any_lengths(self):
        """A walk is made for one shape, whatever the lengths and heads."""
        shapes = {
            self.config(Ranges.of([], total_q, 500), num_heads=heads).walk_shape
            for total_q in (1, 64, 200, 5000)
            for heads in (1, 8)
        }
        assert len(shapes) == 1

    @pytest.mark.parametrize(
        ("fields", "reason"),
        [
            ({"pack_gqa": True}, "pack_gqa with a range plan: its masks are of tiles of queries of one head"),
            ({"dtype": DType.E4M3}, "a range plan with dtype e4m3: its kernels are of 16 bits"),
        ],
    )
    def test_what_is_refused(self, fields, reason):
        with pytest.raises(CuteFaError, match=reason):
            TABLE.lookup(self.problem(Ranges.of([], 512, 512), **fields), self.kernel.family)
