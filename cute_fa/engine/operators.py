"""The torch library ``cute_fa``: operators whose schemas follow from the NamedTuples that declare their arguments."""

from __future__ import annotations

import types
import typing
from typing import TYPE_CHECKING

import torch
from torch import library

if TYPE_CHECKING:
    from collections.abc import Callable

LIBRARY = library.Library("cute_fa", "DEF")
# Sizes and counts may be symbolic while torch.compile traces.
_SCHEMA_TYPES = {torch.Tensor: "Tensor", int: "SymInt", float: "float", bool: "bool", str: "str"}


def schema(*parts: type | str, written: tuple[str, ...] = ()) -> str:
    """The arguments of an operator: those of NamedTuples, from their annotations, and others as a schema has them;
    ``written``: tensors that the operator writes to."""
    aliases = {name: f"Tensor({chr(ord('a') + i)}!)" for i, name in enumerate(written)}
    arguments = []
    for part in parts:
        if isinstance(part, str):
            arguments.append(part)
            continue
        for name, hint in typing.get_type_hints(part).items():
            kind = _schema_type(hint)
            if name in aliases:
                kind = kind.replace("Tensor", aliases[name])
            arguments.append(f"{kind} {name}")
    return ", ".join(arguments)


def _schema_type(hint: object) -> str:
    kinds = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    (kind,) = (kind for kind in kinds if kind is not type(None))
    return _SCHEMA_TYPES[kind] + ("?" if len(kinds) > 1 else "")


def define(name: str, arguments: str, returns: str, run: Callable, fake: Callable) -> None:
    """Add an operator: ``run`` for real tensors, ``fake`` for those that are shapes alone."""
    LIBRARY.define(f"{name}({arguments}) -> {returns}", tags=torch.Tag.pt2_compliant_tag)
    LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    library.register_fake(f"cute_fa::{name}", fake, lib=LIBRARY)
