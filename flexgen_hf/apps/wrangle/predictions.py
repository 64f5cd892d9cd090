"""What a model answered, example by example, and the file of it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...errors import PolicyError
from .examples import YES, Example
from .metrics import Scores
from .tables import write_table, write_whole
from .wording import Wording

__all__ = ["Prediction", "refuse_ending", "scored", "write_predictions"]


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
        write_table(rows, path)
    else:
        write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def refuse_ending(path: Path) -> None:
    """Refuses a name that promises another format than JSON lines or CSV.

    Raises:
        PolicyError: it does.
    """
    if path.suffix.lower() not in (".csv", ".jsonl"):
        raise PolicyError(f"predictions are written as .jsonl or .csv, not {path.name!r}; give another name")
