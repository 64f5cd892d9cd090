"""Writes a store: shard by shard, piece by piece, so that it can be interrupted at any point and go on later.

Knows the format and where each tensor's elements come from; knows no models and no checkpoints.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from ..errors import CapacityError, ConversionError, StoreError
from ..planning.placement import assign
from ..policy import Placement, Tier
from ..storage.ledger import gib
from .format import (
    FORMAT_VERSION,
    INDEX_NAME,
    MANIFEST_NAME,
    Manifest,
    ShardEntry,
    TensorExtent,
    element_bytes,
    encode_header,
    is_store,
    shard_file,
    sync_folder,
    write_atomically,
)
from .pieces import PIECE_BYTES, dtype_name, pieces_of_extent, pieces_of_tensor
from .quantized import Quantization, Quantizing, byte_pieces

__all__ = ["JOURNAL_NAME", "LOCK_NAME", "Origin", "Progress", "ShardPlan", "TensorPlan", "write_store"]

JOURNAL_NAME = "flexgen_journal.json"
LOCK_NAME = ".flexgen.lock"

# What safetensors files of PyTorch tensors say about themselves; some readers insist on it.
_METADATA = {"format": "pt"}

#: called with (bytes written so far, bytes in all)
Progress = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True)
class TensorPlan:
    """One tensor to be written.

    Args:
        name: its state-dict name.
        dtype: the type in which it is stored, unless it is quantized; others are cast to it, piece by piece.
        shape: its sizes.
        load: gives the whole tensor. Called once, and the result dropped before the next tensor's call.
        extent: where the tensor lies in a file as it is. If given, it is read from there and `load` is not called.
        quantizing: how it is to be quantized, from its elements as they are; `None` keeps it as `dtype`.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    load: Callable[[], torch.Tensor]
    extent: TensorExtent | None = None
    quantizing: Quantizing | None = None

    @property
    def entries(self) -> list[tuple[str, str, tuple[int, ...]]]:
        """Name, safetensors dtype and shape of what is written for it, in order."""
        if self.quantizing is not None:
            return self.quantizing.parts(self.name, self.shape)
        return [(self.name, dtype_name(self.dtype), self.shape)]

    def pieces(self) -> Iterator[torch.Tensor]:
        """The elements in the stored type, as flat pieces; each is valid until the next is asked for.

        Raises:
            StoreError: the tensor turns out to have another shape.
        """
        for piece in self._elements(1):
            yield piece.to(self.dtype)

    def chunks(self) -> Iterator[torch.Tensor]:
        """The elements as they are, in parts of whole rows, of shape (rows, length); each is valid until the next.

        Raises:
            StoreError: the tensor turns out to have another shape.
        """
        length = self.shape[-1]
        for piece in self._elements(length):
            yield piece.view(-1, length)

    def blocks(self) -> Iterator[torch.Tensor]:
        """The bytes of all entries, in pieces.

        Of a quantized tensor all parts are held in memory at once: a quarter of it in 16 bit and a little more, if it
        is quantized in 4.

        Raises:
            StoreError: the tensor turns out to have another shape.
            QuantizationError: it has elements that cannot be quantized.
        """
        if self.quantizing is None:
            for piece in self.pieces():
                yield piece.contiguous().view(torch.uint8)
        else:
            q = self.quantizing.run(self.name, math.prod(self.shape[:-1]), self.chunks())
            yield from byte_pieces((q.scales, q.minima, q.codes), PIECE_BYTES)

    def _elements(self, unit: int) -> Iterator[torch.Tensor]:
        tensor = self.load() if self.extent is None else None
        shape = tuple(tensor.shape) if tensor is not None else self.extent.shape if self.extent is not None else ()
        if shape != self.shape:
            raise StoreError(f"tensor {self.name!r} has shape {list(shape)} where the model needs {list(self.shape)}")
        if tensor is not None:
            return pieces_of_tensor(tensor, unit)
        assert self.extent is not None
        return pieces_of_extent(self.extent, unit)


