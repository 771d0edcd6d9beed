"""The kernels that measure a GPU's constants: what they compute, simulated with the race detector, and what their timed
loops hold."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from cute_fa import simulate
from cute_fa.engine.compiler import compiled
from cute_fa.semantics.types import DType, SmArch
from perf.microbench import barriers, clocks, issue, reductions, streams, tma, warps, wgmma
from perf.microbench.products import operands
from perf.sass import disassemble
from tests.testing.timed_loops import mix, reads_clock, timed_loop, timed_loops

SM80 = SmArch.SM_80
SM90 = SmArch.SM_90A
LOOPING = {"BRA", "ISETP", "IADD3", "UIADD3", "VIADD", "NOP"}  # what a loop may hold beside what it times


def name(config):
    """Of a test's parameter."""
    return config.compile_name.removeprefix("microbench_")


@pytest.fixture(autouse=True)
def world(request):
    """The architecture of the kernel under test, with the race detector."""
    given = getattr(request.node, "callspec", None)
    archs = [value.arch for value in given.params.values() if hasattr(value, "arch")] if given else []
    with simulate(*archs or [SM90], race=True, num_sms=2) as simulation:
        yield simulation


@pytest.mark.parametrize(
    "chain",
    [
        wgmma.Chain(SM90, 8, registers=True),
        wgmma.Chain(SM90, 64, False, DType.BF16, *wgmma.ALONE),
        wgmma.Chain(SM90, 128),
        wgmma.Chain(SM90, 256, False, DType.E4M3),
    ],
    ids=name,
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
    assert [i.operands[1] for i in waits] == [hex(chain.pending)] * (wgmma.UNROLL // chain.per_commit)
    assert {name for name in counts if name[0] != "U"} - LOOPING <= {"HGMMA", "QGMMA", "WARPGROUP"}
    assert sum(i.stall for i in loop) < wgmma.UNROLL * max(chain.n / 3, 6)


@pytest.mark.parametrize("config", [*barriers.hand_overs(SM80), *barriers.hand_overs(SM90)], ids=name)
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


LOADS = [
    tma.Loads(SM90, 8192, 1),
    tma.Loads(SM90, 32768, 4),
    tma.Loads(SM90, *tma.PIECES),
    tma.Loads(SM90, 8192, 4, True),
]


@pytest.mark.parametrize("loads", LOADS, ids=name)
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
STREAMS += [streams.Stream(SM90, kind, 1, 1) for kind in ("shuffle", "shared")]
STREAMS += [streams.Stream(SM80, "ffma2")]
STREAMS += [streams.Stream(SM90, "ffma3", beside=128, registers=registers) for registers in (False, True)]


SASS = {"ffma3": "FFMA", "ffma2": "FFMA", "fadd1": "FADD", "fmnmx": "FMNMX", "imad": "IMAD", "mufu": "MUFU"}
SASS |= {"convert": "F2FP", "shuffle": "SHFL", "shared": "LDS", "mma": "HMMA", "ldmatrix": "LDSM"}


@pytest.mark.parametrize("stream", STREAMS, ids=name)
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


@pytest.mark.parametrize("burst", [issue.Burst(SM90, 64), issue.Burst(SM90, 256, 2)], ids=name)
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


@pytest.mark.parametrize("config", [warps.Matrices(SM80, "mma"), *warps.matrices(SM90)], ids=name)
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


CHASES = [warps.Chase(SM80, True), warps.Chase(SM90), warps.Chase(SM90, True)]


@pytest.mark.parametrize("config", CHASES, ids=name)
def test_chases(config):
    buffer = warps.chase_buffer(2**16)
    place = buffer.data_ptr() + torch.zeros(1, dtype=torch.int64)
    done = warps.launch_chase(config, 2, place, buffer)
    lines = 2**16 // 4224
    assert place.item() == buffer.data_ptr() + 4224 * (2 * warps.LOADS % lines)
    assert done.cycles > 0
    # ptxas puts loads that never run in front of each LDGSTS
    counts = mix([i for i in timed_loop(compiled(config).cubin) if i.predicate != "@!PT"])
    loads = dict.fromkeys(("LDGSTS", "LDGDEPBAR", "DEPBAR", "LDS") if config.copies else ("LDG",), warps.LOADS)
    assert counts - Counter(LOOPING) == loads


@pytest.mark.parametrize("config", [*reductions.kinds(SM80), *reductions.kinds(SM90)], ids=name)
def test_reductions(config):
    done = reductions.launch(config, 3, ctas=2)
    assert (done.output == 3).all()
    loop = timed_loop(compiled(config).cubin)
    opcode, each = {"f32": ("RED", 32 * 4), "v4": ("RED", 32 * 16), "bulk": ("UBLKRED", 2**13)}[config.kind]
    warps_of_cta = config.threads // 32
    count = sum(i.opcode.removesuffix("G") == opcode for i in loop)  # REDG from sm_90 on
    assert count * each * warps_of_cta == reductions.REGION_BYTES
    # issued faster than at 16 TB/s on 132 SMs of 1.5 GHz
    assert reductions.REGION_BYTES * reductions.KINDS[config.kind][1] / sum(i.stall for i in loop) > 80


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
    loop = timed_loop(compiled(config).cubin)
    counts = mix(loop)
    wanted = {"HGMMA": clocks.PRODUCTS, "MUFU": exponentials, "FFMA": exponentials, "WARPGROUP": 2}
    assert {name: counts[name] for name in wanted} == wanted
    assert [i.operands[1] for i in loop if "DEPBAR" in i.modifiers] == ["0x1"]
    others = [name for name in counts.elements() if name[0] != "U" and name not in LOOPING | set(wanted)]
    assert len(others) <= 1  # a constant of the FFMA
