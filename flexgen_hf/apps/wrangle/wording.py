"""How a task is put into words: questions, instructions, and what the published data sets are known to need.

The form of the questions, the attributes that are left out and those that are imputed follow Narayan et al.,
arXiv:2205.09911, and its published settings.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from ...errors import PolicyError
from .examples import NO, TASKS, YES, Example
from .serialising import cell_text, row_text, same_value

__all__ = ["Wording"]

_QUESTIONS = {
    "entity_matching": "Are {thing} A and {thing} B the same?",
    "imputation": "What is the {column}?",
    "error_detection": "Is there an error in {cell}?",
    "schema_matching": "Do A and B mean the same?",
}
_INSTRUCTIONS = {
    "entity_matching": "Decide whether {thing} A and {thing} B are the same. Answer Yes or No.",
    "imputation": "Fill in the {column} that is missing.",
    "error_detection": "Decide whether there is an error in a cell of a table. Answer Yes or No.",
    "schema_matching": "Decide whether two attributes of different schemas, A and B, mean the same. Answer Yes or No.",
}

_DECISION = re.compile(r"\b(yes|no)\b", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Wording:
    """How examples of a data set are put into words.

    Args:
        task: one of `TASKS`.
        question: what is asked behind the row or rows; `{thing}`, `{column}` and `{cell}` stand for what they say.
        instruction: what is said once, before the examples; "" says nothing.
        thing: what a row describes.
        dropped: attributes that are left out.
        renamed: attributes and what they are called instead.
        shows_row: of an error detection, whether the cell's row stands before the question.
        column: of an imputation, the one that is asked for where none is named.
        blank: what an empty value is written as.

    Raises:
        PolicyError: an unknown task, or braces around something else.
    """

    task: str
    question: str = ""
    instruction: str | None = None
    thing: str = "Record"
    dropped: tuple[str, ...] = ()
    renamed: Mapping[str, str] = dataclasses.field(default_factory=dict)
    shows_row: bool = True
    column: str | None = None
    blank: str = ""

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise PolicyError(f"task {self.task!r} is unknown; use one of {', '.join(TASKS)}")
        for text in (self.question, self.instruction or ""):
            self._filled(text, Example("", ({"name": "value"},), "name"))

    @classmethod
    def of(cls, task: str, name: str = "") -> Wording:
        """The wording of a published data set by the name of its folder or file, or a general one."""
        key = re.sub(r"[^a-z0-9]", "", name.casefold())
        known = next((made for (of, begin), made in _KNOWN.items() if of == task and key.startswith(begin)), {})
        return cls(task, **known)

    # ------------------------------------------------------------------------------------------------------- questions
    def asked(self, example: Example) -> str:
        """The question about an example, to be followed by the answer."""
        question = self._filled(self.question or _QUESTIONS[self.task], example)
        rows = [row_text(row, self.dropped, self.renamed, self.blank) for row in example.rows]
        if self.task == "entity_matching":
            return f"{self.thing} A is {rows[0]}. {self.thing} B is {rows[1]}. {question}"
        if self.task == "schema_matching":
            left, right = ("; ".join(map(cell_text, row.values())) for row in example.rows)
            return f"A is {left}. B is {right}. {question}"
        if self.task == "imputation":
            return f"{rows[0]}. {question}"
        return f"{rows[0]}. {question}" if self.shows_row else question

    def instructed(self, example: Example) -> str:
        """What is said once, before everything else; the example is any one of the data set."""
        text = _INSTRUCTIONS[self.task] if self.instruction is None else self.instruction
        return self._filled(text, example)

    def read(self, text: str) -> str | None:
        """The answer in what a model wrote; None if there is none in it."""
        line = text.strip().split("\n")[0]
        if self.task == "imputation":
            return cell_text(line) or None
        found = _DECISION.search(line)
        return None if found is None else YES if found[1].casefold() == "yes" else NO

    def compared(self, answer: str) -> str:
        """What of an answer or label must be the same for the answer to be right."""
        return same_value(answer) if self.task == "imputation" else answer

    def _filled(self, text: str, example: Example) -> str:
        column = self.renamed.get(example.column, example.column)
        value = example.rows[0].get(example.column, "")
        try:
            cell = f"{column}: {cell_text(value) or self.blank}".rstrip()
            return text.format(thing=self.thing, column=column, cell=cell)
        except (KeyError, IndexError, ValueError, AttributeError) as error:
            raise PolicyError(
                f"{text!r} cannot be filled in ({error}); it may have {{thing}}, {{column}} and {{cell}}"
            ) from error


_SONG = {"Song_Name": "name", "Artist_Name": "artist", "Album_Name": "album", "Genre": "genre", "Price": "price",
         "Time": "time", "Released": "released"}  # fmt: skip
_RESTAURANT: Mapping[str, Any] = {
    "column": "city", "dropped": ("class",), "thing": "Restaurant",
    "instruction": "Fill in the city of the restaurant.",
}  # fmt: skip

#: by task and the beginning of a name, in small letters and digits only
_KNOWN: Mapping[tuple[str, str], Mapping[str, Any]] = {
    ("entity_matching", "amazongoogle"): {"thing": "Product"},
    ("entity_matching", "beer"): {
        "thing": "Product", "dropped": ("Style", "ABV"),
        "renamed": {"Beer_Name": "name", "Brew_Factory_Name": "factory"},
    },
    ("entity_matching", "dblpacm"): {"thing": "Product"},
    ("entity_matching", "dblpgooglescholar"): {"thing": "Product"},
    ("entity_matching", "fodorszagats"): {"thing": "Product"},
    ("entity_matching", "itunesamazon"): {"thing": "Song", "dropped": ("CopyRight",), "renamed": _SONG},
    ("entity_matching", "walmartamazon"): {"thing": "Product", "dropped": ("category", "price", "brand")},
    ("imputation", "buy"): {
        "column": "manufacturer", "thing": "Product", "instruction": "Fill in the manufacturer of the product.",
    },
    ("imputation", "restaurant"): _RESTAURANT,
    ("imputation", "fodorszagats"): _RESTAURANT,
    ("error_detection", "hospital"): {
        "question": "Is there a spelling error in {cell}?", "shows_row": False,
        "instruction": "Decide whether a letter x stands in a value where another one belongs. Answer Yes or No.",
    },
    ("error_detection", "adult"): {
        "instruction": "Decide whether a value is wrong, looking at the other ones of its row. Answer Yes or No.",
    },
    ("schema_matching", "synthea"): {
        "instruction": "Decide whether an attribute of one medical schema and one of another, A and B, mean the same. "
        "Answer Yes or No.",
    },
}  # fmt: skip