@dataclasses.dataclass(frozen=True)
class ShardPlan:
    """One shard to be written: the tensors of a part of a stage."""

    stage: int
    part: str
    tensors: Sequence[TensorPlan]

    @property
    def file(self) -> str:
        """Its name below the store's folder."""
        return shard_file(self.stage, self.part)

    def ordered(self) -> list[TensorPlan]:
        """The tensors as they lie in the file: widest element first, quantized ones last, else in the plan's order."""
        return sorted(self.tensors, key=lambda tensor: 0 if tensor.quantizing is not None else -tensor.dtype.itemsize)

    @property
    def entries(self) -> list[tuple[str, str, tuple[int, ...]]]:
        """Name, safetensors dtype and shape of what is in the file, in order."""
        return [entry for tensor in self.ordered() for entry in tensor.entries]

    def header(self) -> bytes:
        """The file up to its data."""
        return encode_header({name: (dtype, shape) for name, dtype, shape in self.entries}, _METADATA)

    @property
    def data_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(element_bytes(dtype) * math.prod(shape) for _, dtype, shape in self.entries)


@dataclasses.dataclass(frozen=True)
class Origin:
    """What a store is made from.

    Args:
        source: Hub id or folder, as the manifest will name it.
        revision: commit of the Hub repository, if the source has one.
        dtype: torch's name of the weights' type, e.g. `"float16"`. What differs from it (integers, parameters that the
            model keeps in fp32) the plans say.
        fingerprint: a hash that changes whenever the source's bytes do.
    """

    source: str
    revision: str | None
    dtype: str
    fingerprint: str


