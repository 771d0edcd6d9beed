"""``python -m ptxsim time``: the table, the trace in Perfetto's eyes, and what cannot be timed."""

from __future__ import annotations

import json
import re

import pytest
from click.testing import CliRunner

from ptxsim.report.cli import main
from ptxsim.timing import assembler
from ptxsim.timing.replay import REASONS
from tests.testing import perfetto
from tests.testing.commands import neighbour, run_ptxsim
from tests.testing.traces import check_trace


def rows(output):
    """Cells of the table, those of rows of two lines joined."""
    lines = [[cell.strip() for cell in line[1:-1].split("│")] for line in output.splitlines() if line[:1] == "│"]
    found = []
    for cells in lines:
        if cells[0]:
            found.append(cells)
        else:
            found[-1][-1] += " " + cells[-1]
    return found


@pytest.fixture(scope="module")
def softmax(tmp_path_factory):
    """quack's softmax and its backward: rows of the table, and the trace."""
    path = tmp_path_factory.mktemp("time") / "softmax.json"
    code, output = run_ptxsim(
        "time", "examples/quack_softmax.py", "--arch", "sm_90a", "--gpu", "h100", "--trace", str(path)
    )
    assert code == 0, output
    assert "softmax of (8, 1000) on cuda:0" in output and "H100 SXM5 80GB at" in output
    return rows(output), path


def test_the_table(softmax):
    (forward, backward), _ = softmax
    assert forward[0] == "quacksoftmaxSoftmax" and backward[0] == "quacksoftmaxSoftmaxBackward"
    for name, grid, on, cycles, time, *busy, went in (forward, backward):
        assert (grid, on) == ("2×1×1", "2 SMs"), name
        cycles = int(cycles.replace(",", ""))
        assert 600 < cycles < 4000 and float(time) == pytest.approx(cycles / 1450, abs=0.06)
        tensor, issue, _, mufu = (int(share.rstrip("%")) for share in busy)
        assert tensor == 0 < issue < 60 and (mufu > 0) == (name == "quacksoftmaxSoftmax")
        shares = dict(re.findall(r"([a-z ]+) (\d+)%", went))
        assert {reason.strip() for reason in shares} <= set(REASONS) and 60 < sum(map(int, shares.values())) <= 101


def test_the_trace(softmax):
    """A process for each CTA of both launches, a track for each warp; what waits are for, and where."""
    table, path = softmax
    found = perfetto.opened(path)
    assert not found.problems and len(found.processes) == 4
    assert sorted(name.split(" quack")[0] for name in found.processes.values()) == ["launch 0"] * 2 + ["launch 1"] * 2
    ends = []
    for tracks in found.tracks.values():
        assert [name for name in tracks if re.fullmatch(r"warp \d+", name)] == list(tracks)
        spans = [span for track in tracks.values() for span in track.spans]
        names = {name.split(": ")[0] for name, *_ in spans}
        assert {"copies", "scoreboards"} <= names <= set(REASONS)
        assert any(name.startswith("copies: DEPBAR") for name, *_ in spans)
        ends.append(max(end for *_, end in spans))
    first, second = (int(row[3].replace(",", "")) for row in table)
    assert first > max(ends[:2]) > 0.9 * first and second > max(ends[2:]) - first - 1000 > 0.8 * second
    events = json.loads(path.read_text("utf-8"))["traceEvents"]
    copy = next(event["args"] for event in events if event["ph"] == "i" and event["name"].startswith("LDGSTS"))
    assert copy["PTX"].startswith("cp.async.") and "LDGSTS" in copy["SASS"] and copy["PTX line"] > 0
    assert ".py:" in copy["source"]


def test_tensor_cores_have_a_track(tmp_path):
    """FA3 forward on one SM."""
    path, options = tmp_path / "fa3.json", ["--arch", "sm_90a", "--gpu", "h100", "--sms", "1"]
    code, output = run_ptxsim("time", "examples/fa3_forward.py", *options, "--trace", str(path))
    assert code == 0, output
    found = rows(output)
    whole = check_trace(path)
    (pid,) = (pid for pid, name in whole.processes.items() if "tensor cores" in name)
    ((name, track),) = whole.tracks[pid].items()
    assert name == "SM 0" and {span[0] for span in track.spans} == {f"wgmma of CTA 0 warpgroup {n}" for n in (1, 2)}
    busy = sum(end - start for _, start, end in track.spans) / int(found[0][3].replace(",", ""))
    assert f"{busy:.0%}" == found[0][5]


@pytest.mark.parametrize(
    ("gpu", "message"),
    [
        ("h900", "no constants of the GPU 'h900': one of a100"),
        ("a100", "A100 SXM4 80GB runs machine code of sm_80, not of sm_90a"),
    ],
)
def test_what_cannot_be_timed(tmp_path, gpu, message):
    script = tmp_path / "script.py"
    script.write_text("raise AssertionError")
    result = CliRunner().invoke(main, ["time", str(script), "--arch", "sm_90a", "--gpu", gpu])
    assert result.exit_code == 2 and message in " ".join(result.output.replace("│", "").split())


def test_a_trace_that_cannot_be_written(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("raise AssertionError")
    options = ["--arch", "sm_90a", "--gpu", "h100", "--trace", str(tmp_path / "missing" / "trace.json")]
    result = CliRunner().invoke(main, ["time", str(script), *options])
    assert result.exit_code == 2 and "No such file or directory" in " ".join(result.output.replace("│", "").split())


def test_machine_code_that_differs(tmp_path, monkeypatch):
    """The reason is told, and that nothing was timed by the exit code."""
    monkeypatch.setattr(assembler, "_code", lambda cubin: id(cubin))
    script = tmp_path / "script.py"
    script.write_text(neighbour("cute.arch.barrier()"))
    result = CliRunner().invoke(main, ["time", str(script), "--arch", "sm_90a", "--gpu", "h100"])
    assert result.exit_code == 2 and "CodeDiffers: " in result.output and "other machine code" in result.output
