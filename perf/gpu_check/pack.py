"""The folder of ``make gpu-pack``: ``gpu-check`` for a machine with a GPU, torch and no package index.

The tree, TVM-FFI and what is pure Python for that machine's interpreter, and a bundle of exactly the kernels that the
dry run launched. ``gpu-check.sh`` in it runs with the machine's own python3 and torch.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from cute_fa.engine.recording import line_of
from cute_fa.semantics.errors import ArgumentError, BundleError
from cute_fa.semantics.types import Direction, SmArch
from cute_fa.tools.tour_keys import tour_configs
from perf.gpu_check.steps import SANITIZED, Plan, run

LIMIT_MB = 60
_TREE = (
    "cute_fa fa2_sm80 fa3_sm90 fa4_sm100 ptxsim perf tests examples pyproject.toml Makefile README.md LICENSE".split()
)
_LEFT_OUT = ("__pycache__", "results", "*.png", "*.pyc")
# Beside the machine's own torch, NumPy and pandas: what is small and may be missing there.
_PURE = (
    "click rich markdown-it-py mdurl pygments platformdirs filelock typing-extensions pytest iniconfig pluggy "
    "packaging pytest-xdist execnet pytest-timeout hypothesis sortedcontainers nvidia-ml-py"
).split()
_BEFORE_3_11 = ["exceptiongroup", "tomli"]  # of pytest
# Problems of tests whose dry run ends before their kernels: those of dry_run.NOT_WALKED but for test_cache's, whose
# kernel is the test's own and not bundled, and test_cli's.
_NOT_WALKED = (
    "--causal",
    "--batch 2 --heads 4 --heads-kv 2 --seqlen-q 512 --causal",
    "--batch 2 --heads 4 --heads-kv 2 --seqlen-q 40 --seqlen-k 70 --head-dim 64 --causal",
    "--batch 2 --heads 4 --heads-kv 2 --seqlen-q 20 --seqlen-k 36 --head-dim 32 --causal --backward",
)
_SCRIPT = """#!/bin/sh
# ./gpu-check.sh --minutes 8 --out results: what this machine's GPU can tell; PY names another python3.
here=$(cd "$(dirname "$0")" && pwd)
PYTHONPATH="$here:$here/site" CUTE_FA_BUNDLES="$here/bundle"
export PYTHONPATH CUTE_FA_BUNDLES
"${PY:-python3}" -c '
import importlib.util, sys
missing = [name for name in ("torch", "numpy", "pandas") if not importlib.util.find_spec(name)]
sys.exit(bool(missing) and "gpu-check.sh: this python3 has no " + ", ".join(missing) + "; PY=... names another")
' || exit
# From where the caller is, whose --out is relative to it; what lies there is not imported.
PYTHONSAFEPATH=1 exec "${PY:-python3}" -m perf gpu-check "$@"
"""


def write_pack(folder: Path, arch: str, python: str, jobs: int, tell: Callable[[str], None]) -> Path:
    """Write the folder anew and pack it: ``folder`` and ``folder.tar.xz``, whose path is returned. ``python``: the
    machine's version, such as 3.12.

    Raises ArgumentError for a folder that holds something else, BundleError where a step fails or the archive is larger
    than 60 MB.
    """
    if folder.exists() and not (folder / "gpu-check.sh").is_file():
        raise ArgumentError(f"--out {folder}: is there already and is no pack")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    script = folder / "gpu-check.sh"  # first: what is left by a failure is known as a pack, and replaced
    script.write_text(_SCRIPT)
    script.chmod(0o755)
    keys = folder / "kernels.keys"
    _record(keys, arch, tell)
    tell("compiling and linking")
    _call([sys.executable, "-m", "cute_fa", "bundle", "--keys", str(keys), "--out", str(folder / "bundle"), "--jobs",
           str(jobs)])  # fmt: skip
    tell(f"fetching TVM-FFI for Python {python}")
    _fetch(folder / "site", python)
    root = Path(__file__).parents[2]
    for name in _TREE:
        source = root / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns(*_LEFT_OUT))
        elif source.exists():
            shutil.copy2(source, folder / name)
    tell("packing")
    archive = folder.with_name(f"{folder.name}.tar.xz")
    with tarfile.open(archive, "w:xz") as packed:
        packed.add(folder, folder.name, filter=_of_root)
    size = archive.stat().st_size / 1e6
    if size > LIMIT_MB:
        raise BundleError(f"{archive} has {size:.0f} MB: at most {LIMIT_MB} are useful where such a folder travels")
    return archive


def _record(keys: Path, arch: str, tell: Callable[[str], None]) -> None:
    """Write down which kernels the plan launches: those that its dry run does not come to, and its dry run's."""
    keys.write_text(_not_walked(arch))
    os.environ["CUTE_FA_RECORD_KEYS"] = str(keys)
    try:
        plan = Plan(keys.with_name("dry-run"), dry=arch, processors=len(os.sched_getaffinity(0)))
        plan.out.mkdir()
        outcomes = run(
            plan, time.monotonic() + 3600, lambda outcome: tell(f"dry run, {outcome.step.name}: {outcome.result}")
        )
    finally:
        del os.environ["CUTE_FA_RECORD_KEYS"]
    # What was not reached has not been recorded either.
    bad = [outcome for outcome in outcomes if outcome.result != "ok" and not outcome.step.missing]
    if bad:
        raise BundleError(f"the dry run's {bad[0].step.name} {bad[0].result}:\n{bad[0].output[-2000:]}")
    shutil.rmtree(plan.out)


def _not_walked(arch: str) -> str:
    """Keys of the problems that are sanitized, of the tour, and of some tests. A backward has a forward before it."""
    problems = dict.fromkeys(
        forward for problem in (*SANITIZED, *_NOT_WALKED) for forward in (problem.removesuffix(" --backward"), problem)
    )
    lines = [f"--arch {arch} {problem}" for problem in problems]
    lines += [line_of(config) for config in tour_configs(SmArch(arch), (Direction.FORWARD,))]
    return "".join(f"{line}\n" for line in lines)


def _fetch(site: Path, python: str) -> None:
    """TVM-FFI as it is here, for the machine's Python, and the pure ones."""
    older = _BEFORE_3_11 if int(python.split(".")[1]) < 11 else []
    wheels = [f"apache-tvm-ffi=={version('apache-tvm-ffi')}", *_PURE, *older]
    platforms = [f"--platform=manylinux_2_{minor}_x86_64" for minor in (28, 27, 24, 17)]
    _call([sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-deps", "--no-compile",
           "--only-binary=:all:", f"--python-version={python}", "--implementation=cp", *platforms,
           "--platform=manylinux2014_x86_64", f"--target={site}", *wheels])  # fmt: skip


def _call(command: list[str]) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise BundleError(f"{' '.join(command)}\n{done.stdout[-2000:]}")


def _of_root(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    """Whoever unpacks it owns it: a bundle is used only where nobody else could have written it."""
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = "root"
    return entry
