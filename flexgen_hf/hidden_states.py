"""Hidden states between one decoder layer and the next, each micro-batch's in its home tier.

A layer's output is taken from the model's hands and a placeholder without memory is given in its place; before the
next layer the real one is put back. A model that touches hidden states between its layers would touch the placeholder:
that is noticed and refused, never computed with.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch

from .errors import UnsupportedModelError
from .planning.schedule import Route
from .policy import Tier
from .storage.buffers import Buffer, tensor_view
from .storage.files import SpillFile
from .storage.workspace import Workspace

__all__ = ["HiddenStates"]


class HiddenStates:
    """Hidden states of all micro-batches of one sweep.

    Args:
        homes: the tier of each micro-batch's hidden states.
        space: where the model computes and keeps its bytes.
    """

    def __init__(self, homes: Sequence[Tier], space: Workspace) -> None:
        self.homes, self._space = list(homes), space
        self._direct = space.is_direct
        slots = range(space.rings.hidden)
        self._staging = [space.staging("hidden slots") for _ in slots]
        self._device_slots = [Buffer(space.ledger, Tier.DEVICE, space.device, "hidden slots") for _ in slots]
        # On their way to disk; one more than are pulled ahead, so that writing never has to wait for one.
        ways = range(1 if self._direct else space.rings.hidden + 1)
        self._outgoing = [space.staging("hidden slots") for _ in ways]
        self._free = list(self._outgoing)
        self._lock = threading.Lock()
        self._spill: SpillFile | None = None
        self._regions: dict[int, tuple[int, int]] = {}  # micro-batch -> offset, bytes in the spill file
        self._parked: dict[int, torch.Tensor] = {}  # as the layer returned it, until it is home
        self._host: dict[int, Buffer] = {}  # homes on the host of an accelerator
        self._pulled: dict[int, Buffer] = {}  # on the way to disk
        self._placeholder: dict[int, torch.Tensor] = {}
        self._shape: dict[int, tuple[torch.dtype, torch.Size]] = {}
        self._slot: dict[int, int] = {}
        self._given: dict[int, torch.Tensor] = {}  # what a layer was given, a view of a slot

    def route(self, batch: int) -> Route:
        """The links that a micro-batch's hidden states cross between two layers."""
        disk = self.homes[batch] is Tier.DISK
        moved = not self._direct and self.homes[batch] is not Tier.DEVICE
        return Route(read=disk, push=moved, pull=moved, write=disk)

    @property
    def notes(self) -> list[str]:
        """What is done differently from what one would expect."""
        return [] if self._spill is None else self._spill.notes

    # ------------------------------------------------------------------------------------------- in the model's frame
    def park(self, batch: int, output: Any) -> Any:
        """Takes the hidden states (batch, tokens, hidden) out of a layer's output; returns what the model may keep."""
        if not self.route(batch).moves:
            return output
        hidden = output[0] if isinstance(output, (tuple, list)) else output
        given = self._given.pop(batch, None)
        if given is not None and (hidden is given or hidden._base is given._base):
            hidden = hidden.clone()  # a layer that hands through its input must not leave it in a reused buffer
        self._parked[batch] = hidden
        self._shape[batch] = (hidden.dtype, hidden.shape)
        self._prepare(batch, hidden.numel() * hidden.element_size())
        placeholder = self._placeholder[batch] = torch.empty(hidden.shape, dtype=hidden.dtype, device="meta")
        if isinstance(output, (tuple, list)):
            return type(output)((placeholder, *output[1:]))
        return placeholder

    def restore(
        self, batch: int, args: tuple[Any, ...], kwargs: dict[str, Any], *, outlives_slot: bool = False
    ) -> tuple[tuple[Any, ...], Any]:
        """Puts the real hidden states where the model passes the placeholder to the next layer.

        Args:
            batch: number of the micro-batch.
            args: of the layer.
            kwargs: of the layer.
            outlives_slot: the layer may need them when their slot is in use for others.

        Raises:
            UnsupportedModelError: the model passes something else, so it changed them in between.
        """
        placeholder = self._placeholder.pop(batch, None)
        if placeholder is None:
            return args, kwargs
        value = self._loaded(batch)
        if outlives_slot:
            value = value.clone()
        else:
            self._given[batch] = value
        found = [i for i, a in enumerate(args) if a is placeholder]
        names = [n for n, a in kwargs.items() if a is placeholder]
        if not found and not names:
            raise UnsupportedModelError(
                "the model changes hidden states between its layers, so they cannot be moved; keep them on the device "
                "with hidden=Placement(device=1.0)"
            )
        args = tuple(value if i in found else a for i, a in enumerate(args))
        return args, {n: value if n in names else a for n, a in kwargs.items()}

    # ------------------------------------------------------------------------------------------------------- in lanes
    def pull(self, batch: int) -> int:
        """Device to host; returns the bytes.

        Hidden states that go on to disk are left where they are if all buffers are in use: `write` takes them then.
        """
        if self.homes[batch] is Tier.HOST:
            buffer: Buffer | None = self._host[batch]
        else:
            buffer = self._borrow(leave=1)
        if buffer is None:
            return 0
        moved = self._take(batch, buffer)
        if self.homes[batch] is Tier.DISK:
            self._pulled[batch] = buffer
        return moved

    def write(self, batch: int) -> int:
        """Host to disk; returns the bytes."""
        pulled = self._pulled.pop(batch, None)
        buffer = pulled or self._borrow()
        assert buffer is not None
        try:
            if pulled is None:
                self._take(batch, buffer)
            return self._file().write_run(self._regions[batch][0], buffer.bytes, 0, self._nbytes(batch))
        finally:
            with self._lock:
                self._free.append(buffer)

    def read(self, batch: int, slot: int) -> int:
        """Disk to host, into a slot's staging buffer; returns the bytes."""
        self._slot[batch] = slot
        return self._file().read_run(self._regions[batch][0], self._staging[slot].bytes, 0, self._nbytes(batch))

    def push(self, batch: int, slot: int) -> int:
        """Host to device, into a slot; returns the bytes."""
        self._slot[batch] = slot
        source = self._host[batch] if self.homes[batch] is Tier.HOST else self._staging[slot]
        self._space.copy(self._view(batch, self._device_slots[slot]), self._view(batch, source))
        return self._nbytes(batch)

    def close(self) -> None:
        """Gives all memory back, and the file."""
        for buffer in (*self._staging, *self._device_slots, *self._outgoing, *self._host.values()):
            buffer.free()
        self._parked.clear()
        if self._spill is not None:
            self._spill.close()

    # --------------------------------------------------------------------------------------------------------- inside
    def _prepare(self, batch: int, nbytes: int) -> None:
        """Room on disk and in the slots; micro-batches of a sweep only shrink after the first layer, never grow."""
        if self.homes[batch] is Tier.HOST:
            if batch not in self._host:
                self._host[batch] = Buffer(self._space.ledger, Tier.HOST, self._space.device, "hidden states")
            self._host[batch].ensure(nbytes)
        elif self._regions.get(batch, (0, 0))[1] < nbytes:
            if batch in self._regions:
                self._file().release(*self._regions[batch])
            self._regions[batch] = (self._file().reserve(nbytes), nbytes)
        on_disk = (*self._staging, *self._outgoing) if self.homes[batch] is Tier.DISK else ()
        for buffer in (*on_disk, *(() if self._direct else self._device_slots)):
            buffer.ensure(nbytes)

    def _borrow(self, leave: int = 0) -> Buffer | None:
        """A buffer on the way to disk, unless only `leave` are left."""
        with self._lock:
            return self._free.pop() if len(self._free) > leave else None

    def _take(self, batch: int, buffer: Buffer) -> int:
        """Brings what a layer returned into host memory; returns the bytes."""
        self._space.copy(self._view(batch, buffer), self._parked[batch])
        del self._parked[batch]
        return self._nbytes(batch)

    def _nbytes(self, batch: int) -> int:
        dtype, shape = self._shape[batch]
        return shape.numel() * dtype.itemsize

    def _view(self, batch: int, buffer: Buffer) -> torch.Tensor:
        dtype, shape = self._shape[batch]
        return tensor_view(buffer.bytes, 0, dtype, shape)

    def _loaded(self, batch: int) -> torch.Tensor:
        slots = self._staging if self._direct else self._device_slots
        return self._view(batch, slots[self._slot[batch]])

    def _file(self) -> SpillFile:
        if self._spill is None:
            self._spill = SpillFile(self._space.folder, self._space.ledger, "hidden states")
        return self._spill
