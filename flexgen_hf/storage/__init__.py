"""Bytes in tiers: buffers, files, lanes and the account of who holds how much. Knows nothing of models."""
