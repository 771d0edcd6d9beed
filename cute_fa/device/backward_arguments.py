"""What the kernels of a backward take, and where they find one tile of queries in the scratch memory."""

from typing import NamedTuple, Optional

import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, const_expr

from cute_fa.device.arguments import CommonArguments
from cute_fa.device.dtypes import CUTE_DTYPE
from cute_fa.device.fake_arguments import common_fakes, fake_activations, fake_tensor, fake_vector, optional
from cute_fa.device.seqlen import SeqlenInfo


class Scratch(NamedTuple):
    """Memory between the kernels, fp32. A sequence has whole tiles of queries, see :func:`first_tile`.

    ``stats`` (tiles, heads, stats_elements): LSE of the queries in log2 units, less the softcap's offset, +inf where P
    is 0, and their D = rowsum(dO∘O) − dLSE, see :func:`cute_fa.device.backward_preprocess.statistics_place`; where P is
    wanted times 2^probability_shift, D divided by that. ``dq`` (tiles, heads,
    tile_m · head_dim_padded): the sum of dS·K in the order of the accumulator's registers, or None.
    ``dsink`` (batch, heads, m_blocks) and ``dslopes`` (batch, heads, blocks · slope_parts): parts of the gradients of
    the learnable sink and of the ALiBi slopes, or None; the blocks are of keys, or of queries. ``turns`` int32
    (tiles · heads + 1), where tiles of keys add to dQ in order, or None: how many have added to each, and at the end
    how many have been begun."""

    stats: cute.Tensor
    dq: Optional[cute.Tensor]
    dsink: Optional[cute.Tensor]
    dslopes: Optional[cute.Tensor]
    turns: Optional[cute.Tensor]


class BackwardArguments(NamedTuple):
    """dout like out, dlse like lse; dq, dk, dv like q, k, v; dalibi (1 or batch, heads), dsink (1, heads).
    ``seqlen_*``: the longest, which size the grids where sequences are packed. ``head_group``: kv heads whose tiles of
    keys are handed out together, longest first, or None: head by head. ``key_walk``, ``dq_walk``: of a range
    plan, for tiles of keys and for the queries of the kernel for dQ alone."""

    common: CommonArguments
    dout: cute.Tensor
    dlse: Optional[cute.Tensor]
    dq: cute.Tensor
    dk: cute.Tensor
    dv: cute.Tensor
    dalibi: Optional[cute.Tensor]
    dsink: Optional[cute.Tensor]
    scratch: Scratch
    seqlen_q: Int32
    seqlen_k: Int32
    head_group: Optional[Int32]
    key_walk: Optional[cute.Tensor]
    dq_walk: Optional[cute.Tensor]

    def m_blocks(self, tile_m: int):
        """Most query blocks of a sequence."""
        return cute.ceil_div(self.seqlen_q, tile_m)

    def first_tile(self, info: SeqlenInfo, batch: Int32, tile_m: int) -> Int32:
        """Where the tiles of a sequence begin. Packed: offset // tile_m + batch, since ⌈l / t⌉ never exceeds
        ⌊(o + l) / t⌋ − ⌊o / t⌋ + 1."""
        if const_expr(self.common.lengths.cu_seqlens_q is None):
            return batch * self.m_blocks(tile_m)
        return info.offset_q // tile_m + batch


def scratch_address(tensor: cute.Tensor, tile: Int32, head: Int32) -> Int64:
    """Byte address of what ``tensor`` (tiles, heads, n) of fp32 holds of one tile."""
    elements = Int64(tile) * tensor.stride[0] + Int64(head) * tensor.stride[1]
    return tensor.iterator.toint() + elements * 4


def backward_fakes(config) -> BackwardArguments:
    """Arguments for ``cute.compile`` of the kernels of a backward's config."""
    c, dtype = config, CUTE_DTYPE[config.dtype]

    def scratch(elements: int):
        return fake_tensor(Float32, cute.sym_int(), cute.sym_int(), elements, aligned=4)

    return BackwardArguments(
        common=common_fakes(c),
        dout=fake_activations(dtype, c.cu_seqlens_q, c.head_dim_v),
        dlse=optional(c.lse_gradient, lambda: fake_vector(Float32, 2 if c.cu_seqlens_q else 3)),
        dq=fake_activations(dtype, c.cu_seqlens_q, c.head_dim),
        dk=fake_activations(dtype, c.cu_seqlens_k, c.head_dim),
        dv=fake_activations(dtype, c.cu_seqlens_k, c.head_dim_v),
        dalibi=optional(c.slopes_gradient, lambda: fake_vector(Float32, 2)),
        dsink=optional(c.learnable_sink, lambda: fake_vector(Float32, 2)),
        scratch=Scratch(
            stats=scratch(c.stats_elements),
            dq=optional(c.dq_sums, lambda: scratch(c.tile_m * c.head_dim_padded)),
            dsink=optional(c.learnable_sink, lambda: fake_vector(Float32, 3)),
            dslopes=optional(c.slopes_gradient, lambda: fake_vector(Float32, 3)),
            turns=optional(c.turns, lambda: fake_vector(Int32)),
        ),
        seqlen_q=Int32(0),
        seqlen_k=Int32(0),
        head_group=optional(c.longest_first, lambda: Int32(1)),
        key_walk=optional(c.ranges, lambda: fake_vector(Int32)),
        dq_walk=optional(c.ranges and not c.dq_sums, lambda: fake_vector(Int32)),
    )
