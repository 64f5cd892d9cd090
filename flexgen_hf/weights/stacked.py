"""Tensors whose matrices lie apart in files, as many checkpoints hold their experts: read where they lie.

Knows extents and elements; knows no rules of conversion. What a conversion makes of its sources is found by trying it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from .format import TensorExtent
from .pieces import read_extent

__all__ = ["StackedExtent", "find_stacked"]

# A trial's matrices are small, and not square, so that one that is transposed is noticed.
_TRIAL_SHAPE = (2, 3)


@dataclasses.dataclass(frozen=True)
class StackedExtent:
    """Where the bytes of a tensor lie that is a stack of matrices, each of whose rows may lie in several places.

    Args:
        matrices: for each matrix the parts that make it up, one below the other.
    """

    matrices: tuple[tuple[TensorExtent, ...], ...]

    @property
    def parts(self) -> tuple[TensorExtent, ...]:
        """Every part, in order."""
        return tuple(part for matrix in self.matrices for part in matrix)

    @property
    def file(self) -> Path:
        """Where its first part lies."""
        return self.parts[0].file

    @property
    def offset(self) -> int:
        """Where its first part begins."""
        return self.parts[0].offset

    @property
    def nbytes(self) -> int:
        """Of all parts."""
        return sum(part.nbytes for part in self.parts)

    @property
    def dtype(self) -> str:
        """Element type, as safetensors writes it."""
        return self.parts[0].dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Matrices, rows, columns."""
        first = self.matrices[0]
        return len(self.matrices), sum(part.shape[0] for part in first), first[0].shape[1]

    def read(self) -> torch.Tensor:
        """The tensor, in memory."""
        return torch.stack([torch.cat([read_extent(part) for part in matrix]) for matrix in self.matrices])


def find_stacked(
    sources: Mapping[str, TensorExtent], convert: Callable[[Mapping[str, torch.Tensor]], torch.Tensor]
) -> StackedExtent | None:
    """How a conversion stacks its sources; None if it does anything else with them.

    It is run on small matrices of numbers that are all different: where in the result they are found again says it.

    Args:
        sources: where the conversion's sources lie.
        convert: makes one tensor of them.
    """
    kinds = {(extent.dtype, extent.shape[1:]) for extent in sources.values()}
    if len(kinds) != 1 or any(len(extent.shape) != 2 for extent in sources.values()):
        return None
    rows, columns = _TRIAL_SHAPE
    numbers = torch.arange(len(sources) * rows * columns).view(len(sources), rows, columns)
    trial = dict(zip(sources, numbers, strict=True))
    try:
        made = convert(trial)
    except Exception:  # noqa: BLE001  a conversion that minds the shapes of its sources does more than stack them
        return None
    if made.dim() != 3 or made.numel() != numbers.numel() or made.shape[1] % rows or made.shape[2] != columns:
        return None
    names = {tuple(value.flatten().tolist()): name for name, value in trial.items()}
    found = [[names.get(tuple(part.flatten().tolist())) for part in matrix.split(rows)] for matrix in made]
    return _checked([[sources[name] for name in matrix if name is not None] for matrix in found], len(sources))


def _checked(matrices: Sequence[Sequence[TensorExtent]], count: int) -> StackedExtent | None:
    """Nothing where a source was not found again, or was found twice, or matrices differ in their parts."""
    shapes = {tuple(part.shape for part in matrix) for matrix in matrices}
    if len({part for matrix in matrices for part in matrix}) != count or len(shapes) != 1:
        return None
    return StackedExtent(tuple(map(tuple, matrices)))
