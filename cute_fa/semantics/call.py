"""The arguments of attention as they travel from the public functions to a launch: declared here, once.

The torch operators take them flat, in this order: q, k, v, :class:`Extras`, :class:`Options`
(:meth:`Call.of`, :meth:`Call.flat`), and their schema follows from the types here (``cute_fa.engine.operators``).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch


class Extras(NamedTuple):
    """The tensors beside q, k and v; None where absent.

    ``cu_seqlens_*`` int32 (batch + 1): q and out, or k and v, are packed; ``seqused_*`` int32 (batch): rows that count;
    ``page_table`` int32 (batch, max_pages): k and v are pages; ``cache_batch_idx`` int32 (batch): which sequence of k
    and v, or row of page_table, each one of the batch reads; ``cache_leftpad`` int32 (batch): rows of k and v before
    its first key; ``alibi_slopes`` fp32 (heads) or (batch, heads); ``learnable_sink`` fp32 (heads); ``*_descale`` fp32
    (batch, heads_kv) or one number: what codes of fp8 q, k, v are multiplied by; those of k and v also (batch,
    heads_kv, blocks), one for each ``DESCALE_BLOCK`` keys of a sequence, or of four dimensions that broadcast against
    k or v, a cache: one for each row and head, (…, rows, heads_kv, 1), or for each page, (num_pages, 1, heads_kv, 1).

    ``query_walk``, ``key_walk``, ``dq_walk``: what a range plan shows, as lists of blocks for the forward's tiles of
    queries, the backward's of keys, and those of its kernel for dQ alone: int32, see ``cute_fa.device.range_walk``.
    ``q_positions`` int32 (total_q), ``k_positions`` int32 (total_k): between which ALiBi's distances are.

    ``tree_mask`` int32 (batch, seqlen_q, words), packed (total_q, words): bit j of word w is set where the query sees
    draft token 32 · w + j of its sequence; the drafts are its queries, the last keys.
    """

    cu_seqlens_q: torch.Tensor | None = None
    cu_seqlens_k: torch.Tensor | None = None
    seqused_q: torch.Tensor | None = None
    seqused_k: torch.Tensor | None = None
    page_table: torch.Tensor | None = None
    cache_batch_idx: torch.Tensor | None = None
    cache_leftpad: torch.Tensor | None = None
    alibi_slopes: torch.Tensor | None = None
    learnable_sink: torch.Tensor | None = None
    q_descale: torch.Tensor | None = None
    k_descale: torch.Tensor | None = None
    v_descale: torch.Tensor | None = None
    query_walk: torch.Tensor | None = None
    key_walk: torch.Tensor | None = None
    dq_walk: torch.Tensor | None = None
    q_positions: torch.Tensor | None = None
    k_positions: torch.Tensor | None = None
    tree_mask: torch.Tensor | None = None


class Options(NamedTuple):
    """The choices of a call; meanings as in ``cute_fa.api.attention``, the window normalised: bounds are literal, None
    alone is infinite. ``num_splits`` 0: the table chooses. ``out_dtype``: the value of a
    :class:`~cute_fa.semantics.types.DType`, None for the usual one. ``names``: what the caller calls the arguments
    (``cute_fa.semantics.argument_names``)."""

    max_seqlen_q: int | None = None
    max_seqlen_k: int | None = None
    softmax_scale: float | None = None
    window_left: int | None = None
    window_right: int | None = None
    sink_tokens: int = 0
    softcap: float = 0.0
    num_splits: int = 1
    family: str | None = None
    pack_gqa: bool | None = None
    persistent: str = "auto"
    deterministic: bool = False
    out_dtype: str | None = None
    promote_every: int | None = None
    v_layout: str = "head_dim"
    seqlen_k_per_split: int = 0
    names: str = ""


NO_EXTRAS = Extras()
_ABSENT = frozenset((type(None),))
TENSORS = ("q", "k", "v", *Extras._fields)
FIELDS = (*TENSORS, *Options._fields)


class Call(NamedTuple):
    """One call of attention."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    extras: Extras = NO_EXTRAS
    options: Options = Options()

    @classmethod
    def of(cls, arguments: tuple) -> Call:
        """The call of an operator's flat arguments."""
        count = len(TENSORS)
        tensors = arguments[3:count]
        extras = NO_EXTRAS if _ABSENT.issuperset(map(type, tensors)) else Extras._make(tensors)
        return cls._make((*arguments[:3], extras, Options._make(arguments[count:])))

    @classmethod
    def made(cls, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **fields: Any) -> Call:
        """The call of these fields of Extras and Options; the others have their defaults."""
        return cls(q, k, v).changed(**fields)

    def changed(self, **fields: Any) -> Call:
        """The call with other values for fields of Extras and Options, or for q, k and v."""
        extras = {name: fields.pop(name) for name in Extras._fields if name in fields}
        options = {name: fields.pop(name) for name in Options._fields if name in fields}
        if extras:
            fields["extras"] = self.extras._replace(**extras)
        return self._replace(options=self.options._replace(**options), **fields)

    def flat(self) -> tuple:
        """The operator's arguments."""
        return (self.q, self.k, self.v, *self.extras, *self.options)

    # No property, which torch.compile before 2.11 cannot trace of a NamedTuple.
    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        return (self.q, self.k, self.v, *self.extras)

    def named_tensors(self) -> dict[str, torch.Tensor | None]:
        """The tensors by name, None for what is absent."""
        return dict(zip(TENSORS, self.tensors(), strict=True))

    @property
    def lse_shape(self) -> tuple[int, ...]:
        """(heads, total_q) if packed, else (batch, heads, seqlen_q)."""
        if self.extras.cu_seqlens_q is not None:
            return self.q.shape[1], self.q.shape[0]
        return self.q.shape[0], self.q.shape[2], self.q.shape[1]

    @property
    def has_work(self) -> bool:
        """Whether there is any sequence, any query and any key."""
        offsets = self.extras.cu_seqlens_q
        return (offsets is None or offsets.shape[0] > 1) and self.q.numel() > 0 and self.k.numel() > 0


class AppendCall(NamedTuple):
    """One append: the operator's arguments in their order; meanings as for ``cute_fa.append_kv``. ``*_row_descale``: a
    ``*_descale`` that is written, which has one for each row and head of the cache. ``names``: what the
    caller calls them (``cute_fa.semantics.argument_names``)."""

    k_cache: torch.Tensor
    v_cache: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    cache_seqlens: torch.Tensor
    q: torch.Tensor | None = None
    page_table: torch.Tensor | None = None
    cache_batch_idx: torch.Tensor | None = None
    cu_seqlens_q: torch.Tensor | None = None
    cu_seqlens_k_new: torch.Tensor | None = None
    seqused_q: torch.Tensor | None = None
    seqused_k_new: torch.Tensor | None = None
    rotary_cos: torch.Tensor | None = None
    rotary_sin: torch.Tensor | None = None
    rotary_seqlens: torch.Tensor | None = None
    k_descale: torch.Tensor | None = None
    v_descale: torch.Tensor | None = None
    k_row_descale: torch.Tensor | None = None
    v_row_descale: torch.Tensor | None = None
    max_seqlen_q: int | None = None
    max_seqlen_k_new: int | None = None
    rotary_interleaved: bool = False
    rotate_each: bool = True
    names: str = ""

    def tensors(self) -> dict[str, torch.Tensor | None]:
        """The tensors by name, None for what is absent."""
        tensors: Any = self[:APPEND_TENSORS]
        return dict(zip(self._fields, tensors, strict=False))


APPEND_TENSORS = AppendCall._fields.index("max_seqlen_q")  # how many come first
