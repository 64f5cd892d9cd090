"""Lanes and tickets: ordered queues of work that run side by side, and the promises they keep.

A lane is a thread that takes its work in order; before each piece it waits for the tickets that the piece names. Work
is submitted in an order in which everything waited for comes first, so lanes cannot wait for each other in a circle.
"""

from __future__ import annotations

import collections
import dataclasses
import queue
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from ..errors import StepError

__all__ = ["Event", "LaneUse", "Lanes", "Ticket"]


class Ticket:
    """A pending piece of work that carries its error.

    Args:
        name: what the work is, for error messages.
    """

    __slots__ = ("_done", "error", "event", "name")

    def __init__(self, name: Any) -> None:
        self.name = name
        self.error: BaseException | None = None
        self.event: Any = None
        self._done = threading.Event()

    def finish(self, error: BaseException | None = None, event: Any = None) -> None:
        """Declares the work done, or failed with `error`. The first call counts.

        Args:
            error: why it failed.
            event: on a device that computes asynchronously, the event after which the result is there.
        """
        if not self._done.is_set():
            self.error, self.event = error, event
            self._done.set()

    @property
    def done(self) -> bool:
        """Whether the work is finished, well or not."""
        return self._done.is_set()

    def wait(self) -> None:
        """Blocks until the work is done; raises its error."""
        self._done.wait()
        if self.error is not None:
            raise self.error
        if self.event is not None:
            self.event.synchronize()
            self.event = None


class Event(NamedTuple):
    """A piece of work that a lane did, between two values of `time.perf_counter()`."""

    name: Any
    started: float
    ended: float
    bytes: int


# A trace of the last steps is what one looks at; a night's job must not collect millions.
_KEPT_EVENTS = 100_000


@dataclasses.dataclass
class LaneUse:
    """What a lane did: seconds at work, bytes moved, pieces of work."""

    busy_s: float = 0.0
    bytes: int = 0
    steps: int = 0
    events: collections.deque[Event] = dataclasses.field(
        default_factory=lambda: collections.deque(maxlen=_KEPT_EVENTS), repr=False, compare=False
    )

    def add(self, name: Any, started: float, nbytes: int = 0) -> None:
        """Notes a piece of work that ends now; `started` is a `time.perf_counter()`."""
        ended = time.perf_counter()
        self.busy_s += ended - started
        self.bytes += nbytes
        self.steps += 1
        self.events.append(Event(name, started, ended, nbytes))


_Work = Callable[[], int]


class Lanes:
    """A set of named lanes, each a thread. Use as a context manager, or call `close`.

    Args:
        names: names of the lanes.
        before_step: called as `before_step(lane, step)` in the lane's thread before each piece of work; for tests
            that inject delays and errors.
        uses: where to add up what each lane does; survives `close`.
    """

    def __init__(
        self,
        names: Iterable[str],
        *,
        before_step: Callable[[str, Any], None] | None = None,
        uses: Mapping[str, LaneUse] | None = None,
    ) -> None:
        names = list(names)
        self.uses = uses if uses is not None else {name: LaneUse() for name in names}
        self._before_step = before_step
        self._queues: dict[str, queue.SimpleQueue[tuple[Ticket, _Work, tuple[Ticket, ...]] | None]] = {}
        self._threads = []
        self._cancelled = False
        for name in names:
            self._queues[name] = queue.SimpleQueue()
            thread = threading.Thread(target=self._serve, args=(name,), name=f"flexgen-{name}", daemon=True)
            self._threads.append(thread)
            thread.start()

    def submit(self, lane: str, name: Any, work: _Work, after: Iterable[Ticket] = ()) -> Ticket:
        """Queues `work`, which returns the bytes it moved, behind everything submitted to `lane` before.

        Returns:
            The ticket. If one of `after` fails, the work is not run and the ticket fails with the same error.
        """
        if not self._threads:
            raise RuntimeError(f"{name} was submitted to lane {lane!r} after the lanes were closed")
        ticket = Ticket(name)
        self._queues[lane].put((ticket, work, tuple(after)))
        return ticket

    def close(self, cancel: bool = False) -> None:
        """Ends the threads after the work they have, or with `cancel` without it (tickets then fail)."""
        self._cancelled = self._cancelled or cancel
        for waiting in self._queues.values():
            waiting.put(None)
        for thread in self._threads:
            thread.join()
        self._threads = []

    def __enter__(self) -> Lanes:
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        self.close(cancel=error_type is not None)

    def _serve(self, lane: str) -> None:
        waiting, use = self._queues[lane], self.uses[lane]
        while (item := waiting.get()) is not None:
            ticket, work, after = item
            ticket.finish(self._run(lane, use, ticket, work, after))
            del item, ticket, work, after  # a thread that waits must not keep buffers alive

    def _run(
        self, lane: str, use: LaneUse, ticket: Ticket, work: _Work, after: tuple[Ticket, ...]
    ) -> BaseException | None:
        try:
            for before in after:
                before.wait()
        except BaseException as error:  # noqa: BLE001  the error belongs to whoever waits for this ticket
            return error
        if self._cancelled:
            return StepError(lane, str(ticket.name), InterruptedError("the run was stopped"))
        started, moved = time.perf_counter(), 0
        try:
            if self._before_step is not None:
                self._before_step(lane, ticket.name)
            moved = work()
        except BaseException as error:  # noqa: BLE001  carried to the caller by the ticket
            return StepError(lane, str(ticket.name), error)
        finally:
            use.add(ticket.name, started, moved)
        return None
