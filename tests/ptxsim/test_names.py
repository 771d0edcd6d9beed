"""Readable names of kernels."""

import pytest

from ptxsim.errors import Deadlock
from ptxsim.names import readable

LONG = "kernel_cutlass_kernel_fa3_sm90forwardkernelFa3ForwardKernel_object_at__ForwardArgumentsqtensorptrbf16gmem_0"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (LONG, "fa3_sm90forwardkernelFa3ForwardKernel"),
        ("kernel_cutlass_kernel_tensorptrf32gmemo641_tensorptrf32gmemo641_0", "kernel"),
        ("kernel_cutlass_softmax_tensor0000o1_tensor0000o1_0", "softmax"),
        ("_Z6kernelPf", "_Z6kernelPf"),
        ("tensorptr", "tensorptr"),
    ],
)
def test_readable(name, expected):
    assert readable(name) == expected
    assert readable(name, 5) == (expected if len(expected) <= 5 else expected[:4] + "…")


def test_errors_show_the_readable_name_and_keep_the_whole():
    error = Deadlock("no warp can run")
    assert str(error) == "no warp can run" and error.kernel is None
    error.kernel = LONG
    assert str(error) == "fa3_sm90forwardkernelFa3ForwardKernel: no warp can run"
    assert error.message == "no warp can run" and error.kernel == LONG
