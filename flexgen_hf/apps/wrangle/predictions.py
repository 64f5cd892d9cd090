"""What a model answered, example by example, and the file of it."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...errors import PolicyError, StoreError
from .examples import YES, Example
from .metrics import Scores
from .serialising import cell_text
from .tables import ids_of, read_table
from .wording import Wording

__all__ = ["Prediction", "refuse_ending", "scored", "write_filled", "write_predictions"]


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What became of an example.

    Args:
        id: of the example.
        answer: what was read in the text; None if nothing was, or if there is no text.
        label: the right answer, if it is known.
        correct: whether the answer is right; None if the label is not known.
        text: what the model wrote.
        error: why it wrote nothing.
        prompt_tokens: of the prompt.
        tokens: that were written.
    """

    id: str
    answer: str | None
    label: str | None
    correct: bool | None
    text: str = ""
    error: str | None = None
    prompt_tokens: int = 0
    tokens: int = 0

    @classmethod
    def of(cls, example: Example, line: Mapping[str, Any], wording: Wording) -> Prediction:
        """The prediction of an example by the line of a batch job."""
        error = line.get("error")
        text = str(line.get("text", ""))
        answer = None if error is not None else wording.read(text)
        correct = None
        if example.label is not None:
            correct = answer is not None and wording.compared(answer) == wording.compared(example.label)
        return cls(
            example.id,
            answer,
            example.label,
            correct,
            text,
            None if error is None else str(error["message"]),
            int(line.get("prompt_tokens", 0)),
            int(line.get("completion_tokens", 0)),
        )


def scored(predictions: Sequence[Prediction], wording: Wording) -> Scores | None:
    """What the predictions are worth; None if no label is known."""
    answers = [
        (None if p.answer is None else wording.compared(p.answer), wording.compared(p.label))
        for p in predictions
        if p.label is not None
    ]
    if not answers:
        return None
    return Scores.of_values(answers) if wording.task == "imputation" else Scores.of_decisions(answers, YES)


def write_predictions(predictions: Sequence[Prediction], path: Path) -> None:
    """Writes a file of one line for each prediction: JSON lines, or CSV if the name ends so.

    Raises:
        StoreError: it cannot be written.
    """
    rows = [dataclasses.asdict(prediction) for prediction in predictions]
    if path.suffix.lower() == ".csv":
        content = _csv_text([field.name for field in dataclasses.fields(Prediction)], rows)
    else:
        content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    _write_whole(path, content)


def write_filled(path: Path, column: str, answers: Mapping[str, str | None], target: Path) -> None:
    """Writes a CSV file again with answers in the empty cells of a column.

    Args:
        path: of the file.
        column: that had holes.
        answers: by the ids of predictions; what has none, or None, stays empty.
        target: of the file to be written.

    Raises:
        StoreError: the one cannot be read, or the other not written.
    """
    table = read_table(path)
    for known_by, row in zip(ids_of(table), table, strict=True):
        if not cell_text(row[column]):
            row[column] = answers.get(known_by) or ""
    _write_whole(target, _csv_text(list(table[0]), table))


def refuse_ending(path: Path) -> None:
    """Refuses a name that promises another format than JSON lines or CSV.

    Raises:
        PolicyError: it does.
    """
    if path.suffix.lower() not in (".csv", ".jsonl"):
        raise PolicyError(f"predictions are written as .jsonl or .csv, not {path.name!r}; give another name")


def _write_whole(path: Path, content: str) -> None:
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


def _csv_text(names: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> str:
    """Rows as CSV with a header."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, names)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
