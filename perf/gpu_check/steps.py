"""The plan of ``gpu-check``, and its execution within a time."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from cute_fa.engine.compiler import dsl_installed
from cute_fa.semantics.types import SmArch
from cute_fa.tools.trial import gpu_arch
from perf.gpu_check.smoke import NOT_BUNDLED, SMOKE, served

_ROOT = Path(__file__).parents[2]  # where commands run: they name files below it
_TOOLS = ("memcheck", "racecheck", "synccheck")
# synccheck takes arrivals on an mbarrier by another role for a fault, which is how every TMA pipeline works.
_INFORMATIVE_TOOLS = ("synccheck",)
# Our kernels' names in PTX begin so: torch's kernels around them are not instrumented, which would take minutes.
_KERNELS = "kns=kernel_cutlass"
# What compute-sanitizer exits with for what it finds; the program's own codes are 0, 1 and 2.
_FOUND = 86
SANITIZED = (
    "--head-dim 64 --batch 1 --heads 2 --seqlen-q 200 --causal",
    "--head-dim 128 --batch 3 --heads 4 --heads-kv 2 --seqlen-q 300 --varlen --window 64 0",
    "--head-dim 256 --batch 1 --heads 1 --seqlen-q 130 --seqlen-k 70",
    "--head-dim 128 --batch 2 --heads 8 --heads-kv 2 --seqlen-q 4 --seqlen-k 500 --causal --page-size 16",
    "--head-dim 64 --batch 2 --heads 4 --heads-kv 2 --seqlen-q 200 --causal --backward",
    "--head-dim 64 --heads 2 --seqlen-q 200 --ranges 9 --backward",
)
# Files with tests marked gpu, in an order of value. composable_kernel's grid, 6144 runs, is for machines of one's own.
TESTS = {
    "kernels": "fa3_sm90/test_forward fa4_sm100/test_forward fa3_sm90/test_fp8_features fa4_sm100/test_fp8 "
    "fa3_sm90/test_clusters fa3_sm90/test_backward fa3_sm90/test_split_backward fa3_sm90/test_decode "
    "fa2_sm80/test_split fa2_sm80/test_backward cute_fa/test_ranges_on_a_gpu fa2_sm80/test_range_forward "
    "fa2_sm80/test_range_backward cute_fa/test_append cute_fa/test_append_fp8 cute_fa/test_kvcache "
    "cute_fa/test_tree_mask cute_fa/test_batch_invariance fa2_sm80/test_forward",
    "around them": "cute_fa/test_backward_ops cute_fa/test_cache cute_fa/test_service cute_fa/test_transformers "
    "perf/test_device cute_fa/test_cli",
    "composable_kernel's grid": "cute_fa/test_composable_kernel_grid",
}
_SMOKE_LIMIT_S, _SWEEP_LIMIT_S, _SANITIZER_LIMIT_S, _TESTS_LIMIT_S = 60, 300, 120, 900
_TEST_LIMIT_S = 90  # of one test, where pytest-timeout is installed
# A process that waits for a GPU which does not answer cannot always be killed: it is left behind.
_KILL_LIMIT_S = 10
_GLANCE_S = 0.5  # how often a step looks whether all has been stopped
_KEPT_BYTES = 1 << 20  # of the end of a step's output: a kernel that prints must not fill the memory
_SHORTEST_S = 15  # what is left must be more than this for another step to begin: importing torch takes most of it


@dataclass(frozen=True)
class Step:
    """A command to run, at most ``limit_s``; ``log``: which file its output is added to; ``together``: how many steps
    of its phase run at a time; ``missing``: why it cannot run; ``informative``: whether what it finds is no failure."""

    phase: str
    name: str
    command: tuple[str, ...]
    limit_s: float
    together: int = 1
    missing: str | None = None
    informative: bool = False


@dataclass(frozen=True)
class Outcome:
    """``result``: ok, failed, timed out, cut short (by the end of the run), found (informative), not bundled, not run
    (missing) or not reached."""

    step: Step
    result: str
    seconds: float = 0.0
    output: str = ""

    @property
    def bad(self) -> bool:
        return self.result in ("failed", "timed out")


@dataclass(frozen=True)
class Plan:
    """``out``: the folder of results; ``dry``: the architecture to simulate where there is no GPU; ``everything``: also
    the 6144-run grid; ``pytest_arguments``: for the tests."""

    out: Path
    dry: str | None = None
    everything: bool = False
    pytest_arguments: tuple[str, ...] = ()
    processors: int = 2

    def steps(self) -> Iterator[Step]:
        """Everything that is checked, in an order of value."""
        yield from self._smoke()
        yield from self._sweep()
        yield from self._tests()
        yield from self._sanitizers()

    def _smoke(self) -> Iterator[Step]:
        simulated = ("--arch", self.dry) if self.dry else ()
        arch = SmArch(self.dry) if self.dry else gpu_arch()
        for name in SMOKE if arch is None else served(arch):
            command = (sys.executable, "-m", "perf.gpu_check.smoke", name, *simulated)
            # In parallel: on a GPU a process waits for its imports more than for the kernel.
            yield Step("smoke", name, command, _SMOKE_LIMIT_S * (10 if self.dry else 1), min(4, self.processors))

    def _sweep(self) -> Iterator[Step]:
        pose = ("--pose", self.dry) if self.dry else ()
        command = (sys.executable, "-m", "perf.gpu_check.sweep", "--out", str(self.out / "sweep.csv"), *pose)
        yield Step("sweep", "ours, FA2, cuDNN", command, _SWEEP_LIMIT_S)

    def _tests(self) -> Iterator[Step]:
        workers = str(max(2, min(8, self.processors // 2)))
        options = ["-v", "-m", "gpu", "-n", workers, "-p", "perf.gpu_check.failures"]
        if self.dry:
            options += ["-p", "perf.gpu_check.dry_run", "--dry-gpu", self.dry]
        elif importlib.util.find_spec("pytest_timeout"):
            # By a thread, which ends the process, and xdist starts another: a signal's handler would wait for the
            # call that hangs.
            limit = _TEST_LIMIT_S * (3 if dsl_installed() else 1)  # it may have to compile a dozen kernels
            options += ["--timeout", str(limit), "--timeout-method", "thread"]
        for name, files in TESTS.items():
            if self.everything or files != TESTS["composable_kernel's grid"]:
                paths = [f"tests/{file}.py" for file in files.split()]
                command = (sys.executable, "-m", "pytest", *options, *paths, *self.pytest_arguments)
                yield Step("tests", name, command, _TESTS_LIMIT_S)

    def _sanitizers(self) -> Iterator[Step]:
        sanitizer = _compute_sanitizer()
        missing = None if sanitizer else "compute-sanitizer is neither on the PATH nor in a CUDA toolkit"
        missing = "a GPU is needed" if self.dry else missing
        for tool in _TOOLS:
            options = ("--tool", tool, "--kernel-name", _KERNELS, "--error-exitcode", str(_FOUND))
            # "no": calls of torch's and ours that ask whether something is supported, and fail by design.
            options += ("--target-processes", "all", "--report-api-errors", "no")
            for problem in SANITIZED:
                run = (sys.executable, "-m", "cute_fa", "run", *problem.split())
                command = (sanitizer or "compute-sanitizer", *options, *run)
                informative = tool in _INFORMATIVE_TOOLS
                name = f"{tool} {problem}"
                yield Step("sanitizers", name, command, _SANITIZER_LIMIT_S, 1, missing, informative)


def run(plan: Plan, deadline: float, tell: Callable[[Outcome], None]) -> list[Outcome]:
    """Run all steps, also behind one that fails, until ``deadline`` (of ``time.monotonic``); tell each as it ends.
    Whatever interrupts it, also SIGTERM or SIGHUP, ends what is running."""
    outcomes, stopped = [], threading.Event()
    with _signals_raise():
        for phase, steps in _phases(plan):
            with ThreadPoolExecutor(steps[0].together) as pool:
                log = plan.out / f"{phase}.log"
                futures = [pool.submit(_run, step, log, deadline, stopped) for step in steps]
                try:
                    for future in as_completed(futures):
                        outcomes.append(future.result())
                        tell(outcomes[-1])
                except BaseException:
                    stopped.set()
                    raise
    return outcomes


@contextlib.contextmanager
def _signals_raise() -> Iterator[None]:
    """A signal that would end this process at once, and leave behind what it runs, raises SystemExit."""

    def leave(number: int, _: object) -> None:
        sys.exit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # Not where it is ignored, as under nohup.
    ending = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) is signal.SIG_DFL]
    for number in ending:
        signal.signal(number, leave)
    try:
        yield
    finally:
        for number in ending:
            signal.signal(number, signal.SIG_DFL)


def _phases(plan: Plan) -> Iterator[tuple[str, list[Step]]]:
    phases: dict[str, list[Step]] = {}
    for step in plan.steps():
        phases.setdefault(step.phase, []).append(step)
    yield from phases.items()


def _run(step: Step, log: Path, deadline: float, stopped: threading.Event | None = None) -> Outcome:
    """One step in a process group of its own, so that nothing of it survives its limit, or that ``stopped`` is set."""
    stopped = stopped or threading.Event()
    if step.missing:
        return Outcome(step, "not run")
    left = deadline - time.monotonic()
    if left < _SHORTEST_S or stopped.is_set():
        return Outcome(step, "not reached")
    limit = min(step.limit_s, left)
    start = time.monotonic()
    shared = step.together > 1  # the output of steps that run together goes to the log when each ends
    own = log.with_suffix(f".{step.name}.log") if shared else log
    with own.open("ab") as output:
        begin = output.tell()
        output.write(f"\n$ {' '.join(step.command)}\n".encode())
        output.flush()
        process = subprocess.Popen(
            step.command, cwd=_ROOT, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        code = None
        try:
            while code is None and time.monotonic() < start + limit and not stopped.is_set():
                with contextlib.suppress(subprocess.TimeoutExpired):
                    code = process.wait(min(_GLANCE_S, max(0, start + limit - time.monotonic())))
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_KILL_LIMIT_S)
    seconds = time.monotonic() - start
    with own.open("rb") as written:
        written.seek(max(begin, written.seek(0, os.SEEK_END) - _KEPT_BYTES))
        text = written.read().decode(errors="replace")
    if shared:
        with log.open("a") as together:
            together.write(text)
        own.unlink()
    return Outcome(step, _result(step, code, limit), seconds, text)


def _result(step: Step, code: int | None, limit: float) -> str:
    if code is None:
        return "timed out" if limit == step.limit_s else "cut short"
    if step.phase == "smoke" and code == NOT_BUNDLED:
        return "not bundled"
    if step.phase == "tests" and code == 5:
        return "not run"  # nothing was collected
    if code == 0:
        return "ok"
    return "found" if step.informative and code == _FOUND else "failed"


def _compute_sanitizer() -> str | None:
    toolkits = (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda")
    path = os.pathsep.join([os.environ.get("PATH", ""), *(f"{toolkit}/bin" for toolkit in toolkits if toolkit)])
    return shutil.which("compute-sanitizer", path=path)
