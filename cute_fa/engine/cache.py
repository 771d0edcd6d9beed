"""The disk cache of compiled kernels: compiled once on a machine, by whichever process comes first.

On by default in ``~/.cache/cute_fa/kernels`` (platformdirs); ``CUTE_FA_CACHE_DIR`` replaces ``~/.cache/cute_fa`` and
``CUTE_FA_CACHE=0`` turns the cache off. Where ``~/.cache/cute_fa`` cannot be written, a folder of the user's in the
machine's temporary one takes its place, with a warning. One folder an entry, named by its key:

    kernel.o       the host code with the cubin in it, as the DSL exports it
    kernel.ptx     what the simulator runs in place of the cubin
    kernel.cubin   the cubin alone, by whose bytes the simulator finds the PTX
    manifest.json  the key in full and the SHA-256 of the three

An entry is executed only from bytes that were read once, found to be what the manifest says, and lie in a folder that
nobody but this user or root can write. Anything else there is replaced by a fresh compile. The hashes find damage, not
forgery: who can write as this user can run code as this user anyway.

Nothing here imports the DSL; :mod:`cute_fa.engine.compiler` does the compiling and loading.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import importlib.metadata
import inspect
import json
import logging
import os
import platform
import shutil
import stat
import sys
import tempfile
import threading
import warnings
from dataclasses import dataclass
from enum import Enum
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import filelock
import platformdirs

from cute_fa.engine import flavour
from cute_fa.engine.contract import KernelConfig
from cute_fa.engine.environment import switch
from cute_fa.semantics.errors import ArgumentError

if TYPE_CHECKING:
    from collections.abc import Callable

logger = logging.getLogger(__name__)

# Raised whenever the meaning of an entry changes: its files, the compile options, how a kernel is called.
FORMAT = 1

# A holder of the lock that neither finishes nor dies (a stopped process) must not stop the others for ever: after
# this many seconds they compile for themselves. The slowest kernel takes about a tenth of it.
LOCK_TIMEOUT = 600.0

_OBJECT, _PTX, _CUBIN, _MANIFEST = "kernel.o", "kernel.ptx", "kernel.cubin", "manifest.json"

# Settings of the DSL that say where files go or what is printed. Every other one is taken to shape the code.
_NEUTRAL_SETTINGS = ("ARCH", "LIBS", "KEEP", "DUMP_DIR", "CACHE_DIR", "LOG_", "PRINT_", "JIT_", "NO_CACHE", "DISABLE_")


@dataclass(frozen=True)
class Artifacts:
    """What a compile yields and an entry holds."""

    object: bytes
    ptx: str
    cubin: bytes


@dataclass
class Stats:
    """Counts of this process, since it started or since :meth:`reset`."""

    compiled: int = 0  # kernels compiled
    loaded: int = 0  # entries read from disk
    stored: int = 0  # entries written
    rejected: int = 0  # entries found damaged or foreign, and therefore not used

    def __post_init__(self):
        self._lock = threading.Lock()

    def count(self, name: str) -> None:
        with self._lock:
            setattr(self, name, getattr(self, name) + 1)

    def reset(self) -> None:
        with self._lock:
            for field in dataclasses.fields(self):
                setattr(self, field.name, 0)


stats = Stats()


@dataclass(frozen=True)
class Key:
    """What an entry depends on: ``fields`` in words, ``digest`` (32 hex digits) as the name of its folder."""

    fields: dict[str, Any]
    digest: str
    roots: tuple[Path, ...]  # the files and folders behind fields["sources"]


def enabled() -> bool:
    """False if ``CUTE_FA_CACHE=0``; anything but 0, 1 or nothing raises ArgumentError."""
    return switch("CUTE_FA_CACHE", default=True)


def directory() -> Path:
    """The folder that holds the entries; it need not exist yet."""
    chosen = os.environ.get("CUTE_FA_CACHE_DIR")
    if not chosen and _temporary is not None:
        return _temporary
    base = chosen or platformdirs.user_cache_dir("cute_fa", appauthor=False)
    return Path(base).expanduser().absolute() / "kernels"


def _make_writable(folder: Path) -> None:
    """Make the folder; raises OSError where there is none that can be written."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))


_temporary: Path | None = None  # what takes the place of a default folder that cannot be written


def _use_temporary(error: OSError) -> bool:
    """Put a folder of this user's in the place of a default one that cannot be written; False if there is no other.
    Entries there are trusted no more than elsewhere: ``_read`` looks at their owner."""
    global _temporary
    if os.environ.get("CUTE_FA_CACHE_DIR") or _temporary is not None:
        return False
    unwritable = directory()
    _temporary = Path(tempfile.gettempdir(), f"cute_fa_{os.geteuid()}", "kernels").absolute()
    message = f"compiled kernels are kept in {_temporary}, since {unwritable} cannot be written: {error}"
    warnings.warn(f"{message}; set CUTE_FA_CACHE_DIR", RuntimeWarning, stacklevel=2)
    return True


