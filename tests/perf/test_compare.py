"""Regressions between two tables: what is beyond the threshold, what is noise."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from cute_fa.semantics.errors import ArgumentError
from perf.__main__ import main
from perf.compare import compare, machine_change
from perf.workload import Workload
from tests.testing.measured import measured, table_of

WORKLOADS = [Workload(seqlen=seqlen) for seqlen in (512, 1024, 2048, 4096, 8192)]
STEADY = (1.00, 1.00, 1.01, 1.01, 1.02)


@pytest.fixture
def tables(tmp_path):
    """Before and after: steady, slower, slower within its noise, slower within the threshold, faster."""
    after = [STEADY, (1.1, 1.1, 1.11, 1.12, 1.12), (0.9, 0.9, 1.2, 1.3, 1.4), (1.03,) * 5, (0.5, 0.5, 0.5, 0.6, 0.6)]
    first = [measured(workload, "cute-fa", *STEADY, sm_mhz_after=1980) for workload in WORKLOADS]
    second = [measured(w, "cute-fa", *times, sm_mhz_after=1500) for w, times in zip(WORKLOADS, after, strict=True)]
    return table_of(tmp_path / "a.csv", *first), table_of(tmp_path / "b.csv", *second)


def test_verdicts(tables):
    table = compare(*tables, threshold=0.03)
    verdicts = dict(zip(table.problem.str.extract(r"×(\d+)")[0].astype(int), table.verdict, strict=True))
    assert verdicts == {512: "same", 1024: "slower", 2048: "same", 4096: "same", 8192: "faster"}
    worst = table.iloc[0]
    assert (worst.verdict, worst.ratio) == ("slower", pytest.approx(1.11 / 1.01))
    assert (worst.before_ms, worst.after_ms) == (1.01, 1.11)
    # a threshold above the change hides it, one below shows what noise does not cover
    assert set(compare(*tables, threshold=0.12).verdict) == {"same", "faster"}
    assert compare(*tables, threshold=0.01).verdict.tolist().count("slower") == 2


def test_what_cannot_run_any_more_is_broken_and_comes_first(tmp_path, tables):
    rows = [measured(WORKLOADS[0], "cute-fa"), measured(WORKLOADS[1], "cute-fa", 9.0)]
    after = table_of(tmp_path / "c.csv", *rows)
    assert compare(tables[0], after, 0.03).verdict.tolist() == ["broken", "slower"]
    # what was never measured cannot have become worse
    assert len(compare(after, tables[0], 0.03)) == 1


def test_tables_of_different_gpus_have_nothing_in_common(tmp_path, tables):
    other = table_of(tmp_path / "c.csv", *(measured(w, "cute-fa", 1.0, gpu="A100") for w in WORKLOADS))
    with pytest.raises(ArgumentError, match="no common problem: measured before on H100, after on A100"):
        compare(tables[0], other, 0.03)


def test_of_a_problem_measured_twice_the_later_counts(tmp_path, tables):
    twice = table_of(
        tmp_path / "c.csv", measured(WORKLOADS[0], "cute-fa", 9.0), measured(WORKLOADS[0], "cute-fa", *STEADY)
    )
    assert compare(tables[0], twice, 0.03).verdict.tolist() == ["same"]


def test_the_machine_is_told(tables):
    same = "matmul_tflops 800 → 800 TFLOP/s, copy_gbps 4000 → 4000 GB/s"
    assert machine_change(*tables) == f"{same}, sm_mhz_after 1980 → 1500 MHz"


def test_command(tmp_path, tables):
    first, second = str(tmp_path / "a.csv"), str(tmp_path / "b.csv")

    def invoke(*arguments):
        return CliRunner().invoke(main, ["compare", *arguments])

    done = invoke(first, second, "--markdown")
    assert done.exit_code == 1, done.output
    lines = done.stdout.splitlines()
    assert lines[0].startswith("5 results in common; matmul_tflops 800 → 800")
    assert [line.split(" | ")[-1] for line in lines[3:]] == ["slower |", "faster |"]
    assert len(invoke(first, second, "--markdown", "--all").stdout.splitlines()) == 8
    assert invoke(first, first).exit_code == 0
    assert invoke(first, second, "--threshold", "0.2").exit_code == 0
    nothing = invoke(first, second, "--provider", "FA4")
    assert nothing.exit_code == 1
    assert "no common problem" in nothing.stderr
