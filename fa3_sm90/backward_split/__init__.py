"""The Hopper backward for wide head_dims: dK and dV by one kernel, dQ by another."""
