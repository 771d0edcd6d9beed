"""The split-KV forward."""
