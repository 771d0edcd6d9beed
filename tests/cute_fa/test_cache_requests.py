"""Requests over a paged cache and the chunks of a prefill: what they describe, what they refuse, and that they run."""

import dataclasses
import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch

import cute_fa
from cute_fa import (
    ChunkedPrefillRequest,
    ChunkLayout,
    CumulativeSeqlens,
    KvLayout,
    MaskKind,
    PagedAttentionRequest,
    PagedKvCache,
    SmArch,
    VarlenFwdRequest,
)
from cute_fa.semantics.errors import (
    ArgumentError,
    ChunkIndexError,
    CumulativeSeqlensError,
    CuteFaError,
    DeviceError,
    DTypeError,
    EmptyBatchError,
    EmptyCacheError,
    Fp8Error,
    LengthError,
    NoDeviceError,
    PagedHeadDimError,
    PageSizeError,
    PageTableError,
    ShapeError,
    StrideError,
    ZeroLengthError,
)
from cute_fa.semantics.problem import PAGE_SIZES
from cute_fa.semantics.reference import expected
from cute_fa.tools.inputs import InputSpec, make_inputs
from fa2_sm80.split.entry import Fa2Split
from fa3_sm90.decode.entry import Fa3Decode
from tests.testing.caches import places
from tests.testing.simulated import unwritten_is_nan

BF16 = torch.bfloat16
WINDOW = {"mask": MaskKind.SLIDING_CAUSAL, "window": (40, 0), "sink_tokens": 4}
SPEC = InputSpec(3, 70, 150, 4, 2, 64, page_size=16, window=(40, 0), sink_tokens=4, varlen_q=True)


def zeros(*shape, dtype=BF16):
    return torch.zeros(shape, dtype=dtype)


def request_of(given, arch=None, layout=KvLayout.NHD, **changes):
    """A request for the inputs, with their mask."""
    k, v = given.k, given.v
    if layout is KvLayout.HND:
        k, v = (t.transpose(1, 2).contiguous() for t in (k, v))
    offsets = None if given.cu_seqlens_q is None else CumulativeSeqlens.from_tensor(given.cu_seqlens_q)
    options = {**WINDOW, "arch": arch, "cu_seqlens_q": offsets, **changes}
    return PagedAttentionRequest(given.q, PagedKvCache(k, v, layout), given.page_table, given.seqused_k, **options)


def assert_right(given, result):
    comparison = expected(given.q, given.k, given.v, **given.options()).check(*result)
    assert comparison.ok, comparison


def test_named_request():
    """The last chunk of two prompts of 16384 tokens: GQA 8, sliding window of 4096, 4 sink tokens, bf16 on sm_90a; the
    request of atomr-accel-flashattn's tests. Made without a GPU."""
    offsets = {"cu_seqlens_q": CumulativeSeqlens.from_lengths((2048, 2048))}
    options = {"mask": MaskKind.SLIDING_CAUSAL, "window": (4096, 0), "sink_tokens": 4, "arch": SmArch.SM_90A}
    chunk = ChunkLayout(2048, 14336, 8, 7)
    q, kv = (torch.empty(rows, heads, 128, dtype=BF16) for rows, heads in ((4096, 8), (32768, 1)))
    keys = CumulativeSeqlens.from_lengths((16384, 16384))
    packed = VarlenFwdRequest(q, kv, kv, cu_seqlens_k=keys, **offsets, **options)
    cache = PagedKvCache(*(kv.reshape(512, 64, 1, 128),) * 2)
    lengths = torch.full((2,), 16384, dtype=torch.int32)
    table = torch.arange(512, dtype=torch.int32).reshape(2, 256)
    paged = PagedAttentionRequest(q, cache, table, lengths, **offsets, **options)
    assert (offsets["cu_seqlens_q"].total, keys.total) == (4096, 32768)
    for attention in (packed, paged):
        request = ChunkedPrefillRequest(attention, chunk)
        assert request.chunk.is_final
        key, problem = request.dispatch_key(), request.problem()
        assert (key.varlen, key.causal, key.sliding_window, key.sink, key.gqa_ratio) == (True, True, 4096, 4, 8)
        assert (key.arch, key.dtype, key.head_dim) == (SmArch.SM_90A, cute_fa.DType.BF16, 128)
        assert (problem.batch, problem.seqlen_q, problem.seqlen_k) == (2, 2048, 16384)
        assert request.kernel().family == "fa3"
        page = "_page64" if attention is paged else ""
        assert request.kernel_name() == f"fa3_fwd_sm90a_bf16_hd128_causal_varlen_sw4096_sink4{page}_gqa8"
        with pytest.raises(NoDeviceError, match="CPU tensors"):
            request.run()


