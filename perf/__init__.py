"""How fast: static figures read from compiled kernels, which need no GPU. ``python -m perf --help``."""
