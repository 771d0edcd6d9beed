"""The geometry of a launch against what the device allows (CUDA programming guide, technical specifications per compute
capability; PTX ISA 11.4 for the directives of a kernel)."""

from __future__ import annotations

from math import prod

from ..errors import SimError

# Largest shared memory of one CTA in bytes, static and dynamic together, by compute capability
SMEM_LIMIT = {
    **dict.fromkeys((80, 87), 166912),
    **dict.fromkeys((86, 89, 120, 121), 101376),
    **dict.fromkeys((90, 100, 101, 103), 232448),
}
REGISTER_FILE = 65536  # 32-bit registers of an SM, and so the most that a CTA can have
_MAX_THREADS, _MAX_BLOCK = 1024, (1024, 1024, 64)
_MAX_GRID = (2**31 - 1, 65535, 65535)
_MAX_CLUSTER = 16  # more than 8 need a function attribute, which is not followed
_PARAMETER_BYTES = 32764  # from sm_70 on
_GRANULE = 8  # registers of a thread come in multiples


def allocated_registers(registers: int, warps: int) -> int:
    """Registers that the launch of a CTA takes; ``registers`` are those of a thread."""
    return -(-registers // _GRANULE) * _GRANULE * 32 * warps


def check_launch(arch, kernel, grid, block, cluster, smem, static_smem, registers) -> None:
    """SimError for a launch that the device would refuse.

    ``arch`` is the number of the architecture, ``kernel`` a ``parser.Kernel``; ``grid`` (CTAs), ``block`` (threads) and
    ``cluster`` (CTAs) are dim3 tuples; ``smem`` and ``static_smem`` bytes; ``registers`` those of a thread, or None.
    """
    if static_smem + smem > SMEM_LIMIT[arch]:
        raise SimError(f"{static_smem} + {smem} bytes of shared memory, a CTA of sm_{arch} has {SMEM_LIMIT[arch]}")
    if kernel.param_bytes > _PARAMETER_BYTES:
        raise SimError(f"{kernel.param_bytes} bytes of parameters, at most {_PARAMETER_BYTES} are allowed")
    _check_block(kernel, block)
    needed = allocated_registers(registers or 0, -(-prod(block) // 32))
    if needed > REGISTER_FILE:
        raise SimError(f"{registers} registers a thread in a CTA of {block} are {needed}, an SM has {REGISTER_FILE}")
    if 0 in grid:
        raise SimError(f"the grid {grid} is empty")
    if any(have > most for have, most in zip(grid, _MAX_GRID, strict=True)):
        raise SimError(f"the grid {grid} has more than {_MAX_GRID} CTAs")
    _check_cluster(arch, kernel, grid, cluster)


def _check_block(kernel, block):
    if not 1 <= prod(block) <= _MAX_THREADS or any(have > most for have, most in zip(block, _MAX_BLOCK, strict=True)):
        raise SimError(f"{block} threads in a CTA; at most {_MAX_THREADS} are allowed, and {_MAX_BLOCK} in x, y, z")
    if kernel.reqntid and tuple(block) != kernel.reqntid:
        raise SimError(f"{block} threads in a CTA; the kernel requires {kernel.reqntid} (.reqntid)")
    if kernel.maxntid and prod(block) > prod(kernel.maxntid):
        raise SimError(f"{block} threads in a CTA; the kernel allows {prod(kernel.maxntid)} (.maxntid)")


def _check_cluster(arch, kernel, grid, cluster):
    if kernel.cluster and tuple(cluster) not in ((1, 1, 1), kernel.cluster):
        raise SimError(f"clusters of {cluster} CTAs; the kernel requires {kernel.cluster} (.reqnctapercluster)")
    cluster = kernel.cluster or cluster
    if prod(cluster) > 1 and arch < 90:
        raise SimError(f"clusters of {cluster} CTAs on sm_{arch}; clusters exist from sm_90 on")
    if not 1 <= prod(cluster) <= _MAX_CLUSTER:
        raise SimError(f"clusters of {cluster} CTAs; a cluster has at most {_MAX_CLUSTER}")
    if any(g % c for g, c in zip(grid, cluster, strict=True)):
        raise SimError(f"clusters of {cluster} CTAs do not divide the grid {grid}")
