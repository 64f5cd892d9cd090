"""Where a model's weights would lie, in which pieces they would move, and what room that takes; nothing is read.

The same rules as those of a running model's weights (`weights.store`), from sizes alone: what the planner says of a
policy is what a run of it does. Knows no names and no files.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from ..policy import Compression, Policy, Tier
from .budget import PAGE, TILE_BYTES, Need, pages
from .placement import assign
from .schedule import Rings, Route
from .shape import LayerShape, ModelShape, TensorShape, quantized_bytes

__all__ = [
    "PIECE_BYTES", "SMALL_BYTES", "Piece", "PlannedTensor", "Tensors", "WeightLayout", "routes_of", "size_of_pieces",
    "tensors_of",
]  # fmt: skip

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
        is_table: it is a table of the vocabulary: if it is streamed, then through a buffer that nothing else uses.
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
    is_table: bool = False

    @property
    def resident_bytes(self) -> int:
        """Size where it stays on the device."""
        return self.stored_bytes if self.is_quantized else self.device_bytes


class Piece(NamedTuple):
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


@functools.lru_cache(maxsize=256)
def routes_of(pieces: tuple[Piece, ...]) -> tuple[Route, ...]:
    """The links that each piece crosses."""
    return tuple(piece.route for piece in pieces)


class _Group(NamedTuple):
    """The tensors of a unit, whatever their homes will be.

    Args:
        stage: theirs.
        expert: the expert; -1 for what is none.
        kind: the same number for all that consist of the same tensors.
        places: of each in the order of all tensors.
    """

    stage: int
    expert: int
    kind: int
    places: tuple[int, ...]


class Tensors(tuple[PlannedTensor, ...]):  # noqa: SLOT001  what is found once is kept in its dict
    """All tensors of a model, in the order of its stages; stages and experts that are alike are found once."""

    @classmethod
    def of(cls, tensors: Iterable[PlannedTensor]) -> Tensors:
        """The same, unless they are that already."""
        return tensors if isinstance(tensors, cls) else cls(tensors)

    @functools.cached_property
    def sizes(self) -> list[tuple[int, int]]:
        """Place and stored bytes of each, the largest first."""
        sizes = [(place, tensor.stored_bytes) for place, tensor in enumerate(self)]
        return sorted(sizes, key=lambda pair: -pair[1])

    @functools.cached_property
    def stage_bytes(self) -> collections.Counter[int]:
        """Stored bytes of each stage."""
        sizes = collections.Counter[int]()
        for tensor in self:
            sizes[tensor.stage] += tensor.stored_bytes
        return sizes

    @functools.cached_property
    def tables(self) -> list[int]:
        """Places of the tables of the vocabulary, the embedding's first."""
        return sorted((n for n, tensor in enumerate(self) if tensor.is_table), key=lambda n: self[n].stage)

    @functools.cached_property
    def sparse(self) -> frozenset[int]:
        """Stages with experts."""
        return frozenset(tensor.stage for tensor in self if tensor.expert >= 0)

    @functools.cached_property
    def groups(self) -> list[_Group]:
        """The units of the model."""
        places: dict[tuple[int, int], list[int]] = {}
        for place, tensor in enumerate(self):
            places.setdefault((tensor.stage, tensor.expert), []).append(place)
        kinds: dict[tuple[Any, ...], int] = {}
        made = []
        for (stage, expert), own in places.items():
            alike = tuple(dataclasses.replace(self[place], stage=0, expert=min(0, expert)) for place in own)
            kind = kinds.setdefault((stage in self.sparse, alike), len(kinds))
            made.append(_Group(stage, expert, kind, tuple(own)))
        return made


@functools.lru_cache(maxsize=32)
def tensors_of(shape: ModelShape, compression: Compression) -> Tensors:
    """The tensors of a model, in the order of its stages."""
    head = len(shape.layers) + 1
    made = [_outer(shape, tensor, head) for tensor in shape.outer]
    layers = {layer: _layer(shape, layer, compression) for layer in dict.fromkeys(shape.layers)}
    for stage, layer in enumerate(shape.layers, start=1):
        made += [dataclasses.replace(tensor, stage=stage) for tensor in layers[layer]]
    return Tensors(sorted(made, key=lambda tensor: tensor.stage))


