"""Constants of a GPU (:mod:`ptxsim.timing.gpus`), measured by kernels of our own in the DSL.

A module for each group of kernels: its configs, ``launch`` of each, which runs in a simulation and on a GPU alike,
``measure``, which yields rows, and ``constants``, a pure function of rows. What a kernel times is written in its
docstring; ``session`` runs the groups within a time, ``gpu_file`` writes the TOML file.
"""

# The modules in an order of value, with the least architecture that each runs on.
GROUPS = {
    "wgmma": 90,
    "barriers": 80,
    "tma": 90,
    "streams": 80,
    "issue": 90,
    "warps": 80,
    "reductions": 80,
    "clocks": 90,
}
