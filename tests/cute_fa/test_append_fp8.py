"""``append_kv`` to fp8 caches: every code of the caches after it, against plain torch."""

import math
from typing import NamedTuple

import pytest
import torch
from torch import library
from torch._subclasses import FakeTensorMode

import cute_fa
from cute_fa import append_kv, append_rows
from cute_fa.compat import flashinfer
from cute_fa.engine import plan
from cute_fa.semantics.call import AppendCall
from cute_fa.semantics.errors import (
    ArgumentError,
    CuteFaError,
    DeviceError,
    DTypeError,
    Fp8Error,
    ShapeError,
)
from cute_fa.semantics.types import DType
from tests.cute_fa.test_append import make
from tests.testing.caches import assert_rotated, coded_rows, codes, rotated_queries, rounded, scattered, take_last
from tests.testing.grid import pairwise
from tests.testing.simulated import unwritten_is_nan

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
LENGTHS = (41, 9, 70)


@pytest.mark.parametrize("dtype", [E4M3, E5M2, torch.int8])
@pytest.mark.parametrize("arch", ["sm_80", "sm_89"])
@pytest.mark.parametrize("rows", [torch.bfloat16, torch.float16])
def test_all_values_of_16_bits(arch, dtype, rows):
    """NaN, infinities, subnormals and ties among them, each divided by four descales; the architectures before sm_89
    have no instruction that rounds to fp8."""
    values = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(rows).view(1, 256, 1, 256)
    descales = torch.tensor([[1.0], [0.3], [1.7e-3], [900.0]])
    batch = len(descales)
    new = values.expand(batch, -1, -1, -1)
    caches = [torch.zeros(batch, 256, 1, 256).to(dtype) for _ in "kv"]
    with cute_fa.simulate(arch):
        append_kv(new, new, *caches, torch.zeros(batch, dtype=torch.int32), k_descale=descales, v_descale=descales)
    expected = rounded(new.float(), descales[:, :, None, None], dtype)
    for cache in caches:
        assert codes(cache).equal(codes(expected))
    found = caches[0].view(torch.uint8).unique().tolist()
    finite = sum(torch.arange(256, dtype=torch.uint8).view(dtype).float().isfinite().tolist())
    assert len(found) == (255 if dtype == torch.int8 else finite + 1)  # NaN is one code; −128 is none


class Descales(NamedTuple):
    """As the caller gives them, and (batch, heads_kv)."""

    given: dict
    k: torch.Tensor
    v: torch.Tensor

    @classmethod
    def of_kind(cls, kind: str, heads: int) -> "Descales":
        generator = torch.Generator().manual_seed(heads)
        each = torch.rand(2, len(LENGTHS), heads, generator=generator) + 0.01
        if kind == "strided":
            k, v = each.transpose(1, 2).contiguous().transpose(1, 2)
        elif kind == "expanded":
            k, v = each[0, :1].expand(len(LENGTHS), -1), each[1, :, :1].expand(-1, heads)
        elif kind == "single":
            k, v = each[0, 0, 0], each[1, :1, :1]
        elif kind == "numbers":
            k, v = 0.3, 2
        else:
            k, v = each
        of_all = [torch.as_tensor(t, dtype=torch.float32).expand(len(LENGTHS), heads) for t in (k, v)]
        return cls({"k_descale": k, "v_descale": v}, *of_all)


FEATURES = {
    "arch": ["sm_80", "sm_90a", "sm_86", "sm_89", "sm_100a", "sm_103a", "sm_120a"],
    "dtype": [DType.BF16, DType.FP16],
    "caches": [(E4M3, E4M3), (E5M2, E5M2), (E4M3, E5M2), (torch.int8, torch.int8), (E5M2, torch.int8)],
    "rows": ["16 bits", "codes"],
    "descales": ["each", "strided", "expanded", "single", "numbers"],
    "head_dim": [(64, 64), (128, 128), (80, 48), (32, 16), (256, 128)],
    "heads": [(4, 2), (3, 3)],
    "page_size": [None, 8, 16, 64, 256],
    "index": [False, True],
    "packed": [False, True],
    "transposed": [False, True],
    "rotary": [None, "halves", "interleaved", "partial", "partial interleaved"],
    "tables": [torch.float32, torch.float16, torch.bfloat16],
    "pairs": [False, True],
    "shifted": [False, True],
    "schedule": [{}, {"late": True, "schedule_seed": 1}],
}


