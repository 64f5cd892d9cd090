"""The schedule as data: whatever moves and however lanes race, each step finds what it needs where it needs it.

No threads and no tensors here: sweeps are chained as the executor submits them, and what a step touches (slots, homes,
tensors on their way) is checked against what it waits for.
"""

import dataclasses
import itertools
import random
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexgen_hf.planning.schedule import Choose, Lane, Rings, Route, Schedule, Step, StepId, Traffic, What

STILL = Route()
# what a cell or hidden states may cross: nothing; RAM and disk; device and RAM; all of it
HOMES = [STILL, Route(read=True, write=True), Route(push=True, pull=True), Route(True, True, True, True)]
# each piece: read to where it is used, from RAM to the device, or both through staging
WEIGHTS = [Route(read=True), Route(push=True), Route(read=True, push=True)]

# of experts, by number: those that live where compute is, and all ways to get there
EXPERTS = [(), (Route(read=True),), (Route(read=True, push=True),) * 2, (Route(push=True),), (Route(read=True),) * 2]

LOADS = (Lane.DISK_TO_HOST, Lane.HOST_TO_DEVICE)
STORES = (Lane.DEVICE_TO_HOST, Lane.HOST_TO_DISK)


@st.composite
def traffics(draw) -> Traffic:
    layers, batches = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    tied = draw(st.booleans())
    nothing = (STILL,) * batches
    cells = [tuple(draw(st.sampled_from(HOMES)) for _ in range(batches)) for _ in range(layers)]
    weights = [tuple(draw(st.lists(st.sampled_from(WEIGHTS), max_size=3))) for _ in range(layers + 2)]
    return Traffic(
        weights=(*weights[:-1], () if tied else weights[-1]),
        cache=(nothing, *cells, nothing),
        hidden=tuple(draw(st.sampled_from(HOMES)) for _ in range(batches)),
        tied=tied,
        sparse=draw(st.frozensets(st.integers(1, layers))),
    )


RINGS = st.builds(
    Rings,
    layers=st.integers(1, 4),
    pieces=st.integers(1, 5),
    cache=st.integers(1, 5),
    hidden=st.integers(1, 4),
    experts=st.integers(1, 3),
)
# whether a sweep begins with empty cells; the first does
FRESH = st.lists(st.booleans(), max_size=3).map(lambda flags: [True, *flags])

everything = pytest.mark.parametrize("overlap", [True, False])
drawn = settings(max_examples=60, deadline=None)


