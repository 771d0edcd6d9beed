"""Tables of results made up by hand."""

from __future__ import annotations

from typing import Any

import pandas as pd

from cute_fa.semantics.tensors import TORCH_DTYPES
from perf.results import COLUMNS, ResultFile
from perf.sweep import figures
from perf.timing import Ceilings, Timing
from perf.workload import Workload


def measured(workload: Workload, provider: str, *samples: float, gpu: str = "H100", **columns: Any) -> dict[str, Any]:
    """A row of these times in ms; skipped without any."""
    row = dict.fromkeys(COLUMNS) | workload.columns() | {"provider": provider, "gpu": gpu, "date": "2026-11-01"}
    row |= {"flops": workload.work.flops, "bytes": workload.work.bytes, "version": "1"}
    row |= {"status": "skipped", "reason": "not installed"}
    if samples:
        ceilings = Ceilings(dict.fromkeys(TORCH_DTYPES.values(), 800.0), gbps=4000.0)
        row |= figures(workload, Timing(samples), ceilings) | {"reason": None}
    return row | columns


def table_of(path, *rows: dict[str, Any]) -> pd.DataFrame:
    """The rows as read back from a file."""
    results = ResultFile(path)
    results.append(rows)
    return results.rows()
