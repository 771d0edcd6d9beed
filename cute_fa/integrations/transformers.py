"""Attention and a paged KV cache for models of Hugging Face Transformers (5.x).

After ``register()``, ``AutoModelForCausalLM.from_pretrained(…, attn_implementation="cute_fa")`` runs and trains on
these kernels, and ``model.generate(…, past_key_values=PagedCache(…))`` appends to pages and reads them in place.

Causal and bidirectional masks, sliding windows, softcap and sinks (``s_aux``) are the kernels' own: no 4-D mask is
made, and one that is given raises. A 2-D ``attention_mask`` becomes lengths on the device: the tokens that count are
one block of each row (checked with ``CUTE_FA_CHECK=1`` and when simulating), so that left- and right-padded batches are
both right, in training and with a ``PagedCache``.
What raises: padding with another cache, rows of several sequences without ``cu_seq_lens_q``, ``StaticCache``, chunked
attention beyond one chunk, mask patterns of a model's own, dropout, beams. What only values can tell of these raises
ArgumentError, but RuntimeError out of a compiled model (``torch._assert_async``): tracing looks at no values.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.compiler import is_dynamo_compiling
from torch.nn.functional import pad
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, CacheLayerMixin, get_layer_types_and_kwargs
from transformers.masking_utils import causal_mask_function
from transformers.utils import is_tracing

from cute_fa.api.append import append_kv
from cute_fa.api.attention import flash_attn_func, flash_attn_varlen_func
from cute_fa.api.cache_requests import PagedKvCache
from cute_fa.engine import worlds
from cute_fa.engine.torch_internals import assert_on_device
from cute_fa.semantics.errors import ArgumentError, LengthError, NoBackwardError, ShapeError, UnsupportedArgumentError

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedConfig

NAME = "cute_fa"
# What only other attention functions understand: a bias of scores, and the cache of continuous batching.
_NOT_IMPLEMENTED = ("position_bias", "cache", "output_attentions")
_LAYER_TYPES = ("full_attention", "sliding_attention")
_OWN_PATTERN = "a model's own mask pattern: only causal, windowed and bidirectional ones are implemented"
_PACKED = "position_ids that start again within a row: give cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k"


def register() -> None:
    """Make ``attn_implementation="cute_fa"`` known to Transformers. Calling it again changes nothing."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, padding_mask)


class Rows(NamedTuple):
    """Where the tokens that count lie in (batch, length) rows seen as one packed tensor: sequence b + 1 uses the first
    ``seqused[b + 1]`` rows from ``cu_seqlens[b + 1]`` on. Sequence 0 is empty: it owns the padding before the first."""

    cu_seqlens: torch.Tensor
    seqused: torch.Tensor
    longest: int

    @classmethod
    def block(cls, first: torch.Tensor, used: torch.Tensor, length: int) -> Rows:
        """Rows first[b] up to first[b] + used[b] of each sequence."""
        batch = len(first)
        starts = first + length * torch.arange(batch, device=first.device)
        # the padding behind one sequence and that before the next belong to the first of them
        cu_seqlens = pad(pad(starts, (1, 0)), (0, 1), value=batch * length).int()
        return cls(cu_seqlens, pad(used, (1, 0)).int(), min(2, batch) * length)

    @classmethod
    def all(cls, batch: int, length: int, device: torch.device) -> Rows:
        """Every row."""
        zeros = torch.zeros(batch, dtype=torch.int64, device=device)
        return cls.block(zeros, zeros + length, length)


def look(condition: torch.Tensor) -> bool | torch.Tensor:
    """The value of a condition of one element, a host synchronisation; the tensor itself where values cannot be looked
    at, as while torch.compile traces."""
    return condition if is_tracing(condition) else bool(condition)


def require(condition: bool | torch.Tensor, message: str) -> None:
    """Raise ArgumentError unless the condition holds. A tensor is asked on the device, whenever this runs."""
    if isinstance(condition, torch.Tensor):
        assert_on_device(condition, message)
    elif not condition:
        raise ArgumentError(message)


