"""Quantized tensors of a store: which there are, where their parts lie, and how they are made from elements.

Knows the manifest's `quantization` and names of tensors; knows no models. What the bytes mean is `quantization`'s.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import PolicyError, StoreError
from ..quantization import dispatch, groupwise
from ..quantization.dispatch import METHODS, Method
from ..quantization.groupwise import GROUP_DTYPE, GroupFormat, Quantized
from .format import MANIFEST_NAME, Manifest, TensorExtent
from .pieces import dtype_name, read_extent

__all__ = [
    "LAYOUT_VERSION",
    "Method",
    "Quantization",
    "QuantizedExtent",
    "Quantizing",
    "byte_pieces",
    "part_names",
    "rows_of",
]

LAYOUT_VERSION = 1


@dataclasses.dataclass(frozen=True)
class Quantizing:
    """How a tensor is to be quantized.

    Args:
        format: width and group size.
        method: `"search"` (see `quantization.search`) takes longer than `"minmax"` and errs less.

    Raises:
        PolicyError: no such method.
    """

    format: GroupFormat
    method: Method = "search"

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise PolicyError(f"method={self.method!r} does not exist; use {' or '.join(map(repr, METHODS))}")

    def parts(self, name: str, shape: tuple[int, ...]) -> list[tuple[str, str, tuple[int, ...]]]:
        """Name, safetensors dtype and shape of each part of a quantized tensor, in the order in which they lie."""
        scales, minima, codes = part_names(name)
        groups, half = self.format.groups(shape), dtype_name(GROUP_DTYPE)
        return [(scales, half, groups), (minima, half, groups), (codes, "U8", self.format.packed_shape(shape))]

    def run(self, name: str, rows: int, chunks: Iterable[torch.Tensor]) -> Quantized:
        """Quantizes a tensor that comes in parts.

        Args:
            name: for error messages.
            rows: in all.
            chunks: parts of shape (rows, length), in order; each is used up before the next is asked for.

        Returns:
            Parts of shape (rows, ...).

        Raises:
            QuantizationError: an element is not finite or too large.
        """
        done, whole = 0, None
        for chunk in chunks:
            if whole is None:
                whole = groupwise.empty((rows, chunk.shape[1]), self.format)
            part = rows_of(whole, done, done + chunk.shape[0])
            dispatch.quantize(chunk, self.format, name, self.method, part, torch.get_num_threads())
            done += chunk.shape[0]
        return whole if whole is not None else groupwise.empty((rows, 0), self.format)


@dataclasses.dataclass(frozen=True)
class QuantizedExtent:
    """Where the parts of a quantized tensor lie.

    Args:
        format: width and group size.
        shape: of the tensor that was quantized.
        codes: its part in the file, as `scales` and `minima`.
    """

    format: GroupFormat
    shape: tuple[int, ...]
    codes: TensorExtent
    scales: TensorExtent
    minima: TensorExtent

    @property
    def file(self) -> Path:
        """The shard."""
        return self.codes.file

    @property
    def offset(self) -> int:
        """Where its first part begins."""
        return min(part.offset for part in self.parts)

    @property
    def parts(self) -> tuple[TensorExtent, TensorExtent, TensorExtent]:
        """Codes, scales, minima."""
        return self.codes, self.scales, self.minima

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.nbytes for part in self.parts)

    @property
    def rows(self) -> int:
        """Rows of the tensor, those of all its leading dimensions."""
        return functools.reduce(int.__mul__, self.shape[:-1], 1)

    def row_bytes(self, part: TensorExtent) -> int:
        """Bytes of a row of a part."""
        return part.nbytes // max(1, self.rows)

    def read(self) -> Quantized:
        """The parts, in memory."""
        return Quantized(read_extent(self.codes), read_extent(self.scales), read_extent(self.minima), self.shape)

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """The tensor, in memory."""
        return dispatch.dequantize(self.read(), self.format, dtype, threads=torch.get_num_threads())


@dataclasses.dataclass(frozen=True)
class Quantization:
    """What a manifest says about quantized tensors.

    Args:
        method: how scales and minima were found.
        tensors: format and shape of each.
    """

    method: Method
    tensors: Mapping[str, tuple[GroupFormat, tuple[int, ...]]]

    @classmethod
    def of(cls, manifest: Manifest, folder: str | Path) -> Quantization | None:
        """Reads and checks what a store's manifest says; `None` if nothing is quantized.

        Raises:
            StoreError: another layout version, a width that does not exist, or something that is not understood.
        """
        fields, path = manifest.quantization, Path(folder) / MANIFEST_NAME
        if fields is None:
            return None
        version = fields.get("layout_version")
        if version != LAYOUT_VERSION:
            raise StoreError(
                f"{path} has quantized tensors of layout version {version!r}, this program reads version "
                f"{LAYOUT_VERSION}; upgrade flexgen_hf, or convert the model again with this one"
            )
        method, tensors = fields.get("method"), fields.get("tensors")
        if method not in METHODS or not isinstance(tensors, dict):
            raise StoreError(f"{path} has a quantization of method {method!r}, which is unknown, or without tensors; "
                             "convert the model again")  # fmt: skip
        return cls(method, {name: _entry(path, name, entry) for name, entry in tensors.items()})

    @classmethod
    def planned(cls, tensors: Mapping[str, tuple[Quantizing, tuple[int, ...]]]) -> Quantization | None:
        """What the manifest of a store will say; `None` if nothing is quantized."""
        if not tensors:
            return None
        (method,) = {quantizing.method for quantizing, _ in tensors.values()}
        return cls(method, {name: (quantizing.format, shape) for name, (quantizing, shape) in tensors.items()})

    def to_dict(self) -> dict[str, Any]:
        """The manifest's JSON values."""
        return {
            "layout_version": LAYOUT_VERSION,
            "method": self.method,
            "tensors": {
                name: {"bits": fmt.bits, "group_size": fmt.group_size, "shape": list(shape)}
                for name, (fmt, shape) in self.tensors.items()
            },
        }

    def formats(self) -> dict[str, GroupFormat]:
        """Width and group size of each quantized tensor."""
        return {name: fmt for name, (fmt, _) in self.tensors.items()}

    def join(self, folder: Path, extents: Mapping[str, TensorExtent]) -> dict[str, QuantizedExtent]:
        """Finds the parts of every quantized tensor among a store's tensors.

        Raises:
            StoreError: a part is missing or has another type or shape; it is named.
        """
        found = {}
        for name, (fmt, shape) in self.tensors.items():
            for part, dtype, expected in Quantizing(fmt).parts(name, shape):
                extent = extents.get(part)
                if extent is None:
                    raise StoreError(f"{folder} lacks {part!r}, a part of a quantized tensor; convert the model again")
                if (extent.dtype, extent.shape) != (dtype, expected):
                    raise StoreError(
                        f"{part!r} in {extent.file} is {extent.dtype} {list(extent.shape)}, but in {fmt.bits} bits and "
                        f"groups of {fmt.group_size} it is {dtype} {list(expected)}; convert the model again"
                    )
            scales, minima, codes = part_names(name)
            found[name] = QuantizedExtent(fmt, shape, extents[codes], extents[scales], extents[minima])
        return found


