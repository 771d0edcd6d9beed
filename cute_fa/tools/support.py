"""The support table as Markdown and for the terminal: a feature a row, direction and architectures a column. A cell
names the kernel, or "no", and the numbers of the notes that say why the kernels preferred to it do not serve; "–" where
a direction does not have the feature."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from rich.console import Group
from rich.table import Table

from cute_fa.engine.table import SupportRow
from cute_fa.semantics.types import Direction

_DIRECTIONS = [direction.value for direction in Direction]


class _Grid(NamedTuple):
    """``cells[feature]`` has one entry for each header; ``notes`` are numbered from 1."""

    headers: list[str]
    cells: dict[str, list[str]]
    notes: list[str]


def _grid(rows: Iterable[SupportRow]) -> _Grid:
    notes: list[str] = []
    columns: dict[tuple[str, str], dict[str, str]] = {}
    for row in rows:
        numbers = []
        for reason in row.reasons:
            if reason not in notes:
                notes.append(reason)
            numbers.append(str(notes.index(reason) + 1))
        text = row.kernel or "no"
        if numbers:
            text += f" ({', '.join(numbers)})"
        columns.setdefault((row.direction, row.arch), {})[row.feature] = text
    # Architectures that agree in everything share a column.
    shared: dict[tuple, list[str]] = {}
    for (direction, arch), column in sorted(columns.items(), key=lambda item: _DIRECTIONS.index(item[0][0])):
        shared.setdefault((direction, *column.items()), []).append(arch)
    headers = [f"{key[0]} on {', '.join(archs)}" for key, archs in shared.items()]
    features = dict.fromkeys(feature for column in columns.values() for feature in column)
    return _Grid(headers, {feature: [dict(key[1:]).get(feature, "–") for key in shared] for feature in features}, notes)


def to_markdown(rows: Iterable[SupportRow]) -> str:
    headers, cells, notes = _grid(rows)
    lines = ["| feature | " + " | ".join(headers) + " |", "|---|" + "---|" * len(headers)]
    lines += [f"| {feature} | " + " | ".join(row) + " |" for feature, row in cells.items()]
    return "\n".join([*lines, "", *(f"{number}. {note}" for number, note in enumerate(notes, 1))])


def to_rich(rows: Iterable[SupportRow]) -> list[Table | Group]:
    headers, cells, notes = _grid(rows)
    table = Table(header_style="bold")
    for name in ("feature", *headers):
        table.add_column(name)
    for feature, row in cells.items():
        table.add_row(feature, *row)
    return [table, Group(*(f"{number}. {note}" for number, note in enumerate(notes, 1)))]
