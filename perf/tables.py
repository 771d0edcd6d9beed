"""Data frames as Markdown and as terminal tables."""

from __future__ import annotations

import sys

import click
import pandas as pd
from rich.console import Console
from rich.table import Table


def _text(value) -> str:
    if value is None or value != value:
        return ""
    return f"{value:g}" if isinstance(value, float) else str(value)


def to_markdown(frame: pd.DataFrame) -> str:
    lines = ["| " + " | ".join(map(str, frame.columns)) + " |", "|" + "---|" * len(frame.columns)]
    for row in frame.itertuples(index=False):
        lines.append("| " + " | ".join(map(_text, row)) + " |")
    return "\n".join(lines)


def to_rich(frame: pd.DataFrame, title: str | None = None) -> Table:
    table = Table(title=title, header_style="bold")
    for name, dtype in frame.dtypes.items():
        table.add_column(str(name), justify="left" if dtype.kind in "OUSTb" else "right")
    for row in frame.itertuples(index=False):
        table.add_row(*map(_text, row))
    return table


def show(frame: pd.DataFrame, markdown: bool) -> None:
    """Print a frame."""
    if markdown:
        click.echo(to_markdown(frame))
    else:
        # A pipe has no width of its own: the whole table goes out, never wrapped or cut.
        Console(width=None if sys.stdout.isatty() else 240).print(to_rich(frame))
