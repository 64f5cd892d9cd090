"""A numba kernel that multiplies a few rows by a quantized matrix while it is dequantized, for the CPU.

Nothing of the matrix is written to memory. In float32, where a weight is not rounded before it is multiplied.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .groupwise import GroupFormat, Quantized, as_rows
from .kernel_parts import from_half, reordering_kernel, unpack

__all__ = ["MOST_ROWS", "row_multiplier"]

#: the most rows that are multiplied; with more, dequantizing by tiles is faster
MOST_ROWS = 4


@reordering_kernel
def _multiply_row(scratch: Any, parts: Any, bits: int, size: int, x: Any, out: Any, rows: Any) -> None:
    """A row of `x`, padded to whole groups, by rows of a quantized matrix."""
    packed, scales, minima = parts
    codes, third, nbytes = scratch[:size], scratch[size : 2 * size], size * bits // 8
    for row in range(rows[0], rows[1]):
        total = np.float32(0)
        for group in range(scales.shape[1]):
            scale, minimum = from_half(scales[row, group]), from_half(minima[row, group])
            unpack(packed[row, group * nbytes : (group + 1) * nbytes], bits, codes, third)
            values = x[0, group * size : (group + 1) * size]
            for i in range(size):
                total += (np.float32(codes[i]) * scale + minimum) * values[i]
        out[0, row] = total


@reordering_kernel
def _multiply_four_rows(scratch: Any, parts: Any, bits: int, size: int, x: Any, out: Any, rows: Any) -> None:
    """As `_multiply_row`, for four rows of `x`."""
    packed, scales, minima = parts
    codes, third, nbytes = scratch[:size], scratch[size : 2 * size], size * bits // 8
    zero = np.float32(0)
    for row in range(rows[0], rows[1]):
        t0, t1, t2, t3 = zero, zero, zero, zero
        for group in range(scales.shape[1]):
            scale, minimum = from_half(scales[row, group]), from_half(minima[row, group])
            unpack(packed[row, group * nbytes : (group + 1) * nbytes], bits, codes, third)
            start, end = group * size, (group + 1) * size
            x0, x1, x2, x3 = x[0, start:end], x[1, start:end], x[2, start:end], x[3, start:end]
            for i in range(size):
                weight = np.float32(codes[i]) * scale + minimum
                t0, t1, t2, t3 = t0 + weight * x0[i], t1 + weight * x1[i], t2 + weight * x2[i], t3 + weight * x3[i]
        out[0, row], out[1, row], out[2, row], out[3, row] = t0, t1, t2, t3


def row_multiplier(q: Quantized, fmt: GroupFormat, x: Tensor) -> tuple[Tensor, Callable[[int, int], None]]:
    """See `dispatch.row_multiplier`."""
    parts, rows = (_array(q.codes), _array(q.scales), _array(q.minima)), 1 if len(x) == 1 else MOST_ROWS
    padded = x.new_zeros((rows, parts[1].shape[1] * fmt.group_size))
    padded[: len(x), : x.shape[1]] = x
    out = x.new_empty((rows, len(parts[0])))
    given, taken = padded.numpy(), out.numpy()
    multiply_rows = _multiply_row if rows == 1 else _multiply_four_rows

    def multiply(first: int, last: int) -> None:
        scratch = np.empty(2 * fmt.group_size, np.uint8)  # a group's codes; the third bits of a width of 3
        multiply_rows(scratch, parts, fmt.bits, fmt.group_size, given, taken, (first, last))

    return out[: len(x)], multiply


def _array(x: Tensor) -> np.ndarray:
    """The memory of a tensor, or of a copy, as (rows, length); 16-bit numbers as their bits."""
    rows = as_rows(x.detach().contiguous())
    array: np.ndarray = (rows.view(torch.uint16) if x.dtype.itemsize == 2 else rows).numpy()
    return array
