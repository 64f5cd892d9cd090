"""What a data set is made of, whatever its files looked like: examples to learn from, and examples to be answered."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence

from .tables import Row

__all__ = ["NO", "TASKS", "YES", "Data", "Example", "apportioned", "sampled"]

TASKS = ("entity_matching", "imputation", "error_detection", "schema_matching")

YES, NO = "Yes", "No"

# Of a data set that comes in one piece, so much is to learn from and so much to choose with; few examples are needed.
_TRAIN_SHARE = _VALID_SHARE = 0.1


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
    """A question, with its answer if that is known.

    Args:
        id: by which the example is known in its files, and in the predictions.
        rows: the two of a pair, or the one that is asked about.
        column: of the cell that is asked about.
        label: `YES` or `NO`, or the value of a cell; None if it is not known.
        group: what must not be torn apart between examples to learn from and those to be answered; by default the id.
    """

    id: str
    rows: tuple[Row, ...]
    column: str = ""
    label: str | None = None
    group: str = ""


@dataclasses.dataclass(frozen=True, eq=False)
class Data:
    """A data set.

    Args:
        name: of its folder or file; wordings go by it.
        task: one of `TASKS`.
        train: examples that prompts may show.
        valid: examples to choose them with.
        test: examples to be answered, in the order of their files.
    """

    name: str
    task: str
    train: Sequence[Example]
    valid: Sequence[Example]
    test: Sequence[Example]

    def limited(self, samples: int | None, seed: int) -> Data:
        """The data set with at most so many examples to be answered, drawn at random, in their order."""
        return self if samples is None else dataclasses.replace(self, test=sampled(self.test, samples, seed))


def sampled(examples: Sequence[Example], most: int, seed: int) -> Sequence[Example]:
    """At most so many of the examples, drawn at random, in their order."""
    if len(examples) <= most:
        return examples
    draw = random.Random(seed)  # noqa: S311  the same sample in every run
    return [examples[place] for place in sorted(draw.sample(range(len(examples)), most))]


def apportioned(name: str, task: str, examples: Sequence[Example], seed: int) -> Data:
    """A data set of examples that come in one piece.

    If labels are missing, those examples are to be answered, and the others to learn from. If all are known, the seed
    draws a tenth of the groups to learn from and a tenth to choose with, and the rest measures answers.
    """
    if missing := [example for example in examples if example.label is None]:
        known = [example for example in examples if example.label is not None]
        groups = _shuffled(known, seed)
        valid = set(groups[: round(len(groups) * _VALID_SHARE)])
        train = [example for example in known if _group(example) not in valid]
        return Data(name, task, train, [example for example in known if _group(example) in valid], missing)
    groups = _shuffled(examples, seed)
    ends = round(len(groups) * _TRAIN_SHARE), round(len(groups) * (_TRAIN_SHARE + _VALID_SHARE))
    part_of = dict.fromkeys(groups[: ends[0]], 0) | dict.fromkeys(groups[ends[0] : ends[1]], 1)
    parts: tuple[list[Example], list[Example], list[Example]] = ([], [], [])
    for example in examples:
        parts[part_of.get(_group(example), 2)].append(example)
    return Data(name, task, *parts)


def _group(example: Example) -> str:
    return example.group or example.id


def _shuffled(examples: Sequence[Example], seed: int) -> list[str]:
    groups = list(dict.fromkeys(map(_group, examples)))
    random.Random(seed).shuffle(groups)  # noqa: S311  the same parts in every run
    return groups
