"""The serving operators on simulated GPUs: output against the reference, caches bit for bit against plain torch."""

import dataclasses

import pytest
import torch
from torch import library
from torch._subclasses import FakeTensorMode
from torch.nn.functional import scaled_dot_product_attention

import cute_fa
from cute_fa.engine import worlds
from cute_fa.integrations import auto_deploy
from cute_fa.semantics import reference
from cute_fa.semantics.errors import (
    CacheIndexError,
    CuteFaError,
    DTypeError,
    EmptyCacheError,
    LengthError,
    NoBackwardError,
    PageTableError,
    ShapeError,
    UnsupportedArgumentError,
)
from cute_fa.semantics.types import DType
from cute_fa.tools.inputs import Inputs, InputSpec, make_inputs
from tests.testing.caches import Append, Rotary, after, places, rotated_queries, take_last
from tests.testing.simulated import unwritten_is_nan

OPERATORS = torch.ops.cute_fa
# (tokens in the cache, new ones) of each sequence: context, generate, padding, a context that goes on over two pages
MIXED = ((0, 21), (17, 1), (0, 0), (13, 12), (30, 1))
GENERATE = ((17, 1), (0, 1), (5, 0), (31, 1))
SMALL = ((3, 2), (0, 0))
ROOM = 32


@pytest.fixture(params=["sm_80"])
def arch(request):
    with cute_fa.simulate(request.param, race=True), unwritten_is_nan():
        yield request.param


@dataclasses.dataclass
class Step:
    """One step of a server. ``given``: the sequences with their new tokens in the cache already, which ``append`` takes
    out again; ``cache_loc``: their places in it, or the rows of ``page_table``; ``rows``: where the new tokens lie
    among those of q, k and v."""

    given: Inputs
    append: Append
    rotary: Rotary | None
    freqs_cis: torch.Tensor | None
    cache_loc: torch.Tensor
    rows: torch.Tensor
    tensors: dict[str, torch.Tensor]

    def call(self, operator: str, **changes) -> torch.Tensor:
        return getattr(auto_deploy, operator)(**self.arguments(operator, **changes))

    def arguments(self, operator: str, **changes) -> dict:
        known = {
            **self.tensors,
            "k_cache": self.append.k_cache,
            "v_cache": self.append.v_cache,
            "freqs_cis": self.freqs_cis,
            "cache_loc": self.cache_loc,
            "max_seq_len": ROOM,
            "scale": None,
            **changes,
        }
        schema = getattr(OPERATORS, operator).default._schema
        return {argument.name: known[argument.name] for argument in schema.arguments}

    def check(self, out: torch.Tensor) -> None:
        """The caches, and the output of the new tokens; 0 for rows that belong to no sequence."""
        self.append.check()
        q = self.given.q
        if self.rotary is not None:
            q = rotated_queries(self.given, self.rotary, self.append.cache_seqlens.tolist())
        whole = after(self.given, self.append, q)
        k, v = whole.k, whole.v
        if whole.page_table is None:
            k, v = (cache[self.cache_loc] for cache in (k, v))
        expected = reference.expected(q, k, v, **whole.options())
        out = out.flatten(0, 1).unflatten(1, (q.shape[1], -1))
        comparison = expected.check(out[self.rows])
        assert comparison.ok, comparison
        others = torch.ones(out.shape[0], dtype=torch.bool)
        others[self.rows] = False
        assert not out[others].any()


