"""What a run did: seconds, bytes, peaks and placement, counted while it ran."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from .planning.schedule import Lane
from .policy import Policy, Tier
from .storage.lanes import Event, LaneUse
from .storage.ledger import gib

__all__ = [
    "ExpertUse", "LaneWork", "RunReport", "RunningSweep", "SweepRecord", "peak_rss_bytes", "rss_bytes",
]  # fmt: skip

# `to_dict` is stored with every measurement, and a night's job has very many sweeps.
_LISTED_SWEEPS = 1000

# In the order in which data passes through them.
_LANES_IN_A_TRACE = (
    Lane.DISK_TO_HOST,
    Lane.HOST_TO_DEVICE,
    Lane.COMPUTE,
    Lane.DEVICE_TO_HOST,
    Lane.HOST_TO_DISK,
)


class LaneWork(NamedTuple):
    """What a lane did in one sweep, or in several.

    `busy_s` is counted from a sweep's call of forward to its result, so it is never more than the sweep's seconds.
    `bytes` are those whose transfer ended since the sweep before ended, so those are counted too that move while the
    caller samples. What a lane loads ahead for the next sweep counts for the one during which it happens.
    """

    busy_s: float = 0.0
    bytes: int = 0


class ExpertUse(NamedTuple):
    """What was done with experts that are loaded one by one, in one sweep or in several.

    `applied` counts experts that tokens chose, each once per layer and sweep; `loaded` those of them that had to be
    moved to where compute is; `read_bytes` are what of them was read from disk.
    """

    applied: int = 0
    loaded: int = 0
    read_bytes: int = 0


_NO_EXPERTS = ExpertUse()


@dataclasses.dataclass(frozen=True)
class RunningSweep:
    """A sweep that has begun.

    Args:
        rows: sequences.
        tokens: new tokens of each.
        is_prefill: the cache was empty.
        started: the `time.perf_counter()`.
        busy_s: of each lane, until then.
    """

    rows: int
    tokens: int
    is_prefill: bool
    started: float
    busy_s: dict[str, float]


@dataclasses.dataclass(frozen=True)
class SweepRecord:
    """One pass over all stages.

    Args:
        rows: sequences.
        tokens: new tokens of each, 1 in decode.
        seconds: from the call of forward to its result.
        is_prefill: the cache was empty.
        lanes: what each lane did.
        experts: what was done with experts.
    """

    rows: int
    tokens: int
    seconds: float
    is_prefill: bool
    lanes: dict[str, LaneWork] = dataclasses.field(default_factory=dict)
    experts: ExpertUse = _NO_EXPERTS


@dataclasses.dataclass
class RunReport:
    """The last `generate` (or `forward`) of a model.

    Args:
        policy: the policy in force.
        sweeps: one record per forward.
        lanes: what each lane did in the whole call, also before the first sweep and after the last one.
        upcasts: casts of stored weights to the dtype of compute: `tensors`, how many there were, and
            `per_stage_and_sweep`, the most often that one tensor was cast in one sweep.
        dequantizations: of stored weights, counted in the same way.
        elapsed_s: the whole call, sampling included.
        peak_bytes: the most that each tier held in buffers of this package.
        peak_rss_bytes: the most memory the process ever had resident, everything included.
        placement: bytes per tier that weights and cache really got.
        notes: what was done differently from what the policy says, and why.
        running: the sweep that runs, or the one in which an error ended the call.
    """

    policy: Policy
    sweeps: list[SweepRecord] = dataclasses.field(default_factory=list)
    lanes: dict[str, LaneUse] = dataclasses.field(default_factory=dict)
    upcasts: dict[str, int] = dataclasses.field(default_factory=dict)
    dequantizations: dict[str, int] = dataclasses.field(default_factory=dict)
    elapsed_s: float = 0.0
    peak_bytes: dict[Tier, int] = dataclasses.field(default_factory=dict)
    peak_rss_bytes: int = 0
    placement: dict[str, dict[Tier, int]] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)
    running: RunningSweep | None = dataclasses.field(default=None, repr=False)
    _bytes_before: dict[str, int] = dataclasses.field(default_factory=dict, init=False, repr=False)

    def begin_sweep(self, rows: int, tokens: int, is_prefill: bool) -> None:
        """Notes that a sweep begins now; the arguments are those of `SweepRecord`."""
        busy_s = {name: use.busy_s for name, use in self.lanes.items()}
        self.running = RunningSweep(rows, tokens, is_prefill, time.perf_counter(), busy_s)

    def end_sweep(self, experts: ExpertUse = _NO_EXPERTS) -> None:
        """Notes that the sweep that runs is done, with what each lane did in it, and what was done with experts."""
        sweep = self.running
        assert sweep is not None
        lanes = {}
        for name, use in self.lanes.items():
            moved = use.bytes
            lanes[name] = LaneWork(use.busy_s - sweep.busy_s[name], moved - self._bytes_before.get(name, 0))
            self._bytes_before[name] = moved
        seconds = time.perf_counter() - sweep.started
        self.sweeps.append(SweepRecord(sweep.rows, sweep.tokens, seconds, sweep.is_prefill, lanes, experts))
        self.running = None

    @property
    def rows(self) -> int:
        """The most sequences that were in flight together."""
        return max((s.rows for s in self.sweeps), default=0)

    @property
    def experts(self) -> ExpertUse:
        """What was done with experts in all sweeps."""
        return ExpertUse(*(sum(counts) for counts in zip(*(s.experts for s in self.sweeps), strict=True)))

    @property
    def prefill_s(self) -> float:
        """Seconds in sweeps over prompts."""
        return sum(s.seconds for s in self.sweeps if s.is_prefill)

    @property
    def decode_s(self) -> float:
        """Seconds in sweeps over one new token per sequence."""
        return sum(s.seconds for s in self.sweeps if not s.is_prefill)

    @property
    def generated_tokens(self) -> int:
        """One token per row and sweep: each sweep, the prompt's too, ends in one."""
        return sum(s.rows for s in self.sweeps)

    @property
    def tokens_per_s(self) -> float:
        """Generated tokens per second of prefill and decode."""
        return _per(self.generated_tokens, self.prefill_s + self.decode_s)

    @property
    def prefill_tokens_per_s(self) -> float:
        """Tokens of prompts, padding included, per second of prefill."""
        return _per(sum(s.rows * s.tokens for s in self.sweeps if s.is_prefill), self.prefill_s)

    @property
    def decode_tokens_per_s(self) -> float:
        """Generated tokens per second of decode."""
        return _per(sum(s.rows for s in self.sweeps if not s.is_prefill), self.decode_s)

    @property
    def share_of_limit(self) -> float:
        """Busy time of the busiest lane as a share of the time in sweeps; 1 means nothing could be faster."""
        busiest = max((use.busy_s for use in self.lanes.values()), default=0.0)
        return min(1.0, _per(busiest, self.prefill_s + self.decode_s))

    @property
    def bottleneck(self) -> str:
        """Name of the busiest lane."""
        return max(self.lanes, key=lambda name: self.lanes[name].busy_s, default="none")

    @property
    def decode_lanes(self) -> dict[str, LaneWork]:
        """What each lane did in sweeps over one new token per sequence."""
        return {
            name: _sum(s.lanes.get(name, LaneWork()) for s in self.sweeps if not s.is_prefill) for name in self.lanes
        }

    @property
    def decode_share_of_limit(self) -> float:
        """`share_of_limit` of decode alone; 0 if there was none."""
        return min(1.0, _per(max((work.busy_s for work in self.decode_lanes.values()), default=0.0), self.decode_s))

    @property
    def decode_bottleneck(self) -> str:
        """Name of the lane that was busiest in decode; "none" if there was none."""
        lanes = self.decode_lanes if self.decode_s else {}
        return max(lanes, key=lambda name: lanes[name].busy_s, default="none")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values.

        `rows` are the most sequences in flight together. `sweeps` lists the first 1000 of `num_sweeps`. A lane's
        `idle_s` is the time in sweeps in which it did nothing.
        """
        return {
            "prefill_s": self.prefill_s,
            "decode_s": self.decode_s,
            "elapsed_s": self.elapsed_s,
            "rows": self.rows,
            "generated_tokens": self.generated_tokens,
            "tokens_per_s": self.tokens_per_s,
            "prefill_tokens_per_s": self.prefill_tokens_per_s,
            "decode_tokens_per_s": self.decode_tokens_per_s,
            "share_of_limit": self.share_of_limit,
            "bottleneck": self.bottleneck,
            "decode_share_of_limit": self.decode_share_of_limit,
            "decode_bottleneck": self.decode_bottleneck,
            "num_sweeps": len(self.sweeps),
            "sweeps": [
                {
                    "rows": s.rows,
                    "tokens": s.tokens,
                    "seconds": s.seconds,
                    "is_prefill": s.is_prefill,
                    **({"experts": s.experts._asdict()} if s.experts.applied else {}),
                }
                for s in self.sweeps[:_LISTED_SWEEPS]
            ],
            "lanes": {
                name: _lane(LaneWork(use.busy_s, use.bytes), self.prefill_s + self.decode_s)
                for name, use in self.lanes.items()
            },
            "decode_lanes": {name: _lane(work, self.decode_s) for name, work in self.decode_lanes.items()},
            "experts": self.experts._asdict(),
            "upcasts": _counts(self.upcasts),
            "dequantizations": _counts(self.dequantizations),
            "peak_bytes": {str(tier): size for tier, size in self.peak_bytes.items()},
            "peak_rss_bytes": self.peak_rss_bytes,
            "placement": {
                kind: {str(tier): size for tier, size in sizes.items()} for kind, sizes in self.placement.items()
            },
            "policy": self.policy.to_dict(),
            "notes": list(self.notes),
        }

    def trace(self, path: str | Path) -> None:
        """Writes what each lane did when, in Chrome's trace format, which https://ui.perfetto.dev opens.

        Args:
            path: the JSON file. Times are in microseconds from the first event; of a long run the last steps are kept.
        """
        tracks = self._tracks()
        start = min((event.started for _, events in tracks for event in events), default=0.0)
        rows: list[dict[str, Any]] = [_metadata("process_name", 0, name="flexgen_hf")]
        # Viewers take 0 for the idle thread, and the thread whose number is its process's for the main one.
        for thread, (name, events) in enumerate(tracks, start=_PROCESS + 1):
            rows += [
                _metadata("thread_name", thread, name=name),
                _metadata("thread_sort_index", thread, sort_index=thread),
            ]
            for event in events:
                # Whole microseconds: of fractions, rounding would make neighbours overlap, which viewers do not draw.
                begin, end = (math.floor((at - start) * 1e6) for at in (event.started, event.ended))
                rows.append(
                    {
                        "ph": "X",
                        "pid": _PROCESS,
                        "tid": thread,
                        "name": str(event.name),
                        "ts": begin,
                        "dur": end - begin,
                        "args": {"bytes": event.bytes},
                    }
                )
        Path(path).write_text(json.dumps({"traceEvents": rows, "displayTimeUnit": "ms"}))

    def _tracks(self) -> list[tuple[str, list[Event]]]:
        """Names and events of what does one thing at a time: each worker of each lane."""
        order = {str(lane): place for place, lane in enumerate(_LANES_IN_A_TRACE)}
        tracks = []
        for name in sorted(self.lanes, key=lambda name: order.get(name, len(order))):
            events = list(self.lanes[name].events)
            for worker in sorted({0} | {event.worker for event in events}):
                title = f"{name}, worker {worker}" if worker else name
                tracks.append((title, [event for event in events if event.worker == worker]))
        return tracks

    def __str__(self) -> str:
        lines = [
            f"policy      {self.policy}",
            f"time        prefill {self.prefill_s:.2f} s, decode {self.decode_s:.2f} s",
            f"prefill     {self.prefill_tokens_per_s:.2f} token/s of prompts",
            f"decode      {self.decode_tokens_per_s:.2f} token/s",
            f"tokens      {self.generated_tokens}, {self.tokens_per_s:.2f} per second",
            f"bottleneck  {self.bottleneck}, busy {self.share_of_limit:.0%} of the time",
        ]
        if self.decode_s:
            lines[-1] += f"; in decode {self.decode_bottleneck}, {self.decode_share_of_limit:.0%}"
        for name, use in self.lanes.items():
            if use.steps:
                moved = f", {gib(use.bytes)}" if use.bytes else ""
                lines.append(f"  {name:<16}{use.busy_s:8.2f} s in {use.steps} steps{moved}")
        for title, made in (("casts", self.upcasts), ("dequantized", self.dequantizations)):
            if made.get("tensors"):
                most = made["per_stage_and_sweep"]
                times = {1: "once", 2: "twice"}.get(most, f"{most} times")
                lines.append(f"{title:<12}{made['tensors']} tensors, at most {times} per stage and sweep")
        if self.experts.applied:
            applied, loaded, read_bytes = self.experts
            lines.append(f"experts     {applied} applied, {loaded} loaded, {gib(read_bytes)} from disk")
        for kind, sizes in self.placement.items():
            total = sum(sizes.values()) or 1
            parts = ", ".join(f"{tier} {gib(size)} ({size / total:.1%})" for tier, size in sizes.items() if size)
            lines.append(f"{kind:<12}{parts or 'nothing'}")
        peaks = ", ".join(f"{tier} {gib(size)}" for tier, size in self.peak_bytes.items())
        lines.append(f"peak        {peaks}; process {gib(self.peak_rss_bytes)}")
        return "\n".join([*lines, *(f"note        {note}" for note in self.notes)])


_PROCESS = 1  # there is one in a trace


def _metadata(what: str, thread: int, **args: Any) -> dict[str, Any]:
    """An event that names or sorts something in a trace."""
    return {"ph": "M", "pid": _PROCESS, "tid": thread, "name": what, "args": args}


def _counts(made: dict[str, int]) -> dict[str, int]:
    return {name: made.get(name, 0) for name in ("tensors", "per_stage_and_sweep")}


def _per(amount: float, seconds: float) -> float:
    return amount / seconds if seconds else 0.0


def _sum(works: Iterable[LaneWork]) -> LaneWork:
    busy_s, moved = 0.0, 0
    for work in works:
        busy_s, moved = busy_s + work.busy_s, moved + work.bytes
    return LaneWork(busy_s, moved)


def _lane(work: LaneWork, seconds: float) -> dict[str, Any]:
    return {"busy_s": work.busy_s, "idle_s": max(0.0, seconds - work.busy_s), "bytes": work.bytes}


def peak_rss_bytes() -> int:
    """The most memory that this process ever had resident; 0 where the system does not say."""
    found = _of_status("VmHWM")
    if found is not None:  # better than getrusage, whose peak begins with that of the process that started this one
        return found
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def rss_bytes() -> int:
    """The memory that this process has resident now; 0 where the system does not say."""
    return _of_status("VmRSS") or 0


def _of_status(field: str) -> int | None:
    """Bytes by Linux' account of this process; None on other systems."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    lines = status.read_text().splitlines()
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith(f"{field}:")), 0)