def clear() -> int:
    """Remove all entries and return how many there were. Loaded kernels go on working.

    Lock files stay: a lock is on a file, and two processes must never hold it on two files of one name.
    """
    entries = [path for path in _listing(directory()) if path.suffix != ".lock"]
    for path in entries:
        _remove(path)
    return sum(1 for path in entries if not path.suffix)


def key_of(config: KernelConfig, line_info: bool = False) -> Key:
    """The cache key of a config: its fields, the sources that shape its code, the tools, the target, the host, and
    whether the PTX names lines of Python."""
    roots = _source_roots(type(config))
    fields = {
        "format": FORMAT,
        "name": config.compile_name,
        "config": _canonical(config),
        "sources": _source_hash(roots),
        "versions": _versions(),
        "target": config.arch.value,
        "python": sys.implementation.cache_tag,
        "host": _host(),
        "settings": _settings(),
        "line_info": line_info,
    }
    text = json.dumps(fields, sort_keys=True)
    return Key(fields, hashlib.sha256(text.encode()).hexdigest()[:32], roots)


def fetch(key: Key, build: Callable[[], Artifacts]) -> Artifacts:
    """The entry of ``key``; if there is none, ``build()``, called once among all processes and then stored.

    Whatever goes wrong with the disk costs a warning (one a process) and the cache's help, never the kernel.
    """
    if not enabled():
        return build()
    try:
        found = _read(key)
    except _RejectedError:
        found = None  # replaced under the lock below, unless another process has done so by then
    if found is not None:
        return found
    try:
        _make_writable(directory())
    except OSError as error:
        if _use_temporary(error):
            return fetch(key, build)
        _warn(error)
        return build()
    lock = filelock.FileLock(directory() / f"{key.digest}.lock", timeout=LOCK_TIMEOUT, poll_interval=0.02)
    try:
        lock.acquire()
    except (OSError, NotImplementedError) as error:  # Timeout is an OSError; NotImplementedError: no such locks here
        _warn(error)
        return build()
    try:
        try:
            found = _read(key)
        except _RejectedError as reason:
            stats.count("rejected")
            logger.warning("%s is not used: %s", directory() / key.digest, reason)
        if found is None:
            found = build()
            _write(key, found)
        return found
    finally:
        lock.release()


# ---- the key ---------------------------------------------------------------------------------------------------------