@dataclasses.dataclass
class Program:
    """Several sweeps in the order in which the executor submits them."""

    traffic: Traffic
    rings: Rings
    fresh: list[bool]
    overlap: bool = True
    batches: tuple[int, ...] = ()  # micro-batches of each call; as many as there are, if it is not said

    def __post_init__(self):
        schedule = Schedule(self.rings, overlap=self.overlap)
        self.steps: list[Step] = []
        for sweep in range(len(self.fresh)):
            traffic = self.of_sweep(sweep)
            weights = ((), *traffic.weights[1:]) if traffic.tied else traffic.weights
            # whoever runs this does not know yet that the next sweep may be another call's, of another block
            following = dataclasses.replace(traffic, weights=weights, fresh_cache=False)
            following_or_none = following if sweep + 1 < len(self.fresh) else None
            for step in schedule.steps(traffic, following_or_none, self.chooser(sweep)):
                self.steps.append(step)
        self.ids = [step.id for step in self.steps]
        self.at = {name: index for index, name in enumerate(self.ids)}

    def of_sweep(self, sweep: int) -> Traffic:
        """The traffic of one sweep: a tied table that was loaded stays where it is."""
        weights = list(self.traffic.weights)
        if sweep and self.traffic.tied:
            weights[0] = ()
        count = self.num_batches(sweep)
        return dataclasses.replace(
            self.traffic,
            weights=tuple(weights),
            cache=tuple(routes[:count] for routes in self.traffic.cache),
            hidden=self.traffic.hidden[:count],
            fresh_cache=self.fresh[sweep],
        )

    def chosen(self, sweep: int, stage: int, batch: int) -> set[int]:
        """The experts that a micro-batch chooses: any, a few of them, none at times."""
        dice = random.Random(f"{sweep}, {stage}, {batch}")  # noqa: S311
        return {dice.randrange(len(EXPERTS)) for _ in range(dice.randint(0, 3))}

    def experts(self, sweep: int, stage: int) -> set[int]:
        """Those that a block chooses in a layer; none where there are none."""
        batches = range(self.num_batches(sweep) if stage in self.traffic.sparse else 0)
        return set().union(*(self.chosen(sweep, stage, batch) for batch in batches))

    def chooser(self, sweep: int) -> Choose:
        """Answers once what the micro-batch waits for, and all that was computed before it, is listed."""

        def choose(stage: int, batch: int) -> list[tuple[int, tuple[Route, ...]]]:
            assert StepId(sweep, Lane.COMPUTE, What.STAGE, stage, batch) in {step.id for step in self.steps}
            known = set().union(*(self.chosen(sweep, stage, other) for other in range(batch)))
            return [(expert, EXPERTS[expert]) for expert in sorted(self.chosen(sweep, stage, batch) - known)]

        return choose

    def num_batches(self, sweep: int) -> int:
        """Micro-batches of one sweep."""
        call = sum(self.fresh[: sweep + 1]) - 1
        return min([self.traffic.num_batches, *self.batches[call : call + 1]])

    def ancestors(self, fifo: Iterable[Lane] = (Lane.COMPUTE,)) -> list[int]:
        """For each step the set of steps that are done before it begins, as a bit mask.

        Args:
            fifo: lanes whose order counts. Compute always has one, the order of the thread that issues it.
        """
        sets: list[int] = []
        last: dict[Lane, int] = {}
        for index, step in enumerate(self.steps):
            before = [self.at[name] for name in step.after if name in self.at]
            if step.id.lane in fifo and step.id.lane in last:
                before.append(last[step.id.lane])
            last[step.id.lane] = index
            done = 0
            for other in before:
                done |= sets[other] | 1 << other
            sets.append(done)
        return sets

    def compute(self, sweep: int, stage: int, batch: int) -> StepId:
        head = stage == self.traffic.head
        return StepId(sweep, Lane.COMPUTE, What.STAGE, stage, -1 if head else batch)


programs = st.builds(
    Program, traffics(), RINGS, FRESH, st.booleans(), st.lists(st.integers(1, 4), max_size=4).map(tuple)
)


# ----------------------------------------------------------------------------------------------- what each step touches


@dataclasses.dataclass(frozen=True)
class Touch:
    """A step uses some memory. Of two users, one must be done before the other, unless both only read the same."""

    memory: tuple[object, ...]
    user: tuple[object, ...]
    writes: bool = True


def touches(program: Program) -> Iterator[tuple[int, Touch]]:
    slots = {step.id: step.slot for step in program.steps}
    for index, step in enumerate(program.steps):
        traffic = program.of_sweep(step.id.sweep)
        touched = _OF[step.id.what](program, traffic, step, slots)
        yield from ((index, touch) for touch in touched)


def _of_weights(program: Program, traffic: Traffic, step: Step, slots: dict[StepId, int]) -> Iterator[Touch]:
    stage, piece = step.id.stage, step.id.piece
    route, user = traffic.weights[stage][piece], (step.id.sweep, stage)
    if route.read and route.push:
        assert step.staging >= 0
        yield Touch(("pieces", step.staging), (*user, piece))
    if not (route.read and route.push and step.id.lane is Lane.DISK_TO_HOST):
        yield from _weights_slot(program, stage, step.slot, user)


def _weights_slot(program: Program, stage: int, slot: int, user: tuple[object, ...]) -> Iterator[Touch]:
    assert slot >= 0
    yield Touch(("outer" if stage in (0, program.traffic.head) else "layers", slot), user)


