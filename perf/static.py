"""Our kernels' static figures beside the peers': compiled here, without a GPU, with the same assembler.

The peers are those compiled in the same run (FlashAttention-4, where it is installed) and the figures recorded in
``peer_figures.csv``, whose ``source`` column says of which revision; all were compiled with nvidia-cutlass-dsl 4.8.1.
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

from cute_fa.compiler import compile_artifacts
from cute_fa.dispatch import TABLE
from cute_fa.inputs import InputSpec
from cute_fa.problem import AttentionProblem
from cute_fa.trial import problem_of_spec
from cute_fa.types import DType, SmArch
from perf.sass import KernelReport, add_per_score, report_cubin

COLUMNS = (
    "arch direction head_dim causal source per_score copy_per_score cond_per_score regs setmaxnreg spills "
    "spills_in_loops serialised instr cond ex2 stall cond_stall tc mufu alu smem"
).split()
_PEER_FIGURES = Path(__file__).with_name("peer_figures.csv")


@dataclass(frozen=True)
class StaticKey:
    """One kernel to compile: a bf16 forward with head_dim_v = head_dim, dense, MHA."""

    arch: SmArch
    head_dim: int
    causal: bool

    def __str__(self) -> str:
        return f"{self.arch.value} d{self.head_dim} {'causal' if self.causal else 'full'}"

    def problem(self) -> AttentionProblem:
        spec = InputSpec(1, 1024, 1024, 8, 8, self.head_dim, dtype=DType.BF16, causal=self.causal)
        return problem_of_spec(spec, self.arch)


def our_report(key: StaticKey) -> KernelReport:
    """The report of the kernel that the dispatch table gives the key."""
    problem = key.problem()
    _, cubin = compile_artifacts(TABLE.lookup(problem).configure(problem))
    return _single_report(cubin, key)


def fa4_reports(keys: list[StaticKey]) -> dict[StaticKey, KernelReport]:
    """FlashAttention-4's kernels for the same keys, compiled in a process of their own for each arch, since FA4 takes
    its target from the environment."""
    reports = {}
    for arch in {key.arch for key in keys}:
        mine = [key for key in keys if key.arch is arch]
        with tempfile.TemporaryDirectory() as folder:
            environment = os.environ | {
                "FLASH_ATTENTION_ARCH": arch.value.rstrip("a"),
                "FLASH_ATTENTION_NUM_SMS": "108" if arch.number < 90 else "132",
                "CUTE_DSL_ARCH": arch.value,
                "CUTE_DSL_KEEP": "cubin",
                "CUTE_DSL_DUMP_DIR": folder,
            }
            keywords = [f"{key.head_dim}:{int(key.causal)}" for key in mine]
            command = [sys.executable, "-W", "ignore", "-m", "perf.compile_fa4", folder, *keywords]
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"compiling FlashAttention-4 for {arch.value} failed:\n{done.stderr[-2000:]}")
            for key, keyword in zip(mine, keywords, strict=True):
                cubin = Path(folder, f"{keyword}.kept").read_bytes()
                reports[key] = _single_report(cubin, key)
    return reports


def fa4_installed() -> bool:
    return importlib.util.find_spec("flash_attn") is not None and importlib.util.find_spec("quack") is not None


def static_table(keys: list[StaticKey], *, fa4: bool, progress=lambda step: None) -> pd.DataFrame:
    """One row per kernel, ours first, in ``COLUMNS``; ``progress`` is told each step before it starts."""
    rows = []
    for key in keys:
        progress(f"compiling {key}")
        rows.append(_row(key, "cute-fa", our_report(key)))
    if fa4:
        import importlib.metadata

        progress("compiling FlashAttention-4")
        source = f"FA4 {importlib.metadata.version('flash-attn-4')}, here"
        rows += [_row(key, source, report) for key, report in fa4_reports(keys).items()]
    wanted = {(key.arch.value, key.head_dim, key.causal) for key in keys}
    recorded = pd.read_csv(_PEER_FIGURES).query("direction == 'fwd'")
    known = [(row.arch, row.head_dim, row.causal) in wanted for row in recorded.itertuples()]
    recorded = recorded[known].reindex(columns=COLUMNS)  # nothing was recorded of some figures
    table = pd.concat([pd.DataFrame(rows, columns=COLUMNS), recorded], ignore_index=True)
    order = {(key.arch.value, key.head_dim, key.causal): position for position, key in enumerate(keys)}
    rank = [order[row.arch, row.head_dim, row.causal] for row in table.itertuples()]
    return table.assign(rank=rank).sort_values("rank", kind="stable").drop(columns="rank").reset_index(drop=True)


def _single_report(cubin: bytes, key: StaticKey) -> KernelReport:
    reports = report_cubin(cubin)
    if len(reports) != 1:
        raise ValueError(f"{key}: expected one kernel in the cubin, found {[report.kernel for report in reports]}")
    add_per_score(reports[0], key.head_dim)
    return reports[0]


def _row(key: StaticKey, source: str, report: KernelReport) -> dict:
    loop = report.main_loop
    if loop is None:
        raise ValueError(f"{key}: no loop with tensor-core instructions in {report.kernel}")
    kernel, figures = report.row(), loop.row()
    return {
        "arch": key.arch.value,
        "direction": "fwd",
        "head_dim": key.head_dim,
        "causal": key.causal,
        "source": source,
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
