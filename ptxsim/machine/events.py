"""The event interface: what happens in a wave, as the methods of an ``Observer``.

The machine's parts tell ``Events`` what they do. An observer overrides the methods that it wants to hear; the others
cost nothing: ``Events`` has None in their place, and the parts ask before they call. Several observers hear the same
event in the order in which they were attached.

Everywhere ``w`` are warps of the wave (``Wave`` says which CTA a warp belongs to), ``M`` is a mask [n, 32] of active
lanes or None for all. Addresses in shared memory are *flat indices* of bytes, CTA after CTA (``SharedMemory.stride``
apart), those in global memory count from ``GLOBAL_BASE``. ``wave.step`` is the present step of the scheduler,
``wave.line`` the PTX line of the latest instruction with side effects: that of the event, but for ``issue``, fences,
``grid_wait`` and ``tensor_wait``, where it is the one before. An event comes after the checks of its instruction, and
before what it tells of unless its name says otherwise. Arrays must not be changed.
"""

from __future__ import annotations

from typing import Any

from ..frontend.blocks import Block


class Observer:
    """Hears what happens in the waves that it is attached to; the base class does nothing."""

    # ---- the wave -------------------------------------------------------------------------------------------------

    def begin(self, machine: Any) -> None:
        """The observer is attached to a wave that is about to run; ``machine`` is its ``machine.machine.Machine``."""

    def end(self, machine: Any, error: BaseException | None) -> None:
        """The wave is over; ``error`` is what ended it early. Comes also to observers that nothing else interests."""

    # ---- issue, state of warps ------------------------------------------------------------------------------------

    def issue(self, block: Block, w: Any, M: Any) -> None:
        """The warps are about to execute a basic block."""

    def wait_begins(self, wait: Any) -> None:
        """Warps come to an instruction that may suspend them (``waiting.Wait``), before it is known whether it does.
        The observer may put arrays of its own into ``wait.info``, one row a warp, under names that are its own."""

    def wait_ends(self, wait: Any, selected: Any, failed: bool) -> None:
        """The warps of the rows ``selected`` (bool array) go on; ``failed``: the wait gave up and says no."""

    def exited(self, w: Any) -> None:
        """All lanes of the warps have ended."""

    def grid_wait(self, w: Any, M: Any) -> None:
        """griddepcontrol.wait."""

    # ---- accesses to memory ---------------------------------------------------------------------------------------

    def read_shared(self, w: Any, index: Any, size: int, M: Any) -> None:
        """Each lane reads ``size`` bytes at a flat index ([n, lanes])."""

    def write_shared(self, w: Any, index: Any, size: int, M: Any, values: Any = None) -> None:
        """Each lane writes, or updates atomically, ``size`` bytes; ``values`` are the elements that a plain store
        writes."""

    def read_global(self, w: Any, index: Any, size: int, M: Any) -> None:
        """Each active lane reads ``size`` bytes; ``index`` is [n, 32], or with a mask one element an active lane."""

    def write_global(self, w: Any, index: Any, size: int, M: Any, values: Any = None) -> None:
        """As ``read_global``; ``values`` as in ``write_shared``."""

    def ordered_access(self, w: Any, address: Any, space: str, order: Any, M: Any) -> None:
        """An access that is not weak is about to happen: ``order`` is an ``ops.scopes.AccessOrder``; ``space`` is
        shared, global_memory or generic, and ``address`` as the instruction names it."""

    def memory_fence(self, w: Any, M: Any, scope: int) -> None:
        """fence or membar of a scope of ``ops.scopes``."""

    def fence(self, w: Any, M: Any, what: str) -> None:
        """fence.mbarrier_init ("mbarrier_init"), or a proxy fence: "async", "async.shared", "async.global"."""

    def tensor_map_fence(self, w: Any, address: Any, M: Any) -> None:
        """fence.proxy.tensormap::generic.acquire of the tensor map at a global address."""

    # ---- barriers -------------------------------------------------------------------------------------------------

    def mbarrier_initialised(self, w: Any, index: Any, mask: Any) -> None:
        """mbarrier.init at flat indices."""

    def mbarrier_changed(self, w: Any, operation: str, index: Any, count: Any, mask: Any) -> None:
        """The active lanes are about to arrive, or to change the transaction count: ``operation`` is arrive,
        arrive_drop, arrive_tx, arrive_drop_tx (``count`` arrivals, or bytes expected), expect_tx or complete_tx. Of
        cp.async.mbarrier.arrive tells ``cp_async_arrives``."""

    def mbarrier_updated(self, index: int, arrivals: int, completed: int) -> None:
        """The word of a barrier has changed, by ``arrivals`` or by bytes that came or are expected; ``completed``: how
        many phases that has completed, 0 or 1 but where lanes of a warp arrive for several."""

    def mbarrier_passed(self, w: Any, index: Any, mask: Any) -> None:
        """The active lanes have seen their phase complete."""

    def bar_reached(self, w: Any, cta: Any, barrier: Any, waits: bool) -> None:
        """Warps come to bar.sync, bar.red (``waits``) or bar.arrive, each at a barrier of its CTA."""

    def bar_arrived(self, warp: int, cta: int, barrier: int, waits: bool) -> None:
        """One of them arrives, and may complete the barrier."""

    def bar_together(self, w: Any, cta: Any, waits: bool) -> None:
        """All warps of whole CTAs arrive in one step, and complete the barrier."""

    def bar_completed(self, cta: int, barrier: int) -> None:
        """Everybody has arrived at a named barrier."""

    def cluster_arrived(self, w: Any, cluster: Any, relaxed: bool) -> None:
        """barrier.cluster.arrive."""

    def cluster_completed(self, cluster: int) -> None:
        """All warps of the cluster have arrived."""

    def cluster_passed(self, w: Any, cluster: Any) -> None:
        """barrier.cluster.wait lets the warps go on."""

    def warp_barrier(self, w: Any) -> None:
        """bar.warp.sync."""

    # ---- asynchronous copies --------------------------------------------------------------------------------------

    def copy_issued(self, copy: Any) -> None:
        """One thread issues a bulk copy, a tensor copy or a remote store (``copies.Copy``)."""

    def copy_lands(self, copy: Any) -> None:
        """A copy is about to be performed; what ``mbarrier_updated`` tells before ``copy_landed`` comes of it. Of a
        tcgen05.commit (``tensor_memory.Commit``): what it waited for is over."""

    def copy_landed(self, copy: Any) -> None:
        """The copy, or the arrival of the commit, is done."""

    def cp_async(self, w: Any, index: Any, source: Any, size: int, source_size: Any, mask: Any) -> None:
        """cp.async of ``size`` bytes a lane: flat indices, global addresses [n, 32] and bytes of them, or None."""

    def cp_async_arrives(self, w: Any, index: Any, mask: Any) -> None:
        """cp.async.mbarrier.arrive at flat indices: the arrival happens after the copies."""

    def group_committed(self, kind: str, w: Any) -> None:
        """The warps close a group of asynchronous operations: "cp.async", "bulk" or "wgmma"."""

    def group_awaited(self, kind: str, w: Any, pending: int | None, read: bool) -> None:
        """All but the ``pending`` latest groups of the warps are over (None: everything, committed or not); ``read``:
        of bulk stores only the reads of shared memory."""

    # ---- tensor operations ----------------------------------------------------------------------------------------

    def wgmma(self, w: Any, spec: Any, operands: Any) -> None:
        """A wgmma (``ops.matrix.WgmmaSpec``) is issued; ``operands`` are its ``wgmma.SharedOperand``."""

    def tcgen05_mma(self, w: Any, form: Any, M: Any) -> None:
        """Threads issue a tcgen05.mma (``ops.tensor5.MmaForm``)."""

    def tcgen05_commit(self, commit: Any) -> None:
        """A thread issues a tcgen05.commit (``tensor_memory.Commit``)."""

    def tensor_core_reads(self, warp: int, cta: int, chunks: Any) -> None:
        """A tcgen05 operation of a warp reads 16-byte chunks of a CTA's shared memory, by their numbers."""

    def tensor_matrix(self, warp: int, cta: int, lanes: Any, first: int, count: int, writes: bool) -> None:
        """A tcgen05.mma, cp or shift accesses ``count`` columns of tensor memory from ``first`` on, in some lanes."""

    def tensor_registers(self, w: Any, lane: Any, column: Any, shape: Any, writes: bool) -> None:
        """tcgen05.ld or st: lanes and columns [warps, …] that each warp touches; equal ``shape``, equal differences."""

    def tensor_freed(self, warp: int, cta: int, first: int, count: int) -> None:
        """tcgen05.dealloc."""

    def tensor_wait(self, w: Any, what: str) -> None:
        """tcgen05.wait::ld or ::st."""

    def tensor_use(self, w: Any, lines: tuple[int, ...]) -> None:
        """The warps read registers of tcgen05.ld at these PTX lines."""

    def tensor_fence(self, w: Any, M: Any, side: str) -> None:
        """tcgen05.fence::before_thread_sync or ::after_thread_sync."""


