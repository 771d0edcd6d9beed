"""A KV cache before and after an append, and rotary position embedding, in plain torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from cute_fa.tools.inputs import Inputs


@dataclass(frozen=True)
class Rotary:
    """Tables (positions, dim / 2) of random angles; ``pairs`` stores them as (positions, dim / 2, 2)."""

    cos: torch.Tensor
    sin: torch.Tensor
    interleaved: bool

    @classmethod
    def random(
        cls, positions: int, dim: int, dtype=torch.float32, interleaved: bool = False, pairs: bool = False
    ) -> Rotary:
        angles = 6.3 * torch.rand(positions, dim // 2, generator=torch.Generator().manual_seed(3))
        table = torch.stack((angles.cos(), angles.sin()), -1).to(dtype)
        cos, sin = table[..., 0], table[..., 1]
        return cls(cos, sin, interleaved) if pairs else cls(cos.contiguous(), sin.contiguous(), interleaved)

    def __call__(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """x (rows, heads, head_dim), each row by its position, in fp32, rounded to x's dtype."""
        cos, sin = (table[positions].float()[:, None] for table in (self.cos, self.sin))
        dim = 2 * cos.shape[-1]
        rotating, rest = x[..., :dim].float(), x[..., dim:]
        if self.interleaved:
            first, second = rotating[..., 0::2], rotating[..., 1::2]
        else:
            first, second = rotating.chunk(2, -1)
        parts = (first * cos - second * sin, first * sin + second * cos)
        rotated = torch.stack(parts, -1).flatten(-2) if self.interleaved else torch.cat(parts, -1)
        return torch.cat((rotated.to(x.dtype), rest), -1)

    def arguments(self) -> dict:
        return {"rotary_cos": self.cos, "rotary_sin": self.sin, "rotary_interleaved": self.interleaved}


@dataclass(frozen=True)
class Append:
    """``k``, ``v``: new rows, dense, or packed with ``cu_seqlens_k_new``; the caches before them, NaN where they go,
    and after; ``cache_seqlens``: tokens before; ``rotates``: whether keys are rotated on the way."""

    k: torch.Tensor
    v: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    k_after: torch.Tensor
    v_after: torch.Tensor
    cache_seqlens: torch.Tensor
    cu_seqlens_k_new: torch.Tensor | None
    rotates: bool

    def check(self) -> None:
        """The caches hold what they should, bit for bit but for what is rotated, and nothing else has changed."""
        if self.rotates:
            assert_rotated(self.k_cache, self.k_after)
        else:
            torch.testing.assert_close(self.k_cache, self.k_after, atol=0, rtol=0, equal_nan=True)
        torch.testing.assert_close(self.v_cache, self.v_after, atol=0, rtol=0, equal_nan=True)