def make_step(
    sequences=MIXED, page_size=None, rotary: Rotary | None = None, flattened=True, head_dim_v=64, padding=0
) -> Step:
    """``flattened``: one row, with ``padding`` tokens behind the last sequence; else one token for each sequence."""
    cached, new = ([sequence[i] for sequence in sequences] for i in (0, 1))
    batch = len(new)
    spec = InputSpec(
        *(batch, max(new), ROOM, 4, 2, 64),
        head_dim_v=head_dim_v,
        causal=True,
        varlen_q=True,
        seqused_k=page_size is None,
        page_size=page_size,
        lengths_q=tuple(new),
        lengths_k=tuple(map(sum, sequences)),
    )
    given = make_inputs(spec, "peaked", seed=5)
    order = torch.randperm(batch + 1, generator=torch.Generator().manual_seed(1))
    cache_loc = order[:batch].to(torch.int32)  # one place is nobody's
    index, tables = None, {}
    if page_size is None:
        index = cache_loc
        k, v = (torch.cat([t, torch.full_like(t[:1], torch.nan)])[order.argsort()] for t in (given.k, given.v))
        given = dataclasses.replace(given, k=k, v=v)
    else:
        tables["page_table"] = torch.full((batch + 1, given.page_table.shape[1]), -1, dtype=torch.int32)
        tables["page_table"][cache_loc] = given.page_table
    if rotary is not None:  # so that what is rotated is peaked
        back = dataclasses.replace(rotary, sin=-rotary.sin)
        given = dataclasses.replace(given, q=rotated_queries(given, back, cached))
        for b, (before, count) in enumerate(sequences):
            at = places(given, b, range(before, before + count), index)
            given.k[at] = back(given.k[at], torch.arange(before, before + count))
    append = take_last(given, new, packed=True, rotary=rotary, index=index)
    lengths = torch.tensor(new, dtype=torch.int32)
    rows = torch.arange(sum(new)) if flattened else lengths.nonzero().flatten()
    flat = {}
    for name, packed in (("q", given.q), ("k", append.k), ("v", append.v)):
        whole = torch.full((sum(new) + padding if flattened else batch, *packed.shape[1:]), torch.nan)
        whole[rows] = packed.float()
        flat[name] = whole.to(packed.dtype).flatten(1).unsqueeze(0 if flattened else 1)
    starts = (lengths.cumsum(0) - lengths).to(torch.int32)
    tensors = {**flat, **tables, "input_pos": append.cache_seqlens, "seq_len": lengths, "seq_start": starts}
    freqs_cis = None if rotary is None else torch.stack((rotary.cos, rotary.sin), -1)
    return Step(given, append, rotary, freqs_cis, cache_loc, rows, tensors)


HALVES = Rotary.random(ROOM, 64)
FLATTENED, PAGED = "fused_flattened_mha_with_cache", "fused_mha_with_paged_cache"
FUSION = "fused_flattened_mha_with_cache_rope_fusion"
CASES = {
    "flattened": (FLATTENED, {"rotary": HALVES}),
    "flattened, generate": (FLATTENED, {"rotary": HALVES, "sequences": GENERATE, "flattened": False}),
    "flattened, other head_dim_v, padded": (FLATTENED, {"head_dim_v": 32, "padding": 5}),
    "fusion": (FUSION, {"rotary": HALVES, "padding": 2}),
    "paged": (PAGED, {"page_size": 8, "rotary": HALVES, "padding": 2}),
    "paged, generate": (PAGED, {"page_size": 8, "rotary": HALVES, "sequences": GENERATE, "flattened": False}),
    "paged, partly rotated by fp16": (PAGED, {"page_size": 8, "rotary": Rotary.random(ROOM, 32, torch.float16)}),
}


@pytest.mark.sampled
@pytest.mark.parametrize("case", CASES)
def test_operators(arch, case):
    operator, choices = CASES[case]
    step = make_step(**choices)
    step.check(step.call(operator))


@pytest.mark.parametrize("arch", ["sm_90a"], indirect=True)
def test_hopper(arch):
    test_operators(arch, "paged")


@pytest.mark.parametrize("tokens", [1, 3])
def test_sequences_of_one_length(arch, tokens):
    """Without an index: sequence i is number i of a cache that has room for more; new tokens follow cached ones."""
    sequences = ((0, tokens), (17, tokens), (29, tokens))
    step = make_step(sequences, rotary=HALVES)
    step.cache_loc = torch.arange(3, dtype=torch.int32)
    inverse = make_step(sequences, rotary=HALVES).cache_loc.long()
    for holder, names in ((step.given, ("k", "v")), (step.append, ("k_cache", "v_cache", "k_after", "v_after"))):
        for name in names:
            whole = getattr(holder, name)
            rest = [row for row in range(4) if row not in inverse.tolist()]
            object.__setattr__(holder, name, whole[[*inverse.tolist(), *rest]].clone())
    flat = {name: step.tensors[name].view(3, tokens, -1) for name in "qkv"}
    out = step.call("fused_mha_with_cache", **flat)
    assert out.shape == (3, tokens, 4 * 64)
    step.check(out)


