"""The store format: its literal bytes, and every way in which a file or a manifest can be broken."""

import dataclasses
import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from flexgen_hf.errors import StoreError
from flexgen_hf.policy import Tier
from flexgen_hf.weights.format import (
    MANIFEST_NAME,
    Manifest,
    ShardEntry,
    TensorExtent,
    encode_header,
    is_store,
    read_header,
    shard_file,
)

SHARDS = (
    ShardEntry("shards/stage-00000-embedding.safetensors", 0, "embedding", Tier.HOST, 4196, "0" * 64),
    ShardEntry("shards/stage-00001-mlp.safetensors", 1, "mlp", Tier.DISK, 8192, "ab" * 32),
)
MANIFEST = Manifest(
    format_version=1,
    source="facebook/opt-125m",
    revision="27dcfa74d334bc871f3234de431e71c6eeba5dd6",
    dtype="float16",
    quantization=None,
    placement={"device": 0.0, "host": 0.25, "disk": 0.75},
    shards=SHARDS,
    fingerprint="f" * 64,
)


def test_header_bytes():
    header = encode_header({"a.weight": ("F16", (2, 3)), "b": ("U8", ())}, {"format": "pt"})
    text = (
        b'{"__metadata__":{"format":"pt"},'
        b'"a.weight":{"dtype":"F16","shape":[2,3],"data_offsets":[0,12]},'
        b'"b":{"dtype":"U8","shape":[],"data_offsets":[12,13]}}'
    )
    assert header == struct.pack("<Q", 4088) + text + b" " * (4088 - len(text))
    assert len(header) == 4096


def test_a_long_header_ends_on_a_page_too():
    header = encode_header({f"layer.{i}.weight": ("F32", (8, 8)) for i in range(100)})
    assert len(header) % 4096 == 0
    assert len(header) > 4096


def test_safetensors_reads_what_we_write(tmp_path):
    path = tmp_path / "shard.safetensors"
    values = torch.arange(6, dtype=torch.float16)
    path.write_bytes(
        encode_header({"a": ("F16", (2, 3)), "b": ("U8", ())}, {"format": "pt"}) + values.numpy().tobytes() + b"\x07"
    )
    with safe_open(path, "pt") as file:
        assert torch.equal(file.get_tensor("a"), values.view(2, 3))
        assert file.get_tensor("b").item() == 7
    assert read_header(path) == {
        "a": TensorExtent(path, 4096, 12, "F16", (2, 3)),
        "b": TensorExtent(path, 4108, 1, "U8", ()),
    }


def test_we_read_what_safetensors_writes(tmp_path):
    tensors = {"x": torch.randn(3, 5), "empty": torch.empty(0, 4), "y": torch.randn(7).bfloat16()}
    save_file(tensors, tmp_path / "a.safetensors")
    extents = read_header(tmp_path / "a.safetensors")
    raw = (tmp_path / "a.safetensors").read_bytes()
    assert set(extents) == set(tensors)
    for name, extent in extents.items():
        assert extent.shape == tuple(tensors[name].shape)
        assert raw[extent.offset : extent.offset + extent.nbytes] == bytes(
            tensors[name].reshape(-1).view(torch.uint8).numpy()
        )


def entry(begin: int, end: int, shape: object = None, dtype: object = "U8") -> dict[str, object]:
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


