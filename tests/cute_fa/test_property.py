"""Whatever is thrown at the API: a right answer or one clear error, never anything else.

A call starts as one of a few good ones (so that as many kernels serve every example) with random sizes, then up to two
of its arguments are damaged. Damage may also leave a call valid: then its answer must be right.
"""

import math

import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

import cute_fa
from cute_fa import flash_attn_func, flash_attn_varlen_func
from cute_fa.semantics import reference
from cute_fa.semantics.errors import CuteFaError
from cute_fa.tools.inputs import InputSpec, make_inputs

LENGTHS = st.integers(0, 80)
NAN, INF = math.nan, math.inf


@st.composite
def good_calls(draw, arch):
    """(kind, keyword arguments): plain, causal, packed with every feature, or, where a kernel serves them, pages."""
    kind = draw(st.sampled_from(["plain", "causal", "packed", *(["paged"] if arch != "sm_80" else [])]))
    heads_kv = draw(st.integers(1, 2))
    # kernels of tiles by TMA pack query heads, and are compiled for each number of them
    ratio = draw(st.integers(1, 3)) if arch == "sm_80" else 1 + (kind == "paged")
    sizes = {
        "batch": draw(st.integers(1, 3)),
        "seqlen_q": draw(LENGTHS),
        "seqlen_k": draw(LENGTHS),
        "heads_kv": heads_kv,
        "heads": heads_kv * ratio,
        "layout": draw(st.sampled_from(["contiguous", "padded", "transposed", "expanded"])),
        "softmax_scale": draw(st.none() | st.floats(0.01, 1.0)),
    }
    inputs, seed = draw(st.sampled_from(["random", "peaked"])), draw(st.integers(0, 99))
    if kind == "packed":
        window = (draw(st.integers(0, 90)), draw(st.integers(1, 90)))
        features = {"window": window, "sink_tokens": draw(st.integers(1, 90)), "softcap": draw(st.floats(1.0, 60.0))}
        features |= {"alibi": True, "alibi_per_batch": draw(st.booleans()), "learnable_sink": True}
        features |= dict.fromkeys(("varlen_q", "varlen_k", "seqused_q", "seqused_k"), True)
        sizes |= {"seqlen_q": draw(st.integers(1, 80)), "seqlen_k": draw(st.integers(1, 80))}
        made = make_inputs(InputSpec(**sizes, **features), inputs, seed=seed)
        longest = {"max_seqlen_q": sizes["seqlen_q"], "max_seqlen_k": sizes["seqlen_k"]}
        call = {"q": made.q, "k": made.k, "v": made.v, **made.options(), **longest}
        del call["page_table"]
        return kind, call
    if kind == "paged":
        sizes |= {"seqlen_q": draw(st.integers(1, 80)), "seqlen_k": draw(st.integers(1, 80))}
        spec = InputSpec(**sizes, page_size=16, varlen_q=True, causal=True)
        made = make_inputs(spec, inputs, seed=seed, poison=False)  # damage may list any page
        return kind, {"q": made.q, "k": made.k, "v": made.v, **made.arguments()}
    made = make_inputs(InputSpec(**sizes), inputs, seed=seed)
    call = {"q": made.q, "k": made.k, "v": made.v, "softmax_scale": sizes["softmax_scale"]}
    if kind == "causal":
        call |= draw(
            st.sampled_from(
                [
                    {"causal": True},
                    {"window_size": (-1, 0)},
                    {"window_size": (None, 0), "causal": True},
                    {"window_size": (10**30, 7), "causal": True},
                ]
            )
        )
    else:
        call |= draw(st.sampled_from([{}, {"window_size": (-1, -1)}, {"window_size": [None, 2**31]}]))
    return kind, call


def unaligned(tensor):
    moved = tensor.new_zeros(tensor.numel() + 4)[4:]
    return moved.view(tensor.shape).copy_(tensor)


