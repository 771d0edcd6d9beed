"""Keys and values in pages: from the public functions to the launch, and through the kernel that serves them."""

import dataclasses

import pytest
import torch
from torch import library
from torch._subclasses.fake_tensor import FakeTensorMode

import cute_fa
from cute_fa import flash_attn_varlen_func
from cute_fa.compat import fa2, fa4
from cute_fa.engine import plan as plans
from cute_fa.engine.contract import AttentionTensors
from cute_fa.semantics import reference
from cute_fa.semantics.call import Call, Extras
from cute_fa.semantics.errors import (
    CumulativeSeqlensError,
    CuteFaError,
    DTypeError,
    LengthError,
    PageTableError,
    ShapeError,
)
from cute_fa.semantics.types import DType
from cute_fa.tools.inputs import InputSpec, make_inputs
from fa3_sm90.forward.entry import Fa3Forward

SPEC = InputSpec(batch=3, seqlen_q=20, seqlen_k=50, heads=4, heads_kv=2, page_size=8, causal=True)
PACKED = dataclasses.replace(SPEC, varlen_q=True)


@pytest.fixture
def launches(monkeypatch):
    """(problem, tensors) of every launch on sm_90a, which computes the reference instead of running the kernel."""
    made = []

    class Kernel:
        def launch(self, arguments):
            problem = arguments[0]
            *given, extras, scratch = arguments[2]
            tensors = AttentionTensors(*given, Extras(*extras))
            made.append((problem, tensors))
            given = tensors._asdict()
            assert given.pop("scratch") == scratch == ()
            given |= {name: tensor for name, tensor in given.pop("extras")._asdict().items() if tensor is not None}
            out, lse = given.pop("out"), given.pop("lse")
            assert given.keys().isdisjoint(("cache_batch_idx", "cache_leftpad"))
            window = problem.window_left, problem.window_right
            result = reference.attention(**given, window_size=window, softmax_scale=problem.softmax_scale)
            for tensor, value in zip((out, lse), result, strict=True):
                tensor.copy_(value)

    monkeypatch.setattr(plans, "compiled", lambda config: Kernel())
    monkeypatch.setattr(Fa3Forward, "arguments", classmethod(lambda cls, *arguments: arguments[:3]))
    monkeypatch.setattr(plans, "PLANS", {})
    with cute_fa.simulate("sm_90a"):
        yield made


def call(inputs, **changes):
    """(out, lse) of the varlen function; ``changes`` replace what the inputs would be called with."""
    options = inputs.options() | {"max_seqlen_q": inputs.spec.seqlen_q, "max_seqlen_k": inputs.spec.seqlen_k}
    tensors = [changes.pop(name, getattr(inputs, name)) for name in "qkv"]
    return flash_attn_varlen_func(*tensors, **options | changes, return_lse=True)


def assert_right(result, inputs, **changes):
    comparison = reference.check(*result, inputs.q, inputs.k, inputs.v, **inputs.options() | changes)
    assert comparison.ok, comparison


@pytest.mark.parametrize("spec", [SPEC, PACKED], ids=["dense", "packed"])
def test_lengths(launches, spec):
    """seqused_k, or the differences of cu_seqlens_k, or else every slot that the table has."""
    inputs = make_inputs(spec, "peaked", seed=3)
    used = inputs.seqused_k
    offsets = torch.cat([torch.zeros(1), used.cumsum(0)]).int()
    nowhere = torch.full_like(offsets, -1)  # seqused_k wins
    assert_right(call(inputs), inputs)
    for changes in ({"seqused_k": None, "cu_seqlens_k": offsets}, {"cu_seqlens_k": nowhere}):
        assert all(map(torch.equal, call(inputs, **changes), call(inputs)))
    whole = dataclasses.replace(spec, seqlen_k=56, seqused_k=True, lengths_k=(56, 56, 56))
    inputs = dataclasses.replace(make_inputs(whole, "peaked", seed=3), seqused_k=None)
    for longest in (None, 56, 1000):
        assert_right(call(inputs, max_seqlen_k=longest), inputs)
    for problem, tensors in launches:
        assert (tensors.extras.cu_seqlens_k, problem.varlen_k) == (None, False)
        assert problem.page_size == 8
        assert problem.varlen_q is (spec is PACKED)
        assert problem.seqused_k is (tensors.extras.seqused_k is not None)
        assert tensors.extras.page_table.shape == (3, 7)
    assert [problem.seqlen_k for problem, _ in launches] == [*[50] * 5, *[56] * 3]
    assert [tensors.extras.seqused_k is None for _, tensors in launches] == [*[False] * 5, *[True] * 3]
    with pytest.raises(LengthError, match="max_seqlen_k=55: without seqused_k each sequence has the 56 tokens"):
        call(inputs, max_seqlen_k=55)


