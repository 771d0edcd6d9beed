"""Bundles: compiled kernels that run without the DSL, what they are made of, and what is refused."""

from __future__ import annotations

import base64
import dataclasses
import gzip
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from click.testing import CliRunner

import cute_fa
from cute_fa.engine import bundles, cache, compiler, keys
from cute_fa.engine.bundles import Bundle, BundledKernel
from cute_fa.engine.cache import Artifacts
from cute_fa.engine.version import __version__
from cute_fa.semantics.errors import ArgumentError, BundleError, CompilerMissingError
from cute_fa.semantics.types import SmArch
from cute_fa.tools import cli
from cute_fa.tools.bundle import RUNTIME_FUNCTIONS, WHEEL_TAG, write_bundle
from cute_fa.tools.cli import main
from tests.testing.bundled import Processes, edited, replace_file, result

sys.path.append(str(Path(__file__).parent))  # by this name, as the programs below import it
from cache_kernels import ScaleConfig

WHEEL = f"scale_kernels-1.0-{WHEEL_TAG}.whl"
DOUBLE, TRIPLE, NOWHERE = (ScaleConfig(SmArch.SM_80, factor) for factor in (2.0, 3.0, 5.0))

# A sample of the public functions, each compared with the reference by `python -m cute_fa run`.
PROBLEMS = """
--arch sm_80 --head-dim 64 --causal --heads 4 --heads-kv 2 --seqlen-q 100 --inputs peaked
--arch sm_80 --head-dim 64 --causal --heads 4 --heads-kv 2 --seqlen-q 70 --backward
--arch sm_80 --head-dim 64 --varlen --batch 3 --seqlen-q 90 --window 20 0 --sink 2 --inputs peaked
--arch sm_80 --head-dim 128 --batch 2 --seqlen-q 1 --seqlen-k 200 --page-size 16 --num-splits 3 --heads 8 --heads-kv 2
--arch sm_80 --head-dim 64 --seqlen-q 3 --seqlen-k 200 --heads 4 --heads-kv 2 --dtype e4m3 --seqlen-k-per-split 64
--arch sm_80 --head-dim 64 --append --page-size 16 --seqlen-q 5 --seqlen-k 40 --rotary-dim 32
--arch sm_80 --head-dim 64 --ranges 9 --seqlen-q 100 --seqlen-k 150 --heads 2 --inputs peaked
--arch sm_80 --head-dim 64 --ranges 9 --seqlen-q 70 --seqlen-k 90 --heads 2 --backward
--arch sm_90a --head-dim 128 --causal --seqlen-q 150 --heads 2 --inputs peaked
--arch sm_90a --head-dim 64 --varlen --batch 2 --seqlen-q 130 --softcap 20 --heads 2
--arch sm_90a --head-dim 128 --ranges 9 --seqlen-q 150 --heads 2 --inputs peaked
--arch sm_90a --head-dim 64 --causal --seqlen-q 9 --seqlen-k 200 --heads 2 --page-size 16 --seqlen-k-per-split 64
--arch sm_90a --head-dim 128 --append --page-size 16 --seqlen-q 3 --seqlen-k 33
--arch sm_100a --head-dim 64 --causal --seqlen-q 150 --heads 2 --inputs peaked
""".strip().splitlines()
# What makes walks for those under a range plan: FA2's forward and backward, FA3's forward.
WALKS = ["ranges_sm80_rows128_columns64", "ranges_sm80_rows128_columns32", "ranges_sm90a_rows128_columns128"]


@pytest.fixture(scope="module")
def processes(tmp_path_factory) -> Processes:
    return Processes(tmp_path_factory.mktemp("packages"))


class Small(NamedTuple):
    """A bundle of two kernels, as a folder and as a wheel, and what the cache had of them."""

    folder: Path
    wheel: Path
    artifacts: Artifacts


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Small:
    place = tmp_path_factory.mktemp("small")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUTE_FA_CACHE_DIR", str(place / "cache"))
        patch.setattr(compiler, "_kernels", {})
        for out in (place / "bundle", place / WHEEL):
            assert [kernel.name for kernel in write_bundle([DOUBLE, TRIPLE], out)] == ["scale_sm80"] * 2
        return Small(place / "bundle", place / WHEEL, compiler.exported(DOUBLE))


