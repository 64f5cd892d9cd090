"""Whole jobs on top of a loaded model."""
