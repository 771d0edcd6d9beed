"""FA3-style kernels for sm_90a: persistent, warp-specialised, TMA and WGMMA. None exists yet; the table says so."""
