"""Parts of the machine, made and used alone."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest

from ptxsim import Observer
from ptxsim.errors import MemoryFault, SyncError, Trap, UninitializedRead
from ptxsim.frontend.parser import parse_module
from ptxsim.frontend.program import Program
from ptxsim.machine.cluster_barriers import ClusterBarriers
from ptxsim.machine.copies import BulkGroups, Copy, CopyUnit
from ptxsim.machine.deferred import Deferred
from ptxsim.machine.global_memory import GlobalMemory, Ranges
from ptxsim.machine.launch import LaunchConfig
from ptxsim.machine.mbarriers import Mbarriers, mbarrier_fields
from ptxsim.machine.named_barriers import NamedBarriers
from ptxsim.machine.register_pool import RegisterPool
from ptxsim.machine.registers import Registers
from ptxsim.machine.shared_memory import SHARED_BASE, SharedMemory, Suspicion
from ptxsim.machine.symbols import Symbols
from ptxsim.machine.tensor_memory import TensorMemory
from ptxsim.machine.wave import Wave
from tests.testing.ptx import aligned, kernel_text, launch

EVERY = np.arange(4)  # the warps of a wave of two CTAs of two
ONE = np.array([0])
FIRST_LANE = (np.arange(32) == 0)[None]


def wave(body="", *, cluster=1, **options):
    """Two CTAs of 64 threads."""
    program = Program(parse_module(kernel_text(body, 0, 0)).kernels["kernel"])
    launch = LaunchConfig(
        program, (2, 1, 1), (64, 1, 1), (cluster, 1, 1), 256, np.zeros(64, np.uint8), Ranges(), **options
    )
    return Wave(launch, [0, 1])


def shared(of):
    return SharedMemory(of, Suspicion(of), 256)


def registers(of):
    return Registers(of, Symbols(of))


def group(w):
    return SimpleNamespace(w=w, M=None)


def instruction(of, op):
    return next(i for i in of.program.body if i.op.startswith(op))


class Log(Observer):
    """Names of the events that it hears."""

    def __init__(self, log, name=""):
        self.log, self.name = log, name

    def mbarrier_updated(self, index, arrivals, completed):
        self.log.append((self.name, index, arrivals, completed))

    def copy_lands(self, copy):
        self.log.append((self.name, copy.name, "lands"))

    def copy_landed(self, copy):
        self.log.append((self.name, copy.name, "landed"))


def test_wave_numbers_warps_cta_by_cta():
    found = wave(cluster=2)
    assert found.cta_of.tolist() == [0, 1, 0, 1] and found.warp_in_cta.tolist() == [0, 0, 1, 1]
    assert found.warp_text(3) == "cta(1,0,0).w1" and found.cta_rank.tolist() == [0, 1, 0, 1]
    assert found.multicast_targets(1, 0b11) == [0, 1]
    with pytest.raises(MemoryFault, match="multicast mask 0x4: the cluster has 2 CTAs"):
        found.multicast_targets(0, 0b100)
    found.exit(np.array([1, 3]), None)
    assert found.live_threads.tolist() == [64, 0] and found.alive.any(1).tolist() == [True, False, True, False]


def test_shared_memory():
    """Each CTA has its own bytes; what nothing wrote, or what a copy is on its way to, cannot be read."""
    memory = shared(wave())
    places = (SHARED_BASE + 4 * np.arange(32))[None].repeat(2, 0)
    memory.store(np.array([0, 1]), places, np.uint32, [np.array([[1], [2]]) * np.ones((2, 32), np.uint32)], None)
    (values,) = memory.load(np.array([1, 0]), places, np.uint32, 1, None)
    assert (values == [[2], [1]]).all()
    with pytest.raises(UninitializedRead, match=r"0x480 of cta\(0,0,0\)"):
        memory.load(ONE, places[:1] + 128, np.uint32, 1, None)
    memory.set_in_flight(0, SHARED_BASE, 16)
    with pytest.raises(SyncError, match="before the asynchronous copy"):
        memory.load(ONE, places[:1], np.uint32, 1, FIRST_LANE)
    memory.write_region(0, SHARED_BASE, np.arange(16, dtype=np.uint8))
    assert memory.load(ONE, places[:1], np.uint32, 1, FIRST_LANE)[0][0, 0] == 0x03020100
    with pytest.raises(MemoryFault, match="out of bounds"):
        memory.store(ONE, np.full((1, 32), SHARED_BASE + 256), np.uint32, [np.uint32(0)], None)


def test_global_memory():
    found, array = wave(), aligned(np.arange(32, dtype=np.float32))
    memory = GlobalMemory(found, Suspicion(found))
    memory.ranges.register(array.ctypes.data, array.nbytes)
    memory.ranges.prepare([])
    places = array.ctypes.data + 4 * np.arange(32, dtype=np.uint64)[None]
    (values,) = memory.load(ONE, places, np.float32, 1, None)
    assert (values == np.arange(32)).all()
    memory.store(ONE, places, np.float32, [values * 2], FIRST_LANE | (values == 5))
    assert array[5] == 10 and array[6] == 6 and found.global_writes == 1
    with pytest.raises(MemoryFault, match="right after 128 bytes"):
        memory.load(ONE, places + np.uint64(4), np.float32, 1, None)


def test_mbarriers():
    """Two arrivals and 16 bytes are a phase; observers hear each change, in the order in which they were attached."""
    found, log = wave(), []
    found.events.attach(Log(log, "first"))
    found.events.attach(Log(log, "second"))
    memory = shared(found)
    barriers = Mbarriers(found, memory, registers(found))
    at = np.full((1, 32), SHARED_BASE + 8)
    index = SHARED_BASE + 8
    with pytest.raises(SyncError, match="uninitialised mbarrier"):
        barriers.update(index, arrive=1)
    barriers.initialise(ONE, at, 2, FIRST_LANE)
    barriers.change(ONE, "arrive_tx", at, 16, FIRST_LANE)
    barriers.change(ONE, "arrive", at, 1, FIRST_LANE)
    assert mbarrier_fields(barriers.words[index >> 3]) == (0, 2, 0, 16)
    assert not barriers.test(ONE, at, 0, True, FIRST_LANE)[0, 0]
    barriers.update(index, tx=-16)
    assert mbarrier_fields(barriers.words[index >> 3]) == (1, 2, 2, 0)
    assert barriers.test(ONE, at, 0, True, FIRST_LANE)[0, 0]
    expected = [(index, 1, 0), (index, 1, 0), (index, 0, 1)]
    assert log == [(name, *event) for event in expected for name in ("first", "second")]
    with pytest.raises(SyncError, match="3 arrivals of one warp's lanes"):
        barriers.change(ONE, "arrive", at, 1, (np.arange(32) < 3)[None])


def test_what_is_no_observer():
    """It would hear nothing, or be called where it cannot."""
    events = wave().events
    with pytest.raises(TypeError, match=r"is not a ptxsim\.Observer"):
        events.attach(object())
    log = Log([])
    log.copy_lands = 3
    with pytest.raises(TypeError, match=r"Log\.copy_lands is no method, and has the name of an event"):
        events.attach(log)
    assert events.observers == [] and events.copy_landed is None
    events.attach(log := Log([]))
    with pytest.raises(ValueError, match="observes this wave already"):
        events.attach(log)


class Failing(Observer):
    def __init__(self, where):
        self.where = where

    def begin(self, machine):
        if self.where == "begin":
            raise KeyError("begin")

    def end(self, machine, error):
        if self.where == "end":
            raise KeyError("end")


class Ends(Observer):
    def __init__(self):
        self.errors = []

    def end(self, machine, error):
        self.errors.append(type(error))


@pytest.mark.parametrize(("body", "where", "raised"), [
    ("trap;", "end", Trap), ("trap;", "", Trap), ("", "end", KeyError), ("", "begin", KeyError), ("", "", None),
])  # fmt: skip
def test_observers_that_fail(body, where, raised):
    """The kernel's error comes first, and every observer hears the end."""
    text, ends = kernel_text(body, 0, 0), Ends()
    told = pytest.warns(RuntimeWarning, match="an observer failed") if body and where == "end" else nullcontext()
    with told, pytest.raises(raised) if raised else nullcontext():
        launch(text, [], observers=[ends, Failing(where)])
    assert ends.errors == [Trap if body else KeyError if where == "begin" else type(None)]


