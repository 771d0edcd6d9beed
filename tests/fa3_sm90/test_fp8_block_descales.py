"""Descales of blocks of keys in fp8, simulated: masks, scores and layouts, of k alone, of v alone, far apart; what the
host refuses."""

import dataclasses

import pytest
import torch

import cute_fa
from cute_fa import errors
from cute_fa.semantics.reference import expected
from cute_fa.tools.inputs import InputSpec, make_inputs
from tests.fa3_sm90.test_fp8_features import E4M3, E5M2, config_of, launch, run

BLOCKS = InputSpec(1, 40, 300, heads=1, heads_kv=1, head_dim=128, dtype=E4M3, block_descales=True, causal=True)
LATE = {"late": True, "race": True}
CASES = [
    ({"heads": 4, "heads_kv": 2, "seqlen_q": 130, "seqlen_k": 400}, LATE | {"schedule_seed": 1}),
    ({"batch": 3, "causal": False, "seqused_k": True, "lengths_k": (300, 0, 129)}, {"num_sms": 1}),
    ({"batch": 3, "head_dim": 64, "varlen_q": True, "varlen_k": True, "alibi": True}, {"num_sms": 1}),
    (
        {"head_dim": 256, "causal": False, "window": (137, 11), "sink_tokens": 5, "heads": 2},
        {"late": True, "schedule_seed": 2},
    ),
    ({"head_dim": 64, "seqlen_k": 401, "softcap": 15.0, "page_size": 16}, {}),
    ({"batch": 2, "dtype_k": E5M2, "softcap": 15.0, "alibi": True, "cache_leftpad": True}, {"race": True}),
    ({"head_dim": 192, "head_dim_v": 128, "seqlen_q": 200, "learnable_sink": True, "seqused_k": True}, {"num_sms": 1}),
]


@pytest.mark.parametrize(("changes", "simulation"), CASES)
def test_blocks_against_the_reference(changes, simulation):
    spec = dataclasses.replace(BLOCKS, **changes)
    assert 128 % config_of(spec).tile_n == 0
    run(spec, "peaked" if simulation else "random", **simulation)


@pytest.mark.parametrize("alone", ["k", "v"])
def test_blocks_of_k_or_v_alone(alone):
    given = make_inputs(BLOCKS, "random")
    other = {"k": "v_descale", "v": "k_descale"}[alone]
    given = dataclasses.replace(given, **{other: getattr(given, other)[..., 0].clone()})
    out, lse = launch(given)
    result = expected(given.q, given.k, given.v, **given.options()).check(out, lse)
    assert result.ok, result


@pytest.mark.parametrize("factors", [(1.0, 2.0**20, 1.0), (2.0**20, 1.0, 2.0**-20), (2.0**-32, 2.0**-32, 2.0**32)])
def test_values_of_blocks_far_apart(factors):
    given = make_inputs(dataclasses.replace(BLOCKS, causal=False), "random")
    v_descale = torch.tensor([*factors, 1.0]).expand_as(given.v_descale)
    given = dataclasses.replace(given, v_descale=v_descale)
    out, lse = launch(given)
    result = expected(given.q, given.k, given.v, **given.options()).check(out, lse)
    assert result.ok, result


def test_ones_are_as_none():
    given = make_inputs(BLOCKS, "peaked")
    of_blocks, none = torch.ones(1, 1, 3), dict.fromkeys(("q_descale", "k_descale", "v_descale"))
    results = [
        launch(dataclasses.replace(given, **none | more))
        for more in ({}, {"k_descale": of_blocks, "v_descale": of_blocks})
    ]
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


@pytest.mark.parametrize(
    ("name", "descale", "error", "message"),
    [
        ("k_descale", torch.ones(2, 2, 2), errors.ShapeError, r"k_descale \(2, 2, 2\): \(2, 2, 3\) is needed"),
        ("v_descale", torch.ones(2, 1, 3), errors.ShapeError, r"v_descale \(2, 1, 3\): \(2, 2, 3\) is needed"),
        ("v_descale", torch.ones(2, 2, 6)[..., ::2], errors.StrideError, "v_descale .*last dimension must be contig"),
        ("k_descale", torch.ones(2, 2, 3).double(), errors.DTypeError, "k_descale is float64: float32 is needed"),
        ("k_descale", torch.tensor([1.0, 1, 0]).expand(2, 2, 3), errors.ArgumentError, r"k_descale\[0, 0, 2\]=0"),
        ("q_descale", torch.ones(2, 2, 3), errors.ShapeError, r"q_descale \(2, 2, 3\): \(2, 2\) is needed, or one"),
    ],
)
def test_what_is_refused(name, descale, error, message):
    given = make_inputs(dataclasses.replace(BLOCKS, batch=2, heads=2, heads_kv=2))
    with cute_fa.simulate("sm_90a"), pytest.raises(error, match=message):
        cute_fa.flash_attn_func(given.q, given.k, given.v, **{name: descale})