class Padding:
    """A mask of keys, (batch, seqlen_k) bool, in whose rows the tokens that count are one block. One object serves all
    layers of a forward, so that what is computed from the mask is computed once."""

    def __init__(self, mask: torch.Tensor):
        self.mask = mask
        self._found: dict[str | int, Any] = {}

    def require_none(self) -> None:
        """Every token has to count, see :func:`require`."""
        is_none = self._once("is_none", lambda: look(self.mask.all()))
        require(is_none, "padding with a cache other than cute_fa.integrations.transformers.PagedCache")

    def rows(self, length: int) -> Rows:
        """Of the last ``length`` tokens. Raises ArgumentError for holes, where values are checked."""
        return self._once(length, lambda: self._find_rows(length))

    def _once(self, name: str | int, find: Callable[[], Any]) -> Any:
        """What ``find`` gives, remembered but for traced code: in that a checkpointed layer cannot write to an object
        of the model's, and the compiler finds what is computed twice."""
        if is_dynamo_compiling():
            return find()
        if name not in self._found:
            self._found[name] = find()
        return self._found[name]

    def _find_rows(self, length: int) -> Rows:
        counts = self.mask[:, -length:]
        used, first = counts.sum(-1), counts.int().argmax(-1)
        if worlds.checks_values():
            place = torch.arange(length, device=counts.device) - first[:, None]
            one_block = (counts == ((place >= 0) & (place < used[:, None]))).all()
            require(look(one_block), "attention_mask with holes: the tokens that count must be one block of each row")
        return Rows.block(first, used, length)


class Pattern:
    """A causal mask that Transformers has a function for: ``sees(row, head, query, key)`` of index tensors. Either
    position_ids start again within a row, which packs several sequences, or tokens of a block see each other, or values
    cannot be looked at: then every causal mask without padding and cache is one.

    ``length`` tokens from ``first`` on are asked about their neighbours, which is enough: sequences and blocks are
    runs of tokens. Blocks raise, see :func:`require`.
    """

    def __init__(self, sees: Callable[..., Any], batch: int, first: int, length: int, device: torch.device | str):
        row, head = (torch.arange(size, device=device)[:, None] for size in (batch, 1))
        token = torch.arange(first, first + length - 1, device=device)
        require(look(~sees(row, head, token, token + 1).any()), _OWN_PATTERN)
        self._is_causal = look(sees(row, head, token + 1, token).all())

    def require_causal(self) -> None:
        """Each row has to be one sequence, see :func:`require`."""
        require(self._is_causal, _PACKED)


