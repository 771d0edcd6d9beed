"""Runs a script with one damaged synchronisation at a time: which of them does the simulator notice?

The script runs once. At the first launch of each kernel the process forks for every mutant, and each child goes on with
that kernel damaged, in this launch and the following ones, until an error ends it or the script does: nothing before
is repeated, and what the script itself checks counts. See ``ptxsim.analysis.mutants`` for what is damaged and
``ptxsim.analysis.equivalence`` for which mutants need not be noticed.
"""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import json
import os
import random
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import Pipe, connection
from pathlib import Path
from typing import Any

from ..errors import Deadlock, PtxError, SimError
from ..frontend.locations import source_of
from ..frontend.program import Program
from ..machine.events import Observer
from ..names import readable
from .equivalence import FOR_SPEED, Facts, Recorder
from .mutants import KINDS, damaged, plan

CAUGHT, EQUIVALENT, ESCAPED = "caught", "equivalent", "escaped"
WRONG_RESULT, NOT_EXECUTED = "wrong result", "never executed"
_ENDLESS = 20  # times the steps of the undamaged kernel


@dataclass(frozen=True)
class Record:
    """What became of one mutant. ``by``: the error that caught it, why it is equivalent, or NOT_EXECUTED; ``mode``: the
    schedule in which it was caught."""

    kernel: str
    ptx: str  # of the module, hashed
    line: int
    text: str
    source: str  # file.py:12, or empty
    kind: str
    change: str
    outcome: str
    by: str = ""
    mode: str = ""

    def __str__(self) -> str:
        place = f" ({self.source})" if self.source else ""
        return f"{self.change}: PTX line {self.line}{place}: {self.text}" + (f"; {self.by}" if self.by else "")

    @property
    def key(self) -> tuple:
        return self.ptx, self.kernel, self.line, self.change


def read(file: Path) -> list[Record]:
    """The records that a study left in a file."""
    return [Record(**json.loads(line)) for line in file.read_text().splitlines()]


def _line(record):
    return json.dumps(dataclasses.asdict(record)) + "\n"


class _Bounded(Observer):
    """Gives up on a kernel that does not end."""

    def __init__(self, limit):
        self.limit = limit

    def begin(self, machine):
        self.wave = machine.wave

    def issue(self, block, w, M):
        if self.wave.step > self.limit:
            raise Deadlock(f"no end after {self.limit} steps, {_ENDLESS} times those of the undamaged kernel")


class _InChild(BaseException):
    """Unwinds a forked child to the launch that it goes on with."""