def nobody(*arguments: Any) -> None:
    """Hears an event that no observer wants to hear."""


_EVENTS = [name for name, value in vars(Observer).items() if callable(value)]


class Events:
    """What the parts of a machine call: for each event the method of the observer that hears it, None if none does."""

    def __init__(self):
        self.detach()

    def detach(self) -> None:
        """Nobody hears any more."""
        self.observers: list[Observer] = []
        for name in _EVENTS:
            setattr(self, name, None)

    def attach(self, observer: Observer) -> None:
        """Add an observer; those that are there already hear first. TypeError if it is none, or has something else in
        the place of an event; ValueError if it hears already."""
        if not isinstance(observer, Observer):
            raise TypeError(f"{observer!r} is not a ptxsim.Observer")
        if any(other is observer for other in self.observers):
            raise ValueError(f"{observer!r} observes this wave already")
        for name in _EVENTS:
            if name in getattr(observer, "__dict__", ()) or not callable(getattr(type(observer), name)):
                raise TypeError(f"{type(observer).__name__}.{name} is no method, and has the name of an event")
        self.observers.append(observer)
        for name in _EVENTS:
            if getattr(type(observer), name) is not getattr(Observer, name):
                before, method = getattr(self, name), getattr(observer, name)
                setattr(self, name, method if before is None else _Both(before, method))


class _Both:
    """Two listeners as one."""

    __slots__ = ("first", "second")

    def __init__(self, first, second):
        self.first, self.second = first, second

    def __call__(self, *args):
        self.first(*args)
        self.second(*args)
