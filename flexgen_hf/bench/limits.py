"""Limits on a subprocess: memory with its page cache, and the bandwidth of disks; and a cold page cache before it.

By control groups of version 1, which Linux gives to root. Knows nothing of models.

A limit on writes holds for direct and synchronous ones; what the kernel writes back later is charged to nobody.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path

from ..errors import CapacityError

__all__ = ["ControlGroup", "Limits", "drop_page_cache", "why_not_permitted"]

_CGROUPS = Path("/sys/fs/cgroup")

# a process enters its groups before it becomes the command, so that all it ever allocates is counted
_ENTER = 'for group in "$1" "$2"; do echo $$ > "$group/cgroup.procs" || exit 126; done; shift 2; exec "$@"'


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a process may use; None is no limit.

    Args:
        memory_bytes: memory and the page cache of the files that it reads, together.
        read_bytes_per_s: from each disk concerned.
        write_bytes_per_s: to each disk concerned.
    """

    memory_bytes: int | None = None
    read_bytes_per_s: int | None = None
    write_bytes_per_s: int | None = None

    def __bool__(self) -> bool:
        return any(value is not None for value in dataclasses.astuple(self))


def why_not_permitted() -> str | None:
    """What is missing for limits on this machine, or None if nothing is."""
    if os.geteuid() != 0:
        return "only root may make control groups"
    for controller, file in (("memory", "memory.limit_in_bytes"), ("blkio", "blkio.throttle.read_bps_device")):
        if not (_CGROUPS / controller / file).exists():
            return f"there is no {controller} controller of version 1 in {_CGROUPS}"
    return None


class ControlGroup:
    """A pair of control groups with limits, for one process after the other. Use it with `with`: it removes them.

    Args:
        limits: what the processes may use together.
        folders: whose disks the limits on reads and writes are for.

    Raises:
        CapacityError: such limits cannot be set here; the message says what is missing.
    """

    def __init__(self, limits: Limits, folders: Iterable[Path] = ()) -> None:
        if (reason := why_not_permitted()) is not None:
            raise CapacityError(f"limits cannot be set: {reason}; run as root, or leave the limits out")
        name = f"flexgen-bench-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self._memory, self._blkio = _CGROUPS / "memory" / name, _CGROUPS / "blkio" / name
        self._limits = limits
        self._disks = sorted({_disk_of(folder) for folder in folders})

    def __enter__(self) -> ControlGroup:
        with contextlib.ExitStack() as undo:
            undo.callback(self.__exit__)
            self._memory.mkdir()
            self._blkio.mkdir()
            self._set_limits()
            undo.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        for group in (self._memory, self._blkio):
            _remove(group)

    def _set_limits(self) -> None:
        # pages that were swapped out would be memory that nobody counts
        _write(self._memory / "memory.swappiness", "0")
        if self._limits.memory_bytes is not None:
            _write(self._memory / "memory.limit_in_bytes", str(self._limits.memory_bytes))
        for direction, rate in (("read", self._limits.read_bytes_per_s), ("write", self._limits.write_bytes_per_s)):
            for disk in self._disks if rate is not None else ():
                _write(self._blkio / f"blkio.throttle.{direction}_bps_device", f"{disk} {rate}")

    def command(self, command: Sequence[str]) -> list[str]:
        """A command that runs this one inside the groups."""
        return ["/bin/sh", "-c", _ENTER, "sh", str(self._memory), str(self._blkio), *command]

    @property
    def peak_bytes(self) -> int:
        """The most that was ever charged, page cache included."""
        return int((self._memory / "memory.max_usage_in_bytes").read_text())

    @property
    def out_of_memory_kills(self) -> int:
        """How many processes the kernel killed because of the limit."""
        lines = (self._memory / "memory.oom_control").read_text().splitlines()
        return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)


def drop_page_cache(folders: Iterable[Path], everything: bool = False) -> None:
    """Has the next reads of these folders' files go to the disk.

    Args:
        folders: whose files are dropped from the cache, at any depth.
        everything: drop all other files too, so that none that a limited process reads is another's to pay; only root
            can, for others nothing happens.
    """
    os.sync()
    for folder in folders:
        for file in (f for f in folder.rglob("*") if f.is_file()):
            handle = os.open(file, os.O_RDONLY)
            try:
                os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(handle)
    if everything:
        with contextlib.suppress(OSError):  # a container may keep even root from it
            Path("/proc/sys/vm/drop_caches").write_text("1")


def _write(file: Path, text: str) -> None:
    try:
        file.write_text(text)
    except OSError as error:
        raise CapacityError(f"limits cannot be set: {file.name} does not take {text!r} ({error.strerror})") from error


def _remove(group: Path) -> None:
    # a killed process leaves its group a moment after its parent has seen it end
    for _ in range(100):
        try:
            group.rmdir()
        except FileNotFoundError:
            return
        except OSError:
            time.sleep(0.05)
        else:
            return
    raise CapacityError(f"{group} still holds processes and cannot be removed; end them, then 'rmdir {group}'")


def _disk_of(folder: Path) -> str:
    """`"major:minor"` of the whole disk that holds a folder: a partition has no queue of its own to throttle."""
    number = folder.stat().st_dev
    if os.major(number) == 0:  # a file system that hides its disk from stat
        number = _mounted_device(folder, number)
    device = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}").resolve()
    if (device / "partition").exists():
        device = device.parent
    try:
        return (device / "dev").read_text().strip()
    except OSError:
        raise CapacityError(f"limits cannot be set: {str(folder)!r} is on no known disk; use another folder") from None


def _mounted_device(folder: Path, number: int) -> int:
    wanted = f"{os.major(number)}:{os.minor(number)}"
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields, _, source = line.partition(" - ")
        path = Path(source.split()[1])
        if fields.split()[2] == wanted and path.is_block_device():
            return path.stat().st_rdev
    raise CapacityError(f"limits cannot be set: {str(folder)!r} is on no known disk; use another folder")
