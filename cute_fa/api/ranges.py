"""Attention under a range plan: ``cute_fa.range_attention``."""

from __future__ import annotations

import dataclasses

import torch

from cute_fa.api.attention import prepare
from cute_fa.api.range_plan import RangePlan
from cute_fa.engine import attention as engine
from cute_fa.engine.range_plans import WalkShape, walk_shapes
from cute_fa.engine.worlds import target_of
from cute_fa.semantics.tensors import positions_held, problem_of
from cute_fa.semantics.types import Direction


def range_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_ranges: torch.Tensor | None = None,
    k_ranges: torch.Tensor | None = None,
    attn_type_map: torch.Tensor | None = None,
    *,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    q_positions: torch.Tensor | None = None,
    k_positions: torch.Tensor | None = None,
    learnable_sink: torch.Tensor | None = None,
    plan: RangePlan | None = None,
    deterministic: bool = False,
    return_lse: bool = False,
    family: str | None = None,
):
    """Attention of packed queries over the keys that a range plan names."""
    if plan is None:
        plan = RangePlan.build(q_ranges, k_ranges, attn_type_map, total_q=q.shape[0], total_k=k.shape[0])
    call = prepare(
        q[None],
        k[None],
        v[None],
        softmax_scale=softmax_scale,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        learnable_sink=learnable_sink,
        deterministic=deterministic,
        family=family,
    )
    positions = {"q_positions": q_positions, "k_positions": k_positions}
    trains = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in call.tensors())
    arch = target_of(q.device).arch
    given = {"ranges": True} | {name: tensor is not None for name, tensor in positions.items()}
    forward = dataclasses.replace(problem_of(arch, call), **given)
    backward = None
    if trains:
        deterministic = deterministic or torch.are_deterministic_algorithms_enabled()
        backward = dataclasses.replace(forward, direction=Direction.BACKWARD, deterministic=deterministic)
    shapes = walk_shapes(forward, backward, family)
    walks = {"query_walk": plan.walk("queries", WalkShape(*shapes.queries))}
    if shapes.keys is not None:
        walks["key_walk"] = plan.walk("keys", WalkShape(*shapes.keys))
    if shapes.dq is not None:
        walks["dq_walk"] = plan.walk("queries", WalkShape(*shapes.dq))
    padded = {name: None if p is None else _padded(p) for name, p in positions.items()}
    out, lse = engine.attention(call.changed(**walks, **padded))
    return (out[0], lse[0]) if return_lse else out[0]


def _padded(positions: torch.Tensor) -> torch.Tensor:
    """Positions with whole tiles of rows, whatever stands behind the last one."""
    return torch.nn.functional.pad(positions, (0, positions_held(positions.shape[0]) - positions.shape[0]))
