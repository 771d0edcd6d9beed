"""Tests that the kernels whose CTAs share all key blocks have in common: a kernel's test class inherits them."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import pytest
import torch

import cute_fa
from cute_fa.engine import attention as engine
from cute_fa.engine import plan as plans
from cute_fa.engine.table import TABLE, DispatchTable
from cute_fa.semantics.reference import attention, expected
from cute_fa.semantics.types import DType
from cute_fa.tools.inputs import Inputs, InputSpec, make_inputs
from tests.testing.cases import FA2_FEATURES, spec_name, spec_of
from tests.testing.simulated import unwritten_is_nan

if TYPE_CHECKING:
    from collections.abc import Iterator

    import ptxsim

SCHEDULES = [{}, {"late": True, "schedule_seed": 1}, {"late": True, "schedule_seed": 2}]
# Types of k and v.
CODES = [(DType.E4M3, DType.E4M3), (DType.E5M2, DType.E4M3), (DType.INT8, DType.INT8)]
# What is asked of caches of codes, and with queries in which type.
CACHES = [
    ({"seqlen_q": 1, "head_dim": 128, "page_size": 16}, DType.BF16),
    ({"seqlen_q": 40, "head_dim": 64, "causal": True, "softcap": 15.0}, DType.FP16),
    ({"seqlen_q": 9, "head_dim": 256, "window": (100, 0), "sink_tokens": 3, "learnable_sink": True}, DType.BF16),
    ({"seqlen_q": 3, "head_dim": 80, "head_dim_v": 48, "alibi": True, "varlen_q": True, "page_size": 64}, DType.FP16),
]
# What is asked of queries in fp8: types of q, k and v, splits, the output's type.
QUERIES = [
    ({"seqlen_q": 1, "head_dim": 128, "page_size": 16}, "e4m3 e4m3 e4m3", 0, torch.float16),
    ({"seqlen_q": 40, "head_dim": 64, "causal": True, "softcap": 15.0}, "e5m2 e4m3 e5m2", 3, torch.bfloat16),
    (
        {"seqlen_q": 9, "head_dim": 256, "window": (100, 0), "sink_tokens": 3, "learnable_sink": True},
        *("e4m3 e5m2 e4m3", 0, torch.bfloat16),
    ),
    (
        {"seqlen_q": 7, "head_dim": 80, "head_dim_v": 48, "alibi": True, "varlen_q": True, "page_size": 64},
        *("e4m3 e4m3 e5m2", 2, torch.float16),
    ),
    (
        {"seqlen_q": 20, "head_dim": 48, "tree": True, "seqused_k": True, "cache_leftpad": True},
        *("e5m2 e5m2 e4m3", 0, torch.float16),
    ),
    ({"seqlen_q": 140, "head_dim": 32, "causal": True, "cache_batch_idx": True}, "e4m3 e4m3 e4m3", 1, torch.bfloat16),
]
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
# What is asked of caches whose rows, or pages, have descales of their own: tiles of 16, 64 and 128 rows.
ROW_DESCALES = [
    ({"seqlen_q": 1, "head_dim": 128}, "rows", DType.BF16),
    ({"seqlen_q": 1, "head_dim": 64, "page_size": 16, "softcap": 15.0, "learnable_sink": True}, "pages", DType.FP16),
    ({"seqlen_q": 3, "head_dim": 128, "page_size": 1, "causal": True, "alibi": True}, "rows", DType.BF16),
    ({"seqlen_q": 2, "head_dim": 64, "cache_batch_idx": True, "cache_leftpad": True}, "rows", DType.FP16),
    (
        {"seqlen_q": 9, "head_dim": 64, "cache_batch_idx": True, "page_size": 64, "causal": True, "varlen_q": True},
        *("rows", DType.BF16),
    ),
    ({"seqlen_q": 9, "head_dim": 256, "window": (100, 0), "sink_tokens": 3, "seqused_k": True}, "rows", DType.BF16),
    ({"seqlen_q": 12, "head_dim": 80, "head_dim_v": 48, "tree": True, "page_size": 64}, "pages", DType.FP16),
    ({"seqlen_q": 100, "head_dim": 128, "head_dim_v": 64, "causal": True, "page_size": 16}, "rows", DType.BF16),
]

# Lengths of a batch in which a split of every sequence into as many parts leaves most CTAs waiting for the longest.
SKEWED = (1, 17, 4000, 64, 5, 900, 130, 2)


def features(lengths: list[dict[str, Any]]) -> dict[str, list]:
    """Levels of what a kernel's grid varies; ``lengths``: how they are given."""
    return {
        **FA2_FEATURES,
        "lengths": lengths,
        "heads": [(2, 2), (8, 2), (3, 1)],
        "layout": ["contiguous", "padded", "transposed", "expanded"],
        # tiles of 16, 64 and 128 rows, of one row and of many, and tiles that end inside a query's group of heads
        "seqlens": [(1, 300), (5, 211), (40, 77), (90, 150)],
        # evenly between so many SMs, or in parts
        "cut": [(0, 1), (0, 3), (0, 8), (0, 132), (1, 132), (2, 132), (7, 132)],
        "inputs": ["random", "peaked"],
        "schedule": [{}, {"late": True, "schedule_seed": 1}, {"late": True, "schedule_seed": 2}],
    }


