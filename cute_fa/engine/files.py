"""Files that hold code: used only from bytes that were read once, have the hash they should, and lie where nobody but
this user or root can write. The hashes find damage, not forgery: who can write as this user can run code as this user
anyway.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


class RejectedError(Exception):
    """A file or folder that must not be used; the text says why."""


@contextmanager
def opened(folder: Path, check_owner: bool = True) -> Iterator[int]:
    """A descriptor of a folder: what is read below it is of this folder, whatever happens to the names meanwhile.
    Raises FileNotFoundError where there is none, RejectedError for another thing or one that others can write."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise RejectedError(f"not a readable folder: {error.strerror}") from error
    try:
        if check_owner:
            _check_owner(descriptor, "the folder")
        yield descriptor
    finally:
        os.close(descriptor)


def read(folder: int, name: str, check_owner: bool = True) -> bytes:
    """The content of a regular file of an opened folder. Raises RejectedError."""
    try:
        # Non-blocking: a pipe put in the file's place must not hang the reader.
        file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
        try:
            if check_owner:
                _check_owner(file, name)
            if not stat.S_ISREG(os.fstat(file).st_mode):
                raise RejectedError(f"{name} is not a regular file")
            with open(file, "rb", closefd=False) as stream:
                return stream.read()
        finally:
            os.close(file)
    except OSError as error:
        raise RejectedError(f"{name}: {error.strerror}") from error


def verify(name: str, content: bytes, digest: str | None) -> None:
    """Raises RejectedError unless ``digest`` is the content's SHA-256 in hex."""
    if hashlib.sha256(content).hexdigest() != digest:
        raise RejectedError(f"the hash of {name} is not the manifest's")


def parse_json(content: bytes, fields: dict[str, type]) -> dict[str, Any]:
    """A manifest that has at least these fields, of these types. Raises RejectedError."""
    try:
        manifest = json.loads(content)
        sound = all(isinstance(manifest[name], kind) for name, kind in fields.items())
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise RejectedError(f"manifest.json cannot be parsed: {error!r}") from error
    if not sound:
        raise RejectedError("manifest.json is not that of an entry")
    return manifest


def _check_owner(descriptor: int, name: str) -> None:
    status = os.fstat(descriptor)
    if status.st_uid not in (os.geteuid(), 0):
        raise RejectedError(f"{name} belongs to user {status.st_uid}")
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise RejectedError(f"{name} can be written by others (mode {stat.S_IMODE(status.st_mode):o})")
