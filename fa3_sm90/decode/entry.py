"""The Hopper decode as the dispatch table sees it: what it serves, its configuration, what it is launched with."""

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
    common_objections,
)
from cute_fa.semantics.names import dtypes_of_code
from cute_fa.semantics.problem import AttentionProblem
from cute_fa.semantics.types import Direction
from fa3_sm90.decode.config import MOST_TOKENS, Fa3DecodeConfig, decode_candidates, decode_config, line_blocks

_MOST_BLOCKS = 2**31 - 1  # of the line that CTAs cut, and what a walk counts to
_SLOTS = 2  # for parts of tiles that a CTA leaves


class Parts(NamedTuple):
    """Memory for parts of tiles, and what lies in it, in the order of ``cute_fa.device.split_parts.Parts``."""

    out: Any
    lse: Any


class Launch(NamedTuple):
    """What a launch takes, in the order of ``fa3_sm90.decode.arguments.DecodeArguments``."""

    common: CommonArguments
    parts: Parts
    num_ctas: int


class Fa3Decode(AttentionKernel):
    """Forward with TMA and wgmma for up to 128 query tokens, for sm_90a: fp16 and bf16, head_dim 8 … 256, any query
    heads of a kv head in one tile, key blocks cut evenly between the CTAs."""

    family = "fa3"
    direction = Direction.FORWARD

    @classmethod
    def supports(cls, problem: AttentionProblem) -> list[str]:
        reasons = []
        if problem.num_splits:
            reasons.append(
                f"num_splits {problem.num_splits}: this kernel cuts the keys itself, all CTAs' parts alike (0)"
            )
        if problem.is_fp8:
            reasons.append(f"dtype {dtypes_of_code(problem)}: its kernels are of 16 bits")
        reasons += common_objections(problem, "16-byte strides of TMA", splits=True)
        if problem.seqlen_q > MOST_TOKENS:
            reasons.append(f"{problem.seqlen_q} query tokens: up to {MOST_TOKENS}, more are a prompt's kernel's")
        if problem.ranges:
            reasons.append("a range plan: its masks are of whole tiles of queries, this kernel's tiles hold any rows")
        if problem.page_size is not None:
            if problem.page_size < 8:
                reasons.append(f"page_size {problem.page_size}: TMA brings 8 rows of a page or more")
            if problem.cache_leftpad:
                reasons.append(f"cache_leftpad with page_size {problem.page_size}: blocks of keys start where pages do")
        if not reasons and (blocks := line_blocks(problem)) > _MOST_BLOCKS:
            reasons.append(f"{blocks} key blocks of all tiles: at most {_MOST_BLOCKS}")
        return reasons

    @classmethod
    def configure(cls, problem: AttentionProblem) -> Fa3DecodeConfig:
        return decode_config(problem)

    @classmethod
    def candidates(cls, problem: AttentionProblem) -> list[Candidate]:
        return decode_candidates(problem)

    @classmethod
    def num_splits(cls, problem: AttentionProblem, num_sms: int) -> int | None:
        return 0 if problem.seqlen_q <= MOST_TOKENS else None

    @classmethod
    def scratch(
        cls, problem: AttentionProblem, config: Fa3DecodeConfig, tensors: AttentionTensors, num_sms: int
    ) -> tuple[Memory | None, ...]:
        slots = _SLOTS * cls.num_ctas(problem, config, num_sms), config.tile_m
        return Parts(Memory((*slots, problem.head_dim_v), torch.float32), Memory(slots, torch.float32))

    @classmethod
    def arguments(
        cls, problem: AttentionProblem, config: Fa3DecodeConfig, tensors: AttentionTensors, num_sms: int
    ) -> Launch:
        num_ctas = cls.num_ctas(problem, config, num_sms)
        return Launch(common_arguments(problem, tensors), Parts(*tensors.scratch), num_ctas)

    @classmethod
    def num_ctas(cls, problem: AttentionProblem, config: Fa3DecodeConfig, num_sms: int) -> int:
        """One an SM, or as many as there may be work for."""
        return max(1, min(num_sms, ceil_div(line_blocks(problem), config.least_blocks)))
