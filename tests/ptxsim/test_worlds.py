"""The host side: which world runs a call, what is restored, how the stand-in library comes to be, what is legal."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cutlass
import cutlass.cute as cute
import numpy as np
import pytest
import torch
import tvm_ffi
from cutlass.cute.runtime import from_dlpack

import ptxsim
from ptxsim.host import host_memory, programs, standin
from tests.testing.copy_kernel import compile_copy, compile_scale

ROOT = Path(__file__).parents[2]
REAL_ERROR = "cudaErrorInsufficientDriver|cudaErrorNoDevice"  # what the real runtime says without a GPU


def run_python(code, *arguments, cwd=None, **environment):
    """Run the code in a fresh process; the finished process."""
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", **environment}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True, timeout=300)


@pytest.fixture
def vectors():
    """(a, b) of 300 numbers; b is zero."""
    torch.manual_seed(0)
    return torch.randn(300), torch.zeros(300)


def assert_real_world(function, scale):
    """The call reaches the CUDA runtime: it computes on a GPU, or fails in the runtime's own words without one."""
    if torch.cuda.is_available():
        a, b = torch.randn(300, device="cuda"), torch.zeros(300, device="cuda")
        function((a, b, None, scale, 300))
        torch.testing.assert_close(b, a * scale + 1.0)
    else:
        a, b = (tvm_ffi.from_dlpack(ptxsim.DeviceView(torch.zeros(300))) for _ in range(2))
        with pytest.raises(Exception, match=REAL_ERROR):
            function((a, b, None, scale, 300))


def test_worlds_alternate(vectors):
    a, b = vectors
    simulated, plain = [], []
    for arch in ("sm_80", "sm_90a", "sm_100a"):
        with ptxsim.simulate(arch) as sim:
            function = compile_scale()
            assert f".target {arch}\n" in function.artifacts.PTX
            sim.call(function, (a, b, None, 3.0, 300))
            assert torch.equal(b, 3 * a)
            assert [launch.grid for launch in sim.launches] == [(3, 1, 1)]
            simulated.append(function)
        plain.append(compile_scale(extra=1.0))
        for function in plain:
            assert_real_world(function, 2.0)
        b.zero_()
    # A loaded function stays in its world.
    for function in simulated:
        views = [tvm_ffi.from_dlpack(ptxsim.DeviceView(t)) for t in vectors]
        with pytest.raises(Exception, match="cudaErrorInvalidResourceHandle"):
            function((*views, None, 2.0, 300))
    with ptxsim.simulate("sm_100a") as sim:
        for function in plain:
            with pytest.raises(ptxsim.SimError, match=r"no PTX is known|in the real world"):
                sim.call(function, (a, b, None, 3.0, 300))
        with pytest.raises(ptxsim.SimError, match="compiled for sm_80, which does not run on the simulated sm_100a"):
            sim.call(simulated[0], (a, b, None, 3.0, 300))
        assert not b.any()
        sim.call(simulated[2], (a, b, None, 3.0, 300))  # loaded in an earlier simulation
    assert torch.equal(b, 3 * a)


