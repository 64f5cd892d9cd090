"""Where each tensor of a model lies in a checkpoint's files, found with transformers' own renaming rules.

Knows names and transformers' conversion mappings; knows nothing of tiers, policies and running models.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch

from .architectures import Structure
from .checkpoint_files import CheckpointTensor, first_line, index_files
from .compression import weight_formats
from .errors import StoreError
from .gguf_files import index_gguf, is_gguf
from .policy import Compression
from .prequantized import dequantizer, refuse_unread_scales, stored_settings
from .weights.quantized import Method, Quantizing
from .weights.stacked import StackedExtent, find_stacked
from .weights.writer import ShardPlan, TensorPlan

__all__ = ["match", "plan_shards", "planned_quantizing", "read_checkpoint", "target_dtype"]

_logger = logging.getLogger(__name__)


def read_checkpoint(
    model: torch.nn.Module, files: Sequence[Path], dtype: torch.dtype | None = None
) -> dict[str, CheckpointTensor]:
    """Finds every tensor of a model in a checkpoint's files; reads headers, no data.

    Args:
        model: the model on `meta`.
        files: all `.safetensors` or all `.bin` files of the checkpoint, or its one `.gguf` file.
        dtype: the type to which tensors that must be fused are cast first, as transformers does; `None` keeps theirs.

    Returns:
        State-dict name to tensor, each tied tensor once, under the name of its source.

    Raises:
        StoreError: a file is missing, broken or refused; a tensor is missing or has another shape.
        UnsupportedModelError: the checkpoint is quantized by a method that cannot be undone.
    """
    quantizer = dequantizer(stored_settings(model.config))
    found = index_gguf(model, Path(files[0])) if is_gguf(files) else index_files(files)
    return match(model, found, dtype, quantizer)


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


# ----------------------------------------------------------------------------------------------------- matching names


@dataclasses.dataclass
class _Target:
    """What the checkpoint gives for one state-dict name: a tensor as it is, or several that a converter fuses."""

    converter: Any = None
    keys: list[tuple[str, str | None]] = dataclasses.field(default_factory=list)  # with the pattern that matched

    @property
    def is_dequantized(self) -> bool:
        """Whether the converter wants what is in the file as it is, to make numbers of it."""
        operations = getattr(self.converter, "operations", ())
        return any(getattr(operation, "hf_quantizer", None) is not None for operation in operations)


def match(
    model: Any, found: Mapping[str, CheckpointTensor], dtype: torch.dtype | None = None, quantizer: Any = None
) -> dict[str, CheckpointTensor]:
    """Gives a checkpoint's tensors the names and the form that the model wants.

    Args:
        model: the model on `meta`.
        found: tensors by their names in the checkpoint.
        dtype: as for `read_checkpoint`.
        quantizer: for a quantized checkpoint, what `prequantized.dequantizer` gives.

    Raises:
        StoreError: a tensor is missing or has another shape.
        UnsupportedModelError: tensors are quantized and nothing says how.
    """
    meta: dict[str, torch.Tensor] = model.state_dict()
    targets, unexpected = _sort_keys(model, found, meta, quantizer)
    keys = {name: [key for key, _ in target.keys] for name, target in targets.items()}
    refuse_unread_scales(keys, found, meta, {name for name, target in targets.items() if target.is_dequantized})
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
    model: Any, found: Mapping[str, CheckpointTensor], meta: dict[str, torch.Tensor], quantizer: Any
) -> tuple[dict[str, _Target], list[str]]:
    """Which checkpoint keys make up each state-dict name, and the keys for which there is none."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    mapping = get_model_conversion_mapping(model, hf_quantizer=quantizer)
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
    made = meta[name].dtype if target.is_dequantized else dtype or found[target.keys[0][0]].dtype
    stacked = _stacked(model, name, target, found) if names == [name] and not target.is_dequantized else None
    return {
        each: CheckpointTensor(
            tuple(meta[each].shape),
            made,
            functools.partial(_convert, model, (name, each), target, found, made),
            stacked=stacked,
        )
        for each in names
    }


def _stacked(model: Any, name: str, target: _Target, found: Mapping[str, CheckpointTensor]) -> StackedExtent | None:
    """Where the matrices lie of which a converter makes a stack; None if it does more, or files do not hold them."""

    def convert(trial: Mapping[str, torch.Tensor]) -> torch.Tensor:
        tried = {key: CheckpointTensor.of_tensor(value) for key, value in trial.items()}
        return _convert(model, (name, name), target, tried, torch.int64)

    sources = {key: found[key].extent for key, _ in target.keys}
    extents = {key: extent for key, extent in sources.items() if extent is not None}
    return find_stacked(extents, convert) if len(extents) == len(sources) else None


def _convert(
    model: Any,
    names: tuple[str, str],
    target: _Target,
    found: Mapping[str, CheckpointTensor],
    dtype: torch.dtype,
) -> torch.Tensor:
    """Runs a converter and picks one of its results; `names` is the converter's first target, and the one wanted."""
    first, wanted = names
    converter = deepcopy(target.converter)  # a converter forgets what it has converted
    before = None if target.is_dequantized else dtype
    for key, pattern in target.keys:
        converter.add_tensor(first, key, pattern, functools.partial(_load_as, found[key], before))
    try:
        results = converter.convert(first, model=model, config=model.config)
    except (ValueError, RuntimeError) as error:
        raise StoreError(
            f"converting {', '.join(key for key, _ in target.keys)} into {first!r} failed ({first_line(error)}); check "
            "that config.json belongs to the checkpoint"
        ) from error
    if wanted not in results:
        raise StoreError(f"converting {first!r} gave {', '.join(results) or 'nothing'}, not {wanted!r}")
    value = results[wanted]
    tensor: torch.Tensor = value[0] if isinstance(value, list) else value
    return tensor.to(dtype)


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
