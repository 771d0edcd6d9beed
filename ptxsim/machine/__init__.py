"""A wave of CTAs: memory, barriers, copies, tensor cores, scheduler; parts that ``machine.Machine`` puts together."""