def test_leaving_restores_everything():
    from cutlass.base_dsl.jit_executor import JitExecutor, JitFunctionArtifacts
    from cutlass.cutlass_dsl import CuTeDSL
    from cutlass.cutlass_dsl.cuda_jit_executor import CudaDialectJitCompiledFunction
    from cutlass.cutlass_dsl.tvm_ffi_provider import TVMFFIJitCompiledFunction, TVMFFIJitCompiledFunctionWithKwargs

    owners = [
        CuTeDSL._get_dsl().envar,
        cute.compile,
        JitExecutor,
        JitFunctionArtifacts,
        CudaDialectJitCompiledFunction,
        TVMFFIJitCompiledFunction,
        TVMFFIJitCompiledFunctionWithKwargs,
        cutlass.utils.HardwareInfo,
    ]
    foreign = [torch, torch.cuda, torch.Tensor, tvm_ffi, tvm_ffi.Function, np]
    ptxsim.install()

    def state(objects):
        return [dict(vars(owner)) for owner in objects]

    before, foreign_before, variables = state(owners), state(foreign), dict(os.environ)
    with pytest.raises(ZeroDivisionError), ptxsim.simulate("sm_90a", schedule_seed=3, late=True) as sim:
        assert ptxsim.current() is sim
        assert CuTeDSL._get_dsl().envar.arch == "sm_90a"
        assert state(owners) != before
        assert state(foreign) == foreign_before
        compile_scale()
        cute.compile(_double, from_dlpack(ptxsim.device_view(torch.zeros(4))))  # without options: the shared ones
        raise ZeroDivisionError
    assert state(owners) == before
    assert state(foreign) == foreign_before
    assert os.environ == variables
    assert ptxsim.current() is None
    assert not cute.compile._compile_options.options[cute.KeepPTX].value


@cute.kernel
def _double_kernel(a: cute.Tensor):
    thread, _, _ = cute.arch.thread_idx()
    a[thread] = a[thread] * 2.0


@cute.jit
def _double(a: cute.Tensor):
    _double_kernel(a).launch(grid=(1, 1, 1), block=(4, 1, 1))


def test_calls_without_tvm_ffi():
    values = torch.arange(4.0)
    with ptxsim.simulate("sm_80") as sim:
        argument = from_dlpack(ptxsim.device_view(values))
        _double(argument)
        compiled = cute.compile(_double, argument)
        compiled(argument)
        compiled.to(0)(argument)
        assert values.tolist() == [0, 8, 16, 24]
        short = from_dlpack(ptxsim.device_view(values[:4].clone()))
        sim.call(compiled, values)
        assert values.tolist() == [0, 16, 32, 48] and len(sim.launches) == 4
        del short


def test_simulations_do_not_nest_and_name_their_arch():
    with ptxsim.simulate("sm_80") as sim:
        with pytest.raises(ptxsim.SimError, match="do not nest: one of sm_80 is on"), ptxsim.simulate("sm_90a"):
            pass
        assert ptxsim.current() is sim
    with pytest.raises(ptxsim.SimError, match="this simulation is over"):
        sim.call(print)
    for arch in ("sm_75", "hopper", "sm_90b"):
        with pytest.raises(ptxsim.SimError, match=f"cannot simulate '{arch}'"), ptxsim.simulate(arch):
            pass


def test_unknown_ptx_is_named(vectors):
    a, b = vectors
    with ptxsim.simulate("sm_80") as sim:
        function = compile_scale(extra=11.0)
        ptx = function.artifacts.PTX
        assert "st.global" in ptx
        ptxsim.register_ptx(function.artifacts.CUBIN, ptx.replace("st.global", "st.nowhere"))
        with pytest.raises(ptxsim.PtxError, match=r"^\w{,60}Scale: ") as caught:
            sim.call(function, (a, b, None, 2.0, 300))
        assert "st.nowhere" in str(caught.value)
        assert caught.value.kernel.startswith("kernel_cutlass_kernel_") and "tensorptrf32" in caught.value.kernel
        ptxsim.register_ptx(function.artifacts.CUBIN, ptx)  # nothing of the failed call stays
        sim.call(function, (a, b, None, 2.0, 300))
        torch.testing.assert_close(b, 2 * a + 11.0)


@pytest.mark.parametrize(
    ("target", "arch", "runs"),
    [
        ("sm_80", "sm_80", True),
        ("sm_80", "sm_86", True),
        ("sm_86", "sm_80", False),
        ("sm_80", "sm_90a", False),
        ("sm_90a", "sm_90a", True),
        ("sm_100a", "sm_103a", False),
        ("sm_100f", "sm_103a", True),
    ],
)
def test_which_cubins_run(target, arch, runs):
    assert programs.runs_on(target, arch) is runs


