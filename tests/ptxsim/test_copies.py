"""Asynchronous copies: cp.async and its groups, bulk copies, tensor copies (PTX ISA 9.7.9.25, 9.7.9.27)."""

from __future__ import annotations

import numpy as np
import pytest

from ptxsim.errors import Deadlock, MemoryFault, PtxError, SyncError, UninitializedRead
from ptxsim.machine import tensor_maps
from ptxsim.report.history import History
from tests.testing.ptx import aligned, run, same_bits

SHARED = ".shared .align 1024 .b8 buffer[16384]; .shared .align 8 .b64 bar;"
FIRST = """mov.u32 %r50, buffer; mov.u32 %r52, bar; setp.eq.u32 %p10, %t, 0; mul.wide.u32 %rd1, %t, 16;
add.s64 %rd2, %in0, %rd1; add.s64 %rd3, %out0, %rd1; mad.lo.u32 %r51, %t, 16, %r50;"""
READ16 = "ld.shared.v4.u32 {%r1, %r2, %r3, %r4}, [%r51]; st.global.v4.u32 [%rd3], {%r1, %r2, %r3, %r4};"
WAIT = "W: mbarrier.try_wait.parity.shared.b64 %p11, [%r52], 0; @!%p11 bra W;"
MODES = [(False, None), (True, None), (True, 1), (True, 2)]


def bytes_of(count, seed=0):
    return np.random.default_rng(seed).integers(0, 256, count, dtype=np.uint8)


def copied(body, data, out_bytes=None, threads=32, **options):
    out = np.zeros(out_bytes or len(data), np.uint8)
    return run(FIRST + body, [data], [out], threads=threads, declarations=SHARED, **options)


# ---- cp.async -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cop", "size"), [("cg", 16), ("ca", 16), ("ca", 8), ("ca", 4)])
@pytest.mark.parametrize("late", [False, True])
def test_cp_async(cop, size, late):
    data = bytes_of(32 * 16)
    steps = "".join(f"cp.async.{cop}.shared.global [%r51+{at}], [%rd2+{at}], {size};" for at in range(0, 16, size))
    body = steps + "cp.async.commit_group; cp.async.wait_group 0; bar.warp.sync -1;" + READ16
    same_bits(copied(body, data, late=late), data)


@pytest.mark.parametrize("size", [4, 8, 16])
@pytest.mark.parametrize("late", [False, True])
def test_source_size(size, late):
    """Bytes beyond the source size become zero; the source may end there."""
    data = bytes_of(32 * 16)
    body = """rem.u32 %r6, %t, {n}; cp.async.ca.shared.global.L2::128B [%r51], [%rd2], {size}, %r6;
    cp.async.wait_all; ld.shared.{kind} {r}, [%r51]; st.global.{kind} [%rd3], {r};"""
    kind, r = {4: ("b32", "%r1"), 8: ("b64", "%rd9"), 16: ("v4.b32", "{%r1, %r2, %r3, %r4}")}[size]
    out = copied(body.format(n=size + 1, size=size, kind=kind, r=r), data, late=late).reshape(32, 16)
    for lane in range(32):
        count = lane % (size + 1)
        expected = np.zeros(size, np.uint8)
        expected[:count] = data[16 * lane : 16 * lane + count]
        np.testing.assert_array_equal(out[lane, :size], expected)


def test_ignored_source():
    data = bytes_of(32 * 16)
    body = """and.b32 %r6, %t, 1; setp.eq.u32 %p1, %r6, 1; setp.ge.u32 %p2, %t, 16; @%p2 mov.u64 %rd2, 64;
    @%p2 setp.eq.u32 %p1, %r6, %r6; cp.async.cg.shared.global [%r51], [%rd2], 16, %p1; cp.async.wait_all;"""
    out = copied(body + READ16, data).reshape(32, 16)
    lanes = np.arange(32)
    kept = (lanes % 2 == 0) & (lanes < 16)
    np.testing.assert_array_equal(out, np.where(kept[:, None], data.reshape(32, 16), 0))


