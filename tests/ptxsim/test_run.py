"""``python -m ptxsim run``: the examples as third parties run them, a script with a fault, and the exit codes."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from ptxsim.report.cli import Mode, _modes, _with_mode, main
from tests.testing import perfetto
from tests.testing.commands import neighbour, run_ptxsim


def run(script, *options):
    """(exit code, output) of the command."""
    return run_ptxsim("run", script, *options)


def rows(output):
    """Cells of the table of launches."""
    return [[cell.strip() for cell in line.strip("│ ").split("│")] for line in output.splitlines() if line[:1] == "│"]


def test_quack_softmax():
    """Forward and backward in four runs, with the race detector on."""
    code, output = run("examples/quack_softmax.py", "--arch", "sm_90a", "--race", "--seeds", "1", "--late")
    assert code == 0, output
    table = rows(output)
    assert [row[0] for row in table[::2]] == ["default", "seed 0", "default, late", "seed 0, late"]
    assert all(row[1].startswith("quacksoftmaxSoftmax") and row[-1] == "clean" for row in table) and len(table) == 8
    assert output.count("softmax of (8, 1000) on cuda:0") == 4 and "clean in 4 runs" in output


def test_fa4_forward_and_its_trace(tmp_path):
    """A warp-specialised kernel: its trace has the copies, the wgmma groups and what they wait for."""
    path = tmp_path / "fa4.json"
    code, output = run("examples/fa4_forward.py", "--arch", "sm_90a", "--late", "--sms", "2", "--trace", str(path))
    assert code == 0, output
    assert not path.exists()  # two runs, two files
    for name in ("fa4.default.json", "fa4.default-late.json"):
        found = perfetto.opened(tmp_path / name)
        assert len(found.processes) == int(rows(output)[0][2].split("×")[0])  # a process for each CTA of the grid
        for pid, tracks in found.tracks.items():
            assert {f"warp {n}" for n in range(16)} <= set(tracks)
            kinds = [kind for kind, *_ in found.slices[pid]]
            assert kinds.count("wgmma group") > 2 and kinds.count("copy") >= 3  # Q, K and V at least
            # every copy signals one barrier, and some warp waited for it
            loads = [(start, end) for name, start, end in found.flows if start[0] == pid and "TMA load" in name]
            assert len(loads) == kinds.count("copy")
            signalled = {end[1] for _, end in loads}
            waited = {start[1] for name, start, _ in found.flows if start[0] == pid and "wait" in name}
            assert signalled and signalled <= waited
    late = json.loads((tmp_path / "fa4.default-late.json").read_text("utf-8"))["traceEvents"]
    place = next(event["args"] for event in late if event["ph"] == "X" and "TMA load" in event["name"])
    assert place["source"].split(":")[0].endswith(".py") and "cp.async.bulk.tensor" in place["PTX"]


def test_fa3_forward():
    """This project's own example, which also gives the figure of docs/sanitizer.md."""
    code, output = run("examples/fa3_forward.py", "--arch", "sm_90a", "--race", "--sms", "1")
    assert code == 0, output
    ((_, kernel, grid, *_, result),) = rows(output)
    assert (kernel, grid, result) == ("fa3_sm90forwardkernelFa3ForwardKernel", "1×1×1", "clean")
    assert "attention of (1, 384, 1, 128) on cuda:0: largest error" in output


def test_race_is_reported_with_source_lines(tmp_path):
    script = tmp_path / "neighbour.py"
    script.write_text(neighbour("cute.arch.barrier()"))
    code, output = run(script, "--arch", "sm_90a", "--race")
    assert code == 0 and len(rows(output)) == 1, output
    script.write_text(neighbour())
    lines = script.read_text().splitlines()
    write, read = (
        1 + next(i for i, x in enumerate(lines) if text in x) for text in ("shared[thread] =", "thread ^ 32")
    )
    code, output = run(script, "--arch", "sm_90a", "--race")
    assert code == 1 and "RaceError" in output and "failed in the run 'default'" in output
    assert f"neighbour.py:{write}" in output and f"neighbour.py:{read}" in output
    assert "is at the fault" in output and "made the earlier access" in output


# One argument is a tensor, the other the bare address of one.
POINTER = """
import cutlass, cutlass.cute as cute, torch
from cutlass.cute.runtime import from_dlpack, make_ptr

@cute.kernel
def kernel(a: cute.Tensor, b: cute.Tensor):
    thread, _, _ = cute.arch.thread_idx()
    b[thread] = a[thread] + 1

@cute.jit
def launch(a: cute.Pointer, b: cute.Tensor):
    kernel(cute.make_tensor(a, cute.make_layout(64)), b).launch(grid=(1, 1, 1), block=(64, 1, 1))

a = torch.arange(64, dtype=torch.float32, device="cuda")
b = torch.empty_like(a)
launch(make_ptr(cutlass.Float32, a.data_ptr(), cute.AddressSpace.gmem, assumed_align=16), from_dlpack(b))
assert torch.equal(b, a + 1), b
"""


def test_bare_addresses(tmp_path):
    script = tmp_path / "pointer.py"
    script.write_text(POINTER)
    code, output = run(script, "--arch", "sm_80")
    assert code == 0 and len(rows(output)) == 1, output


