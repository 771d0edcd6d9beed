"""Planted faults: fences, or the barrier after mbarriers are initialised, removed. Only the race detector sees that.

* ``no proxy fence``: a fence.proxy.async: it lies between writing the output tile and its TMA store.
* ``no wgmma fence``: a wgmma.fence. (Not one that follows a commit without a wait: the fence before that commit has
  covered the registers.)
* ``no init fence``, ``no barrier after the initialisation``: fence.mbarrier_init, and the bar.sync that follows it.
"""

from tests.testing.faults import Fault


def plan_fences(ptx: str) -> list[Fault]:
    """Every fault that the rules allow, in the order of the code."""
    code = [(number, line.strip()) for number, line in enumerate(ptx.split("\n"), 1)]
    faults, wgmma = [], ""
    for i, (number, text) in enumerate(code):
        if text.startswith("fence.proxy.async"):
            faults.append(Fault("no proxy fence", ((number, ""),)))
        if text.startswith("wgmma.fence") and not wgmma.startswith("wgmma.commit_group"):
            faults.append(Fault("no wgmma fence", ((number, ""),)))
        if text.startswith("fence.mbarrier_init"):
            barrier = next(n for n, s in code[i:] if s.startswith("bar.sync"))
            faults.append(Fault("no init fence", ((number, ""),)))
            faults.append(Fault("no barrier after the initialisation", ((barrier, ""),)))
        wgmma = text if text.startswith("wgmma") else wgmma
    return faults
