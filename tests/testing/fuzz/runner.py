"""Running many problems in worker processes, and remembering which are done."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import signal
from collections import deque
from dataclasses import dataclass
from functools import cache
from multiprocessing.connection import wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import cute_fa.engine.cache
from tests.testing.fuzz.draw import GROUP, draw
from tests.testing.fuzz.execute import Failure, failure_of
from tests.testing.fuzz.problem import Problem
from tests.testing.fuzz.shrink import shrink

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    Check = Callable[[Problem], Failure | None]

ROOT = Path(__file__).parents[3]
_SOURCES = ("cute_fa", "fa2_sm80", "fa3_sm90", "fa4_sm100", "ptxsim", "tests/testing")
# A process keeps every kernel that it has loaded: after so many groups a new one goes on.
_GROUPS_PER_PROCESS = 10
LIMIT_S = 600  # of one problem; a kernel that does not end would go on for ever


@dataclass(frozen=True)
class Found:
    """A problem that failed, how, and the smallest that still did so, with its own message."""

    failure: Failure
    shrunk: Problem
    message: str

    def to_fields(self) -> dict[str, Any]:
        return {**vars(self.failure), "shrunk": self.shrunk.to_json(), "shrunk_message": self.message}

    @classmethod
    def of_fields(cls, fields: dict[str, Any]) -> Found:
        failure = Failure(fields["kind"], fields["message"])
        return cls(failure, Problem.from_json(fields["shrunk"]), fields["shrunk_message"])


def find(seed: int, indices: Iterable[int], jobs: int, check: Check = failure_of) -> Iterator[tuple[int, Found | None]]:
    """Check problems in ``jobs`` processes; gives each one's index with what was found, as they are done. ``check`` has
    to be importable by name. A process that dies is a failure of the problem that it was at."""
    waiting = deque(_stretches(indices))
    workers: list[_Worker] = []
    try:
        while waiting or workers:
            while waiting and len(workers) < jobs:
                workers.append(_Worker(seed, waiting.popleft(), check))
            ready = wait([worker.results for worker in workers])
            for worker in [worker for worker in workers if worker.results in ready]:
                try:
                    index, fields = worker.results.recv()
                except EOFError:
                    workers.remove(worker)
                    worker.process.join()
                    if worker.left:
                        index = worker.left.popleft()
                        yield index, _died(draw(seed, index), worker.process.exitcode)
                    if worker.left:
                        waiting.appendleft(list(worker.left))
                    continue
                worker.left.remove(index)
                yield index, None if fields is None else Found.of_fields(fields)
    finally:
        for worker in workers:
            worker.process.terminate()
            worker.process.join()


def _stretches(indices: Iterable[int]) -> Iterator[list[int]]:
    """What one process does: whole groups, in order."""
    stretch: list[int] = []
    groups: set[int] = set()
    for index in sorted(indices):
        if index // GROUP not in groups and len(groups) == _GROUPS_PER_PROCESS:
            yield stretch
            stretch, groups = [], set()
        stretch.append(index)
        groups.add(index // GROUP)
    if stretch:
        yield stretch


class _Worker:
    """A process at its indices; ``left``: those that it has not answered."""

    def __init__(self, seed: int, indices: list[int], check: Check):
        context = multiprocessing.get_context("spawn")
        self.left = deque(indices)
        self.results, theirs = context.Pipe(duplex=False)
        self.process = context.Process(target=_work, args=(theirs, seed, indices, check), daemon=True)
        self.process.start()
        theirs.close()


def _work(results, seed: int, indices: list[int], check: Check) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its processes itself
    signal.signal(signal.SIGALRM, _out_of_time)
    torch.set_num_threads(1)
    for index in indices:
        found = examine(draw(seed, index), check)
        results.send((index, None if found is None else found.to_fields()))


def _out_of_time(*_: Any) -> None:
    raise TimeoutError(f"still running after {LIMIT_S} s")


def examine(problem: Problem, check: Check = failure_of) -> Found | None:
    """What is found in a problem, shrunk."""
    failure = _limited(problem, check)
    if failure is None:
        return None
    last = failure

    def fails(simpler: Problem) -> bool:
        nonlocal last
        found = _limited(simpler, check)
        if found is None or found.kind != failure.kind:
            return False
        last = found
        return True

    return Found(failure, shrink(problem, fails), last.message)


def _limited(problem: Problem, check: Check) -> Failure | None:
    """What the check says in time; only processes of :func:`find` have a limit."""
    limited = signal.getsignal(signal.SIGALRM) is _out_of_time
    if limited:
        signal.alarm(LIMIT_S)
    try:
        return check(problem)
    except TimeoutError as error:  # the check was about to return
        return Failure(type(error).__name__, str(error))
    finally:
        if limited:
            signal.alarm(0)


def _died(problem: Problem, code: int | None) -> Found:
    how = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
    failure = Failure("process died", f"the process ended with {how}")
    return Found(failure, problem, failure.message)


class State:
    """Which problems are done, in a file that grows line by line: a run that was cut short goes on. What was found by
    other sources, whose hash each line holds, does not count."""

    def __init__(self, path: Path | None, seed: int):
        self.path = cute_fa.engine.cache.directory().parent / "fuzz.jsonl" if path is None else path
        self.done: dict[int, Found | None] = {}
        self._key = {"seed": seed, "sources": source_hash()}
        self._torn = False
        if not self.path.exists():
            return
        text = self.path.read_text()
        self._torn = bool(text) and not text.endswith("\n")
        for line in text.splitlines():
            try:
                fields = json.loads(line)
            except ValueError:  # a line that was cut short
                continue
            if {name: fields.get(name) for name in self._key} == self._key:
                found = fields["found"]
                self.done[fields["index"]] = None if found is None else Found.of_fields(found)

    def add(self, index: int, found: Found | None) -> None:
        self.done[index] = found
        line = {**self._key, "index": index, "found": None if found is None else found.to_fields()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write("\n" * self._torn + json.dumps(line) + "\n")
        self._torn = False


@cache
def source_hash() -> str:
    """Of everything that a result depends on."""
    digest = hashlib.sha256()
    for folder in _SOURCES:
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:16]