def flat_changes(step: Step, **changes) -> dict:
    """Tensors of a step with some elements replaced: name → {index: value}."""
    replaced = {}
    for name, values in changes.items():
        replaced[name] = (step.cache_loc if name == "cache_loc" else step.tensors[name]).clone()
        for index, value in values.items():
            replaced[name][index] = value
    return replaced


def split_heads(step: Step, name: str, heads: int) -> dict:
    return {name: step.tensors[name].unflatten(2, (heads, -1))}


@pytest.mark.parametrize("operator", [FLATTENED, FUSION, PAGED])
@pytest.mark.parametrize("sequences", [((9, 0), (17, 1), (0, 0)), ((9, 0), (0, 0))], ids=["one token", "none"])
def test_sequences_without_tokens(arch, operator, sequences):
    """Also one token alone among them, which is no generate-only batch, and a row that holds padding alone."""
    step = make_step(sequences, 8 if operator == PAGED else None, HALVES, padding=0 if max(sequences)[1] else 3)
    step.check(step.call(operator))


EMPTY_STEPS = [
    (operator, shape, batch)
    for operator in (FLATTENED, FUSION, PAGED)
    for shape, batch in (((1, 0), 2), ((0, 1), 2), ((0, 1), 0), ((0, 0), 0), ((1, 3), 0))
]
EMPTY_STEPS += [("fused_mha_with_cache", (b, s), b) for b, s in ((2, 0), (0, 1), (0, 0))]


@pytest.mark.parametrize(("operator", "shape", "batch"), EMPTY_STEPS)
def test_steps_without_tokens(operator, shape, batch):
    """No kernel runs, no cache is touched; rows that belong to no sequence are 0."""
    step = make_step(SMALL, 8 if operator == PAGED else None, HALVES, head_dim_v=32)
    tokens = {name: torch.full((*shape, *step.tensors[name].shape[2:]), torch.nan).bfloat16() for name in "qkv"}
    metadata = dict.fromkeys(("seq_len", "seq_start"), torch.zeros(batch, dtype=torch.int32))
    metadata |= {"input_pos": step.tensors["input_pos"][:batch], "cache_loc": step.cache_loc[:batch]}
    before = step.append.k_cache.clone(), step.append.v_cache.clone()
    with cute_fa.simulate("sm_80") as simulation:
        out = step.call(operator, **tokens, **metadata, max_seq_len=0 if batch == 0 else ROOM)
        apart = {name: tokens[name].unflatten(2, (-1, 32 if name == "v" else 64)) for name in "qkv"}
        assert step.call(operator, **apart, **metadata).shape == (*shape, 4, 32)
    assert out.equal(torch.zeros(*shape, 4 * 32, dtype=torch.bfloat16))
    assert not simulation.launches
    for cache, same in zip((step.append.k_cache, step.append.v_cache), before, strict=True):
        torch.testing.assert_close(cache, same, atol=0, rtol=0, equal_nan=True)


@pytest.mark.parametrize("operator", ["fused_mha_with_cache", FLATTENED, FUSION, PAGED])
def test_other_forms_of_arguments(operator):
    """Heads apart, offsets as torch.cumsum gives them, a scale, and no rotation by leaving it out."""
    one_each = operator == "fused_mha_with_cache"
    sequences = GENERATE[:2] if one_each else MIXED
    step = without_nan(make_step(sequences, 8 if operator == PAGED else None, flattened=not one_each))
    caches = [(step.append.k_cache.clone(), step.append.v_cache.clone()) for _ in range(2)]
    forms = {name: step.tensors[name].unflatten(2, (-1, 64)) for name in "qkv"}
    forms |= {"seq_start": step.tensors["seq_start"].long(), "scale": 0.25}
    plain = {"q": 2 * step.tensors["q"], "scale": None}
    results = []
    with cute_fa.simulate("sm_80"), torch.no_grad():
        for (k_cache, v_cache), changes in zip(caches, (forms, plain), strict=True):
            arguments = step.arguments(operator, **changes, k_cache=k_cache, v_cache=v_cache)
            del arguments["freqs_cis"]
            results.append(getattr(auto_deploy, operator)(**arguments))
    assert results[0].shape == forms["q"].shape
    torch.testing.assert_close(results[0].flatten(2), results[1], atol=0, rtol=0)
    torch.testing.assert_close(*caches, atol=0, rtol=0)