def part_names(name: str) -> tuple[str, str, str]:
    """Names of scales, minima and codes of a quantized tensor."""
    return f"{name}.scales", f"{name}.minima", name


def rows_of(q: Quantized, first: int, last: int) -> Quantized:
    """Rows `first` to before `last` of a quantized tensor of two dimensions, without a copy."""
    return Quantized(q.codes[first:last], q.scales[first:last], q.minima[first:last], (last - first, *q.shape[1:]))


def _entry(path: Path, name: str, entry: Any) -> tuple[GroupFormat, tuple[int, ...]]:
    try:
        bits, size, shape = (entry[field] for field in ("bits", "group_size", "shape"))
        if not shape or any(type(length) is not int or length < 1 for length in shape):
            raise TypeError(f"its shape is {shape!r}")
        return GroupFormat(bits, size), tuple(shape)
    except (PolicyError, TypeError, KeyError) as error:
        raise StoreError(f"{path}: the quantized tensor {name!r} cannot be read ({error}); convert again") from error


def byte_pieces(parts: Iterable[torch.Tensor], nbytes: int) -> Iterator[torch.Tensor]:
    """The bytes of contiguous tensors, in pieces."""
    for part in parts:
        yield from torch.split(part.reshape(-1).view(torch.uint8), nbytes)
