"""Texts that come and go: a block in which whoever ends leaves its place to whoever waits."""
