"""What a backward is launched with, and its memory between the kernels. No DSL."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch

from cute_fa.device.tiling import backward_row_bytes, ceil_div, head_group
from cute_fa.engine.contract import (
    AttentionKernel,
    AttentionTensors,
    BackwardTensors,
    CommonArguments,
    Memory,
    common_arguments,
)
from cute_fa.semantics.problem import AttentionProblem
from cute_fa.semantics.types import Direction


class Scratch(NamedTuple):
    """Memory, and what lies in it, in the order of ``cute_fa.device.backward_arguments.Scratch``."""

    stats: Any
    dq: Any
    dsink: Any
    dslopes: Any
    turns: Any


class Launch(NamedTuple):
    """What a launch takes, in the order of ``cute_fa.device.backward_arguments.BackwardArguments``."""

    common: CommonArguments
    dout: torch.Tensor
    dlse: torch.Tensor | None
    dq: torch.Tensor
    dk: torch.Tensor
    dv: torch.Tensor
    dalibi: torch.Tensor | None
    dsink: torch.Tensor | None
    scratch: Scratch
    seqlen_q: int
    seqlen_k: int
    head_group: int | None
    key_walk: torch.Tensor | None
    dq_walk: torch.Tensor | None


class TiledBackward(AttentionKernel):
    """A backward whose kernels share scratch memory.

    In bytes for each query head: 4 · head_dim_padded + 8 for each row of queries (8 where dQ is not summed up there),
    and 4 for each tile of them where tiles of keys take turns; sequences have whole tiles, packed ones total_q //
    tile_m and one each. For each sequence, however short, as for the longest: 4 for each tile of queries with a
    learnable sink, 4 · slope_parts for each tile of keys, or of queries, with the slopes' gradients.

    ``l2_bytes``: of the cache that the order of tiles is planned for, where the longest come first.
    """

    direction = Direction.BACKWARD
    l2_bytes: ClassVar[int]

    @classmethod
    def scratch(cls, problem: AttentionProblem, config, tensors: BackwardTensors, num_sms: int) -> Scratch:
        inputs, heads, batch = tensors.forward, problem.num_heads, problem.batch
        seqlen_q, seqlen_k = _longest(problem, inputs)
        m_blocks, n_blocks = ceil_div(seqlen_q, config.tile_m), ceil_div(seqlen_k, config.tile_n)
        slope_blocks = n_blocks if config.slopes_by_keys else m_blocks
        tiles = inputs.q.shape[0] // config.tile_m + batch if problem.varlen_q else batch * m_blocks

        def memory(wanted: bool, *shape: int, dtype: torch.dtype = torch.float32) -> Memory | None:
            return Memory(shape, dtype) if wanted else None

        return Scratch(
            stats=memory(True, tiles, heads, config.stats_elements),
            dq=memory(config.dq_sums, tiles, heads, config.tile_m * config.head_dim_padded),
            dsink=memory(config.learnable_sink, batch, heads, m_blocks),
            dslopes=memory(config.slopes_gradient, batch, heads, slope_blocks * config.slope_parts),
            turns=memory(config.turns, tiles * heads + 1, dtype=torch.int32),
        )

    @classmethod
    def arguments(cls, problem: AttentionProblem, config, tensors: BackwardTensors, num_sms: int) -> Launch:
        t, inputs = tensors, tensors.forward
        seqlen_q, seqlen_k = _longest(problem, inputs)
        return Launch(
            common=common_arguments(problem, inputs),
            dout=t.dout,
            dlse=t.dlse,
            dq=t.dq,
            dk=t.dk,
            dv=t.dv,
            dalibi=t.dalibi,
            dsink=t.dsink,
            scratch=Scratch(*t.scratch),
            seqlen_q=seqlen_q,
            seqlen_k=seqlen_k,
            head_group=cls.head_group(problem, seqlen_q) if config.longest_first else None,
            key_walk=inputs.extras.key_walk,
            dq_walk=None if config.dq_sums else inputs.extras.dq_walk,
        )

    @classmethod
    def head_group(cls, problem: AttentionProblem, seqlen_q: int) -> int:
        """kv heads whose tiles of keys are handed out together: as many as the cache holds Q, dO and sums of dQ of."""
        size = backward_row_bytes(problem.head_dim, problem.head_dim_v, problem.dtype.bytes) * problem.gqa_ratio
        return head_group(seqlen_q * size, cls.l2_bytes)


def _longest(problem: AttentionProblem, inputs: AttentionTensors) -> tuple[int, int]:
    """Rows of queries and of keys of the longest sequence."""
    return (
        problem.seqlen_q if problem.varlen_q else inputs.q.shape[1],
        problem.seqlen_k if problem.varlen_k else inputs.k.shape[1],
    )
