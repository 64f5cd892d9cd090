"""Numba kernels for the CPU that do what `groupwise` specifies, bit for bit; the only module that imports numba.

A kernel goes through a range of rows in the thread that calls it and holds no lock of Python's meanwhile: lanes call it
beside compute. With `threads=` rows are shared among threads of the call's own; numba's own, of which a process has one
set that it configures once, stay out of it. Machine code is compiled for the processor at hand when a kernel is first
called, and kept on disk.

The loops are written for a compiler's vectoriser: a group is unpacked into bytes that stay in the first cache, then one
loop without branches makes numbers of them. float16 and bfloat16 are handled by the bits of float32, because numba has
neither. Scales, minima and elements are finite, as quantizing ensures.
"""

from __future__ import annotations

import concurrent.futures
import itertools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
import numpy as np
import torch
from torch import Tensor

from . import groupwise
from .groupwise import GroupFormat, Quantized, as_rows
from .search import MARGIN, REFITS, SHRINKS

__all__ = ["dequantize", "quantize", "row_multiplier", "row_reader"]

_Function = TypeVar("_Function", bound=Callable[..., Any])

# what a kernel sees of a Quantized: codes, then the bits of scales and minima, each of shape (rows, ...)
_Parts = tuple[np.ndarray, np.ndarray, np.ndarray]
# a kernel's arguments: scratch, parts, width, group size, the tensor's other form, first and last row
_Kernel = Callable[[np.ndarray, _Parts, int, int, np.ndarray, int, int], int]

# Elements that are cast to float32 at once where their dtype is another.
_CHUNK_ELEMENTS = 1 << 19
# Below this many elements, starting threads takes longer than the work.
_SHARED_ELEMENTS = 1 << 18
# Bytes for each element of a group: its code; the third bits of a width of 3; a float32.
_SCRATCH = 6

#: the most rows that `row_multiplier` multiplies
MOST_ROWS = 4


def _kernel(function: _Function, **more: Any) -> _Function:
    """Compiles without Python's lock and keeps the machine code, where there is a folder to keep it in."""
    # Without numba's runtime a kernel can allocate nothing, so its caller brings scratch; but slices cost nothing. With
    # it, references to arrays are counted, atomically, in every group: half of the speed. numpy's division looks for no
    # zeros.
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy", "_nrt": False, **more}
    try:
        return cast(_Function, numba.njit(function, cache=True, **options))
    except RuntimeError:  # neither the package's folder nor the user's cache can be written
        return cast(_Function, numba.njit(function, **options))


def _product(function: _Function) -> _Function:
    """A kernel whose sums may be added up in any order, as products' are: several at once, then these."""
    return _kernel(function, fastmath={"contract", "nsz", "reassoc"})


def _inlined(function: _Function) -> _Function:
    """A part of kernels; becomes code where it is called, so that the compiler sees whole loops."""
    return cast(_Function, numba.njit(function, inline="always"))


# In numba the sum of two uint32 is an uint64; so sums are cast back, which also keeps vectors full.


@_inlined
def _from_half(bits: Any) -> Any:
    """The float32 of a float16's bits; exact, subnormal numbers too."""
    magnitude = np.uint32((np.uint32(bits) & np.uint32(0x7FFF)) << np.uint32(13)).view(np.float32)
    value = magnitude * np.float32(2.0**112)
    return -value if bits & np.uint16(0x8000) else value


@_inlined
def _to_float32(value: Any) -> Any:
    return value


@_kernel
def _to_half(value: Any) -> Any:
    """The bits of the float16 nearest to a float32, ties to even."""
    bits = np.float32(value).view(np.uint32)
    magnitude = np.uint32(bits & np.uint32(0x7FFFFFFF))
    # The exponent's bias changes from 127 to 15; half of the last place, less one where that place is even, rounds.
    odd = (magnitude >> np.uint32(13)) & np.uint32(1)
    normal = min(np.uint32(np.uint32(magnitude + np.uint32(0xC8000FFF)) + odd) >> np.uint32(13), np.uint32(0x7C00))
    # After adding 0.5, the lowest bits count multiples of 2**-24, the smallest float16.
    shifted = np.float32(magnitude.view(np.float32) + np.float32(0.5))
    subnormal = np.uint32(shifted.view(np.uint32) - np.uint32(0x3F000000))
    half = subnormal if magnitude < np.uint32(0x38800000) else normal
    return np.uint16(half | ((bits >> np.uint32(16)) & np.uint32(0x8000)))


