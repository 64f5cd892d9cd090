"""metaseq's OPT checkpoints: model-parallel parts, each one file or many data-parallel shards of flat parameters.

Layouts, as Meta published them and as metaseq's scripts leave them:

* `*-model_part-P-shardS.pt`: part P of the model-parallel group, shard S of fully-sharded data parallelism. The file's
  `model` holds flat parameters, each cut evenly over the shards (the last ones padded); its `shard_metadata` says which
  tensors, of which shapes, a flat parameter strings together. Where a script dropped the metadata, `flat-meta.json`
  beside the files says the same.
* `*-model_part-P.pt`: the same with the shards joined: `model` holds the part's tensors under their names.
* `restored.pt`: everything joined.

Among parts, the rows of q, k, v, fc1 and of the embedding are distributed (concatenated along dimension 0), of out_proj
and fc2 the columns (dimension 1); all else is replicated. A fused `qkv_proj` holds, within each part, first the rows of
k, then of v, then of q.

Files are mapped, not read, so a tensor's pieces come into memory when it is its turn.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from flexgen_hf.checkpoint_files import CheckpointTensor, load_pickle
from flexgen_hf.errors import ConversionError, StoreError

from .opt_shapes import config_of, transformers_name

__all__ = ["is_metaseq", "read"]

_FILE = re.compile(r"model_part-(\d+)(?:-shard(\d+))?\.pt$")
_FLAT = re.compile(r"(^|\.)flat_param_\d+$")
_ROWS = re.compile(r"(qkv_proj|q_proj|k_proj|v_proj|fc1)\.(weight|bias)$|embed_tokens\.weight$")
_COLUMNS = re.compile(r"(out_proj|fc2)\.weight$")
_UNUSED = re.compile(r"(^|\.)(version|_float_tensor|output_projection\.weight)$")

# Shards carry their training configuration, objects of these packages, which is not needed: stand-ins take its place.
_CONFIGURATION_PACKAGES = {"argparse", "omegaconf", "metaseq", "fairseq"}


def is_metaseq(folder: Path) -> bool:
    """Whether a folder holds such a checkpoint."""
    return bool(_parts(folder))


def read(folder: Path, config: Any = None) -> tuple[Any, dict[str, CheckpointTensor], list[Path]]:
    """Finds the tensors of a folder; maps the files and reads what describes them.

    Args:
        folder: the folder.
        config: the model's configuration; without it, it is told from the tensors' shapes.

    Returns:
        Configuration, tensors by transformers' names, and the files.

    Raises:
        StoreError: a file is missing, broken, or holds more than tensors and settings.
        ConversionError: the configuration cannot be told.
    """
    files = _parts(folder)
    parts = [_read_part(folder, files[part]) for part in sorted(files)]
    found = _join(parts)
    if config is None:
        config = config_of({name: tensor.shape for name, tensor in found.items()})
    table = "decoder.embed_tokens.weight"
    if table in found and found[table].shape[0] > config.vocab_size:
        found[table] = _first_rows(found[table], config.vocab_size)
    return config, found, [path for part in files.values() for path in part]


def _parts(folder: Path) -> dict[int, list[Path]]:
    """The files of each model-parallel part, in the order of their shards."""
    named = [(match, path) for path in sorted(folder.glob("*.pt")) if (match := _FILE.search(path.name))]
    parts: dict[int, dict[int, Path]] = defaultdict(dict)
    for match, path in named:
        parts[int(match[1])][int(match[2] or 0)] = path
    if not parts and (folder / "restored.pt").is_file():
        parts[0][0] = folder / "restored.pt"
    _refuse_holes(folder, "model-parallel part", parts)
    for part, shards in parts.items():
        _refuse_holes(folder, f"of part {part} shard", shards)
    return {part: [shards[number] for number in sorted(shards)] for part, shards in sorted(parts.items())}


def _refuse_holes(folder: Path, what: str, numbers: Iterable[int]) -> None:
    present = set(numbers)
    if missing := sorted(set(range(max(present, default=-1) + 1)) - present):
        raise StoreError(f"{folder} lacks {what} {missing[0]}; download all of the files")


# -------------------------------------------------------------------------------------------------------- within a part


@dataclasses.dataclass(frozen=True)
class _Slice:
    """A tensor of one part: a range of the elements that some shards hold one after the other."""

    shards: Sequence[torch.Tensor]  # flat
    start: int
    shape: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        return self.shards[0].dtype

    def rows(self, first: int, last: int) -> torch.Tensor:
        """Rows `first` to `last` (without it), gathered from the shards that hold them."""
        row = math.prod(self.shape[1:])
        wanted = range(self.start + first * row, self.start + last * row)
        pieces, begin = [], 0
        for shard in self.shards:
            end = begin + shard.numel()
            if begin < wanted.stop and wanted.start < end:
                pieces.append(shard[max(wanted.start - begin, 0) : wanted.stop - begin])
            begin = end
        gathered = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        return gathered.view(last - first, *self.shape[1:])


def _read_part(folder: Path, files: Sequence[Path]) -> dict[str, _Slice]:
    contents = [_load(path) for path in files]
    models = [content.get("model", content) for content in contents]
    tensors = {key: value for key, value in models[0].items() if isinstance(value, torch.Tensor)}
    flat = {key for key in tensors if _FLAT.search(key)}
    plain = {
        key: _Slice([value.reshape(-1)], 0, tuple(value.shape)) for key, value in tensors.items() if key not in flat
    }
    if not flat:
        if len(files) > 1:
            raise StoreError(f"{files[0]} is a shard but holds no flat parameters; it is not a metaseq checkpoint")
        return plain
    if all("shard_metadata" in content for content in contents):
        described = _by_metadata(files[0], models, [content["shard_metadata"] for content in contents])
    else:
        described = _by_flat_meta(folder, models)
    return {**plain, **described}


def _by_metadata(
    file: Path, models: Sequence[Mapping[str, torch.Tensor]], metadata: Sequence[Mapping[str, Any]]
) -> dict[str, _Slice]:
    result: dict[str, _Slice] = {}
    for number, wrapped in enumerate(metadata[0]["param_metadata"]):
        path = wrapped["fsdp_path"]
        for flat_name, info in wrapped["params"].items():
            key = _dotted(path, flat_name)
            if any(key not in model for model in models):
                raise StoreError(f"{file}: its metadata describes {key!r}, but a shard lacks it; download it again")
            pads = [entry["param_metadata"][number]["params"][flat_name]["padding"] for entry in metadata]
            shards = [_unpadded(model[key], pad) for model, pad in zip(models, pads, strict=True)]
            names = [_dotted(path, name) for name in info["names"]]
            result.update(_cut(key, shards, names, info["shapes"]))
    for entry in metadata[0].get("shared_param_info", ()):
        source, copy = entry
        result[copy] = result[source]
    return result


def _by_flat_meta(folder: Path, models: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, _Slice]:
    path = folder / "flat-meta.json"
    try:
        described = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ConversionError(
            f"the shards in {folder} carry no shard_metadata, and flat-meta.json, which would say what is in them, "
            f"cannot be read ({error}); put that file beside them"
        ) from error
    result: dict[str, _Slice] = {}
    for key, info in described.items():
        result.update(_cut(key, [model[key].reshape(-1) for model in models], info["names"], info["shapes"]))
    return result


def _cut(
    key: str, shards: Sequence[torch.Tensor], names: Sequence[str], shapes: Iterable[Sequence[int]]
) -> dict[str, _Slice]:
    sizes = [tuple(shape) for shape in shapes]
    starts = [0, *itertools.accumulate(math.prod(size) for size in sizes)]
    have = sum(shard.numel() for shard in shards)
    if have < starts[-1]:
        raise StoreError(f"{key!r} has {have} elements, its tensors need {starts[-1]}; a shard is missing or cut short")
    return {name: _Slice(shards, start, size) for name, start, size in zip(names, starts, sizes, strict=False)}


def _unpadded(shard: torch.Tensor, padding: int) -> torch.Tensor:
    flat = shard.reshape(-1)
    return flat[: flat.numel() - padding]


def _dotted(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


# ---------------------------------------------------------------------------------------------------------- among parts


def _join(parts: Sequence[Mapping[str, _Slice]]) -> dict[str, CheckpointTensor]:
    found: dict[str, CheckpointTensor] = {}
    for key in parts[0]:
        if _UNUSED.search(key):
            continue
        if lacking := [number for number, part in enumerate(parts) if key not in part]:
            raise StoreError(f"model-parallel part {lacking[0]} lacks {key!r}, which part 0 has; download it again")
        slices, name = [part[key] for part in parts], transformers_name(key)
        if "qkv_proj" in key:
            for third, letter in enumerate("kvq"):
                found[name.replace("qkv_proj", f"{letter}_proj")] = _joined(slices, 0, third)
        elif _ROWS.search(key):
            found[name] = _joined(slices, 0)
        elif _COLUMNS.search(key):
            found[name] = _joined(slices, 1)
        else:
            found[name] = _joined(slices[:1], 0)
    return found


def _joined(slices: Sequence[_Slice], dim: int, third: int | None = None) -> CheckpointTensor:
    """Slices along a dimension, or of each its first, second or last third of the rows."""
    pieces = []
    for piece in slices:
        rows = piece.shape[0] if third is None else piece.shape[0] // 3
        pieces.append((piece, (third or 0) * rows, rows))
    shape = [pieces[0][2], *slices[0].shape[1:]]
    shape[dim] = sum(rows if dim == 0 else piece.shape[1] for piece, _, rows in pieces)
    return CheckpointTensor(tuple(shape), slices[0].dtype, functools.partial(_gather, pieces, tuple(shape), dim))


def _gather(pieces: Sequence[tuple[_Slice, int, int]], shape: tuple[int, ...], dim: int) -> torch.Tensor:
    """Puts a tensor together, a part's piece at a time."""
    result, at = torch.empty(shape, dtype=pieces[0][0].dtype), 0
    for piece, first, rows in pieces:
        values = piece.rows(first, first + rows)
        result.narrow(dim, at, values.shape[dim]).copy_(values)
        at += values.shape[dim]
    return result


