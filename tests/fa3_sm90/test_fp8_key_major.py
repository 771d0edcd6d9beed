"""fp8 with the keys of V contiguous, simulated: head_dims, masks, odd numbers of keys; what the host refuses."""

import dataclasses
import re

import pytest
import torch

import cute_fa
from cute_fa import errors
from cute_fa.tools.inputs import InputSpec, make_inputs
from tests.fa3_sm90.test_fp8_features import E4M3, E5M2, config_of, launch, run

KEY_MAJOR = InputSpec(1, 40, 301, heads=1, heads_kv=1, head_dim=128, dtype=E4M3, v_layout="key_major")
CASES = [
    ({"batch": 2, "heads": 4, "heads_kv": 2, "causal": True}, {"num_sms": 2, "race": True, "late": True}),
    ({"head_dim": 64, "seqlen_k": 401, "causal": True}, {"late": True, "schedule_seed": 1}),
    ({"batch": 2, "head_dim": 256, "seqlen_k": 135, "window": (70, 11), "sink_tokens": 5}, {"num_sms": 1}),
    ({"head_dim": 48, "head_dim_v": 80, "seqlen_k": 7, "batch": 2}, {"race": True, "schedule_seed": 2}),
    ({"head_dim": 192, "head_dim_v": 128, "heads": 2, "heads_kv": 2, "layout": "expanded", "block_descales": True}, {}),
    ({"dtype_v": E5M2, "seqlen_k": 1}, {}),
]


@pytest.mark.parametrize(("changes", "simulation"), CASES)
def test_against_the_reference(changes, simulation):
    spec = dataclasses.replace(KEY_MAJOR, **changes)
    assert config_of(spec).transposers == 0
    run(spec, "peaked" if simulation else "random", **simulation)


def test_the_same_as_transposed_on_the_way():
    spec = dataclasses.replace(KEY_MAJOR, head_dim=64)
    given = make_inputs(spec, "random")
    theirs = dataclasses.replace(given, spec=dataclasses.replace(spec, v_layout="head_dim"), v=given.v.contiguous())
    assert theirs.v.stride(-1) == 1 and given.v.stride(1) == 1
    assert all(torch.equal(*pair) for pair in zip(launch(given), launch(theirs), strict=True))


Q = torch.zeros(2, 16, 2, 64).to(torch.float8_e4m3fn)
V = torch.zeros(2, 64, 2, 48).to(torch.float8_e4m3fn).permute(0, 3, 2, 1)  # (2, 48, 2, 64), keys contiguous
K = torch.zeros(2, 48, 2, 64).to(torch.float8_e4m3fn)
ODD = torch.zeros(2, 64, 2, 50).to(torch.float8_e4m3fn)[..., :48].permute(0, 3, 2, 1)


@pytest.mark.parametrize(
    ("tensors", "options", "error", "message"),
    [
        ((Q, K, K), {}, errors.StrideError, "v .*the keys must be contiguous for v_layout='key_major'"),
        ((Q, K, ODD), {}, errors.StrideError, "v .*every stride but the keys' must be a multiple of 16 bytes"),
        ((Q, K, V), {"v_layout": "head_dim"}, errors.StrideError, "v .*the last dimension must be contiguous"),
        ((Q, K, V), {"v_layout": "rows"}, errors.ArgumentError, "v_layout='rows': one of head_dim, key_major"),
        ((Q, K, V), {"v_layout": 1}, errors.ArgumentError, "v_layout=1: a name"),
        ((Q.half(), K.half(), V.half()), {}, errors.Fp8Error, "v_layout='key_major' with q in fp16: only fp8"),
    ],
)
def test_what_is_refused(tensors, options, error, message):
    with cute_fa.simulate("sm_90a"), pytest.raises(error, match=message):
        cute_fa.flash_attn_func(*tensors, **{"v_layout": "key_major"} | options)


def test_packed_and_paged_keys_are_refused():
    packed = (Q.flatten(0, 1), K.flatten(0, 1), K.flatten(0, 1))
    offsets = torch.tensor([0, 16, 32], dtype=torch.int32), torch.tensor([0, 48, 96], dtype=torch.int32)
    call = cute_fa.api.attention.prepare(
        *packed, cu_seqlens_q=offsets[0], cu_seqlens_k=offsets[1], v_layout="key_major"
    )
    with (
        cute_fa.simulate("sm_90a"),
        pytest.raises(
            errors.ArgumentError, match=re.escape("v_layout='key_major' with cu_seqlens_k: it is one of dense tensors")
        ),
    ):
        cute_fa.engine.attention.validate(call)
