"""Cells: the keys and values of one layer for one micro-batch, each with a home tier.

A `Cell` is a transformers cache layer. It is allocated once for the longest sequence it will see and appended in place;
only new keys and values move home. Its tokens lie one after the other, `(tokens, batch, heads, head_dim)`, so that what
a step adds is contiguous in memory and in the file.
"""

from __future__ import annotations

import dataclasses
import weakref
from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin

from .errors import UnsupportedModelError
from .planning.schedule import Route
from .policy import Tier
from .storage.buffers import Buffer, round_up, tensor_view
from .storage.files import SpillFile
from .storage.workspace import Workspace

__all__ = ["CacheSpace", "Cell"]

# First and last token of an update, the last excluded.
_Tokens = tuple[int, int]


class CacheSpace:
    """What the cells of one block share: the spill file, and the reused slots that those pass through which move.

    Args:
        space: where the model computes and keeps its bytes.
        host_attention: cells that live on the host are attended to there.
    """

    def __init__(self, space: Workspace, host_attention: bool = False) -> None:
        self._space = space
        self.direct = space.is_direct
        self.host_attention = host_attention and not space.is_direct
        slots = range(space.rings.cache)
        self._staging = [Buffer(space.ledger, Tier.HOST, space.device, "cache slots") for _ in slots]
        self._device_slots = [Buffer(space.ledger, Tier.DEVICE, space.device, "cache slots") for _ in slots]
        self._spill: SpillFile | None = None
        self._buffers: weakref.WeakSet[Buffer] = weakref.WeakSet()

    @property
    def num_slots(self) -> int:
        """How many slots there are."""
        return len(self._staging)

    @property
    def spill(self) -> SpillFile:
        """The file of cells on disk, made when the first one needs it."""
        if self._spill is None:
            self._spill = SpillFile(self._space.folder, self._space.ledger, "the KV cache")
        return self._spill

    def buffer(self, tier: Tier) -> Buffer:
        """A new home for a cell."""
        made = Buffer(self._space.ledger, tier, self._space.device, "KV cache")
        self._buffers.add(made)
        return made

    def staging(self, slot: int) -> Buffer:
        """The host buffer that a cell on disk passes through."""
        return self._staging[slot]

    def working(self, slot: int) -> Buffer:
        """The buffer that compute sees."""
        return self._staging[slot] if self.direct else self._device_slots[slot]

    def ensure_slot(self, slot: int, nbytes: int) -> None:
        """Grows a slot; what was in it is lost if it grows, and no lane may be using it."""
        self._staging[slot].ensure(nbytes)
        if not self.direct:
            self._device_slots[slot].ensure(nbytes)

    def slots_hold(self, nbytes: int) -> bool:
        """Whether every slot has at least `nbytes`."""
        return all(buffer.nbytes >= nbytes for buffer in self._staging)

    def close(self) -> None:
        """Gives everything back, the file too."""
        for buffer in (*self._staging, *self._device_slots, *self._buffers):
            buffer.free()
        if self._spill is not None:
            self._spill.close()


