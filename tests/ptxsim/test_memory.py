"""Loads, stores, spaces, guards, atomics, and what raises (PTX ISA 9.7.9 ld, st, cvta, isspacep; 9.7.13 atom, red)."""

from __future__ import annotations

import numpy as np
import pytest

from ptxsim.errors import MemoryFault, UninitializedRead
from tests.testing.ptx import aligned, kernel_text, launch, run, same_bits

SHARED = ".shared .align 128 .b8 buffer[4096];"
ADDRESS = "mul.lo.u32 %r1, %t, {size}; cvt.u64.u32 %rd1, %r1; add.s64 %rd2, %in0, %rd1; add.s64 %rd3, %out0, %rd1;"
SHARED_ADDRESS = "mov.u32 %r2, buffer; add.u32 %r2, %r2, %r1;"


def random_bytes(count, dtype=np.uint8, seed=0):
    return np.random.default_rng(seed).integers(0, 256, count, dtype=np.uint8).view(dtype)


@pytest.mark.parametrize(
    ("vector", "kind", "size"),
    [
        ("", "b32", 4),
        ("", "b64", 8),
        (".v2", "b32", 8),
        (".v4", "b32", 16),
        (".v2", "b64", 16),
        (".v4", "b16", 8),
        ("", "b8", 1),
    ],
)
@pytest.mark.parametrize("through", ["global", "shared", "generic"])
def test_vectors_and_spaces(vector, kind, size, through):
    """Global to global, by way of shared memory, or by generic addresses of both."""
    data = random_bytes(32 * size)
    count = int(vector[2:] or 1)
    prefix = {"b64": "%rd2", "b32": "%r2", "b16": "%rs2", "b8": "%rs2"}[kind]
    names = ", ".join(f"{prefix}{j}" for j in range(count))
    value = "{" + names + "}" if count > 1 else names
    body = ADDRESS.format(size=size) + f"ld.global{vector}.{kind} {value}, [%rd2];"
    if through == "shared":
        body += SHARED_ADDRESS + f"st.shared{vector}.{kind} [%r2], {value}; bar.sync 0;"
        body += f"ld.volatile.shared{vector}.{kind} {value}, [%r2];"
    elif through == "generic":
        body += SHARED_ADDRESS + "cvt.u64.u32 %rd5, %r2; cvta.shared.u64 %rd6, %rd5;"
        body += f"st{vector}.{kind} [%rd6], {value}; ld{vector}.{kind} {value}, [%rd6]; cvta.to.shared.u64 %rd7, %rd6;"
        body += "cvt.u32.u64 %r3, %rd7;" + f"ld.shared{vector}.{kind} {value}, [%r3];"
    body += f"st.global{vector}.{kind} [%rd3], {value};"
    out = run(body, [data], [np.zeros_like(data)], declarations=SHARED)
    same_bits(out, data)


def test_sub_word_loads_extend():
    data = random_bytes(32)
    body = ADDRESS.format(size=1) + ("ld.global.s8 %r20, [%rd2]; ld.global.u8 %r21, [%rd2]; mul.wide.u32 %rd4, %t, 8;"
                                     "add.s64 %rd5, %out0, %rd4; st.global.v2.u32 [%rd5], {%r20, %r21};")  # fmt: skip
    out = run(body, [data], [np.zeros((32, 2), np.int32)])
    np.testing.assert_array_equal(out[:, 0], data.view(np.int8))
    np.testing.assert_array_equal(out[:, 1], data)


def test_guarded_store_and_offsets():
    data = random_bytes(128, np.uint32)
    body = ADDRESS.format(size=4) + ("and.b32 %r5, %t, 1; setp.eq.u32 %p1, %r5, 1; ld.global.nc.L1::no_allocate.u32 "
                                     "%r6,"
                                     "[%rd2]; @%p1 add.u32 %r6, %r6, 100; @!%p1 st.global.u32 [%rd3+-0], %r6;"
                                     "@%p1 st.global.u32 [%rd3+128], %r6;")  # fmt: skip
    out = run(body, [data], [np.zeros(64, np.uint32)])
    even = np.arange(32) % 2 == 0
    np.testing.assert_array_equal(out[:32], np.where(even, data, 0))
    np.testing.assert_array_equal(out[32:], np.where(even, 0, data + np.uint32(100)))


