"""Tensors in a GGUF file, under the names and in the form that transformers gives them.

The file is mapped, and each tensor is dequantized when it is asked for, alone: transformers' own reader would put all
of them into memory. Which tensor of the file becomes which of the model, and in which order of rows, is transformers'.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import logging
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .checkpoint_files import CheckpointTensor, first_line
from .errors import StoreError, UnsupportedModelError

__all__ = ["float_type", "index_gguf", "is_gguf", "refuse_missing_reader"]

_logger = logging.getLogger(__name__)

# What a file can hold that no model of transformers takes from it: factors of the rotary embedding, which transformers
# computes from the configuration.
_NO_WEIGHTS = ("rope_freqs.", "rope_factors_")

_BROKEN = (ValueError, IndexError, KeyError, OSError, UnicodeDecodeError, OverflowError)


def is_gguf(files: Sequence[Path | str]) -> bool:
    """Whether a checkpoint's files are one GGUF file."""
    return len(files) == 1 and Path(files[0]).suffix == ".gguf"


def refuse_missing_reader() -> None:
    """Raises `StoreError` where the package that reads GGUF files is not installed."""
    if importlib.util.find_spec("gguf") is None:
        raise StoreError(
            "GGUF files are read with the package gguf, which is not installed: pip install 'flexgen_hf[gguf]'"
        )


def float_type(file: Path) -> torch.dtype | None:
    """The type in which a file holds its weights; `None` if some of them are quantized.

    Raises:
        StoreError: it is no GGUF file, or a broken one.
    """
    from gguf import GGMLQuantizationType as Kind

    kinds = {tensor.tensor_type for tensor in _reader(file).tensors}
    for kind, dtype in ((Kind.BF16, torch.bfloat16), (Kind.F16, torch.float16), (Kind.F32, torch.float32)):
        if kind in kinds and kinds <= {Kind.BF16, Kind.F16, Kind.F32}:
            return dtype  # norms are in F32 whatever the matrices are in
    return None


def index_gguf(model: Any, file: Path) -> dict[str, CheckpointTensor]:
    """The tensors of a GGUF file under the names that the model has for them; reads the file's header.

    Args:
        model: the model on `meta`.
        file: the file.

    Returns:
        State-dict name to tensor; each gives float32.

    Raises:
        StoreError: the file is broken, or the package that reads it is missing.
        UnsupportedModelError: transformers knows no mapping for the architecture, or `gguf` no type of a tensor.
    """
    refuse_missing_reader()
    reader = _reader(file)
    if (parts := _field(file, "split.count") or 1) > 1:
        raise UnsupportedModelError(
            f"{file} is one of {parts} parts, which transformers does not read; join them with llama-gguf-split --merge"
        )
    rules = _Rules.of(model, file)
    sources: dict[str, list[Any]] = defaultdict(list)
    strange = []
    for tensor in reader.tensors:
        name = rules.names.get(tensor.name) or rules.names.get(tensor.name.removesuffix(".weight"))
        if name is not None:
            sources[name].append(tensor)
        elif not any(part in tensor.name for part in _NO_WEIGHTS):
            strange.append(tensor.name)
    if strange:
        _logger.warning("%s has no use for %d tensors: %s", type(model).__name__, len(strange), ", ".join(strange[:8]))
    _refuse_unknown_types(file, [tensor for group in sources.values() for tensor in group])
    state = model.state_dict()
    return {
        name: CheckpointTensor(
            _shape(group, state.get(name)), torch.float32, functools.partial(rules.make, name, tuple(group))
        )
        for name, group in sources.items()
    }


@dataclasses.dataclass(frozen=True)
class _Rules:
    """How transformers makes the tensors of a model from those of a file: names, and a processor for the values."""

    names: Mapping[str, str]
    processor: Any
    file: Path

    @classmethod
    def of(cls, model: Any, file: Path) -> _Rules:
        from transformers import modeling_gguf_pytorch_utils as theirs

        try:
            content = theirs.load_gguf_checkpoint(str(file))  # type: ignore[no-untyped-call]  # its configuration
            architecture = _field(file, "general.architecture")
            processor: Any = theirs.TENSOR_PROCESSORS.get(architecture, theirs.TensorProcessor)
            made = processor(config=content["config"])
            return cls(theirs.get_gguf_hf_weights_map(model, made), made, file)
        except (ValueError, NotImplementedError) as error:
            raise UnsupportedModelError(
                f"transformers cannot map the tensors of {file} to {type(model).__name__} ({first_line(error)}); take "
                "the model's safetensors checkpoint"
            ) from error

    def make(self, name: str, tensors: Sequence[Any]) -> torch.Tensor:
        """One tensor of the model from those of the file that it is made of."""
        import numpy as np
        from gguf import dequantize

        made: dict[str, dict[str, torch.Tensor]] = {"tensors": {}}
        for tensor in tensors:
            values = dequantize(tensor.data, tensor.tensor_type)
            result = self.processor.process(
                weights=values, name=tensor.name, tensor_key_mapping=self.names, parsed_parameters=made
            )
            if result.name is not None:  # else the processor has put it there itself
                made["tensors"][name] = torch.from_numpy(np.copy(result.weights))
        if name not in made["tensors"]:
            raise StoreError(
                f"{self.file}: {', '.join(t.name for t in tensors)} did not become {name!r}; take the model's "
                "safetensors checkpoint"
            )
        return made["tensors"][name]


def _reader(file: Path) -> Any:
    status = file.stat() if file.is_file() else None
    if status is None:
        raise StoreError(f"{file} is not there; check the name of the GGUF file")
    return _parsed(file, status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=1)  # reading the vocabulary takes seconds
def _parsed(file: Path, _size: int, _changed: int) -> Any:
    from gguf import GGUFReader

    try:
        return GGUFReader(file)
    except _BROKEN as error:
        raise StoreError(f"{file} is no GGUF file, or a broken one ({first_line(error)}); download it again") from error


def _field(file: Path, key: str) -> Any:
    field = _reader(file).get_field(key)
    return field.contents() if field is not None else None


def _shape(tensors: Sequence[Any], wanted: torch.Tensor | None) -> tuple[int, ...]:
    """That of the model's tensor, if the file's have as many elements; else the first one's, which is then refused."""
    count = sum(int(tensor.n_elements) for tensor in tensors)
    if wanted is not None and count == math.prod(wanted.shape):
        return tuple(wanted.shape)
    return tuple(int(size) for size in reversed(tensors[0].shape.tolist()))


def _refuse_unknown_types(file: Path, tensors: Sequence[Any]) -> None:
    """Tries one row of each type, before anything is written."""
    from gguf import dequantize

    for kind, tensor in {tensor.tensor_type: tensor for tensor in tensors}.items():
        try:
            dequantize(tensor.data.reshape(-1, tensor.data.shape[-1])[:1], kind)
        except NotImplementedError as error:
            raise UnsupportedModelError(
                f"{file} holds tensors of type {kind.name}, which the package gguf cannot dequantize; take a file of "
                "another type, or the model's safetensors checkpoint"
            ) from error
