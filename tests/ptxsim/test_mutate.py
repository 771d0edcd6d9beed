"""``python -m ptxsim mutate``: what is noticed of a script's kernel, what is kept between runs, and the exit codes."""

import json

import pytest

from ptxsim.analysis.equivalence import FOR_SPEED
from ptxsim.analysis.mutants import KINDS
from tests.testing.commands import neighbour, run_ptxsim


def mutate(script, *options):
    """(exit code, output) of the command."""
    return run_ptxsim("mutate", script, *options)


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_noticed_and_escaped(tmp_path):
    """A barrier that is needed; two of which either would do, and a second run that asks only what it is told to."""
    script, out = tmp_path / "neighbour.py", tmp_path / "records.jsonl"
    script.write_text(neighbour("cute.arch.barrier()"))
    code, output = mutate(script, "--arch", "sm_90a")
    assert code == 0 and "1 (1 RaceError)" in output, output
    script.write_text(neighbour("cute.arch.barrier()", "cute.arch.barrier(barrier_id=1, number_of_threads=64)"))
    code, output = mutate(script, "--arch", "sm_90a", "--out", str(out), "--jobs", "2")
    assert code == 1 and output.count("escaped: deleted: PTX line") == 2, output
    line = 1 + next(i for i, x in enumerate(script.read_text().splitlines()) if "barrier_id=1" in x)
    assert f"neighbour.py:{line}): bar.sync 1, 64;" in output
    assert [(r["kind"], r["outcome"], r["by"]) for r in records(out)] == [("barrier", "escaped", "")] * 2
    out.write_text(out.read_text().replace('"escaped"', '"caught"', 1))
    code, output = mutate(script, "--arch", "sm_90a", "--out", str(out), "--again")
    # the one that had escaped ran again; of the other only what is kept counts
    assert code == 1 and [r["outcome"] for r in records(out)] == ["caught", "escaped"]


def test_what_the_scripts_own_observers_notice(tmp_path):
    """Of two barriers either would do, for the result and for the race detector; the script insists on both."""
    script = tmp_path / "neighbour.py"
    lines = [f"cute.arch.barrier(barrier_id={i}, number_of_threads=64)" for i in (1, 2)]
    script.write_text(f"{_BARRIERS}\n{neighbour(*lines)}\nassert barriers.seen == {{1, 2}}, barriers.seen\n")
    code, output = mutate(script, "--arch", "sm_90a")
    assert code == 0 and "2 (2 wrong result)" in output, output


_BARRIERS = """
import ptxsim
from cute_fa.engine import worlds

class Barriers(ptxsim.Observer):
    seen = set()
    def bar_completed(self, cta, barrier):
        self.seen.add(barrier)

barriers = Barriers()
worlds.simulation().observers.append(barriers)
"""


def test_what_cannot_be_studied(tmp_path):
    """A kernel that fails undamaged, and a script that launches nothing."""
    script = tmp_path / "script.py"
    script.write_text(neighbour())
    code, output = mutate(script, "--arch", "sm_90a")
    assert code == 1 and "the undamaged kernel fails in the run 'default': RaceError" in output
    script.write_text("import torch\n")
    code, output = mutate(script, "--arch", "sm_90a")
    assert code == 2 and "launched no kernel" in output


# Two of every kind in one of the FA3 forward's kernels; all of them is docs/mutations.md.
@pytest.mark.thorough
def test_fa3_forward(tmp_path):
    out = tmp_path / "records.jsonl"
    options = ["--arch", "sm_90a", "--sms", "1", "--sample", "2", "--seeds", "0", "--out", str(out)]
    code, output = mutate("tests/testing/attention.py", *options, "--", "cute-fa", "64", "causal")
    assert code == 0, output
    found = records(out)
    assert sorted(r["kind"] for r in found) == sorted([*KINDS, *KINDS])
    caught_by = {kind: {r["by"] for r in found if (r["kind"], r["outcome"]) == (kind, "caught")} for kind in KINDS}
    assert {r["by"] for r in found if r["outcome"] == "equivalent"} == {FOR_SPEED}  # the turns of the warpgroups
    assert caught_by == {
        "barrier": {"Deadlock"},
        "fence": {"WgmmaError"},
        "wait": {"RaceError"},
        "arrive": {"Deadlock"},
        "expect_tx": {"Deadlock"},
        "commit": {"WgmmaError"},
    }