def test_local_memory():
    body = """.local .align 16 .b8 depot[16];
        mov.u64 %rd1, depot; cvta.local.u64 %rd2, %rd1; mul.lo.u32 %r1, %t, 3; st.u32 [%rd2+8], %r1; isspacep.local
        %p1, %rd2;
    isspacep.global %p2, %rd2; isspacep.global %p3, %out0; selp.u32 %r3, 1, 0, %p1; selp.u32 %r4, 1, 0, %p2;
    selp.u32 %r5, 1, 0, %p3; ld.local.u32 %r2, [%rd1+8]; mul.wide.u32 %rd3, %t, 16; add.s64 %rd4, %out0, %rd3;
    st.global.v4.u32 [%rd4], {%r2, %r3, %r4, %r5};"""
    out = run(body, [], [np.zeros((64, 4), np.uint32)], threads=64)
    np.testing.assert_array_equal(out, np.stack([np.arange(64) * 3] + [np.full(64, v) for v in (1, 0, 1)], 1))


def test_parameters_by_their_address():
    x = np.arange(32, dtype=np.uint32)
    body = """mov.b64 %rd5, p_in0; add.s64 %rd6, %rd5, 4; ld.param.v2.u64 {%rd1, %rd2}, [%rd5];
    ld.param.u32 %r9, [%rd6+4]; mad.wide.u32 %rd3, %t, 4, %rd1; ld.global.u32 %r1, [%rd3]; cvt.u32.u64 %r8, %rd2;
    sub.u32 %r8, %r8, %r9; add.u32 %r1, %r1, %r8; mad.wide.u32 %rd4, %t, 4, %rd2; st.global.u32 [%rd4], %r1;"""
    np.testing.assert_array_equal(run(body, [x], [np.zeros_like(x)]), x)


def test_constants_of_the_module():
    table = ".const .align 4 .b32 table[4] = {7, 0x10, -1, 42};"
    body = "ld.param.u64 %rd1, [p_out0];"
    with pytest.raises(KeyError):  # the host gives module variables their addresses; here nobody does
        run(body + "mov.u64 %rd2, table; ld.const.u32 %r1, [%rd2];", [], [np.zeros(4, np.uint32)], declarations=table)


ATOMICS = {
    "add.u32": (np.uint32, np.add),
    "add.s32": (np.int32, np.add),
    "add.f32": (np.float32, np.add),
    "add.f64": (np.float64, np.add),
    "add.u64": (np.uint64, np.add),
    "min.s32": (np.int32, np.minimum),
    "max.u32": (np.uint32, np.maximum),
    "max.s64": (np.int64, np.maximum),
    "and.b32": (np.uint32, np.bitwise_and),
    "or.b32": (np.uint32, np.bitwise_or),
    "xor.b64": (np.uint64, np.bitwise_xor),
}


@pytest.mark.parametrize(
    "modifiers",
    [
        "cta.shared",
        "shared.cta",
        "relaxed.cta.shared",
        "relaxed.shared.cta",
        "shared.acq_rel",
        "shared.cta.release",
    ],
)
def test_scope_and_space_of_an_atomic(modifiers):
    body = """mov.u32 %r50, place; mov.u32 %r1, 1000; st.shared.u32 [%r50], %r1; bar.sync 0; sub.u32 %r2, 500, %t;
    atom.MODIFIERS.min.u32 %r3, [%r50], %r2; bar.sync 0; ld.shared.u32 %r4, [%r50];
    mad.wide.u32 %rd1, %t, 4, %out0; st.global.u32 [%rd1], %r4;""".replace("MODIFIERS", modifiers)
    out = run(body, [], [np.zeros(32, np.uint32)], declarations=".shared .align 4 .b32 place;")
    assert (out == 500 - 31).all()


