"""From padded batches to packed sequences and back: the helpers of ``flash_attn.bert_padding``, in plain torch.

``unpad_input`` reads the longest length and how many tokens there are on the host, as it does there. All of them are
differentiable.
"""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from cute_fa.semantics.errors import ShapeError
from cute_fa.semantics.tensors import check_dims


def index_first_axis(input: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """(n, …): rows ``indices`` (n) of ``input`` (rows, …)."""
    return input.index_select(0, indices)


def unpad_input(
    hidden_states: torch.Tensor, attention_mask: torch.Tensor, unused_mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int, torch.Tensor]:
    """The tokens of a padded batch, one sequence behind the other.

    hidden_states: (batch, seqlen, …); attention_mask: (batch, seqlen), bool or integers, 1 for a token that counts;
    unused_mask: likewise, 1 for one that has a place among the packed ones and does not count.

    Returns (tokens (total, …), their indices in the flattened batch (total), cu_seqlens int32 (batch + 1), the longest
    length with unused tokens, int32 (batch) lengths without them). Raises ShapeError.
    """
    shape = tuple(hidden_states.shape[:2])
    for name, mask in (("attention_mask", attention_mask), ("unused_mask", unused_mask)):
        if mask is not None and tuple(mask.shape) != shape:
            raise ShapeError(f"{name} {tuple(mask.shape)}: {shape} is needed, as hidden_states has")
    present = attention_mask if unused_mask is None else attention_mask + unused_mask
    lengths = present.sum(-1, dtype=torch.int32)
    used = attention_mask.sum(-1, dtype=torch.int32)
    indices = present.flatten().nonzero().flatten()
    cu_seqlens = pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    longest = int(lengths.max()) if lengths.numel() else 0
    return index_first_axis(hidden_states.flatten(0, 1), indices), indices, cu_seqlens, longest, used


def pad_input(hidden_states: torch.Tensor, indices: torch.Tensor, batch: int, seqlen: int) -> torch.Tensor:
    """(batch, seqlen, …) with ``hidden_states`` (total, …) at ``indices`` (total) of the flattened batch, 0 elsewhere.

    Raises ShapeError."""
    check_dims("indices", indices, 1, "(total)")
    rows = hidden_states.shape[0]
    if indices.shape[0] != rows:
        raise ShapeError(f"indices {tuple(indices.shape)}: one for each of the {rows} rows of hidden_states is needed")
    padded = hidden_states.new_zeros(batch * seqlen, *hidden_states.shape[1:])
    return padded.index_copy(0, indices, hidden_states).unflatten(0, (batch, seqlen))
