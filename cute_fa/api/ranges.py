"""Attention under a range plan: ``cute_fa.range_attention``."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch.compiler import is_dynamo_compiling

from cute_fa.api.attention import Result, prepare
from cute_fa.api.merge import merge_states
from cute_fa.api.range_plan import RangePlan
from cute_fa.api.values import check_tensor, flag
from cute_fa.engine import attention as engine
from cute_fa.engine.range_plans import WalkShapes, walk_shapes
from cute_fa.engine.worlds import target_of
from cute_fa.semantics.errors import ArgumentError, DTypeError, ShapeError, UnsupportedArgumentError
from cute_fa.semantics.problem import AttentionProblem, default_scale
from cute_fa.semantics.tensors import DTYPES, check_devices, check_dims, check_loadable, check_vector, positions_held
from cute_fa.semantics.types import Direction, SmArch

# MagiAttention's hints, which change nothing that is computed, and what it alone computes, by what asks for nothing.
_MAGI_HINTS = (
    *(
        "sm_margin",
        "disable_fwd_atomic_reduction",
        "auto_range_merge",
        "ref_block_size",
        "max_seqlen_q",
        "max_seqlen_k",
    ),
    *("swap_ab", "pack_gqa", "sparse_load", "swap_bwd_qk_loop", "profile_mode"),
)
_MAGI_DEFAULTS = {"sink_layout": "sh", "return_max_logits": False}


def range_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_ranges: torch.Tensor | None = None,
    k_ranges: torch.Tensor | None = None,
    attn_type_map: torch.Tensor | None = None,
    *,
    segment_offsets: torch.Tensor | None = None,
    plan: RangePlan | None = None,
    softmax_scale: float | None = None,
    softcap: float | None = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    q_positions: torch.Tensor | None = None,
    k_positions: torch.Tensor | None = None,
    learnable_sink: torch.Tensor | None = None,
    sink: torch.Tensor | None = None,
    deterministic: bool = False,
    return_lse: bool = False,
    family: str | None = None,
    **magi: Any,
) -> Result:
    """Attention of packed queries over the keys that a range plan names: no dense mask, and work in proportion to what
    is visible.

    q: (total_q, heads, head_dim); k: (total_k, heads_kv, head_dim); v: (total_k, heads_kv, head_dim_v); fp16 or bf16.
    q_ranges, k_ranges: int32 (n, 2) on the device: query i in [q_start, q_stop) sees key j in [k_start, k_stop), as
        attn_type_map int32 (n) says: 0 all (the default), 1 if j − i ≤ k_stop − q_stop (causal, bottom right), 2 if
        j − i ≥ k_start − q_start (inverse causal, top left), 3 if both. Ranges may repeat and overlap: a pair that
        several name counts once.
    segment_offsets: int32 (m + 1): k_ranges [segment_offsets[i], segment_offsets[i + 1]) belong to q_ranges[i].
    plan: a ``RangePlan`` in the place of the four: made once for all layers, where the host knows the ranges with the
        fastest path for them. Without it one is made in each call.
    alibi_slopes: fp32 (heads): −slope·|q_positions[i] − k_positions[j]| is added; positions int32 (total_q), (total_k),
        by default the rows i and j.
    learnable_sink: (heads); sink: MagiAttention's, (logits, heads) fp32, in its place.
    softmax_scale, softcap, deterministic, return_lse, family: as for ``flash_attn_func``.

    Under CUTE_FA_BATCH_INVARIANT=1 a plan of path "simple" or "packed" is computed in that mode, others raise.
    MagiAttention's other arguments are accepted. Returns out (total_q, heads, head_dim_v), or (out, lse) with lse fp32
    (heads, total_q). A query in no range has O = 0 and LSE −inf, or the learnable sink. Values of ranges are checked
    with ``CUTE_FA_CHECK=1`` and when simulating; otherwise what leaves the tensors is cut off. Raises a subclass of
    ``cute_fa.errors.CuteFaError`` for whatever breaks a rule, before anything runs.
    """
    _check_magi(magi)
    return_lse = flag("return_lse", return_lse)
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        check_tensor(name, tensor)
        check_dims(name, tensor, 3, f"(total_{'q' if name == 'q' else 'k'}, heads, head_dim)")
    if not is_dynamo_compiling():
        _check_packed(q, k, v)
    if plan is None:
        plan = _new_plan(q, k, q_ranges, k_ranges, attn_type_map, segment_offsets)
    else:
        ranges = {"q_ranges": q_ranges, "k_ranges": k_ranges, "attn_type_map": attn_type_map}
        _check_plan(plan, q, k, ranges | {"segment_offsets": segment_offsets})
    positions = _Positions(q_positions, k_positions)
    positions.check(alibi_slopes, q.shape[0], k.shape[0])
    score = {"softmax_scale": softmax_scale, "softcap": softcap, "alibi_slopes": alibi_slopes}
    score["learnable_sink"] = _one_sink(learnable_sink, sink, q.shape[1])
    choices = {"deterministic": deterministic, "family": family}
    call = _RangeCall(plan, q, k, v, positions, score, choices)
    out, lse = _PATHS[call.path()](call)
    return (out, lse) if return_lse else out


def _check_packed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """Raise the errors that name shapes and strides, before there are a batch or pages that no caller gave, and that of
    a transform, inside of which no plan can be made."""
    engine.check_derivatives((q, k, v))
    if q.shape[1] == 0:
        raise ShapeError(f"q {tuple(q.shape)}: num_heads=0: at least 1 is needed")
    if v.shape[:-1] != k.shape[:-1]:
        raise ShapeError(f"v {tuple(v.shape)} and k {tuple(k.shape)}: all sizes but the last must be equal")
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        check_loadable(name, tensor)


class _Positions(NamedTuple):
    """Between which ALiBi's distances are, None for the rows."""

    q: torch.Tensor | None
    k: torch.Tensor | None

    def check(self, alibi_slopes: torch.Tensor | None, total_q: int, total_k: int) -> None:
        """Raise the error of positions that do not fit."""
        for name, other, tensor, rows in (("q", "k", self.q, total_q), ("k", "q", self.k, total_k)):
            if tensor is None:
                continue
            check_tensor(f"{name}_positions", tensor)
            if getattr(self, other) is None:
                raise ArgumentError(f"{name}_positions without {other}_positions: distances are between the two")
            if alibi_slopes is None:
                raise ArgumentError(f"{name}_positions without alibi_slopes: nothing depends on positions")
            check_vector(f"{name}_positions", tensor, torch.int32, (rows,), of=f"{rows} rows of {name}")

    def padded(self) -> dict[str, torch.Tensor | None]:
        """With whole tiles of rows, as kernels read them."""
        named = {"q_positions": self.q, "k_positions": self.k}
        return {name: None if tensor is None else _padded(tensor) for name, tensor in named.items()}


