"""The serving interface of TensorRT-LLM's auto_deploy: its operators, argument order and descriptions of a batch.

The operators are ``torch.ops.cute_fa.<name>``, the functions here call them; ``ops`` says what their arguments mean and
where they differ from the original.
"""

from cute_fa.integrations.auto_deploy.ops import (
    fused_flattened_mha_with_cache,
    fused_flattened_mha_with_cache_rope_fusion,
    fused_mha_with_cache,
    fused_mha_with_paged_cache,
    prepare_fused_mha_metadata,
    prepare_paged_mha_metadata,
    scaled_dot_product_attention,
)
from cute_fa.integrations.auto_deploy.registry import (
    AttentionDescriptor,
    AttentionInfo,
    AttentionRegistry,
    FlattenedAttention,
    PagedAttention,
    PositionalEmbeddingConfig,
)
from cute_fa.integrations.auto_deploy.sequence_info import CacheConfig, SequenceInfo

__all__ = [
    "AttentionDescriptor",
    "AttentionInfo",
    "AttentionRegistry",
    "CacheConfig",
    "FlattenedAttention",
    "PagedAttention",
    "PositionalEmbeddingConfig",
    "SequenceInfo",
    "fused_flattened_mha_with_cache",
    "fused_flattened_mha_with_cache_rope_fusion",
    "fused_mha_with_cache",
    "fused_mha_with_paged_cache",
    "prepare_fused_mha_metadata",
    "prepare_paged_mha_metadata",
    "scaled_dot_product_attention",
]
