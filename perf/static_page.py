"""The static figures as a page of the documentation shows them: a table for the forward of each architecture and dtype,
one for all backwards. ``docs/static.md`` holds what ``python -m perf static --markdown`` prints."""

from __future__ import annotations

from collections.abc import Iterator

import pandas as pd

from cute_fa.semantics.types import Direction, DType, SmArch
from perf.static import SEQLEN
from perf.tables import to_markdown

_OURS = "cute-fa"
_USUAL = "cu12"  # the flavour that the page's titles do not name
_STEP = ("tensor", "smem", "exp2", "MUFU", "FMA", "issue", "busiest")  # columns step_… of the table


def to_page(table: pd.DataFrame) -> str:
    """Markdown of a table in ``perf.static.COLUMNS``: of what our kernels' flavour has compiled."""
    (flavour,) = table.flavour[table.source == _OURS].unique()
    suffix = "" if flavour == _USUAL else f", {flavour}"
    sections = _sections(table[table.flavour == flavour])
    return "\n\n".join(f"{title}{suffix}:\n\n{to_markdown(section)}" for title, section in sections)


def _sections(table: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    by_role, table = (table[own] for own in (table.net_per_score.notna(), table.net_per_score.isna()))
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
    yield from role_sections(by_role)
    if not forward.all():
        yield "Backward", shown[~forward].drop(columns=["registers", "stall (conditional)", "tensor cycles"])


def to_row(row: dict) -> dict:
    """One kernel's figures, in the page's words."""
    return {
        "arch": row["arch"],
        **_name(row),
        "per score": row["per_score"],
        "copies": row["copy_per_score"],
        "conditional": row["cond_per_score"],
        "registers": _registers(row),
        "LDL/STL (in loops)": f"{row['spills']} ({row['spills_in_loops']})",
        "stall (conditional)": _beside(row["stall"], row["cond_stall"]),
        "tensor cycles": row["tc"],
    }


def role_sections(table: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """Of forwards on tcgen05: what each role runs, what a step costs each pipe, and how ours compare with the peer."""
    for (arch, dtype), own in table.groupby(["arch", "dtype"], sort=False):
        named = f"Forward, {arch}" + (f", {dtype}" if dtype != DType.BF16.value else "")
        rows = own.to_dict("records")
        yield f"{named}, by role", pd.DataFrame([_role_row(row) for row in rows])
        yield f"{named}, cycles of 128 keys", pd.DataFrame([_step_row(row) for row in rows])
        compared = [
            _ratio_row(ours, theirs)
            for ours in rows
            for theirs in rows
            if ours["source"] == _OURS != theirs["source"] and _shape(ours) == _shape(theirs)
        ]
        if compared:
            yield f"{named}, ours / FlashAttention-4's", pd.DataFrame(compared)


def _role_row(row: dict) -> dict:
    return {
        **_name(row),
        "per score": row["per_score"],
        "net": row["net_per_score"],
        "conditional": row["cond_per_score"],
        "emulated": f"{row['emulated']:g} of {row['scores']:g}",
        "stall (conditional)": _beside(row["stall"], row["cond_stall"]),
        "correction": row["correction"],
        "per MMA": row["per_mma"],
        "load": row["load"],
        "registers": row["role_regs"],
        "LDL/STL (in loops)": f"{row['spills']} ({row['role_spills'] or 0})",
    }


def _step_row(row: dict) -> dict:
    return {**_name(row), **{name: row[f"step_{name.lower()}"] for name in _STEP}}


def _ratio_row(ours: dict, theirs: dict) -> dict:
    """What is wanted of a kernel: fewer instructions a score, and a less busy pipe, than the peer's."""
    return {
        **_shape(ours),
        "net": round(ours["net_per_score"] / theirs["net_per_score"], 3),
        "busiest": round(ours["step_busiest"] / theirs["step_busiest"], 3),
    }


def _name(row: dict) -> dict:
    return {**_shape(row), "kernel": f"**{_OURS}**" if row["source"] == _OURS else row["source"]}


def _shape(row: dict) -> dict:
    sizes = dict.fromkeys([row["head_dim"], row["head_dim_v"]])
    mask = "causal" if row["causal"] else "full"
    tokens = "" if row["seqlen"] == SEQLEN else f", {row['seqlen']} tokens"
    return {"head_dim": ", ".join(f"{size:g}" for size in sizes), "mask": mask + tokens}


def _registers(row: dict) -> str:
    """Those of a producer and of a consumer where setmaxnreg divides them."""
    limits = [token.lstrip("-+") for token in str(row["setmaxnreg"] or "").split()]
    return " / ".join(limits) if len(limits) == 2 else f"{row['regs']:g}"


def _beside(figure: float, part: float) -> str:
    return f"{figure:g}" if part != part else f"{figure:g} ({part:g})"
