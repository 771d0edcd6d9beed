"""Warpgroup matrix instructions at run time: PTX ISA 9.7.15 (wgmma.mma_async and its groups).

By default a wgmma is performed where it is issued. In the late mode it is performed when wgmma.wait_group retires
it. Until then its destination registers hold tags (signalling NaN patterns 0x7fa00000 | id): moves carry them along,
and the wait replaces them everywhere by the result; arithmetic on a tag quiets the NaN, so that using an accumulator
too early ends in NaNs. Operands in shared memory must be the same at issue and at the wait.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from ..arrays import full_width
from ..errors import SyncError, UninitializedRead
from ..ops.numerics import UNDEFINED, f16_to_f32
from ..ops.sparsity import expand
from .accumulate import limited_sum
from .operands import wgmma_descriptor
from .products import in_fragments, products
from .warp_mma import a_fragment, accumulators, pack_f16, sparse_metadata

_u4, _f4 = np.uint32, np.float32
_TAG, _TAG_MASK = _u4(0x7FA00000), _u4(0xFFE00000)
_TAG_IDS = 1 << 21
_UNSET = _u4(UNDEFINED & 0xFFFFFFFF)  # a register that nothing has written


def _distinct(numbers):
    """As np.unique; mostly there is one, which takes a twentieth of the time to see."""
    return numbers[:1] if (numbers == numbers[:1]).all() else np.unique(numbers)


class _InFlight:
    """One issued wgmma of some warps (late mode)."""

    __slots__ = (
        "accumulators",
        "args",
        "base",
        "count",
        "done",
        "keys",
        "line",
        "result",
        "row_of",
        "sources",
        "tiles",
        "warps",
    )


class SharedOperand(NamedTuple):
    """An operand of a wgmma in shared memory, for observers: descriptors of the warps, and a function from a descriptor
    to the numbers of its 16-byte chunks in the CTA, [parts, chunks]: one part if each warp reads all of it, four if the
    warps of a warpgroup read one part each."""

    descriptors: Any
    chunks_of: Callable
    parts: int


class Wgmma:
    """wgmma of all warps. In the late mode ``ops`` are the operations (by number) whose result is not yet everywhere in
    place, ``of_tag`` has the number of the operation of each tag, ``open`` and ``closed`` have the operations that a
    warp has not committed and its committed groups."""

    def __init__(self, wave, operands, registers):
        self.wave, self.events, self.operands, self.registers = wave, wave.events, operands, registers
        self.fp8_bits, self.sums = wave.launch.fp8_bits, wave.launch.tensor_sums
        self.next = 0  # tag
        self.ops, self.issued = {}, 0
        self.of_tag = np.zeros(_TAG_IDS if wave.late else 0, np.int64)
        self.open, self.closed = {}, {}

    def _tile(self, cta, descriptor, mn_major, rows, depth, element):
        return self.operands.tile(cta, wgmma_descriptor(descriptor), mn_major, rows, depth, element)

    def multiply(self, w, spec, a, b, c, scale_d, metadata=None):
        """Registers of D; ``a`` is a descriptor or a tuple of four registers, ``c`` the registers of the
        accumulator, ``metadata`` the register of a sparse A."""
        unset = np.equal(c[0], _UNSET) & scale_d
        if unset.any():
            raise UninitializedRead("wgmma adds to accumulators that nothing has written (ACCUMULATE is set)",
                                    where=self.wave.warps_text(w))  # fmt: skip
        if self.events.wgmma:
            self.events.wgmma(w, spec, self._shared_operands(spec, a, b))
        if not self.wave.late:
            return self._product(w, spec, a, b, c, scale_d, metadata)
        n = len(w)
        ctas = self.wave.cta_of[w].tolist()
        tile = (spec.transpose_b, spec.n, spec.b_depth, spec.b_type)
        keys = [[(cta, d, *tile)] for cta, d in zip(ctas, full_width(b, n)[:, 0].tolist(), strict=True)]
        if not isinstance(a, tuple):
            tile = (spec.transpose_a, 64, spec.a_depth, spec.a_type)
            for mine, cta, d in zip(keys, ctas, full_width(a, n)[:, 0].tolist(), strict=True):
                mine.append((cta, d, *tile))

        def keep(v):
            return tuple(keep(x) for x in v) if isinstance(v, tuple) else np.array(v) if np.ndim(v) == 2 else v

        accumulators = np.stack([full_width(x, n) for x in c])
        return self._issue(w, accumulators, (spec, keep(a), keep(b), keep(scale_d), keep(metadata)), keys)

    def _shared_operands(self, spec, a, b):
        def of_b(descriptor):
            layout = wgmma_descriptor(descriptor)
            return self.operands.chunks(layout, spec.transpose_b, spec.n, spec.b_depth, spec.b_type).reshape(1, -1)

        def of_a(descriptor):
            layout = wgmma_descriptor(descriptor)
            chunks = self.operands.chunks(layout, spec.transpose_a, 64, spec.a_depth, spec.a_type)
            if spec.transpose_a:  # lines run along the 64 rows
                chunks = np.ascontiguousarray(chunks.reshape(len(chunks), 4, -1).swapaxes(0, 1))
            return chunks.reshape(4, -1)

        if isinstance(a, tuple):
            return [SharedOperand(b, of_b, 1)]
        # FlashAttention-4's P: each warp writes and reads its own 16 rows
        return [SharedOperand(b, of_b, 1), SharedOperand(a, of_a, 4)]

    # ---- late mode --------------------------------------------------------------------------------
    def _issue(self, w, accumulators, args, keys):
        count, n = accumulators.shape[:2]
        if self.next + count > _TAG_IDS:
            self.next = 0
        op = _InFlight()
        op.base, op.count, op.args, op.line = self.next, count, args, self.wave.line
        op.warps, op.accumulators = w, accumulators
        tags = accumulators[(accumulators & _TAG_MASK) == _TAG] - _TAG
        waited = (self.ops.get(number) for number in _distinct(self.of_tag[tags]).tolist())
        op.sources = {other.base for other in waited if other is not None}  # operations whose results it continues on
        op.row_of = np.full(self.wave.nwarps, -1)
        op.row_of[w] = np.arange(n)
        op.result, op.done, op.keys = np.zeros((count, n, 32), _u4), np.zeros(n, bool), keys
        op.tiles = {key: self._tile(*key) for key in dict.fromkeys(key for mine in keys for key in mine)}
        self.of_tag[op.base : op.base + count] = self.issued
        self.ops[self.issued] = op
        self.issued += 1
        self.next += count
        for x in w:
            self.open.setdefault(int(x), []).append(op)
        tags = _TAG + _u4(op.base) + np.arange(count, dtype=_u4)
        return np.ascontiguousarray(np.broadcast_to(tags[:, None, None], (count, n, 32)))

    def commit(self, w):
        """wgmma.commit_group of the warps ``w``."""
        if self.events.group_committed:
            self.events.group_committed("wgmma", w)
        if self.wave.late:
            for x in w:
                self.closed.setdefault(int(x), []).append(self.open.pop(int(x), []))

    def _replace_tags(self, values, w, required):
        """Tags in ``values`` [registers, len(w), 32] become results; ``required``: SyncError if one is missing."""
        at = np.nonzero((values & _TAG_MASK) == _TAG)
        if not len(at[0]):
            return values
        ids = (values[at] - _TAG).astype(np.int64)
        values = values.copy()
        numbers = self.of_tag[ids]
        found = _distinct(numbers)
        for number in found.tolist():
            op = self.ops.get(number)
            mine = slice(None) if len(found) == 1 else np.flatnonzero(numbers == number)
            if op is None or ids[mine].min() < op.base or ids[mine].max() >= op.base + op.count:
                continue  # not a tag: a NaN that looks like one
            register, warp, lane = (x[mine] for x in at)
            row = op.row_of[w[warp]]
            done = (row >= 0) & op.done[row]
            if required and not done.all():
                raise SyncError(f"a wgmma uses an accumulator that the wgmma at PTX line {op.line} is still computing")
            place, result = (register, warp, lane), (ids[mine] - op.base, row, lane)
            if not done.all():
                place, result = (tuple(x[done] for x in index) for index in (place, result))
            values[place] = op.result[result]
        return values

    def wait(self, i, group):
        """wgmma.wait_group N: all but the N latest groups of the warps are performed."""
        left = int(i.args[0], 0)
        if self.events.group_awaited:
            self.events.group_awaited("wgmma", group.w, left, False)
        if self.wave.late:
            self._retire(group.w, left)

    def _retire(self, w, keep):
        """Perform the operations of all but the ``keep`` latest groups of these warps."""
        todo = {}
        for x in w:
            queue = self.closed.get(int(x), [])
            while len(queue) > keep:
                for op in queue.pop(0):
                    todo.setdefault(id(op), (op, []))[1].append(int(x))
        if not todo:
            return
        for op, warps in sorted(todo.values(), key=lambda t: t[0].base):
            self._perform(op, np.array(warps))
        # the results replace the tags wherever they are, and operations that are done are forgotten
        performed = {op.base for op, _ in todo.values()}
        for op in self.ops.values():
            if not op.done.all() and not performed.isdisjoint(op.sources):
                op.accumulators = self._replace_tags(op.accumulators, op.warps, False)
        words = self.registers.words[:, w]
        rows = np.flatnonzero(((words & _TAG_MASK) == _TAG).any((1, 2)))
        if rows.size:
            self.registers.words[np.ix_(rows, w)] = self._replace_tags(words[rows], w, False)
        self.ops = {number: op for number, op in self.ops.items() if not op.done.all()}

    def _perform(self, op, warps):
        rows = op.row_of[warps]
        for key in dict.fromkeys(key for row in rows for key in op.keys[row]):
            if not np.array_equal(self._tile(*key), op.tiles[key], equal_nan=True):
                raise SyncError(
                    f"the shared memory operand (descriptor 0x{key[1]:x}) of the wgmma at PTX line {op.line} was "
                    "overwritten before wgmma.wait_group",
                    where=self.wave.warps_text(warps),
                )

        def pick(v):
            return tuple(pick(x) for x in v) if isinstance(v, tuple) else v[rows] if np.ndim(v) == 2 else v

        spec, a, b, scale_d, metadata = op.args
        accumulators = self._replace_tags(op.accumulators[:, rows], warps, True)
        op.result[:, rows] = self._product(
            warps, spec, pick(a), pick(b), tuple(accumulators), pick(scale_d), pick(metadata)
        )
        op.done[rows] = True

    # ---- the product ------------------------------------------------------------------------------
    def _product(self, w, spec, a, b, c, scale_d, metadata):
        n, N = len(w), spec.n
        tiles, tile_of = self._tiles(w, b, spec.transpose_b, N, spec.b_depth, spec.b_type)
        if isinstance(a, tuple):
            left = a_fragment(a, n, spec.a_type)
        else:
            a_tiles, a_tile_of = self._tiles(w, a, spec.transpose_a, 64, spec.a_depth, spec.a_type)
            quarter = self.wave.warp_in_cta[w] & 3
            left = a_tiles.reshape(len(a_tiles), 4, 16, -1)[a_tile_of, quarter]
        if metadata is not None:
            codes = sparse_metadata(spec.a_type, full_width(metadata, n), spec.selector, spec.k)
            left = expand(left, codes, spec.a_type)
        if spec.negate:
            left = -left
        use = full_width(scale_d, n)
        limited = self.fp8_bits is not None and spec.a_type in ("e4m3", "e5m2")
        if limited or (self.sums and spec.result != "s32"):
            start = accumulators([np.where(use, full_width(x, n), _u4(0)) for x in c], n, 16, spec.result)
            product = np.empty((n, 16, N), _f4)
            for t, tile in enumerate(tiles):
                rows = tile_of == t
                if limited:
                    product[rows] = limited_sum(left[rows], tile, start[rows], self.fp8_bits)
                else:
                    elements, sparse = (spec.a_type, spec.b_type), metadata is not None
                    product[rows] = self.sums.add(
                        "wgmma", elements, spec.result, left[rows], tile[None], start[rows], sparse=sparse
                    )
            product = in_fragments(product)
            use = np.zeros_like(use)  # the accumulators are in it
        else:
            product = products(left, tiles, tile_of, fragments=True)
        if spec.result == "f16":
            accumulator = np.stack([full_width(x, n) for x in c])
            low = product[0::2] + np.where(use, f16_to_f32(accumulator & _u4(0xFFFF)), _f4(0))
            high = product[1::2] + np.where(use, f16_to_f32(accumulator >> _u4(16)), _f4(0))
            return pack_f16(low, high)
        if spec.clamp:
            total = product.astype(np.int64)
            for j, x in enumerate(c):
                total[j] += np.where(use, full_width(x, n).view(np.int32), 0)
            return np.clip(total, -0x80000000, 0x7FFFFFFF).astype(np.int32).view(_u4)
        kind = np.int32 if spec.result == "s32" else _f4
        product = product.astype(kind, copy=False)
        if use.any():
            everywhere = use.all()
            for j, x in enumerate(c):
                accumulator = full_width(x, n).view(kind)
                product[j] += accumulator if everywhere else np.where(use, accumulator, kind(0))
        return product.view(_u4)

    def _tiles(self, w, descriptors, mn_major, rows, depth, element):
        """Distinct operand tiles of the warps [tiles, rows, depth], and the number of each warp's tile."""
        ctas = self.wave.cta_of[w]
        found, which = np.unique(full_width(descriptors, len(w))[:, 0], return_inverse=True)
        places, tile_of = np.unique(which * self.wave.nctas + ctas, return_inverse=True)
        tiles = []
        for n, descriptor in enumerate(found):
            mine = places[places // self.wave.nctas == n] % self.wave.nctas
            tiles.append(self.operands.tiles(mine, wgmma_descriptor(descriptor), mn_major, rows, depth, element))
        return np.ascontiguousarray(np.concatenate(tiles) if len(tiles) > 1 else tiles[0]), tile_of