def test_device_of_the_simulation():
    with ptxsim.simulate("sm_90a", sm_count=6):
        hardware = cutlass.utils.HardwareInfo()
        assert hardware.get_device_multiprocessor_count() == 6
        assert hardware.get_max_active_clusters(4) == 1
        with pytest.raises(ptxsim.SimError, match="no L2 cache"):
            hardware.get_l2_cache_size_in_bytes()


# ---- arguments ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "element"),
    [
        (torch.float32, cutlass.Float32),
        (torch.bfloat16, cutlass.BFloat16),
        (torch.float16, cutlass.Float16),
        (torch.int32, cutlass.Int32),
        (torch.float8_e4m3fn, cutlass.Float8E4M3FN),
        (torch.float8_e5m2, cutlass.Float8E5M2),
    ],
    ids=str,
)
def test_dtypes_and_strides(dtype, element):
    values = torch.randint(-8, 8, (40, 6)).to(dtype)
    out = torch.zeros(6, 40).to(dtype).t()  # column-major
    with ptxsim.simulate("sm_90a") as sim:
        function = compile_copy(element)
        sim.call(function, (values[:, ::2], out[:, :3]))
        assert torch.equal(out[:, :3].float(), values[:, ::2].float())
        sim.call(function, (values[:1].expand(40, 6), out))  # stride 0
        assert torch.equal(out.float(), values[:1].expand(40, 6).float())
    assert values.dtype == dtype and not out.is_cuda


def test_nested_numpy_and_empty_arguments(vectors):
    a, b = vectors
    with ptxsim.simulate("sm_80") as sim:
        function = compile_scale(with_c=True)
        sim.call(function, (a.numpy(), b, np.full(300, 0.5, np.float32), 2.0, 300))
        assert torch.equal(b, 2 * a + 0.5)
        sim.call(function, (a, b, torch.empty(0), 2.0, 0))  # nothing of c is read
        with pytest.raises(ptxsim.MemoryFault):
            sim.call(function, (a, b, torch.empty(0), 2.0, 1))
        with pytest.raises(TypeError, match="not str"):
            ptxsim.device_view("tensor")
        with pytest.raises(ValueError, match="works on host memory, this tensor is on meta"):
            sim.call(function, (a.to("meta"), b, a, 2.0, 300))


def test_overlapping_arguments(vectors):
    a, b = vectors
    both = b.numpy()
    with ptxsim.simulate("sm_80") as sim:
        sim.call(compile_scale(with_c=True), (a, both, both[100:101], 2.0, 1))
        sim.call(compile_copy(cutlass.Float32), (a[:, None], b[:, None]))
        assert torch.equal(a, b)
        sim.call(compile_scale(), (both, both[:300], None, 2.0, 300))
    assert torch.equal(2 * a, b)
    assert host_memory.merged([(0, 10), (5, 2), (8, 4), (12, 1), (20, 0)]) == [(0, 12), (12, 1)]


def test_clusters(vectors):
    a, b = vectors
    with ptxsim.simulate("sm_90a") as sim:
        sim.call(compile_scale(cluster=2), (a, b, None, 2.0, 300))
        assert torch.equal(b, 2 * a)
        assert (sim.launches[0].cluster, sim.launches[0].grid) == ((2, 1, 1), (4, 1, 1))


# ---- errors ---------------------------------------------------------------------------------------------------------