@pytest.mark.parametrize("operation", ATOMICS)
@pytest.mark.parametrize("collide", [True, False])
def test_atomics(operation, collide):
    """Each lane's old value and the final memory, with all lanes at 4 places or each at its own."""
    dtype, function = ATOMICS[operation]
    size = np.dtype(dtype).itemsize
    places = 4 if collide else 32
    start = (np.random.default_rng(1).integers(-50, 50, places)).astype(dtype)
    data = (np.random.default_rng(2).integers(-50, 50, 32)).astype(dtype)
    kind, register = ("b64", "%rd20") if size == 8 else ("b32", "%r20")
    body = (
        ADDRESS.format(size=size)
        + f"""and.b32 %r3, %t, {places - 1}; mul.wide.u32 %rd4, %r3, {size};
    add.s64 %rd5, %out0, %rd4; add.s64 %rd6, %out1, %rd1; ld.global.{kind} {register}, [%rd2];
    atom.relaxed.gpu.global.{operation} {register}, [%rd5], {register}; st.global.{kind} [%rd6], {register};"""
    )
    memory, old = run(body, [data], [start, np.zeros(32, dtype)])
    expected, before = start.copy(), np.zeros(32, dtype)
    for lane in range(32):
        before[lane] = expected[lane % places]
        expected[lane % places] = function(expected[lane % places], data[lane])
    same_bits(memory, expected)
    same_bits(old, before)
    reduced = run(body.replace("atom.", "red.").replace(f"{operation} {register}, ", f"{operation} "), [data],
                  [start, np.zeros(32, dtype)])[0]  # fmt: skip
    same_bits(reduced, expected)


def test_old_value_of_a_float_atomic_is_a_float():
    """Used at once, and under a guard that keeps the old register in the other lanes."""
    body = """mov.f32 %f1, 0f40400000; mov.f32 %f2, 0fBF800000; setp.lt.u32 %p1, %t, 1;
    @%p1 atom.global.add.f32 %f2, [%out0], %f1; add.f32 %f3, %f2, %f2; mad.wide.u32 %rd1, %t, 4, %out1;
    st.global.f32 [%rd1], %f3;"""
    memory, twice = run(body, [], [np.array([0.5], np.float32), np.zeros(32, np.float32)])
    assert memory[0] == 3.5
    np.testing.assert_array_equal(twice, [1.0] + [-2.0] * 31)


def test_exchange_and_compare():
    body = """mul.wide.u32 %rd1, %t, 4; add.s64 %rd2, %out1, %rd1; add.u32 %r1, %t, 1;
    {what} st.global.u32 [%rd2], %r2;"""
    memory, old = run(
        body.format(what="atom.global.exch.b32 %r2, [%out0], %r1;"),
        [],
        [np.array([99], np.uint32), np.zeros(32, np.uint32)],
    )
    assert memory[0] == 32
    np.testing.assert_array_equal(old, [99, *range(1, 32)])
    memory, old = run(
        body.format(what="atom.global.cas.b32 %r2, [%out0], %t, %r1;"),
        [],
        [np.array([0], np.uint32), np.zeros(32, np.uint32)],
    )
    assert memory[0] == 32  # lane t finds t and puts t + 1
    np.testing.assert_array_equal(old, np.arange(32))
    memory, old = run(
        body.format(what="atom.global.inc.u32 %r2, [%out0], 4;"),
        [],
        [np.array([3], np.uint32), np.zeros(32, np.uint32)],
    )
    np.testing.assert_array_equal(old[:8], [3, 4, 0, 1, 2, 3, 4, 0])
    memory, old = run(
        body.format(what="atom.global.dec.u32 %r2, [%out0], 4;"),
        [],
        [np.array([2], np.uint32), np.zeros(32, np.uint32)],
    )
    np.testing.assert_array_equal(old[:8], [2, 1, 0, 4, 3, 2, 1, 0])


@pytest.mark.parametrize("element", ["f16", "bf16"])
def test_packed_atomics(element):
    values = np.random.default_rng(1).integers(-8, 8, (32, 2)).astype(np.float32)
    bits = (
        values.astype(np.float16).view(np.uint16)
        if element == "f16"
        else (values.view(np.uint32) >> 16).astype(np.uint16)
    )
    body = ADDRESS.format(size=4) + f"ld.global.b32 %r5, [%rd2]; red.global.add.noftz.{element}x2 [%out0], %r5;"
    out = run(body, [np.ascontiguousarray(bits)], [np.zeros(2, np.uint16)])
    got = (
        out.view(np.float16).astype(np.float32) if element == "f16" else (out.astype(np.uint32) << 16).view(np.float32)
    )
    np.testing.assert_array_equal(got, values.sum(0))


