"""Running a problem and comparing what comes out with the reference in fp64."""

from __future__ import annotations

import itertools
import math
import traceback
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import cute_fa
from cute_fa.api.requests import CumulativeSeqlens
from cute_fa.semantics import reference
from cute_fa.semantics.problem import normalize_window
from cute_fa.semantics.tensors import TORCH_DTYPES
from cute_fa.semantics.types import DType, KvLayout, MaskKind, PersistentMode, PositionBias
from cute_fa.tools.inputs import Inputs, lay_out, make_inputs, output_gradients
from tests.testing.caches import (
    Append,
    CodedRows,
    Rotary,
    assert_rotated,
    coded_rows,
    places,
    rotated_queries,
    take_last,
)
from tests.testing.fuzz.problem import Problem
from tests.testing.simulated import unwritten_is_nan

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

EXACT = torch.float64
WRONG = "wrong numbers"
_DESCALES = ("q_descale", "k_descale", "v_descale")
_ROOT = Path(__file__).parents[3]


@dataclass(frozen=True)
class Failure:
    """``kind``: WRONG, or the class of what was raised."""

    kind: str
    message: str


def failure_of(problem: Problem) -> Failure | None:
    """Run the problem; None if everything is right."""
    try:
        wrong = wrong_numbers(problem)
    except Exception as error:
        return Failure(type(error).__name__, f"{error}\n{_origin(error)}")
    return Failure(WRONG, "\n".join(wrong)) if wrong else None


def wrong_numbers(problem: Problem) -> list[str]:
    """Run the problem; what is wrong with the results, in words. Raises whatever the call raises."""
    return _RUN[problem.call](problem)


