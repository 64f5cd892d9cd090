"""Files of data sets, in the layouts in which they are published and in those that users have, as examples.

What `read` takes for each task:

- `entity_matching`: a folder with `tableA.csv` and `tableB.csv`, and `train.csv`, `valid.csv`, `test.csv` of
  `ltable_id, rtable_id, label`; or one with `train.txt`, `valid.txt`, `test.txt` of DeepMatcher's lines.
- `imputation`: a folder with `train.csv`, `valid.csv`, `test.csv`; one with pairs as above, whose distinct rows are
  taken; or a CSV file, whose empty cells are asked for.
- `error_detection`: a folder with `table.csv` and `train.csv`, `valid.csv`, `test.csv` of `row_id, col_name, is_clean`,
  or without the table if these hold the row as well; or a CSV file, with what is right in `NAME_clean.csv`.
- `schema_matching`: a folder with `train.csv`, `valid.csv`, `test.csv` of `left, right, label`, or of
  `omop, table, label` with descriptions `d1` to `d4`; or a CSV file.

A folder may lack train and valid. Labels may be missing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from ...errors import PolicyError, StoreError
from .cells import cells_of, cells_of_table
from .examples import NO, TASKS, YES, Data, Example, apportioned
from .serialising import cell_text
from .tables import Row, Table, read_pair_lines, read_table
from .wording import Wording

__all__ = ["read", "read_pair", "with_answers"]

_SPLITS = ("train", "valid", "test")

_TRUE, _FALSE = {"1", "1.0", "true", "yes", "y", "match"}, {"0", "0.0", "false", "no", "n", "non-match"}


def read(
    task: str,
    path: str | Path,
    *,
    column: str | None = None,
    clean: str | Path | None = None,
    made_errors: float = 0.0,
    seed: int = 0,
) -> Data:
    """A data set from its folder, or from a CSV file.

    Args:
        task: one of `TASKS`.
        path: of the folder or file.
        column: of an imputation, the one that is asked for; known for the published sets.
        clean: of an error detection in a CSV file, what is right there: the same table without errors, or a table of
            `tid, attribute, correct_val`.
        made_errors: share of a CSV file's cells into which an error is put, to measure how many are found.
        seed: draws parts of what comes in one piece, and errors that are made.

    Raises:
        StoreError: files are missing or cannot be read.
        PolicyError: an unknown task or column, or a label that means nothing.
    """
    if task not in TASKS:
        raise PolicyError(f"task {task!r} is unknown; use one of {', '.join(TASKS)}")
    folder = Path(path)
    if not folder.exists():
        raise StoreError(f"no data at {str(folder)!r}; give the folder of a data set, or a CSV file")
    if task != "error_detection" and (clean is not None or made_errors):
        raise PolicyError(f"clean and made_errors are of error detection, not of {task}; leave them out")
    name = folder.resolve().stem if folder.is_file() else folder.resolve().name
    if task == "entity_matching":
        return _from_splits(name, task, folder, _pair_readers(folder))
    if task == "schema_matching":
        return _from_splits(name, task, folder, [(".csv", lambda file: _schema_pairs(read_table(file)))], seed)
    if task == "imputation":
        return _imputation(name, folder, column or Wording.of(task, name).column, seed)
    if folder.is_file():
        return apportioned(name, task, cells_of_table(folder, clean, made_errors, seed), seed)
    if clean is not None or made_errors:
        raise PolicyError(f"{str(folder)!r} is a folder; clean and made_errors go with a CSV file")
    table = read_table(folder / "table.csv") if (folder / "table.csv").exists() else None
    return _from_splits(name, task, folder, [(".csv", lambda file: cells_of(read_table(file), table, file))])


def read_pair(left: str | Path, right: str | Path, pairs: str | Path, *, seed: int = 0) -> Data:
    """Entities to be matched from three CSV files.

    Args:
        left: the one table; its rows are known by `id`, or by the first column.
        right: the other one, likewise.
        pairs: of `ltable_id, rtable_id`, or the first two columns, and if known the `label`. Pairs without a label are
            to be answered, those with one to learn from; if all have one, most are to be answered, to measure that.
        seed: draws the parts then.

    Raises:
        StoreError: a file that cannot be read, or an id that is not there.
        PolicyError: a label that means nothing.
    """
    examples = _matched(read_table(pairs), _by_id(left), _by_id(right), Path(pairs))
    return apportioned(Path(pairs).resolve().stem, "entity_matching", examples, seed)


def _decision(label: str, where: str) -> str | None:
    """`YES` or `NO` of a label as files have it; None of an empty one.

    Raises:
        PolicyError: it says neither.
    """
    word = label.strip().casefold()
    if word and word not in _TRUE | _FALSE:
        raise PolicyError(f"{where}: the label {label!r} is neither 1 nor 0")
    return (YES if word in _TRUE else NO) if word else None


_Reader = Callable[[Path], list[Example]]


def _from_splits(name: str, task: str, folder: Path, readers: Sequence[tuple[str, _Reader]], seed: int = 0) -> Data:
    """A data set of a file for each split, by the first of the readers for whose ending there is a test split."""
    if folder.is_file():
        return apportioned(name, task, readers[0][1](folder), seed)
    for ending, reader in readers:
        if (folder / f"test{ending}").is_file():
            files = [folder / f"{split}{ending}" for split in _SPLITS]
            return Data(name, task, *(reader(file) if file.is_file() else [] for file in files))
    wanted = " or ".join(f"test{ending}" for ending, _ in readers)
    raise StoreError(f"no {wanted} in {str(folder)!r}; give the folder of one data set of {task}")


# -------------------------------------------------------------------------------------------------------------- pairs
def _pair_readers(folder: Path) -> Sequence[tuple[str, _Reader]]:
    if folder.is_file():
        raise StoreError(f"{str(folder)!r} is a file; give the folder of a data set, or two tables and their pairs")
    if not (folder / "tableA.csv").is_file():
        return [(".txt", _pairs_of_lines)]
    left, right = _by_id(folder / "tableA.csv"), _by_id(folder / "tableB.csv")
    return [(".csv", lambda file: _matched(read_table(file), left, right, file))]


def _pairs_of_lines(file: Path) -> list[Example]:
    return [
        Example(str(number), (left, right), label=_decision(label, f"pair {number} of {str(file)!r}"))
        for number, (left, right, label) in enumerate(read_pair_lines(file))
    ]


def _by_id(path: str | Path) -> dict[str, Row]:
    """The rows of a table, without their ids, by these."""
    table = read_table(path)
    if not table:
        raise StoreError(f"the table {str(path)!r} has no rows")
    key = "id" if "id" in table[0] else next(iter(table[0]))
    found: dict[str, Row] = {}
    for row in table:
        if row[key] in found:
            raise StoreError(f"{str(path)!r} has two rows with {key} {row[key]!r}; ids must be distinct")
        found[row[key]] = {name: value for name, value in row.items() if name != key}
    return found


def _matched(pairs: Table, left: dict[str, Row], right: dict[str, Row], file: Path) -> list[Example]:
    def row(table: dict[str, Row], key: str, side: str) -> Row:
        if key not in table:
            raise StoreError(f"{str(file)!r} names {key!r}, which is no id of the {side} table")
        return table[key]

    found = []
    for number, pair in enumerate(pairs):
        names = ["ltable_id", "rtable_id"] if {"ltable_id", "rtable_id"} <= pair.keys() else list(pair)[:2]
        if len(names) < 2:
            raise StoreError(f"{str(file)!r} has one column; it should be two of ids, and a label if there is one")
        first, second = (pair[name] for name in names)
        label = _decision(pair.get("label", ""), f"pair {number} of {str(file)!r}")
        rows = row(left, first, "left"), row(right, second, "right")
        found.append(Example(f"{first},{second}", rows, label=label))
    return found


def _schema_pairs(table: Table) -> list[Example]:
    found = []
    for number, line in enumerate(table):
        names = next((names for names in (("left", "right"), ("omop", "table")) if set(names) <= line.keys()), None)
        if names is None:
            raise StoreError(f"pairs of attributes need columns left and right, or omop and table, not {list(line)}")
        # the descriptions are of the table and the column, first those of the left attribute
        told = [[line[key] for key in keys if line.get(key)] for keys in (("d1", "d2"), ("d3", "d4"))]
        rows = tuple(
            {"name": line[name], **({"description": ". ".join(text)} if text else {})}
            for name, text in zip(names, told, strict=True)
        )
        found.append(Example(str(number), rows, label=_decision(line.get("label", ""), f"pair {number}")))
    return found


# --------------------------------------------------------------------------------------------------------- imputation
def _imputation(name: str, path: Path, column: str | None, seed: int) -> Data:
    if column is None:
        raise PolicyError(f"{str(path)!r}: which column is to be filled in? name it with column, or --column")
    wanted = column
    if path.is_file():
        return apportioned(name, "imputation", _holes(read_table(path), wanted, path), seed)
    if (path / "test.csv").is_file() and not (path / "tableA.csv").is_file():
        return _from_splits(name, "imputation", path, [(".csv", lambda file: _holes(read_table(file), wanted, file))])
    pairs = _from_splits(name, "entity_matching", path, _pair_readers(path))
    seen: set[tuple[tuple[str, str], ...]] = set()
    # the rows to be answered first: what is asked must not be shown
    test, valid, train = (
        _holes(list(_distinct(split, seen)), wanted, path) for split in (pairs.test, pairs.valid, pairs.train)
    )
    return Data(name, "imputation", train, valid, test)


def _distinct(pairs: Sequence[Example], seen: set[tuple[tuple[str, str], ...]]) -> Iterator[dict[str, str]]:
    for pair in pairs:
        for row in pair.rows:
            key = tuple(row.items())
            if key not in seen:
                seen.add(key)
                yield dict(row)


def _holes(table: Table, column: str, path: Path) -> list[Example]:
    found = []
    for number, row in enumerate(table):
        if column not in row:
            raise PolicyError(f"{str(path)!r} has no column {column!r}, but {', '.join(map(repr, row))}")
        value = cell_text(row[column])
        rest = {name: cell for name, cell in row.items() if name not in (column, "id")}
        found.append(Example(str(number), (rest,), column, value or None))
    return found


def with_answers(table: Table, column: str, answers: dict[str, str]) -> Table:
    """A table whose empty cells of a column have the answers, each by the number of its row."""
    filled = []
    for number, row in enumerate(table):
        answer = answers.get(str(number))
        is_empty = not cell_text(row[column])
        filled.append({**row, column: answer} if is_empty and answer is not None else row)
    return filled
