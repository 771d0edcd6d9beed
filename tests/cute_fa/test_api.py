"""The public functions: names of the peers, conventions, what comes back, and right answers at the edges."""

import ast
import importlib.metadata
import inspect
import math

import pytest
import torch

import cute_fa
from cute_fa import flash_attn_func, flash_attn_varlen_func
from cute_fa.compat import fa2, fa3, fa4
from cute_fa.semantics import reference
from cute_fa.semantics.errors import ArgumentError, UnsupportedKeyError
from cute_fa.semantics.types import DType, PersistentMode
from cute_fa.tools.inputs import InputSpec, make_inputs

DENSE = InputSpec(batch=2, seqlen_q=40, seqlen_k=72, heads=4, heads_kv=2)
PACKED = InputSpec(batch=3, seqlen_q=40, seqlen_k=72, heads=4, heads_kv=2, varlen_q=True, varlen_k=True)


@pytest.fixture(autouse=True)
def simulated():
    with cute_fa.simulate("sm_80") as simulation:
        yield simulation


def close(result, inputs, **options):
    """Assert that a result is right for the inputs with these options, and return it."""
    out, lse = result if isinstance(result, tuple) else (result, None)
    comparison = reference.check(out, lse, inputs.q, inputs.k, inputs.v, **{**inputs.options(), **options})
    assert comparison.ok, comparison
    return result


@pytest.mark.parametrize("function", [flash_attn_func, flash_attn_varlen_func])
def test_everything_after_the_tensors_is_keyword_only(function):
    kinds = [p.kind for p in inspect.signature(function).parameters.values()]
    positional = 3 if function is flash_attn_func else 7
    assert kinds[:positional] == [inspect.Parameter.POSITIONAL_OR_KEYWORD] * positional
    assert inspect.Parameter.POSITIONAL_OR_KEYWORD not in kinds[positional:]
    message = rf"^{function.__name__}: 0.0 by position: only .*; cute_fa.compat.fa2, fa3 and fa4 have"
    with pytest.raises(ArgumentError, match=message):
        function(*[torch.zeros(1, 8, 1, 64, dtype=torch.bfloat16)] * positional, 0.0)


