"""Weights in their tiers: keeps what has a home in memory, and brings the rest to the device stage by stage.

Knows names, bytes and where they lie; knows no module. Files are read by extents, so a Hugging Face safetensors
checkpoint and a store of ours are the same thing here.

A quantized tensor stays quantized in its home, the device's too, and on its way. It moves in parts of whole rows, each
of which is dequantized into the slot when it has arrived: what compute finds there is the same either way.

What is loaded together is a *unit*: a stage without its experts, or one expert of a stage.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from ..planning.budget import TILE_BYTES, Need
from ..planning.layout import SMALL_BYTES, size_of_pieces
from ..planning.placement import realised
from ..planning.schedule import Route
from ..policy import Tier
from ..quantization import dispatch
from ..quantization.groupwise import GroupFormat, Quantized, as_rows
from ..storage.buffers import Buffer, host_memory, round_up, tensor_view
from ..storage.files import Files
from ..storage.workspace import Workspace
from .cuts import Piece, cut, in_file_order, parts_of, runs_of
from .dequantizing import Dequantizer, parts_bytes, rows_at
from .pieces import torch_dtype
from .quantized import QuantizedExtent
from .tensors import StoredTensor, Unit

__all__ = ["WeightStore"]

# Resident tensors from this size on lie in pages of their own.
_LARGE_BYTES = 1 << 20


@dataclasses.dataclass
class _Plan:
    """The streamed weights of one unit: where each byte is, in which slot it arrives."""

    host: list[tuple[StoredTensor, int]] = dataclasses.field(default_factory=list)  # with offset in the host arena
    # read where they are used, each part at its offset in the host slot
    in_place: list[tuple[StoredTensor, Sequence[int]]] = dataclasses.field(default_factory=list)
    pushed: dict[str, tuple[StoredTensor, int]] = dataclasses.field(default_factory=dict)  # offset in the device slot
    from_codes: list[StoredTensor] = dataclasses.field(default_factory=list)  # multiplied as they are kept
    pieces: list[Piece] = dataclasses.field(default_factory=list)
    arena: Buffer | None = None
    host_bytes: int = 0  # of the slot that tensors are read into in place
    device_bytes: int = 0

    @property
    def arena_bytes(self) -> int:
        """Size of the host arena."""
        return sum(tensor.home_bytes for tensor, _ in self.host)


class WeightStore:
    """All weights of a model, each in its home tier.

    Args:
        tensors: every tensor once (a tied one under the name of its source), or instead of it its parts.
        homes: the tier of each tensor name.
        whole: the tensors of the model, none in parts; those above if they are not given.
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
        whole: Sequence[StoredTensor] | None = None,
    ) -> None:
        self.tied, self._space, self._num_stages = tied, space, num_stages
        self._files = Files()
        self._tensors, self._homes = list(tensors), dict(homes)
        self._whole = self._tensors if whole is None else list(whole)
        self._resident: dict[str, torch.Tensor] = {}
        self._resident_of: dict[Unit, list[str]] = {}
        self._dequantizer = Dequantizer(space)
        self._taken: list[Need] = []  # in the account, beside buffers
        #: how often each tensor was cast to the dtype of compute
        self.casts: collections.Counter[str] = collections.Counter()
        #: how often each quantized tensor was dequantized
        self.dequantizations = self._dequantizer.counts
        members = self._by_unit()
        layers: collections.Counter[int] = collections.Counter()
        for tensor in self._tensors:
            layers[tensor.stage] += tensor.stored_bytes if 0 < tensor.stage < num_stages - 1 else 0
        self._piece_bytes = size_of_pieces(layers.values(), direct=space.is_direct)
        self._plans = {unit: self._lay_out(tensors) for unit, tensors in members.items()}
        self._slots = self._make_slots()
        self._staging = [space.staging("weight staging") for _ in range(space.rings.pieces)]

    # -------------------------------------------------------------------------------------------------- what there is
    @property
    def placement(self) -> dict[Tier, int]:
        """Stored bytes whose home is each tier."""
        return realised([(t.name, t.stored_bytes) for t in self._tensors], self._homes)

    @property
    def streamed_bytes(self) -> int:
        """Bytes read from disk in one sweep."""
        return sum(t.stored_bytes for t in self._tensors if self._homes[t.name] is Tier.DISK)

    @property
    def _staging_bytes(self) -> int:
        """Size of each staging buffer, that of the largest piece that passes through one."""
        return max((piece.staging_bytes for plan in self._plans.values() for piece in plan.pieces), default=0)

    @property
    def _arrived_bytes(self) -> int:
        """On a device apart from the host, room for the parts of a piece that is to be dequantized there."""
        if self._space.is_direct:
            return 0
        segments = (s for plan in self._plans.values() for piece in plan.pieces for s in piece.segments if s.at)
        quantized = ((s.tensor.extent, s.count) for s in segments)
        return max((parts_bytes(e, count) for e, count in quantized if isinstance(e, QuantizedExtent)), default=0)

    @property
    def _scratch_bytes(self) -> int:
        """What dequantizing allocates meanwhile: its own scratch, and tiles of what is multiplied from its codes."""
        is_used = any(tensor.is_quantized for tensor in self._tensors)
        late = (t.device_bytes for t in self._tensors if t.is_quantized and t.is_late)
        tiles = min(TILE_BYTES, max(late, default=0))
        return tiles + (dispatch.scratch_bytes(self._space.device) if is_used else 0)

    @property
    def needs(self) -> list[Need]:
        """What `load_homes` takes of each tier: homes, slots and staging."""
        slots = [size for buffers in self._slots.values() for size in buffers if size[1]]
        arenas = (plan.arena_bytes for plan in self._plans.values() if plan.host)
        resident = sum(t.resident_bytes for t in self._tensors if self._homes[t.name] is Tier.DEVICE)
        needs = [Need(Tier.DISK, self.streamed_bytes, "weights")]
        needs += [Need(buffer.tier, round_up(nbytes), "weight slots") for buffer, nbytes in slots]
        needs.append(Need(Tier.HOST, len(self._staging) * self._staging_bytes, "weight staging"))
        needs.append(Need(Tier.DEVICE, round_up(self._arrived_bytes), "weight staging"))
        needs.append(Need(Tier.DEVICE, self._scratch_bytes, "dequantizing"))
        needs.append(Need(Tier.HOST, sum(map(round_up, arenas)), "weights"))
        needs.append(Need(Tier.DEVICE, resident, "weights"))
        return [need for need in needs if need.nbytes]

    def routes(self) -> tuple[tuple[Route, ...], ...]:
        """For each stage the links that each piece of its weights, experts left out, crosses in a sweep."""
        return tuple(self.routes_of(Unit(stage)) for stage in range(self._num_stages))

    def routes_of(self, unit: Unit) -> tuple[Route, ...]:
        """The links that each piece of a unit crosses."""
        return tuple(piece.route for piece in self._plans[unit].pieces)

    def bytes_from_disk(self, unit: Unit) -> int:
        """What is read to load a unit."""
        return sum(run.nbytes for piece in self._plans[unit].pieces for run in piece.runs)

    def late(self, stage: int) -> list[str]:
        """Matrices of a stage that arrive in another form than that of compute, to be multiplied tile by tile."""
        return [tensor.name for tensor in self._tensors if tensor.unit == Unit(stage) and tensor.is_late]

    def resident(self, unit: Unit | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors of a unit, or of all stages, that are on the device as compute needs them, by name."""
        names = self._resident_of
        units = [unit] if unit is not None else [unit for unit in names if unit.expert < 0]
        yield from ((name, self._resident[name]) for unit in units for name in names.get(unit, ()))

    def tensors(self, unit: Unit, slot: int) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors of a unit that are not resident, by name, as they arrived in `slot`."""
        plan = self._plans[unit]
        host, device = self._buffers(unit, slot)
        in_place = [(tensor, places[0]) for tensor, places in plan.in_place]
        for memory, part in ((plan.arena, plan.host), (host, in_place)):
            for tensor, at in part:
                if tensor.name not in plan.pushed and not tensor.is_quantized:
                    assert memory is not None
                    value = tensor_view(memory.bytes, at, tensor.stored_dtype, tensor.extent.shape)
                    self.casts[tensor.name] += tensor.is_cast
                    yield tensor.name, value.to(tensor.dtype)
        for tensor, at in plan.pushed.values():
            assert device is not None
            yield tensor.name, tensor_view(device.bytes, at, tensor.dtype, tensor.extent.shape)
        for tensor in plan.from_codes:
            yield tensor.name, torch.full((), math.nan, dtype=tensor.dtype).expand(tensor.extent.shape)

    def codes(self, unit: Unit, slot: int) -> Iterator[tuple[str, Quantized, GroupFormat]]:
        """The matrices of a unit that are to be multiplied from their codes: `tensors` shows NaN in place of them."""
        plan = self._plans[unit]
        if not plan.from_codes:
            return
        host, _ = self._buffers(unit, slot)
        memories = {t.name: (plan.arena, t.offsets(at)) for t, at in plan.host}
        memories |= {t.name: (host, list(places)) for t, places in plan.in_place}
        for tensor in plan.from_codes:
            extent = tensor.extent
            assert isinstance(extent, QuantizedExtent)
            held = self._dequantizer.held.get(tensor.name)
            if held is None:
                memory, places = memories[tensor.name]
                assert memory is not None
                held = rows_at(extent, extent.rows, memory.bytes, places)
            yield tensor.name, held, extent.format

    # ------------------------------------------------------------------------------------------------------ moving it
    def load_homes(self, progress: Callable[[int], None] | None = None) -> None:
        """Fills the device and host tiers from disk; called once.

        Raises:
            CapacityError: a tier cannot take what the placement gives it.
            StoreError: a file is missing or broken.
        """
        self._take(Tier.DISK, self.streamed_bytes, "weights")
        for buffers in self._slots.values():
            for buffer, nbytes in buffers:
                if nbytes:
                    buffer.ensure(nbytes)
        for buffer in self._staging if self._staging_bytes else ():
            buffer.ensure(self._staging_bytes)
        if self._arrived_bytes:
            self._dequantizer.arrived.ensure(self._arrived_bytes)
        self._take(Tier.DEVICE, self._scratch_bytes, "dequantizing")
        for loaded in itertools.chain(self._fill_arenas(), self._make_resident()):
            if progress is not None:
                progress(loaded)

    def read(self, unit: Unit, piece: int, slot: int, staging: int) -> int:
        """Disk to host: a piece of a unit's weights into its place or a staging buffer; returns its bytes."""
        part = self._plans[unit].pieces[piece]
        target = self._staging[staging] if part.segments else self._buffers(unit, slot)[0]
        assert target is not None
        return sum(self._files.read_run(r.file, r.offset, target.bytes, r.at, r.nbytes) for r in part.runs)

    def push(self, unit: Unit, piece: int, slot: int, staging: int) -> int:
        """Host to device, cast or dequantized to the dtype of compute on the way; returns the bytes that crossed."""
        plan = self._plans[unit]
        part = plan.pieces[piece]
        source = self._staging[staging] if part.runs else plan.arena
        _, device = self._buffers(unit, slot)
        assert device is not None
        moved = 0
        for segment in part.segments:
            tensor = segment.tensor
            width = math.prod(tensor.extent.shape[-1:]) if tensor.is_quantized else 1
            start = plan.pushed[tensor.name][1] + segment.first * width * tensor.dtype.itemsize
            target = tensor_view(device.bytes, start, tensor.dtype, (segment.count, width))
            if isinstance(tensor.extent, QuantizedExtent):
                rows = range(segment.first, segment.first + segment.count)
                place = (source.bytes, segment.at) if source is not None and segment.at else None
                moved += self._dequantizer.push(tensor.name, tensor.extent, rows, place, target)
            else:
                assert source is not None
                given = tensor_view(source.bytes, segment.at[0], tensor.stored_dtype, (segment.count, width))
                self._space.copy(target, given)
                moved += segment.count * tensor.stored_dtype.itemsize
                if tensor.is_cast and segment.first == 0:
                    self.casts[tensor.name] += 1
        return moved

    def fetch_now(self, unit: Unit, slot: int = 0) -> None:
        """Reads and pushes a unit in the calling thread; no lane may be using its slot or the staging buffers."""
        for piece, route in enumerate(self.routes_of(unit)):
            if route.read:
                self.read(unit, piece, slot, 0)
            if route.push:
                self.push(unit, piece, slot, 0)

    @property
    def notes(self) -> list[str]:
        """What is done differently from what one would expect."""
        folders = sorted({str(path.parent) for path in self._files.cached})
        return [f"reads go through the page cache: {folder} does not allow O_DIRECT" for folder in folders]

    @property
    def stored(self) -> list[StoredTensor]:
        """Every tensor of the model, wherever its home is; all of them can be read from their files."""
        return list(self._whole)

    @property
    def units(self) -> dict[str, Unit]:
        """What each tensor, or part of one, is loaded with."""
        return {tensor.name: tensor.unit for tensor in self._tensors}

    def close(self) -> None:
        """Closes files and gives all memory back."""
        self._files.close()
        for buffers in self._slots.values():
            for buffer, _ in buffers:
                buffer.free()
        for buffer in self._staging:
            buffer.free()
        for plan in self._plans.values():
            if plan.arena is not None:
                plan.arena.free()
        self._dequantizer.close()
        for need in self._taken:
            self._space.ledger.give(*need)
        self._resident, self._resident_of, self._taken = {}, {}, []

    # --------------------------------------------------------------------------------------------------------- layout
    def _by_unit(self) -> dict[Unit, list[StoredTensor]]:
        members: dict[Unit, list[StoredTensor]] = {Unit(stage): [] for stage in range(self._num_stages)}
        for tensor in self._tensors:
            members.setdefault(tensor.unit, []).append(tensor)
        return members

    def _lay_out(self, members: Sequence[StoredTensor]) -> _Plan:
        plan, at = _Plan(), 0
        for tensor in members:
            if self._homes[tensor.name] is Tier.HOST:
                plan.host.append((tensor, at))
                at += tensor.home_bytes
        if plan.host:
            plan.arena = Buffer(self._space.ledger, Tier.HOST, self._space.device, "weights")
        disk = [tensor for tensor in members if self._homes[tensor.name] is Tier.DISK]
        if self._space.is_direct and not any(self._is_pushed(tensor) for tensor in disk):
            runs, plan.in_place, plan.host_bytes = runs_of(disk)
            plan.pieces = [Piece([part]) for run in runs for part in parts_of(run)]
            moved = []
        else:
            plan.pieces, moved = cut(in_file_order(disk), self._piece_bytes), disk
        held = [t for t in members if t.is_quantized and not t.is_late and self._homes[t.name] is Tier.DEVICE]
        at = 0
        for tensor in (*moved, *(t for t, _ in plan.host if self._is_pushed(t)), *held):
            plan.pushed[tensor.name] = (tensor, at)
            at += round_up(tensor.device_bytes, 64)
        plan.device_bytes = at
        plan.from_codes = [t for t in members if t.is_quantized and t.name not in plan.pushed]
        pushed = {t: t.offsets(place) for t, place in plan.host if t.name in plan.pushed}
        plan.pieces += cut([*pushed, *held], self._piece_bytes, {**pushed, **{t: [] for t in held}})
        return plan

    def _is_pushed(self, tensor: StoredTensor) -> bool:
        """Whether a tensor cannot be used where it was read."""
        is_large = tensor.stored_bytes > SMALL_BYTES
        is_changed = not tensor.is_late and (tensor.is_quantized or (tensor.is_cast and is_large))
        return not self._space.is_direct or is_changed

    def _make_slots(self) -> dict[tuple[str, int], list[tuple[Buffer, int]]]:
        """For each slot a buffer on the host and one on the device, with the bytes they must hold."""
        slots = {}
        rings = self._space.rings
        for ring, size in (("layers", rings.layers), ("outer", rings.outer), ("experts", rings.experts)):
            plans = [plan for unit, plan in self._plans.items() if self._ring(unit) == ring]
            host = max((plan.host_bytes for plan in plans), default=0)
            device = max((plan.device_bytes for plan in plans), default=0)
            for slot in range(size):
                slots[ring, slot] = [
                    (Buffer(self._space.ledger, Tier.HOST, self._space.device, "weight slots"), host),
                    (Buffer(self._space.ledger, Tier.DEVICE, self._space.device, "weight slots"), device),
                ]
        return slots

    def _ring(self, unit: Unit) -> str:
        """The ring whose slots a unit passes through."""
        if unit.expert >= 0:
            return "experts"
        return "outer" if unit.stage in (0, self._num_stages - 1) else "layers"

    def _buffers(self, unit: Unit, slot: int) -> tuple[Buffer | None, Buffer | None]:
        plan = self._plans[unit]
        if slot < 0 or not plan.pieces:
            return None, None
        (host, _), (device, _) = self._slots[self._ring(unit), slot]
        return host, device

    def _fill_arenas(self) -> Iterator[int]:
        for plan in self._plans.values():
            if plan.arena is not None:
                memory = plan.arena.ensure(plan.arena_bytes)
                for tensor, place in plan.host:
                    for part, at in zip(tensor.parts, tensor.offsets(place), strict=True):
                        yield self._files.read(part.file, part.offset, memory[at : at + part.nbytes])

    def _make_resident(self) -> Iterator[int]:
        for tensor in self._tensors:
            if self._homes[tensor.name] is Tier.DEVICE:
                self._take(Tier.DEVICE, tensor.resident_bytes, "weights")
                parts = []
                for part in tensor.parts:
                    memory = _room(part.nbytes)
                    yield self._files.read(part.file, part.offset, memory)
                    dtype = torch_dtype(part.dtype)
                    wanted = dtype if tensor.is_quantized else tensor.dtype
                    parts.append(self._on_device(tensor_view(memory, 0, dtype, part.shape), wanted))
                if isinstance(tensor.extent, QuantizedExtent):
                    codes, scales, minima = map(as_rows, parts)
                    shape = (tensor.extent.rows, tensor.extent.shape[-1])
                    self._dequantizer.held[tensor.name] = Quantized(codes, scales, minima, shape)
                else:
                    (self._resident[tensor.name],) = parts
                    self._resident_of.setdefault(tensor.unit, []).append(tensor.name)

    def _on_device(self, value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        if not self._space.is_direct or value.dtype == dtype:
            return value.to(device=self._space.device, dtype=dtype)
        return tensor_view(_room(value.numel() * dtype.itemsize), 0, dtype, value.shape).copy_(value)

    def _take(self, tier: Tier, nbytes: int, what: str) -> None:
        """Enters into the account what is in no buffer."""
        self._space.ledger.take(tier, nbytes, what)
        self._taken.append(Need(tier, nbytes, what))


def _room(nbytes: int) -> torch.Tensor:
    """Memory for a resident tensor; a small one would waste the rest of its page."""
    return host_memory(nbytes) if nbytes >= _LARGE_BYTES else torch.empty(nbytes, dtype=torch.uint8)
