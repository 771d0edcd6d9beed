"""Inference as values: a paged KV cache, attention over it, and the chunks of a prefill.

A ``PagedKvCache`` is memory alone: pages, which a layer of a model allocates once. Which pages a sequence owns, and how
many of its tokens they hold, changes with every step and is the request's. Who owns which page is decided elsewhere: a
page allocator is the server's business.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from cute_fa.api.requests import CumulativeSeqlens, ForwardRequest, VarlenFwdRequest, check_kinds, check_packed, packed
from cute_fa.engine import worlds
from cute_fa.engine.table import TABLE, DispatchKey
from cute_fa.engine.worlds import described
from cute_fa.semantics.argument_names import spelled
from cute_fa.semantics.errors import (
    ArgumentError,
    ChunkIndexError,
    DeviceError,
    DTypeError,
    EmptyCacheError,
    LengthError,
    ShapeError,
    ZeroLengthError,
)
from cute_fa.semantics.problem import check_page_size
from cute_fa.semantics.tensors import DTYPES, check_dims, check_head_dim, check_loadable, is_codes
from cute_fa.semantics.types import DType, KvLayout

if TYPE_CHECKING:
    from cute_fa.engine.contract import AttentionKernel
    from cute_fa.semantics.problem import AttentionProblem


@dataclass(frozen=True, eq=False)
class PagedKvCache:
    """Keys and values in pages: ``k_pages`` (num_pages, page_size, kv_heads, head_dim) and ``v_pages`` (…, head_dim_v),
    fp16, bf16, e4m3, e5m2 or int8, page_size a power of two from 1 to 1024. With ``layout`` HND tensors are (num_pages,
    kv_heads, page_size, …): kernels follow strides, nothing is copied.

    Raises ArgumentError, ShapeError, DTypeError, DeviceError, StrideError, EmptyCacheError or PageSizeError. Pages of k
    and v may be of different types of codes. These are multiplied by the descales of the request that reads them.
    """

    k_pages: torch.Tensor
    v_pages: torch.Tensor
    layout: KvLayout = KvLayout.NHD

    def __post_init__(self) -> None:
        check_kinds(self, k_pages=torch.Tensor, v_pages=torch.Tensor, layout=KvLayout)
        k, v = self.k_pages, self.v_pages
        order = {KvLayout.NHD: "page_size, kv_heads", KvLayout.HND: "kv_heads, page_size"}[self.layout]
        for name, tensor in (("k_pages", k), ("v_pages", v)):
            check_dims(name, tensor, 4, f"(num_pages, {order}, head_dim)")
        if v.shape[:-1] != k.shape[:-1]:
            raise ShapeError(f"v_pages {tuple(v.shape)} and k_pages {tuple(k.shape)}: all sizes but the last are equal")
        if k.dtype not in DTYPES:
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
            raise DTypeError("k_pages", k.dtype, f"one of {names} is needed")
        both_codes = is_codes(k) and is_codes(v)
        if v.dtype != k.dtype and not both_codes:
            raise DTypeError("v_pages", v.dtype, f"{str(k.dtype).removeprefix('torch.')} is needed, as k_pages are")
        if v.device != k.device:
            raise DeviceError(f"v_pages are on {v.device} and k_pages on {k.device}: they must be on one device")
        if self.num_pages == 0:
            raise EmptyCacheError(f"k_pages {tuple(k.shape)}: the cache has no pages")
        check_page_size(self.page_size)
        check_head_dim("k_pages", k)
        check_head_dim("v_pages", v, "head_dim_v")
        if self.kv_heads < 1:
            raise ShapeError(f"k_pages {tuple(k.shape)}: kv_heads={self.kv_heads}: at least 1 is needed")
        check_loadable("k_pages", k)
        check_loadable("v_pages", v)

    @classmethod
    def empty(
        cls,
        num_pages: int,
        page_size: int,
        kv_heads: int,
        head_dim: int,
        *,
        head_dim_v: int | None = None,
        layout: KvLayout = KvLayout.NHD,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cuda",
    ) -> PagedKvCache:
        """Pages that hold nothing yet; ``head_dim_v`` is ``head_dim`` by default."""
        sizes = {"num_pages": num_pages, "page_size": page_size, "kv_heads": kv_heads, "head_dim": head_dim}
        sizes["head_dim_v"] = head_dim if head_dim_v is None else head_dim_v
        for name, size in sizes.items():
            _check_count(name, size)
        inner = (page_size, kv_heads) if layout is KvLayout.NHD else (kv_heads, page_size)
        k, v = (
            torch.empty(num_pages, *inner, size, dtype=dtype, device=device) for size in (head_dim, sizes["head_dim_v"])
        )
        return cls(k, v, layout)

    @cached_property
    def k(self) -> torch.Tensor:
        """``k_pages`` seen as (num_pages, page_size, kv_heads, head_dim), as the public functions take them."""
        return self._by_token(self.k_pages)

    @cached_property
    def v(self) -> torch.Tensor:
        """``v_pages`` seen as (num_pages, page_size, kv_heads, head_dim_v)."""
        return self._by_token(self.v_pages)

    @property
    def num_pages(self) -> int:
        return self.k_pages.shape[0]

    @property
    def page_size(self) -> int:
        return self.k.shape[1]

    @property
    def kv_heads(self) -> int:
        return self.k.shape[2]

    @property
    def head_dim(self) -> int:
        return self.k_pages.shape[3]

    @property
    def head_dim_v(self) -> int:
        return self.v_pages.shape[3]

    @property
    def dtype(self) -> DType:
        return DTYPES[self.k_pages.dtype]

    def _by_token(self, pages: torch.Tensor) -> torch.Tensor:
        return pages if self.layout is KvLayout.NHD else pages.transpose(1, 2)


# What a PagedAttentionRequest calls arguments of the operator.
_NAMES = spelled(k="cache.k_pages", v="cache.v_pages", seqused_k="seqlens")


@dataclass(frozen=True, eq=False)
class PagedAttentionRequest(ForwardRequest):
    """Attention over the tokens that a paged cache holds, decoding and prefill alike and mixed in one batch: the
    queries of a sequence are its last tokens, whose keys and values are in the cache.

    q: (batch, seqlen_q, heads, head_dim), or packed (total_q, heads, head_dim) with ``cu_seqlens_q``.
    page_table: int32 (batch, max_pages), the pages of each sequence in order; entries beyond its length are not read.
    seqlens: int32 (batch), how many tokens of each sequence the cache holds. max_seqlen_k: at least the largest of
    them, by default all that a row of page_table can hold.
    num_splits: parts that the keys are split into; 0 leaves kernel and number to the table, and ``problem()`` and
    ``dispatch_key()`` then stand for one part.
    k_descale, v_descale: fp32 (batch, kv_heads), needed for pages in fp8 or int8 and refused for others; of
    pages and of rows as for ``cute_fa.flash_attn_func``; q_descale: of fp8 queries, which fp8 pages are read with, 1 by
    default. ``out_dtype`` as for ``cute_fa.flash_attn_func``.
    tree_mask: int32 (batch, seqlen_q, words) or (total_q, words), which draft tokens a query sees, as for
    ``cute_fa.flash_attn_varlen_func``.

    Beside the errors of the public functions: PagedHeadDimError, LengthError and, where values are checked (see
    ``cute_fa.flash_attn_varlen_func``), PageTableError from ``run()``; ``kernel()`` and ``run()`` raise Fp8Error where
    no kernel reads such pages, or none with such queries.
    """

    fp8 = None

    cache: PagedKvCache
    page_table: torch.Tensor
    seqlens: torch.Tensor
    _: KW_ONLY
    cu_seqlens_q: CumulativeSeqlens | None = None
    max_seqlen_k: int | None = None
    num_splits: int = 0
    q_descale: torch.Tensor | float | None = None
    k_descale: torch.Tensor | None = None
    v_descale: torch.Tensor | None = None
    out_dtype: torch.dtype | None = None
    tree_mask: torch.Tensor | None = None

    def __post_init__(self) -> None:
        check_kinds(self, q=torch.Tensor, cache=PagedKvCache, page_table=torch.Tensor, seqlens=torch.Tensor)
        for name in ("k_descale", "v_descale"):
            self._check_given(name, getattr(self, name))
        if self.cu_seqlens_q is not None:
            check_kinds(self, cu_seqlens_q=CumulativeSeqlens)
        super().__post_init__()
        if self.cu_seqlens_q is not None:
            check_packed(self, "q")

    @property
    def k(self) -> torch.Tensor:
        return self.cache.k

    @property
    def v(self) -> torch.Tensor:
        return self.cache.v

    @property
    def capacity(self) -> int:
        """Tokens that a row of page_table can hold."""
        return self.page_table.shape[1] * self.cache.page_size

    def _check_given(self, name: str, descale: torch.Tensor | None) -> None:
        """Whether there are descales where the pages need some, and there alone."""
        if not self.cache.dtype.is_codes:
            if descale is not None:
                raise ArgumentError(
                    f"{name} with {self.cache.dtype.value} pages: only fp8 and int8 pages have descales"
                )
            return
        if not isinstance(descale, torch.Tensor):
            rule = f"{self.cache.dtype.value} pages need a tensor, (batch, kv_heads) or of pages or rows"
            raise ArgumentError(f"{name} is {type(descale).__name__}: {rule}")

    def _choose(self) -> tuple[AttentionProblem, type[AttentionKernel]]:
        num_sms = described(self._arch, self.q.device).num_sms
        return TABLE.choose(self.problem(), self.family, num_sms, self.num_splits)

    def _options(self) -> dict[str, Any]:
        return {
            **super()._options(),
            **(packed(self, "q") if self.cu_seqlens_q is not None else {}),
            "seqused_k": self.seqlens,
            "names": _NAMES,
        }


@dataclass(frozen=True)
class ChunkLayout:
    """One chunk of a prefill that is done in ``total_chunks`` pieces: at most ``chunk_q_tokens`` queries a sequence
    (the last chunk may have fewer), behind at most ``prefix_kv_tokens`` keys that the chunks before, or a shared
    prefix, left. ``chunk_index`` counts from 0.

    Raises ZeroLengthError for chunks of 0 tokens or 0 chunks, ChunkIndexError for an index beyond the last,
    ArgumentError for negative sizes and other types.
    """

    chunk_q_tokens: int
    prefix_kv_tokens: int
    total_chunks: int
    chunk_index: int

    def __post_init__(self) -> None:
        for name in ("chunk_q_tokens", "prefix_kv_tokens", "total_chunks", "chunk_index"):
            _check_count(name, getattr(self, name))
        for name in ("chunk_q_tokens", "total_chunks"):
            if getattr(self, name) == 0:
                raise ZeroLengthError(f"{name}=0: at least 1 is needed")
        if self.chunk_index >= self.total_chunks:
            raise ChunkIndexError(f"chunk_index={self.chunk_index}: there are {self.total_chunks} chunks, from 0 on")

    @property
    def is_final(self) -> bool:
        """Whether no chunk follows."""
        return self.chunk_index == self.total_chunks - 1


@dataclass(frozen=True, eq=False)
class ChunkedPrefillRequest:
    """One chunk of a prefill: ``attention`` over a paged cache or over packed keys, whose queries are the chunk and the
    last tokens of the keys. Sequences whose prompt is done have none.

    Beside the errors of ``attention``: LengthError unless each of the others has at most ``chunk.chunk_q_tokens``
    queries, at least as many keys, and at most ``chunk.prefix_kv_tokens`` keys more; or where the pages cannot hold
    that many.
    Lengths on the device are checked by ``run()``, where values are (see ``cute_fa.flash_attn_varlen_func``).
    """

    attention: PagedAttentionRequest | VarlenFwdRequest
    chunk: ChunkLayout

    def __post_init__(self) -> None:
        if not isinstance(self.attention, (PagedAttentionRequest, VarlenFwdRequest)):
            kind = type(self.attention).__name__
            raise ArgumentError(f"attention is {kind}: a PagedAttentionRequest or a VarlenFwdRequest is needed")
        check_kinds(self, chunk=ChunkLayout)
        longest = max(self._lengths_q)
        if longest > self.chunk.chunk_q_tokens:
            raise LengthError(f"a sequence of {longest} queries: the chunk has {self.chunk.chunk_q_tokens} tokens")
        if isinstance(self.attention, VarlenFwdRequest):
            self._check_lengths_k(self.attention.cu_seqlens_k.lengths)
        elif self.chunk.prefix_kv_tokens + longest > self.attention.capacity:
            tokens = f"{self.chunk.prefix_kv_tokens} tokens and {longest} after them"
            raise LengthError(f"{tokens}: a row of page_table holds {self.attention.capacity}")

    def problem(self) -> AttentionProblem:
        """The validated problem."""
        return self.attention.problem()

    def dispatch_key(self) -> DispatchKey:
        """What the table is asked."""
        return self.attention.dispatch_key()

    def kernel(self) -> type[AttentionKernel]:
        """The kernel that serves the request; raises UnsupportedKeyError if there is none."""
        return self.attention.kernel()

    def kernel_name(self) -> str:
        """The canonical name of that kernel with this problem."""
        return self.attention.kernel_name()

    def run(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(out, lse) of the chunk's queries."""
        if isinstance(self.attention, PagedAttentionRequest) and worlds.checks_values():
            self._check_lengths_k(self.attention.seqlens.tolist())
        return self.attention.run()

    def reference(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(out, lse) by ``cute_fa.reference``, as of ``attention``."""
        return self.attention.reference()

    @property
    def _lengths_q(self) -> tuple[int, ...]:
        offsets, q = self.attention.cu_seqlens_q, self.attention.q
        return offsets.lengths if offsets is not None else (q.shape[1],) * q.shape[0]

    def _check_lengths_k(self, lengths_k: tuple[int, ...] | list[int]) -> None:
        most = self.chunk.prefix_kv_tokens
        for b, (length_q, length_k) in enumerate(zip(self._lengths_q, lengths_k, strict=True)):
            if length_q and not 0 <= length_k - length_q <= most:
                rule = f"they are its last keys, behind at most {most} of the prefix"
                raise LengthError(f"sequence {b} has {length_q} queries and {length_k} keys: {rule}")


def _check_count(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ArgumentError(f"{name}={value!r}: an int of at least 0 is needed")
