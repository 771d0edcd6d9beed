"""Regressions between two tables of results of one GPU."""

from __future__ import annotations

from typing import Any

import pandas as pd

from cute_fa.semantics.errors import ArgumentError
from perf.results import KEY
from perf.workload import problem_name

REGRESSIONS = ("slower", "broken")


def compare(before: pd.DataFrame, after: pd.DataFrame, threshold: float) -> pd.DataFrame:
    """One row for each provider and problem that both have and ``before`` has measured, worst first: provider, problem,
    before_ms and after_ms (medians), ratio, verdict.

    ``slower``: the median takes more than 1 + ``threshold`` times as long, and beyond the noise: the 20th percentile
    after lies above the 80th before. ``faster``: the same the other way round. ``broken``: it is not measured any more.
    Raises ArgumentError where the two have nothing in common.
    """
    common = _latest(before).merge(_latest(after), on=KEY, suffixes=("_before", "_after"))
    common = common[common.status_before == "ok"]
    if common.empty:
        raise ArgumentError(f"no common problem: measured before on {_gpus(before)}, after on {_gpus(after)}")
    rows = [_compared(row, threshold) for row in common.to_dict("records")]
    table = pd.DataFrame(rows)
    order = table.verdict.map(("broken", "slower", "same", "faster").index)
    return table.assign(order=order).sort_values(["order", "ratio"], ascending=[True, False]).drop(columns="order")


def machine_change(before: pd.DataFrame, after: pd.DataFrame) -> str:
    """Medians of what the machine itself did, for a reader who asks whether it is the kernel that has changed."""
    parts = []
    for name, unit in (("matmul_tflops", "TFLOP/s"), ("copy_gbps", "GB/s"), ("sm_mhz_after", "MHz")):
        first, second = (table[name].median() for table in (before, after))
        if first == first and second == second:
            parts.append(f"{name} {first:.0f} → {second:.0f} {unit}")
    return ", ".join(parts)


def _latest(table: pd.DataFrame) -> pd.DataFrame:
    return table.drop_duplicates(KEY, keep="last")


def _gpus(table: pd.DataFrame) -> str:
    return ", ".join(table[table.status == "ok"].gpu.unique()) or "none"


def _compared(row: dict[str, Any], threshold: float) -> dict[str, Any]:
    first, second = row["ms_p50_before"], row["ms_p50_after"]
    if row["status_after"] != "ok":
        verdict = "broken"
    elif second > first * (1 + threshold) and row["ms_p20_after"] > row["ms_p80_before"]:
        verdict = "slower"
    elif first > second * (1 + threshold) and row["ms_p20_before"] > row["ms_p80_after"]:
        verdict = "faster"
    else:
        verdict = "same"
    return {
        "provider": row["provider"],
        "problem": problem_name(row),
        "before_ms": first,
        "after_ms": second,
        "ratio": second / first,
        "verdict": verdict,
    }
