"""The order of work: what moves in a sweep, turned into steps with the steps they wait for.

One description is executed, simulated, drawn and checked. Nothing here knows bytes, tensors or threads: a `Traffic`
says which links each piece of data crosses, a `Schedule` turns it into steps, and whoever runs them looks up the rest.

Method: the block schedule of FlexGen (arXiv 2303.06865, section 4.1): a loaded layer serves every micro-batch before
the next layer is loaded. Instead of a barrier after every (layer, micro-batch), a step names what it waits for.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence

from .steps import Lane, Rings, Route, Step, StepId, Traffic, What

# with the words in which it is written
__all__ = ["Choose", "Lane", "Rings", "Route", "Schedule", "Step", "StepId", "Traffic", "What"]

_RINGS = Rings()

#: called as `choose(stage, micro-batch)` at the micro-batch's router, to which it has come when this returns: the
#: experts that it needs and no micro-batch before it did, with a route for each piece in which each is moved
Choose = Callable[[int, int], Sequence[tuple[int, tuple[Route, ...]]]]


def _choose_none(_stage: int, _batch: int) -> Sequence[tuple[int, tuple[Route, ...]]]:
    return ()


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

    Which experts a layer needs is known only when its routers have run. So the steps are listed while they are run: at
    a router, whoever takes them is asked (`choose`), and computes everything that is listed before it answers.
    Experts are loaded from the first micro-batch's answer on, as far as their ring reaches, and computed once all
    have answered.

    It remembers which step needs each slot last, from one sweep to the next: the last cells of a sweep may still be on
    their way to disk when the next one begins.

    Args:
        rings: the reused buffers.
        overlap: off chains every step to the one before it, with every load right before it is needed.
    """

    def __init__(self, rings: Rings = _RINGS, *, overlap: bool = True) -> None:
        self.rings, self.overlap = rings, overlap
        #: number of the next sweep
        self.sweep = 0
        self._empty()

    def _empty(self) -> None:
        sizes = self.rings
        self.layers, self.outer, self.pieces = _Ring(sizes.layers), _Ring(sizes.outer), _Ring(sizes.pieces)
        self.cache, self.hidden = _Ring(sizes.cache), _Ring(sizes.hidden)
        self.experts = _Ring(sizes.experts)
        self._loaded_ahead: set[int] = set()  # stages of the next sweep

    def restart(self) -> None:
        """Forgets what is in the slots, after a run that was stopped. No step of it may be at work."""
        self._empty()
        self.sweep += 1

    def steps(
        self, traffic: Traffic, following: Traffic | None = None, choose: Choose = _choose_none
    ) -> Iterator[Step]:
        """All steps of one sweep in an order that every lane can take them in; to be taken to the end.

        Args:
            traffic: what moves.
            following: what will move in the sweep after it, if one will come: its first layers are loaded while this
                one ends, and its embedding once the head has left the slot.
            choose: which experts micro-batches need.

        Yields:
            Steps. Everything a step waits for comes before it or belongs to the sweep before.
        """
        for ring in (self.layers, self.outer):  # what was loaded ahead may be for another call, of another block
            ring.recount(self.sweep, traffic.num_batches)
        steps = _Sweep(self, traffic, self.sweep, self._loaded_ahead, choose).steps()
        yield from steps if self.overlap else _chained(steps)
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

    def __init__(
        self, schedule: Schedule, traffic: Traffic, sweep: int, loaded: set[int], choose: Choose = _choose_none
    ) -> None:
        self.schedule, self.traffic, self.sweep, self.loaded, self.choose = schedule, traffic, sweep, loaded, choose
        self.visits = [(stage, batch) for stage in range(1, traffic.head) for batch in range(traffic.num_batches)]
        self.ready: dict[tuple[What, int, int], tuple[int, list[StepId]]] = {}  # visit -> slot, what compute waits for
        self.begun = {What.CACHE: 0, What.HIDDEN: 0}
        self.held_back: list[Step] = []  # loads of the next layer that have to follow all transfers of this one
        self.stored: list[StepId] = []  # the steps that bring hidden states home, in order
        self.brought: dict[int, tuple[StepId, ...]] = {}  # stage -> the steps that bring its weights
        self.goes_home = [route.moves for route in traffic.hidden]

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
                self.held_back = []
                experts = _Experts(self, stage) if stage in traffic.sparse else None
                upcoming, count = self.spread(stage, ahead)
            # How far ahead: a slot fewer than there are, because the one in use is not free; and what is not yet
            # written cannot be read, so hidden states not farther than the layer before has come.
            yield from self.loads(What.CACHE, cells, number + rings.cache)
            written = stage * batches if experts is not None else number + batches
            yield from self.loads(What.HIDDEN, hidden, min(number + rings.hidden, written))
            if stage == 1:
                yield self.compute(0, batch)
            yield from self.visit(stage, batch)
            size = count * (batch + 1) // batches - count * batch // batches
            part = itertools.islice(upcoming, size if batch < batches - 1 else None)
            yield from part if experts is None else experts.after(batch, part)
            if experts is not None and batch == batches - 1:
                yield from experts.rest()
        if last == 1:  # with a single layer, the embedding leaves the slot only now
            yield from self.load_weights(traffic.head)
        yield self.compute(traffic.head, -1)

    def spread(self, stage: int, ahead: int) -> tuple[Iterator[Step], int]:
        """The weights that are loaded while `stage` computes, and how many of these steps to share out; others follow.

        Buffers are taken when a step is listed. So with experts, whose loads come in between, steps are not listed
        before their turn; and those that are read ahead of their only slot keep staging until this stage has ended,
        so they follow its experts.
        """
        steps = self.loads_ahead(stage, ahead)
        if stage not in self.traffic.sparse:
            listed = list(steps)
            return iter(listed), len(listed)
        stages = {stage + ahead} if ahead and stage + ahead < self.traffic.head else set()
        pieces = [piece for stage in stages - self.loaded for piece in self.traffic.weights[stage]]
        return steps, sum(piece.read + piece.push for piece in pieces)

    def loads_ahead(self, stage: int, ahead: int) -> Iterator[Step]:
        """The weights that are loaded while `stage` computes."""
        last = self.traffic.head - 1
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
        """One micro-batch in one decoder layer: compute, and its cell and hidden states on their way home.

        In a layer with experts, it is the part up to the router, and hidden states go home after the rest.
        """
        cell, is_sparse = self.traffic.cache[stage][batch], stage in self.traffic.sparse
        slot, after = self.ready.pop((What.CACHE, stage, batch), (-1, []))
        _, after_hidden = self.ready.pop((What.HIDDEN, stage, batch), (-1, []))
        room = [] if is_sparse else self.room(stage, batch)
        compute = self.compute(stage, batch, (*after, *after_hidden, *room))._replace(slot=slot)
        yield compute
        if cell.moves:
            yield from self._store(What.CACHE, stage, batch, cell, slot, compute.id)
        if not is_sparse:
            yield from self.hidden_home(stage, batch, compute.id)

    def room(self, stage: int, batch: int) -> list[StepId]:
        """What has to be home before compute makes more: what is made faster than it goes home would pile up."""
        size = self.schedule.rings.hidden
        return [self.stored[-size]] if self._goes_home(stage, batch) and len(self.stored) >= size else []

    def hidden_home(self, stage: int, batch: int, computed: StepId) -> Iterator[Step]:
        """Hidden states on their way home, if they have one elsewhere."""
        if self._goes_home(stage, batch):
            stores = list(self._store(What.HIDDEN, stage, batch, self.traffic.hidden[batch], -1, computed))
            self.stored += [step.id for step in stores[-1:]]
            yield from stores

    def _goes_home(self, stage: int, batch: int) -> bool:
        return self.goes_home[batch] and stage < self.traffic.head - 1

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
        until = self._freed_by(route, stage, batch) if is_cell else self.computed(stage, batch)
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
        return self.computed(stage, batch)

    def computed(self, stage: int, batch: int) -> StepId:
        """The name of a compute step."""
        return StepId(self.sweep, Lane.COMPUTE, What.STAGE, stage, batch)

    def compute(self, stage: int, batch: int, after: Iterable[StepId] = ()) -> Step:
        source = 0 if self.traffic.tied and stage == self.traffic.head else stage
        if source not in self.brought:
            self.brought[source] = tuple(self.arrivals(What.WEIGHTS, source, -1, self.traffic.weights[source]))
        return Step(self.computed(stage, batch), (*after, *self.brought[source]))

    def arrivals(self, what: What, stage: int, batch: int, pieces: Sequence[Route]) -> Iterator[StepId]:
        """The steps after which each piece of weights is where compute needs it."""
        for piece, route in enumerate(pieces):
            lane = Lane.HOST_TO_DEVICE if route.push else Lane.DISK_TO_HOST
            yield StepId(self.sweep, lane, what, stage, batch, piece)

    def load_weights(self, stage: int) -> Iterator[Step]:
        """All pieces of a stage's weights into one slot, unless the sweep before has loaded them."""
        pieces = self.traffic.weights[stage]
        if not pieces or stage in self.loaded:
            return
        self.loaded.add(stage)
        user = self.traffic.head if stage == 0 and self.traffic.tied else stage
        until = self.computed(user, -1 if user == self.traffic.head else self.traffic.num_batches - 1)
        if user in self.traffic.sparse:
            until = until._replace(what=What.REST)
        ring = self.schedule.outer if stage in (0, self.traffic.head) else self.schedule.layers
        yield from self.load_pieces(What.WEIGHTS, stage, -1, pieces, *ring.take(until))

    def load_pieces(
        self, what: What, stage: int, batch: int, pieces: Sequence[Route], slot: int, free: list[StepId]
    ) -> Iterator[Step]:
        """All pieces of a load into a slot that is free after some steps."""
        for piece, route in enumerate(pieces):
            read = StepId(self.sweep, Lane.DISK_TO_HOST, what, stage, batch, piece)
            push = StepId(self.sweep, Lane.HOST_TO_DEVICE, what, stage, batch, piece)
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


