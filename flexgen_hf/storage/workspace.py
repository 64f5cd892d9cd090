"""What everything that holds bytes of a running model shares."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from ..planning.schedule import Rings
from .ledger import Ledger

__all__ = ["Workspace"]


@dataclasses.dataclass(frozen=True)
class Workspace:
    """Where a model computes and keeps its bytes.

    Args:
        ledger: the account of what each tier holds.
        device: where compute happens.
        folder: where cache and hidden states on disk go.
        rings: how many reused buffers there are of each kind.
    """

    ledger: Ledger
    device: torch.device
    folder: Path
    rings: Rings

    @property
    def is_direct(self) -> bool:
        """Whether compute works in host memory, so that nothing needs to be moved between host and device."""
        return self.device.type == "cpu"
