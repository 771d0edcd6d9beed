"""The FA3 forward."""