def _origin(error: Exception) -> str:
    """Where it was raised, and where in the project that was called."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames[1:] if Path(frame.filename).is_relative_to(_ROOT)]
    places = dict.fromkeys(f"{Path(frame.filename).name}:{frame.lineno}" for frame in [*ours[-2:], *frames[-1:]])
    return "in " + ", ".join(places)


@contextmanager
def _simulated(problem: Problem) -> Iterator[None]:
    """The machine. What a call leaves unwritten is NaN, except where that setting of torch would ask for other kernels:
    it makes every backward that torch.autograd runs deterministic."""
    chosen = problem.backward and not problem.deterministic
    with problem.machine.simulate(), nullcontext() if chosen else unwritten_is_nan():
        yield


def _compared(comparison: reference.Comparison) -> list[str]:
    errors = {"out": comparison[:2], "lse": comparison[2:]}
    return _beyond({name: reference.Error(*error) for name, error in errors.items()})


def _beyond(errors: dict[str, reference.Error]) -> list[str]:
    """What is not within its tolerance, in words."""
    return [f"{name}: error {e.error:.3g}, allowed {e.allowed:.3g}" for name, e in errors.items() if not e.ok]


def _inputs(problem: Problem) -> Inputs:
    given = make_inputs(problem.spec, problem.inputs, problem.seed)
    if problem.tail:
        packed = {"q": problem.spec.varlen_q, "k": problem.spec.varlen_k, "v": problem.spec.varlen_k}
        packed["tree_mask"] = problem.spec.varlen_q and problem.spec.tree
        longer = {
            name: _with_tail(getattr(given, name), problem.tail) for name, is_packed in packed.items() if is_packed
        }
        given = replace(given, **longer)
    if problem.joined:
        k, v = torch.stack((given.k, given.v), -3).unbind(-3)
        given = replace(given, k=k, v=v)
    return given


def _with_tail(tensor: torch.Tensor, rows: int) -> torch.Tensor:
    unused = math.nan if tensor.is_floating_point() else -1
    return torch.cat([tensor, tensor.new_full((rows, *tensor.shape[1:]), unused)])


def _expected(given: Inputs) -> reference.Expected:
    return reference.expected(given.q, given.k, given.v, **given.options(), exact=EXACT)


def _choices(problem: Problem) -> dict[str, Any]:
    """What says how a function computes."""
    names = ("family", "num_splits", "pack_gqa", "promote_every")
    if problem.seqlen_k_per_split:
        names += ("seqlen_k_per_split",)
    return {name: getattr(problem, name) for name in names}


def _into(problem: Problem, given: Inputs) -> torch.Tensor | None:
    """A tensor for the result, with gaps between its rows where q has any."""
    if not problem.into:
        return None
    shape = (*given.q.shape[:-1], problem.spec.head_dim_v)
    dtype = given.q.dtype
    if dtype.itemsize == 1:
        dtype = (torch.float16, torch.bfloat16)[problem.seed % 2]
    return lay_out(torch.full(shape, math.nan, dtype=dtype), problem.spec.layout, math.nan)


# ---- forward and backward by the functions ---------------------------------------------------------------------------


def _function(problem: Problem) -> list[str]:
    given = _inputs(problem)
    out = _into(problem, given)

    def call(called: Inputs):
        arguments = called.arguments() | _choices(problem)
        arguments |= {"persistent": problem.persistent, "deterministic": problem.deterministic, "return_lse": True}
        if problem.offsets_k:
            arguments["cu_seqlens_k"] = torch.nn.functional.pad(arguments.pop("seqused_k").cumsum(0), (1, 0)).int()
        if not problem.max_seqlens:
            arguments |= {name: None for name in arguments if name.startswith("max_seqlen")}
        return getattr(cute_fa, problem.call)(called.q, called.k, called.v, **arguments, out=out)

    result, wrong = _differentiated(problem, given, call)
    if out is not None and result[0] is not out:
        wrong.append("the result is not the caller's tensor")
    return wrong


def _differentiated(problem: Problem, given: Inputs, call: Callable[[Inputs], Any]) -> tuple[Any, list[str]]:
    """What the call gives, and what is wrong with it or with its gradients."""
    variables = given.variables() if problem.backward else {}
    if not problem.slopes_gradient:
        variables.pop("alibi_slopes", None)
    variables = {name: tensor.detach().requires_grad_() for name, tensor in variables.items()}
    called = replace(given, **variables)
    with _simulated(problem):
        result = call(called)
        if problem.backward:
            dout, dlse = output_gradients(given, problem.seed)
            if problem.summed:
                dout = torch.ones((), dtype=dout.dtype).expand(dout.shape)
            returned = (result, (dout, dlse)) if problem.lse_gradient else (result[:1], (dout,))
            grads = torch.autograd.grad(returned[0], list(variables.values()), returned[1])
    rows = slice(None, -problem.tail if problem.tail and problem.spec.varlen_q else None)
    counting = replace(given, q=given.q[rows])
    wrong = _compared(_expected(counting).check(result[0].detach()[rows], result[1].detach()[..., rows]))
    if problem.backward:
        gradients = reference.Gradients.of(variables, grads)
        wrong += _compared_gradients(problem, given, gradients, dout, dlse)
    return result, wrong


def _range_attention(problem: Problem) -> list[str]:
    grouped = problem.grouped_ranges()
    given = _inputs(problem)
    if problem.segments > 1:  # the reference has a range of queries for each of keys
        counts = grouped["segment_offsets"].diff()
        given = replace(given, **{n: grouped[n].repeat_interleave(counts, 0) for n in ("q_ranges", "attn_type_map")})
    names = ("softmax_scale", "softcap", "alibi_slopes", "learnable_sink", "q_positions", "k_positions")

    def call(called: Inputs):
        arguments = {name: value for name, value in called.options().items() if name in names}
        arguments |= {"family": problem.family, "deterministic": problem.deterministic, "return_lse": True}
        arguments |= grouped if problem.plan is None else {"plan": problem.range_plan()}
        out, lse = cute_fa.range_attention(called.q[0], called.k[0], called.v[0], **arguments)
        return out[None], lse[None]

    return _differentiated(problem, given, call)[1]


def _compared_gradients(problem: Problem, given: Inputs, gradients: reference.Gradients, dout, dlse) -> list[str]:
    dlse = dlse if problem.lse_gradient else None
    options = given.options()
    expected = reference.expected_gradients(given.q, given.k, given.v, dout, dlse, **options, exact=EXACT)
    errors = expected.check(gradients)
    if not problem.slopes_gradient:
        errors.pop("dalibi", None)
    return _beyond(errors)


# ---- requests --------------------------------------------------------------------------------------------------------


def _request_fields(problem: Problem, given: Inputs) -> dict[str, Any]:
    """What all requests take."""
    spec = problem.spec
    left, right = normalize_window(spec.window, spec.causal)
    mask = MaskKind.SLIDING if (left, right) != (None, None) else MaskKind.NONE
    if right == 0:
        mask = MaskKind.CAUSAL if left is None else MaskKind.SLIDING_CAUSAL
    return {
        "mask": mask,
        "window": (left, right) if mask in (MaskKind.SLIDING, MaskKind.SLIDING_CAUSAL) else (None, None),
        "sink_tokens": spec.sink_tokens,
        "position_bias": PositionBias.NONE if given.alibi_slopes is None else PositionBias.ALIBI,
        "alibi_slopes": given.alibi_slopes,
        "softmax_scale": spec.softmax_scale,
        "softcap": spec.softcap,
        "learnable_sink": given.learnable_sink,
    }


def _offsets(given: Inputs, *names: str) -> dict[str, CumulativeSeqlens]:
    tensors = {f"cu_seqlens_{name}": getattr(given, f"cu_seqlens_{name}") for name in names}
    return {name: CumulativeSeqlens.from_tensor(t) for name, t in tensors.items() if t is not None}


def _request(problem: Problem) -> list[str]:
    given = _inputs(problem)
    with _simulated(problem):
        request = _forward_request(problem, given)
        result = request.run()
    return _compared(_expected(given).check(*result))


def _forward_request(problem: Problem, given: Inputs):
    fields = _request_fields(problem, given)
    descales = {name: getattr(given, name) for name in _DESCALES}
    if problem.call in ("Fa2FwdRequest", "Fa3FwdRequest", "Fa3FwdFp8Request"):
        if problem.call == "Fa3FwdFp8Request":
            fields |= descales | {"promote_every": problem.promote_every}
        if problem.call != "Fa2FwdRequest":
            fields |= {"persistent": PersistentMode(problem.persistent), "pack_gqa": problem.pack_gqa}
        return getattr(cute_fa, problem.call)(given.q, given.k, given.v, **fields)
    if problem.spec.page_size is None:
        attention = cute_fa.VarlenFwdRequest(given.q, given.k, given.v, **_offsets(given, "q", "k"), **fields)
    else:
        pages = given.k, given.v
        if problem.heads_first:
            pages = (t.transpose(1, 2).contiguous() for t in pages)
        cache = cute_fa.PagedKvCache(*pages, KvLayout.HND if problem.heads_first else KvLayout.NHD)
        if problem.seqlen_k_per_split:
            fields["seqlen_k_per_split"] = problem.seqlen_k_per_split
        fields |= {"num_splits": problem.num_splits, **_offsets(given, "q"), **descales, "tree_mask": given.tree_mask}
        if problem.max_seqlens:
            fields["max_seqlen_k"] = problem.spec.seqlen_k
        attention = cute_fa.PagedAttentionRequest(given.q, cache, given.page_table, given.seqused_k, **fields)
    if problem.call != "ChunkedPrefillRequest":
        return attention
    chunk = cute_fa.ChunkLayout(max(1, *problem.lengths_q), problem.prefix, 3, 1)
    return cute_fa.ChunkedPrefillRequest(attention, chunk)


def _backward_request(problem: Problem) -> list[str]:
    """After the reference's forward."""
    given = _inputs(problem)
    tensors = given.q, given.k, given.v
    out, lse = reference.attention(*tensors, **given.options(), dtype=EXACT)
    dout, dlse = output_gradients(given, problem.seed)
    fields = _request_fields(problem, given) | _offsets(given, "q", "k")
    fields |= {"deterministic": problem.deterministic, "slopes_gradient": problem.slopes_gradient}
    if problem.lse_gradient:
        fields["dlse"] = dlse
    with _simulated(problem):
        request = cute_fa.Fa2BwdRequest(*tensors, out.to(given.q.dtype), lse.float(), dout, **fields)
        gradients = request.run()
    return _compared_gradients(problem, given, gradients, dout, dlse)


