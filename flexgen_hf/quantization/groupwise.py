"""Asymmetric group quantization in plain torch: the specification, which every kernel matches bit for bit.

A tensor is cut into groups of `group_size` elements along its last dimension (the input dimension of a weight of shape
(out, in), `head_dim` of a cache). A group is kept as one code of `bits` bits per element, a scale and a minimum, both
float16; an element is `code * scale + minimum`. A row whose length is no multiple of the group size is padded by
repeating its last element, which widens no range. Elements are finite and at most 65504 in magnitude.

**Quantizing**, in float32, with `top = 2**bits - 1`:

- *minimum*: the group's smallest element rounded down to float16; zero is +0.
- *scale*: the smallest float16 for which `top * scale >= largest element - minimum`.
- *code*: `(element - minimum) / scale`, rounded half to even, at most `top`; 0 where the scale is 0.

So every element lies within `minimum ... minimum + top * scale` and comes back with an error of at most half a scale,
but for float32's rounding. A group whose elements are all one float16 number is exact: its scale is 0.

**Dequantizing**: `float32(code) * float32(scale)` is exact (8 and 11 bits), so one rounding in float32 makes the sum
with the minimum, fused or not; a second one makes the result's dtype. In float16, elements of a group that reaches
beyond 65504 by less than a step may come back infinite.

**Packing**. The codes of a group of g elements become g * bits / 8 bytes, in planes. A plane of p bits has
h = g * p / 8 bytes; its byte i holds element i + k * h in its bits p * k ... p * k + p - 1. Widths 2, 4 and 8 are one
plane; in width 4, for example, byte i holds element i in its low and element i + g/2 in its high four bits. Width 3 is
the plane of the codes' two low bits, then the plane of their third bit. Groups follow each other along a row, and rows
along the tensor. Consecutive bytes hold consecutive elements, so one vector instruction unpacks many of them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..errors import PolicyError, QuantizationError

__all__ = [
    "GROUP_DTYPE",
    "LARGEST",
    "SCRATCH_BYTES",
    "GroupFormat",
    "Quantized",
    "as_rows",
    "bounds",
    "check_parts",
    "check_range",
    "dequantize",
    "empty",
    "encode",
    "groups_of",
    "pack",
    "quantize",
    "room_for",
    "row_chunks",
    "target_for",
    "unpack",
]

#: dtype of scales and minima
GROUP_DTYPE = torch.float16
#: the largest magnitude of an element: that of a float16
LARGEST = 65504.0

# widths of the planes into which a code is cut, lowest bits first
_PLANES = {2: (2,), 3: (2, 1), 4: (4,), 8: (8,)}

# Elements worked on at once; a step holds a handful of float32 copies of them.
_CHUNK_ELEMENTS = 1 << 19

#: what `dequantize` holds of such a chunk beside its result: codes as bytes, parts of them, and float32 copies
SCRATCH_BYTES = 8 * _CHUNK_ELEMENTS


@dataclasses.dataclass(frozen=True)
class GroupFormat:
    """How tensors are quantized. The packed size follows from a tensor's shape, the width and the group size alone.

    Args:
        bits: width of a code: 2, 3, 4 or 8.
        group_size: elements that share a scale and a minimum, a positive multiple of 8.

    Raises:
        PolicyError: a width or a group size that does not exist.
    """

    bits: int = 4
    group_size: int = 64

    def __post_init__(self) -> None:
        if isinstance(self.bits, bool) or self.bits not in _PLANES:
            raise PolicyError(f"group quantization: {self.bits!r} bits do not exist; use 2, 3, 4 or 8")
        size = self.group_size
        if isinstance(size, bool) or not isinstance(size, int) or size <= 0 or size % 8:
            raise PolicyError(f"group quantization: group_size={size!r} must be a positive multiple of 8, e.g. 64")

    @property
    def top(self) -> int:
        """The largest code."""
        return int(2**self.bits - 1)

    @property
    def planes(self) -> tuple[int, ...]:
        """Widths of the planes of a packed group, in their order."""
        return _PLANES[self.bits]

    @property
    def group_nbytes(self) -> int:
        """Bytes of a group's codes."""
        return self.group_size * self.bits // 8

    @property
    def bits_per_element(self) -> float:
        """Bits of an element together with its part of scale and minimum, where rows are not padded."""
        return self.bits + 2 * GROUP_DTYPE.itemsize * 8 / self.group_size

    def groups(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of the scales, and of the minima, of a tensor of `shape`."""
        *rows, length = shape
        return (*rows, -(-length // self.group_size))

    def packed_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of the uint8 codes of a tensor of `shape`."""
        *rows, groups = self.groups(shape)
        return (*rows, groups * self.group_nbytes)

    def nbytes(self, shape: Sequence[int]) -> int:
        """Bytes of codes, scales and minima of a tensor of `shape`."""
        return math.prod(self.packed_shape(shape)) + 2 * GROUP_DTYPE.itemsize * math.prod(self.groups(shape))


@dataclasses.dataclass(frozen=True, eq=False)
class Quantized:
    """A quantized tensor.

    Args:
        codes: uint8, shape `GroupFormat.packed_shape(shape)`.
        scales: float16, shape `GroupFormat.groups(shape)`.
        minima: as `scales`.
        shape: of the tensor that was quantized.
    """

    codes: Tensor
    scales: Tensor
    minima: Tensor
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and minima."""
        return int(self.codes.nbytes + self.scales.nbytes + self.minima.nbytes)


def empty(shape: Sequence[int], fmt: GroupFormat, device: torch.device | str | None = None) -> Quantized:
    """Room for a tensor of `shape`, for `quantize(..., out=...)`."""
    groups = fmt.groups(shape)
    return Quantized(
        torch.empty(fmt.packed_shape(shape), dtype=torch.uint8, device=device),
        torch.empty(groups, dtype=GROUP_DTYPE, device=device),
        torch.empty(groups, dtype=GROUP_DTYPE, device=device),
        tuple(shape),
    )


def quantize(x: Tensor, fmt: GroupFormat, name: str = "tensor", out: Quantized | None = None) -> Quantized:
    """Quantizes by each group's minimum and maximum.

    Args:
        x: floating point, at least one dimension; is worked on in float32.
        fmt: width and group size.
        name: what `x` is, for error messages.
        out: where to put the result, as `empty` makes it; a new one by default.

    Raises:
        QuantizationError: an element is not finite or beyond 65504 in magnitude (`out` is undefined then); `x` has no
            dimension or is not floating point; `out` is for another shape or format.
    """
    out = room_for(x, fmt, name, out)
    for part, (codes, scales, minima) in row_chunks(x, out, name):
        groups = groups_of(part, fmt)
        scale, minimum = bounds(groups, fmt)
        codes.copy_(pack(encode(groups, scale, minimum, fmt), fmt).view(codes.shape))
        scales.copy_(scale)
        minima.copy_(minimum)
    return out


def room_for(x: Tensor, fmt: GroupFormat, name: str, out: Quantized | None) -> Quantized:
    """`out`, or room for `x`, after all checks of `quantize` but that of the elements.

    Raises:
        QuantizationError: see `quantize`.
    """
    if x.dim() == 0 or not x.is_floating_point():
        raise QuantizationError(
            f"{name} has {x.dim()} dimensions and dtype {x.dtype}; only floating-point tensors with rows are quantized"
        )
    if out is None:
        return empty(x.shape, fmt, x.device)
    if out.shape != tuple(x.shape):
        raise QuantizationError(f"{name} has the shape {tuple(x.shape)}, the room for it {out.shape}; make them equal")
    check_parts(out, fmt)
    return out


def check_parts(q: Quantized, fmt: GroupFormat) -> None:
    """Refuses parts that are not those of a tensor of `q.shape`: kernels would read or write beyond them.

    Raises:
        QuantizationError: names the part.
    """
    groups = fmt.groups(q.shape)
    expected = {"codes": (fmt.packed_shape(q.shape), torch.uint8)}
    expected |= {"scales": (groups, GROUP_DTYPE), "minima": (groups, GROUP_DTYPE)}
    for name, (shape, dtype) in expected.items():
        part: Tensor = getattr(q, name)
        if tuple(part.shape) != shape or part.dtype != dtype:
            raise QuantizationError(
                f"{name} of a tensor of shape {q.shape} in {fmt.bits} bits, groups of {fmt.group_size}, have the shape "
                f"{shape} and {dtype}, not {tuple(part.shape)} and {part.dtype}; use the format that made them"
            )


def dequantize(q: Quantized, fmt: GroupFormat, dtype: torch.dtype = torch.float32, out: Tensor | None = None) -> Tensor:
    """The tensor that `q` stands for.

    Args:
        q: what `quantize` made with the same format.
        fmt: width and group size.
        dtype: float32, bfloat16 or float16; that of `out` if it is given.
        out: where to put the result, of `q.shape`; a new tensor by default.

    Raises:
        QuantizationError: `q` is of another format, or `out` of another shape.
    """
    out = target_for(q, fmt, dtype, out)
    codes, scales, minima = as_rows(q.codes), as_rows(q.scales), as_rows(q.minima)
    target = as_rows(out)
    for at in _row_slices(target.shape):
        values = unpack(torch.unflatten(codes[at], 1, (-1, fmt.group_nbytes)), fmt).float()
        values = values.mul_(scales[at, :, None].float()).add_(minima[at, :, None].float())
        target[at] = values.flatten(1)[:, : target.shape[1]]
    return out if out.is_contiguous() else out.copy_(target.view(out.shape))


def target_for(q: Quantized, fmt: GroupFormat, dtype: torch.dtype, out: Tensor | None) -> Tensor:
    """`out`, or a new tensor, after all checks of `dequantize`.

    Raises:
        QuantizationError: see `dequantize`.
    """
    check_parts(q, fmt)
    if out is None:
        return torch.empty(q.shape, dtype=dtype, device=q.codes.device)
    if tuple(out.shape) != q.shape:
        raise QuantizationError(f"a tensor of shape {q.shape} does not fit one of {tuple(out.shape)}; make them equal")
    return out


def row_chunks(x: Tensor, out: Quantized, name: str) -> Iterator[tuple[Tensor, tuple[Tensor, Tensor, Tensor]]]:
    """Parts of `x` that are small enough for float32 copies, and where their codes, scales and minima go.

    Each part is float32 of shape (rows, length), checked. Copies of the parts of `out` that are not contiguous are
    copied back at the end.

    Raises:
        QuantizationError: an element is out of range.
    """
    source = as_rows(x)
    codes, scales, minima = as_rows(out.codes), as_rows(out.scales), as_rows(out.minima)
    for at in _row_slices(source.shape):
        part = source[at].float()
        check_range(part, name, x.shape, at.start)
        yield part, (codes[at], scales[at], minima[at])
    for original, target in ((out.codes, codes), (out.scales, scales), (out.minima, minima)):
        if not original.is_contiguous():
            original.copy_(target.view(original.shape))


def as_rows(x: Tensor) -> Tensor:
    """A tensor of any dimensions as one of two, (rows, length): a view where it is contiguous, else a copy."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def check_range(part: Tensor, name: str, shape: Sequence[int], first_row: int) -> None:
    """Refuses elements that scales and minima of 16 bits cannot hold.

    Args:
        part: float32, shape (rows, length): rows `first_row` and following of a tensor.
        name: what the tensor is.
        shape: of the tensor.
        first_row: see `part`.

    Raises:
        QuantizationError: names the tensor and the first such element.
    """
    fits = part.abs() <= LARGEST  # false for NaN
    if bool(fits.all()):
        return
    row, column = torch.nonzero(~fits)[0].tolist()
    index: list[int] = []
    flat = (first_row + row) * shape[-1] + column
    for size in reversed(shape):
        index.insert(0, flat % size)
        flat //= size
    value = float(part[row, column])
    raise QuantizationError(
        f"{name}[{', '.join(map(str, index))}] is {value:g}; quantized tensors hold finite values of at most "
        f"{LARGEST:g} in magnitude, so keep this one uncompressed"
    )


def groups_of(part: Tensor, fmt: GroupFormat) -> Tensor:
    """Rows cut into groups: (rows, length) becomes (rows, groups, group_size), padded with each row's last element."""
    rows, length = part.shape
    groups = fmt.groups((length,))[0]
    missing = groups * fmt.group_size - length
    if missing:
        part = torch.cat([part, part[:, -1:].expand(rows, missing)], dim=1)
    return part.reshape(rows, groups, fmt.group_size)


def bounds(groups: Tensor, fmt: GroupFormat) -> tuple[Tensor, Tensor]:
    """Scale and minimum of each group, float16, by its smallest and largest element.

    Args:
        groups: float32, shape (..., group_size).
        fmt: width and group size.
    """
    smallest, largest = groups.amin(-1), groups.amax(-1)
    minimum = _round_down(smallest)
    width = largest - minimum.float() + 0.0  # never -0
    scale = (width / fmt.top).to(GROUP_DTYPE)
    is_short = scale.float() * fmt.top < width
    # the bits of positive float16 numbers count them in order
    return (scale.view(torch.int16) + is_short.to(torch.int16)).view(GROUP_DTYPE), minimum


def _round_down(x: Tensor) -> Tensor:
    """The largest float16 that is not above `x`; zero is +0."""
    near = x.to(GROUP_DTYPE)
    bits = torch.where(near == 0, 0, near.view(torch.int16))
    below = torch.where(bits > 0, bits - 1, torch.where(bits == 0, -0x7FFF, bits + 1))
    return torch.where(near.float() > x, below, bits).view(GROUP_DTYPE)


def encode(groups: Tensor, scale: Tensor, minimum: Tensor, fmt: GroupFormat) -> Tensor:
    """Codes, uint8, of the shape of `groups`, under given scales and minima of one dimension less."""
    divisor = torch.where(scale == 0, 1, scale).float()
    steps = (groups - minimum.float()[..., None]).div_(divisor[..., None])
    return steps.round_().clamp_(0, fmt.top).to(torch.uint8)


def pack(codes: Tensor, fmt: GroupFormat) -> Tensor:
    """Codes of shape (..., group_size) as bytes of shape (..., group_nbytes)."""
    planes, shift = [], 0
    for width in fmt.planes:
        parts = torch.unflatten((codes >> shift) & (2**width - 1), -1, (8 // width, -1))
        plane = parts[..., 0, :].clone()
        for k in range(1, 8 // width):
            plane |= parts[..., k, :] << (width * k)
        planes.append(plane)
        shift += width
    return torch.cat(planes, dim=-1)


def unpack(packed: Tensor, fmt: GroupFormat) -> Tensor:
    """What `pack` packed: bytes of shape (..., group_nbytes) as codes of shape (..., group_size)."""
    codes = torch.zeros((*packed.shape[:-1], fmt.group_size), dtype=torch.uint8, device=packed.device)
    first, shift = 0, 0
    for width in fmt.planes:
        nbytes = fmt.group_size * width // 8
        plane = packed[..., first : first + nbytes]
        parts = torch.unflatten(codes, -1, (8 // width, nbytes))
        for k in range(8 // width):
            parts[..., k, :] |= ((plane >> (width * k)) & (2**width - 1)) << shift
        first, shift = first + nbytes, shift + width
    return codes


def _row_slices(shape: Sequence[int]) -> Iterator[slice]:
    count, length = shape
    step = max(1, _CHUNK_ELEMENTS // max(length, 1))
    for start in range(0, count if length else 0, step):
        yield slice(start, min(start + step, count))