@_inlined
def _to_bfloat16(value: Any) -> Any:
    """The bits of the bfloat16 nearest to a float32, ties to even."""
    bits = np.float32(value).view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    return np.uint16(np.uint32(bits + np.uint32(np.uint32(0x7FFF) + odd)) >> np.uint32(16))


@_inlined
def _unpack_quarters(packed: Any, bits: Any, codes: Any, third: Any) -> None:
    """Widths 2 and 3, whose first plane holds four quarters of the group."""
    quarter, eighth = codes.shape[0] // 4, codes.shape[0] // 8
    for k in range(4):
        part, shift = codes[k * quarter : (k + 1) * quarter], np.uint8(2 * k)
        for i in range(quarter):
            part[i] = (packed[i] >> shift) & np.uint8(3)
    if bits == 3:
        # The plane of third bits twice, so that all of a quarter's codes find theirs in the same place.
        plane, again = packed[quarter:], third[eighth:]
        for i in range(eighth):
            third[i] = plane[i]
        for i in range(eighth):
            again[i] = plane[i] >> np.uint8(1)
        for k in range(4):
            part, shift = codes[k * quarter : (k + 1) * quarter], np.uint8(2 * k)
            for i in range(quarter):
                part[i] |= ((third[i] >> shift) & np.uint8(1)) << np.uint8(2)


@_inlined
def _unpack(packed: Any, bits: Any, codes: Any, third: Any) -> None:
    """A group's bytes as one code per byte. `third` is scratch of a quarter of the group."""
    size = codes.shape[0]
    if bits == 8:
        for i in range(size):
            codes[i] = packed[i]
    elif bits == 4:
        half = size // 2
        low, high = codes[:half], codes[half:]
        for i in range(half):
            low[i] = packed[i] & np.uint8(15)
        for i in range(half):
            high[i] = packed[i] >> np.uint8(4)
    else:
        _unpack_quarters(packed, bits, codes, third)


@_kernel
def _pack(codes: Any, bits: Any, packed: Any) -> None:
    """One code per byte as a group's bytes."""
    size = codes.shape[0]
    if bits == 8:
        for i in range(size):
            packed[i] = codes[i]
    elif bits == 4:
        half = size // 2
        low, high = codes[:half], codes[half:]
        for i in range(half):
            packed[i] = low[i] | (high[i] << np.uint8(4))
    else:
        quarter, eighth = size // 4, size // 8
        first, second, third, fourth = codes[:quarter], codes[quarter:], codes[2 * quarter :], codes[3 * quarter :]
        for i in range(quarter):
            low = (first[i] & np.uint8(3)) | ((second[i] & np.uint8(3)) << np.uint8(2))
            high = (third[i] & np.uint8(3)) | ((fourth[i] & np.uint8(3)) << np.uint8(2))
            packed[i] = low | (high << np.uint8(4))
        if bits == 3:
            plane = packed[quarter:]
            for i in range(eighth):
                plane[i] = 0
            for k in range(8):
                part = codes[k * eighth : (k + 1) * eighth]
                for i in range(eighth):
                    plane[i] |= (part[i] >> np.uint8(2)) << np.uint8(k)


@_inlined
def _dequantize_rows(scratch: Any, parts: Any, fmt: Any, out: Any, rows: Any, convert: Any) -> None:
    packed, scales, minima = parts
    bits, size = fmt
    first, last = rows
    codes, third, nbytes = scratch[:size], scratch[size : 2 * size], size * bits // 8
    for row in range(first, last):
        for group in range(scales.shape[1]):
            scale, minimum = _from_half(scales[row, group]), _from_half(minima[row, group])
            _unpack(packed[row, group * nbytes : (group + 1) * nbytes], bits, codes, third)
            target = out[row, group * size : (group + 1) * size]
            for i in range(target.shape[0]):
                target[i] = convert(np.float32(codes[i]) * scale + minimum)


@_kernel
def _rows_to_float32(scratch: Any, parts: Any, bits: int, size: int, out: Any, first: int, last: int) -> int:
    _dequantize_rows(scratch, parts, (bits, size), out, (first, last), _to_float32)
    return -1


@_kernel
def _rows_to_bfloat16(scratch: Any, parts: Any, bits: int, size: int, out: Any, first: int, last: int) -> int:
    _dequantize_rows(scratch, parts, (bits, size), out, (first, last), _to_bfloat16)
    return -1


@_kernel
def _rows_to_float16(scratch: Any, parts: Any, bits: int, size: int, out: Any, first: int, last: int) -> int:
    _dequantize_rows(scratch, parts, (bits, size), out, (first, last), _to_half)
    return -1


