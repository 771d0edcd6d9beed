"""Every rule for a call's arguments: one error of its own kind, with the value and the rule, before anything runs."""

import inspect
import math
import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch

import cute_fa
from cute_fa import flash_attn_func, flash_attn_varlen_func
from cute_fa.engine import plan as plans
from cute_fa.engine import table as dispatch
from cute_fa.engine.worlds import simulated_arch
from cute_fa.semantics import errors
from cute_fa.semantics.errors import (
    AlignmentError,
    ArgumentError,
    CompilerMissingError,
    CumulativeSeqlensError,
    CuteFaError,
    DeviceError,
    DTypeError,
    EmptyBatchError,
    EmptyCacheError,
    Fa3ArchError,
    Fp8Error,
    LengthError,
    NoDeviceError,
    PagedHeadDimError,
    PageSizeError,
    ShapeError,
    StrideError,
    UnsupportedArgumentError,
    UnsupportedKeyError,
    WindowError,
    ZeroLengthError,
)
from cute_fa.semantics.types import DType, PersistentMode, SmArch
from tests.testing import exceptions

BF16 = torch.bfloat16


def zeros(*shape, dtype=BF16):
    return torch.zeros(shape, dtype=dtype)


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


@pytest.fixture
def simulated(monkeypatch):
    """A simulation in which nothing may be launched, nor compiled."""
    monkeypatch.setattr(plans, "compiled", None)
    with cute_fa.simulate("sm_80") as simulation:
        yield simulation
        assert not simulation.launches


Q = zeros(2, 24, 4, 64)
KV = zeros(2, 40, 2, 64)
PACKED_Q = zeros(48, 4, 64)
PACKED_KV = zeros(80, 2, 64)
CU_Q, CU_K = ints(0, 20, 48), ints(0, 30, 80)
PAGES = zeros(6, 16, 2, 64)
TABLE = torch.zeros(2, 3, dtype=torch.int32)