def test_named_barriers():
    """bar.sync 1, 64: the warps of a CTA wait for each other, not for those of the other one."""
    found = wave("bar.sync 1, 64;")
    barriers = NamedBarriers(found, registers(found))
    sync = instruction(found, "bar.sync")
    first = barriers.bar(sync, group(np.array([0, 1])))
    assert not first.check(first).any()
    assert first.lines()[0] == "barrier 1 of cta(0,0,0): 32 of 64 threads arrived (phase 0)"
    second = barriers.bar(sync, group(np.array([3])))
    assert first.check(first).tolist() == [False, True] and second.check(second).all()
    everybody = wave("bar.sync 0;")
    barriers = NamedBarriers(everybody, registers(everybody))
    alone = barriers.bar(instruction(everybody, "bar.sync"), group(np.array([0])))
    everybody.exit(np.array([2]), None)  # the other warp of the CTA: it no longer counts
    barriers.after_exit(np.array([2]))
    assert alone.check(alone).all()


def test_cluster_barriers():
    found = wave("barrier.cluster.arrive; barrier.cluster.wait;", cluster=2)
    barriers = ClusterBarriers(found)
    arrive, wait = (instruction(found, f"barrier.cluster.{what}") for what in ("arrive", "wait"))
    barriers.barrier(arrive, group(EVERY[:3]))
    waiting = barriers.barrier(wait, group(EVERY[:3]))
    assert not waiting.check(waiting).any() and "missing: cta(1,0,0).w1" in waiting.lines()[0]
    barriers.barrier(arrive, group(EVERY[3:]))
    assert waiting.check(waiting).all()
    with pytest.raises(SyncError, match="twice without a wait"):
        barriers.barrier(arrive, group(EVERY[3:]))


