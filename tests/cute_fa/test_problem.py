"""AttentionProblem, windows, types and requests: what is normalised, and what raises."""

import dataclasses
import sys

import numpy
import pytest
import torch

import cute_fa
from cute_fa.api.attention import prepare
from cute_fa.api.requests import CumulativeSeqlens, Fa2FwdRequest, Fa3FwdRequest, PersistentMode, VarlenFwdRequest
from cute_fa.semantics import reference
from cute_fa.semantics.append_problem import AppendProblem
from cute_fa.semantics.call import Call
from cute_fa.semantics.errors import (
    ArgumentError,
    ChunkIndexError,
    CumulativeSeqlensError,
    DeviceError,
    EmptyBatchError,
    Fa3ArchError,
    Fp8Error,
    LengthError,
    NoDeviceError,
    PageSizeError,
    ShapeError,
    UnsupportedKeyError,
    WindowError,
    ZeroLengthError,
)
from cute_fa.semantics.problem import PAGE_SIZES, AttentionProblem, LiteralWindow, normalize_window
from cute_fa.semantics.tensors import problem_of
from cute_fa.semantics.types import Direction, DType, MaskKind, PositionBias, SmArch

BASE = AttentionProblem(
    arch=SmArch.SM_80,
    dtype=DType.BF16,
    batch=2,
    seqlen_q=64,
    seqlen_k=128,
    num_heads=8,
    num_heads_kv=2,
    head_dim=64,
    head_dim_v=64,
    softmax_scale=0.125,
)
FP8 = {"dtype": DType.E4M3} | dict.fromkeys(("dtype_k", "dtype_v", "out_dtype"))


@pytest.mark.parametrize(
    ("window", "causal", "expected"),
    [
        ((-1, -1), False, (None, None)),
        ((None, None), False, (None, None)),
        (None, False, (None, None)),
        ((-1, -1), True, (None, 0)),
        ((None, None), True, (None, 0)),
        ((-1, 0), False, (None, 0)),
        ((None, 0), False, (None, 0)),
        ((-1, 0), True, (None, 0)),
        ((128, -1), True, (128, 0)),
        ((128, 0), False, (128, 0)),
        ((128, 64), True, (128, 0)),
        ([0, 7], False, (0, 7)),
        ((-1, 5), False, (None, 5)),
        ((sys.maxsize, 10**30), False, (None, None)),
        ((numpy.int64(3), numpy.int32(-1)), False, (3, None)),
        (torch.tensor([3, 7]), False, (3, 7)),
        (torch.tensor([3, -1], dtype=torch.int32), True, (3, 0)),
        (numpy.array([-1, 7]), False, (None, 7)),
        ((torch.tensor(3), numpy.int64(7)), False, (3, 7)),
        (LiteralWindow(3, None), False, (3, None)),
        (LiteralWindow(-4, None), False, (-4, None)),
        (LiteralWindow(None, -1), False, (None, -1)),
        (LiteralWindow(-4, -1), False, (-4, -1)),
        (LiteralWindow(numpy.int64(-1), torch.tensor(3)), False, (-1, 3)),
        (LiteralWindow(-1, -3), True, (-1, -3)),
        (LiteralWindow(-1, None), True, (-1, 0)),
        (LiteralWindow(2**31, -(2**40)), False, (None, 1 - 2**31)),
    ],
)
def test_windows(window, causal, expected):
    assert normalize_window(window, causal) == expected


@pytest.mark.parametrize(
    "window",
    [
        *((-2, 0), (0, -7), (1.5, 0), ("4", 0), (True, 0), (1,), 5, (1, 2, 3)),
        *(torch.tensor([-2, 0]), torch.tensor([1.5, 0.0]), torch.tensor(5), torch.tensor([[1], [2]])),
        *(LiteralWindow(1.5, 0), LiteralWindow(True, None), numpy.array([1, 2, 3])),
    ],
    ids=str,
)
@pytest.mark.parametrize("causal", [False, True])
def test_windows_that_raise(window, causal):
    with pytest.raises(WindowError, match="window_size"):
        normalize_window(window, causal)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [(), (1,), (1, 2, False), (1, 2, 3, 4), [1, 2, True]], ids=str)
