"""The FA4 forward."""
