"""A wave of CTAs: memory, synchronisation, copies, tensor cores, scheduler; parts that ``machine.Machine`` puts together."""
