"""Programmatic dependent launch: what must come after griddepcontrol.wait, in the race detector."""

import cutlass
import cutlass.cute as cute
import pytest
import torch
from cutlass.cute.runtime import from_dlpack

import ptxsim

GPU = dict(sem="relaxed", scope="gpu")


class Pair:
    """Two launches of two CTAs of 64 threads: w = 2 u, then y = w + x, from what another CTA has written."""

    def __init__(self, *, first="signals", wait="all", pdl=True, second="reads"):
        self.first, self.wait, self.pdl, self.second = first, wait, pdl, second

    @cute.jit
    def __call__(self, u: cute.Tensor, w: cute.Tensor, x: cute.Tensor, y: cute.Tensor, n: cute.Tensor):
        self.produce(u, w, n).launch(grid=(2, 1, 1), block=(64, 1, 1), use_pdl=True)
        self.consume(u, w, x, y, n).launch(grid=(2, 1, 1), block=(64, 1, 1), use_pdl=self.pdl)

    @cute.kernel
    def produce(self, u: cute.Tensor, w: cute.Tensor, n: cute.Tensor):
        i = cute.arch.block_idx()[0] * 64 + cute.arch.thread_idx()[0]
        if cutlass.const_expr(self.first == "signals"):
            cute.arch.griddepcontrol_launch_dependents()
        w[i] = 2.0 * u[i]
        cute.arch.atomic_add(n.iterator, cutlass.Int32(1), **GPU)

    @cute.kernel
    def consume(self, u: cute.Tensor, w: cute.Tensor, x: cute.Tensor, y: cute.Tensor, n: cute.Tensor):
        thread, _, _ = cute.arch.thread_idx()
        i = 127 - cute.arch.block_idx()[0] * 64 - thread
        early = x[i]  # nobody writes x
        cute.arch.atomic_add(n.iterator, cutlass.Int32(1), **GPU)  # nor does an atomic race with an atomic
        if cutlass.const_expr(self.second == "overwrites"):
            u[i] = early
        if cutlass.const_expr(self.wait == "all"):
            cute.arch.griddepcontrol_wait()
        if cutlass.const_expr(self.wait in ("warp 0", "warp 0 alone")):
            if thread < 32:
                cute.arch.griddepcontrol_wait()
        if cutlass.const_expr(self.wait == "warp 0"):
            cute.arch.sync_threads()
        y[i] = w[i] + early


def run(**options):
    """Two rounds, so that ``produce`` has a prerequisite, too: ``consume``, which signals nothing."""
    u, x = torch.arange(128.0), torch.full((128,), 0.5)
    w, y, n = torch.zeros(128), torch.zeros(128), torch.zeros(1, dtype=torch.int32)
    with ptxsim.simulate("sm_90a", race=True, line_info=True) as simulation:
        views = [from_dlpack(ptxsim.device_view(t)) for t in (u, w, x, y, n)]
        function = cute.compile(Pair(**options), *views)
        for _ in range(2):
            simulation.run(function, *views)
    torch.testing.assert_close(y, 2 * u + 0.5)
    assert n.item() == 4 * 128


@pytest.mark.parametrize(
    "options", [{}, {"wait": "warp 0"}, {"wait": "", "pdl": False}, {"wait": "", "first": "quiet"}]
)
def test_ordered(options):
    """By the wait of all warps, or of one and a barrier; a launch that is not early, or after a quiet one."""
    run(**options)


@pytest.mark.parametrize("wait", ["", "warp 0 alone"])
def test_read_before_the_wait(wait):
    """Both sides are named: this launch's line, the other's kernel and line."""
    with pytest.raises(ptxsim.RaceError, match=r"read of global memory .* comes before griddepcontrol\.wait") as found:
        run(wait=wait)
    error = found.value
    assert error.where.endswith("w1" if wait else "w0") and "consume" in error.kernel
    assert "the write by cta(1,0,0)" in error.message and "produce" in error.message
    assert error.message.count("test_dependents.py:") == 2


def test_write_before_the_wait():
    """Of what the launch before reads."""
    match = r"write of global memory .* comes before griddepcontrol\.wait"
    with pytest.raises(ptxsim.RaceError, match=match) as found:
        run(second="overwrites")
    assert "there is the read by cta(1,0,0)" in found.value.message
