"""Benchmarks of Stanford's HELM with a whole scenario's requests as one job.

HELM itself is the extra `helm`, and is imported inside functions only: requests are read and answered without it.
"""

from __future__ import annotations

from .engine import Answer, Engine, Passage
from .executing import batch_runner
from .job import HelmJob, HelmReport, HelmRun, run

__all__ = ["Answer", "Engine", "HelmJob", "HelmReport", "HelmRun", "Passage", "batch_runner", "run"]
