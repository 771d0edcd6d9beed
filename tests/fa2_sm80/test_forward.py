"""The FA2 forward, simulated, against the fp32 reference: features in pairs, edges of the mask, costs, big strides."""

import pytest
import torch

import cute_fa
from cute_fa.semantics.reference import expected
from cute_fa.tools.inputs import InputSpec, make_inputs
from tests.testing.cases import FA2_FEATURES, FA2_LENGTHS, fa2_cases, spec_name, spec_of

# one compile a case: as many levels as shape the code or the control flow differently, no more
FEATURES = {
    **FA2_FEATURES,
    "lengths": FA2_LENGTHS,
    "heads": [(2, 2), (4, 2), (3, 1)],
    "layout": ["contiguous", "padded", "transposed", "expanded"],
    "seqlens": [(130, 130), (70, 211), (200, 77), (1, 150)],
    "inputs": ["random", "peaked"],
    "schedule": [{}, {"late": True, "schedule_seed": 1}, {"late": True, "schedule_seed": 2}],
}


def case_name(case: dict) -> str:
    return f"{spec_name(spec_of(case))}-{case['inputs']}"


def run(spec: InputSpec, inputs: str = "random", arch: str = "sm_80", seed: int = 0, **schedule):
    """(out, lse, expected, simulation) of one call."""
    given = make_inputs(spec, inputs, seed)
    with cute_fa.simulate(arch, **schedule) as simulation:
        out, lse = given.run(return_lse=True, family="fa2")
    return out, lse, expected(given.q, given.k, given.v, **given.options()), simulation


def assert_right(spec: InputSpec, inputs: str = "random", **options):
    out, lse, reference, _ = run(spec, inputs, **options)
    result = reference.check(out, lse)
    assert result.ok, result
    return out, lse


@pytest.mark.sampled
@pytest.mark.parametrize("case", fa2_cases(FEATURES), ids=case_name)
def test_features_in_pairs(case):
    assert_right(spec_of(case), case["inputs"], **case["schedule"])


@pytest.mark.gpu
@pytest.mark.parametrize("case", fa2_cases(FEATURES), ids=case_name)
def test_features_in_pairs_on_the_gpu(case):
    given = make_inputs(spec_of(case), case["inputs"], device="cuda")
    out, lse = given.run(return_lse=True, family="fa2")
    result = expected(given.q, given.k, given.v, **given.options()).check(out, lse)
    assert result.ok, result


# the widths of panels and tiles that the pairs leave out, and sizes that are no multiple of 16
@pytest.mark.sampled
@pytest.mark.parametrize("head_dim", [16, 24, 32, 48, 80, 96, 104, 112, 144, 160, 176, 200, 208, 240])
def test_other_head_dims(head_dim):
    assert_right(InputSpec(1, 70, 130, 1, 1, head_dim, causal=True), "peaked")


@pytest.mark.sampled
@pytest.mark.parametrize("head_dims", [(128, 24), (96, 104)], ids=str)
def test_key_blocks_that_are_no_multiple_of_a_pass(head_dims):
    """48 keys a step beside panels of 32 columns, of which a pass of all threads loads 32 rows."""
    head_dim, head_dim_v = head_dims
    assert_right(InputSpec(1, 70, 130, 1, 1, head_dim, head_dim_v=head_dim_v, causal=True), "peaked")


# tile_n is 64 at head_dim 64; the tile of queries starts at key 320 − 192 = 128, so its window of 100 at block 0
@pytest.mark.parametrize("sink_tokens", [1, 27, 28, 29, 63, 64, 65, 128, 200, 320, 10_000])
def test_sink_inside_touching_and_beyond_the_window(sink_tokens):
    spec = InputSpec(1, 192, 320, 1, 1, 64, window=(100, 0), sink_tokens=sink_tokens)
    assert_right(spec, "peaked")


@pytest.mark.parametrize("left", [0, 1, 64, 127, 300, 2**31 - 2])
@pytest.mark.parametrize("right", [0, 64, 2**31 - 2])
def test_window_edges(left, right):
    assert_right(InputSpec(1, 150, 260, 1, 1, 64, window=(left, right)), "peaked")


@pytest.mark.parametrize("residue", [-2, -1, 0, 1, 2])
@pytest.mark.parametrize("window", [(None, 0), (128, 0), (64, 64)])
def test_mask_edges_that_meet_block_edges(window, residue):
    """The diagonal and the window's sides pass within two keys of the corner of a block of 64, on either side."""
    assert_right(InputSpec(1, 128, 256 + residue, 1, 1, 64, window=window), "peaked")


@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(64, 64), (65, 63), (127, 129), (128, 128), (129, 1), (300, 31)])
@pytest.mark.parametrize("causal", [False, True])
def test_lengths_around_the_tiles(seqlen_q, seqlen_k, causal):
    assert_right(InputSpec(1, seqlen_q, seqlen_k, 1, 1, 64, causal=causal), "peaked")