def test_windows_that_are_no_pair_of_a_call(window, causal):
    """A value too many or too few is no other argument's."""
    q = torch.zeros(1, 8, 2, 64, dtype=torch.bfloat16)
    with cute_fa.simulate("sm_80"), pytest.raises(WindowError, match="a pair \\(left, right\\) is needed"):
        cute_fa.flash_attn_func(q, q, q, window_size=window, causal=causal)


def test_windows_on_a_device_are_not_read():
    with pytest.raises(WindowError, match="window_size is a tensor on meta: the host would wait"):
        normalize_window(torch.zeros(2, dtype=torch.int32, device="meta"), False)
    with pytest.raises(WindowError, match="window_size right is a tensor on meta"):
        normalize_window((3, torch.zeros((), dtype=torch.int32, device="meta")), False)


@pytest.mark.parametrize(
    ("changes", "mask", "causal"),
    [
        ({}, MaskKind.NONE, False),
        ({"window_right": 0}, MaskKind.CAUSAL, True),
        ({"window_left": 8}, MaskKind.SLIDING, False),
        ({"window_right": 8}, MaskKind.SLIDING, False),
        ({"window_left": 8, "window_right": 8}, MaskKind.SLIDING, False),
        ({"window_left": 8, "window_right": 0}, MaskKind.SLIDING_CAUSAL, True),
        ({"window_left": -8, "window_right": 0}, MaskKind.SLIDING_CAUSAL, True),
        ({"window_right": -1}, MaskKind.SLIDING, False),
    ],
)
def test_mask_kind(changes, mask, causal):
    problem = dataclasses.replace(BASE, **changes)
    assert problem.mask_kind is mask
    assert problem.causal is causal


