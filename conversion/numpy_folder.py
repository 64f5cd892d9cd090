"""The original FlexGen's `NAME-np` folders: for each tensor a file in `.npy` format that bears the tensor's name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from flexgen_hf.checkpoint_files import CheckpointTensor
from flexgen_hf.errors import StoreError
from flexgen_hf.weights.format import TensorExtent

from .opt_shapes import config_of, transformers_name

__all__ = ["is_numpy_folder", "read"]

_MAGIC = b"\x93NUMPY"
_TYPES = {"<f2": "F16", "<f4": "F32", "<f8": "F64"}


def is_numpy_folder(folder: Path) -> bool:
    """Whether a folder is one of these."""
    return not (folder / "config.json").exists() and (folder / "decoder.embed_tokens.weight").is_file()


def read(folder: Path, config: Any = None) -> tuple[Any, dict[str, CheckpointTensor], list[Path]]:
    """Finds the tensors of a folder; reads the files' headers only.

    Args:
        folder: the folder.
        config: the model's configuration; without it, it is told from the tensors' shapes.

    Returns:
        Configuration, tensors by transformers' names, and the files.

    Raises:
        StoreError: a file is broken or of a type that weights do not have.
        ConversionError: the configuration cannot be told.
    """
    files = [path for path in sorted(folder.iterdir()) if path.is_file() and _begins_as_npy(path)]
    found = {transformers_name(path.name): CheckpointTensor.of_extent(_extent(path)) for path in files}
    if config is None:
        config = config_of({name: tensor.shape for name, tensor in found.items()})
    return config, found, files


def _begins_as_npy(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(_MAGIC)) == _MAGIC


def _extent(path: Path) -> TensorExtent:
    """Where a file's elements lie. numpy maps the file for us; an array of Python objects would be refused."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise StoreError(f"cannot read {path}: {error}; copy the folder again") from error
    if array.dtype.str not in _TYPES or not isinstance(array, np.memmap) or not array.flags.c_contiguous:
        raise StoreError(f"{path} holds {array.dtype} elements; weights are little-endian float16, float32 or float64")
    return TensorExtent(path, int(array.offset), int(array.nbytes), _TYPES[array.dtype.str], tuple(array.shape))
