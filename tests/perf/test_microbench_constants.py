"""The inverse problem: rows of a GPU whose constants are known give them back; the TOML file; the command."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner

from cute_fa import simulate
from cute_fa.semantics.errors import DeviceError
from cute_fa.semantics.types import SmArch
from perf import command_line
from perf.__main__ import main
from perf.device import Clocks
from perf.gpu_check import steps
from perf.microbench import GROUPS, barriers, clocks, gpu_file, issue, reductions, session, streams, tma, warps, wgmma
from perf.microbench import __main__ as process
from perf.microbench.benchmark import REPETITIONS, Measured
from ptxsim.timing.gpus import known, load
from tests.testing.clock import FakeDevice
from tests.testing.microbench import rows_of

SM90 = SmArch.SM_90A


def test_wgmma_constants():
    def interval(chain):
        if (chain.per_commit, chain.pending) == wgmma.ALONE:
            return 33 + 46
        return max(19 if chain.registers else 18 + chain.n / 4, 2 * 64 * chain.n * 16 / 4096)

    rows = []
    for chain in wgmma.chains(SM90):
        cycles = interval(chain)
        rows += rows_of(chain, wgmma.NAME, (64, 320), lambda n, cycles=cycles: round(700 + n * wgmma.UNROLL * cycles))
    found = wgmma.constants(rows)
    assert found["tensor_flops"].value == pytest.approx(4096, rel=1e-3)
    assert found["wgmma_least"].value == pytest.approx(19)
    assert found["wgmma_tail"].value == pytest.approx(79 - 34)
    assert all(constant.spread == 0 for constant in found.values())
    # a session that was cut short has what it measured
    assert set(wgmma.constants([row for row in rows if row["n"] == 256])) == {"tensor_flops"}


def test_barriers_constants():
    known = {"try_wait": 21, "arrive": 17, "wake": 30, "remote_arrive": 190, "bar": 25, "cluster_barrier": 230}
    k = SimpleNamespace(**known)
    cycles = {
        "wait": k.try_wait,
        "arrive and wait": k.arrive + k.try_wait,
        "mbarrier": 2 * (k.arrive + k.wake),
        "named barrier": 2 * k.bar,
        "remote mbarrier": 2 * (k.remote_arrive + k.wake),
        "cluster barrier": k.cluster_barrier,
    }
    rows = []
    for config in barriers.hand_overs(SM90):
        each = cycles[config.kind] * barriers.UNROLL
        rows += rows_of(config, barriers.NAME, (16, 144), lambda count, each=each: 90 + count * each)
    assert {name: value for name, (value, _) in barriers.constants(rows).items()} == known


def test_tma_constants():
    known = {"tma_latency": 600, "tma_bytes": 64, "tma_interval": 32, "l2": 5.5, "hbm": 3.0}
    wake, arrive, clock = 40, 15, 1.5e9
    rows = []
    for kind, cycles in {"wait": 20, "arrive and wait": 20 + arrive, "mbarrier": 2 * (arrive + wake)}.items():
        config = barriers.HandOver(SM90, kind)
        rows += rows_of(config, barriers.NAME, (16, 144), lambda count, c=cycles: count * c * barriers.UNROLL)
    for loads, ctas, buffer in tma.runs(SM90, 132):
        bandwidth = known["l2" if buffer == tma.L2_BYTES else "hbm"] * 1e12 / clock / ctas if ctas > 1 else 64
        cycles = loads.boxes * loads.box_bytes / bandwidth
        if loads.boxes == 1:
            cycles += tma.SETUP + known["tma_latency"] + wake
        elif loads.pieces > 1:
            cycles = loads.boxes * loads.pieces * loads.warps * known["tma_interval"]
        for row in rows_of(loads, tma.NAME, (20, 120), lambda count, c=cycles: 500 + count * c):
            rows.append({**row, "ctas": ctas, "buffer": buffer, "seconds": row["cycles"] / clock})
    found = {name: constant.value for name, constant in tma.constants(rows).items()}
    assert found == pytest.approx(known)
    assert load("h100").tma_setup == tma.SETUP


PIPES = {"fmnmx": 16, "imad": 16, "mufu": 4, "convert": 16}


def stream_rows(rate, latency):
    rows = []
    for stream in streams.streams(SM90):
        cycles = streams.UNROLL * (latency(stream.kind) if stream.chains == 1 else streams.WARPS / rate(stream))
        rows += rows_of(stream, streams.NAME, (32, 288), lambda count, c=cycles: 300 + count * c)
    return rows


LANES = {"fp32_lanes": 32, "alu_lanes": 16, "imad_lanes": 16, "mufu_lanes": 4, "convert_lanes": 16}
LATENCIES = {"mufu_latency": 22, "shuffle_latency": 24, "shared_latency": 29}


def latency_of(kind):
    return {"mufu": 22, "shuffle": 24, "shared": 29}.get(kind, 4)


def test_streams_constants_of_ports():
    """Three reads a cycle, of which wgmma take 1.7."""

    def rate(stream):
        reads = streams.INSTRUCTIONS[stream.kind][1]
        return min(PIPES.get(stream.kind, 32) / 32, (3 - (1.7 if stream.beside else 0)) / reads)

    known = {**LANES, **LATENCIES, "register_ports": 3, "register_tensor": 1.7, "slots_lost": 0}
    found = streams.constants(stream_rows(rate, latency_of))
    assert {name: constant.value for name, constant in found.items()} == pytest.approx(known)


def test_streams_constants_of_slots():
    """Whatever they read, streams lose 30 % of the issue slots."""

    def rate(stream):
        return min(PIPES.get(stream.kind, 32) / 32, 0.7 if stream.beside else 1)

    known = {**LANES, **LATENCIES, "register_ports": 0, "slots_lost": 0.3}
    found = streams.constants(stream_rows(rate, latency_of))
    assert {name: constant.value for name, constant in found.items()} == pytest.approx(known)


def test_streams_remark():
    alone, beside = streams.Stream(SM90, "ffma2"), streams.Stream(SM90, "ffma2", beside=128, registers=True)
    rows = [*rows_of(alone, streams.NAME, (32, 288), lambda count: count * 256)]
    products = {"product_cycles": 23040, "groups": 10}
    rows += rows_of(beside, streams.NAME, (32, 288), lambda count: count * 512, **products)
    assert streams.remark(beside, rows) == (
        "ffma2 beside wgmma n128, A in registers: 0.500 of its 1.000 a cycle and quarter, and a wgmma in 72.0 cycles"
    )
    assert streams.remark(beside, rows[:3]) is None


def test_issue_constants():
    """A queue of 3 in front of products of 64 cycles, which begin 10 cycles after their issue."""
    issued = [0]
    for i in range(issue.LENGTH):
        issued.append(max(issued[-1] + 13, 10 + (i - 3) * 64))
    rows = [{"kernel": issue.NAME, "n": 128, "warpgroups": 1, "issued": [[*issued, 1100]]}] * 5
    assert issue.constants(rows) == {"wgmma_queue": Measured(3, 0)}


def test_warps_constants():
    rows = []
    for config in warps.matrices(SM90):
        chained = {"mma": 25, "ldmatrix": 33}[config.kind]
        together = {"mma": 4096 / 2680, "ldmatrix": 512 / 128}[config.kind] * warps.WARPS
        cycles = warps.UNROLL * (chained if config.chains == 1 else together)
        rows += rows_of(config, warps.NAME, (32, 160), lambda count, c=cycles: 200 + count * c)
    for size, latency in ((warps.L2_BYTES, 300), (warps.MEMORY_BYTES, 600)):
        turn = latency * warps.LOADS
        rows += rows_of(warps.Chase(SM90), warps.NAME, (32, 160), lambda n, c=turn: n * c, bytes=size)
        rows += rows_of(warps.Chase(SM90, True), warps.NAME, (32, 160), lambda n, c=turn: 2 * n * c, bytes=size)
    found = warps.constants(rows)
    known = {"mma_sync_flops": 2680, "mma_sync_latency": 25, "shared_bytes": 128, "global_latency": 450}
    assert {name: constant.value for name, constant in found.items()} == pytest.approx(known)
    assert found["global_latency"].spread == pytest.approx(1 / 3)


@pytest.mark.parametrize(("arch", "rate"), [(SM90, 4.0), (SmArch.SM_80, 1.2)])
def test_reductions_constants(arch, rate):
    rows = []
    for config in reductions.kinds(arch):
        rates = {"f32": rate if arch is SmArch.SM_80 else 2.1, "v4": rate, "bulk": 3.5}
        seconds = 264 * reductions.REGION_BYTES / rates[config.kind] / 1e12
        for row in rows_of(config, reductions.NAME, (64, 576), lambda count: count, ctas=264):
            rows.append({**row, "seconds": 5e-6 + row["count"] * seconds})
    assert reductions.constants(rows)["l2_reductions"].value == pytest.approx(rate)


def test_clocks_constants():
    told = [Clocks(1500, 2600, 690.0, 60)] * 3
    cycles = {None: [1450, 1000], 64: [1600, 1000], 128: [1500, 1000], 256: [1400, 1000]}
    rows = [clocks.row(head_dim, torch.tensor([pair] * 4), told) for head_dim, pair in cycles.items()]
    assert clocks.constants(rows)["clock"].value == pytest.approx(1.5)
    assert clocks.constants(rows)["clock"].spread == pytest.approx(0.0544, abs=1e-4)
    assert [row["note"] for row in rows[:2]] == [
        "wgmma beside nothing: 1.450 GHz by clock64 over globaltimer; NVML: sm_mhz 1500, watts 690, celsius 60",
        "wgmma beside exponentials of head_dim 64: 1.600 GHz by clock64 over globaltimer; "
        "NVML: sm_mhz 1500, watts 690, celsius 60",
    ]
    assert "NVML: silent" in clocks.row(64, torch.tensor([[1, 1]]), [Clocks()])["note"]


H100 = "NVIDIA H100 80GB HBM3"


@pytest.mark.parametrize(
    ("name", "arch", "file"),
    [
        (H100, "sm_90a", "h100"),
        ("NVIDIA H200", "sm_90a", "h200"),
        ("NVIDIA A100-SXM4-80GB", "sm_80", "a100"),
        ("NVIDIA A100-PCIE-40GB", "sm_80", "a100-pcie"),
    ],
)
def test_the_nearest_gpu(name, arch, file):
    assert gpu_file.nearest(name, arch) == load(file)


def test_a_gpu_without_relatives():
    with pytest.raises(DeviceError, match=r"NVIDIA B200 is sm_100a: constants are measured of sm_80, sm_90a"):
        gpu_file.nearest("NVIDIA B200", "sm_100a")


@pytest.mark.parametrize("file", known())
def test_the_file_is_read_back(file, tmp_path):
    base = load(file)
    found = {"tensor_flops": Measured(4055.25, 0.0125), "slots_lost": Measured(0.0, 0.0)}
    gpu = gpu_file.merged('A "new" one', base, found, "2026-11-30")
    path = tmp_path / "new.toml"
    path.write_text(gpu_file.text(gpu, ["clock of wgmma: 1.7 GHz"]), encoding="utf-8")
    read = load(str(path))
    assert read == gpu
    assert read.constants["tensor_flops"].spread == 0.0125
    assert read.constants["tensor_flops"].kind == "measured"
    assert read.constants["hbm"] == base.constants["hbm"]
    assert all("slots_lost" not in values and values for values in read.rivals.values())


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A machine with a GPU whose wgmma take 0.5 N cycles; processes of groups run in this one."""
    monkeypatch.setattr(command_line, "CudaDevice", lambda: FakeDevice(gpu=H100))

    def measure(arch):
        for chain in wgmma.chains(arch):
            yield from rows_of(chain, wgmma.NAME, (32, 160), lambda n, chain=chain: n * wgmma.UNROLL * chain.n // 2)

    def in_process(step, log, deadline):
        process.main(*step.command[3:])
        return steps.Outcome(step, "ok", 1.0)

    monkeypatch.setattr(wgmma, "measure", measure)
    monkeypatch.setattr(steps, "_run", lambda step, log, deadline, stopped: in_process(step, log, deadline))
    return tmp_path / "gpu.toml"


def test_the_command_writes_rows_and_constants(gpu):
    def invoke(*arguments):
        return CliRunner().invoke(main, ["microbench", "--out", str(gpu), *arguments])

    done = invoke("--only", "wgmma")
    assert done.exit_code == 0, done.output
    assert "tensor_flops = 4096, spread 0" in done.output
    measured = load(str(gpu))
    assert (measured.name, measured.tensor_flops, measured.wgmma_least) == (H100, 4096, 4)
    rows = session.read_rows(gpu.with_suffix(".jsonl"))
    assert len(rows) == 2 * REPETITIONS * len(wgmma.chains(SM90))
    # rows of other groups stay, those of other GPUs and of the same group do not, nor does an unfinished line
    with gpu.with_suffix(".jsonl").open("a") as file:
        file.write(session.line({"group": "other", "gpu": H100}) + session.line({"group": "other", "gpu": "X"}) + "{")
    assert invoke("--only", "wgmma").exit_code == 0
    again = session.read_rows(gpu.with_suffix(".jsonl"))
    assert [row["group"] for row in again] == ["other"] + ["wgmma"] * len(rows)


def test_the_command_without_a_gpu():
    done = CliRunner().invoke(main, ["microbench"])
    assert (done.exit_code, done.stderr) == (2, "no GPU: kernels are timed on one.\n")


def test_the_command_refuses_other_files(gpu):
    done = CliRunner().invoke(main, ["microbench", "--out", "x.csv"])
    assert done.exit_code == 2
    assert "x.csv: a file that ends in .toml" in done.output


def test_a_group_that_the_gpu_lacks_does_not_run(gpu):
    done = session.Session(gpu, "NVIDIA A100-SXM4-80GB", SmArch.SM_80, tuple(GROUPS))
    missing = {step.name: step.missing for step in session._Plan(done).steps()}
    assert {name for name, why in missing.items() if why} == {"wgmma", "tma", "issue", "clocks"}
    assert missing["tma"] == "sm_80: from sm_90 on"


def test_what_came_out_negative_is_told_and_not_taken(gpu):
    done = session.Session(gpu, H100, SM90, ("barriers",))
    rows = []
    for kind, cycles in {"wait": 20, "arrive and wait": 18}.items():
        config = barriers.HandOver(SM90, kind)
        rows += rows_of(config, barriers.NAME, (16, 144), lambda n, c=cycles: n * c * barriers.UNROLL, group="barriers")
    done.rows_file.write_text("".join(map(session.line, rows)))
    found, notes = done.write()
    assert found == {"try_wait": Measured(20, 0)}
    assert notes == ["arrive came out as -2: not taken"]
    assert load(str(gpu)).arrive == load("h100").arrive


def test_what_differs_by_more_than_itself_is_told_and_not_taken(gpu, monkeypatch):
    done = session.Session(gpu, H100, SM90, ("barriers",))
    done.rows_file.touch()
    found = {"try_wait": Measured(20, 0.1), "wake": Measured(4, 1.5), "global_latency": Measured(600, -0.1)}
    monkeypatch.setattr(session, "constants", lambda rows: found)
    taken, notes = done.write()
    assert taken == {"try_wait": Measured(20, 0.1)}
    assert notes == [
        "wake came out as 4 with a spread of 1.5: not taken",
        "global_latency came out as 600 with a spread of -0.1: not taken",
    ]
    assert load(str(gpu)).wake == load("h100").wake


def test_without_any_row_there_is_no_file(gpu):
    done = session.Session(gpu, H100, SM90, ("barriers",))
    done.rows_file.touch()
    with pytest.raises(DeviceError, match=r"nothing was measured: .*microbench\.log says why"):
        done.write()
    assert not gpu.exists()


RUNS = [(name, arch) for name, least in GROUPS.items() for arch in (SmArch.SM_80, SM90) if arch.number >= least]


@pytest.mark.parametrize(("name", "arch"), [run for run in RUNS if run[0] != "clocks"])
def test_every_kernel_of_a_group_is_measured(name, arch, monkeypatch):
    """The launches left out."""
    group, launched = session.group(name), {}
    monkeypatch.setattr(group, "run", lambda config, *arguments: launched.setdefault(config, 1e-3))
    for size in ("HBM_BYTES", "MEMORY_BYTES"):
        monkeypatch.setattr(group, size, 2**23, raising=False)
    with simulate(arch, num_sms=4):
        rows = [json.loads(session.line(row)) for row in group.measure(arch)]
    measured = [row for row in rows if "repetition" in row]
    assert {row["kernel"] for row in rows} == {name}
    for config in launched:
        own = [row for row in measured if row.items() >= config.parameters().items()]
        assert {row["repetition"] for row in own} == set(range(REPETITIONS))
        assert name == "issue" or len({row["count"] for row in own}) > 1


def test_clocks_are_measured(monkeypatch):
    """Ten launches of each load, and NVML asked until the last is done."""
    launched, asked = [], iter([False, False, True] * 4)
    monkeypatch.setattr(clocks, "CudaDevice", FakeDevice)
    monkeypatch.setattr(torch.cuda, "Event", lambda: SimpleNamespace(record=list, query=lambda: next(asked)))

    def launch(config, arguments):
        launched.append((config.head_dim, arguments[0]))
        arguments[2][:] = torch.tensor([1400, 1000])

    monkeypatch.setattr(clocks, "compiled", lambda config: SimpleNamespace(launch=lambda args: launch(config, args)))
    with simulate(SM90, num_sms=4):
        rows = list(clocks.measure(SM90))
    assert [row["head_dim"] for row in rows] == [None, 64, 128, 256]
    assert [row["ghz"] for row in rows] == pytest.approx([1.4] * 4)
    assert rows[0]["watts"] == 350.5
    # of a tenth of a second: 1024 cycles for 8 wgmma of two warpgroups
    assert launched == [(head_dim, 146484) for head_dim in (None, 64, 128, 256) for _ in range(10)]