DENSE = [
    # shapes
    ({"q": zeros(24, 4, 64)}, ShapeError, r"q has shape \(24, 4, 64\): \(batch, seqlen_q, heads, head_dim\)"),
    ({"k": zeros(2, 40, 64)}, ShapeError, r"k has shape \(2, 40, 64\)"),
    ({"v": zeros(2, 39, 2, 64)}, ShapeError, r"v \(2, 39, 2, 64\) and k \(2, 40, 2, 64\)"),
    ({"v": zeros(2, 40, 1, 64)}, ShapeError, "all sizes but the last must be equal"),
    ({"k": zeros(3, 40, 2, 64), "v": zeros(3, 40, 2, 64)}, ShapeError, r"k \(3, 40, 2, 64\): its first size"),
    ({"k": zeros(2, 40, 2, 72)}, ShapeError, "k has head_dim 72 and q 64"),
    ({"q": zeros(2, 24, 3, 64)}, ShapeError, "3 query heads and 2 kv heads"),
    ({"q": zeros(2, 24, 0, 64)}, ShapeError, "num_heads=0"),
    ({"k": zeros(2, 40, 0, 64), "v": zeros(2, 40, 0, 64)}, ShapeError, "num_heads_kv=0"),
    ({"v": zeros(2, 40, 2, 0)}, ShapeError, "head_dim_v=0"),
    ({"q": zeros(2, 24, 4, 0), "k": zeros(2, 40, 2, 0)}, ShapeError, "head_dim=0"),
    ({"q": zeros(0, 24, 4, 64)}, ShapeError, r"k \(2, 40, 2, 64\): its first size is the batch, the 0 sequences of q"),
    ({"alibi_slopes": torch.ones(2)}, ShapeError, r"alibi_slopes \(2,\): \(4,\) or \(2, 4\)"),
    ({"alibi_slopes": torch.ones(4, 2)}, ShapeError, "alibi_slopes"),
    ({"learnable_sink": torch.ones(2, 4)}, ShapeError, r"learnable_sink \(2, 4\): \(4,\)"),
    ({"out": zeros(2, 24, 4, 32)}, ShapeError, r"out \(2, 24, 4, 32\): \(2, 24, 4, 64\) is needed"),
    # dtypes
    ({"q": zeros(2, 24, 4, 64, dtype=torch.float32)}, DTypeError, "q is float32: one of float16, bfloat16"),
    ({"v": zeros(2, 40, 2, 64, dtype=torch.float16)}, DTypeError, "v is float16: q is bfloat16"),
    ({"q": zeros(2, 24, 4, 64, dtype=torch.complex64)}, DTypeError, "q is complex64"),
    ({"alibi_slopes": torch.ones(4, dtype=BF16)}, DTypeError, "alibi_slopes is bfloat16: float32"),
    ({"learnable_sink": torch.ones(4, dtype=torch.float64)}, DTypeError, "learnable_sink is float64: float32"),
    ({"out": zeros(2, 24, 4, 64, dtype=torch.float16)}, DTypeError, "out is float16: bfloat16"),
    # strides
    ({"q": zeros(2, 24, 64, 4).transpose(2, 3)}, StrideError, r"q has strides .*: the last dimension must be"),
    ({"k": zeros(2, 40, 2, 68)[..., :64]}, StrideError, r"k has strides \(5440, 136, 68, 1\).*multiple of 16 bytes"),
    ({"v": zeros(2, 40, 2, 64).new_zeros(2, 2 * 40 * 64 + 4)[:, :-4].view(2, 40, 2, 64)}, StrideError, "v has strides"),
    ({"v": zeros(2, 40, 2, 1).expand(-1, -1, -1, 64)}, StrideError, "last dimension must be contiguous"),
    ({"out": zeros(2, 24, 1, 64).expand(2, 24, 4, 64)}, StrideError, "out has strides .*cannot be written"),
    ({"out": zeros(10000).as_strided((2, 24, 4, 64), (1600, 64, 16, 1))}, StrideError, "out has .*cannot be written"),
    ({"alibi_slopes": torch.ones(8)[::2]}, StrideError, r"alibi_slopes has strides \(2,\)"),
    # values
    ({"causal": 2}, ArgumentError, "causal=2: True or False"),
    ({"causal": "yes"}, ArgumentError, "causal='yes': True or False"),
    ({"causal": torch.tensor(True)}, ArgumentError, "causal="),
    ({"return_lse": "yes"}, ArgumentError, "return_lse='yes'"),
    ({"window_size": (-2, 0)}, WindowError, "window_size left=-2"),
    ({"window_size": (0, -5)}, WindowError, "window_size right=-5"),
    ({"window_size": 128}, WindowError, "window_size=128: a pair"),
    ({"softmax_scale": 0.0}, ArgumentError, "softmax_scale=0.0: a number between"),
    ({"softmax_scale": -0.1}, ArgumentError, "softmax_scale=-0.1"),
    ({"softmax_scale": math.nan}, ArgumentError, "softmax_scale=nan"),
    ({"softmax_scale": 10**400}, ArgumentError, "softmax_scale: the number is beyond any float"),
    ({"softmax_scale": torch.ones(1)}, ArgumentError, r"softmax_scale is a tensor of shape \(1,\): a number"),
    ({"softmax_scale": torch.ones((), device="meta")}, ArgumentError, "softmax_scale is a tensor on meta: the host"),
    ({"softmax_scale": torch.ones((), requires_grad=True)}, ArgumentError, "softmax_scale is .* requires a gradient"),
    ({"softcap": -30.0}, ArgumentError, "softcap=-30.0"),
    ({"softcap": math.inf}, ArgumentError, "softcap=inf"),
    ({"sink_tokens": -1}, ArgumentError, "sink_tokens=-1: between 0 and"),
    ({"sink_tokens": 4.0}, ArgumentError, "sink_tokens=4.0: an int"),
    ({"sink_tokens": True}, ArgumentError, "sink_tokens=True: an int"),
    ({"num_splits": -1}, ArgumentError, "num_splits=-1"),
    ({"num_splits": 2, "softcap": 9e3}, UnsupportedKeyError, r"split2[\s\S]*fa2_fwd: num_splits 2"),
    ({"family": "fa1"}, ArgumentError, "family='fa1': one of fa2, fa3, fa4"),
    ({"family": 3}, ArgumentError, "family=3"),
    ({"family": "fa3"}, Fa3ArchError, "FA3 kernels on sm_80"),
    ({"family": "fa4"}, UnsupportedKeyError, "fa4_fwd: tcgen05 exists on"),
    ({"pack_gqa": True, "softcap": 9e3}, UnsupportedKeyError, r"gqa2[\s\S]*fa2_fwd: softcap 9000.*; pack_gqa: this"),
    ({"pack_gqa": "on"}, ArgumentError, "pack_gqa='on': True or False"),
    ({"persistent": "on"}, UnsupportedKeyError, "fa2_fwd: persistent: this kernel launches one CTA"),
    ({"persistent": PersistentMode.ON}, UnsupportedKeyError, "fa2_fwd: persistent"),
    ({"persistent": True}, ArgumentError, "persistent=True: one of auto, off, on"),
    ({"persistent": []}, ArgumentError, r"persistent=\[\]: one of"),
    ({"page_table": TABLE}, ArgumentError, "page_table: no such argument"),
    ({"softmax_scal": 1.0}, ArgumentError, "softmax_scal: no such argument"),
    ({"q": None}, ArgumentError, "q is NoneType: a torch.Tensor"),
    ({"k": [[1.0]]}, ArgumentError, "k is list"),
    ({"v": KV.float().numpy()}, ArgumentError, "v is ndarray"),
    ({"alibi_slopes": 0.5}, ArgumentError, "alibi_slopes is float"),
    ({"out": "here"}, ArgumentError, "out is str"),
    ({"q": zeros(2, 24, 4, 64, dtype=torch.float32).to_sparse()}, ArgumentError, "q has layout sparse_coo"),
    # head dimensions
    *(
        (
            {"q": zeros(2, 24, 4, d), "k": zeros(2, 40, 2, d)},
            UnsupportedKeyError,
            f"fa2_fwd: head_dim {d}: a multiple of 8",
        )
        for d in (20, 33, 36, 100)
    ),
    ({"v": zeros(2, 40, 2, 20)}, UnsupportedKeyError, "fa2_fwd: head_dim_v 20: a multiple of 8 from 8 to 256"),
    ({"q": zeros(2, 24, 4, 264), "k": zeros(2, 40, 2, 264)}, UnsupportedKeyError, "hd264v64_gqa2[\\s\\S]*head_dim 264"),
    ({"v": zeros(2, 40, 2, 512)}, UnsupportedKeyError, "head_dim_v 512"),
]


