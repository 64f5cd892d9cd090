"""A bounded pool of pinned memory, through which ordinary host memory crosses to an accelerator and back.

A link runs at its full speed, and beside compute, only from pinned memory. Pinning everything that lives on the host
would take it from the rest of the machine (the original pinned 8 GiB at its start); here a few buffers are pinned, and
long copies pass through them in turn: while one crosses the link, the next is filled by the processor.
"""

from __future__ import annotations

import queue
from collections.abc import Callable
from typing import Any, Protocol

import torch

from ..planning.budget import PINNED_BYTES
from ..policy import Tier
from .ledger import Ledger

__all__ = ["PinnedPool"]

# one pair for each direction; a third copy waits
_PAIRS = 2

_BUFFER_BYTES = PINNED_BYTES // (2 * _PAIRS)


class _Event(Protocol):
    def record(self) -> None: ...

    def synchronize(self) -> None: ...


class PinnedPool:
    """Pairs of pinned buffers that copies take and give back.

    Args:
        ledger: the account; the buffers are on the host tier.
        make_event: makes an event of the device; a copy that was issued is done once it is reached.
        pin: off for tests on a machine that cannot pin.
        nbytes: size of each buffer.
    """

    def __init__(
        self, ledger: Ledger, make_event: Callable[[], _Event], *, pin: bool = True, nbytes: int = _BUFFER_BYTES
    ) -> None:
        self._ledger, self._make_event, self._nbytes = ledger, make_event, nbytes
        self._pairs: queue.SimpleQueue[list[tuple[torch.Tensor, _Event]]] = queue.SimpleQueue()
        ledger.take(Tier.HOST, self.nbytes, "pinned buffers")
        for _ in range(_PAIRS):
            memory = [torch.empty(nbytes, dtype=torch.uint8, pin_memory=pin) for _ in range(2)]
            self._pairs.put([(buffer, make_event()) for buffer in memory])

    @property
    def nbytes(self) -> int:
        """Size of all buffers."""
        return 2 * _PAIRS * self._nbytes

    def close(self) -> None:
        """Gives the memory back; no copy may be under way."""
        while not self._pairs.empty():
            self._pairs.get()
        self._ledger.give(Tier.HOST, self.nbytes, "pinned buffers")

    def copy(self, target: torch.Tensor, source: torch.Tensor, *, to_device: bool) -> None:
        """Copies `source` to `target`, one on the host and one on the device; returns when it is done.

        Args:
            target: contiguous.
            source: contiguous, of the same shape and dtype.
            to_device: the direction.
        """
        to, given = (tensor.reshape(-1).view(torch.uint8) for tensor in (target, source))
        pair = self._pairs.get()
        try:
            self._run(to, given, pair, to_device)
        finally:
            self._pairs.put(pair)

    def _run(self, target: torch.Tensor, source: torch.Tensor, pair: list[Any], to_device: bool) -> None:
        starts = range(0, target.numel(), self._nbytes)
        parts = [slice(start, min(start + self._nbytes, target.numel())) for start in starts]
        for number, part in enumerate(parts):
            buffer, event = pair[number % 2]
            if number >= 2:
                self._take_back(parts[number - 2], buffer, event, target, to_device)
            part_of_buffer = buffer[: part.stop - part.start]
            if to_device:
                part_of_buffer.copy_(source[part])
                target[part].copy_(part_of_buffer, non_blocking=True)
            else:
                part_of_buffer.copy_(source[part], non_blocking=True)
            event.record()
        for number in range(max(0, len(parts) - 2), len(parts)):
            buffer, event = pair[number % 2]
            self._take_back(parts[number], buffer, event, target, to_device)

    @staticmethod
    def _take_back(part: slice, buffer: torch.Tensor, event: _Event, target: torch.Tensor, to_device: bool) -> None:
        """Waits for a buffer that is crossing the link; what came from the device goes on to its place."""
        event.synchronize()
        if not to_device:
            target[part].copy_(buffer[: part.stop - part.start])
