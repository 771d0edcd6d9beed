"""How many CTAs of a kernel an SM holds at once: CUDA programming guide, compute capabilities."""

from __future__ import annotations

from .replay import TimedLaunch

_SHARED = {80: 164, 86: 100, 89: 100, 90: 228, 100: 228, 103: 228, 120: 100}  # KiB of an SM
_REGISTERS, _THREADS = 65536, {86: 1536, 89: 1536, 120: 1536}
_MOST_CTAS = {80: 32, 86: 16, 89: 24, 90: 32, 100: 32, 103: 32, 120: 24}
_RESERVED = 1024  # bytes of shared memory that the system takes for each CTA
_UNKNOWN_REGISTERS = 255


def ctas_an_sm(launch: TimedLaunch) -> int:
    """By shared memory, registers (allocated by eight a thread), threads and places; at least one."""
    shared = launch.smem + launch.static_smem + _RESERVED
    registers = -(-(launch.registers or _UNKNOWN_REGISTERS) // 8) * 8 * 32 * launch.warps_per_cta
    limits = (
        _SHARED[launch.arch] * 1024 // shared,
        _REGISTERS // registers,
        _THREADS.get(launch.arch, 2048) // (32 * launch.warps_per_cta),
        _MOST_CTAS[launch.arch],
    )
    return max(min(limits), 1)