def _padded(positions: torch.Tensor) -> torch.Tensor:
    rows = positions.shape[0]
    return torch.nn.functional.pad(positions, (0, positions_held(rows) - rows))


def _check_magi(given: dict[str, Any]) -> None:
    """Raise the error of a MagiAttention argument that asks for what is not computed, or of nobody's."""
    for name, value in given.items():
        if name in _MAGI_DEFAULTS:
            if value != _MAGI_DEFAULTS[name]:
                raise UnsupportedArgumentError(name, value)
        elif name not in _MAGI_HINTS:
            raise ArgumentError(f"{name}: no such argument")


def _one_sink(learnable_sink: torch.Tensor | None, sink: torch.Tensor | None, heads: int) -> torch.Tensor | None:
    """Several logits of a head are one: the logarithm of the sum of their exponentials."""
    if sink is None:
        return learnable_sink
    if learnable_sink is not None:
        raise ArgumentError("sink and learnable_sink: two names of one argument, give one")
    check_tensor("sink", sink)
    check_dims("sink", sink, 2, "(logits, heads)")
    if sink.dtype != torch.float32:
        raise DTypeError("sink", sink.dtype, "float32 is needed")
    if sink.shape[1] != heads:
        raise ShapeError(f"sink {tuple(sink.shape)}: (logits, {heads}) is needed for the {heads} heads of q")
    return sink.logsumexp(0)


def _new_plan(
    q: torch.Tensor, k: torch.Tensor, q_ranges: Any, k_ranges: Any, attn_type_map: Any, segment_offsets: Any
) -> RangePlan:
    given = {"q_ranges": q_ranges, "k_ranges": k_ranges, "attn_type_map": attn_type_map}
    given |= {"segment_offsets": segment_offsets}
    for name, tensor in given.items():
        if tensor is not None or name in ("q_ranges", "k_ranges"):
            check_tensor(name, tensor)
    return RangePlan.build(**given, total_q=q.shape[0], total_k=k.shape[0])


def _check_plan(plan: Any, q: torch.Tensor, k: torch.Tensor, ranges: dict[str, Any]) -> None:
    """Raise the error of a plan that is none, is of other tensors, or stands beside ranges."""
    if not isinstance(plan, RangePlan):
        raise ArgumentError(f"plan is {type(plan).__name__}: a RangePlan is needed, RangePlan.build makes one")
    for name, tensor in ranges.items():
        if tensor is not None:
            raise ArgumentError(f"{name} with plan: the plan has its ranges, give one of the two")
    for name, tensor, total in (("q", q, plan.total_q), ("k", k, plan.total_k)):
        if tensor.shape[0] != total:
            raise ShapeError(f"{name} {tuple(tensor.shape)}: the plan is of {total} rows")
    check_devices({"q": q, "plan": plan.q_ranges}, "q")


