"""Group quantization with a smaller squared error at the same size: a search for each group's scale and minimum.

Nothing but the tensor is looked at: no calibration. A group begins with the scale and minimum of `groupwise.quantize`.
Candidates are tried in turn, and one that lowers the group's squared error (of float32, before the rounding to another
dtype) replaces what the group has; so no group is worse than without the search:

1. *clipping*: both ends of the group's range drawn towards its middle, each by each of `SHRINKS`;
2. *least squares*: scale and minimum under which the group's codes come nearest to its elements, `REFITS` times.

An element outside a clipped range may err by more than half a step. Kernels match this bit for bit, which needs one
order of addition: a sum over a group is eight sums, each of every eighth element, which are then added up in order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .groupwise import (
    GROUP_DTYPE,
    LARGEST,
    GroupFormat,
    Quantized,
    bounds,
    encode,
    groups_of,
    pack,
    room_for,
    row_chunks,
)

__all__ = ["MARGIN", "REFITS", "SHRINKS", "quantize"]

#: Shares of the way from the middle of a group's range to its end.
SHRINKS = (1.0, 0.9, 0.8, 0.7)
#: Least-squares fits, each with the codes of the one before.
REFITS = 2
#: A candidate's error must be smaller than this share of what it replaces: beyond what rounding could pretend.
MARGIN = 0.99998

_LANES = 8


def quantize(x: Tensor, fmt: GroupFormat, name: str = "tensor", out: Quantized | None = None) -> Quantized:
    """As `groupwise.quantize`, with scales and minima found by search.

    Raises:
        QuantizationError: see there.
    """
    out = room_for(x, fmt, name, out)
    for part, (codes, scales, minima) in row_chunks(x, out, name):
        groups = groups_of(part, fmt)
        best = _Search(groups, _is_element(part.shape[1], groups), fmt)
        best.clip()
        best.refit()
        codes.copy_(pack(encode(groups, best.scale, best.minimum, fmt), fmt).view(codes.shape))
        scales.copy_(best.scale)
        minima.copy_(best.minimum)
    return out


def _is_element(length: int, groups: Tensor) -> Tensor:
    """1 for an element of a row, 0 for padding; float32, shape (groups of a row, group_size)."""
    places = torch.arange(groups.shape[1] * groups.shape[2], device=groups.device)
    return (places < length).float().view(groups.shape[1:])


class _Search:
    """The best scales and minima so far of groups of shape (rows, groups, group_size)."""

    def __init__(self, groups: Tensor, is_element: Tensor, fmt: GroupFormat) -> None:
        self._groups, self._is_element, self._fmt = groups, is_element, fmt
        self.scale, self.minimum = bounds(groups, fmt)
        self._error = self._error_of(self.scale, self.minimum)

    def clip(self) -> None:
        """Tries narrower ranges."""
        lowest, highest = self._groups.amin(-1), self._groups.amax(-1)
        middle = (lowest + highest) * 0.5
        for low_share in SHRINKS:
            low = middle + (lowest - middle) * low_share
            for high_share in SHRINKS:
                high = middle + (highest - middle) * high_share
                self._try((high - low) / self._fmt.top, low)

    def refit(self) -> None:
        """Tries the least-squares fit to the codes."""
        count = self._is_element.sum(-1)
        mean = _sum(self._groups * self._is_element) / count
        around = (self._groups - mean[..., None]) * self._is_element
        for _ in range(REFITS):
            codes = encode(self._groups, self.scale, self.minimum, self._fmt).float()
            mean_code = _sum(codes * self._is_element) / count
            codes = (codes - mean_code[..., None]) * self._is_element
            square = _sum(codes * codes)
            scale = _sum(codes * around) / torch.where(square > 0, square, 1)
            scale = torch.where(scale > 0, scale, 0)
            self._try(scale, mean - scale * mean_code)

    def _try(self, scale: Tensor, minimum: Tensor) -> None:
        """Takes the candidate, given in float32, for the groups where it is better."""
        scale, minimum = (part.clamp(-LARGEST, LARGEST).to(GROUP_DTYPE) for part in (scale, minimum))
        minimum = torch.where(minimum == 0, 0, minimum)
        error = self._error_of(scale, minimum)
        is_better = error < self._error * MARGIN
        self.scale = torch.where(is_better, scale, self.scale)
        self.minimum = torch.where(is_better, minimum, self.minimum)
        self._error = torch.where(is_better, error, self._error)

    def _error_of(self, scale: Tensor, minimum: Tensor) -> Tensor:
        values = encode(self._groups, scale, minimum, self._fmt).float()
        values = values.mul_(scale.float()[..., None]).add_(minimum.float()[..., None])
        wrong = values.sub_(self._groups).mul_(self._is_element)
        return _sum(wrong.mul_(wrong))


def _sum(terms: Tensor) -> Tensor:
    """Sum over the last dimension, in the order that the module's docstring says."""
    blocks = torch.unflatten(terms, -1, (-1, _LANES))
    lanes = torch.zeros_like(blocks[..., 0, :])
    for block in range(blocks.shape[-2]):
        lanes = lanes + blocks[..., block, :]
    total = lanes[..., 0]
    for lane in range(1, _LANES):
        total = total + lanes[..., lane]
    return total