def test_derived():
    assert BASE.gqa_ratio == 4
    assert BASE.out_dtype is DType.BF16
    assert dataclasses.replace(BASE, **FP8).out_dtype is DType.BF16
    assert not BASE.varlen
    assert dataclasses.replace(BASE, seqused_k=True).varlen
    assert dataclasses.replace(BASE, alibi=True).position_bias is PositionBias.ALIBI
    assert hash(BASE) == hash(dataclasses.replace(BASE))
    with pytest.raises(dataclasses.FrozenInstanceError):
        BASE.batch = 3


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"arch": "sm_80"}, ArgumentError, "arch='sm_80': SmArch is needed"),
        ({"dtype": torch.bfloat16}, ArgumentError, "dtype=torch.bfloat16: DType is needed"),
        ({"head_dim": 64.0}, ArgumentError, "head_dim=64.0: int is needed"),
        ({"batch": True}, ArgumentError, "batch=True: int is needed"),
        ({"batch": 0}, EmptyBatchError, "batch=0"),
        ({"batch": 0, "seqlen_q": -1}, EmptyBatchError, "batch=0"),
        ({"num_heads": 0, "num_heads_kv": 0}, ShapeError, "num_heads=0"),
        ({"seqlen_q": -1}, LengthError, "seqlen_q=-1"),
        ({"seqlen_k": 2**31}, LengthError, "seqlen_k=2147483648"),
        ({"num_heads": 0}, ShapeError, "num_heads=0"),
        ({"num_heads_kv": 3}, ShapeError, "8 query heads and 3 kv heads"),
        ({"head_dim": 0}, ShapeError, "head_dim=0"),
        ({"head_dim_v": 0}, ShapeError, "head_dim_v=0"),
        ({"page_size": 48}, PageSizeError, "page_size=48: a power of two from 1 to 1024"),
        ({"page_size": 0}, PageSizeError, "page_size=0"),
        ({"page_size": 2048}, PageSizeError, "page_size=2048"),
        ({"page_size": 16, "varlen_k": True}, ArgumentError, "seqused_k"),
        ({"softmax_scale": 0.0}, ArgumentError, "softmax_scale=0.0"),
        ({"softmax_scale": float("nan")}, ArgumentError, "softmax_scale=nan"),
        ({"softmax_scale": float("inf")}, ArgumentError, "softmax_scale=inf"),
        ({"softcap": -1.0}, ArgumentError, "softcap=-1.0"),
        ({"deterministic": 1}, ArgumentError, "deterministic=1: True or False"),
        ({"deterministic": True}, ArgumentError, "deterministic of a forward"),
        ({"lse_gradient": True}, ArgumentError, "lse_gradient of a forward"),
        ({"direction": Direction.BACKWARD, "slopes_gradient": True}, ArgumentError, "slopes_gradient without alibi"),
        ({"window_left": 1.5}, WindowError, "window_left=1.5"),
        ({"window_right": True}, WindowError, "window_right=True"),
        ({"sink_tokens": -1}, ArgumentError, "sink_tokens=-1"),
        ({"num_splits": -1}, ArgumentError, "num_splits=-1: between 0 and"),
        ({"out_dtype": DType.E4M3}, Fp8Error, "out_dtype=e4m3"),
        ({"out_dtype": "bf16"}, ArgumentError, "out_dtype='bf16': a DType"),
        ({"dtype_k": DType.E4M3}, Fp8Error, "bf16, e4m3, bf16 of q, k, v: k and v are of q's, or both fp8 or int8"),
        ({"dtype_v": DType.INT8}, Fp8Error, "bf16, bf16, int8 of q, k, v: k and v are of q's, or both fp8 or int8"),
        ({"dtype": DType.INT8}, Fp8Error, "dtypes int8, bf16, bf16 of q, k, v: q is of 16 bits or fp8"),
        (FP8 | {"dtype_k": DType.INT8}, Fp8Error, "dtypes e4m3, int8, e4m3 of q, k, v: k and v are fp8 where q is"),
        ({"out_dtype": DType.INT8}, Fp8Error, "out_dtype=int8"),
        (FP8 | {"dtype_v": DType.BF16}, Fp8Error, "dtypes e4m3, e4m3, bf16 of q, k, v"),
        ({"k_descale": True}, Fp8Error, "k_descale with k in bf16: only fp8 and int8 codes have descales"),
        ({"persistent": "on"}, ArgumentError, "persistent='on': PersistentMode is needed"),
        ({"persistent": None}, ArgumentError, "persistent=None: PersistentMode is needed"),
        ({"pack_gqa": 1}, ArgumentError, "pack_gqa=1: True, False, or None for the kernel's own choice"),
        ({"pack_gqa": "auto"}, ArgumentError, "pack_gqa='auto': True, False"),
    ],
)
def test_problems_that_raise(changes, error, message):
    with pytest.raises(error, match=message):
        dataclasses.replace(BASE, **changes)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"batch": 0}, EmptyBatchError, "batch=0"),
        ({"tokens_k": -1}, LengthError, "tokens_k=-1"),
        ({"tokens_q": -1}, LengthError, "tokens_q=-1"),
        ({"num_heads": -1}, ShapeError, "num_heads=-1"),
        ({"num_heads_kv": 0}, ShapeError, "num_heads_kv=0"),
        ({"head_dim_v": 0}, ShapeError, "head_dim_v=0"),
        ({"page_size": 48}, PageSizeError, "page_size=48"),
        ({"rotary_dim": -16}, ArgumentError, "rotary_dim=-16"),
        ({"rotary_dtype": "f32"}, ArgumentError, "rotary_dtype='f32': one of fp16, bf16, fp32"),
        ({"rotary_dtype": "bf16"}, ArgumentError, "rotary_dtype without rotary_dim"),
        ({"rotary_interleaved": True}, ArgumentError, "rotary_interleaved without rotary_dim"),
        ({"rotary_seqlens": True}, ArgumentError, "rotary_seqlens without rotary_dim"),
        ({"dtype_k": DType.E4M3}, Fp8Error, "caches in e4m3 and bf16: both in fp8 or int8, or both in bf16"),
        ({"dtype_v": DType.E4M3}, Fp8Error, "caches in bf16 and e4m3: both in fp8 or int8, or both in bf16"),
        ({"dtype_k": DType.FP16, "dtype_v": DType.FP16}, Fp8Error, "a cache of keys in fp16 for rows in bf16"),
        ({"dtype": DType.E4M3, "dtype_k": DType.E5M2}, Fp8Error, "a cache of keys in e5m2 for rows in e4m3"),
        ({"dtype": DType.E4M3, "dtype_v": DType.BF16}, Fp8Error, "caches in e4m3 and bf16: both in fp8 or int8"),
        ({"dtype": DType.E4M3, "rotary_dim": 16}, Fp8Error, "rotary_dim with rows in e4m3"),
        ({"dtype": DType.INT8, "rotary_dim": 16}, Fp8Error, "rotary_dim with rows in int8"),
        ({"dtype": DType.INT8, "dtype_v": DType.E4M3, "k_row_descale": True}, Fp8Error, "k_row_descale with rows in"),
    ],
)
def test_appends_that_raise(changes, error, message):
    sizes = {"batch": 1, "tokens_k": 1, "num_heads_kv": 1, "head_dim": 64, "head_dim_v": 64}
    with pytest.raises(error, match=message):
        AppendProblem(**{"arch": SmArch.SM_80, "dtype": DType.BF16, **sizes, **changes})


