"""The store format, version 1, in prose and in code. Knows files and names; knows no torch, models or tiers' contents.

A *store* is a folder that Hugging Face's own loaders accept (`config.json`, `generation_config.json`, tokenizer files,
`model.safetensors.index.json`) and that holds, besides:

* `flexgen_manifest.json`, written last and atomically. Without it a folder is not a store. Its fields are those of
  `Manifest`; every shard is listed with its stage, part, tier, size in bytes and SHA-256 of the whole file.
* `shards/stage-SSSSS-PART.safetensors`: one part (`embedding`, `attention`, `mlp`, `experts`, `head`) of one stage
  (0 the embedding, 1..L the decoder layers, L+1 the head). A shard belongs to one tier; moving it to another one edits
  the manifest only.

A shard is an ordinary safetensors file: eight bytes with the header's length (little endian), the header as JSON, the
tensors without gaps. Two things are fixed beyond safetensors' own rules: the header is padded with spaces so that data
starts on a multiple of 4096 bytes (so that it can be read with O_DIRECT), and tensors lie in the order of the shard's
plan, widest element first (so that each begins on a multiple of its element size), quantized ones behind the others.
Keys are the state-dict names of the transformers model, so a renamed or fused checkpoint tensor appears under the name
it has in memory.

A *quantized* tensor `X` is three tensors in its shard, one behind the other: `X.scales` and `X.minima` (F16), of the
shape of `X` with its last size replaced by the number of groups in a row, and `X` (U8), the codes, with the bytes of a
row's codes there instead. `quantization.groupwise` says what they mean and how codes are packed; that is layout
version 1. (Codes of 3 bits may have an odd number of bytes; what is behind them is not aligned then.) The manifest's
`quantization`, which is null where nothing is quantized, has

* `layout_version`: 1. Another one has another meaning of the bytes; a reader that does not know it refuses the store.
* `method`: `"minmax"` or `"search"`, how scales and minima were found. Reading does not depend on it, verifying does.
* `tensors`: for each quantized tensor's name `bits` (2, 3, 4 or 8), `group_size` and `shape`, that of the tensor that
  was quantized (a row of codes does not tell how much of its last group is padding).

While a store is being written the folder may also hold `flexgen_journal.json` (the shards that are finished, and a
fingerprint of what is being written), `.flexgen.lock`, and one `*.tmp` file. The first and the last are gone once the
manifest is there.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import os
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

from ..errors import StoreError
from ..policy import Tier

__all__ = [
    "ALIGNMENT",
    "FORMAT_VERSION",
    "INDEX_NAME",
    "MANIFEST_NAME",
    "Manifest",
    "ShardEntry",
    "TensorExtent",
    "element_bytes",
    "encode_header",
    "is_store",
    "read_header",
    "shard_file",
    "write_atomically",
]

FORMAT_VERSION = 1
MANIFEST_NAME = "flexgen_manifest.json"
INDEX_NAME = "model.safetensors.index.json"
ALIGNMENT = 4096

# safetensors itself refuses longer headers; a longer one is a file of another kind.
_MAX_HEADER_BYTES = 100_000_000

_ELEMENT_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}


# ---------------------------------------------------------------------------------------------- safetensors headers


@dataclasses.dataclass(frozen=True)
class TensorExtent:
    """Where the bytes of one tensor lie.

    Args:
        file: the safetensors file.
        offset: first byte, counted from the start of the file (not of the data section).
        nbytes: length in bytes; `element_bytes(dtype)` times the product of `shape`.
        dtype: name as safetensors writes it, e.g. `"F16"`.
        shape: sizes of the dimensions; `()` is a scalar.
    """

    file: Path
    offset: int
    nbytes: int
    dtype: str
    shape: tuple[int, ...]


def element_bytes(dtype: str) -> int:
    """Bytes of one element of a safetensors dtype name.

    Raises:
        StoreError: the name is unknown, or its elements are not whole bytes.
    """
    try:
        return _ELEMENT_BYTES[dtype]
    except KeyError:
        raise StoreError(f"tensor type {dtype!r} is unknown; this version reads {', '.join(_ELEMENT_BYTES)}") from None


def read_header(path: str | Path) -> dict[str, TensorExtent]:
    """The tensors of a safetensors file in the order of their bytes, with every size checked against the file's.

    Raises:
        StoreError: the file is missing, no safetensors file, cut short, too long, or its header contradicts itself.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = _header_length(path, file.read(8), size)
            text = file.read(length)
    except OSError as error:
        if isinstance(error, StoreError):
            raise
        raise StoreError(f"cannot read {path}: {error.strerror or error}; restore the file") from error
    extents = {
        name: _extent(path, name, entry, 8 + length)
        for name, entry in _parse_header(path, text).items()
        if name != "__metadata__"
    }
    extents = dict(sorted(extents.items(), key=lambda item: (item[1].offset, item[1].nbytes)))
    _check_contiguous(path, extents, 8 + length, size)
    return extents


