"""Tables of measured results: one row for each problem and provider, in a CSV file that grows while a sweep runs."""

from __future__ import annotations

import csv
import importlib.util
import re
from collections.abc import Iterable, Mapping
from datetime import date
from pathlib import Path
from typing import Any

import pandas as pd

from cute_fa.errors import ArgumentError
from perf.workload import problem_name

# What names a problem; the columns of Workload.columns.
PROBLEM = (
    "direction dtype dtype_kv head_dim head_dim_v heads heads_kv phase query_tokens seqlen_q seqlen_k batch tokens "
    "causal window_left window_right lengths page_size plan"
).split()
# What a result is one of.
KEY = ["gpu", "provider", *PROBLEM]
# status: ok (measured), wrong (its output disagrees with the reference) or skipped (it cannot run), with a reason for
# the latter two. ms: of one call; plan_ms: of making what calls
# under one plan share, the median. tflops, gbps: by the median. ceiling_ms: the least time by the ceilings measured in
# the same run, bound: the one that sets it, percent: 100·ceiling_ms/ms_p50. Clocks before and after the timing.
COLUMNS = (
    ["provider", "version", "status", "reason", *PROBLEM]
    + "ms_p20 ms_p50 ms_p80 samples plan_ms tflops gbps percent bound ceiling_ms flops bytes".split()
    + "error error_allowed".split()
    + "matmul_tflops copy_gbps sm_mhz_before sm_mhz_after mem_mhz_before mem_mhz_after".split()
    + "watts_after celsius_after gpu arch driver cuda torch dsl date".split()
)
_TEXT = "provider version status reason direction dtype dtype_kv phase lengths plan bound".split()
_TEXT += "gpu arch driver cuda torch dsl date".split()
_INTEGERS = [name for name in PROBLEM if name not in (*_TEXT, "causal")] + ["samples", "flops", "bytes"]


_FOLDER = Path("perf", "results")


def result_path(gpu: str, name: str) -> Path:
    """``perf/results/<gpu>/<date>-<name>`` in the working folder, which in a checkout is where tables are committed."""
    return _FOLDER / re.sub(r"\W+", "-", gpu).strip("-").lower() / f"{date.today():%Y-%m-%d}-{name}"


class ResultFile:
    """Results in a CSV file: rows are appended as they come, so that a run cut short keeps what it has."""

    def __init__(self, path: Path):
        self.path = path
        self._keys: set[tuple[str, ...]] = set()
        if path.exists():
            _cut_unfinished_line(path)
            with path.open(newline="") as file:
                header = next(csv.reader(file), [])
            if header != COLUMNS:
                raise ArgumentError(f"{path}: no table of results with the columns of this version")
            self._keys = {_key(row) for row in self.rows().to_dict("records")}

    def __contains__(self, row: Mapping[str, Any]) -> bool:
        """Whether there is a result with the row's values of KEY."""
        return _key(row) in self._keys

    def rows(self) -> pd.DataFrame:
        return read_results(self.path)

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        rows = list(rows)
        new = not self.path.exists()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            if new:
                writer.writeheader()
            writer.writerows(rows)
        self._keys |= {_key(row) for row in rows}

    def forget(self, statuses: Iterable[str]) -> None:
        """Drop the rows of these statuses, so that they are tried again."""
        kept = self.rows()
        kept = kept[~kept.status.isin(list(statuses))]
        kept.to_csv(self.path, index=False)
        self._keys = {_key(row) for row in kept.to_dict("records")}

    def write_parquet(self) -> Path | None:
        """The same table beside the CSV file; None without pyarrow."""
        if importlib.util.find_spec("pyarrow") is None:
            return None
        path = self.path.with_suffix(".parquet")
        self.rows().to_parquet(path, index=False)
        return path


def read_results(path: Path) -> pd.DataFrame:
    """A table of results from a CSV or Parquet file, of the same types from either; raises ArgumentError for others."""
    try:
        if path.suffix == ".parquet":
            table = pd.read_parquet(path)
        else:
            table = pd.read_csv(path, dtype=dict.fromkeys(_TEXT, "str"))
    except (OSError, ValueError) as error:
        raise ArgumentError(f"{path}: {error}") from None
    missing = [name for name in COLUMNS if name not in table]
    if missing:
        raise ArgumentError(f"{path}: no table of results, {', '.join(missing[:3])} is missing")
    types = dict.fromkeys(_TEXT, "string") | dict.fromkeys(_INTEGERS, "Int64") | {"causal": "bool"}
    floats = [name for name in COLUMNS if name not in types]
    return table[COLUMNS].astype(types | dict.fromkeys(floats, "float64"))


def speed_table(results: pd.DataFrame) -> pd.DataFrame:
    """Problems by providers: TFLOP/s, GB/s where memory is the bound, "wrong", or nothing where it was skipped."""

    def speed(row) -> str:
        if row.status != "ok":
            return "wrong" if row.status == "wrong" else ""
        return f"{row.tflops:.0f} TFLOP/s" if row.bound == "compute" else f"{row.gbps:.0f} GB/s"

    problems = [problem_name(row) for row in results.to_dict("records")]
    speeds = [speed(row) for row in results.itertuples()]
    long = pd.DataFrame({"problem": problems, "provider": results.provider, "speed": speeds})
    wide = long.pivot_table(
        index="problem", columns="provider", values="speed", aggfunc="last", sort=False, fill_value=""
    )
    return wide.rename_axis(columns=None).reset_index()


def _cut_unfinished_line(path: Path) -> None:
    """Drop what a run that was killed while writing has left behind the last whole line."""
    content = path.read_bytes()
    if not content.endswith(b"\n"):
        path.write_bytes(content[: content.rfind(b"\n") + 1])


def _key(row: Mapping[str, Any]) -> tuple[str, ...]:
    """A row's values of KEY as text, the same for a row made here and one read back."""
    values = (row[name] for name in KEY)
    return tuple("" if value is None or value is pd.NA or value != value else str(value) for value in values)