@pytest.mark.parametrize(("changes", "error", "message"), DENSE)
def test_dense(simulated, changes, error, message):
    arguments = {"q": Q, "k": KV, "v": KV, **changes}
    with pytest.raises(CuteFaError, match=message) as caught:
        flash_attn_func(arguments.pop("q"), arguments.pop("k"), arguments.pop("v"), **arguments)
    assert type(caught.value) is error


VARLEN = [
    ({"q": Q}, ShapeError, r"q has shape \(2, 24, 4, 64\): \(total_q, heads, head_dim\) with cu_seqlens_q"),
    ({"k": KV}, ShapeError, r"k has shape .*\(total_k, heads_kv, head_dim\) with cu_seqlens_k"),
    ({"cu_seqlens_q": None}, ShapeError, r"q has shape \(48, 4, 64\): \(batch, seqlen_q"),
    ({"cu_seqlens_q": ints(0)}, ShapeError, r"cu_seqlens_k \(3,\): \(1,\) is needed"),
    ({"cu_seqlens_q": ints(0)[:0]}, EmptyBatchError, r"cu_seqlens_q \(0,\): .* the offset 0, is needed"),
    ({"cu_seqlens_q": CU_Q[None]}, ShapeError, r"cu_seqlens_q has shape \(1, 3\)"),
    ({"cu_seqlens_q": CU_Q.long()}, DTypeError, "cu_seqlens_q is int64: int32"),
    ({"cu_seqlens_k": CU_K.float()}, DTypeError, "cu_seqlens_k is float32: int32"),
    ({"cu_seqlens_k": ints(0, 80)}, ShapeError, r"cu_seqlens_k \(2,\): \(3,\)"),
    ({"cu_seqlens_q": ints(0, 9, 20, 9, 48, 9)[::2]}, StrideError, "cu_seqlens_q has strides"),
    ({"cu_seqlens_q": [0, 20, 48]}, ArgumentError, "cu_seqlens_q is list"),
    ({"seqused_q": ints(1, 2, 3)}, ShapeError, r"seqused_q \(3,\): \(2,\)"),
    ({"seqused_k": torch.ones(2)}, DTypeError, "seqused_k is float32"),
    ({"max_seqlen_q": 0}, ZeroLengthError, "max_seqlen_q=0"),
    ({"max_seqlen_k": 0}, ZeroLengthError, "max_seqlen_k=0"),
    ({"max_seqlen_q": -3}, ArgumentError, "max_seqlen_q=-3"),
    ({"max_seqlen_q": 2**31}, ArgumentError, "max_seqlen_q=2147483648"),
    ({"max_seqlen_k": 50.0}, ArgumentError, "max_seqlen_k=50.0"),
    ({"max_seqlen_k": torch.tensor(50.0)}, ArgumentError, r"max_seqlen_k=50.0: an int"),
    ({"max_seqlen_k": torch.tensor(50, device="meta")}, ArgumentError, "max_seqlen_k is a tensor on meta: the host"),
    ({"softcap": 9e3}, UnsupportedKeyError, r"varlen[\s\S]*fa2_split: softcap 9000"),
    ({"persistent": "on"}, UnsupportedKeyError, "fa2_fwd: persistent"),
    ({"page_table": TABLE, "block_table": TABLE}, ArgumentError, "page_table and block_table"),
    # values on the device
    ({"cu_seqlens_q": ints(1, 20, 48)}, CumulativeSeqlensError, r"cu_seqlens_q\[0\]=1: offsets start at 0"),
    ({"cu_seqlens_q": ints(0, 48, 20)}, CumulativeSeqlensError, "cu_seqlens_q goes from 48 to 20 at 2"),
    ({"cu_seqlens_k": ints(0, -1, 80)}, CumulativeSeqlensError, "cu_seqlens_k goes from 0 to -1 at 1"),
    ({"cu_seqlens_k": ints(0, 30, 81)}, CumulativeSeqlensError, "cu_seqlens_k ends at 81: the packed tensor has 80"),
    ({"max_seqlen_q": 27}, LengthError, "max_seqlen_q=27: a sequence has 28 tokens"),
    ({"max_seqlen_k": 49}, LengthError, "max_seqlen_k=49: a sequence has 50 tokens"),
    ({"seqused_q": ints(20, 29)}, LengthError, r"seqused_q\[1\]=29: between 0 and the 28 tokens"),
    ({"seqused_k": ints(-1, 5)}, LengthError, r"seqused_k\[0\]=-1"),
]


