"""The command line and what it runs: trials, the tour, inputs, warming the cache."""