def encode_header(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str] | None = None
) -> bytes:
    """Length prefix and header of a shard; its own length is a multiple of `ALIGNMENT`.

    Args:
        tensors: name to (safetensors dtype name, shape), in the order in which the data will be written.
        metadata: free text under `__metadata__`.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    begin = 0
    for name, (dtype, shape) in tensors.items():
        end = begin + element_bytes(dtype) * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header, separators=(",", ":")).encode()
    padded = -(-(8 + len(text)) // ALIGNMENT) * ALIGNMENT - 8
    return struct.pack("<Q", padded) + text.ljust(padded)


def _broken(path: Path, fact: str) -> NoReturn:
    raise StoreError(f"{path} is not a whole safetensors file: {fact}; download or convert it again")


def _header_length(path: Path, prefix: bytes, size: int) -> int:
    if len(prefix) < 8:
        _broken(path, f"it has {size} bytes, fewer than the 8 of the header's length")
    length = int(struct.unpack("<Q", prefix)[0])
    if length < 2 or length > _MAX_HEADER_BYTES:
        _broken(path, f"it claims a header of {length} bytes, outside 2..{_MAX_HEADER_BYTES}")
    if 8 + length > size:
        _broken(path, f"it claims a header of {length} bytes but has {size} bytes in all")
    return length


def _parse_header(path: Path, text: bytes) -> dict[str, Any]:
    try:
        header = json.loads(text, object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        _broken(path, f"its header is not JSON ({error})")
    if not isinstance(header, dict):
        _broken(path, f"its header is a JSON {type(header).__name__}, not an object")
    return header


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{max(names, key=names.count)!r} appears twice")
    return result


def _extent(path: Path, name: str, entry: Any, data_start: int) -> TensorExtent:
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        _broken(path, f"tensor {name!r} lacks dtype, shape or data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if dtype not in _ELEMENT_BYTES:
        _broken(path, f"tensor {name!r} has the unknown type {dtype!r}")
    if not _is_sizes(shape) or not _is_sizes(offsets) or len(offsets) != 2:
        _broken(path, f"tensor {name!r} has shape {shape!r} and data_offsets {offsets!r}")
    begin, end = offsets
    expected = _ELEMENT_BYTES[dtype] * math.prod(shape)
    if end - begin != expected:
        _broken(path, f"tensor {name!r} of {dtype} {shape} needs {expected} bytes but its offsets span {end - begin}")
    return TensorExtent(path, data_start + begin, expected, dtype, tuple(shape))


def _is_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _check_contiguous(path: Path, extents: Mapping[str, TensorExtent], data_start: int, size: int) -> None:
    position = data_start
    for name, extent in extents.items():
        if extent.offset != position:
            relation = "overlaps the tensor before it" if extent.offset < position else "leaves a gap before it"
            _broken(path, f"tensor {name!r} begins at byte {extent.offset}, not {position}: it {relation}")
        position += extent.nbytes
    if position != size:
        relation = "cut short" if size < position else "too long"
        _broken(path, f"its header describes {position} bytes but it has {size} (it is {relation})")


# --------------------------------------------------------------------------------------------------------- manifest


@dataclasses.dataclass(frozen=True)
class ShardEntry:
    """One shard as the manifest lists it.

    Args:
        file: path below the store's folder with forward slashes, e.g. `"shards/stage-00001-mlp.safetensors"`.
        stage: 0 the embedding, 1..L the decoder layers, L+1 the head.
        part: `"embedding"`, `"attention"`, `"mlp"`, `"experts"` or `"head"`.
        tier: where the shard's tensors are meant to live.
        bytes: size of the file.
        sha256: hash of the whole file, 64 hexadecimal digits.
    """

    file: str
    stage: int
    part: str
    tier: Tier
    bytes: int
    sha256: str

    def __post_init__(self) -> None:
        path = PurePosixPath(self.file) if isinstance(self.file, str) else PurePosixPath("/")
        if path.is_absolute() or ".." in path.parts or "\\" in self.file or not path.parts:
            raise StoreError(f"shard file {self.file!r} is not a path below the store's folder")
        for field in ("stage", "bytes"):
            if type(value := getattr(self, field)) is not int or value < 0:
                raise StoreError(f"shard {self.file!r}: {field}={value!r} is not a whole number of at least 0")
        if not isinstance(self.part, str) or not self.part:
            raise StoreError(f"shard {self.file!r}: part={self.part!r} is not a name")
        if self.tier not in {tier.value for tier in Tier}:
            raise StoreError(f"shard {self.file!r}: tier={self.tier!r} is not one of device, host, disk")
        object.__setattr__(self, "tier", Tier(self.tier))
        if not isinstance(self.sha256, str) or len(self.sha256) != 64 or set(self.sha256) - set("0123456789abcdef"):
            raise StoreError(f"shard {self.file!r}: sha256={self.sha256!r} is not 64 hexadecimal digits")


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The description of a store: what it was made from and what it is made of.

    Args:
        format_version: `FORMAT_VERSION` of the program that wrote it.
        source: Hub id or folder that was converted.
        revision: commit of the Hub repository, or `None` for a folder.
        dtype: torch's name of the weights' type, e.g. `"float16"`.
        quantization: `None`, or which tensors are quantized and how (JSON values; `weights.quantized` reads them).
        placement: `None`, or the shares `{"device", "host", "disk"}` by which the shards' tiers were chosen.
        shards: every shard, ordered by stage.
        fingerprint: hash of source, dtype, layout and format; equal fingerprints mean equal stores.
    """

    format_version: int
    source: str
    revision: str | None
    dtype: str
    quantization: Mapping[str, Any] | None
    placement: Mapping[str, float] | None
    shards: tuple[ShardEntry, ...]
    fingerprint: str = ""

    @classmethod
    def load(cls, folder: str | Path) -> Manifest:
        """Reads and checks the manifest of a store.

        Raises:
            StoreError: there is none, or it is broken or of another format version.
        """
        path = Path(folder) / MANIFEST_NAME
        fields = _read_json_object(path)
        _check_version(path, fields.get("format_version"))
        _check_names(path, "the manifest", fields, _names(cls))
        shards = fields.pop("shards")
        if not isinstance(shards, list) or not all(isinstance(entry, dict) for entry in shards):
            _bad_manifest(path, "its shards are not a list of objects")
        for entry in shards:
            _check_names(path, f"shard {entry.get('file', '?')!r}", entry, _names(ShardEntry))
        try:
            entries = tuple(ShardEntry(**entry) for entry in shards)
        except StoreError as error:
            _bad_manifest(path, str(error))
        _check_types(path, fields)
        if len({entry.file for entry in entries}) != len(entries):
            _bad_manifest(path, "it lists a shard twice")
        return cls(shards=entries, **fields)

    def encode(self) -> bytes:
        """The manifest as it lies on disk: JSON, two spaces of indentation, one final newline."""
        return (json.dumps(dataclasses.asdict(self), indent=2) + "\n").encode()

    def save(self, folder: str | Path) -> None:
        """Replaces the folder's manifest at once: a reader sees the old one or the new one, also after a power cut."""
        write_atomically(Path(folder) / MANIFEST_NAME, self.encode())

    def check_files(self, folder: str | Path) -> None:
        """Checks that every shard exists with its exact size. Reads no data; `verify` compares the hashes.

        Raises:
            StoreError: a shard is missing or of another size.
        """
        for shard in self.shards:
            path = Path(folder) / shard.file
            try:
                size = path.stat().st_size
            except OSError as error:
                raise StoreError(
                    f"shard {path} is listed in the manifest but cannot be read ({error.strerror}); "
                    f"convert {self.source} again"
                ) from error
            if size != shard.bytes:
                raise StoreError(
                    f"shard {path} has {size} bytes, the manifest says {shard.bytes}; convert {self.source} again"
                )

    def moved(self, file: str, tier: Tier | str) -> Manifest:
        """A manifest in which shard `file` belongs to `tier`; no shard's bytes change.

        Raises:
            StoreError: there is no such shard or tier.
        """
        if tier not in {known.value for known in Tier}:
            raise StoreError(f"there is no tier {tier!r}; tiers are device, host and disk")
        if all(shard.file != file for shard in self.shards):
            raise StoreError(f"the store has no shard {file!r}{_suggestion(file, [s.file for s in self.shards])}")
        shards = tuple(dataclasses.replace(s, tier=Tier(tier)) if s.file == file else s for s in self.shards)
        return dataclasses.replace(self, shards=shards)


