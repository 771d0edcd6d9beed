"""``python -m perf.gpu_check.sweep --out FILE.csv``: a short sweep in one process, ours beside the two peers that a
machine with nothing but torch has. Rows are written problem by problem; ``--pose`` walks our calls without a GPU.
"""

from __future__ import annotations

import sys
from pathlib import Path

import click

from cute_fa.engine.table import TABLE
from cute_fa.semantics.errors import CompilerMissingError
from cute_fa.semantics.types import Direction, DType, SmArch
from cute_fa.tools.trial import problem_of_spec
from perf.device import CudaDevice
from perf.providers import PROVIDERS, CuteFa
from perf.results import ResultFile
from perf.sweep import NO_REFERENCE, Sweep
from perf.timing import Effort
from perf.workload import Workload

PEERS = ("cute-fa", "FA2", "cuDNN")
_BACKWARD = {"direction": Direction.BACKWARD, "causal": True}
_GQA = {"heads": 32, "heads_kv": 8}
# In an order of value; 16384 tokens, bf16, 16 heads of 128 unless said otherwise.
_FP8 = {"dtype": DType.E4M3}
WORKLOADS = (
    Workload(seqlen=8192, causal=True),
    Workload(seqlen=8192),
    Workload(seqlen=8192, **_BACKWARD),
    Workload(seqlen=8192, **_FP8),
    Workload(seqlen=8192, causal=True, **_FP8),
    Workload(seqlen=8192, tokens=131072, decode=True, **_GQA),
    Workload(seqlen=8192, tokens=131072, decode=True, query_tokens=8, **_GQA),
    Workload(seqlen=8192, tokens=131072, decode=True, dtype_kv=DType.E4M3, **_GQA),
    Workload(seqlen=8192, causal=True, head_dim=64, head_dim_v=64),
    Workload(seqlen=8192, causal=True, head_dim=256, head_dim_v=256),
    Workload(seqlen=8192, head_dim=256, head_dim_v=256, **_FP8),
    Workload(seqlen=2048, causal=True),
    Workload(seqlen=2048, **_BACKWARD),
    Workload(seqlen=8192, head_dim=64, head_dim_v=64),
    Workload(seqlen=8192, head_dim=64, head_dim_v=64, **_BACKWARD),
    Workload(seqlen=4096, causal=True, lengths="skewed", **_GQA),
    Workload(seqlen=8192, tokens=131072, decode=True, page_size=64, **_GQA),
    Workload(seqlen=16384, causal=True, window=1024, **_GQA),
    Workload(seqlen=8192, head_dim=256, head_dim_v=256),
    Workload(seqlen=512, causal=True),
    Workload(seqlen=512, causal=True, head_dim=64, head_dim_v=64),
    Workload(seqlen=8192, tokens=8192, plan="documents"),
    Workload(seqlen=8192, tokens=8192, plan="random-1000"),
    Workload(Direction.BACKWARD, seqlen=8192, tokens=8192, plan="streaming-llm"),
)


def workloads(arch: SmArch) -> list[Workload]:
    """Those that there are kernels for."""
    return [
        workload
        for workload in WORKLOADS
        if TABLE.serves(problem_of_spec(workload.spec(), arch, direction=workload.direction))
    ]


@click.command()
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), required=True)
@click.option("--budget", type=float, default=30.0, show_default=True, help="Milliseconds timed for each provider.")
@click.option("--pose", type=click.Choice([arch.value for arch in SmArch]))
def main(out: Path, budget: float, pose: str | None) -> None:
    """Time the problems; exits with 1 if our kernels disagree with the reference anywhere, or raise."""
    if pose:
        from perf.gpu_check.dry_run import launch_once

        for workload in workloads(SmArch(pose)):
            launch_once(workload, pose)
            click.echo(f"{workload}: launched")
        return
    providers = {name: PROVIDERS[name] for name in PEERS}
    failed, device = False, CudaDevice()
    sweep = Sweep(device, providers, ResultFile(out), Effort(budget_ms=budget))
    for workload, rows in sweep.run(workloads(device.arch)):
        told = [f"{row['provider']} " + (_figures(row) if row["status"] == "ok" else _reason(row)) for row in rows]
        click.echo(f"{workload}: {', '.join(told) or 'already there'}")
        failed = failed or any(row["provider"] == CuteFa.name and _failed(row) for row in rows)
    sys.exit(failed)


def _failed(row: dict) -> bool:
    """Not where the kernel is not bundled, or the reference does not fit into the GPU's memory."""
    excused = CompilerMissingError.__name__, NO_REFERENCE
    return row["status"] == "wrong" or (row["status"] == "skipped" and not row["reason"].startswith(excused))


def _reason(row: dict) -> str:
    return f"{row['status']} ({row['reason']})"


def _figures(row: dict) -> str:
    return f"{row['ms_p50']:.4g} ms {row['tflops']:.0f} TFLOP/s {row['gbps']:.0f} GB/s"


if __name__ == "__main__":
    main()
