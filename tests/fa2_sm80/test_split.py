"""The split-KV forward, simulated, against the fp32 reference: features in pairs, shares of CTAs, pages, what is
read."""

import bisect
import dataclasses
from collections import Counter
from typing import ClassVar

import pytest

from cute_fa.engine import attention as engine
from cute_fa.engine import plan as plans
from cute_fa.engine.compiler import compile_artifacts
from cute_fa.semantics.problem import PAGE_SIZES
from cute_fa.semantics.types import DType, SmArch
from cute_fa.tools.inputs import InputSpec, make_inputs
from fa2_sm80.split.entry import Fa2Split
from perf.sass import report_cubin
from tests.testing.cases import fa2_cases, refusals, small_problem
from tests.testing.loads import recorded_copies
from tests.testing.split_tests import CodeTests, RowDescaleTests, Split, SplitTests, case_name, features

FEATURES = features(
    lengths=[
        {"seqused_k": True},
        {"varlen_q": True, "varlen_k": True},
        {"seqused_q": True, "page_size": 8},
        {"varlen_q": True, "page_size": 1024},
        {"varlen_q": True, "seqused_q": True, "page_size": 2},
        {"seqused_k": True, "tree": True},
        {"varlen_q": True, "page_size": 32, "tree": True},
    ]
)


QUERIES = dict.fromkeys(("dtype", "dtype_k", "dtype_v"), DType.E4M3)


