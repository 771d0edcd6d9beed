"""What the race detector costs: ``python -m tests.testing.race_cost`` prints the CPU time of launches without and with
it, and the ratio, for launches of milliseconds and for longer ones. The fastest of seven each, without compiling.
"""

import os
import time

os.environ.setdefault("QUACK_CACHE_ENABLED", "0")  # its cache on disk holds machine code for GPUs

import torch

import cute_fa
import ptxsim
from ptxsim.host.posing import posing

RUNS = 7


def best(run):
    """CPU seconds of the fastest run."""
    seconds = []
    for _ in range(RUNS):
        started = time.process_time()
        run()
        seconds.append(time.process_time() - started)
    return min(seconds)


def compare(name, simulation, run):
    taken = []
    for simulation.race in (False, True):
        run()
        taken.append(best(run))
    plain, race = taken
    print(f"{name:40} {1e3 * plain:8.1f} ms {1e3 * race:8.1f} ms {race / plain:6.2f}", flush=True)


def attention(batch, seqlen, heads, head_dim):
    q, k, v = (torch.randn(batch, seqlen, heads, head_dim).bfloat16() for _ in range(3))
    return lambda: cute_fa.flash_attn_func(q, k, v, causal=True)


def main():
    for arch in ("sm_80", "sm_90a"):
        with cute_fa.simulate(arch) as simulation:
            for shape in ((1, 64, 1, 64), (2, 600, 4, 64), (2, 600, 4, 128)):
                name = "{} forward {} x {} x {} x {}".format(arch, *shape)
                compare(name, simulation, attention(*shape))
    with ptxsim.simulate("sm_90a") as simulation, posing(simulation):
        from quack.softmax import softmax_fwd

        for rows, columns in ((8, 1000), (64, 1000), (4, 20000)):
            x = torch.randn(rows, columns).bfloat16()
            compare(f"quack softmax {rows} x {columns}", simulation, lambda x=x: softmax_fwd(x))


if __name__ == "__main__":
    main()
