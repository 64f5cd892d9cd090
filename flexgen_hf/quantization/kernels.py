"""Numba kernels for the CPU that do what `groupwise` specifies, bit for bit.

A kernel goes through a range of rows in the thread that calls it and holds no lock of Python's meanwhile: lanes call it
beside compute. With `threads=` rows are shared with a few threads of this module's, which stay; numba's own, of which a
process has one set that it configures once, stay out of it. Rows are read and written where they lie, in any order:
those of a cache's cell are records that hold scales, minima and codes of a few rows each.

The loops are written for a compiler's vectoriser: a group is unpacked into bytes that stay in the first cache, then one
loop without branches makes numbers of them. Scales, minima and elements are finite, as quantizing ensures.
"""

from __future__ import annotations

import concurrent.futures
import functools
import itertools
import math
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import groupwise
from .groupwise import GroupFormat, Quantized, as_rows
from .kernel_parts import (
    BFLOAT16,
    KINDS,
    from_bfloat16,
    from_half,
    inlined,
    kernel,
    pack,
    to_bfloat16,
    to_float32,
    to_half,
    unpack,
)
from .search import MARGIN, REFITS, SHRINKS

__all__ = ["Grid", "dequantize", "grid", "quantize", "row_reader", "share"]


# What a kernel sees of a tensor of up to four dimensions, whose rows are contiguous each and begin anywhere: everything
# from the first element to the last, 16-bit numbers as their bits; and the elements from a row to the next along the
# first, second and third dimension, 0 where there is none. (A plain tuple: others take numba long to look at.)
Grid = tuple[np.ndarray, int, int, int]

# what a kernel sees of a Quantized: codes, scales, minima
_Parts = tuple[Grid, Grid, Grid]
# a kernel's arguments: scratch, parts, width and group size, the tensor's other form, sizes, first and last row; sizes
# are those of the second dimension, of the third, and of a row, the groups of a row, and the number of the dtype
_Kernel = Callable[[np.ndarray, _Parts, tuple[int, int], Grid, tuple[int, ...], int, int], int]

# Below this many elements, starting threads takes longer than the work.
_SHARED_ELEMENTS = 1 << 18


@inlined
def _places(grids: Any, place: Any) -> Any:
    """Where the row at `place` begins in each of four grids."""
    i, j, k = place
    one, two, three, four = grids
    return (
        i * one[1] + j * one[2] + k * one[3],
        i * two[1] + j * two[2] + k * two[3],
        i * three[1] + j * three[2] + k * three[3],
        i * four[1] + j * four[2] + k * four[3],
    )


@inlined
def _place(row: Any, sizes: Any) -> Any:
    """The place of a row among three dimensions."""
    return row // (sizes[0] * sizes[1]), row // sizes[1] % sizes[0], row % sizes[1]


@inlined
def _next(place: Any, sizes: Any) -> Any:
    i, j, k = place
    k += 1
    if k == sizes[1]:
        k, j = 0, j + 1
        if j == sizes[0]:
            j, i = 0, i + 1
    return i, j, k


@inlined
def _dequantize_rows(scratch: Any, work: Any, fmt: Any, sizes: Any, rows: Any, convert: Any) -> None:
    parts, out = work
    bits, size = fmt
    first, last = rows
    length, codes, third, nbytes = sizes[2], scratch[:size], scratch[size : 2 * size], size * bits // 8
    place = _place(first, sizes)
    for _ in range(first, last):
        packed, scale_at, minimum_at, target_at = _places((parts[0], parts[1], parts[2], out), place)
        for group in range(sizes[3]):
            scale, minimum = from_half(parts[1][0][scale_at + group]), from_half(parts[2][0][minimum_at + group])
            unpack(parts[0][0][packed + group * nbytes : packed + (group + 1) * nbytes], bits, codes, third)
            target = out[0][target_at + group * size : target_at + min((group + 1) * size, length)]
            for i in range(target.shape[0]):
                target[i] = convert(np.float32(codes[i]) * scale + minimum)
        place = _next(place, sizes)


@kernel
def _rows_to_float32(scratch: Any, parts: Any, fmt: Any, out: Any, sizes: Any, first: int, last: int) -> int:
    _dequantize_rows(scratch, (parts, out), fmt, sizes, (first, last), to_float32)
    return -1


@kernel
def _rows_to_bfloat16(scratch: Any, parts: Any, fmt: Any, out: Any, sizes: Any, first: int, last: int) -> int:
    _dequantize_rows(scratch, (parts, out), fmt, sizes, (first, last), to_bfloat16)
    return -1


