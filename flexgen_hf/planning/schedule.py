"""The order of work as data: steps with the steps they wait for.

One description is executed, simulated, drawn and checked. Nothing here knows bytes, tensors or threads: a `Traffic`
says which links each piece of data crosses, `zigzag` turns it into steps, and whoever runs them looks up the rest.

Method: the block schedule of FlexGen (arXiv 2303.06865, section 4.1): a loaded layer serves every micro-batch before
the next layer is loaded. Instead of a barrier after every (layer, micro-batch), a step names what it waits for.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterator
from typing import NamedTuple

__all__ = ["Lane", "Rings", "Route", "Step", "StepId", "Traffic", "What", "prefetch", "zigzag"]


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
    """The name of a step. `batch` is -1 where a step serves all micro-batches."""

    sweep: int
    lane: Lane
    what: What
    stage: int
    batch: int = -1

    def __str__(self) -> str:
        batch = f", micro-batch {self.batch}" if self.batch >= 0 else ""
        what = "compute" if self.what is What.STAGE else self.what
        return f"{what} of stage {self.stage}{batch} in sweep {self.sweep}"


class Step(NamedTuple):
    """A unit of work in one lane.

    Args:
        id: its name.
        after: names of the steps it waits for. All of them come earlier in the schedule, or belong to an earlier sweep.
        slot: which reused buffer of its ring it fills or uses, -1 if none; for a compute step, that of its cell.
    """

    id: StepId
    after: tuple[StepId, ...] = ()
    slot: int = -1


@dataclasses.dataclass(frozen=True)
class Rings:
    """How many reused buffers there are of each kind. More means more look-ahead and more memory."""

    layers: int = 2
    outer: int = 1
    cache: int = 3
    hidden: int = 3


@dataclasses.dataclass(frozen=True)
class Traffic:
    """What has to move in one sweep.

    Args:
        weights: a route for each stage; 0 is the embedding, the last one the head.
        cache: for each stage, a route for each micro-batch. Embedding and head have none.
        hidden: a route for each micro-batch, crossed between one decoder layer and the next.
        fresh_cache: the cells are empty, so nothing is loaded (the prompt's sweep).
        tied: the head computes with the embedding's weights, which stay in their slot.
    """

    weights: tuple[Route, ...]
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


def zigzag(traffic: Traffic, sweep: int, *, rings: Rings = Rings(), overlap: bool = True) -> Iterator[Step]:
    """All steps of one sweep in an order that every lane can take them in.

    The embedding runs right before the first layer, micro-batch by micro-batch, so that no hidden states wait there.
    The head is one step for the whole block: what reaches it is small, and its table is the largest matrix of all.

    Args:
        traffic: what moves.
        sweep: number of this sweep since the weights' rings were empty.
        rings: the reused buffers.
        overlap: off chains every step to the one before it.

    Yields:
        Steps. Everything a step waits for comes before it or belongs to the sweep before.
    """
    steps = _Zigzag(traffic, sweep, rings).steps()
    return steps if overlap else _chained(steps)


def prefetch(traffic: Traffic, sweep: int, *, rings: Rings = Rings()) -> Iterator[Step]:
    """The weight loads of sweep `sweep` that can start while sweep `sweep - 1` ends: its first stages.

    `zigzag` yields the same steps; a runner takes each once. The layers come first here: the embedding's slot is the
    head's, which is needed until the very end.
    """
    loads = _Zigzag(traffic, sweep, rings)
    yield from loads.first_layers()
    yield from loads.load_weights(0)


class _Zigzag:
    def __init__(self, traffic: Traffic, sweep: int, rings: Rings) -> None:
        self.traffic, self.sweep, self.rings = traffic, sweep, rings
        # The step that frees each use of a slot, in order of use. Those of cache slots begin with the sweep before,
        # whose last cells may still be on their way home; hidden states are free when a sweep ends.
        self.cache_uses = self._last_cache_uses()
        self.hidden_uses: list[StepId] = []

    def steps(self) -> Iterator[Step]:
        traffic, ahead = self.traffic, self.rings.layers - 1
        last = traffic.head - 1
        yield from self.load_weights(0)
        yield from self.first_layers()
        for stage in range(1, traffic.head):
            if not ahead and stage > 1:
                yield from self.load_weights(stage)
            for batch in range(traffic.num_batches):
                if stage == 1:
                    yield self.compute(0, batch)
                yield from self.visit(stage, batch)
                if batch == 0:  # behind the first cell: what is needed now must not stand in line behind what is not
                    yield from self.loads_ahead(stage, ahead)
        if last == 1:  # with a single layer, the embedding leaves the slot only now
            yield from self.load_weights(traffic.head)
        yield self.compute(traffic.head, -1)

    def loads_ahead(self, stage: int, ahead: int) -> Iterator[Step]:
        """The weights that are loaded while `stage` computes."""
        last = self.traffic.head - 1
        if ahead and stage + ahead <= last and stage + ahead not in self._first_layers():
            yield from self.load_weights(stage + ahead)
        if stage == last > 1:
            yield from self.load_weights(self.traffic.head)

    def first_layers(self) -> Iterator[Step]:
        for stage in self._first_layers():
            yield from self.load_weights(stage)

    def _first_layers(self) -> range:
        """The layers whose weights can be loaded while none has run: as many as there is look-ahead, at least one."""
        return range(1, 1 + min(max(1, self.rings.layers - 1), self.traffic.head - 1))

    def visit(self, stage: int, batch: int) -> Iterator[Step]:
        """One micro-batch in one decoder layer: its cell and hidden states in, compute, both out."""
        cell, hidden = self.traffic.cache[stage][batch], self.traffic.hidden[batch]
        cache_slot, hidden_slot = -1, -1
        after: list[StepId] = []
        if cell.moves:
            cache_slot, free = self._slot(self.cache_uses, self.rings.cache)
            load = list(self._load(What.CACHE, stage, batch, cell, cache_slot, free))
            yield from load
            after += [load[-1].id] if load else free
        if hidden.moves and stage > 1:
            hidden_slot, free = self._slot(self.hidden_uses, self.rings.hidden)
            load = list(self._load(What.HIDDEN, stage, batch, hidden, hidden_slot, free))
            yield from load
            after += [load[-1].id] if load else free
        compute = self.compute(stage, batch, tuple(after))._replace(slot=cache_slot)
        yield compute
        if cell.moves:
            yield from self._store(What.CACHE, stage, batch, cell, cache_slot, compute.id)
            self.cache_uses.append(self._freed_by(cell, self.sweep, stage, batch))
        if hidden_slot >= 0:
            self.hidden_uses.append(compute.id)  # layers return a new tensor; the loaded one is free again
        if hidden.moves and stage < self.traffic.head - 1:
            yield from self._store(What.HIDDEN, stage, batch, hidden, -1, compute.id)

    @staticmethod
    def _freed_by(cell: Route, sweep: int, stage: int, batch: int) -> StepId:
        """The last step that uses a cell's slot."""
        if cell.write:
            return StepId(sweep, Lane.HOST_TO_DISK, What.CACHE, stage, batch)
        if cell.pull:
            return StepId(sweep, Lane.DEVICE_TO_HOST, What.CACHE, stage, batch)
        return StepId(sweep, Lane.COMPUTE, What.STAGE, stage, batch)

    def _last_cache_uses(self) -> list[StepId]:
        """The uses of the cache slots in the sweep before, padded so that slots are counted from 0 in every sweep."""
        cells = [
            (route, stage, batch)
            for stage, batches in enumerate(self.traffic.cache)
            for batch, route in enumerate(batches)
            if route.moves
        ]
        if self.sweep == 0 or not cells:
            return []
        uses = [self._freed_by(route, self.sweep - 1, stage, batch) for route, stage, batch in cells]
        size = self.rings.cache
        newest = {use % size: name for use, name in enumerate(uses)}
        return [newest.get(slot, uses[-1]) for slot in range(size)]

    def compute(self, stage: int, batch: int, after: tuple[StepId, ...] = ()) -> Step:
        source = 0 if self.traffic.tied and stage == self.traffic.head else stage
        route = self.traffic.weights[source]
        wait = (*after, *self._arrival(What.WEIGHTS, source, -1, route))
        return Step(StepId(self.sweep, Lane.COMPUTE, What.STAGE, stage, batch), wait)

    def load_weights(self, stage: int) -> Iterator[Step]:
        route = self.traffic.weights[stage]
        if not route.moves:
            return
        slot, free = self._weights_slot(stage)
        yield from self._load(What.WEIGHTS, stage, -1, route, slot, free)

    def _weights_slot(self, stage: int) -> tuple[int, list[StepId]]:
        """The slot of a stage's weights, and the last compute step of the stage that had it before."""
        traffic, layers = self.traffic, self.traffic.head - 1
        if stage in (0, traffic.head):
            use, size = 2 * self.sweep + (stage > 0), self.rings.outer
            before = divmod(use - size, 2)
            owner = (before[0], traffic.head if before[1] else 0)
        else:
            use, size = layers * self.sweep + stage - 1, self.rings.layers
            before = divmod(use - size, layers)
            owner = (before[0], before[1] + 1)
        last = -1 if owner[1] == traffic.head else traffic.num_batches - 1
        free = [StepId(owner[0], Lane.COMPUTE, What.STAGE, owner[1], last)] if owner[0] >= 0 else []
        return use % size, free

    @staticmethod
    def _slot(uses: list[StepId], size: int) -> tuple[int, list[StepId]]:
        use = len(uses)
        return use % size, ([uses[use - size]] if use >= size else [])

    def _arrival(self, what: What, stage: int, batch: int, route: Route) -> list[StepId]:
        """The step after which the data is on the device; none if it does not move."""
        if route.push:
            return [StepId(self.sweep, Lane.HOST_TO_DEVICE, what, stage, batch)]
        return [StepId(self.sweep, Lane.DISK_TO_HOST, what, stage, batch)] if route.read else []

    def _load(self, what: What, stage: int, batch: int, route: Route, slot: int, free: list[StepId]) -> Iterator[Step]:
        if what is What.CACHE and self.traffic.fresh_cache:
            return
        after = [*free, *self._home_ready(what, stage, batch, route)]
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
        if what is What.WEIGHTS or not (route.write or route.pull):
            return []
        lane = Lane.HOST_TO_DISK if route.write else Lane.DEVICE_TO_HOST
        sweep, stage = (self.sweep - 1, stage) if what is What.CACHE else (self.sweep, stage - 1)
        return [StepId(sweep, lane, what, stage, batch)]


def _chained(steps: Iterator[Step]) -> Iterator[Step]:
    """The same steps, each waiting for the one before it as well; loads move down to right before they are needed."""
    ordered = _just_in_time(list(steps))
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