@pytest.mark.parametrize(("changes", "error", "message"), VARLEN)
def test_varlen(simulated, changes, error, message):
    arguments = {
        "q": PACKED_Q,
        "k": PACKED_KV,
        "v": PACKED_KV,
        "cu_seqlens_q": CU_Q,
        "cu_seqlens_k": CU_K,
        "max_seqlen_q": 28,
        "max_seqlen_k": 50,
        **changes,
    }
    with pytest.raises(CuteFaError, match=message) as caught:
        flash_attn_varlen_func(**arguments)
    assert type(caught.value) is error


PAGED = [
    ({"k": zeros(0, 16, 2, 64), "v": zeros(0, 16, 2, 64)}, EmptyCacheError, r"k \(0, 16, 2, 64\).*has no pages"),
    ({"page_table": TABLE[:, :0]}, EmptyCacheError, r"page_table \(2, 0\)"),
    (
        {"k": zeros(6, 24, 2, 64), "v": zeros(6, 24, 2, 64)},
        PageSizeError,
        "page_size=24: a power of two from 1 to 1024",
    ),
    ({"k": zeros(6, 2048, 2, 64), "v": zeros(6, 2048, 2, 64)}, PageSizeError, "page_size=2048"),
    ({"k": zeros(6, 16, 2, 72)}, PagedHeadDimError, "paged k has head_dim 72 and q 64"),
    ({"k": PACKED_KV}, ShapeError, r"\(num_pages, page_size, heads_kv, head_dim\)"),
    ({"page_table": TABLE[0]}, ShapeError, r"page_table has shape \(3,\)"),
    ({"page_table": TABLE[:1]}, ShapeError, r"page_table \(1, 3\): one row for each of 2 sequences"),
    ({"page_table": TABLE.long()}, DTypeError, "page_table is int64: int32"),
    ({"page_table": TABLE.T.contiguous().T}, StrideError, "page_table has strides"),
    ({"softcap": 9e3}, UnsupportedKeyError, r"page16[\s\S]*fa2_fwd: softcap 9000.*; page_size 16"),
]