class TestChunkLayout:
    def test_values(self):
        assert [ChunkLayout(512, 512 * i, 3, i).is_final for i in range(3)] == [False, False, True]
        assert ChunkLayout(1, 0, 1, 0) == ChunkLayout(
            chunk_q_tokens=1, prefix_kv_tokens=0, total_chunks=1, chunk_index=0
        )

    @pytest.mark.parametrize(
        ("layout", "error", "message"),
        [
            ((1024, 0, 4, 4), ChunkIndexError, "chunk_index=4: there are 4 chunks"),
            ((1024, 0, 4, 5), ChunkIndexError, "chunk_index=5"),
            ((0, 0, 1, 0), ZeroLengthError, "chunk_q_tokens=0: at least 1"),
            ((1024, 0, 0, 0), ZeroLengthError, "total_chunks=0"),
            ((-1, 0, 1, 0), ArgumentError, "chunk_q_tokens=-1: an int of at least 0"),
            ((1024, -1, 1, 0), ArgumentError, "prefix_kv_tokens=-1"),
            ((1024, 0, -1, 0), ArgumentError, "total_chunks=-1"),
            ((1024, 0, 1, -1), ArgumentError, "chunk_index=-1"),
            ((1024.0, 0, 1, 0), ArgumentError, "chunk_q_tokens=1024.0"),
            ((1024, None, 1, 0), ArgumentError, "prefix_kv_tokens=None"),
            ((1024, 0, 1, False), ArgumentError, "chunk_index=False"),
        ],
    )
    def test_errors(self, layout, error, message):
        with pytest.raises(CuteFaError, match=message) as caught:
            ChunkLayout(*layout)
        assert type(caught.value) is error


