"""Control flow (PTX ISA 9.7.12: bra, ret, exit; run by the scheduler), fences (9.7.13) and miscellaneous instructions
(9.7.19).

Memory accesses are performed in program order and seen by everybody at once, so that fences change nothing; the race
detector, where it is on, is told of them.
"""

from __future__ import annotations

from ..clocks import GLOBAL_VISIBLE, INITIALISED, VISIBLE
from ..sites import scope_of
from .forms import form, suspending

suspending("setmaxnreg.{action}.sync.aligned.u32", "h_setmaxnreg", action="inc|dec")


@form("bra[.uni]", writes=False)
@form("ret[.uni]", writes=False)
@form("exit", writes=False)
@form("trap", writes=False)
def control_flow(gen, args, mods):
    """Ends a block; the scheduler does the rest."""


def _tell(gen, call):
    gen.emit(f"if X.races is not None: X.races.{call}")


@form("membar.{level}", writes=False, level="cta|gl|sys")
@form("fence[.{sem}].{scope}", writes=False, sem="sc|acq_rel|acquire|release")
@form("fence.{sem}.sync_restrict::shared::{where}.cluster", writes=False, sem="acquire|release", where="cluster|cta")
def memory_fence(gen, args, mods):
    """Orders the thread's accesses."""
    _tell(gen, f"fence_memory(w, {gen.mask()}, {scope_of(gen.instr.op)})")


@form("fence.mbarrier_init.release.cluster", writes=False)
def init_fence(gen, args, mods):
    """Makes earlier mbarrier.init visible to the cluster."""
    _tell(gen, f"fence(w, {gen.mask()}, {INITIALISED})")


@form("membar.proxy.{proxy}", writes=False, proxy="alias|async|async.global|async.shared::cta|async.shared::cluster")
@form("fence.proxy.{proxy}", writes=False, proxy="alias|async|async.global|async.shared::cta|async.shared::cluster")
def proxy_fence(gen, args, mods):
    """Between the generic proxy and another. Only the async proxy is followed, for the memory that is named, or all."""
    if mods.proxy == "async":
        _tell(gen, f"fence(w, {gen.mask()}, {VISIBLE}, {GLOBAL_VISIBLE})")
    elif mods.proxy != "alias":
        _tell(gen, f"fence(w, {gen.mask()}, {GLOBAL_VISIBLE if mods.proxy == 'async.global' else VISIBLE})")


@form("fence.proxy.async::generic.{sem}.sync_restrict::shared::{where}.cluster", writes=False, sem="acquire|release",
      where="cluster|cta")  # fmt: skip
def one_way_proxy_fence(gen, args, mods):
    """One half of a fence between the generic and the async proxy; counts as a whole one."""
    _tell(gen, f"fence(w, {gen.mask()}, {VISIBLE})")


@form("fence.proxy.tensormap::generic.{sem}.{scope}", writes=False, sem="acquire|release")
def tensormap_fence(gen, args, mods):
    """Between the generic proxy and that of tensor maps; [address], 128 for acquire."""
    if mods.sem == "acquire":
        _tell(gen, f"fence_tensormap(w, {gen.address(args[0])}, {gen.mask()})")


@form("griddepcontrol.wait", writes=False)
def grid_wait(gen, args, mods):
    """Launches run one after the other; the race detector takes those for concurrent that may be."""
    _tell(gen, f"grid_wait(w, {gen.mask()})")


@form("griddepcontrol.launch_dependents", writes=False)
@form("nanosleep.u32", writes=False)
@form("pmevent[.mask]", writes=False)
def no_operation(gen, args, mods):
    """Has no effect on what a kernel computes."""
