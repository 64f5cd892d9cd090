"""The progress bar of a job: rows, tokens per second, time left, and the busiest lane."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from tqdm import tqdm

__all__ = ["Bar"]

# Speed and bottleneck are those of the last half minute or so: a job of a night changes on the way.
_MEMORY_S = 30.0


class Bar:
    """Shows how far a job is, on stderr. Use as a context manager.

    Args:
        total: rows of the input; None if there is no saying.
        done: rows that were there before.
        report: returns the report of the run, once there is one.
        shown: off draws nothing.
    """

    def __init__(self, total: int | None, done: int, report: Callable[[], Any], *, shown: bool) -> None:
        self._report = report
        self._tokens = 0
        self._since = time.perf_counter()
        self._busy: dict[str, float] = {}
        self._bar: Any = None
        if shown:
            self._bar = tqdm(total=total, initial=done, unit="row", dynamic_ncols=True, desc="rows", smoothing=0.05)

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def row(self) -> None:
        """A row is done."""
        if self._bar is not None:
            self._bar.update()

    def sweep(self, tokens: int) -> None:
        """A sweep brought so many tokens."""
        if self._bar is None:
            return
        self._tokens += tokens
        seconds = time.perf_counter() - self._since
        facts = [f"{self._tokens / max(seconds, 1e-9):.2f} token/s"]
        report = self._report()
        lanes = {} if report is None else {name: use.busy_s for name, use in report.lanes.items()}
        busy = {name: busy_s - self._busy.get(name, 0.0) for name, busy_s in lanes.items()}
        if any(busy.values()):
            busiest = max(busy, key=busy.__getitem__)
            facts.append(f"{busiest} {min(1.0, busy[busiest] / max(seconds, 1e-9)):.0%}")
        self._bar.set_postfix_str(", ".join(facts))
        if seconds > _MEMORY_S:
            self._tokens, self._since, self._busy = 0, time.perf_counter(), lanes
