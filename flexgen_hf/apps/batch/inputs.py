"""Rows of a file of prompts, one at a time: JSON lines, CSV, Parquet, plain text. Knows nothing of models.

A row is numbered by its place among the rows of its file, and known again by a digest of its content. A line that
cannot be read is a row too, with what is wrong with it.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import hashlib
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from ...errors import FlexGenError, PolicyError, StoreError

__all__ = ["FORMATS", "InputRow", "count_rows", "digest_of", "format_of", "read_rows"]

#: endings of file names and the format that they mean; any other is plain text, a prompt a line
_ENDINGS = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet",
    ".txt": "text", ".text": "text", "": "text",
}  # fmt: skip

FORMATS = ("jsonl", "csv", "tsv", "parquet", "text")

# The longest cell that csv reads; its own default of 128 KiB is less than a long document.
_LONGEST_CELL = 1 << 30

_PARQUET_ROWS = 256

# Counting the lines of larger files would take longer than a look at the bar is worth.
_COUNTED_BYTES = 1 << 30


@dataclasses.dataclass(frozen=True)
class InputRow:
    """A row of the input.

    Args:
        index: its number among the rows, from 0; empty lines are no rows.
        digest: 16 hexadecimal digits that follow from its content.
        record: its fields; a row of plain text is `{"prompt": ...}`.
        error: why it could not be read, if it could not.
    """

    index: int
    digest: str
    record: dict[str, Any]
    error: str | None = None


def format_of(path: str | Path, given: str | None = None) -> str:
    """The format of a file by its ending; of standard input (`-`) JSON lines, unless another is given.

    Raises:
        PolicyError: an unknown format.
    """
    if given is not None:
        if given not in FORMATS:
            raise PolicyError(f"format {given!r} is unknown; use one of {', '.join(FORMATS)}")
        return given
    return "jsonl" if str(path) == "-" else _ENDINGS.get(Path(path).suffix.lower(), "text")


def read_rows(path: str | Path, kind: str | None = None, column: str | None = None) -> Iterator[InputRow]:
    """The rows of a file, read as they are asked for.

    Args:
        path: of the file; `-` is standard input.
        kind: one of `FORMATS`; by default what the ending says.
        column: of a table, the one with the prompts; by default "prompt", or the only one there is.

    Raises:
        StoreError: the file is missing or cannot be read.
        PolicyError: a table without the column.
    """
    kind = format_of(path, kind)
    if kind == "parquet":
        yield from _numbered(_parquet(path, column))
        return
    with _opened(path) as file:
        if kind in ("csv", "tsv"):
            yield from _numbered(_table(file, column, "\t" if kind == "tsv" else ","))
        else:
            yield from _lines(file, is_json=kind == "jsonl")


def count_rows(path: str | Path, kind: str | None = None) -> int | None:
    """How many rows a file has, if that can be known quickly; quoted line breaks of a CSV make it too many."""
    kind, size = format_of(path, kind), 0
    if str(path) == "-" or not Path(path).is_file():
        return None
    if kind == "parquet":
        return int(_pyarrow_parquet().ParquetFile(path).metadata.num_rows)
    if Path(path).stat().st_size > _COUNTED_BYTES:
        return None
    with Path(path).open("rb") as file:
        for line in file:
            size += bool(line.strip())
    return max(0, size - (kind in ("csv", "tsv")))


def digest_of(content: bytes) -> str:
    """16 hexadecimal digits by which the content of a row is known again."""
    return hashlib.sha256(content).hexdigest()[:16]


# --------------------------------------------------------------------------------------------------------- each format
def _lines(file: IO[bytes], *, is_json: bool) -> Iterator[InputRow]:
    index = 0
    for number, line in enumerate(file, start=1):
        content = line.strip(b"\r\n") if not is_json else line.strip()
        if not content.strip():
            continue
        yield _line(index, number, content, is_json)
        index += 1


def _line(index: int, number: int, content: bytes, is_json: bool) -> InputRow:
    digest = digest_of(content)
    try:
        text = content.decode("utf-8-sig" if number == 1 else "utf-8")
        record = json.loads(text) if is_json else {"prompt": text}
    except UnicodeDecodeError as error:
        return InputRow(index, digest, {}, f"line {number} is not UTF-8 ({error.reason} at byte {error.start})")
    except (json.JSONDecodeError, RecursionError) as error:
        return InputRow(index, digest, {}, f"line {number} is not JSON: {error}")
    if isinstance(record, str):
        record = {"prompt": record}
    if not isinstance(record, dict):
        kind = type(record).__name__
        return InputRow(index, digest, {}, f"line {number} is {kind}, not an object with a prompt or messages")
    return InputRow(index, digest, record)


def _numbered(rows: Iterator[tuple[dict[str, Any], str | None]]) -> Iterator[InputRow]:
    for index, (record, error) in enumerate(rows):
        content = json.dumps(record, sort_keys=True, default=str).encode()
        yield InputRow(index, digest_of(content), record, error)


def _table(file: IO[bytes], column: str | None, delimiter: str) -> Iterator[tuple[dict[str, Any], str | None]]:
    csv.field_size_limit(_LONGEST_CELL)
    text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
    rows = csv.reader(text, delimiter=delimiter)
    names = next(rows, None)
    if names is None:
        return
    wanted = _column(names, column)
    place = names.index(wanted)
    for row in rows:
        if not row:
            continue
        if len(row) <= place:
            yield {"row": row}, f"row at line {rows.line_num} has {len(row)} cells, none for column {wanted!r}"
            continue
        record: dict[str, Any] = {"prompt": row[place]}
        if "id" in names and names.index("id") < len(row):
            record["id"] = row[names.index("id")]
        bad = any("\udc80" <= character <= "\udcff" for character in row[place])
        yield record, f"row at line {rows.line_num} is not UTF-8" if bad else None


def _parquet(path: str | Path, column: str | None) -> Iterator[tuple[dict[str, Any], str | None]]:
    parquet = _pyarrow_parquet()
    try:
        file = parquet.ParquetFile(path)
    except (OSError, ValueError) as error:
        raise StoreError(f"cannot read {str(path)!r} as Parquet ({error})") from error
    with file:
        names = file.schema_arrow.names
        wanted = "messages" if column is None and "messages" in names else _column(names, column)
        for batch in file.iter_batches(_PARQUET_ROWS, columns=[wanted, *(n for n in ("id",) if n in names)]):
            for row in batch.to_pylist():
                value = row.pop(wanted)
                key = "messages" if isinstance(value, list) and value and isinstance(value[0], dict) else "prompt"
                yield {key: value, **row}, None


def _column(names: list[str], wanted: str | None) -> str:
    if wanted is None:
        wanted = "prompt" if "prompt" in names or len(names) != 1 else names[0]
    if wanted not in names:
        raise PolicyError(f"no column {wanted!r}; the table has {', '.join(map(repr, names))}: name one with --column")
    return wanted


@contextlib.contextmanager
def _opened(path: str | Path) -> Iterator[IO[bytes]]:
    if str(path) == "-":
        yield sys.stdin.buffer
        return
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(Path(path).open("rb"))
        except OSError as error:
            raise StoreError(f"cannot read the input {str(path)!r} ({error.strerror})") from error
        yield file


def _pyarrow_parquet() -> Any:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise FlexGenError("Parquet needs pyarrow; run: pip install 'flexgen_hf[parquet]'") from error
    return parquet
