"""Cluster launch control: PTX ISA 9.7.13.17 (clusterlaunchcontrol), and the 128-bit registers that its answers take.

A CTA asks to take over a cluster that has not been launched yet. The answer, 16 opaque bytes, is here: 1 or 0, then the
coordinates of the cluster's first CTA.
"""

from __future__ import annotations

import numpy as np

from .forms import as_list, form

_CANCEL = "clusterlaunchcontrol.try_cancel.async[.shared::cta].mbarrier::complete_tx::bytes"


@form(f"{_CANCEL}[.{{multicast}}].b128", writes=False, effect=True, multicast="multicast::cluster::all")
def try_cancel(gen, args, mods):
    """[answer], [mbarrier]."""
    gen.emit(
        f"X.launch_control.try_cancel(w, {gen.address(args[0])}, {gen.address(args[1])}, "
        f"{bool(mods.multicast)}, {gen.mask()})"
    )


def words(answer):
    """128-bit values as uint32 [..., 4]."""
    return np.ascontiguousarray(answer).view(np.uint32).reshape(*np.shape(answer), 4)


def is_canceled(answer):
    return words(answer)[..., 0] != 0


def first_cta(answer):
    """Coordinates x, y, z and a zero; all ones where the request was turned down.

    That is undefined, but the DSL asks always, and drops what it gets unless the request was granted.
    """
    parts = np.where(words(answer)[..., :1] == 0, np.uint32(0xFFFFFFFF), words(answer))
    return [parts[..., 1], parts[..., 2], parts[..., 3], np.zeros_like(parts[..., 0])]


@form("clusterlaunchcontrol.query_cancel.is_canceled.pred.b128")
def query_canceled(gen, args, mods):
    gen.write(args[0], f"{gen.fn(is_canceled)}({gen.read(args[1], 'c16')})", "b")


@form("clusterlaunchcontrol.query_cancel.get_first_ctaid.v4.b32.b128")
@form("clusterlaunchcontrol.query_cancel.get_first_ctaid::{axis}.b32.b128", axis="x|y|z")
def query_first_cta(gen, args, mods):
    axis = getattr(mods, "axis", None)
    result = gen.temp(f"{gen.fn(first_cta)}({gen.read(args[1], 'c16')})")
    for register, j in zip(as_list(args[0]), range(4) if axis is None else ["xyz".index(axis)], strict=True):
        if register != "_":
            gen.write(register, f"{result}[{j}]", "u4")


def join(*parts):
    """uint32 or uint64 parts, lowest first, as 128-bit values."""
    parts = np.broadcast_arrays(*parts)
    return np.stack(parts, axis=-1).view(np.complex128)[..., 0]


@form("ld.{space}.b128", effect=True, space="shared|shared::cta")
def load_128(gen, args, mods):
    loaded = gen.temp(f"X.shared.load(w, {gen.address(args[1])}, u4, 4, {gen.mask()})")
    gen.write(args[0], f"{gen.fn(join)}(*{loaded})", "c16")


@form("mov.b128")
def move_128(gen, args, mods):
    """Two 64-bit registers to one of 128 bits, or back."""
    if isinstance(args[0], list):
        halves = gen.temp(f"{gen.fn(np.ascontiguousarray)}({gen.read(args[1], 'c16')}).view(u8)")
        for j, register in enumerate(args[0]):
            gen.write(register, f"{halves}[..., {j}::2]", "u8")
    else:
        parts = ", ".join(gen.read(x, "u8") for x in args[1])
        gen.write(args[0], f"{gen.fn(join)}({parts})", "c16")