def _of_expert(program: Program, traffic: Traffic, step: Step, slots: dict[StepId, int]) -> Iterator[Touch]:
    stage, expert, user = step.id.stage, step.id.batch, (step.id.sweep, step.id.stage, step.id.batch)
    if step.id.lane is Lane.COMPUTE:
        yield from _weights_in_use(program, step.id.sweep, stage, slots)
        if EXPERTS[expert]:
            yield Touch(("experts", step.slot), user)
        return
    route = EXPERTS[expert][step.id.piece]
    if route.read and route.push:
        yield Touch(("pieces", step.staging), (*user, step.id.piece, "expert"))
    if not (route.read and route.push and step.id.lane is Lane.DISK_TO_HOST):
        yield Touch(("experts", step.slot), user)


def _of_rest(program: Program, traffic: Traffic, step: Step, slots: dict[StepId, int]) -> Iterator[Touch]:
    yield from _weights_in_use(program, step.id.sweep, step.id.stage, slots)
    if traffic.hidden[step.id.batch].moves and step.id.stage < traffic.head - 1:
        yield Touch(("parked", step.id.batch), (step.id,))


def _of_cell(program: Program, traffic: Traffic, step: Step, slots: dict[StepId, int]) -> Iterator[Touch]:
    sweep, lane, _, stage, batch, _ = step.id
    route, user = traffic.cache[stage][batch], (sweep, stage, batch)
    assert step.slot >= 0
    if (lane in (Lane.HOST_TO_DEVICE, Lane.DEVICE_TO_HOST) and route.write) or not route.push or lane not in _ON_DEVICE:
        yield Touch(("cache", "host", step.slot), user)
    if lane in _ON_DEVICE and route.push:
        yield Touch(("cache", "device", step.slot), user)
    reads_home = lane is (Lane.DISK_TO_HOST if route.read else Lane.HOST_TO_DEVICE)
    writes_home = lane is (Lane.HOST_TO_DISK if route.write else Lane.DEVICE_TO_HOST)
    if reads_home or writes_home:
        generation = sum(program.fresh[: sweep + 1])  # each begins with cells of its own
        yield Touch(("home", generation, stage, batch), (step.id,), writes_home)


_ON_DEVICE = (Lane.HOST_TO_DEVICE, Lane.COMPUTE, Lane.DEVICE_TO_HOST)


def _of_hidden(program: Program, traffic: Traffic, step: Step, slots: dict[StepId, int]) -> Iterator[Touch]:
    sweep, lane, _, stage, batch, _ = step.id
    route = traffic.hidden[batch]
    if lane in LOADS:
        assert step.slot >= 0
        if route.read:
            yield Touch(("hidden", "host", step.slot), (sweep, stage, batch))
        if lane is Lane.HOST_TO_DEVICE:
            yield Touch(("hidden", "device", step.slot), (sweep, stage, batch))
    first_store = Lane.DEVICE_TO_HOST if route.pull else Lane.HOST_TO_DISK
    if lane is first_store:
        yield Touch(("parked", batch), (step.id,))
    if route.pull and lane in (Lane.DEVICE_TO_HOST, Lane.HOST_TO_DISK):
        yield Touch(("pulled", batch), (step.id,))
    if route.write and lane in (Lane.HOST_TO_DISK, Lane.DISK_TO_HOST):
        yield Touch(("written", batch), (step.id,), lane is Lane.HOST_TO_DISK)
    if route.push and not route.read and lane is Lane.HOST_TO_DEVICE:
        yield Touch(("pulled", batch), (step.id,))


