"""Which tile of queries a CTA computes next: one CTA a tile, persistent CTAs, and packed sequences of unequal lengths.

A tile is (m_block, head, batch). Every role of a kernel makes a scheduler of its own and gets the same tiles from it,
without communication:

    state = scheduler.first()
    while scheduler.valid(state):
        work = scheduler.tile(state)
        ...
        state = scheduler.next(state)

Order. Tiles under a right bound (causal, window) grow with ``m_block``: the longest are computed first, so that the
short ones fill the gaps at the end (longest processing time first: R. L. Graham, Bounds on multiprocessing timing
anomalies, 1969; in attention: the LPT scheduler of the FlashAttention repository). Over all heads at once, each
``m_block`` would read the keys and values of every head again; heads are therefore taken in groups whose K and V fit
in the L2 cache together, and the order is: group, ``m_block`` from last to first, head within the group. Tiles without
a right bound are equally long, and the order is: batch, head, ``m_block``, so that CTAs that run at the same time share
the K and V of a few heads.

Balance. With one CTA a tile, the hardware gives the next tile to the SM that is free first, and the order alone makes
the ends meet. Persistent CTAs (one for each SM: FlashAttention-3, arXiv 2407.08608) have fixed tiles instead, and if
``m_block`` fell in every group, the same CTAs would get the longer tiles of each. It therefore falls and rises by turns
from group to group, and falls in the last one; and CTAs take tiles in turns from the front and from the back. In a
model of causal rows (time = key blocks + 1 a tile, 132 SMs, head_dim 64 to 256, 36 shapes of 512 to 32k tokens) the
slowest CTA then takes 1.5 % longer than the least possible (mean, or longest tile) instead of 13.6 %; one CTA a tile:
0.8 %. For packed sequences (48 mixes of lengths), whose CTAs always count from the front, 4.3 % instead of 9.6 %; one
CTA a tile: 0.8 %.
"""

from collections.abc import Callable
from typing import NamedTuple, Optional

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Int32, Uint32, const_expr

from cute_fa.device.pipeline_spec import HANDOUT_STAGES
from cute_fa.device.ring import RingState, ring_next, ring_start
from cute_fa.device.tile_handout import Handout


class TileGrid(NamedTuple):
    """Run-time numbers of tiles: a kernel argument. m_blocks · heads · batches ≤ 2^31 − 1.

    ``m_blocks``: query tiles of the longest sequence; ``heads``: heads that own tiles (those of K and V where query
    heads are packed); ``head_group``: heads whose K and V stay in L2 together, ≥ 1, see
    ``cute_fa.device.tiling.head_group``.
    """

    m_blocks: Int32
    heads: Int32
    batches: Int32
    head_group: Int32


class WorkTile(NamedTuple):
    """One tile of queries, the same for all threads of a CTA."""

    m_block: Int32
    head: Int32
    batch: Int32


class TileState(NamedTuple):
    """``tile``: its index in the order of all tiles, unsigned."""

    tile: Int32


class SingleTileScheduler:
    """One CTA a tile, or one cluster of ``ctas``: the grid has m_blocks · heads · batches of them in x.

    ``longest_first``: the tiles have a right bound. All methods are pure: calling ``tile`` again later costs two or
    three divisions, but no register in between.
    """

    alternate = False

    def __init__(self, grid: TileGrid, longest_first: bool, ctas: int = 1):
        self.grid = grid
        self.longest_first = longest_first
        self.ctas = ctas

    def first(self) -> TileState:
        """The CTA's first tile, valid or not."""
        return TileState(_index(self.ctas))

    def valid(self, state: TileState) -> Boolean:
        """Whether the state names a tile."""
        grid = self.grid
        return Uint32(state.tile) < Uint32(grid.m_blocks * grid.heads * grid.batches)

    def tile(self, state: TileState) -> WorkTile:
        """The tile that a valid state names."""
        m_blocks, heads, batches, head_group = self.grid
        if const_expr(self.longest_first):
            m_block, row = tile_longest_first(state.tile, m_blocks, heads * batches, head_group, self.alternate)
        else:
            row, m_block = quotient_and_rest(state.tile, m_blocks)
        batch, head = quotient_and_rest(row, heads)
        return WorkTile(m_block, head, batch)

    def next(self, state: TileState) -> TileState:
        """The CTA's next tile, valid or not."""
        return TileState(Int32(-1))


class PersistentScheduler(SingleTileScheduler):
    """Any number of CTAs, or clusters, in x: of each as many tiles in order every one computes one, by turns its own
    index from the front and from the back."""

    alternate = True

    def next(self, state: TileState) -> TileState:
        """The CTA's next tile, valid or not."""
        walkers = _walkers(self.ctas)
        turn, _ = quotient_and_rest(state.tile, walkers)
        return TileState(2 * (turn + 1) * walkers - 1 - state.tile)


class HandedState(NamedTuple):
    """``tile`` as in :class:`TileState`; ``place``: of the next answer."""

    tile: Int32
    place: RingState


