"""A limit on the memory of subprocesses, page cache included, by a control group of version 1."""

from __future__ import annotations

import contextlib
import os
import subprocess
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

__all__ = ["memory_limit", "run_in"]

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