def test_out_of_bounds_is_caught_and_named(vectors):
    a, b = vectors
    with ptxsim.simulate("sm_80") as sim:
        function, with_c = compile_scale(), compile_scale(with_c=True)
        short = torch.zeros(256)
        for bad, args, access in ((function, (a, short, None), "st.global"), (with_c, (a, b, short), "ld.global")):
            with pytest.raises(ptxsim.MemoryFault, match=r"^\w{,60}Scale: .*out of bounds") as caught:
                sim.call(bad, (*args, 2.0, 300))
            assert access in caught.value.text  # the PTX line
        sim.call(function, (a, b, None, 2.0, 300))  # the error left nothing behind
        assert torch.equal(b, 2 * a)
        # Only this call's arguments are legal, not those of the calls before.
        other = torch.zeros(300)
        views = [tvm_ffi.from_dlpack(ptxsim.device_view(t)) for t in (a, b)]
        function((*views, None, 3.0, 300))
        assert torch.equal(b, 3 * a)
        with pytest.raises(ptxsim.MemoryFault):
            function((views[0], tvm_ffi.from_dlpack(ptxsim.DeviceView(other)), None, 3.0, 300))
        with pytest.raises(ptxsim.MemoryFault):
            function((*views, None, 3.0, 301))


def test_impossible_launches_are_refused(vectors):
    a, b = vectors
    with ptxsim.simulate("sm_80") as sim:
        with pytest.raises(ptxsim.SimError, match=r"the grid \(0, 1, 1\) is empty"):
            sim.call(compile_scale(), (a[:0], b, None, 2.0, 0))
        function = compile_scale(threads=1056)
        with pytest.raises(ptxsim.SimError, match=r"\(1056, 1, 1\) threads in a CTA; at most 1024"):
            sim.call(function, (a, b, None, 2.0, 300))


def test_machine_code_is_matched_by_its_bytes(vectors):
    """Two kernels of one name: each runs its own code, and the one without PTX is refused."""
    a, b = vectors
    with ptxsim.simulate("sm_80") as sim:
        functions = [compile_scale(extra=extra) for extra in (1.0, 5.0)]
        names = [f.artifacts.PTX.split(".entry ")[1].split("(")[0] for f in functions]
        assert names[0] == names[1]
        for function, extra in zip(functions, (1.0, 5.0), strict=True):
            sim.call(function, (a, b, None, 2.0, 300))
            torch.testing.assert_close(b, 2 * a + extra)
    stranger = compile_scale(extra=7.0)
    with ptxsim.simulate("sm_80") as sim:
        with pytest.raises(ptxsim.SimError, match="no PTX is known"):
            sim.call(stranger, (a, b, None, 2.0, 300))
        torch.testing.assert_close(b, 2 * a + 5.0)
        with pytest.raises(ptxsim.SimError, match="not a cubin"):
            ptxsim.register_ptx(b"\x7fELF\x01", functions[0].artifacts.PTX)


# ---- the stand-in library -------------------------------------------------------------------------------------------

LOAD_OBJECT = """
import sys, pathlib, torch, cutlass.cute as cute, ptxsim
folder, known = pathlib.Path(sys.argv[1]), sys.argv[2] == "known"
a, b = torch.arange(300.0), torch.zeros(300)
with ptxsim.simulate("sm_80") as sim:
    if known:
        ptxsim.register_ptx((folder / "k.cubin").read_bytes(), (folder / "k.ptx").read_text())
    function = cute.runtime.load_module(str(folder / "k.o"), enable_tvm_ffi=True).scale
    sim.call(function, (a, b, None, 2.0, 300))
    assert torch.equal(b, 2 * a), b
    print(len(sim.launches), "launches")
"""


