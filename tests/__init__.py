"""Tests; a package, so that they can share the modules that make checkpoints and control groups."""
