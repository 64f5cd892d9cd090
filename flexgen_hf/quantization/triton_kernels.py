"""Triton kernels for CUDA, ROCm and XPU that quantize and dequantize as `groupwise` specifies, bit for bit.

Triton comes with torch's builds for these. The module can be imported without it, and then has no kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import groupwise
from .groupwise import GroupFormat, Quantized

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

__all__ = ["dequantize", "is_available", "quantize"]

# Elements per program.
_BLOCK = 1024

_READABLE = (torch.float32, torch.bfloat16, torch.float16)


def is_available() -> bool:
    """Whether Triton is installed."""
    return triton is not None


def dequantize(q: Quantized, fmt: GroupFormat, dtype: torch.dtype = torch.float32, out: Tensor | None = None) -> Tensor:
    """`groupwise.dequantize` on a device that Triton compiles for, queued on its current stream.

    Args:
        q: see there, as `fmt`, `dtype` and `out`. Nothing of it is copied if it is contiguous.
        fmt: width and group size.
        dtype: of the result; that of `out` if it is given.
        out: where to put the result.

    Raises:
        QuantizationError: as there.
    """
    out = groupwise.target_for(q, fmt, dtype, out)
    target = out.contiguous()
    if target.numel():
        codes, scales, minima = q.codes.contiguous(), q.scales.contiguous(), q.minima.contiguous()
        grid = (triton.cdiv(target.numel(), _BLOCK),)
        is_bfloat16 = target.dtype is torch.bfloat16
        memory = target.view(torch.int16) if is_bfloat16 else target
        sizes = (target.numel(), q.shape[-1], fmt.groups(q.shape)[-1])
        with torch.cuda.device_of(target):  # type: ignore[no-untyped-call]
            _dequantize[grid](codes, scales, minima, memory, *sizes, fmt.bits, fmt.group_size, is_bfloat16, _BLOCK)
    return out if out.is_contiguous() else out.copy_(target)


def quantize(x: Tensor, fmt: GroupFormat, name: str = "tensor", out: Quantized | None = None) -> Quantized:
    """`groupwise.quantize` on a device that Triton compiles for. Waits for it, to know that all is in range.

    Args:
        x: see there, as `fmt`, `name` and `out`. Nothing of it is copied if it is contiguous.
        fmt: width and group size.
        name: what `x` is, for error messages.
        out: where to put the result. What is not contiguous of it is written by way of a copy.

    Raises:
        QuantizationError: as there.
    """
    out = groupwise.room_for(x, fmt, name, out)
    source = (x if x.dtype in _READABLE else x.float()).contiguous()
    parts = (out.codes, out.scales, out.minima)
    made = [part if part.is_contiguous() else torch.empty_like(part, memory_format=torch.contiguous_format)
            for part in parts]  # fmt: skip
    count = out.scales.numel()
    if count and source.shape[-1]:
        bad = torch.zeros(1, dtype=torch.int32, device=x.device)
        sizes = (source.shape[-1], fmt.groups(x.shape)[-1])
        width = triton.next_power_of_2(fmt.group_size)
        with torch.cuda.device_of(source):  # type: ignore[no-untyped-call]
            _quantize[count,](source, *made, bad, *sizes, fmt.bits, fmt.group_size, width)
        if bad.item():
            _refuse(source, name)
    for part, values in zip(parts, made, strict=True):
        if values is not part:
            part.copy_(values)
    return out


def _refuse(x: Tensor, name: str) -> None:
    """Raises for the first element that is out of range."""
    rows = groupwise.as_rows(x)
    row = int(torch.nonzero(~(rows.abs() <= groupwise.LARGEST).all(1))[0])
    groupwise.check_range(rows[row : row + 1].float(), name, x.shape, row)


if triton is not None:

    @triton.jit  # type: ignore[untyped-decorator, unused-ignore]
    def _quantize(  # type: ignore[no-untyped-def]  # noqa: PLR0913, PLR0917  it takes tensors and numbers only
        x, codes, scales, minima, bad, length, groups,
        bits: tl.constexpr, size: tl.constexpr, width: tl.constexpr,
    ):  # fmt: skip
        group = tl.program_id(0).to(tl.int64)
        row, first = group // groups, group % groups * size
        top: tl.constexpr = (1 << bits) - 1
        place = tl.arange(0, width)
        # padding repeats the row's last element, which widens no range
        column = tl.minimum(first + tl.minimum(place, size - 1), length - 1)
        value = tl.load(x + row * length + column).to(tl.float32)
        fits = tl.abs(value) <= 65504.0  # false for NaN
        if tl.sum((fits == 0).to(tl.int32), 0) > 0:
            tl.store(bad, 1)
        smallest, largest = tl.min(value, 0), tl.max(value, 0)
        near = smallest.to(tl.float16)
        order = tl.where(near == 0.0, 0, near.to(tl.int16, bitcast=True).to(tl.int32))
        below = tl.where(order > 0, order - 1, tl.where(order == 0, -0x7FFF, order + 1))
        low = tl.where(near.to(tl.float32) > smallest, below, order).to(tl.int16).to(tl.float16, bitcast=True)
        minimum = low.to(tl.float32)
        reach = largest - minimum + 0.0  # never -0
        high = tl.div_rn(reach, tl.full((), top, tl.float32)).to(tl.float16)
        is_short = (high.to(tl.float32) * top < reach).to(tl.int32)
        # the bits of positive float16 numbers count them in order
        high = (high.to(tl.int16, bitcast=True).to(tl.int32) + is_short).to(tl.int16).to(tl.float16, bitcast=True)
        scale = high.to(tl.float32)
        tl.store(scales + group, high)
        tl.store(minima + group, low)
        divisor = tl.where(scale == 0.0, 1.0, scale)
        start = codes + group * (size * bits // 8)
        # a byte of a plane takes the codes of elements that lie a plane's bytes apart: each is read and encoded again
        plane: tl.constexpr = 2 if bits == 3 else bits
        nbytes: tl.constexpr = size * plane // 8
        packed = tl.zeros((width,), tl.int32)
        for k in tl.static_range(8 // plane):
            code = _codes_of(x + row * length, first + place + k * nbytes, length, minimum, divisor, top)
            packed |= (code & ((1 << plane) - 1)) << (plane * k)
        tl.store(start + place, packed.to(tl.uint8), mask=place < nbytes)
        if bits == 3:
            third = tl.zeros((width,), tl.int32)
            for k in tl.static_range(8):
                code = _codes_of(x + row * length, first + place + k * (size // 8), length, minimum, divisor, top)
                third |= (code >> 2) << k
            tl.store(start + nbytes + place, third.to(tl.uint8), mask=place < size // 8)

    @triton.jit  # type: ignore[untyped-decorator, unused-ignore]
    def _codes_of(row, column, length, minimum, divisor, top: tl.constexpr):  # type: ignore[no-untyped-def]
        """Codes of some elements of a row; of its padding that of its last element."""
        value = tl.load(row + tl.minimum(column, length - 1)).to(tl.float32)
        steps = tl.div_rn(value - minimum, divisor)
        steps = tl.minimum(tl.maximum(steps, 0.0), top)
        rounded = steps + 12582912.0  # 1.5 * 2**23 leaves the integer, rounded half to even, in the lowest bits
        return rounded.to(tl.int32, bitcast=True) - 0x4B400000

    @triton.jit  # type: ignore[untyped-decorator, unused-ignore]
    def _dequantize(  # type: ignore[no-untyped-def]  # noqa: PLR0913, PLR0917  it takes tensors and numbers only
        codes, scales, minima, out, count, length, groups,
        bits: tl.constexpr, size: tl.constexpr, is_bfloat16: tl.constexpr, block: tl.constexpr,
    ):  # fmt: skip
        element = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
        is_element = element < count
        column = element % length
        group = element // length * groups + column // size
        place = column % size
        start = group * (size * bits // 8)
        # a plane of p bits has size * p / 8 bytes; one byte is loaded by several lanes, from the first cache
        first: tl.constexpr = 2 if bits == 3 else bits
        plane: tl.constexpr = size * first // 8
        byte = tl.load(codes + start + place % plane, mask=is_element, other=0).to(tl.int32)
        code = (byte >> (place // plane * first).to(tl.int32)) & ((1 << first) - 1)
        if bits == 3:
            third: tl.constexpr = size // 8
            byte = tl.load(codes + start + plane + place % third, mask=is_element, other=0).to(tl.int32)
            code |= ((byte >> (place // third).to(tl.int32)) & 1) << 2
        scale = tl.load(scales + group, mask=is_element, other=0).to(tl.float32)
        minimum = tl.load(minima + group, mask=is_element, other=0).to(tl.float32)
        # the product is exact, so it does not matter whether it is fused with the sum
        value = code.to(tl.float32) * scale + minimum
        if is_bfloat16:
            # by its bits, to nearest even: Triton's interpreter, on which this is tested, would cut them off
            whole = value.to(tl.int32, bitcast=True)
            tl.store(out + element, ((whole + 0x7FFF + ((whole >> 16) & 1)) >> 16).to(tl.int16), mask=is_element)
        else:
            tl.store(out + element, value.to(out.dtype.element_ty), mask=is_element)