def assert_rotated(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal to one rounding: fma keeps more bits of a difference of products than two roundings do."""
    step = 2 * torch.finfo(expected.dtype).eps
    torch.testing.assert_close(actual, expected, atol=1e-6, rtol=step, equal_nan=True)


def places(given: Inputs, sequence: int, tokens: range, index: torch.Tensor | None = None):
    """Where tokens of a sequence lie in the cache: (pages or sequences, rows)."""
    tokens = torch.tensor(list(tokens), dtype=torch.long)
    if given.page_table is None:
        row = sequence if index is None else int(index[sequence])
        return torch.full_like(tokens, row), tokens
    page_size = given.k.shape[1]
    return given.page_table[sequence].long()[tokens // page_size], tokens % page_size


def scattered(page_table: torch.Tensor, index: torch.Tensor, rows: int) -> torch.Tensor:
    """A page table of ``rows`` rows, of which row index[b] is that of sequence b; the others list pages that no cache
    has."""
    table = page_table.new_full((rows, page_table.shape[1]), 2**30)
    table[index.long()] = page_table
    return table


def take_last(
    given: Inputs,
    new: list[int],
    packed: bool = False,
    rotary: Rotary | None = None,
    index: torch.Tensor | None = None,
    starts: list[int] | None = None,
) -> Append:
    """The inputs' k and v as a cache whose sequences' last ``new`` tokens are yet to be appended; with ``rotary`` these
    rotate by their place in the cache, or from ``starts`` on. Dense new rows are as many as the most, NaN beyond a
    sequence's own."""
    lengths = given.seqused_k.tolist()
    k_cache, v_cache, k_after = given.k.clone(), given.v.clone(), given.k.clone()
    rows_k, rows_v = [], []
    for b, (length, count) in enumerate(zip(lengths, new, strict=True)):
        at = places(given, b, range(length - count, length), index)
        rows_k.append(given.k[at])
        rows_v.append(given.v[at])
        k_cache[at] = v_cache[at] = torch.nan
        if rotary is not None:
            first = length - count if starts is None else starts[b]
            k_after[at] = rotary(rows_k[-1], first + torch.arange(count))
    cu_seqlens = None
    if packed:
        cu_seqlens = torch.tensor([0, *torch.tensor(new).cumsum(0)], dtype=torch.int32)
        k, v = torch.cat(rows_k), torch.cat(rows_v)
    else:
        k, v = (torch.nn.utils.rnn.pad_sequence(rows, True, torch.nan) for rows in (rows_k, rows_v))
    before = given.seqused_k - torch.tensor(new, dtype=torch.int32)
    return Append(k, v, k_cache, v_cache, k_after, given.v.clone(), before, cu_seqlens, rotary is not None)


def rotated_queries(given: Inputs, rotary: Rotary, starts: list[int], each: bool = True) -> torch.Tensor:
    """q, each sequence's row t by position start + t, or all by start. Rows that do not count stay."""
    q = given.q.clone()
    for b, start in enumerate(starts):
        rows = slice(None)
        if given.cu_seqlens_q is not None:
            rows = slice(*given.cu_seqlens_q[b : b + 2].tolist())
        part = q[rows] if given.cu_seqlens_q is not None else q[b]
        positions = start + torch.arange(part.shape[0]) * int(each)
        part.copy_(rotary(part.clone(), positions))
    return q


def after(given: Inputs, append: Append, q: torch.Tensor | None = None) -> Inputs:
    """The inputs with the cache as it is after the append, for the reference."""
    return replace(given, k=append.k_after, v=append.v_after, q=given.q if q is None else q)


def rounded(values: torch.Tensor, descale: torch.Tensor | float, dtype: torch.dtype) -> torch.Tensor:
    """Codes of fp32 values / descale."""
    if dtype == torch.int8:
        return (values / descale).nan_to_num(0.0, 127, -127).clamp(-127, 127).round().to(dtype)
    largest = torch.finfo(dtype).max
    return (values / descale).clamp(-largest, largest).to(dtype)


def codes(tensor: torch.Tensor) -> torch.Tensor:
    """Those of a tensor of codes as bytes, all NaN alike: torch keeps their sign."""
    return torch.where(tensor.float().isnan(), torch.tensor(255, dtype=torch.uint8), tensor.view(torch.uint8))


class CodedRows(NamedTuple):
    """New rows for an fp8 cache: what is given, the cache before, NaN where they go, and after: the least and the
    largest codes that are right."""

    new: torch.Tensor
    cache: torch.Tensor
    least: torch.Tensor
    largest: torch.Tensor

    def check(self, cache: torch.Tensor) -> None:
        """The cache after the append: bit for bit but where a rotation's last bits decide between two codes."""
        alike = codes(self.least) == codes(self.largest)
        assert codes(cache)[alike].equal(codes(self.least)[alike])
        least, found, largest = (t.float()[~alike] for t in (self.least, cache, self.largest))
        assert (least <= found).all() and (found <= largest).all()
        assert (~alike).sum() < 0.002 * alike.numel() + 3


def coded_rows(
    name: str,
    before: Append,
    given: Inputs,
    new: list[int],
    dtype: torch.dtype,
    descale: torch.Tensor | None,
    index: torch.Tensor | None = None,
    rotary: Rotary | None = None,
    starts: list[int] | None = None,
) -> CodedRows:
    """``before`` (:func:`take_last` of ``given``) with its k or v in fp8: rows are divided by ``descale`` (batch,
    heads_kv), behind the rotation, or for None given as codes."""
    rows, values = getattr(before, name), getattr(given, name)
    cache = getattr(before, f"{name}_cache").to(dtype)
    ends = [cache.clone(), cache.clone()]
    for b, (first, count) in enumerate(zip(before.cache_seqlens.tolist(), new, strict=True)):
        at = places(given, b, range(first, first + count), index)
        if descale is None:
            ends[0][at] = ends[1][at] = values[at].to(dtype)
            continue
        exact = values[at].double()
        slack = torch.zeros_like(exact)
        if rotary is not None:
            # two products of fp32 and their sum
            dim = 2 * rotary.cos.shape[-1]
            slack[..., :dim] = 2.0**-22 * exact[..., :dim].abs().amax(-1, keepdim=True)
            exact = rotary(exact, (first if starts is None else starts[b]) + torch.arange(count))
        for sign, end in zip((-1, 1), ends, strict=True):
            end[at] = rounded((exact + sign * slack).float(), descale[b][:, None], dtype)
    return CodedRows(rows.to(dtype) if descale is None else rows, cache, *ends)
