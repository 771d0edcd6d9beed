"""Descales of the cache's rows on their way: into shared memory with the codes of K, from there with the numbers that
these become, and into registers of the consumers. Blocks of them are fp32 (keys, tensors), the tensors being those of K
and V whose rows have some."""

from typing import Optional

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr

from cute_fa.device.arguments import CommonArguments
from cute_fa.device.async_copies import copy_async
from cute_fa.device.pages import page_place
from cute_fa.device.ring import RingState
from cute_fa.device.row_descales import column_factors
from cute_fa.device.split_walk import Piece
from fa3_sm90.decode.config import WIDENERS, Fa3DecodeConfig
from fa3_sm90.decode.storage import Storage

_WARP = 32
_BYTES = 4  # of a descale


def _blocks(config: Fa3DecodeConfig, memory: cute.Pointer, stages: int) -> cute.Tensor:
    """(keys, tensors, stages)."""
    return cute.make_tensor(memory, cute.make_layout((config.tile_n, config.row_descales, stages)))


class DescaleCopies:
    """Copies by the warp that loads K, into the stages of its codes."""

    def __init__(self, config: Fa3DecodeConfig, common: CommonArguments, storage: Storage):
        c, descales = config, common.descales
        given = (descales.k, c.k_row_descale), (descales.v, c.v_row_descale)
        self.config, self.common = c, common
        self.tensors = [tensor for tensor, of_rows in given if of_rows]
        self.target = storage.code_descales.toint() + _BYTES * cute.arch.lane_idx()

    @cute.jit
    def start(self, piece: Piece, first_key: Int32, stage: Int32):
        """Those of the keys from ``first_key`` on; 0 for keys that do not count, where NaN may lie."""
        c, common, info = self.config, self.common, piece.info
        target = self.target + stage * (_BYTES * c.tile_n * c.row_descales)
        outer = common.key_batch(piece.batch)
        for first in cutlass.range_constexpr(0, c.tile_n, _WARP):
            key = first_key + first + cute.arch.lane_idx()
            counts, row = key < info.seqlen_k, info.offset_k + key
            sequence_or_page = outer
            if const_expr(c.page_size is not None):
                index, row = page_place(row, c.page_size)
                sequence_or_page = Int32(0)
                if counts:
                    sequence_or_page = common.page_table[outer, index]
            for i in cutlass.range_constexpr(c.row_descales):
                source = self.tensors[i][sequence_or_page, row, piece.head, None].iterator.toint()
                copy_async(target, _BYTES * (i * c.tile_n + first), source, 0, counts, _BYTES)


class DescaleMoves:
    """By a widening warp, from the stage of K's codes to that of its numbers; the warps have a tensor each."""

    def __init__(self, config: Fa3DecodeConfig, storage: Storage, index: int):
        """``index``: which of the warps."""
        self.tensors = range(index, config.row_descales, WIDENERS)
        self.codes = _blocks(config, storage.code_descales, config.code_stages)
        self.numbers = _blocks(config, storage.descales, config.stages)
        self.share = (config.tile_n // _WARP,)  # of a lane

    def move(self, before: RingState, behind: RingState):
        """Of the block at ``before`` in the ring of codes, to ``behind`` in that of numbers."""
        for i in self.tensors:
            source, target = self.codes[None, i, before.stage], self.numbers[None, i, behind.stage]
            cute.autovec_copy(
                *(cute.local_tile(block, self.share, (cute.arch.lane_idx(),)) for block in (source, target))
            )


class ColumnDescales:
    """What a consumer's thread has of a block's: of its columns of the scores, ``k`` and ``v``, or None."""

    def __init__(self, config: Fa3DecodeConfig, storage: Storage, columns: cute.Tensor, column: Int32):
        """Arguments of :func:`cute_fa.device.row_descales.column_factors`."""
        c, self.columns, self.column = config, columns, column
        self.blocks = _blocks(c, storage.descales, c.stages)
        given = [
            cute.make_rmem_tensor(cute.size(columns, mode=[1]), Float32) if of_rows else None
            for of_rows in (c.k_row_descale, c.v_row_descale)
        ]
        self.given = [factors for factors in given if factors is not None]
        self.k: Optional[cute.Tensor] = given[0]
        self.v: Optional[cute.Tensor] = given[1]

    def load(self, stage: Int32):
        """Those of the block in a stage."""
        for i, factors in enumerate(self.given):
            factors.store(column_factors(self.blocks[None, i, stage], self.columns, self.column).load())
