"""What a model says whose weights stay where the policy put them, when it is asked to move, cast, train or change them.

Beside torch's and transformers' own methods of the same names; knows no executor.
"""

from __future__ import annotations

from typing import Any

import torch

from .errors import PolicyError, UnsupportedModelError

__all__ = ["FixedWeights"]


class FixedWeights:
    """A mixin before a transformers model: moves do nothing, all other changes of the weights are refused by name."""

    config: Any

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of compute."""
        dtype = self.config.dtype
        return dtype if isinstance(dtype, torch.dtype) else torch.float32

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Moves nothing: the policy places the model. A change of dtype is refused."""
        _, dtype, *_rest = torch._C._nn._parse_to(*args, **kwargs)
        if dtype is not None and dtype != self.dtype:
            raise PolicyError(f"to({dtype}): the model computes in {self.dtype}; load it with dtype={dtype}")
        return self

    def cuda(self, *_: Any, **__: Any) -> Any:
        """Moves nothing: the policy places the model."""
        return self

    def cpu(self) -> Any:
        """Moves nothing: the policy places the model."""
        return self

    def half(self, *_: Any) -> Any:
        """As `to(torch.float16)`."""
        return self.to(torch.float16)

    def float(self, *_: Any) -> Any:
        """As `to(torch.float32)`."""
        return self.to(torch.float32)

    def bfloat16(self, *_: Any) -> Any:
        """As `to(torch.bfloat16)`."""
        return self.to(torch.bfloat16)

    def double(self) -> Any:
        """As `to(torch.float64)`."""
        return self.to(torch.float64)

    def _apply(self, *_: Any, **__: Any) -> Any:
        # What torch's own type(), to_empty(), share_memory() and the like come down to.
        raise PolicyError("the policy places the weights, which can be neither moved nor cast; load with dtype=...")

    def tie_weights(self, *_: Any, **__: Any) -> None:
        """Nothing to do: what is tied was tied when the model was loaded."""

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *_: Any, **__: Any) -> Any:
        """Refused, unless the size is the one there is."""
        embedding: Any = self.get_input_embeddings()  # type: ignore[attr-defined]
        if new_num_tokens not in (None, embedding.num_embeddings):
            raise UnsupportedModelError(
                f"resize_token_embeddings({new_num_tokens}): the table has {embedding.num_embeddings} rows on disk; "
                "resize it with plain transformers and save the model, then load that"
            )
        return embedding

    def load_state_dict(self, *_: Any, **__: Any) -> Any:
        """Refused: weights stay in their files."""
        raise UnsupportedModelError("load_state_dict: save the weights as a checkpoint, and load that")

    def train(self, mode: bool = True) -> Any:
        """Refused for `mode=True`: weights come and go."""
        if mode:
            raise UnsupportedModelError("train(): weights are streamed and cannot be trained; use plain transformers")
        return super().train(False)  # type: ignore[misc]