class _Experts:
    """The steps of one layer's experts: loaded one after the other, each computed for the whole block."""

    def __init__(self, sweep: _Sweep, stage: int) -> None:
        self.sweep, self.stage = sweep, stage
        self.chosen: list[tuple[int, tuple[Route, ...]]] = []
        self.begun = 0  # of the chosen ones, how many are on their way or were
        self.in_use = 0  # slots that are filled, or on their way to be
        self.slots: dict[int, int] = {}  # of each expert that has one

    def after(self, batch: int, part: Iterable[Step]) -> Iterator[Step]:
        """What follows a micro-batch's router: loads; `part` of the next layer's; after the last one all experts."""
        self.chosen += self.sweep.choose(self.stage, batch)
        yield from self._loads()
        if batch < self.sweep.traffic.num_batches - 1:
            yield from part
            return
        for expert, pieces in self.chosen:
            yield from self._loads()
            if self.begun == len(self.chosen):  # what comes next is to be at hand when these are used up
                yield from part
                part = ()
            name = StepId(self.sweep.sweep, Lane.COMPUTE, What.EXPERT, self.stage, expert)
            arrivals = self.sweep.arrivals(What.EXPERT, self.stage, expert, pieces)
            yield Step(name, tuple(arrivals), self.slots.get(expert, -1))
            self.in_use -= bool(pieces)
        yield from part

    def _loads(self) -> Iterator[Step]:
        """Loads as many as there are free slots: one that waits for a slot would stand in the way of the next cell."""
        ring, size = self.sweep.schedule.experts, self.sweep.schedule.rings.experts
        while self.begun < len(self.chosen):
            expert, pieces = self.chosen[self.begun]
            if pieces and self.in_use == size:
                return
            self.begun += 1
            self.in_use += bool(pieces)
            if pieces:
                until = StepId(self.sweep.sweep, Lane.COMPUTE, What.EXPERT, self.stage, expert)
                self.slots[expert], free = ring.take(until)
                slot = self.slots[expert]
                yield from self.sweep.load_pieces(What.EXPERT, self.stage, expert, pieces, slot, free)

    def rest(self) -> Iterator[Step]:
        """What the layer does with what experts gave, for each micro-batch, and its hidden states on their way home."""
        for batch in range(self.sweep.traffic.num_batches):
            name = StepId(self.sweep.sweep, Lane.COMPUTE, What.REST, self.stage, batch)
            yield Step(name, tuple(self.sweep.room(self.stage, batch)))
            yield from self.sweep.hidden_home(self.stage, batch, name)


def _chained(steps: Iterable[Step]) -> Iterator[Step]:
    """The same steps, each waiting for the one before it as well; loads move down to right before they are needed."""
    previous: tuple[StepId, ...] = ()
    for step in _just_in_time(steps):
        yield step._replace(after=(*step.after, *previous))
        previous = (step.id,)


def _just_in_time(steps: Iterable[Step]) -> Iterator[Step]:
    """Each load right before the first step that waits for it; others keep their order, and are taken one by one."""
    loads: dict[StepId, Step] = {}  # those that nothing was seen to wait for yet

    def take(step: Step) -> Iterator[Step]:
        for name in step.after:
            if name in loads:
                yield from take(loads.pop(name))
        yield step

    for step in steps:
        if step.id.lane in (Lane.DISK_TO_HOST, Lane.HOST_TO_DEVICE):
            loads[step.id] = step
        else:
            yield from take(step)
