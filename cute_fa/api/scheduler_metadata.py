"""``scheduler_metadata`` of FlashAttention 3 and 4: what a server computes once a step and hands to every layer.

They keep there how many splits each sequence gets, and a counter for their dynamic scheduler. Kernels here
need neither: lengths that the host knows choose the grid, and each CTA finds its share of all keys from the lengths on
the device. So the tensor says "no plan", as zeros, and results do not depend on it: callers that compute
one, keep it in a buffer for CUDA graphs and pass it on work as they are. A tensor of another form is refused.
"""

from __future__ import annotations

from typing import Any

import torch

from cute_fa.semantics.errors import ArgumentError, DeviceError, EmptyBatchError
from cute_fa.semantics.tensors import check_vector


def scheduler_metadata_of(batch_size: Any, name: str, lengths: Any) -> torch.Tensor:
    """int32 (batch_size + 1) zeros beside ``lengths`` int32 (batch_size), which the caller calls ``name``."""
    if isinstance(batch_size, bool) or not isinstance(batch_size, (int, torch.SymInt)):
        raise ArgumentError(f"batch_size={batch_size!r}: an int is needed")
    if batch_size < 1:
        raise EmptyBatchError(f"batch_size={batch_size}: at least one sequence is needed")
    if not isinstance(lengths, torch.Tensor):
        raise ArgumentError(f"{name} is {type(lengths).__name__}: a torch.Tensor is needed")
    check_vector(name, lengths, torch.int32, (batch_size,))
    return lengths.new_zeros(batch_size + 1)


def check_scheduler_metadata(metadata: Any, q: torch.Tensor, cu_seqlens_q: torch.Tensor | None) -> None:
    """Raise unless it is what ``scheduler_metadata_of`` gives for the batch of q."""
    if not isinstance(metadata, torch.Tensor):
        raise ArgumentError(f"scheduler_metadata is {type(metadata).__name__}: a torch.Tensor is needed")
    batch = q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
    check_vector("scheduler_metadata", metadata, torch.int32, (batch + 1,))
    if metadata.device != q.device:
        raise DeviceError(f"scheduler_metadata is on {metadata.device} and q on {q.device}: one device is needed")
