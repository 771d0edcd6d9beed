"""What has no time: unknown GPUs, damaged constants, missing or other compilers, other machine code, no path."""

from __future__ import annotations

import re
import struct
import sys

import numpy as np
import pytest

from ptxsim.errors import SimError
from ptxsim.timing import assembler, cubin
from ptxsim.timing.gpus import FOLDER, known, load
from ptxsim.timing.paths import PathNotFound
from ptxsim.timing.replay import TimedLaunch
from tests.testing.timed import H100, chains, recorded

OUT = [np.zeros(1024, np.float32)]
TEXT = (FOLDER / "h100.toml").read_text()


def test_every_gpu_loads():
    assert {"a100", "a100-pcie", "h100", "h200"} <= set(known())
    for name in known():
        gpu = load(name)
        assert gpu.sms > 50 and 1 < gpu.clock < 2 and gpu.arch.startswith("sm_")


def test_an_unknown_gpu():
    with pytest.raises(SimError, match=r"no constants of the GPU 'b900': one of a100, .*h100, .*or the path of a TOML"):
        load("b900")
    with pytest.raises(SimError, match=r"no constants of the GPU '/nowhere\.toml'"):
        load("/nowhere.toml")


def without(name):
    return re.sub(rf"\[{name}\]\n(?:[a-z].*\n)+", "", TEXT)


def changed(name, key, value):
    """The file with another value of a key of a constant."""
    start = TEXT.index(f"[{name}]\n")
    at = TEXT.index(f"\n{key} =", start)
    return TEXT[:at] + f"\n{key} = {value}" + TEXT[TEXT.index("\n", at + 1) :]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (without("wake"), "lacks wake$"),
        (without("wake").replace('name = "', 'title = "', 1), "lacks name, wake"),
        (changed("wake", "unit", '"µs"'), "wake has the unit 'µs': 'cycles'"),
        (changed("wake", "kind", '"guessed"'), "wake has the kind 'guessed': one of documented, measured"),
        (changed("wake", "value", "-3"), "wake has the value -3: a number that is not negative"),
        (changed("wake", "value", "nan"), "wake has the value nan"),
        (changed("wake", "value", "inf"), "wake has the value inf"),
        (changed("wake", "value", "true"), "wake has the value True"),
        (changed("wake", "value", '"40"'), "wake has the value '40'"),
        (changed("tensor_flops", "value", "0"), "tensor_flops has the value 0: a number above 0"),
        (changed("wake", "source", '""'), "wake has no source"),
        (changed("wake", "spread", "-0.1"), "wake has the spread -0.1: 0 to 1"),
        (changed("wake", "date", "2026-11-29\nspraed = 0.1"), "wake has unknown spraed"),
        (TEXT + "\n[tma_bites]\nvalue = 1\n", "unknown constants tma_bites"),
        (TEXT + "\n[rivals.other]\ntma_bites = 1\n", "unknown constants tma_bites"),
        (TEXT + "\n[rivals.other]\ntensor_flops = 0\n", r"rivals\.other\.tensor_flops has the value 0"),
        ("wake = 40\n" + without("wake"), "wake = 40: a table with value, unit"),
        ("rivals = 3\n" + TEXT[: TEXT.index("[rivals.")], "rivals are tables of values"),
        (TEXT.replace('arch = "sm_90a"', 'arch = "hopper"'), "arch = 'hopper'"),
        ("name = ", "is not TOML"),
    ],
)
def test_a_damaged_file(tmp_path, text, message):
    path = tmp_path / "gpu.toml"
    path.write_text(text)
    with pytest.raises(SimError, match=message) as raised:
        load(str(path))
    assert str(path) in str(raised.value)


def test_another_explanation():
    assert H100.rival("power", 128).register_ports == 0 != H100.register_ports
    with pytest.raises(SimError, match=r"H100 SXM5 80GB has no rival 'heat': one of power, .*slots"):
        H100.rival("heat", 128)
    with pytest.raises(KeyError):
        H100.with_values(tma_bites=3)


# ---- machine code -------------------------------------------------------------------------------------------------
def test_ptxas_is_missing(monkeypatch):
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(
        SimError, match=r"ptxas 12\.9\.86, which makes .* PTX 8\.8, is missing: install nvidia-cuda-nvcc-cu12=="
    ):
        assembler.find_ptxas(".version 8.8\n")


