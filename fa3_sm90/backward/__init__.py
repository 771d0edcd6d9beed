"""The Hopper backward: TMA, wgmma, warp-specialised."""
