"""Hidden states between one decoder layer and the next, each micro-batch's in its home tier.

A layer's output is taken from the model's hands and a placeholder without memory is given in its place; before the
next layer the real one is put back. A model that touches hidden states between its layers would touch the placeholder:
that is noticed and refused, never computed with.
"""

from __future__ import annotations

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
        self._staging = [Buffer(space.ledger, Tier.HOST, space.device, "hidden slots") for _ in slots]
        self._device_slots = [Buffer(space.ledger, Tier.DEVICE, space.device, "hidden slots") for _ in slots]
        self._spill: SpillFile | None = None
        self._regions: dict[int, tuple[int, int]] = {}  # micro-batch -> offset, bytes in the spill file
        self._parked: dict[int, torch.Tensor] = {}  # as the layer returned it, until it is home
        self._host: dict[int, torch.Tensor] = {}  # home on the host of an accelerator, or on the way to disk
        self._placeholder: dict[int, torch.Tensor] = {}
        self._shape: dict[int, tuple[torch.dtype, torch.Size]] = {}
        self._slot: dict[int, int] = {}
        self._given: dict[int, torch.Tensor] = {}  # what a layer was given, a view of a slot

    def route(self, batch: int) -> Route:
        """The links that a micro-batch's hidden states cross between two layers."""
        disk = self.homes[batch] is Tier.DISK
        moved = not self._direct and self.homes[batch] is not Tier.DEVICE
        return Route(read=disk, push=moved, pull=moved, write=disk)

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

    def restore(self, batch: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
        """Puts the real hidden states where the model passes the placeholder to the next layer.

        Raises:
            UnsupportedModelError: the model passes something else, so it changed them in between.
        """
        placeholder = self._placeholder.pop(batch, None)
        if placeholder is None:
            return args, kwargs
        value = self._given[batch] = self._loaded(batch)
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
        """Device to host."""
        hidden = self._parked.pop(batch)
        self._host[batch] = hidden.to("cpu")
        return hidden.numel() * hidden.element_size()

    def write(self, batch: int) -> int:
        """Host to disk."""
        hidden = (self._parked if self._direct else self._host).pop(batch)
        return self._file().write(self._regions[batch][0], hidden.contiguous().view(-1).view(torch.uint8))

    def read(self, batch: int, slot: int) -> int:
        """Disk to host, into a slot's staging buffer."""
        dtype, shape = self._shape[batch]
        self._slot[batch] = slot
        memory = self._staging[slot].bytes[: shape.numel() * dtype.itemsize]
        return self._file().read(self._regions[batch][0], memory)

    def push(self, batch: int, slot: int) -> int:
        """Host to device, into a slot."""
        self._slot[batch] = slot
        dtype, shape = self._shape[batch]
        if self.homes[batch] is Tier.HOST:
            source = self._host.pop(batch)
        else:
            source = tensor_view(self._staging[slot].bytes, 0, dtype, shape)
        tensor_view(self._device_slots[slot].bytes, 0, dtype, shape).copy_(source)
        return source.numel() * source.element_size()

    def close(self) -> None:
        """Gives all memory back, and the file."""
        for buffer in (*self._staging, *self._device_slots):
            buffer.free()
        self._parked.clear()
        self._host.clear()
        if self._spill is not None:
            self._spill.close()

    # --------------------------------------------------------------------------------------------------------- inside
    def _prepare(self, batch: int, nbytes: int) -> None:
        """Room on disk and in the slots; micro-batches of a sweep only shrink after the first layer, never grow."""
        if self.homes[batch] is Tier.DISK and self._regions.get(batch, (0, 0))[1] < nbytes:
            self._regions[batch] = (self._file().reserve(nbytes), nbytes)
        for slot in range(len(self._staging)):
            if self.homes[batch] is Tier.DISK:
                self._staging[slot].ensure(nbytes)
            if not self._direct:
                self._device_slots[slot].ensure(nbytes)

    def _loaded(self, batch: int) -> torch.Tensor:
        dtype, shape = self._shape[batch]
        slots = self._staging if self._direct else self._device_slots
        return tensor_view(slots[self._slot[batch]].bytes, 0, dtype, shape)

    def _file(self) -> SpillFile:
        if self._spill is None:
            self._spill = SpillFile(self._space.folder, self._space.ledger, "hidden states")
        return self._spill
