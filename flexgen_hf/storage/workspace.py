"""What everything that holds bytes of a running model shares."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from ..planning.schedule import Rings
from .ledger import Ledger

__all__ = ["EMULATED", "Workspace"]

#: type of the device that `flexgen_hf.bench` emulates
EMULATED = "emulated"


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

    @property
    def is_asynchronous(self) -> bool:
        """Whether the device computes on after a call returned, so that waiting for it takes an event."""
        return not self.is_direct and hasattr(getattr(torch, self.device.type, None), "Event")
