"""A machine that runs some CTAs of a launch: its parts, put together.

Generated code and the handlers of instructions reach the parts by their names here. A part gets what it needs when it
is made, and can be made and tested without the others.
"""

from __future__ import annotations

import warnings
from collections import deque

import numpy as np

from ..errors import SimError
from .atomics import Atomics
from .bulk_copies import BulkCopies
from .cluster_barriers import ClusterBarriers
from .copies import BulkGroups, CopyUnit
from .cp_async import CpAsync
from .deferred import Deferred
from .events import Observer
from .generic_memory import GenericMemory
from .global_memory import GlobalMemory
from .launch import LaunchConfig
from .launch_control import LaunchControl
from .matrices import Matrices
from .mbarriers import Mbarriers
from .named_barriers import NamedBarriers
from .offsets import Offsets
from .operands import Operands
from .register_pool import RegisterPool
from .registers import Registers
from .remote_stores import RemoteStores
from .scheduler import Scheduler
from .shared_memory import SharedMemory, Suspicion
from .symbols import Symbols
from .tcgen05_copy import Tcgen05Copy
from .tcgen05_mma import Tcgen05Mma
from .tensor_copies import TensorCopies
from .tensor_map_changes import TensorMapChanges
from .tensor_memory import TensorMemory
from .warp_exchange import WarpExchange
from .warp_mma import WarpMma
from .wave import Wave
from .wgmma import Wgmma


class Machine:
    """Runs a wave of CTAs.

    ``ctas`` are their linear numbers (whole clusters, in order); ``pending_clusters`` a deque of the first CTAs of
    clusters that are not launched yet, which the wave may take over.
    """

    def __init__(self, launch: LaunchConfig, ctas: list[int], pending_clusters: deque[int] | None = None):
        self.wave = wave = Wave(launch, ctas)
        self.events = wave.events

        self.symbols = Symbols(wave)
        self.registers = Registers(wave, self.symbols)
        suspicion = Suspicion(wave)
        self.shared = SharedMemory(wave, suspicion, self.symbols.static + launch.smem)
        self.global_memory = GlobalMemory(wave, suspicion)
        self.generic = GenericMemory(self.shared, self.global_memory, self.symbols.local_arrays)
        self.atomics = Atomics(wave, self.shared, self.global_memory, self.generic, suspicion)

        self.mbarriers = Mbarriers(wave, self.shared, self.registers)
        self.named_barriers = NamedBarriers(wave, self.registers)
        self.cluster_barriers = ClusterBarriers(wave)

        self.deferred = Deferred(wave)
        self.cp_async = CpAsync(wave, self.shared, self.global_memory, self.mbarriers, self.deferred)
        copies = CopyUnit(wave, self.shared, self.mbarriers, self.deferred)
        self.bulk_groups = BulkGroups(wave, self.deferred)
        memories = self.shared, self.global_memory, suspicion
        self.bulk_copies = BulkCopies(wave, *memories, copies, self.bulk_groups)
        self.tensor_copies = TensorCopies(wave, *memories, copies, self.bulk_groups)
        self.tensor_map_changes = TensorMapChanges(self.shared, self.global_memory)
        self.remote_stores = RemoteStores(self.shared, copies)
        self.launch_control = LaunchControl(
            wave, self.shared, copies, deque() if pending_clusters is None else pending_clusters
        )

        operands = Operands(self.shared)
        self.matrices = Matrices(wave, self.shared)
        self.warp_mma = WarpMma(wave)
        self.wgmma = Wgmma(wave, operands, self.registers)
        self.tensor_memory = TensorMemory(wave, self.shared, self.registers, self.mbarriers, self.deferred)
        self.tcgen05_copy = Tcgen05Copy(wave, operands, self.tensor_memory)
        self.tcgen05_mma = Tcgen05Mma(wave, operands, self.tensor_memory, self.tcgen05_copy)

        self.register_pool = RegisterPool(wave)
        self.offsets = Offsets(wave)
        exits = [self.named_barriers.after_exit, self.cluster_barriers.after_exit]
        self.scheduler = Scheduler(wave, self.registers, self.deferred, exits)
        self.warps = WarpExchange(wave, self.scheduler.lines_elsewhere)

    def attach(self, *observers: Observer) -> None:
        """Let observers hear what happens; before ``run``."""
        try:
            for observer in observers:
                observer.begin(self)
                self.events.attach(observer)
        except BaseException as error:
            self._end(error)
            raise

    def run(self) -> None:
        """Run all warps to the end. Raises a subclass of SimError that names PTX line, CTA and warps."""
        try:
            with np.errstate(all="ignore"):
                self._run()
        except BaseException as error:
            self._end(error)
            raise
        self._end(None)

    def _run(self):
        wave = self.wave
        try:
            self.scheduler.run(self)
            self.bulk_groups.drain()
            self.register_pool.check_warpgroups()
            self.tensor_memory.check_freed()
        except SimError as error:
            raise error.located(wave.line, wave.ptx_line(wave.line), wave.running_text()) from None
        except (IndexError, ValueError, OverflowError) as error:
            wrapped = SimError(
                f"the simulator, or an observer, failed on this instruction: {type(error).__name__}: {error}"
            )
            raise wrapped.located(wave.line, wave.ptx_line(wave.line), wave.running_text()) from error

    def _end(self, error):
        """Tell all observers. What one of them raises then comes out, unless the kernel has raised: then it is a
        warning."""
        raised = None
        for observer in self.events.observers:
            try:
                observer.end(self, error)
            except Exception as problem:
                raised = raised or problem
        self.events.detach()
        # what is left after an error would keep the wave's memory until the next garbage collection
        for left in (self.deferred.pending, self.bulk_groups.queues, self.tensor_memory.queues, self.scheduler.waits):
            left.clear()
        if raised is None:
            return
        if error is None:
            raise raised
        warnings.warn(f"an observer failed at the end of the wave: {raised!r}", RuntimeWarning, stacklevel=3)
