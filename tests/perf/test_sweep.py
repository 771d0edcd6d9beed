"""The sweep with CPU providers and a made-up clock: what is trusted, what the rows say, what a cut run keeps."""

from __future__ import annotations

import dataclasses
import math
import time

import pandas as pd
import pytest
import torch

import cute_fa
from cute_fa.semantics.errors import ArgumentError, DeviceError
from cute_fa.semantics.types import Direction, DType
from perf import sweep as sweeping
from perf.providers import PROVIDERS, Attention
from perf.results import COLUMNS, KEY, ResultFile, read_results
from perf.sweep import Sweep
from perf.timing import Ceilings, Effort
from perf.workload import Workload
from tests.testing.clock import FakeDevice
from tests.testing.providers import Absent, Failing, Reference

SMALL = dict(head_dim=16, head_dim_v=16, heads=2, heads_kv=1, seqlen=24, tokens=48)
EFFORT = Effort(budget_ms=10, least=2, most=5)
# 1 GFLOP/ms and 1 MB/ms
CEILINGS = Ceilings(dict.fromkeys((torch.bfloat16, torch.float16), 1.0), gbps=1.0)


@pytest.fixture(autouse=True)
def _ceilings(monkeypatch):
    monkeypatch.setattr(sweeping, "measure_ceilings", lambda device, dtypes, effort: CEILINGS)


DENSE = Workload(**SMALL)


def run(path, device, *providers, workloads=(DENSE,)) -> list:
    """A whole sweep; gives its events."""
    by_name = {provider.name: provider for provider in providers}
    return list(Sweep(device, by_name, ResultFile(path), EFFORT).run(workloads))


def test_rows_of_a_workload(tmp_path):
    device = FakeDevice()
    workload = Workload(**SMALL, causal=True)
    providers = (
        Reference("ours", device, 2.0),
        Reference("slow", device, 4.0),
        Reference("liar", device, 0.1, wrong=0.5),
        Absent(),
        Failing(device, breaks=False),
    )
    ((done, rows),) = run(tmp_path / "a.csv", device, *providers, workloads=[workload])
    table = read_results(tmp_path / "a.csv").set_index("provider")
    assert table.status.to_dict() == {
        "ours": "ok",
        "slow": "ok",
        "liar": "wrong",
        "absent": "skipped",
        "failing": "skipped",
    }
    ours = table.loc["ours"]
    pairs = 2 * 24 * 25 // 2
    flops, bytes_ = 4 * 2 * pairs * 16, 2 * 48 * 16 * (2 + 1 + 1 + 2)
    assert (ours.flops, ours.bytes) == (flops, bytes_)
    assert (ours.ms_p20, ours.ms_p50, ours.ms_p80, ours.samples) == (2.0, 2.0, 2.0, 2)
    assert ours.tflops == pytest.approx(flops / 2e-3 / 1e12)
    assert ours.gbps == pytest.approx(bytes_ / 2e-3 / 1e9)
    # 1 GB/s lets the bytes through in this many ms, longer than 1 TFLOP/s needs
    assert ours.ceiling_ms == pytest.approx(bytes_ / 1e6)
    assert (ours.bound, ours.percent) == ("memory", pytest.approx(100 * bytes_ / 1e6 / 2))
    assert table.loc["slow"].tflops == pytest.approx(ours.tflops / 2)
    assert (ours.gpu, ours.arch, ours.cuda, ours.version) == ("Fake H100", "sm_90a", "13.0", "ours 1")
    assert ours.sm_mhz_after < ours.sm_mhz_before < 1981
    assert 0 <= ours.error <= ours.error_allowed < 0.1
    assert (ours.window_right, ours.seqlen_k, ours.batch) == (0, 24, 2)
    liar = table.loc["liar"]
    assert liar.reason == "out disagrees with the reference"
    assert liar.error == pytest.approx(0.5, abs=0.01)
    assert math.isnan(liar.ms_p50)
    assert table.loc["absent"].reason == "no module named absent"
    assert table.loc["failing"].reason == "RuntimeError: an illegal memory access was encountered"
    assert done is workload
    assert [row["status"] for row in rows] == ["ok", "ok", "wrong", "skipped", "skipped"]


def test_a_plan_is_timed_apart_and_asked_of_those_that_take_one(tmp_path):
    device = FakeDevice()

    class Planning(Reference):
        takes_ranges = True

        def prepare(self, inputs):
            attention = super().prepare(inputs)

            def build():
                device.elapsed += 0.5

            return dataclasses.replace(attention, build=build)

    planned = Workload(**SMALL | {"seqlen": 48}, plan="random-10")
    providers = Planning("ours", device, 2.0), Reference("other", device, 1.0)
    run(tmp_path / "a.csv", device, *providers, workloads=[planned])
    ours, other = read_results(tmp_path / "a.csv").to_dict("records")
    assert (ours["plan"], ours["status"], ours["ms_p50"], ours["plan_ms"]) == ("random-10", "ok", 2.0, 0.5)
    assert (other["status"], other["reason"]) == ("skipped", "other takes no ranges")
    ((_, rows),) = run(tmp_path / "a.csv", device, *providers, workloads=[planned])
    assert rows == []  # they are there already


