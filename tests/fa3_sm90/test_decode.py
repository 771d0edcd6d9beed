"""The Hopper decode, simulated, against the fp32 reference: features in pairs, shares of CTAs, pages, what is read."""

import dataclasses
from collections import Counter

import pytest
import torch

import cute_fa
from cute_fa.engine import attention as engine
from cute_fa.engine import plan as plans
from cute_fa.engine.compiler import compile_artifacts
from cute_fa.semantics.types import DType, SmArch
from cute_fa.tools.inputs import InputSpec, make_inputs
from fa3_sm90.decode.config import Fa3DecodeConfig
from fa3_sm90.decode.entry import Fa3Decode
from perf.sass import report_cubin
from tests.testing.cases import fa2_cases, small_problem
from tests.testing.loads import recorded_copies, recorded_loads
from tests.testing.split_tests import (
    SCHEDULES,
    CodeTests,
    RowDescaleTests,
    Split,
    SplitTests,
    cache_spec,
    case_name,
    features,
)

FEATURES = features(
    lengths=[
        {},
        {"seqused_k": True},
        {"seqused_k": True, "tree": True},
        {"varlen_q": True, "page_size": 32, "tree": True},
        {"varlen_q": True, "varlen_k": True},
        {"seqused_q": True, "page_size": 8},
        {"varlen_q": True, "page_size": 64},
        {"varlen_q": True, "seqused_q": True, "page_size": 16},
    ]
)

ROWS = [
    {"page_size": 1, "head_dim": 128},
    {"page_size": 2, "head_dim": 256, "seqlen_q": 40},
    {"page_size": 4, "head_dim": 8, "head_dim_v": 72, "varlen_q": True},
    {"page_size": 16, "head_dim": 72, "head_dim_v": 192, "cache_leftpad": True},
    {"page_size": 1, "head_dim": 128, "dtype_k": DType.E4M3, "dtype_v": DType.E5M2},
    {"page_size": 64, "head_dim": 80, "cache_leftpad": True, "dtype_k": DType.E4M3, "dtype_v": DType.E4M3},
    {"page_size": 4, "head_dim": 64, "dtype_k": DType.INT8, "dtype_v": DType.E5M2},
]
# Of caches whose rows have descales: rows by cp.async, and tiles of 128 rows with blocks of 32 keys.
ROW_DESCALES = [
    ({"seqlen_q": 40, "head_dim": 256, "causal": True}, DType.BF16),
    ({"seqlen_q": 2, "head_dim": 64, "page_size": 64, "cache_leftpad": True, "cache_batch_idx": True}, DType.FP16),
    ({"seqlen_q": 20, "head_dim": 128, "head_dim_v": 80, "page_size": 4, "window": (90, 0)}, DType.BF16),
]
CODES = {"dtype_k": DType.E4M3, "dtype_v": DType.E4M3, "k_descale": True, "v_descale": True}
OF_ROWS = {**CODES, "k_row_descale": True, "v_row_descale": True}
# Instructions of the loop of 64 keys at head_dim 128, one token, with the rare rescaling of O, and of those what warps
# without rows skip: 2026-11-30, nvidia-cutlass-dsl 4.8.1.
LOOPS = [
    ({}, 371, 254),
    ({"page_size": 16, "seqused_k": True}, 370, 254),
    (CODES, 401, 286),
    ({**CODES, "dtype_k": DType.INT8, "dtype_v": DType.INT8}, 401, 286),
    (OF_ROWS, 657, 538),
]


class TestDecode(CodeTests, SplitTests):
    split = Split("fa3_decode", "sm_90a")
    ctas_per_sm = 1

    def loads(self, given, num_sms):
        with recorded_loads() as loads:
            self.split.check(given, num_sms=num_sms)
        return loads

    def key_bytes(self, given, num_sms):
        return sum(load.bytes for load in self.loads(given, num_sms))

    def key_blocks(self, given, num_sms):
        """One box each."""
        of_k = (load for load in self.loads(given, num_sms) if load.extents[0] == given.spec.head_dim)
        return list(Counter(load.cta for load in of_k).values())

    @pytest.mark.sampled
    @pytest.mark.parametrize("case", fa2_cases(FEATURES), ids=case_name)
    def test_features_in_pairs(self, case):
        self.split.run_case(case)

    @pytest.mark.gpu
    @pytest.mark.parametrize("case", fa2_cases(FEATURES), ids=case_name)
    def test_features_in_pairs_on_the_gpu(self, case):
        self.split.run_case_on_the_gpu(case)

    @pytest.mark.sampled
    @pytest.mark.parametrize("page_size", [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024])
    def test_page_sizes(self, page_size):
        """Pages shorter than, as long as, and longer than a block of 64 keys; unlisted pages and unused slots are
        NaN."""
        self.split.run(InputSpec(2, 2, 300, 4, 2, 64, page_size=page_size, causal=True), "peaked", num_sms=5)

    @pytest.mark.sampled
    @pytest.mark.parametrize("changes", ROWS, ids=str)
    @pytest.mark.parametrize("simulation", SCHEDULES, ids=str)
    def test_keys_by_rows(self, changes, simulation):
        """From pages that TMA cannot cut blocks from."""
        spec = dataclasses.replace(InputSpec(3, 2, 300, 4, 2, 64, causal=True), **changes)
        self.split.run(spec, "peaked", num_sms=7, **simulation)

    @pytest.mark.sampled
    @pytest.mark.parametrize("seqlen_q", [4, 33, 64, 128])
    def test_trees(self, seqlen_q):
        """Drafts of one block of keys, of several, and as many as there may be; more than one word of each row."""
        self.split.run(InputSpec(2, seqlen_q, 300, 6, 2, 64, tree=True, seqused_k=True), "peaked", num_sms=6)


