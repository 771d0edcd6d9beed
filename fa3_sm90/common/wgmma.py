"""Sizes of wgmma (PTX ISA, "Asynchronous warpgroup level matrix instructions"). No DSL."""

WARPGROUP = 128  # threads
WGMMA_M = 64  # rows that a warpgroup has
WGMMA_K = 16  # elements of a dot product that one instruction takes, of 16 bits each
