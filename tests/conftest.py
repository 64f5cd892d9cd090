"""Shared fixtures: tiny random checkpoints and ragged prompts."""

from __future__ import annotations
