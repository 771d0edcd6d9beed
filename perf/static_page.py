"""The static figures as a page of the documentation shows them: a table for the forward of each architecture and dtype,
one for all backwards. ``docs/static.md`` holds what ``python -m perf static --markdown`` prints."""

from __future__ import annotations

from collections.abc import Iterator

import pandas as pd

from cute_fa.semantics.types import Direction, DType, SmArch
from perf.tables import to_markdown

_OURS = "cute-fa"
_USUAL = "cu12"  # the flavour that the page's titles do not name


def to_page(table: pd.DataFrame) -> str:
    """Markdown of a table in ``perf.static.COLUMNS``: of what our kernels' flavour has compiled."""
    (flavour,) = table.flavour[table.source == _OURS].unique()
    suffix = "" if flavour == _USUAL else f", {flavour}"
    sections = _sections(table[table.flavour == flavour])
    return "\n\n".join(f"{title}{suffix}:\n\n{to_markdown(section)}" for title, section in sections)


def _sections(table: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    shown = pd.DataFrame([to_row(row) for row in table.to_dict("records")], index=table.index)
    forward = table.direction == Direction.FORWARD.value
    for arch in table.arch[forward].unique():
        has_roles = SmArch(arch).number >= 90
        left_out = ["arch", "copies"] if has_roles else ["arch", "stall (conditional)", "tensor cycles"]
        roles = "; registers of a producer / of a consumer (setmaxnreg)" if has_roles else ""
        for dtype in table.dtype[forward & (table.arch == arch)].unique():
            named = f", {dtype}" if dtype != DType.BF16.value else ""
            own = forward & (table.arch == arch) & (table.dtype == dtype)
            yield f"Forward, {arch}{named}{roles}", shown[own].drop(columns=left_out)
    if not forward.all():
        yield "Backward", shown[~forward].drop(columns=["registers", "stall (conditional)", "tensor cycles"])


def to_row(row: dict) -> dict:
    """One kernel's figures, in the page's words."""
    return {
        "arch": row["arch"],
        "head_dim": row["head_dim"],
        "mask": "causal" if row["causal"] else "full",
        "kernel": f"**{_OURS}**" if row["source"] == _OURS else row["source"],
        "per score": row["per_score"],
        "copies": row["copy_per_score"],
        "conditional": row["cond_per_score"],
        "registers": _registers(row),
        "LDL/STL (in loops)": f"{row['spills']} ({row['spills_in_loops']})",
        "stall (conditional)": _beside(row["stall"], row["cond_stall"]),
        "tensor cycles": row["tc"],
    }


def _registers(row: dict) -> str:
    """Those of a producer and of a consumer where setmaxnreg divides them."""
    limits = [token.lstrip("-+") for token in str(row["setmaxnreg"] or "").split()]
    return " / ".join(limits) if len(limits) == 2 else f"{row['regs']:g}"


def _beside(figure: float, part: float) -> str:
    return f"{figure:g}" if part != part else f"{figure:g} ({part:g})"
