"""This project's FA3 forward, as a script for a GPU. The figure in docs/sanitizer.md is a drawing of its trace.

python -m ptxsim run examples/fa3_forward.py --arch sm_90a --sms 1 --late --trace fa3.json
python docs/draw_trace.py fa3.default-late.json docs/fa3_trace.png
"""

import torch

from cute_fa import flash_attn_func

torch.manual_seed(0)
q, k, v = (torch.randn(1, 384, 1, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3))
out = flash_attn_func(q, k, v, causal=True)

scores = torch.einsum("bqhd,bkhd->bhqk", q.float(), k.float()) * q.shape[-1] ** -0.5
scores += torch.full(scores.shape[-2:], float("-inf"), device="cuda").triu(1)
error = (out - torch.einsum("bhqk,bkhd->bqhd", torch.softmax(scores, -1), v.float())).abs().max().item()
print(f"attention of {tuple(q.shape)} on {q.device}: largest error {error:.1e}")
assert error < 0.02