def test_nvdisasm_is_missing(monkeypatch):
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("NVDISASM", raising=False)
    with pytest.raises(cubin.ToolMissing, match="nvdisasm not found"):
        cubin.find_tool("nvdisasm")


def test_ptx_of_another_version():
    with pytest.raises(
        SimError, match=r"no ptxas is known that makes the machine code of PTX 7\.4: 8\.8 \(ptxas 12\.9\.86\)"
    ):
        assembler.find_ptxas(".version 7.4\n.target sm_90a\n")
    with pytest.raises(SimError, match=r"the PTX has no \.version"):
        assembler.find_ptxas(".target sm_90a\n")


def test_ptx_that_ptxas_refuses():
    with pytest.raises(SimError, match=r"refuses the PTX: .*Unknown symbol|refuses the PTX"):
        assembler.assemble(
            ".version 8.8\n.target sm_90a\n.address_size 64\n.visible .entry kernel()\n{\nmov.u32 %x, 1;\n}\n"
        )


def test_other_machine_code():
    """One byte of one instruction."""
    recording = recorded(chains("fma.rn.f32 {d}, {d}, %f2, %f3;", 1, 4), [], OUT)
    made = cubin.run_ptxas(assembler.find_ptxas(recording.ptx), recording.ptx)
    assert TimedLaunch(recording, made).registers == cubin.kernel_resources(made)["kernel"]["regs"] > 0
    damaged = bytearray(made)
    damaged[text_start(made) + 5] ^= 1
    with pytest.raises(
        assembler.CodeDiffers, match=r"ptxas makes other machine code of the PTX than the one that runs"
    ):
        TimedLaunch(recording, bytes(damaged))
    with pytest.raises(SimError, match="not a cubin"):
        TimedLaunch(recording, b"nothing")


def text_start(made):
    """Where the code of the kernel begins in a cubin."""
    (table,) = struct.unpack_from("<Q", made, 0x28)
    size, count, names = struct.unpack_from("<HHH", made, 0x3A)
    headers = [struct.unpack_from("<IIQQQQIIQQ", made, table + size * i) for i in range(count)]
    (found,) = (h for h in headers if made[headers[names][4] + h[0] :].startswith(b".text.kernel\0"))
    return found[4]


# ---- paths --------------------------------------------------------------------------------------------------------
BODY = """.shared .align 8 .b64 bar; mov.u32 %r1, bar; setp.eq.u32 %p1, %t, 0; @!%p1 bra READY;
  mbarrier.init.shared.b64 [%r1], 1; READY: bar.sync 0; @%p1 mbarrier.arrive.shared.b64 _, [%r1];
  W: mbarrier.try_wait.parity.shared.b64 %p3, [%r1], 0; @!%p3 bra W;""" + chains("ex2.approx.ftz.f32 {d}, {d};", 1, 3)


def entries(trace, kind):
    return [n for n, e in enumerate(trace) if not isinstance(e, int) and e[0] == kind]


def test_no_path_performs_what_a_warp_did():
    recording = recorded(BODY, [], OUT, threads=64)
    TimedLaunch(recording)
    trace = recording.ctas[0][1]
    (at,) = entries(trace, "try")
    for damaged, message in (
        (trace[:at] + trace[at + 1 :], r"no path of a warp through the machine code: at EXIT|at SYNCS.*its end"),
        (trace[: at + 1] + [("cluster", 20, True)] + trace[at + 1 :], "come to .'cluster', 20., operation"),
    ):
        recording.ctas[0][1] = damaged
        with pytest.raises(PathNotFound, match=message):
            TimedLaunch(recording)


def test_a_path_with_other_counts_is_refused():
    """A warp that would have executed the exponentials twice."""
    recording = recorded(BODY, [], OUT, threads=64)
    recording.ctas[0][0] = [*recording.ctas[0][0], recording.ctas[0][0][-1]]
    with pytest.raises(
        PathNotFound, match=r"no path of a warp executes what PTX line \d+ becomes 2 times, as the PTX did: ex2\."
    ):
        TimedLaunch(recording)


def test_polling_is_refused():
    """How often a loop over mbarrier.test_wait turns depends on time: the simulator's count says nothing."""
    body = BODY.replace("try_wait", "test_wait")
    with pytest.raises(SimError, match=r"mbarrier\.test_wait"):
        TimedLaunch(recorded(body, [], OUT, threads=64))
