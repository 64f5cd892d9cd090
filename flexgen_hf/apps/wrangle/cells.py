"""Cells of tables, right or wrong, as examples of error detection; and errors that are made where none are known."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path

from ...errors import PolicyError, StoreError
from .examples import NO, YES, Example
from .tables import Row, Table, read_table

__all__ = ["cells_of", "cells_of_table"]

#: columns of a split that are not the row's
_ABOUT = ("row_id", "col_name", "is_clean")


def cells_of(split: Table, table: Table | None, file: Path) -> list[Example]:
    """The cells that a split names by `row_id, col_name`, with `is_clean`; without a table each line of the split holds
    the row as well.

    Raises:
        StoreError: columns are missing, or no such row or column.
        PolicyError: `is_clean` is something else than 1 or 0.
    """
    found = []
    for number, line in enumerate(split):
        if "col_name" not in line or (table is not None and "row_id" not in line):
            raise StoreError(f"{str(file)!r} needs columns row_id, col_name and is_clean, but has {', '.join(line)}")
        row, key = (_own(line), str(number)) if table is None else (_row(table, line["row_id"], file), line["row_id"])
        column = line["col_name"]
        if column not in row:
            raise StoreError(f"{str(file)!r} names the column {column!r}, but the table has {', '.join(row)}")
        clean = line.get("is_clean", "").strip()
        if clean not in ("", "0", "1", "0.0", "1.0", "True", "False"):
            raise PolicyError(f"{str(file)!r}: is_clean is {clean!r}; it should be 1 or 0")
        label = None if not clean else NO if clean in ("1", "1.0", "True") else YES
        found.append(Example(f"{key}:{column}", (row,), column, label, group=key))
    return found


def cells_of_table(path: Path, clean: str | Path | None, made_errors: float, seed: int) -> list[Example]:
    """All cells of a CSV file, in its order, wrong where they are not as in `clean`, or where an error was put.

    Args:
        path: of the file.
        clean: see `layouts.read`; by default `NAME_clean.csv` beside the file, if there is one.
        made_errors: share of the cells into which an error is put.
        seed: draws these.

    Raises:
        StoreError: a file that cannot be read, or another table than the file's.
        PolicyError: a share that is none, or errors both known and to be made.
    """
    if not 0 <= made_errors <= 1:
        raise PolicyError(f"made_errors={made_errors}: give a share of the cells, from 0 to 1")
    table = read_table(path)
    beside = path.with_name(f"{path.stem}_clean.csv")
    right = Path(clean) if clean is not None else beside if beside.is_file() and not made_errors else None
    if right is not None and made_errors:
        raise PolicyError("errors are known from a clean table or made; give one of the two")
    if made_errors:
        table, wrong = _spoiled(table, made_errors, seed)
        labels = {(n, name): YES if (n, name) in wrong else NO for n, row in enumerate(table) for name in row}
    else:
        labels = {} if right is None else _compared(table, right)
    return [
        Example(f"{number}:{name}", (row,), name, labels.get((number, name)), group=str(number))
        for number, row in enumerate(table)
        for name in row
    ]


def _own(line: Row) -> Row:
    return {name: value for name, value in line.items() if name not in _ABOUT}


def _row(table: Table, key: str, file: Path) -> Row:
    if not (key.isdecimal() and int(key) < len(table)):
        raise StoreError(f"{str(file)!r} names row {key!r}, but the table has rows 0 to {len(table) - 1}")
    return table[int(key)]


def _compared(table: Table, clean: Path) -> dict[tuple[int, str], str]:
    """Labels of the cells of which something is known."""
    right = read_table(clean)
    known: Mapping[tuple[int, str], str]
    if right and {"tid", "attribute", "correct_val"} <= right[0].keys():
        if not all(line["tid"].isdecimal() for line in right):
            raise StoreError(f"{str(clean)!r}: a tid is the number of a row, from 0")
        known = {(int(line["tid"]), line["attribute"]): line["correct_val"] for line in right}
    elif len(right) == len(table):
        known = {(number, name): value for number, row in enumerate(right) for name, value in row.items()}
    else:
        raise StoreError(
            f"{str(clean)!r} has {len(right)} rows, the table {len(table)}; give the same rows without errors"
        )
    return {
        (number, name): NO if value.strip() == known[number, name].strip() else YES
        for number, row in enumerate(table)
        for name, value in row.items()
        if (number, name) in known
    }


def _spoiled(table: Table, share: float, seed: int) -> tuple[Table, set[tuple[int, str]]]:
    """The table with an x in place of a letter or digit of a share of its cells, and which these are."""
    draw = random.Random(seed)  # noqa: S311  the same errors in every run
    places = [
        (number, name)
        for number, row in enumerate(table)
        for name, value in row.items()
        if any(letter.isalnum() and letter not in "xX" for letter in value)
    ]
    wrong = set(draw.sample(places, round(len(places) * share)))
    return [
        {name: _with_an_error(value, draw) if (number, name) in wrong else value for name, value in row.items()}
        for number, row in enumerate(table)
    ], wrong


def _with_an_error(value: str, draw: random.Random) -> str:
    place = draw.choice([place for place, letter in enumerate(value) if letter.isalnum() and letter not in "xX"])
    return f"{value[:place]}x{value[place + 1 :]}"
