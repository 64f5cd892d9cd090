"""Tensors as a stream of pieces, so that one larger than memory can be cast, hashed and compared.

Knows bytes and element types; knows no names and no formats' headers.
"""

from __future__ import annotations

import io
from collections.abc import Iterator

import torch

from ..errors import StoreError
from .format import TensorExtent, element_bytes

__all__ = ["PIECE_BYTES", "dtype_name", "pieces_of_extent", "pieces_of_tensor", "read_extent", "torch_dtype"]

PIECE_BYTES = 8 << 20

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def torch_dtype(name: str) -> torch.dtype:
    """The torch type of a safetensors dtype name.

    Raises:
        StoreError: torch has no such type.
    """
    try:
        return _DTYPES[name]
    except KeyError:
        raise StoreError(
            f"tensor type {name!r} is not one that torch can hold; convert the checkpoint to 16 bit"
        ) from None


def dtype_name(dtype: torch.dtype) -> str:
    """The safetensors name of a torch type.

    Raises:
        StoreError: safetensors has no such type.
    """
    try:
        return _NAMES[dtype]
    except KeyError:
        raise StoreError(f"{dtype} cannot be written to safetensors; cast the tensor to 16 bit first") from None


def pieces_of_extent(extent: TensorExtent, unit: int = 1) -> Iterator[torch.Tensor]:
    """The elements of a tensor in a file, as flat pieces of at most `PIECE_BYTES`.

    All pieces are views of one buffer: the next one overwrites the last.

    Args:
        extent: where they are.
        unit: so many elements stay together (a row, say), in a larger piece if they must.

    Raises:
        StoreError: the file ends before the tensor does, or cannot be read.
    """
    dtype = torch_dtype(extent.dtype)
    whole = unit * element_bytes(extent.dtype)
    size = max(1, PIECE_BYTES // whole) * whole
    buffer = bytearray(min(size, extent.nbytes))
    done = 0
    try:
        with extent.file.open("rb", buffering=0) as file:
            file.seek(extent.offset)
            while done < extent.nbytes:
                wanted = memoryview(buffer)[: min(size, extent.nbytes - done)]
                _read_fully(file, wanted, extent)
                yield torch.frombuffer(buffer, dtype=torch.uint8)[: len(wanted)].view(dtype)
                done += len(wanted)
    except OSError as error:
        if isinstance(error, StoreError):
            raise
        raise StoreError(f"cannot read {extent.file}: {error.strerror or error}; restore the file") from error


def pieces_of_tensor(tensor: torch.Tensor, unit: int = 1) -> Iterator[torch.Tensor]:
    """The elements of a tensor in memory, as flat views of at most `PIECE_BYTES`; `unit` as above."""
    flat = tensor.detach().reshape(-1)
    step = max(1, PIECE_BYTES // (flat.element_size() * unit)) * unit
    for start in range(0, flat.numel(), step):
        yield flat[start : start + step]


def read_extent(extent: TensorExtent) -> torch.Tensor:
    """A whole tensor from a file, in memory of its own.

    Raises:
        StoreError: as `pieces_of_extent`.
    """
    tensor = torch.empty(extent.shape, dtype=torch_dtype(extent.dtype))
    flat, at = tensor.reshape(-1), 0
    for piece in pieces_of_extent(extent):
        flat[at : at + piece.numel()] = piece
        at += piece.numel()
    return tensor


def _read_fully(file: io.FileIO, wanted: memoryview, extent: TensorExtent) -> None:
    got = 0
    while got < len(wanted):
        count = file.readinto(wanted[got:])
        if not count:
            raise StoreError(
                f"{extent.file} has {file.tell()} bytes but a tensor in it ends at byte "
                f"{extent.offset + extent.nbytes}; download or convert it again"
            )
        got += count
