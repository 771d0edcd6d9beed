"""Bundles: kernels compiled elsewhere, which load through TVM-FFI without nvidia-cutlass-dsl, on any Python.

A bundle is a folder that ``python -m cute_fa bundle`` writes, alone or inside a wheel:

    manifest.json              versions, the least driver, and of each kernel its key, its files and their SHA-256;
                               and the SHA-256 of all that
    libcute_fa_runtime.so.1    host_runtime.c: what the kernels' host code asks of CUDA
    NAME.so, NAME.ptx.gz       a kernel: host code with the cubin in it, and what the simulator runs

Kernels are looked for by :func:`keys.key_of`: config, sources, target, ABI. Looked into are, in this order, the folders
given to :func:`use_bundles`, those of ``CUTE_FA_BUNDLES`` (separated by ``:``), and installed wheels (entry points of
the group ``cute_fa.bundles``, each a package that holds a bundle). A file is used only from bytes that were read once
and have the manifest's hash; in a folder that was named, only where nobody but this user or root can write. What a
wheel installs is trusted as its code is.

Nothing here imports the DSL.
"""

from __future__ import annotations

import ctypes
import gzip
import hashlib
import importlib.metadata
import importlib.util
import itertools
import json
import os
import threading
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cute_fa.engine import files
from cute_fa.engine.files import RejectedError
from cute_fa.engine.version import __version__
from cute_fa.semantics.errors import BundleError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cute_fa.engine.keys import Key

FORMAT = 1  # of the manifest and the files' names
MANIFEST = "manifest.json"
RUNTIME = "libcute_fa_runtime.so.1"
ENTRY_POINTS = "cute_fa.bundles"
VARIABLE = "CUTE_FA_BUNDLES"


