"""The split-KV forward, simulated, against the fp32 reference: features in pairs, splits, pages, what is read."""

import dataclasses

import pytest
import torch

import cute_fa
from cute_fa.engine import attention as engine
from cute_fa.engine import plan as plans
from cute_fa.engine.compiler import compile_artifacts
from cute_fa.engine.table import DispatchTable, Entry
from cute_fa.semantics.problem import PAGE_SIZES
from cute_fa.semantics.reference import expected
from cute_fa.semantics.types import Direction, SmArch
from cute_fa.tools.inputs import InputSpec, make_inputs
from fa2_sm80.split.entry import Fa2Split
from perf.sass import report_cubin
from tests.testing.cases import FA2_FEATURES, fa2_cases, refusals, small_problem, spec_name, spec_of
from tests.testing.gradients import call_of
from tests.testing.loads import recorded_copies
from tests.testing.simulated import unwritten_is_nan

SPLIT = Entry("fa2_split", "fa2", Direction.FORWARD, tuple(SmArch), "fa2_sm80.split.entry:Fa2Split")
ONLY_SPLIT = DispatchTable((SPLIT,))


FEATURES = {
    **FA2_FEATURES,
    "lengths": [
        {"seqused_k": True},
        {"varlen_q": True, "varlen_k": True},
        {"seqused_q": True, "page_size": 8},
        {"varlen_q": True, "page_size": 1024},
        {"varlen_q": True, "seqused_q": True, "page_size": 2},
        {"seqused_k": True, "tree": True},
        {"varlen_q": True, "page_size": 32, "tree": True},
    ],
    "heads": [(2, 2), (8, 2), (3, 1)],
    "layout": ["contiguous", "padded", "transposed", "expanded"],
    # 16, 32 or 64 rows a tile, and tiles that end inside a query's group of heads
    "seqlens": [(1, 300), (5, 211), (40, 77), (16, 150)],
    "splits": [1, 2, 7],
    "inputs": ["random", "peaked"],
    "schedule": [{}, {"late": True, "schedule_seed": 1}, {"late": True, "schedule_seed": 2}],
}


def case_name(case: dict) -> str:
    return f"{spec_name(spec_of(case))}-{case['splits']}-{case['inputs']}"


@pytest.fixture(autouse=True)
def only_split(monkeypatch):
    """Problems that other kernels are preferred for, too."""
    monkeypatch.setattr(engine, "TABLE", ONLY_SPLIT)
    plans.PLANS.clear()
    yield
    plans.PLANS.clear()


def run(spec: InputSpec, inputs: str = "random", splits: int = 1, arch: str = "sm_80", **simulation):
    """(out, lse, simulation) of one call, after comparison with the reference."""
    given = make_inputs(spec, inputs)
    with cute_fa.simulate(arch, **simulation) as simulated, unwritten_is_nan():
        out, lse = engine.attention(call_of(given, num_splits=splits))
    result = expected(given.q, given.k, given.v, **given.options()).check(out, lse)
    assert result.ok, result
    return out, lse, simulated


@pytest.mark.parametrize("case", fa2_cases(FEATURES), ids=case_name)
def test_features_in_pairs(case):
    run(spec_of(case), case["inputs"], case["splits"], race=True, **case["schedule"])


@pytest.mark.gpu
@pytest.mark.parametrize("case", fa2_cases(FEATURES), ids=case_name)
def test_features_in_pairs_on_the_gpu(case):
    given = make_inputs(spec_of(case), case["inputs"], device="cuda")
    out, lse = engine.attention(call_of(given, num_splits=case["splits"]))
    result = expected(given.q, given.k, given.v, **given.options()).check(out, lse)
    assert result.ok, result