def is_store(folder: str | Path) -> bool:
    """Whether the folder holds a manifest, that is, a conversion that was finished."""
    return (Path(folder) / MANIFEST_NAME).is_file()


def shard_file(stage: int, part: str) -> str:
    """Name of a shard below the store's folder, e.g. `"shards/stage-00001-mlp.safetensors"`."""
    return f"shards/stage-{stage:05d}-{part}.safetensors"


def write_atomically(path: Path, data: bytes) -> None:
    """Replaces `path` by `data`: written beside it, flushed to the device, renamed, the rename flushed too."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Flushes a folder's entries to the device, so that a rename in it survives a power cut."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:  # Windows opens no folders; its renames need no such flush
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _names(kind: type[Manifest | ShardEntry]) -> list[str]:
    return [field.name for field in dataclasses.fields(kind)]


def _bad_manifest(path: Path, fact: str) -> NoReturn:
    raise StoreError(f"{path} is not a usable manifest: {fact}; convert the model again")


def _read_json_object(path: Path) -> dict[str, Any]:
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        raise StoreError(
            f"{path.parent} is not a store: it has no {path.name} (an interrupted conversion has none); "
            "convert the model again to finish it"
        ) from None
    except OSError as error:
        raise StoreError(f"cannot read {path}: {error.strerror}") from error
    try:
        value = json.loads(text)
    except ValueError as error:
        _bad_manifest(path, f"it is not JSON ({error})")
    if not isinstance(value, dict):
        _bad_manifest(path, f"it is a JSON {type(value).__name__}, not an object")
    return value


def _check_version(path: Path, version: Any) -> None:
    if type(version) is not int or version < 1:
        _bad_manifest(path, f"its format_version is {version!r}")
    if version != FORMAT_VERSION:
        remedy = "upgrade flexgen_hf" if version > FORMAT_VERSION else "convert the model again"
        raise StoreError(
            f"{path} has format version {version}, this program reads version {FORMAT_VERSION}; {remedy}"
            + (", or convert the model again with this one" if version > FORMAT_VERSION else "")
        )


def _check_names(path: Path, what: str, fields: Mapping[str, Any], known: list[str]) -> None:
    for name in fields:
        if name not in known:
            _bad_manifest(path, f"{what} has the unknown field {name!r}{_suggestion(name, known)}")
    if missing := [name for name in known if name not in fields]:
        _bad_manifest(path, f"{what} lacks {', '.join(missing)}")


def _check_types(path: Path, fields: Mapping[str, Any]) -> None:
    for name in ("source", "dtype", "fingerprint"):
        if not isinstance(fields[name], str):
            _bad_manifest(path, f"its {name} is {fields[name]!r}, not a text")
    if not isinstance(fields["revision"], (str, type(None))):
        _bad_manifest(path, f"its revision is {fields['revision']!r}, neither a text nor null")
    for name in ("quantization", "placement"):
        if not isinstance(fields[name], (dict, type(None))):
            _bad_manifest(path, f"its {name} is {fields[name]!r}, neither an object nor null")
    placement = fields["placement"]
    if placement is not None and set(placement) != {tier.value for tier in Tier}:
        _bad_manifest(path, f"its placement has the fields {sorted(placement)}, not device, disk, host")


def _suggestion(name: str, known: Iterable[str]) -> str:
    match = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {match[0]!r}?" if match else ""
