"""Weights in their tiers: keeps what has a home in memory, and brings the rest to the device stage by stage.

Knows names, bytes and where they lie; knows no module. Files are read by extents, so a Hugging Face safetensors
checkpoint and a store of ours are the same thing here.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch

from ..planning.placement import realised
from ..planning.schedule import Route
from ..policy import Tier
from ..storage.buffers import PAGE, Buffer, round_up, tensor_view
from ..storage.files import Files
from ..storage.workspace import Workspace
from .format import TensorExtent
from .pieces import torch_dtype

__all__ = ["StoredTensor", "WeightStore"]

# Tensors this close together in a file are read with the bytes between them: one request is cheaper than two.
_GAP_BYTES = 16 << 10


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor of the model and where its bytes lie.

    Args:
        name: its state-dict name.
        stage: 0 the embedding, 1..L the decoder layers, L+1 the head.
        extent: the bytes in a safetensors file.
        dtype: what it is computed in; differs from the stored one when the model was loaded with another dtype.
    """

    name: str
    stage: int
    extent: TensorExtent
    dtype: torch.dtype

    @property
    def stored_dtype(self) -> torch.dtype:
        """Element type in the file."""
        return torch_dtype(self.extent.dtype)

    @property
    def stored_bytes(self) -> int:
        """Size in the file."""
        return self.extent.nbytes

    @property
    def device_bytes(self) -> int:
        """Size in the dtype it is computed in."""
        return self.extent.nbytes // self.stored_dtype.itemsize * self.dtype.itemsize

    @property
    def is_cast(self) -> bool:
        """Whether it is stored in another dtype than it is computed in."""
        return self.stored_dtype != self.dtype


@dataclasses.dataclass(frozen=True)
class _Run:
    """A contiguous part of a file that is read with one request into one part of a staging buffer."""

    file: Path
    offset: int
    nbytes: int
    at: int


@dataclasses.dataclass
class _Stage:
    """The streamed weights of one stage: where each byte is, in which slot it arrives."""

    host: list[tuple[StoredTensor, int]] = dataclasses.field(default_factory=list)  # with offset in the host arena
    disk: list[tuple[StoredTensor, int]] = dataclasses.field(default_factory=list)  # with offset in the staging buffer
    runs: list[_Run] = dataclasses.field(default_factory=list)
    pushed: list[tuple[StoredTensor, int]] = dataclasses.field(default_factory=list)  # with offset in the device slot
    arena: Buffer | None = None
    staging_bytes: int = 0
    device_bytes: int = 0

    @property
    def route(self) -> Route:
        return Route(read=bool(self.runs), push=bool(self.pushed))


