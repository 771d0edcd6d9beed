"""The groups of kernels one after the other, each in a process of its own: what hangs or breaks the context takes its
own group alone. Rows go to a file as they are measured; the constants are made from it."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType

from cute_fa.semantics.errors import DeviceError
from cute_fa.semantics.types import SmArch
from perf.gpu_check.steps import Outcome, Step, run
from perf.microbench import GROUPS
from perf.microbench.benchmark import Measured, Row
from perf.microbench.gpu_file import merged, nearest, text, today
from ptxsim.timing.gpus import load

_GROUP_LIMIT_S = 90


def group(name: str) -> ModuleType:
    return import_module(f"perf.microbench.{name}")


@dataclass(frozen=True)
class Session:
    """``out``: the TOML file; ``gpu``: the driver's name of the GPU; ``names``: of the groups."""

    out: Path
    gpu: str
    arch: SmArch
    names: tuple[str, ...]

    @property
    def rows_file(self) -> Path:
        return self.out.with_suffix(".jsonl")

    def measure(self, seconds: float, tell: Callable[[Outcome], None]) -> list[Outcome]:
        """Run the groups. What an earlier session left of others in the file of rows is kept."""
        deadline = time.monotonic() + seconds
        nearest(self.gpu, self.arch.value)  # a GPU that is none of ours is refused first
        self.out.parent.mkdir(parents=True, exist_ok=True)
        rows = read_rows(self.rows_file) if self.rows_file.exists() else []
        kept = [row for row in rows if row["group"] not in self.names and row["gpu"] == self.gpu]
        self.rows_file.write_text("".join(map(line, kept)))
        return run(_Plan(self), deadline, tell)

    def write(self) -> tuple[dict[str, Measured], list[str]]:
        """The TOML file out of the file of rows; what was measured, and notes. A difference that came out negative is
        none of the constants, but a note, as is one whose repetitions differ by more than itself."""
        rows = read_rows(self.rows_file)
        found, notes = constants(rows), remarks(rows)
        notes += [f"{name} came out as {it.value:.4g}: not taken" for name, it in found.items() if it.value < 0]
        notes += [
            f"{name} came out as {it.value:.4g} with a spread of {it.spread:.2g}: not taken"
            for name, it in found.items()
            if it.value >= 0 and not 0 <= it.spread <= 1
        ]
        found = {name: it for name, it in found.items() if it.value >= 0 and 0 <= it.spread <= 1}
        if not found:
            raise DeviceError(f"nothing was measured: {self.out.with_name('microbench.log')} says why")
        gpu = merged(self.gpu, nearest(self.gpu, self.arch.value), found, today())
        self.out.write_text(text(gpu, notes), encoding="utf-8")
        load(str(self.out))  # it is what the timing model reads
        return found, notes


@dataclass(frozen=True)
class _Plan:
    """What :func:`perf.gpu_check.steps.run` walks over."""

    session: Session

    @property
    def out(self) -> Path:
        return self.session.out.parent

    def steps(self) -> Iterator[Step]:
        s = self.session
        for name in s.names:
            command = (sys.executable, "-m", "perf.microbench", name, s.arch.value, s.gpu, str(s.rows_file.absolute()))
            least = GROUPS[name]
            missing = f"{s.arch.value}: from sm_{least} on" if s.arch.number < least else None
            yield Step("microbench", name, command, _GROUP_LIMIT_S, missing=missing)


def line(row: Row) -> str:
    return json.dumps(row) + "\n"


def read_rows(file: Path) -> list[Row]:
    """Rows that were written; a line that a killed process left unfinished is none."""
    return [json.loads(text) for text in file.read_text().splitlines(keepends=True) if text.endswith("}\n")]


def constants(rows: Sequence[Row]) -> dict[str, Measured]:
    """What all groups say."""
    found: dict[str, Measured] = {}
    for name in GROUPS:
        found |= group(name).constants(rows)
    return found


def remarks(rows: Sequence[Row]) -> list[str]:
    """What groups say beside constants."""
    return [note for row in rows if (note := row.get("note"))]