def whole(header: object, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


@pytest.mark.parametrize(
    ("content", "fact"),
    [
        (b"", "has 0 bytes"),
        (b"\x01\x02", "has 2 bytes"),
        (struct.pack("<Q", 1 << 60), "outside 2"),
        (struct.pack("<Q", 0) + b"{}", "outside 2"),
        (struct.pack("<Q", 500) + b"{}", "has 10 bytes in all"),
        (whole(b"{nonsense}", b""), "not JSON"),
        (whole(b"\xff\xfe", b""), "not JSON"),
        (whole(b'{"a":1,"a":2}', b""), "appears twice"),
        (whole([1, 2], b""), "not an object"),
        (whole({"a": 5}, b""), "lacks dtype, shape or data_offsets"),
        (whole({"a": {"dtype": "U8", "shape": [1]}}, b"x"), "lacks dtype, shape or data_offsets"),
        (whole({"a": entry(0, 4, dtype="Q4")}, b"abcd"), "unknown type 'Q4'"),
        (whole({"a": entry(0, 4, shape=[-4])}, b"abcd"), "shape"),
        (whole({"a": entry(0, 4, shape="4")}, b"abcd"), "shape"),
        (whole({"a": entry(0, 4, shape=[True, 4])}, b"abcd"), "shape"),
        (whole({"a": entry(4, 0, shape=[0])}, b"abcd"), "span -4"),
        (whole({"a": entry(0, 4, dtype="F16")}, b"abcd"), "needs 8 bytes but its offsets span 4"),
        (whole({"a": entry(0, 4), "b": entry(2, 6)}, b"abcdef"), "overlaps"),
        (whole({"a": entry(0, 4), "b": entry(5, 6)}, b"abcdef"), "gap"),
        (whole({"a": entry(1, 4)}, b"abcd"), "gap"),
        (whole({"a": entry(0, 4)}, b"abc"), "cut short"),
        (whole({"a": entry(0, 4)}, b"abcde"), "too long"),
        (whole({"a": entry(0, 1 << 62)}, b"abcd"), "cut short"),
    ],
)
def test_a_broken_file_is_refused(tmp_path, content, fact):
    path = tmp_path / "broken.safetensors"
    path.write_bytes(content)
    with pytest.raises(StoreError, match=fact) as caught:
        read_header(path)
    assert str(path) in str(caught.value)
    assert "again" in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(StoreError, match=r"cannot read .*gone\.safetensors"):
        read_header(tmp_path / "gone.safetensors")


def test_manifest_bytes(tmp_path):
    MANIFEST.save(tmp_path)
    assert (tmp_path / "flexgen_manifest.json").read_text() == (
        """{
  "format_version": 1,
  "source": "facebook/opt-125m",
  "revision": "27dcfa74d334bc871f3234de431e71c6eeba5dd6",
  "dtype": "float16",
  "quantization": null,
  "placement": {
    "device": 0.0,
    "host": 0.25,
    "disk": 0.75
  },
  "shards": [
    {
      "file": "shards/stage-00000-embedding.safetensors",
      "stage": 0,
      "part": "embedding",
      "tier": "host",
      "bytes": 4196,
      "sha256": \""""
        + "0" * 64
        + """"
    },
    {
      "file": "shards/stage-00001-mlp.safetensors",
      "stage": 1,
      "part": "mlp",
      "tier": "disk",
      "bytes": 8192,
      "sha256": \""""
        + "ab" * 32
        + """"
    }
  ],
  "fingerprint": \""""
        + "f" * 64
        + """"
}
"""
    )
    assert Manifest.load(tmp_path) == MANIFEST
    assert [path.name for path in tmp_path.iterdir()] == [MANIFEST_NAME]


def test_moving_a_shard_edits_the_manifest_only():
    moved = MANIFEST.moved("shards/stage-00001-mlp.safetensors", "device")
    assert [shard.tier for shard in moved.shards] == [Tier.HOST, Tier.DEVICE]
    assert dataclasses.replace(moved, shards=SHARDS) == MANIFEST
    with pytest.raises(StoreError, match=r"did you mean 'shards/stage-00001-mlp.safetensors'"):
        MANIFEST.moved("shards/stage-00001-mpl.safetensors", "device")
    with pytest.raises(StoreError, match="no tier 'gpu'"):
        MANIFEST.moved("shards/stage-00001-mlp.safetensors", "gpu")


def edited(**fields: object) -> bytes:
    return json.dumps({**json.loads(MANIFEST.encode()), **fields}).encode()


def edited_shard(**fields: object) -> bytes:
    first, *rest = json.loads(MANIFEST.encode())["shards"]
    return edited(shards=[{**first, **fields}, *rest])


@pytest.mark.parametrize(
    ("content", "fact"),
    [
        (b"{", "not JSON"),
        (b"[]", "not an object"),
        (b"{}", "format_version is None"),
        (edited(format_version="1"), "format_version is '1'"),
        (edited(format_version=2), r"version 2, this program reads version 1; upgrade flexgen_hf"),
        (edited(shard=[]), "unknown field 'shard'; did you mean 'shards'"),
        (b'{"format_version": 1, "source": "x"}', "lacks revision, dtype"),
        (edited(dtype=16), "dtype is 16"),
        (edited(revision=3), "revision is 3"),
        (edited(quantization="4bit"), "quantization"),
        (edited(placement={"device": 1}), "placement"),
        (edited(shards={}), "not a list"),
        (edited_shard(file="../../etc/passwd"), "not a path below"),
        (edited_shard(file="/etc/passwd"), "not a path below"),
        (edited_shard(tier="gpu"), "not one of device, host, disk"),
        (edited_shard(bytes=-1), "bytes=-1"),
        (edited_shard(stage=1.5), "stage=1.5"),
        (edited_shard(part=""), "part"),
        (edited_shard(sha256="xyz"), "64 hexadecimal digits"),
        (edited_shard(size=3), "unknown field 'size'"),
        (edited_shard(file=SHARDS[1].file), "twice"),
    ],
)
def test_a_broken_manifest_is_refused(tmp_path, content, fact):
    (tmp_path / MANIFEST_NAME).write_bytes(content)
    with pytest.raises(StoreError, match=fact):
        Manifest.load(tmp_path)


def test_a_folder_without_manifest_is_no_store(tmp_path):
    assert not is_store(tmp_path)
    with pytest.raises(StoreError, match="is not a store"):
        Manifest.load(tmp_path)


def test_check_files_names_the_shard(tmp_path):
    (tmp_path / "shards").mkdir()
    for shard in SHARDS:
        (tmp_path / shard.file).write_bytes(bytes(shard.bytes))
    MANIFEST.check_files(tmp_path)
    (tmp_path / SHARDS[1].file).write_bytes(bytes(100))
    with pytest.raises(StoreError, match=r"stage-00001-mlp\.safetensors has 100 bytes, the manifest says 8192"):
        MANIFEST.check_files(tmp_path)
    (tmp_path / SHARDS[1].file).unlink()
    with pytest.raises(StoreError, match=r"stage-00001-mlp\.safetensors is listed .* cannot be read"):
        MANIFEST.check_files(tmp_path)


def test_a_failed_save_leaves_the_old_manifest(tmp_path, monkeypatch):
    MANIFEST.save(tmp_path)

    def fail(_descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="Input/output error"):
        dataclasses.replace(MANIFEST, source="other").save(tmp_path)
    assert Manifest.load(tmp_path) == MANIFEST
    assert list(tmp_path.iterdir()) == [tmp_path / MANIFEST_NAME]


def test_shard_names():
    assert shard_file(3, "attention") == "shards/stage-00003-attention.safetensors"
    assert Path(shard_file(0, "embedding")).suffix == ".safetensors"
