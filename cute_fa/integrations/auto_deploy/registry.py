"""Attention operators by name, with all that a transformation of a model's graph needs to put one in: caches, buffers,
metadata and constants."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from cute_fa.integrations.auto_deploy.sequence_info import CacheConfig, SequenceInfo
from cute_fa.semantics.errors import ArgumentError, PageSizeError, UnsupportedArgumentError
from cute_fa.semantics.problem import check_page_size


@dataclass(frozen=True)
class PositionalEmbeddingConfig:
    """``mode``: None, or "rope" for halves of a head rotated by position / ``rope_theta``^(2i / head_dim).
    ``rope_scale`` other than 1 raises UnsupportedArgumentError."""

    mode: str | None = None
    rope_theta: float = 10000.0
    rope_scale: float = 1.0

    def __post_init__(self) -> None:
        if self.mode not in (None, "rope"):
            raise ArgumentError(f"mode={self.mode!r}: None or 'rope'")
        if not 0.0 < self.rope_theta < math.inf:
            raise ArgumentError(f"rope_theta={self.rope_theta}: a positive number")
        if self.rope_scale != 1.0:
            raise UnsupportedArgumentError("rope_scale", self.rope_scale)


@dataclass(frozen=True)
class AttentionInfo:
    """One attention layer of a model; ``v_head_dim`` None is ``head_dim``."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    cache_config: CacheConfig = field(default_factory=CacheConfig)
    pos_embd_config: PositionalEmbeddingConfig = field(default_factory=PositionalEmbeddingConfig)
    v_head_dim: int | None = None


class AttentionDescriptor(ABC):
    """An attention operator, called as ``op(*qkv, *metadata, *caches, *buffers, *constants)``, and what makes its
    arguments."""

    @classmethod
    @abstractmethod
    def is_paged(cls) -> bool:
        """Whether its caches are paged."""

    @classmethod
    @abstractmethod
    def get_attention_op(cls) -> tuple[Callable, int]:
        """The operator, and how many arguments are q, k and v."""

    @classmethod
    @abstractmethod
    def get_prepare_metadata_op(cls) -> tuple[Callable, int]:
        """The operator that makes ``metadata`` of ``(*SequenceInfo.args, page_size)``, once for all layers of a step,
        and how many values it returns."""

    @classmethod
    @abstractmethod
    def get_cache_initializers(
        cls, get_info: Callable[[], AttentionInfo]
    ) -> dict[str, Callable[[SequenceInfo], torch.Tensor]]:
        """What makes each cache of a layer, by the names of the operator's arguments, in their order."""

    @classmethod
    def get_global_buffer_initializers(
        cls, get_info: Callable[[], AttentionInfo]
    ) -> dict[str, Callable[[SequenceInfo], torch.Tensor]]:
        """What makes each buffer; layers whose buffers have one name share them."""
        return {}

    @classmethod
    def get_constants(cls, attention_info: AttentionInfo) -> list[Any]:
        """The last arguments."""
        return []


class AttentionRegistry:
    """Descriptors by name."""

    _registered: ClassVar[dict[str, type[AttentionDescriptor]]] = {}

    @classmethod
    def register(cls, name: str) -> Callable[[type[AttentionDescriptor]], type[AttentionDescriptor]]:
        """A class decorator; raises ArgumentError for a name that is taken."""

        def decorate(descriptor: type[AttentionDescriptor]) -> type[AttentionDescriptor]:
            if cls.has(name):
                raise ArgumentError(f"attention {name!r}: the name is taken by {cls.get(name).__name__}")
            cls._registered[name] = descriptor
            return descriptor

        return decorate

    @classmethod
    def get(cls, name: str) -> type[AttentionDescriptor]:
        """Raises ArgumentError for an unknown name."""
        if not cls.has(name):
            raise ArgumentError(f"attention {name!r}: one of {', '.join(cls._registered)}")
        return cls._registered[name]

    @classmethod
    def has(cls, name: str) -> bool:
        return name in cls._registered


