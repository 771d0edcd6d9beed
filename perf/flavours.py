"""The DSL's two flavours (:mod:`cute_fa.engine.flavour`) on one machine: which are there, and processes that run with
one of them, whichever this process has.

A flavour's libraries lie beside the DSL's other files, or, lest they become what the whole environment compiles with,
in a folder of their own, ``cu13`` in ``sys.prefix``, which :func:`install` fills. A process gets its flavour from a
folder that comes first on its path: symbolic links to the DSL's files, with the libraries of that flavour alone.
"""

from __future__ import annotations

import importlib.machinery
import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cute_fa.engine.flavour import LIBRARIES, active, driver_supports
from cute_fa.semantics.errors import CuteFaError

FLAVOURS = ("cu12", "cu13")

_DSL = "nvidia-cutlass-dsl"
_ROOT = Path("nvidia_cutlass_dsl")  # the package, and in it where `import cutlass` looks
_PACKAGES = _ROOT / "dsl_packages"
# Names the flavour for which a process was started.
_STARTED_FOR = "CUTE_FA_STARTED_FOR_FLAVOUR"


class FlavourMissing(CuteFaError):
    """A flavour that cannot be used here."""

    def __init__(self, flavour: str, reason: str):
        super().__init__(f"flavour {flavour}: {reason}")
        self.flavour = flavour


def states() -> dict[str, str]:
    """Each flavour with "active", "available", or why it cannot be used."""
    current = active()
    return {flavour: "active" if flavour == current else objection(flavour) or "available" for flavour in FLAVOURS}


def objection(flavour: str) -> str | None:
    """Why no process here can use the flavour, None if one can."""
    if not driver_supports(flavour):
        return "the CUDA driver of this machine does not support it"
    version = importlib.metadata.version(_DSL)
    if _place(flavour) is None:
        return f"its libraries {version} are not installed: `python -m perf flavours --install` fetches them (90 MB)"
    return None


def install() -> list[str]:
    """Fetch the libraries of each flavour that is not there and that the driver supports, in the installed DSL's
    version, into a folder of their own; gives the names."""
    missing = [flavour for flavour in FLAVOURS if driver_supports(flavour) and _place(flavour) is None]
    for flavour in missing:
        package = f"{_DSL}-libs-{flavour}=={importlib.metadata.version(_DSL)}"
        pip = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-deps", "--upgrade"]
        subprocess.run([*pip, "--target", str(_folder(flavour)), package], check=True)
    return missing


def run(flavour: str, arguments: Sequence[str], **options: Any) -> subprocess.CompletedProcess:
    """``python ARGUMENTS`` with that flavour; ``options`` are those of ``subprocess.run``. Raises FlavourMissing."""
    if reason := objection(flavour):
        raise FlavourMissing(flavour, reason)
    if os.environ.get(_STARTED_FOR) == flavour != active():
        raise FlavourMissing(flavour, f"a process started for it has {active()}: is another DSL first on the path?")
    with _view(flavour) as view:
        path = [str(view / _PACKAGES), str(view), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(path), _STARTED_FOR: flavour}
        return subprocess.run([sys.executable, *arguments], env=environment | options.pop("env", {}), **options)


def _folder(flavour: str) -> Path:
    return Path(sys.prefix, flavour)


def _site() -> Path:
    """The folder in which the environment's own DSL lies; not that of a view."""
    return Path(importlib.util.find_spec("cutlass").origin).resolve().parents[3]


def _place(flavour: str) -> Path | None:
    """The folder in which the DSL's package has the flavour's libraries, of the DSL's version and for this Python."""
    compiler = f"_cutlass_ir.{flavour}{importlib.machinery.EXTENSION_SUFFIXES[0]}"
    metadata = f"{_DSL.replace('-', '_')}_libs_{flavour}-{importlib.metadata.version(_DSL)}.dist-info"
    places = (folder for folder in (_site(), _folder(flavour)) if (folder / metadata).is_dir())
    return next((folder for folder in places if (folder / _PACKAGES / LIBRARIES / compiler).exists()), None)


@contextmanager
def _view(flavour: str) -> Iterator[Path]:
    """A folder with the DSL's package in it, in links, of which the libraries are the flavour's."""
    site, place = _site(), _place(flavour)
    deepest = _PACKAGES / LIBRARIES
    split = {*deepest.parents, deepest} - {Path()}  # folders in which only some entries are taken
    with tempfile.TemporaryDirectory(prefix=f"cute_fa_{flavour}_") as temporary:
        view = Path(temporary)
        for folder in sorted(split):
            (view / folder).mkdir()
            common = [path for path in (site / folder).iterdir() if not re.search(r"cu\d+|__pycache__", path.name)]
            for path in [*common, *(place / folder).glob(f"*{flavour}*")]:
                if folder / path.name not in split:
                    (view / folder / path.name).symlink_to(path)
        yield view
