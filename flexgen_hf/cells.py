"""Cells: the keys and values of one layer for one micro-batch, each with a home tier.

A `Cell` is a transformers cache layer. It is allocated once for the longest sequence it will see and appended in place;
only new keys and values move home. Its tokens lie one after the other, `(tokens, batch, heads, head_dim)`, so that what
a step adds is contiguous in memory and in the file. A cell that is attended at home lies by heads, for attention reads
it so; all but the memory itself sees the same axes.

A cell on disk lies in its slot as it lies in its file: keys and values each begin on a page, and the slot holds all
from the first loaded token's page on. So whole pages can be moved, past the page cache, though a token's keys may end
anywhere: what is before a new token in its page is in the slot, what is behind it is not in use yet.

With compression a cell is kept in fewer bits than compute uses: cast to 16, or in groups of 2, 3, 4 or 8. Where
attention takes it as it is kept, it stays so (see `cell_attention`). Elsewhere it is cast, or unpacked, on the way to a
slot, also where no link is to be crossed, and what a step adds is cast or packed on the way back. The step itself sees
it in full precision, later ones see what was kept. What is kept is never cast or packed again: not when the cell moves,
nor when it grows or its rows change places.

A cell of a sliding-window layer keeps the window, and has room for a few tokens more. When these are used up, what is
still in the window is moved to the front: in memory where it lies, and if it lives on disk in its slot, which holds the
window at that time, and is then written as a whole.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from transformers.cache_utils import CacheLayerMixin

from .cell_attention import KeptStates
from .cell_layout import CellShape
from .cell_space import CacheSpace, SlotBytes
from .errors import UnsupportedModelError
from .planning.budget import EXCHANGE_BYTES, room_for
from .planning.schedule import Route
from .policy import Tier
from .storage.buffers import PAGE, Buffer, round_up, tensor_view

__all__ = ["Cell", "CellGrowth", "exchange"]

# First and last token of an update, the last excluded.
_Tokens = tuple[int, int]

# What is done to cells outside of sweeps goes through memory in blocks of tokens of about this size.
_BLOCK_BYTES = EXCHANGE_BYTES


class CellGrowth(NamedTuple):
    """Bytes that a cell takes to hold more tokens.

    Args:
        home: more than now.
        slots: of the buffers that it then passes through.
        bounce: of the host memory that its tokens pass through meanwhile, if it lives on disk.
    """

    home: int
    slots: SlotBytes
    bounce: int = 0


class Cell(CacheLayerMixin):  # type: ignore[no-untyped-call]  # its __init_subclass__
    """Keys and values of one layer for one micro-batch.

    Args:
        space: what the block's cells share.
        home: the tier it lives on.
        capacity: tokens it is allocated for; it grows if more come.
        window: of a sliding-window layer; only what is in the window is loaded and seen.
        keeps_past: what is out of the window is kept nevertheless, so that any number of tokens can be cropped.
    """

    is_compileable = False
    is_croppable = True

    def __init__(
        self, space: CacheSpace, home: Tier, capacity: int, window: int | None = None, *, keeps_past: bool = True
    ) -> None:
        # Not CacheLayerMixin.__init__: it would set keys and values, which are read-only here.
        self.home, self.length, self.window = home, 0, window
        self.is_sliding = window is not None
        self.is_initialized = False
        self.keeps_past = keeps_past or window is None
        #: whether what is added is brought home; nobody needs it if no further token follows
        self.keeps_new = True
        #: tokens that are forgotten; the next one lies at the front
        self.dropped = 0
        self._space, self._capacity = space, self._room(capacity)
        self._shape: CellShape | None = None
        self._memory: Buffer | None = None
        self._offset = 0
        self._slot = -1
        self._new: tuple[torch.Tensor, torch.Tensor] | None = None  # the prompt's, on their way home
        # places of the last update's tokens, and of what it changed at home; the first that is kept has place 0
        self._added: _Tokens = (0, 0)
        self._changed: _Tokens = (0, 0)

    # ---------------------------------------------------------------------------------------- what transformers calls
    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocates the home. Both arguments are (batch, heads, tokens, head_dim)."""
        batch, heads, _, dim = key_states.shape
        self.allocate(batch, (heads, dim), (value_states.shape[1], value_states.shape[3]), key_states.dtype)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends (batch, heads, new tokens, head_dim); returns what attention sees, in the same order of axes.

        If attention is to take the cell as it is kept, these are stand-ins (see `cell_attention`).
        """
        if not self._fits(key_states, value_states):
            self.discard()
            self.lazy_initialization(key_states, value_states)
        first, is_prompt, count = self._first, self.length == 0, key_states.shape[2]
        is_moved = self._make_room(count)
        kept = min(count, self.length + count - self.dropped)  # of a long prompt, only what later tokens see
        own = key_states[:, :, count - kept :], value_states[:, :, count - kept :]
        self.length += count
        new = self.held
        first, old = first - self.dropped, new - kept
        self._added, self._changed = (old, new), (0 if is_moved else old, new)
        if is_prompt and not self.keeps_new:
            return key_states, value_states
        if is_prompt and (self._stays or self._space.casts):  # attended as they are; `pull` brings them home meanwhile
            self._claim_slot()
            self._new = own
            return key_states, value_states
        if self._stays and self._space.casts:
            return self._as_kept(own, first, old)
        keys, values = self._working()
        keys[old:new].copy_(own[0].permute(2, 0, 1, 3))
        values[old:new].copy_(own[1].permute(2, 0, 1, 3))
        if is_prompt:
            return key_states, value_states
        return keys[first:new].permute(1, 2, 0, 3), values[first:new].permute(1, 2, 0, 3)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys that attention will see."""
        return self.length - self._first + query_length, self._first

    def get_seq_length(self) -> int:
        """Tokens seen, also those that are forgotten."""
        return self.length

    def get_max_length(self) -> int:
        """-1: a cell grows when it must."""
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last `-tokens_to_remove` tokens (transformers passes a negative number).

        Raises:
            UnsupportedModelError: tokens would come back into a window that are forgotten.
        """
        self.check_crop(tokens_to_remove)
        self.length = max(0, self.length + tokens_to_remove)

    def check_crop(self, tokens_to_remove: int) -> None:
        """Raises what `crop` would."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}): pass a negative number of tokens to remove")
        length = max(0, self.length + tokens_to_remove)
        if self.window is not None and max(0, length - self.window + 1) < self.dropped:
            raise UnsupportedModelError(
                f"crop({tokens_to_remove}): a layer with a window of {self.window} tokens has forgotten those before; "
                "call activate_past_recording() on the cache before tokens are added that will be removed"
            )

    def keep_past(self) -> None:
        """From now on, forgets nothing that is out of the window."""
        self.keeps_past = True

    def reset(self) -> None:
        """Forgets everything, keeps the memory."""
        self.length = self.dropped = 0

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
        """A copy of all keys that are kept, (batch, heads, tokens, head_dim), or None before the first update."""
        return self._restored(0)

    @property
    def values(self) -> torch.Tensor | None:  # type: ignore[override]
        """A copy of all values that are kept, (batch, heads, tokens, head_dim), or None before the first update."""
        return self._restored(1)

    # ------------------------------------------------------------------------------------------ what the executor calls
    @property
    def shape(self) -> CellShape:
        """How its rows are kept; only after it got a shape."""
        return self._known()

    @property
    def capacity(self) -> int:
        """Tokens that it has room for."""
        return self._capacity

    @property
    def held(self) -> int:
        """Tokens that are kept."""
        return self.length - self.dropped

    @property
    def route(self) -> Route:
        """The links that this cell crosses on its way to compute and back."""
        disk = self.home is Tier.DISK
        moved = self._space.casts or (not self._space.direct and self.home is not Tier.DEVICE)
        return Route(read=disk, push=moved and not self._stays, pull=moved, write=disk)

    @property
    def next_route(self) -> Route:
        """The links that it will cross in the next sweep: as long as it is empty, there is nothing to load."""
        route = self.route if self.length else self.route._replace(read=False, push=False)
        return route if self.keeps_new else route._replace(pull=False, write=False)

    @property
    def _stays(self) -> bool:
        """Whether attention comes to this cell where it is kept, instead of having it brought to where compute is."""
        return self._space.attends_kept or (self._space.host_attention and self.home is Tier.HOST)

    def bind(self, slot: int) -> None:
        """Says in which slot the cell's contents are (or will be made) when compute calls `update`."""
        self._slot = slot

    def read(self, slot: int) -> int:
        """Disk to host: the tokens that attention sees into the slot's staging buffer; returns the bytes."""
        shape, (first, last), moved = self._known(), self._seen, 0
        memory = self._space.staging(slot)
        for start, size in shape.parts(self._capacity):
            at = start + first * size  # of no tokens, their page is brought nevertheless: `write` needs it
            moved += self._space.spill.read_run(self._offset + at, memory, at, (last - first) * size)
        return moved

    def write(self, slot: int) -> int:
        """Host to disk: the tokens of the last update, or all if they were moved to the front; returns the bytes."""
        shape, (old, new), moved = self._known(), self._changed, 0
        memory = self._space.staging(slot)
        for start, size in shape.parts(self._capacity):
            at = start + old * size
            moved += self._space.spill.write_run(self._offset + at, memory, at, (new - old) * size)
        return moved

    def push(self, slot: int) -> int:
        """Home, or host, to the slot that compute sees: the tokens that attention sees; returns the bytes."""
        shape = self._known()
        working = shape.in_compute().views(self._space.working(slot), self._capacity)
        kept, tokens = self._kept(slot), self._seen
        for part, old, new in self._pieces(tokens):
            shape.restore(part, kept[part][old:new], working[part][old:new], self._space.copy)
        return self._bytes_of(tokens)

    def pull(self, slot: int) -> int:
        """The tokens of the last update to their home, or to the host on their way to disk; returns the bytes."""
        if self._new is not None:
            self._keep(slot, (self._new[0].permute(2, 0, 1, 3), self._new[1].permute(2, 0, 1, 3)))
            self._space.finish_copies()  # before their memory is given to others
            self._new = None
        elif not self._stays:  # else `update` brought them, attention needs them there
            self._keep(slot, self._known().in_compute().views(self._space.working(slot), self._capacity))
        return self._bytes_of(self._added)

    def allocate(self, batch: int, key: tuple[int, int], value: tuple[int, int], dtype: torch.dtype) -> None:
        """Takes the home's memory for `capacity` tokens.

        Args:
            batch: rows.
            key: heads and head_dim of keys.
            value: heads and head_dim of values.
            dtype: of compute.

        Raises:
            CapacityError: the tier or the disk is full.
        """
        shape = self._space.shape(batch, key, value, dtype)
        nbytes = shape.nbytes(self._capacity)
        if self.home is Tier.DISK:
            self._offset = self._space.spill.reserve(nbytes)
        else:
            self._memory = self._space.buffer(self.home)
            self._memory.ensure(nbytes)
        self._shape, self.is_initialized = shape, True

    def get(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Copies of keys and values as they are kept, each (tokens, batch, *row). No lane may be busy."""
        shape = self._known()
        if self.home is not Tier.DISK:
            keys, values = self._at_home()
            return keys[: self.held].clone(), values[: self.held].clone()
        keys, values = (torch.empty((self.held, shape.batch, *shape.row(k)), dtype=shape.dtype) for k in (0, 1))
        for part, wanted in enumerate((keys, values)):
            for old, new in self._blocks(part):
                wanted[old:new].copy_(self.block(part, (old, new)))
        return keys, values

    def put(self, keys: torch.Tensor, values: torch.Tensor, dropped: int) -> None:
        """Replaces everything held; same axes as `get`, any number of rows. No lane may be busy.

        Args:
            keys: of the tokens after those that are forgotten.
            values: theirs.
            dropped: tokens that are forgotten.
        """
        shape, held = self._known(), keys.shape[0]
        if keys.shape[1] != shape.batch or held > self._capacity:
            self.discard()
            self._capacity = max(self._capacity, held)
            self.allocate(keys.shape[1], shape.key, shape.value, shape.compute_dtype)
            shape = self._known()
        self.dropped, self.length = dropped, dropped + held
        for part, given in enumerate((keys, values)):
            for old, new in self._blocks(part):
                self.block(part, (old, new), load=False).copy_(given[old:new])
                self.store_block(part, (old, new))
        self._space.finish_copies()

    def block(self, part: int, tokens: _Tokens, load: bool = True) -> torch.Tensor:
        """Some tokens' keys (part 0) or values (part 1), (tokens, batch, *row), where they are kept.

        Those of a cell on disk are in a buffer that the next call reuses. No lane may be busy.

        Args:
            part: 0 for keys, 1 for values.
            tokens: first and last one, excluded; on disk the first begins on a page.
            load: whether they are wanted, or only the place for others, which `store_block` brings home.
        """
        shape, (old, new) = self._known(), tokens
        if self.home is not Tier.DISK:
            return self._at_home()[part][old:new]
        start, size = shape.parts(self._capacity)[part]
        memory = self._space.bounce((new - old) * size)
        if load:
            self._space.spill.read_run(self._offset + start + old * size, memory, 0, (new - old) * size)
        return tensor_view(memory, 0, shape.dtype, (new - old, shape.batch, *shape.row(part)))

    def store_block(self, part: int, tokens: _Tokens) -> None:
        """Brings home what was put in the place that `block` returned for the same tokens. No lane may be busy."""
        if self.home is not Tier.DISK:
            return
        (start, size), (old, new) = self._known().parts(self._capacity)[part], tokens
        nbytes = (new - old) * size
        self._space.spill.write_run(self._offset + start + old * size, self._space.bounce(nbytes), 0, nbytes)

    def select(self, rows: torch.Tensor) -> None:
        """Keeps the rows `rows` (a 1-d index, with repetitions if wanted). No lane may be busy."""
        if self._shape is None or self.length == 0:
            return
        if rows.numel() == self._shape.batch:
            if not torch.equal(rows.cpu(), torch.arange(rows.numel())):
                exchange([self], [rows])
            return
        keys, values = self.get()
        index = rows.to(keys.device)
        self.put(keys.index_select(1, index), values.index_select(1, index), self.dropped)

    def growth(self, tokens: int) -> CellGrowth:
        """The most that it would take to get `tokens` tokens in all."""
        capacity = self._grown(self._room(tokens))
        if self._shape is None or capacity == self._capacity:
            return CellGrowth(0, self.slot_bytes)
        blocks = [
            (new - old) * size
            for part, (_, size) in enumerate(self._shape.parts(0))
            for old, new in (self._blocks(part) if self.home is Tier.DISK else ())
        ]
        before, after = self.nbytes, self._shape.nbytes(capacity)
        if self.home is Tier.DISK and after > before:
            before = 0  # what it gives back is too small for it, unless it lies beside another such part
        return CellGrowth(after - before, self._slot_bytes(capacity), round_up(max(blocks, default=0)))

    def reserve(self, capacity: int) -> None:
        """Makes room for `capacity` tokens in all. No lane may be busy."""
        self._enlarge(self._room(capacity))

    def _enlarge(self, places: int) -> None:
        """Makes room for so many tokens at once."""
        if places <= self._capacity:
            return
        if self._shape is None or self.length == 0:
            self.discard()
            self._capacity = places
            return
        keys, values = self.get()
        shape, dropped = self._shape, self.dropped
        self.discard()
        self._capacity = places
        self.allocate(shape.batch, shape.key, shape.value, shape.compute_dtype)
        self.put(keys, values, dropped)

    def discard(self) -> None:
        """Gives back the home's memory and forgets everything. No lane may be busy."""
        if self._memory is not None:
            self._memory.free()
        if self._shape is not None and self.home is Tier.DISK:
            self._space.spill.release(self._offset, self.nbytes)
        self._memory, self._shape, self.is_initialized, self.length, self.dropped = None, None, False, 0, 0

    # ---------------------------------------------------------------------------------------------------------- inside
    @property
    def _first(self) -> int:
        """The first token that the next one sees, as in transformers' own sliding layers."""
        return 0 if self.window is None else max(0, self.length - self.window + 1)

    @property
    def _seen(self) -> _Tokens:
        """Places of what the next token sees."""
        return self._first - self.dropped, self.held

    def _known(self) -> CellShape:
        if self._shape is None:
            raise RuntimeError("a cell was used before it had a shape")
        return self._shape

    @property
    def _is_attended_at_home(self) -> bool:
        """Whether attention reads the home itself: it is in the dtype of compute, and not moved."""
        return not self._space.casts and (self._stays or not self.route.moves)

    def _at_home(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a cell that is not on disk, each (capacity, batch, *row)."""
        assert self._memory is not None
        return self._known().views(self._memory.bytes, self._capacity, by_heads=self._is_attended_at_home)

    def _kept(self, slot: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values at home, or of a cell on disk in the slot's staging buffer."""
        if self.home is not Tier.DISK:
            return self._at_home()
        return self._known().views(self._space.staging(slot), self._capacity)

    def _fits(self, keys: torch.Tensor, values: torch.Tensor) -> bool:
        if self._shape is None:
            return False
        heads = (keys.shape[1], keys.shape[3]), (values.shape[1], values.shape[3])
        given = self._space.shape(keys.shape[0], *heads, keys.dtype)
        if given != self._shape and self.length:
            raise UnsupportedModelError(f"keys and values changed from {self._shape} to {given} within one sequence")
        return given == self._shape

    def _room(self, tokens: int) -> int:
        """Places that are needed to get so many tokens in all, one after the other."""
        return tokens - self.dropped if self.keeps_past else room_for(tokens, self.window)

    def _grown(self, places: int) -> int:
        """Places that the cell has once it needs so many; with every step it grows by half."""
        return self._capacity if places <= self._capacity else max(places, self._capacity * 3 // 2)

    def _make_room(self, count: int) -> bool:
        """Room for so many new tokens; returns whether what is kept was moved to the front for it."""
        new, is_moved = self.length + count, False
        if new - self.dropped > self._capacity and not self.keeps_past:
            assert self.window is not None
            if self.length == 0:
                self.dropped = max(0, new - max(1, self.window - 1))
            elif is_moved := self._first > self.dropped and new - self._first <= self._capacity:
                self._move_to_front()
        if (places := new - self.dropped) > self._capacity:
            self._grow(places)
        return is_moved

    def _move_to_front(self) -> None:
        """Forgets what is out of the window, and moves what is in it to the front, wherever it lies just now."""
        old, end = self._seen
        if self.home is Tier.DISK:
            self._claim_slot()
        lying = [self._kept(self._slot)]
        if self.route.push:
            lying.append(self._known().in_compute().views(self._space.working(self._slot), self._capacity))
        for part in (part for parts in lying for part in parts):
            part[: end - old].copy_(part[old:end].clone())
        self.dropped += old

    def _grow(self, places: int) -> None:
        if self.route.moves and self.length:
            # The slot holds what was loaded; growing goes through the home, which is complete up to `length`.
            self._enlarge(self._grown(places))
            self._refill()
        else:
            shape, dropped = self._known(), self.dropped
            self._enlarge(self._grown(places))
            if self._shape is None or not self.is_initialized:
                self.allocate(shape.batch, shape.key, shape.value, shape.compute_dtype)
            self.dropped = dropped

    def _refill(self) -> None:
        """Loads the slot again after the layout changed under it."""
        self._claim_slot()
        if self.route.read:
            self.read(self._slot)
        if self.route.push:
            self.push(self._slot)

    def _claim_slot(self) -> None:
        """Makes sure that the cell is in a slot, as large as it must be."""
        if self._slot < 0:
            raise UnsupportedModelError("a layer used the cache of another layer, which is not loaded at that time")
        self._space.ensure_slot(self._slot, self.slot_bytes)

    def _working(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values as compute sees them, each (capacity, batch, heads, head_dim)."""
        if self._stays or not self.route.moves:
            return self._at_home()
        self._claim_slot()
        return self._known().in_compute().views(self._space.working(self._slot), self._capacity)

    def _as_kept(
        self, states: tuple[torch.Tensor, torch.Tensor], first: int, old: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Brings new tokens to where the cell is kept; stand-ins for everything from place `first` on."""
        if self.home is Tier.DISK:
            self._claim_slot()
        shape, kept = self._known(), self._kept(self._slot)
        own = states[0].to(kept[0].device), states[1].to(kept[1].device)
        for part, given in enumerate(own):
            shape.keep(part, given.permute(2, 0, 1, 3), kept[part][old : self.held], self._space.copy)
        return KeptStates(shape, (kept[0][first:old], kept[1][first:old]), own).stand_ins()

    @property
    def nbytes(self) -> int:
        """Bytes of the home."""
        return self._shape.nbytes(self._capacity) if self._shape is not None else 0

    @property
    def slot_bytes(self) -> SlotBytes:
        """Bytes of the buffers that this cell passes through; none if it is used where it lives."""
        return self._slot_bytes(self._capacity)

    def _slot_bytes(self, capacity: int) -> SlotBytes:
        if self._shape is None or not self.route.moves:
            return SlotBytes()
        seen = self._shape.in_compute().nbytes(capacity)
        staging = self._shape.nbytes(capacity) if self.home is Tier.DISK else 0
        return SlotBytes(staging=staging, working=seen if self.route.push else 0)

    def _blocks(self, part: int) -> Iterator[_Tokens]:
        return _blocks(self.held, [self._known().parts(0)[part][1]], self.home is Tier.DISK)

    def _bytes_of(self, tokens: _Tokens) -> int:
        """Of the tokens at these places."""
        shape = self._known()
        return (tokens[1] - tokens[0]) * (shape.token_bytes(0) + shape.token_bytes(1))

    def _pieces(self, tokens: _Tokens) -> Iterator[tuple[int, int, int]]:
        """Cuts the keys (part 0) and values (part 1) of some tokens into (part, first, last one excluded).

        What is cast, packed or rearranged between devices goes through memory of its own: only a block at a time.
        """
        seen = self._known().in_compute()
        for part in range(2):
            passes = self._space.casts or self._stays
            step = max(1, _BLOCK_BYTES // seen.token_bytes(part) if passes else tokens[1])
            for old in range(*tokens, step):
                yield part, old, min(old + step, tokens[1])

    def _keep(self, slot: int, states: Sequence[torch.Tensor]) -> None:
        """Keys and values of the last update to where they are kept; `states` holds those of all tokens."""
        shape, kept = self._known(), self._kept(slot)
        for part, old, new in self._pieces(self._added):
            shape.keep(part, states[part][old:new], kept[part][old:new], self._space.copy)

    def _restored(self, part: int) -> torch.Tensor | None:
        """A copy of all keys (part 0) or values (part 1) as compute sees them, (batch, heads, tokens, head_dim)."""
        if self._shape is None:
            return None
        rows = self.get()[part]
        states = torch.empty(
            (*rows.shape[:2], *self._shape.in_compute().row(part)), dtype=self._shape.compute_dtype, device=rows.device
        )
        self._shape.restore(part, rows, states, self._space.copy)
        self._space.finish_copies()
        return states.permute(1, 2, 0, 3)


def exchange(cells: Sequence[Cell], rows: Sequence[torch.Tensor]) -> None:
    """Row i of a cell becomes what row `rows[k][i]` of all cells, one behind the other, was; no lane may be busy.

    In place and in blocks of tokens, through a few MB of reused memory. The cells belong to one layer and hold equally
    many tokens.

    Args:
        cells: the cells.
        rows: for each cell a 1-d index with as many entries as the cell has rows.
    """
    space, shapes = cells[0]._space, [cell._known() for cell in cells]
    ends = list(itertools.accumulate(shape.batch for shape in shapes))
    tier = Tier.DEVICE if all(cell.home is Tier.DEVICE for cell in cells) else Tier.HOST
    for part in range(2):
        sizes = [shape.parts(0)[part][1] for shape in shapes]
        for old, new in _blocks(cells[0].held, sizes, any(cell.home is Tier.DISK for cell in cells)):
            memory = space.scratch(tier, (new - old) * sum(sizes))
            pool = tensor_view(memory, 0, shapes[0].dtype, (new - old, ends[-1], *shapes[0].row(part)))
            for cell, shape, end in zip(cells, shapes, ends, strict=True):
                pool[:, end - shape.batch : end].copy_(cell.block(part, (old, new)))
            for cell, index in zip(cells, rows, strict=True):
                place, wanted = cell.block(part, (old, new), load=False), index.to(pool.device)
                if place.device == pool.device:
                    torch.index_select(pool, 1, wanted, out=place)
                else:
                    place.copy_(pool.index_select(1, wanted))
                cell.store_block(part, (old, new))
    space.finish_copies()


def _blocks(length: int, sizes: Sequence[int], in_pages: bool) -> Iterator[_Tokens]:
    """Cuts tokens into blocks of a few MB.

    Args:
        length: how many tokens.
        sizes: bytes of a token in each of the cells that are gone through together.
        in_pages: each block is to begin on a page in all of them.
    """
    pages = max(PAGE // math.gcd(PAGE, size) for size in sizes) if in_pages else 1  # powers of two: multiples of all
    step = pages * max(1, _BLOCK_BYTES // (sum(sizes) * pages))
    for old in range(0, length, step):
        yield old, min(old + step, length)