class Copies:
    """What a call loads."""

    split: ClassVar[Split]

    def copies(self, given, num_sms):
        """(CTA, element of the tensor where it begins) of each 16 bytes of k, and of v, that are loaded."""
        with recorded_copies() as copies:
            self.split.check(given, num_sms=num_sms)
        assert {copy.bytes for copy in copies} == {16}
        for tensor in (given.k, given.v):
            start = tensor.data_ptr()
            found = ((copy.cta, copy.address - start) for copy in copies)
            yield [(cta, offset // tensor.element_size()) for cta, offset in found if 0 <= offset < tensor.nbytes]

    def key_bytes(self, given, num_sms):
        return sum(16 * len(copies) for copies in self.copies(given, num_sms))


class TestSplit(Copies, SplitTests):
    split = Split("fa2_split", "sm_80")
    ctas_per_sm = 2

    def key_blocks(self, given, num_sms):
        of_k, _ = self.copies(given, num_sms)
        heads, head_dim = given.k.shape[-2:]
        starts = range(0, given.k[..., 0, 0].numel(), given.k.shape[1])
        if given.cu_seqlens_k is not None:
            starts = given.cu_seqlens_k.tolist()
        blocks = set()
        for cta, element in of_k:
            row, head = element // head_dim // heads, element // head_dim % heads
            sequence = bisect.bisect_right(starts, row) - 1
            blocks.add((cta, sequence, head, (row - starts[sequence]) // 64))
        return list(Counter(cta for cta, *_ in blocks).values())

    @pytest.mark.sampled
    @pytest.mark.parametrize("case", fa2_cases(FEATURES), ids=case_name)
    def test_features_in_pairs(self, case):
        self.split.run_case(case)

    @pytest.mark.gpu
    @pytest.mark.parametrize("case", fa2_cases(FEATURES), ids=case_name)
    def test_features_in_pairs_on_the_gpu(self, case):
        self.split.run_case_on_the_gpu(case)

    @pytest.mark.sampled
    @pytest.mark.parametrize("page_size", PAGE_SIZES)
    def test_page_sizes(self, page_size):
        """Pages shorter than, as long as, and longer than a block of 64 keys; unlisted pages and unused slots are
        NaN."""
        seqlen_k = max(300, 5 * page_size // 4 + 20)  # more than a page
        self.split.run(InputSpec(2, 2, seqlen_k, 4, 2, 64, page_size=page_size, causal=True), "peaked", num_sms=3)

    @pytest.mark.sampled
    @pytest.mark.parametrize("page_size", [1, 4, 1024])
    def test_pages_of_a_prompt(self, page_size):
        """Several tiles of queries, in one part each, and rows of the page table by index."""
        spec = InputSpec(2, 140, 150, 2, 1, 64, page_size=page_size, cache_batch_idx=True, causal=True)
        self.split.run(spec, "peaked", 1)

    def test_keys_cost_the_same_for_all_heads_of_a_group(self):
        """Eight query heads of a kv head cost what one costs, but for their own rows."""
        one, eight = (
            self.split.run(InputSpec(1, 1, 1024, heads, 1, 64), splits=1)[2].launches[0].warp_instrs for heads in (1, 8)
        )
        assert eight < 1.2 * one

    @pytest.mark.sampled
    @pytest.mark.parametrize("arch", ["sm_86", "sm_90a", "sm_100a", "sm_120a"])
    def test_later_archs_run_the_same_source(self, arch):
        self.split.run(InputSpec(1, 2, 300, 8, 1, 256, page_size=16, causal=True), "peaked", arch=arch, num_sms=2)


class TestCodes(Copies, CodeTests):
    """On sm_80, without an instruction that widens e4m3."""

    split = Split("fa2_split", "sm_80")


class TestCodesOfSm89(TestCodes):
    split = Split("fa2_split", "sm_89")


class TestRowDescales(RowDescaleTests):
    """On sm_80, where the factor of widened codes comes on top."""

    split = Split("fa2_split", "sm_80")

    @pytest.mark.sampled
    @pytest.mark.without_races
    @pytest.mark.parametrize("page_size", [None, 16])
    def test_descales_are_read_once(self, page_size):
        """Those of K and of V, by one CTA for all eight query heads of a kv head, and none beyond a sequence's end."""
        codes = {"dtype_k": DType.E4M3, "dtype_v": DType.E5M2, "row_descales": "rows"}
        lengths = {"seqused_k": True, "lengths_k": (301, 77), "page_size": page_size}
        given = make_inputs(InputSpec(2, 4, 330, 16, 2, 64, **codes, **lengths), "random")
        with recorded_copies() as copies:
            self.split.check(given, num_sms=3)
        for descale in (given.k_descale, given.v_descale):
            places = [copy.address - descale.data_ptr() for copy in copies if copy.bytes == descale.element_size()]
            read = [place // descale.element_size() for place in places if 0 <= place < descale.nbytes]
            assert len(read) == len(set(read)) == (301 + 77) * 2
            assert descale.flatten()[read].isfinite().all()


class TestRowDescalesOfSm89(TestRowDescales):
    split = Split("fa2_split", "sm_89")


@pytest.mark.sampled
@pytest.mark.parametrize("arch", ["sm_86", "sm_90a", "sm_100a", "sm_103a", "sm_120a"])
def test_later_archs_read_codes_by_the_same_source(arch, monkeypatch):
    split = Split("fa2_split", arch)
    monkeypatch.setattr(engine, "TABLE", split.table)
    plans.PLANS.clear()
    codes = {"dtype_k": DType.E4M3, "dtype_v": DType.E4M3}
    split.run(InputSpec(1, 2, 300, 8, 1, 256, page_size=16, causal=True, **codes), "peaked", num_sms=2)
    plans.PLANS.clear()


# Figures of 2026-11-30, nvidia-cutlass-dsl 4.8.1: instructions of a warp for a block of keys. One token of 8 query
# heads is a tile of 16 rows, whose keys four warps share, 8 are one of 64, 16 one of 128; of head_dim 256 these two
# have blocks of 32 keys.
@pytest.mark.parametrize(
    ("arch", "seqlen_q", "head_dim", "page_size", "most"),
    [
        (SmArch.SM_80, 1, 64, 16, 254),
        (SmArch.SM_80, 1, 128, None, 299),
        (SmArch.SM_80, 1, 128, 16, 320),
        (SmArch.SM_90A, 1, 128, None, 301),
        (SmArch.SM_90A, 1, 128, 1, 320),
        (SmArch.SM_90A, 1, 128, 16, 327),
        (SmArch.SM_90A, 1, 128, 1024, 354),
        (SmArch.SM_90A, 1, 256, 16, 461),
        (SmArch.SM_80, 8, 128, None, 634),
        (SmArch.SM_80, 8, 256, None, 545),
        (SmArch.SM_80, 16, 128, None, 663),
        (SmArch.SM_86, 16, 128, 16, 641),
        (SmArch.SM_80, 16, 256, None, 533),
        (SmArch.SM_90A, 16, 256, 16, 541),
    ],
)
def test_the_loop_over_keys_neither_spills_nor_grows(arch, seqlen_q, head_dim, page_size, most):
    sizes = {"seqlen_q": seqlen_q, "seqlen_k": 8192, "num_heads": 8, "num_heads_kv": 1, "num_splits": 0}
    sizes |= {"head_dim": head_dim, "head_dim_v": head_dim, "window_right": 0, "seqused_k": True}
    config = Fa2Split.configure(small_problem(arch, page_size=page_size, **sizes))
    reports = report_cubin(compile_artifacts(config)[1])
    (loop,) = [report.main_loop for report in reports if report.main_loop]
    assert loop.counts["local"] == 0
    assert loop.row()["insts"] <= most
    # 16 bytes a thread: K and V of a block by all threads
    assert loop.counts["ldgsts"] == 2 * config.tile_n * head_dim * 2 // (16 * config.num_threads)


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
    """One tile of 16 rows, or of 64, whose warps have four times as many scores each, of half as many keys at
    head_dim 256."""
    sizes = {"seqlen_q": seqlen_q, "seqlen_k": 8192, "num_heads": 8, "num_heads_kv": 1, "num_splits": 0}
    sizes |= {"head_dim": head_dim, "head_dim_v": head_dim, "window_right": 0, "seqused_k": True}
    config = Fa2Split.configure(small_problem(arch, page_size=16, tree_mask=True, **sizes))
    (loop,) = [report.main_loop for report in report_cubin(compile_artifacts(config)[1]) if report.main_loop]
    assert loop.counts["local"] == 0
    assert loop.row()["insts"] <= most, loop.row()["insts"]


@pytest.mark.parametrize(
    ("arch", "seqlen_q", "head_dim", "codes", "most"),
    [
        (SmArch.SM_80, 1, 128, DType.E4M3, 549),
        (SmArch.SM_80, 1, 128, DType.E5M2, 374),
        (SmArch.SM_80, 8, 128, DType.E4M3, 1571),
        (SmArch.SM_86, 1, 64, DType.E4M3, 341),
        (SmArch.SM_89, 1, 64, DType.E4M3, 262),
        (SmArch.SM_89, 1, 128, DType.E4M3, 393),
        (SmArch.SM_89, 8, 128, DType.E4M3, 929),
        (SmArch.SM_89, 16, 256, DType.E4M3, 857),
        (SmArch.SM_90A, 1, 256, DType.E4M3, 593),
        (SmArch.SM_100A, 1, 128, DType.E4M3, 534),
        (SmArch.SM_120A, 1, 128, DType.E5M2, 559),
        (SmArch.SM_80, 1, 128, DType.INT8, 471),
        (SmArch.SM_80, 8, 128, DType.INT8, 1252),
        (SmArch.SM_89, 8, 128, DType.INT8, 1251),
    ],
)
def test_the_loop_over_codes_neither_spills_nor_grows(arch, seqlen_q, head_dim, codes, most):
    """As above; sm_80 and sm_86 take four instructions for two codes of e4m3, where others take one, and of V a PRMT
    more; int8 takes five for four codes everywhere. A step copies half as many bytes."""
    sizes = {"seqlen_q": seqlen_q, "seqlen_k": 8192, "num_heads": 8, "num_heads_kv": 1, "num_splits": 0}
    sizes |= {"head_dim": head_dim, "head_dim_v": head_dim, "window_right": 0, "seqused_k": True, "page_size": 16}
    of_codes = {"dtype_k": codes, "dtype_v": codes, "k_descale": True, "v_descale": True}
    config = Fa2Split.configure(small_problem(arch, **sizes, **of_codes))
    (loop,) = [report.main_loop for report in report_cubin(compile_artifacts(config)[1]) if report.main_loop]
    assert loop.counts["local"] == 0
    assert loop.row()["insts"] <= most, loop.row()["insts"]
    assert loop.counts["ldgsts"] == 2 * config.tile_n * head_dim // (16 * config.num_threads)


@pytest.mark.parametrize(
    ("arch", "seqlen_q", "head_dim", "most"),
    [
        (SmArch.SM_80, 1, 64, 476),
        (SmArch.SM_80, 1, 128, 741),
        (SmArch.SM_80, 8, 128, 1921),
        (SmArch.SM_80, 8, 256, 1841),
        (SmArch.SM_89, 1, 128, 564),
        (SmArch.SM_89, 1, 256, 828),
        (SmArch.SM_89, 16, 256, 1179),
    ],
)
def test_the_loop_with_descales_of_rows_neither_spills_nor_grows(arch, seqlen_q, head_dim, most):
    """Those of K and of V of a key by one thread, 4 bytes each. A part is run where a unit of O grows alone."""
    sizes = {"seqlen_q": seqlen_q, "seqlen_k": 8192, "num_heads": 8, "num_heads_kv": 1, "num_splits": 0}
    sizes |= {"head_dim": head_dim, "head_dim_v": head_dim, "window_right": 0, "seqused_k": True, "page_size": 16}
    of_codes = {"dtype_k": DType.E4M3, "dtype_v": DType.E4M3, "k_descale": True, "v_descale": True}
    of_codes |= {"k_row_descale": True, "v_row_descale": True}
    config = Fa2Split.configure(small_problem(arch, **sizes, **of_codes))
    (loop,) = [report.main_loop for report in report_cubin(compile_artifacts(config)[1]) if report.main_loop]
    assert loop.counts["local"] == 0
    assert loop.counts["ldgsts"] == 2 * config.tile_n * head_dim // (16 * config.num_threads) + 2
    assert loop.row()["insts"] <= most, loop.row()["insts"]


@pytest.mark.parametrize("codes", [None, DType.E4M3])
@pytest.mark.parametrize("arch", SmArch)
def test_every_pair_of_head_dims_fits_shared_memory(arch, codes):
    step = 8 if codes is None else 16
    for head_dim in range(step, 257, step):
        for head_dim_v in range(step, 257, step):
            for seqlen_q in (1, 17, 100):
                sizes = {"head_dim": head_dim, "head_dim_v": head_dim_v, "seqlen_q": seqlen_q}
                config = Fa2Split.configure(small_problem(arch, num_heads_kv=1, dtype_k=codes, dtype_v=codes, **sizes))
                assert config.smem_bytes <= arch.smem_bytes and config.stages >= 1
                assert config.row_warps * config.key_warps == (8 if config.tile_m == 128 else 4)
                assert config.tile_n % (16 * config.key_warps) == 0
                # as many CTAs as there are threads' registers and shared memory for
                assert config.ctas_per_sm * config.num_threads <= 256
                assert config.ctas_per_sm * (config.smem_bytes + 1024) <= arch.smem_bytes + 1024


@pytest.mark.parametrize(
    ("arch", "rows", "tile_m", "tile_n", "stages", "ctas_per_sm"),
    [
        (SmArch.SM_80, 16, 16, 64, 2, 1),
        (SmArch.SM_80, 17, 64, 32, 4, 1),
        (SmArch.SM_80, 65, 128, 32, 3, 1),
        (SmArch.SM_86, 65, 64, 32, 2, 1),  # 128 rows leave room for one step
        (SmArch.SM_90A, 65, 128, 32, 4, 1),
    ],
)
def test_tiles_of_the_largest_head_dim(arch, rows, tile_m, tile_n, stages, ctas_per_sm):
    problem = small_problem(arch, seqlen_q=rows, num_heads=1, num_heads_kv=1, head_dim=256, head_dim_v=256)
    config = Fa2Split.configure(problem)
    assert (config.tile_m, config.tile_n) == (tile_m, tile_n)
    assert (config.stages, config.ctas_per_sm) == (stages, ctas_per_sm)


@pytest.mark.parametrize(
    ("change", "reasons"),
    [
        ({"seqlen_q": 1}, []),
        (
            {"seqlen_q": 3, "num_heads": 8, "num_heads_kv": 2, "head_dim": 256, "head_dim_v": 256},
            [
                # 16 rows of Q and 64 rows of K and of V a step, all 512 bytes
                "shared memory: 270,336 bytes of Q and 4 steps of keys, 82,432 available with 2 CTAs an SM",
                "shared memory: 204,800 bytes of Q and 3 steps of keys, 82,432 available with 2 CTAs an SM",
                "shared memory: 139,264 bytes of Q and 2 steps of keys, 82,432 available with 2 CTAs an SM",
                "shared memory: 270,336 bytes of Q and 4 steps of keys, 166,912 available with 1 CTA an SM",
                "shared memory: 204,800 bytes of Q and 3 steps of keys, 166,912 available with 1 CTA an SM",
            ],
        ),
    ],
)
def test_refused_tiles_say_why(change, reasons):
    assert refusals(Fa2Split, small_problem(SmArch.SM_80, **change)) == reasons


def test_reasons_name_the_value():
    base = small_problem(SmArch.SM_80, page_size=16, seqused_k=True, num_splits=4)
    assert Fa2Split.supports(base) == []
    assert Fa2Split.supports(dataclasses.replace(base, out_dtype=None, **QUERIES)) == []
    for change, word in (
        ({"head_dim": 12}, "head_dim 12"),
        ({"head_dim": 72, "dtype_k": DType.E4M3, "dtype_v": DType.E5M2}, "head_dim 72 in 8 bits: a multiple of 16"),
        ({**QUERIES, "promote_every": 1}, "promote_every 1: this kernel's products are of fp16"),
        ({**QUERIES, "page_size": None, "seqused_k": False, "v_layout": "key_major"}, "v_layout key_major"),
        (
            {"dtype_k": DType.E4M3, "dtype_v": DType.E4M3, "v_descale": True, "v_block_descale": True},
            "descales of blocks of keys",
        ),
        ({"softcap": 9e3}, "softcap 9000"),
        (
            {"num_splits": 2**26, "seqlen_k": 2**29, "num_heads": 1024, "num_heads_kv": 1024},
            f"{2**33} parts of all tiles",
        ),
    ):
        reasons = Fa2Split.supports(dataclasses.replace(base, out_dtype=None, **change))
        assert len(reasons) == 1 and word in reasons[0], reasons
    # no more parts than key blocks
    assert Fa2Split.supports(dataclasses.replace(base, num_splits=2**26, num_heads=64, num_heads_kv=64)) == []