def test_cp_async_faults():
    data = bytes_of(32 * 16)
    with pytest.raises(MemoryFault, match="global access out of bounds: 16 bytes"):
        copied("cp.async.cg.shared.global [%r51], [%rd2+16], 16; cp.async.wait_all;", data)
    with pytest.raises(MemoryFault, match="shared access misaligned: 16 bytes"):
        copied("cp.async.cg.shared.global [%r51+8], [%rd2], 16; cp.async.wait_all;", data)
    with pytest.raises(MemoryFault, match="source size beyond"):
        copied("mov.u32 %r6, 17; cp.async.cg.shared.global [%r51], [%rd2], 16, %r6;", data)
    with pytest.raises(PtxError, match=r"cp\.async\.cg of 8 bytes"):
        copied("cp.async.cg.shared.global [%r51], [%rd2], 8;", data)


TWO_GROUPS = """cp.async.cg.shared.global [%r51], [%rd2], 16; cp.async.commit_group;
add.u32 %r53, %r51, 1024; cp.async.cg.shared.global [%r53], [%rd2+512], 16; cp.async.commit_group; {wait}
ld.shared.v4.u32 {{%r1, %r2, %r3, %r4}}, [{address}]; st.global.v4.u32 [%rd3], {{%r1, %r2, %r3, %r4}};"""


def test_groups_in_late_mode():
    """wait_group N delivers all but the N latest groups; what is read before its wait raises."""
    data = bytes_of(1024)
    one, none = "cp.async.wait_group 1;", "cp.async.wait_group 0;"
    same_bits(copied(TWO_GROUPS.format(wait=one, address="%r51"), data, late=True)[:512], data[:512])
    same_bits(copied(TWO_GROUPS.format(wait=none, address="%r53"), data, late=True)[:512], data[512:])
    for wait, address in ((one, "%r53"), ("", "%r51")):
        body = TWO_GROUPS.format(wait=wait, address=address)
        copied(body, data)  # the default performs copies at once
        with pytest.raises(SyncError, match="before the asynchronous copy to it was waited for") as caught:
            copied(body, data, late=True)
        assert "ld.shared" in caught.value.text and "w0 lane 0" in caught.value.where


def test_wait_counts_groups_of_each_warp():
    """Warp 1 commits one more (empty) group than warp 0, so that wait_group 1 delivers its copy alone."""
    data = bytes_of(1024)
    body = (
        """cp.async.cg.shared.global [%r51], [%rd2], 16; cp.async.commit_group; setp.lt.u32 %p1, %t, 32; @%p1 bra S;
    cp.async.commit_group; S: cp.async.wait_group 1; WHO bra READ; exit; READ:"""
        + READ16
    )
    copied(body.replace("WHO", "@!%p1"), data, threads=64, late=True)
    with pytest.raises(SyncError, match="before the asynchronous copy"):
        copied(body.replace("WHO", "@%p1"), data, threads=64, late=True)


def test_write_into_a_copy_in_flight():
    data = bytes_of(512)
    body = "cp.async.cg.shared.global [%r51], [%rd2], 16; st.shared.u32 [%r51+4], %t; cp.async.wait_all;"
    with pytest.raises(SyncError, match="write to shared memory that an asynchronous copy is writing"):
        copied(body, data, late=True)


@pytest.mark.parametrize(("late", "seed"), MODES)
@pytest.mark.parametrize("noinc", [False, True])
def test_cp_async_with_mbarrier(noinc, late, seed):
    """Warp 0 copies, warp 1 waits at the mbarrier that the copies arrive at."""
    data = bytes_of(512)
    count = 32 if noinc else 64  # without .noinc the thread's own arrival comes on top of a raised count
    arrive = "cp.async.mbarrier.arrive{}.shared.b64 [%r52];".format(".noinc" if noinc else "")
    plain = "" if noinc else "mbarrier.arrive.shared.b64 _, [%r52];"
    other = "" if noinc else "mbarrier.arrive.shared.b64 _, [%r52];"
    body = (
        f"""@%p10 mbarrier.init.shared.b64 [%r52], {count}; bar.sync 0; setp.ge.u32 %p1, %t, 32; @%p1 bra READ;
    cp.async.ca.shared.global [%r51], [%rd2], 16; {arrive} {plain} exit;
  READ: {other} {WAIT} add.u32 %r51, %r51, -512; add.s64 %rd3, %rd3, -512;"""
        + READ16
    )
    same_bits(copied(body, data, threads=64, late=late, seed=seed), data)