BAD = {
    "heads of q": (FLATTENED, ShapeError, "multiple of k_cache's 2 heads", lambda s: {"q": s.tensors["q"][..., :192]}),
    "heads of k": (FLATTENED, ShapeError, r"k \(1, 35, 64\)", lambda s: {"k": s.tensors["k"][..., :64]}),
    "head_dim of v": (PAGED, ShapeError, r"v \(1, 35, 64\)", lambda s: {"v": s.tensors["v"][..., :64]}),
    "q is flat": (FLATTENED, ShapeError, "heads · head_dim", lambda s: {"q": s.tensors["q"][0]}),
    "five dimensions": (FLATTENED, ShapeError, "heads · head_dim", lambda s: {"q": s.tensors["q"][None, None]}),
    "q's heads apart": (FLATTENED, ShapeError, r"q \(1, 35, 8, 32\)", lambda s: split_heads(s, "q", 8)),
    "k's heads apart": (FLATTENED, ShapeError, r"k \(1, 35, 4, 32\)", lambda s: split_heads(s, "k", 4)),
    "no tokens": (FLATTENED, CuteFaError, "decrease", lambda s: {n: s.tensors[n][:0] for n in "qkv"}),
    "dtype of the cache": (FLATTENED, DTypeError, "k is", lambda s: {"k": s.tensors["k"].half()}),
    "dtype of q": (PAGED, DTypeError, "k_cache is bfloat16: q is float16", lambda s: {"q": s.tensors["q"].half()}),
    "dtype of lengths": (FLATTENED, DTypeError, "seq_len", lambda s: {"seq_len": s.tensors["seq_len"].long()}),
    "lengths": (PAGED, ShapeError, "seq_start", lambda s: {"seq_start": s.tensors["seq_start"][:3]}),
    "freqs_cis": (FUSION, ShapeError, r"rotary_dim / 2, 2", lambda s: {"freqs_cis": torch.ones(32, 32, 3)}),
    "partial rotation": (FUSION, ShapeError, "multiple of 16", lambda s: {"freqs_cis": torch.ones(32, 5, 2)}),
    "positions": (FUSION, LengthError, "rotates by positions", lambda s: {"freqs_cis": torch.ones(9, 32, 2)}),
    "no pages": (PAGED, EmptyCacheError, "no pages", lambda s: {"k_cache": s.append.k_cache[:0]}),
    "no length": (PAGED, LengthError, "the 8 tokens", lambda s: {"max_seq_len": 0}),
    "below no length": (PAGED, LengthError, "max_seq_len=-1", lambda s: {"max_seq_len": -1}),
    "starts": (FLATTENED, DTypeError, "seq_start", lambda s: {"seq_start": s.tensors["seq_start"].short()}),
    "a place": (FLATTENED, CacheIndexError, "=6", lambda s: flat_changes(s, cache_loc={1: 6})),
    "a row": (PAGED, CacheIndexError, r"cache_loc\[1\]=6", lambda s: flat_changes(s, cache_loc={1: 6})),
    "a page": (PAGED, PageTableError, "page 99", lambda s: flat_changes(s, page_table={(s.cache_loc[3], 3): 99})),
    "room": (FLATTENED, LengthError, "room for 32", lambda s: flat_changes(s, input_pos={3: 21})),
    "max_seq_len": (PAGED, LengthError, "the 16 tokens", lambda s: {"max_seq_len": 16}),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_input_writes_nothing(bad):
    operator, error, message, changes = BAD[bad]
    step = make_step(page_size=8 if operator == PAGED else None)
    before = step.append.k_cache.clone(), step.append.v_cache.clone()
    with cute_fa.simulate("sm_80") as simulation, pytest.raises(error, match=message):
        step.call(operator, **changes(step))
    assert not simulation.launches
    for cache, same in zip((step.append.k_cache, step.append.v_cache), before, strict=True):
        torch.testing.assert_close(cache, same, atol=0, rtol=0, equal_nan=True)


def test_a_cache_for_fewer_sequences():
    step = make_step(((0, 1),) * 5, flattened=False)
    few = {name: getattr(step.append, name)[:4] for name in ("k_cache", "v_cache")}
    with cute_fa.simulate("sm_80"), pytest.raises(ShapeError, match="a place for each of the 5 sequences of q"):
        step.call("fused_mha_with_cache", **few)


def test_no_gradient():
    """Refused at once, and not differentiated wrongly later."""
    step = make_step(((0, 1),) * 3, flattened=False, rotary=HALVES)
    step.tensors["q"].requires_grad_()
    query, key, value = sdpa_inputs(4, 4)
    with cute_fa.simulate("sm_80") as simulation:
        with pytest.raises(NoBackwardError, match="requires a gradient"):
            step.call("fused_mha_with_cache")
        with pytest.raises(NoBackwardError, match="requires a gradient"):
            auto_deploy.scaled_dot_product_attention(query, key, value.requires_grad_())
        assert not simulation.launches
        with torch.no_grad():
            assert not step.call("fused_mha_with_cache").requires_grad


PAD = {"sequences": SMALL, "rotary": HALVES, "padding": 1}


def without_nan(step: Step) -> Step:
    """With numbers in the place of all that may be NaN: tools compare with what does not equal itself."""
    for holder in (step.tensors, vars(step.append)):
        for tensor in holder.values():
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                tensor.nan_to_num_()
    return step


@pytest.mark.parametrize(
    ("operator", "choices"),
    [
        ("fused_mha_with_cache", {"sequences": ((3, 1), (9, 1)), "rotary": HALVES, "flattened": False}),
        (FLATTENED, PAD),
        (FUSION, PAD),
        (PAGED, {**PAD, "page_size": 8}),
    ],
)
def test_opcheck(operator, choices):
    step = without_nan(make_step(**choices))
    caches = step.append.k_cache, step.append.v_cache
    before = [cache.clone() for cache in caches]
    with cute_fa.simulate("sm_80"):
        library.opcheck(getattr(OPERATORS, operator).default, tuple(step.arguments(operator).values()))
    schema = {argument.name: argument for argument in getattr(OPERATORS, operator).default._schema.arguments}
    written = {name for name, argument in schema.items() if argument.alias_info and argument.alias_info.is_write}
    assert written == {"k_cache", "v_cache"}
    assert all(torch.equal(cache, same) for cache, same in zip(caches, before, strict=True))


def test_fakes():
    """Shapes and dtypes without a device, and none of the values."""
    with FakeTensorMode() as mode:
        for operator, choices in (
            (FLATTENED, {"head_dim_v": 32, "padding": 1}),
            (FLATTENED, {"head_dim_v": 32, "sequences": GENERATE, "flattened": False}),
            (FUSION, {"rotary": HALVES}),
            (PAGED, {"page_size": 8}),
        ):
            with torch.utils._python_dispatch._disable_current_modes():
                step = make_step(**choices)
            arguments = {
                name: mode.from_tensor(value) if isinstance(value, torch.Tensor) else value
                for name, value in step.arguments(operator).items()
            }
            out = getattr(auto_deploy, operator)(**arguments)
            assert out.shape == (*arguments["q"].shape[:2], 4 * choices.get("head_dim_v", 64))
            assert out.dtype == torch.bfloat16
            with pytest.raises(ShapeError, match="multiple of k_cache's"):
                getattr(auto_deploy, operator)(**{**arguments, "q": arguments["q"][..., :192]})


def test_no_value_is_read(monkeypatch):
    """By default, of the operators and of those that prepare metadata."""

    def refuse(*_):
        raise AssertionError("a value of a tensor was read")

    steps = [(FLATTENED, make_step(rotary=HALVES)), (PAGED, make_step(page_size=8))]
    steps[1][1].freqs_cis = torch.empty(0)  # how a graph says that nothing rotates
    sequences = auto_deploy.SequenceInfo(32, 4, 8)
    with cute_fa.simulate("sm_80"), monkeypatch.context() as patch:
        patch.setattr(worlds, "checks_values", lambda: False)
        for method in ("item", "tolist", "cpu", "numpy", "__int__", "__bool__", "__index__", "__float__"):
            patch.setattr(torch.Tensor, method, refuse)
        outs = [step.call(operator) for operator, step in steps]
        sequences.nest_sequences([[1, 2], [3]])
        sequences.assign_cache_loc([[3], [1]])
        sequences.update_pos([4, 5])
        assert sequences.page_assignments == [[3], [1]]
        auto_deploy.prepare_fused_mha_metadata(*sequences.args, 8)
        auto_deploy.prepare_paged_mha_metadata(*sequences.args, 8)
    for (_, step), out in zip(steps, outs, strict=True):
        step.check(out)


def sdpa_inputs(seqlen_q: int, seqlen_k: int) -> list[torch.Tensor]:
    """query, key and value in torch's layout."""
    given = make_inputs(InputSpec(2, seqlen_q, seqlen_k, 4, 2, 64, dtype=DType.FP16), "peaked")
    return [t.transpose(1, 2) for t in (given.q, given.k, given.v)]


@pytest.mark.parametrize(("lengths", "is_causal"), [((20, 50), False), ((20, 50), True), ((50, 20), True)])
def test_scaled_dot_product_attention(arch, lengths, is_causal):
    """torch's own, also where the lengths differ: its diagonal starts at the first key."""
    query, key, value = sdpa_inputs(*lengths)
    out = auto_deploy.scaled_dot_product_attention(query, key, value, None, 0.0, is_causal, 0.1)
    key, value = (t.repeat_interleave(2, 1) for t in (key, value))
    expected = scaled_dot_product_attention(*(t.double() for t in (query, key, value)), is_causal=is_causal, scale=0.1)
    torch.testing.assert_close(out.double(), expected, atol=4e-3, rtol=0)


def test_scaled_dot_product_attention_refuses():
    tensors = sdpa_inputs(4, 4)
    with cute_fa.simulate("sm_80"):
        for change in ({"attn_mask": torch.ones(4, 4)}, {"dropout_p": 0.1}):
            with pytest.raises(UnsupportedArgumentError, match=next(iter(change))):
                auto_deploy.scaled_dot_product_attention(*tensors, **change)
        with pytest.raises(ShapeError, match="query has shape"):
            auto_deploy.scaled_dot_product_attention(tensors[0][0], *tensors[1:])
        library.opcheck(OPERATORS.scaled_dot_product_attention.default, tuple(tensors), {"is_causal": True})


def model(step: Step, hidden: torch.Tensor, sequences: tuple, k_cache, v_cache) -> torch.Tensor:
    """A decode step: metadata once, then two layers that share them."""
    metadata = auto_deploy.prepare_paged_mha_metadata(*sequences, 8, ROOM)
    for k_layer, v_layer in zip(k_cache, v_cache, strict=True):
        qkv = [hidden * step.tensors[name] for name in "qkv"]
        out = auto_deploy.fused_mha_with_paged_cache(*qkv, *metadata, k_layer, v_layer, step.freqs_cis)
        hidden = hidden + out.mean(-1, keepdim=True)
    return hidden


def test_compile():
    """A whole decode step in one graph, its caches written as without."""
    torch._dynamo.reset()
    step = without_nan(make_step(GENERATE, 8, HALVES, flattened=False))
    tables = step.tensors["page_table"][step.cache_loc.long()]
    pages = -(-(step.tensors["input_pos"] + step.tensors["seq_len"]) // 8)
    sequences = (
        torch.zeros(4, 1, dtype=torch.int32),
        *(step.tensors[name] for name in ("seq_len", "input_pos")),
        *(torch.cat([row[:count] for row, count in zip(tables, pages, strict=True)]), pages),
    )
    traced = torch.compile(model, fullgraph=True, backend="aot_eager")
    results = []
    with cute_fa.simulate("sm_80"), torch.no_grad():
        for run in (model, traced):
            caches = [[getattr(step.append, f"{name}_cache").clone() for _ in range(2)] for name in "kv"]
            hidden = torch.ones(4, 1, 1, dtype=torch.bfloat16)
            results.append([run(step, hidden, sequences, *caches), *caches[0], *caches[1]])
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager, compiled)
    assert not torch.equal(results[0][1], step.append.k_cache)
