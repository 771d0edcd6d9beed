"""Control flow (PTX ISA 9.7.12: bra, ret, exit; run by the scheduler), fences (9.7.13) and miscellaneous instructions
(9.7.19).

Memory accesses are performed in program order and seen by everybody at once, so that fences change nothing; observers
are told of them.
"""

from __future__ import annotations

from .forms import form, suspending
from .scopes import scope_of

suspending("setmaxnreg.{action}.sync.aligned.u32", "register_pool.set", action="inc|dec")


@form("bra[.uni]", writes=False)
@form("ret[.uni]", writes=False)
@form("exit", writes=False)
@form("trap", writes=False)
def control_flow(gen, args, mods):
    """Ends a block; the scheduler does the rest."""


@form("membar.{level}", writes=False, level="cta|gl|sys")
@form("fence[.{sem}].{scope}", writes=False, sem="sc|acq_rel|acquire|release")
@form("fence.{sem}.sync_restrict::shared::{where}.cluster", writes=False, sem="acquire|release", where="cluster|cta")
def memory_fence(gen, args, mods):
    """Orders the thread's accesses."""
    gen.tell("memory_fence", "w", gen.mask(), str(scope_of(gen.instr.op)))


@form("fence.mbarrier_init.release.cluster", writes=False)
def init_fence(gen, args, mods):
    """Makes earlier mbarrier.init visible to the cluster."""
    gen.tell("fence", "w", gen.mask(), "'mbarrier_init'")


@form("membar.proxy.{proxy}", writes=False, proxy="alias|async|async.global|async.shared::cta|async.shared::cluster")
@form("fence.proxy.{proxy}", writes=False, proxy="alias|async|async.global|async.shared::cta|async.shared::cluster")
def proxy_fence(gen, args, mods):
    """Between the generic proxy and another. Only the async proxy is followed, for the memory that is named, or all."""
    if mods.proxy != "alias":
        gen.tell("fence", "w", gen.mask(), repr(mods.proxy.split("::")[0]))


@form("fence.proxy.async::generic.{sem}.sync_restrict::shared::{where}.cluster", writes=False, sem="acquire|release",
      where="cluster|cta")  # fmt: skip
def one_way_proxy_fence(gen, args, mods):
    """One half of a fence between the generic and the async proxy; counts as a whole one."""
    gen.tell("fence", "w", gen.mask(), "'async.shared'")


@form("fence.proxy.tensormap::generic.{sem}.{scope}", writes=False, sem="acquire|release")
def tensormap_fence(gen, args, mods):
    """Between the generic proxy and that of tensor maps; [address], 128 for acquire."""
    if mods.sem == "acquire":
        gen.tell("tensor_map_fence", "w", gen.address(args[0]), gen.mask())


@form("griddepcontrol.wait", writes=False)
def grid_wait(gen, args, mods):
    """Launches run one after the other; the race detector takes those for concurrent that may be."""
    gen.tell("grid_wait", "w", gen.mask())


@form("griddepcontrol.launch_dependents", writes=False)
@form("nanosleep.u32", writes=False)
@form("pmevent[.mask]", writes=False)
def no_operation(gen, args, mods):
    """Has no effect on what a kernel computes."""
