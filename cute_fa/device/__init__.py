"""Device code (CuTe DSL) that two or more arch folders use: lengths, block ranges, masks, online softmax, MMA views."""