def _outer(shape: ModelShape, tensor: TensorShape, head: int) -> PlannedTensor:
    is_table = tensor.kind == "table"
    stage = head if tensor.part == "head" else 0
    return dataclasses.replace(
        _plain(shape, tensor), stage=stage, moves=is_table, is_matrix=is_table, is_table=is_table
    )


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


@dataclasses.dataclass(frozen=True, eq=False)  # compared by identity: one stands for all that are alike
class _Unit:
    """Weights that move together, a stage without its experts or one of these, with the home of each tensor.

    Args:
        members: tensors with their homes.
        direct: compute works in host memory.
        is_outer: they are of the embedding or the head.
        is_beside_experts: they are of a layer that has experts.
        piece_bytes: what moves at most at a time.
        pieces: how many pieces there are at most, for each way that they move; None for any number.
    """

    members: Sequence[tuple[PlannedTensor, Tier]]
    direct: bool
    is_outer: bool
    is_beside_experts: bool
    piece_bytes: int
    pieces: int | None

    @property
    def is_expert(self) -> bool:
        """Whether it is an expert."""
        return self.members[0][0].expert >= 0

    def stored(self, tier: Tier) -> int:
        """Bytes whose home is a tier."""
        return sum(tensor.stored_bytes for tensor, home in self.members if home is tier)

    @property
    def resident_bytes(self) -> int:
        """Bytes of what stays on the device."""
        return sum(tensor.resident_bytes for tensor, home in self.members if home is Tier.DEVICE)

    @functools.cached_property
    def reads_in_place(self) -> bool:
        """Whether compute uses what is read where it was read."""
        return self.direct and not any(self._is_pushed(t) for t, home in self.members if home is Tier.DISK)

    @property
    def passing_bytes(self) -> int:
        """Bytes that are read into one memory and used in another."""
        return 0 if self.reads_in_place else self.stored(Tier.DISK)

    def cut(self) -> tuple[Piece, ...]:
        """The pieces in which it moves."""
        disk = [tensor for tensor, home in self.members if home is Tier.DISK]
        host = [tensor for tensor, home in self.members if home is Tier.HOST and self._is_pushed(tensor)]
        held = [t for t, home in self.members if home is Tier.DEVICE and t.is_quantized and not t.is_late]
        made = self._cut(disk, reads=True, pushes=not self.reads_in_place)
        return tuple(made + self._cut(host, reads=False, pushes=True) + self._cut(held, reads=False, pushes=False))

    @property
    def read_in_place(self) -> int:
        """Room on the host for what is read where it is used; a run of tensors begins and ends in a page.

        An expert's matrices lie among those of the others, codes apart from scales and minima; experts lie among what
        else their layer has.
        """
        if not self.reads_in_place:
            return 0
        read = [tensor for tensor, home in self.members if home is Tier.DISK]
        if self.is_expert:
            return sum(pages(tensor.stored_bytes) + (3 if tensor.is_quantized else 1) * PAGE for tensor in read)
        runs = sum(is_disk for is_disk, _ in itertools.groupby(self.members, lambda pair: pair[1] is Tier.DISK))
        runs += self.is_beside_experts
        # Vectors are counted together, but lie apart: what has another home is read with what is around it, or cuts it.
        others = [t.stored_bytes for t, home in self.members if home is not Tier.DISK and not t.is_matrix]
        total = sum(tensor.stored_bytes for tensor in read)
        return pages(total + sum(others)) + (runs + len(others)) * PAGE if total else 0

    @property
    def pushed_room(self) -> int:
        """Room in a slot on the device."""
        return pages(
            sum(
                -(-tensor.device_bytes // 64) * 64
                for tensor, home in self.members
                if (home is Tier.DISK and not self.reads_in_place)
                or (home is Tier.HOST and self._is_pushed(tensor))
                or (home is Tier.DEVICE and tensor.is_quantized and not tensor.is_late)
            )
        )

    def _is_pushed(self, tensor: PlannedTensor) -> bool:
        """Whether a tensor cannot be used where it was read."""
        is_changed = tensor.is_quantized or (tensor.is_cast and tensor.stored_bytes > SMALL_BYTES)
        return not self.direct or (is_changed and not tensor.is_late)

    def _cut(self, tensors: Sequence[PlannedTensor], *, reads: bool, pushes: bool) -> list[Piece]:
        total = sum(tensor.stored_bytes for tensor in tensors)
        if not total:
            return []
        count = -(-total // self.piece_bytes)
        if self.pieces is not None:
            count = min(count, self.pieces)
        cast = sum(tensor.stored_bytes for tensor in tensors if tensor.is_cast)
        unpacked = sum(tensor.elements for tensor in tensors if tensor.is_quantized and not tensor.is_late)
        crosses = pushes and not self.direct
        piece = Piece(
            read=-(-total // count) if reads else 0,
            pushed=-(-total // count) if crosses else 0,
            cast=cast // count,
            unpacked=unpacked // count,
            pushes=pushes or not reads,
        )
        return [piece] * count


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
        self._all = tensors = Tensors.of(tensors)
        self.direct, self.num_stages, self._exact, self._pieces = direct, num_stages, exact, pieces
        layers = [tensors.stage_bytes[stage] for stage in range(1, num_stages - 1)]
        self.piece_bytes = size_of_pieces(layers, direct=direct)
        #: 16-bit bytes of each stage that are cast for each product, and not on their way
        self.late = [0] * num_stages
        #: elements of each stage that are unpacked for each product, and not on their way
        self.late_unpacked = [0] * num_stages
        #: pieces of each stage without its experts
        self.stages: list[tuple[Piece, ...]] = [()] * num_stages
        #: pieces of each expert of each stage
        self.experts: list[dict[int, tuple[Piece, ...]]] = [{} for _ in range(num_stages)]
        #: how many there are of each kind of unit
        self._units = collections.Counter[_Unit]()
        self._place(_homes(tensors, policy) if homes is None else homes, one_batch=policy.num_batches == 1)

    def _place(self, homes: Sequence[Tier], *, one_batch: bool) -> None:
        made: dict[tuple[int, bool, tuple[Tier, ...]], tuple[_Unit, tuple[Piece, ...], int, int]] = {}
        for stage, expert, kind, places in self._all.groups:
            is_outer, own = stage in (0, self.num_stages - 1), tuple([homes[place] for place in places])
            if (kind, is_outer, own) not in made:
                unit, late, unpacked = self._unit(places, own, is_outer=is_outer, one_batch=one_batch)
                made[kind, is_outer, own] = unit, unit.cut(), late, unpacked
            unit, pieces, late, unpacked = made[kind, is_outer, own]
            self._units[unit] += 1
            if expert >= 0:
                self.experts[stage][expert] = pieces
            else:
                self.stages[stage], self.late[stage], self.late_unpacked[stage] = pieces, late, unpacked

    def _unit(
        self, places: Sequence[int], homes: Sequence[Tier], *, is_outer: bool, one_batch: bool
    ) -> tuple[_Unit, int, int]:
        """A unit, its 16-bit bytes that are cast late and its elements that are unpacked late.

        Where compute works in host memory, of tables and experts, and with one micro-batch of all matrices, tiles are
        made where they are used.
        """
        members, late, unpacked = [], 0, 0
        for place, home in zip(places, homes, strict=True):
            tensor = self._all[place]
            is_once = one_batch or tensor.expert >= 0
            is_elsewhere = tensor.is_cast and home is not Tier.DEVICE and (is_once or is_outer)
            if self.direct and tensor.is_matrix and is_elsewhere:
                late += tensor.stored_bytes
                tensor = dataclasses.replace(tensor, device_bytes=tensor.stored_bytes, is_cast=False)
            elif self.direct and tensor.is_matrix and tensor.is_quantized and is_once and not is_outer:
                unpacked += tensor.elements
                tensor = dataclasses.replace(tensor, is_late=True)
            members.append((tensor, home))
        stage, expert = self._all[places[0]].stage, self._all[places[0]].expert
        is_beside_experts = expert < 0 and stage in self._all.sparse
        unit = _Unit(members, self.direct, is_outer, is_beside_experts, self.piece_bytes, self._pieces)
        return unit, late, unpacked

    @property
    def routes(self) -> tuple[tuple[Route, ...], ...]:
        """For each stage the links that each piece of its weights crosses in a sweep."""
        return tuple(map(routes_of, self.stages))

    @functools.cached_property
    def placement(self) -> dict[Tier, int]:
        """Bytes whose home is each tier."""
        return {tier: sum(count * unit.stored(tier) for unit, count in self._units.items()) for tier in Tier}

    def needs(self, rings: Rings) -> list[Need]:
        """What loading takes of each tier: homes, slots and staging."""
        units = list(self._units)
        tensors = [tensor for unit in units for tensor, _ in unit.members]
        needs = [Need(Tier.DISK, self.placement[Tier.DISK], "weights"), *([] if self._exact else self._rounding())]
        # matrices of one size lie in files in another order than here: what is read of a layer may be in more runs
        more_runs = 0 if self._exact else 2 * PAGE
        for size, alike, rounding in (
            (rings.layers, [unit for unit in units if not unit.is_outer and not unit.is_expert], more_runs),
            (rings.outer, [unit for unit in units if unit.is_outer], 0),
            (rings.experts, [unit for unit in units if unit.is_expert], 0),
        ):
            in_place = max((unit.read_in_place for unit in alike), default=0)
            pushed = max((unit.pushed_room for unit in alike), default=0)
            needs.append(Need(Tier.HOST, size * (in_place + rounding) if in_place else 0, "weight slots"))
            needs.append(Need(Tier.DEVICE, size * pushed, "weight slots"))
        needs.append(Need(Tier.HOST, rings.pieces * self._staging_bytes, "weight staging"))
        tile = max((tensor.device_bytes for tensor in tensors if tensor.is_late), default=0)
        needs.append(Need(Tier.DEVICE, min(TILE_BYTES, tile), "dequantizing"))
        if not self.direct and any(tensor.is_quantized for tensor in tensors):
            needs.append(Need(Tier.DEVICE, self._staging_bytes or self.piece_bytes, "weight staging"))
        arenas = sum(count * pages(unit.stored(Tier.HOST)) for unit, count in self._units.items())
        needs.append(Need(Tier.HOST, arenas, "weights"))
        resident = sum(count * unit.resident_bytes for unit, count in self._units.items())
        needs.append(Need(Tier.DEVICE, resident, "weights"))
        return [need for need in needs if need.nbytes]

    def _rounding(self) -> Iterator[Need]:
        """Of a model that is known by its configuration, vectors are counted together; each may go another way.

        Where experts are apart, little is left of a layer, and a vector may begin a page of its own on the host.
        """
        tensors = [tensor for unit in self._units for tensor, _ in unit.members]
        most = max((t.stored_bytes for t in tensors if t.moves and not t.is_matrix), default=0)
        total = sum(self.placement.values())
        for tier, size in self.placement.items():
            if 0 < size < total:
                sparse = len(self._all.sparse) if tier is Tier.HOST else 0
                yield Need(tier, most + sparse * PAGE, "weights")

    @functools.cached_property
    def _staging_bytes(self) -> int:
        """Size of a buffer that pieces from disk pass through.

        What is read by one request begins as far from a page as in its file, and an expert's matrices lie apart.
        """
        largest = max((unit.passing_bytes for unit in self._units), default=0)
        experts = [unit for unit in self._units if unit.is_expert]
        apart = max((sum(3 if t.is_quantized else 1 for t, _ in unit.members) for unit in experts), default=0)
        between = 1 if self._exact else 2  # in another order in the file than here, more may lie between
        return pages(min(largest, self.piece_bytes)) + (between + apart) * PAGE if largest else 0


def _homes(tensors: Tensors, policy: Policy) -> list[Tier]:
    fixed = {place: Tier.DEVICE for place, tensor in enumerate(tensors) if not tensor.moves}
    homes = assign(tensors.sizes, policy.weights, fixed, first=tensors.tables)
    return [homes[place] for place in range(len(tensors))]
