"""The split-KV forward as the dispatch table sees it: what it serves, its configuration, what it is launched with."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from cute_fa.device.tiling import ceil_div
from cute_fa.engine.contract import (
    AttentionKernel,
    AttentionTensors,
    Candidate,
    CommonArguments,
    Memory,
    common_arguments,
)
from cute_fa.semantics.problem import AttentionProblem
from cute_fa.semantics.types import Direction
from fa2_sm80.common.rules import objections
from fa2_sm80.split.config import Fa2SplitConfig, num_splits, split_candidates, split_config


class Parts(NamedTuple):
    """Memory for what the splits leave, and what lies in it, in the order of ``fa2_sm80.split.arguments.Parts``."""

    out: Any
    lse: Any


class Launch(NamedTuple):
    """What a launch takes, in the order of ``fa2_sm80.split.arguments.SplitArguments``."""

    common: CommonArguments
    parts: Parts | None
    seqlen_q: int
    num_splits: int


class Fa2Split(AttentionKernel):
    """Forward with cp.async and mma.sync for few queries, split keys and paged caches, on sm_80 and every arch after
    it: fp16 and bf16, head_dim 8 … 256."""

    family = "fa2"
    direction = Direction.FORWARD

    @classmethod
    def supports(cls, problem: AttentionProblem) -> list[str]:
        def grids() -> dict[str, int]:
            tiles = ceil_div(problem.seqlen_q * problem.gqa_ratio, cls.configure(problem).tile_m)
            ctas = tiles * problem.num_heads_kv * problem.batch * problem.num_splits
            return {"tiles of queries and splits": ctas}

        if problem.num_splits == 0:
            return ["num_splits 0: this kernel splits the keys of every sequence into as many parts"]
        return objections(problem, grids, rows_of_any_head=True)

    @classmethod
    def configure(cls, problem: AttentionProblem) -> Fa2SplitConfig:
        return split_config(problem)

    @classmethod
    def candidates(cls, problem: AttentionProblem) -> list[Candidate]:
        return split_candidates(problem)

    @classmethod
    def num_splits(cls, problem: AttentionProblem, num_sms: int) -> int | None:
        return None if cls.supports(problem) else num_splits(problem, num_sms)

    @classmethod
    def scratch(
        cls, problem: AttentionProblem, config: Fa2SplitConfig, tensors: AttentionTensors, num_sms: int
    ) -> tuple[Memory | None, ...]:
        if problem.num_splits == 1:
            return ()
        rows = tensors.lse.numel()
        return Parts(
            out=Memory((problem.num_splits, rows, problem.head_dim_v), torch.float32),
            lse=Memory((problem.num_splits, rows), torch.float32),
        )

    @classmethod
    def arguments(
        cls, problem: AttentionProblem, config: Fa2SplitConfig, tensors: AttentionTensors, num_sms: int
    ) -> Launch:
        return Launch(
            common=common_arguments(problem, tensors),
            parts=Parts(*tensors.scratch) if tensors.scratch else None,
            seqlen_q=problem.seqlen_q,
            num_splits=problem.num_splits,
        )
