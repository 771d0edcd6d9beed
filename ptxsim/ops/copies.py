"""Asynchronous copies: PTX ISA 9.7.9.25 (cp.async, cp.async.bulk, cp.reduce.async.bulk and their groups) and 9.7.9.27
(tensor copies).

Cache hints and prefetch sizes have no functional meaning. In the late mode a copy happens as late as it legally may:
see ``ptxsim.machine.copies``.
"""

from __future__ import annotations

from ..errors import PtxError
from .forms import as_list, form, suspending

_SHARED_CTA = "shared|shared::cta"
_DESTINATION = "shared::cluster|shared::cta"
_HINT = dict(hint="L2::cache_hint")
_BULK_OPS = "add|min|max|and|or|xor"


# ---- cp.async -------------------------------------------------------------------------------------
@form("cp.async.{cop}.{space}.global[.{hint}][.{prefetch}]", writes=False, effect=True, cop="ca|cg", space=_SHARED_CTA,
      prefetch="L2::64B|L2::128B|L2::256B", **_HINT)  # fmt: skip
def copy_async(gen, args, mods):
    """[dst], [src], size {, source size or ignore predicate} {, policy}: bytes beyond the source size become zero."""
    size, rest = int(args[2], 0), list(args[3:])
    if size not in ((16,) if mods.cop == "cg" else (4, 8, 16)):
        raise PtxError(f"cp.async.{mods.cop} of {size} bytes")
    if mods.hint:
        rest.pop()
    source_size = "None"
    if rest and gen.kernel.regtype(rest[0].lstrip("!")) == "pred":
        source_size = f"np.where({gen.predicate(rest[0])}, u4(0), u4({size}))"
    elif rest:
        source_size = gen.read(rest[0], "u4")
    gen.emit(f"X.cp_async.copy(w, {gen.address(args[0])}, {gen.address(args[1])}, {size}, {source_size}, {gen.mask()})")


suspending("cp.async.commit_group", "cp_async.commit")
suspending("cp.async.wait_group", "cp_async.wait")
suspending("cp.async.wait_all", "cp_async.wait")
suspending("cp.async.bulk.commit_group", "bulk_groups.commit")
suspending("cp.async.bulk.wait_group[.{read}]", "bulk_groups.wait", read="read")


@form("cp.async.mbarrier.arrive[.{noinc}][.{space}].b64", writes=False, effect=True, noinc="noinc", space=_SHARED_CTA)
def copy_async_arrive(gen, args, mods):
    gen.emit(f"X.cp_async.arrive(w, {gen.address(args[0])}, {bool(mods.noinc)}, {gen.mask()})")


# ---- cp.async.bulk --------------------------------------------------------------------------------
_TO_SHARED = "mbarrier::complete_tx::bytes[.{multicast}][.{hint}]"


@form(f"cp.async.bulk.{{space}}.global.{_TO_SHARED}", writes=False, effect=True, space=_DESTINATION,
      multicast="multicast::cluster", **_HINT)  # fmt: skip
def bulk_load(gen, args, mods):
    multicast = gen.read(args[4], "u2") if mods.multicast else "None"
    gen.emit(
        f"X.bulk_copies.load(w, {gen.address(args[0])}, {gen.address(args[1])}, {gen.read(args[2], 'u4')}, "
        f"{gen.address(args[3])}, {multicast}, {gen.mask()})"
    )


@form("cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes", writes=False, effect=True)
def bulk_shared_to_shared(gen, args, mods):
    gen.emit(
        f"X.bulk_copies.between(w, {gen.address(args[0])}, {gen.address(args[1])}, {gen.read(args[2], 'u4')}, "
        f"{gen.address(args[3])}, {gen.mask()})"
    )


@form("cp.async.bulk.global.shared::cta.bulk_group[.{hint}]", writes=False, effect=True, **_HINT)
@form("cp.reduce.async.bulk.global.shared::cta.bulk_group[.{hint}].{op}.{type}", writes=False, effect=True, op="add",
      type="u32|s32|u64|f32|f64", **_HINT)  # fmt: skip
