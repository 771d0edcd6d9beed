"""Tensor maps changed on the device: PTX ISA 9.7.9.28 (tensormap.replace) and 9.7.13.16 (tensormap.cp_fenceproxy)."""

from __future__ import annotations

from .forms import form

_SPACE = "global|shared::cta"


@form("tensormap.replace.tile.{field}.{space}.b1024.b64", writes=False, effect=True, space=_SPACE,
      field="global_address|global_stride")  # fmt: skip
@form("tensormap.replace.tile.{field}.{space}.b1024.b32", writes=False, effect=True, space=_SPACE,
      field="rank|global_dim|box_dim|element_stride|elemtype|interleave_layout|swizzle_mode|swizzle_atomicity|"
            "fill_mode")  # fmt: skip
def replace(gen, args, mods):
    """[map] {, dimension}, new value."""
    dimension = int(args[1], 0) if len(args) == 3 else 0
    value = gen.read(args[-1], "u8" if mods.field in ("global_address", "global_stride") else "u4")
    shared = mods.space != "global"
    gen.emit(
        f"X.tensor_map_changes.replace(w, {gen.address(args[0])}, {shared}, {mods.field!r}, {dimension}, "
        f"{value}, {gen.mask()})"
    )


@form("tensormap.cp_fenceproxy.global.shared::cta.tensormap::generic.release.{scope}.sync.aligned", writes=False,
      effect=True)  # fmt: skip
def copy_and_fence(gen, args, mods):
    """[destination], [source], 128, by a whole warp."""
    gen.emit(f"X.tensor_map_changes.copy(w, {gen.address(args[0])}, {gen.address(args[1])}, {gen.mask()})")
