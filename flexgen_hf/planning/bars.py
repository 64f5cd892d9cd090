"""What lanes did when, as bars for a drawing: of a simulated run and of a recorded one alike. Draws nothing itself."""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from ..errors import FlexGenError, PolicyError
from .cost import PlannedRun
from .schedule import Lane, StepId, What
from .simulate import Timeline, play
from .workload import Sweep

__all__ = ["Bar", "Recorded", "Window", "bars_of", "busy_s", "cut", "joined", "shares", "steady"]

# Sweeps that are simulated for a drawing, and those of them that are drawn: what comes before fills the rings, and
# what comes after is loaded while they end. Of long ones, which take seconds to simulate, a single one is drawn.
_SHORT = (5, (2, 3))
_LONG = (4, (2, 2))
_LONG_VISITS = 400  # of a layer by a micro-batch


class Recorded(Protocol):
    """A run that noted its steps, as `RunReport` does."""

    @property
    def lanes(self) -> Mapping[str, Any]:
        """For each lane an object whose `events` have a step's `name`, `started`, `ended` and `worker`."""


class Bar(NamedTuple):
    """A step in time.

    Args:
        step: which; sweeps count from 0, the prompt's.
        started: seconds from the first step's beginning.
        ended: the same.
        worker: of a lane that does several things at a time.
    """

    step: StepId
    started: float
    ended: float
    worker: int = 0


@dataclasses.dataclass(frozen=True)
class Window:
    """The bars of a stretch of time, cut to it.

    Args:
        started: its beginning.
        ended: its end.
        bars: by beginning.
        ends: of the sweeps that end in it, when.
    """

    started: float
    ended: float
    bars: tuple[Bar, ...]
    ends: Mapping[int, float]

    @property
    def seconds(self) -> float:
        """How long it is."""
        return self.ended - self.started


def bars_of(run: Timeline | Recorded) -> list[Bar]:
    """All steps of a run with their times, by beginning.

    Args:
        run: of `play(..., keep_events=True)`, or a model's `last_run`. Of a long one only the last steps were noted;
            the first sweep among them is then number 0.

    Raises:
        FlexGenError: no steps were noted.
    """
    if isinstance(run, Timeline):
        made = [Bar(event.step.id, event.started, event.ended) for event in run.events]
    else:
        made = [
            Bar(event.name, event.started, event.ended, event.worker)
            for use in run.lanes.values()
            for event in use.events
        ]
    if not made:
        raise FlexGenError(
            "no steps to draw: give play(..., keep_events=True), or a model's last_run after a call of generate"
        )
    start, sweep = min(bar.started for bar in made), min(bar.step.sweep for bar in made)
    moved = (
        Bar(b.step._replace(sweep=b.step.sweep - sweep), b.started - start, b.ended - start, b.worker) for b in made
    )
    return sorted(moved, key=lambda bar: bar.started)


def cut(bars: Sequence[Bar], *, sweeps: tuple[int, int] | None = None, layers: tuple[int, int] | None = None) -> Window:
    """What happens while some sweeps, or some layers, are computed.

    Args:
        bars: of the whole run.
        sweeps: the first and the last one; None for all.
        layers: of the first of these sweeps only the time of these layers, the first and the last one, counted from 1;
            None for all stages.

    Raises:
        PolicyError: sweeps or layers that the run does not have.
    """
    computed = [bar for bar in bars if bar.step.what is What.STAGE]
    ends = {number: max(bar.ended for bar in mine) for number, mine in _by(computed, lambda bar: bar.step.sweep)}
    first, last = sweeps or (min(ends), max(ends))
    if first not in ends or last not in ends or first > last:
        raise PolicyError(f"sweeps {sweeps} cannot be drawn; the run has {min(ends)} to {max(ends)}")
    started, ended = ends.get(first - 1, min(bar.started for bar in bars)), ends[last]
    if layers is not None:
        started, ended = _of_layers([bar for bar in computed if bar.step.sweep == first], layers, started)
    inside = (
        bar._replace(started=max(bar.started, started), ended=min(bar.ended, ended))
        for bar in bars
        if bar.ended > started and bar.started < ended
    )
    within = {number: end for number, end in ends.items() if started < end <= ended}
    return Window(started, ended, tuple(inside), within)


def _of_layers(computed: Sequence[Bar], layers: tuple[int, int], started: float) -> tuple[float, float]:
    """From the end of the layer before to the end of the last one."""
    ends = {stage: max(bar.ended for bar in mine) for stage, mine in _by(computed, lambda bar: bar.step.stage)}
    first, last = layers
    if not 1 <= first <= last <= max(ends) - 1:
        raise PolicyError(f"layers {layers} cannot be drawn; the model has 1 to {max(ends) - 1}")
    return (ends[first - 1] if first > 1 else started), ends[last]


def joined(bars: Iterable[Bar], alike: Callable[[Bar], Hashable], gap_s: float) -> list[Bar]:
    """Bars of one worker that follow each other within `gap_s` and are alike, as one; it has the first one's step."""
    made: list[Bar] = []
    last: dict[tuple[Lane, int], int] = {}
    for bar in bars:
        row = bar.step.lane, bar.worker
        before = made[last[row]] if row in last else None
        if before is not None and alike(before) == alike(bar) and bar.started - before.ended <= gap_s:
            made[last[row]] = before._replace(ended=max(before.ended, bar.ended))
        else:
            last[row] = len(made)
            made.append(bar)
    return made


def shares(window: Window, parts: int) -> dict[tuple[Lane, What], list[float]]:
    """How much of each part of a window, of so many equal ones, a lane is at work on each kind of data.

    Of a lane with several workers it is their mean, so that no lane is ever more than 1.
    """
    workers = collections.Counter(lane for lane, _ in {(bar.step.lane, bar.worker) for bar in window.bars})
    length = window.seconds / parts
    made: dict[tuple[Lane, What], list[float]] = {}
    for bar in window.bars:
        mine = made.setdefault((bar.step.lane, bar.step.what), [0.0] * parts)
        begin, end = (bar.started - window.started) / length, (bar.ended - window.started) / length
        for part in range(int(begin), min(parts, int(end) + 1)):
            mine[part] += max(0.0, min(end, part + 1) - max(begin, part)) / workers[bar.step.lane]
    return made


def busy_s(bars: Iterable[Bar], lane: Lane) -> float:
    """Seconds in which any worker of a lane is at work; bars by beginning."""
    total, until = 0.0, float("-inf")
    for bar in bars:
        if bar.step.lane is lane:
            total += max(0.0, bar.ended - max(bar.started, until))
            until = max(until, bar.ended)
    return total


def steady(run: PlannedRun) -> tuple[Timeline, tuple[int, int]]:
    """A block from the middle of its decode, simulated, and which sweeps of it show what all later ones look like.

    A workload of one token has no decode: then it is the prompt's sweep.
    """
    prompt, steps = run.workload.prompt_len, run.workload.gen_len - 1
    count, drawn = _LONG if len(run.shape.layers) * len(run.batches) > _LONG_VISITS else _SHORT
    decode = min(count - 1, steps)
    sweeps = [Sweep(prompt, 0), *[Sweep(1, prompt + steps // 2)] * decode]
    first, last = (min(number, decode) for number in drawn)
    return play(run, sweeps, keep_events=True), (first, last)


def _by(bars: Iterable[Bar], key: Callable[[Bar], int]) -> Iterator[tuple[int, list[Bar]]]:
    for number, mine in itertools.groupby(sorted(bars, key=key), key=key):
        yield number, list(mine)