def run(case: dict, device: str = "cpu") -> None:
    given, index, rotary = make(case)
    new = [5, 0, 6] if case["packed"] else [6, 6, 6]
    copies = case["rows"] == "codes"
    rotary = None if copies else rotary
    shift = 3 if case["shifted"] and rotary else 0
    descales = Descales.of_kind(case["descales"], case["heads"][1])
    before = take_last(given, new, case["packed"], None, index)
    starts = (before.cache_seqlens + shift).tolist()
    types, scales = case["caches"], (None, None) if copies else (descales.k, descales.v)
    k = coded_rows("k", before, given, new, types[0], scales[0], index, rotary, starts)
    v = coded_rows("v", before, given, new, types[1], scales[1], index)
    page_table = given.page_table
    if index is not None and page_table is not None:
        page_table = scattered(page_table, index, 5)
    q = given.q.to(case["caches"][0]) if copies else given.q
    options = {"page_table": page_table, "cache_batch_idx": index, "q": q, **({} if copies else descales.given)}
    if case["packed"]:
        options |= {"cu_seqlens_k_new": before.cu_seqlens_k_new, "max_seqlen_k_new": 6}
        options |= {"cu_seqlens_q": given.cu_seqlens_q, "max_seqlen_q": 6}
    if rotary:
        options |= rotary.arguments()
        if shift:
            options["rotary_seqlens"] = before.cache_seqlens + shift
    caches = [k.cache.clone(), v.cache.clone()]
    if case["transposed"]:  # heads before rows in memory
        caches = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in caches]
    options = {name: t.to(device) if isinstance(t, torch.Tensor) else t for name, t in options.items()}
    caches = [t.to(device) for t in caches]
    rotated, seqused_k = append_kv(
        k.new.to(device), v.new.to(device), *caches, before.cache_seqlens.to(device), **options
    )
    k.check(caches[0].cpu())
    v.check(caches[1].cpu())
    assert seqused_k.tolist() == given.seqused_k.tolist()
    if rotary:
        assert_rotated(rotated.cpu(), rotated_queries(given, rotary, starts))
    else:
        assert rotated is options["q"]


def case_name(case: dict) -> str:
    cache = f"page{case['page_size']}" if case["page_size"] else "contiguous"
    types = "-".join(str(dtype).removeprefix("torch.float8_") for dtype in case["caches"])
    return f"{case['arch']}-{case['rows']}-{types}-hd{case['head_dim'][0]}-{cache}-{case['rotary']}"


CASES = pairwise(FEATURES, seed=1)


@pytest.mark.sampled
@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_features_in_pairs(case):
    with cute_fa.simulate(case["arch"], race=True, **case["schedule"]), unwritten_is_nan():
        run(case)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_features_in_pairs_on_the_gpu(case):
    run(case, device="cuda")


def small(**changes) -> dict:
    """Arguments: two sequences of 16 and 3 tokens in a cache of 3 pages, one new token each."""
    generator = torch.Generator().manual_seed(0)
    arguments = {
        "k": torch.randn(2, 1, 2, 64, generator=generator).bfloat16(),
        "v": torch.randn(2, 1, 2, 32, generator=generator).bfloat16(),
        "k_cache": torch.zeros(3, 16, 2, 64).to(E4M3),
        "v_cache": torch.zeros(3, 16, 2, 32).to(E5M2),
        "cache_seqlens": torch.tensor([16, 3], dtype=torch.int32),
        "page_table": torch.tensor([[1, 2], [0, 5]], dtype=torch.int32),
        "k_descale": torch.tensor([[0.5, 0.25], [2.0, 0.1]]),
        "v_descale": torch.tensor([[0.7, 3.0], [0.02, 0.3]]),
    }
    return arguments | changes