def _of_stage(program: Program, traffic: Traffic, step: Step, slots: dict[StepId, int]) -> Iterator[Touch]:
    sweep, stage, batch = step.id.sweep, step.id.stage, step.id.batch
    yield from _weights_in_use(program, sweep, stage, slots)
    if not 0 < stage < traffic.head:
        return
    if traffic.cache[stage][batch].moves:
        yield from _of_cell(program, traffic, step, slots)
    route = traffic.hidden[batch]
    if route.moves and stage > 1:
        name = StepId(sweep, Lane.HOST_TO_DEVICE if route.push else Lane.DISK_TO_HOST, What.HIDDEN, stage, batch)
        yield Touch(("hidden", "device" if route.push else "host", slots[name]), (sweep, stage, batch))
    if route.moves and stage < traffic.head - 1 and stage not in traffic.sparse:
        yield Touch(("parked", batch), (step.id,))


def _weights_in_use(program: Program, sweep: int, stage: int, slots: dict[StepId, int]) -> Iterator[Touch]:
    tied, head = program.traffic.tied, program.traffic.head
    source = 0 if tied and stage == head else stage
    loaded = 0 if tied and source == 0 else sweep
    for piece, route in enumerate(program.traffic.weights[source]):
        lane = Lane.HOST_TO_DEVICE if route.push else Lane.DISK_TO_HOST
        slot = slots[StepId(loaded, lane, What.WEIGHTS, source, -1, piece)]
        yield from _weights_slot(program, source, slot, (loaded, source))


_OF = {
    What.WEIGHTS: _of_weights,
    What.EXPERT: _of_expert,
    What.CACHE: _of_cell,
    What.HIDDEN: _of_hidden,
    What.STAGE: _of_stage,
    What.REST: _of_rest,
}


def races(program: Program) -> Iterator[str]:
    """Pairs of users of the same memory of which neither waits for the other."""
    ancestors = program.ancestors()
    users: dict[tuple[object, ...], list[tuple[int, Touch]]] = defaultdict(list)
    for index, touch in touches(program):
        users[touch.memory].append((index, touch))
    for memory, list_of_users in users.items():
        for (first, one), (second, other) in itertools.combinations(list_of_users, 2):
            if one.user != other.user and (one.writes or other.writes) and not ancestors[second] >> first & 1:
                yield f"{memory}: {program.ids[second]} does not wait for {program.ids[first]}"


# ----------------------------------------------------------------------------------------------------------- properties


@given(programs)
@drawn
def test_a_step_waits_only_for_what_comes_earlier(program):
    seen: set[StepId] = set()
    for step in program.steps:
        for name in step.after:
            assert name in seen or name.sweep < 0, f"{step.id} waits for {name}"
        seen.add(step.id)


@given(programs)
@drawn
def test_every_micro_batch_passes_every_stage_once_and_in_order(program):
    head = program.traffic.head
    for sweep in range(len(program.fresh)):
        batches = program.num_batches(sweep)
        of_sweep = [s.id for s in program.steps if s.id.sweep == sweep and s.id.lane is Lane.COMPUTE]
        computed = [(name.stage, name.batch) for name in of_sweep if name.what is What.STAGE]
        layers = [(stage, batch) for stage in range(1, head) for batch in range(batches)]
        assert [name for name in computed if 0 < name[0] < head] == layers
        assert len(computed) == len(set(computed)) == len(layers) + batches + 1
        for batch in range(batches):
            assert computed.index((0, batch)) < computed.index((1, batch))
        assert computed[-1] == (head, -1)
        for stage in program.traffic.sparse:
            parts = [name for name in of_sweep if name.stage == stage]
            experts = parts[batches:-batches]
            assert [name.what for name in parts[:batches]] == [What.STAGE] * batches
            assert {name.what for name in experts} <= {What.EXPERT}
            assert {name.batch for name in experts} == program.experts(sweep, stage)
            assert len(experts) == len(program.experts(sweep, stage))
            assert [(name.what, name.batch) for name in parts[-batches:]] == [(What.REST, k) for k in range(batches)]