class TestPagedKvCache:
    @pytest.mark.parametrize("page_size", PAGE_SIZES)
    def test_sizes(self, page_size):
        sizes = {"head_dim_v": 40, "dtype": torch.float16, "device": "cpu"}
        for layout, shape in ((KvLayout.NHD, (5, page_size, 2)), (KvLayout.HND, (5, 2, page_size))):
            cache = PagedKvCache.empty(5, page_size, 2, 64, layout=layout, **sizes)
            assert (cache.k_pages.shape, cache.v_pages.shape) == ((*shape, 64), (*shape, 40))
            assert (cache.k.shape, cache.v.shape) == ((5, page_size, 2, 64), (5, page_size, 2, 40))
            assert (cache.num_pages, cache.page_size, cache.kv_heads) == (5, page_size, 2)
            assert (cache.head_dim, cache.head_dim_v, cache.dtype) == (64, 40, cute_fa.DType.FP16)
            assert cache.k.data_ptr() == cache.k_pages.data_ptr()
            row = page_size - 1
            cache.v[4, row, 1] = 7.0
            assert cache.v_pages[(4, row, 1) if layout is KvLayout.NHD else (4, 1, row)].eq(7.0).all()

    def test_defaults(self):
        cache = PagedKvCache.empty(2, 8, 1, 64, device="cpu")
        assert (cache.layout, cache.dtype, cache.head_dim_v) == (KvLayout.NHD, cute_fa.DType.BF16, 64)

    @pytest.mark.parametrize(
        ("changes", "error", "message"),
        [
            ({"k_pages": None}, ArgumentError, "k_pages is NoneType: a Tensor"),
            ({"layout": "hnd"}, ArgumentError, "layout is str: a KvLayout"),
            ({"k_pages": zeros(16, 2, 64)}, ShapeError, r"k_pages has shape .*\(num_pages, page_size, kv_heads"),
            ({"layout": KvLayout.HND, "v_pages": zeros(2, 64)}, ShapeError, r"\(num_pages, kv_heads, page_size, head"),
            ({"v_pages": zeros(4, 16, 2, 64)}, ShapeError, r"v_pages \(4, 16, 2, 64\) and k_pages \(6, 16, 2, 64\)"),
            ({"v_pages": zeros(6, 16, 2, 64, dtype=torch.float16)}, DTypeError, "v_pages is float16: bfloat16 is"),
            ({"k_pages": zeros(6, 16, 2, 64, dtype=torch.float32)}, DTypeError, "k_pages is float32: one of"),
            ({"v_pages": zeros(6, 16, 2, 64).to("meta")}, DeviceError, "v_pages are on meta and k_pages on cpu"),
            ({"k_pages": zeros(0, 16, 2, 64), "v_pages": zeros(0, 16, 2, 64)}, EmptyCacheError, "has no pages"),
            ({"k_pages": zeros(6, 12, 2, 64), "v_pages": zeros(6, 12, 2, 64)}, PageSizeError, "page_size=12: a power"),
            (
                {"layout": KvLayout.HND, "k_pages": zeros(6, 16, 3, 64), "v_pages": zeros(6, 16, 3, 64)},
                PageSizeError,
                "page_size=3: a power of two from 1 to 1024",
            ),
            ({"k_pages": zeros(6, 16, 0, 64), "v_pages": zeros(6, 16, 0, 64)}, ShapeError, "kv_heads=0"),
            ({"v_pages": zeros(6, 16, 2, 0)}, ShapeError, "head_dim_v=0"),
            ({"k_pages": zeros(6, 16, 2, 68)[..., :64]}, StrideError, "k_pages has strides .* multiple of 16 bytes"),
            ({"v_pages": zeros(6, 16, 64, 2).transpose(2, 3)}, StrideError, "v_pages .* last dimension must be contig"),
        ],
    )
    def test_errors(self, changes, error, message):
        pages = {"k_pages": zeros(6, 16, 2, 64), "v_pages": zeros(6, 16, 2, 64)}
        with pytest.raises(CuteFaError, match=message) as caught:
            PagedKvCache(**{**pages, **changes})
        assert type(caught.value) is error

    @pytest.mark.parametrize(
        ("changes", "error", "message"),
        [
            ({"num_pages": 0}, EmptyCacheError, "no pages"),
            ({"num_pages": -1}, ArgumentError, "num_pages=-1"),
            ({"page_size": 24}, PageSizeError, "page_size=24"),
            ({"kv_heads": 2.0}, ArgumentError, "kv_heads=2.0: an int"),
            ({"head_dim_v": True}, ArgumentError, "head_dim_v=True"),
            ({"head_dim": 60}, ShapeError, r"k_pages \(4, 16, 2, 60\): head_dim=60: a multiple of 8"),
            ({"dtype": torch.float32}, DTypeError, "k_pages is float32"),
        ],
    )
    def test_errors_of_empty(self, changes, error, message):
        sizes = {"num_pages": 4, "page_size": 16, "kv_heads": 2, "head_dim": 64, "device": "cpu"}
        with pytest.raises(CuteFaError, match=message) as caught:
            PagedKvCache.empty(**{**sizes, **changes})
        assert type(caught.value) is error


