"""The FA3 forward, simulated, against the fp32 reference: features in pairs, edges of the mask, which blocks are
loaded, how tiles are shared out, pages, big strides."""

from typing import ClassVar

import pytest

from cute_fa.semantics.types import SmArch
from cute_fa.tools.inputs import InputSpec, make_inputs
from fa3_sm90.forward.entry import Fa3Forward
from tests.testing.forward_tests import ForwardTests
from tests.testing.tiled_forward import Forward, compare


class TestForward(ForwardTests):
    forward = Forward(Fa3Forward, SmArch.SM_90A)
    packed_tokens: ClassVar = {3: 3 * 21, 5: 3 * 12, 32: 3 * 2}  # of three warpgroups with 64 rows each


# Lengths that blocks of 64 keys suit better than those of 80, each with the cluster that is chosen: tiles of 128
# queries, an odd number of them in one CTA each.
SHORT = {
    "full, 5 tiles": (InputSpec(1, 513, 500, 1, 1, 256), 1, {"num_sms": 2, "schedule_seed": 1}),
    "full, 6 tiles": (InputSpec(1, 641, 441, 1, 1, 256), 2, {"num_sms": 2, "late": True, "schedule_seed": 2}),
    "full, alibi, softcap": (InputSpec(1, 512, 321, 1, 1, 256, alibi=True, softcap=20.0), 2, {"late": True}),
    "causal": (InputSpec(1, 520, 520, 1, 1, 256, causal=True), 1, {"num_sms": 2, "late": True, "schedule_seed": 3}),
    "causal, fewer keys": (InputSpec(1, 530, 445, 1, 1, 256, causal=True), 1, {"num_sms": 3, "schedule_seed": 4}),
    "causal, packed heads": (
        InputSpec(1, 512, 512, 2, 1, 248, 256, causal=True),
        1,
        {"pack_gqa": True, "num_sms": 3, "late": True},
    ),
    "right, one CTA a tile": (InputSpec(1, 512, 500, 1, 1, 184, 256, window=(None, 9)), 1, {"persistent": "off"}),
}


@pytest.mark.sampled
@pytest.mark.parametrize("name", SHORT)
def test_short_sequences_in_blocks_of_64_keys(name):
    spec, cluster, options = SHORT[name]
    forward, given = TestForward.forward, make_inputs(spec, "peaked")
    c = forward.config_of(spec, pack_gqa=options.get("pack_gqa"))
    assert (c.tile_n, c.cluster) == (64, cluster)
    out, lse, simulation = forward.launch(given, **options)
    compare(given, out, lse)
    assert simulation.launches[-1].cluster == (cluster, 1, 1)
