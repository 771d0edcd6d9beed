"""Control flow (PTX ISA 9.7.12: bra, ret, exit; run by the scheduler), fences (9.7.13) and miscellaneous instructions
(9.7.19).

Memory accesses are performed in program order and seen by everybody at once, so that fences have nothing to do; a
missing fence is therefore never noticed.
"""

from __future__ import annotations

from .forms import form


@form("bra[.uni]", writes=False)
@form("ret[.uni]", writes=False)
@form("exit", writes=False)
@form("trap", writes=False)
def control_flow(gen, args, mods):
    """Ends a block; the scheduler does the rest."""


@form("membar.{level}", writes=False, level="cta|gl|sys")
@form("membar.proxy.{proxy}", writes=False, proxy="alias|async|async.global|async.shared::cta|async.shared::cluster")
@form("fence[.{sem}].{scope}", writes=False, sem="sc|acq_rel|acquire|release")
@form("fence.{sem}.sync_restrict::shared::{where}.cluster", writes=False, sem="acquire|release", where="cluster|cta")
@form("fence.mbarrier_init.release.cluster", writes=False)
@form("fence.proxy.{proxy}", writes=False, proxy="alias|async|async.global|async.shared::cta|async.shared::cluster")
@form("fence.proxy.tensormap::generic.{sem}.{scope}", writes=False, sem="acquire|release")
@form("fence.proxy.async::generic.{sem}.sync_restrict::shared::{where}.cluster", writes=False, sem="acquire|release",
      where="cluster|cta")  # fmt: skip
def fence(gen, args, mods):
    """Nothing to do: see the module's text."""


@form("setmaxnreg.{action}.sync.aligned.u32", writes=False, action="inc|dec")
@form("griddepcontrol.{action}", writes=False, action="launch_dependents|wait")
@form("nanosleep.u32", writes=False)
@form("pmevent[.mask]", writes=False)
def no_operation(gen, args, mods):
    """Register budgets are not enforced, and launches run one after the other."""
