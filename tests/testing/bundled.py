"""Bundles for tests, and processes that use them, without the DSL where they should."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cute_fa.engine import bundles, keys

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).parents[2]
_DSL = ("nvidia_cutlass", "cutlass", "cuda", "flash_attn", "quack")  # what it needs and what needs it go with it


class Processes:
    """Starts Python in the project's folder. ``without_dsl``: a folder of links to all that is installed here but the
    DSL, on the path instead of the environment's own."""

    def __init__(self, folder: Path):
        self.without_dsl = folder
        for place in map(Path, dict.fromkeys(sys.path)):
            for item in place.iterdir() if place.name in ("site-packages", "dist-packages") else ():
                link = folder / item.name
                if not item.name.startswith(_DSL) and not link.is_symlink():
                    link.symlink_to(item)

    def start(
        self, code: str, *arguments: Any, dsl: bool = False, path: str = "", **environment: str
    ) -> subprocess.Popen:
        """``path``: further folders of modules, before all others."""
        places = [path, str(ROOT), str(ROOT / "tests/cute_fa"), *([] if dsl else [str(self.without_dsl)])]
        environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": ":".join(filter(None, places)), **environment}
        kept = {name: value for name, value in os.environ.items() if name != bundles.VARIABLE}
        # -S: no .pth file is read, and the environment's own packages are not on the path.
        command = [sys.executable, *([] if dsl else ["-S"]), "-W", "ignore", "-c", code, *map(str, arguments)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(command, cwd=ROOT, env={**kept, **environment}, text=True, **pipes)

    def run(self, code: str, *arguments: Any, **options: Any) -> Any:
        """What the program prints last, as JSON."""
        return result(self.start(code, *arguments, **options))


def result(process: subprocess.Popen) -> Any:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, out + err
    return json.loads(out.splitlines()[-1])


def edited(bundle: Path, copy: Path, edit: Callable[[dict], None]) -> Path:
    """A copy of a bundle with another manifest that is sound in itself."""
    shutil.copytree(bundle, copy)
    file = copy / bundles.MANIFEST
    manifest = json.loads(file.read_text())
    edit(manifest)
    for entry in manifest["kernels"]:
        entry["digest"] = keys.digest_of(entry["key"])
    file.write_text(json.dumps(manifest | {"sha256": bundles.hash_of(manifest)}))
    return copy


def replace_file(folder: Path, entry: dict, kind: str, content: bytes) -> None:
    """Put another content in the place of an entry's ``library`` or ``ptx``, and its hash into the entry."""
    (folder / entry[kind]).write_bytes(content)
    entry[f"{kind}_sha256"] = hashlib.sha256(content).hexdigest()
