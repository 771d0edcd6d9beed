"""The compile cache: one compile among many processes, and nothing executed that is not what was compiled."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import filelock
import pytest
import torch

import cute_fa
import ptxsim
from cute_fa.engine import cache, compiler, files, keys
from cute_fa.engine.cache import Artifacts
from cute_fa.engine.contract import KernelConfig
from cute_fa.semantics.errors import ArgumentError, NoDeviceError
from cute_fa.semantics.types import DType, SmArch

SCRIPT = Path(__file__).with_name("cache_kernels.py")


def _import(name: str, path: Path):
    """Import a file under a name without a package, as a script would be: its source alone then counts."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


ScaleConfig = _import("cache_kernels", SCRIPT).ScaleConfig


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """An empty cache, fresh counts, an empty memory cache, and an empty working directory."""
    monkeypatch.setenv("CUTE_FA_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("CUTE_FA_CACHE", raising=False)
    monkeypatch.setattr(cache, "_warned", False)
    monkeypatch.setattr(compiler, "_kernels", {})
    cache.stats.reset()
    working = tmp_path / "working"
    working.mkdir()
    monkeypatch.chdir(working)
    return tmp_path / "cache" / "kernels"


def counts() -> dict[str, int]:
    return {name: count for name, count in dataclasses.asdict(cache.stats).items() if count}


# ---- entries, without the DSL ----------------------------------------------------------------------------------------

CONFIG = ScaleConfig(SmArch.SM_80)
GOOD = Artifacts(b"\x7fELF object" * 100, ".target sm_80 // µ\n" * 100, b"cubin" * 100)
FRESH = Artifacts(b"\x7fELF fresh", ".target sm_80 // fresh", b"fresh")


def must_not_build() -> Artifacts:
    raise AssertionError("the entry was not used")


def store(artifacts: Artifacts = GOOD, config: KernelConfig = CONFIG) -> Path:
    """Put an entry into the cache and return its folder."""
    key = cache.key_of(config)
    assert cache.fetch(key, lambda: artifacts) == artifacts
    return cache.directory() / key.digest


def test_an_entry_is_stored_and_found(folder):
    entry = store()
    assert entry.parent == folder == cache.directory()
    assert {path.name for path in entry.iterdir()} == {"kernel.o", "kernel.ptx", "kernel.cubin", "manifest.json"}
    assert (entry / "kernel.ptx").read_text() == GOOD.ptx
    assert cache.fetch(cache.key_of(CONFIG), must_not_build) == GOOD
    assert counts() == {"stored": 1, "loaded": 1}
    assert json.loads((entry / "manifest.json").read_text())["key"]["config"]["factor"] == (2.0).hex()


def _flip(name: str):
    def damage(entry: Path):
        content = bytearray((entry / name).read_bytes())
        content[len(content) // 2] ^= 1
        (entry / name).write_bytes(content)

    return damage


def _truncate(name: str, keep: float):
    def damage(entry: Path):
        content = (entry / name).read_bytes()
        (entry / name).write_bytes(content[: int(len(content) * keep)])

    return damage


def _write_manifest(text: str):
    return lambda entry: (entry / "manifest.json").write_text(text)


def _edit_manifest(edit):
    def damage(entry: Path):
        manifest = json.loads((entry / "manifest.json").read_text())
        edit(manifest)
        (entry / "manifest.json").write_text(json.dumps(manifest))

    return damage


def _other_entry(entry: Path):
    """A sound entry of another kernel under this one's name."""
    other = store(FRESH, ScaleConfig(SmArch.SM_80, 3.0))
    shutil.rmtree(entry)
    shutil.copytree(other, entry)


def _link_folder(entry: Path):
    entry.rename(entry.parent.parent / "elsewhere")
    entry.symlink_to(entry.parent.parent / "elsewhere")


def _link_object(entry: Path):
    (entry / "kernel.o").rename(entry.parent.parent / "elsewhere.o")
    (entry / "kernel.o").symlink_to(entry.parent.parent / "elsewhere.o")


def _pipe(entry: Path):
    (entry / "kernel.o").unlink()
    os.mkfifo(entry / "kernel.o")


def _folder_for_object(entry: Path):
    (entry / "kernel.o").unlink()
    (entry / "kernel.o").mkdir()


def _file_for_folder(entry: Path):
    shutil.rmtree(entry)
    entry.write_bytes(GOOD.object)


DAMAGE = {
    "object bit": _flip("kernel.o"),
    "ptx bit": _flip("kernel.ptx"),
    "cubin bit": _flip("kernel.cubin"),
    "object cut": _truncate("kernel.o", 0.5),
    "ptx cut": _truncate("kernel.ptx", 0.9),
    "cubin emptied": _truncate("kernel.cubin", 0),
    "object missing": lambda entry: (entry / "kernel.o").unlink(),
    "manifest missing": lambda entry: (entry / "manifest.json").unlink(),
    "manifest cut": _truncate("manifest.json", 0.5),
    "manifest not json": _write_manifest("kernel"),
    "manifest not utf-8": lambda entry: (entry / "manifest.json").write_bytes(b"\xff\xfe{"),
    "manifest a list": _write_manifest("[1, 2]"),
    "manifest too deep": _write_manifest("[" * 100_000),
    "manifest without files": _write_manifest('{"key": {}, "files": 3}'),
    "key of other versions": _edit_manifest(lambda manifest: manifest["key"].update(versions={})),
    "key of another host": _edit_manifest(lambda manifest: manifest["key"].update(host="Linux x86_64 0")),
    "hash missing": _edit_manifest(lambda manifest: manifest["files"].pop("kernel.o")),
    "another entry": _other_entry,
    "folder a link": _link_folder,
    "object a link": _link_object,
    "object a pipe": _pipe,
    "object a folder": _folder_for_object,
    "a file": _file_for_folder,
    "object writable by all": lambda entry: (entry / "kernel.o").chmod(0o666),
    "manifest writable by the group": lambda entry: (entry / "manifest.json").chmod(0o660),
    "folder writable by all": lambda entry: entry.chmod(0o777),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_or_foreign_entry_is_rebuilt(damage, caplog):
    entry = store()
    damage(entry)
    cache.stats.reset()
    key = cache.key_of(CONFIG)
    assert cache.fetch(key, lambda: FRESH) == FRESH, "the damaged entry was used"
    assert counts() == {"rejected": 1, "stored": 1}
    assert "is not used" in caplog.text and key.digest in caplog.text
    assert cache.fetch(key, must_not_build) == FRESH
    assert [path.name for path in cache.directory().iterdir() if path.name.startswith(f"{key.digest}.")] == [
        f"{key.digest}.lock"
    ]


@pytest.mark.parametrize("owner", [54321, 1000, 0])
def test_whose_entry_is_used(monkeypatch, owner):
    store()
    real = os.fstat

    def fstat(descriptor):
        status = real(descriptor)
        return os.stat_result((*status[:4], owner, *status[5:]))

    monkeypatch.setattr(cache.os, "fstat", fstat)
    monkeypatch.setattr(cache.os, "geteuid", lambda: 1000)
    key = cache.key_of(CONFIG)
    if owner == 54321:
        with pytest.raises(files.RejectedError, match="the folder belongs to user 54321"):
            cache._read(key)
    else:
        assert cache._read(key) == GOOD


def test_a_file_swapped_after_it_was_checked_is_not_seen(monkeypatch):
    entry = store()
    real = files.read

    def read_then_swap(descriptor, name):
        content = real(descriptor, name)
        (entry / name).write_bytes(b"swapped")
        return content

    monkeypatch.setattr(files, "read", read_then_swap)
    assert cache.fetch(cache.key_of(CONFIG), must_not_build) == GOOD


def test_an_open_umask_does_not_open_the_entry():
    before = os.umask(0)
    try:
        entry = store()
    finally:
        os.umask(before)
    assert entry.stat().st_mode & 0o077 == 0
    assert {path.stat().st_mode & 0o777 for path in entry.iterdir()} == {0o600}
    assert cache.fetch(cache.key_of(CONFIG), must_not_build) == GOOD


def test_leftovers_of_a_killed_writer_are_removed(folder):
    digest = cache.key_of(CONFIG).digest
    (folder / f"{digest}.x7d3").mkdir(parents=True)
    (folder / f"{digest}.x7d3" / "kernel.o").write_bytes(b"half")
    store()
    assert sorted(path.name for path in folder.iterdir()) == [digest, f"{digest}.lock"]


def test_clear(folder):
    assert cache.clear() == 0
    store()
    store(FRESH, ScaleConfig(SmArch.SM_80, 3.0))
    assert cache.clear() == 2
    assert {path.suffix for path in folder.iterdir()} == {".lock"}
    assert store(FRESH).is_dir()


def test_switched_off(monkeypatch, folder):
    monkeypatch.setenv("CUTE_FA_CACHE", "0")
    key = cache.key_of(CONFIG)
    assert [cache.fetch(key, lambda built=built: built) for built in (GOOD, FRESH)] == [GOOD, FRESH]
    assert not folder.exists()
    monkeypatch.setenv("CUTE_FA_CACHE", "yes")
    with pytest.raises(ArgumentError, match="CUTE_FA_CACHE='yes': must be 0"):
        cache.fetch(key, lambda: GOOD)


def test_the_default_place(monkeypatch, tmp_path):
    monkeypatch.delenv("CUTE_FA_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.directory() == tmp_path / "xdg" / "cute_fa" / "kernels"


def test_no_place_to_write_warns_once_and_goes_on(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("CUTE_FA_CACHE_DIR", str(tmp_path / "file" / "cache"))
    key = cache.key_of(CONFIG)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert [cache.fetch(key, lambda built=built: built) for built in (GOOD, FRESH)] == [GOOD, FRESH]
    assert [str(warning.message).startswith("compiled kernels are not cached in") for warning in caught] == [True]


def test_a_full_disk_warns_and_leaves_no_half_entry(folder):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    key = cache.key_of(CONFIG)
    with pytest.warns(RuntimeWarning, match="not cached"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(GOOD.object) - 1, hard))  # as a full disk: write() fails midway
        try:
            assert cache.fetch(key, lambda: GOOD) == GOOD
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in folder.iterdir()] == [f"{key.digest}.lock"]
    assert counts() == {}


def test_a_read_only_folder_still_serves(monkeypatch):
    store()

    def refuse(*_args, **_keywords):
        raise PermissionError("read-only")

    monkeypatch.setattr(filelock, "FileLock", refuse)
    monkeypatch.setattr(os, "mkdir", refuse)
    assert cache.fetch(cache.key_of(CONFIG), must_not_build) == GOOD


def test_a_holder_that_hangs_does_not_block_for_ever(monkeypatch, folder):
    monkeypatch.setattr(cache, "LOCK_TIMEOUT", 0.1)
    key = cache.key_of(CONFIG)
    folder.mkdir(parents=True)
    held = threading.Event()
    done = threading.Event()

    def hold():
        with filelock.FileLock(folder / f"{key.digest}.lock"):
            held.set()
            done.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    try:
        assert held.wait(5)
        started = time.monotonic()
        with pytest.warns(RuntimeWarning, match="not cached"):
            assert cache.fetch(key, lambda: FRESH) == FRESH
        assert 0.1 <= time.monotonic() - started < 5
    finally:
        done.set()
        thread.join()


def test_a_failed_build_leaves_the_next_one_free(folder):
    def fail():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        cache.fetch(cache.key_of(CONFIG), fail)
    assert store().is_dir()


# ---- keys ------------------------------------------------------------------------------------------------------------


def test_every_part_of_the_key_counts(monkeypatch):
    configs = CONFIG, ScaleConfig(SmArch.SM_86), ScaleConfig(SmArch.SM_80, 3.0)
    digests = {cache.key_of(config).digest for config in configs}
    assert len(digests) == 3
    for change in (
        lambda: monkeypatch.setattr(cache.importlib.metadata, "version", lambda name: f"{name} 99"),
        lambda: monkeypatch.setattr(keys.platform, "machine", lambda: "riscv"),
        lambda: monkeypatch.setenv("CUTE_DSL_LINEINFO", "1"),
        lambda: monkeypatch.setattr(keys, "FORMAT", 99),
    ):
        for cached in (cache.versions, keys._host):
            cached.cache_clear()
        change()
        digest = cache.key_of(CONFIG).digest
        assert digest not in digests
        digests.add(digest)
    monkeypatch.setenv("CUTE_DSL_KEEP", "ptx")
    monkeypatch.setenv("CUTE_DSL_LIBS", "elsewhere.so")
    assert cache.key_of(CONFIG).digest in digests
    monkeypatch.undo()
    for cached in (cache.versions, keys._host):
        cached.cache_clear()


def test_a_version_change_leaves_the_old_entry_alone(monkeypatch):
    store()
    cache.versions.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(cache.importlib.metadata, "version", lambda name: "99")
        assert cache.fetch(cache.key_of(CONFIG), lambda: FRESH) == FRESH
    cache.versions.cache_clear()
    assert cache.fetch(cache.key_of(CONFIG), must_not_build) == GOOD


PACKAGE = """
from dataclasses import dataclass
from cute_fa.engine.contract import KernelConfig

@dataclass(frozen=True)
class Config(KernelConfig):
    @property
    def compile_name(self): return "package"
    def build(self): raise AssertionError
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An arch folder: config in arch_folder/forward.py, a helper in arch_folder/parts/tile.py."""
    root = tmp_path / "arch_folder"
    (root / "parts").mkdir(parents=True)
    (root / "__init__.py").touch()
    (root / "forward.py").write_text(PACKAGE)
    (root / "parts" / "tile.py").write_text("M = 64")
    monkeypatch.syspath_prepend(tmp_path)
    yield root
    for name in [name for name in sys.modules if name.partition(".")[0] == "arch_folder"]:
        del sys.modules[name]
    keys._source_hash.cache_clear()


def test_what_kernels_are_made_from_is_in_the_key():
    """Every module of this package that device code or a kernel's folder imports."""
    root = Path(cute_fa.__file__).parents[1]
    covered = [root / "cute_fa" / place for place in keys.SHARED_SOURCES]
    for folder in ("cute_fa/device", "fa2_sm80", "fa3_sm90", "fa4_sm100"):
        for file in root.joinpath(folder).rglob("*.py"):
            if file.name == "entry.py":  # the host's part
                continue
            for module in re.findall(r"^from (cute_fa[\w.]*) import", file.read_text(), re.M):
                source = root.joinpath(*module.split("."))  # a folder, or a file without its suffix
                places = {source, source.with_suffix(".py"), *source.parents}
                assert not places.isdisjoint(covered), (file, module)


def test_a_source_change_anywhere_in_the_arch_folder_changes_the_key(package):
    config = importlib.import_module("arch_folder.forward").Config(SmArch.SM_80)
    before = cache.key_of(config)
    shared = Path(cute_fa.__file__).parent
    assert set(before.roots) == {package, *(shared / place for place in keys.SHARED_SOURCES)}
    (package / "parts" / "tile.py").write_text("M = 32")
    keys._source_hash.cache_clear()  # as in the next process
    edited = cache.key_of(config)
    assert edited.digest != before.digest
    assert {name for name in before.fields if before.fields[name] != edited.fields[name]} == {"sources"}
    (package / "parts" / "tile.py").write_text("M = 64")
    (package / "notes.txt").write_text("not code")
    keys._source_hash.cache_clear()
    assert cache.key_of(config).digest == before.digest


def test_code_edited_after_its_import_is_not_stored(package, folder, caplog):
    key = cache.key_of(importlib.import_module("arch_folder.forward").Config(SmArch.SM_80))
    (package / "parts" / "tile.py").write_text("M = 32")
    assert cache.fetch(key, lambda: GOOD) == GOOD
    assert "not stored: its sources have been edited" in caplog.text
    assert not (folder / key.digest).exists()


@dataclass(frozen=True)
class AnyConfig(ScaleConfig):
    value: object = None


def test_values_of_a_config():
    values = [None, True, 1, 1.0, "1", (1,), (1, (2,)), DType.FP16, DType.BF16, int, ScaleConfig(SmArch.SM_80)]
    digests = [cache.key_of(AnyConfig(SmArch.SM_80, value=value)).digest for value in values]
    assert len(set(digests)) == len(values)
    with pytest.raises(ArgumentError, match="in a kernel config: must be"):
        cache.key_of(AnyConfig(SmArch.SM_80, value=object()))


# ---- processes -------------------------------------------------------------------------------------------------------


def start(*arguments) -> subprocess.Popen:
    """A process of its own on this cache, in which the kernels' module has the same name as here."""
    path = os.pathsep.join([str(SCRIPT.parent), str(Path(cute_fa.__file__).parents[1])])
    code = "import cache_kernels; cache_kernels.main()"
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def finish(process: subprocess.Popen) -> dict:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0
    return json.loads(output.splitlines()[-1])


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 300
    while not path.exists():
        assert time.monotonic() < deadline, f"{path.name} never appeared"
        time.sleep(0.01)


def test_four_processes_compile_once(tmp_path, folder):
    gate = tmp_path / "gate"
    processes = [start("sm_80", 2.0, "--wait-for", gate, "--ready", tmp_path / f"ready{i}") for i in range(4)]
    for i in range(4):
        wait_for(tmp_path / f"ready{i}")
    gate.touch()
    results = [finish(process) for process in processes]
    assert sum(result["compiled"] for result in results) == sum(result["stored"] for result in results) == 1
    assert sum(result["loaded"] for result in results) == 3
    assert sum(result["rejected"] for result in results) == 0
    assert sorted(path.suffix for path in folder.iterdir()) == ["", ".lock"]


def test_a_killed_compiler_frees_the_waiting_process(tmp_path):
    stalled = start("sm_80", 2.0, "--stall", tmp_path / "stalled")
    try:
        wait_for(tmp_path / "stalled")
        waiting = start("sm_80", 2.0, "--ready", tmp_path / "waiting")
        wait_for(tmp_path / "waiting")
        with pytest.raises(subprocess.TimeoutExpired):
            waiting.wait(1.0)
    finally:
        stalled.send_signal(signal.SIGKILL)
        stalled.communicate()
    result = finish(waiting)
    assert (result["compiled"], result["stored"], result["loaded"]) == (1, 1, 0)


# ---- kernels ---------------------------------------------------------------------------------------------------------

TWO, THREE = ScaleConfig(SmArch.SM_80, 2.0), ScaleConfig(SmArch.SM_80, 3.0)
N = 200


def run(kernel: compiler.CompiledKernel, scale: float) -> torch.Tensor:
    b = torch.full((N + 3,), -1.0)
    kernel.launch((torch.arange(1.0, N + 1), b, scale, N))
    return b


def expected(factor: float) -> torch.Tensor:
    return torch.cat([torch.arange(1.0, N + 1) * factor, torch.full((3,), -1.0)])


@pytest.fixture
def next_process(monkeypatch):
    """Forget what is in memory, as a new process would; with ``compiles=False`` the DSL's compiler must not run."""
    from cutlass import cute

    def refuse(*_args, **_keywords):
        raise AssertionError("compiled again")

    def forget(compiles: bool):
        compiler._kernels.clear()
        cache.stats.reset()
        if not compiles:
            monkeypatch.setattr(type(cute.compile), "__call__", refuse)

    return forget


@pytest.mark.parametrize("arch", SmArch, ids=lambda arch: arch.value)
def test_the_target_is_the_config_s(arch, monkeypatch):
    from cutlass.cutlass_dsl import CuTeDSL

    dsl = CuTeDSL._get_dsl()
    before = dsl.envar._arch, dsl.compile_options
    seen = []
    build = ScaleConfig.build
    monkeypatch.setattr(ScaleConfig, "build", lambda self: seen.append(dsl.get_arch_enum().to_string()) or build(self))
    ptx, cubin = compiler.compile_artifacts(ScaleConfig(arch))
    assert re.findall(r"^\.target\s+(\S+)", ptx, re.MULTILINE) == [arch.value]
    assert cubin[:4] == b"\x7fELF"
    assert seen == [arch.value], "build() saw another target than the compile"
    assert (dsl.envar._arch, dsl.compile_options) == before
    assert list(Path.cwd().iterdir()) == [], "the compile left files in the working directory"
    assert compiler.compile_artifacts(ScaleConfig(arch)) == (ptx, cubin)
    assert counts() == {"compiled": 1, "stored": 1, "loaded": 1}


def test_kernels_of_one_mangled_name_do_not_mix(next_process):
    for source in ("compiled", "loaded"):
        with ptxsim.simulate("sm_80"):
            kernels = [compiler.compiled(config) for config in (TWO, THREE)]
            results = [run(kernel, scale) for scale in (1.0, 0.5) for kernel in kernels]
        assert counts() == ({"compiled": 2, "stored": 2} if source == "compiled" else {"loaded": 2})
        names = [re.findall(r"\.entry\s+(\w+)", kernel.ptx) for kernel in kernels]
        assert names[0] == names[1]
        for kernel, config in zip(kernels, (TWO, THREE), strict=True):
            assert f"__tvm_ffi_cute_fa_{cache.key_of(config).digest}\0".encode() in kernel.artifacts.object
        for result, factor in zip(results, (2.0, 3.0, 1.0, 1.5), strict=True):
            torch.testing.assert_close(result, expected(factor), rtol=0, atol=0)
        next_process(compiles=False)


@pytest.mark.parametrize("name", ["kernel.o", "kernel.ptx", "kernel.cubin"])
def test_a_tampered_kernel_never_runs(name, next_process):
    """The entry of THREE, put in the place of TWO's file by file, would run and give threefold values."""
    folders = [cache.directory() / cache.key_of(config).digest for config in (TWO, THREE)]
    with ptxsim.simulate("sm_80"):
        for config in (TWO, THREE):
            compiler.compiled(config)
        (folders[0] / name).write_bytes((folders[1] / name).read_bytes())
        next_process(compiles=True)
        result = run(compiler.compiled(TWO), 1.0)
    torch.testing.assert_close(result, expected(2.0), rtol=0, atol=0)
    assert counts() == {"rejected": 1, "compiled": 1, "stored": 1}


def test_a_kernel_belongs_to_the_world_that_loaded_it():
    real = compiler.compiled(TWO)
    assert compiler.compiled(TWO) is real
    with ptxsim.simulate("sm_80"):
        simulated = compiler.compiled(TWO)
        assert simulated is not real
        assert simulated.function is not real.function
        assert compiler.compiled(TWO) is simulated
        torch.testing.assert_close(run(simulated, 1.0), expected(2.0), rtol=0, atol=0)
        with pytest.raises(RuntimeError, match="scale_sm80 was loaded for real launches, not simulated ones"):
            run(real, 1.0)
    with pytest.raises(RuntimeError, match="scale_sm80 was loaded for simulated launches, not real ones"):
        run(simulated, 1.0)
    with ptxsim.simulate("sm_80"):
        assert compiler.compiled(TWO) is simulated
        torch.testing.assert_close(run(simulated, 2.0), expected(4.0), rtol=0, atol=0)
    assert compiler.compiled(TWO) is real
    assert counts() == {"compiled": 1, "stored": 1}


def test_without_a_disk_cache(monkeypatch, folder):
    monkeypatch.setenv("CUTE_FA_CACHE", "0")
    compiler.compiled(TWO)
    with ptxsim.simulate("sm_80"):
        torch.testing.assert_close(run(compiler.compiled(TWO), 1.0), expected(2.0), rtol=0, atol=0)
    assert counts() == {"compiled": 1}
    assert not folder.exists()


def test_threads_compile_once():
    kernels = []
    threads = [threading.Thread(target=lambda: kernels.append(compiler.compiled(TWO))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(kernels) == 4
    assert len(set(map(id, kernels))) == 1
    assert counts() == {"compiled": 1, "stored": 1}


def test_cpu_tensors_without_a_simulation_raise():
    kernel = compiler.compiled(TWO)
    with pytest.raises(NoDeviceError, match=r"scale_sm80 needs CUDA tensors: CPU tensors run inside cute_fa\.simulate"):
        run(kernel, 1.0)


class FakeCudaTensor(torch.Tensor):
    def get_device(self) -> int:
        return 1


def test_a_launch_is_made_on_the_device_of_its_tensors(monkeypatch):
    """The DSL itself does not look for a device inside the tuple of arguments."""
    trace = []

    class Device:
        def __init__(self, index):
            self.index = index

        def __enter__(self):
            trace.append(("enter", self.index))

        def __exit__(self, *_):
            trace.append("leave")

    monkeypatch.setattr(torch.cuda, "device", Device)
    kernel = compiler.CompiledKernel("kernel", GOOD, lambda args: trace.append(len(args)), simulated=False)
    tensor = torch.zeros(3).as_subclass(FakeCudaTensor)
    for args in ((tensor, 1), (None, (2.0, (tensor,)), 3)):
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        kernel.launch(args)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
        kernel.launch(args)
    assert trace == [("enter", 1), 2, "leave", 2, ("enter", 1), 3, "leave", 3]


@pytest.mark.gpu
def test_a_gpu_runs_compiled_and_loaded_kernels_on_the_current_stream(next_process):
    major, minor = torch.cuda.get_device_capability()
    config = ScaleConfig(SmArch(f"sm_{major}{minor}{'a' if major >= 9 else ''}"), 2.0)
    for found in ({"compiled": 1, "stored": 1}, {"loaded": 1}):
        kernel = compiler.compiled(config)
        a, b = torch.zeros(N, device="cuda"), torch.full((N + 3,), -1.0, device="cuda")
        values = torch.arange(1.0, N + 1, device="cuda")
        kernel.launch((a, b, 1.0, N))  # loads the module, which may wait for the whole device
        b.fill_(-1.0)
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            # The values arrive when the wait is over, and nothing blocks the host until then, as a copy from pageable
            # memory would: a kernel on any other stream, torch's waiting for none, runs at once and reads the zeros.
            torch.cuda._sleep(400_000_000)
            a.copy_(values)
            kernel.launch((a, b, 1.0, N))
            assert not stream.query()  # else the wait was over before the launch, and this showed nothing
        stream.synchronize()
        torch.testing.assert_close(b.cpu(), expected(2.0), rtol=0, atol=0)
        assert counts() == found
        next_process(compiles=False)


def test_a_cached_kernel_runs_simulated_in_a_fresh_process():
    compiler.compile_artifacts(TWO)
    result = finish(start("sm_80", 2.0, "--no-compiler", "--simulate", 200))
    assert result["values"] == [2.0 * i for i in range(200)]
    assert (result["compiled"], result["loaded"]) == (0, 1)
