"""Lines of Python source that PTX lines came from: the directives .file and .loc (PTX ISA 11.5)."""

from __future__ import annotations

import functools
import re

_FILE = re.compile(r'^\s*\.file\s+(\d+)\s+"([^"]*)"', re.M)
_LOC = re.compile(r"\.loc\s+(\d+)\s+(\d+)")


@functools.lru_cache(maxsize=4)
def _sources(text: str) -> list[str]:
    """Of every line of a module's text, `` (file.py:12)``, or nothing."""
    files = dict(_FILE.findall(text))
    sources, source, in_assembly = [], "", False
    for line in text.split("\n"):
        if line.lstrip().startswith((".visible .entry", ".entry")):
            source = ""
        elif "inline asm" in line:
            in_assembly = "begin inline asm" in line
        elif files and not in_assembly and (found := _LOC.search(line)):
            # LLVM counts on within inline assembly: its lines would lie below the Python line that has it
            source = f" ({files.get(found[1], 'file ' + found[1])}:{found[2]})"
        sources.append(source)
    return sources


def source_of(text: str, line: int) -> str:
    """`` (file.py:12)`` for a PTX line (1-based) of a module's text; empty without line information."""
    sources = _sources(text)
    return sources[min(line, len(sources)) - 1]