def case_name(case: dict) -> str:
    return f"{spec_name(spec_of(case))}-{case['cut']}-{case['inputs']}"


def query_spec(sizes: dict, dtypes: str) -> InputSpec:
    """Of q, k and v in fp8."""
    of = dict(zip(("dtype", "dtype_k", "dtype_v"), map(DType, dtypes.split()), strict=True))
    return InputSpec(2, seqlen_k=330, heads=8, heads_kv=2, **of, **sizes)


def cache_spec(codes: tuple[DType, DType], sizes: dict, dtype: DType) -> InputSpec:
    """Of queries in ``dtype`` over keys and values in ``codes``."""
    return InputSpec(2, seqlen_k=330, heads=8, heads_kv=2, dtype_k=codes[0], dtype_v=codes[1], dtype=dtype, **sizes)


@dataclass(frozen=True)
class Split:
    """A kernel, by its name in the table, on an architecture."""

    name: str
    arch: str

    @property
    def table(self) -> DispatchTable:
        """One in which there is no other, so that problems that others are preferred for are this kernel's."""
        return DispatchTable(tuple(entry for entry in TABLE.entries if entry.name == self.name))

    def run(
        self, spec: InputSpec, inputs: str = "random", splits: int = 0, arch: str | None = None, **simulation: Any
    ) -> tuple[torch.Tensor, torch.Tensor, ptxsim.Simulation]:
        """(out, lse, simulation) of one call, after comparison with the reference."""
        return self.check(make_inputs(spec, inputs), splits, arch, **simulation)

    def check(
        self,
        given: Inputs,
        splits: int = 0,
        arch: str | None = None,
        out_dtype: torch.dtype | None = None,
        **simulation: Any,
    ):
        """The same for given inputs."""
        with cute_fa.simulate(arch or self.arch, **simulation) as simulated, unwritten_is_nan():
            out, lse = engine.attention(given.call(num_splits=splits, out_dtype=out_dtype))
        assert out_dtype in (None, out.dtype)
        result = expected(given.q, given.k, given.v, **given.options(), out_dtype=out_dtype).check(out, lse)
        assert result.ok, result
        return out, lse, simulated

    def run_case(self, case: dict) -> None:
        """One case of a grid of :func:`features`."""
        splits, num_sms = case["cut"]
        self.run(spec_of(case), case["inputs"], splits, num_sms=num_sms, **case["schedule"])

    def run_case_on_the_gpu(self, case: dict) -> None:
        """The same, on as many SMs as there are."""
        self.run_on_the_gpu(spec_of(case), case["inputs"], case["cut"][0])

    def run_on_the_gpu(self, spec: InputSpec, inputs: str, splits: int = 0) -> None:
        """One call there, and its comparison with the reference."""
        given = make_inputs(spec, inputs, device="cuda")
        out, lse = engine.attention(given.call(num_splits=splits))
        result = expected(given.q, given.k, given.v, **given.options()).check(out, lse)
        assert result.ok, result