# An operator that asks what its tensors are on; also called where torch has left its modes, in a backward.
OPERATOR = """
import torch
from torch import library

seen = []
LIBRARY = library.Library("posed", "DEF")
LIBRARY.define("copy(Tensor a) -> Tensor")

def copied(a):
    seen.append((a.device.type, torch.empty(1, device="cuda").is_cuda))
    b = torch.empty_like(a)
    launch(from_dlpack(a), from_dlpack(b))
    return b

LIBRARY.impl("copy", copied, "CompositeExplicitAutograd")
library.register_autograd("posed::copy", lambda ctx, g: torch.ops.posed.copy(g.contiguous()), lib=LIBRARY)
a = torch.arange(64, dtype=torch.float32, device="cuda").requires_grad_()
b = torch.ops.posed.copy(a)
b.sum().backward()
assert torch.equal(b, a) and torch.equal(a.grad, torch.ones(64, device="cuda")), (b, a.grad)
assert seen == [("cuda", True)] * 2, seen
"""


def test_operators_see_tensors_that_pose(tmp_path):
    script = tmp_path / "operator.py"
    kernel = POINTER[: POINTER.index("a = torch")].replace("a[thread] + 1", "a[thread]")
    kernel = kernel.replace("a: cute.Pointer", "a: cute.Tensor").replace(
        "cute.make_tensor(a, cute.make_layout(64))", "a"
    )
    script.write_text(kernel + OPERATOR)
    code, output = run(script, "--arch", "sm_80")
    assert code == 0 and len(rows(output)) == 2, output


# What scripts of CUTLASS ask the driver and torch for, and a kernel that leaves half of its result alone.
HOST = """
import cutlass, cutlass.cute as cute, cutlass.testing, cutlass.torch, cutlass.utils, math, torch
from cuda.bindings import driver
from cutlass.cute.runtime import from_dlpack

driver.cuInit(0)
assert driver.cuDeviceGetCount() == (driver.CUresult.CUDA_SUCCESS, 1)
stream = torch.cuda.Stream()
stream.wait_stream(torch.cuda.current_stream())
cutlass.cuda.initialize_cuda_context()
start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
start.record(stream)
info = cutlass.utils.HardwareInfo()
assert info.get_device_multiprocessor_count() == 6
assert [info.get_max_active_clusters(n) for n in (1, 2, 4, 8)] == [6, 3, 1, 1]

@cute.kernel
def kernel(a: cute.Tensor, b: cute.Tensor):
    thread, _, _ = cute.arch.thread_idx()
    b[2 * thread] = a[thread] + 1

@cute.jit
def launch(a: cute.Tensor, b: cute.Tensor, stream: driver.CUstream):
    kernel(a, b).launch(grid=(1, 1, 1), block=(64, 1, 1), stream=stream)

a = torch.arange(64, dtype=torch.float32, device="cuda")
b = torch.empty(128, device="cuda")
arguments = from_dlpack(a), from_dlpack(b), driver.CUstream(stream.cuda_stream)
function = cute.compile(launch, *arguments)
with torch.cuda.stream(stream):
    time = cutlass.testing.benchmark(function, kernel_arguments=cutlass.testing.JitArguments(*arguments), iterations=9)
end.record()
end.synchronize()
assert math.isnan(time) and math.isnan(start.elapsed_time(end)) and end.query()
assert torch.equal(b[::2], a + 1) and b[1::2].isnan().all(), b
count = torch.empty_like(a, dtype=torch.int32)
assert (count == -1).all() and torch.empty(3, dtype=torch.float8_e5m2, device="cuda").isnan().all()
assert a.new_empty((2, 3)).isnan().all() and torch.empty_strided((2, 2), (3, 1), device="cuda").isnan().all()
"""


def test_what_scripts_ask_the_host_for(tmp_path):
    script = tmp_path / "host.py"
    script.write_text(HOST)
    code, output = run(script, "--arch", "sm_90a", "--sms", "6")
    assert code == 0 and len(rows(output)) == 1, output  # the benchmark runs once


def test_script_that_fails_or_launches_nothing(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import sys\nassert sys.argv[1:] == ['--much', '3'], sys.argv\nsys.exit(5)\n")
    code, output = run(script, "--arch", "sm_80", "--", "--much", "3")
    assert code == 1 and "the script ended with 5" in output
    script.write_text("import torch\nassert torch.cuda.get_device_capability() == (8, 0)\n")
    code, output = run(script, "--arch", "sm_80")
    assert code == 2 and "launched no kernel" in output and "nothing was checked" in output
    script.write_text("import ptxsim\nprint('sums in', ptxsim.current().arithmetic)\n")
    for options, arithmetic in (([], "float32"), (["--arithmetic", "distinct"], "distinct")):
        assert f"sums in {arithmetic}" in run(script, "--arch", "sm_80", *options)[1]


@pytest.mark.parametrize(
    "options",
    [
        ["no_such_script.py", "--arch", "sm_90a"],
        [__file__],
        [__file__, "--arch", "sm_70"],
        [__file__, "--arch", "sm_90a", "--seeds", "-1"],
        [__file__, "--arch", "sm_90a", "--arithmetic", "exact"],
    ],
)
def test_bad_requests(options):
    assert CliRunner().invoke(main, ["run", *options]).exit_code == 2


def test_modes():
    assert _modes(0, False) == [Mode(None, False)]
    assert [str(mode) for mode in _modes(2, True)] == [
        "default", "seed 0", "seed 1", "default, late", "seed 0, late", "seed 1, late"]  # fmt: skip
    assert _with_mode(Path("a/b.json"), Mode(1, True)) == Path("a/b.seed1-late.json")