@pytest.mark.parametrize(("changes", "error", "message"), PAGED)
@pytest.mark.parametrize("name", ["page_table", "block_table"])
def test_paged(simulated, changes, error, message, name):
    arguments = {"q": PACKED_Q, "k": PAGES, "v": PAGES, "page_table": TABLE, "seqused_k": ints(40, 48), **changes}
    arguments[name] = arguments.pop("page_table")
    with pytest.raises(CuteFaError, match=message.replace("page_table", name)) as caught:
        flash_attn_varlen_func(**arguments, cu_seqlens_q=CU_Q, cu_seqlens_k=None, max_seqlen_q=28, max_seqlen_k=48)
    assert type(caught.value) is error


def test_packed_rows_beyond_int32(simulated):
    rows = zeros(1, 1, 64).expand(2**31, 1, 64)
    with pytest.raises(CumulativeSeqlensError, match="cu_seqlens_k for 2147483648 rows: its int32 offsets overflow"):
        flash_attn_varlen_func(zeros(48, 1, 64), rows, rows, CU_Q, CU_K, 28, 50)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_fp8(dtype):
    q, kv = Q.to(dtype), KV.to(dtype)
    blocks = torch.ones(kv.shape[0], kv.shape[2], 1)
    for arch in ("sm_80", "sm_89", "sm_120a"):
        with cute_fa.simulate(arch), pytest.raises(Fp8Error, match=f"input on {arch}: no kernel serves it in 8 bits"):
            flash_attn_func(q, kv, kv, k_descale=blocks)


def test_addresses(simulated):
    shifted = zeros(Q.numel() + 8)[4:][: Q.numel()].view(Q.shape)
    for arguments, name in (((shifted, KV, KV), "q"), ((Q, shifted[:, :, :2], KV[:, :24]), "k")):
        with pytest.raises(AlignmentError, match=f"{name} starts at address 0x.*8: .* multiple of 16 bytes"):
            flash_attn_func(*arguments)
    with pytest.raises(AlignmentError, match="out starts"):
        flash_attn_func(Q, KV, KV, out=shifted)


def test_out_may_not_be_an_input(simulated):
    q = Q.clone()
    with pytest.raises(ArgumentError, match="out shares its memory with q"):
        flash_attn_func(q, KV, KV, out=q)
    rows = zeros(3, 24, 4, 64)
    with pytest.raises(ArgumentError, match="out shares its memory with q"):
        flash_attn_func(rows[:2], KV, KV, out=rows[1:])


def test_devices(simulated):
    meta = KV.to("meta")
    with pytest.raises(DeviceError, match="k is on meta and q on cpu"):
        flash_attn_func(Q, meta, meta)
    with pytest.raises(DeviceError, match="alibi_slopes is on meta"):
        flash_attn_func(Q, KV, KV, alibi_slopes=torch.ones(4, device="meta"))


