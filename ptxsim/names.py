"""Names of kernels for people: the DSL's mangled names are ``kernel_cutlass_``, function, class and argument types."""

from __future__ import annotations

import re

_ARGUMENTS = re.compile(r"_(object_at_|tensor(ptr|\d))")


def readable(kernel: str, width: int = 60) -> str:
    """The name of a kernel without the types of its arguments, cut to ``width`` characters.

    A method ``kernel`` goes by its class: ``kernel_cutlass_kernel_fa3_sm90forwardkernelFa3ForwardKernel_…`` is
    ``fa3_sm90forwardkernelFa3ForwardKernel``. Names that the DSL did not make are only cut.
    """
    name = kernel.removeprefix("kernel_cutlass_")
    if name != kernel and (found := _ARGUMENTS.search(name)) and found.start():
        name = name[: found.start()]
        name = name.removeprefix("kernel_") or name
    return name if len(name) <= width else name[: width - 1] + "…"
