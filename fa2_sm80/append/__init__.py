"""Appending to a KV cache."""