@_product
def _multiply_row(scratch: Any, parts: Any, bits: int, size: int, x: Any, out: Any, rows: Any) -> None:
    """A row of `x`, padded to whole groups, by rows of a quantized matrix."""
    packed, scales, minima = parts
    codes, third, nbytes = scratch[:size], scratch[size : 2 * size], size * bits // 8
    for row in range(rows[0], rows[1]):
        total = np.float32(0)
        for group in range(scales.shape[1]):
            scale, minimum = _from_half(scales[row, group]), _from_half(minima[row, group])
            _unpack(packed[row, group * nbytes : (group + 1) * nbytes], bits, codes, third)
            values = x[0, group * size : (group + 1) * size]
            for i in range(size):
                total += (np.float32(codes[i]) * scale + minimum) * values[i]
        out[0, row] = total


@_product
def _multiply_four_rows(scratch: Any, parts: Any, bits: int, size: int, x: Any, out: Any, rows: Any) -> None:
    """As `_multiply_row`, for four rows of `x`."""
    packed, scales, minima = parts
    codes, third, nbytes = scratch[:size], scratch[size : 2 * size], size * bits // 8
    zero = np.float32(0)
    for row in range(rows[0], rows[1]):
        t0, t1, t2, t3 = zero, zero, zero, zero
        for group in range(scales.shape[1]):
            scale, minimum = _from_half(scales[row, group]), _from_half(minima[row, group])
            _unpack(packed[row, group * nbytes : (group + 1) * nbytes], bits, codes, third)
            start, end = group * size, (group + 1) * size
            x0, x1, x2, x3 = x[0, start:end], x[1, start:end], x[2, start:end], x[3, start:end]
            for i in range(size):
                weight = np.float32(codes[i]) * scale + minimum
                t0, t1, t2, t3 = t0 + weight * x0[i], t1 + weight * x1[i], t2 + weight * x2[i], t3 + weight * x3[i]
        out[0, row], out[1, row], out[2, row], out[3, row] = t0, t1, t2, t3


@_inlined
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


@_inlined
def _half_below(value: Any) -> Any:
    """The bits of the largest float16 that is not above a float32; zero is +0."""
    bits = _to_half(value)
    if bits == np.uint16(0x8000):
        bits = np.uint16(0)
    if _from_half(bits) > value:
        if bits == 0:
            bits = np.uint16(0x8001)
        elif bits & np.uint16(0x8000):
            bits = np.uint16(bits + 1)
        else:
            bits = np.uint16(bits - 1)
    return bits


@_inlined
def _bounds(smallest: Any, largest: Any, top: Any) -> Any:
    """The bits of scale and minimum of a group."""
    minimum = _half_below(smallest)
    width = np.float32(largest - _from_half(minimum)) + np.float32(0)  # never -0
    scale = _to_half(width / top)
    if np.float32(_from_half(scale) * top) < width:
        scale = np.uint16(scale + 1)
    return scale, minimum


@_inlined
def _code(value: Any, divisor: Any, minimum: Any, top: Any) -> Any:
    """The code of an element, plus 1.5 * 2**23, all float32.

    Adding that rounds half to even and leaves the integer in the lowest bits.
    """
    steps = np.float32((value - minimum) / divisor)
    steps = steps if steps > np.float32(0) else np.float32(0)
    steps = steps if steps < top else top
    return np.float32(steps + np.float32(12582912))


@_inlined
def _encode(values: Any, scale: Any, minimum: Any, top: Any, codes: Any) -> None:
    """Codes of a group; those of its padding are that of its last element."""
    divisor = scale if scale > 0 else np.float32(1)
    length = values.shape[0]
    for i in range(length):
        codes[i] = np.int32(_code(values[i], divisor, minimum, top).view(np.int32) - np.int32(0x4B400000))
    for i in range(length, codes.shape[0]):
        codes[i] = codes[length - 1]


@_kernel
def _quantize_rows(scratch: Any, parts: Any, bits: int, size: int, x: Any, first: int, last: int) -> int:
    """Returns the first row that has an element out of range, where it stops, or -1."""
    packed, scales, minima = parts
    codes, nbytes, top = scratch[:size], size * bits // 8, np.float32(2**bits - 1)
    for row in range(first, last):
        for group in range(scales.shape[1]):
            values = x[row, group * size : (group + 1) * size]
            smallest, largest, fits = _range(values)
            if not fits:
                return row
            scale, minimum = _bounds(smallest, largest, top)
            scales[row, group], minima[row, group] = scale, minimum
            _encode(values, _from_half(scale), _from_half(minimum), top, codes)
            _pack(codes, bits, packed[row, group * nbytes : (group + 1) * nbytes])
    return -1