@given(programs)
@drawn
def test_nothing_moves_twice_and_everything_that_has_to_moves(program):
    assert len(set(program.ids)) == len(program.ids)
    for sweep, fresh in enumerate(program.fresh):
        traffic = program.of_sweep(sweep)
        moved = {s.id[1:] for s in program.steps if s.id.sweep == sweep and s.id.lane is not Lane.COMPUTE}
        expected = set()
        for stage, pieces in enumerate(traffic.weights):
            for piece, route in enumerate(pieces):
                expected |= crossings(route, What.WEIGHTS, stage, -1, load=True, piece=piece)
        for stage in range(1, traffic.head):
            for expert in program.experts(sweep, stage):
                for piece, route in enumerate(EXPERTS[expert]):
                    expected |= crossings(route, What.EXPERT, stage, expert, load=True, piece=piece)
            for batch, route in enumerate(traffic.cache[stage]):
                expected |= crossings(route, What.CACHE, stage, batch, load=not fresh, store=True)
            for batch, route in enumerate(traffic.hidden):
                is_last = stage == traffic.head - 1
                expected |= crossings(route, What.HIDDEN, stage, batch, load=stage > 1, store=not is_last)
        assert moved == expected


def crossings(
    route: Route, what: What, stage: int, batch: int, *, load=False, store=False, piece=0
) -> set[tuple[object, ...]]:
    lanes = zip((Lane.DISK_TO_HOST, Lane.HOST_TO_DEVICE, Lane.DEVICE_TO_HOST, Lane.HOST_TO_DISK), route, strict=True)
    return {(lane, what, stage, batch, piece) for lane, on in lanes if on and (load if lane in LOADS else store)}


@given(programs)
@drawn
def test_a_compute_step_finds_its_data(program):
    ancestors = program.ancestors()

    def assert_after(later: StepId, earlier: StepId) -> None:
        assert ancestors[program.at[later]] >> program.at[earlier] & 1, f"{later} does not wait for {earlier}"

    for name, other in itertools.product(program.ids, program.ids):
        if name.lane is Lane.COMPUTE and other.lane in LOADS and _feeds(program, other, name):
            assert_after(name, other)
        same = (other.sweep, other.stage, other.batch) == (name.sweep, name.stage, name.batch)
        makes = What.STAGE if other.what is What.CACHE else makes_hidden(program, name.stage)
        if name.lane is Lane.COMPUTE and other.lane in STORES and same and name.what is makes:
            assert_after(other, name)


def makes_hidden(program: Program, stage: int) -> What:
    """The kind of step after which a layer's hidden states are there."""
    return What.REST if stage in program.traffic.sparse else What.STAGE


def _feeds(program: Program, load: StepId, compute: StepId) -> bool:
    if load.sweep != compute.sweep:
        return False
    if What.EXPERT in (load.what, compute.what):
        return load.what is compute.what and (load.stage, load.batch) == (compute.stage, compute.batch)
    if load.what is not What.WEIGHTS:
        return (load.stage, load.batch) == (compute.stage, compute.batch)
    tied_head = program.traffic.tied and compute.stage == program.traffic.head
    return load.stage == (0 if tied_head else compute.stage)


@given(programs)
@drawn
def test_what_went_home_is_home_before_it_is_loaded_again(program):
    ancestors = program.ancestors()
    for name in program.ids:
        if name.lane not in LOADS or name.what in (What.WEIGHTS, What.EXPERT):
            continue
        is_cell = name.what is What.CACHE
        sweep, stage = (name.sweep - 1, name.stage) if is_cell else (name.sweep, name.stage - 1)
        for lane in STORES:
            stored = StepId(sweep, lane, name.what, stage, name.batch)
            if stored in program.at:
                assert ancestors[program.at[name]] >> program.at[stored] & 1


@given(programs)
@drawn
def test_hidden_states_on_their_way_home_do_not_pile_up(program):
    ancestors = program.ancestors()
    leaving: dict[int, list[StepId]] = defaultdict(list)  # the last steps that bring them home
    for step in program.steps:
        name = step.id
        if name.what is What.HIDDEN and name.lane in STORES:
            route = program.of_sweep(name.sweep).hidden[name.batch]
            if name.lane is (Lane.HOST_TO_DISK if route.write else Lane.DEVICE_TO_HOST):
                leaving[name.sweep].append(name)
        is_layer = name.lane is Lane.COMPUTE and 0 < name.stage < program.traffic.head - 1
        if (
            is_layer
            and name.what is makes_hidden(program, name.stage)
            and program.of_sweep(name.sweep).hidden[name.batch].moves
        ):
            done = ancestors[program.at[name]]
            waiting = [other for other in leaving[name.sweep] if not done >> program.at[other] & 1]
            assert len(waiting) < program.rings.hidden


