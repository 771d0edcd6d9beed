"""What a type checker says of calls of the public functions: mypy, with this project's settings."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
GIVEN = """
import torch

from cute_fa import AttentionProblem, DispatchKey, DType, SmArch, append_kv, flash_attn_func, flash_attn_varlen_func
from cute_fa import AttentionService, Fa2BwdRequest, Fa2FwdRequest, flash_attn_with_kvcache, reference
from cute_fa.compat import fa2, fa3, fa4

q = k = v = offsets = torch.empty(0)
lengths = offsets, offsets, 1, 1
"""
FIELDS = (
    "arch=SmArch.SM_80, dtype=DType.BF16, batch=1, seqlen_q=1, seqlen_k=1, num_heads=1, num_heads_kv=1, head_dim=64, "
    "head_dim_v=64"
)
# Calls with nothing wrong about them.
RIGHT = [
    "flash_attn_varlen_func(q, k, v, *lengths, seqused_k=k, block_table=k, deterministic=True).float()",
    "flash_attn_with_kvcache(q, k, v, cache_seqlens=3, page_table=k, rotary_cos=k, rotary_sin=k).float()",
    "reference.attention(q, k, v, causal=True)[0].float()",
    "reference.check_gradients(reference.gradients(q, k, v, q, sink_tokens=1), q, k, v, q, causal=True)",
    "fa2.flash_attn_func(q, k, v, 0.0, None, True).float()",
    "fa2.flash_attn_varlen_func(q, k, v, *lengths, 0.0, block_table=k)",
    "fa2.flash_attn_with_kvcache(q, k, v, cache_seqlens=3)",
    "fa3.flash_attn_func(q, k, v, 0.1, True)",
    "fa3.flash_attn_varlen_func(q, k, v, *lengths, k, k)",
    "fa3.flash_attn_with_kvcache(q, k, v, page_table=k)",
    "fa4_out, fa4_lse = fa4.flash_attn_func(q, k, v, learnable_sink=k); fa4_out.float()",
    "fa4.flash_attn_varlen_func(q, k, v, None, offsets, offsets)[0].float()",
    "DispatchKey(SmArch.SM_80, DType.BF16, 64, causal=True)",
    "AttentionService().submit(Fa2FwdRequest(q, k, v)).result()[0].float()",
    "AttentionService().submit(Fa2BwdRequest(q, k, v, q, q, q)).result(1.0).dq.float()",
    f"AttentionProblem({FIELDS}, softmax_scale=1.0, window_left=3, alibi=True)",
]
# Others, with what mypy's first words about them hold.
WRONG = {
    "flash_attn_func(q, k)": 'No overload variant of "flash_attn_func"',
    "flash_attn_func(q, k, v, seqused_k=k)": 'Unexpected keyword argument "seqused_k"',
    "flash_attn_with_kvcache(q, k, v, deterministic=True)": 'Unexpected keyword argument "deterministic"',
    "append_kv(k, v, k, v, offsets, page_tables=k)": 'Unexpected keyword argument "page_tables"',
    "reference.gradients(q, k, v, q, sinks=1)": 'Unexpected keyword argument "sinks"',
    "fa2.flash_attn_func(q, k)": 'Missing positional argument "v"',
    "fa2.flash_attn_func(q, k, v, 'x')": 'Argument 4 to "flash_attn_func" has incompatible type "str"',
    "fa2.flash_attn_func(q, k, v, dropout=0.0)": 'Unexpected keyword argument "dropout"',
    "fa2.flash_attn_varlen_func(q, k, v, *lengths, page_table=k)": 'Unexpected keyword argument "page_table"',
    "fa2.flash_attn_with_kvcache(q, k, v, page_table=k)": 'Unexpected keyword argument "page_table"',
    "fa3.flash_attn_func(q, k, v, dropout_p=0.0)": 'Unexpected keyword argument "dropout_p"',
    "fa3.flash_attn_varlen_func(q, k, v, *lengths, 0.0)": 'has incompatible type "float"; expected "Tensor | None"',
    "fa3.flash_attn_with_kvcache(q, k, v, block_table=k)": 'Unexpected keyword argument "block_table"',
    "fa4.flash_attn_func(q, k, v).float()": '"tuple[Tensor, Tensor | None]" has no attribute "float"',
    "fa4.flash_attn_func(q, k, v, 0.1)": 'Argument 4 to "flash_attn_func" has incompatible type "float"',
    "fa4.flash_attn_varlen_func(q, k, v, block_table=k)": 'Unexpected keyword argument "block_table"',
    "AttentionService().submit(q)": 'Argument 1 to "submit" of "AttentionService" has incompatible type "Tensor"',
    "AttentionService().submit(Fa2FwdRequest(q, k, v)).result().dq": '"tuple[Tensor, Tensor]" has no attribute "dq"',
    "DispatchKey(SmArch.SM_80, DType.BF16, 64, window=3)": 'Unexpected keyword argument "window"',
    "DispatchKey(SmArch.SM_80, DType.BF16, '64')": 'Argument 3 to "DispatchKey" has incompatible type "str"',
    f"AttentionProblem({FIELDS})": 'Missing positional argument "softmax_scale"',
    f"AttentionProblem({FIELDS}, softmax_scale=1.0, window=3)": 'Unexpected keyword argument "window"',
    f"AttentionProblem({FIELDS}, softmax_scale=1.0, alibi=k)": 'Argument "alibi" to "AttentionProblem" has',
}
for call in (
    "flash_attn_func(q, k, v{})",
    "flash_attn_varlen_func(q, k, v, *lengths{})",
    "flash_attn_with_kvcache(q, k, v, k, v{})",
):
    RIGHT += [
        call.format("") + ".float()",
        call.format(", causal=True, window_size=(1, None), softcap=None") + ".float()",
        call.format(", dropout_p=0.0, attention_chunk=0") + ".float()",
    ]
    WRONG |= {
        call.format(', dropout_p="x"'): "No overload variant",
        call.format(", 0.0"): "No overload variant",
        call.format(", window_size=(1, 2, 3)"): 'Argument "window_size"',
        call.format(", causal=True, windowsize=(1, 2)"): 'Unexpected keyword argument "windowsize"',
        call.format(", return_lse=torch.is_grad_enabled()") + ".float()": 'Item "tuple[Tensor, ...]" of',
    }
    for flag in ("return_lse", "return_attn_probs", "return_softmax_lse"):
        RIGHT.append("out, lse = " + call.format(f", {flag}=True") + "; out.float(), lse.float()")
        RIGHT.append(call.format(f", {flag}=False") + ".float()")
        WRONG[call.format(f", {flag}=True") + ".float()"] = '"tuple[Tensor, Tensor]" has no attribute "float"'


def test_what_mypy_says(tmp_path):
    uses = [*GIVEN.splitlines(), *RIGHT, *WRONG]
    file = tmp_path / "uses.py"
    file.write_text("\n".join(uses))
    command = [sys.executable, "-m", "mypy", "--cache-dir", str(tmp_path / "cache"), str(file)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    said: dict[str, str] = {}
    for line, message in re.findall(r"uses\.py:(\d+): error: (.*)$", done.stdout, re.MULTILINE):
        said.setdefault(uses[int(line) - 1], message)
    assert {use: said.get(use, "") for use in WRONG if WRONG[use] not in said.get(use, "")} == {}
    assert {use: message for use, message in said.items() if use not in WRONG} == {}
