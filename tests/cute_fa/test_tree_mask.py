"""``tree_mask``: which draft tokens of a sequence its queries see, from the public functions through the kernel."""

import dataclasses

import pytest
import torch

import cute_fa
from cute_fa import PagedAttentionRequest, PagedKvCache, flash_attn_varlen_func, flash_attn_with_kvcache
from cute_fa.engine.table import TABLE
from cute_fa.semantics import reference
from cute_fa.semantics.errors import (
    ArgumentError,
    CuteFaError,
    DeviceError,
    DTypeError,
    NoBackwardError,
    ShapeError,
    StrideError,
    UnsupportedKeyError,
)
from cute_fa.semantics.types import Direction, SmArch
from cute_fa.tools.inputs import InputSpec, draw_tree, make_inputs, tree_words
from tests.testing.caches import Rotary, after, rotated_queries, take_last
from tests.testing.cases import small_problem
from tests.testing.grid import pairwise
from tests.testing.simulated import unwritten_is_nan

FEATURES = {
    "arch": ["sm_80", "sm_90a", "sm_100a"],
    # from one draft to 128; drafts that meet one block of 64 keys, two or three; more drafts than keys
    "seqlens": [(1, 300), (5, 67), (33, 96), (64, 128), (100, 331), (128, 190), (128, 129), (90, 50)],
    "heads": [(2, 2), (4, 1), (6, 2)],
    "mask": [
        {},
        {"causal": True},
        {"window": (40, 0), "sink_tokens": 5},
        {"window": (7, None), "sink_tokens": 200},  # drafts that the window hides, and the sink shows again
        {"window": (None, 20)},
        {"window": (90, 3)},
    ],
    "lengths": [
        {},
        {"page_size": 16},
        {"page_size": 1, "varlen_q": True},
        {"varlen_q": True, "varlen_k": True},
        {"seqused_q": True, "seqused_k": True},
        {"varlen_q": True, "seqused_q": True, "page_size": 128},
        {"cache_batch_idx": True, "cache_leftpad": True},
    ],
    "score": [{}, {"alibi": True}, {"softcap": 15.0, "learnable_sink": True}],
    "num_splits": [0, 1, 3],
    "inputs": ["peaked", "peaked", "random"],
    "schedule": [{}, {"late": True, "schedule_seed": 1}],
}


def spec_of(case: dict) -> InputSpec:
    return InputSpec(
        2, *case["seqlens"], *case["heads"], 64, tree=True, **case["mask"], **case["lengths"], **case["score"]
    )


def assert_right(result, given, **changes):
    comparison = reference.check(*result, given.q, given.k, given.v, **given.options() | changes)
    assert comparison.ok, comparison


def case_name(case: dict) -> str:
    lengths = "-".join(case["lengths"]) or "dense"
    return f"{case['arch']}-{case['seqlens']}-{case['mask']}-{lengths}-{case['num_splits']}"


CASES = pairwise(FEATURES, seed=2)


@pytest.mark.sampled
@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_features_in_pairs(case):
    given = make_inputs(spec_of(case), case["inputs"])
    with cute_fa.simulate(case["arch"], race=True, **case["schedule"]), unwritten_is_nan():
        assert_right(given.run(num_splits=case["num_splits"], return_lse=True), given)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_features_in_pairs_on_the_gpu(case):
    given = make_inputs(spec_of(case), case["inputs"], device="cuda")
    assert_right(given.run(num_splits=case["num_splits"], return_lse=True), given)


@pytest.mark.parametrize(("causal", "sink"), [(False, 0), (True, 0), (True, 30)])
def test_the_reference_hides_what_the_tree_does(causal, sink):
    """Beside torch's own attention with a mask written out: context and drafts, within the window."""
    drafts, keys, window = 37, 90, (50 if sink else None, None)
    spec = InputSpec(1, drafts, keys, 2, 2, 64, causal=causal, window=window, sink_tokens=sink, tree=True)
    given = make_inputs(spec, "peaked", seed=3)
    tree = draw_tree(drafts, 3)
    assert not tree.triu(1).any() and tree.diagonal().all() and 60 < int(tree.sum()) < 300
    row, key = torch.arange(drafts)[:, None] + keys - drafts, torch.arange(keys)
    mask = torch.cat([torch.ones(drafts, keys - drafts, dtype=torch.bool), tree], 1)
    if causal:
        mask &= key <= row
    if sink:
        mask &= (key >= row - 50) | (key < sink)
    q, k, v = (t.transpose(1, 2).double() for t in (given.q, given.k, given.v))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)
    out, _ = reference.attention(given.q, given.k, given.v, **given.options(), dtype=torch.float64)
    torch.testing.assert_close(out, expected)


def chain(drafts: int) -> torch.Tensor:
    return tree_words(torch.ones(drafts, drafts, dtype=torch.bool).tril())