@_kernel
def _sum(terms: Any) -> Any:
    """Sum of a multiple of eight numbers, in the order that `search` says."""
    zero = np.float32(0)
    s0, s1, s2, s3, s4, s5, s6, s7 = zero, zero, zero, zero, zero, zero, zero, zero
    for i in range(0, terms.shape[0], 8):
        s0, s1, s2, s3 = s0 + terms[i], s1 + terms[i + 1], s2 + terms[i + 2], s3 + terms[i + 3]
        s4, s5, s6, s7 = s4 + terms[i + 4], s5 + terms[i + 5], s6 + terms[i + 6], s7 + terms[i + 7]
    return np.float32(((((((s0 + s1) + s2) + s3) + s4) + s5) + s6) + s7)


@_kernel
def _error(values: Any, scale: Any, minimum: Any, top: Any, terms: Any) -> Any:
    """Squared error of a group. `terms` is scratch of a group, zero behind the group's elements."""
    divisor = scale if scale > 0 else np.float32(1)
    for i in range(values.shape[0]):
        code = np.float32(_code(values[i], divisor, minimum, top) - np.float32(12582912))
        wrong = np.float32(np.float32(code * scale + minimum) - values[i])
        terms[i] = wrong * wrong
    return _sum(terms)


@_inlined
def _candidate(scale: Any, minimum: Any) -> Any:
    """The bits of a scale and a minimum of float32, brought into range."""
    limit = np.float32(65504)
    scale_bits = _to_half(min(max(scale, -limit), limit))
    minimum_bits = _to_half(min(max(minimum, -limit), limit))
    return scale_bits, np.uint16(0) if minimum_bits == np.uint16(0x8000) else minimum_bits


@_kernel
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


@_kernel
def _mean(values: Any, terms: Any) -> Any:
    for i in range(values.shape[0]):
        terms[i] = values[i]
    return np.float32(_sum(terms) / np.float32(values.shape[0]))


