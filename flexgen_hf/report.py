"""What a run did: seconds, bytes, peaks and placement, counted while it ran."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from .policy import Policy, Tier
from .storage.lanes import LaneUse
from .storage.ledger import gib

__all__ = ["RunReport", "SweepRecord", "peak_rss_bytes"]


@dataclasses.dataclass(frozen=True)
class SweepRecord:
    """One pass over all stages.

    Args:
        rows: sequences.
        tokens: new tokens of each, 1 in decode.
        seconds: from the call of forward to its result.
        is_prefill: the cache was empty.
    """

    rows: int
    tokens: int
    seconds: float
    is_prefill: bool


@dataclasses.dataclass
class RunReport:
    """The last `generate` (or `forward`) of a model.

    Args:
        policy: the policy in force.
        sweeps: one record per forward.
        lanes: what each lane did.
        elapsed_s: the whole call, sampling included.
        peak_bytes: the most that each tier held in buffers of this package.
        peak_rss_bytes: the most memory the process ever had resident, everything included.
        placement: bytes per tier that weights and cache really got.
        notes: what was done differently from what the policy says, and why.
    """

    policy: Policy
    sweeps: list[SweepRecord] = dataclasses.field(default_factory=list)
    lanes: dict[str, LaneUse] = dataclasses.field(default_factory=dict)
    elapsed_s: float = 0.0
    peak_bytes: dict[Tier, int] = dataclasses.field(default_factory=dict)
    peak_rss_bytes: int = 0
    placement: dict[str, dict[Tier, int]] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)

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
        seconds = self.prefill_s + self.decode_s
        return self.generated_tokens / seconds if seconds else 0.0

    @property
    def share_of_limit(self) -> float:
        """Busy time of the busiest lane as a share of the time in sweeps; 1 means nothing could be faster."""
        seconds = self.prefill_s + self.decode_s
        busiest = max((use.busy_s for use in self.lanes.values()), default=0.0)
        return min(1.0, busiest / seconds) if seconds else 0.0

    @property
    def bottleneck(self) -> str:
        """Name of the busiest lane."""
        return max(self.lanes, key=lambda name: self.lanes[name].busy_s, default="none")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        seconds = self.prefill_s + self.decode_s
        return {
            "prefill_s": self.prefill_s,
            "decode_s": self.decode_s,
            "elapsed_s": self.elapsed_s,
            "generated_tokens": self.generated_tokens,
            "tokens_per_s": self.tokens_per_s,
            "share_of_limit": self.share_of_limit,
            "bottleneck": self.bottleneck,
            "lanes": {
                name: {"busy_s": use.busy_s, "idle_s": max(0.0, seconds - use.busy_s), "bytes": use.bytes}
                for name, use in self.lanes.items()
            },
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
        lanes = {name: list(use.events) for name, use in self.lanes.items()}
        start = min((event.started for events in lanes.values() for event in events), default=0.0)
        rows: list[dict[str, Any]] = []
        for thread, (name, events) in enumerate(lanes.items()):
            rows.append({"ph": "M", "pid": 1, "tid": thread, "name": "thread_name", "args": {"name": name}})
            rows += [
                {
                    "ph": "X",
                    "pid": 1,
                    "tid": thread,
                    "name": str(event.name),
                    "ts": (event.started - start) * 1e6,
                    "dur": (event.ended - event.started) * 1e6,
                    "args": {"bytes": event.bytes},
                }
                for event in events
            ]
        Path(path).write_text(json.dumps({"traceEvents": rows, "displayTimeUnit": "ms"}))

    def __str__(self) -> str:
        lines = [
            f"policy      {self.policy}",
            f"time        prefill {self.prefill_s:.2f} s, decode {self.decode_s:.2f} s",
            f"tokens      {self.generated_tokens}, {self.tokens_per_s:.2f} per second",
            f"bottleneck  {self.bottleneck}, busy {self.share_of_limit:.0%} of the time",
        ]
        for name, use in self.lanes.items():
            if use.steps:
                moved = f", {gib(use.bytes)}" if use.bytes else ""
                lines.append(f"  {name:<16}{use.busy_s:8.2f} s in {use.steps} steps{moved}")
        for kind, sizes in self.placement.items():
            total = sum(sizes.values()) or 1
            parts = ", ".join(f"{tier} {gib(size)} ({size / total:.1%})" for tier, size in sizes.items() if size)
            lines.append(f"{kind:<12}{parts or 'nothing'}")
        peaks = ", ".join(f"{tier} {gib(size)}" for tier, size in self.peak_bytes.items())
        lines.append(f"peak        {peaks}; process {gib(self.peak_rss_bytes)}")
        return "\n".join([*lines, *(f"note        {note}" for note in self.notes)])


def peak_rss_bytes() -> int:
    """The most memory that this process ever had resident; 0 where the system does not say."""
    status = Path("/proc/self/status")
    if status.exists():  # better than getrusage, whose peak begins with that of the process that started this one
        lines = status.read_text().splitlines()
        return next((int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:")), 0)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