class TestPagedAttention:
    @pytest.mark.parametrize("arch", ["sm_80", "sm_90a", "sm_100a"])
    def test_both_layouts(self, arch):
        """A packed prefill; kernels follow the strides of either layout."""
        given = make_inputs(SPEC, "peaked")
        with cute_fa.simulate(arch), unwritten_is_nan():
            results = [request_of(given, layout=layout).run() for layout in KvLayout]
        assert_right(given, results[0])
        assert all(map(torch.equal, *results))

    def test_decoding_chooses_its_splits(self):
        """Dense q of one token a sequence: the table's kernel for few rows, by name and by result."""
        given = make_inputs(dataclasses.replace(SPEC, seqlen_q=1, varlen_q=False, seqlen_k=700, window=(600, 0)))
        with cute_fa.simulate("sm_90a") as simulation, unwritten_is_nan():
            request = request_of(given, window=(600, 0), max_seqlen_k=700)
            assert_right(given, request.run())
        assert request.kernel_name() == "fa3_fwd_sm90a_bf16_hd64_causal_varlen_sw600_sink4_page16_split0_gqa2"
        assert request.kernel() is Fa3Decode
        parts, _ = simulation.launches  # and their merge
        # as many keys as window and sink show make 10 blocks, of 3 sequences with 2 kv heads, two blocks a CTA
        assert parts.grid == (30, 1, 1)
        assert request.dispatch_key().splits == 1
        two = dataclasses.replace(request, num_splits=2)
        assert two.dispatch_key().splits == 2
        assert "_split2_" in two.kernel_name()

    def test_described_for_another_machine(self):
        given = make_inputs(SPEC)
        request = request_of(given, SmArch.SM_90A)
        assert request.kernel_name() == "fa3_fwd_sm90a_bf16_hd64_causal_varlen_sw40_sink4_page16_split0_gqa2"
        assert (request.capacity, request.problem().seqlen_k) == (160, 160)
        with (
            cute_fa.simulate("sm_80"),
            pytest.raises(ArgumentError, match="arch=sm_90a: the tensors are on cpu, sm_80"),
        ):
            request.run()

    @pytest.mark.sampled
    @pytest.mark.parametrize("arch", [SmArch.SM_80, SmArch.SM_120A])
    @pytest.mark.parametrize("dtype", [cute_fa.DType.E4M3, cute_fa.DType.E5M2])
    def test_fp8_queries(self, arch, dtype):
        given = make_inputs(dataclasses.replace(SPEC, dtype=dtype), "peaked")
        scales = {name: getattr(given, name) for name in ("q_descale", "k_descale", "v_descale")}
        with cute_fa.simulate(arch) as simulation:
            request = request_of(given, **scales)
            assert request.kernel() is Fa2Split
            assert_right(given, request.run())
            launches = len(simulation.launches)
            blocks = request_of(given, **scales | {"k_descale": torch.ones(3, 2, 2)})
            for read in (blocks.kernel, blocks.run):
                with pytest.raises(Fp8Error, match=f"{dtype.value} input on {arch.value}: no kernel"):
                    read()
            for changes, error, message in (
                ({"k_descale": None}, ArgumentError, "k_descale is NoneType: e[45]m[32] pages need a tensor"),
                ({"v_descale": 1.0}, ArgumentError, "v_descale is float"),
                ({"v_descale": torch.ones(3, 4)}, ShapeError, r"v_descale \(3, 4\): \(3, 2\) is needed"),
                ({"k_descale": torch.ones(3, 2).half()}, DTypeError, "k_descale is float16: float32"),
                ({"k_descale": torch.ones(3, 2, device="meta")}, DeviceError, "k_descale is on meta"),
            ):
                with pytest.raises(error, match=message):
                    request_of(given, **{**scales, **changes})
        assert len(simulation.launches) == launches

    @pytest.mark.parametrize(
        ("changes", "error", "message"),
        [
            (
                {"q": zeros(0, 1, 4, 64), "page_table": torch.zeros(0, 3).int()},
                EmptyBatchError,
                r"q \(0, 1, 4, 64\): a request is of at least one",
            ),
            ({"page_table": torch.zeros(2, 0).int()}, EmptyCacheError, "the cache has no pages"),
            ({"page_table": torch.zeros(2, 3)}, DTypeError, "page_table is float32: int32"),
            ({"page_table": torch.zeros(3, 3).int()}, ShapeError, "one row for each of 2 sequences"),
            ({"page_table": None}, ArgumentError, "page_table is NoneType"),
            ({"seqlens": None}, ArgumentError, "seqlens is NoneType"),
            ({"seqlens": torch.zeros(3).int()}, ShapeError, r"seqlens \(3,\): \(2,\)"),
            ({"cache": zeros(6, 16, 2, 64)}, ArgumentError, "cache is Tensor: a PagedKvCache is needed"),
            ({"q": zeros(2, 1, 4, 128)}, PagedHeadDimError, "paged cache.k_pages has head_dim 64 and q 128"),
            ({"q": zeros(2, 1, 3, 64)}, ShapeError, "3 query heads and 2 kv heads"),
            ({"q": zeros(2, 1, 4, 64, dtype=torch.float16)}, DTypeError, "cache.k_pages is bfloat16: q is float16"),
            ({"cu_seqlens_q": (0, 1, 2)}, ArgumentError, "cu_seqlens_q is tuple"),
            ({"cu_seqlens_q": CumulativeSeqlens((0, 1, 2))}, ShapeError, "q has shape"),
            (
                {"q": zeros(2, 4, 64), "cu_seqlens_q": CumulativeSeqlens((0, 1, 3))},
                CumulativeSeqlensError,
                "cu_seqlens_q ends at 3: q has 2 rows",
            ),
            ({"max_seqlen_k": 0}, ZeroLengthError, "max_seqlen_k=0"),
            ({"num_splits": -1}, ArgumentError, "num_splits=-1"),
            ({"k_descale": torch.ones(2, 2)}, ArgumentError, "k_descale with bf16 pages: only fp8 and int8 pages"),
            ({"mask": MaskKind.CAUSAL, "alibi_slopes": torch.ones(4)}, ArgumentError, "alibi_slopes given"),
        ],
    )
    def test_errors_when_made(self, changes, error, message):
        self._refused(changes, error, message, PagedAttentionRequest)

    @pytest.mark.parametrize(
        ("changes", "error", "message"),
        [
            ({"page_table": torch.tensor([[0, 1, 2], [3, 4, 6]]).int()}, PageTableError, r"\[1\] lists page 6: .* 6 p"),
            ({"page_table": torch.tensor([[0, -1, 2], [3, 4, 5]]).int()}, PageTableError, r"\[0\] lists page -1"),
            ({"seqlens": torch.tensor([48, 49]).int()}, LengthError, r"seqlens\[1\]=49: between 0 and the 48 tokens"),
            ({"seqlens": torch.tensor([-1, 48]).int()}, LengthError, r"seqlens\[0\]=-1"),
            ({"max_seqlen_k": 47}, LengthError, "max_seqlen_k=47: a sequence has 48 tokens"),
        ],
    )
    def test_errors_of_values(self, changes, error, message):
        self._refused(changes, error, message, lambda **fields: PagedAttentionRequest(**fields).run())

    @staticmethod
    def _refused(changes, error, message, attempt):
        fields = {"q": zeros(2, 1, 4, 64), "cache": PagedKvCache(zeros(6, 16, 2, 64), zeros(6, 16, 2, 64))}
        fields |= {"page_table": torch.arange(6).reshape(2, 3).int(), "seqlens": torch.tensor([48, 48]).int()}
        with cute_fa.simulate("sm_80") as simulation, pytest.raises(CuteFaError, match=message) as caught:
            attempt(**fields | changes)
        assert type(caught.value) is error
        assert not simulation.launches


