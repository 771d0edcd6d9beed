"""Set-up of the whole suite."""

import pytest
import torch

import ptxsim


def pytest_collection_modifyitems(config, items):
    """Deselect what needs a GPU where there is none."""
    if not torch.cuda.is_available():
        needs_gpu = [item for item in items if item.get_closest_marker("gpu")]
        config.hook.pytest_deselected(items=needs_gpu)
        items[:] = [item for item in items if item not in needs_gpu]


@pytest.fixture(scope="session", autouse=True)
def _standin():
    """Simulations work in any order of the tests, also after a test that uses the DSL in the real world."""
    ptxsim.install()
