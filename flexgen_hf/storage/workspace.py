"""What everything that holds bytes of a running model shares."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path

import torch

from ..planning.schedule import Rings
from ..policy import Tier
from .buffers import Buffer
from .ledger import Ledger
from .pinned import PinnedPool

__all__ = ["EMULATED", "Workspace", "default_device"]

#: type of the device that `flexgen_hf.bench` emulates
EMULATED = "emulated"


def default_device() -> torch.device:
    """The accelerator, or the CPU where there is none."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return found if found is not None and found.type != EMULATED else torch.device("cpu")


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

    def staging(self, what: str) -> Buffer:
        """A host buffer that data passes through on its way to or from the device."""
        return Buffer(self.ledger, Tier.HOST, self.device, what, pinned=self.is_asynchronous)

    @contextlib.contextmanager
    def in_lane(self) -> Iterator[None]:
        """What a thread that moves data sets up for itself.

        It casts and copies with one thread: a team of its own would take the cores from compute. On a device that
        computes asynchronously it has a stream of its own, so that its copies run beside compute.
        """
        torch.get_num_threads()  # a thread that never asked would be given the number anew, and forget this one
        torch.set_num_threads(1)
        with torch.Stream(self.device) if self.is_asynchronous else contextlib.nullcontext():
            yield

    @functools.cached_property
    def _pinned(self) -> PinnedPool:
        return PinnedPool(self.ledger, lambda: torch.Event(self.device))

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Copies between host and device, in the thread's own stream; casts if the dtypes differ.

        What the host holds is ordinary memory. On a device that computes asynchronously it passes through pinned
        buffers, unless it is pinned itself or has to be rearranged.
        """
        on_host = [tensor for tensor in (target, source) if tensor.device.type == "cpu"]
        plain = len(on_host) == 1 and target.dtype == source.dtype and target.is_contiguous() and source.is_contiguous()
        if self.is_asynchronous and plain and not on_host[0].is_pinned():
            self._pinned.copy(target, source, to_device=source is on_host[0])
        else:
            target.copy_(source, non_blocking=self.is_asynchronous)

    def close(self) -> None:
        """Gives back what copies needed; none may be under way."""
        if "_pinned" in self.__dict__:
            self._pinned.close()
            del self.__dict__["_pinned"]

    def finish_copies(self) -> None:
        """Waits until what this thread has issued is done; where calls return when their work is done, that is now."""
        if self.is_asynchronous:
            torch.accelerator.current_stream(self.device).synchronize()
