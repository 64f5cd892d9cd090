"""The trained tiny OPT that the package brings, and prompts in its words; fixtures over it are in `conftest`."""

from __future__ import annotations

import random
from pathlib import Path

from flexgen_hf import demo

TINY_OPT = Path(demo.__file__).parent / "assets" / "tiny-opt"

_WORDS = "the people of these United States have in every year made peace with all nations".split()


def sentences(count: int, seed: int = 0) -> list[str]:
    """So many prompts of one to nine words."""
    draw = random.Random(seed)  # noqa: S311  the same prompts in every run
    return [" ".join(draw.choices(_WORDS, k=draw.randint(1, 9))) for _ in range(count)]
