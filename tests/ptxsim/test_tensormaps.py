"""Tensor maps changed on the device (PTX ISA 9.7.9.28 tensormap.replace, 9.7.13.16 tensormap.cp_fenceproxy)."""

from __future__ import annotations

import numpy as np
import pytest

from ptxsim.errors import MemoryFault, ProxyError, PtxError, UninitializedRead
from ptxsim.machine import tensor_maps
from tests.testing.ptx import aligned, run

ONE = "setp.ne.u32 %p1, %t, 0; @%p1 bra END; {} END:"
FROM = dict(dtype=1, rank=3, address=1 << 30, extents=(64, 40, 3), strides=(4096, 1 << 20), box=(16, 8, 1),
            element_strides=(1, 1, 1), interleave=0, swizzle_mode=1, fill=0)  # fmt: skip
TO = dict(dtype=7, rank=5, address=(5 << 40) + 96, extents=(8, 3000000000, 7, 9, 11),
          strides=(48, 1 << 37, (3 << 36) + 32, 16), box=(8, 256, 2, 3, 4), element_strides=(1,) * 5, interleave=0,
          swizzle_mode=3, fill=0)  # fmt: skip


def replacements(options, space="global", address="%out0"):
    """tensormap.replace of every field, by registers and by immediates."""
    text = ""

    def replace(field, value, dimension=None, wide=False):
        nonlocal text
        register, kind = ("%rd9", "b64") if wide else ("%r9", "b32")
        place = f"{address}], " + ("" if dimension is None else f"{dimension}, ")
        immediate = field in ("rank", "elemtype", "swizzle_mode", "interleave_layout", "fill_mode")
        text += "" if immediate else f"mov.{kind} {register}, {value};"
        text += f"tensormap.replace.tile.{field}.{space}.b1024.{kind} [{place}{value if immediate else register};"

    replace("global_address", options["address"], wide=True)
    replace("rank", options["rank"] - 1)
    replace("elemtype", options["dtype"])
    for name, field in (("extents", "global_dim"), ("box", "box_dim"), ("element_strides", "element_stride")):
        for dimension, value in enumerate(options[name]):
            replace(field, value, dimension)
    for dimension, value in enumerate(options["strides"]):
        replace("global_stride", value, dimension, wide=True)
    for field, name in (("swizzle_mode",) * 2, ("interleave_layout", "interleave"), ("fill_mode", "fill")):
        replace(field, options[name])
    return text


def test_atom_of_the_swizzle():
    """.swizzle_atomicity counts as table 33 of the ISA does, the driver's modes 4 and 6 as CUtensorMapSwizzle does."""
    for value, mode in ((1, 4), (3, 6), (0, 3)):
        text = f"tensormap.replace.tile.swizzle_atomicity.global.b1024.b32 [%out0], {value};"
        got = run(ONE.format(text), [], [np.frombuffer(tensor_maps.encode(**TO), np.uint8)])
        assert got.tobytes() == tensor_maps.encode(**TO | dict(swizzle_mode=mode))


@pytest.mark.parametrize(("old", "new"), [(FROM, TO), (TO, FROM | dict(dtype=6))])
def test_every_field(old, new):
    """A map with every field replaced reads as one that was encoded so."""
    got = run(ONE.format(replacements(new)), [], [np.frombuffer(tensor_maps.encode(**old), np.uint8)])
    assert tensor_maps.decode(got.tobytes()) == tensor_maps.decode(tensor_maps.encode(**new))


SHARED = ".shared .align 1024 .b8 buffer[2048]; .shared .align 128 .b8 map[128]; .shared .align 8 .b64 bar;"
COPY = """mov.u32 %r50, buffer; mov.u32 %r52, bar; mov.u32 %r54, map; setp.eq.u32 %p10, %t, 0;
    @%p10 mbarrier.init.shared.b64 [%r52], 1; fence.mbarrier_init.release.cluster;
    setp.lt.u32 %p2, %t, 8; mul.wide.u32 %rd1, %t, 16; shl.b32 %r1, %t, 4;
    add.s64 %rd2, %in0, %rd1; add.u32 %r55, %r54, %r1; @!%p2 bra COPIED; ld.global.v4.u32 {%r2, %r3, %r4, %r5}, [%rd2];
    st.shared.v4.u32 [%r55], {%r2, %r3, %r4, %r5};
  COPIED: bar.sync 0; @!%p10 bra REPLACED;"""
