"""What the kernels of the split-KV forward take."""

from typing import NamedTuple, Optional

import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr

from cute_fa.device.block_range import Window
from cute_fa.device.fake_arguments import common_fakes, fake_vector, optional
from cute_fa.device.seqlen import LengthTensors, SeqlenInfo, seqlen_info
from fa2_sm80.split_config import Fa2SplitConfig


class Parts(NamedTuple):
    """What the splits leave for the second kernel, fp32: normalised ``out`` (splits, rows, head_dim_v), unwritten where
    ``lse`` (splits, rows) is −inf, or +inf for a query that does not count. Rows are the elements of the caller's LSE,
    in its order."""

    out: cute.Tensor
    lse: cute.Tensor


class SplitArguments(NamedTuple):
    """Dense q, out (batch, seqlen_q, heads, d), k, v (batch, seqlen_k, heads_kv, d) or, paged, (num_pages, page_size,
    heads_kv, d), lse fp32 (batch, heads, seqlen_q), contiguous; packed without the batch dimension, lse (heads,
    total_q). page_table int32 (batch, max_pages), alibi_slopes fp32 (batch or stride 0, heads), learnable_sink fp32
    (heads). ``seqlen_q``: the longest, which sizes the grid."""

    q: cute.Tensor
    k: cute.Tensor
    v: cute.Tensor
    out: cute.Tensor
    lse: cute.Tensor
    lengths: LengthTensors
    window: Window
    alibi_slopes: Optional[cute.Tensor]
    learnable_sink: Optional[cute.Tensor]
    softmax_scale: Float32
    softcap: Optional[Float32]
    page_table: Optional[cute.Tensor]
    parts: Optional[Parts]
    seqlen_q: Int32
    num_splits: Int32

    @property
    def batches(self):
        """Sequences of the batch."""
        packed = self.lengths.cu_seqlens_q
        return self.q.shape[0] if const_expr(packed is None) else packed.shape[0] - 1

    def info(self, batch: Int32) -> SeqlenInfo:
        """Where sequence ``batch`` lies."""
        dense_q = self.q.shape[1] if const_expr(self.lengths.cu_seqlens_q is None) else 0
        dense_k = self.k.shape[1] if const_expr(self.lengths.cu_seqlens_k is None) else 0
        if const_expr(self.page_table is not None):
            dense_k = self.page_table.shape[1] * self.k.shape[1]
        return seqlen_info(self.lengths, batch, dense_q, dense_k)


def split_fakes(config: Fa2SplitConfig) -> SplitArguments:
    """Arguments for ``cute.compile``."""
    return SplitArguments(
        **common_fakes(config),
        page_table=optional(config.page_size is not None, lambda: fake_vector(Int32, 2)),
        parts=optional(config.split, lambda: Parts(fake_vector(Float32, 3), fake_vector(Float32, 2))),
        seqlen_q=Int32(0),
        num_splits=Int32(0),
    )
