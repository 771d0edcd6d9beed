"""The simulator's parts in C, built on first use by the machine's C compiler.

What is built is kept in the user's cache folder (a temporary one where that cannot be written) and named by a hash of
what went into it; a library that is there already needs no compiler.
"""

from __future__ import annotations

import atexit
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
import warnings
from functools import cache
from pathlib import Path

from ptxsim.errors import SimError


class CompilerMissing(SimError):
    """No C compiler to build the simulator's parts in C with."""


def cache_dir() -> Path:
    """Where libraries are kept: ``PTXSIM_CACHE_DIR``, or the user's cache folder."""
    if folder := os.environ.get("PTXSIM_CACHE_DIR"):
        return Path(folder)
    import platformdirs

    return Path(platformdirs.user_cache_dir("ptxsim"))


def compiled(source: Path, name: str, options: list[str], what: str, header: str = "") -> Path:
    """Path of the shared library ``name`` from a C source, built if it is not in the cache.

    ``options`` go to the compiler; ``header`` is text that is included first; ``what`` is how errors call the library.
    Raises CompilerMissing if it must be built and there is no C compiler, SimError if it cannot be built or kept.
    """
    identity = "\0".join([source.read_text(), header, *options])
    entry = Path(f"{source.stem}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}", name)
    library = cache_dir() / entry
    if not library.exists():
        try:
            _compile_once(library, source, options, what, header)
        except OSError as error:
            if os.environ.get("PTXSIM_CACHE_DIR"):
                raise SimError(f"no place to keep {what}: {error}; set PTXSIM_CACHE_DIR") from error
            library = _temporary_folder(str(error)) / entry
            _compile_once(library, source, options, what, header)
    return library


@cache
def _temporary_folder(reason: str) -> Path:
    """A folder for this process alone, in the place of a cache folder that cannot be written: a library that lay where
    all can write may be anyone's."""
    folder = Path(tempfile.mkdtemp(prefix="ptxsim-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    warnings.warn(
        f"the simulator's parts in C are built in {folder} for this process alone: {reason}; set PTXSIM_CACHE_DIR",
        RuntimeWarning,
        stacklevel=2,
    )
    return folder


def _compile_once(library: Path, source: Path, options: list[str], what: str, header: str) -> None:
    """Build ``library``, by one process at a time. Raises OSError where its folder cannot be written."""
    import filelock

    library.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(library.with_name("lock")):
        if not library.exists():
            _compile(library, source, options, what, header)


def _compile(library: Path, source: Path, options: list[str], what: str, header: str) -> None:
    """Build ``library``; it appears whole or not at all."""
    compiler = _compiler(what)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        included, result = Path(folder, "included.h"), Path(folder, "result.so")
        included.write_text(header)
        command = [*compiler, "-shared", "-fPIC", "-w", "-fvisibility=hidden", "-include", str(included)]
        command += ["-o", str(result), str(source), *options]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SimError(f"the C compiler could not build {what}: {' '.join(command)}\n{done.stderr}")
        os.replace(result, library)


def _compiler(what: str) -> list[str]:
    chosen = os.environ.get("CC")
    for command in [shlex.split(chosen)] if chosen else [["cc"], ["gcc"], ["clang"]]:
        if shutil.which(command[0]):
            return command
    raise CompilerMissing(
        f"the simulator builds {what} once and needs a C compiler for it: "
        + (f"$CC names {chosen!r}, which is not there" if chosen else "none of cc, gcc, clang is on the PATH")
        + "; install one (Debian, Ubuntu: gcc and libc6-dev) or set $CC"
    )
