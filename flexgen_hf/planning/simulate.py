"""A run on a fake clock: the very steps that the executor runs, each with the seconds that a machine would take.

Lanes take their steps in the order of the schedule; a step begins when its lane is free and all that it names is done.
Nothing is moved and nothing is computed.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from .cost import Lanes, PlannedRun, Prediction
from .hardware import Hardware
from .schedule import Lane, Schedule, Step, StepId
from .workload import Sweep

__all__ = ["Clock", "Event", "SharingClock", "Throttle", "Timeline", "every_sweep", "play", "simulate", "steps_of"]

# Of the Linux kernel: for so long a limit on a disk remembers what was not used.
_REMEMBERED_S = 0.1


class Event(NamedTuple):
    """A step with the time at which it ran, in seconds."""

    step: Step
    started: float
    ended: float

    @property
    def lane(self) -> Lane:
        """Where it ran."""
        return self.step.id.lane


class _Running:
    """A step at work, with the seconds that are left of it where nothing is in its way."""

    __slots__ = ("left", "started", "step")

    def __init__(self, step: Step, started: float, left: float) -> None:
        self.step, self.started, self.left = step, started, left


class Throttle:
    """A lane with a limit on what it moves on average: what it did not use of late, it may use now.

    Args:
        full_s: what a step takes at full speed.
    """

    def __init__(self, full_s: Callable[[Step], float]) -> None:
        self._full_s = full_s
        self._until = 0.0

    def seconds(self, step: Step, now: float, at_limit_s: float) -> float:
        """What a step takes that begins now.

        Args:
            step: which.
            now: seconds since the beginning.
            at_limit_s: what it takes where nothing is left from before.
        """
        if now - self._until > _REMEMBERED_S:
            self._until = now
        self._until += at_limit_s
        return max(self._full_s(step), self._until - now)


class Clock:
    """Gives each step its time, where no lane takes anything from another.

    A step begins when its lane is free and all that it names is done, so to look at each once is enough.

    Args:
        throttles: of lanes with a limit.
    """

    def __init__(self, throttles: Mapping[Lane, Throttle]) -> None:
        self._throttles = throttles
        #: seconds since the beginning
        self.now = 0.0
        self._free = dict.fromkeys(Lane, 0.0)
        self._ended: dict[StepId, float] = {}

    def sweep(self, steps: Iterable[Step], seconds: Callable[[Step], float], between_s: float) -> Iterator[Event]:
        """Runs steps until all that compute has to do is done, and lets some time pass; what is loaded may take longer.

        Args:
            steps: as the schedule lists them: all that a step names comes before it, or was never listed.
            seconds: what each takes.
            between_s: the time that passes.
        """
        now, free = self.now, self._free
        ended = self._ended = {name: end for name, end in self._ended.items() if end > now}
        for step in steps:
            lane = step.id.lane
            started = max(now, free[lane])
            for name in step.after:
                started = max(started, ended.get(name, 0.0))
            taken = seconds(step)
            if lane in self._throttles:
                taken = self._throttles[lane].seconds(step, started, taken)
            free[lane] = ended[step.id] = started + taken
            yield Event(step, started, free[lane])
        self.now = free[Lane.COMPUTE] + between_s

    def finish(self) -> Iterator[Event]:
        """Lets time pass until nothing is left to do."""
        yield from ()


class SharingClock:
    """Gives each step its time, where lanes share cores: as `Clock` does, event by event.

    Where lanes want more cores than there are, all of them take longer by the same factor.

    Args:
        hardware: whose cores.
        throttles: of lanes with a limit.
    """

    def __init__(self, hardware: Hardware, throttles: Mapping[Lane, Throttle]) -> None:
        self._throttles = throttles
        self._cores, self._cores_of = hardware.cores, {lane: hardware.cores_of(lane) for lane in Lane}
        self.now = 0.0
        self._queues = {lane: collections.deque[tuple[Step, float]]() for lane in Lane}
        self._running: dict[Lane, _Running] = {}
        self._pending: set[StepId] = set()

    def sweep(self, steps: Iterable[Step], seconds: Callable[[Step], float], between_s: float) -> Iterator[Event]:
        """As that of `Clock`."""
        for step in steps:
            self._queues[step.id.lane].append((step, seconds(step)))
            self._pending.add(step.id)
        while self._queues[Lane.COMPUTE] or Lane.COMPUTE in self._running:
            yield from self._next()
        until = self.now + between_s
        while self.now < until:
            yield from self._next(until)

    def finish(self) -> Iterator[Event]:
        """Lets time pass until nothing is left to do."""
        while self._pending:
            yield from self._next()

    def _next(self, until: float = math.inf) -> Iterator[Event]:
        """Begins what can begin, and goes on to when the next step ends, or to a given time if that is sooner."""
        self._begin()
        slower = self._slower()
        ends = {lane: at.left * (slower if self._cores_of[lane] else 1.0) for lane, at in self._running.items()}
        passed = min([*ends.values(), until - self.now])
        self.now = until if passed == until - self.now else self.now + passed
        for lane, end in ends.items():
            at = self._running[lane]
            if end <= passed:
                del self._running[lane]
                self._pending.remove(at.step.id)
                yield Event(at.step, at.started, self.now)
            else:
                at.left -= passed / (slower if self._cores_of[lane] else 1.0)

    def _begin(self) -> None:
        for lane, queue in self._queues.items():
            if queue and lane not in self._running and self._pending.isdisjoint(queue[0][0].after):
                step, seconds = queue.popleft()
                if lane in self._throttles:
                    seconds = self._throttles[lane].seconds(step, self.now, seconds)
                self._running[lane] = _Running(step, self.now, seconds)

    def _slower(self) -> float:
        """The factor by which lanes that share cores take longer now."""
        wanted = sum(self._cores_of[lane] for lane in self._running)
        return max(1.0, wanted / self._cores) if wanted else 1.0


@dataclasses.dataclass(frozen=True)
class Timeline:
    """Some sweeps of a run.

    Args:
        sweeps: what each is.
        ends: when the result of each was there.
        events: what each lane did when; empty unless they were asked for.
        lanes: seconds at work of each lane for each sweep, what it loads ahead counts for the sweep it is for.
    """

    sweeps: tuple[Sweep, ...]
    ends: tuple[float, ...]
    lanes: tuple[Lanes, ...]
    events: tuple[Event, ...] = ()

    def seconds(self, sweep: int) -> float:
        """From the end of the one before to its end."""
        return self.ends[sweep] - (self.ends[sweep - 1] if sweep else 0.0)


def every_sweep(run: PlannedRun) -> list[Sweep]:
    """All sweeps of a block."""
    prompt = run.workload.prompt_len
    return [Sweep(prompt, 0), *(Sweep(1, prompt + step) for step in range(run.workload.gen_len - 1))]


def steps_of(run: PlannedRun, sweeps: Sequence[Sweep]) -> Iterator[Iterator[Step]]:
    """The steps of each sweep, as the executor submits them; to be taken one sweep after the other."""
    schedule = Schedule(run.rings, overlap=run.policy.overlap)
    keeps_table = run.shape.tied and bool(run.layout.routes[0])
    for number, sweep in enumerate(sweeps):
        is_there = keeps_table and number > 0
        traffic = run.traffic(fresh=not sweep.past, table_is_there=is_there)
        following = None
        if run.policy.overlap and number + 1 < len(sweeps):
            following = traffic.following(table_is_there=keeps_table)
        yield schedule.steps(traffic, following, run.chooser(sweep))


class _FullSpeed:
    """What steps take on a disk that nothing limits; the first ones of each lane use memory for the first time."""

    def __init__(self, run: PlannedRun, sweeps: Sequence[Sweep]) -> None:
        self._run, self._sweeps, self._fresh_s = run.at_full_speed(), sweeps, dict(run.fresh_s)
        # of what a link brings, each byte is new until its buffers were filled once
        self._slower: dict[Lane, float] = {
            lane: self._run.hardware.link(lane).best / run.hardware.fresh_bytes_per_s
            for lane, seconds in self._fresh_s.items()
            if seconds and lane is not Lane.COMPUTE
        }

    def __call__(self, step: Step) -> float:
        seconds, lane = self._run.seconds(step, self._sweeps[step.id.sweep]), step.id.lane
        fresh_s = min(self._fresh_s[lane], seconds * self._slower.get(lane, math.inf)) if seconds else 0.0
        self._fresh_s[lane] -= fresh_s
        return seconds + fresh_s


def play(run: PlannedRun, sweeps: Sequence[Sweep], *, keep_events: bool = False) -> Timeline:
    """Runs sweeps one after the other on a fake clock."""
    limited, full_s = run.hardware.limited_lanes, _FullSpeed(run, sweeps)

    def seconds(step: Step) -> float:
        return run.seconds(step, sweeps[step.id.sweep]) if step.id.lane in limited else full_s(step)

    throttles = {lane: Throttle(full_s) for lane in limited}
    clock = SharingClock(run.hardware, throttles) if run.hardware.cores else Clock(throttles)
    ends, events = [], list[Event]()
    lanes = [dict.fromkeys(Lane, 0.0) for _ in sweeps]

    def note(passed: Iterable[Event]) -> None:
        for event in passed:
            lanes[event.step.id.sweep][event.lane] += event.ended - event.started
            if keep_events:
                events.append(event)

    for steps in steps_of(run, sweeps):
        note(clock.sweep(steps, seconds, run.between_s))
        ends.append(clock.now)
    note(clock.finish())
    return Timeline(tuple(sweeps), tuple(ends), tuple(lanes), tuple(events))


def simulate(run: PlannedRun) -> Prediction:
    """What a block takes: its prefill, its first decode sweep, and one in the middle that stands for all later ones."""
    steps = run.workload.gen_len - 1
    prompt = run.workload.prompt_len
    sweeps = [Sweep(prompt, 0)]
    if steps:
        sweeps.append(Sweep(1, prompt))
    if steps > 1:
        sweeps.append(Sweep(1, prompt + steps // 2))
    timeline = play(run, sweeps)
    times = [0, *([1] if steps else []), *([steps - 1] if steps > 1 else [])]
    decode_s = sum(count * timeline.seconds(number) for number, count in enumerate(times))
    decode_lanes = {
        lane: sum(count * timeline.lanes[number][lane] for number, count in enumerate(times)) for lane in Lane
    }
    return Prediction(
        prefill_s=timeline.seconds(0),
        decode_s=decode_s,
        rows=sum(run.batches),
        gen_len=run.workload.gen_len,
        peak_bytes=run.peak_bytes,
        prefill_lanes=timeline.lanes[0],
        decode_lanes=decode_lanes,
    )
