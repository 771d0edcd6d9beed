"""Makes bundles (:mod:`cute_fa.engine.bundles`): objects from the compile cache or fresh ones, linked into shared
libraries by the machine's C compiler, with a manifest; as a folder or as a wheel.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import cute_fa
from cute_fa.engine import bundles, cache, keys
from cute_fa.engine.compiler import export_name, exported
from cute_fa.semantics.errors import ArgumentError, BundleError
from cute_fa.semantics.types import SmArch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cute_fa.engine.contract import KernelConfig

RUNTIME_SOURCE = Path(bundles.__file__).with_name("host_runtime.c")
WHEEL_TAG = "py3-none-manylinux_2_28_x86_64"
# What host code asks of the CUDA runtime: all that a kernel may leave undefined beside TVM-FFI's functions.
RUNTIME_FUNCTIONS = tuple(
    "_cudaLibraryLoadData _cudaLibraryGetKernel _cudaGetDevice _cudaDeviceGetAttribute _cuKernelGetAttribute "
    "_cudaKernelSetAttributeForDevice _cudaFuncSetAttribute _cudaLaunchKernelEx cuda_dialect_init_library_once "
    "cuda_dialect_unload_library_once CuteDSLRT_TVMFFISetRaisedCudaError".split()
)
# The first CUDA whose drivers run code for an architecture, as 1000·major + 10·minor (CUDA's release notes).
_FIRST_CUDA = {SmArch.SM_100A: 12080, SmArch.SM_103A: 12090, SmArch.SM_120A: 12080}


class Bundled(NamedTuple):
    """What was made of one kernel: bytes of its library and of its compressed PTX."""

    name: str
    linked_bytes: int
    ptx_bytes: int


def write_bundle(configs: list[KernelConfig], out: Path) -> Iterator[Bundled]:
    """Write a bundle of these kernels to a folder, or to a wheel if ``out`` ends in ``.whl``; gives each kernel as it
    is ready. A folder or wheel that is there is replaced, once all is written.

    Raises what :func:`check_out` does, BundleError where the kernels cannot be linked, and whatever a compile raises.
    """
    check_out(out)
    wheel = _wheel_name(out) if out.suffix == ".whl" else None
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".bundle-", dir=out.absolute().parent) as scratch:
        folder = Path(scratch, "bundle")
        folder.mkdir()
        yield from _write_folder(configs, folder, Path(scratch))
        if wheel:
            _write_wheel(folder, out, *wheel)
            return
        if out.exists():
            os.rename(out, Path(scratch, "replaced"))
        os.rename(folder, out)


def check_out(out: Path) -> None:
    """Raises ArgumentError for a name that is no wheel's, and where something is that is no bundle; BundleError where
    there is no C compiler."""
    _c_compiler()
    if out.suffix == ".whl":
        _wheel_name(out)
    elif out.exists() and not (out / bundles.MANIFEST).is_file():
        raise ArgumentError(f"--out {out}: is there already and is no bundle")


def _write_folder(configs: list[KernelConfig], folder: Path, scratch: Path) -> Iterator[Bundled]:
    runtime = _link_runtime(folder)
    entries, drivers = [], {}
    for config in configs:
        entry, artifacts = _link_kernel(config, folder, scratch)
        entries.append(entry)
        drivers[config.arch.value] = max(drivers.get(config.arch.value, 0), _least_driver(config.arch, artifacts.ptx))
        sizes = (folder.joinpath(entry[kind]).stat().st_size for kind in ("library", "ptx"))
        yield Bundled(config.compile_name, *sizes)
    manifest = {
        "format": bundles.FORMAT,
        "cute_fa": cute_fa.__version__,
        "made_with": cache.versions(),
        "host": f"linux {keys.HOST_CPU}, glibc 2.28",
        "least_driver": drivers,  # by target, 1000·major + 10·minor of the CUDA that it supports
        "runtime": runtime,
        "kernels": entries,
    }
    manifest["sha256"] = bundles.hash_of(manifest)
    folder.joinpath(bundles.MANIFEST).write_text(json.dumps(manifest, indent=1))
    folder.chmod(0o755)  # explicit, since an open umask would make a bundle that is refused
    for file in folder.iterdir():
        file.chmod(0o644)


def _least_driver(arch: SmArch, ptx: str) -> int:
    """Machine code runs with every driver of its CUDA's major version that knows the architecture ("CUDA minor version
    compatibility"). PTX ISA 8 is that of CUDA 12, 9 that of CUDA 13."""
    isa = int(re.search(r"^\.version (\d+)\.", ptx, re.MULTILINE)[1])
    return max(1000 * (isa + 4), _FIRST_CUDA.get(arch, 0))


# ---- linking ---------------------------------------------------------------------------------------------------------