@form(
    "cp.reduce.async.bulk.global.shared::cta.bulk_group[.{hint}].{op}.{type}",
    writes=False,
    effect=True,
    op="min|max",
    type="u32|s32|u64|s64|f16|bf16",
    **_HINT,
)
@form("cp.reduce.async.bulk.global.shared::cta.bulk_group[.{hint}].{op}.noftz.{type}", writes=False, effect=True,
      op="add", type="f16|bf16", **_HINT)  # fmt: skip
@form("cp.reduce.async.bulk.global.shared::cta.bulk_group[.{hint}].{op}.{type}", writes=False, effect=True,
      op="and|or|xor", type="b32|b64", **_HINT)  # fmt: skip
def bulk_store(gen, args, mods):
    reduction = (mods.op, mods.type) if getattr(mods, "op", None) else None
    gen.emit(
        f"X.bulk_copies.store(w, {gen.address(args[0])}, {gen.address(args[1])}, {gen.read(args[2], 'u4')}, "
        f"{reduction!r}, {gen.mask()})"
    )


# ---- cp.async.bulk.tensor -------------------------------------------------------------------------
def _tensor(gen, operand, rank):
    """[map, {coordinates}] -> expressions for the address of the map and the coordinates."""
    coordinates = as_list(operand.coords)
    if len(coordinates) != int(rank):
        raise PtxError(f"{len(coordinates)} coordinates for a tensor of rank {rank}")
    return gen.address(operand), "(" + ", ".join(gen.read(x, "i4") for x in coordinates) + ",)"


@form(
    "cp.async.bulk.tensor.{rank}d.{space}.global[.tile].mbarrier::complete_tx::bytes[.{multicast}][.{group}][.{hint}]",
    writes=False,
    effect=True,
    rank="1|2|3|4|5",
    space=_DESTINATION,
    multicast="multicast::cluster",
    group="cta_group::1|cta_group::2",
    **_HINT,
)
@form("cp.async.bulk.tensor.{rank}d.{space}.global[.tile].mbarrier::complete_tx::bytes[.{multicast}].{hint}.{group}",
      writes=False, effect=True, rank="1|2|3|4|5", space=_DESTINATION, multicast="multicast::cluster",
      group="cta_group::1|cta_group::2", **_HINT)  # fmt: skip
def tensor_load(gen, args, mods):
    address, coordinates = _tensor(gen, args[1], mods.rank)
    multicast = gen.read(args[3], "u2") if mods.multicast else "None"
    gen.emit(
        f"X.tensor_copies.load(w, {gen.address(args[0])}, {address}, {coordinates}, {gen.address(args[2])}, "
        f"{multicast}, {gen.mask()}, {mods.group == 'cta_group::2'})"
    )


@form("cp.async.bulk.tensor.{rank}d.global.shared::cta[.tile].bulk_group[.{hint}]", writes=False, effect=True,
      rank="1|2|3|4|5", **_HINT)  # fmt: skip
@form(
    "cp.reduce.async.bulk.tensor.{rank}d.global.shared::cta.{op}[.tile].bulk_group[.{hint}]",
    writes=False,
    effect=True,
    rank="1|2|3|4|5",
    op=_BULK_OPS,
    **_HINT,
)
def tensor_store(gen, args, mods):
    address, coordinates = _tensor(gen, args[0], mods.rank)
    gen.emit(
        f"X.tensor_copies.store(w, {address}, {coordinates}, {gen.address(args[1])}, {getattr(mods, 'op', None)!r}, "
        f"{gen.mask()})"
    )


@form("cp.async.bulk.prefetch.tensor.{rank}d.L2.global[.tile][.{hint}]", writes=False, rank="1|2|3|4|5", **_HINT)
@form("cp.async.bulk.prefetch.L2.global[.{hint}]", writes=False, **_HINT)
def prefetch(gen, args, mods):
    """No functional meaning."""