class _Cached(AttentionDescriptor):
    """Two caches, k and v, and one table of rotations."""

    @classmethod
    def get_cache_initializers(
        cls, get_info: Callable[[], AttentionInfo]
    ) -> dict[str, Callable[[SequenceInfo], torch.Tensor]]:
        def cache(head_dim: Callable[[AttentionInfo], int]) -> Callable[[SequenceInfo], torch.Tensor]:
            def initialize(sequences: SequenceInfo) -> torch.Tensor:
                cls._check_pages(sequences)
                info = get_info()
                shape = (sequences.num_pages, sequences.page_size, info.num_kv_heads, head_dim(info))
                return torch.empty(shape, dtype=info.cache_config.dtype or info.dtype, device=sequences.device)

            return initialize

        return {
            "k_cache": cache(lambda info: info.head_dim),
            "v_cache": cache(lambda info: info.head_dim if info.v_head_dim is None else info.v_head_dim),
        }

    @classmethod
    def get_global_buffer_initializers(
        cls, get_info: Callable[[], AttentionInfo]
    ) -> dict[str, Callable[[SequenceInfo], torch.Tensor]]:
        info = get_info()
        config = info.pos_embd_config

        def initialize(sequences: SequenceInfo) -> torch.Tensor:
            if config.mode is None:
                return torch.empty(0, device=sequences.device)
            return _freqs_cis(sequences.max_seq_len, info.head_dim, config.rope_theta).to(sequences.device)

        # the original's name lacks head_dim, so that layers of another one take a table that is not theirs
        name = f"freqs_cis_{config.mode}_{config.rope_theta}_{info.head_dim}".replace(".", "_")
        return {name: initialize}

    @classmethod
    @abstractmethod
    def _check_pages(cls, sequences: SequenceInfo) -> None:
        """Raise PageSizeError unless the operator takes such pages."""


@AttentionRegistry.register("flattened")
class FlattenedAttention(_Cached):
    """``fused_flattened_mha_with_cache``: contiguous caches."""

    @classmethod
    def is_paged(cls) -> bool:
        return False

    @classmethod
    def get_attention_op(cls) -> tuple[Callable, int]:
        return torch.ops.cute_fa.fused_flattened_mha_with_cache, 3

    @classmethod
    def get_prepare_metadata_op(cls) -> tuple[Callable, int]:
        return torch.ops.cute_fa.prepare_fused_mha_metadata, 4

    @classmethod
    def _check_pages(cls, sequences: SequenceInfo) -> None:
        if sequences.is_paged:
            raise PageSizeError(
                f"page_size={sequences.page_size} for contiguous caches: at least max_seq_len={sequences.max_seq_len}"
            )


@AttentionRegistry.register("paged")
class PagedAttention(_Cached):
    """``fused_mha_with_paged_cache``: pages."""

    @classmethod
    def is_paged(cls) -> bool:
        return True

    @classmethod
    def get_attention_op(cls) -> tuple[Callable, int]:
        return torch.ops.cute_fa.fused_mha_with_paged_cache, 3

    @classmethod
    def get_prepare_metadata_op(cls) -> tuple[Callable, int]:
        return torch.ops.cute_fa.prepare_paged_mha_metadata, 6

    @classmethod
    def _check_pages(cls, sequences: SequenceInfo) -> None:
        check_page_size(sequences.page_size)


def _freqs_cis(positions: int, head_dim: int, theta: float) -> torch.Tensor:
    """fp32 (positions, head_dim / 2, 2): cos and sin of position · theta^(−2i / head_dim) (arXiv 2104.09864); fp16, as
    the original has it, is off by 2^-12."""
    frequencies = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angles = torch.arange(positions, dtype=torch.float64)[:, None] * frequencies
    return torch.stack([angles.cos(), angles.sin()], dim=-1).float()
