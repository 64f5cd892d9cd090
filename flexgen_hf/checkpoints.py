"""Where each tensor of a model lies in a checkpoint's files, found with transformers' own renaming rules.

Knows files, names and transformers' conversion mappings; knows nothing of tiers, policies and running models. Nothing
here executes what a checkpoint contains: pickles are read with `weights_only=True`.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
import pickle
import re
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch

from .architectures import Structure
from .compression import weight_formats
from .errors import StoreError, UnsupportedModelError
from .policy import Compression
from .storage.ledger import gib
from .weights.format import Manifest, TensorExtent, is_store, read_header
from .weights.pieces import pieces_of_extent, pieces_of_tensor, read_extent, torch_dtype
from .weights.quantized import Method, Quantization, QuantizedExtent, Quantizing, part_names
from .weights.stacked import StackedExtent, find_stacked
from .weights.writer import ShardPlan, TensorPlan

__all__ = [
    "CheckpointTensor",
    "index_files",
    "load_pickle",
    "match",
    "plan_shards",
    "planned_quantizing",
    "read_checkpoint",
    "refuse_quantized",
    "source_fingerprint",
    "stores_of",
    "target_dtype",
]

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

    def pieces(self) -> Iterator[torch.Tensor]:
        """The elements, as flat pieces; each is valid until the next is asked for."""
        return pieces_of_extent(self.extent) if self.extent is not None else pieces_of_tensor(self.load())


def read_checkpoint(
    model: torch.nn.Module, files: Sequence[Path], dtype: torch.dtype | None = None
) -> dict[str, CheckpointTensor]:
    """Finds every tensor of a model in a checkpoint's files; reads headers, no data.

    Args:
        model: the model on `meta`.
        files: all `.safetensors` or all `.bin` files of the checkpoint.
        dtype: the type to which tensors that must be fused are cast first, as transformers does; `None` keeps theirs.

    Returns:
        State-dict name to tensor, each tied tensor once, under the name of its source.

    Raises:
        StoreError: a file is missing, broken or refused; a tensor is missing or has another shape.
        UnsupportedModelError: the checkpoint is quantized by another method.
    """
    refuse_quantized(model.config)
    return match(model, index_files(files), dtype)


def refuse_quantized(config: Any) -> None:
    """Raises `UnsupportedModelError` for a configuration of a checkpoint quantized by a method that is not ours."""
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return
    method = settings.get("quant_method") if isinstance(settings, Mapping) else getattr(settings, "quant_method", None)
    method = getattr(method, "value", method)
    if method != "flexgen":
        raise UnsupportedModelError(
            f"the checkpoint is quantized with {method or 'an unnamed method'}; its weights cannot be streamed. Take "
            "the model's 16-bit checkpoint, and compression='4bit' if it should be small"
        )


def target_dtype(model: Any, name: str, dtype: torch.dtype) -> torch.dtype:
    """The type in which transformers would hold tensor `name` of a model loaded as `dtype`.

    Integer buffers keep their type, and so do parameters that the model's code makes or keeps in fp32.

    Args:
        model: the model on `meta`, built with `dtype`.
        name: a state-dict name.
        dtype: what the model is loaded as.
    """
    from transformers.core_model_loading import build_glob_alternation

    if plan := model._get_dtype_plan(dtype):
        pattern, by_group, _ = build_glob_alternation(list(plan))
        if (found := pattern.search(name)) is not None:
            wanted: torch.dtype = plan[by_group[str(found.lastgroup)]]
            return wanted
    own: torch.dtype = model.get_parameter_or_buffer(name).dtype
    return own


def source_fingerprint(files: Iterable[Path]) -> str:
    """A hash of the files' names, sizes and times of change. The Hub's files are named by the hash of their content."""
    described = []
    for file in sorted(Path(file).resolve() for file in files):
        status = file.stat()
        described.append([file.name, status.st_size, status.st_mtime_ns])
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()


def plan_shards(
    structure: Structure,
    tensors: Mapping[str, CheckpointTensor],
    dtypes: Mapping[str, torch.dtype],
    quantizing: Mapping[str, Quantizing] | None = None,
) -> list[ShardPlan]:
    """Sorts tensors into shards: one part of one stage each, in the order of the model.

    Args:
        structure: the model's stages.
        tensors: state-dict name to tensor.
        dtypes: state-dict name to the type in which it is to be stored.
        quantizing: how those are quantized that are to be.
    """
    shards: dict[tuple[int, str], list[TensorPlan]] = defaultdict(list)
    for name, tensor in tensors.items():
        how = (quantizing or {}).get(name)
        plan = TensorPlan(name, dtypes[name], tensor.shape, tensor.load, tensor.extent, how)
        shards[structure.locate(name)].append(plan)
    return [ShardPlan(stage, part, tuple(shards[stage, part])) for stage, part in sorted(shards)]


def planned_quantizing(
    structure: Structure, tensors: Mapping[str, CheckpointTensor], compression: Compression, method: Method = "search"
) -> dict[str, Quantizing]:
    """How each tensor is to be quantized, by state-dict name; see `compression.weight_formats`."""
    shapes = {name: tensor.shape for name, tensor in tensors.items() if tensor.dtype.is_floating_point}
    formats = weight_formats(structure, shapes, compression)
    return {name: Quantizing(fmt, method) for name, fmt in formats.items()}


# ------------------------------------------------------------------------------------------------------ reading files


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
            f"{path} is not a plain file of tensors, and nothing in it was executed ({_first_line(error)}); "
            "take the checkpoint's safetensors files, or save it anew from a program that you trust"
        ) from error
    except (RuntimeError, OSError, EOFError, ValueError, KeyError, AttributeError) as error:
        raise StoreError(f"cannot read {path}: {_first_line(error)}; download it again") from error


def _index_pickle(path: Path) -> dict[str, CheckpointTensor]:
    loaded = load_pickle(path)
    if not isinstance(loaded, Mapping) or not all(isinstance(value, torch.Tensor) for value in loaded.values()):
        raise StoreError(f"{path} holds no dictionary of tensors; it is not a checkpoint of a transformers model")
    if zipfile.is_zipfile(path):
        return {name: _of_tensor(tensor) for name, tensor in loaded.items()}
    _logger.warning(
        "%s has the format that torch used before 1.6, which can only be read whole: its %s must fit in memory",
        path, gib(path.stat().st_size),
    )  # fmt: skip
    return {
        name: CheckpointTensor(tuple(tensor.shape), tensor.dtype, functools.partial(_from_legacy, path, name))
        for name, tensor in loaded.items()
    }


def _of_tensor(tensor: torch.Tensor) -> CheckpointTensor:
    return CheckpointTensor(tuple(tensor.shape), tensor.dtype, tensor.detach)


def _from_legacy(path: Path, name: str) -> torch.Tensor:
    tensor: torch.Tensor = _legacy_file(path)[name].detach()
    return tensor


@functools.lru_cache(maxsize=1)  # one file in memory, however many are read in turn
def _legacy_file(path: Path) -> Any:
    return load_pickle(path)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


# ----------------------------------------------------------------------------------------------------- matching names


@dataclasses.dataclass
class _Target:
    """What the checkpoint gives for one state-dict name: a tensor as it is, or several that a converter fuses."""

    converter: Any = None
    keys: list[tuple[str, str | None]] = dataclasses.field(default_factory=list)  # with the pattern that matched


def match(
    model: Any, found: Mapping[str, CheckpointTensor], dtype: torch.dtype | None = None
) -> dict[str, CheckpointTensor]:
    """Gives a checkpoint's tensors the names and the form that the model wants.

    Args:
        model: the model on `meta`.
        found: tensors by their names in the checkpoint.
        dtype: as for `read_checkpoint`.

    Raises:
        StoreError: a tensor is missing or has another shape.
    """
    meta: dict[str, torch.Tensor] = model.state_dict()
    targets, unexpected = _sort_keys(model, found, meta)
    result: dict[str, CheckpointTensor] = {}
    for name, target in targets.items():
        if target.converter is None:
            result[name] = found[target.keys[-1][0]]
        else:
            result.update(_converted(model, name, target, found, meta, dtype))
    _merge_tied(model, result)
    _report_unexpected(model, unexpected)
    _refuse_missing(model, meta, result)
    _refuse_shapes(meta, result)
    return {name: result[name] for name in meta if name in result}


def _sort_keys(
    model: Any, found: Mapping[str, CheckpointTensor], meta: dict[str, torch.Tensor]
) -> tuple[dict[str, _Target], list[str]]:
    """Which checkpoint keys make up each state-dict name, and the keys for which there is none."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    prefix, unexpected = model.base_model_prefix, []
    targets: dict[str, _Target] = {}
    for key in sorted(found, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, meta)
        if name not in meta and key in meta:  # a rule for another generation of this checkpoint matched by accident
            name, pattern = rename_source_key(key, [], [], prefix, meta)
        if name not in meta:
            unexpected.append(key)
            continue
        target = targets.setdefault(name, _Target(deepcopy(by_pattern[pattern]) if pattern is not None else None))
        target.keys.append((key, pattern))
    return targets, unexpected