def _link_runtime(folder: Path) -> str:
    """Build the host runtime; its SHA-256."""
    library = folder / bundles.RUNTIME
    # libdl by its file's name: from glibc 2.34 on there is none to link with, but an older one has dlopen there.
    options = ["-O2", "-fvisibility=hidden", f"-Wl,-soname,{bundles.RUNTIME}", "-Wl,--no-as-needed", "-l:libdl.so.2"]
    _run_compiler([str(RUNTIME_SOURCE), *options], library)
    return _sha256(library.read_bytes())


def _link_kernel(config: KernelConfig, folder: Path, scratch: Path) -> tuple[dict[str, Any], cache.Artifacts]:
    """Link one kernel into ``folder``: its entry of the manifest, and what it was made from."""
    import tvm_ffi.libinfo

    key, artifacts = keys.key_of(config), exported(config)
    name = f"{config.compile_name}-{key.digest[:8]}"
    function = export_name(config)
    library, ptx = folder / f"{name}.so", folder / f"{name}.ptx.gz"
    obj, symbols = scratch / "kernel.o", scratch / "symbols"
    obj.write_bytes(artifacts.object)
    symbols.write_text(f"{{ global: __tvm_ffi_{function}; local: *; }};")
    tvm = Path(tvm_ffi.libinfo.find_libtvm_ffi())
    _run_compiler(
        [
            # -Xlinker, since -Wl would take a comma in the path for the end of the option.
            *(str(obj), "-nostdlib", "-Xlinker", f"--version-script={symbols}", "-Wl,-z,defs,-z,now,--build-id=none"),
            *(f"-Wl,--wrap={symbol}" for symbol in RUNTIME_FUNCTIONS),
            *(str(folder / bundles.RUNTIME), f"-L{tvm.parent}", f"-l:{tvm.name}", "-lc"),
        ],
        library,
    )
    content = library.read_bytes()
    start = content.find(artifacts.cubin)
    if start < 0:
        raise BundleError(f"{config.compile_name}: its machine code is not found in the linked library")
    ptx.write_bytes(gzip.compress(artifacts.ptx.encode(), mtime=0))
    entry = {
        "digest": key.digest,
        "key": key.fields,
        "function": function,
        "library": library.name,
        "library_sha256": _sha256(content),
        "cubin": [start, len(artifacts.cubin)],
        "ptx": ptx.name,
        "ptx_sha256": _sha256(ptx.read_bytes()),
    }
    return entry, artifacts


def _c_compiler() -> list[str]:
    chosen = shlex.split(os.environ.get("CC", "")) or ["cc"]
    if shutil.which(chosen[0]) is None:
        raise BundleError(f"bundles are linked by a C compiler: {chosen[0]!r} is not there, install one or set $CC")
    return chosen


def _run_compiler(arguments: list[str], out: Path) -> None:
    command = [*_c_compiler(), "-shared", "-fPIC", "-o", str(out), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise BundleError(f"{out.name} cannot be linked: {shlex.join(command)}\n{done.stderr}")


# ---- the wheel -------------------------------------------------------------------------------------------------------


def _wheel_name(out: Path) -> tuple[str, str]:
    """Name and version of a wheel from its file's name (PEP 427)."""
    match = re.fullmatch(r"([a-z][a-z0-9_]*)-([0-9][0-9a-zA-Z.!+_]*)-" + re.escape(WHEEL_TAG) + r"\.whl", out.name)
    if not match or match[1] == "cute_fa":
        raise ArgumentError(
            f"--out {out}: a wheel's name is NAME-VERSION-{WHEEL_TAG}.whl; NAME becomes a package: small letters, "
            "digits and underscores, not cute_fa"
        )
    return match[1], match[2]


def _write_wheel(folder: Path, out: Path, name: str, version: str) -> None:
    """The bundle as a package ``NAME`` that an entry point names, for this version of cute-fa."""
    info = f"{name}-{version}.dist-info"
    texts = {
        f"{name}/__init__.py": '"""A bundle of compiled kernels of cute-fa."""\n',
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        f"Summary: Compiled kernels of cute-fa {cute_fa.__version__}\nRequires-Dist: cute-fa=={cute_fa.__version__}\n",
        f"{info}/WHEEL": f"Wheel-Version: 1.0\nGenerator: cute_fa\nRoot-Is-Purelib: false\nTag: {WHEEL_TAG}\n",
        f"{info}/entry_points.txt": f"[{bundles.ENTRY_POINTS}]\n{name} = {name}\n",
    }
    contents = {path: text.encode() for path, text in texts.items()}
    contents |= {f"{name}/{file.name}": file.read_bytes() for file in sorted(folder.iterdir())}
    record = [f"{path},sha256={_urlsafe(content)},{len(content)}" for path, content in contents.items()]
    contents[f"{info}/RECORD"] = "\n".join([*record, f"{info}/RECORD,,", ""]).encode()
    partial = folder / out.name
    with zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED) as archive:
        for path, content in contents.items():
            archive.writestr(path, content)
    os.replace(partial, out)


def _urlsafe(content: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