class _RangeCall(NamedTuple):
    """One call; ``score``: options of its formula that attention without a plan has, too, ``choices``: how it is
    computed."""

    plan: RangePlan
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    positions: _Positions
    score: dict[str, Any]
    choices: dict[str, Any]

    def trains(self) -> bool:
        """Whether gradients will be asked for."""
        tensors = (self.q, self.k, self.v, self.score["alibi_slopes"], self.score["learnable_sink"])
        return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)

    def path(self) -> str:
        """The plan's, but for what its choice cannot do: native then, or an error where it was asked for."""
        plan, objection = self.plan, None
        if plan.path in ("simple", "packed") and self.score["alibi_slopes"] is not None:
            objection = "alibi_slopes: distances would be within packed sequences"
        if plan.path == "packed" and self.trains():
            objection = "a gradient: pages have none"
        if objection is None:
            return plan.path
        if plan.forced:
            raise ArgumentError(f"path={plan.path!r} with {objection}")
        return "native"


State = tuple[torch.Tensor, torch.Tensor]


def _simple(given: _RangeCall) -> State:
    call = prepare(given.q, given.k, given.v, **given.score, **given.choices)
    return engine.attention(call.changed(**given.plan.sequences))


def _packed(given: _RangeCall) -> State:
    page_size, arguments = given.plan.pages
    pages = given.plan.total_k // page_size
    k, v = (tensor[: pages * page_size].unflatten(0, (pages, page_size)) for tensor in (given.k, given.v))
    return engine.attention(prepare(given.q, k, v, **given.score, **given.choices).changed(**arguments))


def _merge(given: _RangeCall) -> State:
    outs, lses = [], []
    for part in given.plan.parts:
        out, lse = _native(given._replace(plan=part))
        outs.append(out)
        lses.append(lse)
        given = given._replace(score=given.score | {"learnable_sink": None})  # which counts once
    return merge_states(outs, lses)


def _native(given: _RangeCall) -> State:
    plan, q, k, v, positions, score, choices = given
    dtype = engine.dtype_computed(q)
    if dtype not in DTYPES:
        raise DTypeError("q", dtype, "float16 or bfloat16 is needed")
    call = prepare(q[None], k[None], v[None], **score, **choices)
    if call.options.seqlen_k_per_split:
        rule = "sums under a plan depend on its tiles; plans of path simple or packed alone have batch-invariant mode"
        raise ArgumentError(f"CUTE_FA_BATCH_INVARIANT=1 with a range plan on path native: {rule}")
    if given.trains() and torch.are_deterministic_algorithms_enabled():
        call = call.changed(deterministic=True)  # as the walks are, whatever is asked for until the backward
    slopes = score["alibi_slopes"]
    shapes = _shapes(
        q.device,
        dtype,
        # ints that the graph is guarded by, where torch.compile traces with sizes that vary
        len(range(q.shape[2])),
        len(range(v.shape[2])),
        slopes is not None,
        positions.q is not None,
        score["learnable_sink"] is not None,
        1.0 if call.options.softcap else 0.0,
        given.trains(),
        call.options.deterministic,
        slopes is not None and slopes.requires_grad,
        call.options.family,
    )
    walks = {"query_walk": plan.walk("queries", shapes.queries)}
    if shapes.keys is not None:
        walks["key_walk"] = plan.walk("keys", shapes.keys)
    if shapes.dq is not None:
        walks["dq_walk"] = plan.walk("queries", shapes.dq)
    out, lse = engine.attention(call.changed(**walks, **positions.padded()))
    return out[0], lse[0]


_PATHS = {"simple": _simple, "packed": _packed, "native": _native, "merge": _merge}


@torch.compiler.assume_constant_result
def _shapes(device: torch.device, dtype: torch.dtype, *description: Any) -> WalkShapes:
    """The tiles of the kernels that such a call will run, also while torch.compile traces. Under a range plan they do
    not follow from lengths or numbers of heads."""
    return _shapes_on(target_of(device).arch, dtype, *description)


@lru_cache(maxsize=4096)
def _shapes_on(
    arch: SmArch,
    dtype: torch.dtype,
    head_dim: int,
    head_dim_v: int,
    alibi: bool,
    positioned: bool,
    learnable_sink: bool,
    softcap: float,
    trains: bool,
    deterministic: bool,
    slopes_gradient: bool,
    family: str | None,
) -> WalkShapes:
    described: dict[str, Any] = {
        "arch": arch,
        "dtype": DTYPES[dtype],
        "batch": 1,
        "seqlen_q": 1,
        "seqlen_k": 1,
        "num_heads": 1,
        "num_heads_kv": 1,
        "head_dim": head_dim,
        "head_dim_v": head_dim_v,
        "softmax_scale": default_scale(head_dim),
        "softcap": softcap,
        "alibi": alibi,
        "q_positions": positioned,
        "k_positions": positioned,
        "learnable_sink": learnable_sink,
        "ranges": True,
    }
    forward, backward = AttentionProblem(**described), None
    if trains:
        of_backward = {"direction": Direction.BACKWARD, "deterministic": deterministic}
        backward = AttentionProblem(**described | of_backward, slopes_gradient=slopes_gradient)
    return walk_shapes(forward, backward, family)
