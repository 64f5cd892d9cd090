"""Tensors that hold all experts of a layer, one part per expert: where each part's bytes lie.

Knows extents and names; knows no modules. Experts come first among a tensor's dimensions, so an expert's part is a
range of its bytes, of each part of a quantized one as well.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Iterator

from .format import TensorExtent
from .quantized import QuantizedExtent
from .stacked import StackedExtent
from .tensors import StoredTensor

__all__ = ["part_name", "split"]


def part_name(name: str, expert: int, part: int | None = None) -> str:
    """The name of an expert's matrix in a tensor, or of a part of it where its rows lie in several places."""
    return f"{name}[{expert}]" if part is None else f"{name}[{expert}].{part}"


def split(tensors: Iterable[StoredTensor], names: Collection[str]) -> list[StoredTensor]:
    """Replaces tensors by the parts of their experts.

    Args:
        tensors: of a model.
        names: of those that hold all experts of a layer, experts first.
    """
    return [part for tensor in tensors for part in (_parts(tensor) if tensor.name in names else [tensor])]


def _parts(tensor: StoredTensor) -> Iterator[StoredTensor]:
    extent, count = tensor.extent, tensor.extent.shape[0]
    for expert in range(count):
        if isinstance(extent, StackedExtent):
            rows = extent.matrices[expert]
            for number, part in enumerate(rows):
                name = part_name(tensor.name, expert, number if len(rows) > 1 else None)
                yield dataclasses.replace(tensor, name=name, extent=part, expert=expert)
            continue
        if isinstance(extent, QuantizedExtent):
            parts = (_slice(part, expert, count) for part in extent.parts)
            own: TensorExtent | QuantizedExtent = QuantizedExtent(extent.format, extent.shape[1:], *parts)
        else:
            own = _slice(extent, expert, count)
        yield dataclasses.replace(tensor, name=part_name(tensor.name, expert), extent=own, expert=expert)


def _slice(extent: TensorExtent, index: int, count: int) -> TensorExtent:
    """The bytes of one of `count` equal parts along the first dimension."""
    size = extent.nbytes // count
    return TensorExtent(extent.file, extent.offset + index * size, size, extent.dtype, extent.shape[1:])
