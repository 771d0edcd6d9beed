"""Compiles FlashAttention-4 forward kernels without a GPU: ``python -m perf.compile_fa4 FOLDER HEAD_DIM:CAUSAL …``.

The environment (set by ``perf.static``) names the target and has the DSL dump cubins into FOLDER; each is renamed to
``HEAD_DIM:CAUSAL.kept`` before the next compile, since the dumped names may collide.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from flash_attn.cute.interface import _flash_attn_fwd
from torch._subclasses.fake_tensor import FakeTensorMode


def main(folder: Path, keys: list[str]) -> None:
    for key in keys:
        head_dim, causal = map(int, key.split(":"))
        with FakeTensorMode():  # FA4 then compiles and launches nothing
            q = torch.empty(1, 1024, 8, head_dim, dtype=torch.bfloat16, device="cuda")
            _flash_attn_fwd(q, q, q, causal=bool(causal), return_lse=True)
        (cubin,) = folder.glob("*.cubin")
        cubin.rename(folder / f"{key}.kept")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
