"""Reading and writing bytes of files into and from reused buffers, without mmap and without fresh allocations."""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
import threading
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

    Args:
        folder: where the bytes go.
        ledger: accounts for them on the disk tier.
        what: what is kept in it, for messages.
    """

    def __init__(self, folder: Path, ledger: Ledger, what: str) -> None:
        self._folder, self._ledger, self._what = folder, ledger, what
        self._size = 0
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115  closed by close()
        except OSError as error:
            raise StoreError(
                f"cannot write to offload_folder {str(folder)!r} ({error.strerror}); name a writable folder"
            ) from error

    def reserve(self, nbytes: int) -> int:
        """Adds `nbytes` at the end and returns their offset, a multiple of 4096.

        Raises:
            CapacityError: the disk or its budget is full; the file is as before.
        """
        offset, nbytes = self._size, round_up(nbytes, PAGE)
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

    def read(self, offset: int, memory: torch.Tensor) -> int:
        """Fills `memory` (uint8, on the CPU); returns its size."""
        return _read_all(self._file.fileno(), offset, memory, self._what)

    def write(self, offset: int, memory: torch.Tensor) -> int:
        """Writes `memory` (uint8, contiguous, on the CPU); returns its size."""
        return _write_all(self._file.fileno(), offset, memory)

    def close(self) -> None:
        """Gives the space back."""
        if not self._file.closed:
            self._file.close()
            self._ledger.give(Tier.DISK, self._size, self._what)


def _allocate(descriptor: int, offset: int, nbytes: int) -> None:
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, offset, nbytes)
    else:  # macOS, Windows: a hole, found full only when written
        os.ftruncate(descriptor, offset + nbytes)


def check_offload_folder(folder: Path) -> None:
    """Raises `StoreError` if nothing can be written to `folder`."""
    SpillFile(folder, Ledger(), "a probe").close()
