"""``python -m perf.gpu_check.smoke NAME``: one small problem for one kernel, compared with the reference.

On the GPU, or simulated with ``--arch``. Prints a line; exit code 0 only if the result is within tolerance, 3 if the
kernel is not bundled where nothing can compile it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import click

from cute_fa.engine.table import TABLE
from cute_fa.semantics.append_problem import AppendProblem
from cute_fa.semantics.errors import CompilerMissingError
from cute_fa.semantics.problem import AttentionProblem
from cute_fa.semantics.types import Direction, DType, SmArch
from cute_fa.tools.append_trial import AppendResult, run_append_trial
from cute_fa.tools.inputs import InputSpec, make_inputs, output_gradients
from cute_fa.tools.trial import Machine, TrialResult, choose_machine, problem_of_spec, run_backward_trial, run_trial
from perf.gpu_check.walk_trial import run_walk_trial

NOT_BUNDLED = 3


@dataclass(frozen=True)
class Attention:
    """A forward, or a forward and its backward; ``choices``: num_splits, family … of the call."""

    spec: InputSpec
    backward: bool = False
    choices: dict[str, Any] = field(default_factory=dict)

    def __call__(self, machine: Machine) -> TrialResult:
        inputs = make_inputs(self.spec, "peaked", device=machine.device)
        if not self.backward:
            return run_trial(inputs, machine, **self.choices)
        return run_backward_trial(inputs, machine, output_gradients(inputs)[0], **self.choices)

    def described(self, arch: SmArch) -> tuple[AttentionProblem, str | None]:
        """What the table is asked: the problem, the backward's if there is one, and the family."""
        choices = {"direction": Direction.BACKWARD if self.backward else Direction.FORWARD, **self.choices}
        family = choices.pop("family", None)
        return problem_of_spec(self.spec, arch, **choices), family


def _append(machine: Machine) -> AppendResult:
    """New tokens into pages, keys and queries rotated."""
    sizes = {"batch": 3, "tokens_k": 5, "tokens_q": 5, "num_heads": 8, "num_heads_kv": 2, "head_dim": 128}
    rotation = {"query": True, "rotary_dim": 64, "rotary_dtype": "fp32"}
    problem = AppendProblem(machine.arch, DType.BF16, head_dim_v=128, page_size=16, **sizes, **rotation)
    return run_append_trial(problem, machine, capacity=100)


def _append_fp8(machine: Machine) -> AppendResult:
    """The same into pages in fp8."""
    sizes = {"batch": 3, "tokens_k": 5, "num_heads_kv": 2, "head_dim": 128, "head_dim_v": 128, "page_size": 16}
    problem = AppendProblem(machine.arch, DType.BF16, **sizes, rotary_dim=64, dtype_k=DType.E4M3, dtype_v=DType.E5M2)
    return run_append_trial(problem, machine, capacity=100)


