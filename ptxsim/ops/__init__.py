"""Instruction forms by family, after the sections of the PTX ISA manual (numbers of version 9.0).

``forms`` holds the table; each other module registers the forms of one family and the functions that generated code
calls for them. Importing the package fills the table.
"""

from . import (  # noqa: F401
    barriers,
    calls,
    compare,
    control,
    convert,
    copies,
    data,
    floating,
    integer,
    launches,
    logic,
    matrix,
    remote,
    tensor5,
    tensormap,
    warp,
    warp_mma,
)
from .forms import KIND, NUMPY, SIZE, defs_uses, lookup  # noqa: F401
