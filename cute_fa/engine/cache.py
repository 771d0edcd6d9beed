"""The disk cache of compiled kernels: compiled once on a machine, by whichever process comes first.

On by default in ``~/.cache/cute_fa/kernels`` (platformdirs); ``CUTE_FA_CACHE_DIR`` replaces ``~/.cache/cute_fa`` and
``CUTE_FA_CACHE=0`` turns the cache off. Where ``~/.cache/cute_fa`` cannot be written, a folder of the user's in the
machine's temporary one takes its place, with a warning. One folder an entry, named by its key:

    kernel.o       the host code with the cubin in it, as the DSL exports it
    kernel.ptx     what the simulator runs in place of the cubin
    kernel.cubin   the cubin alone, by whose bytes the simulator finds the PTX
    manifest.json  the key in full and the SHA-256 of the three

An entry is executed only from bytes that :mod:`cute_fa.engine.files` has verified; anything else there is replaced by a
fresh compile.

Nothing here imports the DSL; :mod:`cute_fa.engine.compiler` does the compiling and loading.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import importlib.metadata
import json
import logging
import os
import shutil
import tempfile
import threading
import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import filelock
import platformdirs

from cute_fa.engine import files, flavour, keys
from cute_fa.engine.environment import switch
from cute_fa.engine.files import RejectedError
from cute_fa.engine.keys import Key

if TYPE_CHECKING:
    from collections.abc import Callable

    from cute_fa.engine.contract import KernelConfig

logger = logging.getLogger(__name__)

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
    """The cache key of a config: what the kernel is, and the tools and settings that it is compiled with."""
    key = keys.key_of(config, line_info)
    return Key({**key.fields, "versions": versions(), "settings": _settings()}, key.roots)


def fetch(key: Key, build: Callable[[], Artifacts]) -> Artifacts:
    """The entry of ``key``; if there is none, ``build()``, called once among all processes and then stored.

    Whatever goes wrong with the disk costs a warning (one a process) and the cache's help, never the kernel.
    """
    if not enabled():
        return build()
    try:
        found = _read(key)
    except RejectedError:
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
        except RejectedError as reason:
            stats.count("rejected")
            logger.warning("%s is not used: %s", directory() / key.digest, reason)
        if found is None:
            found = build()
            _write(key, found)
        return found
    finally:
        lock.release()


# ---- the key ---------------------------------------------------------------------------------------------------------


@cache
def versions() -> dict[str, str]:
    """Versions of what generates and runs the code. Of the DSL's flavours, which bring different ptxas, the active one
    counts; its libraries have the DSL's version."""
    versions = {"flavour": flavour.active() or "absent"}
    for name in ("nvidia-cutlass-dsl", "apache-tvm-ffi"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "absent"
    return versions


def _settings() -> dict[str, str]:
    prefix = "CUTE_DSL_"
    return {
        name: value
        for name, value in os.environ.items()
        if name.startswith(prefix) and not name.removeprefix(prefix).startswith(_NEUTRAL_SETTINGS)
    }


# ---- entries ---------------------------------------------------------------------------------------------------------


def _read(key: Key) -> Artifacts | None:
    """The verified content of an entry, None if there is none."""
    try:
        with files.opened(directory() / key.digest) as folder:
            manifest = files.parse_json(files.read(folder, _MANIFEST), {"key": dict, "files": dict})
            if manifest["key"] != key.fields:
                raise RejectedError("the manifest holds another key")
            contents = {name: files.read(folder, name) for name in (_OBJECT, _PTX, _CUBIN)}
            for name, content in contents.items():
                files.verify(name, content, manifest["files"].get(name))
    except FileNotFoundError:
        return None
    stats.count("loaded")
    return Artifacts(contents[_OBJECT], contents[_PTX].decode(), contents[_CUBIN])


def _write(key: Key, artifacts: Artifacts) -> None:
    """Store an entry: written beside its place, then renamed into it. The caller holds the lock."""
    target = directory() / key.digest
    contents = {_OBJECT: artifacts.object, _PTX: artifacts.ptx.encode(), _CUBIN: artifacts.cubin}
    manifest = {"key": key.fields, "files": {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()}}
    try:
        if not key.sources_as_imported():
            # The code in memory may be of either state, or older than both: the entry would lie about its origin.
            logger.warning("%s is not stored: its sources have been edited meanwhile", key.fields["name"])
            return
        for leftover in _listing(directory()):  # of writers that were killed
            if leftover.name.startswith(f"{key.digest}.") and leftover.suffix != ".lock":
                _remove(leftover)
        temporary = Path(tempfile.mkdtemp(prefix=f"{key.digest}.", dir=directory()))
        try:
            for name, data in {**contents, _MANIFEST: json.dumps(manifest, indent=1).encode()}.items():
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