def test_vector_reduction():
    data = np.random.default_rng(1).integers(-9, 9, (32, 4)).astype(np.float32)
    body = ADDRESS.format(size=16) + ("ld.global.v4.b32 {%r5, %r6, %r7, %r8}, [%rd2];"
                                      "red.global.add.v4.f32 [%out0], {%r5, %r6, %r7, %r8};")  # fmt: skip
    np.testing.assert_array_equal(run(body, [data], [np.zeros(4, np.float32)]), data.sum(0))


def test_shared_atomics():
    body = """mov.u32 %r2, buffer; setp.eq.u32 %p1, %t, 0; mov.u32 %r3, 5; @%p1 st.shared.u32 [%r2], %r3; bar.sync 0;
    red.shared.add.u32 [%r2], %t; bar.sync 0; ld.shared.u32 %r4, [%r2]; @%p1 st.global.u32 [%out0], %r4;"""
    out = run(body, [], [np.zeros(1, np.uint32)], threads=96, declarations=SHARED)
    assert out[0] == 5 + 96 * 95 // 2


def test_generic_atomics_of_some_lanes_and_of_both_spaces():
    """Lanes 0–7 add to shared memory, 8–15 to global memory, the others hold wild addresses and do nothing."""
    body = """mov.u32 %r2, buffer; cvt.u64.u32 %rd5, %r2; cvta.shared.u64 %rd6, %rd5; mov.u64 %rd7, 64;
    setp.eq.u32 %p1, %t, 0; mov.u32 %r3, 5; @%p1 st.shared.u32 [%r2], %r3; bar.sync 0;
    setp.lt.u32 %p1, %t, 8; setp.lt.u32 %p2, %t, 16; selp.u64 %rd8, %out0, %rd7, %p2; selp.u64 %rd8, %rd6, %rd8, %p1;
    @%p1 atom.add.u32 %r5, [%rd8], 1; @%p2 atom.add.u32 %r5, [%rd8], %t; bar.sync 0;
    ld.shared.u32 %r4, [%r2]; setp.eq.u32 %p1, %t, 0;
    @%p1 st.global.u32 [%out0+4], %r4; @%p1 st.global.u32 [%out0+8], %r5;"""
    out = run(body, [], [np.zeros(3, np.uint32)], declarations=SHARED)
    assert out[0] == sum(range(8, 16)) and out[1] == 5 + 8 + sum(range(8))
    assert out[2] == 5 + 8  # lanes are served in ascending order: lane 0 finds the first eight additions done


# ---- what raises ---------------------------------------------------------------------------------------------------


def test_global_out_of_bounds():
    """One element behind the end of the only legal array."""
    data = np.zeros(32, np.uint32)
    with pytest.raises(MemoryFault, match=r"out of bounds: 4 bytes at address 0x") as caught:
        run(ADDRESS.format(size=4) + "ld.global.u32 %r5, [%rd2+4];", [data], [data])
    assert "ld.global.u32" in str(caught.value) and "cta(0,0,0).w0 lane 31" in str(caught.value) and caught.value.line


@pytest.mark.parametrize(
    ("access", "offset", "place"),
    [
        ("ld.global.u32 %r5", 4, "right after"),
        ("ld.global.u32 %r5", 12, "8 bytes after the end of"),
        ("ld.global.u32 %r5", -132, "8 bytes before"),
        ("ld.global.v2.u32 {%r5, %r6}", 0, "4 bytes before the end of"),
    ],
)
def test_place_of_an_address_out_of_bounds(access, offset, place):
    """Lane 31, whose element is the last of 128 bytes, with an offset; the rest of the warp stays away."""
    data = aligned(np.zeros(32, np.uint32))
    body = ADDRESS.format(size=4) + f"setp.eq.u32 %p1, %t, 31; @%p1 {access}, [%rd2+{offset}];"
    with pytest.raises(MemoryFault, match=rf", {place} 128 bytes of memory at 0x{data.ctypes.data:x}\n") as caught:
        launch(kernel_text(body, 1, 1), [data, data])
    assert caught.value.where == "cta(0,0,0).w0 lane 31"


def test_global_store_out_of_bounds():
    data = np.zeros(32, np.uint32)
    with pytest.raises(MemoryFault, match="out of bounds"):
        run(ADDRESS.format(size=4) + "st.global.v2.u32 [%rd3+-8], {%r1, %r1};", [data], [data])