@_inlined
def _search(values: Any, ends: Any, top: Any, terms: Any) -> Any:
    """The bits of the best scale and minimum of a group."""
    lowest, highest = ends
    best = _bounds(lowest, highest, top)
    error = _error(values, _from_half(best[0]), _from_half(best[1]), top, terms)
    middle, mean = np.float32((lowest + highest) * np.float32(0.5)), _mean(values, terms)
    tries = len(SHRINKS) ** 2
    for k in range(tries + REFITS):
        if k < tries:
            low = middle + np.float32((lowest - middle) * np.float32(SHRINKS[k // len(SHRINKS)]))
            high = middle + np.float32((highest - middle) * np.float32(SHRINKS[k % len(SHRINKS)]))
            scale, minimum = np.float32(np.float32(high - low) / top), np.float32(low)
        else:
            scale, minimum = _fit(values, mean, (_from_half(best[0]), _from_half(best[1])), top, terms)
        candidate = _candidate(scale, minimum)
        new_error = _error(values, _from_half(candidate[0]), _from_half(candidate[1]), top, terms)
        if new_error < np.float32(error * np.float32(MARGIN)):
            best, error = candidate, new_error
    return best


@_kernel
def _search_rows(scratch: Any, parts: Any, bits: int, size: int, x: Any, first: int, last: int) -> int:
    """As `_quantize_rows`."""
    packed, scales, minima = parts
    codes, nbytes, top = scratch[:size], size * bits // 8, np.float32(2**bits - 1)
    terms = scratch[2 * size : 6 * size].view(np.float32)
    for row in range(first, last):
        for group in range(scales.shape[1]):
            values = x[row, group * size : (group + 1) * size]
            smallest, largest, fits = _range(values)
            if not fits:
                return row
            for i in range(size):
                terms[i] = 0
            scale, minimum = _search(values, (smallest, largest), top, terms)
            scales[row, group], minima[row, group] = scale, minimum
            _encode(values, _from_half(scale), _from_half(minimum), top, codes)
            _pack(codes, bits, packed[row, group * nbytes : (group + 1) * nbytes])
    return -1


_DEQUANTIZE: dict[torch.dtype, _Kernel] = {
    torch.float32: _rows_to_float32,
    torch.bfloat16: _rows_to_bfloat16,
    torch.float16: _rows_to_float16,
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
        q: see there, as `fmt`, `dtype` and `out`. Nothing of it is copied if it is contiguous.
        fmt: width and group size.
        dtype: of the result; that of `out` if it is given.
        out: where to put the result.
        threads: among how many threads the rows are shared; the caller's is one of them.

    Raises:
        QuantizationError: as there.
    """
    out = groupwise.target_for(q, fmt, dtype, out)
    target = out.contiguous()
    _share(_DEQUANTIZE[out.dtype], _arrays(q), fmt, _array(target), threads)
    return out if out.is_contiguous() else out.copy_(target)


def row_reader(q: Quantized, fmt: GroupFormat) -> Callable[[int, int, Tensor], None]:
    """`dispatch.row_reader` where there are kernels; what it reads into must be contiguous."""
    codes, scales, minima = _arrays(q)

    def read(first: int, last: int, out: Tensor) -> None:
        parts = codes[first:last], scales[first:last], minima[first:last]
        scratch = np.empty(_SCRATCH * fmt.group_size, np.uint8)
        _DEQUANTIZE[out.dtype](scratch, parts, fmt.bits, fmt.group_size, _array(out), 0, last - first)

    return read


def row_multiplier(q: Quantized, fmt: GroupFormat, x: Tensor) -> tuple[Tensor, Callable[[int, int], None]]:
    """See `dispatch.row_multiplier`."""
    parts, rows = _arrays(q), 1 if len(x) == 1 else MOST_ROWS
    padded = x.new_zeros((rows, parts[1].shape[1] * fmt.group_size))
    padded[: len(x), : x.shape[1]] = x
    out = x.new_empty((rows, len(parts[0])))
    given, taken = padded.numpy(), out.numpy()
    kernel = _multiply_row if rows == 1 else _multiply_four_rows

    def multiply(first: int, last: int) -> None:
        scratch = np.empty(_SCRATCH * fmt.group_size, np.uint8)
        kernel(scratch, parts, fmt.bits, fmt.group_size, given, taken, (first, last))

    return out[: len(x)], multiply


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
        x: see there, as `fmt`, `name` and `out`. What is not float32 is cast in parts.
        fmt: width and group size.
        name: what `x` is, for error messages.
        method: `"minmax"` or `"search"`.
        out: where to put the result; it must be contiguous.
        threads: among how many threads the rows are shared; the caller's is one of them.

    Raises:
        QuantizationError: as there.
    """
    out = groupwise.room_for(x, fmt, name, out)
    rows, parts = as_rows(x), _arrays(out)
    step = len(rows) if x.dtype is torch.float32 else max(1, _CHUNK_ELEMENTS // max(rows.shape[1], 1))
    for start in range(0, len(rows), max(step, 1)):
        part = rows[start : start + step].float().contiguous()
        some = (parts[0][start : start + step], parts[1][start : start + step], parts[2][start : start + step])
        bad_row = _share(_search_rows if method == "search" else _quantize_rows, some, fmt, part.numpy(), threads)
        if bad_row >= 0:
            groupwise.check_range(part[bad_row : bad_row + 1], name, x.shape, start + bad_row)
    return out


def _array(x: Tensor) -> np.ndarray:
    """The memory of a contiguous tensor as an array of shape (rows, length); 16-bit numbers as their bits."""
    rows = as_rows(x.detach())
    array: np.ndarray = (rows.view(torch.uint16) if x.dtype.itemsize == 2 else rows).numpy()
    return array


def _arrays(q: Quantized) -> _Parts:
    return _array(q.codes.contiguous()), _array(q.scales.contiguous()), _array(q.minima.contiguous())


def _share(kernel: _Kernel, parts: _Parts, fmt: GroupFormat, array: np.ndarray, threads: int) -> int:
    """Runs a kernel over all rows in this thread and `threads - 1` others; returns the smallest row that one names."""
    count = len(array)
    threads = max(1, min(threads, count, array.size // _SHARED_ELEMENTS))
    cuts = [count * k // threads for k in range(threads + 1)]

    def work(first: int, last: int) -> int:
        scratch = np.empty(_SCRATCH * fmt.group_size, np.uint8)
        return kernel(scratch, parts, fmt.bits, fmt.group_size, array, first, last)

    if threads == 1:
        return work(0, count)
    with concurrent.futures.ThreadPoolExecutor(threads - 1, "flexgen-quantization") as pool:
        others = [pool.submit(work, first, last) for first, last in itertools.pairwise(cuts[1:])]
        named = [work(0, cuts[1]), *(other.result() for other in others)]
    return next((row for row in named if row >= 0), -1)