def test_names_of_the_peers(launches):
    inputs = make_inputs(PACKED, "peaked", seed=6)
    tensors, lengths = (inputs.q, inputs.k, inputs.v), {"max_seqlen_q": 20, "max_seqlen_k": 50}
    offsets = torch.cat([torch.zeros(1), inputs.seqused_k.cumsum(0)]).int()
    expected = call(inputs)[0]
    lengths["cu_seqlens_q"] = inputs.cu_seqlens_q
    out = fa2.flash_attn_varlen_func(
        *tensors, **lengths, cu_seqlens_k=offsets, block_table=inputs.page_table, causal=True
    )
    assert out.equal(expected)
    pages = {"seqused_k": inputs.seqused_k, "page_table": inputs.page_table}
    assert fa4.flash_attn_varlen_func(*tensors, **lengths, **pages, causal=True)[0].equal(expected)
    assert flash_attn_varlen_func(
        *tensors, **lengths, cu_seqlens_k=None, seqused_k=pages["seqused_k"], block_table=inputs.page_table, causal=True
    ).equal(expected)
    assert len(launches) == 4


def test_a_table_may_have_room_for_more(launches):
    """As a serving engine allocates it: for the longest context there may ever be, cut out of a wider table."""
    inputs = make_inputs(SPEC, "peaked", seed=1)
    wide = torch.full((5, 40), -1, dtype=torch.int32)
    wide[:3, :7] = inputs.page_table
    assert_right(call(inputs, page_table=wide[:3, :20]), inputs)
    [(problem, tensors)] = launches
    assert problem.seqlen_k == 50
    assert (tensors.extras.page_table.shape, tensors.extras.page_table.stride()) == ((3, 20), (40, 1))
    call(inputs, page_table=wide[:3], max_seqlen_k=None)
    assert launches[-1][0].seqlen_k == 320


def test_caches_cut_out_of_larger_ones(launches):
    """K and V of a page beside each other, heads before tokens, and pages of another layer in between."""
    inputs = make_inputs(SPEC, "peaked", seed=2)
    pages = inputs.k.shape[0]
    beside = torch.stack([inputs.k, inputs.v], dim=1)
    heads_first = torch.stack([inputs.k, inputs.v]).transpose(2, 3).contiguous().transpose(2, 3)
    layers = torch.full((3 * pages, *inputs.k.shape[1:]), torch.nan).bfloat16()
    layers[1::3] = inputs.k
    for k, v in (beside.unbind(1), heads_first.unbind(0), (layers[1::3], inputs.v)):
        assert all(map(torch.equal, call(inputs, k=k, v=v), call(inputs)))
        _, tensors = launches[-2]
        assert (tensors.k.stride(), tensors.v.stride()) == (k.stride(), v.stride())


def test_one_page_may_have_any_stride(launches):
    spec = InputSpec(batch=1, seqlen_q=8, seqlen_k=16, heads=1, heads_kv=1, page_size=16, lengths_k=(16,))
    made = make_inputs(spec, "peaked")
    [page] = made.page_table[0].tolist()
    one = dataclasses.replace(made, k=made.k[page, None], v=made.v[page, None], page_table=torch.zeros(1, 1).int())
    odd = {name: getattr(one, name).as_strided((1, 16, 1, 64), (3, 64, 5, 1)) for name in "kv"}
    assert_right(call(one, **odd), one)
    assert [tensor.stride() for tensor in launches[0][1][1:3]] == [(0, 64, 0, 1)] * 2


def test_no_queries_launch_nothing(launches):
    inputs = make_inputs(PACKED)
    nobody = torch.zeros(4, dtype=torch.int32)
    out, lse = call(inputs, q=inputs.q[:0], cu_seqlens_q=nobody)
    assert (out.shape, lse.shape) == ((0, 4, 64), (4, 0))
    assert not launches


@pytest.mark.parametrize("spec", [SPEC, PACKED], ids=["dense", "packed"])
def test_operators(launches, spec):
    inputs = make_inputs(spec, seed=5)
    lengths = {name: getattr(inputs, name) for name in ("cu_seqlens_q", "seqused_k", "page_table")}
    longest = {"max_seqlen_q": 20, "max_seqlen_k": 50}
    arguments = Call.made(inputs.q, inputs.k, inputs.v, **lengths, **longest, window_right=0).flat()
    library.opcheck(torch.ops.cute_fa.attention.default, arguments)
    library.opcheck(torch.ops.cute_fa.attention_out.default, (*arguments, torch.empty_like(inputs.q)))
    torch._dynamo.reset()
    traced = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, traced(inputs), call(inputs)))
    with FakeTensorMode(allow_non_fake_inputs=True):
        out, lse = call(inputs, v=torch.empty(*inputs.v.shape[:3], 32, dtype=torch.bfloat16))
    assert out.shape == (*inputs.q.shape[:-1], 32)
    assert lse.shape == ((4, inputs.q.shape[0]) if spec is PACKED else (3, 4, 20))


