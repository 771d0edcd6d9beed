"""Barriers: PTX ISA 9.7.13.1 (bar, barrier), 9.7.13.3 (barrier.cluster), 9.7.13.15 (mbarrier).

Those that may suspend a warp are run by the part and method of the machine that ``suspending`` names.
"""

from __future__ import annotations

from .forms import form, suspending
from .instruction import Mem

_SPACE = "shared|shared::cta|shared::cluster"
_SEM = dict(sem="release|relaxed", scope="cta|cluster")

suspending("bar[.cta].{mode}", "named_barriers.bar", mode="sync|arrive")
suspending("barrier[.cta].{mode}[.aligned]", "named_barriers.bar", mode="sync|arrive")
suspending("bar[.cta].red.{op}.{type}", "named_barriers.reduce", op="and|or", type="pred")
suspending("bar[.cta].red.{op}.{type}", "named_barriers.reduce", op="popc", type="u32")
suspending("barrier[.cta].red.{op}[.aligned].{type}", "named_barriers.reduce", op="and|or", type="pred")
suspending("barrier[.cta].red.{op}[.aligned].{type}", "named_barriers.reduce", op="popc", type="u32")
suspending("barrier.cluster.{mode}[.{sem}][.aligned]", "cluster_barriers.barrier", mode="arrive", sem="release|relaxed")
suspending("barrier.cluster.{mode}[.{sem}][.aligned]", "cluster_barriers.barrier", mode="wait", sem="acquire")
suspending("mbarrier.try_wait[.{sem}][.{scope}][.{space}].b64", "mbarriers.try_wait", sem="acquire|relaxed",
           scope="cta|cluster", space="shared|shared::cta")  # fmt: skip
suspending("mbarrier.try_wait.{parity}[.{sem}][.{scope}][.{space}].b64", "mbarriers.try_wait", parity="parity",
           sem="acquire|relaxed", scope="cta|cluster", space="shared|shared::cta")  # fmt: skip


@form("mbarrier.init[.{space}].b64", writes=False, effect=True, space="shared|shared::cta")
def initialise(gen, args, mods):
    gen.emit(f"X.mbarriers.initialise(w, {gen.address(args[0])}, {gen.read(args[1], 'u4')}, {gen.mask()})")


@form("mbarrier.inval[.{space}].b64", writes=False, effect=True, space="shared|shared::cta")
def invalidate(gen, args, mods):
    gen.emit(f"X.mbarriers.invalidate(w, {gen.address(args[0])}, {gen.mask()})")


@form("mbarrier.expect_tx[.relaxed][.{scope}][.{space}].b64", writes=False, effect=True, scope="cta|cluster",
      space=_SPACE)  # fmt: skip
@form("mbarrier.complete_tx[.relaxed][.{scope}][.{space}].b64", writes=False, effect=True, scope="cta|cluster",
      space=_SPACE)  # fmt: skip
def change_tx(gen, args, mods):
    operation = gen.instr.parts[1]
    gen.emit(f"X.mbarriers.change(w, {operation!r}, {gen.address(args[0])}, {gen.read(args[1], 'u4')}, {gen.mask()})")


@form("mbarrier.{op}[.{tx}][.{sem}][.{scope}][.{space}].b64", effect=True, op="arrive|arrive_drop", tx="expect_tx",
      space=_SPACE, **_SEM)  # fmt: skip
def arrive(gen, args, mods):
    """{state,} [barrier] {, count or tx-count}; the state is the barrier's before the arrival."""
    state, rest = (None, args) if isinstance(args[0], Mem) else (args[0], args[1:])
    count = gen.read(rest[1], "u4") if len(rest) > 1 else "u4(1)"
    operation = mods.op + ("_tx" if mods.tx else "")
    call = f"X.mbarriers.change(w, {operation!r}, {gen.address(rest[0])}, {count}, {gen.mask()})"
    if state in (None, "_"):
        gen.emit(call)
    else:
        gen.write(state, call, "u8")


@form("mbarrier.test_wait[.{sem}][.{scope}][.{space}].b64", effect=True, sem="acquire|relaxed", scope="cta|cluster",
      space="shared|shared::cta")  # fmt: skip
@form("mbarrier.test_wait.{parity}[.{sem}][.{scope}][.{space}].b64", effect=True, parity="parity",
      sem="acquire|relaxed", scope="cta|cluster", space="shared|shared::cta")  # fmt: skip
def test_wait(gen, args, mods):
    parity = bool(getattr(mods, "parity", None))
    wanted = gen.read(args[2], "u4" if parity else "u8")
    gen.write(args[0], f"X.mbarriers.test(w, {gen.address(args[1])}, {wanted}, {parity}, {gen.mask()})", "b")


@form("mbarrier.pending_count.b64")
def pending_count(gen, args, mods):
    gen.write(args[0], f"(({gen.read(args[1], 'u8')} >> 22) & 0xfffff).astype(u4)", "u4")