class Study:
    """The mutants of all kernels that a script launches.

    ``modes`` are schedules (with ``seed`` and ``late``) to try until a mutant is caught; ``kinds`` those of the
    instructions to damage, ``sample`` how many mutants of each kind to choose (None: all); ``file`` (JSON lines) is
    where records are kept as they are made, and from which an interrupted study goes on; ``again`` tries once more what
    escaped before; ``jobs`` children run at a time. ``records`` has what is known of the kernels that ran.
    """

    def __init__(
        self, modes: list, kinds: Iterable[str] = KINDS, sample: int | None = None, jobs: int = 1,
        file: Path | None = None, again: bool = False,
    ):  # fmt: skip
        self.modes, self.kinds, self.sample, self.jobs, self.file = modes, kinds, sample, jobs, file
        self.records: list[Record] = []
        self._known = {}
        if file is not None and file.exists():
            self._known = {record.key: record for record in read(file)}
        self._again = {key for key, record in self._known.items() if again and record.outcome == ESCAPED}
        self._seen: set[int] = set()  # of programs
        self._limit = 0
        self._child: tuple[Any, Any, Any] | None = None  # of a child: original, damaged, pipe

    @contextmanager
    def around(self, simulation: Any) -> Iterator[None]:
        """Wraps the run of the script; a child ends here."""
        self._simulation = simulation
        simulation.before_launch = self._before_launch
        try:
            yield
        except BaseException as error:
            self._end_child(error)
            raise
        self._end_child(None)

    def _before_launch(self, loaded: Any) -> Any:
        if self._child is None and id(loaded) not in self._seen:
            self._seen.add(id(loaded))
            with suppress(_InChild):
                self._examine(loaded)
        if self._child is not None and self._child[0] is loaded:
            return self._child[1]
        return loaded

    # ---- one kernel ---------------------------------------------------------------------------------------------

    def _examine(self, loaded: Any) -> None:
        facts = Facts()
        for (_, mode), (error, found) in self._run_all(loaded, [((), mode) for mode in self.modes]):
            if error:
                raise SimError(f"the undamaged kernel fails in the run '{mode}': {error[0]}: {error[1]}")
            facts.add(found)
        self._limit = _ENDLESS * facts.steps
        mutants = plan(loaded.program.k)
        chosen = self._choose(mutants)
        left = []
        for mutant in chosen:
            key = self._record(loaded, mutant, "").key
            if key in self._known and key not in self._again:
                self.records.append(self._known[key])
            else:
                left.append(mutant)
        for mutant in left:
            if not facts.ran(mutant):
                self._keep(loaded, mutant, ESCAPED, NOT_EXECUTED)
        left = [m for m in left if facts.ran(m)]
        for mode in self.modes:
            silent = []
            for ((mutant,), _), (error, _) in self._run_all(loaded, [((m,), mode) for m in left]):
                if error:
                    self._keep(loaded, mutant, CAUGHT, error[0], str(mode))
                elif reason := facts.reason(mutant):
                    self._keep(loaded, mutant, EQUIVALENT, reason)
                else:
                    silent.append(mutant)
            left = sorted(silent, key=lambda m: m.index)
        serves_speed: dict[tuple, bool] = {}
        for mutant in left:
            order = tuple(facts.order(mutant, mutants))
            if order and order not in serves_speed:
                runs = list(self._run_all(loaded, [(order, mode) for mode in self.modes]))
                serves_speed[order] = not any(error for _, (error, _) in runs)
            if order and serves_speed[order]:
                self._keep(loaded, mutant, EQUIVALENT, FOR_SPEED)
            else:
                self._keep(loaded, mutant, ESCAPED)

    def _choose(self, mutants):
        chosen = []
        for kind in self.kinds:
            mine = [m for m in mutants if m.kind == kind]
            chosen += mine if self.sample is None else random.Random(1).sample(mine, min(self.sample, len(mine)))
        return sorted(chosen, key=lambda m: m.index)

    def _record(self, loaded, mutant, outcome, by="", mode=""):
        kernel = loaded.program.k
        text = kernel.module.text
        source = source_of(text, mutant.line).strip(" ()")
        lines = text.split("\n")[mutant.line - 1].split()
        return Record(readable(kernel.name), hashlib.sha256(text.encode()).hexdigest()[:16], mutant.line,
                      " ".join(lines), source, mutant.kind, mutant.change, outcome, by, mode)  # fmt: skip

    def _keep(self, loaded, mutant, outcome, by="", mode=""):
        record = self._record(loaded, mutant, outcome, by, mode)
        self.records.append(record)
        if self.file is not None:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("a") as file:
                file.write(_line(record))

    def tidy(self) -> None:
        """Leave in the file what is known of the kernels that ran, each mutant once, in the order of the code."""
        if self.file is not None and self.file.exists():
            ran = {record.ptx for record in self.records}
            kept = {record.key: record for record in read(self.file) if record.ptx in ran}
            lines = [_line(kept[key]) for key in sorted(kept)]
            self.file.write_text("".join(lines))

    # ---- children -----------------------------------------------------------------------------------------------

    def _run_all(self, loaded, tasks):
        """(task, (error, facts)) of tasks, (mutants, mode), as they end; ``error`` is (name, message) or None."""
        waiting, running = deque(tasks), {}
        while waiting or running:
            while waiting and len(running) < self.jobs:
                task = waiting.popleft()
                running[self._fork(loaded, *task)] = task
            for pipe in connection.wait([*running]):
                try:
                    result = pipe.recv()
                except EOFError:
                    result = ("crash", "the process that ran the mutant died"), None
                pipe.close()
                os.wait()
                yield running.pop(pipe), result

    def _fork(self, loaded, mutants, mode):
        """Start a child; returns the pipe from it. In the child this raises _InChild."""
        ours, theirs = Pipe(duplex=False)
        if os.fork():
            theirs.close()
            return ours
        gc.disable()  # a collection would write to all that the child shares with its parent
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        os.dup2(silence, 2)
        self._child = loaded, loaded, theirs
        simulation = self._simulation
        simulation.schedule_seed, simulation.late = mode.seed, mode.late
        self._recorder = Recorder()
        # beside the observers that the script has attached itself
        simulation.observers = [*simulation.observers, _Bounded(self._limit) if mutants else self._recorder]
        if mutants:
            try:
                program = Program(damaged(loaded.program.k, *mutants))
            except PtxError as error:
                self._end_child(error)
            self._child = loaded, dataclasses.replace(loaded, program=program), theirs
        raise _InChild

    def _end_child(self, error: BaseException | None) -> None:
        """Send what became of the script, and end; in the parent nothing happens."""
        if self._child is None:
            return
        if isinstance(error, SystemExit) and error.code in (None, 0):
            error = None
        name = WRONG_RESULT if isinstance(error, (AssertionError, SystemExit)) else type(error).__name__
        self._child[2].send((error and (name, str(error).split("\n")[0]), self._recorder.found))
        self._child[2].close()
        os._exit(0)
