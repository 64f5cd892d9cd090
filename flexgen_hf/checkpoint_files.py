"""Tensors in the files of a checkpoint, under the names that they have there.

Knows safetensors, pickles and the parts of quantized tensors in a store; knows no models. Nothing here executes what a
file contains: pickles are read with `weights_only=True`.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
import pickle
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .errors import StoreError
from .storage.ledger import gib
from .weights.format import Manifest, TensorExtent, is_store, read_header
from .weights.pieces import pieces_of_extent, pieces_of_tensor, read_extent, torch_dtype
from .weights.quantized import Quantization, QuantizedExtent, part_names
from .weights.stacked import StackedExtent

__all__ = ["CheckpointTensor", "first_line", "index_files", "load_pickle", "source_fingerprint", "stores_of"]

_logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class CheckpointTensor:
    """A tensor of a checkpoint and how to get it.

    Args:
        shape: its sizes.
        dtype: its element type as `load` gives it; for an extent, the type in the file.
        load: gives the whole tensor, each time anew.
        extent: its bytes in a file, where they lie there as they are; else `None` (pickles, fused tensors).
        quantized: its parts in a store's shard, if it is quantized there; `load` then dequantizes it.
        stacked: its matrices in files, if they lie there as they are, though apart.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], torch.Tensor]
    extent: TensorExtent | None = None
    quantized: QuantizedExtent | None = None
    stacked: StackedExtent | None = None

    @classmethod
    def of_stored(cls, extent: TensorExtent | QuantizedExtent | StackedExtent, dtype: torch.dtype) -> CheckpointTensor:
        """A tensor that lies in files as it is, or quantized; then `load` gives it as `dtype`."""
        if isinstance(extent, TensorExtent):
            return cls.of_extent(extent)
        if isinstance(extent, StackedExtent):
            return cls(extent.shape, torch_dtype(extent.dtype), extent.read, stacked=extent)
        return cls(extent.shape, dtype, functools.partial(extent.dequantize, dtype), quantized=extent)

    @classmethod
    def of_extent(cls, extent: TensorExtent) -> CheckpointTensor:
        """A tensor that lies in a file as it is."""
        return cls(extent.shape, torch_dtype(extent.dtype), functools.partial(read_extent, extent), extent)

    @classmethod
    def of_tensor(cls, tensor: torch.Tensor) -> CheckpointTensor:
        """A tensor that is in memory, or mapped there."""
        return cls(tuple(tensor.shape), tensor.dtype, tensor.detach)

    def pieces(self) -> Iterator[torch.Tensor]:
        """The elements, as flat pieces; each is valid until the next is asked for."""
        return pieces_of_extent(self.extent) if self.extent is not None else pieces_of_tensor(self.load())


def source_fingerprint(files: Iterable[Path]) -> str:
    """A hash of the files' names, sizes and times of change. The Hub's files are named by the hash of their content."""
    described = []
    for file in sorted(Path(file).resolve() for file in files):
        status = file.stat()
        described.append([file.name, status.st_size, status.st_mtime_ns])
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()


def stores_of(files: Iterable[Path]) -> list[Path]:
    """The folders of the stores whose shards are among a checkpoint's files."""
    folders = dict.fromkeys(file.parent.parent for file in files if file.parent.name == "shards")
    return [folder for folder in folders if is_store(folder)]


def index_files(files: Sequence[Path]) -> dict[str, CheckpointTensor]:
    """The tensors of a checkpoint's files under the names they have there; the parts of a quantized one as one.

    Raises:
        StoreError: a file is missing, broken, or a pickle that holds more than tensors.
    """
    found: dict[str, CheckpointTensor] = {}
    for file in map(Path, files):
        if file.suffix == ".safetensors":
            found.update((name, CheckpointTensor.of_extent(extent)) for name, extent in read_header(file).items())
        else:
            found.update(_index_pickle(file))
    for folder in stores_of(map(Path, files)):
        _join_quantized(folder, found)
    return found


def _join_quantized(folder: Path, found: dict[str, CheckpointTensor]) -> None:
    manifest = Manifest.load(folder)
    quantization = Quantization.of(manifest, folder)
    if quantization is None:
        return
    extents = {name: tensor.extent for name, tensor in found.items() if tensor.extent is not None}
    dtype = getattr(torch, manifest.dtype, torch.float32)
    for name, extent in quantization.join(folder, extents).items():
        for part in part_names(name):
            del found[part]
        found[name] = CheckpointTensor.of_stored(extent, dtype)


def load_pickle(path: Path) -> Any:
    """What `torch.save` wrote, with tensors left in the file where the format allows; executes nothing.

    Raises:
        StoreError: the file is missing or broken, or holds something that would have to be executed.
    """
    mapped = zipfile.is_zipfile(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise StoreError(
            f"{path} is not a plain file of tensors, and nothing in it was executed ({first_line(error)}); "
            "take the checkpoint's safetensors files, or save it anew from a program that you trust"
        ) from error
    except (RuntimeError, OSError, EOFError, ValueError, KeyError, AttributeError) as error:
        raise StoreError(f"cannot read {path}: {first_line(error)}; download it again") from error


def _index_pickle(path: Path) -> dict[str, CheckpointTensor]:
    loaded = load_pickle(path)
    if not isinstance(loaded, Mapping) or not all(isinstance(value, torch.Tensor) for value in loaded.values()):
        raise StoreError(f"{path} holds no dictionary of tensors; it is not a checkpoint of a transformers model")
    if zipfile.is_zipfile(path):
        return {name: CheckpointTensor.of_tensor(tensor) for name, tensor in loaded.items()}
    _logger.warning(
        "%s has the format that torch used before 1.6, which can only be read whole: its %s must fit in memory",
        path, gib(path.stat().st_size),
    )  # fmt: skip
    return {
        name: CheckpointTensor(tuple(tensor.shape), tensor.dtype, functools.partial(_from_legacy, path, name))
        for name, tensor in loaded.items()
    }


def _from_legacy(path: Path, name: str) -> torch.Tensor:
    tensor: torch.Tensor = _legacy_file(path)[name].detach()
    return tensor


@functools.lru_cache(maxsize=1)  # one file in memory, however many are read in turn
def _legacy_file(path: Path) -> Any:
    return load_pickle(path)


def first_line(error: BaseException) -> str:
    """What an error of another library says, short enough to be a part of one of ours."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
