"""A folder as a queue: files that are put there become jobs, one after the other, by one model that stays loaded."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ...errors import FlexGenError, StoreError
from .runner import Job, JobReport, run

__all__ = ["watch"]

#: endings of files that are taken for inputs
_INPUTS = frozenset({".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".txt"})


def watch(
    folder: str | Path,
    output: str | Path,
    load: Callable[[], tuple[Any, Any]],
    *,
    job: Job | None = None,
    show_progress: bool = False,
    every_s: float = 2.0,
    until: Callable[[], bool] = lambda: False,
) -> Iterator[tuple[Path, JobReport | FlexGenError]]:
    """Runs a job for each file of a folder, also for those that come later.

    A file is taken once it has not changed between two looks; write it elsewhere and move it in to be sure. Its
    output has its name, with `.jsonl` at the end, in the other folder. One that grows is looked at again: its new rows
    are added.

    Args:
        folder: where inputs are put; hidden files and unknown endings are left alone.
        output: a folder for the outputs; made if need be.
        load: returns model and tokenizer; called once, when there is something to do.
        job: what is to be done with each file.
        show_progress: a bar on stderr for each.
        every_s: seconds between two looks.
        until: asked after each look at which nothing was new; true ends it.

    Yields:
        Each file with what came of it; what is wrong with a file does not end the others.

    Raises:
        StoreError: one of the folders cannot be used.
    """
    inputs, outputs = Path(folder), Path(output)
    try:
        outputs.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(f"cannot make the folder {str(outputs)!r} ({error.strerror}); give another -o") from error
    if outputs.resolve() == inputs.resolve():
        raise StoreError("outputs would be taken for inputs; give another folder with -o")
    loaded = _Once(load)
    seen: dict[Path, tuple[int, int]] = {}
    done: dict[Path, tuple[int, int]] = {}
    while True:
        state = _look(inputs)
        ready = [path for path, stamp in state.items() if seen.get(path) == stamp != done.get(path)]
        seen = state
        for path in ready:
            done[path] = state[path]
            yield path, _one(path, outputs, loaded, job, show_progress)
        if not ready and seen == done and until():
            return
        if not ready:
            time.sleep(every_s)


def _one(
    path: Path, outputs: Path, load: Callable[[], tuple[Any, Any]], job: Job | None, show_progress: bool
) -> JobReport | FlexGenError:
    name = path.name if path.suffix == ".jsonl" else f"{path.name}.jsonl"
    try:
        return run(path, outputs / name, load, job=job, show_progress=show_progress)
    except FlexGenError as error:
        return error


class _Once:
    """A function that is called once, whose result is kept."""

    def __init__(self, load: Callable[[], tuple[Any, Any]]) -> None:
        self._load = load
        self._result: tuple[Any, Any] | None = None

    def __call__(self) -> tuple[Any, Any]:
        if self._result is None:
            self._result = self._load()
        return self._result


def _look(folder: Path) -> dict[Path, tuple[int, int]]:
    """The inputs that are there, each with its size and the time of its last change."""
    try:
        files = sorted(folder.iterdir())
    except OSError as error:
        raise StoreError(f"cannot read the folder {str(folder)!r} ({error.strerror})") from error
    found = {}
    for path in files:
        if path.suffix.lower() in _INPUTS and not path.name.startswith(".") and path.is_file():
            state = path.stat()
            found[path] = (state.st_size, state.st_mtime_ns)
    return found