def test_rows_without_keys_give_zero_and_minus_infinity():
    out, lse, _, _ = run(InputSpec(1, 200, 70, 2, 2, 64, causal=True))
    assert (out[:, :130] == 0).all() and (lse[:, :, :130] == -torch.inf).all()
    assert lse[:, :, 130:].isfinite().all()
    spec = InputSpec(1, 200, 70, 2, 2, 64, causal=True, learnable_sink=True)
    sink = make_inputs(spec).learnable_sink
    out, lse, _, _ = run(spec)
    assert (out[:, :130] == 0).all() and torch.allclose(lse[0, :, :130], sink[:, None].expand(-1, 130), atol=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_queries_still_on_their_way_do_not_overwrite_the_output(seed):
    """A tile that sees no key never waits for its queries, whose shared memory O takes over."""
    out, _, _, _ = run(InputSpec(1, 200, 70, 2, 2, 64, causal=True), schedule_seed=seed, late=True)
    assert (out[:, :130] == 0).all()


def test_dominant_sink_logit_neither_overflows_nor_vanishes():
    given = make_inputs(InputSpec(1, 65, 65, 2, 2, 64, learnable_sink=True))
    for logit in (300.0, -300.0):
        sink = torch.full((2,), logit)
        options = {**given.options(), "learnable_sink": sink}
        with cute_fa.simulate("sm_80"):
            out, lse = cute_fa.flash_attn_func(given.q, given.k, given.v, learnable_sink=sink, return_lse=True)
        result = expected(given.q, given.k, given.v, **options).check(out, lse)
        assert result.ok, result


@pytest.mark.parametrize("softcap", [0.01, 8192.0])
def test_smallest_and_largest_softcap(softcap):
    assert_right(InputSpec(1, 130, 130, 2, 2, 64, softcap=softcap))


def test_nan_in_the_input_is_not_hidden():
    given = make_inputs(InputSpec(1, 40, 40, 1, 1, 64))
    q = given.q.clone()
    q[0, 7] = float("nan")
    with cute_fa.simulate("sm_80"):
        out = cute_fa.flash_attn_func(q, given.k, given.v)
    assert out[0, 7].isnan().all() and out[0, :7].isfinite().all() and out[0, 8:].isfinite().all()


@pytest.mark.parametrize("mask", [{"window": (64, 0)}, {"window": (64, 0), "sink_tokens": 4}], ids=str)
def test_cost_does_not_grow_with_hidden_keys(mask):
    """A query tile visits the same number of blocks whether 512 or 1536 keys precede its window."""
    near, far = (
        run(InputSpec(1, 128, seqlen_k, 1, 1, 64, **mask))[3].launches[-1].warp_instrs for seqlen_k in (512, 1536)
    )
    assert far == near
    everything = run(InputSpec(1, 128, 1536, 1, 1, 64))[3].launches[-1].warp_instrs
    assert far < everything / 2


def test_causal_visits_half_the_blocks():
    full, causal = (
        run(InputSpec(1, 1024, 1024, 1, 1, 64, causal=causal))[3].launches[-1].warp_instrs for causal in (False, True)
    )
    assert causal < 0.68 * full


@pytest.mark.sampled
@pytest.mark.parametrize("arch", ["sm_86", "sm_89", "sm_90a", "sm_100a", "sm_103a", "sm_120a"])
@pytest.mark.parametrize("head_dim", [64, 256])
def test_later_archs_run_the_same_source(arch, head_dim):
    assert_right(InputSpec(1, 140, 140, 2, 1, head_dim, causal=True), "peaked", arch=arch)


def test_same_bits_under_every_schedule():
    spec = InputSpec(2, 150, 150, 2, 1, 64, causal=True, alibi=True)
    first, first_lse, _, _ = run(spec)
    for seed in range(3):
        out, lse, _, _ = run(spec, schedule_seed=seed, late=True)
        assert torch.equal(out, first) and torch.equal(lse, first_lse)


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_offsets_beyond_32_bits(dim):
    """Elements more than 2^31 apart, along the batch, the sequence or the heads; what lies between is never touched."""
    spec = InputSpec(2, 40, 72, 2, 2, 64)
    given = make_inputs(spec)
    sparse = []
    for tensor in (given.q, given.k, given.v):
        strides = list(tensor.stride())
        strides[dim] = (2**31 + 64) // (tensor.shape[dim] - 1) // 8 * 8 + 8
        reach = 1 + sum(stride * (size - 1) for stride, size in zip(strides, tensor.shape, strict=True))
        assert reach > 2**31
        view = torch.empty(reach, dtype=tensor.dtype).as_strided(tensor.shape, strides)
        view.copy_(tensor)
        sparse.append(view)
    with cute_fa.simulate("sm_80"):
        out, lse = cute_fa.flash_attn_func(*sparse, return_lse=True)
    result = expected(given.q, given.k, given.v).check(out, lse)
    assert result.ok, result
