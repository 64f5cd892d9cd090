"""Rotary positions whose frequencies depend on the longest sequence in flight, for all micro-batches alike.

With scaling of the kinds "dynamic" and "longrope", transformers takes other frequencies once a position of the batch
is beyond the length that a model was trained with. A micro-batch that only saw its own positions would take others than
the whole batch. So each is shown, behind its own, the furthest position of all.

Knows modules and positions; runs nothing.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

__all__ = ["FurthestPosition"]

_BY_LENGTH = ("dynamic", "longrope")


class FurthestPosition:
    """Lets a model's rotary modules see the furthest position of a call in each of its micro-batches.

    Args:
        model: gets an entry point of ours in its rotary modules, if their frequencies depend on the length.
    """

    def __init__(self, model: nn.Module) -> None:
        self._furthest: int | None = None
        modules = [module for module in model.modules() if _depends_on_length(module)]
        #: rows of one call have an effect on each other
        self.is_needed = bool(modules)
        for module in modules:
            module.__dict__["forward"] = functools.partial(self._rotate, module.forward)

    @contextlib.contextmanager
    def among(self, call: Mapping[str, Any]) -> Iterator[None]:
        """Inside, the micro-batches of a call run; `call` holds the arguments of forward for all rows.

        Without `position_ids` a model counts columns, which are as many in each micro-batch.
        """
        positions = call.get("position_ids")
        before = self._furthest
        if self.is_needed and isinstance(positions, torch.Tensor) and positions.numel():
            self._furthest = int(positions.max())
        try:
            yield
        finally:
            self._furthest = before

    def _rotate(self, forward: Any, x: torch.Tensor, position_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if self._furthest is None:
            return forward(x, position_ids, *args, **kwargs)
        furthest = position_ids.new_full((*position_ids.shape[:-1], 1), self._furthest)
        made = forward(x, torch.cat([position_ids, furthest], -1), *args, **kwargs)
        if isinstance(made, torch.Tensor):
            return made[..., :-1, :]
        return type(made)(part[..., :-1, :] for part in made)


def _depends_on_length(module: nn.Module) -> bool:
    kinds = getattr(module, "rope_type", None)
    named = kinds.values() if isinstance(kinds, Mapping) else [kinds]
    return any(isinstance(kind, str) and any(word in kind for word in _BY_LENGTH) for kind in named)
