"""``make gpu-check``: what a machine with a GPU can tell, in an order of value and in a given time.

``smoke``    one problem per kernel, each in its own process with a time limit: a hang costs seconds
``steps``    the whole plan: smoke, a short sweep beside the peers, the tests marked gpu, compute-sanitizer
``report``   what is written as it comes: the machine, the outcome of each step, logs
``dry_run``  the plan on a machine without a GPU, which also records which kernels it launches
``pack``     the folder for a machine without a package index, with a bundle of exactly those kernels
"""
