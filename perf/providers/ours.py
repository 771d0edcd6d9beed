"""This project's kernels."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path

import cute_fa
from cute_fa import RangePlan, range_attention
from cute_fa.tools.inputs import Inputs
from perf.providers.base import Attention, Provider


class CuteFa(Provider):
    """Whatever the dispatch table has for the problem, with keys split as the kernel chooses."""

    name = "cute-fa"
    takes_ranges = takes_codes = True

    def version(self) -> str:
        """With the commit, where this is a checkout."""
        command = ["git", "describe", "--always", "--dirty"]
        try:
            done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return cute_fa.__version__
        return f"{cute_fa.__version__}+{done.stdout.strip()}"

    def prepare(self, inputs: Inputs) -> Attention:
        if inputs.q_ranges is not None:
            return _under_plan(inputs)
        return Attention(lambda q, k, v: replace(inputs, q=q, k=k, v=v).run(num_splits=0))


def _under_plan(inputs: Inputs) -> Attention:
    """One plan for all calls, of ranges that the device alone knows."""
    totals = {"total_q": inputs.q.shape[1], "total_k": inputs.k.shape[1]}

    def new() -> RangePlan:
        return RangePlan.build(inputs.q_ranges, inputs.k_ranges, inputs.attn_type_map, **totals)

    plan = new()

    def build() -> None:
        built = new()
        for rows, shape in plan.walks_made:
            built.walk(rows, shape)

    return Attention(lambda q, k, v: range_attention(q[0], k[0], v[0], plan=plan)[None], build=build)