class OneKernel:
    """Tests of problems that others are preferred for."""

    split: ClassVar[Split]

    @pytest.fixture(autouse=True)
    def only_this_kernel(self, monkeypatch) -> Iterator[None]:
        monkeypatch.setattr(engine, "TABLE", self.split.table)
        plans.PLANS.clear()
        yield
        plans.PLANS.clear()


class CodeTests(OneKernel):
    """Caches in fp8 and int8 beside queries in 16 bits, and in fp8 beside queries in fp8."""

    @abstractmethod
    def key_bytes(self, given: Inputs, num_sms: int) -> int:
        """Bytes of k and v that a call loads."""

    @pytest.mark.sampled
    @pytest.mark.parametrize("codes", CODES, ids=str)
    @pytest.mark.parametrize(("sizes", "dtype"), CACHES, ids=str)
    def test_caches_of_codes(self, codes, sizes, dtype):
        for simulation in SCHEDULES[:2]:
            self.split.run(cache_spec(codes, sizes, dtype), "peaked", num_sms=8, **simulation)

    @pytest.mark.gpu
    @pytest.mark.parametrize("codes", CODES, ids=str)
    @pytest.mark.parametrize(("sizes", "dtype"), CACHES, ids=str)
    def test_caches_of_codes_on_the_gpu(self, codes, sizes, dtype):
        self.split.run_on_the_gpu(cache_spec(codes, sizes, dtype), "peaked")

    @pytest.mark.sampled
    @pytest.mark.parametrize(("sizes", "dtypes", "splits", "out_dtype"), QUERIES, ids=str)
    def test_fp8_queries(self, sizes, dtypes, splits, out_dtype):
        given = make_inputs(query_spec(sizes, dtypes), "peaked")
        for simulation in SCHEDULES[:2]:
            self.split.check(given, splits, out_dtype=out_dtype, num_sms=8, **simulation)

    @pytest.mark.gpu
    @pytest.mark.parametrize(("sizes", "dtypes", "splits"), [case[:3] for case in QUERIES], ids=str)
    def test_fp8_queries_on_the_gpu(self, sizes, dtypes, splits):
        self.split.run_on_the_gpu(query_spec(sizes, dtypes), "peaked", splits)

    @pytest.mark.sampled
    @pytest.mark.parametrize("page_size", [1, 4, 32, 1024])
    def test_pages_of_codes(self, page_size):
        """Unlisted pages and unused slots are NaN."""
        codes = {"dtype_k": DType.E4M3, "dtype_v": DType.E5M2}
        self.split.run(InputSpec(2, 2, 300, 4, 2, 64, page_size=page_size, causal=True, **codes), "peaked", num_sms=3)

    @pytest.mark.sampled
    @pytest.mark.parametrize("page_size", [None, 8])
    def test_a_prompt_over_codes(self, page_size):
        """Several tiles of queries, in one part each."""
        codes = {"dtype_k": DType.E4M3, "dtype_v": DType.E4M3, "page_size": page_size}
        self.split.run(InputSpec(2, 140, 150, 2, 1, 128, 64, causal=True, **codes), "peaked", 1)

    @pytest.mark.sampled
    @pytest.mark.parametrize("dtype", [E4M3, E5M2, torch.int8])
    @pytest.mark.parametrize("queries", [torch.float16, torch.bfloat16])
    def test_every_code_is_its_number(self, dtype, queries):
        """O of a single key is its V, 256 codes in a row, and the score of a query with a single 1 one code of K."""
        codes = torch.arange(256, dtype=torch.uint8).view(dtype)
        codes = torch.where(codes.float().isfinite(), codes.float(), 0.0).to(dtype)
        order = torch.randperm(256, generator=torch.Generator().manual_seed(3))
        k, v = codes.view(1, 1, 1, 256), codes.view(torch.uint8)[order].view(dtype).view(1, 1, 1, 256)
        q = torch.eye(256, dtype=queries).view(1, 64, 4, 256)
        descales = {"k_descale": torch.tensor([[0.75]]), "v_descale": torch.tensor([[0.5]])}
        with cute_fa.simulate(self.split.arch, num_sms=1):
            out, lse = cute_fa.flash_attn_func(q, k, v, softmax_scale=1.0, num_splits=0, return_lse=True, **descales)
        assert torch.equal(out.float(), 0.5 * v.float().expand(1, 64, 4, 256))
        scores = 0.75 * k.float().view(64, 4).T[None]
        torch.testing.assert_close(lse, scores, rtol=1e-6, atol=2e-6)

    @pytest.mark.sampled
    @pytest.mark.parametrize("dtype", [E4M3, E5M2])
    @pytest.mark.parametrize("keys", [E4M3, E5M2])
    def test_every_code_of_a_query_is_its_number(self, dtype, keys):
        """The score of a key with a single 1 is one code of Q, of which each row has all in an order of its own."""
        codes = torch.arange(256, dtype=torch.uint8).view(dtype)
        codes = torch.where(codes.float().isfinite(), codes.float(), 0.0)
        q = torch.stack([codes.roll(7 * row) for row in range(64)]).to(dtype).view(1, 16, 4, 256)
        descales = {"q_descale": torch.tensor([[0.75]]), "k_descale": torch.tensor([[2.0]])}
        for place in (0, 13, 255):
            k = torch.zeros(1, 1, 1, 256)
            k[..., place] = 1.0
            k = k.to(keys)
            with cute_fa.simulate(self.split.arch, num_sms=1):
                _, lse = cute_fa.flash_attn_func(q, k, k, softmax_scale=1.0, num_splits=0, return_lse=True, **descales)
            scores = 1.5 * q[..., place].float().mT
            torch.testing.assert_close(lse, scores, rtol=1e-6, atol=2e-6)

    def test_queries_of_any_magnitude(self):
        """Of bf16 each row has a power of two of its own: scores of a single key, off by 2^-24 of what the largest
        element would give."""
        rng = torch.Generator().manual_seed(4)
        exponents = torch.randint(-90, 90, (1, 16, 4, 1), generator=rng)
        within = torch.randint(-20, 1, (1, 16, 4, 128), generator=rng)
        q = (torch.randn(1, 16, 4, 128, generator=rng) * 2.0 ** (exponents + within)).bfloat16()
        k = torch.randn(1, 1, 1, 128, generator=rng).to(E4M3)
        with cute_fa.simulate(self.split.arch, num_sms=1):
            _, lse = cute_fa.flash_attn_func(q, k, k, softmax_scale=1.0, num_splits=0, return_lse=True)
        exact = (q.double() * k.double()).sum(-1).mT
        bound = (q.double().abs().amax(-1) * k.double().abs().sum()).mT
        assert ((lse - exact).abs() <= 2.0**-22 * bound + 2e-6).all()

    @pytest.mark.sampled
    @pytest.mark.without_races
    @pytest.mark.parametrize("page_size", [None, 16])
    @pytest.mark.parametrize("seqlen_q", [1, 4, 16])
    def test_codes_are_read_once(self, seqlen_q, page_size):
        """A byte each, of all eight query heads of a kv head, and none beyond the sequence's end."""
        lengths = {"seqused_k": True, "lengths_k": (301, 77), "page_size": page_size}
        spec = InputSpec(2, seqlen_q, 330, 16, 2, 64, 32, dtype_k=DType.E4M3, dtype_v=DType.E5M2, **lengths)
        assert self.key_bytes(make_inputs(spec, "random"), 3) == (301 + 77) * 2 * (64 + 32)


