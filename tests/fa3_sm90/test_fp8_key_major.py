"""fp8 with the keys of V contiguous, simulated: head_dims, masks, odd numbers of keys; what the host refuses."""

import dataclasses
import re

import pytest
import torch

import cute_fa
from cute_fa import errors
from cute_fa.semantics.types import SmArch
from fa3_sm90.forward.entry import Fa3Forward
from tests.testing.fp8_tests import KEY_MAJOR, KEY_MAJOR_CASES, Fp8KeyMajorTests
from tests.testing.tiled_forward import Forward


class TestKeyMajor(Fp8KeyMajorTests):
    forward = Forward(Fa3Forward, SmArch.SM_90A)

    @pytest.mark.parametrize("changes", [changes for changes, _ in KEY_MAJOR_CASES])
    def test_no_warp_transposes(self, changes):
        assert self.forward.config_of(dataclasses.replace(KEY_MAJOR, **changes)).transposers == 0


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