def write_store(
    out: str | Path,
    plans: Sequence[ShardPlan],
    origin: Origin,
    *,
    companions: Mapping[str, bytes | Path] | None = None,
    placement: Placement | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Manifest:
    """Writes a store into `out`, or finishes one that was interrupted, or finds it finished and leaves it alone.

    Shards that an interrupted run finished are kept if source, dtype, layout and format are still the same. A second
    process that writes the same folder waits, and then finds the store finished.

    Args:
        out: the store's folder; created if need be.
        plans: every shard.
        origin: what the store is made from.
        companions: other files of the folder, such as `config.json`: name to content, or to a file to copy.
        placement: shares by which the shards' tiers are chosen; without it all belong to the disk.
        force: replace a finished store that was made from something else.
        progress: called after each piece.

    Raises:
        ConversionError: `out` holds a store of another source or dtype and `force` is not set.
        CapacityError: the disk is too small; nothing is written if that can be told beforehand.
        StoreError: a tensor's source is broken.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    with FileLock(out / LOCK_NAME):
        job = _Job(out, sorted(plans, key=lambda plan: plan.stage), origin)
        job.tidy()
        if is_store(out) and not job.take_over(force):
            return job.keep(placement)
        job.check_space()
        job.begin()
        entries = job.write_shards(progress)
        return job.finish(_with_tiers(entries, placement), companions or {}, placement)


class _Job:
    """One call of `write_store`, with the folder's lock held."""

    def __init__(self, out: Path, plans: Sequence[ShardPlan], origin: Origin) -> None:
        self.out, self.plans, self.origin = out, plans, origin
        self.fingerprint = _fingerprint(plans, origin)
        self.done = self._read_journal()
        self.sizes = {plan.file: len(plan.header()) + plan.data_bytes for plan in plans}

    def tidy(self) -> None:
        """Removes what a run leaves that is killed while it replaces a small file, or right after its last one."""
        for path in self.out.glob("*.[0-9]*.tmp"):
            path.unlink()
        if is_store(self.out):
            (self.out / JOURNAL_NAME).unlink(missing_ok=True)

    def take_over(self, force: bool) -> bool:
        """Decides about a store that is already in the folder: whether it must be written again, wholly or in part.

        Raises:
            ConversionError: it is another one, and `force` is not set.
        """
        if force:
            self.done = {}
            return True
        manifest = _manifest_of(self.out)
        if manifest.fingerprint != self.fingerprint:
            raise ConversionError(_other_store(self.out, manifest, self.origin))
        whole = {shard.file: shard.sha256 for shard in manifest.shards if _size(self.out / shard.file) == shard.bytes}
        self.done = whole
        return len(whole) < len(self.plans)

    def keep(self, placement: Placement | None) -> Manifest:
        """The finished store's manifest; another placement moves its shards."""
        manifest = Manifest.load(self.out)
        shares = placement.to_dict() if placement is not None else manifest.placement
        if shares != manifest.placement:
            shards = tuple(_with_tiers(manifest.shards, placement))
            manifest = dataclasses.replace(manifest, placement=shares, shards=shards)
            manifest.save(self.out)
        return manifest

    def check_space(self) -> None:
        """Raises `CapacityError` if what is still to be written cannot fit; what will be deleted counts as free."""
        needed = sum(size for file, size in self.sizes.items() if file not in self.done)
        kept = {(self.out / file).name for file in self.done}
        folder = self.out / "shards"
        stale = sum(p.stat().st_size for p in folder.glob("*") if p.name not in kept) if folder.is_dir() else 0
        free = shutil.disk_usage(self.out).free
        if needed > free + stale:
            raise CapacityError(
                f"{self.out} needs {gib(needed)} more but its disk has {gib(free + stale)} free; "
                "free some space, or give another folder (the shards already written are kept)"
            )

    def begin(self) -> None:
        """Removes the manifest of an old store, and every shard that this one cannot use."""
        (self.out / MANIFEST_NAME).unlink(missing_ok=True)
        folder = self.out / "shards"
        folder.mkdir(exist_ok=True)
        kept = {(self.out / file).name for file in self.done}
        for path in folder.iterdir():
            if path.name not in kept:
                path.unlink()
        self._write_journal()

    def write_shards(self, progress: Progress | None) -> list[ShardEntry]:
        """Writes the shards that are not there yet; gives all of them."""
        total, written = sum(self.sizes.values()), sum(self.sizes[file] for file in self.done)
        entries = []
        for plan in self.plans:
            if plan.file not in self.done:
                self.done[plan.file] = self._write_shard(plan, written, total, progress)
                self._write_journal()
                written += self.sizes[plan.file]
            entries.append(
                ShardEntry(plan.file, plan.stage, plan.part, Tier.DISK, self.sizes[plan.file], self.done[plan.file])
            )
        return entries

    def finish(
        self, entries: Sequence[ShardEntry], companions: Mapping[str, bytes | Path], placement: Placement | None
    ) -> Manifest:
        """Writes the other files, the manifest last, and removes the journal."""
        quantization = _quantization_of(self.plans)
        with _disk_full(self.out, "the store's small files"):
            for name, content in companions.items():
                write_atomically(self.out / name, content if isinstance(content, bytes) else content.read_bytes())
            write_atomically(self.out / INDEX_NAME, _encode_index(self.plans))
            manifest = Manifest(
                format_version=FORMAT_VERSION,
                source=self.origin.source,
                revision=self.origin.revision,
                dtype=self.origin.dtype,
                quantization=quantization.to_dict() if quantization is not None else None,
                placement=placement.to_dict() if placement is not None else None,
                shards=tuple(entries),
                fingerprint=self.fingerprint,
            )
            manifest.save(self.out)
        (self.out / JOURNAL_NAME).unlink(missing_ok=True)
        return manifest

    def _write_shard(self, plan: ShardPlan, before: int, total: int, progress: Progress | None) -> str:
        """Writes one shard under a temporary name and renames it when it is safe on disk; returns its hash."""
        path = self.out / plan.file
        temporary = path.with_name(path.name + ".tmp")
        digest, written = hashlib.sha256(), before
        try:
            with _disk_full(self.out, plan.file), temporary.open("wb", buffering=0) as file:
                for block in _blocks(plan):
                    _write_fully(file.write, block)
                    digest.update(block)
                    written += len(block)
                    if progress is not None:
                        progress(written, total)
                os.fsync(file.fileno())
            assert written - before == self.sizes[plan.file], f"{plan.file} came out {written - before} bytes long"
            temporary.replace(path)
            sync_folder(path.parent)
        finally:
            temporary.unlink(missing_ok=True)
        return digest.hexdigest()

    def _read_journal(self) -> dict[str, str]:
        """Hashes of the shards that an interrupted run of this very job finished."""
        try:
            journal = json.loads((self.out / JOURNAL_NAME).read_bytes())
            entries = journal["shards"] if journal["fingerprint"] == self.fingerprint else []
            return {e["file"]: e["sha256"] for e in entries if _size(self.out / e["file"]) == e["bytes"]}
        except (OSError, ValueError, KeyError, TypeError):
            return {}  # no journal, or none of ours: nothing that could be kept

    def _write_journal(self) -> None:
        shards = [{"file": file, "bytes": self.sizes[file], "sha256": sha} for file, sha in self.done.items()]
        text = json.dumps({"fingerprint": self.fingerprint, "shards": shards})
        with _disk_full(self.out, JOURNAL_NAME):
            write_atomically(self.out / JOURNAL_NAME, text.encode())


class _disk_full:  # noqa: N801 (reads as the statement it is: `with _disk_full(...)`)
    """Turns "no space left on device" into a `CapacityError` with numbers."""

    def __init__(self, out: Path, what: str) -> None:
        self._out, self._what = out, what

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(self._out).free
            raise CapacityError(
                f"the disk of {self._out} is full ({gib(free)} free) while writing {self._what}; free some space and "
                "run the same command again: finished shards are kept"
            ) from error


def _blocks(plan: ShardPlan) -> Iterator[memoryview]:
    yield memoryview(plan.header())
    for tensor in plan.ordered():
        for piece in tensor.blocks():
            yield memoryview(piece.numpy())  # type: ignore[arg-type]  # an array is a buffer


def _write_fully(write: Callable[[memoryview], int | None], block: memoryview) -> None:
    while block.nbytes:
        block = block[write(block) or 0 :]


def _fingerprint(plans: Sequence[ShardPlan], origin: Origin) -> str:
    layout = [
        [p.file, p.stage, p.part, [[name, dtype, list(shape)] for name, dtype, shape in p.entries]] for p in plans
    ]
    quantization = _quantization_of(plans)
    how = [quantization.to_dict()] if quantization is not None else []
    text = json.dumps([FORMAT_VERSION, origin.fingerprint, origin.dtype, layout, *how])
    return hashlib.sha256(text.encode()).hexdigest()


def _quantization_of(plans: Sequence[ShardPlan]) -> Quantization | None:
    tensors = [tensor for plan in plans for tensor in plan.tensors]
    return Quantization.planned({t.name: (t.quantizing, t.shape) for t in tensors if t.quantizing is not None})


def _with_tiers(entries: Sequence[ShardEntry], placement: Placement | None) -> list[ShardEntry]:
    if placement is None:
        return [dataclasses.replace(entry, tier=Tier.DISK) for entry in entries]
    homes = assign([(entry.file, entry.bytes) for entry in entries], placement)
    return [dataclasses.replace(entry, tier=homes[entry.file]) for entry in entries]


def _encode_index(plans: Sequence[ShardPlan]) -> bytes:
    index: dict[str, Any] = {
        "metadata": {"total_size": sum(plan.data_bytes for plan in plans)},
        "weight_map": {name: plan.file for plan in plans for name, _, _ in plan.entries},
    }
    return (json.dumps(index, indent=2) + "\n").encode()


def _manifest_of(out: Path) -> Manifest:
    try:
        return Manifest.load(out)
    except StoreError as error:
        raise ConversionError(
            f"{out} holds a store that cannot be used ({error}); give another folder, or --force to replace it"
        ) from error


def _other_store(out: Path, manifest: Manifest, origin: Origin) -> str:
    kept = "" if manifest.quantization is None else ", quantized"
    what = f"{manifest.source} ({manifest.dtype}{kept}, revision {manifest.revision})"
    if (manifest.source, manifest.revision, manifest.dtype) == (origin.source, origin.revision, origin.dtype):
        what += " with another compression, or as it was before it changed"
    return f"{out} already holds a store of {what}; give another folder, or --force to replace it"


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1
