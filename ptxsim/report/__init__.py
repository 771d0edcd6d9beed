"""What is told about runs: accounts of failures, traces, tables, the command line."""