class HandedScheduler(SingleTileScheduler):
    """A cluster a tile in the grid; those that run take over the others' tiles (``cute_fa.device.tile_handout``)."""

    def __init__(self, grid: TileGrid, longest_first: bool, handout: Handout):
        super().__init__(grid, longest_first)
        self.handout = handout

    def first(self) -> HandedState:
        """The cluster's first tile."""
        return HandedState(cute.arch.block_idx()[0] // self.handout.ctas, ring_start())

    def next(self, state: HandedState) -> HandedState:
        """The cluster's next tile, valid or not; the 32 lanes of a warp call together."""
        return HandedState(self.handout.take(state.place), ring_next(state.place, HANDOUT_STAGES))


class VarlenState(NamedTuple):
    """``tile``: its index in the order of all tiles, unsigned; ``batch``: its sequence, ``batches`` or more
    beyond the last tile; ``start``: index of that sequence's first tile."""

    tile: Int32
    batch: Int32
    start: Int32


class VarlenScheduler:
    """Packed sequences: only tiles that exist, sequence by sequence, in the dense schedulers' order within each.

    ``cu_seqlens_q`` (batches + 1) int32 is read 32 sequences at a time, one a lane, from the current sequence on: a
    CTA's whole walk reads it about once. The 32 lanes of a warp call ``first`` and ``next`` together. ``m_blocks`` of
    the grid has no meaning; ``tile_tokens``: tokens of a tile; ``persistent``: any number of CTAs in x, or of clusters
    of ``ctas``, else at least as many as tiles (``cute_fa.device.tiling.packed_tiles``), those beyond have none.
    """

    def __init__(
        self,
        grid: TileGrid,
        longest_first: bool,
        cu_seqlens_q: cute.Tensor,
        tile_tokens: int,
        persistent: bool,
        ctas: int = 1,
    ):
        self.grid = grid
        self.longest_first = longest_first
        self.cu_seqlens_q = cu_seqlens_q
        self.tile_tokens = tile_tokens
        self.persistent = persistent
        self.ctas = ctas

    def first(self) -> VarlenState:
        """The CTA's first tile, valid or not."""
        return self._find(_index(self.ctas), Int32(0), Int32(0))

    def valid(self, state: VarlenState) -> Boolean:
        """Whether the state names a tile."""
        return state.batch < self.grid.batches

    def tile(self, state: VarlenState) -> WorkTile:
        """The tile that a valid state names."""
        grid = self.grid
        tile, m_blocks = state.tile - state.start, self._m_blocks(state.batch)
        if const_expr(self.longest_first):
            later = grid.batches - 1 - state.batch
            m_block, head = tile_longest_first(tile, m_blocks, grid.heads, grid.head_group, self.persistent, later)
        else:
            head, m_block = quotient_and_rest(tile, m_blocks)
        return WorkTile(m_block, head, state.batch)

    def next(self, state: VarlenState) -> VarlenState:
        """The CTA's next tile, valid or not."""
        if const_expr(not self.persistent):
            return VarlenState(state.tile, self.grid.batches, state.start)
        return self._find(state.tile + _walkers(self.ctas), state.batch, state.start)

    @cute.jit
    def _find(self, tile: Int32, batch: Int32, start: Int32) -> VarlenState:
        """The state of ``tile``, which is not in a sequence before ``batch``, whose first tile is ``start``."""
        batches, heads = self.grid.batches, self.grid.heads
        return VarlenState(tile, *sequence_at(tile, batch, start, self._m_blocks, heads, batches))

    def _m_blocks(self, batch: Int32) -> Int32:
        """Tiles of a head of sequence ``batch``; 0 from ``batches`` on."""
        batches = self.grid.batches
        length = self.cu_seqlens_q[cutlass.min(batch + 1, batches)] - self.cu_seqlens_q[cutlass.min(batch, batches)]
        return _ceil_div(length, self.tile_tokens)


class HandedVarlenState(NamedTuple):
    """:class:`VarlenState` and the ``place`` of the next answer."""

    tile: Int32
    batch: Int32
    start: Int32
    place: RingState


class HandedVarlenScheduler(VarlenScheduler):
    """As :class:`HandedScheduler`, of packed sequences; clusters beyond the last tile have none."""

    def __init__(
        self, grid: TileGrid, longest_first: bool, cu_seqlens_q: cute.Tensor, tile_tokens: int, handout: Handout
    ):
        super().__init__(grid, longest_first, cu_seqlens_q, tile_tokens, False)
        self.handout = handout

    def first(self) -> HandedVarlenState:
        """The cluster's first tile, valid or not."""
        found = self._find(cute.arch.block_idx()[0] // self.handout.ctas, Int32(0), Int32(0))
        return HandedVarlenState(*found, ring_start())

    def next(self, state: HandedVarlenState) -> HandedVarlenState:
        """The cluster's next tile, valid or not. One that lies before the last is searched for anew: nothing says in
        which order the hardware hands tiles out."""
        tile = self.handout.take(state.place)
        before = Uint32(tile) < Uint32(state.start)
        batch, start = (cutlass.select_(before, Int32(0), value) for value in (state.batch, state.start))
        return HandedVarlenState(*self._find(tile, batch, start), ring_next(state.place, HANDOUT_STAGES))


TileScheduler = HandedScheduler | HandedVarlenScheduler | SingleTileScheduler | PersistentScheduler | VarlenScheduler


def make_scheduler(
    grid: TileGrid,
    *,
    longest_first: bool,
    persistent: bool,
    cu_seqlens_q: Optional[cute.Tensor],
    tile_tokens: int,
    ctas: int = 1,
    handout: Optional[Handout] = None,
) -> TileScheduler:
    """The scheduler of a kernel; all arguments but ``grid`` and the tensor are compile-time values.

    ``longest_first``: tiles have a right bound; ``persistent``: CTAs walk over tiles; ``cu_seqlens_q``: (batches + 1)
    int32 if the queries are packed, else None; ``tile_tokens``: tokens of a tile, used if the queries are packed;
    ``ctas``: of a cluster that computes a tile together; ``handout``: running clusters take over tiles, and
    ``persistent`` and ``ctas`` have no meaning.
    """
    if handout is not None:
        if cu_seqlens_q is None:
            return HandedScheduler(grid, longest_first, handout)
        return HandedVarlenScheduler(grid, longest_first, cu_seqlens_q, tile_tokens, handout)
    if cu_seqlens_q is not None:
        return VarlenScheduler(grid, longest_first, cu_seqlens_q, tile_tokens, persistent, ctas)
    return (PersistentScheduler if persistent else SingleTileScheduler)(grid, longest_first, ctas)


def _index(ctas: int) -> Int32:
    """Of the CTA, or of its cluster of ``ctas``, among all that run and are yet to run."""
    cta = cute.arch.block_idx()[0]
    return cta if ctas == 1 else cta // ctas


def _walkers(ctas: int) -> Int32:
    """CTAs, or clusters of ``ctas``, of the launch."""
    launched = cute.arch.grid_dim()[0]
    return launched if ctas == 1 else launched // ctas


def tile_longest_first(
    tile: Int32, m_blocks: Int32, heads: Int32, head_group: Int32, alternate: bool = False, later: Int32 | int = 0
) -> tuple[Int32, Int32]:
    """(m_block, head) of a tile: groups of heads from the last to the first, in each the last m_block first.

    ``alternate``: the first m_block first in every other group, so that it falls in the very last one; ``later``
    sequences with as many groups follow.
    """
    head_group = cutlass.min(head_group, heads)
    group, rest = quotient_and_rest(m_blocks * heads - 1 - tile, head_group * m_blocks)
    first_head = group * head_group
    m_block, head = quotient_and_rest(rest, cutlass.min(head_group, heads - first_head))
    if const_expr(alternate):
        turn = group + later * _ceil_div(heads, head_group)
        m_block = cutlass.select_((turn & 1) == 0, m_block, m_blocks - 1 - m_block)
    return m_block, first_head + head


def quotient_and_rest(dividend: Int32, divisor: Int32 | int) -> tuple[Int32, Int32]:
    """Quotient and remainder of numbers ≥ 0. Unsigned, since the signed division has to round down.

    A run-time divisor goes through a shuffle: ptxas would keep the reciprocals of all divisors in registers (8) over
    whatever lies between two tiles.
    """
    if not isinstance(divisor, int):
        divisor = cute.arch.make_warp_uniform(divisor)
    quotient = Int32(Uint32(dividend) // Uint32(divisor))
    return quotient, dividend - quotient * divisor


def _ceil_div(dividend: Int32, divisor: Int32 | int) -> Int32:
    """Quotient of numbers ≥ 0, rounded up."""
    return quotient_and_rest(dividend + divisor - 1, divisor)[0]


@cute.jit
def sequence_at(
    position: Int32,
    batch: Int32,
    start: Int32,
    units: cutlass.Constexpr[Callable[[Int32], Int32]],
    heads: Int32,
    batches: Int32,
) -> tuple[Int32, Int32]:
    """(sequence, where it begins) at ``position`` in the line of all sequences' units, ``units(batch)`` for each of
    their heads and 0 from ``batches`` on; it is not before sequence ``batch``, which begins at ``start``. By a warp."""
    lane, searching = cute.arch.lane_idx(), Boolean(True)
    while searching:
        ends = inclusive_sum(units(batch + lane) * heads, lane) + start
        before = cute.arch.popc(cute.arch.vote_ballot_sync(Uint32(ends) <= Uint32(position)))
        # The sequences that end at or before the position are skipped: their last one's end is the next one's start.
        if before > 0:
            start = cute.arch.shuffle_sync(ends, before - 1)
        batch += before
        searching = (before == 32) & (batch < batches)
    return batch, start


@cute.jit
def inclusive_sum(value: Int32, lane: Int32) -> Int32:
    """The sum of the values of this lane and those below it."""
    for step in cutlass.range_constexpr(5):
        below = cute.arch.shuffle_sync_up(value, 1 << step)
        value += cutlass.select_(lane >= 1 << step, below, Int32(0))
    return value