def padding_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool | None = None,
    local_size: int | None = None,
    use_vmap: bool = False,
    config: PreTrainedConfig | None = None,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Padding | Pattern | None:
    """The mask function of Transformers' ``AttentionMaskInterface``: a ``Padding`` where there is a 2-D mask, a
    ``Pattern`` where ``mask_function`` may be more than causal, else None. Raises ArgumentError for what the attention
    function cannot do."""
    causal = allow_is_bidirectional_skip is None
    if causal and (isinstance(q_offset, torch.Tensor) or q_offset + q_length != kv_offset + kv_length):
        raise ArgumentError(
            "a cache whose keys end behind the last query (StaticCache): use PagedCache or DynamicCache"
        )
    chunk = getattr(config, "attention_chunk_size", None)
    if chunk is not None and local_size == chunk and kv_offset + kv_length > chunk:
        raise ArgumentError(
            f"attention_chunk_size={chunk} and {kv_offset + kv_length} keys: chunks are not implemented"
        )
    if not (allow_is_causal_skip if causal else allow_is_bidirectional_skip):
        if not causal or use_vmap or attention_mask is not None or isinstance(q_offset, torch.Tensor):
            raise ArgumentError(_OWN_PATTERN)
        return Pattern(mask_function, batch_size, q_offset, q_length, device)
    if attention_mask is None:
        return None
    mask = attention_mask[:, kv_offset : kv_offset + kv_length]
    if mask.shape != (batch_size, kv_length):
        raise ShapeError(f"attention_mask {tuple(attention_mask.shape)}: keys {kv_offset} to {kv_offset + kv_length}")
    return Padding(mask)


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor | NewTokens,
    value: torch.Tensor | NewTokens,
    attention_mask: Padding | Pattern | None = None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    s_aux: torch.Tensor | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    cu_seq_lens_k: torch.Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function of Transformers' ``AttentionInterface``.

    query: (batch, heads, seqlen_q, head_dim); key: (batch, heads_kv, seqlen_k, head_dim); value likewise; fp16 or bf16.
    Or key and value are what ``PagedCache.update`` returned, and are first appended to its pages. ``cu_seq_lens_q`` and
    its companions: lengths of the sequences that one row (batch 1) packs.

    Returns (out (batch, seqlen_q, heads, head_dim_v), None). Raises a subclass of ``cute_fa.errors.CuteFaError``.
    """
    for name in _NOT_IMPLEMENTED:
        if kwargs.get(name) is not None and kwargs[name] is not False:
            raise UnsupportedArgumentError(name, kwargs[name])
    if dropout:
        raise UnsupportedArgumentError("dropout", dropout)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    window = (None, None) if sliding_window is None else (sliding_window - 1, 0 if causal else sliding_window - 1)
    options: dict[str, Any] = {"softmax_scale": scaling, "causal": causal, "window_size": window}
    options |= {"softcap": softcap or 0.0, "learnable_sink": s_aux}
    q = query.transpose(1, 2)
    if isinstance(attention_mask, torch.Tensor):
        raise ArgumentError(f"attention_mask {tuple(attention_mask.shape)} for each query: give one (batch, seqlen_k)")
    if isinstance(attention_mask, Pattern):
        if cu_seq_lens_q is None:
            attention_mask.require_causal()
        attention_mask = None
    if isinstance(key, NewTokens):
        if cu_seq_lens_q is not None:
            raise ArgumentError("cu_seq_lens_q with a PagedCache: it has one sequence a row")
        return key.append_and_attend(q, attention_mask, options), None
    k, v = key.transpose(1, 2), value.transpose(1, 2)
    if cu_seq_lens_q is not None:
        if attention_mask is not None or len(q) != 1:
            raise ArgumentError(f"cu_seq_lens_q, batch {len(q)}: needs one row, and no attention_mask")
        lengths = cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k
        return flash_attn_varlen_func(q[0], k[0], v[0], *lengths, **options)[None], None
    # those of a causal mask or a window are the last of the keys
    aligned = causal or sliding_window is not None
    if attention_mask is not None and aligned and q.shape[1] != k.shape[1]:
        attention_mask.require_none()
        attention_mask = None
    if attention_mask is None:
        return flash_attn_func(q, k, v, **options), None
    rows_k = attention_mask.rows(k.shape[1])
    rows_q = rows_k if aligned else Rows.all(q.shape[0], q.shape[1], q.device)
    return _packed(q, k, v, rows_q, rows_k, options), None


def _packed(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows_q: Rows, rows_k: Rows, options: dict[str, Any]
) -> torch.Tensor:
    """Attention between the rows that count; others of the result are 0."""
    out = flash_attn_varlen_func(
        q.flatten(0, 1),
        k.flatten(0, 1),
        v.flatten(0, 1),
        rows_q.cu_seqlens,
        rows_k.cu_seqlens,
        rows_q.longest,
        rows_k.longest,
        seqused_q=rows_q.seqused,
        seqused_k=rows_k.seqused,
        **options,
    )
    return out.unflatten(0, q.shape[:2])


class NewTokens:
    """What ``PagedCache.update`` returns in the place of keys and values: they are in pages, of which only the
    attention function ``cute_fa`` knows. Whatever else looks at them gets an ArgumentError."""

    def __init__(self, layer: PagedLayer, keys: torch.Tensor, values: torch.Tensor):
        self._layer = layer
        self._new: tuple[torch.Tensor, torch.Tensor] | None = (keys, values)

    def __getattr__(self, name: str) -> Any:
        raise ArgumentError(f'{name} of keys in a PagedCache: the model needs attn_implementation="{NAME}"')

    def append_and_attend(self, q: torch.Tensor, padding: Padding | None, options: dict[str, Any]) -> torch.Tensor:
        """Append the new tokens that count and attend to all there are; q: (batch, seqlen_q, heads, head_dim)."""
        if self._new is None:
            raise ArgumentError("keys of one layer used by another: a PagedCache does not share them")
        (k, v), self._new = (t.transpose(1, 2) for t in self._new), None
        if torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v)):
            raise NoBackwardError("a PagedCache has no gradient: call the model under torch.no_grad()")
        pages, seqlens, page_table = self._layer.pages, self._layer.seqlens, self._layer.page_table
        batch, seqlen_q = q.shape[:2]
        rows = padding.rows(seqlen_q) if padding is not None and seqlen_q > 1 else None
        new: dict[str, Any] = {}
        queries: dict[str, Any] = {"cu_seqlens_q": None, "max_seqlen_q": None}
        if rows is not None:
            q, k, v = (t.flatten(0, 1) for t in (q, k, v))
            new = {"cu_seqlens_k_new": rows.cu_seqlens, "max_seqlen_k_new": rows.longest, "seqused_k_new": rows.seqused}
            queries = {"cu_seqlens_q": rows.cu_seqlens, "max_seqlen_q": rows.longest, "seqused_q": rows.seqused}
        else:
            seqlens, page_table = seqlens[1:], page_table[1:]
            if padding is not None:  # one token each, which counts or does not
                new = {"seqused_k_new": padding.rows(1).seqused[1:]}
        _, seqused_k = append_kv(k, v, pages.k, pages.v, seqlens, page_table=page_table, **new)
        seqlens.copy_(seqused_k)  # in place: a captured step moves on when it is replayed
        out = flash_attn_varlen_func(
            q,
            pages.k,
            pages.v,
            **queries,
            cu_seqlens_k=None,
            max_seqlen_k=None,
            seqused_k=seqused_k,
            page_table=page_table,
            num_splits=0,
            **options,
        )
        return out if rows is None else out.unflatten(0, (batch, seqlen_q))


class PagedLayer(CacheLayerMixin):
    """One layer of a ``PagedCache``. ``seqlens`` int32 (batch + 1): tokens of each sequence in the pages, padding left
    out; like ``page_table`` with a first row for the sequence 0 of ``Rows``. The pages are made by the first update."""

    is_croppable = True

    def __init__(self, page_table: torch.Tensor, page_size: int):
        super().__init__()
        self.page_table, self.page_size = page_table, page_size
        self.batch_size = page_table.shape[0] - 1
        self.seqlens = torch.zeros(page_table.shape[0], dtype=torch.int32, device=page_table.device)
        self.length = 0  # as the model counts: with padding

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.pages = PagedKvCache.empty(
            self.batch_size * self.page_table.shape[1],
            self.page_size,
            key_states.shape[1],
            key_states.shape[3],
            head_dim_v=value_states.shape[3],
            dtype=key_states.dtype,
            device=key_states.device,
        )
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any) -> Any:
        batch, new = key_states.shape[0], key_states.shape[2]
        if batch != self.batch_size:
            raise ShapeError(f"{batch} sequences: the PagedCache has {self.batch_size}")
        if self.length + new > self.get_max_length():
            raise LengthError(f"{self.length} tokens and {new} more: the PagedCache holds {self.get_max_length()}")
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.length += new
        tokens = NewTokens(self, key_states, value_states)
        return tokens, tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return self.page_table.shape[1] * self.page_size

    def reset(self) -> None:
        self.seqlens.zero_()
        self.length = 0

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last −``tokens_to_remove`` tokens of each sequence, none of which may be padding."""
        if tokens_to_remove > 0:
            raise ArgumentError(f"crop({tokens_to_remove}): minus the number of tokens to remove")
        self.seqlens.add_(tokens_to_remove).clamp_(min=0)
        self.length += tokens_to_remove

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        raise UnsupportedArgumentError("num_beams", len(beam_idx))