@kernel
def _rows_to_float16(scratch: Any, parts: Any, fmt: Any, out: Any, sizes: Any, first: int, last: int) -> int:
    _dequantize_rows(scratch, (parts, out), fmt, sizes, (first, last), to_half)
    return -1


@inlined
def _range(values: Any) -> Any:
    """Smallest and largest of a group of float32, and whether all of them are in range.

    Order is found among integers, where the compiler may take many minima at once: it may not among numbers that could
    be NaN. The bits of float32 count numbers in order once those below the sign of a negative one are turned.
    """
    low, high, magnitude = np.int32(0x7FFFFFFF), np.int32(-0x80000000), np.int32(0)
    bits = values.view(np.int32)
    for i in range(bits.shape[0]):
        key = np.int32(bits[i] ^ ((bits[i] >> np.int32(31)) & np.int32(0x7FFFFFFF)))
        low, high = min(low, key), max(high, key)
        magnitude = max(magnitude, np.int32(bits[i] & np.int32(0x7FFFFFFF)))
    smallest = np.int32(low ^ ((low >> np.int32(31)) & np.int32(0x7FFFFFFF))).view(np.float32)
    largest = np.int32(high ^ ((high >> np.int32(31)) & np.int32(0x7FFFFFFF))).view(np.float32)
    return smallest, largest, magnitude <= np.int32(0x477FE000)  # 65504


@inlined
def _half_below(value: Any) -> Any:
    """The bits of the largest float16 that is not above a float32; zero is +0."""
    bits = to_half(value)
    if bits == np.uint16(0x8000):
        bits = np.uint16(0)
    if from_half(bits) > value:
        if bits == 0:
            bits = np.uint16(0x8001)
        elif bits & np.uint16(0x8000):
            bits = np.uint16(bits + 1)
        else:
            bits = np.uint16(bits - 1)
    return bits


@inlined
def _bounds(ends: Any, top: Any) -> Any:
    """The bits of scale and minimum of a group, by its smallest and largest element."""
    smallest, largest = ends
    minimum = _half_below(smallest)
    width = np.float32(largest - from_half(minimum)) + np.float32(0)  # never -0
    scale = to_half(width / top)
    if np.float32(from_half(scale) * top) < width:
        scale = np.uint16(scale + 1)
    return scale, minimum


@inlined
def _code(value: Any, divisor: Any, minimum: Any, top: Any) -> Any:
    """The code of an element, plus 1.5 * 2**23, all float32.

    Adding that rounds half to even and leaves the integer in the lowest bits.
    """
    steps = np.float32((value - minimum) / divisor)
    steps = steps if steps > np.float32(0) else np.float32(0)
    steps = steps if steps < top else top
    return np.float32(steps + np.float32(12582912))


@inlined
def _encode(values: Any, scale: Any, minimum: Any, top: Any, codes: Any) -> None:
    """Codes of a group; those of its padding are that of its last element."""
    divisor = scale if scale > 0 else np.float32(1)
    length = values.shape[0]
    for i in range(length):
        codes[i] = np.int32(_code(values[i], divisor, minimum, top).view(np.int32) - np.int32(0x4B400000))
    for i in range(length, codes.shape[0]):
        codes[i] = codes[length - 1]


@inlined
def _as_it_is(x: Any, at: Any, _: Any, __: Any) -> Any:
    """A group of float32."""
    return x[0][at[0] : at[1]]


@inlined
def _widened(x: Any, at: Any, kind: Any, room: Any) -> Any:
    """A group of 16-bit numbers as float32, in `room`."""
    source, values = x[0][at[0] : at[1]], room[: at[1] - at[0]]
    if kind == BFLOAT16:
        for i in range(values.shape[0]):
            values[i] = from_bfloat16(source[i])
    else:
        for i in range(values.shape[0]):
            values[i] = from_half(source[i])
    return values


@kernel
def _sum(terms: Any) -> Any:
    """Sum of a multiple of eight numbers, in the order that `search` says."""
    zero = np.float32(0)
    s0, s1, s2, s3, s4, s5, s6, s7 = zero, zero, zero, zero, zero, zero, zero, zero
    for i in range(0, terms.shape[0], 8):
        s0, s1, s2, s3 = s0 + terms[i], s1 + terms[i + 1], s2 + terms[i + 2], s3 + terms[i + 3]
        s4, s5, s6, s7 = s4 + terms[i + 4], s5 + terms[i + 5], s6 + terms[i + 6], s7 + terms[i + 7]
    return np.float32(((((((s0 + s1) + s2) + s3) + s4) + s5) + s6) + s7)


