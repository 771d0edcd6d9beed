"""Our kernels' static figures beside the peers': compiled here, without a GPU, with the same assembler.

The peers are those compiled in the same run (FlashAttention-4, where it is installed) and the figures recorded in
``peer_figures.csv``, whose ``source`` column says of which revision; all were compiled with nvidia-cutlass-dsl 4.8.1.
``flavour``: by which of its flavours.
"""

from __future__ import annotations

import dataclasses
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
from cute_fa.engine.contract import KernelConfig
from cute_fa.engine.table import TABLE
from cute_fa.semantics.errors import CuteFaError
from cute_fa.semantics.problem import AttentionProblem
from cute_fa.semantics.types import Direction, DType, SmArch
from cute_fa.tools.inputs import InputSpec
from cute_fa.tools.trial import problem_of_spec
from perf.sass import KernelReport, attention_report
from perf.step import step_of

COLUMNS = (
    "arch direction head_dim head_dim_v causal dtype seqlen source flavour per_score copy_per_score cond_per_score "
    "regs setmaxnreg spills spills_in_loops serialised instr cond ex2 stall cond_stall tc mufu alu smem"
).split()
# Those of kernels with tcgen05 alone.
ROLE_COLUMNS = (
    "net_per_score scores emulated correction per_mma load role_regs role_spills step_tensor step_smem step_exp2 "
    "step_mufu step_fma step_issue step_busiest"
).split()
COLUMNS += ROLE_COLUMNS
SEQLEN, SHORT_SEQLEN = 4096, 512
_SMS = {80: "108", 90: "132", 100: "148"}  # of an A100, an H100 and a B200
_PEER_FIGURES = Path(__file__).with_name("peer_figures.csv")


@dataclass(frozen=True)
class StaticKey:
    """One kernel to compile: dense, MHA; in fp8 with descales. ``head_dim_v`` is by default ``head_dim``; ``ranges``:
    under a range plan; ``seqlen``: tokens of a sequence, by which some kernels choose their tiles."""

    arch: SmArch
    head_dim: int
    causal: bool
    direction: Direction = Direction.FORWARD
    dtype: DType = DType.BF16
    head_dim_v: int | None = None
    ranges: bool = False
    seqlen: int = SEQLEN

    def __post_init__(self) -> None:
        object.__setattr__(self, "head_dim_v", self.head_dim_v or self.head_dim)

    def __str__(self) -> str:
        return f"{self.arch.value} {self.direction.value} {self.shape}"

    @property
    def shape(self) -> str:
        """Head dims and mask, "d64 causal" or "d192,128 full", the dtype unless it is bf16, and the length unless it is
        ``SEQLEN``: "d64 causal e4m3", "d256 full 512"."""
        value = "" if self.head_dim_v == self.head_dim else f",{self.head_dim_v}"
        dtype = "" if self.dtype is DType.BF16 else f" {self.dtype.value}"
        mask = "ranges" if self.ranges else "causal" if self.causal else "full"
        seqlen = "" if self.seqlen == SEQLEN else f" {self.seqlen}"
        return f"d{self.head_dim}{value} {mask}{dtype}{seqlen}"

    @property
    def columns(self) -> tuple[str, str, int, int, bool, str, int]:
        """arch, direction, head_dim, head_dim_v, causal, dtype and seqlen, as tables hold them."""
        sizes = self.head_dim, self.head_dim_v
        return self.arch.value, self.direction.value, *sizes, self.causal, self.dtype.value, self.seqlen

    @property
    def served(self) -> bool:
        """Whether a kernel of ours has it."""
        try:
            TABLE.lookup(self.problem())
        except CuteFaError:
            return False
        return True

    @property
    def config(self) -> KernelConfig:
        """That of the kernel which the dispatch table gives."""
        problem = self.problem()
        return TABLE.lookup(problem).configure(problem)

    def with_short(self) -> list[StaticKey]:
        """The key, and that of ``SHORT_SEQLEN`` if it has a kernel of its own."""
        short = dataclasses.replace(self, seqlen=SHORT_SEQLEN)
        return [self] if short.config == self.config else [self, short]

    def problem(self) -> AttentionProblem:
        sizes, tokens = (self.head_dim, self.head_dim_v), (self.seqlen, self.seqlen)
        spec = InputSpec(1, *tokens, 8, 8, *sizes, dtype=self.dtype, causal=self.causal, ranges=int(self.ranges))
        return problem_of_spec(spec, self.arch, direction=self.direction)


def our_report(key: StaticKey) -> KernelReport:
    """The report of the kernel that the dispatch table gives the key."""
    _, cubin = compile_artifacts(key.config)
    return _main_report([cubin], key)


def fa4_serves(key: StaticKey) -> bool:
    """Whether FlashAttention-4 has a kernel for the key that is reported: its interface offers no backward before
    sm_90, fp8 and few head dims above 128 on sm_100; no length has one of its own. Of its backward for sm_100 there are
    no figures."""
    blackwell = key.arch.number // 10 == 10
    if key.seqlen != SEQLEN:
        return False
    if key.direction is Direction.BACKWARD:
        return key.dtype is DType.BF16 and key.arch is SmArch.SM_90A
    if not blackwell:
        return key.dtype is DType.BF16
    sizes = key.head_dim, key.head_dim_v
    return max(sizes) <= 128 or sizes in ((192, 128), (256, 256))