# Every parameter of the three peers, at its default there.
PEER_NAMES = {
    name: default
    for module in (fa2, fa3, fa4)
    for function in (module.flash_attn_func, module.flash_attn_varlen_func)
    for name, parameter in inspect.signature(function).parameters.items()
    if (default := parameter.default) is not inspect.Parameter.empty
}
ONLY_VARLEN = {"cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "seqused_q", "seqused_k", "page_table"}
ONLY_VARLEN |= {"block_table"}


def test_every_name_of_every_peer_is_known():
    inputs = make_inputs(DENSE)
    dense = {name: default for name, default in PEER_NAMES.items() if name not in ONLY_VARLEN}
    assert len(dense) > 30
    close(flash_attn_func(inputs.q, inputs.k, inputs.v, **dense), inputs)
    packed = make_inputs(PACKED)
    rest = {name: default for name, default in PEER_NAMES.items() if "seqlen" not in name} | {"min_seqlen_k": None}
    lengths = (packed.cu_seqlens_q, packed.cu_seqlens_k, 40, 72)
    close(flash_attn_varlen_func(packed.q, packed.k, packed.v, *lengths, **rest), packed)


@pytest.mark.parametrize("name", ["return_lse", "return_attn_probs", "return_softmax_lse"])
def test_three_names_for_the_lse(name):
    inputs = make_inputs(DENSE)
    plain = flash_attn_func(inputs.q, inputs.k, inputs.v)
    assert isinstance(plain, torch.Tensor)
    out, lse = close(flash_attn_func(inputs.q, inputs.k, inputs.v, **{name: True}), inputs)
    assert (lse.shape, lse.dtype) == ((2, 4, 40), torch.float32)
    assert out.equal(plain)
    packed = make_inputs(PACKED)
    assert close(packed.run(**{name: True}), packed)[1].shape == (4, packed.q.shape[0])


@pytest.mark.parametrize("inputs", ["random", "peaked"])
@pytest.mark.parametrize(
    ("window", "causal", "same"),
    [
        ((-1, 0), False, {"causal": True}),
        ((None, 0), False, {"causal": True}),
        ((-1, -1), True, {"causal": True}),
        ((None, None), True, {"causal": True}),
        ((-1, -1), False, {}),
        ((None, None), False, {}),
        ((10**12, -1), False, {}),
        ((8, None), True, {"window_size": (8, 0)}),
        ((8, 5), True, {"window_size": (8, 0)}),
    ],
)
def test_windows(inputs, window, causal, same):
    inputs = make_inputs(DENSE, inputs)
    tensors = (inputs.q, inputs.k, inputs.v)
    out = flash_attn_func(*tensors, window_size=window, causal=causal, return_lse=True)
    close(out, inputs, **same)
    for module in (fa2, fa3):
        assert module.flash_attn_func(*tensors, window_size=window, causal=causal).equal(out[0])


EVERYTHING = InputSpec(
    batch=3,
    seqlen_q=40,
    seqlen_k=72,
    heads=4,
    heads_kv=2,
    window=(12, 3),
    sink_tokens=3,
    softcap=20.0,
    alibi=True,
    learnable_sink=True,
    varlen_q=True,
    varlen_k=True,
    seqused_q=True,
    seqused_k=True,
)


@pytest.mark.parametrize("inputs", ["random", "peaked"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"window": (3, 12)},
        {"sink_tokens": 7},
        {"softcap": 4.0},
        {"softmax_scale": 0.3},
        {"alibi": False, "alibi_per_batch": True},
        {"lengths_q": (0, 0, 40), "lengths_k": (72, 0, 0)},
        {"layout": "padded"},
        {"layout": "expanded"},
        {"heads": 6, "heads_kv": 2},
    ],
    ids=str,
)
def test_every_value_reaches_the_kernel(simulated, inputs, changes):
    """One compiled kernel: what differs is passed at run time."""
    made = make_inputs(InputSpec(**{**vars(EVERYTHING), **changes}), inputs, seed=1)
    out, lse = close(made.run(return_lse=True), made)
    assert len(simulated.launches) == 1
    row = torch.arange(out.shape[0])
    sequence = torch.searchsorted(made.cu_seqlens_q[1:], row, right=True)
    beyond = row - made.cu_seqlens_q[sequence] >= made.seqused_q[sequence]
    assert out[beyond].eq(0).all()
    assert lse[:, beyond].eq(-math.inf).all()


def test_slopes_may_be_expanded():
    inputs = make_inputs(EVERYTHING, "peaked")
    options = inputs.options() | {"max_seqlen_q": 40, "max_seqlen_k": 72}
    options["alibi_slopes"] = inputs.alibi_slopes.expand(3, -1)
    assert flash_attn_varlen_func(inputs.q, inputs.k, inputs.v, **options).equal(inputs.run())


def test_sinks_of_lower_precision_are_widened():
    inputs = make_inputs(InputSpec(**{**vars(EVERYTHING), "seqlen_k": 40}))
    sink = inputs.learnable_sink.to(torch.bfloat16)
    options = inputs.options() | {"max_seqlen_q": 40, "max_seqlen_k": 40, "return_lse": True}
    result = flash_attn_varlen_func(inputs.q, inputs.k, inputs.v, **(options | {"learnable_sink": sink}))
    close(result, inputs, learnable_sink=sink.float())


def test_mixed_layouts():
    """Packed queries against a dense cache, as in decoding."""
    spec = InputSpec(batch=3, seqlen_q=40, seqlen_k=72, varlen_q=True, seqused_k=True, causal=True)
    inputs = make_inputs(spec, "peaked", seed=2)
    out, _ = close(inputs.run(return_lse=True), inputs)
    without_bounds = flash_attn_varlen_func(
        inputs.q, inputs.k, inputs.v, inputs.cu_seqlens_q, None, None, None, seqused_k=inputs.seqused_k, causal=True
    )
    assert without_bounds.equal(out)


