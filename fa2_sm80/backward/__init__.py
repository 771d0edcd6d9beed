"""The FA2 backward."""
