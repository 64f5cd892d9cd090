"""A limit on the memory of subprocesses, page cache included, by a control group of version 1."""

from __future__ import annotations

import contextlib
import os
import subprocess
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

__all__ = ["PEAK_MEMORY", "memory_limit", "run_in"]

#: goes before the code of a subprocess: `with PeakMemory() as memory:` notes its own memory (anonymous, in bytes)
#: before, and at its peak
PEAK_MEMORY = """
import threading

def anonymous():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))

class PeakMemory:
    def __enter__(self):
        self.before, self.peak, self.done = anonymous(), 0, threading.Event()
        self.watcher = threading.Thread(target=self.watch)
        self.watcher.start()
        return self

    def watch(self):
        while not self.done.wait(0.002):
            self.peak = max(self.peak, anonymous())

    def __exit__(self, *_):
        self.done.set()
        self.watcher.join()
"""

_ROOT = Path("/sys/fs/cgroup/memory")


@contextlib.contextmanager
def memory_limit(limit_bytes: int) -> Iterator[Path]:
    """A control group with this limit; the test is skipped where none can be made."""
    group = _ROOT / f"flexgen-test-{uuid.uuid4().hex[:8]}"
    try:
        if not (_ROOT / "memory.limit_in_bytes").exists():
            raise OSError("no memory controller of version 1")
        group.mkdir()
    except OSError as error:
        pytest.skip(f"memory cannot be limited here: {error}")
    try:
        (group / "memory.limit_in_bytes").write_text(str(limit_bytes))
        yield group
    finally:
        group.rmdir()


def run_in(group: Path, command: Sequence[str], **options: object) -> subprocess.CompletedProcess[str]:
    """Runs a command in a control group; its output is captured."""

    def enter() -> None:
        (group / "cgroup.procs").write_text(str(os.getpid()))

    return subprocess.run(  # type: ignore[call-overload, no-any-return]
        list(command), preexec_fn=enter, capture_output=True, text=True, check=False, **options
    )