class PagedCache(Cache):
    """A KV cache in pages for ``model.generate(…, past_key_values=…)`` and for ``model(…)``, prefill in chunks
    (``prefill_chunk_size``) and decoding alike. The model needs ``attn_implementation="cute_fa"``.

    config: the model's; layers with full or sliding-window attention (all of whose tokens are kept).
    batch: sequences, exactly. max_length: tokens each can hold, rounded up to pages. page_size: tokens of a page, a
    power of two from 1 to 1024.
    ``page_table``: int32 (batch, max_pages), of the batch · max_pages pages that each layer has; in order at first, and
    free to be written in place for pages that hold nothing yet.

    Nothing here reads the device: a forward of one token each, with ``position_ids`` of its own, can be captured in a
    CUDA graph, and moves on by one token with each replay. ``get_seq_length()`` counts forwards, not replays.

    Raises ArgumentError or UnsupportedArgumentError for other models, PageSizeError with the first token.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        batch: int,
        max_length: int,
        *,
        page_size: int = 64,
        device: torch.device | str = "cuda",
    ):
        types, _ = get_layer_types_and_kwargs(config.get_text_config(decoder=True))
        for kind in types:
            if kind not in _LAYER_TYPES:
                raise UnsupportedArgumentError("layer_types", kind)
        max_pages = -(-max_length // page_size)
        table = torch.arange(-max_pages, batch * max_pages, dtype=torch.int32, device=device).view(-1, max_pages)
        self.page_table = table[1:]
        super().__init__(layers=[PagedLayer(table, page_size) for _ in types])