@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_page_sizes(page_size):
    """Pages shorter than, as long as, and longer than a block of 64 keys; unlisted pages and unused slots are NaN."""
    seqlen_k = max(300, 5 * page_size // 4 + 20)  # more than a page
    run(InputSpec(2, 2, seqlen_k, 4, 2, 64, page_size=page_size, causal=True), "peaked", 3)


@pytest.mark.parametrize("page_size", [1, 4, 1024])
def test_pages_of_a_prompt(page_size):
    """Several tiles of queries, and rows of the page table by index."""
    spec = InputSpec(2, 70, 150, 2, 1, 64, page_size=page_size, cache_batch_idx=True, causal=True)
    run(spec, "peaked")


@pytest.mark.parametrize("splits", [1, 2, 5, 6, 300])
def test_splits_without_keys_contribute_nothing(splits):
    """A second sequence without keys, and more splits than the first has blocks."""
    spec = InputSpec(2, 1, 330, 4, 1, 64, page_size=16, lengths_k=(330, 0), learnable_sink=True)
    out, lse, _ = run(spec, "peaked", splits)
    sink = make_inputs(spec, "peaked").learnable_sink
    assert (out[1] == 0).all() and torch.allclose(lse[1, :, 0], sink, atol=1e-6)
    spec = dataclasses.replace(spec, learnable_sink=False)
    out, lse, _ = run(spec, "peaked", splits)
    assert (out[1] == 0).all() and (lse[1] == -torch.inf).all()


def test_a_window_reads_its_keys_and_the_sink_alone():
    """No work in the gap: as many instructions whether 512 or 1536 keys lie between."""
    near, far = (
        run(InputSpec(1, 1, seqlen_k, 4, 1, 64, window=(64, 0), sink_tokens=4))[2].launches[-1].warp_instrs
        for seqlen_k in (700, 1724)
    )
    assert far == near


@pytest.mark.parametrize("page_size", [None, 16])
def test_decoding_reads_each_byte_once(page_size):
    """For sixteen query heads of a kv head and several queries, in pieces of 16 bytes, and no key beyond the length."""
    spec = InputSpec(1, 2, 330, 16, 2, 64, head_dim_v=32, page_size=page_size, seqused_k=page_size is None)
    spec = dataclasses.replace(spec, lengths_k=(301,))
    with recorded_copies() as copies:
        run(spec, "peaked", 3)
    assert {size for _, size in copies} == {16}
    addresses = [address for address, _ in copies]
    bytes_of_q = 3 * 2 * 16 * 64 * 2  # each split reads the queries
    assert 16 * len(addresses) == 301 * 2 * (64 + 32) * 2 + bytes_of_q
    assert 16 * len(set(addresses)) == 301 * 2 * (64 + 32) * 2 + bytes_of_q // 3


# Figures of 2026-11-30, nvidia-cutlass-dsl 4.8.1: instructions of a warp for a block of 64 keys.
@pytest.mark.parametrize(
    ("arch", "head_dim", "page_size", "most"),
    [
        (SmArch.SM_80, 64, 16, 271),
        (SmArch.SM_80, 128, 16, 335),
        (SmArch.SM_90A, 128, None, 312),
        (SmArch.SM_90A, 128, 1, 337),
        (SmArch.SM_90A, 128, 16, 342),
        (SmArch.SM_90A, 128, 1024, 397),
        (SmArch.SM_90A, 256, 16, 539),
    ],
)
def test_the_loop_over_keys_neither_spills_nor_grows(arch, head_dim, page_size, most):
    sizes = {"seqlen_q": 1, "seqlen_k": 8192, "num_heads": 8, "num_heads_kv": 1, "num_splits": 4}
    sizes |= {"head_dim": head_dim, "head_dim_v": head_dim, "window_right": 0, "seqused_k": True}
    config = Fa2Split.configure(small_problem(arch, page_size=page_size, **sizes))
    reports = report_cubin(compile_artifacts(config)[1])
    (loop,) = [report.main_loop for report in reports if report.main_loop]
    assert loop.counts["local"] == 0
    assert loop.row()["insts"] <= most
    # 16 bytes a thread: K and V of 64 keys by 128 threads
    assert loop.counts["ldgsts"] == 2 * 64 * head_dim * 2 // (16 * 128)


@pytest.mark.parametrize(
    ("arch", "head_dim", "seqlen_q", "most"),
    [
        (SmArch.SM_80, 128, 1, 385),
        (SmArch.SM_80, 128, 8, 781),
        (SmArch.SM_90A, 128, 8, 808),
        (SmArch.SM_90A, 256, 8, 1023),
    ],
)
def test_the_loop_under_a_tree_mask_neither_spills_nor_grows(arch, head_dim, seqlen_q, most):
    """One tile of 16 rows, or of 64, whose warps have four times as many scores each."""
    sizes = {"seqlen_q": seqlen_q, "seqlen_k": 8192, "num_heads": 8, "num_heads_kv": 1, "num_splits": 4}
    sizes |= {"head_dim": head_dim, "head_dim_v": head_dim, "window_right": 0, "seqused_k": True}
    config = Fa2Split.configure(small_problem(arch, page_size=16, tree_mask=True, **sizes))
    (loop,) = [report.main_loop for report in report_cubin(compile_artifacts(config)[1]) if report.main_loop]
    assert loop.counts["local"] == 0
    assert loop.row()["insts"] <= most


def test_keys_are_read_once_for_all_heads_of_a_group():
    """Eight query heads of a kv head cost what one costs, but for their own rows."""
    one, eight = (run(InputSpec(1, 1, 1024, heads, 1, 64))[2].launches[-1].warp_instrs for heads in (1, 8))
    assert eight < 1.2 * one


def test_same_bits_under_every_schedule():
    spec = InputSpec(2, 3, 300, 4, 2, 64, causal=True, page_size=16)
    first, first_lse, _ = run(spec, splits=3)
    for seed in range(2):
        out, lse, _ = run(spec, splits=3, schedule_seed=seed, late=True)
        assert torch.equal(out, first) and torch.equal(lse, first_lse)


@pytest.mark.parametrize("arch", ["sm_86", "sm_90a", "sm_100a", "sm_120a"])
def test_later_archs_run_the_same_source(arch):
    run(InputSpec(1, 2, 300, 8, 1, 256, page_size=16, causal=True), "peaked", 2, arch=arch)


@pytest.mark.parametrize("arch", SmArch)
def test_every_pair_of_head_dims_fits_shared_memory(arch):
    for head_dim in range(8, 257, 8):
        for head_dim_v in range(8, 257, 8):
            for seqlen_q in (1, 17, 100):
                sizes = {"head_dim": head_dim, "head_dim_v": head_dim_v, "seqlen_q": seqlen_q}
                config = Fa2Split.configure(small_problem(arch, num_heads_kv=1, **sizes))
                assert config.smem_bytes <= arch.smem_bytes and config.stages >= 1
                assert config.row_warps * config.key_warps == 4
                assert config.tile_n % (16 * config.key_warps) == 0


@pytest.mark.parametrize(
    ("change", "reasons"),
    [
        ({"seqlen_q": 1}, []),
        (
            {"seqlen_q": 5, "num_heads": 8, "num_heads_kv": 2, "head_dim": 256, "head_dim_v": 256},
            [
                "20 rows of a kv head: 2 tiles of 16 would each read its keys, 1 of 64",
                # 32 rows of Q and 64 rows of K and of V a step, all 512 bytes
                "shared memory: 278,528 bytes of Q and 4 steps of keys, 82,432 available with 2 CTAs an SM",
                "shared memory: 212,992 bytes of Q and 3 steps of keys, 82,432 available with 2 CTAs an SM",
                "shared memory: 147,456 bytes of Q and 2 steps of keys, 82,432 available with 2 CTAs an SM",
                "shared memory: 278,528 bytes of Q and 4 steps of keys, 166,912 available with 1 CTA an SM",
                "shared memory: 212,992 bytes of Q and 3 steps of keys, 166,912 available with 1 CTA an SM",
            ],
        ),
    ],
)
def test_refused_tiles_say_why(change, reasons):
    assert refusals(Fa2Split, small_problem(SmArch.SM_80, **change)) == reasons


def test_reasons_name_the_value():
    base = small_problem(SmArch.SM_80, page_size=16, seqused_k=True, num_splits=4)
    assert Fa2Split.supports(base) == []
    for change, word in (
        ({"head_dim": 12}, "head_dim 12"),
        ({"softcap": 9e3}, "softcap 9000"),
        ({"num_splits": 2**26, "num_heads": 64, "num_heads_kv": 64}, "tiles of queries and splits"),
    ):
        reasons = Fa2Split.supports(dataclasses.replace(base, out_dtype=None, **change))
        assert len(reasons) == 1 and word in reasons[0], reasons
