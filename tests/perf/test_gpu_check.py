"""What ``make gpu-check`` does where there is a GPU and where there is none, with commands that only pretend."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pandas as pd
import pytest
import torch
from click.testing import CliRunner

from cute_fa.engine.compiler import compile_artifacts
from cute_fa.engine.table import TABLE
from cute_fa.semantics.types import SmArch
from cute_fa.tools.cli import main as cute_fa_main
from perf import __main__ as command_line
from perf import cuda_driver, gpu_check
from perf import results as results_module
from perf.cuda_driver import Driver
from perf.gpu_check import Step
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


def test_steps_run_each_tool_on_each_problem(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_check, "_compute_sanitizer", lambda: "/cuda/compute-sanitizer")
    csv = tmp_path / "check.csv"
    steps = list(gpu_check.steps(csv, ("-k", "forward")))
    tools = [f"{tool} {n}" for tool in ("memcheck", "racecheck", "synccheck") for n in range(1, 6)]
    assert [step.name for step in steps] == ["gpu tests", *tools, "sweep 1", "sweep 2"]
    assert steps[0].command[1:] == ("-m", "pytest", "-m", "gpu", "-k", "forward")
    assert all(step.command[:3] == ("/cuda/compute-sanitizer", "--tool", step.name.split()[0]) for step in steps[1:-2])
    assert all(step.command[-1] == str(csv) for step in steps[-2:])


@pytest.mark.parametrize("problem", gpu_check._SANITIZED)
def test_sanitized_problems_are_served_on_every_architecture(problem, tmp_path, monkeypatch):
    monkeypatch.setattr("cute_fa.tools.cli.compile_artifacts", lambda config: ("", b""))
    for arch in SmArch:
        command = ["compile", *problem.split(), "--arch", arch.value, "--out", str(tmp_path)]
        done = CliRunner().invoke(cute_fa_main, command)
        assert done.exit_code == 0, done.output


def test_our_kernels_have_the_name_that_is_instrumented():
    ptx, _ = compile_artifacts(TABLE.lookup(problem := small_problem(SmArch.SM_90A)).configure(problem))
    (name,) = re.findall(r"\.entry (\w+)", ptx)
    assert name.startswith(gpu_check._KERNELS.removeprefix("kns="))


@pytest.mark.parametrize("grid", gpu_check._SWEEP)
def test_swept_grids_make_sense(grid):
    done = CliRunner().invoke(command_line.main, ["sweep", *grid.split(), "--dry-run"])
    assert done.exit_code == 0, done.output


def fake_steps(csv, pytest_arguments):
    python = sys.executable
    yield Step("fine", (python, "-c", "print('all well')"))
    yield Step("bad", (python, "-c", "import sys; print('out of bounds'); sys.exit(86)"))
    yield Step("slow", (python, "-c", "import time; time.sleep(60)"), limit_s=1)
    yield Step("absent", ("no-such-tool",), missing="not found")
    yield Step("last", (python, "-c", f"open({str(csv)!r}, 'w').write('measured')"))


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    monkeypatch.setattr(cuda_driver, "driver", lambda: Driver(1, (13, 0)))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(command_line, "CudaDevice", FakeDevice)
    monkeypatch.setattr(results_module, "_FOLDER", tmp_path)
    monkeypatch.setattr(gpu_check, "steps", fake_steps)


def invoke(*arguments: str):
    return CliRunner().invoke(command_line.main, ["gpu-check", *arguments])


def test_every_step_runs_and_the_summary_tells(gpu, tmp_path):
    done = invoke()
    assert done.exit_code == 1, done.output
    (summary,) = tmp_path.glob("fake-h100/*-check-*.md")
    assert summary.with_suffix(".csv").read_text() == "measured"
    lines = summary.read_text().splitlines()
    results = {line.split(" | ")[0].strip("| "): line.split(" | ")[1] for line in lines[2:7]}
    assert results == {"fine": "ok", "bad": "failed", "slow": "timed out", "absent": "not found", "last": "ok"}
    assert "out of bounds" in lines and "all well" not in lines
    assert (summary.with_suffix("") / "fine.log").read_text() == "all well\n"
    assert summary.read_text() in done.stdout


def test_a_check_cut_short_keeps_its_summary(gpu, tmp_path, monkeypatch):
    def cut_short(csv, pytest_arguments):
        yield next(fake_steps(csv, pytest_arguments))
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu_check, "steps", cut_short)
    assert invoke().exit_code == 1
    (summary,) = tmp_path.glob("fake-h100/*-check-*.md")
    assert summary.read_text().splitlines()[-1].startswith("| fine | ok | ")


def test_what_is_not_installed_does_not_fail(gpu, monkeypatch):
    chosen = [step for step in fake_steps("unused", ()) if step.name in ("fine", "absent")]
    monkeypatch.setattr(gpu_check, "steps", lambda *arguments: chosen)
    done = invoke()
    assert done.exit_code == 0, done.output
    assert "absent: not found" in done.stdout


def test_without_a_gpu_the_static_figures_are_made(monkeypatch):
    monkeypatch.setattr(cuda_driver, "driver", lambda: None)
    asked = []

    def static_table(keys, *, fa4, progress):
        asked.extend(keys)
        return pd.DataFrame({"per_score": [5.5]})

    monkeypatch.setattr("perf.static.static_table", static_table)
    done = invoke()
    assert done.exit_code == 0, done.output
    assert "No GPU on this machine" in done.stdout and "5.5" in done.stdout
    named = {(key.arch.value, key.head_dim, key.causal) for key in asked}
    assert named == {(a, d, causal) for a in ("sm_80", "sm_90a") for d in (64, 128, 256) for causal in (False, True)}


def test_a_torch_that_does_not_see_the_gpu_is_an_error(monkeypatch):
    monkeypatch.setattr(cuda_driver, "driver", lambda: Driver(1, (12, 4)))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = invoke()
    assert done.exit_code == 1
    assert "supports CUDA 12.4" in done.stderr and "install a build for at most CUDA 12.4" in done.stderr
