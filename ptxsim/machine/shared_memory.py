"""Shared memory of the CTAs of a wave: PTX ISA 5.1 (state spaces), 9.7.9 (ld, st) at run time.

Each byte has a state: nothing wrote it yet, it was written, or an asynchronous copy to it is on its way (late mode).
Reads of bytes in flight raise, and so do reads of unwritten bytes by loads, atomics and stores of asynchronous copies.
Matrix operands are different: attention kernels read rows beyond the end of a sequence that were never loaded, and
drop what comes of them. Unwritten bytes are NaN in every format, so the first such read is remembered and raises when
a NaN is then written to global memory (``Suspicion``).
"""

from __future__ import annotations

import numpy as np

from ..arrays import full_width
from ..errors import MemoryFault, SyncError, UninitializedRead
from .global_memory import DTYPES

SHARED_BASE = 1024  # the first KB is reserved on sm_90 and later; it also keeps address 0 invalid

UNWRITTEN, WRITTEN, IN_FLIGHT = 0, 1, 2
_STATE_TYPES = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
_ALL_WRITTEN = {size: t(int.from_bytes(bytes([WRITTEN] * size), "little")) for size, t in _STATE_TYPES.items()}
_ROW_OF = {state: np.uint64(0x0101010101010101 * state) for state in (UNWRITTEN, WRITTEN, IN_FLIGHT)}


class Suspicion:
    """The first matrix operand that was read before all of it had been written, if there was one."""

    def __init__(self, wave):
        self.wave = wave
        self.found = None  # (place, PTX line, warps)

    def note(self, place, where):
        """Remember the first one."""
        if self.found is None:
            self.found = place, self.wave.line, where or self.wave.running_text()

    def check(self, words):
        """After a suspicious operand read: UninitializedRead if NaNs (f32, or bf16 or f16 in an upper half) are
        written.

        ``words`` is any array that is about to be written to global memory.
        """
        words = np.ascontiguousarray(words)
        words = words.view(np.uint16 if words.dtype.itemsize == 2 else np.uint32)
        half = words & np.uint16(0x7FFF) if words.dtype == np.uint16 else (words >> np.uint32(16)) & np.uint32(0x7FFF)
        if ((half > 0x7F80) | (half == 0x7E00)).any():
            place, line, where = self.found
            raise UninitializedRead(
                f"a NaN is written to global memory (PTX line {self.wave.line}: "
                f"{self.wave.ptx_line(self.wave.line)}) after a matrix operand was read from {place}, which nothing "
                "has written",
                line=line, text=self.wave.ptx_line(line), where=where)  # fmt: skip