def expected_codes(arguments: dict, name: str) -> torch.Tensor:
    """(2, heads, …): those of the new tokens."""
    descale = torch.as_tensor(arguments[f"{name}_descale"]).expand(2, 2)
    return rounded(arguments[name][:, 0].float(), descale[..., None], arguments[f"{name}_cache"].dtype)


def check_small(arguments: dict) -> None:
    for name in "kv":
        cache, expected = arguments[f"{name}_cache"], expected_codes(arguments, name)
        assert codes(cache[2, 0]).equal(codes(expected[0])) and codes(cache[0, 3]).equal(codes(expected[1]))
        assert cache.float().count_nonzero() == expected.float().count_nonzero()


def test_descales_are_arguments(monkeypatch):
    """Other numbers are a matter of the same plan, one for all of the same kernel."""
    configs = []
    monkeypatch.setattr(plan, "PLANS", {})
    monkeypatch.setattr(plan, "recorder", configs.append)
    with cute_fa.simulate("sm_80"):
        for descale in (torch.tensor([[0.5, 0.25], [2.0, 0.1]]), torch.tensor([[3.0, 1.0], [0.2, 10.0]]), 0.5, 1):
            arguments = small(k_descale=descale)
            append_kv(**arguments)
            check_small(arguments)
    assert len(configs) == 2 and len(set(configs)) == 1


def test_all_codes_are_copied():
    """NaN and infinities too, whatever their sign."""
    for k_type, v_type in ((E4M3, E5M2), (E5M2, E4M3), (torch.int8, torch.int8)):
        every = torch.arange(256, dtype=torch.uint8).view(1, 4, 1, 64)
        caches = [torch.zeros(1, 8, 1, 64).to(dtype) for dtype in (k_type, v_type)]
        with cute_fa.simulate("sm_80"):
            append_kv(every.view(k_type), every.view(v_type), *caches, torch.tensor([3], dtype=torch.int32))
        for cache in caches:
            assert cache.view(torch.uint8)[:, 3:7].equal(every)
            assert not cache.view(torch.uint8)[:, [0, 1, 2, 7]].any()


def test_rotation_is_not_rounded_before_the_codes_are():
    """A quotient between two codes, which bf16 would move onto the tie."""
    k = torch.zeros(1, 1, 1, 32).bfloat16()
    k[..., 0], k[..., 16] = 1.0, 2.0**-12
    caches = [torch.zeros(1, 8, 1, 32).to(E4M3) for _ in "kv"]
    cos, sin = torch.full((8, 16), 1.0625), torch.full((8, 16), -1.0)  # 1.0625 is a tie of e4m3; sin tips it up
    with cute_fa.simulate("sm_80"):
        append_kv(k, k, *caches, torch.zeros(1, dtype=torch.int32), rotary_cos=cos, rotary_sin=sin,
                  k_descale=1.0, v_descale=1.0)  # fmt: skip
    assert caches[0][0, 0, 0, 0].item() == 1.125
    assert (torch.tensor(1.0625 + 2.0**-12).bfloat16().to(E4M3)).item() == 1.0


def test_operator():
    arguments = small()
    call = AppendCall(**{name: arguments[name] for name in AppendCall._fields if name in arguments})
    with cute_fa.simulate("sm_90a"):
        # test_schema compares tensors by operators that fp8 does not have
        checks = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
        library.opcheck(torch.ops.cute_fa.append_kv.default, tuple(call), test_utils=checks)
        torch._dynamo.reset()
        for descale in (arguments["k_descale"], 0.5):
            arguments = small(k_descale=descale)
            torch.compile(append_kv, fullgraph=True, backend="aot_eager")(**arguments)
            check_small(arguments)
    with FakeTensorMode(allow_non_fake_inputs=True):
        q, seqused_k = append_kv(**small(k_descale=0.5))
    assert q is None and (seqused_k.shape, seqused_k.dtype) == ((2,), torch.int32)


def test_autocast_casts_rows_to_its_own_type():
    arguments = small()
    wide = {name: arguments[name].float() * 1.001 for name in "kv"}
    with cute_fa.simulate("sm_80"), torch.autocast("cpu", dtype=torch.bfloat16):
        append_kv(**arguments | wide)
    check_small(arguments | {name: rows.bfloat16() for name, rows in wide.items()})