class WeightStore:
    """All weights of a model, each in its home tier.

    Args:
        tensors: every tensor once (a tied one under the name of its source).
        homes: the tier of each tensor name.
        num_stages: decoder layers + 2.
        tied: the head uses the embedding's table.
        space: where the model computes and keeps its bytes.
    """

    def __init__(
        self,
        tensors: Sequence[StoredTensor],
        homes: Mapping[str, Tier],
        *,
        num_stages: int,
        tied: bool,
        space: Workspace,
    ) -> None:
        self.tied, self._space = tied, space
        self._files = Files()
        self._tensors, self._homes = list(tensors), dict(homes)
        self._resident: dict[str, torch.Tensor] = {}
        self._resident_bytes = self._disk_bytes = 0  # as the account has them
        self._stages = [_Stage() for _ in range(num_stages)]
        for stage, members in enumerate(self._by_stage(num_stages)):
            self._stages[stage] = self._lay_out(members)
        self._slots = self._make_slots()

    # -------------------------------------------------------------------------------------------------- what there is
    @property
    def placement(self) -> dict[Tier, int]:
        """Stored bytes whose home is each tier."""
        return realised([(t.name, t.stored_bytes) for t in self._tensors], self._homes)

    @property
    def streamed_bytes(self) -> int:
        """Bytes read from disk in one sweep."""
        return sum(t.stored_bytes for t in self._tensors if self._homes[t.name] is Tier.DISK)

    def routes(self) -> tuple[Route, ...]:
        """The links that each stage's weights cross in the next sweep."""
        return tuple(stage.route for stage in self._stages)

    def resident(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors whose home is the device, by name."""
        yield from self._resident.items()

    def tensors(self, stage: int, slot: int) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors of a stage that are not resident, by name, as they arrived in `slot`."""
        plan = self._stages[stage]
        pushed = {tensor.name for tensor, _ in plan.pushed}
        staging, device = self._buffers(stage, slot)
        for memory, part in ((plan.arena, plan.host), (staging, plan.disk)):
            for tensor, at in part:
                if tensor.name not in pushed:
                    assert memory is not None
                    yield tensor.name, tensor_view(memory.bytes, at, tensor.stored_dtype, tensor.extent.shape)
        for tensor, at in plan.pushed:
            assert device is not None
            yield tensor.name, tensor_view(device.bytes, at, tensor.dtype, tensor.extent.shape)

    # ------------------------------------------------------------------------------------------------------ moving it
    def load_homes(self, progress: Callable[[int], None] | None = None) -> None:
        """Fills the device and host tiers from disk; called once.

        Raises:
            CapacityError: a tier cannot take what the placement gives it.
            StoreError: a file is missing or broken.
        """
        self._space.ledger.take(Tier.DISK, self.streamed_bytes, "weights")
        self._disk_bytes = self.streamed_bytes
        for buffers in self._slots.values():
            for buffer, nbytes in buffers:
                if nbytes:
                    buffer.ensure(nbytes)
        for loaded in itertools.chain(self._fill_arenas(), self._make_resident()):
            if progress is not None:
                progress(loaded)

    def read(self, stage: int, slot: int) -> int:
        """Disk to host: the stage's streamed bytes into a staging buffer; returns how many."""
        staging, _ = self._buffers(stage, slot)
        assert staging is not None
        moved = 0
        for run in self._stages[stage].runs:
            moved += self._files.read_run(run.file, run.offset, staging.bytes, run.at, run.nbytes)
        return moved

    def push(self, stage: int, slot: int) -> int:
        """Host to device, cast to the dtype of compute on the way; returns the bytes that crossed."""
        plan = self._stages[stage]
        staging, device = self._buffers(stage, slot)
        assert device is not None
        sources = {t.name: (plan.arena, at) for t, at in plan.host} | {t.name: (staging, at) for t, at in plan.disk}
        moved = 0
        for tensor, at in plan.pushed:
            memory, start = sources[tensor.name]
            assert memory is not None
            source = tensor_view(memory.bytes, start, tensor.stored_dtype, tensor.extent.shape)
            tensor_view(device.bytes, at, tensor.dtype, tensor.extent.shape).copy_(source)
            moved += tensor.stored_bytes
        return moved

    def fetch_now(self, stage: int, slot: int = 0) -> None:
        """Reads and pushes a stage in the calling thread; no lane may be using its slot."""
        route = self.routes()[stage]
        if route.read:
            self.read(stage, slot)
        if route.push:
            self.push(stage, slot)

    @property
    def notes(self) -> list[str]:
        """What is done differently from what one would expect."""
        folders = sorted({str(path.parent) for path in self._files.cached})
        return [f"reads go through the page cache: {folder} does not allow O_DIRECT" for folder in folders]

    @property
    def stored(self) -> list[StoredTensor]:
        """Every tensor, wherever its home is; all of them can be read from their files."""
        return list(self._tensors)

    def close(self) -> None:
        """Closes files and gives all memory back."""
        self._files.close()
        for buffers in self._slots.values():
            for buffer, _ in buffers:
                buffer.free()
        for plan in self._stages:
            if plan.arena is not None:
                plan.arena.free()
        self._space.ledger.give(Tier.DEVICE, self._resident_bytes, "weights")
        self._space.ledger.give(Tier.DISK, self._disk_bytes, "weights")
        self._resident, self._resident_bytes, self._disk_bytes = {}, 0, 0

    # --------------------------------------------------------------------------------------------------------- layout
    def _by_stage(self, num_stages: int) -> list[list[StoredTensor]]:
        members: list[list[StoredTensor]] = [[] for _ in range(num_stages)]
        for tensor in self._tensors:
            members[tensor.stage].append(tensor)
        return members

    def _lay_out(self, members: Sequence[StoredTensor]) -> _Stage:
        plan, at = _Stage(), 0
        for tensor in members:
            if self._homes[tensor.name] is Tier.HOST:
                plan.host.append((tensor, at))
                at += round_up(tensor.stored_bytes, 64)
        if plan.host:
            plan.arena = Buffer(self._space.ledger, Tier.HOST, self._space.device, "weights")
        disk = [tensor for tensor in members if self._homes[tensor.name] is Tier.DISK]
        plan.runs, plan.disk, plan.staging_bytes = _runs(disk)
        at = 0
        for tensor, _ in (*plan.host, *plan.disk):
            if not self._space.is_direct or tensor.is_cast:
                plan.pushed.append((tensor, at))
                at += round_up(tensor.device_bytes, 64)
        plan.device_bytes = at
        return plan

    def _make_slots(self) -> dict[tuple[str, int], list[tuple[Buffer, int]]]:
        """For each slot a staging buffer on the host and one on the device, with the bytes they must hold."""
        slots = {}
        for ring, size, stages in (
            ("layers", self._space.rings.layers, self._stages[1:-1]),
            ("outer", self._space.rings.outer, [self._stages[0], self._stages[-1]]),
        ):
            staging = max((plan.staging_bytes for plan in stages), default=0)
            device = max((plan.device_bytes for plan in stages), default=0)
            for slot in range(size):
                slots[ring, slot] = [
                    (Buffer(self._space.ledger, Tier.HOST, self._space.device, "weight slots"), staging),
                    (Buffer(self._space.ledger, Tier.DEVICE, self._space.device, "weight slots"), device),
                ]
        return slots

    def _key(self, stage: int, slot: int) -> tuple[str, int]:
        return ("outer" if stage in (0, len(self._stages) - 1) else "layers"), slot

    def _buffers(self, stage: int, slot: int) -> tuple[Buffer | None, Buffer | None]:
        plan = self._stages[stage]
        if slot < 0 or not plan.route.moves:
            return None, None
        (staging, _), (device, _) = self._slots[self._key(stage, slot)]
        return staging, device

    def _fill_arenas(self) -> Iterator[int]:
        for plan in self._stages:
            if plan.arena is not None:
                memory = plan.arena.ensure(sum(round_up(t.stored_bytes, 64) for t, _ in plan.host))
                for tensor, at in plan.host:
                    part = memory[at : at + tensor.stored_bytes]
                    yield self._files.read(tensor.extent.file, tensor.extent.offset, part)

    def _make_resident(self) -> Iterator[int]:
        for tensor in self._tensors:
            if self._homes[tensor.name] is Tier.DEVICE:
                self._space.ledger.take(Tier.DEVICE, tensor.device_bytes, "weights")
                self._resident_bytes += tensor.device_bytes
                memory = torch.empty(tensor.stored_bytes, dtype=torch.uint8)
                yield self._files.read(tensor.extent.file, tensor.extent.offset, memory)
                value = memory.view(tensor.stored_dtype).view(tensor.extent.shape)
                self._resident[tensor.name] = value.to(device=self._space.device, dtype=tensor.dtype)


def _runs(tensors: Sequence[StoredTensor]) -> tuple[list[_Run], list[tuple[StoredTensor, int]], int]:
    """Groups extents into long reads, and says where in a staging buffer each tensor lands.

    A run begins in the buffer at the same distance from a page boundary as in the file, so that the file's alignment
    carries over.
    """
    runs: list[_Run] = []
    places: list[tuple[StoredTensor, int]] = []
    for tensor in sorted(tensors, key=lambda t: (str(t.extent.file), t.extent.offset)):
        extent, last = tensor.extent, runs[-1] if runs else None
        end = last.offset + last.nbytes if last is not None else 0
        if last is not None and last.file == extent.file and 0 <= extent.offset - end <= _GAP_BYTES:
            runs[-1] = dataclasses.replace(last, nbytes=extent.offset + extent.nbytes - last.offset)
        else:
            at = round_up(last.at + last.nbytes) if last is not None else 0
            runs.append(_Run(extent.file, extent.offset, extent.nbytes, at + extent.offset % PAGE))
        places.append((tensor, runs[-1].at + extent.offset - runs[-1].offset))
    size = round_up(runs[-1].at + runs[-1].nbytes) if runs else 0
    return runs, places, size
