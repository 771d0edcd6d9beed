"""quack's softmax, as a script for a GPU: forward and backward against torch.

python -m ptxsim run examples/quack_softmax.py --arch sm_90a --race --seeds 2 --late
"""

import os

os.environ.setdefault("QUACK_CACHE_ENABLED", "0")  # its cache on disk holds machine code for GPUs

import torch
from quack.softmax import softmax

torch.manual_seed(0)
x = (4 * torch.randn(8, 1000, device="cuda")).to(torch.bfloat16).requires_grad_()
expected = torch.softmax(x.detach().float(), -1)

out = softmax(x)
error = (out.float() - expected).abs().max().item()
print(f"softmax of {tuple(x.shape)} on {x.device}: largest error {error:.1e}")
assert error < 2**-8  # half a unit of bf16 below 1

grad = torch.randn_like(out)
out.backward(grad)
y = out.detach().float()
grad_expected = y * (grad.float() - (grad.float() * y).sum(-1, keepdim=True))
error = (x.grad.float() - grad_expected).abs().max().item()
print(f"its gradient: largest error {error:.1e}")
assert error < 2**-7
