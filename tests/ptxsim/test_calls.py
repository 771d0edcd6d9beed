"""vprintf, which is what cute.printf becomes: conversions, packing of the arguments, which lanes print."""

import ctypes
import struct

import cutlass
import cutlass.cute as cute
import pytest
import torch
from cutlass.cute.runtime import from_dlpack

import ptxsim
from ptxsim.ops.calls import formatted


@cute.kernel
def kernel(x: cute.Tensor):
    thread, _, _ = cute.arch.thread_idx()
    if thread % 20 == 3:
        cute.printf("thread {} of {}: {} {}", thread, cutlass.Int64(thread) << 40, x[thread], -x[thread])
    x[thread] = 2 * x[thread]


@cute.jit
def host(x: cute.Tensor):
    kernel(x).launch(grid=(1, 1, 1), block=(32, 1, 1))


@pytest.mark.parametrize("race", [False, True])
def test_printf_of_a_kernel(capsys, race):
    """A 32-bit argument before a 64-bit one; only the lanes of the branch print, and the kernel goes on."""
    x = torch.arange(32.0) / 4
    with ptxsim.simulate("sm_90a", race=race) as simulation:
        view = from_dlpack(ptxsim.device_view(x))
        simulation.run(cute.compile(host, view), view)
    assert capsys.readouterr().out.split("\n") == [
        f"thread 3 of {3 << 40}: 0.750000 -0.750000", f"thread 23 of {23 << 40}: 5.750000 -5.750000", ""]  # fmt: skip
    torch.testing.assert_close(x, torch.arange(32.0) / 2)


@pytest.mark.parametrize(
    ("text", "packed", "expected", "count"),
    [
        ("no arguments, 100%%", b"", "no arguments, 100%", 0),
        ("%d %u %x", struct.pack("<iII", -5, 2**32 - 1, 255), "-5 4294967295 ff", 3),
        ("%d|%lld|%d", struct.pack("<i4xqi", 7, -(2**40), 8), f"7|{-(2**40)}|8", 3),
        ("%c%5.2f %e", struct.pack("<i4xdd", ord("A"), 3.14159, 1e10), "A 3.14 1.000000e+10", 3),
        ("%-4d|%04d|%+d", struct.pack("<iii", 1, 2, 3), "1   |0002|+3", 3),
        ("%p %llu", struct.pack("<QQ", 4096, 2**63), f"0x1000 {2**63}", 2),
    ],
)
def test_conversions(text, packed, expected, count):
    room = ctypes.create_string_buffer(packed, len(packed) + 8)
    assert formatted(text, ctypes.addressof(room)) == (expected, count)


def test_strings():
    word = ctypes.create_string_buffer(b"tile")
    room = ctypes.create_string_buffer(struct.pack("<i4xQ", 1, ctypes.addressof(word)))
    assert formatted("%d %6s.", ctypes.addressof(room)) == ("1   tile.", 2)


@pytest.mark.parametrize("text", ["%*d", "%n", "%a"])
def test_conversions_that_are_refused(text):
    room = ctypes.create_string_buffer(32)
    with pytest.raises(ptxsim.PtxError, match="of printf is not simulated"):
        formatted(text, ctypes.addressof(room))
