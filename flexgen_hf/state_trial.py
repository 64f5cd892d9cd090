"""A trial without memory: does a model keep, beside its cache, anything from one token for the next?

Weights come and go and micro-batches take turns in every layer, so what a layer notes in itself would be read by the
wrong rows. A copy of the model runs on `meta`, where nothing is computed and no weight is needed, and what its modules
hold is compared between two tokens. Knows modules; knows no family and no files.
"""

from __future__ import annotations

import copy
import numbers
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import DynamicCache

__all__ = ["kept_between_tokens"]

# Tokens of three calls: the first may make tables that stay as they are, the others differ in what is kept only.
_TRIAL = (3, 1, 1)
_ROWS = 2


def kept_between_tokens(model: nn.Module) -> str | None:
    """The attribute of a module that a token changed, by its qualified name.

    None if there is none, or if it is not known: code that looks at numbers cannot be run without them.

    Args:
        model: a causal language model on `meta`; it is left as it is.
    """
    held: list[dict[str, Any]] = []
    try:
        tried: Any = copy.deepcopy(model).to(torch.bfloat16)  # all that products of experts are made for
        cache = DynamicCache(config=tried.config)
        with torch.no_grad(), torch.device("meta"):
            for tokens in _TRIAL:
                ids = torch.zeros((_ROWS, tokens), dtype=torch.long)
                tried(input_ids=ids, past_key_values=cache, use_cache=True)
                held.append(dict(_held(tried)))
    except Exception:  # noqa: BLE001  whatever the code of a model raises where there are no numbers
        return None
    before, after = held[-2:]
    changed = [name for name in after if name not in before or not _is_same(before[name], after[name])]
    return min(changed, default=None)


def _held(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """What modules hold that a token could change, by qualified name: tensors with their version, and numbers."""
    for path, module in model.named_modules():
        own = {**vars(module), **module._buffers}
        for name in own.keys() - {"_parameters", "_buffers", "_modules"}:
            for place, item in _items(own[name]):
                if isinstance(item, torch.Tensor):
                    yield f"{path}.{name}{place}", (item, item._version)
                elif isinstance(item, numbers.Number):
                    yield f"{path}.{name}{place}", item


def _items(value: Any) -> Iterator[tuple[str, Any]]:
    """A value, or what plain collections hold, with its place there."""
    if isinstance(value, Mapping):
        pairs: Any = list(value.items())
    elif isinstance(value, (list, tuple)):
        pairs = enumerate(value)
    else:
        yield "", value
        return
    for key, inner in pairs:
        for place, item in _items(inner):
            yield f"[{key}]{place}", item


def _is_same(one: Any, other: Any) -> bool:
    if isinstance(one, tuple) and isinstance(other, tuple):
        return one[0] is other[0] and bool(one[1] == other[1])
    return bool(one == other)