@pytest.mark.sampled
@pytest.mark.parametrize("drafts", [1, 31, 32, 33, 64, 65, 128])
@pytest.mark.parametrize("keys", [128, 191, 200])
def test_a_chain_is_causal_and_a_full_mask_is_none(drafts, keys):
    """Bit for bit where the same blocks are walked over: beside a chain also causal."""
    given = make_inputs(InputSpec(1, drafts, keys, 2, 1, 64), "peaked", seed=drafts)
    every = torch.full((1, drafts, -(-drafts // 32)), -1, dtype=torch.int32)

    def run(**options):
        return flash_attn_varlen_func(
            given.q, given.k, given.v, None, None, None, None, family="fa2", num_splits=2, return_lse=True, **options
        )

    with cute_fa.simulate("sm_80"):
        assert_right(run(tree_mask=chain(drafts)[None]), given, causal=True)
        for mask, options in ((chain(drafts)[None], {"causal": True}), (every, {"causal": True}), (every, {})):
            assert all(map(torch.equal, run(tree_mask=mask, **options), run(**options)))


def test_no_visible_key():
    """Drafts alone, of which one sees none: O = 0, LSE = −inf, or the learnable sink."""
    given = make_inputs(InputSpec(1, 40, 40, 2, 2, 64, learnable_sink=True, tree=True), seed=1)
    given.tree_mask[0, 7] = 0
    sink = given.learnable_sink
    for choices, lse_of_none in (({}, sink), ({"learnable_sink": None}, torch.full_like(sink, -torch.inf))):
        options = given.arguments() | choices
        with cute_fa.simulate("sm_80"):
            out, lse = flash_attn_varlen_func(given.q, given.k, given.v, **options, return_lse=True)
        assert (out[0, 7] == 0).all() and lse[0, :, 7].equal(lse_of_none)
        assert_right((out, lse), given, **choices)


def test_bits_that_do_not_count_change_nothing():
    """Of drafts behind the sequence's last, in further words, and of queries that do not count."""
    spec = InputSpec(3, 70, 150, 2, 1, 64, varlen_q=True, seqused_q=True, page_size=16, tree=True)
    given = make_inputs(spec, "peaked", poison=True)
    clean = make_inputs(spec, "peaked", poison=False)
    assert not given.tree_mask.equal(clean.tree_mask)
    wide = torch.full((*given.tree_mask.shape[:-1], 9), -1, dtype=torch.int32)
    wide[..., :4] = given.tree_mask
    with cute_fa.simulate("sm_80"):
        expected = given.run(return_lse=True)
        for mask in (clean.tree_mask, wide, wide[..., :3], ~wide[..., :3] & 0 | clean.tree_mask[..., :3]):
            assert all(map(torch.equal, dataclasses.replace(given, tree_mask=mask).run(return_lse=True), expected))


def test_drafts_that_are_appended():
    """The server's step: keys of the drafts are written to the cache, rotated, and attended to by the tree."""
    spec = InputSpec(2, 20, 150, 4, 2, 64, page_size=8, lengths_k=(150, 77), tree=True)
    given = make_inputs(spec, "peaked", seed=5)
    rotary = Rotary.random(160, 32)
    append = take_last(given, [20, 20], False, rotary)
    reads = after(given, append, rotated_queries(given, rotary, append.cache_seqlens.tolist(), False))
    with cute_fa.simulate("sm_90a", race=True):
        result = flash_attn_with_kvcache(
            *(given.q, append.k_cache, append.v_cache, append.k, append.v),
            cache_seqlens=append.cache_seqlens,
            page_table=given.page_table,
            tree_mask=given.tree_mask,
            **rotary.arguments(),
            return_lse=True,
        )
    assert_right(result, reads)


def test_a_request():
    spec = InputSpec(2, 12, 90, 4, 2, 64, page_size=16, varlen_q=True, lengths_q=(12, 5), tree=True)
    given = make_inputs(spec, "peaked")
    cache = PagedKvCache(given.k, given.v)
    offsets = cute_fa.CumulativeSeqlens.from_tensor(given.cu_seqlens_q)
    with cute_fa.simulate("sm_90a"):
        request = PagedAttentionRequest(
            given.q, cache, given.page_table, given.seqused_k, cu_seqlens_q=offsets, tree_mask=given.tree_mask
        )
        result, expected = request.run(), request.reference()
    assert_right(result, given)
    torch.testing.assert_close(expected[1], reference.attention(given.q, given.k, given.v, **given.options())[1])
    assert request.dispatch_key().tree_mask and "_tree_" in request.kernel_name()


def test_blocks_without_drafts_read_no_words():
    """What the mask costs does not grow with the context, but for the question whether a block has drafts: of PTX 9
    instructions of each warp, where a block that has some takes 50."""

    def instructions(seqlen_k: int, tree: bool) -> int:
        given = make_inputs(InputSpec(1, 4, seqlen_k, 4, 1, 64, tree=tree))
        with cute_fa.simulate("sm_80") as simulation:
            given.run(family="fa2", num_splits=2)
        return simulation.launches[0].warp_instrs

    near, far = (instructions(keys, True) - instructions(keys, False) for keys in (512, 2048))
    warps, blocks = 4, (2048 - 512) // 64
    assert near > 0 and far - near <= 10 * warps * blocks


Q, K = torch.zeros(2, 5, 2, 64).bfloat16(), torch.zeros(2, 40, 2, 64).bfloat16()
WORDS = torch.ones(2, 5, 1, dtype=torch.int32)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"tree_mask": 3}, ArgumentError, "tree_mask is int"),
        ({"tree_mask": WORDS.long()}, DTypeError, "tree_mask is int64: int32 is needed"),
        ({"tree_mask": WORDS[..., 0]}, ShapeError, r"tree_mask \(2, 5\): \(2, 5, 1\) is needed, or more words"),
        ({"tree_mask": WORDS[..., :0]}, ShapeError, r"tree_mask \(2, 5, 0\): \(2, 5, 1\) is needed"),
        ({"tree_mask": WORDS[:1]}, ShapeError, r"tree_mask \(1, 5, 1\): \(2, 5, 1\) is needed"),
        ({"tree_mask": WORDS[:, :4]}, ShapeError, r"tree_mask \(2, 4, 1\): \(2, 5, 1\) is needed"),
        (
            {"q": Q.repeat(1, 7, 1, 1), "tree_mask": WORDS.repeat(1, 7, 1)},
            ShapeError,
            r"tree_mask \(2, 35, 1\): \(2, 35, 2\) is needed, or more words: a bit for each of up to 35 queries of q",
        ),
        ({"tree_mask": WORDS.expand(2, 5, 2).mT.contiguous().mT}, StrideError, "tree_mask has strides"),
        ({"tree_mask": WORDS.to("meta")}, DeviceError, "tree_mask is on meta"),
        (
            {"q": Q.repeat(1, 26, 1, 1), "tree_mask": WORDS.repeat(1, 26, 5)},
            UnsupportedKeyError,
            "fa2_split: tree_mask of 130 queries: at most 128 draft tokens a sequence",
        ),
        (
            {"q": Q.clone().requires_grad_()},
            NoBackwardError,
            "q requires a gradient: attention with tree_mask has none",
        ),
        (
            {name: t.to(torch.float8_e4m3fn) for name, t in (("q", Q), ("k", K), ("v", K))} | {"promote_every": 2},
            UnsupportedKeyError,
            "fa3_decode: promote_every 2: this kernel's products are of fp16",
        ),
    ],
)
def test_bad_masks_run_nothing(changes, error, message):
    arguments = {"q": Q, "k": K, "v": K, "tree_mask": WORDS, **changes}
    tensors = [arguments.pop(name) for name in "qkv"]
    with cute_fa.simulate("sm_90a") as simulation, pytest.raises(CuteFaError, match=message) as caught:
        flash_attn_varlen_func(*tensors, None, None, None, None, **arguments)
    assert type(caught.value) is error
    assert not simulation.launches