def test_global_misaligned():
    data = np.zeros(64, np.uint32)
    with pytest.raises(MemoryFault, match="misaligned: 8 bytes"):
        run(ADDRESS.format(size=4) + "ld.global.v2.u32 {%r5, %r6}, [%rd2];", [data], [data])


@pytest.mark.parametrize(("offset", "what"), [(4096, "out of bounds"), (-4, "out of bounds"), (2, "misaligned")])
def test_shared_faults(offset, what):
    body = f"mov.u32 %r2, buffer; mov.u32 %r3, 1; st.shared.u32 [%r2+{offset}], %r3;"
    with pytest.raises(MemoryFault, match=what) as caught:
        run(body, [], [np.zeros(1, np.uint32)], declarations=SHARED)
    assert "st.shared.u32" in caught.value.text and "lane 0" in caught.value.where


def test_inactive_lanes_access_nothing():
    """The guard keeps lanes with wild addresses out."""
    body = """mov.u32 %r2, 0x7fffff00; mov.u32 %r3, buffer; setp.lt.u32 %p1, %t, 4; selp.u32 %r2, %r3, %r2, %p1;
    @%p1 st.shared.u32 [%r2], %r3; mov.u64 %rd1, 64; @%p1 mov.u64 %rd1, %out0; @%p1 st.global.u32 [%rd1], %t;"""
    out = run(body, [], [np.full(1, 77, np.uint32)], declarations=SHARED)
    assert out[0] in (0, 1, 2, 3)


@pytest.mark.parametrize("load", ["ld.shared.u32 %r4, [%r2]", "ld.shared.v4.u32 {%r4, %r5, %r6, %r7}, [%r2]",
                                  "atom.shared.add.u32 %r4, [%r2], 1", "ld.shared.u8 %rs1, [%r2]"])  # fmt: skip
def test_uninitialised_shared_read(load):
    """Bytes 0 to 31 are written; lane 2 of 16-byte pieces (lane 8 of words, lane 32 of bytes) reads beyond them."""
    size = 16 if "v4" in load else 1 if "u8" in load else 4
    body = f"""mov.u32 %r2, buffer; mad.lo.u32 %r3, %t, 4, %r2; setp.lt.u32 %p1, %t, 8; @%p1 st.shared.u32 [%r3], %t;
    bar.sync 0; mad.lo.u32 %r2, %t, {size}, %r2; {load};"""
    with pytest.raises(UninitializedRead, match="shared memory 0x420 of cta") as caught:
        run(body, [], [np.zeros(1, np.uint32)], threads=64, declarations=SHARED)
    lane = {16: "w0 lane 2", 4: "w0 lane 8", 1: "w1 lane 0"}[size]
    assert lane in caught.value.where and load.split()[0] in caught.value.text


def test_partly_written_vector():
    body = "mov.u32 %r2, buffer; st.shared.v2.u32 [%r2], {%t, %t}; ld.shared.v4.u32 {%r4, %r5, %r6, %r7}, [%r2];"
    with pytest.raises(UninitializedRead, match="0x408 of cta"):
        run(body, [], [np.zeros(1, np.uint32)], declarations=SHARED)


def test_partly_written_word():
    body = "mov.u32 %r2, buffer; st.shared.u16 [%r2], 7; ld.shared.u32 %r4, [%r2];"
    with pytest.raises(UninitializedRead, match="0x402 of cta"):
        run(body, [], [np.zeros(1, np.uint32)], declarations=SHARED)


def test_each_cta_has_its_own_shared_memory():
    body = """mov.u32 %r2, buffer; setp.eq.u32 %p1, %c, 0; @%p1 st.shared.u32 [%r2], 7; bar.sync 0;
    ld.shared.u32 %r3, [%r2];"""
    with pytest.raises(UninitializedRead, match=r"of cta\(1,0,0\)"):
        run(body, [], [np.zeros(1, np.uint32)], grid=2, declarations=SHARED)


def test_stores_of_unaligned_host_arrays_do_not_leak():
    """Only the listed storages are legal memory, whatever else the process has mapped."""
    other = aligned(np.zeros(4, np.uint32))
    address = int(other.ctypes.data)
    with pytest.raises(MemoryFault, match=f"0x{address:x}"):
        run(f"mov.u64 %rd1, {address}; st.global.u32 [%rd1], %t;", [], [np.zeros(1, np.uint32)])
