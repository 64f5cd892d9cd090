"""Weights on disk: the store's format, its writer, and the reader that fetches a stage."""
