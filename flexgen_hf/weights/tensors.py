"""A tensor of a running model: where its bytes lie, how it is computed with, and what it is loaded with.

Knows extents and dtypes; knows neither tiers nor memory.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import NamedTuple

import torch

from ..storage.buffers import round_up
from .format import TensorExtent
from .pieces import torch_dtype
from .quantized import QuantizedExtent
from .stacked import StackedExtent

__all__ = ["StoredTensor", "Unit"]


class Unit(NamedTuple):
    """What is loaded together: a stage without its experts, or one of its experts."""

    stage: int
    expert: int = -1


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor of the model and where its bytes lie.

    Args:
        name: its state-dict name; of a part of a tensor, one that no other has.
        stage: 0 the embedding, 1..L the decoder layers, L+1 the head.
        extent: the bytes in a safetensors file, or those of its parts if it is quantized or a stack of matrices; a
            stack is read in parts, each a tensor here.
        dtype: what it is computed in; differs from the stored one when the model was loaded with another dtype.
        is_late: it arrives in its stored dtype and is cast where it is used, or in codes and is dequantized there.
        expert: the expert whose part it is of a tensor that holds all of a layer's; -1 if it is whole.
    """

    name: str
    stage: int
    extent: TensorExtent | QuantizedExtent | StackedExtent
    dtype: torch.dtype
    is_late: bool = False
    expert: int = -1

    @property
    def unit(self) -> Unit:
        """What it is loaded with."""
        return Unit(self.stage, self.expert)

    @property
    def is_quantized(self) -> bool:
        """Whether it is dequantized on its way to compute."""
        return isinstance(self.extent, QuantizedExtent)

    @property
    def parts(self) -> tuple[TensorExtent, ...]:
        """What there is of it in its file: codes, scales and minima, or the tensor."""
        return (self.extent,) if isinstance(self.extent, TensorExtent) else self.extent.parts

    @property
    def stored_dtype(self) -> torch.dtype:
        """Element type in the file; that of the codes if it is quantized."""
        return torch_dtype(self.parts[0].dtype)

    @property
    def stored_bytes(self) -> int:
        """Size in the file."""
        return self.extent.nbytes

    @property
    def device_bytes(self) -> int:
        """Size in the dtype it is computed in."""
        return math.prod(self.extent.shape) * self.dtype.itemsize

    @property
    def resident_bytes(self) -> int:
        """Size where it stays on the device."""
        return self.stored_bytes if self.is_quantized else self.device_bytes

    @property
    def is_cast(self) -> bool:
        """Whether it is stored in another dtype than it is computed in, and cast."""
        return not self.is_quantized and self.stored_dtype != self.dtype

    def offsets(self, at: int) -> list[int]:
        """Where each part begins in a home that has the tensor from `at` on."""
        sizes = [round_up(part.nbytes, 64) for part in self.parts]
        return [at + before for before in itertools.accumulate(sizes[:-1], initial=0)]

    @property
    def home_bytes(self) -> int:
        """Room for it in a home on the host."""
        return sum(round_up(part.nbytes, 64) for part in self.parts)
