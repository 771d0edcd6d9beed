"""What ``make gpu-check`` does where there is a GPU and where there is none, with commands that only pretend."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import venv
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from click.testing import CliRunner

from cute_fa import RangePlan
from cute_fa.engine.compiler import compile_artifacts
from cute_fa.engine.table import TABLE
from cute_fa.semantics.errors import ArgumentError, BundleError, CompilerMissingError
from cute_fa.semantics.types import Direction, SmArch
from cute_fa.semantics.walk_layout import Header
from cute_fa.tools.cli import _configs_of
from cute_fa.tools.cli import main as cute_fa_main
from cute_fa.tools.tour import layers_of
from cute_fa.tools.trial import Machine, problem_of_spec
from cute_fa.tools.warm import read_keys
from fa3_sm90.backward.config import Fa3BackwardConfig
from fa3_sm90.backward_split.config import Fa3SplitBackwardConfig
from perf import command_line, cuda_driver
from perf import results as results_module
from perf.__main__ import main
from perf.cuda_driver import Driver
from perf.gpu_check import pack, steps, sweep, walk_trial
from perf.gpu_check.smoke import SMOKE, Attention, served
from perf.gpu_check.steps import Outcome, Plan, Step
from perf.static import COLUMNS
from perf.workload import Workload
from tests.cute_fa.test_backward_ops import FULL
from tests.cute_fa.test_service import DENSE as SERVED
from tests.testing.cases import small_problem
from tests.testing.clock import FakeDevice

ROOT = Path(__file__).parents[2]
DRIVER = """
int cuInit(unsigned flags) {{ return {init}; }}
int cuDeviceGetCount(int *count) {{ *count = {gpus}; return 0; }}
int cuDriverGetVersion(int *version) {{ *version = {version}; return 0; }}
"""


def fake_driver(folder: Path, init: int = 0, gpus: int = 2, version: int = 12080) -> Path:
    source, library = folder / "driver.c", folder / "libcuda.so.1"
    source.write_text(DRIVER.format(init=init, gpus=gpus, version=version))
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=True)
    return library


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ({}, Driver(2, (12, 8))),
        ({"version": 13000}, Driver(2, (13, 0))),
        ({"gpus": 0}, None),
        ({"init": 100}, None),  # CUDA_ERROR_NO_DEVICE
    ],
)
def test_driver_is_asked_without_nvidia_smi(tmp_path, fields, found):
    assert cuda_driver.driver(str(fake_driver(tmp_path, **fields))) == found


def test_without_a_driver_there_is_no_gpu():
    assert cuda_driver.driver("libno-such-driver.so.1") is None


@pytest.mark.parametrize(
    ("version", "extra", "index"), [(12040, "cu12", "an-index"), (13010, "cu13", ""), (None, "cu12", "")]
)
def test_make_installs_what_the_driver_supports(tmp_path, version, extra, index):
    """The commands that make would run where the driver is the one made here; None: it has no GPU."""
    fake_driver(tmp_path, **({"version": version} if version else {"gpus": 0}))
    environment = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "LD_LIBRARY_PATH": str(tmp_path)}
    done = subprocess.run(
        ["make", "-nB", "gpu-check", f"TORCH_INDEX={index}"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    installs = [line for line in done.stdout.splitlines() if "pip install" in line]
    assert f"[dev,perf,{extra}]" in installs[-1]
    assert installs[0].endswith('"torch==2.13.0"')
    assert ("--index-url" in installs[0]) == bool(index)
    assert index in installs[0]
    assert "-m perf gpu-check" in done.stdout


FAKE_PIP = """
import os, sys
with open(os.environ["INSTALLED"], "a") as file:
    print(*sys.argv[1:], file=file)
"""
FAKE_TORCH = """
__version__ = {version!r}
class cuda:
    is_available = staticmethod(lambda: {sees_gpu})
