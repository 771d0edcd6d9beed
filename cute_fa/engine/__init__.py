"""From a call to a launch: the operators, the dispatch table, plans, the compiler and its cache, worlds."""
