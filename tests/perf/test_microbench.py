"""The kernels that measure a GPU's constants: simulated once each, what their timed loops hold, and the inverse
problem: rows of a GPU whose constants are known give them back."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner

from cute_fa import simulate
from cute_fa.engine.compiler import compiled
from cute_fa.semantics.errors import DeviceError
from cute_fa.semantics.types import DType, SmArch
from perf import __main__ as command_line
from perf.device import Clocks
from perf.gpu_check import steps
from perf.microbench import __main__ as process
from perf.microbench import barriers, clocks, gpu_file, issue, reductions, session, streams, tma, warps, wgmma
from perf.microbench.benchmark import REPETITIONS, Measured
from perf.microbench.products import operands
from perf.sass import disassemble
from ptxsim.timing.gpus import known, load
from tests.testing.clock import FakeDevice
from tests.testing.timed_loops import mix, reads_clock, timed_loop, timed_loops

SM90 = SmArch.SM_90A
LOOPING = {"BRA", "ISETP", "IADD3", "VIADD", "NOP"}  # what a loop may hold beside what it times


@pytest.fixture(scope="module", autouse=True)
def sm90():
    """All kernels run here, under the race detector."""
    with simulate(SM90, race=True, num_sms=2) as simulation:
        yield simulation


def rows_of(config, name, counts, cycles, **more):
    """Rows as a kernel gives them that takes ``cycles(count)``."""
    for repetition in range(REPETITIONS):
        for count in counts:
            figures = {"cycles": cycles(count), "seconds": cycles(count) / 1.5e9}
            yield {"kernel": name, **config.parameters(), **more, "count": count, "repetition": repetition, **figures}


@pytest.mark.parametrize(
    "chain",
    [
        wgmma.Chain(SM90, 8, registers=True),
        wgmma.Chain(SM90, 64, False, DType.BF16, *wgmma.ALONE),
        wgmma.Chain(SM90, 256),
        wgmma.Chain(SM90, 256, False, DType.E4M3),
    ],
    ids=lambda chain: chain.compile_name,
)
def test_wgmma(chain):
    a, b = operands(chain.dtype, chain.n)
    done = wgmma.launch(chain, 2, a, b)
    product = a.double() @ b.double().T
    assert torch.allclose(done.output.double(), 2 * wgmma.UNROLL / 4 * product, rtol=1e-4, atol=1e-3)
    assert (done.cycles > 0).all()
    loop = timed_loop(compiled(chain).cubin)
    counts = mix(loop)
    assert counts["QGMMA" if chain.dtype.is_fp8 else "HGMMA"] == wgmma.UNROLL
    # nothing is waited for that the kernel does not ask for, and what else is issued takes less time than the products
    waits = [i for i in loop if i.opcode == "WARPGROUP" and "DEPBAR" in i.modifiers]
    assert len(waits) == wgmma.UNROLL // chain.per_commit
    assert {name for name in counts if name[0] != "U"} - LOOPING <= {"HGMMA", "QGMMA", "WARPGROUP"}
    assert sum(i.stall for i in loop) < wgmma.UNROLL * max(chain.n / 3, 6)


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


@pytest.mark.parametrize("config", barriers.hand_overs(SM90), ids=lambda config: config.kind)
def test_barriers(config):
    # what waits in vain never ends, which the simulator would say
    done = barriers.launch(config, 2)
    assert (done.cycles >= 2 * barriers.UNROLL).all()
    instructions = [(i.opcode, *i.modifiers[:1], "TRYWAIT" in i.modifiers) for i in timed_loop(compiled(config).cubin)]
    waits, arrivals = ("SYNCS", "PHASECHK", True), ("SYNCS", "ARRIVE", False)
    if config.kind == "named barrier":
        waits, arrivals = ("BAR", "SYNC", False), ("BAR", "ARV", False)
    elif config.kind == "cluster barrier":
        waits, arrivals = ("UCGABAR_WAIT", False), ("UCGABAR_ARV", False)
    assert instructions.count(waits) == barriers.UNROLL
    assert instructions.count(arrivals) == (0 if config.kind == "wait" else barriers.UNROLL)
    assert not any("MEMBAR" in i for i in instructions) or config.kind == "cluster barrier"


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


LOADS = [
    tma.Loads(SM90, 8192, 1),
    tma.Loads(SM90, 32768, 4),
    tma.Loads(SM90, *tma.PIECES),
    tma.Loads(SM90, 8192, 4, True),
]


@pytest.mark.parametrize("loads", LOADS, ids=lambda loads: loads.compile_name)
def test_tma(loads):
    ctas, count = 2, 2
    boxes = torch.randint(-8, 9, (16, loads.box_bytes // 2)).to(torch.bfloat16)
    done = tma.launch(loads, count, ctas, boxes.view(-1, tma.COLUMNS))
    # the last boxes of each ring
    end = (count + 1) * loads.boxes - loads.multicast
    worker = torch.arange(ctas)[:, None] // loads.cluster * loads.warps + torch.arange(loads.warps)
    step = ctas // loads.cluster * loads.warps
    last = boxes[(worker[..., None] + torch.arange(end - loads.boxes, end) * step) % 16]
    assert torch.equal(done.output.view(ctas, loads.warps, -1).sum(2), last.float().sum((2, 3)))
    loop = timed_loop(compiled(loads).cubin)
    copies = [i for i in loop if i.opcode == "UTMALDG"]
    assert len(copies) == loads.boxes * loads.pieces
    assert all(("MULTICAST" in i.modifiers) == loads.multicast for i in copies)
    # the warps issue faster than the copies could be done
    assert sum(i.stall for i in loop) / len(copies) / loads.warps < (8 if loads.pieces > 1 else 100)


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


def chains_after(kind, instructions, x, y, z):
    """x of a chain after so many instructions, all tensors of words."""
    as_float = torch.float32
    a, b, c = (value.view(as_float).double() for value in (x, y, z))
    if kind == "imad":
        for _ in range(instructions):
            x = x * y + z
        return x
    if kind == "convert":
        for _ in range(instructions):
            high, low = (value.view(as_float).bfloat16().view(torch.int16).int() for value in (x, y))
            x = high << 16 | low & 0xFFFF
        return x
    sums = {"ffma3": a + instructions * b * c, "ffma2": a + instructions * b / 2, "fadd1": a + instructions}
    others = {"fmnmx": torch.maximum(a, b), "shuffle": a.view(-1, 2, a.shape[1]).flip(1).reshape(a.shape)}
    if instructions % 2 == 0:
        others["shuffle"] = a
    fixed_point = 0.6411857445  # of 2^-x
    return {**sums, **others, "mufu": torch.full_like(a, fixed_point)}[kind].float().view(torch.int32)


STREAMS = [streams.Stream(SM90, kind) for kind in streams.INSTRUCTIONS if kind not in ("shuffle", "shared")]
STREAMS += [streams.Stream(SM90, kind, 1, 1) for kind in ("ffma3", "mufu", "shuffle", "shared")]
STREAMS += [streams.Stream(SM90, "ffma3", beside=128, registers=registers) for registers in (False, True)]


@pytest.mark.parametrize("stream", STREAMS, ids=lambda stream: stream.compile_name)
def test_streams(stream):
    chains, opcode = stream.chains, SASS[stream.kind]
    # integers as floats, so that sums are exact
    values = torch.randint(1, 9, (stream.threads, 3 * chains)).float().view(torch.int32)
    done = streams.launch(stream, 2, values)
    x, y, z = values.split(chains, 1)
    found, _, _ = done.output.split(chains, 1)
    if stream.kind == "shared":
        assert (found.flatten().diff() == 4).all()  # each thread's word holds its own address
    else:
        wanted = chains_after(stream.kind, 2 * streams.UNROLL // chains, x, y, z)
        assert torch.allclose(found.view(torch.float32), wanted.view(torch.float32), rtol=1e-6)
    *products, loop = timed_loops(compiled(stream).cubin)
    assert mix(loop)[opcode] == streams.UNROLL
    assert len(loop) == streams.UNROLL + 3
    assert set(mix(loop)) <= LOOPING | {opcode}
    assert len(products) == (stream.beside is not None)
    for loop in products:
        assert mix(loop)["HGMMA"] == streams.PRODUCTS
        assert [i.opcode for i in loop].count("WARPGROUP") == 2  # none of them is waited for at once
        # they leave the issue slots to the stream
        assert len(loop) < 0.04 * streams.PRODUCTS * stream.beside / 2
        assert done.figures["groups"] > 0


SASS = {"ffma3": "FFMA", "ffma2": "FFMA", "fadd1": "FADD", "fmnmx": "FMNMX", "imad": "IMAD", "mufu": "MUFU"}
SASS |= {"convert": "F2FP", "shuffle": "SHFL", "shared": "LDS", "mma": "HMMA", "ldmatrix": "LDSM"}


def stream_rows(rate, latency):
    rows = []
    for stream in streams.streams(SM90):
        cycles = streams.UNROLL * (latency(stream.kind) if stream.chains == 1 else streams.WARPS / rate(stream))
        rows += rows_of(stream, streams.NAME, (32, 288), lambda count, c=cycles: 300 + count * c)
    return rows


LANES = {"fp32_lanes": 32, "alu_lanes": 16, "imad_lanes": 16, "mufu_lanes": 4, "convert_lanes": 16}
PIPES = {"fmnmx": 16, "imad": 16, "mufu": 4, "convert": 16}
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


@pytest.mark.parametrize("burst", [issue.Burst(SM90, 128), issue.Burst(SM90, 256, 2)], ids=lambda b: b.compile_name)
def test_issue(burst):
    a, b = operands(DType.BF16, burst.n)
    done = issue.launch(burst, a, b)
    product = issue.LENGTH / 4 * (a.float() @ b.float().T)
    assert torch.allclose(done.output, product.expand_as(done.output), rtol=1e-4, atol=1e-3)
    assert (done.cycles.diff() >= 0).all()
    _, codes = disassemble(compiled(burst).cubin)
    (code,) = codes.values()
    kept = ["clock" if reads_clock(i) else i.opcode for i in code.instructions]
    kept = [name for name in kept if name in ("clock", "HGMMA")]
    assert kept == ["clock", *["HGMMA", "clock"] * issue.LENGTH, "clock"]
    assert not any(i.opcode == "S2UR" and reads_clock(i) for i in code.instructions)  # it comes late


def test_issue_constants():
    """A queue of 3 in front of products of 64 cycles, which begin 10 cycles after their issue."""
    issued = [0]
    for i in range(issue.LENGTH):
        issued.append(max(issued[-1] + 13, 10 + (i - 3) * 64))
    rows = [{"kernel": issue.NAME, "n": 128, "warpgroups": 1, "issued": [[*issued, 1100]]}] * 5
    assert issue.constants(rows) == {"wgmma_queue": Measured(3, 0)}


@pytest.mark.parametrize("config", warps.matrices(SM90), ids=lambda config: config.compile_name)
def test_warps(config):
    one = 0x3F80  # in bf16
    inputs = torch.randint(0, 2, (config.threads, warps.OPERANDS, 2), dtype=torch.int32) * one
    results = torch.randint(-8, 9, (config.threads, 4 * config.chains)).float()
    packed = inputs[..., 0] | inputs[..., 1] << 16
    done = warps.launch(config, 2, packed, results.view(torch.int32))
    found = done.output.view(config.warps, 8, 4, config.chains, 4)
    steps = 2 * warps.UNROLL // config.chains
    if config.kind == "mma":
        # a lane is (row, pair of columns) of 8 × 8: A's registers are such blocks one below the other, B's side by side
        bits = (inputs / one).view(config.warps, 8, 4, warps.OPERANDS, 2)
        rows = torch.cat([bits[..., (0, 2), :], bits[..., (1, 3), :]], 1).transpose(2, 3).flatten(2)
        columns = bits[..., 4:, :].transpose(2, 3).flatten(2)
        product = (rows @ columns.mT).view(config.warps, 2, 8, 4, 2).permute(0, 2, 3, 1, 4).flatten(3)
        wanted = results.view(found.shape) + steps * product[..., None, :]
        assert torch.equal(found.view(torch.float32), wanted)
    else:
        # a lane's first register holds the address of its row
        address = found[..., 0].view(config.warps, 32, -1)
        assert (address.diff(dim=1) == 16).all() and (address.diff(dim=2) == 0).all()
    loop = timed_loop(compiled(config).cubin)
    # what ptxas puts between dependent mma.sync: "@!UPT UIADD3 URZ, URZ, URZ, URZ"
    kept = [i.opcode for i in loop if i.predicate != "@!UPT"]
    assert Counter(kept) - Counter(LOOPING) == {SASS[config.kind]: warps.UNROLL}


@pytest.mark.parametrize("copies", [False, True])
def test_chases(copies):
    config, buffer = warps.Chase(SM90, copies), warps.chase_buffer(2**16)
    place = buffer.data_ptr() + torch.zeros(1, dtype=torch.int64)
    done = warps.launch_chase(config, 2, place, buffer)
    lines = 2**16 // 4224
    assert place.item() == buffer.data_ptr() + 4224 * (2 * warps.LOADS % lines)
    assert done.cycles > 0
    # ptxas puts loads that never run in front of each LDGSTS
    counts = mix([i for i in timed_loop(compiled(config).cubin) if i.predicate != "@!PT"])
    loads = dict.fromkeys(("LDGSTS", "LDGDEPBAR", "DEPBAR", "LDS") if copies else ("LDG",), warps.LOADS)
    assert counts - Counter(LOOPING) == loads


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


@pytest.mark.parametrize("config", reductions.kinds(SM90), ids=lambda config: config.kind)
def test_reductions(config):
    done = reductions.launch(config, 3, ctas=2)
    assert (done.output == 3).all()
    loop = timed_loop(compiled(config).cubin)
    opcode, each = {"f32": ("REDG", 32 * 4), "v4": ("REDG", 32 * 16), "bulk": ("UBLKRED", 2**13)}[config.kind]
    warps_of_cta = config.threads // 32
    assert mix(loop)[opcode] * each * warps_of_cta == reductions.REGION_BYTES
    # issued faster than at 16 TB/s on 132 SMs of 1.5 GHz
    assert reductions.REGION_BYTES * reductions.KINDS[config.kind][1] / sum(i.stall for i in loop) > 80


@pytest.mark.parametrize(("arch", "rate"), [(SM90, 4.0), (SmArch.SM_80, 1.2)])
def test_reductions_constants(arch, rate):
    rows = []
    for config in reductions.kinds(arch):
        rates = {"f32": rate if arch is SmArch.SM_80 else 2.1, "v4": rate, "bulk": 3.5}
        seconds = 264 * reductions.REGION_BYTES / rates[config.kind] / 1e12
        for row in rows_of(config, reductions.NAME, (64, 576), lambda count: count, ctas=264):
            rows.append({**row, "seconds": 5e-6 + row["count"] * seconds})
    assert reductions.constants(rows)["l2_reductions"].value == pytest.approx(rate)


@pytest.mark.parametrize(("head_dim", "exponentials"), [(None, 0), (64, 64), (256, 16)])
def test_clocks(head_dim, exponentials):
    config, loaded = clocks.Load(SM90, head_dim), clocks.tensors(ctas=2)
    x = loaded.values.clone()
    done = clocks.launch(config, 2, loaded)
    product = 2 * clocks.PRODUCTS / 4 * (loaded.a.float() @ loaded.b.float().T)
    assert torch.allclose(done.output, product.expand_as(done.output), rtol=1e-4, atol=1e-3)
    for _ in range(2 * exponentials // clocks.CHAINS):
        x = 2 - 2 * torch.exp2(x)
    assert torch.allclose(loaded.values, x, rtol=1e-2, atol=1e-3)
    assert (done.cycles > 0).all()
    counts = mix(timed_loop(compiled(config).cubin))
    wanted = {"HGMMA": clocks.PRODUCTS, "MUFU": exponentials, "FFMA": exponentials, "WARPGROUP": 2}
    assert {name: counts[name] for name in wanted} == wanted
    others = [name for name in counts.elements() if name[0] != "U" and name not in LOOPING | set(wanted)]
    assert len(others) <= 1  # a constant of the FFMA


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
        return CliRunner().invoke(command_line.main, ["microbench", "--out", str(gpu), *arguments])

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
    done = CliRunner().invoke(command_line.main, ["microbench"])
    assert (done.exit_code, done.stderr) == (2, "no GPU: kernels are timed on one.\n")


def test_the_command_refuses_other_files(gpu):
    done = CliRunner().invoke(command_line.main, ["microbench", "--out", "x.csv"])
    assert done.exit_code == 2
    assert "x.csv: a file that ends in .toml" in done.output
