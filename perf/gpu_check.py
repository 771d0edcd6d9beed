"""``make gpu-check``: the tests that need a GPU, compute-sanitizer on a few problems, a short sweep, and a summary."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

_TOOLS = ("memcheck", "racecheck", "synccheck")
# Our kernels' names in PTX begin so: torch's kernels around them are not instrumented, which would take minutes.
_KERNELS = "kns=kernel_cutlass"
# What compute-sanitizer exits with for what it finds; the program's own codes are 0, 1 and 2.
_FOUND = 86
_SANITIZED = (
    "--head-dim 64 --batch 1 --heads 2 --seqlen-q 200 --causal",
    "--head-dim 128 --batch 3 --heads 4 --heads-kv 2 --seqlen-q 300 --varlen --window 64 0",
    "--head-dim 256 --batch 1 --heads 1 --seqlen-q 130 --seqlen-k 70",
    "--head-dim 128 --batch 2 --heads 8 --heads-kv 2 --seqlen-q 4 --seqlen-k 500 --causal --page-size 16",
    "--head-dim 64 --batch 2 --heads 4 --heads-kv 2 --seqlen-q 200 --causal --backward",
)
_SWEEP = (
    "--direction fwd --direction bwd --head-dim 64 --head-dim 128 --seqlen 1024 --seqlen 8192 --budget 50",
    "--phase decode --head-dim 128 --heads 32,8 --seqlen 8192 --tokens 131072 --budget 50",
)


@dataclass(frozen=True)
class Step:
    """A command to run; ``missing``: why it cannot be."""

    name: str
    command: tuple[str, ...]
    limit_s: int = 1800
    missing: str | None = None


@dataclass(frozen=True)
class Outcome:
    """``result``: ok, failed, timed out or not run."""

    step: Step
    result: str
    seconds: float = 0.0
    log: Path | None = None

    @property
    def bad(self) -> bool:
        return self.result in ("failed", "timed out")


def steps(csv: Path, pytest_arguments: tuple[str, ...] = ()) -> Iterator[Step]:
    """Everything that is checked on a GPU."""
    python = sys.executable
    yield Step("gpu tests", (python, "-m", "pytest", "-m", "gpu", *pytest_arguments))
    sanitizer = _compute_sanitizer()
    for tool in _TOOLS:
        options = (
            "--tool",
            tool,
            "--kernel-name",
            _KERNELS,
            "--error-exitcode",
            str(_FOUND),
            "--target-processes",
            "all",
        )
        for number, problem in enumerate(_SANITIZED, 1):
            run = (python, "-m", "cute_fa", "run", *problem.split())
            missing = None if sanitizer else "compute-sanitizer is neither on the PATH nor in a CUDA toolkit"
            command = (sanitizer or "compute-sanitizer", *options, *run)
            yield Step(f"{tool} {number}", command, 600, missing)
    for number, grid in enumerate(_SWEEP, 1):
        yield Step(f"sweep {number}", (python, "-m", "perf", "sweep", *grid.split(), "--out", str(csv)))


def run(step: Step, logs: Path) -> Outcome:
    """Run one step with its output in a file."""
    if step.missing:
        return Outcome(step, "not run")
    log = logs / f"{step.name.replace(' ', '-')}.log"
    start = time.perf_counter()
    with log.open("w") as output:
        try:
            done = subprocess.run(step.command, stdout=output, stderr=subprocess.STDOUT, timeout=step.limit_s)
            result = "failed" if done.returncode else "ok"
        except subprocess.TimeoutExpired:
            result = "timed out"
    return Outcome(step, result, time.perf_counter() - start, log)


def check(csv: Path, pytest_arguments: tuple[str, ...], tell: Callable[[str], object]) -> list[Outcome]:
    """Run all steps, also behind one that fails, and keep a summary beside the results up to date."""
    logs, outcomes = csv.with_suffix(""), []
    logs.mkdir(parents=True, exist_ok=True)
    for step in steps(csv, pytest_arguments):
        tell(f"{step.name}: {' '.join(step.command)}")
        outcomes.append(run(step, logs))
        tell(f"{step.name}: {_told(outcomes[-1])}")
        csv.with_suffix(".md").write_text(summary(outcomes), encoding="utf-8")
    return outcomes


def summary(outcomes: list[Outcome]) -> str:
    """Markdown: a line for each step, and the end of the output of those that went wrong."""
    lines = ["| step | result | seconds |", "|---|---|---|"]
    lines += [f"| {o.step.name} | {o.step.missing or o.result} | {o.seconds:.0f} |" for o in outcomes]
    for outcome in outcomes:
        if outcome.bad:
            tail = outcome.log.read_text(errors="replace").splitlines()[-30:]
            lines += ["", f"{outcome.step.name}: `{' '.join(outcome.step.command)}`", "", "```", *tail, "```"]
    return "\n".join(lines) + "\n"


def _told(outcome: Outcome) -> str:
    where = f", see {outcome.log}" if outcome.bad else ""
    return f"{outcome.step.missing or outcome.result} after {outcome.seconds:.0f} s{where}"


def _compute_sanitizer() -> str | None:
    toolkits = (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda")
    path = os.pathsep.join([os.environ.get("PATH", ""), *(f"{toolkit}/bin" for toolkit in toolkits if toolkit)])
    return shutil.which("compute-sanitizer", path=path)
