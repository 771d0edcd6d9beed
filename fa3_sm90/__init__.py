"""FA3-style kernels for sm_90a: persistent, warp-specialised, TMA and wgmma."""
