"""The support table as Markdown and for the terminal: a feature and direction a row, an architecture a column, and the
reason for each "no" as a numbered note."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Group
from rich.table import Table

from cute_fa.dispatch import SupportRow


def _grid(rows: Iterable[SupportRow]) -> tuple[list[str], dict[tuple[str, str], list[str]], list[str]]:
    """Architectures, the cells by (feature, direction), and the notes, in the order in which cells name them."""
    archs: list[str] = []
    notes: list[str] = []
    cells: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row.arch not in archs:
            archs.append(row.arch)
        if row.kernel is None and row.reason not in notes:
            notes.append(row.reason)
        text = row.kernel or f"no ({notes.index(row.reason) + 1})"
        cells.setdefault((row.feature, row.direction), []).append(text)
    return archs, cells, notes


def to_markdown(rows: Iterable[SupportRow]) -> str:
    archs, cells, notes = _grid(rows)
    lines = ["| feature | pass | " + " | ".join(archs) + " |", "|---|---|" + "---|" * len(archs)]
    lines += [f"| {feature} | {direction} | " + " | ".join(row) + " |" for (feature, direction), row in cells.items()]
    return "\n".join([*lines, "", *(f"{number}. {note}" for number, note in enumerate(notes, 1))])


def to_rich(rows: Iterable[SupportRow]) -> list[Table | Group]:
    archs, cells, notes = _grid(rows)
    table = Table(header_style="bold")
    for name in ("feature", "pass", *archs):
        table.add_column(name)
    for key, row in cells.items():
        table.add_row(*key, *row)
    return [table, Group(*(f"{number}. {note}" for number, note in enumerate(notes, 1)))]
