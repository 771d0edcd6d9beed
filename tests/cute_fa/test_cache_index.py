"""``cache_batch_idx``: which sequences of a contiguous cache, or rows of a page table, a batch reads, in every forward
kernel; ``num_splits=0``: the table's choice of kernel and splits."""

import dataclasses

import pytest
import torch

import cute_fa
from cute_fa.api import attention as api
from cute_fa.device.split_forward import Grid
from cute_fa.engine import attention as engine
from cute_fa.engine import plan as plans
from cute_fa.engine.contract import AttentionKernel
from cute_fa.engine.table import TABLE
from cute_fa.semantics import errors
from cute_fa.semantics.reference import expected
from cute_fa.tools.inputs import InputSpec, make_inputs
from fa2_sm80.forward.entry import Fa2Forward
from fa2_sm80.split.entry import Fa2Split
from fa3_sm90.decode.entry import Fa3Decode
from fa3_sm90.forward.entry import Fa3Forward
from fa4_sm100.forward.entry import Fa4Forward
from tests.testing.caches import scattered
from tests.testing.cases import small_problem

TILED = [("sm_90a", "fa3", 1, Fa3Forward), ("sm_100a", "fa4", 1, Fa4Forward)]
SPLIT = [("sm_80", "fa2", 0, Fa2Split), ("sm_80", "fa2", 3, Fa2Split), ("sm_90a", "fa3", 0, Fa3Decode)]
KERNELS = [("sm_80", "fa2", 1, Fa2Forward), *TILED, *SPLIT]
SPEC = InputSpec(4, 40, 150, 4, 2, 64, seqused_k=True, causal=True)


@pytest.fixture(autouse=True)
def fresh_plans(monkeypatch):
    """Whatever ran before in this process, the last plan is that of the last call."""
    monkeypatch.setattr(plans, "PLANS", {})


def attention(inputs, **changes):
    given = {"q": inputs.q, "k": inputs.k, "v": inputs.v, "seqused_k": inputs.seqused_k, "causal": True}
    return engine.attention(api.prepare(**{**given, **changes}))


@pytest.mark.sampled
@pytest.mark.parametrize(("arch", "family", "splits", "kernel"), KERNELS)
def test_reads_the_sequences_that_the_index_names(arch, family, splits, kernel):
    """Sequences in another order, one of them twice; those that are not named are NaN."""
    inputs = make_inputs(SPEC, "peaked")
    index = torch.tensor([2, 0, 2], dtype=torch.int32)
    rows = index.long()
    options = {"q": inputs.q[:3], "seqused_k": inputs.seqused_k[rows], "family": family, "num_splits": splits}
    k, v = inputs.k.clone(), inputs.v.clone()
    k[[1, 3]], v[[1, 3]] = torch.nan, torch.nan
    with cute_fa.simulate(arch, race=True):
        out, lse = attention(inputs, **options, k=k, v=v, cache_batch_idx=index)
        problem = list(plans.PLANS.values())[-1].problem
        gathered = attention(inputs, **options, k=inputs.k[rows], v=inputs.v[rows])
    assert TABLE.lookup(problem, family) is kernel
    assert problem.cache_batch_idx
    assert torch.equal(out, gathered[0]) and torch.equal(lse, gathered[1])


@pytest.mark.sampled
@pytest.mark.parametrize(("arch", "family", "splits", "kernel"), KERNELS)
def test_left_padding_is_no_key(arch, family, splits, kernel):
    """In front of the sequences, NaN; one is empty behind it."""
    inputs = make_inputs(dataclasses.replace(SPEC, lengths_k=(150, 41, 100, 77)), "peaked")
    pads = torch.tensor([33, 41, 0, 76], dtype=torch.int32)
    k, v = inputs.k.clone(), inputs.v.clone()
    for b, pad in enumerate(pads.tolist()):
        k[b, :pad], v[b, :pad] = torch.nan, torch.nan
    with cute_fa.simulate(arch, race=True):
        out, lse = attention(inputs, k=k, v=v, cache_leftpad=pads, family=family, num_splits=splits)
    plan = list(plans.PLANS.values())[-1]
    assert plan.kernel is kernel and plan.problem.varlen
    for b, (pad, end) in enumerate(zip(pads.tolist(), inputs.seqused_k.tolist(), strict=True)):
        one = slice(b, b + 1)
        result = expected(inputs.q[one], k[one, pad:end], v[one, pad:end], causal=True).check(out[one], lse[one])
        assert result.ok, result


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"cache_batch_idx": torch.tensor([0, 1, 4, 2], dtype=torch.int32)},
            errors.CacheIndexError,
            r"\[2\]=4: .* 4 seq",
        ),
        ({"cache_batch_idx": torch.tensor([0, -1, 1, 2], dtype=torch.int32)}, errors.CacheIndexError, r"\[1\]=-1"),
        ({"cache_batch_idx": torch.tensor([0, 1, 2], dtype=torch.int32)}, errors.ShapeError, r"cache_batch_idx \(3,\)"),
        ({"cache_batch_idx": torch.tensor([0, 1, 2, 3])}, errors.DTypeError, "cache_batch_idx is int64"),
    ],
)
def test_bad_index(changes, error, message):
    inputs = make_inputs(SPEC)
    with cute_fa.simulate("sm_80") as simulation, pytest.raises(error, match=message):
        attention(inputs, **changes)
    assert not simulation.launches


