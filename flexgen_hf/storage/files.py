"""Reading and writing bytes of files into and from reused buffers, without mmap and without fresh allocations."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..errors import CapacityError, StoreError
from ..policy import Tier
from .buffers import PAGE, round_up
from .ledger import Ledger, gib

__all__ = ["Files", "SpillFile", "check_offload_folder"]

# Large enough for the disk's full speed, small enough to let other requests in between.
_CALL_BYTES = 8 << 20

# Descriptor, offset and memory: reads or writes all of it, returns the bytes.
_Move = Callable[[int, int, torch.Tensor], int]


class Files:
    """Open files for reading by offset, opened once each. Safe to use from several threads."""

    def __init__(self) -> None:
        self._open: dict[tuple[Path, bool], int] = {}
        self._lock = threading.Lock()
        #: files whose file system does not allow reads past the page cache
        self.cached: set[Path] = set()

    def read(self, path: Path, offset: int, memory: torch.Tensor) -> int:
        """Fills `memory` (uint8, shape (n,), on the CPU) with the file's bytes from `offset`; returns n.

        Raises:
            StoreError: the file is gone or ends early.
        """
        try:
            return _read_all(self._descriptor(path), offset, memory, path)
        except StoreError:
            raise
        except OSError as error:
            raise _unreadable(path, error) from error

    def read_run(self, path: Path, offset: int, buffer: torch.Tensor, at: int, nbytes: int) -> int:
        """Fills `buffer[at : at + nbytes]` from `offset`, past the page cache where that is possible; returns nbytes.

        A read past the cache (O_DIRECT) moves whole pages, so the bytes around the run in its first and last page are
        overwritten as well. It needs a page-aligned buffer in which the run lies as it lies in the file, and a file
        system that allows it; otherwise the read goes through the cache.

        Args:
            path: the file.
            offset: where the run begins in it.
            buffer: uint8, on the CPU.
            at: where the run goes; for a direct read, `at` and `offset` are equal modulo 4096.
            nbytes: its length.

        Raises:
            StoreError: the file is gone or ends early.
        """
        before = offset % PAGE
        start, length = at - before, round_up(before + nbytes)
        fits = start >= 0 and start + length <= buffer.numel() and (buffer.data_ptr() + start) % PAGE == 0
        if not fits or path in self.cached or not hasattr(os, "O_DIRECT"):
            return self.read(path, offset, buffer[at : at + nbytes])
        try:
            descriptor = self._descriptor(path, direct=True)
            _read_all(descriptor, offset - before, buffer[start : start + length], path, enough=before + nbytes)
        except StoreError:
            raise
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise _unreadable(path, error) from error
            self.cached.add(path)
            return self.read(path, offset, buffer[at : at + nbytes])
        return nbytes

    def close(self) -> None:
        """Closes every file."""
        with self._lock:
            for descriptor in self._open.values():
                os.close(descriptor)
            self._open.clear()

    def _descriptor(self, path: Path, direct: bool = False) -> int:
        flags = os.O_RDONLY | getattr(os, "O_BINARY", 0) | (os.O_DIRECT if direct else 0)
        with self._lock:
            if (path, direct) not in self._open:
                self._open[path, direct] = os.open(path, flags)
            return self._open[path, direct]


def _unreadable(path: Path, error: OSError) -> StoreError:
    return StoreError(f"cannot read {path} ({error.strerror}); restore the file or convert again")


def _read_all(descriptor: int, offset: int, memory: torch.Tensor, path: Any, enough: int | None = None) -> int:
    """Fills `memory`, or at least its first `enough` bytes: a direct read may ask for more than the file has."""
    enough = memory.numel() if enough is None else enough
    view = memoryview(memory.numpy())  # type: ignore[arg-type]
    done = 0
    while done < enough:
        count = os.preadv(descriptor, [view[done : done + _CALL_BYTES]], offset + done)
        if count == 0:
            raise StoreError(
                f"{path} ends at byte {offset + done}, {enough - done} bytes early; the file is truncated, "
                "download or convert it again"
            )
        done += count
    return done


def _write_all(descriptor: int, offset: int, memory: torch.Tensor) -> int:
    view = memoryview(memory.numpy())  # type: ignore[arg-type]
    done = 0
    while done < len(view):
        done += os.pwrite(descriptor, view[done : done + _CALL_BYTES], offset + done)
    return done


class SpillFile:
    """A file without a name for data that lives on disk while this process runs.

    It has no name in the file system (or loses it at once), so nothing is left behind however the process ends, and two
    processes can share a folder. Space is reserved before it is used: a full disk is an error here, not in the middle.
    Regions may be used from several threads, each by one at a time; only one thread may reserve and release.

    Args:
        folder: where the bytes go.
        ledger: accounts for them on the disk tier.
        what: what is kept in it, for messages.
    """

    def __init__(self, folder: Path, ledger: Ledger, what: str) -> None:
        self._folder, self._ledger, self._what = folder, ledger, what
        self._size = 0
        self._free: list[tuple[int, int]] = []  # offset and bytes of what was given up, by offset, none adjacent
        self._lock = threading.Lock()
        #: bytes that read_run and write_run moved, whole pages where they went past the page cache
        self.read_bytes = self.written_bytes = 0
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115  closed by close()
        except OSError as error:
            raise StoreError(
                f"cannot write to offload_folder {str(folder)!r} ({error.strerror}); name a writable folder"
            ) from error
        self._direct = _open_direct(self._file.fileno())
        self._cached = self._direct is None

    @property
    def notes(self) -> list[str]:
        """What is done differently from what one would expect; still there after `close`."""
        cached = f"{self._what}: reads and writes go through the page cache: {self._folder} does not allow O_DIRECT"
        return [cached] if self._cached else []

    def reserve(self, nbytes: int) -> int:
        """Finds room for `nbytes`, in what was released or at the end; returns its offset, a multiple of 4096.

        Raises:
            CapacityError: the disk or its budget is full; the file is as before.
        """
        nbytes = round_up(nbytes, PAGE)
        for index, (offset, room) in enumerate(self._free):
            if room >= nbytes:
                self._free[index : index + 1] = [(offset + nbytes, room - nbytes)] if room > nbytes else []
                return offset
        return self._extend(nbytes)

    def release(self, offset: int, nbytes: int) -> None:
        """Gives up a region that `reserve` returned: the file keeps its size, a later `reserve` may get the room."""
        regions: list[tuple[int, int]] = []
        for region in sorted([*self._free, (offset, round_up(nbytes, PAGE))]):
            if regions and sum(regions[-1]) == region[0]:
                regions[-1] = (regions[-1][0], regions[-1][1] + region[1])
            else:
                regions.append(region)
        self._free = regions

    def read(self, offset: int, memory: torch.Tensor) -> int:
        """Fills `memory` (uint8, on the CPU) through the page cache; returns its size."""
        return _read_all(self._file.fileno(), offset, memory, self._what)

    def write(self, offset: int, memory: torch.Tensor) -> int:
        """Writes `memory` (uint8, contiguous, on the CPU) through the page cache; returns its size."""
        return _write_all(self._file.fileno(), offset, memory)

    def read_run(self, offset: int, buffer: torch.Tensor, at: int, nbytes: int) -> int:
        """Fills `buffer[at : at + nbytes]` from `offset`, past the page cache where that is possible; returns nbytes.

        Past the cache whole pages are moved: of a page that the run touches, or ends in, the rest is overwritten in
        the buffer with what the file has there. A run of no bytes in the middle of a page brings that page.

        Args:
            offset: where the run begins in the file.
            buffer: uint8, on the CPU, starting on a page, with room for whole pages.
            at: where the run goes, equal to `offset` modulo 4096.
            nbytes: its length.
        """
        moved = self._move_run(functools.partial(_read_all, path=self._what), offset, buffer, at, nbytes)
        with self._lock:
            self.read_bytes += moved
        return nbytes

    def write_run(self, offset: int, buffer: torch.Tensor, at: int, nbytes: int) -> int:
        """Writes `buffer[at : at + nbytes]` to `offset`, past the page cache where that is possible; returns nbytes.

        Past the cache whole pages are moved, so in the first and the last page of the run the buffer must hold what the
        file is to have around it. Arguments as of `read_run`.
        """
        moved = self._move_run(_write_all, offset, buffer, at, nbytes)
        with self._lock:
            self.written_bytes += moved
        return nbytes

    def close(self) -> None:
        """Gives the space back."""
        if not self._file.closed:
            self._file.close()
            if self._direct is not None:
                os.close(self._direct)
            self._ledger.give(Tier.DISK, self._size, self._what)

    def _extend(self, nbytes: int) -> int:
        offset = self._size
        self._ledger.take(Tier.DISK, nbytes, self._what)
        try:
            _allocate(self._file.fileno(), offset, nbytes)
        except OSError as error:
            self._ledger.give(Tier.DISK, nbytes, self._what)
            with contextlib.suppress(OSError):
                os.ftruncate(self._file.fileno(), offset)
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            free = os.statvfs(self._folder).f_bavail * os.statvfs(self._folder).f_frsize
            raise CapacityError(
                f"{self._what} needs {gib(nbytes)} more in {str(self._folder)!r}, which has {gib(free)} free; "
                "free space, use another offload_folder, or lower the disk share"
            ) from error
        self._size += nbytes
        return offset

    def _move_run(self, move: _Move, offset: int, buffer: torch.Tensor, at: int, nbytes: int) -> int:
        """Moves a run; returns the bytes that were really moved."""
        before = offset % PAGE
        start, length = at - before, round_up(before + nbytes)
        if start < 0 or start + length > buffer.numel() or (buffer.data_ptr() + start) % PAGE:
            raise ValueError(f"a run at {offset} of {nbytes} bytes does not lie in its buffer at {at} as in the file")
        if not self._cached and self._direct is not None:
            try:
                move(self._direct, offset - before, buffer[start : start + length])
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                self._cached = True
            else:
                return length
        return move(self._file.fileno(), offset, buffer[at : at + nbytes])


def _open_direct(descriptor: int) -> int | None:
    """A second way to an open file, without a name, that goes past the page cache; None where there is none."""
    if not hasattr(os, "O_DIRECT"):
        return None
    try:
        return os.open(f"/proc/self/fd/{descriptor}", os.O_RDWR | os.O_DIRECT)
    except OSError:  # the file system does not allow it, or the system shows no descriptors
        return None


def _allocate(descriptor: int, offset: int, nbytes: int) -> None:
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, offset, nbytes)
    else:  # macOS, Windows: a hole, found full only when written
        os.ftruncate(descriptor, offset + nbytes)


def check_offload_folder(folder: Path) -> None:
    """Raises `StoreError` if nothing can be written to `folder`."""
    SpillFile(folder, Ledger(), "a probe").close()