"""


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("version", "sees_gpu", "kept"), [("2.11.0+cu130", True, True), ("2.10.1", True, False), ("2.13.0", False, False)]
)
def test_make_keeps_the_torch_of_a_virtual_environment(tmp_path, version, sees_gpu, kept):
    """python3 is a virtual environment, whose torch sees a GPU, is too old, or sees none. pip only notes its calls."""
    checkout, outer, pip = (tmp_path / name for name in ("checkout", "outer", "pip"))
    for name in ("Makefile", "pyproject.toml", "perf/cuda_driver.py"):
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, checkout / name)
    fake_driver(tmp_path)
    venv.create(outer, symlinks=True)
    (packages,) = outer.glob("lib/python*/site-packages")
    (packages / "torch.py").write_text(FAKE_TORCH.format(version=version, sees_gpu=sees_gpu))
    (packages / "behind.pth").write_text(str(tmp_path / "behind"))
    (tmp_path / "behind").mkdir()
    (tmp_path / "behind" / "a_dependency.py").touch()
    pip.mkdir()
    (pip / "pip.py").write_text(FAKE_PIP)
    environment = {"PATH": f"{outer / 'bin'}:/usr/bin:/bin", "LD_LIBRARY_PATH": str(tmp_path)}
    fakes = {"PYTHONPATH": str(pip), "INSTALLED": str(tmp_path / "installed")}
    subprocess.run(["make", ".venv/.installed"], cwd=checkout, env=environment | fakes, check=True)
    installs = (tmp_path / "installed").read_text().splitlines()
    assert [line.split()[-1] for line in installs] == ["torch==2.13.0"] * (not kept) + [".[dev,perf,cu12]"]
    code = "import torch, a_dependency; print(torch.__file__)"
    found = subprocess.run([checkout / ".venv/bin/python", "-c", code], capture_output=True, text=True, env=environment)
    assert found.stdout.strip() == (str(packages / "torch.py") if kept else ""), found.stderr


def test_a_folder_of_packages_is_enough():
    """The page's line for machines without a package index, with this environment's packages as the folder, and an
    interpreter that has none of its own (-S), so that no .pth file is read."""
    (line,) = re.findall(r"^    (export PYTHONPATH=.*)$", (ROOT / "docs/performance.md").read_text(), re.M)
    spec = importlib.util.find_spec("nvidia_cutlass_dsl")
    folder = Path(next(iter(spec.submodule_search_locations))).parent
    code = "import cutlass.cute, torch; print(cutlass.cute.__file__)"

    def imported(line: str) -> subprocess.CompletedProcess:
        command = ["bash", "-euc", f"{line}\nexec {sys.executable} -W ignore -S -c '{code}'"]
        return subprocess.run(
            command, env={"FOLDER": str(folder), "PATH": "/usr/bin:/bin"}, capture_output=True, text=True
        )

    done = imported(line)
    assert done.stdout.startswith(str(folder)), done.stderr
    assert "No module named 'cutlass'" in imported("export PYTHONPATH=$FOLDER").stderr


def test_the_plan_is_in_an_order_of_value(monkeypatch, tmp_path):
    monkeypatch.setattr(steps, "_compute_sanitizer", lambda: "/cuda/compute-sanitizer")
    planned = list(Plan(tmp_path, pytest_arguments=("-k", "forward"), processors=16).steps())
    phases = [phase for phase, _ in itertools.groupby(step.phase for step in planned)]
    assert phases == ["smoke", "sweep", "tests", "sanitizers"]
    of = {phase: [step for step in planned if step.phase == phase] for phase in phases}
    assert [step.name for step in of["smoke"]] == list(SMOKE)
    assert all("perf.gpu_check.smoke" in step.command and step.together == 4 for step in of["smoke"])
    assert of["sweep"][0].command[-2:] == ("--out", str(tmp_path / "sweep.csv"))
    assert all(step.command[-2:] == ("-k", "forward") and "8" in step.command for step in of["tests"])
    tools = [step.name.split()[0] for step in of["sanitizers"]]
    assert tools == [tool for tool in ("memcheck", "racecheck", "synccheck") for _ in steps.SANITIZED]
    assert {step.name.split()[0] for step in of["sanitizers"] if step.informative} == {"synccheck"}
    for step in of["sanitizers"]:
        assert step.command[:3] == ("/cuda/compute-sanitizer", "--tool", step.name.split()[0])
        assert step.command[step.command.index("--report-api-errors") + 1] == "no"


def test_the_plan_has_every_test_that_needs_a_gpu(tmp_path):
    """Tests of their own, and those that a class has from one of tests/testing."""
    shared = "".join(file.read_text() for file in (ROOT / "tests" / "testing").glob("*.py"))
    classes = re.findall(r"^class (\w+).*\n((?:\n| +.*\n)*)", shared, re.MULTILINE)
    inherited = "|".join(name for name, body in classes if "@pytest.mark.gpu" in body)
    marked = {
        file.relative_to(ROOT / "tests").with_suffix("").as_posix()
        for file in (ROOT / "tests").rglob("test_*.py")
        if re.search(rf"^ *@pytest.mark.gpu$|^class Test\w+\((?:{inherited})\)", file.read_text(), re.MULTILINE)
    }
    assert "fa4_sm100/test_forward" in marked
    assert {file for files in steps.TESTS.values() for file in files.split()} == marked
    run = {word for step in Plan(tmp_path).steps() if step.phase == "tests" for word in step.command}
    assert "tests/cute_fa/test_composable_kernel_grid.py" not in run
    everything = {word for step in Plan(tmp_path, everything=True).steps() for word in step.command}
    assert "tests/cute_fa/test_composable_kernel_grid.py" in everything


def test_no_file_stops_the_others_where_only_torch_is_installed(tmp_path):
    """What a pack and its machine have not: one file that cannot be imported, and pytest runs no test of any."""
    absent = "transformers", "flash_attn", "quack", "cutlass", "matplotlib", "pyarrow", "viztracer", "wasmtime"
    code = f"""