class TestNothingToSee:
    """Lengths of 0: right answers, and no launch where no key or no query exists."""

    @pytest.mark.parametrize("sink", [False, True])
    def test_no_keys(self, simulated, sink):
        inputs = make_inputs(InputSpec(batch=2, seqlen_q=9, seqlen_k=0, learnable_sink=sink))
        out, lse = close(inputs.run(return_lse=True), inputs)
        assert out.shape == (2, 9, 2, 64)
        assert out.eq(0).all()
        logits = inputs.learnable_sink if sink else torch.full((2,), -math.inf)
        assert lse.equal(logits[None, :, None].expand(2, 2, 9))
        assert not simulated.launches

    @pytest.mark.parametrize("packed", [False, True])
    def test_no_keys_and_seqused_q(self, simulated, packed):
        spec = InputSpec(batch=3, seqlen_q=9, seqlen_k=1, learnable_sink=True, seqused_q=True, varlen_q=packed)
        inputs = make_inputs(spec, seed=3)
        cu = torch.zeros(4, dtype=torch.int32)
        keys = inputs.k.flatten(0, 1)[:0]
        lengths = {"cu_seqlens_q": inputs.cu_seqlens_q, "cu_seqlens_k": cu, "seqused_q": inputs.seqused_q}
        options = lengths | {"learnable_sink": inputs.learnable_sink}
        out, lse = flash_attn_varlen_func(
            inputs.q, keys, keys, max_seqlen_q=9, max_seqlen_k=1, return_lse=True, **options
        )
        expected, expected_lse = reference.attention(inputs.q, keys, keys, **options)
        assert out.eq(0).all()
        assert expected.eq(0).all()
        assert lse.equal(expected_lse)
        assert lse.isinf().any()
        assert lse.isfinite().any()
        assert not simulated.launches

    def test_no_queries(self, simulated):
        inputs = make_inputs(InputSpec(seqlen_q=0))
        out, lse = inputs.run(return_lse=True)
        assert (out.shape, lse.shape) == ((2, 0, 2, 64), (2, 2, 0))
        cu_q, cu_k = torch.zeros(3, dtype=torch.int32), torch.tensor([0, 5, 9], dtype=torch.int32)
        keys = torch.randn(9, 2, 64).bfloat16()
        out, lse = flash_attn_varlen_func(keys[:0], keys, keys, cu_q, cu_k, 1, 5, return_lse=True)
        assert (out.shape, lse.shape) == ((0, 2, 64), (2, 0))
        assert not simulated.launches

    def test_rows_above_the_diagonal(self):
        inputs = make_inputs(InputSpec(seqlen_q=40, seqlen_k=9, heads=4, causal=True), "peaked")
        out, lse = close(inputs.run(return_lse=True), inputs)
        assert out[:, :31].eq(0).all()
        assert lse[:, :, :31].eq(-math.inf).all()
        assert lse[:, :, 31:].isfinite().all()


class TestOut:
    def test_is_written_and_returned(self):
        inputs = make_inputs(DENSE)
        out = torch.full_like(inputs.q, math.nan)
        result, lse = close(flash_attn_func(inputs.q, inputs.k, inputs.v, out=out, return_lse=True), inputs)
        assert result is out
        assert lse.equal(flash_attn_func(inputs.q, inputs.k, inputs.v, return_lse=True)[1])

    def test_may_have_gaps(self):
        inputs = make_inputs(DENSE)
        wide = torch.full((2, 40, 4, 80), 7.0, dtype=torch.bfloat16)
        close(flash_attn_func(inputs.q, inputs.k, inputs.v, out=wide[..., :64]), inputs)
        assert wide[..., 64:].eq(7.0).all()

    def test_may_lie_beside_the_inputs(self):
        inputs = make_inputs(InputSpec(**{**vars(DENSE), "heads": 2, "seqlen_k": 40}))
        buffer = torch.stack([inputs.q, inputs.k, inputs.v, torch.full_like(inputs.q, math.nan)])
        close(flash_attn_func(*buffer[:3], out=buffer[3]), inputs)

    def test_packed(self):
        inputs = make_inputs(PACKED)
        out = torch.full_like(inputs.q, math.nan)
        assert close(inputs.run(out=out), inputs) is out