@pytest.mark.parametrize("kind", ["table", "contiguous"])
@pytest.mark.parametrize("descale", ["each", "single", "number"])
def test_rows_by_position(kind, descale):
    """The descales are those of the sequence that a row names."""
    generator = torch.Generator().manual_seed(0)
    batch = torch.tensor([2, 0, -1, 2, 1], dtype=torch.int32)
    positions = torch.tensor([7, 0, 3, 8, 15], dtype=torch.int32)
    k, v = (torch.randn(5, 3, 64, generator=generator).half() for _ in "kv")
    given = torch.rand(3, 3, generator=generator) + 0.1
    k_descale = {"each": given, "single": given[0, 0], "number": 0.3}[descale]
    each = torch.as_tensor(k_descale).expand(3, 3)
    pages = {"page_table": torch.tensor([[0, 5], [3, 2], [1, 4]], dtype=torch.int32)} if kind == "table" else {}
    shape = (6, 8) if kind == "table" else (3, 16)
    caches = [torch.zeros(*shape, 3, 64).to(dtype) for dtype in (E5M2, E4M3)]
    expected = [cache.clone() for cache in caches]
    for row, (b, position) in enumerate(zip(batch.tolist(), positions.tolist(), strict=True)):
        if b >= 0:
            at = (pages["page_table"][b, position // 8], position % 8) if pages else (b, position)
            expected[0][at] = rounded(k[row].float(), each[b][:, None], E5M2)
            expected[1][at] = rounded(v[row].float(), given[b][:, None], E4M3)
    with cute_fa.simulate("sm_90a"):
        append_rows(k, v, *caches, batch, positions, **pages, k_descale=k_descale, v_descale=given)
    assert all(codes(cache).equal(codes(right)) for cache, right in zip(caches, expected, strict=True))


def test_flashinfer_copies_codes():
    codes_k, codes_v = (torch.arange(2 * 3 * 32).view(2, 3, 32).to(torch.uint8) + first for first in (0, 100))
    cache = torch.zeros(2, 2, 8, 3, 32).to(E5M2)
    place = {"batch_indices": [0, 0], "positions": [7, 8], "kv_indices": [1, 0], "kv_indptr": [0, 2], "last": [1]}
    batch, positions, indices, indptr, last = (torch.tensor(t, dtype=torch.int32) for t in place.values())
    with cute_fa.simulate("sm_80"):
        rows_k, rows_v = codes_k.view(E5M2), codes_v.view(E5M2)
        flashinfer.append_paged_kv_cache(rows_k, rows_v, batch, positions, cache, indices, indptr, last)
    for half, expected in enumerate((codes_k, codes_v)):
        written = cache.view(torch.uint8)[:, half]
        assert written[1, 7].equal(expected[0]) and written[0, 0].equal(expected[1])
        assert written.count_nonzero() == expected.count_nonzero()


def test_rows_by_position_that_break_a_rule():
    cache = torch.zeros(3, 16, 3, 64).to(E4M3)
    rows, place = torch.zeros(5, 3, 64).half(), torch.zeros(5, dtype=torch.int32)
    with cute_fa.simulate("sm_80"):
        with pytest.raises(
            ShapeError, match=r"k_descale \(5, 3\): \(3, 3\) is needed, or one number, .* 3 sequences and 3 heads"
        ):
            append_rows(rows, rows, cache, cache.clone(), place, place, k_descale=torch.ones(5, 3), v_descale=1.0)
        with pytest.raises(ArgumentError, match="v_descale is missing: v_cache in e4m3 takes v in fp16 divided by it"):
            append_rows(rows, rows, cache, cache.clone(), place, place, k_descale=1.0)


def rows(*shape, dtype=torch.bfloat16) -> torch.Tensor:
    return torch.ones(shape).to(dtype)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"k_descale": None}, ArgumentError, "k_descale is missing: k_cache in e4m3 takes k in bf16 divided by it"),
        ({"v_descale": None}, ArgumentError, "v_descale is missing: v_cache in e5m2 takes v in bf16 divided by it"),
        (
            {"k_descale": torch.ones(2)},
            ShapeError,
            r"k_descale \(2,\): \(2, 2\) is needed, or one number, .* 2 sequences of k and",
        ),
        ({"v_descale": torch.ones(2, 1)}, ShapeError, r"v_descale \(2, 1\): \(2, 2\) is needed, or one number"),
        ({"v_descale": torch.ones(1, 1, 1)}, ShapeError, r"v_descale \(1, 1, 1\)"),
        ({"v_descale": torch.ones(2, 2).double()}, DTypeError, "v_descale is float64: float32 is needed"),
        ({"k_descale": torch.ones(2, 2, device="meta")}, DeviceError, "k_descale is on meta and k_cache on cpu"),
        ({"k_descale": "1"}, ArgumentError, "k_descale='1': a number is needed"),
        ({"k_descale": torch.ones(2, 2).to_sparse()}, ArgumentError, "k_descale has layout sparse_coo"),
        ({"k_descale": 0.0}, ArgumentError, r"k_descale=0: between 2\^-32 and 2\^32"),
        ({"v_descale": torch.tensor([[1, 1], [1, math.nan]])}, ArgumentError, r"v_descale\[1, 1\]=nan: between"),
        ({"k": rows(2, 1, 2, 64, dtype=E4M3)}, DTypeError, "v is bfloat16: float8_e5m2 is needed, as v_cache is"),
        ({"k": rows(2, 1, 2, 64, dtype=E5M2)}, DTypeError, "k_cache is float8_e4m3fn: float8_e5m2 is needed, as k is"),
        ({"v": rows(2, 1, 2, 32, dtype=E5M2)}, DTypeError, "v is float8_e5m2: bfloat16 is needed, as k is"),
        ({"v_cache": rows(3, 16, 2, 32)}, DTypeError, "v_cache is bfloat16: .*int8 is needed, as k_cache is of codes"),
        ({"k_cache": rows(3, 16, 2, 64)}, DTypeError, "v_cache is float8_e5m2: bfloat16 is needed, as k is"),
        (
            {"k_cache": rows(3, 16, 2, 64), "v_cache": rows(3, 16, 2, 32)},
            Fp8Error,
            "k_descale with k_cache in bf16: only fp8 and int8 caches have descales",
        ),
        (
            {"k": rows(2, 1, 2, 64, dtype=E4M3), "v": rows(2, 1, 2, 32, dtype=E5M2)},
            Fp8Error,
            "k_descale with k in e4m3: codes are copied as they are",
        ),
        ({"k": rows(2, 1, 2, 72), "k_cache": rows(3, 16, 2, 72, dtype=E4M3)}, ShapeError, "72: a multiple of 16"),
        (
            {"v": rows(2, 1, 2, 8), "v_cache": rows(3, 16, 2, 8, dtype=E5M2)},
            ShapeError,
            "head_dim_v=8: a multiple of 16",
        ),
    ],
)
def test_errors(changes, error, message):
    arguments = small(**changes)
    before = {name: t.clone() for name, t in arguments.items() if name.endswith("cache")}
    with cute_fa.simulate("sm_80") as simulation, pytest.raises(CuteFaError, match=message) as caught:
        append_kv(**arguments)
    assert type(caught.value) is error
    assert not simulation.launches
    assert all(arguments[name].view(torch.uint8).equal(t.view(torch.uint8)) for name, t in before.items())


def test_codes_do_not_rotate():
    arguments = small(k=rows(2, 1, 2, 64, dtype=E4M3), v=rows(2, 1, 2, 32, dtype=E5M2), k_descale=None, v_descale=None)
    table = torch.ones(32, 8)
    rule = "rotary_cos with {} in e4m3: rows in fp16 or bf16 rotate, codes do not"
    with cute_fa.simulate("sm_80"):
        with pytest.raises(Fp8Error, match=rule.format("k")):
            append_kv(**arguments, rotary_cos=table, rotary_sin=table)
        with pytest.raises(Fp8Error, match=rule.format("q")):
            append_kv(**small(), q=rows(2, 1, 4, 64, dtype=E4M3), rotary_cos=table, rotary_sin=table)