def _canonical(value: Any) -> Any:
    """JSON-able form of a config or a value in it, the same in every process."""
    if isinstance(value, Enum):
        return f"{type(value).__qualname__}.{value.name}"
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value.hex()
    if isinstance(value, (tuple, list)):
        return [_canonical(item) for item in value]
    if isinstance(value, type):
        return f"{value.__module__}.{value.__qualname__}"
    if dataclasses.is_dataclass(value):
        fields = {field.name: _canonical(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {"class": _canonical(type(value)), **fields}
    raise ArgumentError(
        f"{value!r} in a kernel config: must be None, a bool, number, string, enum, class, tuple or dataclass of these"
    )


# What device code of all kernels is made from, in this package.
SHARED_SOURCES = (
    "device",
    "engine/contract.py",
    *(f"semantics/{name}.py" for name in ("append_problem", "names", "options", "problem", "types", "visibility")),
)


def _source_roots(cls: type) -> tuple[Path, ...]:
    """Files and folders whose Python sources shape the code of a config class: those that all kernels share, and the
    top-level packages of the class and its bases (the file itself for a module outside a package)."""
    package = Path(__file__).parents[1]
    roots = {package / place for place in SHARED_SOURCES}
    for base in cls.__mro__:
        if base.__module__ != KernelConfig.__module__ and issubclass(base, KernelConfig):
            file = Path(inspect.getfile(base)).resolve()
            # "fa2_sm80.forward.entry" lies one folder below its top-level package's parent, "fa2_sm80.a.b" two.
            depth = base.__module__.count(".") + (file.name == "__init__.py")
            roots.add(file.parents[depth - 1] if depth else file)
    return tuple(sorted(roots))


@cache  # The code is imported once: a key must not follow later edits of its source.
def _source_hash(roots: tuple[Path, ...]) -> str:
    return _hash_sources(roots)


def _hash_sources(roots: tuple[Path, ...]) -> str:
    digest = hashlib.sha256()
    for root in roots:
        for path in sorted(root.rglob("*.py")) if root.is_dir() else [root]:
            content = path.read_bytes()
            digest.update(f"{path.relative_to(root.parent).as_posix()} {len(content)}\n".encode())
            digest.update(content)
    return digest.hexdigest()


@cache
def _versions() -> dict[str, str]:
    """Versions of what generates and runs the code. Of the DSL's flavours, which bring different ptxas, the active one
    counts; its libraries have the DSL's version."""
    versions = {"flavour": flavour.active() or "absent"}
    for name in ("nvidia-cutlass-dsl", "apache-tvm-ffi"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "absent"
    return versions


@cache
def _host() -> str:
    """The machine that host code is generated for: LLVM uses every vector extension of the CPU at hand (seen:
    AVX-512), and a home directory may be shared with a machine that has fewer."""
    features = platform.processor()
    try:
        with open("/proc/cpuinfo") as lines:  # one processor's are enough, there may be hundreds
            features = next((line.rstrip() for line in lines if line.startswith(("flags", "Features"))), features)
    except OSError:
        logger.debug("no /proc/cpuinfo: the processor's name stands for its features")
    return f"{platform.system()} {platform.machine()} {hashlib.sha256(features.encode()).hexdigest()[:16]}"


def _settings() -> dict[str, str]:
    prefix = "CUTE_DSL_"
    return {
        name: value
        for name, value in os.environ.items()
        if name.startswith(prefix) and not name.removeprefix(prefix).startswith(_NEUTRAL_SETTINGS)
    }


# ---- entries ---------------------------------------------------------------------------------------------------------


class _RejectedError(Exception):
    """An entry that must not be used; the text says why."""


def _read(key: Key) -> Artifacts | None:
    """The verified content of an entry, None if there is none. Each file is read once, through descriptors below the
    folder that was checked, so what was verified is what is returned whatever happens to the names meanwhile."""
    try:
        folder = os.open(directory() / key.digest, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _RejectedError(f"not a readable folder: {error.strerror}") from error
    try:
        _check_owner(folder, "the folder")
        manifest = _parse_manifest(_read_file(folder, _MANIFEST))
        if manifest["key"] != key.fields:
            raise _RejectedError("the manifest holds another key")
        contents = {name: _read_file(folder, name) for name in (_OBJECT, _PTX, _CUBIN)}
        for name, content in contents.items():
            if hashlib.sha256(content).hexdigest() != manifest["files"].get(name):
                raise _RejectedError(f"the hash of {name} is not the manifest's")
    finally:
        os.close(folder)
    stats.count("loaded")
    return Artifacts(contents[_OBJECT], contents[_PTX].decode(), contents[_CUBIN])


def _read_file(folder: int, name: str) -> bytes:
    try:
        # Non-blocking: a pipe put in the file's place must not hang the reader.
        file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
        try:
            _check_owner(file, name)
            if not stat.S_ISREG(os.fstat(file).st_mode):
                raise _RejectedError(f"{name} is not a regular file")
            with open(file, "rb", closefd=False) as stream:
                return stream.read()
        finally:
            os.close(file)
    except OSError as error:
        raise _RejectedError(f"{name}: {error.strerror}") from error


def _check_owner(descriptor: int, name: str) -> None:
    status = os.fstat(descriptor)
    if status.st_uid not in (os.geteuid(), 0):
        raise _RejectedError(f"{name} belongs to user {status.st_uid}")
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise _RejectedError(f"{name} can be written by others (mode {stat.S_IMODE(status.st_mode):o})")


def _parse_manifest(content: bytes) -> dict[str, Any]:
    try:
        manifest = json.loads(content)
        sound = isinstance(manifest["key"], dict) and isinstance(manifest["files"], dict)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise _RejectedError(f"{_MANIFEST} cannot be parsed: {error!r}") from error
    if not sound:
        raise _RejectedError(f"{_MANIFEST} is not that of an entry")
    return manifest


def _write(key: Key, artifacts: Artifacts) -> None:
    """Store an entry: written beside its place, then renamed into it. The caller holds the lock."""
    target = directory() / key.digest
    files = {_OBJECT: artifacts.object, _PTX: artifacts.ptx.encode(), _CUBIN: artifacts.cubin}
    manifest = {"key": key.fields, "files": {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}}
    try:
        if _hash_sources(key.roots) != key.fields["sources"]:
            # The code in memory may be of either state, or older than both: the entry would lie about its origin.
            logger.warning("%s is not stored: its sources have been edited meanwhile", key.fields["name"])
            return
        for leftover in _listing(directory()):  # of writers that were killed
            if leftover.name.startswith(f"{key.digest}.") and leftover.suffix != ".lock":
                _remove(leftover)
        temporary = Path(tempfile.mkdtemp(prefix=f"{key.digest}.", dir=directory()))
        try:
            for name, data in {**files, _MANIFEST: json.dumps(manifest, indent=1).encode()}.items():
                # The mode is explicit, since an open umask would make an entry that _read rejects.
                with open(os.open(temporary / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as stream:
                    stream.write(data)
            if os.path.lexists(target):
                os.rename(target, f"{temporary}.old")
            os.rename(temporary, target)
        finally:
            _remove(temporary)
            _remove(Path(f"{temporary}.old"))
    except OSError as error:
        _warn(error)
    else:
        stats.count("stored")


def _listing(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except FileNotFoundError:
        return []


def _remove(path: Path) -> None:
    """Remove a file, link or folder as far as possible; what resists is left, since it is never trusted."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            logger.debug("%s stays: %s", path, error)


_warned = False


def _warn(error: Exception) -> None:
    """Say once a process that the cache is of no help; every later call would say the same."""
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(f"compiled kernels are not cached in {directory()}: {error}", RuntimeWarning, stacklevel=2)