def test_exported_object_in_a_fresh_process(tmp_path):
    """… which also builds the library anew, and leaves the packages and the working directory as they were."""
    with ptxsim.simulate("sm_80") as sim:
        function = compile_scale()
        function.export_to_c(str(tmp_path / "k.o"), function_name="scale")
        (tmp_path / "k.ptx").write_text(function.artifacts.PTX)
        (tmp_path / "k.cubin").write_bytes(function.artifacts.CUBIN)
        a, b = torch.arange(300.0), torch.zeros(300)
        loaded = cute.runtime.load_module(str(tmp_path / "k.o"), enable_tvm_ffi=True).scale
        sim.call(loaded, (a, b, None, 2.0, 300))
        assert torch.equal(b, 2 * a)
        with pytest.raises(ptxsim.MemoryFault):
            sim.call(loaded, (a, b, None, 2.0, 301))

    packages = [Path(cutlass.__file__).parents[2], Path(tvm_ffi.__file__).parent, Path(ptxsim.__file__).parent]
    before = _files(packages)
    (tmp_path / "cwd").mkdir()
    environment = {"cwd": tmp_path / "cwd", "PTXSIM_CACHE_DIR": str(tmp_path / "cache")}
    done = run_python(LOAD_OBJECT, tmp_path, "known", **environment)
    assert done.stdout == "1 launches\n", done.stderr
    done = run_python(LOAD_OBJECT, tmp_path, "unknown", **environment)
    assert done.returncode and "no PTX is known" in done.stderr
    assert _files(packages) == before
    assert not list((tmp_path / "cwd").iterdir())
    assert [p.name for p in (tmp_path / "cache").rglob("*") if p.is_file() and p.stat().st_size] == [
        "libcute_dsl_runtime.so"
    ]


def _files(folders):
    return {
        path: path.stat().st_mtime_ns
        for folder in folders
        for path in folder.rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }


def test_real_library_loaded_first(tmp_path):
    code = """
import cutlass.cute as cute, ptxsim
from tests.testing.copy_kernel import compile_scale
compile_scale()
try:
    with ptxsim.simulate("sm_80"):
        pass
except ptxsim.RuntimeAlreadyLoaded as error:
    print(error)
"""
    done = run_python(code, CUTE_DSL_ARCH="sm_80")
    assert "ptxsim.install(), before the first cute.compile" in done.stdout, done.stderr


# The library's path is what the DSL would find; without importing the DSL, which takes seconds.
BUILD = "import sys, pathlib; from ptxsim.host import standin; print(standin.build(pathlib.Path(sys.argv[1])))"


@pytest.fixture
def real_library():
    ptxsim.install()
    return next(Path(cutlass.__file__).parents[2].glob("cu*/lib/libcute_dsl_runtime.so"))


def test_missing_compiler(tmp_path, real_library):
    cache = {"PTXSIM_CACHE_DIR": str(tmp_path / "cache")}
    done = run_python(BUILD, real_library, PATH="", CC="", **cache)
    assert "CompilerMissing" in done.stderr and "none of cc, gcc, clang is on the PATH" in done.stderr
    done = run_python(BUILD, real_library, CC="no-such-compiler -O1", **cache)
    assert "CompilerMissing" in done.stderr and "$CC names 'no-such-compiler -O1'" in done.stderr
    done = run_python(BUILD, real_library, CC="false", **cache)
    assert "could not build the stand-in library: false" in done.stderr
    done = run_python(BUILD, real_library, CC="", PTXSIM_CACHE_DIR="/dev/null/cache")
    assert "no place to keep the stand-in library" in done.stderr and "set PTXSIM_CACHE_DIR" in done.stderr
    assert run_python(BUILD, real_library, CC="", **cache).returncode == 0
    done = run_python(BUILD, real_library, PATH="", CC="", **cache)  # built already: needs no compiler
    assert done.returncode == 0, done.stderr


def test_concurrent_first_builds(tmp_path, real_library):
    cache = tmp_path / "cache"
    with ThreadPoolExecutor(4) as pool:
        runs = list(pool.map(lambda _: run_python(BUILD, real_library, PTXSIM_CACHE_DIR=str(cache)), range(4)))
    assert {run.returncode for run in runs} == {0}, runs
    (path,) = {run.stdout.strip() for run in runs}
    assert sorted(p.name for p in cache.rglob("*")) == sorted(["lock", Path(path).name, Path(path).parent.name])
    # What was built exports exactly what the real library does.
    symbols = standin.exported_functions(Path(path).read_bytes())
    own = [name for name in symbols if name.startswith("ptxsim_")]
    assert own and set(symbols) - set(own) == set(standin.exported_functions(real_library.read_bytes()))