def test_a_family_is_never_replaced():
    inputs = make_inputs(DENSE)
    close(flash_attn_func(inputs.q, inputs.k, inputs.v, family="fa2"), inputs)
    with pytest.raises(UnsupportedKeyError, match="fa4_fwd: tcgen05 exists on sm_100a and sm_103a alone; not sm_80"):
        flash_attn_func(inputs.q, inputs.k, inputs.v, family="fa4")


@pytest.mark.parametrize("persistent", ["auto", "off", PersistentMode.OFF])
@pytest.mark.parametrize("pack_gqa", [None, False])
def test_choices_of_how_change_no_bit(persistent, pack_gqa):
    for spec in (DENSE, PACKED):
        inputs = make_inputs(spec)
        assert inputs.run(persistent=persistent, pack_gqa=pack_gqa).equal(inputs.run())


ORDERS = {
    fa2.flash_attn_func: "q k v dropout_p softmax_scale causal window_size softcap alibi_slopes deterministic "
    "return_attn_probs",
    fa2.flash_attn_varlen_func: "q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k dropout_p softmax_scale "
    "causal window_size softcap alibi_slopes deterministic return_attn_probs block_table",
    fa3.flash_attn_func: "q k v softmax_scale causal qv q_descale k_descale v_descale window_size attention_chunk "
    "softcap num_splits pack_gqa deterministic sm_margin return_attn_probs",
    fa3.flash_attn_varlen_func: "q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k seqused_q seqused_k "
    "softmax_scale causal qv q_descale k_descale v_descale window_size attention_chunk softcap num_splits pack_gqa "
    "deterministic sm_margin return_attn_probs",
    fa2.flash_attn_with_kvcache: "q k_cache v_cache k v rotary_cos rotary_sin cache_seqlens cache_batch_idx "
    "cache_leftpad block_table softmax_scale causal window_size softcap rotary_interleaved alibi_slopes num_splits "
    "return_softmax_lse",
    fa3.flash_attn_with_kvcache: "q k_cache v_cache k v qv rotary_cos rotary_sin cache_seqlens cache_batch_idx "
    "cache_leftpad page_table cu_seqlens_q cu_seqlens_k_new max_seqlen_q rotary_seqlens q_descale k_descale v_descale "
    "softmax_scale causal window_size attention_chunk softcap rotary_interleaved scheduler_metadata num_splits "
    "pack_gqa sm_margin return_softmax_lse",
}


