"""What a cache with compression is to hold: transformers' own, that keeps tokens in fewer bits than they came in."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer

from flexgen_hf import Compression
from flexgen_hf.quantization import groupwise
from flexgen_hf.quantization.groupwise import GroupFormat

__all__ = ["cache_as_kept", "kept_bytes"]


def cache_as_kept(compression: Compression) -> Cache:
    """An empty cache in which a step sees its own tokens as they are, and earlier ones as they are kept."""

    class Layer(DynamicLayer):
        def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> Any:
            seen = super().update(key_states, value_states, *args, **kwargs)
            new = key_states.shape[2]
            self.keys, self.values = (
                torch.cat([states[:, :, :-new], _as_kept(states[:, :, -new:], compression)], 2) for states in seen
            )
            return seen

    return Cache(layer_class_to_replicate=Layer)


def _as_kept(states: torch.Tensor, compression: Compression) -> torch.Tensor:
    """There and back, by the functions that specify it."""
    bits, dtype = compression.cache, states.dtype
    if bits is None or (bits == 16 and dtype.itemsize == 2):
        return states
    if bits == 16:
        return states.half().to(dtype)
    fmt = _format(states.shape[-1], bits, compression.group_size)
    return groupwise.dequantize(groupwise.quantize(states, fmt), fmt, dtype)


def _format(head_dim: int, bits: int, group_size: int) -> GroupFormat:
    return GroupFormat(bits, min(group_size, -(-head_dim // 8) * 8))


def kept_bytes(heads: int, head_dim: int, bits: int | None, group_size: int = 64, itemsize: int = 4) -> int:
    """Bytes of the keys of one token of one row: codes, and two bytes each for the scale and minimum of a group."""
    if bits is None or bits == 16:
        return heads * head_dim * (itemsize if bits is None else 2)
    size = min(group_size, -(-head_dim // 8) * 8)
    packed = heads * -(-head_dim // size) * (size * bits // 8 + 4)
    return packed + packed % 2
