"""Recorded probes on disk, so that a problem is simulated once for all constants, and what the command said of it, so
that it is said again without importing torch and the DSL."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import logging
import os
import pickle
import runpy
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptxsim.compiled import cache_dir

if TYPE_CHECKING:
    from ptxsim.timing.replay import TimedLaunch

logger = logging.getLogger(__name__)

_ROOT = Path(__file__).parents[2]
# What decides how a probe's warps run: our kernels, and the simulator with its recorder.
_SOURCES = ("cute_fa", "fa2_sm80", "fa3_sm90", "fa4_sm100", "ptxsim", "perf/predict/kernels.py")
# What an answer depends on besides.
_MODEL = ("perf/predict", "perf/workload.py", "perf/plans.py")
_PACKAGES = ("nvidia-cutlass-dsl", "nvidia-cuda-nvcc-cu12", "nvidia-cuda-nvcc", "flash-attn-4", "quack-kernels")


@functools.cache
def _version(*sources: str) -> str:
    """Hash of the sources, and of what else is installed that recordings depend on beside their problem. Nothing that
    is hashed is imported."""
    digest = hashlib.sha256()
    for folder in sources:
        place = _ROOT / folder
        found = place.rglob("*.[cp]*") if place.is_dir() else [place]
        for file in sorted(file for file in found if file.suffix in (".c", ".py")):
            digest.update(file.read_bytes())
    for package in _PACKAGES:
        try:
            digest.update(importlib.metadata.version(package).encode())
        except importlib.metadata.PackageNotFoundError:
            digest.update(b"none")
    # a module without imports of its own, whose package imports torch
    flavour = runpy.run_path(str(_ROOT / "cute_fa/engine/flavour.py"))["active"]()
    digest.update(str(flavour).encode())
    return digest.hexdigest()


def _file(name: str, version: str, identity: tuple) -> Path:
    return cache_dir() / "timing" / (hashlib.sha256(repr((version, identity)).encode()).hexdigest()[:32] + name)


def kept(identity: tuple, make: Callable[[], TimedLaunch]) -> TimedLaunch:
    """The launch of a probe: from the user's cache folder, or made and kept there. Entries are pickles that this user's
    processes wrote."""
    return _kept(_file(".pickle", _version(*_SOURCES), identity), pickle.loads, pickle.dumps, make)


def kept_rows(identity: tuple, make: Callable[[], list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Rows that the command prints, from the user's cache folder, or made and kept there, as JSON. ``identity``: all
    that they depend on but the sources and what is installed."""
    file = _file(".json", _version(*_SOURCES, *_MODEL), identity)
    return _kept(file, json.loads, lambda rows: json.dumps(rows).encode(), make)


def _kept(file: Path, load: Callable[[bytes], Any], dump: Callable[[Any], bytes], make: Callable[[], Any]) -> Any:
    try:
        return load(file.read_bytes())
    except FileNotFoundError:
        pass
    except Exception:  # a damaged entry raises anything; it is made again
        logger.warning("%s is damaged and is made again", file)
    value = make()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=file.parent, delete=False) as written:
            written.write(dump(value))
        os.replace(written.name, file)
    except OSError:
        pass  # a folder that cannot be written costs the time of a simulation, nothing else
    return value