# ---- cp.async.bulk --------------------------------------------------------------------------------------------------

INIT = "@%p10 mbarrier.init.shared.b64 [%r52], 1; bar.sync 0;"
LOAD = """@%p10 mbarrier.arrive.expect_tx.shared.b64 _, [%r52], {bytes};
@%p10 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r50], [%in0], {size}, [%r52];"""


@pytest.mark.parametrize(("late", "seed"), MODES)
def test_bulk_load_and_store(late, seed):
    data = bytes_of(512)
    body = (
        INIT
        + LOAD.format(bytes=512, size=512)
        + WAIT
        + """
    @%p10 cp.async.bulk.global.shared::cta.bulk_group [%out0], [%r50], 512; @%p10 cp.async.bulk.commit_group;
    @%p10 cp.async.bulk.wait_group.read 0;"""
    )
    same_bits(copied(body, data, late=late, seed=seed), data)


def test_bulk_mistakes():
    data = bytes_of(512)
    with pytest.raises(Deadlock, match="tx-count 16"):
        copied(INIT + LOAD.format(bytes=512, size=496) + WAIT, data)
    body = INIT + LOAD.format(bytes=512, size=512) + READ16 + WAIT
    copied(body, data)
    with pytest.raises(SyncError, match="before the asynchronous copy"):
        copied(body, data, late=True)
    with pytest.raises(MemoryFault, match="must be multiples of 16"):
        copied(INIT + LOAD.format(bytes=512, size=500) + WAIT, data)
    with pytest.raises(MemoryFault, match="global access out of bounds"):
        copied(INIT + LOAD.format(bytes=528, size=528) + WAIT, data)
    with pytest.raises(UninitializedRead, match="shared memory 0x600"):
        copied(INIT + LOAD.format(bytes=512, size=512) + WAIT + "@%p10 cp.async.bulk.global.shared::cta.bulk_group"
               " [%out0], [%r50], 528;", data, 528)  # fmt: skip


def test_source_of_a_bulk_store_changed_before_its_wait():
    """The late mode reads shared memory at the wait."""
    data = bytes_of(512)
    store = "@%p10 cp.async.bulk.global.shared::cta.bulk_group [%out0], [%r50], 512; @%p10 cp.async.bulk.commit_group;"
    body = (
        INIT
        + LOAD.format(bytes=512, size=512)
        + WAIT
        + store
        + "bar.sync 0; mov.u32 %r1, 0; st.shared.u32 [%r51], %r1;"
    )
    same_bits(copied(body, data), data)
    assert (copied(body, data, late=True) != data).any()


@pytest.mark.parametrize(("kind", "dtype"), [("f32", np.float32), ("u32", np.uint32), ("s32", np.int32)])
def test_bulk_reduction(kind, dtype):
    values = np.random.default_rng(0).integers(0, 100, 128).astype(dtype)
    start = np.random.default_rng(1).integers(0, 100, 128).astype(dtype)
    body = (
        FIRST
        + INIT
        + LOAD.format(bytes=512, size=512)
        + WAIT
        + f"""
    @%p10 cp.reduce.async.bulk.global.shared::cta.bulk_group.add.{kind} [%out0], [%r50], 512;
    cp.async.bulk.commit_group;
    cp.async.bulk.wait_group 0;"""
    )
    same_bits(run(body, [values], [start], declarations=SHARED), start + values)