PAGED_KERNELS = [*TILED, ("sm_80", "fa2", 1, Fa2Split), *SPLIT]


@pytest.mark.sampled
@pytest.mark.parametrize(("arch", "family", "splits", "kernel"), PAGED_KERNELS)
def test_reads_the_rows_of_the_page_table_that_the_index_names(arch, family, splits, kernel):
    """One of them twice, of a table with more rows than the batch has sequences; the others list pages that there are
    not, and the pages that no sequence reads are NaN."""
    inputs = make_inputs(dataclasses.replace(SPEC, seqused_k=False, page_size=16), "peaked")
    rows = torch.tensor([1, 0, 1])
    index = torch.tensor([5, 2, 5], dtype=torch.int32)
    table = scattered(inputs.page_table[[0, 1]], index[[1, 0]], 7)
    used = inputs.seqused_k[rows]
    assert used.min() > 64
    listed = {
        page for row, n in zip(rows, used, strict=True) for page in inputs.page_table[row, : -(-n // 16)].tolist()
    }
    unread = [page for page in range(inputs.k.shape[0]) if page not in listed]
    k, v = inputs.k.clone(), inputs.v.clone()
    k[unread], v[unread] = torch.nan, torch.nan
    options = {"q": inputs.q[:3], "seqused_k": used, "family": family, "num_splits": splits}
    with cute_fa.simulate(arch, race=True):
        out, lse = attention(inputs, **options, k=k, v=v, page_table=table, cache_batch_idx=index)
        plan = list(plans.PLANS.values())[-1]
    assert plan.kernel is kernel and plan.problem.cache_batch_idx and plan.problem.page_size == 16
    lengths = {"seqused_k": used, "page_table": inputs.page_table[rows]}
    result = expected(inputs.q[:3], inputs.k, inputs.v, causal=True, **lengths).check(out, lse)
    assert result.ok, result


def test_an_index_of_the_page_table_is_checked():
    inputs = make_inputs(dataclasses.replace(SPEC, seqused_k=False, page_size=16))
    given = {"page_table": inputs.page_table, "cache_batch_idx": torch.tensor([0, 1, 4, 2], dtype=torch.int32)}
    with cute_fa.simulate("sm_80"), pytest.raises(errors.CacheIndexError, match=r"\[2\]=4: page_table has 4 rows"):
        attention(inputs, **given)
    with cute_fa.simulate("sm_80"), pytest.raises(errors.ShapeError, match="one row for each of 4 sequences"):
        attention(inputs, page_table=inputs.page_table[:3])


def test_index_goes_with_caches_alone():
    inputs = make_inputs(dataclasses.replace(SPEC, seqused_k=False, varlen_k=True))
    given = {"cu_seqlens_k": inputs.cu_seqlens_k, "cache_batch_idx": torch.zeros(4, dtype=torch.int32)}
    with cute_fa.simulate("sm_80"), pytest.raises(errors.ArgumentError, match="cache_batch_idx with cu_seqlens_k"):
        attention(inputs, seqused_k=None, **given)


def test_the_backward_takes_no_index():
    for name in ("cache_batch_idx", "cache_leftpad"):
        problem = small_problem(cute_fa.SmArch.SM_80, direction=cute_fa.Direction.BACKWARD, **{name: True})
        assert TABLE.explain(problem)["fa2_bwd"] == [f"{name}: a cache has no gradient"]


@pytest.mark.parametrize(("arch", "family", "served"), [("sm_90a", "fa3", Fa3Decode), ("sm_100a", "fa4", Fa2Split)])
def test_padding_inside_pages_is_not_for_blocks_that_tma_brings(arch, family, served):
    """They start where pages do; kernels that copy rows serve them."""
    problem = small_problem(cute_fa.SmArch.named(arch), cache_leftpad=True, page_size=16)
    rule = "cache_leftpad with page_size 16: blocks of keys start where pages do"
    assert TABLE.explain(problem, family)[f"{family}_fwd"] == [rule]
    assert TABLE.lookup(problem) is served


def decoding(**changes):
    return small_problem(
        cute_fa.SmArch.SM_80,
        **{
            "seqlen_q": 1,
            "seqlen_k": 8192,
            "num_heads": 8,
            "num_heads_kv": 1,
            "head_dim": 128,
            "head_dim_v": 128,
            **changes,
        },
    )


@pytest.mark.parametrize(("kernel", "ctas_per_sm"), [(Fa2Split, 2), (Fa3Decode, 1)])
@pytest.mark.parametrize(
    ("changes", "blocks"),
    [
        ({"batch": 1}, 128),
        ({"batch": 216}, 216 * 128),
        ({"batch": 1, "seqlen_k": 64}, 1),
        ({"batch": 1, "seqlen_k": 0}, 1),  # hidden
        ({"batch": 1, "window_left": 100, "window_right": 0}, 2),
    ],
)
def test_an_even_cut_fills_the_gpu(kernel, ctas_per_sm, changes, blocks):
    """As many CTAs as run at a time, each with two key blocks at least, of which the host knows the longest lengths;
    each may leave two parts."""
    arch = cute_fa.SmArch.SM_90A if kernel is Fa3Decode else cute_fa.SmArch.SM_80
    problem = dataclasses.replace(decoding(**changes), arch=arch, num_splits=0)
    config = kernel.configure(problem)
    ctas = min(108 * ctas_per_sm, -(-blocks // 2))
    assert kernel.grid(problem, config, 108) == Grid(ctas, ctas - 1, None)
    out, lse = kernel.scratch(problem, config, None, 108)
    slots = 2 * ctas if ctas > 1 else 1
    assert (out.shape, lse.shape) == ((slots, 8, 128), (slots, 8))  # of as many rows as a kv head has


@pytest.mark.parametrize(("splits", "merges"), [(1, 0), (2, 216), (7, 216)])
def test_parts_have_a_cta_each(splits, merges):
    problem = decoding(batch=216, num_splits=splits)
    config = Fa2Split.configure(problem)
    assert Fa2Split.grid(problem, config, 108) == Grid(216 * splits, merges, splits)
    out, _ = Fa2Split.scratch(problem, config, None, 108)
    assert out.shape == (216 * splits if merges else 1, 8, 128)


def test_many_tokens_are_left_to_the_table():
    assert Fa2Split.num_splits(decoding(seqlen_q=128), 108) == 0
    assert Fa2Split.num_splits(decoding(seqlen_q=129), 108) is None
    assert AttentionKernel.num_splits(decoding(), 108) is None


@pytest.mark.sampled
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a", "sm_100a"])
def test_open_splits_choose_the_kernel(arch):
    """Decoding goes to the split kernels although others come first in the table; a prompt does not."""
    decode = Fa3Decode if arch == "sm_90a" else Fa2Split
    short, long = (InputSpec(1, rows, 400, 8, 1, 64, causal=True) for rows in (2, 129))
    for spec, splits in ((short, 0), (long, 1)):
        inputs = make_inputs(spec, "peaked")
        with cute_fa.simulate(arch):
            out = cute_fa.flash_attn_func(inputs.q, inputs.k, inputs.v, causal=True, num_splits=0)
        plan = list(plans.PLANS.values())[-1]
        assert plan.problem.num_splits == splits
        assert plan.kernel is (decode if spec is short else TABLE.lookup(plan.problem))
        expected = cute_fa.reference.attention(inputs.q, inputs.k, inputs.v, causal=True)[0]
        torch.testing.assert_close(out.float(), expected.float(), atol=2e-2, rtol=2e-2)
