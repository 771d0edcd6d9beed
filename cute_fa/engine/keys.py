"""What a compiled kernel is: its config, the sources that shape its code, the architecture and processor it is for.

By this :mod:`cute_fa.engine.bundles` finds kernels that were compiled elsewhere, whatever compiled them;
:mod:`cute_fa.engine.cache` adds the tools.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import logging
import platform
from dataclasses import dataclass
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any

from cute_fa.engine.contract import KernelConfig
from cute_fa.semantics.errors import ArgumentError

logger = logging.getLogger(__name__)

# Raised whenever a compiled kernel means something else: the compile options, how it is called, what host code needs.
FORMAT = 2

# What host code is compiled for on x86-64: the level that every server of the last fifteen years has (System V ABI,
# x86-64 microarchitecture levels), and its features in LLVM's words.
HOST_CPU = "x86-64-v2"
HOST_FEATURES = ("+cx16", "+popcnt", "+sahf", "+sse3", "+sse4.1", "+sse4.2", "+ssse3")


@dataclass(frozen=True)
class Key:
    """What a compiled kernel depends on: ``fields`` in words, ``digest`` (32 hex digits) of them."""

    fields: dict[str, Any]
    roots: tuple[Path, ...]  # the files and folders behind fields["sources"]
    digest: str = dataclasses.field(init=False)

    def __post_init__(self):
        object.__setattr__(self, "digest", digest_of(self.fields))

    def sources_as_imported(self) -> bool:
        """False if the sources have been edited since they were hashed."""
        return _hash_sources(self.roots) == self.fields["sources"]


def digest_of(fields: dict[str, Any]) -> str:
    """32 hex digits of a key's fields."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:32]


def key_of(config: KernelConfig, line_info: bool = False) -> Key:
    """The key of a config: its fields, the sources that shape its code, the target, the host, and whether its PTX names
    lines of Python."""
    roots = _source_roots(type(config))
    fields = {
        "format": FORMAT,
        "name": config.compile_name,
        "config": _canonical(config),
        "sources": _source_hash(roots),
        "target": config.arch.value,
        "host": _host(),
        "line_info": line_info,
    }
    return Key(fields, roots)


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
    *(
        f"semantics/{name}.py"
        for name in ("append_problem", "names", "options", "problem", "types", "visibility", "walk_layout")
    ),
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
def _host() -> str:
    """The machine that host code is compiled for. Elsewhere than on x86-64 that is the machine at hand, with all
    extensions of its processor."""
    if platform.machine() == "x86_64":
        return f"{platform.system()} {HOST_CPU}"
    features = platform.processor()
    try:
        with open("/proc/cpuinfo") as lines:  # one processor's are enough, there may be hundreds
            features = next((line.rstrip() for line in lines if line.startswith(("flags", "Features"))), features)
    except OSError:
        logger.debug("no /proc/cpuinfo: the processor's name stands for its features")
    return f"{platform.system()} {platform.machine()} {hashlib.sha256(features.encode()).hexdigest()[:16]}"
