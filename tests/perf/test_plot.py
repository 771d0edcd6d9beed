"""Plots: the numbers that they show, and a page that needs nothing else."""

from __future__ import annotations

import base64
import io
import re

import numpy as np
import pytest
from click.testing import CliRunner
from matplotlib import image

from cute_fa.semantics.types import Direction, DType
from perf import plot
from perf.__main__ import main
from perf.workload import Workload
from tests.testing.measured import measured, table_of

SEQLENS = (1024, 512, 4096)


@pytest.fixture
def table(tmp_path):
    rows = []
    for causal in (False, True):
        for seqlen in SEQLENS:
            workload = Workload(seqlen=seqlen, causal=causal)
            rows.append(measured(workload, "FA4", *(3.0,) * 5))
            rows.append(measured(workload, "cute-fa", 1.0, 1.0, 2.0, 4.0, 4.0))
    # FA3 has one length, FA2 none; its reason must not become markup
    rows.append(measured(Workload(seqlen=512), "FA3", 1.0))
    rows.append(measured(Workload(seqlen=512), "FA2", reason="<script>no kernel</script>"))
    rows.append(measured(Workload(Direction.BACKWARD), "cute-fa", 1.0))
    rows.append(measured(Workload(decode=True), "cute-fa", 1.0))
    rows.append(measured(Workload(decode=True, query_tokens=8, dtype_kv=DType.E4M3), "cute-fa", 1.0))
    return table_of(tmp_path / "a.csv", *rows)


def test_curves_show_speed_spread_and_ceiling(table):
    figures = dict(plot.figures(table))
    assert [name for name in figures if name.endswith("curves")] == [
        "h100-fwd-bf16-prefill-curves",
        "h100-bwd-bf16-prefill-curves",
        "h100-fwd-bf16-decode-curves",
    ]
    full, causal = figures["h100-fwd-bf16-prefill-curves"].axes
    assert (full.get_title(), causal.get_title()) == ("d128 h16/16 full", "d128 h16/16 causal")
    lines = {line.get_label(): line for line in full.get_lines()}
    assert list(lines) == ["cute-fa", "FA4", "FA3", "ceiling"]
    flops = np.array([Workload(seqlen=seqlen).work.flops for seqlen in sorted(SEQLENS)])
    assert lines["cute-fa"].get_xdata().tolist() == sorted(SEQLENS)
    np.testing.assert_allclose(lines["cute-fa"].get_ydata().astype(float), flops / 2.0 / 1e9)
    np.testing.assert_allclose(lines["ceiling"].get_ydata().astype(float), 800.0)
    assert lines["FA3"].get_xdata().tolist() == [512]
    spread = full.collections[0].get_datalim(full.transData)
    assert (spread.y0, spread.y1) == (pytest.approx(flops[0] / 4e9), pytest.approx(flops[2] / 1e9))
    assert full.get_ylabel() == "TFLOP/s"


def test_memory_bound_curves_show_bandwidth(table):
    axis, drafts = dict(plot.figures(table))["h100-fwd-bf16-decode-curves"].axes
    assert drafts.get_title() == "decode of 8 d128 h16/16 cache in e4m3"
    assert (axis.get_title(), axis.get_ylabel()) == ("decode d128 h16/16", "GB/s")
    speed, ceiling = (line.get_ydata().astype(float) for line in axis.get_lines())
    assert speed == pytest.approx(Workload(decode=True).work.bytes / 1e6)
    assert ceiling == pytest.approx(4000.0)


def test_heat_maps_show_how_many_times_as_fast_ours_is(table):
    figures = dict(plot.figures(table))
    assert [name for name in figures if "ratio" in name] == [
        "h100-fwd-bf16-prefill-ratio-fa4",
        "h100-fwd-bf16-prefill-ratio-fa3",
    ]
    (axis,) = figures["h100-fwd-bf16-prefill-ratio-fa4"].axes
    assert [label.get_text() for label in axis.get_xticklabels()] == ["512", "1024", "4096"]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["d128 h16/16 full", "d128 h16/16 causal"]
    np.testing.assert_allclose(axis.images[0].get_array(), np.log2(np.full((2, 3), 1.5)))
    assert [text.get_text() for text in axis.texts] == ["1.50"] * 6
    (axis,) = figures["h100-fwd-bf16-prefill-ratio-fa3"].axes
    assert [text.get_text() for text in axis.texts] == ["0.50"]


def test_a_missing_length_leaves_its_cell_empty(tmp_path):
    rows = [measured(Workload(seqlen=seqlen), "cute-fa", 1.0) for seqlen in SEQLENS]
    rows += [measured(Workload(seqlen=512), "FA4", 2.0), measured(Workload(seqlen=1024, causal=True), "FA4", 2.0)]
    rows += [measured(Workload(seqlen=1024, causal=True), "cute-fa", 1.0)]
    (axis,) = dict(plot.figures(table_of(tmp_path / "a.csv", *rows)))["h100-fwd-bf16-prefill-ratio-fa4"].axes
    shown = axis.images[0].get_array().filled(np.nan)
    np.testing.assert_allclose(shown, [[1, np.nan], [np.nan, 1]])
    assert len(axis.texts) == 2


def test_command_writes_pictures_and_one_page_that_needs_nothing_else(table, tmp_path):
    done = CliRunner().invoke(main, ["plot", str(tmp_path / "a.csv"), "--out", str(tmp_path / "plots")])
    assert done.exit_code == 0, done.output
    written = sorted(path.name for path in (tmp_path / "plots").iterdir())
    assert written == sorted(["index.html", *(f"{name}.png" for name, _ in plot.figures(table))])
    assert len(done.stdout.splitlines()) == len(written) == 6
    page = (tmp_path / "plots" / "index.html").read_text()
    pictures = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert len(pictures) == 5
    for picture in pictures:
        pixels = image.imread(io.BytesIO(base64.b64decode(picture)))
        assert pixels.std() > 0.01
    assert not re.search(r"https?://|<script|<link", page)
    assert "&lt;script&gt;no kernel" in page
    assert page.count("<td>fwd bf16 32×512 d128 h16/16 full</td>") == 4


def test_nothing_measured_is_an_error(tmp_path):
    table_of(tmp_path / "a.csv", measured(Workload(), "cute-fa"))
    done = CliRunner().invoke(main, ["plot", str(tmp_path / "a.csv")])
    assert done.exit_code == 1
    assert "nothing was measured" in done.stderr