@pytest.fixture(scope="module")
def real(tmp_path_factory) -> Path:
    """A bundle of the kernels of PROBLEMS, made by the command."""
    place = tmp_path_factory.mktemp("real")
    place.joinpath("keys.txt").write_text("\n".join(re.sub(" --inputs peaked", "", line) for line in PROBLEMS))
    place.joinpath("bundle").mkdir()  # an empty bundle, which is replaced
    place.joinpath("bundle", bundles.MANIFEST).touch()
    done = CliRunner().invoke(main, ["bundle", "--keys", f"{place}/keys.txt", "--out", f"{place}/bundle", "--json"])
    assert done.exit_code == 0, done.output
    told, folder = json.loads(done.stdout), place / "bundle"
    names = [kernel["name"] for kernel in told["kernels"]]
    assert len(names) == len(PROBLEMS) + len(WALKS)
    assert [name for name in names if name.startswith("ranges_")] == WALKS
    assert told["linked_bytes"] == sum(file.stat().st_size for file in folder.glob("*.so"))
    assert told["ptx_bytes"] == sum(file.stat().st_size for file in folder.glob("*.ptx.gz"))
    return folder


@pytest.fixture(autouse=True)
def _nothing_known(tmp_path, monkeypatch):
    """An empty cache, no kernels loaded, no bundles named."""
    monkeypatch.setenv("CUTE_FA_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("CUTE_FA_CACHE", raising=False)
    monkeypatch.delenv(bundles.VARIABLE, raising=False)
    monkeypatch.setattr(compiler, "_kernels", {})
    monkeypatch.setattr(bundles, "_given", ())
    bundles._found.cache_clear()
    cache.stats.reset()
    yield
    bundles._found.cache_clear()


def scaled(kernel: compiler.CompiledKernel, n: int = 300) -> torch.Tensor:
    """What the kernel makes of 0 … n − 1, and of a scale of 0.5."""
    out = torch.full((n,), torch.nan)
    kernel.launch((torch.arange(float(n)), out, 0.5, n))
    return out


# ---- what is in a library --------------------------------------------------------------------------------------------

_EXTENSIONS = set("andn bextr blsi blsmsk blsr bzhi mulx pdep pext rorx sarx shlx shrx lzcnt movbe adcx adox".split())


def newer_instructions(library: Path) -> set[str]:
    """Instructions of a library that x86-64-v2 does not have: in VEX or EVEX encoding, or of later extensions."""
    text = subprocess.run(["objdump", "-d", "--no-show-raw-insn", library], capture_output=True, text=True).stdout
    instructions = {match[1] for match in re.finditer(r"^ +[0-9a-f]+:\t([a-z]\S*)", text, re.MULTILINE)}
    assert {"mov", "ret", "call"} <= instructions
    return {name for name in instructions if name in _EXTENSIONS or (name[0] == "v" and name not in ("verr", "verw"))}


def test_host_code_is_for_every_x86_64_machine_of_the_last_years(real):
    for library in real.glob("*.so*"):
        assert newer_instructions(library) == set(), library.name


def readelf(option: str, library: Path) -> str:
    return subprocess.run(["readelf", option, "-W", library], capture_output=True, text=True, check=True).stdout


def test_libraries_need_no_more_than_glibc_2_28_and_the_runtime(real):
    libraries = sorted(real.glob("*.so*"))
    assert len(libraries) == len(PROBLEMS) + len(WALKS) + 1
    for library in libraries:
        needed = set(re.findall(r"\(NEEDED\).*\[(.*)\]", readelf("-d", library)))
        glibc = {tuple(map(int, v.split("."))) for v in re.findall(r"GLIBC_([\d.]+)", readelf("-V", library))}
        assert max(glibc, default=(2, 0)) <= (2, 28)
        assert re.search(r"GNU_STACK.* RW +0x", readelf("-l", library))  # newer glibc refuses an executable stack
        undefined = {line.split()[-1] for line in readelf("--dyn-syms", library).splitlines() if " UND " in line}
        if library.name == bundles.RUNTIME:
            assert needed == {"libc.so.6", "libdl.so.2"}
            assert f"[{bundles.RUNTIME}]" in readelf("-d", library)
        else:
            assert needed - {"libc.so.6"} == {"libtvm_ffi.so", bundles.RUNTIME}
            ours = {name for name in undefined if name.startswith("__wrap_")}
            assert {name.removeprefix("__wrap_") for name in ours} == {*RUNTIME_FUNCTIONS}
            assert {name for name in undefined - ours if not name.startswith("TVMFFI")} <= {"UND"}


def test_a_kernel_is_known_by_what_it_is_not_by_what_made_it(monkeypatch):
    """The key names no version of Python and none of the processor's extensions, in a bundle nor in the cache."""
    fields = keys.key_of(DOUBLE).fields
    assert set(fields) == {"format", "name", "config", "sources", "target", "host", "line_info"}
    assert fields["host"] == "Linux x86-64-v2" and fields["target"] == "sm_80"
    of_the_cache = cache.key_of(DOUBLE).fields
    assert {name: of_the_cache[name] for name in fields} == fields
    assert set(of_the_cache) - set(fields) == {"versions", "settings"}
    assert not any("python" in name for name in of_the_cache["versions"])


# ---- used ------------------------------------------------------------------------------------------------------------

# Runs lines of options through the command line, and the small kernels.
WITHOUT_DSL = """
import importlib.util, json, sys, torch
from click.testing import CliRunner
import cute_fa, cache_kernels
from cute_fa.engine import compiler
from cute_fa.semantics.errors import CompilerMissingError
from cute_fa.tools.cli import main
from cute_fa.semantics.types import SmArch

results = []
for line in json.loads(sys.argv[1]):
    done = CliRunner().invoke(main, ["run", *line.split(), "--race", "--json"])
    results.append(json.loads(done.stdout) if done.stdout else repr(done.exception))
values = []
for _ in range(2):
    with cute_fa.simulate("sm_80", race=True):
        out = torch.zeros(300)
        compiler.compiled(cache_kernels.ScaleConfig(SmArch.SM_80, 3.0)).launch((torch.arange(300.0), out, 0.5, 300))
        values.append(out.tolist())
with cute_fa.simulate("sm_80"):
    try:
        compiler.compiled(cache_kernels.ScaleConfig(SmArch.SM_80, 5.0))
    except CompilerMissingError as error:
        missing = str(error)
present = [name for name in ("cutlass", "nvidia_cutlass_dsl") if importlib.util.find_spec(name) or name in sys.modules]
print(json.dumps({"results": results, "values": values, "missing": missing, "present": present}))
"""


def test_a_sample_of_problems_runs_without_the_dsl(real, small, processes, tmp_path):
    """Simulated, under the race check, against the reference, in one process."""
    environment = {bundles.VARIABLE: f"{real}:{small.folder}", "CUTE_FA_CACHE_DIR": str(tmp_path / "none")}
    told = processes.run(WITHOUT_DSL, json.dumps(PROBLEMS), **environment)
    assert told["present"] == []
    for line, outcome in zip(PROBLEMS, told["results"], strict=True):
        assert outcome["ok"], (line, outcome)
        assert outcome["race"] and outcome["simulated"]
    names = {outcome["compile_name"] for outcome in told["results"]}
    assert names.union(WALKS) == {entry["key"]["name"] for entry in Bundle(real).entries.values()}
    assert told["values"] == [[1.5 * i for i in range(300)]] * 2
    assert f"scale_sm80: {real} has it not; {small.folder} has it not; and nvidia-cutlass-dsl" in told["missing"]
    assert not (tmp_path / "none").exists()


BESIDE_THE_DSL = """
import json, sys, torch
import cute_fa, cache_kernels
from cute_fa.engine import compiler
from cute_fa.semantics.types import SmArch

told = []
for factor in map(float, sys.argv[1:] * 2):
    with cute_fa.simulate("sm_80", race=True):
        kernel = compiler.compiled(cache_kernels.ScaleConfig(SmArch.SM_80, factor))
        out = torch.zeros(300)
        kernel.launch((torch.arange(300.0), out, 0.5, 300))
    told.append([type(kernel.artifacts).__name__, out.tolist()])
print(json.dumps(told))
"""


def test_bundled_and_compiled_kernels_run_in_one_process(small, processes):
    """In either order: the DSL's runtime library and the bundle's have functions of the same names."""
    environment = {bundles.VARIABLE: str(small.folder), "CUTE_FA_CACHE_DIR": os.environ["CUTE_FA_CACHE_DIR"]}
    orders = {order: processes.start(BESIDE_THE_DSL, *order, dsl=True, **environment) for order in ((2, 5), (5, 2))}
    for order, process in orders.items():
        kinds = {2: "BundledKernel", 5: "Artifacts"}
        expected = [[kinds[factor], [0.5 * factor * i for i in range(300)]] for factor in order]
        assert result(process) == expected * 2


# ---- where it is looked for ------------------------------------------------------------------------------------------


def origin(config=DOUBLE) -> Path | None:
    """The bundle that a simulated kernel is taken from, after its values have been looked at; None: no bundle."""
    with cute_fa.simulate("sm_80"):
        compiler._kernels.clear()
        kernel = compiler.compiled(config)
        assert scaled(kernel).equal(0.5 * config.factor * torch.arange(300.0))
    return kernel.artifacts.bundle.folder if isinstance(kernel.artifacts, BundledKernel) else None


def install(wheel: Path, target: Path) -> None:
    options = ["--no-deps", "--no-index", "--disable-pip-version-check", "--no-compile", "--target", target]
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", *options, wheel], check=True)


def test_bundles_are_looked_into_in_order(small, tmp_path, monkeypatch):
    """Those given, those of the environment, installed ones; then the cache, then the compiler."""
    places = [tmp_path / name for name in ("given", "first", "second", "wheel")]
    for place in places[:3]:
        shutil.copytree(small.folder, place)
    install(small.wheel, places[3])
    assert origin() is None and cache.stats.compiled == 1
    monkeypatch.syspath_prepend(places[3])
    assert origin() is None  # looked for once a process
    bundles._found.cache_clear()
    assert origin() == places[3] / "scale_kernels"
    bundles._found.cache_clear()
    monkeypatch.setenv(bundles.VARIABLE, f"{places[1]}:{places[2]}")
    assert origin() == places[1]
    cute_fa.use_bundles(places[2], places[0])
    assert origin() == places[2]
    cute_fa.use_bundles(places[0])
    assert origin() == places[0]
    cute_fa.use_bundles()
    assert origin() == places[1]
    assert origin(NOWHERE) is None
    # DOUBLE compiled, then from the cache; NOWHERE compiled
    assert dataclasses.asdict(cache.stats) == {"compiled": 2, "loaded": 1, "stored": 2, "rejected": 0}


def test_what_the_compiler_gives_is_never_a_bundles(small, tmp_path):
    """`compile`, `perf static` and new bundles have the compiler's PTX and cubin, whatever is loaded."""

    def change_ptx(manifest):
        for entry in manifest["kernels"]:
            ptx = gzip.decompress((small.folder / entry["ptx"]).read_bytes()) + b"\n// of the bundle\n"
            replace_file(tmp_path / "changed", entry, "ptx", gzip.compress(ptx))

    cute_fa.use_bundles(edited(small.folder, tmp_path / "changed", change_ptx))
    assert origin() == tmp_path / "changed"
    assert "// of the bundle" in next(iter(compiler._kernels.values())).ptx
    assert compiler.compile_artifacts(DOUBLE) == (small.artifacts.ptx, small.artifacts.cubin)
    assert compiler.exported(DOUBLE).ptx == small.artifacts.ptx
    assert cache.stats.compiled == 1


def test_the_command_line_takes_bundles(real, small, tmp_path):
    options = ["run", *PROBLEMS[0].split(), "--json"]
    for folder in (small.folder, real):
        options += ["--bundle", str(folder)]
    done = CliRunner().invoke(main, options)
    assert done.exit_code == 0, done.output
    (kernel,) = [k for k in compiler._kernels.values() if k.name == json.loads(done.stdout)["compile_name"]]
    assert kernel.artifacts.bundle.folder == real.resolve()
    done = CliRunner().invoke(main, ["run", "--bundle", str(tmp_path)])
    assert done.exit_code == 2 and f"BundleError: {tmp_path}: no bundle" in done.output


def test_line_information_is_not_a_bundles(small):
    cute_fa.use_bundles(small.folder)
    with cute_fa.simulate("sm_80", line_info=True):
        kernel = compiler.compiled(DOUBLE)
        assert scaled(kernel).equal(torch.arange(300.0))
    assert isinstance(kernel.artifacts, Artifacts) and "\t.loc\t" in kernel.ptx
    assert origin() == small.folder and ".loc" not in next(iter(compiler._kernels.values())).ptx


def test_a_wheel_is_installed_and_its_kernels_run(small, processes, tmp_path):
    target = tmp_path / "installed"
    install(small.wheel, target)
    (distribution,) = importlib.metadata.distributions(path=[str(target)])
    assert (distribution.name, distribution.version) == ("scale_kernels", "1.0")
    assert distribution.requires == [f"cute-fa=={__version__}"]
    files = {file.name: file for file in distribution.files if file.hash and "scale_kernels/" in str(file)}
    assert set(files) == {"__init__.py", *(file.name for file in small.folder.iterdir())}
    for file in files.values():
        digest = hashlib.sha256(file.locate().read_bytes()).digest()
        assert base64.urlsafe_b64encode(digest).rstrip(b"=").decode() == file.hash.value, file
    # As a careless administrator leaves it: what is installed is trusted, as all code there is.
    package = target / "scale_kernels"
    package.chmod(0o777)
    told = processes.run(WITHOUT_DSL, "[]", path=str(target))
    assert told["present"] == [] and told["values"] == [[1.5 * i for i in range(300)]] * 2
    assert f"{package} has it not" in told["missing"]


# ---- refused ---------------------------------------------------------------------------------------------------------


def flip(file: Path, at: int | None = None) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2 if at is None else at] ^= 1
    file.write_bytes(content)


