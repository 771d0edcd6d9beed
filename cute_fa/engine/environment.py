"""Switches in the environment: ``CUTE_FA_CACHE`` (the disk cache), ``CUTE_FA_CHECK`` (check values on the device),
``CUTE_FA_BATCH_INVARIANT`` (batch-invariant mode wherever a call leaves it open)."""

from __future__ import annotations

import os

from cute_fa.semantics.errors import ArgumentError


def switch(name: str, default: bool) -> bool:
    """Whether the variable is on; ``default`` where it is unset or empty. Raises ArgumentError unless it is 0 or 1."""
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        raise ArgumentError(f"{name}={value!r}: must be 0 (off) or 1 (on)")
    return value == "1" if value else default
