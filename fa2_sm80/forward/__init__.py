"""The FA2 forward."""
