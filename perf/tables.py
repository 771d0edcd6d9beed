"""Data frames as Markdown and as terminal tables."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    import pandas as pd


def _text(value) -> str:
    if value is None or value != value:
        return ""
    return f"{value:g}" if isinstance(value, float) else str(value)


def to_markdown(frame: pd.DataFrame) -> str:
    return _markdown(frame.columns, frame.itertuples(index=False))


def to_rich(frame: pd.DataFrame, title: str | None = None) -> Table:
    sides = {str(name): "left" if dtype.kind in "OUSTb" else "right" for name, dtype in frame.dtypes.items()}
    return _rich(sides, frame.itertuples(index=False), title)


def show(frame: pd.DataFrame, markdown: bool) -> None:
    """Print a frame."""
    _print(to_markdown(frame) if markdown else to_rich(frame))


def show_rows(rows: list[dict[str, Any]], markdown: bool) -> None:
    """Print rows as a table, without pandas: columns in the order in which the rows first have them, to the left; what
    a row lacks is empty."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [[row.get(name) for name in names] for row in rows]
    _print(_markdown(names, cells) if markdown else _rich(dict.fromkeys(names, "left"), cells))


def _markdown(names: Iterable, rows: Iterable[Iterable]) -> str:
    names = list(names)
    lines = ["| " + " | ".join(map(str, names)) + " |", "|" + "---|" * len(names)]
    return "\n".join([*lines, *("| " + " | ".join(map(_text, row)) + " |" for row in rows)])


def _rich(sides: dict[str, Any], rows: Iterable[Iterable], title: str | None = None) -> Table:
    """``sides``: of each column, by its name."""
    table = Table(title=title, header_style="bold")
    for name, side in sides.items():
        table.add_column(name, justify=side)
    for row in rows:
        table.add_row(*map(_text, row))
    return table


def _print(table: str | Table) -> None:
    if isinstance(table, str):
        click.echo(table)
    else:
        # A pipe has no width of its own: the whole table goes out, never wrapped or cut.
        Console(width=None if sys.stdout.isatty() else 240).print(table)
