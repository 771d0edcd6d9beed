"""The runner of peers' suites (docs/peers.md) on a suite in a peer's manner, written here."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SUITE = """
import pytest
import torch
import torch.nn.functional as F
from flash_attn import flash_attn_func, flash_attn_qkvpacked_func, flash_attn_with_kvcache
from flash_attn.bert_padding import lengths_of
from flash_attn.cute.interface import flash_attn_varlen_func, _flash_attn_fwd
from flash_attn.layers.rotary import apply_rotary_emb
from flash_attn_interface import flash_attn_combine, get_scheduler_metadata
from beside import attention_ref
from tests.of_the_peer import SEED
import flashinfer

MAJOR = torch.cuda.get_device_capability()[0]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("seqlen_q,seqlen_k", [(20, 20), (9, 40), (4096, 4096), (1024, 100000)])
def test_output(seqlen_q, seqlen_k, causal):
    assert MAJOR == 8
    torch.manual_seed(SEED)
    if causal and seqlen_q != seqlen_k:
        pytest.skip("not served by the peer")
    q = torch.randn(2, seqlen_q, 2, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    k, v = (torch.randn(2, seqlen_k, 2, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in "kv")
    assert q.is_cuda
    out = flash_attn_func(q, k, v, 0.0, causal=causal)
    dout = torch.randn_like(out)
    expected = attention_ref(q.float(), k.float(), v.float(), causal)
    assert (out - expected).abs().max() < 0.02
    for ours, theirs in zip(torch.autograd.grad(out, (q, k, v), dout), torch.autograd.grad(expected, (q, k, v), dout)):
        assert (ours - theirs).abs().max() < 0.05


def test_lengths():
    assert lengths_of(torch.tensor([0, 2, 5], device="cuda")) == [2, 3]


def test_decoding():
    cache = torch.randn(1, 32, 2, 64, device="cuda", dtype=torch.float16)
    q = torch.randn(1, 1, 2, 64, device="cuda", dtype=torch.float16)
    lengths = torch.tensor([20], dtype=torch.int32, device="cuda")
    assert get_scheduler_metadata(1, 1, 32, 2, 2, 64, lengths).is_cuda
    out = flash_attn_with_kvcache(q, cache, cache, cache_seqlens=lengths)
    assert (out - attention_ref(q, cache[:, :20], cache[:, :20], False)).abs().max() < 0.01


def test_without_kernels():
    x = torch.randn(1, 4, 2, 16, device="cuda")
    cos, sin = torch.ones(4, 8, device="cuda"), torch.zeros(4, 8, device="cuda")
    assert torch.equal(apply_rotary_emb(x, cos, sin), x)
    v, s = torch.ones(2, 3, 1, 8, device="cuda"), torch.zeros(2, 3, 1, device="cuda")
    assert flashinfer.merge_states(v, s)[1].tolist() == [[pytest.approx(1.5849625)]] * 2


@pytest.mark.parametrize("p", [0.5])
def test_dropout(p):
    flash_attn_qkvpacked_func(torch.zeros(1, 4, 3, 2, 64, device="cuda", dtype=torch.float16), p)


def test_private():
    _flash_attn_fwd(1)


def test_differs():
    q = torch.zeros(1, 4, 2, 64, device="cuda", dtype=torch.float16)
    assert flash_attn_func(q, q, q + 1).sum() == 0, "sums differ"


def test_error():
    {}["no such key"]
"""
ENDLESS = """
import pytest

@pytest.mark.parametrize("kind", ["skipped", "endless", "ends", "ends too"])
def test_endless(kind):
    if kind == "skipped":
        pytest.skip("nothing to wait for")
    try:
        while kind == "endless":
            pass
    except Exception:
        pass
"""
BESIDE = """
import torch.nn.functional as F

def attention_ref(q, k, v, causal):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2)
"""


@pytest.fixture
def suite(tmp_path):
    """A checkout: the suite, a module beside it, one of the package's without kernels, and one of its own tests."""
    files = {
        "tests/attention/test_tiny.py": SUITE,
        "tests/attention/test_endless.py": ENDLESS,
        "tests/attention/beside.py": BESIDE,
        "tests/of_the_peer.py": "SEED = 3",
        "flash_attn/__init__.py": "raise ImportError('the extension is not built')",
        "flash_attn/bert_padding.py": "lengths_of = lambda offsets: offsets.diff().tolist()",
        ".git/HEAD": "",
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "tests/attention/test_tiny.py"


def run(suite, *options):
    """(exit status, summary)"""
    file = suite.parent / "summary.json"
    command = [sys.executable, "-m", "tests.testing.peers_suite", str(suite), "--json", str(file), *options]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert file.exists(), done.stderr[-2000:]
    return done.returncode, json.loads(file.read_text())


def test_outcomes(suite):
    status, summary = run(suite, "--sample", "20")
    assert status == 1
    assert (summary["cases"], summary["too large"]) == (15, 4)
    assert summary["functions"] == {
        "test_output": {"agreed": 3, "skipped": 1},
        "test_lengths": {"agreed": 1},
        "test_decoding": {"agreed": 1},
        "test_without_kernels": {"agreed": 1},
        "test_dropout": {"refused": 1},
        "test_private": {"refused": 1},
        "test_differs": {"differs": 1},
        "test_error": {"error": 1},
    }
    assert summary["reasons"]["refused"] == {
        "dropout_p is not implemented": 1,
        "no function flash_attn.cute.interface._flash_attn_fwd": 1,
    }
    assert any(reason.startswith("test_differs: sums differ") for reason in summary["reasons"]["differs"])
    assert summary["reasons"]["error"] == {"test_error: KeyError: 'no such key'": 1}


def test_the_draw_and_the_time(suite):
    """As many cases of those asked for as the sample has; those that are skipped or take too long do not count."""
    endless = suite.with_name("test_endless.py")
    status, summary = run(endless, "--sample", "2", "--seconds", "0.2", "-k", "[e")
    assert status == 0
    assert summary["cases"] == 3
    assert summary["agreed"] == 2
    assert summary["skipped"] == 0
    _, summary = run(endless, "--sample", "9", "--seconds", "0.2")
    assert summary["functions"] == {"test_endless": {"agreed": 2, "skipped": 1, "too costly": 1}}
