"""Flavours of the DSL beside the active one: found, refused by name, and run; each with the static gate and a sample of
simulated problems."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner

from cute_fa.engine.flavour import active, driver_supports
from perf import flavours
from perf.__main__ import main
from perf.flavours import FLAVOURS, FlavourMissing
from tests.testing.flavour_sample import PROBLEMS

ROOT = Path(__file__).parents[2]
USABLE = [flavour for flavour in FLAVOURS if driver_supports(flavour)]
OTHERS = [flavour for flavour in USABLE if flavour != active()]


def run(flavour: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    options = {"cwd": ROOT, "env": {"OMP_NUM_THREADS": "1", **environment}, "timeout": 900}
    return flavours.run(flavour, ["-W", "ignore", *arguments], capture_output=True, text=True, **options)


# ---- what is there ---------------------------------------------------------------------------------------------------

COMPILE = """
import json
from cute_fa.engine import cache, flavour
expected = flavour.active()
import cutlass
from cute_fa.engine.compiler import compile_artifacts
from cute_fa.semantics.types import SmArch
from cutlass.base_dsl.env_manager import get_prefix_dsl_libs
from fa2_sm80.forward.entry import Fa2Forward
from tests.testing.cases import small_problem
assert expected == flavour.active() == f"cu{cutlass.CUDA_VERSION.major}"
compile_artifacts(Fa2Forward.configure(small_problem(SmArch.SM_80)))
print(json.dumps([expected, get_prefix_dsl_libs("CUTE_DSL").split("/")[-3], cache.stats.compiled, cache.stats.loaded]))
"""


def test_no_flavour_is_served_what_another_has_compiled(tmp_path):
    """In processes that share a cache; the runtime library is the flavour's own, too."""
    first = [(flavour, [1, 0]) for flavour in USABLE]
    for flavour, counts in [*first, (USABLE[0], [0, 1])]:
        done = run(flavour, "-c", COMPILE, CUTE_FA_CACHE_DIR=str(tmp_path))
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout) == [flavour, flavour, *counts]


def test_a_process_of_one_flavour_starts_another():
    first, last = USABLE[0], USABLE[-1]
    done = run(first, "-m", "perf", "flavours", last, "-m", "perf", "flavours")
    states = dict(line.split(": ") for line in done.stdout.splitlines())
    assert states == {name: "active" if name == last else "available" for name in USABLE}, done.stderr


@pytest.fixture
def alone(tmp_path, monkeypatch):
    """No flavour but the active one is installed."""
    monkeypatch.setattr(flavours.sys, "prefix", str(tmp_path))
    monkeypatch.setattr(flavours, "driver_supports", lambda flavour: True)
    site = tmp_path / "site"
    monkeypatch.setattr(flavours, "_site", lambda: site)
    _libraries(site, active())


def _libraries(folder: Path, flavour: str, version: str = "4.8.1") -> None:
    """What the wheel of a flavour's libraries puts into a folder, as far as it is looked for."""
    libraries = folder / "nvidia_cutlass_dsl/dsl_packages/cutlass/_mlir/_mlir_libs"
    libraries.mkdir(parents=True)
    (libraries / f"_cutlass_ir.{flavour}{flavours.importlib.machinery.EXTENSION_SUFFIXES[0]}").touch()
    (folder / f"nvidia_cutlass_dsl_libs_{flavour}-{version}.dist-info").mkdir()


OTHER = next(flavour for flavour in FLAVOURS if flavour != active())


def test_a_missing_flavour_is_named_with_the_command_that_fetches_it(alone):
    with pytest.raises(FlavourMissing, match=rf"^flavour {OTHER}: .* 4.8.1 are not installed: .*flavours --install"):
        flavours.run(OTHER, ["-c", "raise SystemExit('started')"])
    done = CliRunner().invoke(main, ["static", "--flavour", OTHER, "--gate"])
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr.startswith(f"FlavourMissing: flavour {OTHER}: its libraries")
    assert CliRunner().invoke(main, ["features", "--flavour", "cu11"]).exit_code == 2


def test_libraries_of_another_version_are_not_used(alone, tmp_path):
    _libraries(tmp_path / OTHER, OTHER, version="4.8.0")
    assert "not installed" in flavours.objection(OTHER)
    (tmp_path / OTHER / f"nvidia_cutlass_dsl_libs_{OTHER}-4.8.1.dist-info").mkdir()
    assert flavours.objection(OTHER) is None
    assert flavours.states() == {active(): "active", OTHER: "available"}


def test_a_driver_that_is_too_old(alone, tmp_path, monkeypatch):
    _libraries(tmp_path / OTHER, OTHER)
    monkeypatch.setattr(flavours, "driver_supports", lambda flavour: flavour != OTHER)
    assert "driver" in flavours.objection(OTHER)
    monkeypatch.setattr(flavours.subprocess, "run", lambda *arguments, **options: pytest.fail("it is fetched"))
    assert flavours.install() == []


def test_only_what_is_missing_is_fetched(alone, tmp_path, monkeypatch):
    fetched = []
    monkeypatch.setattr(flavours.subprocess, "run", lambda command, **options: fetched.append(command))
    assert flavours.install() == [OTHER]
    (command,) = fetched
    assert command[-3:] == ["--target", str(tmp_path / OTHER), f"nvidia-cutlass-dsl-libs-{OTHER}==4.8.1"]
    assert "--no-deps" in command
    _libraries(tmp_path / OTHER, OTHER)
    assert flavours.install() == []


def test_a_process_that_has_not_got_its_flavour_starts_no_further_one(alone, tmp_path, monkeypatch):
    _libraries(tmp_path / OTHER, OTHER)
    monkeypatch.setenv("CUTE_FA_STARTED_FOR_FLAVOUR", OTHER)
    with pytest.raises(FlavourMissing, match=f"a process started for it has {active()}"):
        flavours.run(OTHER, [])


def test_commands_repeat_themselves_with_their_arguments(monkeypatch):
    started = []

    def record(flavour, arguments):
        started.append((flavour, arguments))
        return subprocess.CompletedProcess(arguments, 3)

    monkeypatch.setattr(flavours, "run", record)
    for command in (["static", "--gate", "--head-dim", "64"], ["features", "--arch", "sm_80"]):
        done = CliRunner().invoke(main, [*command, "--flavour", OTHER])
        assert done.exit_code == 3, done.output
        assert started.pop() == (OTHER, ["-m", "perf", *command, "--flavour", OTHER])
    done = CliRunner().invoke(main, ["flavours", OTHER, "-m", "cute_fa", "run", "--help"])
    assert (done.exit_code, started) == (3, [(OTHER, ("-m", "cute_fa", "run", "--help"))])


# ---- what they compile -----------------------------------------------------------------------------------------------


@pytest.mark.thorough
@pytest.mark.parametrize("flavour", OTHERS)
def test_main_loops_of_the_other_flavour(flavour):
    """Its static figures: within the budgets, and those of the documentation."""
    done = run(flavour, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/perf/test_budgets.py")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("flavour", OTHERS)
@pytest.mark.parametrize("every", [6, pytest.param(1, marks=pytest.mark.thorough)])
def test_problems_of_the_other_flavour(flavour, every):
    done = run(flavour, "-m", "tests.testing.flavour_sample", str(every))
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert [result["problem"] for result in results] == list(PROBLEMS[::every])
    assert [result for result in results if result["flavour"] != flavour or not result["ok"]] == []
