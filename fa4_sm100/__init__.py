"""FA4-style kernels for sm_100a and sm_103a: persistent, warp-specialised, TMA, tcgen05 and tensor memory."""