import sys
import pytest
from importlib.machinery import PathFinder

class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, *rest):
        return None if name.startswith({absent!r}) else PathFinder.find_spec(name, *rest)

sys.meta_path[sys.meta_path.index(PathFinder)] = Without
sys.exit(pytest.main(["-q", "--collect-only", "-m", "gpu", "--dry-gpu", "sm_90a", "-p", "perf.gpu_check.dry_run",
                      *sys.argv[1:]]))
"""
    files = [word for step in Plan(tmp_path).steps() for word in step.command if word.startswith("tests/")]
    done = subprocess.run([sys.executable, "-c", code, *files], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_a_pack_has_what_no_dry_run_comes_to(arch, tmp_path):
    """Both kernels of a backward, the tour, and the problems of tests that ask the GPU something before they launch."""
    keys = tmp_path / "keys"
    keys.write_text(pack._not_walked(arch))
    packed = read_keys(keys, _configs_of)
    needed = [f"--arch {arch} {problem}".split() for problem in steps.SANITIZED]
    needed += [[word for word in line if word != "--backward"] for line in needed]
    needed.append(["--arch", arch, "--causal"])  # test_cli's
    needed = [config for line in needed for config in _configs_of(line)]
    plain = replace(FULL, alibi=False, learnable_sink=False)
    specs = [SERVED, plain, Workload(heads=4, heads_kv=2, seqlen=512, tokens=1024, causal=True).spec()]
    specs += [layer.spec(layer.length) for layer in layers_of(SmArch(arch))]
    problems = [problem_of_spec(spec, SmArch(arch)) for spec in specs]
    problems.append(problem_of_spec(plain, SmArch(arch), direction=Direction.BACKWARD))
    needed += [TABLE.lookup(problem).configure(problem) for problem in problems]
    assert set(packed) == set(needed)


@pytest.mark.parametrize("result", ["ok", "failed", "timed out", "cut short", "not reached", "not run"])
def test_a_pack_is_of_a_whole_dry_run(result, tmp_path, monkeypatch):
    def walked(plan, deadline, tell):
        (plan.out / "log").touch()
        missing = Step("sanitizers", "memcheck", (), 1, missing="a GPU is needed")
        return [Outcome(Step("tests", "kernels", (), 1), result), Outcome(missing, "not run")]

    monkeypatch.setattr(pack, "run", walked)
    with nullcontext() if result == "ok" else pytest.raises(BundleError, match=f"the dry run's kernels {result}"):
        pack._record(tmp_path / "keys", "sm_90a", print)
    assert "CUTE_FA_RECORD_KEYS" not in os.environ


def test_a_pack_that_failed_is_made_anew(tmp_path, monkeypatch):
    """What it leaves is no reason to refuse the next attempt."""

    def fail(*arguments):
        raise BundleError("the first step")

    monkeypatch.setattr(pack, "_record", fail)
    for _ in range(2):
        with pytest.raises(BundleError, match="the first step"):
            pack.write_pack(tmp_path / "pack", "sm_90a", "3.12", 1, print)
    (tmp_path / "other").mkdir()
    with pytest.raises(ArgumentError, match="is no pack"):
        pack.write_pack(tmp_path / "other", "sm_90a", "3.12", 1, print)


@pytest.mark.parametrize(("python", "older"), [("3.10", True), ("3.12", False)])
def test_a_pack_has_what_stops_a_test_that_hangs(python, older, tmp_path, monkeypatch):
    """pytest-timeout, and what pytest needs on the older Python."""
    called = []
    monkeypatch.setattr(pack, "_call", called.append)
    pack._fetch(tmp_path, python)
    assert "pytest-timeout" in called[0] and f"--python-version={python}" in called[0]
    assert ({"exceptiongroup", "tomli"} <= set(called[0])) is older
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "pytest_timeout")
    for compiles, limit in ((False, 90), (True, 270)):
        monkeypatch.setattr(steps, "dsl_installed", lambda compiles=compiles: compiles)
        commands = [" ".join(step.command) for step in Plan(tmp_path).steps() if step.phase == "tests"]
        # A signal is handled only when the call that hangs returns; the thread ends the process.
        assert all(f"--timeout {limit} --timeout-method thread" in command for command in commands)


def test_results_go_where_the_caller_is(tmp_path):
    """--out is relative to the caller's folder, and nothing is imported from there."""
    (tmp_path / "pack/perf").mkdir(parents=True)
    (tmp_path / "pack/perf/__main__.py").write_text("import os, sys; print(os.getcwd(), *sys.argv[1:])")
    (tmp_path / "caller/perf").mkdir(parents=True)
    (tmp_path / "caller/perf/__main__.py").write_text("print('another')")
    (tmp_path / "pack/gpu-check.sh").write_text(pack._SCRIPT)
    command = ["sh", "../pack/gpu-check.sh", "--out", "results"]
    environment = {"PY": sys.executable, "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, cwd=tmp_path / "caller", env=environment, capture_output=True, text=True)
    assert done.stdout.split() == [str(tmp_path / "caller"), "gpu-check", "--out", "results"], done.stderr
    bare = tmp_path / "bare"  # an interpreter without packages
    bare.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n')
    bare.chmod(0o755)
    environment["PY"] = str(bare)
    done = subprocess.run(command, cwd=tmp_path / "caller", env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "gpu-check.sh: this python3 has no torch, numpy, pandas; PY=... names another\n"


def test_failures_are_told_when_they_happen(tmp_path):
    """Also by a run that is stopped before its end, where pytest itself would tell of them."""
    (tmp_path / "test_two.py").write_text("def test_a(): assert 1 == 2\ndef test_b(): import time; time.sleep(60)\n")
    command = (sys.executable, "-u", "-m", "pytest", "-n", "1", "-p", "perf.gpu_check.failures", str(tmp_path))
    outcome = steps._run(Step("tests", "two", command, 12), tmp_path / "log", time.monotonic() + 100)
    assert outcome.result == "timed out"
    assert outcome.output.count("assert 1 == 2") >= 1


def test_a_broken_context_fails_no_later_test(tmp_path):
    """The worker ends with it; the tests that it had still to run pass in another."""
    (tmp_path / "test_three.py").write_text("""
import pytest, torch
torch.cuda.is_initialized = lambda: True
broken = []
def synchronize():
    if broken:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
torch.cuda.synchronize = synchronize
def test_breaks():
    broken.append(1)
    assert broken == [2]
def test_fails(): assert 3 == 4
@pytest.mark.parametrize("i", range(4))
def test_later(i): torch.cuda.synchronize()
""")
    command = (sys.executable, "-m", "pytest", "-n", "1", "-p", "perf.gpu_check.failures", str(tmp_path))
    outcome = steps._run(Step("tests", "three", command, 60), tmp_path / "log", time.monotonic() + 100)
    assert outcome.result == "failed" and "assert [1] == [2]" in outcome.output
    assert re.search(r"4 passed", outcome.output.splitlines()[-1]), outcome.output


@pytest.mark.parametrize(
    ("provider", "status", "reason", "code"),
    [
        ("cute-fa", "skipped", "RuntimeError: CUDA error 700", 1),
        ("cute-fa", "wrong", "out disagrees with the reference", 1),
        ("cute-fa", "skipped", "CompilerMissingError: fa3_fwd: no bundle", 0),
        ("cute-fa", "skipped", "the reference is CUDA out of memory", 0),
        ("cuDNN", "skipped", "RuntimeError: no plan", 0),
    ],
)
def test_the_sweep_fails_where_ours_does_and_says_why(provider, status, reason, code, monkeypatch, tmp_path):
    class OneRow:
        def __init__(self, *_):
            pass

        def run(self, workloads):
            yield workloads[0], [{"provider": provider, "status": status, "reason": reason}]

    monkeypatch.setattr(sweep, "Sweep", OneRow)
    monkeypatch.setattr(sweep, "CudaDevice", FakeDevice)
    done = CliRunner().invoke(sweep.main, ["--out", str(tmp_path / "a.csv")])
    assert (done.exit_code, f"{provider} {status} ({reason})" in done.output) == (code, True), done.output


@pytest.mark.without_races
def test_a_walk_that_hides_or_shows_a_pair_too_many_is_noticed(monkeypatch):
    right, machine = RangePlan._make_walk, Machine(SmArch.SM_80, simulated=True)
    assert walk_trial.run_walk_trial(machine).wrong == 0

    def flipped(plan, *arguments):
        walk = right(plan, *arguments)
        # of the mask tile behind the one that hides nothing: the first row's first column
        walk[int(walk[Header.MASKS]) + 128 * 2] ^= 1
        return walk

    monkeypatch.setattr(RangePlan, "_make_walk", flipped)
    assert walk_trial.run_walk_trial(machine).wrong == 1


@pytest.mark.parametrize(
    ("arch", "forward", "others", "backwards"),
    [
        (
            SmArch.SM_90A,
            "fa3_sm90.forward",
            {"fa3_sm90.decode"},
            {"fa3_sm90.backward", "fa3_sm90.backward_split", "fa2_sm80.backward"},
        ),
        (SmArch.SM_100A, "fa4_sm100.forward", set(), {"fa2_sm80.backward"}),
    ],
)
def test_smoke_has_every_kernel_of_hopper_and_blackwell(arch, forward, others, backwards):
    """Every entry of the table that serves it, at head dims and features that differ most; and what asks for all of
    an SM's shared memory."""
    configs = {}
    for name, problem in SMOKE.items():
        if isinstance(problem, Attention):
            described, family = problem.described(arch)
            configs[name] = TABLE.lookup(described, family).configure(described)
    kinds = {type(config) for config in configs.values()}
    assert {kind.__module__.rpartition(".")[0] for kind in kinds} == {
        forward, "fa2_sm80.forward", "fa2_sm80.split", *others, *backwards
    }  # fmt: skip
    tiles = {config.tile_m for config in configs.values() if isinstance(config, Fa3BackwardConfig)}
    assert tiles == ({64, 128} if "fa3_sm90.backward" in backwards else set())
    clusters = {config.cluster for config in configs.values() if isinstance(config, Fa3SplitBackwardConfig)}
    assert clusters == ({1, 2} if "fa3_sm90.backward_split" in backwards else set())
    assert {config.head_dim for config in configs.values()} == {64, 128, 256}
    under_plans = [config for config in configs.values() if config.ranges]
    of_plans = {type(config).__module__.rpartition(".")[0] for config in under_plans}
    assert of_plans == {forward, "fa2_sm80.forward", "fa2_sm80.backward"}
    assert {config.query_kernel is None for config in under_plans if hasattr(config, "query_kernel")} == {True, False}
    largest = configs["largest shared memory"]
    assert (largest.head_dim, largest.head_dim_v, largest.smem_bytes) == (256, 176, arch.smem_bytes)
    in_fp8 = {config.head_dim for config in configs.values() if config.dtype.is_fp8}
    assert in_fp8 == {64, 128, 256} and served(arch) == list(SMOKE)


def test_every_architecture_runs_every_smoke_problem_and_workload(tmp_path):
    """Those in fp8, too: where there are no products in fp8 the kernel that widens codes serves them."""
    for arch in (SmArch.SM_80, SmArch.SM_90A, SmArch.SM_100A, SmArch.SM_103A):
        names = [step.name for step in Plan(tmp_path, dry=arch.value).steps() if step.phase == "smoke"]
        assert set(SMOKE) == set(names)
        assert sweep.workloads(arch) == list(sweep.WORKLOADS)


@pytest.mark.parametrize("problem", steps.SANITIZED)
def test_sanitized_problems_are_served_on_every_architecture(problem, tmp_path, monkeypatch):
    monkeypatch.setattr("cute_fa.tools.cli.compile_artifacts", lambda config: ("", b""))
    for arch in SmArch:
        command = ["compile", *problem.split(), "--arch", arch.value, "--out", str(tmp_path)]
        done = CliRunner().invoke(cute_fa_main, command)
        assert done.exit_code == 0, done.output


def test_our_kernels_have_the_name_that_is_instrumented():
    ptx, _ = compile_artifacts(TABLE.lookup(problem := small_problem(SmArch.SM_90A)).configure(problem))
    (name,) = re.findall(r"\.entry (\w+)", ptx)
    assert name.startswith(steps._KERNELS.removeprefix("kns="))


class FakePlan(Plan):
    """Commands that only pretend; ``out`` is where they leave what they wrote."""

    def steps(self):
        python = sys.executable
        yield Step("smoke", "fine", (python, "-c", "print('all well')"), 60, together=3)
        yield Step("smoke", "slow", (python, "-c", "import time; print('begun', flush=True); time.sleep(60)"), 1, 3)
        yield Step("smoke", "unbundled", (python, "-c", "import sys; sys.exit(3)"), 60, 3)
        yield Step("tests", "bad", (python, "-c", "import sys; print('out of bounds'); sys.exit(1)"), 60)
        yield Step("tests", "nothing there", (python, "-c", "import sys; sys.exit(5)"), 60)
        yield Step("sanitizers", "absent", ("no-such-tool",), 60, missing="not found")
        yield Step("sanitizers", "told", (python, "-c", "import sys; sys.exit(86)"), 60, informative=True)
        yield Step("sanitizers", "last", (python, "-c", f"open({str(self.out / 'x.csv')!r}, 'w').write('y')"), 60)


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    monkeypatch.setattr(cuda_driver, "driver", lambda: Driver(1, (13, 0)))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(command_line, "CudaDevice", FakeDevice)
    monkeypatch.setattr(results_module, "_FOLDER", tmp_path)
    monkeypatch.setattr(steps, "Plan", FakePlan)


def invoke(*arguments: str):
    return CliRunner().invoke(main, ["gpu-check", *arguments])


def results_of(summary: Path) -> dict[str, str]:
    rows = [line.split(" | ") for line in summary.read_text().splitlines() if line.startswith("| ")][1:]
    return {row[1]: row[2] for row in rows}


def test_every_step_runs_and_the_summary_tells(gpu, tmp_path):
    done = invoke()
    assert done.exit_code == 1, done.output
    (summary,) = tmp_path.glob("fake-h100/*-check-*/summary.md")
    assert results_of(summary) == {
        "fine": "ok",
        "slow": "timed out",
        "unbundled": "not bundled",
        "bad": "failed",
        "nothing there": "nothing to run",
        "absent": "not run",
        "told": "found",
        "last": "ok",
    }
    folder, text = summary.parent, summary.read_text()
    assert (folder / "x.csv").read_text() == "y"
    assert "out of bounds" in text.splitlines() and "all well" not in text.splitlines()
    assert {file.name for file in folder.iterdir()} == {
        "machine.json", "summary.md", "smoke.log", "tests.log", "sanitizers.log", "x.csv"
    }  # fmt: skip
    log = (folder / "smoke.log").read_text().splitlines()
    assert "all well" in log and "begun" in log  # also of one that was stopped
    facts = json.loads((folder / "machine.json").read_text())
    assert facts["gpu"] == FakeDevice().columns()["gpu"] and facts["versions"]["numpy"] and "sm_mhz" in facts["clocks"]
    assert text in done.stdout


def test_a_step_that_hangs_leaves_nothing_behind(tmp_path):
    """Its children go with it: one that held the GPU would keep the next from it."""
    child = "import subprocess, sys; p = subprocess.Popen(['sleep', '60']); print(p.pid, flush=True); p.wait()"
    step = Step("smoke", "hangs", (sys.executable, "-c", child), 2)
    outcome = steps._run(step, tmp_path / "log", time.monotonic() + 100)
    assert outcome.result == "timed out" and outcome.seconds < 30
    state = Path("/proc", outcome.output.splitlines()[-1], "stat")
    for _ in range(100):  # it is killed, and gone a little later
        if not state.exists() or state.read_text().split()[2] == "Z":
            return
        time.sleep(0.1)
    raise AssertionError(f"{state} is still there")


@pytest.mark.sampled
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_what_interrupts_it_ends_what_is_running(number, tmp_path):
    """At once, also what waits for its turn; a step that went on would hold the GPU."""
    code = f"""
import sys, time
from pathlib import Path
from perf.gpu_check.steps import Plan, Step, run

class Long(Plan):
    def steps(self):
        for i in range(4):
            program = f"import os, time; open({str(tmp_path)!r} + '/' + str(os.getpid()), 'w'); time.sleep(60)"
            yield Step("smoke", str(i), (sys.executable, "-c", program), 60, 2)

run(Long(Path({str(tmp_path)!r})), time.monotonic() + 600, print)
"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.DEVNULL)
    for _ in range(600):
        if len(begun := [path.name for path in tmp_path.iterdir() if path.name.isdigit()]) == 2:
            break
        time.sleep(0.1)
    process.send_signal(number)
    assert process.wait(20) != 0
    assert {path.name for path in tmp_path.iterdir() if path.name.isdigit()} == set(begun)
    assert not any(Path("/proc", pid).exists() for pid in begun)


def test_a_process_that_cannot_be_killed_is_left_behind(tmp_path, monkeypatch):
    """As one that waits in the driver for a GPU that does not answer."""
    monkeypatch.setattr(steps.os, "killpg", lambda *_: None)
    monkeypatch.setattr(steps, "_KILL_LIMIT_S", 1)
    step = Step("smoke", "stuck", (sys.executable, "-c", "import time; time.sleep(20)"), 1)
    outcome = steps._run(step, tmp_path / "log", time.monotonic() + 100)
    assert (outcome.result, outcome.seconds < 10) == ("timed out", True)


def test_of_long_output_the_end_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(steps, "_KEPT_BYTES", 1000)
    step = Step("smoke", "prints", (sys.executable, "-c", "print('x' * 10**6); print('the end')"), 60, 2)
    outcome = steps._run(step, tmp_path / "log", time.monotonic() + 100)
    assert len(outcome.output) == 1000 and outcome.output.endswith("the end\n")


def test_it_stops_in_time_and_tells_what_it_did_not_reach(gpu, tmp_path):
    class Long(FakePlan):
        def steps(self):
            for name in ("first", "second", "third"):
                yield Step("tests", name, (sys.executable, "-c", "import time; time.sleep(60)"), 60)

    began = time.monotonic()
    plan = Long(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steps, "_SHORTEST_S", 2)
        outcomes = steps.run(plan, began + 4, lambda outcome: None)
    assert time.monotonic() - began < 8
    assert [outcome.result for outcome in outcomes] == ["cut short", "not reached", "not reached"]
    assert not any(outcome.bad for outcome in outcomes)  # the time was over: nothing failed
    # nothing can be reached in half a minute
    done = invoke("--minutes", "0.5", "--out", str(tmp_path / "out"))
    assert done.exit_code in (0, 1)
    assert set(results_of(tmp_path / "out" / "summary.md")) >= {"fine", "last"}


def test_a_check_cut_short_keeps_its_summary(gpu, tmp_path, monkeypatch):
    def cut_short(plan, deadline, tell):
        tell(Outcome(next(plan.steps()), "ok", 1.0, "all well"))
        raise KeyboardInterrupt

    monkeypatch.setattr(steps, "run", cut_short)
    assert invoke().exit_code == 1
    (summary,) = tmp_path.glob("fake-h100/*-check-*/summary.md")
    assert results_of(summary)["fine"] == "ok" and results_of(summary)["last"] == "not reached"


def test_what_is_not_installed_does_not_fail(gpu, monkeypatch):
    monkeypatch.setattr(
        FakePlan,
        "steps",
        lambda plan, all_steps=FakePlan.steps: (s for s in all_steps(plan) if s.name in ("fine", "absent", "told")),
    )
    done = invoke()
    assert done.exit_code == 0, done.output
    assert "| absent | not run | 0 | not found |" in done.stdout


def test_without_a_gpu_the_static_figures_are_made(monkeypatch):
    monkeypatch.setattr(cuda_driver, "driver", lambda: None)
    asked = []

    def static_table(keys, *, fa4, progress):
        asked.extend(keys)
        return pd.DataFrame({"per_score": [5.5]}).reindex(columns=COLUMNS)

    monkeypatch.setattr("perf.static.static_table", static_table)
    done = invoke()
    assert done.exit_code == 0, done.output
    assert "No GPU on this machine" in done.stdout and "5.5" in done.stdout
    named = {(key.arch.value, key.head_dim, key.head_dim_v) for key in asked}
    square = {(a, d, d) for a in ("sm_80", "sm_90a", "sm_100a") for d in (64, 128, 256)}
    assert named == square | {("sm_100a", 192, 128)}
    assert {key.causal for key in asked} == {False, True}


def test_without_a_gpu_and_the_compiler_it_says_so(monkeypatch):
    """In a pack, on a machine whose GPU is not there."""
    monkeypatch.setattr(cuda_driver, "driver", lambda: None)

    def static_table(keys, **_):
        raise CompilerMissingError("fa2_fwd", "nothing")

    monkeypatch.setattr("perf.static.static_table", static_table)
    done = invoke()
    assert done.exit_code == 1 and "No GPU on this machine" in done.stdout
    assert done.stderr.startswith("CompilerMissingError: fa2_fwd: nothing")


def test_a_torch_that_does_not_see_the_gpu_is_an_error(monkeypatch):
    monkeypatch.setattr(cuda_driver, "driver", lambda: Driver(1, (12, 4)))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = invoke()
    assert done.exit_code == 1
    assert "supports CUDA 12.4" in done.stderr and "install a build for at most CUDA 12.4" in done.stderr
