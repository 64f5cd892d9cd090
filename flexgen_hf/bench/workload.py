"""What every system is given to do: how many prompts, how long, how many new tokens."""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING

from ..errors import PolicyError

if TYPE_CHECKING:
    import torch

__all__ = ["BenchWorkload"]

# below are the special tokens of the models that we measure
_FIRST_TOKEN = 4


@dataclasses.dataclass(frozen=True)
class BenchWorkload:
    """One call of `generate`: greedy, no token ends a text.

    Args:
        prompt_len: tokens of the longest prompt; the others have half as many or more, and are padded on the left.
        new_tokens: tokens written after each prompt.
        rows: prompts in the call.
        seed: of the prompts. A row's prompt depends on the seed and the row only, not on how many rows there are, so
            that systems with different batch sizes can be compared row by row.

    Raises:
        PolicyError: a number below 1.
    """

    prompt_len: int
    new_tokens: int
    rows: int
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("prompt_len", "new_tokens", "rows"):
            if getattr(self, name) < 1:
                raise PolicyError(f"workload: {name}={getattr(self, name)} must be at least 1")

    @property
    def tokens(self) -> int:
        """New tokens in all."""
        return self.rows * self.new_tokens

    @functools.cached_property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each prompt, padding left out."""
        import torch

        return tuple(self._length(row, torch.Generator()) for row in range(self.rows))

    def _length(self, row: int, generator: torch.Generator) -> int:
        """Tokens of a prompt, the first thing that is drawn from a generator, which this seeds."""
        import torch

        generator.manual_seed(self.seed * 1_000_003 + row)
        shortest = (self.prompt_len + 1) // 2
        drawn = int(torch.randint(shortest, self.prompt_len + 1, (), generator=generator))
        return drawn if row else self.prompt_len

    def prompts(self, vocab_size: int, pad_token: int) -> dict[str, torch.Tensor]:
        """`input_ids` and `attention_mask`, (rows, prompt_len). The first row is as long as prompts get."""
        import torch

        ids = torch.full((self.rows, self.prompt_len), pad_token)
        mask = torch.zeros_like(ids)
        for row in range(self.rows):
            generator = torch.Generator()
            length = self._length(row, generator)
            first = min(_FIRST_TOKEN, vocab_size - 1)
            ids[row, -length:] = torch.randint(first, vocab_size, (length,), generator=generator)
            mask[row, -length:] = 1
        return {"input_ids": ids, "attention_mask": mask}
