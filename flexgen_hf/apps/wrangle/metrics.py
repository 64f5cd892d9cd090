"""What answers are worth: precision, recall, F1, accuracy, by counting. Knows neither tasks nor models."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

__all__ = ["Scores"]


@dataclasses.dataclass(frozen=True)
class Scores:
    """Counts of answers beside labels. A ratio of nothing to nothing is 0.

    Args:
        labelled: rows whose label is known.
        relevant: of these, the ones that there were to find.
        claimed: the ones that an answer claims to have found.
        found: the ones of which it is right.
        correct: rows whose answer is the label.
    """

    labelled: int
    relevant: int
    claimed: int
    found: int
    correct: int

    @classmethod
    def of_decisions(cls, answers: Iterable[tuple[str | None, str]], positive: str) -> Scores:
        """Answers of two classes beside labels. No answer claims nothing and is never correct."""
        pairs = list(answers)
        return cls(
            labelled=len(pairs),
            relevant=sum(label == positive for _, label in pairs),
            claimed=sum(answer == positive for answer, _ in pairs),
            found=sum(answer == label == positive for answer, label in pairs),
            correct=sum(answer == label for answer, label in pairs),
        )

    @classmethod
    def of_values(cls, answers: Iterable[tuple[str | None, str]]) -> Scores:
        """Values beside the right ones: precision is of those given, recall of all."""
        pairs = list(answers)
        right = sum(answer == label for answer, label in pairs)
        given = sum(answer is not None for answer, _ in pairs)
        return cls(labelled=len(pairs), relevant=len(pairs), claimed=given, found=right, correct=right)

    @property
    def precision(self) -> float:
        """Share of what is claimed that is right."""
        return _ratio(self.found, self.claimed)

    @property
    def recall(self) -> float:
        """Share of what there was to find that was found."""
        return _ratio(self.found, self.relevant)

    @property
    def f1(self) -> float:
        """The harmonic mean of precision and recall, from the counts, so that it is defined where both are 0."""
        return _ratio(2 * self.found, self.claimed + self.relevant)

    @property
    def accuracy(self) -> float:
        """Share of labelled rows whose answer is the label."""
        return _ratio(self.correct, self.labelled)


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else 0.0
