"""Tables and pairs of rows in files: CSV, and DeepMatcher's lines of `COL name VAL value`. Knows nothing of tasks."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...errors import StoreError

__all__ = ["Row", "Table", "read_pair_lines", "read_table", "write_table", "write_whole"]

#: attributes and values as text, in the order of the table's columns
Row = Mapping[str, str]
Table = list[dict[str, str]]

# The longest cell that csv reads; its own default of 128 KiB is less than a long document.
_LONGEST_CELL = 1 << 30

_ATTRIBUTE = re.compile(r"(?:^|\s)COL (\S+) VAL(?=\s|$)")


def read_table(path: str | Path) -> Table:
    """The rows of a CSV file with a header. A short row has empty cells at its end; what has no name is left out.

    Raises:
        StoreError: no such file, not a table, or a row with more cells than the header.
    """
    csv.field_size_limit(_LONGEST_CELL)
    try:
        with Path(path).open(encoding="utf-8-sig", newline="") as file:
            return list(_rows(csv.reader(file), path))
    except StoreError:
        raise
    except OSError as error:
        raise StoreError(f"cannot read the table {str(path)!r} ({error.strerror})") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise StoreError(f"{str(path)!r} is no table ({error}); give CSV in UTF-8 with a header") from error


def read_pair_lines(path: str | Path) -> list[tuple[Row, Row, str]]:
    """Left row, right row and label of each line of a file such as DeepMatcher's benchmarks have: three tab-separated
    parts, the rows as `COL name VAL value COL name VAL value`.

    Raises:
        StoreError: no such file, or a line of another form.
    """
    try:
        lines = Path(path).read_text("utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise StoreError(f"cannot read the pairs {str(path)!r} ({error})") from error
    pairs: list[tuple[Row, Row, str]] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        parts = line.split("\t")
        rows = [_attributes(part) for part in parts[:2]]
        if len(parts) != 3 or not all(rows):
            raise StoreError(
                f"line {number} of {str(path)!r} is no pair; it should be two rows, COL name VAL value each, and a "
                "label, with tabs between them"
            )
        pairs.append((rows[0], rows[1], parts[2].strip()))
    return pairs


def write_table(table: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    """Writes a CSV file with a header; nothing of an empty table.

    Raises:
        StoreError: it cannot be written.
    """
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(table[0]) if table else [])
    if table:
        writer.writeheader()
    writer.writerows(table)
    write_whole(Path(path), text.getvalue())


def write_whole(path: Path, content: str) -> None:
    """Writes a file that is whole or not there.

    Raises:
        StoreError: it cannot be written.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(content, "utf-8", newline="")
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise StoreError(
            f"cannot write {str(path)!r} ({error.strerror}); give another name, or free some space"
        ) from error


def _rows(lines: Iterator[list[str]], path: str | Path) -> Iterator[dict[str, str]]:
    names = [name.strip() for name in next(lines, [])]
    named = [name for name in names if name]
    if not named:
        raise StoreError(f"{str(path)!r} has no header; its first line should name the columns")
    if twice := sorted({name for name in named if named.count(name) > 1}):
        raise StoreError(f"{str(path)!r} has several columns {twice[0]!r}; give each a name of its own")
    for number, cells in enumerate(lines, start=2):
        if not cells:
            continue
        if len(cells) > len(names):
            raise StoreError(
                f"row {number} of {str(path)!r} has {len(cells)} cells for {len(names)} columns; put quotes around "
                "cells with commas"
            )
        whole = [*cells, *[""] * (len(names) - len(cells))]
        yield {name: cell for name, cell in zip(names, whole, strict=True) if name}


def _attributes(text: str) -> dict[str, str]:
    """Attributes of `COL name VAL value COL name VAL value`; none if it is something else."""
    before, *parts = _ATTRIBUTE.split(text)
    if before.strip():
        return {}
    return {name: value.strip() for name, value in zip(parts[::2], parts[1::2], strict=True)}
