"""The FA4 forward, simulated, against the fp32 reference: features in pairs, edges of the mask, which blocks are
loaded, how tiles are shared out, pages, big strides; its configs, and pairs of CTAs."""

from typing import ClassVar

import pytest
import torch

from cute_fa.semantics.types import DType, SmArch
from cute_fa.tools.inputs import InputSpec, make_inputs
from fa4_sm100.forward.entry import Fa4Forward
from tests.testing.forward_tests import ForwardTests
from tests.testing.tiled_forward import Forward

B200, B300 = (Forward(Fa4Forward, arch) for arch in (SmArch.SM_100A, SmArch.SM_103A))


class TestForward(ForwardTests):
    forward = B200
    packed_tokens: ClassVar = {3: 2 * 42, 5: 2 * 25, 32: 2 * 4}  # of two tiles with 128 rows each
    lse_error = 2 * 8.6e-5  # of those that the FMA pipe computes, here and there

    def check_grid(self, grid, num_sms, spec):
        """Running CTAs take over the tiles of those that do not run yet."""
        tiles = spec.batch * spec.heads * -(-spec.seqlen_q // self.forward.config_of(spec).tile_tokens)
        assert tiles <= grid[0] <= tiles + spec.batch * spec.heads and num_sms < tiles

    @pytest.mark.sampled
    @pytest.mark.parametrize("page_size", [8, 64, 256])
    def test_pages_give_the_bits_of_contiguous_keys(self, page_size):
        """The other sizes are in the grid of features."""
        super().test_pages_give_the_bits_of_contiguous_keys(page_size)


BF16, FP16, E4M3, E5M2 = DType.BF16, DType.FP16, DType.E4M3, DType.E5M2
CAUSAL = {"causal": True}
# head_dims, dtype, queries and a mask, and what the heuristic makes of them: tiles of queries, keys of a block, stages,
# CTAs, and whether O has memory of its own.
SHAPES = [
    ((80, 80), BF16, 300, {}, (2, 128, 8, 1, True)),
    ((144, 40), BF16, 300, {"window": (200, 30)}, (2, 128, 4, 1, False)),
    ((152, 136), BF16, 300, CAUSAL, (2, 96, 4, 1, False)),
    ((240, 48), BF16, 300, CAUSAL, (2, 64, 3, 1, True)),
    ((8, 168), FP16, 300, {}, (2, 64, 6, 1, False)),
    ((128, 120), FP16, 100, {}, (1, 128, 6, 1, False)),
    ((128, 128), BF16, 512, {}, (2, 128, 8, 2, True)),
    ((256, 128), FP16, 512, {}, (2, 128, 3, 2, False)),
    ((152, 160), BF16, 500, {}, (2, 96, 8, 2, False)),
    ((256, 256), BF16, 512, CAUSAL, (1, 128, 4, 2, True)),
    ((64, 256), FP16, 256, {"window": (150, 9), "sink_tokens": 3}, (1, 128, 6, 2, False)),
    ((256, 144), E4M3, 300, {}, (2, 96, 6, 1, False)),
    ((16, 192), E4M3, 500, {}, (2, 64, 8, 2, True)),
    ((256, 256), E4M3, 512, CAUSAL, (1, 128, 8, 2, True)),
]
SCHEDULES = [
    {"num_sms": 1, "late": True, "schedule_seed": 1},
    {"num_sms": 3, "late": True},
    {"num_sms": 2, "schedule_seed": 2},
]


@pytest.mark.sampled
@pytest.mark.parametrize("index", range(len(SHAPES)))
def test_shapes(index):
    """Each of two heads has another tile, and more blocks of keys than there are stages."""
    (head_dim, head_dim_v), dtype, queries, mask, shape = SHAPES[index]
    spec = InputSpec(1, queries, 777, 2, 2, head_dim, head_dim_v, dtype, **mask)
    c = B200.config_of(spec)
    assert (c.q_tiles, c.tile_n, c.stages, c.ctas, c.own_output) == shape
    B200.run(spec, **SCHEDULES[index % len(SCHEDULES)])


@pytest.mark.parametrize(
    ("seqlen_q", "seqlen_k"),
    [(1, 1), (63, 65), (64, 63), (127, 129), (128, 127), (129, 128), (255, 257), (256, 256), (257, 255), (513, 1)],
)
def test_lengths_around_the_tiles_of_queries(seqlen_q, seqlen_k):
    for causal, inputs in ((True, "peaked"), (False, "random")):
        B200.run(InputSpec(1, seqlen_q, seqlen_k, 1, 1, 64, causal=causal), inputs)


@pytest.mark.sampled
@pytest.mark.parametrize("head_dims", [(64, 64), (256, 256)])
def test_sequences_without_queries_or_keys(head_dims):
    """Packed, one beside the other: a sequence has no queries, no keys, or neither."""
    lengths = {"lengths_q": (0, 130, 260, 0, 5), "lengths_k": (200, 0, 257, 0, 300)}
    spec = InputSpec(5, 260, 300, 1, 1, *head_dims, varlen_q=True, varlen_k=True, **lengths)
    out, lse = B200.run(spec, num_sms=1, late=True)
    assert (out[:130] == 0).all() and (lse[:, :130] == -torch.inf).all()


@pytest.mark.sampled
@pytest.mark.parametrize("ratio", [5, 7, 16, 128])
def test_packed_heads_of_many_ratios(ratio):
    """Rows of a tile that are no query take no part, be they as many as 2 of 7 heads or 3 of 5."""
    spec = InputSpec(
        2, 70 // ratio + 3, 300, ratio, 1, 64, causal=True, alibi=True, seqused_q=True, learnable_sink=True
    )
    assert B200.config_of(spec, pack_gqa=True).pack_gqa == ratio
    B200.run(spec, pack_gqa=True, num_sms=1, late=True, schedule_seed=ratio)


@pytest.mark.sampled
@pytest.mark.parametrize("num_sms", [1, 2, 3, 5])
def test_same_bits_of_pairs_on_any_number_of_sms(num_sms):
    """Of one SM a pair takes two: the simulator runs a cluster as a whole."""
    spec = InputSpec(2, 512, 300, 1, 1, 128)
    given = make_inputs(spec, "peaked")
    assert B200.config_of(spec).ctas == 2
    first = B200.check(given)
    again = B200.check(given, num_sms=num_sms, late=True, schedule_seed=num_sms)
    assert all(torch.equal(*pair) for pair in zip(first, again, strict=True))


B300_CASES = [
    {"head_dim": 64, "causal": True, "softcap": 20.0},
    {"head_dim": 128, "head_dim_v": 128, "page_size": 16},
    {"head_dim": 256, "dtype": E4M3, "window": (100, 0), "sink_tokens": 7},
]


@pytest.mark.sampled
@pytest.mark.parametrize("changes", B300_CASES, ids=str)
def test_on_a_b300(changes):
    spec = InputSpec(2, 140, 300, 2, 1, **changes)
    assert B300.config_of(spec).emulated == 0
    B300.run(spec, num_sms=2, late=True)
