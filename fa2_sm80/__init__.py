"""FlashAttention-2 style kernels for sm_80: cp.async, ldmatrix, mma.sync. They run on every later arch too."""
