"""The output of a job as it grows: lines are only ever appended, so that what is written stays, whatever happens.

A line holds the number and the digest of its row. Killed in the middle of a line, the next start cuts that line off and
goes on behind the last whole one: no row is lost, and none is there twice. Beside the output, `OUTPUT.job.json` says
what was asked for, so that a job is never continued as another one.
"""

from __future__ import annotations

import array
import contextlib
import errno
import fcntl
import json
import os
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from ...errors import CapacityError, PolicyError, StoreError

__all__ = ["Journal"]

# A power cut loses at most what was written in this time, and the next start computes it again.
_SYNC_S = 1.0

# Numbers and digests of plain lines, and of OpenAI's, whose id holds both.
_OPENAI_ID = re.compile(r"batch_req_(\d+)_([0-9a-f]{16})")


class Journal:
    """The output file of a job. Use as a context manager.

    Args:
        path: of the output.
        job: what was asked for, as JSON takes it; it must be the same whenever the job is continued.
        overwrite: begin anew, whatever is there.
        retry_errors: rows whose output is an error are to be computed again.

    Raises:
        StoreError: the file cannot be written, is in use, or is not the output of a job.
        PolicyError: it is that of another job.
    """

    def __init__(
        self, path: Path, job: Mapping[str, Any], *, overwrite: bool = False, retry_errors: bool = False
    ) -> None:
        self.path, self._about = path, path.with_name(path.name + ".job.json")
        self._digests = array.array("Q")  # of row i, 0 if it is not there yet: eight bytes a row
        self.count = 0
        #: what the job says of itself; `created`, the time of its first start, stays
        self.job: dict[str, Any] = {}
        try:
            # Without a buffer: what could not be written must not be written later.
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            raise StoreError(f"cannot write the output {str(path)!r} ({error.strerror}); give another -o") from error
        try:
            self._lock()
            if overwrite:
                self._file.truncate(0)
                self._about.unlink(missing_ok=True)
            self._compare(json.loads(json.dumps(job)))
            self._recover(retry_errors)
        except BaseException:
            self._file.close()
            raise
        self._synced = time.monotonic()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        self.close(sync=kind is None)

    def has(self, index: int, digest: str) -> bool:
        """Whether the row is there already.

        Raises:
            StoreError: a row of that number is there, of another content.
        """
        held = self._digests[index] if index < len(self._digests) else 0
        if held and held != int(digest, 16):
            raise StoreError(
                f"row {index} of the input is not the one that {str(self.path)!r} was made from; give another -o, or "
                "--overwrite"
            )
        return bool(held)

    def append(self, lines: Sequence[tuple[int, str, Mapping[str, Any]]]) -> None:
        """Writes rows, each as (number, digest, what `json` writes).

        Raises:
            CapacityError: the disk is full; what was there before is whole.
            StoreError: the file cannot be written.
        """
        if not lines:
            return
        end = self.path.stat().st_size
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for _, _, line in lines)
        try:
            left = memoryview(text.encode("utf-8", "backslashreplace"))
            while left:
                left = left[self._file.write(left) :]
            if time.monotonic() - self._synced > _SYNC_S:
                self._sync()
        except OSError as error:
            raise self._failed(error, end) from error
        for index, digest, _ in lines:
            self._note(index, int(digest, 16))

    def in_input_order(self) -> None:
        """Writes the output anew in the order of the rows, in one step; the journal is closed.

        Raises:
            CapacityError: there is no room for the second copy; the output stays as it is.
            StoreError: it cannot be written.
        """
        self._sync()
        offsets = array.array("q", [-1]) * len(self._digests)  # of row i: eight bytes a row, as for the digests
        at, last, is_ordered = 0, -1, True
        with self.path.open("rb") as lines:
            for line in lines:
                index = _row_of(line)[0]
                offsets[index], is_ordered, last = at, is_ordered and index > last, index
                at += len(line)
        if not is_ordered:
            self._replace(offset for offset in offsets if offset >= 0)
        self.close(sync=False)

    def close(self, *, sync: bool = True) -> None:
        """Closes the file."""
        if not self._file.closed:
            if sync:
                self._sync()
            self._file.close()

    # ---------------------------------------------------------------------------------------------------------- inside
    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StoreError(f"another process writes {str(self.path)!r}; give another -o, or wait for it") from error
        except OSError:  # a file system without locks
            return

    def _compare(self, job: dict[str, Any]) -> None:
        """Notes what was asked for, or sees that it is what was asked for before."""
        if self._about.exists():
            try:
                before = json.loads(self._about.read_text("utf-8"))
            except ValueError as error:
                raise StoreError(
                    f"{str(self._about)!r} is broken ({error}); give another -o, or --overwrite"
                ) from error
            self.job = before
            for name in sorted(job.keys() | before.keys() - {"created"}):
                if job.get(name) != before.get(name):
                    raise PolicyError(
                        f"{str(self.path)!r} was begun with {name}={before.get(name)!r}, not {job.get(name)!r}; give "
                        "the same, another -o, or --overwrite"
                    )
            return
        if self.path.stat().st_size:
            raise StoreError(f"{str(self.path)!r} is there and not of a batch job; give another -o, or --overwrite")
        self.job = {**job, "created": int(time.time())}
        partial = self._about.with_name(self._about.name + ".partial")
        try:
            with partial.open("w", encoding="utf-8") as file:
                json.dump(self.job, file, indent=1)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(self._about)
        except OSError as error:
            raise self._failed(error, 0) from error

    def _recover(self, retry_errors: bool) -> None:
        """Reads what is there, and cuts off a line that is not whole."""
        at, keep, kept_bytes = 0, array.array("q"), 0
        with self.path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                try:
                    if not line.endswith(b"\n"):
                        break
                    index, digest, is_error = _row_of(line)
                except ValueError as error:
                    if lines.read(1):
                        raise StoreError(
                            f"line {number} of {str(self.path)!r} is not of a batch job ({error}); give another -o, or "
                            "--overwrite"
                        ) from error
                    break
                if not (is_error and retry_errors):
                    self._note(index, digest)
                    keep.append(at)
                    kept_bytes += len(line)
                at += len(line)
        self._file.truncate(at)
        if kept_bytes < at:
            self._replace(keep)
            self._file = self.path.open("ab", buffering=0)
            self._lock()

    def _replace(self, offsets: Iterable[int]) -> None:
        """Puts a file with the lines that begin at these offsets in the place of the output."""
        partial = self.path.with_name(self.path.name + ".partial")
        try:
            with partial.open("wb") as file, self.path.open("rb") as source:
                for offset in offsets:
                    source.seek(offset)
                    file.write(source.readline())
                file.flush()
                os.fsync(file.fileno())
            partial.replace(self.path)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise _write_error(error, self.path, self.count) from error
        self._file.close()

    def _note(self, index: int, digest: int) -> None:
        if index >= len(self._digests):
            self._digests.extend([0] * (max(index + 1, 2 * len(self._digests)) - len(self._digests)))
        self.count += not self._digests[index]
        self._digests[index] = digest

    def _sync(self) -> None:
        os.fsync(self._file.fileno())
        self._synced = time.monotonic()

    def _failed(self, error: OSError, end: int) -> Exception:
        """The error to raise; what was written of the last lines is cut off."""
        with contextlib.suppress(OSError):
            os.ftruncate(self._file.fileno(), end)
        self._file.close()
        return _write_error(error, self.path, self.count)


def _write_error(error: OSError, path: Path, rows: int) -> Exception:
    safe = f"{rows} rows are safe in {str(path)!r}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return CapacityError(f"the disk is full ({error.strerror}); {safe}: free some space and start the job again")
    return StoreError(f"cannot write the output ({error.strerror}); {safe}: start the job again to go on")


def _row_of(line: bytes) -> tuple[int, int, bool]:
    """Number and digest of the row of a line, and whether it is an error.

    Raises:
        ValueError: not a line of a job.
    """
    record = json.loads(line)
    if not isinstance(record, dict):
        raise ValueError("not an object")
    is_error = record.get("error") is not None
    if "index" in record and "digest" in record:
        return int(record["index"]), int(str(record["digest"]), 16), is_error
    found = _OPENAI_ID.fullmatch(str(record.get("id")))
    if found is None:
        raise ValueError("no number and digest of a row")
    return int(found[1]), int(found[2], 16), is_error
