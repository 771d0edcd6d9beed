"""Resources of a kernel, and the instruction mix of its hot loops with a crude bound model.

A hot loop is an innermost loop that holds tensor-core instructions, or a MUFU.EX2 loop where another warp issues the
tensor work, as on sm_100, or a loop of asynchronous copies. Spins on mbarriers are dropped. A nested loop that runs at
most once, a detour, is no loop of its own. Every other block of the loop counts once; blocks that do not dominate the
loop's latch are also reported as ``cond`` (executed on some iterations or by some warps only).

The model's unit is SM cycles for one iteration of four warps, one in each quarter of the SM (a Hopper warpgroup):

* tc: flops / dense flop rate of one SM;  mufu: 8 a warp instruction (16 lanes a clock and SM);
* fma: 1 an FFMA/FADD/FMUL (2 on sm_80), 2 an IMAD or packed x2;  alu: 2 a warp instruction (64 lanes);
* issue: one warp instruction a clock and quarter;
* smem: bytes of WGMMA operands and of LDS, STS, LDSM, STSM, LDGSTS at 128 bytes a clock.

``util_overlap`` = tc / max(all): everything overlaps perfectly. ``util_serial`` = tc / (tc + max(others)): nothing
does. ``util_pingpong`` (sm_90): W consumer warpgroups taking turns on the tensor cores without overlap inside one.
On sm_100 one warp issues the tensor work (tcgen05) and others do the rest, so a kernel has a loop for each role:
``role_loops``. Figures of scores are those of the softmax warps, which hold a row a thread.

``stall_sum``: the compiler's fixed stall counts of the non-tensor instructions, one warp's own lower bound in cycles,
``cond_stall``: those of conditional blocks among them; ``sb_waits``: instructions that wait on a scoreboard, whose
latency is not modelled. Nothing here knows latencies, bank conflicts, cache or memory time, trip counts, clocks or
power.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections import Counter
from dataclasses import dataclass

from perf.sass.emulation import emulated_exp2
from perf.sass.flow import ControlFlow, Loop
from perf.sass.opcodes import (
    ALU_CLASSES,
    CLASSES,
    classify,
    is_tcgen05,
    is_tensor,
    is_warpgroup_mma,
    tensor_operation,
)
from perf.sass.registers import needed
from ptxsim.timing.cubin import Code, Instruction, disassemble, kernel_resources

_SPIN_LENGTH = 12  # instructions; a longer loop without tensor work or exp2 is no spin
_POLLING = ("sync", "ldg", "red")  # what a spin asks for the state of a barrier or semaphore by
_SCORE_UNIT = 16  # a tile's keys are multiples of it; what exponentials there are beyond are factors of O
_SHARED_MEMORY = ("lds", "sts", "ldgsts", "ldsm", "stsm")


@dataclass(frozen=True)
class SmModel:
    """Rates of one SM: dense 16-bit flops a clock, cycles of the FP32 pipe and of the MUFU a warp instruction, and the
    share of the tensor rate that mma.sync reaches (on an H100 about 63 % of what WGMMA does)."""

    flops: int
    fma: int = 1
    mufu: int = 8
    mma_share: float = 1.0


SM_MODELS = {
    80: SmModel(2048, fma=2),
    86: SmModel(1024),
    89: SmModel(1024),
    90: SmModel(4096, mma_share=0.63),
    100: SmModel(8192, mma_share=0.25),
    103: SmModel(8192, mufu=4, mma_share=0.25),
    120: SmModel(1024),
}


@dataclass
class LoopReport:
    """One hot loop. ``row()`` is what tables print; ``main`` marks the steady-state loop of its role. ``counts`` are by
    class, ``opcodes`` by opcode, ``shapes`` by shape of the tensor-core instructions. ``registers``: most that its role
    uses of those that setmaxnreg gives it, ``register_limit``. ``usual``: ``cycles`` without conditional blocks. Of
    softmax warps, also without these: ``scores`` of a thread, and how many of their exponentials are ``emulated``, with
    ``emulation`` instructions."""

    role: str
    address: int
    instructions: int
    conditional: int
    copying: int
    nested: int
    counts: Counter[str]
    opcodes: Counter[str]
    shapes: Counter[str]
    flops: int
    unknown_mma: int
    cycles: dict[str, float]
    usual: dict[str, float]
    stall_sum: int
    conditional_stall: int
    sb_waits: int
    warpgroups: int | None
    registers: int | None = None
    register_limit: int | None = None
    scores: int = 0
    emulated: int = 0
    emulation: int = 0
    main: bool = False
    per_score: float | None = None
    cond_per_score: float | None = None
    copy_per_score: float | None = None
    net_per_score: float | None = None
    pipe_per_score: float | None = None

    @property
    def mflop(self) -> float:
        return round(self.flops / 1e6, 4)

    @property
    def work(self) -> float:
        """What loops are compared by: tensor work, or scores where another warp issues that."""
        return self.flops or self.scores

    def row(self) -> dict:
        cycles, tensor = self.cycles, self.cycles["tc"]
        exp2 = self.counts["mufu_ex2"]
        others = max(value for name, value in cycles.items() if name != "tc")
        return {
            "role": self.role,
            "addr": f"{self.address:#x}",
            "main": self.main,
            "insts": self.instructions,
            "cond": self.conditional,
            "nested": self.nested,
            "tensor_shapes": " ".join(f"{count}x{shape}" for shape, count in self.shapes.items()),
            "mflop": self.mflop,
            "unknown_mma": self.unknown_mma,
            **{name: self.counts[name] for name in CLASSES},
            **{f"cyc_{name}": round(value, 1) for name, value in cycles.items()},
            "bound": max(cycles, key=cycles.get),
            "util_overlap": round(tensor / max(cycles.values()), 3) if tensor else None,
            "util_serial": round(tensor / (tensor + others), 3) if tensor else None,
            "util_pingpong": self._pingpong(),
            "stall_sum": self.stall_sum,
            "cond_stall": self.conditional_stall,
            "sb_waits": self.sb_waits,
            "wgs": self.warpgroups,
            "slots_per_ex2": round((self.instructions - self.counts["tensor"]) / exp2, 2) if exp2 else None,
            "issue_per_tc": round(self.instructions / tensor, 3) if tensor else None,
            "per_score": self.per_score,
            "cond_per_score": self.cond_per_score,
            "copy_per_score": self.copy_per_score,
            "net_per_score": self.net_per_score,
            "pipe_per_score": self.pipe_per_score,
            "scores": self.scores,
            "emulated": self.emulated,
            "emulation": self.emulation,
            "registers": self.registers,
            "register_limit": self.register_limit,
        }

    def _pingpong(self) -> float | None:
        tensor, groups = self.cycles["tc"], self.warpgroups
        if not groups or not tensor:
            return None
        others = max(self.cycles[name] for name in ("mufu", "fma", "alu", "issue"))
        serial = max(self.stall_sum, others)
        bound = max(groups * tensor, tensor + serial, groups * others, groups * self.cycles["smem"])
        return round(groups * tensor / bound, 3)


@dataclass
class KernelReport:
    """One kernel of a cubin: ``resources`` as :func:`kernel_resources` gives them, sizes in bytes;
    ``wgmma_serialised``: every wgmma is waited for before the next one, as ptxas does in a whole function where the
    registers do not suffice or an accumulator is touched in flight (its warning C7512 and its neighbours)."""

    kernel: str
    arch: int
    resources: dict[str, int]
    setmaxnreg: str
    spill_loads: int
    spill_stores: int
    instructions: int
    tensor_total: int
    wgmma_serialised: bool
    loop_count: int
    roles: str
    loops: list[LoopReport]

    @property
    def main_loop(self) -> LoopReport | None:
        """The steady-state loop that does the tensor work."""
        return next((loop for loop in self.loops if loop.main and loop.role.startswith("mma")), None)

    @property
    def tcgen05(self) -> bool:
        """Whether one warp issues the tensor work for all."""
        return self.main_loop is not None and any(is_tcgen05(shape) for shape in self.main_loop.shapes)

    @property
    def role_loops(self) -> dict[str, LoopReport]:
        """The steady-state loop of each role, as far as it has one: ``main``, or with tcgen05 ``softmax``,
        ``correction`` (which reads O from tensor memory, scales it and writes it back), ``mma`` and ``load``."""
        if not self.tcgen05:
            return {"main": self.main_loop} if self.main_loop else {}
        most = {
            "softmax": lambda loop: loop.main * loop.scores,
            "correction": lambda loop: not loop.scores and loop.opcodes["STTM"],
            "mma": lambda loop: loop.main and loop.flops,
            "load": lambda loop: loop.opcodes["UTMALDG"],
        }
        found = {role: max(self.loops, key=measure) for role, measure in most.items()}
        return {role: loop for role, loop in found.items() if most[role](loop)}

    @property
    def score_loop(self) -> LoopReport | None:
        """The one among them that computes with the scores."""
        return self.role_loops.get("softmax", self.main_loop)

    def row(self) -> dict:
        tensor_in_loops = sum(loop.counts["tensor"] for loop in self.loops)
        return {
            "kernel": self.kernel,
            "arch": self.arch,
            "threads": self.resources.get("threads"),
            "regs": self.resources.get("regs"),
            "setmaxnreg": self.setmaxnreg,
            "stack": self.resources.get("frame", 0),
            "ldl": self.spill_loads,
            "stl": self.spill_stores,
            "spill_in_hot": sum(loop.counts["local"] for loop in self.loops),
            "static_smem": self.resources.get("static_smem", 0),
            "insts": self.instructions,
            "tensor_total": self.tensor_total,
            "tensor_peeled": self.tensor_total - tensor_in_loops,
            "wgmma_serialised": self.wgmma_serialised,
            "loops": self.loop_count,
            "hot_loops": len(self.loops),
            "roles": self.roles,
        }


class _Analysis:
    """The hot loops of one kernel."""

    def __init__(self, code: Code, arch: int, threads: int):
        self.code, self.arch, self.threads = code, arch, threads
        self.model = SM_MODELS.get(arch) or SM_MODELS[max(known for known in SM_MODELS if known <= arch)]
        self.flow = ControlFlow(code)
        self.loops = self.flow.loops
        self.tensor = self._count(lambda i: is_tensor(i.opcode))
        self.exp2 = self._count(_is_exp2)
        self.copies = self._count(_is_copy)
        self.tensor_memory = self._count(lambda i: i.opcode in ("LDTM", "STTM"))
        self.register_limits = [
            (self._block_of(k), int(i.operands[-1], 16), "DEALLOC" in i.modifiers)
            for k, i in enumerate(code.instructions)
            if i.opcode == "USETMAXREG"
        ]
        self.detours = {header for header, loop in self.loops.items() if all(map(self._ends_loop, loop.latches))}

    def _count(self, test) -> dict[int, int]:
        return {h: sum(map(test, self.flow.instructions(loop.body))) for h, loop in self.loops.items()}

    def _block_of(self, index: int) -> int:
        return next(b for b, (start, end) in enumerate(self.flow.blocks) if start <= index < end)

    def _ends_loop(self, latch: int) -> bool:
        """Whether the block asks the warp for a round more of a condition that none of its lanes has."""
        votes = [i for i in self.flow.instructions({latch}) if (i.opcode, i.modifiers) == ("VOTE", ["ANY"])]
        return any(i.operands[1] == "!PT" for i in votes)

    def _nested(self, header: int) -> list[int]:
        return [g for g, loop in self.loops.items() if self.loops[header].holds(loop)]

    def role(self, header: int) -> str:
        """What the loop is for, and the register budget in force there (``mma@r240``)."""
        limit = self._limit(header)
        if self.tensor[header]:
            what = "mma"
        elif self.exp2[header] >= 4:
            what = "softmax"
        elif self.tensor_memory[header]:
            what = "correction"
        else:
            what = "load/store" if self.copies[header] else "other"
        return what + (f"@r{limit[1]}" if limit else "")

    def _limit(self, header: int) -> tuple[int, int] | None:
        """(block, registers) of the setmaxnreg that is in force in the loop."""
        limits = [(block, value) for block, value, _ in self.register_limits if self.flow.dominates(block, header)]
        return limits[-1] if limits else None

    def _registers_after(self, block: int) -> int:
        """Most registers that code behind the block uses."""
        return needed(self.flow.instructions({b for b in self.flow.idom if self.flow.dominates(block, b)}))

    def hot(self) -> list[int]:
        """Headers of the hot loops, in no order."""
        found = []
        for header, total in self.tensor.items():
            if header in self.detours:
                continue
            nested = [g for g in self._nested(header) if g not in self.detours]
            blocks: set[int] = set().union(*(self.loops[g].body for g in nested))
            inner = sum(is_tensor(i.opcode) for i in self.flow.instructions(blocks))
            own = total - inner
            # Also an outer loop that itself holds most of the tensor work around a small inner one.
            if total and (inner == 0 or own >= 2 * inner):
                found.append(header)
            elif not total and self.exp2[header] >= 4 and not any(self.exp2[g] for g in nested):
                found.append(header)
            elif not total and self.exp2[header] < 4 and (self.copies[header] or self.tensor_memory[header]):
                if not any(self.copies[g] or self.tensor_memory[g] for g in nested):
                    found.append(header)
        return found

    def report(self, header: int) -> LoopReport:
        loop = self.loops[header]
        spins = self._spins(loop)
        body = loop.body - spins
        always = {b for b in body if all(self.flow.dominates(b, latch) for latch in loop.latches)}
        instructions, conditional = self.flow.instructions(body), self.flow.instructions(body - always)
        usual = self.flow.instructions(always)
        role, limit = self.role(header), self._limit(header)
        scores, emulated, emulation = 0, 0, []
        if role.startswith("softmax"):
            emulated, emulation = emulated_exp2(usual)
            exponentials = emulated + sum(_is_exp2(i) for i in usual)
            scores = exponentials - exponentials % _SCORE_UNIT
        counts = _count_classes(instructions)
        shapes: Counter[str] = Counter()
        flops = unknown = 0
        tensor_cycles = smem_cycles = 0.0
        for i in instructions:
            if is_tensor(i.opcode):
                operation = tensor_operation(i.opcode, i.modifiers, i.operands, self._descriptor_shape(i))
                shapes[operation.label] += 1
                if operation.flops is None:
                    unknown += 1
                elif is_warpgroup_mma(i.opcode) or is_tcgen05(i.opcode):
                    flops += operation.flops
                    tensor_cycles += operation.flops / (self.model.flops * operation.rate)
                    smem_cycles += operation.smem_bytes / 128
                else:
                    flops += 4 * operation.flops
                    tensor_cycles += 4 * operation.flops / (self.model.flops * operation.rate * self.model.mma_share)
            else:
                smem_cycles += _shared_memory_cycles(i)
        return LoopReport(
            role=role,
            address=self.code.instructions[self.flow.blocks[header][0]].address,
            instructions=len(instructions),
            conditional=len(conditional),
            copying=sum(self._copying_length(block) for block in body - always),
            nested=sum(not self.loops[g].body <= spins for g in self._nested(header)),
            counts=counts,
            opcodes=Counter(i.opcode for i in instructions),
            shapes=shapes,
            flops=flops,
            unknown_mma=unknown,
            cycles=self._cycles(counts, len(instructions), tensor_cycles, smem_cycles),
            usual=self._cycles(_count_classes(usual), len(usual), tensor_cycles, smem_cycles),
            stall_sum=_stall_sum(instructions),
            conditional_stall=_stall_sum(conditional),
            sb_waits=sum(i.wait != 0 for i in instructions),
            warpgroups=max(1, self.threads // 128 - bool(self.register_limits)) if self.arch // 10 == 9 else None,
            registers=self._registers_after(limit[0]) if limit else None,
            register_limit=limit[1] if limit else None,
            scores=scores,
            emulated=emulated,
            emulation=len(emulation),
        )

    def _copying_length(self, block: int) -> int:
        """Instructions of the block if it issues asynchronous copies, else 0."""
        instructions = self.flow.instructions({block})
        return len(instructions) if any(map(_is_copy, instructions)) else 0

    def _spins(self, loop: Loop) -> set[int]:
        """Blocks of nested spin-waits on mbarriers or semaphores."""
        spins: set[int] = set()
        for g in self._nested(loop.header):
            body = self.loops[g].body
            instructions = self.flow.instructions(body)
            polls = any(classify(i.opcode, i.modifiers) in _POLLING for i in instructions)
            if polls and not self.tensor[g] and not self.exp2[g] and len(instructions) <= _SPIN_LENGTH:
                spins |= body
        return spins

    def _descriptor_shape(self, instruction: Instruction) -> tuple[int, int] | None:
        """(M, N) of a tcgen05 instruction: the nearest constant above it that feeds its idesc (a linear scan)."""
        register = re.search(r"idesc\[(UR\d+)\]", instruction.text)
        if not is_tcgen05(instruction.opcode) or not register:
            return None
        above = [i for i in self.code.instructions if i.address < instruction.address]
        for i in reversed(above):
            if i.opcode == "UMOV" and i.operands[0] == register[1] and i.operands[1].startswith("0x"):
                value = int(i.operands[1], 16)
                m, n = (value >> 24 & 31) * 16, (value >> 17 & 63) * 8
                if m in (64, 128, 256) and n:
                    return m, n
        return None

    def _cycles(self, counts: Counter[str], issued: int, tensor: float, smem: float) -> dict[str, float]:
        scalar = counts["ffma"] + counts["fadd"] + counts["fmul"] + counts["half"]
        packed = counts["ffma2"] + counts["fadd2"] + counts["fmul2"] + counts["imad"]
        return {
            "tc": tensor,
            "mufu": self.model.mufu * (counts["mufu_ex2"] + counts["mufu_other"]),
            "fma": self.model.fma * scalar + 2 * packed,
            "alu": 2 * sum(counts[name] for name in ALU_CLASSES),
            "issue": issued,
            "smem": smem,
        }


def _stall_sum(instructions: list[Instruction]) -> int:
    """Fixed stall counts of the non-tensor instructions."""
    return sum(max(1, i.stall) for i in instructions if not is_tensor(i.opcode))


def _is_copy(instruction: Instruction) -> bool:
    """Asynchronous copies: cp.async, TMA and bulk."""
    return instruction.opcode.startswith(("UTMALDG", "UTMASTG", "UTMAREDG", "LDGSTS", "UBLK"))


def _is_exp2(instruction: Instruction) -> bool:
    return instruction.opcode == "MUFU" and "EX2" in instruction.modifiers


def _count_classes(instructions: list[Instruction]) -> Counter[str]:
    return Counter(classify(i.opcode, i.modifiers) for i in instructions)


def _wgmma_serialised(code: Code) -> bool:
    """Whether all wgmma in flight are waited for after each one. A product of several leaves only its last one with a
    group barrier (gsb0) to wait for."""
    kinds = [
        "wgmma" if is_warpgroup_mma(i.opcode) else "wait"
        for i in code.instructions
        if is_warpgroup_mma(i.opcode)
        or (i.opcode, i.modifiers, i.operands[-1:]) == ("WARPGROUP", ["DEPBAR", "LE"], ["0x0"])
    ]
    return "wgmma" in kinds and all(b == "wait" for a, b in itertools.pairwise(kinds) if a == "wgmma")


def _shared_memory_cycles(instruction: Instruction) -> float:
    """Cycles that four warps' copies of this instruction occupy shared memory, at 128 bytes a clock. A shuffle goes
    through its crossbar at the same rate: 32 results a clock and SM (CUDA C++ Programming Guide, "Arithmetic
    Instructions", warp shuffle)."""
    if instruction.opcode == "SHFL":
        return 4
    kind = classify(instruction.opcode, instruction.modifiers)
    if kind not in _SHARED_MEMORY:
        return 0
    if kind in ("ldsm", "stsm"):
        matrices = next((m for m in instruction.modifiers if m in ("2", "4")), "1")
        width = 4 * int(matrices)
    else:
        width = {"64": 8, "128": 16}.get(next((m for m in instruction.modifiers if m in ("64", "128")), ""), 4)
    return 4 * 32 * width / 128


def _mark_main(loops: list[LoopReport]) -> None:
    """Marks each role's steady-state loop: the least instructions per unit of tensor work (or score) among the loops
    that do at least half as much of it as the largest; of softmax warps without conditional ones."""
    candidates = [loop for loop in loops if loop.work]
    for kind in {loop.role.split("@")[0] for loop in candidates}:
        same = [loop for loop in candidates if loop.role.startswith(kind)]
        largest = max(loop.work for loop in same)
        steady = (loop for loop in same if loop.work >= 0.5 * largest)
        min(steady, key=lambda loop: (loop.instructions - loop.conditional * bool(loop.scores)) / loop.work).main = True


def report_code(kernel: str, code: Code, arch: int, resources: dict[str, int]) -> KernelReport:
    """The report of one disassembled kernel for compute capability ``arch`` (80, 90 …)."""
    analysis = _Analysis(code, arch, resources.get("threads", 128))
    loops = sorted(map(analysis.report, analysis.hot()), key=lambda loop: loop.address)
    _mark_main(loops)
    named = [h for h in analysis.loops if analysis.tensor[h] or analysis.exp2[h] >= 4 or analysis.copies[h]]
    return KernelReport(
        kernel=kernel,
        arch=arch,
        resources=resources,
        setmaxnreg=" ".join(("-" if lowers else "+") + str(value) for _, value, lowers in analysis.register_limits),
        spill_loads=sum(i.opcode == "LDL" for i in code.instructions),
        spill_stores=sum(i.opcode == "STL" for i in code.instructions),
        instructions=len(code.instructions),
        tensor_total=sum(is_tensor(i.opcode) for i in code.instructions),
        wgmma_serialised=_wgmma_serialised(code),
        loop_count=len(analysis.loops),
        roles=" ".join(sorted({analysis.role(h) for h in named})),
        loops=loops,
    )


def report_cubin(cubin: bytes) -> list[KernelReport]:
    """One report for every kernel of the cubin, in its order. Needs nvdisasm."""
    resources = kernel_resources(cubin)
    arch, kernels = disassemble(cubin)
    return [report_code(name, code, arch, resources.get(name, {})) for name, code in kernels.items()]


def add_per_score(report: KernelReport, head_dim: int, head_dim_v: int | None = None, backward: bool = False) -> None:
    """Fills ``per_score``, ``cond_per_score`` and ``copy_per_score``: the loop's non-tensor instructions per thread and
    element of S without conditional blocks, of those alone, and of those among them that copy the next tiles;
    ``net_per_score``: ``per_score`` without what emulates exponentials; ``pipe_per_score``: cycles, without conditional
    blocks, of the busiest of MUFU, FMA pipe and issue.

    Unlike instructions per exp2 this does not move when exp2 is computed on another pipe. Elements of S per thread
    follow from the loop's flops: 2(d + dv) per element forward, 2(3d + 2dv) backward; of softmax warps they are its
    ``scores``.
    """
    dv = head_dim_v or head_dim
    _per_score(report.loops, 2 * (3 * head_dim + 2 * dv) if backward else 2 * (head_dim + dv))


def attention_report(cubins: list[bytes], head_dim: int, head_dim_v: int, backward: bool) -> KernelReport:
    """Of the kernels that one call launches, the one whose main loop does most of the tensor work, with what
    :func:`add_per_score` fills: before and after a backward's run smaller ones. Where dQ has a kernel of its own, both
    (:func:`split_backward_report`). ValueError without any loop with tensor-core instructions."""
    reports = [report for cubin in cubins for report in report_cubin(cubin) if report.main_loop]
    if not reports:
        raise ValueError("no loop with tensor-core instructions")
    *others, report = sorted(reports, key=lambda report: report.main_loop.flops)
    if others:
        return split_backward_report(*others, report, head_dim, head_dim_v)
    add_per_score(report, head_dim, head_dim_v, backward)
    return report


def split_backward_report(keys: KernelReport, queries: KernelReport, head_dim: int, head_dim_v: int) -> KernelReport:
    """A backward whose dQ has a kernel of its own as one report: of ``queries``, the kernel for dQ, with all loops,
    spills and what :func:`add_per_score` fills in its main loop summed over the loops that meet a score: that one, and
    in ``keys`` that of the warpgroup of dV, which computes exponentials, and that of dK. Of loops alike the one without
    masks counts, known by its fewest comparisons: at head_dim 256 dQ's has 40 more uniform instructions and moves than
    the masked one, and is not the leanest."""
    _per_score(queries.loops, 2 * (2 * head_dim + head_dim_v))
    _per_score(keys.loops, 2 * (head_dim + head_dim_v))

    def unmasked(report: KernelReport, exponentials: bool) -> LoopReport:
        alike = (loop for loop in report.loops if loop.flops and bool(loop.counts["mufu_ex2"]) == exponentials)
        return min(alike, key=lambda loop: loop.counts["int_alu"])

    parts = unmasked(queries, True), unmasked(keys, True), unmasked(keys, False)
    figures = ("per_score", "cond_per_score", "copy_per_score", "net_per_score", "pipe_per_score")
    sums = {name: round(sum(getattr(loop, name) for loop in parts), 2) for name in figures}
    main = dataclasses.replace(parts[0], main=True, **sums)
    rest = [dataclasses.replace(loop, main=False) for loop in (*queries.loops, *keys.loops) if loop is not parts[0]]
    return dataclasses.replace(
        queries,
        spill_loads=queries.spill_loads + keys.spill_loads,
        spill_stores=queries.spill_stores + keys.spill_stores,
        wgmma_serialised=queries.wgmma_serialised or keys.wgmma_serialised,
        loops=[main, *rest],
    )


def _per_score(loops: list[LoopReport], flops: int) -> None:
    """``flops``: of the loops' tensor work for an element of S."""
    for loop in loops:
        elements = loop.scores or loop.mflop * 1e6 / flops / 128
        if elements:
            plain = loop.instructions - loop.counts["tensor"] - loop.conditional
            loop.per_score = round(plain / elements, 2)
            loop.cond_per_score = round(loop.conditional / elements, 2)
            loop.copy_per_score = round(loop.copying / elements, 2)
            loop.net_per_score = round((plain - loop.emulation) / elements, 2)
            loop.pipe_per_score = round(max(loop.usual[name] for name in ("mufu", "fma", "issue")) / elements, 2)
