"""Warp-level communication: PTX ISA 9.7.9 shfl.sync, 9.7.13 vote.sync, match.sync, activemask, redux.sync, elect.sync,
bar.warp.sync."""

from __future__ import annotations

from .forms import KIND, form


def _members(gen, token):
    """Check that the lanes of the membermask are the ones that execute."""
    gen.emit(f"X.warps.require_members(w, M, {gen.read(token, 'u4')})")


@form("shfl.sync.{mode}.b32", effect=True, mode="up|down|bfly|idx")
def shuffle(gen, args, mods):
    """d|p = the value of another lane of the segment and whether that lane was in range."""
    _members(gen, args[4])
    operands = ", ".join(gen.read(x, "u4") for x in args[1:4])
    result = gen.temp(f"X.warps.shuffle(w, {mods.mode!r}, {operands})")
    destinations = args[0].split("|")
    gen.write(destinations[0], f"{result}[0]", "u4")
    if len(destinations) > 1:
        gen.write(destinations[1], f"{result}[1]", "b")


@form("elect.sync", effect=True)
def elect(gen, args, mods):
    """d|p = the leader (the lowest lane) and whether this lane is it."""
    _members(gen, args[1])
    destinations = args[0].split("|")
    result = gen.temp("X.warps.elect(w, M)")
    gen.write(destinations[0], f"{result}[0]", "u4")
    gen.write(destinations[1], f"{result}[1]", "b")


@form("vote.sync.{mode}.pred", effect=True, mode="all|any|uni")
@form("vote.sync.{mode}.b32", effect=True, mode="ballot")
def vote(gen, args, mods):
    _members(gen, args[2])
    kind = "u4" if mods.mode == "ballot" else "b"
    gen.write(args[0], f"X.warps.vote(w, {mods.mode!r}, {gen.predicate(args[1])}, M)", kind)


@form("activemask.b32", effect=True)
def active_mask(gen, args, mods):
    gen.write(args[0], f"X.warps.vote(w, 'ballot', np.True_, {gen.mask()})", "u4")


@form("match.{mode}.sync.{type}", effect=True, mode="any", type="b32|b64")
@form("match.{mode}.sync.{type}", effect=True, mode="all", type="b32|b64")
def match(gen, args, mods):
    """any: lanes with an equal value. all: d|p = all lanes of the mask if every value is equal, else 0."""
    _members(gen, args[2])
    destinations = args[0].split("|")
    result = gen.temp(f"X.warps.match_any(w, {gen.read(args[1], KIND[mods.type])}, M)")
    if mods.mode == "all":
        equal = gen.temp(f"({result} == X.warps.vote(w, 'ballot', np.True_, M))")
        result = f"np.where({equal}, {result}, u4(0))"
        if len(destinations) > 1:
            gen.write(destinations[1], equal, "b")
    gen.write(destinations[0], result, "u4")


@form("redux.sync.{op}.{type}", effect=True, op="add|min|max", type="u32|s32")
@form("redux.sync.{op}.{type}", effect=True, op="and|or|xor", type="b32")
@form("redux.sync.{op}[.{abs}][.{nan}].{type}", effect=True, op="min|max", abs="abs", type="f32")
def reduce(gen, args, mods):
    _members(gen, args[2])
    kind = KIND[mods.type]
    value = gen.read(args[1], kind)
    if getattr(mods, "abs", None):
        value = f"np.abs({value})"
    gen.write(args[0], f"X.warps.reduce(w, {mods.op!r}, {value}, M, {bool(getattr(mods, 'nan', None))})", kind)


@form("bar.warp.sync", writes=False, effect=True)
def warp_barrier(gen, args, mods):
    """Lanes of a warp run in step, so that arriving together is all there is to do."""
    _members(gen, args[0])
    gen.tell("warp_barrier", "w")
