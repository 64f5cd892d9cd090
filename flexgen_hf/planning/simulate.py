"""A run on a fake clock: the very steps that the executor runs, each with the seconds that a machine would take.

Lanes take their steps in the order of the schedule; a step begins when its lane is free and all that it names is done.
Nothing is moved and nothing is computed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence

from .cost import Lanes, PlannedRun, Prediction, Sweep
from .schedule import Lane, Schedule, Step, StepId

__all__ = ["Clock", "Event", "Timeline", "every_sweep", "play", "simulate", "steps_of"]


@dataclasses.dataclass(frozen=True)
class Event:
    """A step with the time at which it ran, in seconds."""

    step: Step
    started: float
    ended: float

    @property
    def lane(self) -> Lane:
        """Where it ran."""
        return self.step.id.lane


class Clock:
    """Gives each step its time."""

    def __init__(self) -> None:
        self._free = dict.fromkeys(Lane, 0.0)
        self._ended: dict[StepId, float] = {}

    def run(self, steps: Iterable[Step], seconds: Callable[[Step], float]) -> Iterator[Event]:
        """Runs steps in their order.

        Args:
            steps: as the schedule lists them: all that a step names comes before it, or was never listed.
            seconds: what each takes.
        """
        free, ended = self._free, self._ended
        for step in steps:
            lane = step.id.lane
            start = free[lane]
            for name in step.after:
                before = ended.get(name, 0.0)
                start = max(start, before)
            end = start + seconds(step)
            free[lane] = ended[step.id] = end
            yield Event(step, start, end)

    def wait(self, lane: Lane, seconds: float) -> None:
        """Keeps a lane from working for a while."""
        self._free[lane] += seconds

    @property
    def computed(self) -> float:
        """When the last step of compute has ended."""
        return self._free[Lane.COMPUTE]


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


def steps_of(run: PlannedRun, sweeps: Sequence[Sweep]) -> Iterator[list[Step]]:
    """The steps of each sweep, as the executor submits them."""
    schedule = Schedule(run.rings, overlap=run.policy.overlap)
    keeps_table = run.shape.tied and bool(run.layout.routes[0])
    for number, sweep in enumerate(sweeps):
        is_there = keeps_table and number > 0
        traffic = run.traffic(fresh=not sweep.past, table_is_there=is_there)
        following = None
        if run.policy.overlap and number + 1 < len(sweeps):
            following = traffic.following(table_is_there=keeps_table)
        yield list(schedule.steps(traffic, following, run.chooser(sweep)))


def play(run: PlannedRun, sweeps: Sequence[Sweep], *, keep_events: bool = False) -> Timeline:
    """Runs sweeps one after the other on a fake clock."""
    clock, ends, events = Clock(), [], list[Event]()
    lanes = [dict.fromkeys(Lane, 0.0) for _ in sweeps]
    for steps in steps_of(run, sweeps):
        for event in clock.run(steps, lambda step: run.seconds(step, sweeps[step.id.sweep])):
            lanes[event.step.id.sweep][event.lane] += event.ended - event.started
            if keep_events:
                events.append(event)
        clock.wait(Lane.COMPUTE, run.hardware.sweep_s)
        ends.append(clock.computed)
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