class TestChunkedPrefill:
    prompts = CumulativeSeqlens.from_lengths((100, 61, 33))

    @pytest.mark.sampled
    @pytest.mark.parametrize("arch", ["sm_80", "sm_90a", "sm_100a"])
    def test_chunks_give_the_whole(self, arch):
        """Three prompts in chunks of 32 tokens. Keys of later chunks are NaN in the pages, and absent where packed."""
        lengths = {"lengths_q": self.prompts.lengths, "lengths_k": self.prompts.lengths}
        given = make_inputs(dataclasses.replace(SPEC, seqlen_q=100, seqlen_k=100, **lengths), "peaked")
        right = expected(given.q, given.k, given.v, **given.options())
        paged, packed = [(torch.full_like(right.out, torch.nan), torch.full_like(right.lse, torch.nan)) for _ in "ab"]
        for index in range(4):
            offsets, layout = self.prompts.chunk(index, 32), ChunkLayout(32, 32 * index, 4, index)
            kept = CumulativeSeqlens.from_lengths([min(32 * (index + 1), n) for n in self.prompts.lengths])
            ends = [start + n for start, n in zip(self.prompts.offsets, kept.lengths, strict=False)]
            rows = torch.cat([torch.arange(end - n, end) for end, n in zip(ends, offsets.lengths, strict=True)])
            held = [places(given, b, range(n)) for b, n in enumerate(kept.lengths)]
            at = tuple(map(torch.cat, zip(*held, strict=True)))
            k, v = (torch.full_like(t, torch.nan).index_put(at, t[at]) for t in (given.k, given.v))
            step = dataclasses.replace(given, q=given.q[rows], k=k, v=v, seqused_k=torch.tensor(kept.lengths).int())
            with cute_fa.simulate(arch), unwritten_is_nan():
                over_pages = request_of(step, cu_seqlens_q=offsets)
                over_rows = VarlenFwdRequest(step.q, k[at], v[at], offsets, kept, **WINDOW)
                for whole, attention in ((paged, over_pages), (packed, over_rows)):
                    out, whole[1][:, rows] = ChunkedPrefillRequest(attention, layout).run()
                    whole[0][rows] = out.float()
        for whole in (paged, packed):
            assert right.check(*whole).ok, right.check(*whole)
        assert layout.is_final and offsets.lengths == (4, 0, 0)

    def request(self, layout, lengths_q=(32, 9), lengths_k=(96, 40), max_pages=8, pages=True):
        q, offsets = zeros(sum(lengths_q), 4, 64), CumulativeSeqlens.from_lengths(lengths_q)
        if pages:
            table, used = torch.zeros(len(lengths_q), max_pages).int(), torch.tensor(lengths_k).int()
            cache = PagedKvCache.empty(1, 16, 2, 64, device="cpu")
            attention = PagedAttentionRequest(q, cache, table, used, cu_seqlens_q=offsets)
            return ChunkedPrefillRequest(attention, ChunkLayout(*layout))
        kv = zeros(sum(lengths_k), 2, 64)
        attention = VarlenFwdRequest(q, kv, kv, offsets, CumulativeSeqlens.from_lengths(lengths_k))
        return ChunkedPrefillRequest(attention, ChunkLayout(*layout))

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"lengths_q": (33, 9)}, "a sequence of 33 queries: the chunk has 32 tokens"),
            ({"lengths_k": (97, 40)}, "sequence 0 has 32 queries and 97 keys: .* at most 64 of the prefix"),
            ({"lengths_k": (96, 8)}, "sequence 1 has 9 queries and 8 keys: they are its last keys"),
            ({"lengths_q": (0, 9), "lengths_k": (96, 74)}, "sequence 1 has 9 queries and 74 keys"),
        ],
    )
    @pytest.mark.parametrize("pages", [True, False])
    def test_lengths(self, changes, message, pages):
        with cute_fa.simulate("sm_80") as simulation, pytest.raises(LengthError, match=message):
            self.request((32, 64, 4, 2), pages=pages, **changes).run()
        assert not simulation.launches

    def test_beyond_the_pages(self):
        with cute_fa.simulate("sm_80"):
            assert self.request((32, 64, 4, 2), max_pages=6).attention.capacity == 96
            with pytest.raises(LengthError, match="64 tokens and 32 after them: a row of page_table holds 80"):
                self.request((32, 64, 4, 2), max_pages=5)
            # the last chunk may be shorter
            self.request((32, 64, 4, 2), lengths_q=(16, 9), max_pages=5)

    def test_finished_prompts_may_be_longer(self):
        with cute_fa.simulate("sm_80"):
            for pages in (True, False):
                self.request((32, 64, 4, 2), lengths_q=(0, 9), lengths_k=(120, 40), pages=pages)

    def test_kinds(self):
        with cute_fa.simulate("sm_80"):
            attention = self.request((32, 64, 4, 2)).attention
            with pytest.raises(ArgumentError, match="chunk is tuple: a ChunkLayout is needed"):
                ChunkedPrefillRequest(attention, (32, 64, 4, 2))
            dense = cute_fa.Fa2FwdRequest(*[zeros(1, 8, 2, 64)] * 3)
            with pytest.raises(ArgumentError, match="attention is Fa2FwdRequest: a PagedAttentionRequest or a Varlen"):
                ChunkedPrefillRequest(dense, ChunkLayout(32, 64, 4, 2))
            q, cache = zeros(2, 33, 4, 64), attention.cache
            with pytest.raises(LengthError, match="a sequence of 33 queries"):
                ChunkedPrefillRequest(
                    PagedAttentionRequest(q, cache, attention.page_table, attention.seqlens), ChunkLayout(32, 64, 4, 2)
                )