def test_packed_masks_have_a_row_for_each_query():
    arguments = {"cu_seqlens_q": torch.tensor([0, 3, 10], dtype=torch.int32), "max_seqlen_q": 7}
    message = r"tree_mask \(2, 5, 1\): \(10, 1\) is needed, or more words: a bit for each of up to 7 queries"
    with cute_fa.simulate("sm_80"), pytest.raises(ShapeError, match=message):
        flash_attn_with_kvcache(Q.flatten(0, 1), K, K, **arguments, tree_mask=WORDS)


@pytest.mark.parametrize("arch", SmArch)
def test_every_other_kernel_says_why_not(arch):
    problem = small_problem(arch, tree_mask=True)
    reasons = TABLE.explain(problem)
    serving = ["fa3_decode", "fa2_split"] if arch is SmArch.SM_90A else ["fa2_split"]
    assert [name for name, why in reasons.items() if not why] == serving
    for name, why in reasons.items():
        assert name in serving or "tree_mask: this kernel does not hide drafts" in why or "tcgen05" in why[0]
    backward = dataclasses.replace(problem, direction=Direction.BACKWARD)
    for name, why in TABLE.explain(backward).items():
        assert name == "fa4_bwd" or why == ["tree_mask: drafts have no gradient"]
    longest = dataclasses.replace(problem, seqlen_q=128)
    assert TABLE.serves(longest) and not TABLE.serves(dataclasses.replace(longest, seqlen_q=129))


def test_no_gradient_by_the_reference_or_a_range_plan():
    given = make_inputs(InputSpec(1, 5, 20, 1, 1, 64, tree=True))
    with pytest.raises(ArgumentError, match="gradients with tree_mask"):
        reference.gradients(given.q, given.k, given.v, torch.zeros_like(given.q), **given.options())
    with pytest.raises(ArgumentError, match="tree_mask with a range plan"):
        small_problem(SmArch.SM_80, tree_mask=True, ranges=True)
