"""``SequenceInfo``: how the sequences of a batch lie in the input tokens and in the cache."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.export import Dim

from cute_fa.semantics.errors import (
    ArgumentError,
    DTypeError,
    EmptyBatchError,
    EmptyCacheError,
    LengthError,
    PageTableError,
    ShapeError,
    ZeroLengthError,
)

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True)
class CacheConfig:
    """``dtype``: element type of a KV cache, the model's by default."""

    dtype: torch.dtype | None = None


class SequenceInfo:
    """The sequences of one step of a server, as TensorRT-LLM's auto_deploy describes them: int32 tensors on one device.

    max_seq_len: the most tokens of a sequence, in the cache and new together.
    max_batch_size: the most sequences of a step.
    page_size: tokens of a page; 0, or ``max_seq_len`` and more, for a cache that is not paged: a page is then the
        place of a whole sequence.
    max_num_tokens: the most new tokens of a step; 0 for ``max_batch_size · max_seq_len``.

    input_ids: new tokens, (sequences, 1) if each sequence has one (generate-only), else one flattened row (1, tokens).
    seq_len (max_batch_size): new tokens of each sequence, 0 behind the last one.
    input_pos (max_batch_size): tokens that each sequence has in the cache already.
    cache_loc (num_pages): pages of the first sequence in order, then those of the second one …
    pages_per_seq (max_batch_size): how many of them belong to each sequence, 0 behind the last one.

    Lengths and pages are also kept on the host, so that nothing here reads from the device (the original's
    ``page_assignments`` does), and tensors keep their addresses from step to step, as CUDA graphs need.
    """

    def __init__(self, max_seq_len: int = 1, max_batch_size: int = 1, page_size: int = 0, max_num_tokens: int = 0):
        if max_seq_len < 1:
            raise ZeroLengthError(f"max_seq_len={max_seq_len}: a sequence has at least 1 token")
        if max_batch_size < 1:
            raise EmptyBatchError(f"max_batch_size={max_batch_size}: at least one sequence is needed")
        self.max_seq_len = max_seq_len
        self.max_batch_size = max_batch_size
        self.page_size = page_size if page_size > 0 else max_seq_len
        self.max_num_tokens = max_num_tokens if max_num_tokens > 0 else max_batch_size * max_seq_len
        self._dynamic_shapes: tuple[dict[int, Dim], ...] | None = None
        self._ids = torch.zeros(self.max_num_tokens, dtype=torch.int32)
        self.seq_len = torch.zeros(max_batch_size, dtype=torch.int32)
        self.input_pos = torch.zeros_like(self.seq_len)
        self.pages_per_seq = torch.zeros_like(self.seq_len)
        self.cache_loc = torch.zeros(self._pages_for_all(), dtype=torch.int32)
        self.reset()

    def _pages_for_all(self) -> int:
        """Pages for the longest sequences that fit, one for each sequence at least. The original divides the sum of
        their tokens by the page size: too few pages where their lengths are no multiples of it."""
        if self.max_num_tokens >= self.max_batch_size * self.max_seq_len:
            return self.max_batch_size * -(-self.max_seq_len // self.page_size)
        return max(self.max_batch_size, -(-self.max_num_tokens // self.page_size))

    @property
    def device(self) -> torch.device:
        return self.input_pos.device

    @property
    def input_ids(self) -> torch.Tensor:
        """(sequences, 1) or (1, tokens)."""
        return self._ids[: sum(self.sequence_lengths)].view((-1, 1) if self.is_generate else (1, -1))

    @property
    def args(self) -> tuple[torch.Tensor, ...]:
        """What an operator that prepares metadata takes, without its constants."""
        return self.input_ids, self.seq_len, self.input_pos, self.cache_loc, self.pages_per_seq

    @property
    def num_sequences(self) -> int:
        return len(self.sequence_lengths)

    @property
    def is_generate(self) -> bool:
        """Whether each sequence has one new token."""
        return all(length == 1 for length in self.sequence_lengths)

    @property
    def is_paged(self) -> bool:
        return self.page_size < self.max_seq_len

    @property
    def num_pages(self) -> int:
        """Pages of the cache; set it to what fits into the memory, and assign pages again."""
        return self.cache_loc.shape[0]

    @num_pages.setter
    def num_pages(self, pages: int) -> None:
        if pages < 1:
            raise EmptyCacheError(f"num_pages={pages}: a cache has at least one page")
        self.cache_loc = self.cache_loc.new_zeros(pages)
        self.assign_cache_loc([])

    @property
    def page_assignments(self) -> list[list[int]]:
        """The pages of each sequence."""
        return [list(pages) for pages in self._assigned[: self.num_sequences]]

    @property
    def dynamic_shapes(self) -> tuple[dict[int, Dim], ...]:
        """Which sizes of ``args`` change from step to step, for torch.export: those of ``input_ids`` alone."""
        if self._dynamic_shapes is None:  # not in __init__: a Dim cannot be pickled
            most = {"batch_size": self.max_batch_size, "seq_len": self.max_num_tokens}
            of_ids = {axis: Dim(name, max=size) for axis, (name, size) in enumerate(most.items()) if size > 1}
            self._dynamic_shapes = (of_ids, {}, {}, {}, {})
        return self._dynamic_shapes

    def reset(self) -> None:
        """A generate-only batch of as many sequences as fit, with nothing in the cache, of which each has one page."""
        sequences = min(self.max_batch_size, self.max_num_tokens)
        self.nest_sequences([[0]] * sequences)
        self.update_pos(0, reset=True)
        self.assign_cache_loc([[page] for page in range(min(self.max_batch_size, self.num_pages))])

    def nest_sequences(self, input_ids: Sequence[Sequence[int]] | torch.Tensor) -> None:
        """New tokens of each sequence; 0 of them are fine. Raises EmptyBatchError, LengthError, DTypeError or
        ShapeError."""
        rows = [ids if isinstance(ids, torch.Tensor) else torch.tensor(ids, dtype=torch.int32) for ids in input_ids]
        if not rows:
            raise EmptyBatchError("input_ids of 0 sequences: at least one is needed")
        self._check_batch("input_ids", len(rows))
        for b, row in enumerate(rows):
            if row.dim() != 1:
                raise ShapeError(f"input_ids[{b}] {tuple(row.shape)}: (tokens) is needed")
            if row.is_floating_point():
                raise DTypeError(f"input_ids[{b}]", row.dtype, "token numbers are integers")
            if len(row) > self.max_seq_len:
                raise LengthError(f"input_ids[{b}] has {len(row)} tokens: at most max_seq_len={self.max_seq_len}")
        lengths = [len(row) for row in rows]
        if sum(lengths) > self.max_num_tokens:
            raise LengthError(f"input_ids have {sum(lengths)} tokens: at most max_num_tokens={self.max_num_tokens}")
        self.sequence_lengths = lengths
        self._write(self.seq_len, lengths)
        self._ids[: sum(lengths)].copy_(self._staged(torch.cat(rows)), non_blocking=True)

    def unnest_sequences(self, t_nested: torch.Tensor) -> list[torch.Tensor]:
        """What belongs to each sequence, (tokens, …), of a tensor laid out as ``input_ids`` are, (sequences, 1, …) or
        (1, tokens, …)."""
        expected = self.input_ids.shape
        if t_nested.shape[:2] != expected:
            raise ShapeError(
                f"t_nested {tuple(t_nested.shape)}: {tuple(expected)} and more are needed, as of input_ids"
            )
        return list(t_nested.flatten(0, 1).split(self.sequence_lengths))

    def update_pos(self, seq_len: torch.Tensor | Sequence[int] | int, reset: bool = False) -> None:
        """Add to ``input_pos``, or with ``reset`` write it: one number for all sequences, or one for each of the first
        ones."""
        tokens = self._staged(torch.as_tensor(seq_len, dtype=torch.int32)).to(self.device, non_blocking=True)
        if tokens.dim() > 1:
            raise ShapeError(f"seq_len {tuple(tokens.shape)}: one number, or (sequences), is needed")
        if tokens.dim() == 1:
            self._check_batch("seq_len", len(tokens))
        positions = self.input_pos if tokens.dim() == 0 else self.input_pos[: len(tokens)]
        if reset:
            positions.copy_(tokens)
        else:
            positions.add_(tokens)

    def assign_cache_loc(self, page_assignments: Sequence[Sequence[int]]) -> None:
        """The pages of each sequence, in order, which have to hold ``input_pos + seq_len`` tokens. The server sees to
        it that sequences share no page that is written. Raises LengthError or PageTableError."""
        self._check_batch("page_assignments", len(page_assignments))
        assigned = [list(pages) for pages in page_assignments]
        flat = list(itertools.chain.from_iterable(assigned))
        if len(flat) > self.num_pages:
            raise LengthError(f"page_assignments list {len(flat)} pages: the cache has {self.num_pages}")
        for b, pages in enumerate(assigned):
            for page in pages:
                if not 0 <= page < self.num_pages:
                    raise PageTableError(
                        f"page_assignments[{b}] lists page {page}: the cache has {self.num_pages} pages"
                    )
        self._assigned = assigned
        self._write(self.cache_loc, flat)
        self._write(self.pages_per_seq, [len(pages) for pages in assigned])

    def to(self, device: torch.device | str) -> None:
        """Move the tensors."""
        for name in _TENSORS:
            setattr(self, name, getattr(self, name).to(device))

    def sync(self, other: SequenceInfo) -> None:
        """Take over the sequences of another one with equal limits, which may be on another device."""
        for name in ("max_seq_len", "max_batch_size", "page_size", "max_num_tokens", "num_pages"):
            ours, theirs = getattr(self, name), getattr(other, name)
            if ours != theirs:
                raise ArgumentError(f"{name}={theirs} of the other sequences: {ours} is needed")
        for name in _TENSORS:
            # towards the host only a copy that waits is complete when it returns
            getattr(self, name).copy_(getattr(other, name), non_blocking=self.device.type != "cpu")
        self.sequence_lengths = list(other.sequence_lengths)
        self._assigned = [list(pages) for pages in other._assigned]

    def _write(self, tensor: torch.Tensor, numbers: list[int]) -> None:
        """Numbers, and 0 behind them."""
        staged = torch.zeros(tensor.shape, dtype=tensor.dtype)
        staged[: len(numbers)] = torch.tensor(numbers, dtype=tensor.dtype)
        tensor.copy_(self._staged(staged), non_blocking=True)

    def _staged(self, tensor: torch.Tensor) -> torch.Tensor:
        """In memory from which a copy to the device does not wait."""
        return tensor.pin_memory() if tensor.device.type == "cpu" and self.device.type == "cuda" else tensor

    def _check_batch(self, name: str, sequences: int) -> None:
        if sequences > self.max_batch_size:
            raise LengthError(f"{name} of {sequences} sequences: at most max_batch_size={self.max_batch_size}")


_TENSORS = ("_ids", "seq_len", "input_pos", "cache_loc", "pages_per_seq")