# ---- merging ---------------------------------------------------------------------------------------------------------


def _merge(problem: Problem) -> list[str]:
    """Attention over each part of the keys, merged: a learnable sink takes part once."""
    given = _inputs(problem)
    ends = [0, *problem.parts, problem.spec.seqlen_k]
    options = _choices(problem) | {"softcap": problem.spec.softcap, "softmax_scale": problem.spec.softmax_scale}
    states = []
    with _simulated(problem):
        for number, (start, end) in enumerate(itertools.pairwise(ends)):
            last = number == len(problem.parts)
            sink = given.learnable_sink if number == 0 else None
            part = (tensor[:, start:end] for tensor in (given.k, given.v))
            mask = {"causal": problem.spec.causal and last, "learnable_sink": sink}
            states.append(cute_fa.flash_attn_func(given.q, *part, **options, **mask, return_lse=True))
    return _compared(_expected(given).check(*cute_fa.merge_states(*zip(*states, strict=True))))


# ---- caches ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Cache:
    """``stored``: the inputs with k and v as the cache has them in the end, but for the rotation of new keys;
    ``append``: what is yet to be appended; ``caches``: what the call is given as k_cache and v_cache."""

    problem: Problem
    stored: Inputs
    index: torch.Tensor | None
    rotary: Rotary | None
    append: Append | None
    caches: tuple[torch.Tensor, torch.Tensor]

    @property
    def pads(self) -> tuple[int, ...]:
        return self.problem.cache.leftpad or (0,) * self.problem.spec.batch

    @property
    def rotation_starts(self) -> list[int]:
        """The position of each sequence's first new row."""
        starts = self.problem.cache.rotary_starts
        return self.append.cache_seqlens.tolist() if starts is None else list(starts)

    def append_arguments(self) -> dict[str, Any]:
        """What flash_attn_with_kvcache and append_kv are given alike; nothing of it is written to by others."""
        if self.append is None:
            return {}
        arguments = {"k": self.append.k, "v": self.append.v, "cu_seqlens_k_new": self.append.cu_seqlens_k_new}
        if self.rotary is not None:
            arguments |= self.rotary.arguments()
            if self.problem.cache.rotary_starts is not None:
                arguments["rotary_seqlens"] = _int32(self.problem.cache.rotary_starts)
        return arguments

    def read(self) -> Inputs:
        """The inputs with the keys that attention sees in ``caches``, packed: values, where rows have descales."""
        lengths = self.problem.lengths_k
        rows = zip(self.pads, lengths, strict=True)
        at = [places(self.stored, b, range(pad, length), self.index) for b, (pad, length) in enumerate(rows)]
        k, v = (torch.cat([cache[place] for place in at]) for cache in self.caches)
        descales = {}
        if self.problem.spec.row_descales:
            descales = {"k_descale": None, "v_descale": None}
            of_rows = zip((self.stored.k_descale, self.stored.v_descale), self.caches, strict=True)
            of_k, of_v = (descale.expand(*cache.shape[:3], 1) for descale, cache in of_rows)
            k, v = k.float() * torch.cat([of_k[place] for place in at]), v.float() * torch.cat([of_v[p] for p in at])
        sizes = torch.tensor([0, *(length - pad for pad, length in zip(self.pads, lengths, strict=True))])
        offsets = sizes.cumsum(0).to(torch.int32)
        return replace(self.stored, k=k, v=v, cu_seqlens_k=offsets, seqused_k=None, page_table=None, **descales)


