"""Rows as text: `attribute: value. attribute: value`, in one line. Knows nothing of tasks and models.

The form is that of Narayan et al., arXiv:2205.09911, section 3.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from .tables import Row

__all__ = ["cell_text", "row_text", "same_value"]


def cell_text(value: str) -> str:
    """A value in one line: a line break would end an answer. The quotes that the Magellan tables have around a value
    with blanks (`` ` new york ' ``) are none of it.
    """
    words = " ".join(value.split())
    if words[:1] in ("`", "'") and words.endswith(" '"):
        return words[1:-2].strip()
    return words


def row_text(row: Row, dropped: Collection[str] = (), renamed: Mapping[str, str] | None = None, blank: str = "") -> str:
    """A row as `attribute: value. attribute: value`.

    Args:
        row: attributes and values.
        dropped: attributes that are left out.
        renamed: attributes and what they are called in the text.
        blank: what an empty value is written as.
    """
    names = renamed or {}
    return ". ".join(
        f"{names.get(name, name)}: {cell_text(value) or blank}" for name, value in row.items() if name not in dropped
    )


def same_value(value: str) -> str:
    """What two values have in common that are the same one but for case, blanks, and quotes or points around them."""
    return cell_text(value).casefold().strip(" .,;:'\"`")