@pytest.mark.parametrize("late", [False, True])
def test_bulk_multicast(late):
    """CTA 0 copies into both CTAs of the cluster; the barrier of each is signalled."""
    data = bytes_of(512)
    body = (
        INIT
        + """barrier.cluster.arrive; barrier.cluster.wait; mov.u32 %r20, %cluster_ctarank; mov.u16 %rs9, 3;
    @%p10 mbarrier.arrive.expect_tx.shared.b64 _, [%r52], 512; setp.ne.u32 %p1, %r20, 0;
    setp.eq.and.u32 %p2, %t, 0, !%p1;
    @%p2 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%r50], [%in0], 512,
      [%r52], %rs9; mad.wide.u32 %rd3, %r20, 512, %rd3;"""
        + WAIT
        + READ16
    )
    out = copied(body, data, 1024, grid=2, cluster=2, late=late)
    same_bits(out, np.concatenate([data, data]))


def test_bulk_to_the_other_cta():
    """CTA 0 sends its shared memory to CTA 1, which waits at its own barrier."""
    data = bytes_of(512)
    body = INIT + """mov.u32 %r20, %cluster_ctarank; setp.eq.u32 %p1, %r20, 1; @%p1 bra SECOND;
    ld.global.v4.u32 {%r1, %r2, %r3, %r4}, [%rd2]; st.shared.v4.u32 [%r51], {%r1, %r2, %r3, %r4}; bar.sync 0;
    barrier.cluster.arrive; barrier.cluster.wait; mov.u32 %r21, 1; mapa.shared::cluster.u32 %r22, %r50, %r21;
    mapa.shared::cluster.u32 %r23, %r52, %r21;
    @%p10 cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%r22], [%r50], 512, [%r23]; bra END;
  SECOND: @%p10 mbarrier.arrive.expect_tx.shared.b64 _, [%r52], 512; barrier.cluster.arrive;
    barrier.cluster.wait;""" + \
        WAIT + READ16 + "END: barrier.cluster.arrive; barrier.cluster.wait;"  # fmt: skip
    for late in (False, True):
        same_bits(copied(body, data, grid=2, cluster=2, late=late), data)


# ---- tensor copies ---------------------------------------------------------------------------------------------------

CODE = {np.uint8: 0, np.uint16: 1, np.uint32: 2, np.int32: 3, np.float32: 7, np.float16: 6}
SWIZZLE = {0: 0, 32: 1, 64: 2, 128: 3, (128, 32): 4, (128, 64): 6}  # CUtensorMapSwizzle of a span, or span and atom


def tensor_map(array, box, span=0):
    """Tensor map of a C-contiguous array whose rows are multiples of 16 bytes; ``box`` as the array's shape."""
    extents = array.shape[::-1]
    raw = tensor_maps.encode(CODE[array.dtype.type], array.ndim, array.ctypes.data, extents, array.strides[::-1][1:],
                             box[::-1], [1] * array.ndim, 0, SWIZZLE[span], 0)  # fmt: skip
    return np.frombuffer(raw, np.uint8)


def load_text(rank, start, size, extra="", multicast="", group=""):
    coordinates = ", ".join(str(c) for c in reversed(start))
    return f"""@%p10 mbarrier.arrive.expect_tx.shared.b64 _, [%r52], {size};
    @%p10 cp.async.bulk.tensor.{rank}d.shared::cluster.global.tile.mbarrier::complete_tx::bytes{multicast}{group}
    [%r50], [%in0, {{{coordinates}}}], [%r52]{extra};"""


def boxed(array, start, box):
    """The box at ``start`` with zeros outside of the array."""
    padded = np.pad(array, [(8, 8)] * array.ndim)
    return padded[tuple(slice(s + 8, s + 8 + b) for s, b in zip(start, box, strict=True))]


def tensor_run(array, box, body, out_bytes, span=0, **options):
    array = aligned(array)
    out = aligned(np.zeros(out_bytes, np.uint8))
    return run(
        FIRST + INIT + body, [tensor_map(array, box, span)], [out], legal=[array], declarations=SHARED, **options
    )