@given(programs)
@drawn
def test_no_two_users_of_one_slot_overlap_within_and_across_sweeps(program):
    assert next(races(program), None) is None


class TestTheCheckerItself:
    """A checker that finds nothing proves nothing: dependencies are taken out, and it must say so."""

    @staticmethod
    def program() -> Program:
        disk = Route(read=True, write=True)
        nothing = (STILL,) * 3
        traffic = Traffic(
            weights=((Route(read=True), Route(read=True, push=True)),) * 6,
            cache=(nothing, *((disk,) * 3,) * 4, nothing),
            hidden=(disk,) * 3,
        )
        return Program(traffic, Rings(layers=2, cache=2, hidden=2), [True, False, False])

    def test_the_schedule_as_it_is_has_no_race(self):
        assert list(races(self.program())) == []

    @pytest.mark.parametrize("what", [What.WEIGHTS, What.CACHE, What.HIDDEN])
    def test_a_load_that_waits_for_nothing_is_found(self, what):
        program = self.program()
        program.steps = [s._replace(after=()) if s.id.lane in LOADS and s.id.what is what else s for s in program.steps]
        assert any(str(what) in race for race in races(program))

    def test_one_slot_instead_of_two_is_found(self):
        program = self.program()
        program.steps = [s._replace(slot=0) if s.id.what is What.CACHE else s for s in program.steps]
        assert list(races(program))


# ----------------------------------------------------------------------------------------------------------- no barrier


def streaming(layers: int = 5, batches: int = 3) -> Traffic:
    """Everything on disk, of a machine with an accelerator."""
    load, both = (Route(read=True, push=True),) * 4, Route(True, True, True, True)
    nothing = (STILL,) * batches
    return Traffic((load,) * (layers + 2), (nothing, *((both,) * batches,) * layers, nothing), (both,) * batches)


class TestNoBarrier:
    """The order within lanes counts here: what stands in line behind a step that waits, waits too."""

    @pytest.fixture
    def program(self):
        return Program(streaming(), Rings(), [True, False, False])

    @pytest.fixture
    def waits_for(self, program):
        ancestors = program.ancestors(fifo=Lane)

        def waits_for(later: StepId, earlier: StepId) -> bool:
            return bool(ancestors[program.at[later]] >> program.at[earlier] & 1)

        return waits_for

    def test_the_next_layer_loads_while_this_one_computes(self, program, waits_for):
        for sweep, stage in itertools.product(range(3), range(1, program.traffic.head - 1)):
            load = StepId(sweep, Lane.HOST_TO_DEVICE, What.WEIGHTS, stage + 1)
            assert not waits_for(load, program.compute(sweep, stage, 0))

    def test_the_next_cell_loads_while_this_one_computes(self, program, waits_for):
        for sweep, stage, batch in itertools.product((1, 2), range(2, program.traffic.head), range(3)):
            before = (sweep, stage, batch - 1) if batch else (sweep, stage - 1, 2)
            load = StepId(sweep, Lane.HOST_TO_DEVICE, What.CACHE, stage, batch)
            assert not waits_for(load, program.compute(*before))

    def test_compute_does_not_wait_for_what_is_on_its_way_home(self, program, waits_for):
        for sweep, stage, batch in itertools.product(range(3), range(1, program.traffic.head), (1, 2)):
            store = StepId(sweep, Lane.HOST_TO_DISK, What.CACHE, stage, batch - 1)
            assert not waits_for(program.compute(sweep, stage, batch), store)

    def test_the_first_layer_of_the_next_token_loads_while_the_last_ones_compute(self, program, waits_for):
        for sweep in (1, 2):
            load = StepId(sweep, Lane.HOST_TO_DEVICE, What.WEIGHTS, 1)
            assert not waits_for(load, program.compute(sweep - 1, program.traffic.head - 1, 0))
            assert not waits_for(load, program.compute(sweep - 1, program.traffic.head, -1))

    def test_experts_load_from_the_first_choice_on(self):
        """As many as have room, while the other micro-batches are still on their way to the router."""
        program = Program(dataclasses.replace(streaming(batches=4), sparse=frozenset({2, 4})), Rings(), [True, False])
        ancestors = program.ancestors(fifo=Lane)
        early = 0
        for name in program.ids:
            if name.what is What.EXPERT and name.lane in LOADS:
                second = program.at[program.compute(name.sweep, name.stage, 1)]
                early += not ancestors[program.at[name]] >> second & 1
        assert early > 0

    def test_the_next_layer_loads_behind_the_experts_that_are_needed_before(self):
        one = dataclasses.replace(streaming(batches=1), sparse=frozenset({1, 2, 3, 4}))
        program = Program(one, Rings(experts=2), [True])
        of_disk = [name for name in program.ids if name.lane is Lane.DISK_TO_HOST]
        checked = 0
        for stage in (2, 3, 4):
            experts = [i for i, n in enumerate(of_disk) if n.what is What.EXPERT and n.stage == stage]
            following = next(i for i, n in enumerate(of_disk) if n.what is What.WEIGHTS and n.stage == stage + 1)
            assert all(load < following for load in experts)
            checked += len(experts)
        assert checked


