"""Lines of Python source that PTX lines came from: the directives .file and .loc (PTX ISA 11.5)."""

from __future__ import annotations

import functools
import re

_FILE = re.compile(r'^\s*\.file\s+(\d+)\s+"([^"]*)"', re.M)
_LOC = re.compile(r"\.loc\s+(\d+)\s+(\d+)")


@functools.lru_cache(maxsize=4)
def _table(text: str) -> tuple[dict[str, str], list[str]]:
    return dict(_FILE.findall(text)), text.split("\n")


def source_of(text: str, line: int) -> str:
    """`` (file.py:12)`` for a PTX line (1-based) of a module's text; empty without line information."""
    files, lines = _table(text)
    if not files:
        return ""
    for number in range(min(line, len(lines)) - 1, -1, -1):
        if found := _LOC.search(lines[number]):
            return f" ({files.get(found[1], 'file ' + found[1])}:{found[2]})"
        if lines[number].lstrip().startswith((".visible .entry", ".entry")):
            break
    return ""