def dump(size):
    """Copy ``size`` bytes of shared memory to the output, 512 at a time."""
    return "".join(f"ld.shared.v4.u32 {{%r1, %r2, %r3, %r4}}, [%r51+{at}];"
                   f"st.global.v4.u32 [%rd3+{at}], {{%r1, %r2, %r3, %r4}};"
                   for at in range(0, size, 512))  # fmt: skip


SHAPES = [((400,), (256,)), ((40, 32), (16, 16)), ((5, 12, 32), (2, 8, 16)), ((3, 4, 5, 16), (2, 2, 4, 16)),
          ((2, 3, 3, 4, 16), (1, 2, 2, 4, 16))]  # fmt: skip


@pytest.mark.parametrize(("shape", "box"), SHAPES)
@pytest.mark.parametrize("outside", [0, -3, 1])
def test_tensor_tiles(shape, box, outside):
    """Ranks 1 to 5, inside, before the beginning and beyond the end: what lies outside is zero."""
    array = np.random.default_rng(0).integers(1, 2**16, shape).astype(np.uint16)
    start = [outside if outside < 0 else (n - b if outside else 0) + outside for n, b in zip(shape, box, strict=True)]
    size = int(np.prod(box)) * 2
    for late in (False, True):
        out = tensor_run(array, box, load_text(len(shape), start, size) + WAIT + dump(size), max(size, 512), late=late)
        np.testing.assert_array_equal(out[:size].view(np.uint16).reshape(box), boxed(array, start, box))


