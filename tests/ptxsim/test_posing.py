"""Tensors that pose as CUDA tensors: where they lie, and what shares memory with what."""

import threading

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint

import ptxsim
from ptxsim.host.posing import posing


@pytest.fixture(autouse=True)
def _posing():
    with ptxsim.simulate("sm_90a") as simulation, posing(simulation):
        yield


def address(tensor):
    return tensor.untyped_storage().data_ptr()


def test_new_tensors_are_aligned_like_cuda_memory():
    """Whatever makes them; sizes that the host's allocator serves from different places."""
    for count in (1, 3, 100, 1000, 100_000):
        x = torch.arange(count, device="cuda")
        made = [x, x + 1, x.clone(), x.to(torch.float16), torch.empty_like(x), torch.stack([x, x]), torch.tensor([1.5])]
        assert [address(tensor) % 512 for tensor in made] == [0] * len(made)
        assert torch.equal(x, torch.from_numpy(np.arange(count)))
    transposed = torch.randn(4, 8, dtype=torch.bfloat16).t().clone(memory_format=torch.preserve_format)
    assert transposed.stride() == (1, 8) and address(transposed) % 512 == 0


def test_views_share_memory():
    x = torch.zeros(6, 4, device="cuda")
    for view in (x.view(-1), x[2:], x.t(), x.detach(), x.chunk(2)[0], x.to("cuda"), torch.as_strided(x, (2,), (1,))):
        assert address(view) == address(x)
    x[2:].fill_(1.0)
    assert x.sum() == 16
    assert torch.add(x, 1.0, out=x) is x and x.sum() == 40
    array = np.zeros(3)
    torch.from_numpy(array)[1] = 2.0
    assert array[1] == 2.0


def test_gradients():
    x = torch.nn.Parameter(torch.randn(5, device="cuda"))
    y = (x * x).exp()
    assert address(x) % 512 == address(y) % 512 == 0
    y.sum().backward()
    torch.testing.assert_close(x.grad, (2 * x * (x * x).exp()).detach())


class Watched(torch.autograd.Function):
    """x², and what its backward sees: whether tensors pose, what a new one holds, and where it lies; ``depth`` times,
    each inside of the one before."""

    @staticmethod
    def forward(ctx, x, depth, seen, threads):
        ctx.depth, ctx.seen, ctx.threads = depth, seen, threads
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, dout):
        (x,) = ctx.saved_tensors
        fresh = torch.empty_like(x)
        ctx.threads.add(threading.get_ident())
        ctx.seen.append((x.is_cuda, dout.device.type, bool(fresh.isnan().all()), address(fresh) % 512))
        if ctx.depth > 1:
            with torch.enable_grad():
                again = x.detach().requires_grad_()
                torch.autograd.backward(Watched.apply(again, ctx.depth - 1, ctx.seen, ctx.threads).sum())
        return 2 * x * dout, None, None, None


def by_grad(y, x):
    return torch.autograd.grad(y, x)[0]


def by_backward(y, x):
    y.backward()
    return x.grad


@pytest.mark.parametrize("differentiate", [by_grad, by_backward])
@pytest.mark.parametrize("depth", [1, 70])  # from the 60th on, each has a thread of the engine's
def test_python_that_a_backward_calls_sees_tensors_that_pose(differentiate, depth):
    seen, threads = [], set()
    x = torch.randn(5, device="cuda", requires_grad=True)
    y = Watched.apply(x, depth, seen, threads)
    y.register_hook(lambda gradient: seen.append((gradient.is_cuda, gradient.device.type, True, 0)))
    torch.testing.assert_close(differentiate(y.sum(), x), 2 * x)
    assert seen == [(True, "cuda", True, 0)] * (1 + depth)
    assert (len(threads) > 1) == (depth > 60)


def test_a_backward_is_checkpointed():
    seen = []
    x = torch.randn(5, device="cuda", requires_grad=True)
    y = checkpoint(
        lambda x: Watched.apply(x, 1, seen, set()) * (1.0 if x.is_cuda else torch.nan), x, use_reentrant=False
    )
    y.sum().backward()
    torch.testing.assert_close(x.grad, 2 * x)
    assert seen == [(True, "cuda", True, 0)]
