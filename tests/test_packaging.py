"""The wheel: what it holds, and that it runs where there is no checkout."""

import json
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]


class Build(NamedTuple):
    """``source``: the packages and what a build reads, apart from the checkout; ``wheel``: what became of them."""

    source: Path
    wheel: Path

    @property
    def packages(self) -> list[str]:
        return sorted(path.parent.name for path in self.source.glob("*/__init__.py"))


def run(command: list, **options) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def build(tmp_path_factory) -> Build:
    source, wheels = (tmp_path_factory.mktemp(name) for name in ("source", "wheels"))
    for package in (path.parent for path in ROOT.glob("*/__init__.py")):
        shutil.copytree(package, source / package.name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    options = ["--no-build-isolation", "--no-deps", "--no-index", "--disable-pip-version-check", "--wheel-dir", wheels]
    run([sys.executable, "-m", "pip", "wheel", *options, source])
    (wheel,) = wheels.glob("*.whl")
    return Build(source, wheel)


def test_the_wheel_holds_every_file_of_the_packages(build):
    with zipfile.ZipFile(build.wheel) as wheel:
        held = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert {"cute_fa", "fa2_sm80", "fa3_sm90", "fa4_sm100", "perf", "ptxsim"} <= set(build.packages)
    files = (path for package in build.packages for path in (build.source / package).rglob("*") if path.is_file())
    expected = {path.relative_to(build.source).as_posix() for path in files if path.suffix != ".md"}
    assert held == expected
    data = {
        "cute_fa/tools/tour_text.txt",
        "perf/peer_figures.csv",
        "perf/budgets.toml",
        "ptxsim/host/standin.c",
        "ptxsim/machine/products.c",
        "ptxsim/timing/engine.c",
        "ptxsim/timing/gpus/h100.toml",
    }
    assert data | {f"{package}/py.typed" for package in build.packages} <= held


def test_a_problem_runs_from_the_installed_wheel(build, tmp_path):
    """In an environment of its own, without a network, that sees what this one has installed but not its cute_fa: a
    folder that a .pth file names comes behind the environment's own, and .pth files in it are not read."""
    venv.create(tmp_path / "venv", symlinks=True)
    python = tmp_path / "venv" / "bin" / "python"
    packages = Path(run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]).strip())
    installed = [path for path in sys.path if {"site-packages", "dist-packages"} & set(Path(path).parts)]
    (packages / "installed.pth").write_text("\n".join(installed))
    options = ["--no-deps", "--no-index", "--disable-pip-version-check"]
    run([sys.executable, "-m", "pip", "--python", python, "install", *options, build.wheel])

    outside = tmp_path / "outside"
    outside.mkdir()
    private = {"CUTE_FA_CACHE_DIR": str(tmp_path / "kernels"), "PTXSIM_CACHE_DIR": str(tmp_path / "libraries")}
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | private
    names = ", ".join(build.packages)
    places = run(
        [python, "-c", f"import {names}\nfor package in ({names}): print(package.__file__)"],
        cwd=outside,
        env=environment,
    ).split()
    assert places == [str(packages / package / "__init__.py") for package in build.packages]

    problem = "--arch sm_80 --head-dim 64 --seqlen-q 64 --heads 1 --json".split()
    printed = run([python, "-W", "ignore", "-m", "cute_fa", "run", *problem], cwd=outside, env=environment)
    result = json.loads(printed)
    assert result["ok"] and result["canonical_name"] == "fa2_fwd_sm80_bf16_hd64"
    assert 0 < result["out_error"] <= result["out_allowed"]
    assert any((tmp_path / "kernels").rglob("*"))
