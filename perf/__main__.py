"""``python -m perf``: static figures of compiled kernels."""

from __future__ import annotations

import sys
from pathlib import Path

import click
import pandas as pd
from rich.console import Console

from cute_fa.types import SmArch
from perf.sass import add_per_score, assemble_ptx, report_cubin
from perf.tables import to_markdown, to_rich

_ARCHS = [arch.value for arch in SmArch]
# The architectures that have a kernel of their own.
_KERNEL_ARCHS = [SmArch.SM_80.value, SmArch.SM_90A.value]


class _HeadDims(click.ParamType):
    """``D`` or ``D,DV``: (head_dim, head_dim_v)."""

    name = "D[,DV]"

    def convert(self, value: str, param, context) -> tuple[int, int]:
        head_dim, comma, head_dim_v = value.partition(",")
        try:
            return int(head_dim), int(head_dim_v if comma else head_dim)
        except ValueError:
            self.fail(f"{value!r}: one head dim, or head_dim and head_dim_v with a comma between", param, context)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
def main() -> None:
    """Performance figures of the kernels."""


@main.command()
@click.option(
    "--arch", "archs", multiple=True, type=click.Choice(_ARCHS), default=["sm_80", "sm_90a"], show_default=True
)
@click.option("--head-dim", "head_dims", multiple=True, type=int, default=[64, 128, 256], show_default=True)
@click.option("--fa4/--no-fa4", default=None, help="Compile FlashAttention-4 too.  [default: if it is installed]")
@click.option("--csv", type=click.Path(dir_okay=False, path_type=Path), help="Also write the table to this file.")
@click.option("--markdown", is_flag=True, help="Print Markdown instead of a terminal table.")
def static(archs, head_dims, fa4: bool | None, csv: Path | None, markdown: bool) -> None:
    """Static figures of our forward kernels (bf16, full and causal) beside the peers'. Needs no GPU.

    per_score: non-tensor instructions per thread and score element in the steady-state loop, without conditional
    blocks; cond_per_score: those of conditional blocks, copy_per_score of the ones among them that copy the next tiles;
    setmaxnreg: registers of the producers (-) and of the consumers (+); spills: LDL/STL of the whole kernel, then those
    in its loops; serialised: ptxas has every wgmma waited for before the next; stall: sum of the fixed stall counts,
    cond_stall of those in conditional blocks; tc, mufu, alu, smem: cycles of the bound model for one iteration of four
    warps.
    """
    from perf.static import StaticKey, fa4_installed, static_table

    notes = Console(stderr=True)
    if fa4 is None:
        fa4 = fa4_installed()
        if not fa4:
            notes.print("FlashAttention-4 is not installed: its figures are the recorded ones alone.")
    keys = [StaticKey(SmArch(a), d, causal) for a in archs for d in head_dims for causal in (False, True)]
    table = static_table(keys, fa4=fa4, progress=notes.print)
    if csv:
        table.to_csv(csv, index=False)
    _print(table, markdown)


@main.command()
@click.option("--arch", type=click.Choice(_ARCHS), default="sm_90a", show_default=True)
@click.option("--head-dim", "head_dims", multiple=True, type=_HeadDims(), help="[default: 64 … 256, and 192,128]")
@click.option("--offenders", is_flag=True, help="Only the kernels that spill in a loop or whose wgmma are serialised.")
@click.option("--csv", type=click.Path(dir_okay=False, path_type=Path), help="Also write the table to this file.")
@click.option("--markdown", is_flag=True, help="Print Markdown instead of a terminal table.")
def features(
    arch: str, head_dims: tuple[tuple[int, int], ...], offenders: bool, csv: Path | None, markdown: bool
) -> None:
    """Static figures of our forward kernel under each feature and every two features together (bf16).

    Several hundred kernels of a few seconds each: minutes for one head dim, most of an hour for all. Figures as in
    "static"; in_loops, in_main: LDL/STL in hot loops, and in the steady-state one.
    """
    from perf.features import HEAD_DIMS, feature_keys, feature_rows

    notes = Console(stderr=True)
    keys = feature_keys(SmArch(arch), head_dims or HEAD_DIMS)
    rows = []
    for key, row in zip(keys, feature_rows(keys), strict=True):
        notes.print(f"{key}: {'offends' if row['offends'] else 'fine'}")
        rows.append(row)
    table = pd.DataFrame(rows)
    if csv:
        table.to_csv(csv, index=False)
    _print(table[table.offends] if offenders else table, markdown)


@main.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--score", metavar="D[,DV][,bwd]", help="Head dims: adds per_score and cond_per_score.")
@click.option("--all-loops", is_flag=True, help="Every hot loop instead of the steady-state ones.")
@click.option("--csv", type=click.Path(dir_okay=False, path_type=Path), help="Also write the loops to this file.")
@click.option("--markdown", is_flag=True, help="Print Markdown instead of terminal tables.")
def sass(files: tuple[Path, ...], score: str | None, all_loops: bool, csv: Path | None, markdown: bool) -> None:
    """Resources and hot loops of any cubin, PTX file, or folder of cubins."""
    kernels, loops = [], []
    for file in (f for given in files for f in (sorted(given.rglob("*.cubin")) if given.is_dir() else [given])):
        for report in report_cubin(assemble_ptx(file) if file.suffix == ".ptx" else file.read_bytes()):
            if score:
                parts = score.split(",")
                add_per_score(report, *(int(part) for part in parts if part != "bwd"), backward=parts[-1] == "bwd")
            kernels.append({"file": file.name, **report.row()})
            loops += [{"file": file.name, **loop.row()} for loop in report.loops if all_loops or loop.main]
    if csv:
        pd.DataFrame(loops).to_csv(csv, index=False)
    for rows in (kernels, loops):
        # A kernel or loop a column; figures that are zero or unknown everywhere only take room.
        frame = pd.DataFrame(rows).set_index("file").drop(columns="kernel", errors="ignore")
        frame = frame.loc[:, frame.map(bool).any() & frame.notna().any()]
        _print(frame.T.reset_index(names="figure"), markdown)


def _print(table: pd.DataFrame, markdown: bool) -> None:
    if markdown:
        click.echo(to_markdown(table))
    else:
        # A pipe has no width of its own: the whole table goes out, never wrapped or cut.
        Console(width=None if sys.stdout.isatty() else 240).print(to_rich(table))


if __name__ == "__main__":
    main()