def fa4_target(arch: SmArch) -> dict[str, str]:
    """The environment in which FlashAttention-4 compiles for an architecture."""
    sms = _SMS[max(known for known in _SMS if known <= arch.number)]
    return {
        "FLASH_ATTENTION_ARCH": arch.value.rstrip("a"),
        "FLASH_ATTENTION_NUM_SMS": sms,
        "CUTE_DSL_ARCH": arch.value,
    }


def fa4_reports(keys: list[StaticKey]) -> dict[StaticKey, KernelReport]:
    """FlashAttention-4's kernels for the same keys, as far as it has them, compiled in a process of their own for each
    arch, since FA4 takes its target from the environment."""
    reports = {}
    served = [key for key in keys if fa4_serves(key)]
    for arch in {key.arch for key in served}:
        mine = [key for key in served if key.arch is arch]
        with tempfile.TemporaryDirectory() as folder:
            dumping = {"CUTE_DSL_KEEP": "cubin", "CUTE_DSL_DUMP_DIR": folder}
            environment = os.environ | fa4_target(arch) | dumping
            keywords = [
                f"{key.direction.value}:{key.head_dim}:{key.head_dim_v}:{int(key.causal)}:{key.dtype.value}"
                for key in mine
            ]
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
    recorded = pd.read_csv(_PEER_FIGURES)
    recorded = recorded.assign(head_dim_v=recorded.head_dim, dtype=DType.BF16.value, seqlen=SEQLEN)
    recorded = recorded.reindex(columns=COLUMNS)  # nothing was recorded of some figures
    recorded = recorded[[columns in rank for columns in _key_columns(recorded)]]
    table = pd.concat([pd.DataFrame(rows, columns=COLUMNS), recorded], ignore_index=True)
    order = [rank[columns] for columns in _key_columns(table)]
    return table.assign(rank=order).sort_values("rank", kind="stable").drop(columns="rank").reset_index(drop=True)


def range_row(key: StaticKey) -> dict:
    """What a range plan's kernel runs where nothing is masked, beside the dense one of ``key``: non-tensor instructions
    of the main loop per score, with the copies of the next tiles, and accesses spilled in it."""
    reports = {"dense": our_report(key), "ranges": our_report(dataclasses.replace(key, ranges=True))}
    loops = {name: report.score_loop for name, report in reports.items()}
    row = {name: round(loop.per_score + loop.copy_per_score, 2) for name, loop in loops.items()}
    return {
        "arch": key.arch.value,
        "direction": key.direction.value,
        "kernel": key.shape,
        **row,
        "percent": round(100 * (row["ranges"] / row["dense"] - 1), 1),
        "spills": loops["ranges"].counts["local"],
    }


def _key_columns(table: pd.DataFrame) -> list[tuple]:
    """:attr:`StaticKey.columns` of each row."""
    return list(table[COLUMNS[:7]].itertuples(index=False, name=None))


def _main_report(cubins: list[bytes], key: StaticKey) -> KernelReport:
    """Of what one call launches."""
    try:
        return attention_report(cubins, key.head_dim, key.head_dim_v, key.direction is Direction.BACKWARD)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None


def table_row(key: StaticKey, source: str, report: KernelReport) -> dict:
    """The row of one kernel compiled here, in ``COLUMNS``."""
    loop = report.score_loop
    kernel, figures = report.row(), loop.row()
    cycles = figures | {"cyc_tc": report.main_loop.row()["cyc_tc"]}
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
        **{name: cycles[f"cyc_{name}"] for name in ("tc", "mufu", "alu", "smem")},
        **(_role_columns(key, report) if report.tcgen05 else {}),
    }


def _role_columns(key: StaticKey, report: KernelReport) -> dict:
    """``ROLE_COLUMNS`` of a kernel whose roles have loops of their own."""
    loops = report.role_loops
    mma, instructions = loops["mma"], {role: loop.instructions for role, loop in loops.items()}
    step = step_of(report, key.head_dim, key.head_dim_v, 1 if key.dtype.is_fp8 else 2)
    return {
        "net_per_score": loops["softmax"].net_per_score,
        "scores": loops["softmax"].scores,
        "emulated": loops["softmax"].emulated,
        "correction": instructions.get("correction"),
        "per_mma": round((mma.instructions - mma.counts["tensor"]) / mma.counts["tensor"], 2),
        "load": instructions.get("load"),
        "role_regs": ", ".join(f"{role} {loop.registers}/{loop.register_limit}" for role, loop in loops.items()),
        "role_spills": ", ".join(f"{role} {n}" for role, loop in loops.items() if (n := loop.counts["local"])),
        **{f"step_{name}": round(cycles) for name, cycles in dataclasses.asdict(step).items()},
        "step_busiest": round(step.busiest),
    }
