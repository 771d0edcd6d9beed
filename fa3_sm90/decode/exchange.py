"""Two warpgroups that have the same rows and different keys become one: the second hands the first its sums."""

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32

from cute_fa.device.softmax import OnlineSoftmax, finite
from fa3_sm90.common.wgmma import WARPGROUP, WGMMA_M
from fa3_sm90.decode.config import EXCHANGED_COLUMNS, Fa3DecodeConfig

_FULL, _EMPTY = 1, 2  # named barriers; 0 is the CTA's own
_THREADS = 2 * WARPGROUP


class Exchange:
    """Through shared memory a few columns at a time. A thread of one has the same rows and columns as that of the
    other, so a number lies where its register's index and its thread's say."""

    def __init__(self, config: Fa3DecodeConfig, memory: cute.Pointer, thread: Int32):
        """``thread``: index within the warpgroup."""
        self.values = EXCHANGED_COLUMNS * WGMMA_M // WARPGROUP
        layout = cute.make_layout((self.values, WARPGROUP), stride=(WARPGROUP, 1))
        self.slots = cute.make_tensor(memory, layout)[None, thread]

    def start(self):
        """Once, by the first warpgroup: the memory is free."""
        cute.arch.barrier_arrive(barrier_id=_EMPTY, number_of_threads=_THREADS)

    @cute.jit
    def give(self, acc: cute.Tensor, softmax: OnlineSoftmax, busy: Boolean):
        """By the second: a tile's sums. ``busy``: whether the warp has rows."""
        slots = self.slots
        for numbers in self.portions(acc, softmax):
            cute.arch.barrier(barrier_id=_EMPTY, number_of_threads=_THREADS)
            if busy:
                for i in cutlass.range_constexpr(cute.size(numbers)):
                    slots[i] = numbers[i]
            cute.arch.barrier_arrive(barrier_id=_FULL, number_of_threads=_THREADS)

    @cute.jit
    def take(self, acc: cute.Tensor, softmax: OnlineSoftmax, busy: Boolean):
        """By the first: adds them to its own."""
        _statistics, *sums = self.portions(acc, softmax)
        slots, running, total, rows = self.slots, softmax.reference, softmax.total, cute.size(softmax.reference)
        own, others = (cute.make_rmem_tensor(rows, Float32) for _ in range(2))
        own.fill(1.0)
        others.fill(0.0)
        cute.arch.barrier(barrier_id=_FULL, number_of_threads=_THREADS)
        if busy:
            for r in cutlass.range_constexpr(rows):
                reference = cute.arch.fmax(running[r], slots[r])
                own[r] = cute.math.exp2(running[r] - finite(reference), fastmath=True)
                others[r] = cute.math.exp2(slots[r] - finite(reference), fastmath=True)
                running[r] = reference
                total[r] = total[r] * own[r] + slots[rows + r] * others[r]
        cute.arch.barrier_arrive(barrier_id=_EMPTY, number_of_threads=_THREADS)
        for numbers in sums:
            cute.arch.barrier(barrier_id=_FULL, number_of_threads=_THREADS)
            if busy:
                for i in cutlass.range_constexpr(cute.size(numbers)):
                    r = i // 2 % rows  # pairs of columns of one row, then of the other
                    numbers[i] = numbers[i] * own[r] + slots[i] * others[r]
            cute.arch.barrier_arrive(barrier_id=_EMPTY, number_of_threads=_THREADS)

    def portions(self, acc: cute.Tensor, softmax: OnlineSoftmax) -> list[cute.Tensor]:
        """What is handed over at a time: the rows' references and sums of exponentials, then columns of ``acc``."""
        rows = cute.size(softmax.reference)
        statistics = cute.make_rmem_tensor(2 * rows, Float32)
        for r in range(rows):
            statistics[r], statistics[rows + r] = softmax.reference[r], softmax.total[r]
        portions = [statistics]
        for first in range(0, cute.size(acc), self.values):
            layout = cute.make_layout(min(self.values, cute.size(acc) - first))
            portions.append(cute.make_tensor(acc.iterator + first, layout))
        return portions
