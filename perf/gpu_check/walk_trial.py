"""One walk of a range plan, made as a kernel for attention would have it and held against the plan's dense mask."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch

from cute_fa import RangePlan
from cute_fa.engine.compiler import compiled
from cute_fa.engine.table import TABLE
from cute_fa.semantics.walk_layout import HEADER, TABLE_WORDS, Header, mask_words, table_start, tiles_of
from cute_fa.semantics.walk_problem import WalkProblem
from cute_fa.tools.inputs import InputSpec, draw_ranges
from cute_fa.tools.trial import Machine

_SPEC = InputSpec(1, 1000, 900, ranges=200)
_TILE = (128, 64)


@dataclass(frozen=True)
class WalkResult:
    """``wrong``: pairs that the walk hides or shows and the plan does not."""

    compile_name: str
    wrong: int
    seconds: float

    @property
    def ok(self) -> bool:
        return self.wrong == 0

    def summary(self) -> dict[str, Any]:
        return {"ok": self.ok, "compile_name": self.compile_name, "wrong": self.wrong, "seconds": self.seconds}


def run_walk_trial(machine: Machine) -> WalkResult:
    """Make it on the machine."""
    ranges = [tensor.to(machine.device) for tensor in draw_ranges(_SPEC, seed=0)]
    problem = WalkProblem(machine.arch, *_TILE, _SPEC.seqlen_q, _SPEC.seqlen_k)
    config = TABLE.lookup(problem).configure(problem)

    def run() -> tuple[RangePlan, torch.Tensor]:
        plan = RangePlan.build(*ranges, total_q=_SPEC.seqlen_q, total_k=_SPEC.seqlen_k)
        return plan, plan.walk("queries", _TILE).cpu()

    if machine.simulated:
        with machine.simulate():
            plan, walk = run()
            start = time.perf_counter()
            plan, walk = run()
            seconds = time.perf_counter() - start
    else:
        compiled(config)
        run()
        start = time.perf_counter()
        plan, walk = run()
        seconds = time.perf_counter() - start
    return WalkResult(config.compile_name, int((seen_by(walk) != plan.mask().cpu()).sum()), seconds)


def seen_by(walk: torch.Tensor) -> torch.Tensor:
    """bool (seqlen_q, seqlen_k): what a walk says is visible; a tile that is not in the order shows nothing."""
    rows, columns = _TILE
    tiles, blocks = tiles_of(_SPEC.seqlen_q, rows), tiles_of(_SPEC.seqlen_k, columns)
    words = mask_words(columns)
    table = walk[table_start(tiles) :][: TABLE_WORDS * tiles].view(tiles, TABLE_WORDS).tolist()
    masks = walk[walk[Header.MASKS] :].view(-1, rows, words)
    bits = (masks[..., None] >> torch.arange(32) & 1).bool().flatten(-2)[..., :columns]
    seen = torch.zeros(tiles, rows, blocks, columns, dtype=torch.bool)
    for tile in walk[HEADER:][: int(walk[Header.FILLED])].tolist():
        entry, masked, total, mask = table[tile]
        for i, block in enumerate(walk[entry : entry + total].tolist()):
            seen[tile, :, block] = bits[mask + i] if i < masked else True
    return seen.view(tiles * rows, blocks * columns)[: _SPEC.seqlen_q, : _SPEC.seqlen_k]