@dataclasses.dataclass(frozen=True)
class _Shape:
    """Shape of one token's keys and values in a cell."""

    batch: int
    key: tuple[int, int]  # heads, head_dim
    value: tuple[int, int]
    dtype: torch.dtype

    @property
    def key_bytes(self) -> int:
        return self.batch * self.key[0] * self.key[1] * self.dtype.itemsize

    @property
    def value_bytes(self) -> int:
        return self.batch * self.value[0] * self.value[1] * self.dtype.itemsize

    def views(self, memory: torch.Tensor, capacity: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values over `memory`, each (capacity, batch, heads, head_dim)."""
        key = tensor_view(memory, 0, self.dtype, (capacity, self.batch, *self.key))
        value = tensor_view(memory, self.value_start(capacity), self.dtype, (capacity, self.batch, *self.value))
        return key, value

    def value_start(self, capacity: int) -> int:
        return round_up(capacity * self.key_bytes)

    def nbytes(self, capacity: int) -> int:
        return self.value_start(capacity) + round_up(capacity * self.value_bytes)


class Cell(CacheLayerMixin):  # type: ignore[no-untyped-call]  # its __init_subclass__
    """Keys and values of one layer for one micro-batch.

    Args:
        space: what the block's cells share.
        home: the tier it lives on.
        capacity: tokens it is allocated for; it grows if more come.
        window: of a sliding-window layer; all tokens are kept, but only what is in the window is loaded and seen.
    """

    is_compileable = False
    is_croppable = True

    def __init__(self, space: CacheSpace, home: Tier, capacity: int, window: int | None = None) -> None:
        # Not CacheLayerMixin.__init__: it would set keys and values, which are read-only here.
        self.home, self.length, self.window = home, 0, window
        self.is_sliding = window is not None
        self.is_initialized = False
        self._space, self._capacity = space, capacity
        self._shape: _Shape | None = None
        self._memory: Buffer | None = None
        self._offset = 0
        self._slot = -1
        self._new: tuple[torch.Tensor, torch.Tensor] | None = None  # the prompt's, on their way to the host
        self._added: _Tokens = (0, 0)

    # ---------------------------------------------------------------------------------------- what transformers calls
    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocates the home. Both arguments are (batch, heads, tokens, head_dim)."""
        batch, heads, _, dim = key_states.shape
        self.allocate(batch, (heads, dim), (value_states.shape[1], value_states.shape[3]), key_states.dtype)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends (batch, heads, new tokens, head_dim); returns what attention sees, in the same order of axes."""
        if not self._fits(key_states, value_states):
            self.discard()
            self.lazy_initialization(key_states, value_states)
        first, old, new = self._first, self.length, self.length + key_states.shape[2]
        self._grow(new)
        if self._stays and old == 0:  # attended on the device, where they are; `pull` brings them home meanwhile
            self.length, self._added, self._new = new, (old, new), (key_states, value_states)
            return key_states, value_states
        keys, values = self._working()
        keys[old:new].copy_(key_states.permute(2, 0, 1, 3))
        values[old:new].copy_(value_states.permute(2, 0, 1, 3))
        self.length, self._added = new, (old, new)
        if old == 0:
            return key_states, value_states
        return keys[first:new].permute(1, 2, 0, 3), values[first:new].permute(1, 2, 0, 3)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys that attention will see."""
        return self.length - self._first + query_length, self._first

    def get_seq_length(self) -> int:
        """Tokens held."""
        return self.length

    def get_max_length(self) -> int:
        """-1: a cell grows when it must."""
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last `-tokens_to_remove` tokens (transformers passes a negative number)."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}): pass a negative number of tokens to remove")
        self.length = max(0, self.length + tokens_to_remove)

    def reset(self) -> None:
        """Forgets everything, keeps the memory."""
        self.length = 0

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Row i becomes what row `beam_idx[i]` was; `beam_idx` is (batch,)."""
        self.select(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps the rows `indices`, in that order."""
        self.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row `repeats` times."""
        if self._shape is not None:
            self.select(torch.arange(self._shape.batch).repeat_interleave(repeats))

    @property
    def keys(self) -> torch.Tensor | None:  # type: ignore[override]  # read-only: written by update
        """A copy of all keys, (batch, heads, tokens, head_dim), or None before the first update."""
        return None if self._shape is None else self.get()[0].permute(1, 2, 0, 3)

    @property
    def values(self) -> torch.Tensor | None:  # type: ignore[override]
        """A copy of all values, (batch, heads, tokens, head_dim), or None before the first update."""
        return None if self._shape is None else self.get()[1].permute(1, 2, 0, 3)

    # ------------------------------------------------------------------------------------------ what the executor calls
    @property
    def route(self) -> Route:
        """The links that this cell crosses on its way to compute and back."""
        disk = self.home is Tier.DISK
        moved = not self._space.direct and self.home is not Tier.DEVICE
        return Route(read=disk, push=moved and not self._stays, pull=moved, write=disk)

    @property
    def _stays(self) -> bool:
        """Whether the device attends to this cell on the host, instead of having it moved."""
        return self._space.host_attention and self.home is Tier.HOST

    def bind(self, slot: int) -> None:
        """Says in which slot the cell's contents are (or will be made) when compute calls `update`."""
        self._slot = slot

    def read(self, slot: int) -> int:
        """Disk to host: the tokens that attention sees into the slot's staging buffer; returns the bytes."""
        shape, first, moved = self._known(), self._first, 0
        memory = self._space.staging(slot).bytes
        for base, size in ((0, shape.key_bytes), (shape.value_start(self._capacity), shape.value_bytes)):
            part = memory[base + first * size : base + self.length * size]
            moved += self._space.spill.read(self._offset + base + first * size, part)
        return moved

    def write(self, slot: int) -> int:
        """Host to disk: the tokens of the last update; returns the bytes."""
        shape, (old, new) = self._known(), self._added
        memory, start, moved = self._space.staging(slot).bytes, shape.value_start(self._capacity), 0
        for base, size in ((0, shape.key_bytes), (start, shape.value_bytes)):
            part = memory[base + old * size : base + new * size]
            moved += self._space.spill.write(self._offset + base + old * size, part)
        return moved

    def push(self, slot: int) -> int:
        """Host to device: the tokens that attention sees into the slot; returns the bytes."""
        home = self._home_memory() if self.home is Tier.HOST else self._space.staging(slot).bytes
        return self._copy(home, self._space.working(slot).bytes, (self._first, self.length))

    def pull(self, slot: int) -> int:
        """Device to host: the tokens of the last update; returns the bytes."""
        if self._stays:
            return self._bring_home()
        home = self._home_memory() if self.home is Tier.HOST else self._space.staging(slot).bytes
        return self._copy(self._space.working(slot).bytes, home, self._added)

    def _bring_home(self) -> int:
        """The prompt's tokens of a cell that stays on the host; later ones `update` brings, attention needs them."""
        shape, (old, new) = self._known(), self._added
        if self._new is not None:
            home = shape.views(self._home_memory(), self._capacity)
            for kept, given in zip(home, self._new, strict=True):
                kept[old:new].copy_(given.permute(2, 0, 1, 3))
            self._new = None
        return (new - old) * (shape.key_bytes + shape.value_bytes)

    def allocate(self, batch: int, key: tuple[int, int], value: tuple[int, int], dtype: torch.dtype) -> None:
        """Takes the home's memory for `capacity` tokens; `key` and `value` are (heads, head_dim).

        Raises:
            CapacityError: the tier or the disk is full.
        """
        self._shape = _Shape(batch, key, value, dtype)
        nbytes = self._shape.nbytes(self._capacity)
        if self.home is Tier.DISK:
            self._offset = self._space.spill.reserve(nbytes)
        else:
            self._memory = self._space.buffer(self.home)
            self._memory.ensure(nbytes)
        self.is_initialized = True

    def get(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Copies of keys and values, each (tokens, batch, heads, head_dim). No lane may be busy."""
        shape = self._known()
        if self.home is not Tier.DISK:
            keys, values = shape.views(self._home_memory(), self._capacity)
            return keys[: self.length].clone(), values[: self.length].clone()
        keys = torch.empty((self.length, shape.batch, *shape.key), dtype=shape.dtype)
        values = torch.empty((self.length, shape.batch, *shape.value), dtype=shape.dtype)
        self._space.spill.read(self._offset, _bytes(keys))
        self._space.spill.read(self._offset + shape.value_start(self._capacity), _bytes(values))
        return keys, values

    def put(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Replaces everything held; same axes as `get`, any number of rows. No lane may be busy."""
        shape, length = self._known(), keys.shape[0]
        if keys.shape[1] != shape.batch or length > self._capacity:
            self.discard()
            self._capacity = max(self._capacity, length)
            self.allocate(keys.shape[1], shape.key, shape.value, shape.dtype)
            shape = self._known()
        self.length = length
        if self.home is Tier.DISK:
            self._space.spill.write(self._offset, _bytes(keys))
            self._space.spill.write(self._offset + shape.value_start(self._capacity), _bytes(values))
            return
        for home, given in zip(shape.views(self._home_memory(), self._capacity), (keys, values), strict=True):
            home[:length].copy_(given)

    def select(self, rows: torch.Tensor) -> None:
        """Keeps the rows `rows` (a 1-d index, with repetitions if wanted). No lane may be busy."""
        if self._shape is None or self.length == 0:
            return
        keys, values = self.get()
        index = rows.to(keys.device)
        self.put(keys.index_select(1, index), values.index_select(1, index))

    def reserve(self, capacity: int) -> None:
        """Makes room for `capacity` tokens in all. No lane may be busy."""
        if capacity <= self._capacity:
            return
        if self._shape is None or self.length == 0:
            self.discard()
            self._capacity = capacity
            return
        keys, values = self.get()
        shape = self._shape
        self.discard()
        self._capacity = capacity
        self.allocate(shape.batch, shape.key, shape.value, shape.dtype)
        self.put(keys, values)

    def discard(self) -> None:
        """Gives back the home's memory and forgets everything. No lane may be busy."""
        if self._memory is not None:
            self._memory.free()
        # A region of the spill file that is given up stays in the file until the cache is closed.
        self._memory, self._shape, self.is_initialized, self.length = None, None, False, 0

    # ---------------------------------------------------------------------------------------------------------- inside
    @property
    def _first(self) -> int:
        """The first token that the next one sees, as in transformers' own sliding layers."""
        return 0 if self.window is None else max(0, self.length - self.window + 1)

    def _known(self) -> _Shape:
        if self._shape is None:
            raise RuntimeError("a cell was used before it had a shape")
        return self._shape

    def _home_memory(self) -> torch.Tensor:
        assert self._memory is not None
        return self._memory.bytes

    def _fits(self, keys: torch.Tensor, values: torch.Tensor) -> bool:
        if self._shape is None:
            return False
        given = _Shape(keys.shape[0], (keys.shape[1], keys.shape[3]), (values.shape[1], values.shape[3]), keys.dtype)
        if given != self._shape and self.length:
            raise UnsupportedModelError(f"keys and values changed from {self._shape} to {given} within one sequence")
        return given == self._shape

    def _grow(self, length: int) -> None:
        if length <= self._capacity:
            return
        if self.route.moves and self.length:
            # The slot holds what was loaded; growing goes through the home, which is complete up to `length`.
            self.reserve(max(length, self._capacity * 3 // 2))
            self._refill()
        else:
            shape = self._known()
            self.reserve(max(length, self._capacity * 3 // 2))
            if self._shape is None or not self.is_initialized:
                self.allocate(shape.batch, shape.key, shape.value, shape.dtype)

    def _refill(self) -> None:
        """Loads the slot again after the layout changed under it."""
        self._working()
        if self.route.read:
            self.read(self._slot)
        if self.route.push:
            self.push(self._slot)

    def _working(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values as compute sees them, each (capacity, batch, heads, head_dim)."""
        shape = self._known()
        if self._stays or not self.route.moves:
            return shape.views(self._home_memory(), self._capacity)
        if self._slot < 0:
            raise UnsupportedModelError("a layer used the cache of another layer, which is not loaded at that time")
        self._space.ensure_slot(self._slot, shape.nbytes(self._capacity))
        return shape.views(self._space.working(self._slot).bytes, self._capacity)

    @property
    def nbytes(self) -> int:
        """Bytes of the home."""
        return self._shape.nbytes(self._capacity) if self._shape is not None else 0

    @property
    def slot_bytes(self) -> int:
        """Bytes of a slot that this cell passes through; 0 if it is used where it lives."""
        return self.nbytes if self.route.moves else 0

    def _copy(self, source: torch.Tensor, target: torch.Tensor, tokens: _Tokens) -> int:
        shape, (old, new) = self._known(), tokens
        for given, wanted in zip(shape.views(source, self._capacity), shape.views(target, self._capacity), strict=True):
            wanted[old:new].copy_(given[old:new])
        return (new - old) * (shape.key_bytes + shape.value_bytes)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor, on the host, as a 1-d uint8 tensor."""
    return tensor.cpu().contiguous().view(-1).view(torch.uint8)
