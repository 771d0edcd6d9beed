"""How the warps of a CTA share a product; plain data, without the DSL."""

from dataclasses import dataclass


@dataclass(frozen=True)
class WarpGrid:
    """``rows`` × ``columns`` warps over a product's rows and columns, ``depth`` over what is summed."""

    rows: int
    columns: int = 1
    depth: int = 1
