"""A progress bar on stderr for a call of `generate`: what is being computed, tokens, speed, and the busiest lane.

Knows a run by its report and by the compute steps that it is told of; knows nothing of models, tensors or threads.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

from tqdm import tqdm

from .report import RunReport

__all__ = ["Progress"]

# Drawing costs about as much as a small compute step, and nobody reads faster.
_REDRAW_S = 0.1

# Short, so that all of it can be read on 80 columns; tqdm cuts off what is too long at the right.
_FORMAT = "{desc}|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
_FORMAT_WITHOUT_TOTAL = "{desc} {n_fmt} [{elapsed}{postfix}]"


class _Bar(tqdm):  # type: ignore[misc]  # tqdm has no types
    monitor_interval = 0  # tqdm's thread, which would outlive the call, redraws bars that `step` redraws anyway

    def refresh(self, *_: Any, **__: Any) -> None:
        with self.get_lock():  # tqdm's own would keep the lock of all bars if Ctrl-C came while it draws
            self.display()


class Progress:
    """Shows how far a call of `generate` is. Use as a context manager, or call `close`.

    The bar counts tokens of one row: a sweep over all layers brings every row of a block one token further. Its
    description says which decoder layer the sweep has reached, so it moves in a long prefill, too. Behind it are, since
    the block began, tokens of all rows per second, and the lane that was at work most, with its share of the time.

    Args:
        report: of the run that is to be shown.
        layers: decoder layers of the model.
        blocks: blocks that are run one after the other.
        tokens: the most that a row of a block gets; None if there is no saying.
    """

    def __init__(self, report: RunReport, layers: int, blocks: int = 1, tokens: int | None = None) -> None:
        self._report, self._layers, self._blocks, self._tokens = report, layers, blocks, tokens
        self._block = 0  # the one that runs, from 1
        self._block_tokens = 0  # of each row in this block
        self._generated = 0  # by all rows of this block
        self._reached = 0  # the last layer that this sweep came to; not all micro-batches are at the same
        self._started = self._drawn = time.perf_counter()
        self._busy_before: dict[str, float] = {}
        # The width of a terminal is asked for at every drawing, since it may change in a long run.
        self._bar = _Bar(
            desc="prefill",
            total=None if tokens is None else tokens * blocks,
            bar_format=_FORMAT_WITHOUT_TOTAL if tokens is None else _FORMAT,
            dynamic_ncols=True,
            miniters=1,
            mininterval=_REDRAW_S,
        )

    def block(self, generate: Callable[..., Any]) -> Callable[..., Any]:
        """`generate`, each call of which is shown as one block."""

        @functools.wraps(generate)
        def run(*args: Any, **kwargs: Any) -> Any:
            self._begin_block()
            result = generate(*args, **kwargs)
            self._end_block()
            return result

        return run

    def step(self, stage: int, _batch: int) -> None:
        """Notes that a compute step is done; cheap, as most steps draw nothing.

        Args:
            stage: 0 is the embedding, then come the decoder layers, the last one is the head.
            _batch: the micro-batch, -1 for all of them.
        """
        is_layer = stage <= self._layers
        self._reached = max(self._reached, stage) if is_layer else 0
        if is_layer and time.perf_counter() - self._drawn < _REDRAW_S:
            return
        phase = "decode" if self._block_tokens else "prefill"
        if is_layer:
            self._describe(phase, self._reached)
            self._bar.refresh()
        else:
            running = self._report.running
            assert running is not None
            self._block_tokens += 1
            self._generated += running.rows
            self._describe(phase, self._layers)
            self._bar.update()  # draws, unless it did a moment ago
        self._drawn = time.perf_counter()

    def close(self) -> None:
        """Draws the bar a last time, as it is then, and leaves it where it stands."""
        self._bar.close()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _begin_block(self) -> None:
        self._block += 1
        self._block_tokens = self._generated = self._reached = 0
        self._started = time.perf_counter()
        self._busy_before = {name: use.busy_s for name, use in self._report.lanes.items()}
        self._describe("prefill", 0)
        self._bar.refresh()

    def _end_block(self) -> None:
        if self._tokens is not None:  # all its rows may have ended before they were as long as they may get
            self._bar.total -= self._tokens - self._block_tokens
        self._describe("decode", self._layers)

    def _describe(self, phase: str, layer: int) -> None:
        block = f"block {self._block}/{self._blocks}, " if self._blocks > 1 else ""
        self._bar.set_description_str(f"{block}{phase} layer {layer}/{self._layers}", refresh=False)
        seconds = time.perf_counter() - self._started
        facts = [f"{self._generated / seconds:.2f} token/s"] if self._generated else []
        busy = {name: use.busy_s - self._busy_before.get(name, 0.0) for name, use in self._report.lanes.items()}
        if any(busy.values()):
            busiest = max(busy, key=busy.__getitem__)
            facts.append(f"{busiest} {min(1.0, busy[busiest] / seconds):.0%}")
        self._bar.set_postfix_str(", ".join(facts), refresh=False)
