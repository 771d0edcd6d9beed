"""Curves and ratio heat maps of measured results, as PNG files and as one HTML page that needs nothing else."""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from perf.providers import PROVIDERS, CuteFa
from perf.results import KEY, PROBLEM, read_results
from perf.workload import configuration_name, problem_name

# A figure has one of each of these, a panel of it one of each of the others but the lengths along the x axis.
_FIGURE = ["gpu", "direction", "dtype", "phase"]
_X = ["seqlen_q", "seqlen_k", "batch"]
_PANEL = [name for name in PROBLEM if name not in (*_FIGURE, *_X)]
_COLUMNS = 3
# Where colours of the ratio end: half and twice as fast.
_RATIO_LIMIT = 2.0
_COLOURS = {name: f"C{number}" for number, name in enumerate(PROVIDERS)}


def load(paths: list[Path]) -> pd.DataFrame:
    """Results of several files; of what was measured twice the later."""
    table = pd.concat([read_results(path) for path in paths], ignore_index=True)
    return table.drop_duplicates(KEY, keep="last", ignore_index=True)


def figures(table: pd.DataFrame) -> Iterator[tuple[str, Figure]]:
    """Every figure with a name for its file: curves, then the ratios to each peer."""
    ok = table[table.status == "ok"]
    for key, group in ok.groupby(_FIGURE, sort=False):
        common = dict(zip(_FIGURE, key, strict=True))
        name = re.sub(r"\W+", "-", " ".join(key)).lower()
        title = f"{common['gpu']}, {common['phase']} {common['direction']} {common['dtype']}"
        yield f"{name}-curves", _curves(group, common, title)
        for peer in _providers(group):
            ratios = _ratios(group, common, peer)
            if peer != CuteFa.name and ratios.size:
                yield f"{name}-ratio-{peer.lower()}", _heat_map(ratios, f"{title}: speed of cute-fa ÷ {peer}")


def write(table: pd.DataFrame, folder: Path) -> list[Path]:
    """Write the figures and the page; returns their paths, the page first."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = {name: _png(figure) for name, figure in figures(table)}
    paths = [folder / "index.html"]
    paths[0].write_text(page(table, pictures), encoding="utf-8")
    for name, png in pictures.items():
        paths.append(folder / f"{name}.png")
        paths[-1].write_bytes(png)
    return paths


def page(table: pd.DataFrame, pictures: dict[str, bytes]) -> str:
    """The page: the machines, the figures, the measured rows, and what was not measured with the reason."""
    ok, others = table[table.status == "ok"], table[table.status != "ok"]
    machines = ok.groupby(["gpu", "driver", "cuda", "torch", "dsl"], dropna=False).agg(
        first=("date", "min"),
        last=("date", "max"),
        matmul_tflops=("matmul_tflops", "median"),
        copy_gbps=("copy_gbps", "median"),
    )
    shown = "provider version ms_p20 ms_p50 ms_p80 tflops gbps percent bound sm_mhz_before sm_mhz_after date".split()
    measured = ok.assign(problem=_problems(ok))[["gpu", "problem", *shown]].round(3)
    reasons = others.assign(problem=_problems(others)).groupby(["provider", "status", "reason"], dropna=False)
    missing = reasons.problem.agg(problems="count", first="first").reset_index()
    sections = [
        "<h1>Attention, measured</h1>",
        _html_table(machines.reset_index().round(1)),
        *(
            f'<img alt="{name}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'
            for name, png in pictures.items()
        ),
        "<h2>Results</h2>",
        "<p>ms: 20th, 50th and 80th percentile of one call; percent: of the ceilings measured in the same run.</p>",
        _html_table(measured),
        "<h2>Not measured</h2>",
        _html_table(missing),
    ]
    return _PAGE.format(body="\n".join(sections))


_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>Attention, measured</title><style>
body {{ font: 14px sans-serif; margin: 2em; }}
img {{ max-width: 100%; display: block; margin: 1em 0; }}
table {{ border-collapse: collapse; }}
td, th {{ border: 1px solid #ccc; padding: 2px 8px; text-align: left; }}
</style></head><body>
{body}
</body></html>
"""


