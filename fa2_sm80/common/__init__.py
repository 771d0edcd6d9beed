"""What the FA2 kernels share: copies, products of warps, rings of key blocks, rules."""