def test_a_cache_of_codes_is_asked_of_those_that_take_one(tmp_path):
    device, taking = FakeDevice(), Reference("ours", FakeDevice())
    taking.takes_codes = True
    codes = Workload(**SMALL, decode=True, query_tokens=3, dtype_kv=DType.E4M3)
    run(tmp_path / "a.csv", device, taking, Reference("other", device), workloads=[codes])
    ours, other = read_results(tmp_path / "a.csv").to_dict("records")
    assert (ours["status"], ours["dtype"], ours["dtype_kv"], ours["seqlen_q"]) == ("ok", "bf16", "e4m3", 3)
    assert (other["status"], other["reason"]) == ("skipped", "other takes no cache in e4m3 beside q in bf16")


def test_unwritten_outputs_do_not_pass_as_those_of_a_right_provider(tmp_path, monkeypatch):
    """With an allocator that hands out again what was freed last."""
    device, freed, full = FakeDevice(), [], torch.full

    def allocated(*arguments, **options) -> torch.Tensor:
        freed.append(full(*arguments, **options))
        return freed[-1]

    class Freeing(Reference):
        def prepare(self, inputs):
            attention = super().prepare(inputs)
            return Attention(lambda *tensors: freed.append(attention.forward(*tensors)) or freed[-1])

    class Unwritten(Reference):
        def prepare(self, inputs):
            return Attention(lambda q, k, v: next(memory for memory in reversed(freed) if memory.shape == q.shape))

    monkeypatch.setattr(torch, "full", allocated)
    run(tmp_path / "a.csv", device, Freeing("right", device), Unwritten("none", device))
    table = read_results(tmp_path / "a.csv").set_index("provider")
    assert (table.loc["right"].status, table.loc["none"].status) == ("ok", "wrong")
    assert math.isinf(table.loc["none"].error)


def test_wrong_providers_are_never_timed_and_others_rotate_over_random_buffers(tmp_path):
    device = FakeDevice()
    right, wrong = Reference("right", device), Reference("wrong", device, wrong=1.0)
    run(tmp_path / "a.csv", device, right, wrong)
    assert len(wrong.seen) == 1
    # the L2 would hold far more than the most sets
    buffers = {q.data_ptr() for q in right.seen[1:]}
    assert len(buffers) == 8
    peaked, drawn = right.seen[0], right.seen[1]
    assert len(peaked.abs().unique()) == 1
    assert drawn.float().std() == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize(("l2_bytes", "sets"), [(2**30, 8), (15_000, 3), (10, 2)])
def test_buffer_sets_exceed_the_l2(tmp_path, monkeypatch, l2_bytes, sets):
    """q, k and v hold 2·48·16·(2 + 1 + 1) = 6144 bytes."""
    device = FakeDevice()
    monkeypatch.setattr(device, "l2_bytes", l2_bytes)
    provider = Reference("right", device)
    run(tmp_path / "a.csv", device, provider)
    assert len({q.data_ptr() for q in provider.seen[1:]}) == sets


def test_backward_times_gradients_and_checks_each(tmp_path):
    device = FakeDevice()

    class Detached(Reference):
        """Its gradient of v is twice what it should be."""

        def prepare(self, inputs):
            attention = super().prepare(inputs)
            return Attention(lambda q, k, v: attention.forward(q, k, 2 * v - v.detach()))

    workload = Workload(Direction.BACKWARD, **SMALL, causal=True)
    right, wrong = Reference("right", device), Detached("wrong", device)
    run(tmp_path / "a.csv", device, right, wrong, workloads=[workload])
    table = read_results(tmp_path / "a.csv").set_index("provider")
    assert table.loc["right"].status == "ok"
    assert table.loc["right"].flops == 2.5 * Workload(**SMALL, causal=True).work.flops
    # forwards are not timed: the clock stands still there, and a call without elapsed time takes a millisecond
    assert table.loc["right"].ms_p50 == 1.0
    assert table.loc["wrong"].reason == "dv disagrees with the reference"


@pytest.mark.sampled
@pytest.mark.parametrize(("direction", "arch"), [(Direction.FORWARD, "sm_90a"), (Direction.BACKWARD, "sm_80")])
def test_real_providers_in_one_sweep(tmp_path, direction, arch):
    """Our kernel in the simulator, torch's on the CPU."""
    device = FakeDevice()
    chosen = [PROVIDERS[name] for name in ("cute-fa", "FA2", "cuDNN")]
    with cute_fa.simulate(arch):
        run(tmp_path / "a.csv", device, *chosen, workloads=[Workload(direction, **SMALL, causal=True)])
    table = read_results(tmp_path / "a.csv").set_index("provider")
    assert table.status.to_dict() == {"cute-fa": "ok", "FA2": "ok", "cuDNN": "skipped"}