@pytest.mark.parametrize("size", PAGE_SIZES)
def test_page_sizes(size):
    assert dataclasses.replace(BASE, page_size=size).page_size == size


def test_persistent_modes():
    assert [PersistentMode.named(name) for name in ("auto", "off", PersistentMode.ON)] == list(PersistentMode)
    for name in ("yes", True, None, "ON"):
        with pytest.raises(ArgumentError, match=f"persistent={name!r}: one of auto, off, on"):
            PersistentMode.named(name)
    assert cute_fa.PersistentMode is PersistentMode


def test_from_tensors():
    q = torch.zeros(100, 8, 64, dtype=torch.float16)
    k = torch.zeros(3, 50, 2, 64, dtype=torch.float16)
    v = torch.zeros(3, 50, 2, 32, dtype=torch.float16)
    cu = torch.tensor([0, 10, 20, 100], dtype=torch.int32)
    call = prepare(
        q,
        k,
        v,
        cu_seqlens_q=cu,
        seqused_k=cu[1:].contiguous(),
        max_seqlen_q=80,
        window_size=(-1, 3),
        causal=True,
        sink_tokens=2**31 - 1,
        alibi_slopes=torch.ones(3, 8),
    )
    problem = problem_of(SmArch.SM_90A, call)
    assert problem == AttentionProblem(
        arch=SmArch.SM_90A,
        dtype=DType.FP16,
        batch=3,
        seqlen_q=80,
        seqlen_k=50,
        num_heads=8,
        num_heads_kv=2,
        head_dim=64,
        head_dim_v=32,
        softmax_scale=0.125,
        window_right=0,
        sink_tokens=2**31 - 1,
        alibi=True,
        varlen_q=True,
        seqused_k=True,
    )
    pages = torch.zeros(5, 16, 2, 64, dtype=torch.float16)
    table = torch.zeros(3, 4, dtype=torch.int32)
    paged = problem_of(SmArch.SM_80, Call.made(q, pages, pages, cu_seqlens_q=cu, page_table=table, softmax_scale=2.0))
    assert (paged.page_size, paged.seqlen_k, paged.seqlen_q, paged.softmax_scale) == (16, 64, 100, 2.0)
    assert paged.direction is Direction.FORWARD