def _converted(
    model: Any,
    name: str,
    target: _Target,
    found: Mapping[str, CheckpointTensor],
    meta: Mapping[str, torch.Tensor],
    dtype: torch.dtype | None,
) -> dict[str, CheckpointTensor]:
    """The tensors that a converter makes; one that is split gives several."""
    patterns = target.converter.target_patterns
    names = [other for p in patterns if (other := name.replace(patterns[0], p)) in meta] or [name]
    made = dtype if dtype is not None else found[target.keys[0][0]].dtype
    stacked = _stacked(model, name, target, found) if names == [name] else None
    return {
        each: CheckpointTensor(
            tuple(meta[each].shape),
            made,
            functools.partial(_convert, model, (name, each), target, found, dtype),
            stacked=stacked,
        )
        for each in names
    }


def _stacked(model: Any, name: str, target: _Target, found: Mapping[str, CheckpointTensor]) -> StackedExtent | None:
    """Where the matrices lie of which a converter makes a stack; None if it does more, or files do not hold them."""

    def convert(trial: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return _convert(model, (name, name), target, {key: _of_tensor(value) for key, value in trial.items()}, None)

    sources = {key: found[key].extent for key, _ in target.keys}
    extents = {key: extent for key, extent in sources.items() if extent is not None}
    return find_stacked(extents, convert) if len(extents) == len(sources) else None


def _convert(
    model: Any,
    names: tuple[str, str],
    target: _Target,
    found: Mapping[str, CheckpointTensor],
    dtype: torch.dtype | None,
) -> torch.Tensor:
    """Runs a converter and picks one of its results; `names` is the converter's first target, and the one wanted."""
    first, wanted = names
    converter = deepcopy(target.converter)  # a converter forgets what it has converted
    for key, pattern in target.keys:
        converter.add_tensor(first, key, pattern, functools.partial(_load_as, found[key], dtype))
    results = converter.convert(first, model=model, config=model.config)
    if wanted not in results:
        raise StoreError(f"converting {first!r} gave {', '.join(results) or 'nothing'}, not {wanted!r}")
    value = results[wanted]
    tensor: torch.Tensor = value[0] if isinstance(value, list) else value
    return tensor


def _load_as(tensor: CheckpointTensor, dtype: torch.dtype | None) -> torch.Tensor:
    value = tensor.load()
    return value.to(dtype) if dtype is not None and value.is_floating_point() else value


def _merge_tied(model: Any, result: dict[str, CheckpointTensor]) -> None:
    """Keeps each tied tensor once, under its source's name, wherever in its group the checkpoint has it.

    Two that a checkpoint has with different values are both kept: transformers does not tie them either.
    """
    for target, source in getattr(model, "all_tied_weights_keys", {}).items():
        if target not in result:
            continue
        if source not in result:
            result[source] = result.pop(target)
        elif _same_values(result[target], result[source]):
            del result[target]
        else:
            _logger.warning("%s and %s differ in the checkpoint, so they are not tied", target, source)


def _same_values(one: CheckpointTensor, other: CheckpointTensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if one.extent is None and other.extent is None:
        a, b = one.load(), other.load()
        if a.data_ptr() == b.data_ptr() and a.stride() == b.stride():
            return True  # what a .bin file has of tied tensors: one storage under two names
    pairs = zip(one.pieces(), other.pieces(), strict=True)
    return all(torch.equal(_bits(a), _bits(b)) for a, b in pairs)


def _bits(piece: torch.Tensor) -> torch.Tensor:
    return piece.contiguous().view(torch.uint8)


def _refuse_missing(model: Any, meta: Mapping[str, torch.Tensor], result: Mapping[str, CheckpointTensor]) -> None:
    tied = getattr(model, "all_tied_weights_keys", {})
    ignored = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
    missing = [
        name
        for name in meta
        if name not in result and tied.get(name) not in result and not any(re.search(p, name) for p in ignored)
    ]
    if missing:
        raise StoreError(
            f"the checkpoint lacks {len(missing)} of {len(meta)} tensors of {type(model).__name__}: {_some(missing)}; "
            "download all of its files again, or check that config.json belongs to it"
        )


def _refuse_shapes(meta: Mapping[str, torch.Tensor], result: Mapping[str, CheckpointTensor]) -> None:
    for name, tensor in result.items():
        if tensor.shape != tuple(meta[name].shape):
            raise StoreError(
                f"tensor {name!r} has shape {list(tensor.shape)} in the checkpoint but {list(meta[name].shape)} by "
                "config.json; check that the two belong together"
            )


def _report_unexpected(model: Any, unexpected: Sequence[str]) -> None:
    patterns = set(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())
    # buffers that old checkpoints hold and models now compute
    patterns |= {r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$"}
    strange = [key for key in unexpected if not any(re.search(pattern, key) for pattern in patterns)]
    if strange:
        _logger.warning("%s has no use for %d tensors: %s", type(model).__name__, len(strange), _some(strange))


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:8])
    return shown if len(names) <= 8 else f"{shown} and {len(names) - 8} more"
