"""FlashAttention-4's forward, as a script for a GPU: causal attention against the formula in fp32.

python -m ptxsim run examples/fa4_forward.py --arch sm_90a --race --late --trace fa4.json
"""

import os

os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "0")  # its cache on disk holds machine code for GPUs

import torch
from flash_attn.cute import flash_attn_func

torch.manual_seed(0)
q, k, v = (torch.randn(1, 200, 2, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
out, lse = flash_attn_func(q, k, v, causal=True, return_lse=True)

scores = torch.einsum("bqhd,bkhd->bhqk", q.float(), k.float()) * q.shape[-1] ** -0.5
scores += torch.full(scores.shape[-2:], float("-inf"), device="cuda").triu(1)
expected = torch.einsum("bhqk,bkhd->bqhd", torch.softmax(scores, -1), v.float())
errors = [(out - expected).abs().max().item(), (lse - torch.logsumexp(scores, -1)).abs().max().item()]
print(f"attention of {tuple(q.shape)} on {q.device}: largest errors {errors[0]:.1e} (O), {errors[1]:.1e} (LSE)")
assert errors[0] < 0.02 and errors[1] < 2e-3