def table(inputs, row: int, column: int, page: int):
    changed = inputs.page_table.clone()
    changed[row, column] = page
    return changed


# of 50, 31 and 0 keys in pages of 8
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (lambda i: {"seqused_k": i.seqused_k + 7}, LengthError, r"seqused_k\[0\]=57: between 0 and the 56 tokens"),
        (lambda i: {"seqused_k": i.seqused_k - 1}, LengthError, r"seqused_k\[2\]=-1"),
        (lambda i: {"max_seqlen_k": 49}, LengthError, "max_seqlen_k=49: a sequence has 50 tokens"),
        (lambda i: {"page_table": table(i, 0, 6, 12)}, PageTableError, r"\[0\] lists page 12: .* has 12 pages"),
        (lambda i: {"page_table": table(i, 1, 3, -1)}, PageTableError, r"page_table\[1\] lists page -1"),
        (lambda i: {"page_table": table(i, 0, 6, 12), "max_seqlen_k": None, "seqused_k": None}, PageTableError, "12"),
        (lambda i: {"seqused_k": None, "cu_seqlens_k": torch.zeros(4)}, DTypeError, "cu_seqlens_k is float32: int32"),
        (lambda i: {"seqused_k": None, "cu_seqlens_k": torch.zeros(4, 1).int()}, ShapeError, "cu_seqlens_k has shape"),
        (lambda i: {"seqused_k": i.seqused_k[:2]}, ShapeError, r"seqused_k \(2,\): \(3,\) is needed"),
        (lambda i: {"cu_seqlens_q": i.cu_seqlens_q + 1}, CumulativeSeqlensError, r"cu_seqlens_q\[0\]=1"),
    ],
)
def test_bad_values_launch_nothing(launches, changes, error, message):
    inputs = make_inputs(PACKED)
    assert (inputs.seqused_k.tolist(), inputs.k.shape[0]) == ([50, 31, 0], 12)
    with pytest.raises(CuteFaError, match=message) as caught:
        call(inputs, **changes(inputs))
    assert type(caught.value) is error
    assert not launches


@pytest.mark.parametrize("page", [-7, 12, 2**31 - 1])
def test_entries_beyond_the_lengths_may_be_anything(launches, page):
    inputs = make_inputs(PACKED)
    assert all(map(torch.equal, call(inputs, page_table=table(inputs, 1, 4, page)), call(inputs)))


@pytest.mark.sampled
@pytest.mark.parametrize("page_size", [8, 256, 1024])
def test_through_the_kernel(page_size):
    """Public function to PTX: a table with room for more, one page more than is used, lengths of every kind."""
    spec = dataclasses.replace(PACKED, page_size=page_size, seqlen_k=300)
    inputs = make_inputs(spec, "peaked", seed=4)
    with cute_fa.simulate("sm_90a", num_sms=2) as simulation:
        result = inputs.run(return_lse=True)
        assert_right(result, inputs)
        wide = torch.full((3, 64), -1, dtype=torch.int32)
        wide[:, : inputs.page_table.shape[1]] = inputs.page_table
        assert all(map(torch.equal, call(inputs, page_table=wide), result))
        rows = max(512, page_size)
        full = dataclasses.replace(spec, seqlen_k=rows, lengths_k=(rows, rows, rows))
        whole = dataclasses.replace(make_inputs(full, "peaked"), seqused_k=None)
        assert_right(call(whole), whole)
    assert [launch.grid for launch in simulation.launches] == [(2, 1, 1)] * 3


@pytest.mark.sampled
@pytest.mark.parametrize(("arch", "kernel"), [("sm_90a", "Fa3DecodeKernel"), ("sm_100a", "Fa2SplitKernel")])
@pytest.mark.parametrize("page_size", [1, 2, 4])
def test_small_pages_of_a_prompt_are_read_row_by_row(arch, kernel, page_size):
    """TMA does not load them, of queries in fp8 neither."""
    spec = dataclasses.replace(PACKED, page_size=page_size, seqlen_q=70, lengths_q=(70, 1, 9))
    inputs = make_inputs(spec, "peaked", seed=4)
    with cute_fa.simulate(arch) as simulation:
        assert_right(inputs.run(return_lse=True), inputs)
        coded = make_inputs(dataclasses.replace(spec, dtype=DType.E4M3), "peaked", seed=4)
        assert_right(coded.run(return_lse=True), coded)
    assert len(simulation.launches) == 2
    assert all(kernel in launch.name for launch in simulation.launches)
