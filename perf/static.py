"""Our kernels' static figures beside the peers': compiled here, without a GPU, with the same assembler.

The peers are those compiled in the same run (FlashAttention-4, where it is installed) and the figures recorded in
``peer_figures.csv``, whose ``source`` column says of which revision; all were compiled with nvidia-cutlass-dsl 4.8.1.
``flavour``: by which of its flavours.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from cute_fa.engine import flavour
from cute_fa.engine.compiler import compile_artifacts
from cute_fa.engine.table import TABLE
from cute_fa.semantics.errors import CuteFaError
from cute_fa.semantics.problem import AttentionProblem
from cute_fa.semantics.types import Direction, DType, SmArch
from cute_fa.tools.inputs import InputSpec
from cute_fa.tools.trial import problem_of_spec
from perf.sass import KernelReport, add_per_score, report_cubin

COLUMNS = (
    "arch direction head_dim causal dtype source flavour per_score copy_per_score cond_per_score regs setmaxnreg "
    "spills spills_in_loops serialised instr cond ex2 stall cond_stall tc mufu alu smem"
).split()
_PEER_FIGURES = Path(__file__).with_name("peer_figures.csv")


@dataclass(frozen=True)
class StaticKey:
    """One kernel to compile: head_dim_v = head_dim, dense, MHA; in fp8 with descales."""

    arch: SmArch
    head_dim: int
    causal: bool
    direction: Direction = Direction.FORWARD
    dtype: DType = DType.BF16

    def __str__(self) -> str:
        return f"{self.arch.value} {self.direction.value} {self.shape}"

    @property
    def shape(self) -> str:
        """Head dim and mask, "d64 causal", and the dtype where it is not bf16: "d64 causal e4m3"."""
        dtype = "" if self.dtype is DType.BF16 else f" {self.dtype.value}"
        return f"d{self.head_dim} {'causal' if self.causal else 'full'}{dtype}"

    @property
    def columns(self) -> tuple[str, str, int, bool, str]:
        """arch, direction, head_dim, causal and dtype, as tables hold them."""
        return self.arch.value, self.direction.value, self.head_dim, self.causal, self.dtype.value

    @property
    def served(self) -> bool:
        """Whether a kernel of ours has it."""
        try:
            TABLE.lookup(self.problem())
        except CuteFaError:
            return False
        return True

    def problem(self) -> AttentionProblem:
        spec = InputSpec(1, 1024, 1024, 8, 8, self.head_dim, dtype=self.dtype, causal=self.causal)
        return problem_of_spec(spec, self.arch, direction=self.direction)


def our_report(key: StaticKey) -> KernelReport:
    """The report of the kernel that the dispatch table gives the key."""
    problem = key.problem()
    _, cubin = compile_artifacts(TABLE.lookup(problem).configure(problem))
    return _main_report([cubin], key)


def fa4_serves(key: StaticKey) -> bool:
    """Whether FlashAttention-4 has a kernel for the key: its interface offers no backward before sm_90, no fp8 before
    sm_100."""
    return key.dtype is DType.BF16 and (key.direction is Direction.FORWARD or key.arch.number >= 90)


def fa4_reports(keys: list[StaticKey]) -> dict[StaticKey, KernelReport]:
    """FlashAttention-4's kernels for the same keys, as far as it has them, compiled in a process of their own for each
    arch, since FA4 takes its target from the environment."""
    reports = {}
    served = [key for key in keys if fa4_serves(key)]
    for arch in {key.arch for key in served}:
        mine = [key for key in served if key.arch is arch]
        with tempfile.TemporaryDirectory() as folder:
            environment = os.environ | {
                "FLASH_ATTENTION_ARCH": arch.value.rstrip("a"),
                "FLASH_ATTENTION_NUM_SMS": "108" if arch.number < 90 else "132",
                "CUTE_DSL_ARCH": arch.value,
                "CUTE_DSL_KEEP": "cubin",
                "CUTE_DSL_DUMP_DIR": folder,
            }
            keywords = [f"{key.direction.value}:{key.head_dim}:{int(key.causal)}" for key in mine]
            command = [sys.executable, "-W", "ignore", "-m", "perf.compile_fa4", folder, *keywords]
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"compiling FlashAttention-4 for {arch.value} failed:\n{done.stderr[-2000:]}")
            for key, keyword in zip(mine, keywords, strict=True):
                cubins = [path.read_bytes() for path in sorted(Path(folder).glob(f"{keyword}:*.kept"))]
                reports[key] = _main_report(cubins, key)
    return reports


def fa4_installed() -> bool:
    return importlib.util.find_spec("flash_attn") is not None and importlib.util.find_spec("quack") is not None


def static_table(keys: list[StaticKey], *, fa4: bool, progress=lambda step: None) -> pd.DataFrame:
    """One row per kernel, ours first, in ``COLUMNS``; ``progress`` is told each step before it starts."""
    rows = []
    for key in keys:
        progress(f"compiling {key}")
        rows.append(table_row(key, "cute-fa", our_report(key)))
    if fa4:
        import importlib.metadata

        progress("compiling FlashAttention-4")
        source = f"FA4 {importlib.metadata.version('flash-attn-4')}, here"
        rows += [table_row(key, source, report) for key, report in fa4_reports(keys).items()]
    rank = {key.columns: position for position, key in enumerate(keys)}
    recorded = pd.read_csv(_PEER_FIGURES).assign(dtype=DType.BF16.value)
    known = [(row.arch, row.direction, row.head_dim, row.causal, row.dtype) in rank for row in recorded.itertuples()]
    recorded = recorded[known].reindex(columns=COLUMNS)  # nothing was recorded of some figures
    table = pd.concat([pd.DataFrame(rows, columns=COLUMNS), recorded], ignore_index=True)
    order = [rank[row.arch, row.direction, row.head_dim, row.causal, row.dtype] for row in table.itertuples()]
    return table.assign(rank=order).sort_values("rank", kind="stable").drop(columns="rank").reset_index(drop=True)


def _main_report(cubins: list[bytes], key: StaticKey) -> KernelReport:
    """Of the kernels that one call launches, the one whose main loop does most of the tensor work: before and after a
    backward's run smaller ones."""
    reports = [report for cubin in cubins for report in report_cubin(cubin) if report.main_loop]
    if not reports:
        raise ValueError(f"{key}: no loop with tensor-core instructions")
    report = max(reports, key=lambda report: report.main_loop.flops)
    add_per_score(report, key.head_dim, backward=key.direction is Direction.BACKWARD)
    return report


def table_row(key: StaticKey, source: str, report: KernelReport) -> dict:
    """The row of one kernel compiled here, in ``COLUMNS``."""
    loop = report.main_loop
    kernel, figures = report.row(), loop.row()
    return {
        **dict(zip(COLUMNS, key.columns, strict=False)),
        "source": source,
        "flavour": flavour.active(),
        "per_score": loop.per_score,
        "copy_per_score": loop.copy_per_score,
        "cond_per_score": loop.cond_per_score,
        "regs": kernel["regs"],
        "setmaxnreg": report.setmaxnreg,
        "spills": f"{kernel['ldl']}/{kernel['stl']}",
        "spills_in_loops": kernel["spill_in_hot"],
        "serialised": report.wgmma_serialised,
        "instr": figures["insts"],
        "cond": figures["cond"],
        "ex2": figures["mufu_ex2"],
        "stall": figures["stall_sum"],
        "cond_stall": figures["cond_stall"],
        **{name: figures[f"cyc_{name}"] for name in ("tc", "mufu", "alu", "smem")},
    }
