"""Rows of quantized weights wherever they are: views of their parts, and their way into a slot in the dtype of compute.

Knows parts and memory; knows neither stages nor files.
"""

from __future__ import annotations

import collections
import itertools
from collections.abc import Sequence

import torch

from ..policy import Tier
from ..quantization import dispatch
from ..quantization.groupwise import Quantized
from ..storage.buffers import Buffer, round_up, tensor_view
from ..storage.workspace import Workspace
from .pieces import torch_dtype
from .quantized import QuantizedExtent, rows_of

__all__ = ["Dequantizer", "parts_bytes", "rows_at"]


class Dequantizer:
    """Holds the quantized tensors that live on the device, and makes numbers of rows, wherever their parts are.

    Args:
        space: where the model computes and keeps its bytes.
    """

    def __init__(self, space: Workspace) -> None:
        self._space = space
        #: those whose home is the device
        self.held: dict[str, Quantized] = {}
        #: on a device apart from the host, where parts arrive that are dequantized there
        self.arrived = Buffer(space.ledger, Tier.DEVICE, space.device, "weight staging")
        #: how often each tensor was dequantized
        self.counts: collections.Counter[str] = collections.Counter()

    def push(
        self,
        name: str,
        extent: QuantizedExtent,
        rows: range,
        source: tuple[torch.Tensor, Sequence[int]] | None,
        target: torch.Tensor,
    ) -> int:
        """Rows of a tensor into their place, in its dtype; returns the bytes that crossed.

        Args:
            name: whose rows they are.
            extent: its format and shape.
            rows: which.
            source: a memory, and where each part of these rows begins there; None if the tensor is `held`.
            target: (rows, length).
        """
        if source is None:
            part = rows_of(self.held[name], rows.start, rows.stop)
        else:
            part = rows_at(extent, len(rows), *source)
            if not self._space.is_direct:
                places = list(itertools.accumulate(_parts_sizes(extent, len(rows))[:-1], initial=0))
                arrived = rows_at(extent, len(rows), self.arrived.bytes, places)
                for there, here in zip(_tensors(arrived), _tensors(part), strict=True):
                    self._space.copy(there, here)
                part = arrived
        dispatch.dequantize(part, extent.format, out=target)
        self.counts[name] += rows.start == 0
        return part.nbytes if source is not None else 0

    def close(self) -> None:
        """Gives all memory back."""
        self.arrived.free()
        self.held = {}


def parts_bytes(extent: QuantizedExtent, rows: int) -> int:
    """Room for the parts of so many rows, one after the other."""
    return sum(_parts_sizes(extent, rows))


def _parts_sizes(extent: QuantizedExtent, rows: int) -> list[int]:
    return [round_up(rows * extent.row_bytes(part), 64) for part in extent.parts]


def rows_at(extent: QuantizedExtent, count: int, memory: torch.Tensor, at: Sequence[int]) -> Quantized:
    """Views of so many rows of a tensor whose parts begin at these places of a memory."""
    codes, scales, minima = (
        tensor_view(memory, begin, torch_dtype(part.dtype), (count, part.shape[-1]))
        for part, begin in zip(extent.parts, at, strict=True)
    )
    return Quantized(codes, scales, minima, (count, extent.shape[-1]))


def _tensors(q: Quantized) -> tuple[torch.Tensor, ...]:
    return q.codes, q.scales, q.minima
