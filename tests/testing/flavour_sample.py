"""A sample of problems, simulated and compared with the reference, for a process that has one flavour of the DSL:
``python -m tests.testing.flavour_sample N`` prints a line of JSON for each Nth: its options, the flavour that compiled
it and what ``python -m cute_fa run --json`` says."""

from __future__ import annotations

import json
import sys

from click.testing import CliRunner, Result

import ptxsim
from cute_fa.engine.flavour import active
from cute_fa.tools.cli import main

# Options of `python -m cute_fa run`: every kernel, the head dims of the static figures, and features in few kernels,
# since compiling takes most of the time.
PROBLEMS = (
    "--arch sm_80 --head-dim 64 --causal --alibi --seqlen-q 130 --seqlen-k 200 --heads 2 --inputs peaked --race",
    "--arch sm_80 --head-dim 128 --causal --heads 4 --heads-kv 2 --varlen --batch 2 --seqlen-q 150 --inputs peaked",
    "--arch sm_80 --head-dim 256 --window 40 9 --sink 3 --seqlen-q 100 --seqlen-k 170 --heads 1 --inputs peaked",
    "--arch sm_80 --head-dim 128 --seqlen-q 1 --seqlen-k 500 --heads 8 --heads-kv 1 --page-size 16 --num-splits 3",
    "--arch sm_80 --append --head-dim 64 --seqlen-q 5 --seqlen-k 100 --heads 2 --page-size 16 --rotary-dim 32",
    "--arch sm_80 --head-dim 64 --causal --backward --seqlen-q 130 --heads 2 --inputs peaked --race",
    "--arch sm_80 --head-dim 128 --backward --seqlen-q 130 --heads 2 --heads-kv 1 --softcap 20",
    "--arch sm_80 --head-dim 64 --causal --backward --deterministic --seqlen-q 130 --heads 2 --alibi",
    "--arch sm_90a --head-dim 64 --causal --alibi --seqlen-q 200 --seqlen-k 300 --heads 2 --inputs peaked --race",
    "--arch sm_90a --head-dim 64 --seqlen-q 200 --seqlen-k 300 --heads 2 --softcap 20 --learnable-sink --inputs peaked",
    "--arch sm_90a --head-dim 128 --causal --heads 4 --heads-kv 2 --varlen --batch 2 --seqlen-q 150 --race",
    "--arch sm_90a --head-dim 256 --window 40 9 --sink 3 --seqlen-q 140 --seqlen-k 170 --heads 1 --inputs peaked",
    "--arch sm_90a --head-dim 128 --causal --seqlen-q 8 --seqlen-k 300 --heads 4 --heads-kv 1 --page-size 64",
    "--arch sm_90a --head-dim 128 --seqlen-q 1 --seqlen-k 500 --heads 8 --heads-kv 1 --page-size 16 --num-splits 3",
    "--arch sm_90a --head-dim 128 --causal --backward --seqlen-q 130 --heads 2 --inputs peaked",
    "--arch sm_100a --head-dim 128 --causal --alibi --seqlen-q 200 --seqlen-k 300 --heads 2 --inputs peaked --race",
    "--arch sm_100a --head-dim 256 --softcap 20 --sink 3 --window 40 9 --seqlen-q 300 --heads 1 --inputs peaked",
    "--arch sm_100a --head-dim 64 --dtype e4m3 --seqlen-q 150 --seqlen-k 300 --heads 4 --heads-kv 2 --page-size 16",
)


def run_sample(every: int) -> None:
    ptxsim.install()
    for problem in PROBLEMS[::every]:
        done = CliRunner().invoke(main, ["run", *problem.split(), "--json"])
        print(json.dumps({"problem": problem, "flavour": active(), **_told(done)}), flush=True)


def _told(done: Result) -> dict:
    """What the command has printed, or the exception that kept it from that."""
    return json.loads(done.stdout) if done.stdout else {"ok": False, "message": repr(done.exception)}


if __name__ == "__main__":
    run_sample(int(sys.argv[1]))
