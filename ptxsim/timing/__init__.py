"""A timing model: replays the machine code of kernels that ran in the simulator, cycle by cycle, docs/timing.md."""