@pytest.mark.parametrize("late", [False, True])
def test_copies(late):
    """A load signals its barrier when it lands; a store of a bulk group reads shared memory when it is waited for."""
    found, log = wave("cp.async.bulk.commit_group; cp.async.bulk.wait_group 0;", late=late), []
    found.events.attach(Log(log))
    memory, deferred = shared(found), Deferred(found)
    barriers = Mbarriers(found, memory, registers(found))
    barriers.initialise(ONE, np.full((1, 32), SHARED_BASE), 1, FIRST_LANE)
    barriers.update(SHARED_BASE, arrive=1, tx=16)
    copy = Copy("bulk load", 0, 0, SHARED_BASE + 16, 16, [(0, SHARED_BASE + 16, SHARED_BASE)])
    CopyUnit(found, memory, barriers, deferred).load(copy, lambda: np.full(16, 9, np.uint8))
    landed = [("", "bulk load", "lands"), ("", SHARED_BASE, 0, 1), ("", "bulk load", "landed")]
    assert log[1:] == ([] if late else landed) and len(deferred.pending) == late
    assert deferred.run_one() == late and log[1:] == landed
    assert (memory.read_region(0, SHARED_BASE + 16, 16) == 9).all()
    groups, stored = BulkGroups(found, deferred), []
    store = Copy("bulk store", 0, 3, SHARED_BASE + 16, 16, is_store=True)
    groups.store(store, lambda: stored.append(memory.read_region(0, SHARED_BASE + 16, 16)[0]))
    groups.commit(None, group(ONE))
    memory.write_region(0, SHARED_BASE + 16, np.full(16, 5, np.uint8))
    groups.wait(instruction(found, "cp.async.bulk.wait"), group(ONE))
    assert stored == [5 if late else 9]


def test_register_pool():
    """64 registers a thread at launch: two warps that give up 24 each have 48 for the others."""
    found = wave("setmaxnreg.dec.sync.aligned.u32 40; setmaxnreg.inc.sync.aligned.u32 88;", registers=64)
    pool = RegisterPool(found)
    less, more = (instruction(found, f"setmaxnreg.{what}") for what in ("dec", "inc"))
    waiting = pool.set(more, group(np.array([2, 3])))
    assert not waiting.check(waiting).any()
    given = pool.set(less, group(np.array([0])))
    assert given.check(given).all() and waiting.check(waiting).tolist() == [True, False]
    assert pool.owned_registers.tolist() == [40, 64, 88, 64]


def test_tensor_memory():
    """512 columns a CTA; the second request waits until the first one's are given back."""
    alloc = "tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r1], 512;"
    program = kernel_text(alloc, 0, 0, target="sm_100a")
    launch = LaunchConfig(Program(parse_module(program).kernels["kernel"]), (1, 1, 1), (64, 1, 1), (1, 1, 1), 256,
                    np.zeros(64, np.uint8), Ranges())  # fmt: skip
    found = Wave(launch, [0])
    memory, files = shared(found), registers(found)
    files.files[found.program.reg("%r1")][:] = SHARED_BASE
    deferred = Deferred(found)
    tensor = TensorMemory(found, memory, files, Mbarriers(found, memory, files), deferred)
    first = tensor.allocate(instruction(found, "tcgen05.alloc"), group(np.array([0])))
    assert first.check(first).all()
    second = tensor.allocate(instruction(found, "tcgen05.alloc"), group(np.array([1])))
    assert not second.check(second).any() and "512 of the 512 columns of cta(0,0,0)" in second.lines()[0]
    with pytest.raises(SyncError, match=r"without tcgen05.dealloc of the 512 columns from 0"):
        tensor.check_freed()
    tensor.free(np.array([0]), 0, 512)
    assert second.check(second).all()
    tensor.free(np.array([1]), 0, 512)
    tensor.check_freed()
    with pytest.raises(MemoryFault, match="columns 0 to 7 of cta"):
        tensor.read(0, np.arange(128), 0, 8)