def test_architectures():
    assert SmArch.named("sm_90a") is SmArch.SM_90A
    assert SmArch.named(SmArch.SM_80) is SmArch.SM_80
    with pytest.raises(ArgumentError, match="arch='sm_90': one of sm_80"):
        SmArch.named("sm_90")
    capabilities = {(8, 0): "sm_80", (8, 6): "sm_86", (8, 9): "sm_89", (9, 0): "sm_90a", (10, 0): "sm_100a"}
    for capability, name in (capabilities | {(10, 3): "sm_103a", (12, 0): "sm_120a"}).items():
        assert SmArch.of_capability(*capability).value == name
    for capability in ((7, 5), (8, 7), (11, 0), (12, 1)):
        with pytest.raises(DeviceError, match=f"compute capability {capability[0]}.{capability[1]}"):
            SmArch.of_capability(*capability)
    assert [arch for arch in SmArch if arch.has_wgmma] == [SmArch.SM_90A]


class TestCumulativeSeqlens:
    def test_from_lengths(self):
        cu = CumulativeSeqlens.from_lengths([5, 0, 7])
        assert cu.offsets == (0, 5, 5, 12)
        assert (cu.lengths, cu.batch, cu.total, cu.max_seqlen) == ((5, 0, 7), 3, 12, 7)
        assert cu.tensor("cpu").equal(torch.tensor([0, 5, 5, 12], dtype=torch.int32))
        assert CumulativeSeqlens.from_tensor(cu.tensor("cpu")) == cu
        assert CumulativeSeqlens(numpy.array([0, 5, 5, 12])) == cu

    def test_overflow(self):
        most = CumulativeSeqlens.from_lengths([2**30, 2**30 - 1])
        assert most.total == 2**31 - 1
        with pytest.raises(CumulativeSeqlensError, match="ends at 2147483648: int32 offsets overflow"):
            CumulativeSeqlens.from_lengths([2**30, 2**30])

    @pytest.mark.parametrize(
        ("offsets", "error", "message"),
        [
            ((0,), EmptyBatchError, "at least one sequence"),
            ((), EmptyBatchError, "at least one sequence"),
            ((1, 2), CumulativeSeqlensError, r"\[0\]=1"),
            ((0, 5, 4), CumulativeSeqlensError, "from 5 to 4 at 2"),
            ((0, 1.5), ArgumentError, "1.5"),
            ((0, True), ArgumentError, "True"),
            (5, ArgumentError, "cu_seqlens is int: a sequence"),
            (((0, 3), (0, 4)), ArgumentError, "offsets are ints"),
        ],
    )
    def test_bad_offsets(self, offsets, error, message):
        with pytest.raises(error, match=message):
            CumulativeSeqlens(offsets)

    def test_bad_tensor(self):
        with pytest.raises(CumulativeSeqlensError, match="from 9 to 3 at 2"):
            CumulativeSeqlens.from_tensor(torch.tensor([0, 9, 3]))
        with pytest.raises(EmptyBatchError, match="at least one sequence"):
            CumulativeSeqlens.from_tensor(torch.empty(0, dtype=torch.int32))
        with pytest.raises(ArgumentError, match="offsets are ints"):
            CumulativeSeqlens.from_tensor(torch.zeros(2, 3))
        with pytest.raises(CumulativeSeqlensError, match="from 0 to -2"):
            CumulativeSeqlens.from_lengths([-2, 5])

    def test_chunks(self):
        cu = CumulativeSeqlens.from_lengths([5, 0, 12])
        assert [cu.chunk(i, 5).lengths for i in range(3)] == [(5, 0, 5), (0, 0, 5), (0, 0, 2)]
        with pytest.raises(ZeroLengthError, match="chunk of 0 tokens"):
            cu.chunk(0, 0)
        for index in (3, -1):
            with pytest.raises(ChunkIndexError, match=f"chunk index {index}: sequences have 3 chunks of 5 tokens"):
                cu.chunk(index, 5)