def odd_strides(tensor):
    wide = tensor.new_zeros(*tensor.shape[:-1], tensor.shape[-1] + 3)
    wide[..., :-3] = tensor
    return wide[..., :-3]


TENSOR_DAMAGE = {
    "one dimension less": lambda t: t[0] if t.shape[0] else t.sum(0),
    "one dimension more": lambda t: t[None],
    "one sequence or row less": lambda t: t[1:],
    "rows twice": lambda t: torch.cat([t, t]),
    "no rows": lambda t: t[:0],
    "shorter": lambda t: t[:, :-1],
    "half the heads": lambda t: t[..., : t.shape[-2] // 2, :],
    "one head": lambda t: t[..., :1, :],
    "head_dim 60": lambda t: t[..., :60],
    "head_dim 0": lambda t: t[..., :0],
    "transposed": lambda t: t.transpose(-1, -2),
    "last dimension strided": lambda t: t[..., ::2],
    "last dimension expanded": lambda t: t[..., :1].expand(t.shape),
    "odd strides": odd_strides,
    "unaligned": unaligned,
    "fp32": torch.Tensor.float,
    "ints": lambda t: t.nan_to_num().to(torch.int32),
    "fp8": lambda t: t.to(torch.float8_e4m3fn),
    "bool": lambda t: t > 0,
    "meta": lambda t: t.to("meta"),
    "sparse": lambda t: t.nan_to_num().float().to_sparse(),
    "numpy": lambda t: t.float().numpy(),
    "list": lambda t: t[:1].float().tolist(),
    "none": lambda t: None,
    "number": lambda t: 1.0,
    "gradient": lambda t: t.detach().requires_grad_(t.is_floating_point()),
    "contiguous": torch.Tensor.contiguous,
}
VECTOR_DAMAGE = {
    **{name: TENSOR_DAMAGE[name] for name in ("one dimension more", "no rows", "rows twice", "fp32", "meta", "numpy")},
    "none": lambda t: None,
    "backwards": lambda t: t.flip(0),
    "strided": lambda t: torch.stack([t, t], -1)[..., 0],
    "shifted": lambda t: t + 1,
    "negative": lambda t: -t,
    "huge": lambda t: t + t.new_tensor(2**31 - 100),
    "long": torch.Tensor.long,
    "one less": lambda t: t[:-1],
    "zero": torch.zeros_like,
}
SCALAR_DAMAGE = {
    "softmax_scale": [0, 0.0, -1.0, NAN, INF, 1e-300, 1e300, 10**400, "x", True, [1.0], 1e-5, 2, torch.tensor(1.0)],
    "softcap": [-1.0, NAN, INF, 1e-30, 1e30, "x", None, True, 5],
    "sink_tokens": [-1, 2.5, 10**12, "x", None, True, 2**31 - 1],
    "window_size": [(-2, 3), (3, -2), (1.5, 3), ("a", 3), (3,), (1, 2, 3), 5, "ab", {}, (True, 3), (NAN, 1), ((1,), 2)],
    "causal": [1, "yes", None, 0.0],
    "num_splits": [2, -1, 10**20, 1.5, None],
    "max_seqlen_q": [0, -1, 1, 3, 10**9, 2**31, 10**30, 4.0, "x", None, True, torch.tensor(50)],
    "max_seqlen_k": [0, -1, 1, 3, 10**9, 2**31, 10**30, 4.0, "x", None, True, torch.tensor(50)],
    "family": ["fa9", 1, ""],
    "pack_gqa": [True, False, 1, "x"],
    "persistent": ["auto", "x", True, None, []],
    "dropout_p": [0.0, 0.5, NAN, "x"],
    "qv": [None, 1],
    "no_such_argument": [1],
}
# What would only be more kernels to compile: features that a kind of call does not have, and their absence.
OTHER_KERNELS = {
    "plain": ("softcap", "sink_tokens", "max_seqlen_q", "max_seqlen_k"),
    "causal": ("softcap", "sink_tokens", "max_seqlen_q", "max_seqlen_k"),
    "packed": (),
    "paged": ("softcap", "sink_tokens", "window_size", "causal"),
}
KEEPS_FEATURE = ("alibi_slopes", "learnable_sink", "seqused_q", "seqused_k", "page_table")
# Valid choices that each architecture has one kernel for, and invalid ones.
FAMILIES = {"sm_80": ["fa2", "fa3"], "sm_90a": ["fa3", "fa4"], "sm_100a": ["fa3", "fa4"]}
MODES = {"sm_80": ["on", "off"], "sm_90a": ["on"], "sm_100a": ["on"]}


@st.composite
def calls(draw, arch):
    kind, call = draw(good_calls(arch))
    scalars = SCALAR_DAMAGE | {"family": SCALAR_DAMAGE["family"] + FAMILIES[arch]}
    scalars |= {"persistent": SCALAR_DAMAGE["persistent"] + MODES[arch]}
    damage = []
    for _ in range(draw(st.sampled_from([0, 1, 1, 2]))):
        name = draw(st.sampled_from([*(n for n in call if isinstance(call[n], torch.Tensor)), *scalars]))
        if name in ("q", "k", "v"):
            how = draw(st.sampled_from(list(TENSOR_DAMAGE)))
            damage.append((name, how, TENSOR_DAMAGE[how]))
        elif name in scalars:
            value = draw(st.sampled_from(scalars[name]))
            if name not in OTHER_KERNELS[kind]:
                damage.append((name, repr(value), lambda _, value=value: value))
        else:
            how = draw(st.sampled_from([how for how in VECTOR_DAMAGE if how != "none" or name not in KEEPS_FEATURE]))
            damage.append((name, how, VECTOR_DAMAGE[how]))
    done = []
    for name, how, change in damage:
        try:
            call[name] = change(call.get(name))
        except (RuntimeError, IndexError, TypeError, AttributeError):
            continue  # this argument cannot be damaged so, or not any more
        done.append((name, how))
    return kind, call, done


@pytest.fixture(scope="module", params=["sm_80", "sm_90a", "sm_100a"])
def simulation(request):
    with cute_fa.simulate(request.param, num_sms=3) as simulation:
        yield simulation


@pytest.mark.sampled
@settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_right_answer_or_one_clear_error(simulation, data):
    kind, call, damage = data.draw(calls(simulation.arch))
    function = flash_attn_varlen_func if kind in ("packed", "paged") else flash_attn_func
    launches = len(simulation.launches)
    try:
        out, lse = function(**call, return_lse=True)
    except CuteFaError as error:
        assert damage, f"a good call was refused: {error}"
        assert len(str(error)) > 15
        assert len(simulation.launches) == launches, "bad input reached a kernel"
        event(f"{type(error).__name__}")
        return
    event("answered, damaged" if damage else "answered, good")
    assert_right(call, out, lse)


def assert_right(call, out, lse):
    """Compare the rows that belong to a sequence."""
    passed = {n: call[n] for n in call if n in REFERENCE_OPTIONS}
    if passed.get("window_size") is not None:
        passed["window_size"] = tuple(passed["window_size"])
    tensors = [call[name].detach() for name in ("q", "k", "v")]
    if tensors[0].is_meta:
        assert out.is_meta
        return
    expected = reference.expected(*tensors, **passed)
    rows = slice(None)
    if call.get("cu_seqlens_q") is not None:
        rows = slice(0, int(call["cu_seqlens_q"][-1]))
        comparison = expected.check(
            torch.cat([out[rows].detach(), expected.out[rows.stop :].to(out.dtype)]),
            torch.cat([lse[:, rows], expected.lse[:, rows.stop :]], 1),
        )
    else:
        comparison = expected.check(out, lse)
    assert comparison.ok, comparison


REFERENCE_OPTIONS = {
    *("cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k", "softmax_scale", "causal", "window_size"),
    *("sink_tokens", "softcap", "alibi_slopes", "learnable_sink", "page_table"),
}
