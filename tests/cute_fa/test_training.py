"""The example that trains a small GPT, for as many steps as it takes for wrong gradients to show in the loss."""

import importlib.util
import itertools
from pathlib import Path

import pytest

import cute_fa

EXAMPLE = Path(__file__).parents[2] / "examples" / "train_tiny.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("train_tiny", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_losses_are_those_of_torchs_attention(example, monkeypatch):
    monkeypatch.setattr(example, "PACK", 160)
    monkeypatch.setattr(example, "LONGEST", 80)
    with cute_fa.simulate("sm_80") as simulation:
        mine = example.train("cute_fa", 3, "cpu")
        # two layers, forward and backward, every step
        assert len(simulation.launches) >= 3 * 2 * 2
    exact = example.train("torch, attention in fp32", 3, "cpu")
    assert exact[0] - exact[-1] > 1.0
    assert mine == pytest.approx(exact, abs=1e-3)


def test_packs_are_documents(example):
    for tokens, offsets in itertools.islice(example.packs(0), 3):
        assert tokens.shape == (example.PACK,) and tokens.max() < example.VOCABULARY
        lengths = [end - start for start, end in itertools.pairwise(offsets)]
        assert offsets[0] == 0 and offsets[-1] == example.PACK
        assert len(set(lengths)) > 1 and 0 < min(lengths) <= max(lengths) <= example.LONGEST