def test_example(monkeypatch, capsys):
    """examples/serve.py: what its steps give is what the whole sequences give, or it raises SystemExit."""
    path = Path(__file__).parents[2] / "examples" / "serve.py"
    spec = importlib.util.spec_from_file_location("serve", path)
    example = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "serve", example)
    spec.loader.exec_module(example)
    monkeypatch.setattr(sys, "argv", ["serve.py", "--arch", "sm_90a"])
    example.main()
    told = capsys.readouterr().out
    assert re.findall(r"(\w) is done: \[([\d, ]+)\]", told) == [
        ("A", "56, 37, 39"),
        ("C", "21, 21"),
        ("B", "50, 1, 39, 59"),
    ]
    assert re.search(r"C: chunk 1 of 1.*\n  B: one token", told)  # a prompt is read while others are written
    assert "A: chunk 1 of 2, fa3_fwd_sm90a_bf16_hd128_causal_varlen_page16_split0_gqa4" in told

    append = example.Layer.append

    def swap_pages(layer, sequences, new):
        q, page_table, seqlens = append(layer, sequences, new)
        return q, page_table[:, [1, 0, 2, 3, 4, 5]], seqlens

    monkeypatch.setattr(example.Layer, "append", swap_pages)
    with pytest.raises(SystemExit, match="wrong: A, C, B"):
        example.main()
