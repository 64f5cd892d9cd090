"""Which of a model's weights are quantized, and in which format.

Knows a model's stages and what was asked for; knows no files and no elements.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from .architectures import Structure
from .planning.shape import SMALL_SHARE
from .policy import Compression
from .quantization.groupwise import GroupFormat

__all__ = ["weight_formats"]

# bytes of an element that is not quantized
_ITEMSIZE = 2


def weight_formats(
    structure: Structure, shapes: Mapping[str, Sequence[int]], compression: Compression
) -> dict[str, GroupFormat]:
    """The format of each tensor that is quantized.

    Candidates are the matrices of decoder layers (of experts, those of all together) and the tables of embedding and
    head; not biases, even those that are matrices. Of these, layers' get the width `compression.weights` unless they
    are small, tables `compression.tables`, and a pattern that fits wins. What would take more bytes than in 16 bit is
    left as it is.

    Args:
        structure: the model's stages.
        shapes: of the model's floating-point tensors, by state-dict name.
        compression: what was asked for.
    """
    tables = structure.tables(shapes.keys())
    matrices = {name: shape for name, shape in shapes.items() if _is_matrix(structure, name, shape)}
    largest: dict[int, int] = {}
    for name, shape in matrices.items():
        stage = structure.locate(name)[0]
        largest[stage] = max(largest.get(stage, 0), math.prod(shape))
    found = {}
    for name, shape in {**matrices, **{name: shapes[name] for name in tables}}.items():
        usual = compression.tables
        if name not in tables:
            is_small = math.prod(shape) < largest[structure.locate(name)[0]] * SMALL_SHARE
            usual = None if is_small else compression.weights
        bits = compression.bits(name, usual)
        if bits is not None and (fmt := GroupFormat(bits, compression.group_size)).nbytes(shape) < _plain(shape):
            found[name] = fmt
    return found


def _is_matrix(structure: Structure, name: str, shape: Sequence[int]) -> bool:
    return 0 < structure.locate(name)[0] < structure.head_stage and len(shape) in (2, 3) and not name.endswith("bias")


def _plain(shape: Sequence[int]) -> int:
    return math.prod(shape) * _ITEMSIZE
