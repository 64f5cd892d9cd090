"""Deciding what is done, apart from doing it. Pure Python: nothing in here imports torch."""