# ------------------------------------------------------------------------------------------------- overlap switched off


@given(traffics(), RINGS, FRESH)
@drawn
def test_without_overlap_each_step_waits_for_the_one_before(traffic, rings, fresh):
    program = Program(traffic, rings, fresh, overlap=False)
    for before, step in itertools.pairwise(program.steps):
        assert before.id in step.after or before.id.sweep < step.id.sweep
    ends = [a for a, b in itertools.pairwise(program.ids) if b.sweep > a.sweep] + program.ids[-1:]
    # the thread that computes begins the next sweep only then
    assert all(name.lane is Lane.COMPUTE and name.stage == traffic.head for name in ends)


@given(traffics(), RINGS, FRESH)
@drawn
def test_without_overlap_data_is_loaded_right_before_it_is_needed(traffic, rings, fresh):
    if traffic.sparse:  # as a policy without overlap has it: with more room, staging makes experts wait for others
        rings = dataclasses.replace(rings, layers=1, experts=1)
    program = Program(traffic, rings, fresh, overlap=False)
    pending: list[StepId] = []
    for step in program.steps:
        if step.id.lane in LOADS:
            pending.append(step.id)
        elif step.id.lane is Lane.COMPUTE:
            assert all(_feeds(program, load, step.id) for load in pending), f"{pending} long before {step.id}"
            pending = []
        else:
            assert not pending


# ----------------------------------------------------------------------------------------------------------------- form


def test_the_schedule_needs_no_torch():
    code = "import sys, flexgen_hf.planning.schedule; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_step_says_what_it_is():
    assert str(StepId(1, Lane.DISK_TO_HOST, What.EXPERT, 3, 5, 2)) == "expert 5 of stage 3, piece 2 in sweep 1"
    assert str(StepId(1, Lane.COMPUTE, What.EXPERT, 3, 5)) == "compute of expert 5 of stage 3 in sweep 1"
    assert str(StepId(1, Lane.COMPUTE, What.REST, 3, 0)) == "rest of stage 3, micro-batch 0 in sweep 1"
    assert str(StepId(2, Lane.DISK_TO_HOST, What.CACHE, 3, 1)) == "cache of stage 3, micro-batch 1 in sweep 2"
    assert str(StepId(0, Lane.COMPUTE, What.STAGE, 4)) == "compute of stage 4 in sweep 0"