class TestCompat:
    def test_fa2(self):
        inputs = make_inputs(DENSE)
        tensors = (inputs.q, inputs.k, inputs.v)
        close(fa2.flash_attn_func(*tensors, 0.0, 0.3, True), inputs, softmax_scale=0.3, causal=True)
        out, lse, dmask = fa2.flash_attn_func(*tensors, 0.0, None, True, (-1, -1), 0.0, None, False, True)
        close((out, lse), inputs, causal=True)
        assert dmask.shape == (0,)
        packed = make_inputs(PACKED)
        lengths = (packed.cu_seqlens_q, packed.cu_seqlens_k, 40, 72)
        result = fa2.flash_attn_varlen_func(packed.q, packed.k, packed.v, *lengths, 0.0, 0.3, False)
        close(result, packed, softmax_scale=0.3)
        paged = make_inputs(InputSpec(**{**vars(PACKED), "varlen_k": False, "page_size": 16}))
        ends = torch.nn.functional.pad(paged.seqused_k.cumsum(0, dtype=torch.int32), (1, 0))
        lengths = (paged.cu_seqlens_q, ends, 40, 72)
        close(fa2.flash_attn_varlen_func(paged.q, paged.k, paged.v, *lengths, block_table=paged.page_table), paged)

    def test_fa3(self):
        inputs = make_inputs(DENSE)
        tensors = (inputs.q, inputs.k, inputs.v)
        close(fa3.flash_attn_func(*tensors, 0.3, True), inputs, softmax_scale=0.3, causal=True)
        everything = (None, True, None, None, None, None, (-1, -1), 0, 0.0, 1, None, False, 0, True)
        close(fa3.flash_attn_func(*tensors, *everything), inputs, causal=True)
        close(fa3.flash_attn_func(*tensors, pack_gqa=True, num_splits=2), inputs)
        packed = make_inputs(InputSpec(**{**vars(PACKED), "seqused_q": True, "seqused_k": True}))
        lengths = (packed.cu_seqlens_q, packed.cu_seqlens_k, 40, 72, packed.seqused_q, packed.seqused_k)
        close(fa3.flash_attn_varlen_func(packed.q, packed.k, packed.v, *lengths), packed)

    def test_fa4(self):
        inputs = make_inputs(DENSE)
        tensors = (inputs.q, inputs.k, inputs.v)
        out, lse = fa4.flash_attn_func(*tensors, None, None, 0.3, True)
        close(out, inputs, softmax_scale=0.3, causal=True)
        assert lse is None
        close(fa4.flash_attn_func(*tensors, causal=True, return_lse=True), inputs, causal=True)
        close(fa4.flash_attn_func(*tensors, pack_gqa=True)[0], inputs)
        assert fa4.flash_attn_func(inputs.q.clone().requires_grad_(), *tensors[1:])[1] is not None
        packed = make_inputs(PACKED)
        lengths = (None, packed.cu_seqlens_q, packed.cu_seqlens_k, 40, 72)
        close(fa4.flash_attn_varlen_func(packed.q, packed.k, packed.v, *lengths)[0], packed)
        close(fa4.flash_attn_varlen_func(*tensors)[0], inputs)

    @pytest.mark.parametrize("module", [fa2, fa3, fa4])
    def test_bad_calls(self, module):
        q = torch.zeros(1, 8, 1, 64, dtype=torch.bfloat16)
        with pytest.raises(ArgumentError, match="flash_attn_func: v is missing"):
            module.flash_attn_func(q, q)
        with pytest.raises(ArgumentError, match="q is given twice"):
            module.flash_attn_func(q, q, q, q=q)
        with pytest.raises(ArgumentError, match="sink_tokens: no such argument"):
            module.flash_attn_func(q, q, q, sink_tokens=4)
        with pytest.raises(ArgumentError, match="50 positional arguments"):
            module.flash_attn_func(*[q] * 50)

    @pytest.mark.parametrize(
        "function", ORDERS, ids=["fa2", "fa2-varlen", "fa3", "fa3-varlen", "fa2-kvcache", "fa3-kvcache"]
    )
    def test_orders(self, function):
        assert list(inspect.signature(function).parameters) == ORDERS[function].split()

    @pytest.mark.parametrize("name", ["flash_attn_func", "flash_attn_varlen_func"])
    def test_order_of_the_installed_fa4(self, name):
        """Read, not imported: importing it would load the DSL's runtime."""
        source = importlib.metadata.distribution("flash-attn-4").locate_file("flash_attn/cute/interface.py")
        functions = [node for node in ast.parse(source.read_text()).body if isinstance(node, ast.FunctionDef)]
        [function] = [node for node in functions if node.name == name]
        theirs = [argument.arg for argument in function.args.args]
        defaults = [ast.literal_eval(default) for default in function.args.defaults]
        ours = inspect.signature(getattr(fa4, name)).parameters
        assert list(ours) == theirs
        assert [p.default for p in ours.values()][-len(defaults) :] == defaults


def test_fp16():
    inputs = make_inputs(InputSpec(**{**vars(DENSE), "dtype": DType.FP16, "causal": True}), "peaked")
    out, _ = close(inputs.run(return_lse=True), inputs)
    assert out.dtype is torch.float16