def use(folder: Path) -> torch.Tensor:
    cute_fa.use_bundles(folder)
    with cute_fa.simulate("sm_80"):
        return scaled(compiler.compiled(DOUBLE))


@pytest.fixture
def copy(small, tmp_path) -> Path:
    return shutil.copytree(small.folder, tmp_path / "copy")


@pytest.mark.parametrize("kind", ["library", "ptx"])
def test_a_damaged_file_is_refused(copy, kind):
    file = copy / Bundle(copy).entries[keys.key_of(DOUBLE).digest][kind]
    flip(file)
    with pytest.raises(BundleError, match=f"{copy}: the hash of {file.name} is not the manifest's; make"):
        use(copy)
    file.unlink()
    with pytest.raises(BundleError, match=f"{copy}: {file.name}: No such file"):
        use(copy)


def test_a_damaged_runtime_is_refused(copy, monkeypatch):
    monkeypatch.setattr(bundles, "_runtime", None)
    flip(copy / bundles.RUNTIME)
    with pytest.raises(BundleError, match=f"the hash of {re.escape(bundles.RUNTIME)} is not the manifest's"):
        use(copy)


def test_a_manifest_damaged_anywhere_is_refused(copy):
    """But for white space, which means nothing there."""
    manifest = copy / bundles.MANIFEST
    sound = manifest.read_bytes()
    places = [i for i in range(0, len(sound), 13) if not sound[i : i + 1].isspace()]
    assert len(places) > 100
    for at in places:
        flip(manifest, at)
        with pytest.raises(BundleError, match=r"no bundle|of format"):
            Bundle(copy)
        manifest.write_bytes(sound)
    assert use(copy).equal(torch.arange(300.0))


