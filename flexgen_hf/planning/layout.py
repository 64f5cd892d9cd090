"""Where a model's weights would lie, in which pieces they would move, and what room that takes; nothing is read.

The same rules as those of a running model's weights (`weights.store`), from sizes alone: what the planner says of a
policy is what a run of it does. Knows no names and no files.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence

from ..policy import Compression, Policy, Tier
from .budget import PAGE, TILE_BYTES, Need, pages
from .placement import assign
from .schedule import Rings, Route
from .shape import LayerShape, ModelShape, TensorShape, quantized_bytes

__all__ = ["PIECE_BYTES", "SMALL_BYTES", "Piece", "PlannedTensor", "WeightLayout", "size_of_pieces", "tensors_of"]

#: how weights move at most at a time: enough for full speed, and no cell waits long for it
PIECE_BYTES = 8 << 20

#: where compute works in host memory, tensors up to this size are cast when their stage begins
SMALL_BYTES = 256 << 10

# What compute sends over a link while it attends on the host stands in line behind pieces: each is a small part of
# a layer, but not so small that requests cost more than what they move.
_PIECES_OF_A_LAYER = 64
_SMALLEST_PIECE_BYTES = 256 << 10


def size_of_pieces(layers: Iterable[int], *, direct: bool) -> int:
    """Bytes of weights that move at a time.

    Args:
        layers: bytes of each decoder layer.
        direct: compute works in host memory.
    """
    if direct:
        return PIECE_BYTES
    part = pages(max(layers, default=0) // _PIECES_OF_A_LAYER)
    return min(PIECE_BYTES, max(_SMALLEST_PIECE_BYTES, part))


@dataclasses.dataclass(frozen=True)
class PlannedTensor:
    """A tensor of a model that need not exist.

    Args:
        stage: 0 the embedding, 1..L the decoder layers, L+1 the head.
        elements: how many there are.
        stored_bytes: as it is kept and moved.
        device_bytes: as it is computed with.
        is_quantized: it is unpacked on its way to compute.
        is_cast: it is kept in another dtype than it is computed in.
        moves: it may live on host or disk; what does not stays where compute is.
        is_matrix: it can be cast where it is multiplied.
        is_late: it is multiplied from its codes, and never unpacked as a whole.
        expert: the expert of its layer that it belongs to; -1 if to none. Each moves by itself.
    """

    stage: int
    elements: int
    stored_bytes: int
    device_bytes: int
    is_quantized: bool = False
    is_cast: bool = False
    moves: bool = True
    is_matrix: bool = True
    is_late: bool = False
    expert: int = -1

    @property
    def resident_bytes(self) -> int:
        """Size where it stays on the device."""
        return self.stored_bytes if self.is_quantized else self.device_bytes


@dataclasses.dataclass(frozen=True)
class Piece:
    """A part of a stage's weights that moves as one.

    Args:
        read: bytes from disk.
        pushed: bytes from host to device.
        cast: bytes of it that are cast on the way.
        unpacked: elements that are unpacked on the way.
        pushes: whether it has a second link to cross, also where no bytes do.
    """

    read: int = 0
    pushed: int = 0
    cast: int = 0
    unpacked: int = 0
    pushes: bool = False

    @property
    def route(self) -> Route:
        """The links that it crosses."""
        return Route(read=self.read > 0, push=self.pushes)


@functools.lru_cache(maxsize=32)
def tensors_of(shape: ModelShape, compression: Compression) -> tuple[PlannedTensor, ...]:
    """The tensors of a model, in the order of its stages."""
    head = len(shape.layers) + 1
    made = [_outer(shape, tensor, head) for tensor in shape.outer]
    layers = {layer: _layer(shape, layer, compression) for layer in dict.fromkeys(shape.layers)}
    for stage, layer in enumerate(shape.layers, start=1):
        made += [dataclasses.replace(tensor, stage=stage) for tensor in layers[layer]]
    return tuple(sorted(made, key=lambda tensor: tensor.stage))


def _outer(shape: ModelShape, tensor: TensorShape, head: int) -> PlannedTensor:
    is_table = tensor.kind == "table"
    stage = head if tensor.part == "head" else 0
    return dataclasses.replace(_plain(shape, tensor), stage=stage, moves=is_table, is_matrix=is_table)


def _layer(shape: ModelShape, layer: LayerShape, compression: Compression) -> list[PlannedTensor]:
    made = []
    for tensor in layer.tensors:
        parts = tensor.shape[0] if tensor in layer.experts else 1
        part = dataclasses.replace(tensor, shape=tensor.shape[1:]) if tensor in layer.experts else tensor
        plain = _plain(shape, part)
        if (bits := layer.bits_of(tensor, compression)) is not None:
            stored = quantized_bytes(part.shape, bits, compression.group_size)
            plain = dataclasses.replace(plain, stored_bytes=stored, is_quantized=True, is_cast=False)
        made += [dataclasses.replace(plain, expert=number if parts > 1 else -1) for number in range(parts)]
    return made


def _plain(shape: ModelShape, tensor: TensorShape) -> PlannedTensor:
    return PlannedTensor(
        stage=0,
        elements=tensor.elements,
        stored_bytes=tensor.elements * shape.stored_itemsize,
        device_bytes=tensor.elements * shape.itemsize,
        is_cast=shape.stored_itemsize != shape.itemsize,
        is_matrix=tensor.kind == "matrix" and len(tensor.shape) == 2,
    )


class WeightLayout:
    """A model's weights under one placement.

    Args:
        tensors: all of the model, in the order of its stages.
        policy: its weights' placement and its block.
        num_stages: decoder layers + 2.
        direct: compute works in host memory.
        homes: of each tensor, if they are not to follow from the shares.
        pieces: how many pieces of a stage there are at most, for each way that they move; None for as many as a run
            has. Fewer make a simulation shorter.
        exact: the tensors are those of a model that is there, not what a configuration says of them.
    """

    def __init__(
        self,
        tensors: Sequence[PlannedTensor],
        policy: Policy,
        *,
        num_stages: int,
        direct: bool,
        homes: Sequence[Tier] | None = None,
        pieces: int | None = None,
        exact: bool = False,
    ) -> None:
        self.direct, self.num_stages, self._exact = direct, num_stages, exact
        self._homes = _homes(tensors, policy) if homes is None else list(homes)
        #: 16-bit bytes of each stage that are cast for each product, and not on their way
        self.late = [0] * self.num_stages
        #: elements of each stage that are unpacked for each product, and not on their way
        self.late_unpacked = [0] * self.num_stages
        self._tensors = self._cast_late(tensors, one_batch=policy.num_batches == 1) if direct else list(tensors)
        self._members: list[list[tuple[PlannedTensor, Tier]]] = [[] for _ in range(self.num_stages)]
        self._experts: list[dict[int, list[tuple[PlannedTensor, Tier]]]] = [{} for _ in range(self.num_stages)]
        layers = [0] * self.num_stages
        for tensor, home in zip(self._tensors, self._homes, strict=True):
            layers[tensor.stage] += tensor.stored_bytes
            is_expert = tensor.expert >= 0
            group = (
                self._experts[tensor.stage].setdefault(tensor.expert, []) if is_expert else self._members[tensor.stage]
            )
            group.append((tensor, home))
        self.piece_bytes = size_of_pieces(layers[1:-1], direct=direct)
        self._pieces = pieces
        self.stages = [self._pieces_of(members) for members in self._members]
        #: pieces of each expert of each stage
        self.experts = [{e: self._pieces_of(members) for e, members in of.items()} for of in self._experts]

    @property
    def routes(self) -> tuple[tuple[Route, ...], ...]:
        """For each stage the links that each piece of its weights crosses in a sweep."""
        return tuple(tuple(piece.route for piece in stage) for stage in self.stages)

    @functools.cached_property
    def placement(self) -> dict[Tier, int]:
        """Bytes whose home is each tier."""
        got = dict.fromkeys(Tier, 0)
        for tensor, home in zip(self._tensors, self._homes, strict=True):
            got[home] += tensor.stored_bytes
        return got

    def needs(self, rings: Rings) -> list[Need]:
        """What loading takes of each tier: homes, slots and staging."""
        pairs = list(zip(self._tensors, self._homes, strict=True))
        needs = [Need(Tier.DISK, self.placement[Tier.DISK], "weights"), *([] if self._exact else self._rounding())]
        for size, stages in (
            (rings.layers, self._members[1:-1]),
            (rings.outer, [self._members[0], self._members[-1]]),
            (rings.experts, [members for experts in self._experts for members in experts.values()]),
        ):
            in_place, pushed = (max(map(room, stages), default=0) for room in (self._read_in_place, self._pushed_room))
            needs.append(Need(Tier.HOST, size * in_place, "weight slots"))
            needs.append(Need(Tier.DEVICE, size * pushed, "weight slots"))
        needs.append(Need(Tier.HOST, rings.pieces * self._staging_bytes, "weight staging"))
        tile = max((tensor.device_bytes for tensor, _ in pairs if tensor.is_late), default=0)
        needs.append(Need(Tier.DEVICE, min(TILE_BYTES, tile), "dequantizing"))
        if not self.direct and any(tensor.is_quantized for tensor, _ in pairs):
            needs.append(Need(Tier.DEVICE, self._staging_bytes or self.piece_bytes, "weight staging"))
        arenas = (sum(t.stored_bytes for t, home in members if home is Tier.HOST) for members in self._units)
        needs.append(Need(Tier.HOST, sum(pages(size) for size in arenas), "weights"))
        resident = sum(tensor.resident_bytes for tensor, home in pairs if home is Tier.DEVICE)
        needs.append(Need(Tier.DEVICE, resident, "weights"))
        return [need for need in needs if need.nbytes]

    # ---------------------------------------------------------------------------------------------------------- inside
    @property
    def _units(self) -> Iterator[list[tuple[PlannedTensor, Tier]]]:
        """What moves together."""
        yield from self._members
        yield from itertools.chain.from_iterable(experts.values() for experts in self._experts)

    def _rounding(self) -> Iterator[Need]:
        """Of a model that is known by its configuration, vectors are counted together; each may go another way.

        Where experts are apart, little is left of a layer, and a vector may begin a page of its own on the host.
        """
        most = max((t.stored_bytes for t in self._tensors if t.moves and not t.is_matrix), default=0)
        total = sum(self.placement.values())
        for tier, size in self.placement.items():
            if 0 < size < total:
                sparse = sum(map(bool, self._experts)) if tier is Tier.HOST else 0
                yield Need(tier, most + sparse * PAGE, "weights")

    def _cast_late(self, tensors: Sequence[PlannedTensor], *, one_batch: bool) -> list[PlannedTensor]:
        """Of tables and experts, and with one micro-batch of all matrices, tiles are made where they are used."""
        made = []
        for tensor, home in zip(tensors, self._homes, strict=True):
            is_outer, is_expert = tensor.stage in (0, self.num_stages - 1), tensor.expert >= 0
            is_once = one_batch or is_expert
            if tensor.is_cast and tensor.is_matrix and home is not Tier.DEVICE and (is_once or is_outer):
                self.late[tensor.stage] += tensor.stored_bytes * (not is_expert)
                tensor = dataclasses.replace(tensor, device_bytes=tensor.stored_bytes, is_cast=False)  # noqa: PLW2901
            elif tensor.is_quantized and tensor.is_matrix and is_once and not is_outer:
                self.late_unpacked[tensor.stage] += tensor.elements * (not is_expert)
                tensor = dataclasses.replace(tensor, is_late=True)  # noqa: PLW2901
            made.append(tensor)
        return made

    def _is_pushed(self, tensor: PlannedTensor) -> bool:
        """Whether a tensor cannot be used where it was read."""
        is_changed = tensor.is_quantized or (tensor.is_cast and tensor.stored_bytes > SMALL_BYTES)
        return not self.direct or (is_changed and not tensor.is_late)

    def _reads_in_place(self, members: Iterable[tuple[PlannedTensor, Tier]]) -> bool:
        return self.direct and not any(self._is_pushed(t) for t, home in members if home is Tier.DISK)

    def _pieces_of(self, members: Sequence[tuple[PlannedTensor, Tier]]) -> tuple[Piece, ...]:
        disk = [tensor for tensor, home in members if home is Tier.DISK]
        in_place = self._reads_in_place(members)
        host = [tensor for tensor, home in members if home is Tier.HOST and self._is_pushed(tensor)]
        held = [t for t, home in members if home is Tier.DEVICE and t.is_quantized and not t.is_late]
        made = self._cut(disk, reads=True, pushes=not in_place)
        return tuple(made + self._cut(host, reads=False, pushes=True) + self._cut(held, reads=False, pushes=False))

    def _cut(self, tensors: Sequence[PlannedTensor], *, reads: bool, pushes: bool) -> list[Piece]:
        total = sum(tensor.stored_bytes for tensor in tensors)
        if not total:
            return []
        count = -(-total // self.piece_bytes)
        if self._pieces is not None:
            count = min(count, self._pieces)
        cast = sum(tensor.stored_bytes for tensor in tensors if tensor.is_cast)
        unpacked = sum(tensor.elements for tensor in tensors if tensor.is_quantized and not tensor.is_late)
        crosses = pushes and not self.direct
        return [
            Piece(
                read=-(-total // count) if reads else 0,
                pushed=-(-total // count) if crosses else 0,
                cast=cast // count,
                unpacked=unpacked // count,
                pushes=pushes or not reads,
            )
            for _ in range(count)
        ]

    def _read_in_place(self, members: Sequence[tuple[PlannedTensor, Tier]]) -> int:
        """Room on the host for what of a stage is read where it is used; a run of tensors begins and ends in a page.

        An expert's matrices lie among those of the others, codes apart from scales and minima; experts lie among what
        else their layer has.
        """
        if not self._reads_in_place(members):
            return 0
        read = [tensor for tensor, home in members if home is Tier.DISK]
        if read and read[0].expert >= 0:
            return sum(pages(tensor.stored_bytes) + (3 if tensor.is_quantized else 1) * PAGE for tensor in read)
        runs = sum(is_disk for is_disk, _ in itertools.groupby(members, lambda pair: pair[1] is Tier.DISK))
        runs += bool(read and self._experts[read[0].stage])
        # Vectors are counted together, but lie apart: what has another home is read with what is around it, or cuts it.
        others = [tensor.stored_bytes for tensor, home in members if home is not Tier.DISK and not tensor.is_matrix]
        total = sum(tensor.stored_bytes for tensor in read)
        return pages(total + sum(others)) + (runs + len(others)) * PAGE if total else 0

    def _pushed_room(self, members: Sequence[tuple[PlannedTensor, Tier]]) -> int:
        """Room in a slot on the device."""
        in_place = self._reads_in_place(members)
        return pages(
            sum(
                -(-tensor.device_bytes // 64) * 64
                for tensor, home in members
                if (home is Tier.DISK and not in_place)
                or (home is Tier.HOST and self._is_pushed(tensor))
                or (home is Tier.DEVICE and tensor.is_quantized and not tensor.is_late)
            )
        )

    @functools.cached_property
    def _staging_bytes(self) -> int:
        """Size of a buffer that pieces from disk pass through.

        What is read by one request begins as far from a page as in its file, and an expert's matrices lie apart.
        """
        passing = [
            sum(tensor.stored_bytes for tensor, home in members if home is Tier.DISK)
            for members in self._units
            if not self._reads_in_place(members)
        ]
        largest = max(passing, default=0)
        experts = [members for of in self._experts for members in of.values()]
        apart = max((sum(3 if t.is_quantized else 1 for t, _ in members) for members in experts), default=0)
        return pages(min(largest, self.piece_bytes)) + (1 + apart) * PAGE if largest else 0


def _homes(tensors: Sequence[PlannedTensor], policy: Policy) -> list[Tier]:
    fixed = {i: Tier.DEVICE for i, tensor in enumerate(tensors) if not tensor.moves}
    homes = assign([(i, tensor.stored_bytes) for i, tensor in enumerate(tensors)], policy.weights, fixed)
    return [homes[i] for i in range(len(tensors))]
