"""Proves that a store is what its source is: every shard's hash, then every element of every tensor.

A quantized tensor is quantized once more from its source: its parts must come out bit for bit. With the method min-max,
every element that it stands for must moreover lie within half a step of its source's.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Set
from pathlib import Path

import torch

from flexgen_hf.errors import StoreError
from flexgen_hf.quantization import dispatch
from flexgen_hf.quantization.groupwise import Quantized
from flexgen_hf.weights.format import Manifest, TensorExtent, read_header
from flexgen_hf.weights.pieces import PIECE_BYTES, dtype_name, pieces_of_extent
from flexgen_hf.weights.quantized import Quantization, QuantizedExtent, Quantizing
from flexgen_hf.weights.writer import Progress, TensorPlan

from .sources import SourceOptions, open_source, parse_dtype

__all__ = ["VerifyReport", "verify"]


@dataclasses.dataclass(frozen=True)
class VerifyReport:
    """What was compared and found equal.

    Args:
        shards: files whose hash is the manifest's.
        tensors: tensors that are bit for bit what the source gives in the store's dtype, or quantized.
        bytes: their size.
        quantized: how many of the tensors are quantized.
    """

    shards: int
    tensors: int
    bytes: int
    quantized: int = 0


def verify(
    store: str | Path,
    source: str | Path,
    *,
    options: SourceOptions | None = None,
    progress: Progress | None = None,
) -> VerifyReport:
    """Compares a store with its source, a few megabytes at a time.

    Args:
        store: the store's folder.
        source: what it was converted from, as given to `convert`.
        options: how to read the source; dtype and revision are the store's if they are not given.
        progress: called with bytes compared and bytes in all (each byte is read twice: for its hash, for its value).

    Raises:
        StoreError: a shard is missing or damaged, or a tensor differs; the first one found is named, with its index
            and both values.
    """
    store = Path(store).expanduser()
    manifest = Manifest.load(store)
    manifest.check_files(store)
    options = options or SourceOptions()
    opened = open_source(
        source,
        dataclasses.replace(
            options,
            dtype=options.dtype or parse_dtype(manifest.dtype),
            revision=options.revision or manifest.revision,
        ),
    )
    quantization = Quantization.of(manifest, store)
    how: dict[str, Quantizing] = {}
    if quantization is not None:
        how = {name: Quantizing(fmt, quantization.method) for name, fmt in quantization.formats().items()}
    plans = {tensor.name: tensor for shard in opened.plans(how) for tensor in shard.tensors}
    meter = _Meter(2 * sum(shard.bytes for shard in manifest.shards), progress)
    extents: dict[str, TensorExtent] = {}
    for shard in manifest.shards:
        _check_hash(store / shard.file, shard.sha256, meter)
        extents.update(read_header(store / shard.file))
    quantized = quantization.join(store, extents) if quantization is not None else {}
    _check_names(store, extents, {name for plan in plans.values() for name, _, _ in plan.entries})
    for name, plan in plans.items():
        if name in quantized:
            _check_quantized(plan, quantized[name], meter)
        else:
            _check_tensor(plan, extents[name], meter)
    size = sum(extent.nbytes for extent in extents.values())
    return VerifyReport(len(manifest.shards), len(plans), size, len(quantized))


class _Meter:
    def __init__(self, total: int, progress: Progress | None) -> None:
        self.done, self.total, self._progress = 0, total, progress

    def add(self, count: int) -> None:
        self.done += count
        if self._progress is not None:
            self._progress(self.done, self.total)


def _check_hash(path: Path, expected: str, meter: _Meter) -> None:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(PIECE_BYTES):
            digest.update(block)
            meter.add(len(block))
    if digest.hexdigest() != expected:
        raise StoreError(
            f"shard {path} is damaged: its SHA-256 is {digest.hexdigest()}, the manifest says {expected}; "
            "convert again with --force"
        )


def _check_names(store: Path, extents: Mapping[str, TensorExtent], expected: Set[str]) -> None:
    if missing := sorted(expected - extents.keys()):
        raise StoreError(f"{store} lacks tensor {missing[0]!r}, which its source has ({len(missing)} in all)")
    if strange := sorted(extents.keys() - expected):
        raise StoreError(f"{store} has tensor {strange[0]!r}, which its source has not ({len(strange)} in all)")


def _check_tensor(plan: TensorPlan, extent: TensorExtent, meter: _Meter) -> None:
    if (extent.dtype, extent.shape) != (dtype_name(plan.dtype), plan.shape):
        raise StoreError(
            f"tensor {plan.name!r} is {extent.dtype} {list(extent.shape)} in the store, "
            f"{dtype_name(plan.dtype)} {list(plan.shape)} in the source"
        )
    stored, at = _Reader(extent), 0
    for expected in plan.pieces():
        actual = stored.next(expected.numel())
        if not torch.equal(_bits(actual), _bits(expected)):
            raise StoreError(_difference(plan, at, actual, expected))
        at += expected.numel()
        meter.add(expected.numel() * expected.element_size())


def _check_quantized(plan: TensorPlan, extent: QuantizedExtent, meter: _Meter) -> None:
    if extent.shape != plan.shape:
        raise StoreError(
            f"tensor {plan.name!r} has shape {list(extent.shape)} in the store, {list(plan.shape)} in the source"
        )
    assert plan.quantizing is not None
    readers = [(part, _Reader(part)) for part in extent.parts]
    row = 0
    for chunk in plan.chunks():
        count = chunk.shape[0]
        codes, scales, minima = (
            reader.next(part.shape[-1] * count).view(count, part.shape[-1]) for part, reader in readers
        )
        stored = Quantized(codes, scales, minima, tuple(chunk.shape))
        _check_rows(plan, plan.quantizing, stored, chunk, row)
        row += count
        meter.add(stored.nbytes)


def _check_rows(plan: TensorPlan, how: Quantizing, stored: Quantized, source: torch.Tensor, row: int) -> None:
    """Compares some rows of a quantized tensor, the first of which is `row`, with the source's."""
    if how.method == "minmax":
        _check_error(plan, how, stored, source, row)
    again = how.run(plan.name, source.shape[0], [source])
    for part in ("scales", "minima", "codes"):
        is_other = (_rows(getattr(stored, part)) != _rows(getattr(again, part))).any(dim=1)
        if is_other.any():
            raise StoreError(
                f"tensor {plan.name!r} is not what quantizing its source gives: {part} differ first in row "
                f"{row + int(is_other.nonzero()[0])}; convert again with --force"
            )