def test_a_bundle_of_another_version_is_refused_by_name(small, tmp_path):
    old = edited(small.folder, tmp_path / "old", lambda manifest: manifest.update(cute_fa="0.0.9"))
    with pytest.raises(BundleError, match=f"{old} was made by cute-fa 0.0.9, this is cute-fa {__version__}, format 1"):
        use(old)
    strange = edited(small.folder, tmp_path / "strange", lambda manifest: manifest.update(format=99, kernels=[]))
    with pytest.raises(BundleError, match=f"{strange} is of format 99, this is cute-fa {__version__}, format 1"):
        use(strange)


def test_what_is_no_bundle_is_refused(tmp_path, monkeypatch):
    for folder in (tmp_path, tmp_path / "nowhere", Path(__file__)):
        with pytest.raises(BundleError, match=f"{folder}: no bundle"):
            cute_fa.use_bundles(folder)
    monkeypatch.setenv(bundles.VARIABLE, str(tmp_path))
    with pytest.raises(BundleError, match=f"{tmp_path}: no bundle"):
        compiler.compiled(DOUBLE)


def test_what_others_can_write_is_refused(copy):
    library = copy / Bundle(copy).entries[keys.key_of(DOUBLE).digest]["library"]
    library.chmod(0o666)
    with pytest.raises(BundleError, match=f"{copy}: {library.name} can be written by others \\(mode 666\\)"):
        use(copy)
    library.chmod(0o644)
    copy.chmod(0o775)
    with pytest.raises(BundleError, match=f"{copy}: no bundle \\(the folder can be written by others"):
        use(copy)
    assert Bundle(copy, installed=True).entries.keys() >= {keys.key_of(DOUBLE).digest}
    copy.chmod(0o755)
    assert use(copy).equal(torch.arange(300.0))