class SharedMemory:
    """Bytes and their states, loads and stores, and whole regions for copies and matrix operands.

    ``w`` are warps, addresses and values arrays [n, 32] or scalars. A *flat index* counts bytes over all CTAs, which
    are ``stride`` bytes apart; a CTA's legal addresses are ``SHARED_BASE`` up to ``limit``. ``total`` is its bytes.
    """

    def __init__(self, wave, suspicion, total):
        self.wave, self.events, self.suspicion = wave, wave.events, suspicion
        self.limit = SHARED_BASE + total
        self.stride = -(-self.limit // 1024) * 1024
        self.bytes = np.full(self.wave.nctas * self.stride, 0xFF, np.uint8)
        self.views = {t: self.bytes.view(t) for t in DTYPES}
        self.rows = self.bytes.view(np.uint64).reshape(-1, 2)  # rows of 16 bytes
        self.of_cta = self.bytes.reshape(self.wave.nctas, self.stride)
        self.states = np.zeros(self.wave.nctas * self.stride, np.uint8)
        self.states_as = {size: self.states.view(t) for size, t in _STATE_TYPES.items()}
        self.state_rows = self.states.view(np.uint64).reshape(-1, 2)
        self.ready_rows = np.zeros(len(self.state_rows), bool)  # rows of 16 bytes known to be all written
        self.states_of = self.states.reshape(self.wave.nctas, self.stride)
        self.cta_base = (self.wave.cta_of * self.stride)[:, None]

    def locate(self, warp, address):
        """Shared address as a CTA of the wave and a byte offset."""
        address = int(address)
        if self.wave.cluster_size == 1:
            return int(self.wave.cta_of[warp]), address
        if address >> 24 >= self.wave.cluster_size:
            raise MemoryFault(f"shared address 0x{address:x}: the cluster has {self.wave.cluster_size} CTAs")
        return int(self.wave.cluster_first[warp]) + (address >> 24), address & 0xFFFFFF

    def flat(self, warp, address):
        """Flat index of a shared address."""
        cta, offset = self.locate(warp, address)
        return cta * self.stride + offset

    def describe(self, index):
        """Name the byte with a flat index for error messages: its offset and its CTA."""
        cta, offset = divmod(int(index), self.stride)
        return f"shared memory 0x{offset:x} of cta{self.wave.cta_name(cta)}"

    # ---- indices and states ------------------------------------------------------------------------
    def index(self, w, address, size, M=None):
        """Flat byte indices [n, 32] of shared addresses (own CTA or cluster window); checks bounds and alignment."""
        address = full_width(address, len(w)).astype(np.int64)
        if self.wave.cluster_size > 1:
            rank, offset = address >> 24, address & 0xFFFFFF
            if M is not None:
                offset = np.where(M, offset, SHARED_BASE)
                rank = np.where(M, rank, self.wave.cta_rank[w][:, None])
            wrong_rank = rank.max() >= self.wave.cluster_size or rank.min() < 0
        else:
            offset = address if M is None else np.where(M, address, SHARED_BASE)
            wrong_rank = False
        if (
            wrong_rank
            or offset.min() < SHARED_BASE
            or offset.max() + size > self.limit
            or (size > 1 and np.bitwise_or.reduce(offset, axis=None) & (size - 1))
        ):
            self._shared_fault(w, address, size, M)
        if self.wave.cluster_size > 1:
            cta = self.wave.cluster_first[w][:, None] + rank
            if not self.wave.live_threads[cta].all():
                self.check_alive(int(cta[self.wave.live_threads[cta] == 0][0]))
            return cta * self.stride + offset
        return self.cta_base[w] + offset

    def check_alive(self, cta):
        """Raise MemoryFault if a CTA of a cluster has ended: its shared memory may be another's by then."""
        if self.wave.cluster_size > 1 and not self.wave.live_threads[cta]:
            raise MemoryFault(f"shared memory of cta{self.wave.cta_name(cta)}, which has ended")

    def _shared_fault(self, w, address, size, M):
        limit = self.wave.cluster_size << 24 if self.wave.cluster_size > 1 else self.limit
        offset = address & 0xFFFFFF if self.wave.cluster_size > 1 else address
        outside = (offset < SHARED_BASE) | (offset + size > self.limit) | (address >= limit)
        misaligned = (offset & (size - 1)) != 0
        active = np.ones(address.shape, bool) if M is None else M
        j, lane = np.argwhere((outside | misaligned) & active)[0]
        what = "out of bounds" if outside[j, lane] else "misaligned"
        raise MemoryFault(
            f"shared access {what}: {size} bytes at address 0x{int(address[j, lane]):x} (legal: 0x{SHARED_BASE:x} to "
            f"0x{self.limit:x})",
            where=self.wave.thread_text(w[j], lane),
        )

    def require_written(self, w, index, size, M):
        """UninitializedRead (or SyncError, in flight) unless all bytes have been written."""
        unit = min(size, 8)
        table, first = self.states_as[unit], index // unit
        for k in range(size // unit):
            good = table[first + k if k else first] == _ALL_WRITTEN[unit]
            if M is not None:
                good |= ~M
            if not good.all():
                j, lane = np.argwhere(~good)[0]
                start = int(index[j, lane])
                self.raise_unwritten(start + int((self.states[start : start + size] != WRITTEN).argmax()),
                                     self.wave.thread_text(w[j], lane))  # fmt: skip

    def raise_unwritten(self, index, where=None):
        """The error for reading the byte with a flat index that is not in the written state."""
        place = self.describe(index)
        if self.states[index] == IN_FLIGHT:
            raise SyncError(f"read of {place} before the asynchronous copy to it was waited for", where=where)
        raise UninitializedRead(f"read of {place}, which nothing has written", where=where)

    def rows_are_written(self, rows):
        """Whether all bytes of rows of 16 bytes have been written; remembers the answer."""
        if self.ready_rows[rows].all():
            return True
        if not (self.state_rows[rows] == _ALL_WRITTEN[8]).all():
            return False
        self.ready_rows[rows] = True
        return True

    def set_in_flight(self, cta, offset, size):
        """An asynchronous copy to a region of a CTA's shared memory is on its way."""
        self.states_of[cta][offset : offset + size] = IN_FLIGHT
        first = cta * self.stride + offset
        self.ready_rows[first >> 4 : (first + size + 15) >> 4] = False

    def unwritten_operand(self, index, where=None):
        """A matrix operand has bytes that are not in the written state; ``index`` are their flat indices."""
        flying = self.states[index] == IN_FLIGHT
        if flying.any():
            self.raise_unwritten(int(index[flying.argmax()]), where)
        self.suspicion.note(self.describe(index[0]), where)

    def mark_written(self, index, size, M):
        unit = min(size, 8)
        table, first = self.states_as[unit], index // unit
        if M is not None:
            first = first[M]
        for k in range(size // unit):
            at = first + k if k else first
            if self.wave.late:
                flying = (table[at] & (IN_FLIGHT * _ALL_WRITTEN[unit])) != 0
                if flying.any():
                    place = self.describe(at[flying][0] * unit)
                    raise SyncError(f"write to shared memory that an asynchronous copy is writing: {place}")
            table[at] = _ALL_WRITTEN[unit]

    # ---- ld and st --------------------------------------------------------------------------------
    def load(self, w, address, dtype, count, M):
        """ld.shared (PTX ISA 9.7.9): ``count`` consecutive elements a lane, as a list of arrays [n, 32].

        Addresses are in bytes. Raises MemoryFault, UninitializedRead or (bytes in flight) SyncError.
        """
        size = np.dtype(dtype).itemsize
        index = self.index(w, address, size * count, M)
        self.require_written(w, index, size * count, M)
        if self.events.read_shared:
            self.events.read_shared(w, index, size * count, M)
        values, first = self.views[np.dtype(dtype)], index // size
        return [values[first + j if j else first] for j in range(count)]

    def store(self, w, address, dtype, values, M):
        """st.shared (PTX ISA 9.7.9): store a list of ``values`` ([n, 32] or scalars) as consecutive elements a lane.

        Raises MemoryFault, and SyncError where an asynchronous copy is writing.
        """
        size = np.dtype(dtype).itemsize
        index = self.index(w, address, size * len(values), M)
        self.mark_written(index, size * len(values), M)
        if self.events.write_shared:
            self.events.write_shared(w, index, size * len(values), M, values)
        store, first = self.views[np.dtype(dtype)], index // size
        if M is not None:
            first = first[M]
        for j, value in enumerate(values):
            store[first + j if j else first] = value if M is None else np.broadcast_to(value, M.shape)[M]
        self.wave.active()

    # ---- whole regions of one CTA's shared memory (copies and matrix operands) --------------------
    def check_region(self, offset, size, what):
        """Check that a region lies in a CTA's shared memory."""
        if offset < SHARED_BASE or offset + size > self.limit:
            raise MemoryFault(f"{what} outside shared memory: {size} bytes at 0x{offset:x} (legal: "
                              f"0x{SHARED_BASE:x} to "
                              f"0x{self.limit:x})")  # fmt: skip

    def read_region(self, cta, offset, size):
        """The bytes of a region; UninitializedRead or SyncError unless all have been written."""
        self.check_region(offset, size, "bulk copy")
        state = self.states_of[cta][offset : offset + size]
        if (state != WRITTEN).any():
            self.raise_unwritten(cta * self.stride + offset + int((state != WRITTEN).argmax()))
        return self.of_cta[cta][offset : offset + size]

    def write_region(self, cta, offset, data):
        """An asynchronous copy of bytes (uint8) arrives."""
        self.of_cta[cta][offset : offset + len(data)] = data
        self.states_of[cta][offset : offset + len(data)] = WRITTEN

    def mark_rows(self, index, size, state):
        """Set the state of pieces of ``size`` bytes at flat indices."""
        if size == 16:
            rows = index >> 4
            if state == IN_FLIGHT and (self.state_rows[rows] == _ROW_OF[IN_FLIGHT]).any():
                raise SyncError("a second asynchronous copy to bytes that one is still writing")
            self.state_rows[rows] = _ROW_OF[state]
            self.ready_rows[rows] = state == WRITTEN
        else:
            pattern = int.from_bytes(bytes([state] * size), "little")
            self.states_as[size][index // size] = pattern
            self.ready_rows[index >> 4] = False
