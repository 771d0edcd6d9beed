"""Set-up of the whole suite."""

import hashlib
import math
from collections import defaultdict
from pathlib import Path

import pytest

import ptxsim
from cute_fa.engine.compiler import dsl_installed
from cute_fa.engine.table import TABLE
from cute_fa.semantics.errors import CompilerMissingError
from cute_fa.semantics.types import SmArch
from cute_fa.tools.trial import gpu_arch

KERNELS = ("fa2_sm80", "fa3_sm90", "fa4_sm100", "cute_fa")  # folders of their tests
SAMPLED = 16  # one case of so many, at least one of a grid: all of them take two cores hours


def pytest_addoption(parser):
    """``make test-all`` gives ``--all-cases``."""
    parser.addoption("--all-cases", action="store_true", help="every case of the kernels' grids, not a sample")
    parser.addoption("--sample-seed", default="0", help="another sample of the grids")


def pytest_collection_modifyitems(config, items):
    """Deselect what needs a GPU where there is none, or one that the kernels are not for. One may be made believe
    (``perf.gpu_check.dry_run``). Of grids that simulate a sample is kept."""
    believed = config.getoption("--dry-gpu", None)
    present = SmArch(believed) if believed else gpu_arch()
    lacking = {item for item in items if item.get_closest_marker("gpu") and present not in archs_of(item.path)}
    if not config.getoption("--all-cases"):
        lacking |= beyond_sample(items, config.getoption("--sample-seed"))
    if lacking:
        config.hook.pytest_deselected(items=lacking)
        items[:] = [item for item in items if item not in lacking]


def beyond_sample(items: list[pytest.Item], seed: str) -> set[pytest.Item]:
    """What is marked ``thorough``; and of each grid, a test marked ``sampled``, all cases but those that the seed
    chooses, one of ``SAMPLED``."""
    beyond = {item for item in items if item.get_closest_marker("thorough")}
    grids = defaultdict(list)
    for item in items:
        if item.get_closest_marker("sampled") and not item.get_closest_marker("gpu"):
            grids[item.path.relative_to(Path(__file__).parent).as_posix(), item.parent.name, item.originalname].append(
                item
            )
    for grid, cases in grids.items():
        ranked = sorted(cases, key=lambda case: hashlib.sha256(f"{seed} {grid} {case.name}".encode()).digest())
        beyond |= set(ranked[math.ceil(len(ranked) / SAMPLED) :])
    return beyond


def archs_of(test: Path) -> set[SmArch]:
    """The architectures for which there are kernels in the folder that a test's is named after; else all."""
    folder = test.relative_to(Path(__file__).parent).parts[0]
    own = [entry.archs for entry in TABLE.entries if entry.target and entry.target.startswith(f"{folder}.")]
    return {arch for archs in own or [SmArch] for arch in archs}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Where kernels come from a bundle alone, one that it has not got is no failure of the kernel."""
    report = yield
    if call.excinfo is not None and call.excinfo.errisinstance(CompilerMissingError):
        report.outcome, report.longrepr = "skipped", (str(item.path), 0, f"not bundled: {call.excinfo.value.kernel}")
    return report


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
    if dsl_installed():
        ptxsim.install()
