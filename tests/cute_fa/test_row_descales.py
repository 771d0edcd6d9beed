"""Descales of a cache's rows: those that an append chooses and writes, and those of pages, which it reads."""

import pytest
import torch
from torch import library

import cute_fa
from cute_fa import append_kv, append_rows, fp8, reference
from cute_fa.compat.fa2 import apply_rotary_emb
from cute_fa.semantics.call import AppendCall
from cute_fa.semantics.errors import ArgumentError, DTypeError, Fp8Error, ShapeError, StrideError
from tests.testing.caches import codes, rounded
from tests.testing.simulated import unwritten_is_nan

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
BEFORE = (3, 14)  # tokens of the two sequences, of 5 new ones each
NEW, HEADS = 5, 3


class Cache:
    """Empty caches of two sequences, with descales of NaN."""

    def __init__(self, page_size: int | None, sizes=(64, 96), dtypes=(E4M3, E5M2), index: bool = False):
        generator = torch.Generator().manual_seed(0)
        self.page_size, rows = page_size, page_size or 48
        self.table, self.index = None, None
        count, pages = 3, -(-48 // rows)
        if page_size is not None:
            count = 3 * pages
            self.table = torch.randperm(count, generator=generator).view(3, pages).int()
        if index:
            self.index = torch.tensor([2, 0], dtype=torch.int32)
        elif self.table is not None:
            self.table = self.table[:2]
        else:
            count = 2
        self.k, self.v = (
            torch.zeros(count, rows, HEADS, size).to(dtype) for size, dtype in zip(sizes, dtypes, strict=True)
        )

    def options(self) -> dict:
        given = {"page_table": self.table, "cache_batch_idx": self.index}
        return {name: tensor for name, tensor in given.items() if tensor is not None}

    def descale(self, name: str, of_pages: bool = False) -> torch.Tensor:
        """NaN; the last dimension of four is not contiguous."""
        cache = getattr(self, name)
        whole = torch.full((cache.shape[0], 1 if of_pages else cache.shape[1], HEADS, 2), torch.nan)
        return whole[..., :1]

    def place(self, sequence: int, position: int) -> tuple[int, int]:
        row = sequence if self.index is None else int(self.index[sequence])
        if self.table is None:
            return row, position
        return int(self.table[row, position // self.page_size]), position % self.page_size


def new_rows(size: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Rows of very different magnitudes; one is 0, one has infinite elements and NaN, one is below all descales."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.exp2(16.0 * torch.rand(2, NEW, HEADS, 1, generator=generator) - 8.0)
    rows = spread * torch.randn(2, NEW, HEADS, size, generator=generator)
    rows[0, 0, 0] = 0.0
    rows[1, 2, 1, :3] = torch.tensor([torch.inf, -torch.inf, torch.nan])
    rows[0, 3, 2] *= 2.0**-60
    return rows.to(dtype)


LENGTHS = torch.tensor(BEFORE, dtype=torch.int32)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
@pytest.mark.parametrize(
    ("page_size", "sizes", "dtypes", "dtype", "index"),
    [
        (None, (64, 96), (E4M3, E5M2), torch.bfloat16, False),
        (16, (256, 32), (E5M2, E4M3), torch.float16, True),
        (1, (80, 128), (E4M3, E4M3), torch.bfloat16, False),
        (None, (112, 16), (E4M3, E4M3), torch.float16, True),
        (16, (64, 128), (torch.int8, torch.int8), torch.bfloat16, False),
    ],
)
def test_rows_choose_their_descales(arch, page_size, sizes, dtypes, dtype, index):
    """Every descale and every code is that of plain torch, and no other place is written."""
    cache = Cache(page_size, sizes, dtypes, index)
    rows = {name: new_rows(size, dtype, seed) for seed, (name, size) in enumerate(zip("kv", sizes, strict=True))}
    descales = {name: cache.descale(name) for name in "kv"}
    given = {f"{name}_descale": descale for name, descale in descales.items()}
    with cute_fa.simulate(arch, race=True, late=True, schedule_seed=3), unwritten_is_nan():
        append_kv(rows["k"], rows["v"], cache.k, cache.v, LENGTHS, **given, **cache.options())
    for name in "kv":
        expected, expected_descales = torch.zeros_like(getattr(cache, name)), torch.full_like(descales[name], torch.nan)
        wanted = fp8.quantize_per_row(rows[name], getattr(cache, name).dtype)
        for b, before in enumerate(BEFORE):
            for t in range(NEW):
                at = cache.place(b, before + t)
                expected_descales[at] = wanted.descale[b, t]
                expected[at] = rounded(rows[name][b, t].float(), wanted.descale[b, t], expected.dtype)
        assert codes(getattr(cache, name)).equal(codes(expected))
        assert torch.equal(descales[name].nan_to_num(-1.0), expected_descales.nan_to_num(-1.0))
    zero, tiny = (descales["k"][cache.place(0, BEFORE[0] + t)][head] for t, head in ((0, 0), (3, 2)))
    assert zero.item() == tiny.item() == 2.0**-32


@pytest.mark.parametrize("interleaved", [False, True])
def test_descales_are_of_rotated_keys(interleaved):
    """A row's largest element is that behind the rotation, which may be √2 of what it was before."""
    cache = Cache(16, (64, 64), (E4M3, E4M3))
    generator = torch.Generator().manual_seed(1)
    k = torch.randn(2, NEW, HEADS, 64, generator=generator).bfloat16()
    angles = 6.3 * torch.rand(64, 16, generator=generator)
    descale = cache.descale("k")
    rotary = {"rotary_cos": angles.cos(), "rotary_sin": angles.sin(), "rotary_interleaved": interleaved}
    options = {"k_descale": descale, "v_descale": 1.0} | cache.options() | rotary
    with cute_fa.simulate("sm_90a"):
        append_kv(k, k, cache.k, cache.v, LENGTHS, **options)
    rotated = apply_rotary_emb(k.float(), angles.cos(), angles.sin(), interleaved, seqlen_offsets=LENGTHS)
    wanted = fp8.quantize_per_row(rotated)
    for b, before in enumerate(BEFORE):
        for t in range(NEW):
            at = cache.place(b, before + t)
            torch.testing.assert_close(descale[at], wanted.descale[b, t], rtol=1e-6, atol=0.0)
            value = cache.k[at].float() * descale[at]
            # between two codes a last digit of fp32 decides
            assert ((value - rotated[b, t]).abs() <= 2.0**-4 * rotated[b, t].abs() + 2.0**-9 * descale[at]).all()
    assert not torch.allclose(wanted.descale, fp8.quantize_per_row(k).descale, rtol=0.05)


def test_descales_of_pages_are_read():
    """Beside values with descales of their own rows."""
    cache = Cache(16)
    generator = torch.Generator().manual_seed(2)
    k, v = new_rows(64, torch.bfloat16, 0), new_rows(96, torch.bfloat16, 1)
    k_descale = torch.rand(*cache.descale("k", of_pages=True).shape, generator=generator) + 0.01
    given, v_descale = k_descale.clone(), cache.descale("v")
    with cute_fa.simulate("sm_80", race=True):
        append_kv(k, v, cache.k, cache.v, LENGTHS, k_descale=given, v_descale=v_descale, **cache.options())
    assert given.equal(k_descale)
    wanted = fp8.quantize_per_row(v, E5M2)
    for b, before in enumerate(BEFORE):
        for t in range(NEW):
            page, row = cache.place(b, before + t)
            exact = (k[b, t].float() / k_descale[page, 0]).clamp(-448, 448).to(E4M3)
            assert codes(cache.k[page, row]).equal(codes(exact))
            assert v_descale[page, row].equal(wanted.descale[b, t])


def test_rows_by_position():
    cache, rows = Cache(16), torch.randn(4, HEADS, 96, generator=torch.Generator().manual_seed(3)).bfloat16()
    batch, positions = (torch.tensor(numbers, dtype=torch.int32) for numbers in ([1, 0, -1, 1], [20, 3, 0, 47]))
    given = {f"{name}_descale": cache.descale(name) for name in "kv"}
    with cute_fa.simulate("sm_90a"):
        append_rows(rows[..., :64], rows, cache.k, cache.v, batch, positions, page_table=cache.table, **given)
    wanted = fp8.quantize_per_row(rows[None], E5M2)
    for r in (0, 1, 3):
        at = cache.place(int(batch[r]), int(positions[r]))
        assert given["v_descale"][at].equal(wanted.descale[0, r])
        assert codes(cache.v[at]).equal(codes(wanted.codes[0, r]))
    assert given["v_descale"].isfinite().sum() == given["k_descale"].isfinite().sum() == 3 * HEADS


def test_tokens_beyond_the_cache_write_no_descale(monkeypatch):
    """Where values are not checked."""
    cache = Cache(16)
    given = {f"{name}_descale": cache.descale(name) for name in "kv"}
    lengths = torch.tensor([46, 48], dtype=torch.int32)
    with cute_fa.simulate("sm_80"):
        monkeypatch.setattr("cute_fa.engine.worlds.checks_values", lambda: False)
        append_kv(new_rows(64, torch.bfloat16, 0), new_rows(96, torch.bfloat16, 1), cache.k, cache.v, lengths,
                  **given, **cache.options())  # fmt: skip
    for descale in given.values():
        assert descale.isfinite().sum() == 2 * HEADS


def test_operator():
    """Its schema says that these descales are written, which compiled code has to know."""
    cache = Cache(None)
    rows = new_rows(64, torch.bfloat16, 0), new_rows(96, torch.bfloat16, 1)
    written = {f"{name}_row_descale": cache.descale(name) for name in "kv"}
    call = AppendCall(cache.k, cache.v, *rows, LENGTHS, **written)
    with cute_fa.simulate("sm_90a"):
        checks = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
        library.opcheck(torch.ops.cute_fa.append_kv.default, tuple(call), test_utils=checks)
        torch._dynamo.reset()
        results = []
        for run in (append_kv, torch.compile(append_kv, fullgraph=True, backend="aot_eager")):
            cache = Cache(None)
            descales = {f"{name}_descale": cache.descale(name) for name in "kv"}
            run(*rows, cache.k, cache.v, LENGTHS, **descales)
            results.append((codes(cache.k), codes(cache.v), *(d.nan_to_num(-1.0) for d in descales.values())))
    assert all(map(torch.equal, *results)) and (results[0][2] > 0.0).any()


@pytest.mark.sampled
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
@pytest.mark.parametrize("page_size", [None, 16])
def test_append_and_attend(arch, page_size):
    """Tokens that one call writes, another reads: O is that of codes × descales, and near that of the values."""
    cache, generator = Cache(page_size, (64, 64), (E4M3, E4M3)), torch.Generator().manual_seed(4)
    descales = {f"{name}_descale": cache.descale(name) for name in "kv"}
    lengths = torch.tensor([0, 0], dtype=torch.int32)
    values: list[list[torch.Tensor]] = [[], []]
    for tokens in (40, 1, 4):
        q, k, v = (torch.randn(2, tokens, heads, 64, generator=generator).bfloat16() for heads in (6, HEADS, HEADS))
        v *= torch.exp2(torch.randint(-6, 7, (2, tokens, HEADS, 1), generator=generator)).bfloat16()
        with cute_fa.simulate(arch):
            out, lse = cute_fa.flash_attn_with_kvcache(
                *(q, cache.k, cache.v, k, v),
                cache_seqlens=lengths,
                page_table=cache.table,
                causal=True,
                return_lse=True,
                **descales,
            )
        lengths = lengths + tokens
        read = {"seqused_k": lengths, "page_table": cache.table, "causal": True}
        assert reference.check(out, lse, q, cache.k, cache.v, **read, **descales).ok
        for column, new in zip(values, (k, v), strict=True):
            column.append(new)
        exact, _ = reference.attention(q, *(torch.cat(column, 1) for column in values), causal=True)
        assert (out - exact).abs().max() <= 0.1 * values[1][0].abs().max()


WHOLE = (2, 48, HEADS, 1)


@pytest.mark.parametrize(
    ("descale", "error", "message"),
    [
        (
            torch.ones(2, 48, 1, 1),
            ShapeError,
            r"k_descale \(2, 48, 1, 1\): \(2, 48, 3, 1\) is needed where descales are w",
        ),
        (torch.ones(2, 48, HEADS, 64), ShapeError, r"k_descale \(2, 48, 3, 64\): \(2, 48, 3, 1\) is needed"),
        (torch.ones(2, 2, HEADS, 1), ShapeError, r"k_descale \(2, 2, 3, 1\): \(2, 48, 3, 1\) is needed, or 1 in the"),
        (torch.ones(WHOLE).double(), DTypeError, "k_descale is float64: float32 is needed"),
        (torch.ones(1).expand(WHOLE), StrideError, "k_descale .*elements that share memory cannot be written"),
        (torch.zeros(2, 1, HEADS, 1), ArgumentError, r"k_descale\[0, 0, 0, 0\]=0: between 2\^-32 and 2\^32"),
        (torch.ones(2, 48, HEADS), ShapeError, r"k_descale \(2, 48, 3\): \(2, 3\) is needed, or one number"),
    ],
)
def test_errors_of_the_append(descale, error, message):
    cache = Cache(None)
    k, v = new_rows(64, torch.bfloat16, 0), new_rows(96, torch.bfloat16, 1)
    with cute_fa.simulate("sm_80"), pytest.raises(error, match=f"^{message}"):
        append_kv(k, v, cache.k, cache.v, LENGTHS, k_descale=descale, v_descale=1.0)
    assert not cache.k.float().any()


def test_one_memory_for_both_is_refused():
    cache = Cache(None)
    descale = cache.descale("k")
    rows = new_rows(64, torch.bfloat16, 0), new_rows(96, torch.bfloat16, 1)
    message = "^v_descale shares its memory with k_descale"
    with cute_fa.simulate("sm_80"):
        append_kv(*rows, cache.k, cache.v, LENGTHS, k_descale=descale, v_descale=cache.descale("v"))
        with pytest.raises(ArgumentError, match=message):  # though a call of these shapes was
            append_kv(*rows, cache.k, cache.v, LENGTHS, k_descale=descale, v_descale=descale)


def test_keys_and_values_may_share_an_allocation():
    """Descales beside each other, between the pages' keys and values, and behind the codes of each row."""
    generator = torch.Generator().manual_seed(6)
    k, v = (torch.randn(2, NEW, HEADS, 64, generator=generator).bfloat16() for _ in range(2))
    pages, numbers = torch.zeros(6, 2, 16, HEADS, 64).to(E4M3), torch.full((6, 2, 16, HEADS), torch.nan)
    rows = torch.zeros(6, 2, 16, HEADS, 80, dtype=torch.uint8)
    table = torch.arange(6).view(2, 3).int()
    apart = (pages[:, 0], pages[:, 1]), (numbers[:, 0, ..., None], numbers[:, 1, ..., None])
    inside = (
        [rows[:, i, ..., :64].view(E4M3) for i in range(2)],
        [rows[:, i, ..., 64:68].view(torch.float32) for i in range(2)],
    )
    for caches, (k_descale, v_descale) in (apart, inside):
        with cute_fa.simulate("sm_80"):
            append_kv(k, v, *caches, LENGTHS, page_table=table, k_descale=k_descale, v_descale=v_descale)
            with pytest.raises(ArgumentError, match=r"^k_descale shares its memory with k_cache"):
                views = caches[0].view(torch.uint8)[..., :4].view(torch.float32)
                append_kv(k, v, *caches, LENGTHS, page_table=table, k_descale=views, v_descale=v_descale)
        for new, cache, descale in ((k, caches[0], k_descale), (v, caches[1], v_descale)):
            wanted = fp8.quantize_per_row(new)
            assert descale[table[1, 0], 14].equal(wanted.descale[1, 0])
            assert codes(cache[table[1, 1], 2]).equal(codes(wanted.codes[1, 4]))


def test_codes_choose_none():
    cache = Cache(None)
    k, v = new_rows(64, torch.bfloat16, 0).to(E4M3), new_rows(96, torch.bfloat16, 1).to(E5M2)
    with cute_fa.simulate("sm_80"), pytest.raises(Fp8Error, match=r"^k_descale with k in e4m3: .* copied as they are"):
        append_kv(k, v, cache.k, cache.v, LENGTHS, k_descale=cache.descale("k"), v_descale=None)


def test_quantize_per_row():
    x = new_rows(64, torch.float32, 0)
    made = fp8.quantize_per_row(x)
    assert made.descale.shape == (2, NEW, HEADS, 1) and made.codes.dtype == E4M3
    finite = x.isfinite()
    values = fp8.dequantize(made.codes, made.descale)
    assert ((values - x)[finite].abs() <= (2.0**-4 * x.abs() + 2.0**-10 * made.descale)[finite]).all()
    largest = made.codes.float().nan_to_num(0.0).abs().amax(-1)
    assert (largest[0, 1:3] == 448).all() and largest[0, 0, 0] == 0
    with pytest.raises(ShapeError, match=r"^descale \(2, 4, 3, 1\): \(2, 5, 3, 1\) is needed, or 1 in the place"):
        fp8.dequantize(made.codes, torch.ones(2, 4, 3, 1))