class RowDescaleTests(OneKernel):
    """Caches of codes whose rows have descales of their own; those of rows that do not count are NaN."""

    @pytest.mark.sampled
    @pytest.mark.parametrize("codes", CODES, ids=str)
    @pytest.mark.parametrize(("sizes", "descales", "dtype"), ROW_DESCALES, ids=str)
    def test_row_descales(self, codes, sizes, descales, dtype):
        spec = cache_spec(codes, {**sizes, "row_descales": descales}, dtype)
        self.split.run(spec, "peaked", num_sms=8, race=True, late=True, schedule_seed=1)

    @pytest.mark.gpu
    @pytest.mark.parametrize(("sizes", "descales", "dtype"), ROW_DESCALES, ids=str)
    def test_row_descales_on_the_gpu(self, sizes, descales, dtype):
        codes = DType.E4M3, DType.E5M2
        self.split.run_on_the_gpu(cache_spec(codes, {**sizes, "row_descales": descales}, dtype), "peaked")

    @pytest.mark.sampled
    @pytest.mark.parametrize("other", ["of heads", "none"])
    @pytest.mark.parametrize("of_rows", ["k", "v"])
    def test_of_k_or_of_v_alone(self, of_rows, other):
        """Beside descales of kv heads, or none, of the other."""
        codes = {"dtype_k": DType.E4M3, "dtype_v": DType.E4M3, "page_size": 16}
        spec = InputSpec(2, 3, 200, 8, 2, 64, causal=True, **codes)
        rows = make_inputs(dataclasses.replace(spec, row_descales="rows"), "peaked")
        heads = make_inputs(spec, "peaked")
        replaced = f"{'v' if of_rows == 'k' else 'k'}_descale"
        descale = getattr(heads, replaced) if other == "of heads" else None
        self.split.check(dataclasses.replace(rows, **{replaced: descale}), num_sms=3)

    @pytest.mark.sampled
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("queries", [1, 20])
    def test_descales_of_any_magnitude(self, queries, dtype):
        """From 2^-12 to 2^12: O is off by the rounding of P and of O, of what the values add up to without their signs,
        also where the key of the largest descale has a small P; LSE by as little as ever."""
        rng = torch.Generator().manual_seed(5)
        q = torch.randn(2, queries, 8, 64, generator=rng).to(dtype)
        k, v = (torch.randn(2, 300, 2, 64, generator=rng).to(E4M3) for _ in range(2))
        k_descale, v_descale = (torch.exp2(24 * torch.rand(2, 300, 2, 1, generator=rng) - 12) for _ in range(2))
        options = {"softmax_scale": 2.0**-13, "causal": True}
        keys, values = k.double() * k_descale, v.double() * v_descale
        exact, exact_lse = attention(q, keys, values, dtype=torch.float64, **options)
        without_signs, _ = attention(q, keys, values.abs(), dtype=torch.float64, **options)
        with cute_fa.simulate(self.split.arch, num_sms=4):
            out, lse = cute_fa.flash_attn_with_kvcache(
                *(q, k, v), cache_seqlens=300, k_descale=k_descale, v_descale=v_descale, return_lse=True, **options
            )
        assert ((out - exact).abs() <= (2.0**-10 + torch.finfo(dtype).eps) * without_signs).all()
        assert (lse - exact_lse).abs().max() < 1e-4


