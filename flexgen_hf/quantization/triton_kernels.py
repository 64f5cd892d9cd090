"""A Triton kernel for CUDA that dequantizes what `groupwise` specifies, bit for bit.

Triton comes with torch's builds for CUDA. The module can be imported without it, and then has no kernel.
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

__all__ = ["dequantize", "is_available"]

# Elements per program.
_BLOCK = 1024


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


if triton is not None:

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