@kernel
def _error(values: Any, scale: Any, minimum: Any, top: Any, terms: Any) -> Any:
    """Squared error of a group. `terms` is scratch of a group, zero behind the group's elements."""
    divisor = scale if scale > 0 else np.float32(1)
    for i in range(values.shape[0]):
        code = np.float32(_code(values[i], divisor, minimum, top) - np.float32(12582912))
        wrong = np.float32(np.float32(code * scale + minimum) - values[i])
        terms[i] = wrong * wrong
    return _sum(terms)


@inlined
def _candidate(scale: Any, minimum: Any) -> Any:
    """The bits of a scale and a minimum of float32, brought into range."""
    limit = np.float32(65504)
    scale_bits = to_half(min(max(scale, -limit), limit))
    minimum_bits = to_half(min(max(minimum, -limit), limit))
    return scale_bits, np.uint16(0) if minimum_bits == np.uint16(0x8000) else minimum_bits


@kernel
def _fit(values: Any, mean: Any, state: Any, top: Any, terms: Any) -> Any:
    """Scale and minimum, float32, that fit the codes under another scale and minimum best."""
    scale, minimum = state
    length = values.shape[0]
    count, magic = np.float32(length), np.float32(12582912)
    divisor = scale if scale > 0 else np.float32(1)
    for i in range(length):
        terms[i] = _code(values[i], divisor, minimum, top) - magic
    mean_code = np.float32(_sum(terms) / count)
    for i in range(length):
        code = np.float32(np.float32(_code(values[i], divisor, minimum, top) - magic) - mean_code)
        terms[i] = code * code
    square = _sum(terms)
    for i in range(length):
        code = np.float32(np.float32(_code(values[i], divisor, minimum, top) - magic) - mean_code)
        terms[i] = code * np.float32(values[i] - mean)
    fitted = np.float32(_sum(terms) / (square if square > 0 else np.float32(1)))
    fitted = fitted if fitted > 0 else np.float32(0)
    return fitted, np.float32(mean - np.float32(fitted * mean_code))


@kernel
def _mean(values: Any, terms: Any) -> Any:
    for i in range(values.shape[0]):
        terms[i] = values[i]
    return np.float32(_sum(terms) / np.float32(values.shape[0]))


