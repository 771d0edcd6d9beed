"""``AppendProblem``: one append to a KV cache, as ``AttentionProblem`` is one attention."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, cast

from cute_fa.semantics.errors import ArgumentError, Fp8Error, ShapeError
from cute_fa.semantics.options import declares, option
from cute_fa.semantics.problem import DTYPE_ROWS, HEAD_DIM_ROWS, HEAD_DIM_V_ROWS, check_sizes
from cute_fa.semantics.types import Direction, DType, SmArch

MAX_HEAD_DIM = 256
ROTARY_STEP = 16  # of rotary_dim: two halves in 16-byte chunks of fp16 or bf16
ROTARY_DTYPES = ("fp16", "bf16", "fp32")
_CACHE_ROWS = {
    "bf16, k and v e4m3": {"dtype_k": DType.E4M3, "dtype_v": DType.E4M3},
    "bf16, k and v int8": {"dtype_k": DType.INT8, "dtype_v": DType.INT8},
}
_ROW_DESCALE_ROWS = {
    "bf16, k and v e4m3 with descales of rows": {
        **_CACHE_ROWS["bf16, k and v e4m3"],
        "k_row_descale": True,
        "v_row_descale": True,
    }
}


@dataclass(frozen=True)
class AppendProblem:
    """What is asked of a kernel that writes new keys and values into a cache and rotates keys and queries on the way.

    ``dtype``: of the new rows and of queries; ``dtype_k``, ``dtype_v``: of the caches, alike by default. Rows in fp16
    or bf16 are divided by a descale and rounded where the caches are fp8 or int8; rows of codes are copied to caches of
    their own type, new values having that of the cache of values.
    ``tokens_k``, ``tokens_q``: new keys, and queries that rotate, of the longest sequence. ``num_heads``: heads of
    these queries. ``page_size`` None: contiguous sequences. ``packed_*``: with cu_seqlens; ``used_*``: with seqused.
    ``rotary_dim``: how many of a head's first elements rotate, 0 for none; ``rotary_dtype``: fp16, bf16 or fp32, of
    cosine and sine, fp32 by default and None where nothing rotates; ``rotary_seqlens``: rotations start elsewhere than
    the new rows. ``*_page_descale``: rows are divided by one for each page, or sequence of the cache, and head;
    ``*_row_descale``: by one of their own, which takes their largest element to the largest code and is written.

    Features are declared here, each in its field's metadata (``cute_fa.semantics.options``). Raises ShapeError,
    EmptyBatchError, LengthError, PageSizeError, Fp8Error or ArgumentError.
    """

    arch: SmArch
    dtype: DType = field(metadata=declares(rows=DTYPE_ROWS))
    batch: int
    tokens_k: int
    num_heads_kv: int
    head_dim: int = field(metadata=declares(rows=HEAD_DIM_ROWS))
    head_dim_v: int = field(metadata=declares(rows=HEAD_DIM_V_ROWS))
    tokens_q: int = 0
    num_heads: int = 0
    page_size: int | None = option(
        None,
        flag="page_size",
        flag_value=True,
        flag_token="page",
        token="page",
        rows={"paged KV": {"page_size": 64}, "paged KV, a page a token": {"page_size": 1}},
    )
    cache_batch_idx: bool = option(
        False,
        flag="cache_batch_idx",
        flag_token="index",
        token="index",
        rows={
            "KV cache by index": {"cache_batch_idx": True},
            "paged KV by index": {"page_size": 64, "cache_batch_idx": True},
        },
    )
    query: bool = option(False, flag="query", flag_token="query", token="query", help="Queries rotate, too.")
    packed_q: bool = option(False, flag="packed_q", flag_token="cuq", token="cuq")
    packed_k: bool = option(False, flag="packed_k", flag_token="cuk", token="cuk", rows={"varlen": {"packed_k": True}})
    used_q: bool = option(False, flag="used_q", flag_token="usedq", token="usedq")
    used_k: bool = option(False, flag="used_k", flag_token="usedk", token="usedk", rows={"seqused": {"used_k": True}})
    rotary_dim: int = option(
        0,
        flag="rotary_dim",
        flag_value=True,
        flag_token="rotary",
        token="rotary",
        help="First elements of each head that rotate.",
        rows={"RoPE": {"rotary_dim": 64, "query": True, "tokens_q": 1, "num_heads": 1}},
    )
    rotary_dtype: str | None = option(
        None, flag="rotary_dtype", flag_value=True, help="Of cosine and sine: fp16, bf16 or fp32. [default: fp32]"
    )
    rotary_interleaved: bool = option(
        False,
        flag="rotary_interleaved",
        flag_token="interleaved",
        token="interleaved",
        help="Neighbours are pairs, else element i and i + rotary_dim / 2.",
    )
    rotary_seqlens: bool = option(
        False,
        flag="rotary_seqlens",
        flag_token="shifted",
        token="shifted",
        help="Rotations start elsewhere than the new rows.",
    )

    k_page_descale: bool = option(False, flag="k_page_descale", flag_token="kpages")
    v_page_descale: bool = option(False, flag="v_page_descale", flag_token="vpages")
    k_row_descale: bool = option(False, flag="k_row_descale", flag_token="krows", rows=_ROW_DESCALE_ROWS)
    v_row_descale: bool = option(False, flag="v_row_descale", flag_token="vrows")
    dtype_k: DType | None = option(None, rows=_CACHE_ROWS)
    dtype_v: DType | None = None

    direction: ClassVar[Direction] = Direction.APPEND

    def __post_init__(self) -> None:
        self._check_dtypes()
        check_sizes(self, ("num_heads_kv", "head_dim", "head_dim_v"), lengths=("tokens_k", "tokens_q"))
        if self.num_heads < 0:
            raise ShapeError(f"num_heads={self.num_heads}: at least 0 is needed")
        if self.rotary_dim < 0:
            raise ArgumentError(f"rotary_dim={self.rotary_dim}: at least 0 is needed")
        if self.rotary_dtype not in (None, *ROTARY_DTYPES):
            raise ArgumentError(f"rotary_dtype={self.rotary_dtype!r}: one of {', '.join(ROTARY_DTYPES)}")
        for name in ("rotary_dtype", "rotary_interleaved", "rotary_seqlens"):
            if not self.rotary_dim and getattr(self, name) != self.__dataclass_fields__[name].default:
                raise ArgumentError(f"{name} without rotary_dim: nothing rotates")
        if self.rotary_dim and self.rotary_dtype is None:
            object.__setattr__(self, "rotary_dtype", "fp32")

    def _check_dtypes(self) -> None:
        """Set those that are left open, too."""
        for name in ("dtype_k", "dtype_v"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, self.dtype)
        rows, (k, v) = self.dtype, self.cache_dtypes
        if k is not rows and (rows.is_codes or not k.is_codes):
            rule = f"{rows.value}, or fp8 or int8 for 16 bits"
            raise Fp8Error(f"a cache of keys in {k.value} for rows in {rows.value}: {rule}")
        if k.is_codes != v.is_codes or not (v is rows or v.is_codes):
            raise Fp8Error(f"caches in {k.value} and {v.value}: both in fp8 or int8, or both in {rows.value}")
        for name in "kv":
            kinds = [kind for kind in ("page", "row") if getattr(self, f"{name}_{kind}_descale")]
            if kinds and not self.quantises:
                raise Fp8Error(f"{name}_{kinds[0]}_descale with rows in {rows.value} and {k.value}: nothing is divided")
            if len(kinds) > 1:
                raise ArgumentError(f"{name}_page_descale and {name}_row_descale: of pages or of rows, not both")
        if self.rotary_dim and rows.is_codes:
            raise Fp8Error(f"rotary_dim with rows in {rows.value}: rows in fp16 or bf16 rotate, codes do not")

    @property
    def cache_dtypes(self) -> tuple[DType, DType]:
        """Of keys and of values."""
        return cast("DType", self.dtype_k), cast("DType", self.dtype_v)

    @property
    def has_codes(self) -> bool:
        """Whether the caches are fp8 or int8."""
        return self.cache_dtypes[0].is_codes

    @property
    def quantises(self) -> bool:
        """Whether rows in fp16 or bf16 are rounded to codes."""
        return self.has_codes and not self.dtype.is_codes
