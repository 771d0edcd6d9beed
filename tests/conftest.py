"""Set-up of the whole suite."""

from pathlib import Path

import pytest
import torch

import ptxsim

KERNELS = ("fa2_sm80", "fa3_sm90", "cute_fa")  # folders of their tests


def pytest_collection_modifyitems(config, items):
    """Deselect what needs a GPU where there is none."""
    if not torch.cuda.is_available():
        needs_gpu = [item for item in items if item.get_closest_marker("gpu")]
        config.hook.pytest_deselected(items=needs_gpu)
        items[:] = [item for item in items if item not in needs_gpu]


@pytest.fixture(autouse=True)
def _races(request, monkeypatch):
    """Every simulation of our kernels looks for races, except in tests marked ``without_races``."""
    folder = request.path.relative_to(Path(__file__).parent).parts[0]
    if folder in KERNELS and not request.node.get_closest_marker("without_races"):
        simulate = ptxsim.simulate
        monkeypatch.setattr(ptxsim, "simulate", lambda *args, **options: simulate(*args, **{**options, "race": True}))


@pytest.fixture(scope="session", autouse=True)
def _standin():
    """Simulations work in any order of the tests, also after a test that uses the DSL in the real world."""
    ptxsim.install()