@pytest.mark.parametrize(("code", "bits", "padding"), [(13, 4, 0), (14, 4, 8), (15, 6, 4)])
@pytest.mark.parametrize("row", [2, 12])
def test_tiles_of_small_elements(code, bits, padding, row):
    """16 elements of 4 or 6 bits in 16 bytes of shared memory: their 8 or 12 bytes, then zeros, which the barrier does
    not count; without padding, as they are. Rows from 16 on lie outside."""
    array = np.random.default_rng(0).integers(1, 256, (16, 128 * bits // 8)).astype(np.uint8)
    data = aligned(array)
    raw = tensor_maps.encode(code, 2, data.ctypes.data, (128, 16), (array.shape[1],), (64, 16), [1, 1], 0, 0, 0)
    moved, size = 16 * 64 * bits // 8, 16 * (64 if padding else 64 * bits // 8)
    body = FIRST + INIT + load_text(2, (row, 64), moved) + WAIT + dump(size)
    out = aligned(np.zeros(max(size, 512), np.uint8))
    out = run(body, [np.frombuffer(raw, np.uint8)], [out], legal=[data], declarations=SHARED)
    wanted = np.pad(array, [(0, 16), (0, 0)])[row : row + 16, 64 * bits // 8 :]
    if padding:
        wanted = np.pad(wanted.reshape(16, 4, 2 * bits), [(0, 0), (0, 0), (0, padding)])
    np.testing.assert_array_equal(out[:size], wanted.ravel())
    with pytest.raises(PtxError, match="coordinate 7 of a tensor map whose elements are taken"):
        run(FIRST + INIT + load_text(2, (0, 7), moved), [np.frombuffer(raw, np.uint8)], [out], legal=[data],
            declarations=SHARED)  # fmt: skip


@pytest.mark.parametrize("span", [32, 64, 128])
@pytest.mark.parametrize("dtype", [np.uint8, np.float16, np.float32])
def test_swizzles(span, dtype):
    """16-byte chunk c of row r lies at chunk c ^ f(r), f after the manual's table of swizzling modes."""
    columns = span // np.dtype(dtype).itemsize
    array = np.random.default_rng(0).integers(0, 100, (32, columns)).astype(dtype)
    size = 32 * span
    out = tensor_run(array, (32, columns), load_text(2, (0, 0), size) + WAIT + dump(size), size, span)
    chunks = np.ascontiguousarray(array).view(np.uint8).reshape(32, span // 16, 16)
    expected = np.zeros(size, np.uint8).reshape(-1, 16)
    for r in range(32):
        for c in range(span // 16):
            flat = r * (span // 16) + c
            expected[flat ^ (flat >> 3 & (span // 16 - 1))] = chunks[r, c]
    np.testing.assert_array_equal(out.reshape(-1, 16), expected)


# PTX ISA 5.5.7: which chunks of 16 bytes lie in each line of 128, by atom
ATOM_LINES = {32: ["01234567", "23016745", "45670123", "67452301"], 64: ["01234567", "45670123"]}


@pytest.mark.parametrize("atom", [32, 64])
@pytest.mark.parametrize("offset", [0, 128, 256])
def test_swizzle_atoms(atom, offset):
    """The pattern belongs to the addresses of shared memory, wherever a box begins; a store undoes it."""
    array = np.random.default_rng(0).integers(0, 256, (16, 128)).astype(np.uint8)
    move = f"add.u32 %r50, %r50, {offset}; add.u32 %r51, %r51, {offset};"
    out = tensor_run(array, (16, 128), move + load_text(2, (0, 0), 2048) + WAIT + dump(2048), 2048, (128, atom))
    lines = out.reshape(16, 128)
    for r in range(16):
        pattern = ATOM_LINES[atom][(r + offset // 128) % len(ATOM_LINES[atom])]
        for place, chunk in enumerate(pattern):
            at = 16 * int(chunk)
            np.testing.assert_array_equal(lines[r, 16 * place : 16 * place + 16], array[r, at : at + 16])
    store = "@%p10 cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%in1, {0, 0}], [%r50];"
    target = aligned(np.zeros_like(array))
    source = aligned(array)
    maps = [tensor_map(x, (16, 128), (128, atom)) for x in (source, target)]
    run(FIRST + INIT + move + load_text(2, (0, 0), 2048) + WAIT + store, maps, [np.zeros(1)], legal=[source, target],
        declarations=SHARED)  # fmt: skip
    np.testing.assert_array_equal(target, array)


@pytest.mark.parametrize("span", [0, 64])
@pytest.mark.parametrize("start", [(0, 0), (36, -8), (-4, 16)])
def test_tensor_store(span, start):
    """Load a box, store it elsewhere: only what lies inside of the tensor is written."""
    source = aligned(np.random.default_rng(0).integers(1, 2**16, (16, 32)).astype(np.uint16))
    target = aligned(np.zeros((40, 32), np.uint16))
    maps = np.concatenate([tensor_map(source, (16, 32), span), tensor_map(target, (16, 32), span)])
    coordinates = ", ".join(str(c) for c in reversed(start))
    body = (
        FIRST
        + INIT
        + load_text(2, (0, 0), 1024)
        + WAIT
        + f"""add.s64 %rd9, %in0, 128; fence.proxy.async.shared::cta;
    @%p10 cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%rd9, {{{coordinates}}}], [%r50];
    cp.async.bulk.commit_group; cp.async.bulk.wait_group 0;"""
    )
    for late in (False, True):
        target[:] = 0
        run(body, [maps], [np.zeros(1)], legal=[source, target], declarations=SHARED, late=late)
        expected = np.zeros((40 + 128, 32 + 128), np.uint16)
        expected[64 + start[0] : 80 + start[0], 64 + start[1] : 96 + start[1]] = source
        np.testing.assert_array_equal(target, expected[64:104, 64:96])


@pytest.mark.parametrize(("operation", "function"), [("add", np.add), ("min", np.minimum), ("max", np.maximum)])
def test_tensor_reduction(operation, function):
    source = aligned(np.random.default_rng(0).integers(-99, 99, (16, 16)).astype(np.float32))
    start = np.random.default_rng(1).integers(-99, 99, (16, 16)).astype(np.float32)
    target = aligned(start)
    maps = np.concatenate([tensor_map(source, (16, 16)), tensor_map(target, (16, 16))])
    body = (
        FIRST
        + INIT
        + load_text(2, (0, 0), 1024)
        + WAIT
        + f"""add.s64 %rd9, %in0, 128;
    @%p10 cp.reduce.async.bulk.tensor.2d.global.shared::cta.{operation}.tile.bulk_group [%rd9, {{0, 0}}], [%r50];"""
    )
    run(body, [maps], [np.zeros(1)], legal=[source, target], declarations=SHARED)
    np.testing.assert_array_equal(target, function(start, source))


@pytest.mark.parametrize(("late", "seed"), MODES)
def test_multicast(late, seed):
    """CTA 0 loads one box into both CTAs of the cluster and signals the barrier of each."""
    array = np.random.default_rng(0).integers(1, 2**16, (16, 16)).astype(np.uint16)
    body = """barrier.cluster.arrive; barrier.cluster.wait; mov.u32 %r20, %cluster_ctarank; mov.u16 %rs9, 3;
    @%p10 mbarrier.arrive.expect_tx.shared.b64 _, [%r52], 512; setp.ne.u32 %p1, %r20, 0;
    setp.eq.and.u32 %p2, %t, 0, !%p1;
    @%p2 cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [%r50],
      [%in0, {0, 0}], [%r52], %rs9;"""
    body += WAIT + "mad.wide.u32 %rd3, %r20, 512, %rd3;" + READ16
    out = tensor_run(array, (16, 16), body, 1024, grid=2, cluster=2, late=late, seed=seed)
    for half in out.view(np.uint16).reshape(2, 16, 16):
        np.testing.assert_array_equal(half, array)


def test_tensor_mistakes():
    array = np.ones((16, 16), np.uint16)
    good = load_text(2, (0, 0), 512)
    with pytest.raises(Deadlock, match="tx-count 16"):
        tensor_run(array, (16, 16), load_text(2, (0, 0), 528) + WAIT, 512)
    with pytest.raises(PtxError, match="3 coordinates for a tensor map of rank 2"):
        tensor_run(array, (16, 16), load_text(3, (0, 0, 0), 512) + WAIT, 512)
    with pytest.raises(MemoryFault, match="not aligned to 128 bytes"):
        tensor_run(array, (16, 16), "add.u32 %r50, %r50, 64;" + good + WAIT, 512)
    with pytest.raises(SyncError, match="before the asynchronous copy"):
        tensor_run(array, (16, 16), good + dump(512) + WAIT, 512, late=True)
    with pytest.raises(MemoryFault, match="outside shared memory"):
        tensor_run(array, (16, 16), "add.u32 %r50, %r50, 16384;" + good + WAIT, 512)
    with pytest.raises(PtxError, match="not a tensor map"):
        run(FIRST + INIT + good, [np.zeros(128, np.uint8)], [np.zeros(1)], declarations=SHARED)
    with pytest.raises(PtxError, match="this form of the instruction is not simulated"):
        tensor_run(array, (16, 16), good.replace(".tile", ".im2col"), 512)
    with pytest.raises(PtxError, match="interleave, NaN fill or element strides"):
        tensor_maps.encode(6, 2, 0, (16, 16), (32,), (16, 16), (2, 1), 0, 0, 0)


GOOD_MAP = dict(dtype=6, rank=2, address=1 << 20, extents=(64, 64), strides=(128,), box=(64, 256),
                element_strides=(1, 1), interleave=0, swizzle_mode=3, fill=0)  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        {},
        dict(strides=((1 << 40) - 16,)),
        dict(extents=(1 << 32, 1)),
        dict(box=(32, 8), swizzle_mode=2),
        dict(box=(256, 1), swizzle_mode=0),
        dict(rank=1, extents=(64,), strides=(), box=(16,), element_strides=(1,), swizzle_mode=1),
    ],
)
def test_tensor_maps_within_the_limits(change):
    options = GOOD_MAP | change
    found = tensor_maps.decode(tensor_maps.encode(**options))
    assert (found.address, found.extents, found.strides, found.box) == tuple(
        options[name] for name in ("address", "extents", "strides", "box")
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(address=(1 << 20) + 8), "the address 0x100008 is not a multiple of 16"),
        (dict(strides=(136,)), "the stride of 136 bytes of dimension 1 is not a multiple of 16"),
        (dict(strides=(1 << 40,)), "below 2"),
        (dict(extents=(0, 64)), "0 elements in dimension 0, not in 1"),
        (dict(extents=(64, (1 << 32) + 1)), "elements in dimension 1, not in 1"),
        (dict(box=(64, 257)), "a box of 257 elements in dimension 1"),
        (dict(box=(0, 16)), "a box of 0 elements in dimension 0"),
        (dict(box=(60, 16)), "a box row of 120 bytes is not a multiple of 16"),
        (dict(box=(72, 16)), "a box row of 144 bytes exceeds the swizzle of 128"),
        (dict(box=(64, 16), swizzle_mode=2), "a box row of 128 bytes exceeds the swizzle of 64"),
        (dict(rank=6), "rank 6, not in 1"),
        (dict(swizzle_mode=5), "swizzle 5 is not simulated"),
    ],
)
def test_tensor_maps_beyond_the_limits(change, message):
    with pytest.raises(PtxError, match=message):
        tensor_maps.encode(**(GOOD_MAP | change))


def test_descriptors_that_the_host_code_wrote_itself():
    """The same rules where no cuTensorMapEncodeTiled sees the numbers: an address off by 8, a box row of 120 bytes."""
    raw = bytearray(tensor_maps.encode(**GOOD_MAP))
    with pytest.raises(PtxError, match="0x100008 is not a multiple of 16"):
        tensor_maps.decode(bytes([8]) + bytes(raw[1:]))
    for swizzle, atom in ((3, 2), (2, 1)):  # 8 bytes flipped; an atom of 32 bytes in a span of 64
        flags = int.from_bytes(raw[8:12], "little") & ~(3 << 13) | swizzle << 13 | atom << 19
        with pytest.raises(PtxError, match="with 8 flipped are not simulated; only a 128-byte swizzle has others"):
            tensor_maps.decode(bytes(raw[:8]) + flags.to_bytes(4, "little") + bytes(raw[12:]))
    raw[55] = 59
    with pytest.raises(PtxError, match="120 bytes is not a multiple of 16"):
        tensor_maps.decode(bytes(raw))


def test_store_of_an_unwritten_box():
    """Only the part of the box that lies inside of the tensor has to be written."""
    target = aligned(np.zeros((16, 16), np.uint16))
    body = (
        FIRST
        + """setp.lt.u32 %p1, %t, 16; @%p1 st.shared.v4.u32 [%r51], {%t, %t, %t, %t};
    @%p10 cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%in0, {0, START}], [%r50];"""
    )
    args = dict(legal=[target], declarations=SHARED)
    run(body.replace("START", "8"), [tensor_map(target, (16, 16))], [np.zeros(1)], **args)
    assert (target[8:] != 0).any() and (target[:8] == 0).all()
    with pytest.raises(UninitializedRead, match="shared memory 0x500"):
        run(body.replace("START", "7"), [tensor_map(target, (16, 16))], [np.zeros(1)], **args)


@pytest.mark.parametrize("race", [False, True])
@pytest.mark.parametrize("late", [False, True])
def test_multicast_to_nobody(race, late):
    """A mask without a CTA copies nothing and signals nothing."""
    body = """.shared .align 16 .b8 buffer[64]; .shared .align 8 .b64 bar; .reg .b16 %rs100;
      mov.u32 %r1, buffer; mov.u32 %r2, bar; setp.eq.u32 %p1, %t, 0; mov.u16 %rs100, 0;
      @%p1 mbarrier.init.shared.b64 [%r2], 1; fence.mbarrier_init.release.cluster; bar.sync 0;
      @%p1 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%r1], [%in0], 64,
      [%r2], %rs100; @%p1 mbarrier.arrive.shared.b64 _, [%r2];
      W: mbarrier.try_wait.parity.shared.b64 %p3, [%r2], 0; @!%p3 bra W; mov.u32 %r3, 5; st.global.u32 [%out0], %r3;"""
    out = run(body, [np.zeros(64, np.uint8)], [np.zeros(1, np.uint32)], race=race, late=late, observers=[History()])
    assert out[0] == 5