class TestRowDescales(RowDescaleTests):
    split = Split("fa3_decode", "sm_90a")

    @pytest.mark.sampled
    @pytest.mark.parametrize(("sizes", "dtype"), ROW_DESCALES, ids=str)
    @pytest.mark.parametrize("simulation", SCHEDULES, ids=str)
    def test_ways_of_loading(self, sizes, dtype, simulation):
        spec = cache_spec((DType.E5M2, DType.E4M3), {**sizes, "row_descales": "rows"}, dtype)
        self.split.run(spec, "peaked", num_sms=5, race=True, **simulation)

    @pytest.mark.sampled
    @pytest.mark.without_races
    @pytest.mark.parametrize("page_size", [None, 1, 16])
    def test_descales_are_read_once(self, page_size):
        """Of all eight query heads of a kv head, and none beyond the sequence's end."""
        lengths = {"seqused_k": True, "lengths_k": (301, 77), "page_size": page_size, "row_descales": "rows"}
        given = make_inputs(cache_spec((DType.E4M3,) * 2, {"seqlen_q": 4, "head_dim": 64, **lengths}, DType.BF16))
        with recorded_copies() as copies:
            self.split.check(given, num_sms=3)
        for descale in (given.k_descale, given.v_descale):
            places = [(copy.address - descale.data_ptr()) // 4 for copy in copies if copy.bytes == 4]
            read = [place for place in places if 0 <= place < descale.numel()]
            assert len(read) == len(set(read)) == (301 + 77) * 2
            assert descale.flatten()[read].isfinite().all()


class FusedConfig(Fa3DecodeConfig):
    """A class of its own, by which the caches tell its kernels from the others."""


def test_scores_beyond_the_digits_of_fp32(monkeypatch):
    """From 2^28 on 8 is no digit of a score in log2 units. ptxas makes an fma of what the simulator rounds twice; that
    says for ever that the row has outgrown its reference."""
    # here, since a machine without the DSL collects this file, too
    from cute_fa.device import softmax
    from cute_fa.device.registers import placed_fma

    configure = Fa3Decode.configure

    def fused(problem):
        config = configure(problem)
        return FusedConfig(**{field.name: getattr(config, field.name) for field in dataclasses.fields(config)})

    def beyond(maximum, scale, running, exponents, row_wise):
        return placed_fma(maximum, scale, -running) > exponents.limit

    monkeypatch.setattr(Fa3Decode, "configure", fused)
    monkeypatch.setattr(softmax, "_beyond", beyond)
    monkeypatch.setattr(engine, "TABLE", TestDecode.split.table)
    plans.PLANS.clear()
    given = make_inputs(InputSpec(2, 1, 300, 4, 2, 64), "random")
    given = dataclasses.replace(given, q=given.q * 1e8, k=given.k * 10)
    with cute_fa.simulate("sm_90a", num_sms=2):
        out, lse = engine.attention(given.call(num_splits=0))
    keys, values = (t.repeat_interleave(2, 2) for t in (given.k, given.v))
    scores = torch.einsum("bqhd,bkhd->bhqk", given.q.double(), keys.double()) / 8.0
    largest, best = scores.max(-1)
    assert largest.min() > 2.0**28
    torch.testing.assert_close(lse.double(), largest, rtol=1e-6, atol=0.0)
    index = best.transpose(1, 2)[..., None].expand(-1, -1, -1, 64)
    torch.testing.assert_close(out, values.gather(1, index), rtol=0.0, atol=0.0)


@pytest.mark.parametrize(("changes", "most", "skipped"), LOOPS, ids=str)
def test_the_loop_over_keys_neither_spills_nor_grows(changes, most, skipped):
    sizes = {"seqlen_q": 1, "seqlen_k": 8192, "num_heads": 8, "num_heads_kv": 1, "num_splits": 0}
    sizes |= {"head_dim": 128, "head_dim_v": 128, "window_right": 0}
    config = Fa3Decode.configure(small_problem(SmArch.SM_90A, **sizes, **changes))
    loops = [report.main_loop for report in report_cubin(compile_artifacts(config)[1]) if report.main_loop]
    (loop,) = [loop for loop in loops if loop.row()["tensor"]]
    assert loop.counts["local"] == 0
    assert loop.row()["insts"] <= most and loop.row()["cond"] >= skipped


@pytest.mark.parametrize(("step", "changes"), [(8, {}), (16, OF_ROWS)], ids=["16 bits", "descales of rows"])
def test_every_pair_of_head_dims_fits_shared_memory(step, changes):
    for head_dim in range(step, 257, step):
        for head_dim_v in range(step, 257, step):
            for seqlen_q in (1, 17, 100):
                sizes = {"head_dim": head_dim, "head_dim_v": head_dim_v, "seqlen_q": seqlen_q}
                config = Fa3Decode.configure(small_problem(SmArch.SM_90A, num_heads_kv=1, **sizes, **changes))
                assert config.smem_bytes <= config.arch.smem_bytes and config.stages >= 2
