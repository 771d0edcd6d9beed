"""The reference of range plans against the one of dense attention, where both can say it: causal is one range."""

import dataclasses

import pytest
import torch

from cute_fa.semantics import reference
from tests.testing.range_reference import RangeInputs
from tests.testing.range_walks import BOTH, CAUSAL, FULL, INVERSE, Ranges

FEATURES = [{}, {"alibi": True}, {"sink": True, "softcap": 3.0}, {"peaked": True, "softmax_scale": 0.3}]


@pytest.mark.parametrize("features", FEATURES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_causal(features, dtype):
    """90 queries, 70 keys: the first 20 rows see nothing."""
    given = RangeInputs.make(Ranges.of([(0, 90, 0, 70, CAUSAL)], 90, 70), (4, 2), (64, 40), **features)
    if "alibi" in features:
        positions = torch.arange(90, dtype=torch.int32) - 20, torch.arange(70, dtype=torch.int32)
        given = dataclasses.replace(given, **dict(zip(("q_positions", "k_positions"), positions, strict=True)))
    names = ("softmax_scale", "softcap", "alibi_slopes", "learnable_sink")
    options = {name: getattr(given, name) for name in names} | {"causal": True, "dtype": dtype}
    q, k, v, dout, dlse = (t[None] for t in (given.q, given.k, given.v, given.dout, given.dlse))
    (out, lse), (theirs, their_lse) = given.attention(dtype), reference.attention(q, k, v, **options)
    grads, _ = given.gradients(dtype)
    their_grads = [t for t in reference.gradients(q, k, v, dout, dlse, **options) if t is not None]
    tolerance = 1e-12 if dtype == torch.float64 else 0.05
    for ours, right in zip((out, lse, *grads.values()), (theirs[0], their_lse[0], *their_grads), strict=True):
        right = right.double().reshape(ours.shape)
        torch.testing.assert_close(ours.double(), right, atol=tolerance * right[right.isfinite()].abs().max(), rtol=0)


def test_masks_of_each_type():
    """4 queries from 2 on, 3 keys from 1 on: key − query is at most 4 − 6 = −2, at least 1 − 2 = −1."""
    rows = {
        FULL: ["xxx"] * 4,
        CAUSAL: ["...", "x..", "xx.", "xxx"],
        INVERSE: ["xxx", ".xx", "..x", "..."],
        BOTH: ["..."] * 4,
    }
    for kind, expected in rows.items():
        mask = Ranges.of([(2, 6, 1, 4, kind)], 7, 5).mask()
        assert not mask[:2].any() and not mask[6:].any() and not mask[:, 0].any() and not mask[:, 4:].any()
        assert ["".join(".x"[int(seen)] for seen in row) for row in mask[2:6, 1:4]] == expected


def test_a_wrong_key_is_noticed():
    """One key less in a row of one head is mostly outside the tolerance, with peaked inputs."""
    ranges = Ranges.of([(0, 60, 0, 80, CAUSAL)], 60, 80)
    given = RangeInputs.make(ranges, peaked=True)
    noticed = 0
    for i in range(0, 60, 6):
        mask = given.mask.clone()
        mask[i, i + 20] = False  # the last key that the query sees
        wrong = dataclasses.replace(given, mask=mask)
        noticed += not given.check(*wrong.attention()).ok
    assert noticed >= 7
