"""What the cells of one block share: memory and a file for their homes, and the reused buffers that they pass through.

Knows tiers and bytes; knows nothing of attention and of transformers.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import NamedTuple

import torch

from .cell_layout import CellShape, kept_dtype
from .planning.budget import Need
from .policy import Compression, Tier
from .storage.buffers import Buffer
from .storage.files import SpillFile
from .storage.workspace import Workspace

__all__ = ["CacheSpace", "SlotBytes"]


class SlotBytes(NamedTuple):
    """Bytes of the reused buffers that a cell passes through.

    Args:
        staging: on the host, as the cell is kept.
        working: where compute is, in its dtype; 0 if compute uses the staging buffer itself.
    """

    staging: int = 0
    working: int = 0


class CacheSpace:
    """What the cells of one block share: the spill file, and the reused buffers that those pass through which move.

    Args:
        space: where the model computes and keeps its bytes.
        host_attention: cells that live on the host are attended to there.
        compression: in how many bits cells are kept.
        dtype: of compute.
        attends_kept: attention takes cells as they are kept (`planning.budget.attends_kept`).
    """

    def __init__(
        self,
        space: Workspace,
        host_attention: bool = False,
        compression: Compression | None = None,
        dtype: torch.dtype = torch.float32,
        attends_kept: bool = False,
    ) -> None:
        self._space = space
        self.direct = space.is_direct
        self.host_attention = host_attention and not space.is_direct
        self._compression = compression or Compression()
        kept = kept_dtype(dtype, self._compression)
        #: cells are not kept as compute uses them
        self.casts = kept != dtype
        self.attends_kept = attends_kept
        slots = range(space.rings.cache)
        self._staging = [space.staging("cache slots") for _ in slots]
        self._device_slots = [Buffer(space.ledger, Tier.DEVICE, space.device, "cache slots") for _ in slots]
        self._scratch = {
            tier: Buffer(space.ledger, tier, space.device, "cache scratch") for tier in (Tier.DEVICE, Tier.HOST)
        }
        self._bounce = Buffer(space.ledger, Tier.HOST, space.device, "cache scratch")
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

    @property
    def notes(self) -> list[str]:
        """What is done differently from what one would expect."""
        return [] if self._spill is None else self._spill.notes

    def shape(self, batch: int, key: tuple[int, int], value: tuple[int, int], dtype: torch.dtype) -> CellShape:
        """Shape of a cell whose keys and values are computed with in `dtype`."""
        return CellShape(batch, key, value, dtype, self._compression)

    def buffer(self, tier: Tier) -> Buffer:
        """A new home for a cell."""
        made = Buffer(self._space.ledger, tier, self._space.device, "KV cache")
        self._buffers.add(made)
        return made

    def staging(self, slot: int) -> torch.Tensor:
        """The host memory that a cell on disk passes through."""
        return self._staging[slot].bytes

    def working(self, slot: int) -> torch.Tensor:
        """The memory that compute sees."""
        return (self._staging if self.direct and not self.casts else self._device_slots)[slot].bytes

    def scratch(self, tier: Tier, nbytes: int) -> torch.Tensor:
        """Memory of a tier for what is done outside of lanes; what was in it may be lost."""
        return self._scratch[tier].ensure(nbytes)

    def bounce(self, nbytes: int) -> torch.Tensor:
        """Host memory that cells on disk pass through outside of lanes; what was in it is lost if it grows."""
        return self._bounce.ensure(nbytes)

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """As `Workspace.copy`."""
        self._space.copy(target, source)

    def finish_copies(self) -> None:
        """Waits until what this thread has copied is there."""
        self._space.finish_copies()

    def ensure_slot(self, slot: int, needs: SlotBytes) -> None:
        """Grows a slot; what was in it is lost if it grows, and no lane may be using it."""
        if needs.staging:
            self._staging[slot].ensure(needs.staging)
        if needs.working:
            self._device_slots[slot].ensure(needs.working)

    def ensure(self, needs: SlotBytes) -> None:
        """Grows all buffers that cells pass through; no lane may be using them."""
        for slot in range(self.num_slots):
            self.ensure_slot(slot, needs)

    def growth(self, needs: SlotBytes, bounce: int) -> Iterator[Need]:
        """What the buffers would take more if each had these bytes."""
        yield Need(Tier.HOST, max(0, bounce - self._bounce.nbytes), "cache scratch")
        wanted = [(buffer, needs.staging) for buffer in self._staging]
        wanted += [(buffer, needs.working) for buffer in self._device_slots]
        for buffer, nbytes in wanted:
            yield Need(buffer.tier, max(0, nbytes - buffer.nbytes), "cache slots")

    def holds(self, needs: SlotBytes) -> bool:
        """Whether every buffer has the bytes that are needed."""
        return all(buffer.nbytes >= needs.staging for buffer in self._staging) and all(
            buffer.nbytes >= needs.working for buffer in self._device_slots
        )

    def close(self) -> None:
        """Gives everything back, the file too."""
        reused = (*self._staging, *self._device_slots, *self._scratch.values(), self._bounce)
        for buffer in (*reused, *self._buffers):
            buffer.free()
        if self._spill is not None:
            self._spill.close()
