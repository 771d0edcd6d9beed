"""The simulator's commands as a user starts them, and a script for them."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

_NEIGHBOUR = """
import cutlass, cutlass.cute as cute, torch
from cutlass.cute.runtime import from_dlpack

@cute.kernel
def kernel(a: cute.Tensor, b: cute.Tensor):
    thread, _, _ = cute.arch.thread_idx()
    smem = cutlass.utils.SmemAllocator()
    shared = smem.allocate_tensor(cutlass.Float32, cute.make_layout(64), byte_alignment=16)
    shared[thread] = a[thread]
    BARRIERS
    b[thread] = shared[thread ^ 32]

@cute.jit
def launch(a: cute.Tensor, b: cute.Tensor):
    kernel(a, b).launch(grid=(1, 1, 1), block=(64, 1, 1))

a = torch.arange(64, dtype=torch.float32, device="cuda")
b = torch.empty_like(a)
launch(from_dlpack(a), from_dlpack(b))
torch.cuda.synchronize()
assert b.device.type == "cuda" and b.is_cuda
assert torch.equal(b.cpu(), a.cpu().roll(32)), b
"""


def neighbour(*barriers: str) -> str:
    """A script whose kernel's threads read what the neighbouring warp wrote, with these lines between."""
    return _NEIGHBOUR.replace("BARRIERS", "\n    ".join(barriers))


def run_ptxsim(command: str, script, *options: str) -> tuple[int, str]:
    """(exit code, output) of ``python -m ptxsim COMMAND SCRIPT …`` in the project's folder."""
    arguments = [sys.executable, "-W", "ignore", "-m", "ptxsim", command, str(script), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(arguments, cwd=ROOT, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr
