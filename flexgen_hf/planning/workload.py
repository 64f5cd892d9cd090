"""What is to be generated, and the sweeps of it that a model of costs tells apart."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import NamedTuple

from ..errors import PolicyError
from ..policy import Policy
from .budget import Call

__all__ = ["Sweep", "Workload", "call_of"]


@dataclasses.dataclass(frozen=True)
class Workload:
    """What is to be generated.

    Args:
        prompt_len: tokens of each prompt.
        gen_len: tokens written after each.
        num_prompts: how many prompts there are; None for as many as a block takes.
        lengths: tokens of each prompt without its padding, where they are known, of a model whose padding is left out:
            the first ones are those of a block.

    Raises:
        PolicyError: a number below 1, or a prompt that is longer than they are said to be.
    """

    prompt_len: int
    gen_len: int
    num_prompts: int | None = None
    lengths: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for field in ("prompt_len", "gen_len", "num_prompts"):
            value = getattr(self, field)
            if field == "num_prompts" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise PolicyError(f"workload: {field}={value!r} must be a whole number of at least 1")
        if self.lengths and not 1 <= min(self.lengths) <= max(self.lengths) <= self.prompt_len:
            raise PolicyError(f"workload: lengths are not all from 1 to prompt_len={self.prompt_len}")

    def paddings(self, batches: Sequence[int]) -> list[int]:
        """Columns on the left that are padding in all rows of a micro-batch, prompts being in order of their lengths.

        Args:
            batches: rows of each micro-batch.
        """
        rows = sum(batches)
        if len(batches) == 1 or len(self.lengths) < rows:
            return [0] * len(batches)
        lengths = sorted(self.lengths[:rows], reverse=True)
        firsts = itertools.accumulate(batches[:-1], initial=0)
        return [self.prompt_len - lengths[first] for first in firsts]


class Sweep(NamedTuple):
    """One pass over all stages.

    Args:
        tokens: new ones of each row.
        past: tokens of each row in the cache before it.
    """

    tokens: int
    past: int


def call_of(policy: Policy, workload: Workload) -> Call:
    """One block of a workload."""
    rows = policy.block_size if workload.num_prompts is None else min(policy.block_size, workload.num_prompts)
    return Call(rows, workload.prompt_len, workload.prompt_len + workload.gen_len - 1)
