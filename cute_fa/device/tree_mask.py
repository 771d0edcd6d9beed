"""Which draft tokens of a sequence a query sees: the tree of speculative decoding, on top of causal and windows.

The drafts are the sequence's own queries, its last keys: with D = seqlen_k − seqlen_q draft t is key D + t. Keys before
them are no drafts, and nothing here hides them.
"""

from collections.abc import Sequence
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Int32, const_expr
from cutlass.cute.arch import inline_ptx

from cute_fa.device.range_walk import hidden_columns, hide
from cute_fa.device.seqlen import SeqlenInfo


class DraftWords(NamedTuple):
    """What one query sees: bit t % 32 of word t // 32 is of draft t. ``last``: the last word that is read."""

    words: cute.Tensor
    last: Int32

    @classmethod
    def of(cls, tree_mask: cute.Tensor, info: SeqlenInfo, batch: Int32, query: Int32) -> "DraftWords":
        """Of ``tree_mask`` (batch, seqlen_q, words), packed (total_q, words). A query that does not count has those of
        the last that does."""
        query = cutlass.max(cutlass.min(query, info.seqlen_q - 1), 0)
        if const_expr(cute.rank(tree_mask) == 2):
            words = tree_mask[info.offset_q + query, None]
        else:
            words = tree_mask[batch, query, None]
        return cls(words, cutlass.max(info.seqlen_q - 1, 0) // 32)

    def bits(self, first: Int32) -> Int32:
        """Of the 32 keys from draft ``first`` on, which may be negative; those of keys behind the last draft may be
        anything."""
        index = first >> 5
        return inline_ptx(
            "shf.r.wrap.b32 {$w0}, {$r0}, {$r1}, {$r2};",
            write_only_types=[Int32],
            read_only_args=[self._word(index), self._word(index + 1), first],
        )

    def _word(self, index: Int32) -> Int32:
        """All bits of a word before the first."""
        word = self.words[cutlass.max(cutlass.min(index, self.last), 0)]
        return cutlass.select_(index < 0, Int32(-1), word)


@cute.jit
def hide_drafts(scores: cute.Tensor, columns: cute.Tensor, first_draft: Int32, rows: Sequence[DraftWords]):
    """Set the scores of drafts that a row does not see to −inf, on the (rows, columns) view of an accumulator.

    ``columns``: thread 0's static ones; ``first_draft``: D less the block's first key plus the thread's column offset,
    as for :func:`cute_fa.device.visibility.mask_scores`, which hides what lies behind the sequence; ``rows``: of each
    of the scores' rows. Reads nothing for a block without drafts.
    """
    width = columns[0, cute.size(scores, mode=[1]) - 1][1] + 1
    if first_draft < width:
        _hide(scores, columns, first_draft, rows, width)


def _hide(scores: cute.Tensor, columns: cute.Tensor, first_draft: Int32, rows: Sequence[DraftWords], width: int):
    hidden = []
    for row in rows:
        bits = cute.make_rmem_tensor((width + 31) // 32, Int32)
        for word in range(cute.size(bits)):
            bits[word] = row.bits(32 * word - first_draft)
        hidden.append(hidden_columns(bits, Int32(0)))
    hide(scores, columns, hidden)