def hash_of(manifest: dict[str, Any]) -> str:
    """SHA-256 of a manifest without its own field for it."""
    rest = {name: value for name, value in manifest.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


class Bundle:
    """A bundle, opened: ``folder``, and the entries of its manifest by their keys' digests. Raises BundleError for what
    is none, or one of another version."""

    def __init__(self, folder: str | os.PathLike, installed: bool = False):
        self.folder, self._installed = Path(folder).resolve(), installed
        manifest = self._manifest()
        self.least_driver: dict[str, int] = manifest["least_driver"]
        self.entries: dict[str, dict[str, Any]] = {entry["digest"]: entry for entry in manifest["kernels"]}
        self._runtime = manifest["runtime"]

    def _manifest(self) -> dict[str, Any]:
        try:
            manifest = files.parse_json(self._bytes(MANIFEST), {"format": int})
            if manifest["format"] == FORMAT:
                fields = {"cute_fa": str, "least_driver": dict, "kernels": list, "runtime": str, "sha256": str}
                manifest = files.parse_json(self._bytes(MANIFEST), fields)
                if manifest["sha256"] != hash_of(manifest):
                    raise RejectedError(f"{MANIFEST} has another hash than it says")
        except (RejectedError, FileNotFoundError, NotADirectoryError) as error:
            raise BundleError(f"{self.folder}: no bundle ({error})") from error
        if manifest["format"] != FORMAT or manifest["cute_fa"] != __version__:
            told = "is of format {format}" if manifest["format"] != FORMAT else "was made by cute-fa {cute_fa}"
            raise BundleError(
                f"{self.folder} {told.format(**manifest)}, this is cute-fa {__version__}, format {FORMAT}: make it anew"
            )
        return manifest

    def _bytes(self, name: str) -> bytes:
        with files.opened(self.folder, check_owner=not self._installed) as folder:
            return files.read(folder, name, check_owner=not self._installed)

    def read(self, name: str, digest: str) -> bytes:
        """A file of the bundle. Raises BundleError where it is not what the manifest says."""
        try:
            content = self._bytes(name)
            files.verify(name, content, digest)
        except (RejectedError, FileNotFoundError) as error:
            raise BundleError(f"{self.folder}: {error}; make the bundle anew") from error
        return content

    def runtime(self) -> bytes:
        """The bundle's copy of the host runtime."""
        return self.read(RUNTIME, self._runtime)


@dataclass(frozen=True, eq=False)
class BundledKernel:
    """A kernel of a bundle."""

    bundle: Bundle
    entry: dict[str, Any]

    @property
    def ptx(self) -> str:
        return gzip.decompress(self.bundle.read(self.entry["ptx"], self.entry["ptx_sha256"])).decode()

    @property
    def cubin(self) -> bytes:
        start, size = self.entry["cubin"]
        return self._library()[start : start + size]

    def _library(self) -> bytes:
        return self.bundle.read(self.entry["library"], self.entry["library_sha256"])

    def load(self, simulated: bool) -> Any:
        """The ``tvm_ffi.Function``, linked in this process to the host runtime. Each call links it anew: a copy belongs
        to one world. Raises BundleError where the driver is older than the kernel needs."""
        import tvm_ffi  # loads the library that kernels need beside the host runtime

        runtime = host_runtime(self.bundle)
        if not simulated:
            self._check_driver(runtime)
        library = _linked(self.entry["library"], self._library())
        address = ctypes.cast(library["__tvm_ffi_" + self.entry["function"]], ctypes.c_void_p).value
        return tvm_ffi.Function.__from_extern_c__(address, keep_alive_object=library)

    def _check_driver(self, runtime: ctypes.CDLL) -> None:
        present = runtime.host_runtime_driver_version(ctypes.byref(ctypes.c_char_p()))
        least = self.bundle.least_driver[self.entry["key"]["target"]]
        if 0 < present < least:
            raise BundleError(
                f"{self.entry['key']['name']} of {self.bundle.folder} needs a driver for CUDA {_version(least)}, this "
                f"one is for CUDA {_version(present)}: update it, or make the bundle with the DSL's libraries for an "
                "older CUDA"
            )


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


# ---- where bundles are looked for ------------------------------------------------------------------------------------

_given: tuple[Bundle, ...] = ()


def use_bundles(*folders: str | os.PathLike) -> None:
    """Look for kernels in these bundles first, then in those of ``CUTE_FA_BUNDLES`` and of installed wheels; replaces
    what was given before. Kernels that are loaded stay. Raises BundleError for what is no bundle of this version."""
    global _given
    _given = tuple(Bundle(folder) for folder in folders)


@cache
def _found() -> tuple[Bundle, ...]:
    """Bundles of the environment and of installed wheels, looked for once a process."""
    named = [Bundle(folder) for folder in os.environ.get(VARIABLE, "").split(os.pathsep) if folder]
    return *named, *_installed()


def _installed() -> Iterator[Bundle]:
    for point in importlib.metadata.entry_points(group=ENTRY_POINTS):
        spec = importlib.util.find_spec(point.value)
        if spec is None or spec.origin is None:
            raise BundleError(
                f"{point.name} of the entry points {ENTRY_POINTS!r} names {point.value}, which is no package"
            )
        yield Bundle(Path(spec.origin).parent, installed=True)


def find(key: Key) -> BundledKernel | None:
    """The first kernel of that key."""
    for bundle in (*_given, *_found()):
        if entry := bundle.entries.get(key.digest):
            return BundledKernel(bundle, entry)
    return None


def looked_into(key: Key) -> str:
    """Why no bundle has the kernel, in words."""
    bundles = (*_given, *_found())
    if not bundles:
        return f"no bundle is at hand (use_bundles, {VARIABLE}, an installed wheel)"
    reasons = []
    for bundle in bundles:
        same = [entry for entry in bundle.entries.values() if entry["key"]["config"] == key.fields["config"]]
        differing = {name for entry in same for name, value in entry["key"].items() if value != key.fields[name]}
        if not same:
            reasons.append(f"{bundle.folder} has it not")
        elif differing:
            reasons.append(f"{bundle.folder} has it with other {', '.join(sorted(differing))}")
        else:
            reasons.append(f"{bundle.folder} has it to run, and no more")
    return "; ".join(reasons)


# ---- linking ---------------------------------------------------------------------------------------------------------

_runtime: ctypes.CDLL | None = None
_loading = threading.Lock()


def host_runtime(bundle: Bundle) -> ctypes.CDLL:
    """The host runtime of this process: the first bundle's that asks. All of a version have the same."""
    global _runtime
    with _loading:
        if _runtime is None:
            _runtime = _linked(RUNTIME, bundle.runtime())
            _runtime.host_runtime_driver_version.argtypes = [ctypes.POINTER(ctypes.c_char_p)]
    return _runtime


_number = itertools.count()


def _linked(name: str, content: bytes) -> ctypes.CDLL:
    """Link a shared library from memory: these bytes were verified. Kernels find the host runtime by its soname."""
    file = os.memfd_create(name)
    try:
        with open(file, "wb", closefd=False) as stream:
            stream.write(content)
        # Each library under another spelling of its path: the linker knows libraries by the path they were opened with,
        # and would give back the one that had this descriptor before.
        turns, rest = divmod(next(_number), 64)
        path = "/proc/self/fd" + "/." * rest + "/" * (turns + 1) + str(file)
        return ctypes.CDLL(path, mode=os.RTLD_NOW | os.RTLD_LOCAL)
    finally:
        os.close(file)