def _check_error(plan: TensorPlan, how: Quantizing, stored: Quantized, source: torch.Tensor, row: int) -> None:
    half_step = torch.repeat_interleave(stored.scales.float() / 2, how.format.group_size, dim=1)[:, : source.shape[1]]
    error = (dispatch.dequantize(stored, how.format, torch.float32) - source.float()).abs()
    # float32 rounds while subtracting, multiplying and adding: a few units in the last place of the largest number
    allowed = half_step * (1 + 1e-5) + source.float().abs().amax(dim=1, keepdim=True) * 1e-6
    is_wrong = ~(error <= allowed).all(dim=1)
    if is_wrong.any():
        at = int(is_wrong.nonzero()[0])
        column = int((~(error[at] <= allowed[at])).nonzero()[0])
        raise StoreError(
            f"tensor {plan.name!r} errs by {error[at, column].item():.3g} in row {row + at}, column {column}, where "
            f"half a step is {half_step[at, column].item():.3g}; convert again with --force"
        )


def _rows(values: torch.Tensor) -> torch.Tensor:
    return values.contiguous().view(torch.uint8)


class _Reader:
    """A stored tensor in pieces of the sizes that are asked for: source and store may be cut differently."""

    def __init__(self, extent: TensorExtent) -> None:
        self._pieces = pieces_of_extent(extent)
        self._rest: torch.Tensor | None = None

    def next(self, count: int) -> torch.Tensor:
        """The next `count` elements."""
        parts = []
        while count:
            piece = self._rest if self._rest is not None and self._rest.numel() else next(self._pieces)
            parts.append(piece[:count].clone())  # the buffer under a piece is used again for the next one
            self._rest, count = piece[count:], count - len(parts[-1])
        return torch.cat(parts)


def _bits(values: torch.Tensor) -> torch.Tensor:
    return values.contiguous().view(torch.uint8).view(-1, values.element_size())


def _difference(plan: TensorPlan, at: int, actual: torch.Tensor, expected: torch.Tensor) -> str:
    first = int((_bits(actual) != _bits(expected)).any(dim=1).nonzero()[0])
    index = []
    rest = at + first
    for size in reversed(plan.shape):
        rest, position = divmod(rest, size)
        index.append(position)
    return (
        f"tensor {plan.name!r} differs first at index {list(reversed(index))}: the store has {actual[first].item()!r}, "
        f"the source gives {expected[first].item()!r}; convert again with --force"
    )