def _first_rows(tensor: CheckpointTensor, rows: int) -> CheckpointTensor:
    """A table without the rows that only fill it up to a multiple of the number of parts."""
    return CheckpointTensor((rows, *tensor.shape[1:]), tensor.dtype, lambda: tensor.load()[:rows])


# --------------------------------------------------------------------------------------------------------------- files


def _load(path: Path) -> Mapping[str, Any]:
    """A shard's dictionary, its training configuration replaced by stand-ins; nothing of it is executed."""
    names = _unknown_globals(path)
    allowed = [(_StandIn, name) for name in names if name.split(".")[0] in _CONFIGURATION_PACKAGES]
    with torch.serialization.safe_globals(allowed):  # type: ignore[arg-type]  # pairs are documented, not annotated
        content = load_pickle(path)
    if not isinstance(content, Mapping):
        raise StoreError(f"{path} holds a {type(content).__name__}, not a metaseq checkpoint's dictionary")
    return content


def _unknown_globals(path: Path) -> list[str]:
    try:
        return torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
    except Exception:  # noqa: BLE001 (it raises whatever parsing raises; reading the file will say what is wrong)
        return []


class _StandIn:
    """Takes the place of an object that is not needed; keeps nothing and does nothing."""

    def __init__(self, *_args: object, **_kwargs: object) -> None:
        pass

    def __setstate__(self, _state: object) -> None:
        pass
