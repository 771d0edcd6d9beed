"""Arguments of the peers' functions that these functions do not have."""

from __future__ import annotations

from typing import Annotated, Any, TypedDict, get_args, get_type_hints

import torch

from cute_fa.api.values import is_number
from cute_fa.semantics.errors import ArgumentError, UnsupportedArgumentError


class PeerArguments(TypedDict, total=False):
    """Arguments of FlashAttention 2, 3 and 4 that are not implemented, each with the values that ask for nothing."""

    dropout_p: Annotated[float | None, 0.0, None]
    qv: Annotated[None, None]
    attention_chunk: Annotated[int | None, 0, None]
    sm_margin: Annotated[int, 0]
    score_mod: Annotated[None, None]
    score_mod_bwd: Annotated[None, None]
    mask_mod: Annotated[None, None]
    aux_tensors: Annotated[None, None]
    aux_scalars: Annotated[None, None]
    block_sparse_tensors: Annotated[None, None]
    block_sparse_tensors_bwd: Annotated[None, None]
    gather_kv_indices: Annotated[None, None]
    gather_bwd_recompute_p: Annotated[bool, False]
    gather_bwd_token_chunk: Annotated[None, None]
    min_seqlen_k: Annotated[None, None]
    leftpad_k: Annotated[None, None]
    disable_scheduler_metadata: Annotated[bool, False]
    m_block_size: Annotated[None, None]
    n_block_size: Annotated[None, None]
    num_threads: Annotated[None, None]


# Where scheduler_metadata is no argument of the function itself.
_HARMLESS: dict[str, tuple] = {"scheduler_metadata": (None,)}
_HARMLESS |= {name: get_args(hint)[1:] for name, hint in get_type_hints(PeerArguments, include_extras=True).items()}


def too_many(function: str, first: str, by_position: tuple) -> ArgumentError:
    """For an argument that peers have in different places: FlashAttention 2's fourth is dropout_p, FlashAttention 3's
    softmax_scale, FlashAttention 4's qv."""
    shown = type(by_position[0]).__name__ if isinstance(by_position[0], torch.Tensor) else repr(by_position[0])
    return ArgumentError(
        f"{function}: {shown} by position: only {first} are taken so, name the others; "
        "cute_fa.compat.fa2, fa3 and fa4 have each peer's order"
    )


def check_peers(peers: Any) -> None:
    """Raise UnsupportedArgumentError for a peer's argument that asks for something, ArgumentError for nobody's."""
    for name, value in peers.items():
        if name not in _HARMLESS:
            raise ArgumentError(f"{name}: no such argument")
        if not any(value is default or (is_number(value) and value == default) for default in _HARMLESS[name]):
            raise UnsupportedArgumentError(name, value)