class TestRequests:
    q = torch.randn(2, 40, 4, 64).bfloat16()
    kv = torch.randn(2, 40, 2, 64).bfloat16()

    def test_keys_without_a_gpu(self):
        request = Fa2FwdRequest(
            self.q, self.kv, self.kv, mask=MaskKind.SLIDING_CAUSAL, window=(16, 0), sink_tokens=4, arch=SmArch.SM_80
        )
        assert str(request.dispatch_key()) == "fwd_sm80_bf16_hd64_causal_sw16_sink4_gqa2"
        slopes = torch.ones(4)
        request = Fa2FwdRequest(
            self.q, self.kv, self.kv, position_bias=PositionBias.ALIBI, alibi_slopes=slopes, arch=SmArch.SM_100A
        )
        assert str(request.dispatch_key()) == "fwd_sm100a_bf16_hd64_alibi_gqa2"
        assert request.kernel().family == "fa2"
        with pytest.raises(NoDeviceError, match="CPU tensors"):
            request.run()

    def test_fa3(self):
        request = Fa3FwdRequest(self.q, self.kv, self.kv, arch=SmArch.SM_90A, persistent=PersistentMode.ON)
        assert request.dispatch_key().arch is SmArch.SM_90A
        assert (request.problem().persistent, request.problem().pack_gqa) == (PersistentMode.ON, None)
        packed = Fa3FwdRequest(self.q, self.kv, self.kv, arch=SmArch.SM_90A, pack_gqa=True)
        assert (packed.problem().persistent, packed.problem().pack_gqa) == (PersistentMode.AUTO, True)
        with pytest.raises(Fa3ArchError, match="FA3 kernels on sm_89"):
            Fa3FwdRequest(self.q, self.kv, self.kv, arch=SmArch.SM_89)
        with pytest.raises(ArgumentError, match="persistent is bool: a PersistentMode is needed"):
            Fa3FwdRequest(self.q, self.kv, self.kv, arch=SmArch.SM_90A, persistent=True)
        with pytest.raises(ArgumentError, match="pack_gqa='yes': True or False"):
            Fa3FwdRequest(self.q, self.kv, self.kv, arch=SmArch.SM_90A, pack_gqa="yes")

    def test_families_have_their_kernels(self):
        for request_, family in ((Fa3FwdRequest, "fa3"), (Fa2FwdRequest, "fa2")):
            assert request_(self.q, self.kv, self.kv, arch=SmArch.SM_90A).kernel().family == family
        # after Hopper FA3's requests are FA4's
        for arch in (SmArch.SM_100A, SmArch.SM_103A):
            request = Fa3FwdRequest(self.q, self.kv, self.kv, arch=arch)
            assert request.kernel_name() == f"fa4_fwd_{arch.short}_bf16_hd64_gqa2"
        request = Fa3FwdRequest(self.q, self.kv, self.kv, arch=SmArch.SM_120A)
        with pytest.raises(UnsupportedKeyError, match=r"fa4_fwd: tcgen05 exists on .*\n  fa3_fwd: WGMMA exists"):
            request.kernel()

    @pytest.mark.parametrize("arch", ["sm_90a", "sm_100a"])
    @pytest.mark.parametrize("persistent", [PersistentMode.ON, PersistentMode.OFF])
    def test_fa3_runs_persistent_or_not(self, arch, persistent):
        with cute_fa.simulate(arch, num_sms=3) as simulation:
            request = Fa3FwdRequest(self.q, self.kv, self.kv, persistent=persistent, pack_gqa=False)
            out, lse = request.run()
        assert reference.check(out, lse, self.q, self.kv, self.kv).ok
        walks = request.kernel().configure(request.problem()).persistent
        assert walks is (persistent is PersistentMode.ON)
        # 4 heads of 2 sequences; on Blackwell CTAs that run take over the tiles of those that have not begun
        assert simulation.launches[0].grid == ((3, 1, 1) if walks and arch == "sm_90a" else (8, 1, 1))

    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"mask": "causal"}, ArgumentError, "mask is str"),
            ({"window": (4, 0)}, WindowError, "mask=none"),
            ({"mask": MaskKind.CAUSAL, "window": (4, 0)}, WindowError, "mask=causal"),
            ({"mask": MaskKind.SLIDING}, WindowError, "mask=sliding with"),
            ({"mask": MaskKind.SLIDING, "window": (4, 0)}, WindowError, "right not 0"),
            ({"mask": MaskKind.SLIDING_CAUSAL, "window": (None, 0)}, WindowError, "mask=sliding-causal"),
            ({"mask": MaskKind.SLIDING_CAUSAL, "window": (4, 2)}, WindowError, "mask=sliding-causal"),
            ({"position_bias": PositionBias.ALIBI}, ArgumentError, "alibi_slopes missing"),
            ({"alibi_slopes": torch.ones(4)}, ArgumentError, "alibi_slopes given"),
            ({"softcap": "50"}, ArgumentError, "softcap='50'"),
            ({"arch": "sm_80"}, ArgumentError, "arch is str"),
        ],
    )
    def test_bad_requests(self, options, error, message):
        with pytest.raises(error, match=message):
            Fa2FwdRequest(self.q, self.kv, self.kv, **{"arch": SmArch.SM_80, **options})

    def test_malformed_tensors(self):
        with pytest.raises(ArgumentError, match="q is NoneType"):
            Fa2FwdRequest(None, self.kv, self.kv)
        with pytest.raises(ShapeError, match="8 query heads and 3 kv heads"):
            Fa2FwdRequest(torch.zeros(2, 4, 8, 64).half(), *[torch.zeros(2, 4, 3, 64).half()] * 2, arch=SmArch.SM_80)
        cu = CumulativeSeqlens.from_lengths([30, 51])
        packed_q, packed_kv = self.q.flatten(0, 1), self.kv.flatten(0, 1)
        with pytest.raises(CumulativeSeqlensError, match="cu_seqlens_q ends at 81: q has 80 rows"):
            VarlenFwdRequest(packed_q, packed_kv, packed_kv, cu, cu, arch=SmArch.SM_80)
        with pytest.raises(ArgumentError, match="cu_seqlens_q is Tensor"):
            VarlenFwdRequest(packed_q, packed_kv, packed_kv, cu.tensor("cpu"), cu, arch=SmArch.SM_80)

    def test_a_request_finds_its_problem_once(self, monkeypatch):
        cu = CumulativeSeqlens.from_lengths([30, 50])
        q, kv = self.q.flatten(0, 1), self.kv.flatten(0, 1)
        request = VarlenFwdRequest(q, kv, kv, cu, cu, arch=SmArch.SM_80)
        monkeypatch.setattr(CumulativeSeqlens, "tensor", None)
        assert request.problem() is request.problem()
        assert request.problem().seqlen_q == 50
        assert str(request.dispatch_key()) == "fwd_sm80_bf16_hd64_varlen_gqa2"
        with cute_fa.simulate("sm_80"):
            out, lse = request.run()
        options = dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k"), torch.tensor(cu.offsets))
        assert reference.check(out, lse, q, kv, kv, **options).ok

    def test_run(self):
        cu = CumulativeSeqlens.from_lengths([30, 0, 50])
        packed_q, packed_kv = self.q.flatten(0, 1), self.kv.flatten(0, 1)
        with cute_fa.simulate("sm_80"):
            dense = Fa2FwdRequest(self.q, self.kv, self.kv, mask=MaskKind.CAUSAL).run()
            packed = VarlenFwdRequest(packed_q, packed_kv, packed_kv, cu, cu, mask=MaskKind.CAUSAL).run()
            none = CumulativeSeqlens((0, 0, 0, 0))
            empty = VarlenFwdRequest(packed_q, packed_kv, packed_kv, cu, none, mask=MaskKind.CAUSAL).run()
            assert empty[0].eq(0).all() and empty[1].eq(-torch.inf).all()
            elsewhere = Fa2FwdRequest(self.q, self.kv, self.kv, arch=SmArch.SM_90A)
            with pytest.raises(ArgumentError, match="arch=sm_90a: the tensors are on cpu, sm_80"):
                elsewhere.run()
        assert reference.check(*dense, self.q, self.kv, self.kv, causal=True).ok
        options = {"cu_seqlens_q": cu.tensor("cpu"), "cu_seqlens_k": cu.tensor("cpu"), "causal": True}
        assert reference.check(*packed, packed_q, packed_kv, packed_kv, **options).ok
