"""Messages speak of the caller's arguments: bad calls of every public function, one argument at a time."""

import inspect
import re
import types

import pytest
import torch

import cute_fa
from cute_fa import flash_attn_with_kvcache
from cute_fa.engine import append
from cute_fa.engine import attention as engine
from cute_fa.engine import plan as plans
from cute_fa.semantics.argument_names import names_of, spelled
from cute_fa.semantics.call import FIELDS, AppendCall, Call
from cute_fa.semantics.errors import CuteFaError, DTypeError, StrideError
from tests.testing.calls import calls, ints, rows

CALLS = calls()
PARAMETERS = {name: set(inspect.signature(call.function).parameters) for name, call in CALLS.items()}
# Every name of an argument that there is, of public functions and of the operators behind them.
NAMES = set().union(*PARAMETERS.values(), FIELDS, AppendCall._fields)

# Changes that are none too many, of all functions and of some: any strides, rows that no length counts.
FINE = {("rotary_cos", "strided"), ("rotary_sin", "strided"), ("seq_start", "strided"), ("freqs_cis", "strided")}
FINE |= {("freqs_cis", "longer")}
SHIFTED = {("cu_seqlens_k", "negative"), ("cu_seqlens_k", "large")}  # differences alone are lengths of a paged cache
FINE_IN = {
    "varlen": {("q", "longer")},
    "varlen, paged": {("cu_seqlens_k", "strided")} | SHIFTED,
    "varlen, block_table": {("cu_seqlens_k", "strided")} | SHIFTED,
    "merge_states": {(name, kind) for name in ("outs", "lses") for kind in ("strided", "float64")},
    "fa2": {(name, "strided") for name in ("q", "k", "v", "qkv", "kv")},
    "qkvpacked": {("qkv", "longer")},  # a sequence, or a row behind the last, more
    "fa2 qkvpacked": {("qkv", "device")},  # no other tensor is elsewhere
    "varlen kvpacked": {("kv", "longer")},
    "fa4": {("window_size", "negative")},  # literal there
    "fused_mha_with_cache": {("k_cache", "longer"), ("v_cache", "longer")},
    "fused_mha_with_paged": {("page_table", "longer"), ("page_table", "strided"), ("cache_loc", "strided")},
}


@pytest.fixture(autouse=True)
def nothing_runs(monkeypatch):
    """Calls that are good end before they are compiled."""
    nothing = types.SimpleNamespace(launch=lambda arguments: None)
    monkeypatch.setattr(plans, "compiled", lambda config: nothing)
    monkeypatch.setattr(plans, "PLANS", {})
    monkeypatch.setattr(append, "_outputs", lambda call: ((call.k if call.q is None else call.q), call.cache_seqlens))
    with cute_fa.simulate("sm_80"):
        yield


def bad_values(value):
    """Changes of one argument, by kind."""
    if isinstance(value, torch.Tensor):
        yield "rank", value[None]
        yield "longer", torch.cat([value, value[:1]])
        yield "float64", value.double()
        yield "strided", torch.stack([value, value], -1)[..., 0]
        yield "device", value.to("meta")
        yield "list", [1.0]
        if not value.is_floating_point():
            yield "negative", value - 100
            yield "large", value + 10**6
    elif isinstance(value, bool):
        yield "text", "yes"
    elif isinstance(value, (int, float)):
        yield "negative", type(value)(-1)
        yield "text", "x"
    elif isinstance(value, tuple):
        yield "number", 3
        yield "negative", (-2, 0)


def is_fine(name, argument, kind):
    return (argument, kind) in FINE or any(part in name and (argument, kind) in fine for part, fine in FINE_IN.items())


@pytest.mark.parametrize("name", list(CALLS))
def test_the_bad_argument_is_named(name):
    call = CALLS[name]
    call()  # is good
    operator = name.startswith(("fused", "scaled"))
    for argument, value in call.arguments.items():
        for kind, changed in bad_values(value):
            if is_fine(name, argument, kind):
                call(**{argument: changed})
                continue
            if operator and kind in ("list", "text"):  # what the dispatcher itself refuses, by its name too
                with pytest.raises(RuntimeError, match=f"'{argument}'"):
                    call(**{argument: changed})
                continue
            with pytest.raises(CuteFaError) as caught:
                call(**{argument: changed})
            named = [word for word in re.findall(r"\w+", str(caught.value)) if word in NAMES]
            message = f"{argument} {kind}: {caught.value}"
            assert argument in named, message
            assert PARAMETERS[name].issuperset(named), message
            # What is wrong in itself is blamed itself; sizes and devices are wrong beside those of others.
            assert named[0] == argument or kind in ("longer", "device", "float64"), message


@pytest.mark.parametrize("name", list(CALLS))
@pytest.mark.parametrize("head_dim", [20, 33, 36, 100])
def test_a_head_dim_is_no_stride(name, head_dim):
    """Contiguous tensors of a head_dim that no kernel serves; ``compat.fa2`` pads it."""
    if name.startswith("fa2"):
        return
    call = CALLS[name]
    names = ("q", "k", "k_cache", "query", "key")
    changes = {}
    for argument, tensor in call.tensors.items():
        if argument in names and tensor.shape[-1] == 64:
            changes[argument] = rows(*tensor.shape[:-1], head_dim)
        elif argument in names:  # heads and head_dim in one dimension
            changes[argument] = rows(*tensor.shape[:-1], tensor.shape[-1] // 64 * head_dim)
    if not changes:  # merge_states has none
        return
    with pytest.raises(CuteFaError, match=rf"head_dim[ =]{head_dim}: a multiple of 8") as caught:
        call(**changes)
    assert not isinstance(caught.value, StrideError)


def test_compiled_code_names_them_too():
    """It calls the operators alone."""
    torch._dynamo.reset()
    traced = torch.compile(flash_attn_with_kvcache, fullgraph=True, backend="eager")
    call = CALLS["kvcache, block_table, append"]
    for argument, value in (("cache_seqlens", ints(40, 30).long()), ("block_table", ints(1, 2, 3))):
        with pytest.raises(CuteFaError, match=f"^{argument} "):
            traced(**{**call.arguments, argument: value})


def test_a_backward_names_them_too():
    """The names go with the call that the derivative is of."""
    call = Call.made(*[rows(1, 8, 1, 64)] * 3, names=spelled(k="key"))
    wrong = call._replace(k=call.k.half())
    out, lse = engine.attention(call)
    with pytest.raises(DTypeError, match=r"^key is float16: q is bfloat16, key and v must be too"):
        torch.ops.cute_fa.attention_backward(out, None, out, lse, *wrong.flat(), False)


def test_names_are_text_and_back():
    names = names_of(spelled(k="k_cache", seqused_k="cu_seqlens_k.diff()"))
    assert (names["k"], names["seqused_k"], names["q"]) == ("k_cache", "cu_seqlens_k.diff()", "q")
    assert names.of({"k": 1, "v": 2}) == {"k_cache": 1, "v": 2}
    assert names_of("") == {} == names_of(spelled())