# A problem per kernel, small enough to be simulated in seconds: batch, seqlen_q, seqlen_k, heads, heads_kv, head_dim.
_INT8 = {"dtype_k": DType.INT8, "dtype_v": DType.INT8}
# The order is that of value: the first ones tell most.
SMOKE: dict[str, Callable[[Machine], Any]] = {
    "d128 causal": Attention(InputSpec(1, 300, 300, 4, 2, 128, causal=True)),
    "d64": Attention(InputSpec(1, 300, 300, 2, 2, 64)),
    "d256": Attention(InputSpec(1, 150, 200, 2, 1, 256, causal=True)),
    "fp8 d128 causal": Attention(InputSpec(1, 300, 300, 4, 2, 128, dtype=DType.E4M3, causal=True)),
    "fp8 d64": Attention(InputSpec(1, 300, 400, 2, 2, 64, dtype=DType.E5M2)),
    "fp8 d256, pages": Attention(InputSpec(2, 60, 300, 4, 2, 256, dtype=DType.E4M3, causal=True, page_size=64)),
    "backward d128": Attention(InputSpec(1, 150, 150, 2, 1, 128, causal=True), backward=True),
    "backward d64": Attention(InputSpec(1, 200, 300, 2, 2, 64), backward=True),
    "split": Attention(InputSpec(2, 1, 700, 4, 1, 128, page_size=64), choices={"num_splits": 3}),
    "decode": Attention(InputSpec(2, 1, 700, 8, 1, 128, page_size=64), choices={"num_splits": 0}),
    "append": _append,
    "append fp8": _append_fp8,
    "varlen": Attention(InputSpec(3, 200, 200, 2, 1, 128, causal=True, window=(64, 0), varlen_q=True, varlen_k=True)),
    "pages": Attention(InputSpec(2, 60, 300, 4, 2, 128, causal=True, page_size=64)),
    "expanded heads": Attention(InputSpec(1, 150, 150, 4, 2, 64, causal=True, layout="expanded")),
    "largest shared memory": Attention(InputSpec(1, 150, 300, 1, 1, 256, 176, window=(64, 64))),
    "backward d64, deterministic": Attention(
        InputSpec(1, 150, 150, 2, 2, 64, causal=True), backward=True, choices={"deterministic": True}
    ),
    "backward d256": Attention(InputSpec(1, 100, 130, 2, 1, 256, causal=True), backward=True),
    "backward d256, full": Attention(InputSpec(1, 150, 128, 2, 1, 256), backward=True),  # in clusters
    "split d256": Attention(InputSpec(1, 1, 500, 2, 1, 256), choices={"num_splits": 2}),
    "decode d128, tiles of 128 rows": Attention(
        InputSpec(2, 16, 500, 8, 1, 128, causal=True, page_size=16), choices={"num_splits": 0}
    ),
    "decode d128, cache in e4m3": Attention(
        InputSpec(2, 1, 700, 8, 1, 128, page_size=64, dtype_k=DType.E4M3, dtype_v=DType.E4M3), choices={"num_splits": 0}
    ),
    "decode d128, cache in int8 with descales of rows": Attention(
        InputSpec(2, 3, 500, 8, 1, 128, causal=True, page_size=16, row_descales="rows", **_INT8),
        choices={"num_splits": 0},
    ),
    "decode d64, pages of a token": Attention(InputSpec(2, 1, 500, 8, 1, 64, page_size=1), choices={"num_splits": 0}),
    "decode d256": Attention(InputSpec(1, 9, 500, 8, 1, 256, causal=True), choices={"num_splits": 0}),
    "decode d128, batch-invariant": Attention(
        InputSpec(2, 1, 700, 8, 1, 128, causal=True, page_size=64), choices={"seqlen_k_per_split": 256}
    ),
    "prompt d128, batch-invariant": Attention(
        InputSpec(1, 700, 700, 8, 1, 128, causal=True), choices={"seqlen_k_per_split": 256}
    ),
    "fa2 decode d128": Attention(InputSpec(2, 1, 700, 8, 1, 128), choices={"num_splits": 0, "family": "fa2"}),
    "fa2 d128 causal": Attention(InputSpec(1, 150, 150, 2, 1, 128, causal=True), choices={"family": "fa2"}),
    "walk of a range plan": run_walk_trial,
    "ranges d128": Attention(InputSpec(1, 300, 400, 4, 2, 128, ranges=12)),
    "ranges d64, positions": Attention(InputSpec(1, 200, 300, 2, 2, 64, alibi=True, ranges=12, positions=True)),
    "ranges d256": Attention(InputSpec(1, 150, 200, 2, 1, 256, ranges=12)),
    "ranges backward d128": Attention(InputSpec(1, 150, 150, 2, 1, 128, ranges=12), backward=True),
    "ranges backward d64, deterministic": Attention(
        InputSpec(1, 150, 150, 2, 2, 64, ranges=12), backward=True, choices={"deterministic": True}
    ),
    "fa2 ranges d128": Attention(InputSpec(1, 150, 150, 2, 1, 128, ranges=12), choices={"family": "fa2"}),
}


def served(arch: SmArch) -> list[str]:
    """The problems that there are kernels for."""
    return [
        name
        for name, problem in SMOKE.items()
        if not isinstance(problem, Attention) or TABLE.serves(*problem.described(arch))
    ]


@click.command()
@click.argument("name", type=click.Choice(list(SMOKE)))
@click.option("--arch", type=click.Choice([arch.value for arch in SmArch]), help="Simulated, with the race check.")
def main(name: str, arch: str | None) -> None:
    """Run one problem."""
    machine = choose_machine(SmArch(arch) if arch else None, **({"race": True} if arch else {}))
    if machine.simulated and not arch:
        raise click.UsageError("no GPU: --arch simulates one")
    try:
        result = SMOKE[name](machine)
    except CompilerMissingError as error:
        click.echo(f"{name}: {error}")
        sys.exit(NOT_BUNDLED)
    verdict = "within tolerance" if result.ok else f"OUTSIDE TOLERANCE: {result.summary()}"
    time = "" if machine.simulated else f", {result.seconds * 1e6:.1f} µs"
    click.echo(f"{name}: {result.compile_name} on {machine}, {verdict}{time}")
    sys.exit(0 if result.ok else 1)


if __name__ == "__main__":
    main()
