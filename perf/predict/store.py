"""Recorded probes on disk, so that a problem is simulated once for all constants."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import logging
import os
import pickle
import tempfile
from collections.abc import Callable
from pathlib import Path

import cute_fa
from cute_fa.engine import flavour
from ptxsim.compiled import cache_dir
from ptxsim.timing.replay import TimedLaunch

logger = logging.getLogger(__name__)

_ROOT = Path(cute_fa.__file__).parents[1]
# What decides how a probe's warps run: our kernels, and the simulator with its recorder.
_SOURCES = ("cute_fa", "fa2_sm80", "fa3_sm90", "fa4_sm100", "ptxsim", "perf/predict/kernels.py")


@functools.cache
def _version() -> str:
    """Hash of everything that recordings depend on beside their problem."""
    digest = hashlib.sha256()
    for folder in _SOURCES:
        place = _ROOT / folder
        found = place.rglob("*.[cp]*") if place.is_dir() else [place]
        for file in sorted(file for file in found if file.suffix in (".c", ".py")):
            digest.update(file.read_bytes())
    for package in ("nvidia-cutlass-dsl", "flash-attn-4", "quack-kernels"):
        try:
            digest.update(importlib.metadata.version(package).encode())
        except importlib.metadata.PackageNotFoundError:
            digest.update(b"none")
    digest.update(flavour.active().encode())
    return digest.hexdigest()


def kept(identity: tuple, make: Callable[[], TimedLaunch]) -> TimedLaunch:
    """The launch of a probe: from the user's cache folder, or made and kept there. Entries are pickles that this user's
    processes wrote."""
    name = hashlib.sha256(repr((_version(), identity)).encode()).hexdigest()[:32]
    file = cache_dir() / "timing" / f"{name}.pickle"
    try:
        return pickle.loads(file.read_bytes())
    except FileNotFoundError:
        pass
    except Exception:  # a damaged pickle raises anything; it is made again
        logger.warning("%s is damaged and is made again", file)
    launch = make()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=file.parent, delete=False) as written:
            written.write(pickle.dumps(launch))
        os.replace(written.name, file)
    except OSError:
        pass  # a folder that cannot be written costs the time of a simulation, nothing else
    return launch
