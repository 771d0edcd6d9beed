"""The Hopper forward for few queries over many keys: decoding, drafts to verify, chunks of a prompt."""
