"""What kernels for the CPU are made of: compiling, numbers of 16 bits by their bits, packing and unpacking a group.

A kernel holds no lock of Python's. Machine code is compiled for the processor at hand when a kernel is first called,
and kept on disk until its module changes: who changes this one clears the caches of those that use it (`__pycache__`).
float16 and bfloat16 are handled by the bits of float32, because numba has neither.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
import numpy as np
import torch

__all__ = [
    "BFLOAT16",
    "KINDS",
    "from_bfloat16",
    "from_half",
    "inlined",
    "kernel",
    "pack",
    "reordering_kernel",
    "to_bfloat16",
    "to_float32",
    "to_half",
    "unpack",
]

_Function = TypeVar("_Function", bound=Callable[..., Any])

#: the number by which kernels know bfloat16
BFLOAT16 = 1

#: dtypes that kernels read, and their numbers
KINDS = {torch.float32: 0, torch.bfloat16: BFLOAT16, torch.float16: 2}


def kernel(function: _Function) -> _Function:
    """Compiles without Python's lock and keeps the machine code, where there is a folder to keep it in."""
    # Without numba's runtime a kernel can allocate nothing, so its caller brings scratch; but slices cost nothing. With
    # it, references to arrays are counted, atomically, in every group: half of the speed. numpy's division looks for no
    # zeros.
    return _compiled(function, {})


def reordering_kernel(function: _Function) -> _Function:
    """As `kernel`, for sums whose order does not matter, so that many terms can be added at once."""
    return _compiled(function, {"fastmath": {"reassoc", "contract", "nsz"}})


def _compiled(function: _Function, more: dict[str, Any]) -> _Function:
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy", "_nrt": False, **more}
    try:
        return cast(_Function, numba.njit(function, cache=True, **options))
    except RuntimeError:  # neither the package's folder nor the user's cache can be written
        return cast(_Function, numba.njit(function, **options))


def inlined(function: _Function) -> _Function:
    """A part of kernels; becomes code where it is called, so that the compiler sees whole loops."""
    return cast(_Function, numba.njit(function, inline="always"))


# In numba the sum of two uint32 is an uint64; so sums are cast back, which also keeps vectors full.


@inlined
def from_half(bits: Any) -> Any:
    """The float32 of a float16's bits; exact, subnormal numbers too."""
    magnitude = np.uint32((np.uint32(bits) & np.uint32(0x7FFF)) << np.uint32(13)).view(np.float32)
    value = magnitude * np.float32(2.0**112)
    return -value if bits & np.uint16(0x8000) else value


@inlined
def from_bfloat16(bits: Any) -> Any:
    """The float32 of a bfloat16's bits."""
    return np.uint32(np.uint32(bits) << np.uint32(16)).view(np.float32)


@inlined
def to_float32(value: Any) -> Any:
    """Itself."""
    return value


@kernel
def to_half(value: Any) -> Any:
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


@inlined
def to_bfloat16(value: Any) -> Any:
    """The bits of the bfloat16 nearest to a float32, ties to even."""
    bits = np.float32(value).view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    return np.uint16(np.uint32(bits + np.uint32(np.uint32(0x7FFF) + odd)) >> np.uint32(16))


@inlined
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


@inlined
def unpack(packed: Any, bits: Any, codes: Any, third: Any) -> None:
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


@kernel
def pack(codes: Any, bits: Any, packed: Any) -> None:
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
