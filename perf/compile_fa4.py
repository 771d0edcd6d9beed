"""Compiles FlashAttention-4's kernels without a GPU:
``python -m perf.compile_fa4 FOLDER DIRECTION:HEAD_DIM:HEAD_DIM_V:CAUSAL:DTYPE …``.

The environment (set by ``perf.static``) names the target and has the DSL dump cubins into FOLDER; each is renamed to
``DIRECTION:HEAD_DIM:HEAD_DIM_V:CAUSAL:DTYPE:NUMBER.kept`` before the next compile, since the dumped names may collide.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from cutlass.utils import HardwareInfo
from flash_attn.cute.interface import _flash_attn_bwd, _flash_attn_fwd
from torch._subclasses.fake_tensor import FakeTensorMode

_DTYPES = {"bf16": torch.bfloat16, "e4m3": torch.float8_e4m3fn}


def main(folder: Path, keys: list[str]) -> None:
    for key in keys:
        direction, head_dim, head_dim_v, causal, dtype = key.split(":")
        compile_kernels(direction, int(head_dim), int(head_dim_v), causal == "1", _DTYPES[dtype])
        for number, cubin in enumerate(sorted(folder.glob("*.cubin"))):
            cubin.rename(folder / f"{key}:{number}.kept")


def compile_kernels(direction: str, head_dim: int, head_dim_v: int, causal: bool, dtype: torch.dtype) -> None:
    """What one call compiles: of the forward one kernel, of the backward also those before and after the main one."""
    with FakeTensorMode():  # FA4 then compiles and launches nothing
        q = torch.empty(1, 1024, 8, head_dim, dtype=dtype, device="cuda")
        v = torch.empty(1, 1024, 8, head_dim_v, dtype=dtype, device="cuda")
        if direction == "fwd":
            names = ("q_descale", "k_descale", "v_descale") if dtype.itemsize == 1 else ()
            descales = {name: torch.empty(1, 8, dtype=torch.float32, device="cuda") for name in names}
            _flash_attn_fwd(q, q, v, causal=causal, return_lse=True, **descales)
        else:
            lse = torch.empty(1, 8, 1024, dtype=torch.float32, device="cuda")
            _flash_attn_bwd(q, q, v, v, v, lse, causal=causal)


def answer_for_the_device() -> None:
    """Persistent schedulers ask HardwareInfo how many SMs there are, which asks the driver: here the environment
    says it."""
    sms = int(os.environ["FLASH_ATTENTION_NUM_SMS"])
    HardwareInfo.__init__ = lambda self, device_id=0: None
    HardwareInfo.get_device_multiprocessor_count = lambda self: sms
    HardwareInfo.get_max_active_clusters = lambda self, cluster_size, stream=None: sms // cluster_size


if __name__ == "__main__":
    answer_for_the_device()
    main(Path(sys.argv[1]), sys.argv[2:])