def test_a_kernel_of_other_sources_is_not_used(small, tmp_path):
    def edit(manifest):
        for entry in manifest["kernels"]:
            entry["key"]["sources"] = "0" * 64

    edited(small.folder, tmp_path / "other", edit)
    cute_fa.use_bundles(tmp_path / "other")
    assert origin() is None
    assert bundles.looked_into(keys.key_of(DOUBLE)) == f"{tmp_path / 'other'} has it with other sources"


def test_without_the_compiler_all_places_are_named(small, tmp_path, monkeypatch):
    def edit(manifest):
        for entry in manifest["kernels"]:
            entry["key"]["config"]["factor"] = (5.0).hex()
            entry["key"]["sources"] = "0" * 64

    monkeypatch.setattr(compiler, "dsl_installed", lambda: False)
    with pytest.raises(CompilerMissingError) as nothing:
        compiler.compiled(NOWHERE)
    assert str(nothing.value) == (
        "scale_sm80: no bundle is at hand (use_bundles, CUTE_FA_BUNDLES, an installed wheel); and nvidia-cutlass-dsl, "
        "which compiles kernels and loads them from the disk cache, is not installed. Install it, or bundle the kernel"
        ": python -m cute_fa bundle"
    )
    install(small.wheel, tmp_path / "wheel")
    monkeypatch.syspath_prepend(tmp_path / "wheel")
    monkeypatch.setenv(bundles.VARIABLE, str(edited(small.folder, tmp_path / "other", edit)))
    bundles._found.cache_clear()
    cute_fa.use_bundles(small.folder)
    with pytest.raises(CompilerMissingError) as missing:
        compiler.compiled(NOWHERE)
    assert str(missing.value).startswith(
        f"scale_sm80: {small.folder} has it not; {tmp_path}/other has it with other sources; "
        f"{tmp_path}/wheel/scale_kernels has it not; and nvidia-cutlass-dsl"
    )
    with pytest.raises(CompilerMissingError, match=f"scale_sm80: {small.folder} has it to run, and no more; "):
        compiler.compile_artifacts(DOUBLE)