def test_a_backend_says_in_its_warnings_why_it_refuses(tmp_path, monkeypatch):
    device = FakeDevice()

    class Refusing(Reference):
        def prepare(self, inputs):
            import warnings

            def forward(q, k, v):
                warnings.warn(
                    "head_dim should be a multiple of 8 (Triggered internally at sdp_utils.cpp)", stacklevel=1
                )
                raise RuntimeError("No available kernel.")

            return Attention(forward)

    run(tmp_path / "a.csv", device, Refusing("refusing", device))
    (row,) = read_results(tmp_path / "a.csv").to_dict("records")
    assert row["reason"] == "RuntimeError: No available kernel. head_dim should be a multiple of 8"


WORKLOADS = [Workload(**SMALL | {"seqlen": seqlen}) for seqlen in (8, 16, 24)]


def test_a_run_cut_short_is_resumed(tmp_path):
    device = FakeDevice()
    path = tmp_path / "results" / "a.csv"

    with pytest.raises(KeyboardInterrupt):
        for workload, _ in Sweep(device, {"ours": Reference("ours", device)}, ResultFile(path), EFFORT).run(WORKLOADS):
            if workload is WORKLOADS[1]:
                raise KeyboardInterrupt
    first = read_results(path)
    assert first.seqlen_k.tolist() == [8, 16]

    ours, other = Reference("ours", device, 3.0), Reference("other", device)
    run(path, device, ours, workloads=WORKLOADS)
    table = read_results(path)
    pd.testing.assert_frame_equal(table.iloc[:2], first)
    assert table[["seqlen_k", "ms_p50"]].values.tolist() == [[8, 1.0], [16, 1.0], [24, 3.0]]
    # another provider is measured alone, what is there already stays
    seen = len(ours.seen)
    run(path, device, ours, other, workloads=WORKLOADS)
    assert len(ours.seen) == seen
    assert read_results(path).provider.tolist() == ["ours"] * 3 + ["other"] * 3


def test_a_line_that_was_cut_is_dropped(tmp_path):
    device = FakeDevice()
    path = tmp_path / "a.csv"
    run(path, device, Reference("ours", device), workloads=WORKLOADS[:2])
    whole = path.read_text()
    path.write_text(whole + whole.splitlines()[-1][:40])
    assert len(ResultFile(path).rows()) == 2
    assert path.read_text() == whole


def test_other_gpus_are_other_results(tmp_path):
    path = tmp_path / "a.csv"
    for gpu in ("H100", "H200", "H200"):
        device = FakeDevice(gpu=gpu)
        run(path, device, Reference("ours", device), workloads=WORKLOADS[:1])
    assert read_results(path).gpu.tolist() == ["H100", "H200"]


def test_a_broken_context_ends_the_run_and_the_next_one_goes_on_behind(tmp_path):
    path = tmp_path / "a.csv"
    device = FakeDevice()
    providers = (Reference("first", device), Failing(device, breaks=True), Reference("last", device))
    with pytest.raises(DeviceError, match="failing broke the CUDA context; run again"):
        run(path, device, *providers, workloads=WORKLOADS[:2])
    # what agreed by then has not been timed: it is not settled
    assert read_results(path).provider.tolist() == ["failing"]
    device.broken = False
    run(path, device, *providers, workloads=WORKLOADS[:1])
    table = read_results(path)
    assert table.provider.tolist() == ["failing", "first", "last"]
    assert table.status.tolist() == ["skipped", "ok", "ok"]


def test_what_was_skipped_can_be_tried_again(tmp_path):
    path = tmp_path / "a.csv"
    device = FakeDevice()
    run(path, device, Reference("ours", device), Failing(device, breaks=False), workloads=WORKLOADS[:1])
    results = ResultFile(path)
    results.forget(["skipped", "wrong"])
    assert results.rows().provider.tolist() == ["ours"]
    assert [name for name in ("ours", "failing") if _row(device, name) in results] == ["ours"]


def _row(device: FakeDevice, provider: str) -> dict:
    return {**WORKLOADS[0].columns(), **device.columns(), "provider": provider}


def test_parquet_holds_the_same_table(tmp_path):
    device = FakeDevice()
    path = tmp_path / "a.csv"
    run(path, device, Reference("ours", device), Absent(), workloads=WORKLOADS)
    parquet = ResultFile(path).write_parquet()
    assert parquet == tmp_path / "a.parquet"
    pd.testing.assert_frame_equal(read_results(parquet), read_results(path))
    assert list(read_results(path).columns) == COLUMNS
    assert read_results(path).duplicated(KEY).sum() == 0


def test_tables_of_something_else_are_refused(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("provider,ms\nours,1\n")
    with pytest.raises(ArgumentError, match=r"a\.csv: no table of results"):
        ResultFile(path)
    with pytest.raises(ArgumentError, match=r"version, status, reason is missing"):
        read_results(path)
    with pytest.raises(ArgumentError, match=r"none\.csv"):
        read_results(tmp_path / "none.csv")


def test_dates_are_utc(tmp_path):
    device = FakeDevice()
    run(tmp_path / "a.csv", device, Reference("ours", device), workloads=WORKLOADS[:1])
    (date,) = pd.to_datetime(read_results(tmp_path / "a.csv").date)
    assert abs(date.timestamp() - time.time()) < 60