USE = """
  REPLACED: bar.sync 0;
    tensormap.cp_fenceproxy.global.shared::cta.tensormap::generic.release.gpu.sync.aligned [%out1], [%r54], 128;
    FENCE
    @%p10 mbarrier.arrive.expect_tx.shared.b64 _, [%r52], 512;
    @%p10 cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%r50], [%out1, {4, 2}],
      [%r52];
  W: mbarrier.try_wait.parity.shared.b64 %p11, [%r52], 0; @!%p11 bra W; add.u32 %r56, %r50, %r1;
    ld.shared.v4.u32 {%r2, %r3, %r4, %r5}, [%r56]; add.s64 %rd3, %out0, %rd1;
    st.global.v4.u32 [%rd3], {%r2, %r3, %r4, %r5};"""
FENCE = "fence.proxy.tensormap::generic.acquire.gpu [%out1], 128;"


def load_through_a_new_map(fence=FENCE, copied="8", **options):
    """The map of one array, changed in shared memory to that of another, copied to global memory, and used."""
    rng = np.random.default_rng(0)
    old, new = aligned(np.zeros((8, 8), np.uint32)), aligned(rng.integers(1, 2**16, (40, 32)).astype(np.uint16))
    numbers = dict(dtype=1, rank=2, address=new.ctypes.data, extents=(32, 40), strides=(64,), box=(16, 16),
                   element_strides=(1, 1), interleave=0, swizzle_mode=0, fill=0)  # fmt: skip
    template = tensor_maps.encode(2, 2, old.ctypes.data, (8, 8), (32,), (8, 8), (1, 1), 0, 1, 0)
    copy = COPY.replace("%t, 8;", f"%t, {copied};")  # pieces of 16 bytes
    body = copy + replacements(numbers, "shared::cta", "%r54") + USE.replace("FENCE", fence)
    outputs = [np.zeros(512, np.uint8), np.zeros(128, np.uint8)]
    got, written = run(
        body, [np.frombuffer(template, np.uint8)], outputs, legal=[old, new], declarations=SHARED, **options
    )
    assert tensor_maps.decode(written.tobytes()) == tensor_maps.decode(tensor_maps.encode(**numbers))
    return got.view(np.uint16).reshape(16, 16), new[2:18, 4:20]


@pytest.mark.parametrize(("late", "seed", "race"), [(False, None, False), (True, 1, False), (False, None, True)])
def test_a_map_made_in_shared_memory(late, seed, race):
    got, expected = load_through_a_new_map(late=late, seed=seed, race=race)
    np.testing.assert_array_equal(got, expected)


def test_a_map_of_which_half_is_written():
    """The DSL's grouped GEMMs copy 64 bytes, which is what the hardware uses; less does not do."""
    got, expected = load_through_a_new_map(copied="4")
    np.testing.assert_array_equal(got, expected)
    with pytest.raises(UninitializedRead):
        load_through_a_new_map(copied="2")


def test_a_map_without_its_fence():
    with pytest.raises(ProxyError, match=r"no fence\.proxy\.tensormap"):
        load_through_a_new_map(fence="", race=True)


@pytest.mark.parametrize(
    ("instruction", "message"),
    [
        ("global_address.global.b1024.b64 [%out0], 24", "global_address 24 is not a multiple of 16"),
        ("global_stride.global.b1024.b64 [%out0], 0, 24", "global_stride 24 is not a multiple of 16"),
        ("global_stride.global.b1024.b64 [%out0], 4, 32", "dimension 4 of global_stride"),
        ("box_dim.global.b1024.b32 [%out0], 1, 257", r"box_dim 257 is not in 1\.\.256"),
        ("global_dim.global.b1024.b32 [%out0], 1, 0", r"global_dim 0 is not in 1\.\."),
        ("rank.global.b1024.b32 [%out0], 5", r"rank 5 is not in 0\.\.4"),
        ("swizzle_mode.global.b1024.b32 [%out0], 4", "swizzle_mode 4"),
        ("swizzle_atomicity.global.b1024.b32 [%out0], 4", "swizzle_atomicity 4"),
        ("interleave_layout.global.b1024.b32 [%out0], 1", "interleave_layout 1 is not in .* not simulated"),
    ],
)
def test_values_that_no_map_may_have(instruction, message):
    with pytest.raises(PtxError, match=message) as caught:
        run(f"tensormap.replace.tile.{instruction};", [], [np.frombuffer(tensor_maps.encode(**FROM), np.uint8)])
    assert "tensormap.replace" in caught.value.text


def test_a_misaligned_map():
    with pytest.raises(MemoryFault, match="not aligned to 64"):
        run("tensormap.replace.tile.rank.global.b1024.b32 [%out0+16], 1;", [], [np.zeros(256, np.uint8)])
