"""The order of work as data: steps with the steps they wait for.

One description is executed, simulated, drawn and checked. Nothing here knows bytes, tensors or threads: a `Traffic`
says which links each piece of data crosses, a `Schedule` turns it into steps, and whoever runs them looks up the rest.

Method: the block schedule of FlexGen (arXiv 2303.06865, section 4.1): a loaded layer serves every micro-batch before
the next layer is loaded. Instead of a barrier after every (layer, micro-batch), a step names what it waits for.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterable, Iterator
from typing import NamedTuple

__all__ = ["Lane", "Rings", "Route", "Schedule", "Step", "StepId", "Traffic", "What"]


class Lane(str, enum.Enum):
    """An ordered queue of work. Lanes run side by side; within one, order is the order of submission."""

    DISK_TO_HOST = "disk_to_host"
    HOST_TO_DEVICE = "host_to_device"
    DEVICE_TO_HOST = "device_to_host"
    HOST_TO_DISK = "host_to_disk"
    COMPUTE = "compute"

    def __str__(self) -> str:
        return self.value


class What(str, enum.Enum):
    """What a step moves or computes."""

    WEIGHTS = "weights"
    CACHE = "cache"
    HIDDEN = "hidden"
    STAGE = "stage"

    def __str__(self) -> str:
        return self.value


class Route(NamedTuple):
    """The links that one piece of data crosses on its way to the device and back; all off: it is used where it is."""

    read: bool = False
    push: bool = False
    pull: bool = False
    write: bool = False

    @property
    def moves(self) -> bool:
        """Whether anything is moved at all, so that a slot is needed."""
        return any(self)


class StepId(NamedTuple):
    """The name of a step. `batch` is -1 where a step serves all micro-batches; `piece` counts parts of one load."""

    sweep: int
    lane: Lane
    what: What
    stage: int
    batch: int = -1
    piece: int = 0

    def __str__(self) -> str:
        batch = f", micro-batch {self.batch}" if self.batch >= 0 else ""
        piece = f", piece {self.piece}" if self.what is What.WEIGHTS else ""
        what = "compute" if self.what is What.STAGE else self.what
        return f"{what} of stage {self.stage}{batch}{piece} in sweep {self.sweep}"


class Step(NamedTuple):
    """A unit of work in one lane.

    Args:
        id: its name.
        after: names of the steps it waits for. All of them come earlier in the schedule, or belong to an earlier sweep.
        slot: which reused buffer of its ring it fills or uses, -1 if none; for a compute step, that of its cell.
        staging: for a piece of weights that crosses both links, the buffer on the host that it passes through.
    """

    id: StepId
    after: tuple[StepId, ...] = ()
    slot: int = -1
    staging: int = -1


@dataclasses.dataclass(frozen=True)
class Rings:
    """How many reused buffers there are of each kind. More means more look-ahead and more memory.

    Args:
        layers: decoder layers whose weights can be where compute needs them.
        outer: the same for embedding and head.
        pieces: pieces of weights on their way from disk to device.
        cache: cells.
        hidden: hidden states.
    """

    layers: int = 2
    outer: int = 1
    pieces: int = 8
    cache: int = 3
    hidden: int = 3


@dataclasses.dataclass(frozen=True)
class Traffic:
    """What has to move in one sweep.

    Args:
        weights: for each stage a route for each piece in which its weights are moved, none if they stay where they are;
            0 is the embedding, the last one the head.
        cache: for each stage, a route for each micro-batch. Embedding and head have none.
        hidden: a route for each micro-batch, crossed between one decoder layer and the next.
        fresh_cache: the cells are empty, so nothing is loaded (the prompt's sweep).
        tied: the head computes with the embedding's weights, which stay in their slot.
    """

    weights: tuple[tuple[Route, ...], ...]
    cache: tuple[tuple[Route, ...], ...]
    hidden: tuple[Route, ...]
    fresh_cache: bool = False
    tied: bool = False

    @property
    def num_batches(self) -> int:
        """Micro-batches of the block."""
        return len(self.hidden)

    @property
    def head(self) -> int:
        """Stage of the head."""
        return len(self.weights) - 1

    def following(self, *, table_is_there: bool) -> Traffic:
        """What moves in the sweep after this one.

        Args:
            table_is_there: the table that embedding and head share stays in its slot.
        """
        weights = ((), *self.weights[1:]) if table_is_there else self.weights
        return dataclasses.replace(self, weights=weights, fresh_cache=False)


class _Ring:
    """Reused buffers that are taken in turn, and the last step that needs each."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._users: list[StepId | None] = [None] * size
        self._uses = 0

    def take(self, until: StepId) -> tuple[int, list[StepId]]:
        """The next slot, which is in use until `until` is done, and the step that has to be done before."""
        slot = self._uses % self.size
        before, self._users[slot] = self._users[slot], until
        self._uses += 1
        return slot, ([before] if before is not None else [])

    def recount(self, sweep: int, batches: int) -> None:
        """Corrects the users in a sweep that turns out to have so many micro-batches."""
        self._users = [
            user._replace(batch=batches - 1) if user is not None and user.sweep == sweep and user.batch >= 0 else user
            for user in self._users
        ]


class Schedule:
    """The block schedule, sweep after sweep.

    Loads of weights come in pieces, spread over the micro-batches of the layer before, so that cells and hidden states
    never stand in line behind a whole layer. Cells and hidden states are loaded as many micro-batches ahead as their
    rings allow. The embedding runs right before the first layer, micro-batch by micro-batch, so that no hidden states
    wait there. The head is one step for the whole block: what reaches it is small, and its table is the largest matrix
    of all.

    It remembers which step needs each slot last, from one sweep to the next: the last cells of a sweep may still be on
    their way to disk when the next one begins.

    Args:
        rings: the reused buffers.
        overlap: off chains every step to the one before it, with every load right before it is needed.
    """

    def __init__(self, rings: Rings = Rings(), *, overlap: bool = True) -> None:
        self.rings, self.overlap = rings, overlap
        #: number of the next sweep
        self.sweep = 0
        self._empty()

    def _empty(self) -> None:
        sizes = self.rings
        self.layers, self.outer, self.pieces = _Ring(sizes.layers), _Ring(sizes.outer), _Ring(sizes.pieces)
        self.cache, self.hidden = _Ring(sizes.cache), _Ring(sizes.hidden)
        self._loaded_ahead: set[int] = set()  # stages of the next sweep

    def restart(self) -> None:
        """Forgets what is in the slots, after a run that was stopped. No step of it may be at work."""
        self._empty()
        self.sweep += 1

    def steps(self, traffic: Traffic, following: Traffic | None = None) -> Iterator[Step]:
        """All steps of one sweep in an order that every lane can take them in; to be taken to the end.

        Args:
            traffic: what moves.
            following: what will move in the sweep after it, if one will come: its first layers are loaded while this
                one ends, and its embedding once the head has left the slot.

        Yields:
            Steps. Everything a step waits for comes before it or belongs to the sweep before.
        """
        for ring in (self.layers, self.outer):  # what was loaded ahead may be for another call, of another block
            ring.recount(self.sweep, traffic.num_batches)
        steps = _Sweep(self, traffic, self.sweep, self._loaded_ahead).steps()
        yield from steps if self.overlap else _chained(list(steps))
        self._loaded_ahead = set()
        self.sweep += 1
        if self.overlap and following is not None:
            yield from self._loads_ahead(following)

    def _loads_ahead(self, traffic: Traffic) -> Iterator[Step]:
        # The layers come first: the embedding's slot is the head's, which is needed until the very end.
        sweep = _Sweep(self, traffic, self.sweep, set())
        for stage in (*range(1, 1 + min(self.rings.layers, traffic.head - 1)), 0):
            self._loaded_ahead.add(stage)
            yield from sweep.load_weights(stage)


class _Sweep:
    """The steps of one sweep; takes slots from the schedule's rings."""

    def __init__(self, schedule: Schedule, traffic: Traffic, sweep: int, loaded: set[int]) -> None:
        self.schedule, self.traffic, self.sweep, self.loaded = schedule, traffic, sweep, loaded
        self.visits = [(stage, batch) for stage in range(1, traffic.head) for batch in range(traffic.num_batches)]
        self.ready: dict[tuple[What, int, int], tuple[int, list[StepId]]] = {}  # visit -> slot, what compute waits for
        self.begun = {What.CACHE: 0, What.HIDDEN: 0}
        self.held_back: list[Step] = []  # loads of the next layer that have to follow all transfers of this one
        self.stored: list[StepId] = []  # the steps that bring hidden states home, in order

    def steps(self) -> Iterator[Step]:
        traffic, rings = self.traffic, self.schedule.rings
        ahead = rings.layers - 1
        last, batches = traffic.head - 1, traffic.num_batches
        cells, hidden = iter(self.visits), iter(self.visits)
        for stage in range(1 + min(max(1, ahead), last)):
            yield from self.load_weights(stage)
        for number, (stage, batch) in enumerate(self.visits):
            if batch == 0:
                yield from self.held_back
                upcoming = list(self.loads_ahead(stage, ahead))
            # How far ahead: a slot fewer than there are, because the one in use is not free; and what is not yet
            # written cannot be read, so hidden states not farther than the layer before has come.
            yield from self.loads(What.CACHE, cells, number + rings.cache)
            yield from self.loads(What.HIDDEN, hidden, number + min(rings.hidden, batches))
            if stage == 1:
                yield self.compute(0, batch)
            yield from self.visit(stage, batch)
            yield from upcoming[len(upcoming) * batch // batches : len(upcoming) * (batch + 1) // batches]
        if last == 1:  # with a single layer, the embedding leaves the slot only now
            yield from self.load_weights(traffic.head)
        yield self.compute(traffic.head, -1)

    def loads_ahead(self, stage: int, ahead: int) -> Iterator[Step]:
        """The weights that are loaded while `stage` computes."""
        last = self.traffic.head - 1
        self.held_back = []
        if ahead and stage + ahead <= last:
            yield from self.load_weights(stage + ahead)
        if not ahead and stage < last:
            yield from self.reads_ahead(stage + 1)
        if stage == last > 1:
            yield from self.load_weights(self.traffic.head)

    def reads_ahead(self, stage: int) -> Iterator[Step]:
        """What of a layer can be read while the one before still has the only slot: what passes through staging.

        The rest is held back. In line before a transfer of this layer it would wait for the slot, and the transfer,
        for which the slot's user waits, for it; so would a read that waits for a staging buffer of the rest.
        """
        steps = list(self.load_weights(stage))
        pushed = {step.id.piece for step in steps if step.id.lane is Lane.HOST_TO_DEVICE}
        reads = [step for step in steps if step.id.lane is Lane.DISK_TO_HOST and step.id.piece in pushed]
        early = reads[: self.schedule.rings.pieces]
        self.held_back = [step for step in steps if step not in early]
        yield from early

    def visit(self, stage: int, batch: int) -> Iterator[Step]:
        """One micro-batch in one decoder layer: compute, and its cell and hidden states on their way home."""
        cell, hidden = self.traffic.cache[stage][batch], self.traffic.hidden[batch]
        slot, after = self.ready.pop((What.CACHE, stage, batch), (-1, []))
        _, after_hidden = self.ready.pop((What.HIDDEN, stage, batch), (-1, []))
        goes_home = hidden.moves and stage < self.traffic.head - 1
        # What compute makes faster than it goes home would pile up where there is no room for it.
        size = self.schedule.rings.hidden
        room = [self.stored[-size]] if goes_home and len(self.stored) >= size else []
        compute = self.compute(stage, batch, (*after, *after_hidden, *room))._replace(slot=slot)
        yield compute
        if cell.moves:
            yield from self._store(What.CACHE, stage, batch, cell, slot, compute.id)
        if goes_home:
            stores = list(self._store(What.HIDDEN, stage, batch, hidden, -1, compute.id))
            self.stored += [step.id for step in stores[-1:]]
            yield from stores

    def loads(self, what: What, visits: Iterator[tuple[int, int]], until: int) -> Iterator[Step]:
        """The loads of all visits before number `until` that are still to come."""
        while self.begun[what] < until:
            self.begun[what] += 1
            visit = next(visits, None)
            if visit is None:
                return
            yield from self.load(what, *visit)

    def load(self, what: What, stage: int, batch: int) -> Iterator[Step]:
        """A cell or hidden states into a slot."""
        is_cell = what is What.CACHE
        route = self.traffic.cache[stage][batch] if is_cell else self.traffic.hidden[batch]
        if not route.moves or (stage == 1 and not is_cell):
            return
        # Layers return new hidden states; those that were loaded are free again after compute.
        until = self._freed_by(route, stage, batch) if is_cell else self.compute(stage, batch).id
        slot, free = (self.schedule.cache if is_cell else self.schedule.hidden).take(until)
        steps = []
        if not (is_cell and self.traffic.fresh_cache):
            ready = self._home_ready(what, stage, batch, route)
            steps = list(self._load(what, stage, batch, route, slot, [*free, *ready]))
        yield from steps
        self.ready[what, stage, batch] = (slot, [steps[-1].id] if steps else free)

    def _freed_by(self, cell: Route, stage: int, batch: int) -> StepId:
        """The last step that uses a cell's slot."""
        if cell.write:
            return StepId(self.sweep, Lane.HOST_TO_DISK, What.CACHE, stage, batch)
        if cell.pull:
            return StepId(self.sweep, Lane.DEVICE_TO_HOST, What.CACHE, stage, batch)
        return StepId(self.sweep, Lane.COMPUTE, What.STAGE, stage, batch)

    def compute(self, stage: int, batch: int, after: Iterable[StepId] = ()) -> Step:
        source = 0 if self.traffic.tied and stage == self.traffic.head else stage
        arrivals = (self._arrival(source, piece, route) for piece, route in enumerate(self.traffic.weights[source]))
        return Step(StepId(self.sweep, Lane.COMPUTE, What.STAGE, stage, batch), (*after, *arrivals))

    def _arrival(self, stage: int, piece: int, route: Route) -> StepId:
        """The step after which a piece of weights is where compute needs it."""
        lane = Lane.HOST_TO_DEVICE if route.push else Lane.DISK_TO_HOST
        return StepId(self.sweep, lane, What.WEIGHTS, stage, -1, piece)

    def load_weights(self, stage: int) -> Iterator[Step]:
        """All pieces of a stage's weights into one slot, unless the sweep before has loaded them."""
        pieces = self.traffic.weights[stage]
        if not pieces or stage in self.loaded:
            return
        self.loaded.add(stage)
        user = self.traffic.head if stage == 0 and self.traffic.tied else stage
        until = self.compute(user, -1 if user == self.traffic.head else self.traffic.num_batches - 1).id
        ring = self.schedule.outer if stage in (0, self.traffic.head) else self.schedule.layers
        slot, free = ring.take(until)
        for piece, route in enumerate(pieces):
            read = StepId(self.sweep, Lane.DISK_TO_HOST, What.WEIGHTS, stage, -1, piece)
            push = read._replace(lane=Lane.HOST_TO_DEVICE)
            if route.read and route.push:  # the slot itself is needed by the second link only
                staging, after = self.schedule.pieces.take(push)
                yield Step(read, tuple(after), slot, staging)
                yield Step(push, (*free, read), slot, staging)
            else:
                yield Step(read if route.read else push, tuple(free), slot)

    def _load(self, what: What, stage: int, batch: int, route: Route, slot: int, after: list[StepId]) -> Iterator[Step]:
        if route.read:
            step = Step(StepId(self.sweep, Lane.DISK_TO_HOST, what, stage, batch), tuple(after), slot)
            yield step
            after = [step.id]
        if route.push:
            yield Step(StepId(self.sweep, Lane.HOST_TO_DEVICE, what, stage, batch), tuple(after), slot)

    def _store(self, what: What, stage: int, batch: int, route: Route, slot: int, computed: StepId) -> Iterator[Step]:
        after = computed
        if route.pull:
            step = Step(StepId(self.sweep, Lane.DEVICE_TO_HOST, what, stage, batch), (after,), slot)
            yield step
            after = step.id
        if route.write:
            yield Step(StepId(self.sweep, Lane.HOST_TO_DISK, what, stage, batch), (after,), slot)

    def _home_ready(self, what: What, stage: int, batch: int, route: Route) -> list[StepId]:
        """The store that brought the data home: a cell's in the sweep before, hidden states' in the layer before."""
        if not (route.write or route.pull):
            return []
        lane = Lane.HOST_TO_DISK if route.write else Lane.DEVICE_TO_HOST
        sweep, stage = (self.sweep - 1, stage) if what is What.CACHE else (self.sweep, stage - 1)
        return [StepId(sweep, lane, what, stage, batch)]


def _chained(steps: list[Step]) -> Iterator[Step]:
    """The same steps, each waiting for the one before it as well; loads move down to right before they are needed."""
    ordered = _just_in_time(steps)
    previous: tuple[StepId, ...] = ()
    for step in ordered:
        yield step._replace(after=(*step.after, *previous))
        previous = (step.id,)


def _just_in_time(steps: list[Step]) -> list[Step]:
    loads = {s.id: s for s in steps if s.id.lane in (Lane.DISK_TO_HOST, Lane.HOST_TO_DEVICE)}
    ordered: list[Step] = []
    taken: set[StepId] = set()

    def take(step: Step) -> None:
        if step.id in taken:
            return
        taken.add(step.id)
        for name in step.after:
            if name in loads:
                take(loads[name])
        ordered.append(step)

    for step in steps:
        if step.id not in loads:
            take(step)
    return ordered
