"""What the race detector needs to know of a program: where it accesses memory, how, and what it synchronises with."""

from __future__ import annotations

import re

import numpy as np

from ..ops.instruction import TYPE_BYTES
from ..ops.scopes import scope_of

# kinds of agents, see ``ptxsim.analysis.clocks``; generic proxy first
GENERIC, LANE, READ, CP_ASYNC, WGMMA, BULK_READ, BULK_WRITE, TCGEN05, ISSUED, TENSOR_LD, TENSOR_ST = range(11)
KIND_NAMES = ("", "", "", "cp.async of ", "wgmma of the warpgroup of ", "bulk store of ", "bulk store of ",
              "tcgen05 of ", "", "tcgen05.ld of ", "tcgen05.st of ")  # fmt: skip
_PROXIES = r"mbarrier|cp\.(reduce\.)?async\.bulk|wgmma|fence\.proxy"
# by some lanes of a warp, see ``lanes``
_LANES_RELEASE = rf"{_PROXIES}|(st|atom|red)\..*(release|acq_rel)"
_USED = {
    LANE: _LANES_RELEASE,
    READ: _LANES_RELEASE,
    CP_ASYNC: r"cp\.async\.(ca|cg)",
    WGMMA: r"wgmma\.mma",
    BULK_READ: r"cp\.(reduce\.)?async\.bulk\.(tensor\.\dd\.)?global",
    BULK_WRITE: r"cp\.(reduce\.)?async\.bulk\.(tensor\.\dd\.)?global",
    TCGEN05: r"tcgen05\.",
    ISSUED: r"tcgen05\.",
    TENSOR_LD: r"tcgen05\.",
    TENSOR_ST: r"tcgen05\.",
}
_STRONG = re.compile(r"(atom|red|multimem)\b|cp\.reduce\.async|(ld|st)\.(relaxed|acquire|release|volatile|mmio)")
_MEMORY_FENCE = re.compile(r"membar\.(?!proxy)|fence\.(?!proxy|mbarrier_init)")
_GLOBAL_SYNC = re.compile(
    r"(ld|st|atom|red)\.(?=.*(acquire|release|acq_rel))(?!.*\.(cta|cluster)\b)"
    r"|fence\.((sc|acq_rel|acquire|release)\.)?(gpu|sys)|membar\.(gl|sys)"
)


class Sites:
    """Numbers of the PTX lines that access memory, and what the opcodes of a program say."""

    def __init__(self, program):
        effects = [i for i in program.body if i.form.effect]
        self.lines = [0, *sorted({i.line for i in effects})]
        self.bits = len(self.lines).bit_length()
        self.mask = (1 << self.bits) - 1
        self.number = {line: n for n, line in enumerate(self.lines)}
        strong = {i.line: i.op for i in effects if _STRONG.match(i.op)}
        # scope of atomic accesses, of which two do not race within it; elsewhere -1
        self.strong = np.array([scope_of(strong[line]) if line in strong else -1 for line in self.lines])
        opcodes = sorted({i.op for i in program.body})
        listed = "\n".join(opcodes)
        self.kinds = [GENERIC] + [kind for kind, pattern in _USED.items() if re.search(pattern, listed)]
        self.proxies = bool(re.search(_PROXIES, listed))
        self.memory_fences = any(_MEMORY_FENCE.match(x) for x in opcodes)
        self.global_sync = any(_GLOBAL_SYNC.match(x) for x in opcodes)  # synchronises through global memory
        self.tensor_fences = (
            sum(x.startswith("tcgen05.fence") for x in opcodes) == 2
        )  # see ``ptxsim.analysis.tensor_races``
        self.shared_granule, self.global_granule = _granules(program)

    @classmethod
    def of(cls, program):
        """Those of a program, which keeps them."""
        if not hasattr(program, "sites"):
            program.sites = cls(program)
        return program.sites


def _granules(program):
    """(shared, global) granule in bytes: the smallest access of the program, at most 16."""
    shared = memory = 16
    for i in program.body:
        size = 16
        if i.root in ("ld", "st", "atom", "red") and i.parts[1] not in ("param", "local", "const"):
            vector = next((int(p[1:]) for p in i.parts if re.fullmatch(r"v\d", p)), 1)
            size = TYPE_BYTES.get(i.parts[-1], 1) * vector
            if not any(p.startswith("shared") for p in i.parts):
                memory = min(memory, size)
            if "global" in i.parts:
                continue
        elif i.root == "cp" and i.parts[2] in ("ca", "cg"):
            size = int(i.args[2], 0)
            memory = min(memory, size)
        elif i.root == "cp" and "tensor" in i.parts:
            memory = min(memory, 4)  # boxes may be clipped anywhere; where that divides a granule it counts as whole
        elif i.root == "tcgen05" and i.parts[1] == "alloc":
            size = 4
        shared = min(shared, size)
    return shared, memory
