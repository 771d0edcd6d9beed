"""Tensors that pose as CUDA tensors: where they lie, and what shares memory with what."""

import numpy as np
import pytest
import torch

import ptxsim
from ptxsim.posing import posing


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
