"""Recording which kernels a program launches, so that ``python -m cute_fa compile --keys FILE`` compiles exactly those
ahead of time: configs, since lengths and the number of SMs choose packing and splits.

A file of keys is text; a recorded kernel is a line of JSON: the config's class and its fields.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import threading
import typing
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cute_fa.engine import plan
from cute_fa.engine.contract import KernelConfig
from cute_fa.semantics.errors import ArgumentError

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def record_keys(file: str | os.PathLike) -> Iterator[None]:
    """Add to a file each kernel that calls inside launch, once; ``CUTE_FA_RECORD_KEYS=FILE`` records from the start of
    the program. What the file holds already stays, and is not added again.

    Raises ArgumentError where recordings nest, for a folder that does not exist, and for what is no file of text.
    """
    file = Path(file)
    if plan.recorder is not None:
        raise ArgumentError(f"record_keys({str(file)!r}): another recording is on")
    recorder = _recorder(file, f"record_keys({str(file)!r})")
    # Plans that are there already have been launched before: their kernels would be missed.
    known = dict(plan.PLANS)
    plan.PLANS.clear()
    plan.recorder = recorder
    try:
        yield
    finally:
        plan.recorder = None
        plan.PLANS.update(known)


def _record_from_the_start() -> None:
    file = os.environ.get("CUTE_FA_RECORD_KEYS")
    if file:
        plan.recorder = _recorder(Path(file), f"CUTE_FA_RECORD_KEYS={file!r}")


def _recorder(file: Path, asked: str) -> Recorder:
    """Raises ArgumentError, which begins with ``asked``, for a file that cannot be read or made."""
    if not file.absolute().parent.is_dir():
        raise ArgumentError(f"{asked}: {file.parent} is no folder")
    try:
        return Recorder(file)
    except (OSError, UnicodeDecodeError) as error:
        raise ArgumentError(f"{asked}: {error}") from error


class Recorder:
    """Writes configs to a file, each once."""

    def __init__(self, file: Path):
        self.file = file
        text = file.read_text() if file.exists() else ""
        self.written: set[str] = set(text.splitlines())
        self._lock = threading.Lock()
        self._before = "" if text.endswith("\n") or not text else "\n"  # ends a last line that has no end

    def __call__(self, config: KernelConfig) -> None:
        line = line_of(config)
        with self._lock:
            if line in self.written:
                return
            with self.file.open("a") as stream:  # one write of a line: other processes may add to the file
                stream.write(self._before + line + "\n")
            self._before = ""
            self.written.add(line)


def line_of(config: KernelConfig) -> str:
    """A config as a line of a file of keys."""
    return json.dumps({"config": f"{type(config).__module__}:{type(config).__qualname__}", **_plain(config)})


def config_of(line: str) -> KernelConfig:
    """The config of such a line. Raises ArgumentError for one that this version does not know."""
    try:
        fields = json.loads(line)
        module, _, name = fields.pop("config").partition(":")
        kind = getattr(importlib.import_module(module), name)
        if not issubclass(kind, KernelConfig):
            raise TypeError(f"{name} is no config")
        return _made(kind, fields)
    except (KeyError, ValueError, TypeError, AttributeError, ImportError) as error:
        raise ArgumentError(f"{line}: no config of this version ({error})") from error


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return value


def _made(kind: Any, value: Any) -> Any:
    """A value of a type from plain data."""
    kinds = [option for option in typing.get_args(kind) or (kind,) if option is not type(None)]
    if value is None or len(kinds) != 1:
        return value
    (kind,) = kinds
    if isinstance(kind, type) and issubclass(kind, Enum):
        return kind(value)
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        unknown = value.keys() - {field.name for field in dataclasses.fields(kind)}
        if unknown:
            raise TypeError(f"unknown fields: {', '.join(sorted(unknown))}")
        return kind(**{name: _made(hints[name], field) for name, field in value.items()})
    return value


_record_from_the_start()
