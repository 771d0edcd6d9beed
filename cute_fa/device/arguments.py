"""What every compiled kernel takes first, and where one sequence of the batch lies in it."""

from typing import NamedTuple, Optional

import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr

from cute_fa.device.seqlen import LengthTensors, SeqlenInfo, seqlen_info
from cute_fa.device.visibility import Window


class Descales(NamedTuple):
    """What codes of q, k and v are multiplied by to give values: fp32 (batch, heads_kv) of any strides, or None; of k
    and v also (batch, heads_kv, blocks), one for each ``DESCALE_BLOCK`` keys of a sequence, or (sequences or pages,
    rows, heads_kv, 1) of any strides, one for each row and head of the cache."""

    q: Optional[cute.Tensor]
    k: Optional[cute.Tensor]
    v: Optional[cute.Tensor]

    def of_scores(self, batch: Int32, kv_head: Int32):
        """Factor of the products of q and k, or None; without that of blocks or rows."""
        factor = None
        for descale in (self.q, self.k):
            if const_expr(descale is not None and cute.rank(descale) == 2):
                own = descale[batch, kv_head]
                factor = own if const_expr(factor is None) else factor * own
        return factor

    def of_values(self, batch: Int32, kv_head: Int32):
        """Factor of v, or None; without that of blocks or rows."""
        return None if const_expr(self.v is None or cute.rank(self.v) > 2) else self.v[batch, kv_head]


class CommonArguments(NamedTuple):
    """Dense q, out (batch, seqlen_q, heads, d), k, v (batch, seqlen_k, heads_kv, d) or, paged, (num_pages, page_size,
    heads_kv, d), lse fp32 (batch, heads, seqlen_q); packed without the batch dimension, lse (heads, total_q).
    alibi_slopes fp32 (batch or stride 0, heads), learnable_sink fp32 (heads), page_table int32 (batch, max_pages),
    cache_batch_idx int32 (batch), which sequence of k and v, or row of page_table, is the one of the batch. query_walk
    int32: what a range plan shows (``cute_fa.device.range_walk``); q_positions, k_positions int32 (seqlen). tree_mask
    int32 (batch, seqlen_q, words), packed (total_q, words): which drafts queries see (``cute_fa.device.tree_mask``)."""

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
    cache_batch_idx: Optional[cute.Tensor]
    descales: Descales
    query_walk: Optional[cute.Tensor]
    q_positions: Optional[cute.Tensor]
    k_positions: Optional[cute.Tensor]
    tree_mask: Optional[cute.Tensor]

    @property
    def batches(self):
        """Sequences of the batch."""
        packed = self.lengths.cu_seqlens_q
        return self.q.shape[0] if const_expr(packed is None) else packed.shape[0] - 1

    @property
    def dense(self):
        """Rows of q, and of k or its pages, that each sequence has; 0 where packed."""
        dense_q = self.q.shape[1] if const_expr(self.lengths.cu_seqlens_q is None) else 0
        dense_k = self.k.shape[1] if const_expr(self.lengths.cu_seqlens_k is None) else 0
        if const_expr(self.page_table is not None):
            dense_k = self.page_table.shape[1] * self.k.shape[1]
        return dense_q, dense_k

    def key_batch(self, batch: Int32) -> Int32:
        """Which sequence of dense k and v, or row of the page table, is that of sequence ``batch``."""
        return batch if const_expr(self.cache_batch_idx is None) else self.cache_batch_idx[batch]

    def info(self, batch: Int32) -> SeqlenInfo:
        """Where sequence ``batch`` lies."""
        return seqlen_info(self.lengths, batch, *self.dense)