def _curves(group: pd.DataFrame, common: dict[str, Any], title: str) -> Figure:
    panels = list(group.groupby(_PANEL, dropna=False, sort=False))
    rows = math.ceil(len(panels) / _COLUMNS)
    figure = Figure(figsize=(5 * _COLUMNS, 3.6 * rows), layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots(rows, _COLUMNS, squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    for axis, (key, panel) in zip(axes.flat, panels, strict=False):
        # memory is the bound of a decode: there bytes say how close it comes, elsewhere flops
        by_bytes = (panel.bound == "memory").mean() > 0.5
        work, unit = ("bytes", "GB/s") if by_bytes else ("flops", "TFLOP/s")
        scale = 1e6 if by_bytes else 1e9
        for provider in _providers(panel):
            measured = panel[panel.provider == provider].sort_values("seqlen_k")
            fast, median, slow = (measured[work] / measured[ms] / scale for ms in ("ms_p20", "ms_p50", "ms_p80"))
            colour = _COLOURS.get(provider)
            axis.plot(measured.seqlen_k, median, label=provider, color=colour, marker="o", markersize=3)
            axis.fill_between(measured.seqlen_k, slow, fast, color=colour, alpha=0.2)
        ceiling = panel.drop_duplicates("seqlen_k").sort_values("seqlen_k")
        axis.plot(ceiling.seqlen_k, ceiling[work] / ceiling.ceiling_ms / scale, "k--", linewidth=1, label="ceiling")
        axis.set_xscale("log", base=2)
        axis.set_xticks(ceiling.seqlen_k, [str(seqlen) for seqlen in ceiling.seqlen_k])
        axis.set_ylim(bottom=0)
        axis.set(title=_panel_name(common, key), xlabel="seqlen", ylabel=unit)
        axis.grid(alpha=0.3)
    handles = {line.get_label(): line for axis in axes.flat for line in axis.get_lines()}
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=len(handles))
    return figure


def _ratios(group: pd.DataFrame, common: dict[str, Any], peer: str) -> pd.DataFrame:
    """Panels by lengths: the peer's median time over ours, for what both have measured."""
    times = group.assign(panel=[_panel_name(common, key) for key in group[_PANEL].itertuples(index=False)])
    wide = times.pivot_table(index=["panel", "seqlen_k"], columns="provider", values="ms_p50", sort=False)
    if CuteFa.name not in wide:
        return pd.DataFrame()
    ratios = (wide[peer] / wide[CuteFa.name]).dropna()
    return ratios.unstack(sort=False).sort_index(axis=1)


def _heat_map(ratios: pd.DataFrame, title: str) -> Figure:
    figure = Figure(figsize=(2.5 + 0.8 * ratios.shape[1], 1.2 + 0.35 * ratios.shape[0]), layout="constrained")
    axis = figure.subplots()
    limit, shown = math.log2(_RATIO_LIMIT), np.log2(ratios.to_numpy(dtype=float))
    axis.imshow(shown, cmap="RdBu", vmin=-limit, vmax=limit, aspect="auto")
    for (row, column), value in np.ndenumerate(shown):
        if value == value:
            colour = "white" if abs(value) > limit / 2 else "black"
            axis.text(column, row, f"{2**value:.2f}", ha="center", va="center", fontsize=8, color=colour)
    axis.set_xticks(range(ratios.shape[1]), [str(seqlen) for seqlen in ratios.columns])
    axis.set_yticks(range(ratios.shape[0]), ratios.index)
    axis.set(title=title, xlabel="seqlen")
    return figure


def _providers(table: pd.DataFrame) -> list[str]:
    """Those of the table, ours first, peers in the order in which the sweep knows them."""
    present = list(table.provider.unique())
    known = [name for name in PROVIDERS if name in present]
    return known + [name for name in present if name not in known]


def _panel_name(common: dict[str, Any], key: Iterable[Any]) -> str:
    return configuration_name(common | dict(zip(_PANEL, key, strict=True)))


def _problems(table: pd.DataFrame) -> list[str]:
    return [problem_name(row) for row in table.to_dict("records")]


def _html_table(table: pd.DataFrame) -> str:
    return table.to_html(index=False, na_rep="", border=0)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