# ---- made ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["kernels.whl", f"my-kernels-1.0-{WHEEL_TAG}.whl", f"cute_fa-1.0-{WHEEL_TAG}.whl", "k-1.0-py3-none-any.whl"]
)
def test_names_of_wheels(tmp_path, name):
    with pytest.raises(ArgumentError, match=r"a wheel's name is NAME-VERSION-py3-none-manylinux_2_28_x86_64\.whl"):
        list(write_bundle([DOUBLE], tmp_path / name))
    assert not list(tmp_path.glob("*.whl")) and cache.stats.compiled == 0


def test_what_is_there_and_is_no_bundle_stays(tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years")
    for out in (mine, mine / "thesis.txt"):
        done = CliRunner().invoke(main, ["bundle", "--keys", __file__, "--out", str(out)])
        assert done.exit_code == 2 and f"--out {out}: is there already and is no bundle" in done.output
    assert (mine / "thesis.txt").read_text() == "years"


def test_a_bundle_is_made_whatever_the_umask(tmp_path):
    before = os.umask(0)
    try:
        list(write_bundle([DOUBLE], tmp_path / "bundle"))
    finally:
        os.umask(before)
    assert use(tmp_path / "bundle").equal(torch.arange(300.0))


def test_a_bundle_is_made_and_used_wherever_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    list(write_bundle([DOUBLE], Path("a, b:c", "bundle")))
    assert use(Path("a, b:c", "bundle")).equal(torch.arange(300.0))


def test_the_command_says_what_the_linker_said(tmp_path, monkeypatch):
    (tmp_path / "keys.txt").write_text("--head-dim 64")
    (tmp_path / "cc").write_text("#!/bin/sh\necho no room >&2; exit 1\n")
    (tmp_path / "cc").chmod(0o755)
    monkeypatch.setenv("CC", str(tmp_path / "cc"))
    monkeypatch.setattr(cli, "_compile_all", lambda configs, jobs: [])
    done = CliRunner().invoke(main, ["bundle", "--keys", str(tmp_path / "keys.txt"), "--out", str(tmp_path / "bundle")])
    assert done.exit_code == 2 and "no room" in done.stderr and "cannot write" not in done.stderr, done.stderr


class Broken(ScaleConfig):
    def build(self):
        raise RuntimeError("this kernel does not compile")


@pytest.mark.parametrize("out", ["bundle", WHEEL])
def test_a_failure_leaves_what_was_there(tmp_path, monkeypatch, out):
    list(write_bundle([DOUBLE], tmp_path / out))

    def state():
        files = [path for path in tmp_path.rglob("*") if path.is_file() and "cache" not in path.parts]
        return {path: path.read_bytes() for path in files}, {path.name for path in tmp_path.iterdir()}

    before = state()
    with pytest.raises(RuntimeError, match="this kernel does not compile"):
        list(write_bundle([TRIPLE, Broken(SmArch.SM_80)], tmp_path / out))
    assert state() == before
    monkeypatch.setenv("CC", "no-such-compiler -O2")
    with pytest.raises(BundleError, match="linked by a C compiler: 'no-such-compiler' is not there, install"):
        list(write_bundle([TRIPLE], tmp_path / out))
    monkeypatch.setenv("CC", "false")
    with pytest.raises(BundleError, match="cannot be linked: false -shared"):
        list(write_bundle([TRIPLE], tmp_path / out))
    assert state() == before


def test_a_bundle_says_what_it_needs(real, small):
    assert Bundle(real).least_driver == {"sm_80": 12000, "sm_90a": 12000, "sm_100a": 12080}
    manifest = json.loads((small.folder / bundles.MANIFEST).read_text())
    assert manifest["made_with"]["nvidia-cutlass-dsl"] == importlib.metadata.version("nvidia-cutlass-dsl")
    assert manifest["host"] == "linux x86-64-v2, glibc 2.28" and manifest["cute_fa"] == __version__
    kernel = BundledKernel(Bundle(small.folder), Bundle(small.folder).entries[keys.key_of(DOUBLE).digest])
    assert (kernel.ptx, kernel.cubin) == (small.artifacts.ptx, small.artifacts.cubin)