class SplitTests(OneKernel):
    """``ctas_per_sm``: of tiles of 16 rows and head_dim 64."""

    ctas_per_sm: ClassVar[int]

    @abstractmethod
    def key_bytes(self, given: Inputs, num_sms: int) -> int:
        """Bytes of k and v that a call loads; head_dim and head_dim_v differ."""

    @abstractmethod
    def key_blocks(self, given: Inputs, num_sms: int) -> list[int]:
        """How many key blocks of k each CTA of a call loads; k is dense and contiguous, head_dim and head_dim_v
        differ."""

    @pytest.mark.sampled
    @pytest.mark.parametrize("head_dim_v", [136, 208])
    def test_blocks_of_a_window_with_sinks(self, head_dim_v):
        """Which are counted from the window's first one, and looked like an overflow where head_dim_v differs."""
        spec = InputSpec(1, 70, 300, 4, 2, 256, head_dim_v, window=(100, 5), sink_tokens=3)
        self.split.run(spec, "peaked", num_sms=3)

    @pytest.mark.sampled
    @pytest.mark.parametrize("num_sms", [1, 2, 5, 132])
    def test_a_sequence_without_keys(self, num_sms):
        self.check_without_keys(num_sms=num_sms)

    @pytest.mark.sampled
    @pytest.mark.parametrize("splits", [1, 2, 5, 6, 300])
    def test_parts_without_keys(self, splits):
        """More parts than a sequence has blocks."""
        self.check_without_keys(splits)

    def check_without_keys(self, splits: int = 0, **simulation: Any) -> None:
        """The second sequence has none: what the learnable sink leaves, or 0 and −inf."""
        spec = InputSpec(2, 1, 330, 4, 1, 64, page_size=16, lengths_k=(330, 0), learnable_sink=True)
        out, lse, _ = self.split.run(spec, "peaked", splits, **simulation)
        sink = make_inputs(spec, "peaked").learnable_sink
        assert (out[1] == 0).all() and torch.allclose(lse[1, :, 0], sink, atol=1e-6)
        out, lse, _ = self.split.run(dataclasses.replace(spec, learnable_sink=False), "peaked", splits, **simulation)
        assert (out[1] == 0).all() and (lse[1] == -torch.inf).all()

    @pytest.mark.sampled
    @pytest.mark.parametrize("splits", [0, 3])
    def test_same_bits_under_every_schedule(self, splits):
        spec = InputSpec(2, 3, 300, 4, 2, 64, causal=True, page_size=16)
        first, first_lse, _ = self.split.run(spec, splits=splits, num_sms=3)
        for seed in range(2):
            out, lse, _ = self.split.run(spec, splits=splits, num_sms=3, schedule_seed=seed, late=True)
            assert torch.equal(out, first) and torch.equal(lse, first_lse)

    def test_a_window_reads_its_keys_and_the_sink_alone(self):
        """No work in the gap: as many instructions whether 512 or 1536 keys lie between."""
        near, far = (
            self.split.run(InputSpec(1, 1, seqlen_k, 4, 1, 64, window=(64, 0), sink_tokens=4), num_sms=1)[2]
            .launches[0]
            .warp_instrs
            for seqlen_k in (700, 1724)
        )
        assert far == near

    @pytest.mark.sampled
    @pytest.mark.without_races
    @pytest.mark.parametrize(
        "lengths", [{"seqused_k": True}, {"varlen_q": True, "lengths_q": (1,) * len(SKEWED), "varlen_k": True}]
    )
    @pytest.mark.parametrize("seed", range(3))
    def test_no_cta_has_much_more_than_the_others(self, lengths, seed):
        """Lengths from 1 to 4000 in one batch, in any order: key blocks of the CTA that has most, and their mean."""
        order = torch.randperm(len(SKEWED), generator=torch.Generator().manual_seed(seed))
        lengths_k = tuple(SKEWED[i] for i in order)
        spec = InputSpec(8, 1, max(SKEWED), 4, 2, 64, 32, lengths_k=lengths_k, **lengths)
        blocks = self.key_blocks(make_inputs(spec, "random"), 4 // self.ctas_per_sm)
        total = 2 * sum(-(-length // 64) for length in SKEWED)
        assert len(blocks) == 4 and sum(blocks) == total and total / 4 > 20
        assert max(blocks) <= 1.05 * total / 4

    @pytest.mark.sampled
    @pytest.mark.without_races
    @pytest.mark.parametrize("page_size", [None, 16, 64])
    @pytest.mark.parametrize(("seqlen_q", "tiles"), [(1, 1), (2, 1), (4, 1), (8, 1), (16, 1), (64, 4)])
    def test_keys_are_read_once_for_128_rows(self, seqlen_q, tiles, page_size):
        """Of all eight query heads of a kv head, however the blocks are cut, and none beyond the sequence's end."""
        lengths = {"seqused_k": True, "lengths_k": (301, 77)}
        spec = InputSpec(2, seqlen_q, 330, 16, 2, 64, 32, page_size=page_size, **lengths)
        assert tiles == -(-8 * seqlen_q // 128)
        assert self.key_bytes(make_inputs(spec, "random"), 3) == tiles * (301 + 77) * 2 * (64 + 32) * 2
