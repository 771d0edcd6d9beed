"""What the main loops of our kernels may cost: ``budgets.toml``, which the gate of ``python -m perf static`` holds them
to, so that a change that makes one longer is seen where it is made."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path

from cute_fa.engine import flavour
from cute_fa.semantics.types import Direction, DType, SmArch
from perf.flavours import FLAVOURS
from perf.sass import KernelReport
from perf.static import SEQLEN, StaticKey

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FILE = Path(__file__).with_name("budgets.toml")


@dataclass(frozen=True)
class Budget:
    """Most non-tensor instructions per thread and score element of a kernel's main loop: ``per_score`` of what every
    iteration runs, ``cond_per_score`` of its conditional blocks. Where other warps than the softmax's issue the tensor
    work, that loop is theirs; ``net_per_score`` is then ``per_score`` without emulated exponentials, and
    ``pipe_per_score`` the cycles of the busiest of MUFU, FMA pipe and issue."""

    key: StaticKey
    per_score: float
    cond_per_score: float
    net_per_score: float = math.inf
    pipe_per_score: float = math.inf

    def breaches(self, report: KernelReport) -> list[str]:
        """What the report breaks, in words; empty if nothing. Spills in the main loop, or in that of a role, and
        serialised wgmma always do."""
        loop, found = report.score_loop, []
        for role, own in report.role_loops.items():
            if own.counts["local"]:
                found.append(f"{own.counts['local']} spilled accesses in the {role} loop")
        if report.wgmma_serialised:
            found.append("every wgmma is waited for before the next")
        for name in ("per_score", "cond_per_score", "net_per_score", "pipe_per_score"):
            measured, allowed = getattr(loop, name), getattr(self, name)
            if measured > allowed:
                found.append(f"{name} {measured:g}, budget {allowed:g}")
        return found


def load(path: Path = FILE, of: str | None = None) -> list[Budget]:
    """The budgets of a file, in its order: a table for each arch and direction, a line for each head dim and mask.
    ``of``: the flavour of the DSL that compiles, by default the active one. A line's figures are those of all
    flavours, but where it has others under the flavour's name."""
    of = of or flavour.active()
    tables = tomllib.loads(path.read_text())
    return [
        Budget(_key(SmArch(arch), Direction(direction), shape), **_figures(line, of))
        for arch, directions in tables.items()
        for direction, shapes in directions.items()
        for shape, line in shapes.items()
    ]


def _figures(line: dict, of: str | None) -> dict[str, float]:
    return {name: value for name, value in line.items() if name not in FLAVOURS} | line.get(of, {})


def _key(arch: SmArch, direction: Direction, shape: str) -> StaticKey:
    head_dims, mask, *rest = shape.split()
    head_dim, *head_dim_v = map(int, head_dims.removeprefix("d").split(","))
    named = {word.isdecimal(): word for word in rest}
    dtype, seqlen = DType(named.get(False, "bf16")), int(named.get(True, SEQLEN))
    key = StaticKey(arch, head_dim, mask == "causal", direction, dtype, *head_dim_v, seqlen=seqlen)
    if key.shape != shape:
        raise ValueError(f"budget of {shape!r}: a head dim and a mask as in {key.shape!r} are needed")
    return key
