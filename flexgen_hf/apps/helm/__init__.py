"""Benchmarks of Stanford's HELM with a whole scenario's requests as one job.

HELM itself is the extra `helm` and is imported inside functions only, so what reads requests works without it.
"""

from __future__ import annotations

from .engine import Answer, Engine, Sequence
from .requests import Asked, read
from .run import HelmJob, HelmReport, run

__all__ = ["Answer", "Asked", "Engine", "HelmJob", "HelmReport", "Sequence", "read", "run"]
