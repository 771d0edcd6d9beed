"""Tensor memory of sm_100 (PTX ISA, "Tensor Memory"): 128 lanes of 512 columns, 32 bits each.

An address holds the lane in its upper half and the column in its lower. A warp reaches the 32 lanes from
32 · (warp index % 4) on; with the shape 32x32b a thread has a lane for itself, so that thread t of a warpgroup holds
row t of an accumulator, one column a register. Loads and stores run on until the wait for them; what crosses from one
thread to another, or to and from a product, lies between :func:`before_sync` and :func:`after_sync`.
"""

import cutlass.cute as cute
from cutlass import Float32, Int32
from cutlass.cute.arch import inline_ptx

LANES = 128
COLUMNS = 512
_LANE_SHIFT = 16


def allocate(address: cute.Pointer, columns: int, ctas: int):
    """By a warp, in a pair by one of each CTA: ``columns``, a power of 2 from 32 on; where they are goes to ``address``
    in shared memory."""
    cute.arch.alloc_tmem(columns, address, is_two_cta=ctas == 2)
    cute.arch.relinquish_tmem_alloc_permit(is_two_cta=ctas == 2)


def free(base: Int32, columns: int, ctas: int):
    """By the warp that allocated, when nobody uses them any more."""
    pointer = cute.make_ptr(Int32, base, cute.AddressSpace.tmem, assumed_align=16)
    cute.arch.dealloc_tmem(pointer, columns, is_two_cta=ctas == 2)


def own_lanes(base: Int32, warp: Int32) -> Int32:
    """The address ``base``, at the first of the lanes that a warp reaches."""
    return base + ((warp % 4 * 32) << _LANE_SHIFT)


def load(address: Int32, columns: int) -> tuple[Float32, ...]:
    """The thread's ``columns`` (a power of 2) from ``address`` on, there after :func:`wait_loads`."""
    names = ", ".join(f"{{$w{i}}}" for i in range(columns))
    loaded = inline_ptx(
        f"tcgen05.ld.sync.aligned.32x32b.x{columns}.b32 {{{names}}}, [{{$r0}}];",
        write_only_types=[Float32] * columns,
        read_only_args=[address],
    )
    return loaded if columns > 1 else (loaded,)


def load_with_maximum(address: Int32, columns: int) -> tuple[tuple[Float32, ...], Float32]:
    """As :func:`load`, and the largest of what it loads, NaN if one is. On sm_103 alone ("tcgen05.ld.red")."""
    names = ", ".join(f"{{$w{i}}}" for i in range(columns))
    *loaded, maximum = inline_ptx(
        f"tcgen05.ld.red.sync.aligned.32x32b.x{columns}.max.NaN.f32 {{{names}}}, {{$w{columns}}}, [{{$r0}}];",
        write_only_types=[Float32] * (columns + 1),
        read_only_args=[address],
    )
    return tuple(loaded), maximum


def store(address: Int32, values: list):
    """The thread's values, 32 bits each and a power of 2 of them, to the columns from ``address`` on."""
    names = ", ".join(f"{{$r{i + 1}}}" for i in range(len(values)))
    inline_ptx(
        f"tcgen05.st.sync.aligned.32x32b.x{len(values)}.b32 [{{$r0}}], {{{names}}};",
        read_only_args=[address, *values],
    )


def wait_loads():
    """Until the thread's loads are there."""
    inline_ptx("tcgen05.wait::ld.sync.aligned;")


def wait_stores():
    """Until the thread's stores are done."""
    inline_ptx("tcgen05.wait::st.sync.aligned;")


def before_sync():
    """What the thread has done in tensor memory comes before the barrier that follows."""
    inline_ptx("tcgen05.fence::before_thread_sync;")


def after_sync():
    """What the thread does in tensor memory comes after the barrier it has waited for."""
    inline_ptx("tcgen05.fence::after_thread_sync;")
