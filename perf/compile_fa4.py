"""Compiles FlashAttention-4's kernels without a GPU:
``python -m perf.compile_fa4 FOLDER DIRECTION:HEAD_DIM:CAUSAL …``.

The environment (set by ``perf.static``) names the target and has the DSL dump cubins into FOLDER; each is renamed to
``DIRECTION:HEAD_DIM:CAUSAL:NUMBER.kept`` before the next compile, since the dumped names may collide.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from flash_attn.cute.interface import _flash_attn_bwd, _flash_attn_fwd
from torch._subclasses.fake_tensor import FakeTensorMode


def main(folder: Path, keys: list[str]) -> None:
    for key in keys:
        direction, head_dim, causal = key.split(":")
        compile_kernels(direction, int(head_dim), causal == "1")
        for number, cubin in enumerate(sorted(folder.glob("*.cubin"))):
            cubin.rename(folder / f"{key}:{number}.kept")


def compile_kernels(direction: str, head_dim: int, causal: bool) -> None:
    """What one call compiles: of the forward one kernel, of the backward also those before and after the main one."""
    with FakeTensorMode():  # FA4 then compiles and launches nothing
        q = torch.empty(1, 1024, 8, head_dim, dtype=torch.bfloat16, device="cuda")
        if direction == "fwd":
            _flash_attn_fwd(q, q, q, causal=causal, return_lse=True)
        else:
            lse = torch.empty(1, 8, 1024, dtype=torch.float32, device="cuda")
            _flash_attn_bwd(q, q, q, q, q, lse, causal=causal)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