@inlined
def _searched(values: Any, ends: Any, top: Any, terms: Any) -> Any:
    """The bits of the best scale and minimum of a group; `terms` is scratch of a group."""
    lowest, highest = ends
    for i in range(terms.shape[0]):
        terms[i] = 0
    best = _bounds(ends, top)
    error = _error(values, from_half(best[0]), from_half(best[1]), top, terms)
    middle, mean = np.float32((lowest + highest) * np.float32(0.5)), _mean(values, terms)
    tries = len(SHRINKS) ** 2
    for k in range(tries + REFITS):
        if k < tries:
            low = middle + np.float32((lowest - middle) * np.float32(SHRINKS[k // len(SHRINKS)]))
            high = middle + np.float32((highest - middle) * np.float32(SHRINKS[k % len(SHRINKS)]))
            scale, minimum = np.float32(np.float32(high - low) / top), np.float32(low)
        else:
            scale, minimum = _fit(values, mean, (from_half(best[0]), from_half(best[1])), top, terms)
        candidate = _candidate(scale, minimum)
        new_error = _error(values, from_half(candidate[0]), from_half(candidate[1]), top, terms)
        if new_error < np.float32(error * np.float32(MARGIN)):
            best, error = candidate, new_error
    return best


@inlined
def _by_ends(_: Any, ends: Any, top: Any, __: Any) -> Any:
    return _bounds(ends, top)


@inlined
def _quantize_rows(scratch: Any, work: Any, fmt: Any, sizes: Any, rows: Any, read: Any, fit: Any) -> Any:
    """The first row that has an element out of range, where it stops, or -1.

    `read` gives a group's elements as float32, `fit` the bits of its scale and minimum.
    """
    parts, x = work
    bits, size = fmt
    first, last = rows
    codes, nbytes, top = scratch[:size], size * bits // 8, np.float32(2**bits - 1)
    room, terms = scratch[2 * size : 6 * size].view(np.float32), scratch[6 * size : 10 * size].view(np.float32)
    place, bad_row, row = _place(first, sizes), -1, first
    while row < last and bad_row < 0:
        packed, scale_at, minimum_at, start = _places((parts[0], parts[1], parts[2], x), place)
        for group in range(sizes[3]):
            values = read(x, (start + group * size, start + min((group + 1) * size, sizes[2])), sizes[4], room)
            smallest, largest, fits = _range(values)
            if not fits:
                bad_row = row
                break
            scale, minimum = fit(values, (smallest, largest), top, terms)
            parts[1][0][scale_at + group], parts[2][0][minimum_at + group] = scale, minimum
            _encode(values, from_half(scale), from_half(minimum), top, codes)
            pack(codes, bits, parts[0][0][packed + group * nbytes : packed + (group + 1) * nbytes])
        place, row = _next(place, sizes), row + 1
    return bad_row


@kernel
def _quantize_float32(scratch: Any, parts: Any, fmt: Any, x: Any, sizes: Any, first: int, last: int) -> Any:
    return _quantize_rows(scratch, (parts, x), fmt, sizes, (first, last), _as_it_is, _by_ends)


@kernel
def _quantize_16_bit(scratch: Any, parts: Any, fmt: Any, x: Any, sizes: Any, first: int, last: int) -> Any:
    return _quantize_rows(scratch, (parts, x), fmt, sizes, (first, last), _widened, _by_ends)


@kernel
def _search_float32(scratch: Any, parts: Any, fmt: Any, x: Any, sizes: Any, first: int, last: int) -> Any:
    return _quantize_rows(scratch, (parts, x), fmt, sizes, (first, last), _as_it_is, _searched)


@kernel
def _search_16_bit(scratch: Any, parts: Any, fmt: Any, x: Any, sizes: Any, first: int, last: int) -> Any:
    return _quantize_rows(scratch, (parts, x), fmt, sizes, (first, last), _widened, _searched)


_DEQUANTIZE: dict[torch.dtype, _Kernel] = {
    torch.float32: _rows_to_float32,
    torch.bfloat16: _rows_to_bfloat16,
    torch.float16: _rows_to_float16,
}
# by method, and whether elements are float32
_QUANTIZE: dict[tuple[str, bool], _Kernel] = {
    ("minmax", True): _quantize_float32,
    ("minmax", False): _quantize_16_bit,
    ("search", True): _search_float32,
    ("search", False): _search_16_bit,
}


def dequantize(
    q: Quantized,
    fmt: GroupFormat,
    dtype: torch.dtype = torch.float32,
    out: Tensor | None = None,
    threads: int = 1,
) -> Tensor:
    """`groupwise.dequantize` on the CPU, into float32, bfloat16 or float16.

    Args:
        q: see there, as `fmt`, `dtype` and `out`. Nothing is copied whose rows are contiguous each (see `grid`).
        fmt: width and group size.
        dtype: of the result; that of `out` if it is given.
        out: where to put the result.
        threads: among how many threads the rows are shared; the caller's is one of them.

    Raises:
        QuantizationError: as there.
    """
    out = groupwise.target_for(q, fmt, dtype, out)
    seen = grid(out)
    target = out if seen is not None else torch.empty(out.shape, dtype=out.dtype)
    parts = _readable(q.codes), _readable(q.scales), _readable(q.minima)
    _run(_DEQUANTIZE[out.dtype], parts, fmt, out, seen or _readable(target), threads)
    return out if target is out else out.copy_(target)


def row_reader(q: Quantized, fmt: GroupFormat) -> Callable[[int, int, Tensor], None]:
    """`dispatch.row_reader` where there are kernels; what it reads into must be contiguous."""
    whole = _readable(q.codes), _readable(q.scales), _readable(q.minima)

    def read(first: int, last: int, out: Tensor) -> None:
        codes, scales, minima = ((memory[first * step :], 0, 0, step) for memory, _, _, step in whole)
        count, length = last - first, out.shape[-1]
        sizes = 1, count, length, fmt.groups((length,))[0], KINDS[out.dtype]
        rows_kernel = _DEQUANTIZE[out.dtype]
        rows_kernel(_scratch(fmt), (codes, scales, minima), (fmt.bits, fmt.group_size), _readable(out), sizes, 0, count)

    return read


def quantize(
    x: Tensor,
    fmt: GroupFormat,
    name: str = "tensor",
    method: str = "minmax",
    out: Quantized | None = None,
    threads: int = 1,
) -> Quantized:
    """`groupwise.quantize` on the CPU, or with the method `"search"` that of `search`.

    Args:
        x: see there, as `fmt`, `name` and `out`. Nothing is copied whose rows are contiguous each (see `grid`).
        fmt: width and group size.
        name: what `x` is, for error messages.
        method: `"minmax"` or `"search"`.
        out: where to put the result.
        threads: among how many threads the rows are shared; the caller's is one of them.

    Raises:
        QuantizationError: as there.
    """
    out = groupwise.room_for(x, fmt, name, out)
    x = x if x.dtype in KINDS else x.float()
    room, parts = out, _parts(out)
    if parts is None:
        room = groupwise.empty(x.shape, fmt)
        parts = _parts(room)
        assert parts is not None
    rows_kernel = _QUANTIZE[method, x.dtype is torch.float32]
    bad_row = _run(rows_kernel, parts, fmt, x, _readable(x), threads)
    if bad_row >= 0:
        groupwise.check_range(as_rows(x)[bad_row : bad_row + 1].float(), name, x.shape, bad_row)
    if room is not out:
        out.codes.copy_(room.codes)
        out.scales.copy_(room.scales)
        out.minima.copy_(room.minima)
    return out


def grid(x: Tensor) -> Grid | None:
    """What kernels see of a tensor, or None if they cannot: its rows may lie anywhere, but each must be contiguous."""
    if x.dim() > 4:
        if not x.is_contiguous():
            return None
        x = x.flatten(0, -4)
    shape, steps = x.shape, x.stride()
    if shape[-1] > 1 and steps[-1] != 1:
        return None
    extent = 1 if x.numel() else 0
    for size, step in zip(shape, steps, strict=True):
        extent += (size - 1) * step * (extent > 0)
    run = x.detach().as_strided((extent,), (1,))
    memory: np.ndarray = (run.view(torch.uint16) if x.dtype.itemsize == 2 else run).numpy()
    outer, middle, inner = (0, 0, 0, *steps[:-1])[-3:]
    return memory, outer, middle, inner


def _scratch(fmt: GroupFormat) -> np.ndarray:
    """Of a group: its codes; the third bits of a width of 3; for each element, twice a float32."""
    return np.empty(10 * fmt.group_size, np.uint8)


def _readable(x: Tensor) -> Grid:
    """The grid of a tensor, or of a copy."""
    seen = grid(x) or grid(x.contiguous())
    assert seen is not None
    return seen


def _parts(q: Quantized) -> _Parts | None:
    codes, scales, minima = grid(q.codes), grid(q.scales), grid(q.minima)
    return None if codes is None or scales is None or minima is None else (codes, scales, minima)


def _run(rows_kernel: _Kernel, parts: _Parts, fmt: GroupFormat, x: Tensor, seen: Grid, threads: int) -> int:
    """Runs a kernel over all rows of `x`, or of what lies like it; returns the first one that it names, or -1."""
    shape = x.shape
    count, length = math.prod(shape[:-1]), shape[-1]
    middle, inner = (1, 1, *shape[:-1])[-2:]
    sizes = middle, inner, length, fmt.groups((length,))[0], KINDS[x.dtype]

    def work(first: int, last: int) -> int:
        return rows_kernel(_scratch(fmt), parts, (fmt.bits, fmt.group_size), seen, sizes, first, last)

    return share(work, count, min(threads, x.numel() // _SHARED_ELEMENTS))


def share(work: Callable[[int, int], int], count: int, threads: int) -> int:
    """Calls `work(first, last)` for parts of `count` rows, in this thread and in `threads - 1` others.

    Returns:
        The smallest row that a part names, or -1.
    """
    threads = max(1, min(threads, count))
    cuts = [count * k // threads for k in range(threads + 1)]
    if threads == 1:
        return work(0, count)
    others = [_helpers(threads - 1).submit(work, first, last) for first, last in itertools.pairwise(cuts[1:])]
    try:
        named = [work(0, cuts[1])]
    finally:
        concurrent.futures.wait(others)  # they write where the caller's tensors are
    named += [other.result() for other in others]
    return next((row for row in named if row >= 0), -1)


@functools.cache
def _helpers(count: int) -> concurrent.futures.ThreadPoolExecutor:
    """Threads that wait for work until the process ends: to start one takes as long as a small kernel."""
    return concurrent.futures.ThreadPoolExecutor(count, "kernel-helper")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_helpers.cache_clear)  # a fork has none of its parent's threads
