"""Scopes of synchronisation (PTX ISA 8.5), and how an access that is not weak orders others (8.8)."""

from __future__ import annotations

from typing import NamedTuple

CTA, CLUSTER, GPU = range(3)  # the same numbers say how far apart two threads are
_SCOPES = {"cta": CTA, "cluster": CLUSTER, "gpu": GPU, "sys": GPU, "gl": GPU}


class AccessOrder(NamedTuple):
    """What an opcode says of an access that is not weak."""

    acquires: bool
    releases: bool
    reads: bool
    writes: bool
    scope: int


def scope_of(opcode: str) -> int:
    """Scope that an opcode names; without one that of atom and red."""
    return next((_SCOPES[part] for part in opcode.split(".") if part in _SCOPES), GPU)
