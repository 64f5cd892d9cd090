"""Lanes and tickets: ordered queues of work that run side by side, and the promises they keep.

A lane is a thread that takes its work in order; before each piece it waits for the tickets that the piece names. Work
is submitted in an order in which everything waited for comes first, so lanes cannot wait for each other in a circle.
A lane with several workers keeps that many pieces of work in flight; they begin in order and may end in another.
"""

from __future__ import annotations

import collections
import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from ..errors import StepError

__all__ = ["Event", "LaneUse", "Lanes", "Ticket"]


_finishing = threading.Lock()


class Ticket:
    """A pending piece of work that carries its error.

    Args:
        name: what the work is, for error messages.
    """

    # A sweep of many micro-batches has tens of thousands: a lock is a tenth of what a threading.Event takes.
    __slots__ = ("_done", "_gate", "error", "event", "name")

    def __init__(self, name: Any) -> None:
        self.name = name
        self.error: BaseException | None = None
        self.event: Any = None
        self._done = False
        self._gate = threading.Lock()
        self._gate.acquire()

    def finish(self, error: BaseException | None = None, event: Any = None) -> None:
        """Declares the work done, or failed with `error`. The first call counts.

        Args:
            error: why it failed.
            event: on a device that computes asynchronously, the event after which the result is there.
        """
        with _finishing:
            if not self._done:
                self.error, self.event = error, event
                self._done = True
                self._gate.release()

    @property
    def done(self) -> bool:
        """Whether the work is finished, well or not."""
        return self._done

    def wait(self) -> None:
        """Blocks until the work is done; raises its error."""
        if not self._done:
            with self._gate:
                pass
        if self.error is not None:
            raise self.error
        if self.event is not None:
            self.event.synchronize()
            self.event = None


class Event(NamedTuple):
    """A piece of work that a worker of a lane did, between two values of `time.perf_counter()`."""

    name: Any
    started: float
    ended: float
    bytes: int
    worker: int = 0


# A trace of the last steps is what one looks at; a night's job must not collect millions, nor tens of megabytes.
_KEPT_EVENTS = 20_000


class LaneUse:
    """What a lane did: seconds at work, bytes moved, pieces of work.

    A lane may have several workers: it is busy while any of them is.
    """

    def __init__(self) -> None:
        self.bytes = 0
        self.steps = 0
        #: the last pieces of work
        self.events: collections.deque[Event] = collections.deque(maxlen=_KEPT_EVENTS)
        self._lock = threading.Lock()
        self._at_work = 0
        self._since = 0.0  # a change of who is at work
        self._busy_s = 0.0

    @property
    def busy_s(self) -> float:
        """Seconds at work until now."""
        with self._lock:
            running = time.perf_counter() - self._since if self._at_work else 0.0
            return self._busy_s + running

    def begin(self) -> float:
        """Notes that a piece of work begins; returns the `time.perf_counter()`."""
        with self._lock:
            now = time.perf_counter()
            if not self._at_work:
                self._since = now
            self._at_work += 1
            return now

    def end(self, name: Any, started: float, nbytes: int = 0, worker: int = 0) -> None:
        """Notes that the piece of work that began at `started` is done."""
        with self._lock:
            now = time.perf_counter()
            self._at_work -= 1
            if not self._at_work:
                self._busy_s += now - self._since
            self.bytes += nbytes
            self.steps += 1
            self.events.append(Event(name, started, now, nbytes, worker))

    @contextlib.contextmanager
    def at_work(self, name: Any) -> Iterator[None]:
        """Notes a piece of work that moves no bytes, as long as the context lasts, also if it fails."""
        started = self.begin()
        try:
            yield
        finally:
            self.end(name, started)


_Work = Callable[[], int]


class Lanes:
    """A set of named lanes, each one thread or more. Use as a context manager, or call `close`.

    Args:
        names: names of the lanes.
        workers: threads of a lane, one if it is not named.
        around: entered by each thread before its first piece of work: it sets up what belongs to a thread.
        before_step: called as `before_step(lane, step)` in the lane's thread before each piece of work; for tests
            that inject delays and errors.
        uses: where to add up what each lane does; survives `close`.
    """

    def __init__(
        self,
        names: Iterable[str],
        *,
        workers: Mapping[str, int] | None = None,
        around: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
        before_step: Callable[[str, Any], None] | None = None,
        uses: Mapping[str, LaneUse] | None = None,
    ) -> None:
        names = list(names)
        self.uses = uses if uses is not None else {name: LaneUse() for name in names}
        self._before_step = before_step
        self._queues: dict[str, queue.SimpleQueue[tuple[Ticket, _Work, tuple[Ticket, ...]] | None]] = {}
        self._threads: list[tuple[str, threading.Thread]] = []
        self._cancelled = False
        self._around = around
        ready = []
        for name in names:
            self._queues[name] = queue.SimpleQueue()
            for worker in range((workers or {}).get(name, 1)):
                title = f"flexgen-{name}-{worker}" if worker else f"flexgen-{name}"
                ready.append(Ticket(title))
                thread = threading.Thread(target=self._serve, args=(name, worker, ready[-1]), name=title, daemon=True)
                self._threads.append((name, thread))
                thread.start()
        try:
            for ticket in ready:
                ticket.wait()
        except BaseException:
            self.close(cancel=True)
            raise

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
        for lane, _ in self._threads:
            self._queues[lane].put(None)
        for _, thread in self._threads:
            thread.join()
        self._threads = []

    def __enter__(self) -> Lanes:
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        self.close(cancel=error_type is not None)

    def _serve(self, lane: str, worker: int, ready: Ticket) -> None:
        try:
            with self._around():
                ready.finish()
                self._work(lane, worker)
        except BaseException as error:  # noqa: BLE001  carried to whoever made the lanes
            ready.finish(error)

    def _work(self, lane: str, worker: int) -> None:
        waiting, use = self._queues[lane], self.uses[lane]
        while (item := waiting.get()) is not None:
            ticket, work, after = item
            ticket.finish(self._run(lane, worker, use, ticket, work, after))
            del item, ticket, work, after  # a thread that waits must not keep buffers alive

    def _run(
        self, lane: str, worker: int, use: LaneUse, ticket: Ticket, work: _Work, after: tuple[Ticket, ...]
    ) -> BaseException | None:
        try:
            for before in after:
                before.wait()
        except BaseException as error:  # noqa: BLE001  the error belongs to whoever waits for this ticket
            return error
        if self._cancelled:
            return StepError(lane, str(ticket.name), InterruptedError("the run was stopped"))
        started, moved = use.begin(), 0
        try:
            if self._before_step is not None:
                self._before_step(lane, ticket.name)
            moved = work()
        except BaseException as error:  # noqa: BLE001  carried to the caller by the ticket
            return StepError(lane, str(ticket.name), error)
        finally:
            use.end(ticket.name, started, moved, worker)
        return None
