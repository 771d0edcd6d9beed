"""Drawing problems: problem ``index`` of ``seed`` is always the same, whatever was drawn before.

Problems come in groups that share their kernels, since compiling takes seconds: a group draws what shapes machine code
(the call, architecture, head sizes, which options there are), and each of its problems the rest (lengths, bounds,
values, layouts, and how the machine is simulated).
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

from cute_fa.semantics.problem import PAGE_SIZES
from cute_fa.semantics.types import DType, SmArch
from cute_fa.tools.inputs import InputSpec
from cute_fa.tools.trial import Machine
from tests.testing.fuzz.problem import CACHE_CALLS, DIFFERENTIATED, FUNCTIONS, PLANS, TREES, CacheSpec, Problem, changed

GROUP = 8  # problems that share their kernels
_TILES = (16, 32, 48, 64, 80, 96, 112, 128)
_ROWS = 480  # queries of all heads and sequences, at most: what a simulated run costs follows from it

_CALLS = {
    "flash_attn_func": 8,
    "flash_attn_varlen_func": 12,
    "flash_attn_with_kvcache": 9,
    "append_kv": 4,
    "Fa2FwdRequest": 2,
    "Fa3FwdRequest": 2,
    "VarlenFwdRequest": 2,
    "PagedAttentionRequest": 3,
    "ChunkedPrefillRequest": 3,
    "Fa2BwdRequest": 3,
    "merge_states": 2,
    "range_attention": 5,
}
_ARCHS = {
    SmArch.SM_80: 4,
    SmArch.SM_86: 1,
    SmArch.SM_89: 1,
    SmArch.SM_90A: 6,
    SmArch.SM_100A: 4,
    SmArch.SM_103A: 2,
    SmArch.SM_120A: 1,
}
# Those with forwards of their own, also on products in fp8.
_FAMILIES = {SmArch.SM_90A: ("fa2", "fa3"), **dict.fromkeys((SmArch.SM_100A, SmArch.SM_103A), ("fa2", "fa3", "fa4"))}
_HEAD_DIMS = {
    (64, 64): 5,
    (128, 128): 5,
    (256, 256): 2,
    (192, 128): 2,
    (96, 96): 1,
    (80, 80): 1,
    (32, 32): 1,
    (16, 16): 1,
    (8, 8): 1,
    (72, 40): 1,
    (40, 72): 1,
    (64, 256): 1,
    (136, 8): 1,
}
_CODES = ("e4m3", "e5m2")
_CACHE_CODES = (*_CODES, "int8")
_FP8_CALLS = (*FUNCTIONS, "flash_attn_with_kvcache", "Fa3FwdRequest", "PagedAttentionRequest")
_RATIOS = {1: 5, 2: 3, 3: 1, 4: 2, 5: 1, 8: 2, 16: 1}
# Longest numbers of queries: decoding, a small chunk, more than a tile.
_MOST_QUERIES = {4: 2, 24: 1, 200: 4}
_DRAFTS = 80  # of a tree: up to 40 more rows may be there


def draw(seed: int, index: int) -> Problem:
    """A problem that the table serves."""
    group, number = divmod(index, GROUP)
    template = _first_served(random.Random(f"{seed}/{group}"), _template)
    return _first_served(random.Random(f"{seed}/{group}/{number}"), lambda rng: _filled(template, rng))


def _first_served(rng: random.Random, make) -> Problem:
    while True:
        problem = make(rng)
        if problem.objection() is None:
            return problem


def _chance(rng: random.Random, share: float) -> bool:
    return rng.random() < share


def _weighted(rng: random.Random, weights: dict) -> Any:
    return rng.choices(list(weights), list(weights.values()))[0]


def _template(rng: random.Random) -> Problem:
    """What shapes machine code; its lengths are the most that there may be, its bounds stand for any."""
    call = _weighted(rng, _CALLS)
    archs = {arch: _ARCHS[arch] for arch in _FAMILIES} if call == "Fa3FwdRequest" else _ARCHS
    arch = _weighted(rng, archs)
    head_dim, head_dim_v = _weighted(rng, _HEAD_DIMS)
    features = {
        "softcap": 1.0 if _chance(rng, 0.25) else 0.0,
        "learnable_sink": _chance(rng, 0.25),
        **_distances(call, rng),
        **_mask(call, rng),
        **_lengths_kind(call, rng),
        "tree": call in TREES and _chance(rng, 0.2),
    }
    template = Problem(
        call,
        Machine(arch, simulated=True),
        InputSpec(
            batch=1,
            seqlen_q=_DRAFTS if features["tree"] else _weighted(rng, _MOST_QUERIES),
            seqlen_k=rng.choice([96, 200, 300]),
            heads=_weighted(rng, _RATIOS),
            heads_kv=1,
            head_dim=head_dim,
            head_dim_v=head_dim_v,
            dtype=rng.choice([DType.BF16, DType.FP16]),
            **features,
        ),
        **_choices(call, arch, rng),
        cache=_cache(call, head_dim, features, rng),
    )
    spec = template.spec
    # one sequence as long as can be: whether the table serves it is asked of these
    lengths = {"lengths_q": (spec.seqlen_q,) if template.varies_q else None}
    lengths["lengths_k"] = (spec.seqlen_k,) if template.varies_k else None
    return _in_fp8(_with_gradients(replace(template, spec=replace(spec, **lengths)), rng), rng)


def _distances(call: str, rng: random.Random) -> dict[str, Any]:
    """Whether a bias grows with them."""
    if call == "range_attention":
        alibi = _chance(rng, 0.4)
        return {"alibi": alibi, "positions": alibi and _chance(rng, 0.5)}
    return {rng.choice(["alibi", "alibi_per_batch"]): call != "merge_states" and _chance(rng, 0.25)}


def _mask(call: str, rng: random.Random) -> dict[str, Any]:
    """Bounds of 1 where there is one; one range stands for any number."""
    if call == "merge_states":
        return {"causal": _chance(rng, 0.5)}
    if call == "range_attention":
        return {"ranges": 1}
    mask = rng.choice(
        [
            {},
            {},
            {"causal": True},
            {"causal": True},
            {"window": (None, 0)},
            {"window": (1, 1)},
            {"window": (1, 0)},
            {"window": (1, None), "causal": True},
            {"window": (1, None)},
            {"window": (None, 1)},
        ]
    )
    sink = "window" in mask and mask["window"][0] is not None and _chance(rng, 0.4)
    return {**mask, "sink_tokens": int(sink)}


def _lengths_kind(call: str, rng: random.Random) -> dict[str, Any]:
    """Which sequences are packed, and where lengths come from."""
    page = {"page_size": rng.choice(PAGE_SIZES)}
    packed = {"varlen_q": True, "varlen_k": True}
    if call == "flash_attn_varlen_func":
        if _chance(rng, 0.35):
            return {**page, "varlen_q": _chance(rng, 0.6), "seqused_q": _chance(rng, 0.2)}
        if _chance(rng, 0.4):
            return packed
        kinds = {name: _chance(rng, 0.5) for name in (*packed, "seqused_q", "seqused_k")}
        return kinds if any(kinds.values()) else packed
    if call == "flash_attn_with_kvcache":
        kinds = page if _chance(rng, 0.5) else {"seqused_k": _chance(rng, 0.9)}
        return {**kinds, "varlen_q": _chance(rng, 0.4), "seqused_q": _chance(rng, 0.25)}
    if call == "append_kv":
        kinds = page if _chance(rng, 0.5) else {"seqused_k": True}
        return {**kinds, "varlen_q": _chance(rng, 0.4), "seqused_q": _chance(rng, 0.3)}
    if call in ("VarlenFwdRequest", "Fa2BwdRequest"):
        return packed if call == "VarlenFwdRequest" or _chance(rng, 0.5) else {}
    if call in ("PagedAttentionRequest", "ChunkedPrefillRequest"):
        if call == "ChunkedPrefillRequest" and _chance(rng, 0.4):
            return packed
        return {**page, "varlen_q": _chance(rng, 0.6)}
    return {}


def _choices(call: str, arch: SmArch, rng: random.Random) -> dict[str, Any]:
    """How the call is computed."""
    choices = {}
    function = call in (*FUNCTIONS, "flash_attn_with_kvcache", "merge_states")
    if (function or call == "range_attention") and _chance(rng, 0.25):
        choices["family"] = rng.choice(_FAMILIES.get(arch, ("fa2",)))
    if call == "flash_attn_with_kvcache":
        choices["num_splits"] = rng.choice([0, 0, 1, 2])
    elif function or call in ("PagedAttentionRequest", "ChunkedPrefillRequest"):
        choices["num_splits"] = rng.choice([1, 1, 1, 0, 2])
    if (function or call == "PagedAttentionRequest") and call != "merge_states" and _chance(rng, 0.1):
        choices |= {"seqlen_k_per_split": rng.choice([64, 128, 256]), "num_splits": rng.choice([0, 1])}
    if function or call == "Fa3FwdRequest":
        choices["pack_gqa"] = rng.choice([None, None, None, True, False])
    if call in (*FUNCTIONS, "Fa3FwdRequest"):
        choices["persistent"] = rng.choice(["auto", "auto", "auto", "on", "off"])
    return choices


def _cache(call: str, head_dim: int, features: dict[str, Any], rng: random.Random) -> CacheSpec:
    """Zeros stand for any number of rows."""
    if call not in CACHE_CALLS:
        return CacheSpec()
    contiguous = "page_size" not in features
    cache = CacheSpec(
        leftpad=(0,) if call == "flash_attn_with_kvcache" and _chance(rng, 0.3) else None,
        indexed=contiguous and _chance(rng, 0.4),
    )
    if call == "flash_attn_with_kvcache" and (_chance(rng, 0.35) or not (features.get("seqused_k") or not contiguous)):
        return cache
    cache = replace(cache, new=(0,), packed=_chance(rng, 0.4))
    if head_dim >= 16 and not _chance(rng, 0.35):
        cache = replace(
            cache,
            rotary_dim=rng.choice([16, head_dim // 16 * 16]),
            rotary_dtype=rng.choice(["fp32", "fp16", "bf16"]),
            rotary_interleaved=_chance(rng, 0.5),
            rotary_starts=(0,) if _chance(rng, 0.25) else None,
        )
    if call == "append_kv" and _chance(rng, 0.5):
        copied = not cache.rotary_dim and _chance(rng, 0.7)
        cache = replace(cache, codes=(rng.choice(_CACHE_CODES), rng.choice(_CACHE_CODES)), copied=copied)
    return cache


def _with_gradients(problem: Problem, rng: random.Random) -> Problem:
    """A backward, where there can be one."""
    forward_only = problem.spec.page_size is not None or problem.spec.tree
    backward = problem.call in DIFFERENTIATED and not forward_only and _chance(rng, 0.35)
    if not backward and problem.call != "Fa2BwdRequest":
        return problem
    alibi = problem.spec.alibi or problem.spec.alibi_per_batch
    return replace(
        problem,
        backward=backward,
        deterministic=_chance(rng, 0.5),
        lse_gradient=_chance(rng, 0.5),
        slopes_gradient=alibi and _chance(rng, 0.7),
    )


def _in_fp8(problem: Problem, rng: random.Random) -> Problem:
    """With q, k and v in fp8 types, or k and v alone in types of codes, for a share of what may have them."""
    request = problem.call == "Fa3FwdRequest"
    products = problem.machine.arch in _FAMILIES and problem.family != "fa2" and not problem.spec.tree
    offered = products if request else _chance(rng, 0.6)
    if problem.call not in _FP8_CALLS or problem.cache.new is not None or not _chance(rng, 0.4):
        return problem
    of_kv = _CODES if offered else _CACHE_CODES
    dtype, dtype_k, dtype_v = (DType(rng.choice(types)) for types in (_CODES, of_kv, of_kv))
    descales = problem.call == "PagedAttentionRequest" or _chance(rng, 0.8)  # which asks for them
    forward = dict.fromkeys(("backward", "deterministic", "lse_gradient", "slopes_gradient"), False)
    spec = replace(problem.spec, dtype_k=dtype_k, dtype_v=dtype_v, descales=descales)
    if not offered:
        if descales and not spec.varlen_k and _chance(rng, 0.5):
            spec = replace(spec, row_descales=rng.choice(["rows", "pages"] if spec.page_size else ["rows"]))
        return problem if request else replace(problem, spec=spec, **forward)
    of_blocks = products and descales and _chance(rng, 0.3)
    spec = replace(spec, dtype=dtype)
    key_major = products and problem.call == "flash_attn_func" and _chance(rng, 0.3)
    spec = replace(spec, block_descales=of_blocks, v_layout="key_major" if key_major else "head_dim")
    promotes = products and problem.call != "PagedAttentionRequest"
    asked = rng.choice([None, None, 1, 2]) if promotes else None
    call = "Fa3FwdFp8Request" if request else problem.call
    return replace(problem, call=call, spec=spec, promote_every=asked, **forward)


def _filled(template: Problem, rng: random.Random) -> Problem:
    """A problem of the template's group."""
    spec, cache = template.spec, template.cache
    ratio = spec.heads
    heads_kv = rng.choice([1, 1, 2, 3]) if ratio <= 2 else rng.choice([1, 1, 2]) if ratio <= 4 else 1
    batch = 1 if spec.ranges else rng.choice([1, 1, 2, 2, 3, 4])
    most_q = max(1, min(spec.seqlen_q, _ROWS // (ratio * heads_kv * batch) + 1))
    seqlen_q, lengths_q = _lengths(batch, most_q, template.varies_q, rng)
    seqlen_k, lengths_k = _lengths(batch, spec.seqlen_k, template.varies_k, rng)
    if template.call == "ChunkedPrefillRequest":
        rows = lengths_q or (seqlen_q,) * batch
        lengths_k = tuple(k + (q if q > k else 0) for q, k in zip(rows, lengths_k, strict=True))
        prefixes = (k - q for q, k in zip(rows, lengths_k, strict=True))
        seqlen_k = max(seqlen_k, *lengths_k, max(prefixes) + max(rows))
    layouts = ["contiguous", "contiguous", "padded", "transposed", *["expanded"] * (cache.new is None)]
    if spec.v_layout == "key_major":
        layouts = ["contiguous"]
    problem = changed(
        template,
        batch=batch,
        heads=ratio * heads_kv,
        heads_kv=heads_kv,
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_k,
        lengths_q=lengths_q,
        lengths_k=lengths_k,
        layout=rng.choice(layouts),
        softmax_scale=rng.choice([None, None, spec.head_dim**-0.5 * 2.0 ** rng.uniform(-3.0, 2.0)]),
        softcap=spec.softcap and rng.choice([1.0, 15.0, 30.0, 50.0, rng.uniform(0.5, 60.0)]),
        window=tuple(_bound(bound, seqlen_k, rng) for bound in spec.window),
        sink_tokens=spec.sink_tokens and rng.choice([1, 2, 4, 5, rng.randint(1, 100)]),
        inputs=rng.choice(["peaked", "peaked", "random"]),
        seed=rng.randrange(1000),
        num_splits=template.num_splits if template.num_splits < 2 else rng.choice([2, 3, 4, 7]),
        max_seqlens=bool(spec.ranges) or spec.tree or _chance(rng, 0.8),
        offsets_k=template.call == "flash_attn_varlen_func" and spec.page_size is not None and _chance(rng, 0.3),
        tail=rng.choice([0, 0, 1, 30]) if template.call in FUNCTIONS and (spec.varlen_q or spec.varlen_k) else 0,
        joined=_may_be_joined(template) and _chance(rng, 0.15),
        summed=template.backward and _chance(rng, 0.15),
        into=not template.backward and "flash" in template.call and _chance(rng, 0.2),
        heads_first=_chance(rng, 0.3),
        machine=_machine(template.machine.arch, rng),
        **_plan(template, rng),
    )
    return replace(problem, cache=_filled_cache(problem, rng), parts=_parts(problem, rng))


def _plan(template: Problem, rng: random.Random) -> dict[str, Any]:
    if template.call != "range_attention":
        return {}
    return {
        "ranges": rng.choice([1, 2, rng.randint(1, 12), rng.randint(1, 60), rng.randint(1, 200)]),
        "segments": rng.choice([1, 1, 1, 2, 3]),
        "plan": rng.choice(PLANS),
    }


def _may_be_joined(template: Problem) -> bool:
    spec = template.spec
    alike = spec.head_dim == spec.head_dim_v and spec.dtype_k is spec.dtype_v and spec.v_layout == "head_dim"
    return alike and template.cache == CacheSpec()


def _lengths(batch: int, most: int, vary: bool, rng: random.Random) -> tuple[int, tuple[int, ...] | None]:
    """(the longest, or what a tensor holds; each sequence's, where they vary)."""
    if not vary:
        return _length(most, rng), None
    lengths = tuple(_length(most, rng) for _ in range(batch))
    return max(1, *lengths) + rng.choice([0, 0, 0, 1, rng.randint(0, 40)]), lengths


def _length(most: int, rng: random.Random) -> int:
    """Empty, one, a tile of some kernel or one more or less, or any."""
    edges = [1, *(tile + more for tile in _TILES for more in (-1, 0, 1))]
    edge = rng.choice([edge for edge in edges if edge <= most])
    return rng.choice([edge, edge, rng.randint(1, most), rng.randint(1, most), 0 if _chance(rng, 0.3) else most])


def _bound(bound: int | None, seqlen_k: int, rng: random.Random) -> int | None:
    """Any bound in the place of 1; infinite ones in either spelling."""
    if bound is None:
        return rng.choice([None, -1])
    return bound and rng.choice([1, 2, rng.randint(1, 20), rng.randint(1, 1 + seqlen_k), rng.randint(1, 1 + seqlen_k)])


def _machine(arch: SmArch, rng: random.Random) -> Machine:
    machine = Machine(arch, simulated=True, num_sms=rng.choice([None, None, None, 1, 2, 3, 7]))
    if _chance(rng, 0.5):
        return machine
    return replace(machine, race=True, late=True, schedule_seed=rng.randrange(1000))


def _filled_cache(problem: Problem, rng: random.Random) -> CacheSpec:
    cache, lengths = problem.cache, problem.lengths_k
    if problem.call not in CACHE_CALLS:
        return cache
    pads = [0] * len(lengths)
    if cache.leftpad is not None:
        pads = [rng.choice([0, rng.randint(0, length), rng.randint(0, min(length, 9))]) for length in lengths]
    new = None
    if cache.new is not None:
        most = [min(length - pad, rng.choice([1, 1, 4, 40])) for length, pad in zip(lengths, pads, strict=True)]
        new = tuple(rng.randint(0, room) for room in most)
        if problem.call == "flash_attn_with_kvcache" and not cache.packed:
            new = (min(most),) * len(new)
    return replace(
        cache,
        new=new,
        leftpad=None if cache.leftpad is None else tuple(pads),
        rotary_starts=None if cache.rotary_starts is None else tuple(rng.randint(0, 99) for _ in lengths),
        rotary_pairs=cache.rotary_dim > 0 and _chance(rng, 0.3),
        rotate_each=problem.call != "append_kv" or _chance(rng, 0.7),
        one_descale=cache.codes is not None and not cache.copied and _chance(rng, 0.3),
        one_length=new is None and problem.spec.seqused_k and len(set(lengths)) == 1,
    )


def _parts(problem: Problem, rng: random.Random) -> tuple[int, ...]:
    if problem.call != "merge_states":
        return ()
    spec = problem.spec
    most = max(0, spec.seqlen_k - spec.seqlen_q) if spec.causal else spec.seqlen_k
    return tuple(sorted(rng.randint(0, most) for _ in range(rng.choice([1, 2, 3]))))
