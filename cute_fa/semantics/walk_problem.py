"""``WalkProblem``: one walk of a range plan to be made, as ``AttentionProblem`` is one attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from cute_fa.semantics.errors import LengthError, ShapeError
from cute_fa.semantics.problem import INT32_MAX
from cute_fa.semantics.types import Direction, SmArch


@dataclass(frozen=True)
class WalkProblem:
    """What is asked of the kernel that lists the blocks of columns which tiles of rows see.

    ``tile_rows``, ``tile_columns``: of the kernel that will walk over them; ``rows``, ``columns``: how many there are.
    ``whole_tiles``: rows behind the last one see nothing, and need a mask for that.
    Raises ShapeError or LengthError.
    """

    arch: SmArch
    tile_rows: int
    tile_columns: int
    rows: int
    columns: int
    whole_tiles: bool = False

    direction: ClassVar[Direction] = Direction.PLAN
    has_codes: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for name in ("tile_rows", "tile_columns"):
            if getattr(self, name) < 1:
                raise ShapeError(f"{name}={getattr(self, name)}: at least 1 is needed")
        for name in ("rows", "columns"):
            if not 0 <= getattr(self, name) <= INT32_MAX:
                raise LengthError(f"{name}={getattr(self, name)}: a length is between 0 and {INT32_MAX}")