def test_no_device():
    with pytest.raises(NoDeviceError, match=r"CPU tensors: .*cute_fa.simulate\(arch\).*reference"):
        flash_attn_func(Q, KV, KV)
    with pytest.raises(NoDeviceError):
        flash_attn_varlen_func(PACKED_Q, PACKED_KV, PACKED_KV, CU_Q, CU_K, 28, 50)


def test_unknown_architectures():
    with pytest.raises(ArgumentError, match="arch='sm_70': one of sm_80"), cute_fa.simulate("sm_70"):
        pass


@pytest.mark.parametrize("num_sms", [0, -3, 2.0, "4", True])
def test_a_gpu_without_sms(num_sms):
    message = f"num_sms={num_sms!r}: a GPU has at least 1 SM"
    with pytest.raises(ArgumentError, match=message), cute_fa.simulate("sm_80", num_sms=num_sms):
        pass
    assert simulated_arch() is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("dropout_p", 0.1),
        ("qv", Q),
        ("attention_chunk", 128),
        ("sm_margin", 8),
        ("score_mod", lambda score: score),
        ("mask_mod", lambda mask: mask),
        ("aux_tensors", []),
        ("block_sparse_tensors", ()),
        ("m_block_size", 64),
        ("disable_scheduler_metadata", True),
        ("gather_kv_indices", ints(1)),
    ],
)
def test_arguments_that_are_not_implemented(simulated, name, value):
    with pytest.raises(UnsupportedArgumentError, match=f"{name}=.* is not implemented"):
        flash_attn_func(Q, KV, KV, **{name: value})
    with pytest.raises(UnsupportedArgumentError, match=f"{name}=.* is not implemented"):
        flash_attn_varlen_func(PACKED_Q, PACKED_KV, PACKED_KV, CU_Q, CU_K, 28, 50, **{name: value})


def test_errors_are_not_remembered(simulated):
    """A call of a bad shape leaves no plan behind."""
    plans.PLANS.clear()
    for _ in range(2):
        with pytest.raises(ShapeError):
            flash_attn_func(Q, KV, zeros(2, 39, 2, 64))
    assert not plans.PLANS


def test_every_error_has_one_base_and_is_documented():
    classes = [c for _, c in inspect.getmembers(errors, inspect.isclass) if c.__module__ == errors.__name__]
    assert len(classes) > 20
    for error in classes:
        assert issubclass(error, CuteFaError)
        assert error.__doc__
    assert issubclass(CuteFaError, ValueError)
    assert issubclass(CuteFaError, RuntimeError)


EXAMPLES = {
    UnsupportedArgumentError: (("score_mod", lambda score: score), {}),
    StrideError: (("q", torch.zeros(2, 3).stride(), "a rule"), {}),
    AlignmentError: (("q", 0x1002, 16), {}),
    DTypeError: (("q", torch.float32, "bfloat16 is needed"), {}),
    CompilerMissingError: (("fa2_fwd_sm80_bf16_hd64", "no bundle is at hand"), {}),
    UnsupportedKeyError: (
        (dispatch.DispatchKey(SmArch.SM_80, DType.BF16, 64, softcap=9e3), {"fa2_fwd": ["a reason", "another"]}),
        {},
    ),
}


def test_every_error_can_be_sent():
    sent = exceptions.instances("cute_fa", EXAMPLES)
    assert len(sent) > 20 and EXAMPLES.keys() <= {type(error) for error in sent}
    for error in sent:
        exceptions.assert_survives(error)


def test_errors_of_another_process():
    """What a worker raises is what its parent sees, of a pool that would break and of one that would wait for ever."""
    spawn = multiprocessing.get_context("spawn")
    message = "q is float32: one of float16, bfloat16"
    with ProcessPoolExecutor(1, mp_context=spawn) as executor:
        with pytest.raises(DTypeError, match=message) as caught:
            executor.submit(exceptions.refused, "sm_80").result(timeout=120)
        assert "flash_attn_func" in str(caught.value.__cause__)  # the worker's traceback
    with spawn.Pool(1) as pool, pytest.raises(DTypeError, match=message):
        pool.apply_async(exceptions.refused, ("sm_90a",)).get(timeout=120)
