"""Which examples a prompt shows: drawn at random, given by hand, or the likes of what a model gets wrong.

The three ways are those of Narayan et al., arXiv:2205.09911, section 4; there, mistakes on the validation split are
clustered by a sentence encoder, here by the pieces of words that they have in common.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
import warnings
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...errors import PolicyError, StoreError
from .examples import Data, Example, sampled
from .wording import Wording

__all__ = ["WAYS", "Shots", "at_random", "by_clusters", "read_shown"]

WAYS = ("random", "clusters", "manual")

#: question and answer as a prompt shows them
Shown = tuple[str, str]

# Pieces of words are counted in so many places; more than a question has, few enough for clusters to be found at once.
_PLACES = 512
_PIECE = 3
# Where k-means ends depends on where it begins; the tightest clusters are taken.
_STARTS = 8


@dataclasses.dataclass(frozen=True)
class Shots:
    """The examples that each prompt shows before its question; the same for all, so that they are computed once.

    Args:
        count: how many; of those given by hand all are shown.
        how: one of `WAYS`.
        file: of examples given by hand, see `read_shown`.
        seed: what is drawn follows from it.
        tried: by clusters, so many validation examples are answered at most, to see which go wrong.

    Raises:
        PolicyError: another way, a negative count, or a file where none is needed or the reverse.
    """

    count: int = 10
    how: str = "random"
    file: str | Path | None = None
    seed: int = 0
    tried: int = 100

    def __post_init__(self) -> None:
        if self.how not in WAYS:
            raise PolicyError(f"examples chosen by {self.how!r}: use one of {', '.join(WAYS)}")
        if self.count < 0 or self.tried < 1:
            raise PolicyError(f"count={self.count}, tried={self.tried}: the one is 0 at least, the other 1")
        if (self.file is None) == (self.how == "manual"):
            raise PolicyError("examples given by hand are in a file, and only they: give both or neither")


def at_random(data: Data, count: int, seed: int) -> list[Example]:
    """Labelled examples to learn from; each answer of a decision as often as the other, as far as there are enough.

    Where there are none in the train split, they are of the validation split.

    Raises:
        PolicyError: there are none at all.
    """
    known = [example for example in data.train or data.valid if example.label is not None]
    if count and not known:
        raise PolicyError(
            f"{data.name!r} has no labelled examples to show in prompts; ask for none (--shots 0), or give some by hand"
        )
    draw = random.Random(seed)  # noqa: S311  the same examples in every run
    if data.task == "imputation":
        chosen = draw.sample(known, min(count, len(known)))
    else:
        classes: dict[str | None, list[Example]] = {}
        for example in draw.sample(known, len(known)):
            classes.setdefault(example.label, []).append(example)
        turns = itertools.chain.from_iterable(itertools.zip_longest(*classes.values()))
        chosen = list(itertools.islice((example for example in turns if example is not None), count))
    draw.shuffle(chosen)
    return chosen


def by_clusters(texts: Sequence[str], count: int, seed: int) -> list[int]:
    """Numbers of distinct texts, of each of so many clusters the one nearest to its centre; fewer if there are none."""
    import numpy as np
    from scipy.cluster.vq import kmeans2

    distinct = sorted({text: place for place, text in reversed([*enumerate(texts)])}.values())
    if count < 1 or len(distinct) <= count:
        return distinct[: max(0, count)]
    vectors = _vectors([texts[place] for place in distinct])
    found = []
    with warnings.catch_warnings():
        # an empty cluster gives no text
        warnings.simplefilter("ignore", UserWarning)
        for start in range(_STARTS):
            centres, cluster = kmeans2(vectors, count, minit="++", seed=(_STARTS * seed + start) % 2**32)
            found.append((np.linalg.norm(vectors - centres[cluster], axis=1), cluster))
    distances, cluster = min(found, key=lambda pair: float((pair[0] ** 2).sum()))
    nearest: dict[int, int] = {}
    for row in np.argsort(distances, kind="stable").tolist():
        nearest.setdefault(int(cluster[row]), distinct[row])
    return sorted(nearest.values())


def read_shown(file: str | Path, data: Data, wording: Wording) -> list[Shown]:
    """Questions and answers that were chosen by hand: JSON lines, each `{"text": ..., "label": ...}`, or `{"id": ...}`
    of an example of the train split, or of the validation split if there is no other.

    Raises:
        StoreError: the file cannot be read.
        PolicyError: a line is something else, or names no labelled example.
    """
    try:
        lines = Path(file).read_text("utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise StoreError(f"cannot read the examples {str(file)!r} ({error})") from error
    by_id = {example.id: example for example in data.train or data.valid}
    shown = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            shown.append(_shown(line, f"line {number} of {str(file)!r}", by_id, wording))
    return shown


def _shown(line: str, where: str, by_id: dict[str, Example], wording: Wording) -> Shown:
    try:
        given = json.loads(line)
    except json.JSONDecodeError as error:
        raise PolicyError(f"{where} is not JSON: {error}") from error
    if not isinstance(given, dict) or not ({"text", "label"} <= given.keys() or "id" in given):
        raise PolicyError(f'{where} should be {{"text": ..., "label": ...}}, or {{"id": ...}} of an example')
    if "id" not in given:
        return str(given["text"]), str(given["label"])
    example = by_id.get(str(given["id"]))
    if example is None or example.label is None:
        raise PolicyError(f"{where}: {given['id']!r} is no labelled example of the train split")
    return wording.asked(example), example.label


def _vectors(texts: Sequence[str]) -> Any:
    """Texts as vectors of length 1, (texts, _PLACES): how often they have which pieces, rare ones counting more."""
    import numpy as np

    counts = np.zeros((len(texts), _PLACES), np.float64)
    for row, text in enumerate(texts):
        small = text.casefold()
        for start in range(max(1, len(small) - _PIECE + 1)):
            counts[row, zlib.crc32(small[start : start + _PIECE].encode()) % _PLACES] += 1
    weighed = counts * np.log((1 + len(texts)) / (1 + np.count_nonzero(counts, axis=0)))
    return weighed / np.maximum(np.linalg.norm(weighed, axis=1, keepdims=True), 1e-12)


def tried(data: Data, shots: Shots) -> Sequence[Example]:
    """The validation examples that are answered to see which go wrong."""
    return sampled([example for example in data.valid if example.label is not None], shots.tried, shots.seed)