def _int32(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def _indexed_descales(given: Inputs, index: torch.Tensor) -> dict[str, torch.Tensor]:
    """Those of a cache's rows where the cache has a sequence more."""
    indexed = {}
    for name in ("k_descale", "v_descale"):
        descale = getattr(given, name)
        if descale is not None and descale.dim() == 4:
            indexed[name] = descale.new_full((len(descale) + 1, *descale.shape[1:]), math.nan)
            indexed[name][index.long()] = descale
    return indexed


def _made_cache(problem: Problem) -> _Cache:
    spec, cache = problem.spec, problem.cache
    given = _inputs(problem)
    stored, index = given, None
    if cache.indexed:
        order = torch.randperm(spec.batch + 1, generator=torch.Generator().manual_seed(problem.seed))
        index = order[: spec.batch].to(torch.int32)
        k, v = (t.new_full((spec.batch + 1, *t.shape[1:]), math.nan) for t in (given.k, given.v))
        k[index.long()], v[index.long()] = given.k, given.v
        stored = replace(given, k=k, v=v, **_indexed_descales(given, index))
    if cache.leftpad is not None:
        k, v = stored.k.clone(), stored.v.clone()
        for b, pad in enumerate(cache.leftpad):
            at = places(stored, b, range(pad), index)
            k[at] = v[at] = math.nan
        stored = replace(stored, k=k, v=v)
    rotary, append, caches = None, None, (stored.k, stored.v)
    if cache.new is not None:
        if cache.rotary_dim:
            rotary = _rotary(problem)
        append = take_last(stored, list(cache.new), cache.packed, rotary, index, cache.rotary_starts)
        caches = append.k_cache, append.v_cache
    if problem.heads_first:
        caches = tuple(lay_out(t, "transposed", math.nan) for t in caches)
        if append is not None:
            append = replace(append, k_cache=caches[0], v_cache=caches[1])
    return _Cache(problem, stored, index, rotary, append, caches)


def _rotary(problem: Problem) -> Rotary:
    """Tables with just as many positions as are looked up."""
    cache = problem.cache
    before = [length - new for length, new in zip(problem.lengths_k, cache.new, strict=True)]
    starts = before if cache.rotary_starts is None else cache.rotary_starts
    # rows of q beyond a sequence's own rotate too, in the reference
    rows = max(problem.lengths_q) if problem.spec.varlen_q else problem.spec.seqlen_q
    if problem.spec.varlen_q and problem.spec.seqused_q:
        rows = problem.spec.seqlen_q
    positions = max(1, *(start + max(new, rows) for start, new in zip(starts, cache.new, strict=True)))
    dtype = torch.float32 if cache.rotary_dtype == "fp32" else TORCH_DTYPES[DType(cache.rotary_dtype)]
    return Rotary.random(positions, cache.rotary_dim, dtype, cache.rotary_interleaved, cache.rotary_pairs)


def _appended(cache: _Cache, rotate_each: bool, **descales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(q, tokens in the cache) of append_kv."""
    problem, given = cache.problem, cache.stored
    new = None
    if problem.call == "append_kv" and not problem.cache.packed and len(set(problem.cache.new)) > 1:
        new = _int32(problem.cache.new)
    arguments = cache.append_arguments()
    return cute_fa.append_kv(
        *(arguments.pop("k"), arguments.pop("v"), *cache.caches, cache.append.cache_seqlens),
        q=given.q,
        page_table=given.page_table,
        cache_batch_idx=cache.index,
        cu_seqlens_q=given.cu_seqlens_q,
        seqused_q=given.seqused_q,
        seqused_k_new=new,
        rotate_each=rotate_each,
        max_seqlen_q=problem.spec.seqlen_q if problem.max_seqlens and given.cu_seqlens_q is not None else None,
        **arguments,
        **descales,
    )


def _check_queries(cache: _Cache, rotated: torch.Tensor, rotate_each: bool) -> None:
    """Where rows count."""
    given = cache.stored
    expected = rotated_queries(given, cache.rotary, cache.rotation_starts, rotate_each)
    counting = given.q.isfinite()
    assert_rotated(rotated[counting], expected[counting])


def _coded(cache: _Cache) -> tuple[list[CodedRows], dict[str, torch.Tensor]]:
    """New rows of k and v for caches of codes, and the descales that are given."""
    spec, own = cache.problem.spec, cache.problem.cache
    shape = (spec.batch, 1 if own.one_descale else spec.heads_kv)
    numbers = 0.02 + torch.rand(2, *shape, generator=torch.Generator().manual_seed(cache.problem.seed))
    descales = numbers.expand(-1, -1, spec.heads_kv).unbind()
    coded = []
    for name, code, descale in zip("kv", own.codes, descales, strict=True):
        rotation = {}
        if name == "k" and cache.rotary is not None:
            rotation = {"rotary": cache.rotary, "starts": cache.rotation_starts}
        given = None if own.copied else descale
        types = TORCH_DTYPES[DType(code)], given, cache.index
        coded.append(coded_rows(name, cache.append, cache.stored, list(own.new), *types, **rotation))
    return coded, {} if own.copied else dict(zip(("k_descale", "v_descale"), descales, strict=True))


def _append(problem: Problem) -> list[str]:
    cache = _made_cache(problem)
    coded, descales = _coded(cache) if problem.cache.codes is not None else ([], {})
    if coded:
        k, v = coded
        caches = tuple(rows.cache.clone(memory_format=torch.preserve_format) for rows in coded)
        cache = replace(cache, append=replace(cache.append, k=k.new, v=v.new), caches=caches)
    with _simulated(problem):
        rotated, seqlens = _appended(cache, problem.cache.rotate_each, **descales)
    try:
        for rows, written in zip(coded, cache.caches, strict=False):
            rows.check(written)
        if not coded:
            cache.append.check()
        if cache.rotary is not None:
            _check_queries(cache, rotated, problem.cache.rotate_each)
    except AssertionError as error:
        return [str(error)]
    wrong = [] if rotated is not cache.stored.q or cache.rotary is None else ["q is not rotated into a new tensor"]
    if seqlens.tolist() != list(problem.lengths_k):
        wrong.append(f"tokens in the cache: {seqlens.tolist()}, not {list(problem.lengths_k)}")
    return wrong


def _with_kvcache(problem: Problem) -> list[str]:
    cache, spec = _made_cache(problem), problem.spec
    given, append = cache.stored, cache.append
    each = normalize_window(spec.window, spec.causal) != (None, None)
    options = given.options()
    seqlens = append.cache_seqlens if append is not None else given.seqused_k
    if problem.cache.one_length:
        seqlens = problem.lengths_k[0]
    names = ("causal", "window_size", "sink_tokens", "softcap", "alibi_slopes", "learnable_sink", "softmax_scale")
    options = {name: options[name] for name in (*names, "cu_seqlens_q", "seqused_q", "page_table", *_DESCALES)}
    if given.cu_seqlens_q is not None and problem.max_seqlens:
        options["max_seqlen_q"] = spec.seqlen_q
    options |= {"cache_seqlens": seqlens, "cache_batch_idx": cache.index, "out": _into(problem, given)}
    options["tree_mask"] = given.tree_mask
    if problem.cache.leftpad is not None:
        options["cache_leftpad"] = _int32(problem.cache.leftpad)
    rotated = given.q
    with _simulated(problem):
        if cache.rotary is not None:
            # as the call rotates them: a difference of one rounding in q is more than the tolerance of the LSE
            copies = tuple(tensor.clone() for tensor in cache.caches)
            rotated, _ = _appended(replace(cache, caches=copies), each)
        result = cute_fa.flash_attn_with_kvcache(
            given.q, *cache.caches, **cache.append_arguments(), **options, **_choices(problem), return_lse=True
        )
    try:
        if append is not None:
            append.check()
        if cache.rotary is not None:
            _check_queries(cache, rotated, each)
    except AssertionError as error:
        return [str(error)]
    return _compared(_expected(replace(cache.read(), q=rotated)).check(*result))


_RUN: dict[str, Callable[[Problem], list[str]]] = {
    "flash_attn_func": _function,
    "flash_attn_varlen_func": _function,
    "flash_attn_with_kvcache": _with_kvcache,
    "append_kv": _append,
    "Fa2FwdRequest": _request,
    "Fa3FwdRequest": _request,
    "Fa3FwdFp8Request": _request,
    "VarlenFwdRequest": _request,
    "PagedAttentionRequest": _request,
    "ChunkedPrefillRequest": _request,
    "Fa2BwdRequest": _backward_request,
    "range_attention": _range_attention,
    "merge_states": _merge,
}
