"""Padding on the left: prompts in the order of their lengths, and what of it a micro-batch need not compute.

Prompts of several lengths are padded to the longest. A column of a micro-batch that is padding in all of its rows says
nothing to any of them: without it there is less to compute, and less to keep and to move for every later token. With
prompts in the order of their lengths nearly all padding is in such columns.

Pure functions over arguments; runs nothing and keeps nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import GenerationConfig

from .kv_cache import Span
from .microbatches import may_be_cut, row_inputs

__all__ = ["back_in_order", "common_padding", "in_order", "longest_first", "without_padding"]


def longest_first(call: Mapping[str, Any], settings: GenerationConfig) -> torch.Tensor | None:
    """The order, (prompts,), in which the prompts of a call of `generate` are longest first.

    None if it makes no difference, or if the rows of the call must stay in their order. A streamer does not keep them
    from moving: what it gets can be put back.
    """
    mask = call.get("attention_mask")
    alone = {name: value for name, value in call.items() if name != "streamer"}
    if not isinstance(mask, torch.Tensor) or mask.ndim != 2 or not may_be_cut(alone, settings):
        return None
    padding = _left_padding(mask)
    if bool((padding[1:] >= padding[:-1]).all()):
        return None
    return padding.argsort(stable=True)


def in_order(call: Mapping[str, Any], order: torch.Tensor) -> dict[str, Any]:
    """The arguments of a call of `generate` with its prompts in another order; its streamer does not notice."""
    rows = {name: value[order.to(value.device)] for name, value in row_inputs(call).items()}
    streamer = call.get("streamer")
    return {**call, **rows, **({} if streamer is None else {"streamer": _Unordered(streamer, order)})}


def back_in_order(output: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """What `generate` returned for prompts in `order`, (prompts x copies, tokens), as if they had not been moved."""
    copies = output.shape[0] // len(order)
    places = order.argsort().to(output.device)
    return output.view(-1, copies, *output.shape[1:])[places].flatten(0, 1)


def common_padding(mask: Any, spans: Sequence[Span], tokens: int) -> list[int]:
    """For each micro-batch, how many columns on the left are padding in all of its rows.

    Never fewer than in a micro-batch before it: hidden states pass through buffers that do not grow on the way.

    Args:
        mask: 1 for tokens and 0 for padding, (rows, tokens); of anything else nothing is known.
        spans: rows of each micro-batch.
        tokens: of the prompts, padding included.
    """
    if not isinstance(mask, torch.Tensor) or mask.ndim != 2 or mask.shape[1] != tokens:
        return [0] * len(spans)
    padding = _left_padding(mask)
    found = [min(int(padding[start:end].min()), tokens - 1) for start, end in spans]
    for batch in reversed(range(len(found) - 1)):
        found[batch] = min(found[batch], found[batch + 1])
    return found


def without_padding(name: str, value: Any, padding: int, is_prompt: bool) -> Any:
    """A micro-batch's share of an argument of forward without its first columns.

    Args:
        name: of the argument.
        value: (batch, tokens, ...), positions also (axes, batch, tokens); the mask's columns are all tokens so far.
        padding: how many columns to leave out.
        is_prompt: the prompt is computed; later there is padding in the mask only.
    """
    if not padding or not isinstance(value, torch.Tensor):
        return value
    if name == "attention_mask" or (is_prompt and name in ("input_ids", "inputs_embeds", "token_type_ids")):
        return value[:, padding:]
    return value[..., padding:] if is_prompt and name == "position_ids" else value


def _left_padding(mask: torch.Tensor) -> torch.Tensor:
    """Zeros before the first one of each row, on the CPU."""
    return (mask.cpu() != 0).cumsum(1).eq(0).sum(1)


class _Unordered:
    """A streamer that puts the rows of what it gets back where they were."""

    def __init__(self, streamer: Any, order: torch.Tensor) -> None:
        self._streamer, self._order = streamer, order

    def put(self, value: torch.Tensor) -> None:
        """Tokens of all rows, prompts at first."""
        self._streamer.put(back_in_order(value, self._order))

    def end(self) -> None:
        """No more will come."""
        self._streamer.end()
