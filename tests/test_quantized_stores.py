"""Stores with quantized tensors: what lies where, converting, verifying, resuming, and what is refused."""

import dataclasses
import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from conversion.convert import convert
from conversion.verify import verify
from flexgen_hf.checkpoint_files import index_files
from flexgen_hf.errors import ConversionError, PolicyError, StoreError
from flexgen_hf.policy import Compression
from flexgen_hf.quantization import groupwise, search
from flexgen_hf.quantization.groupwise import GroupFormat
from flexgen_hf.weights import pieces
from flexgen_hf.weights.format import INDEX_NAME, MANIFEST_NAME, Manifest, is_store, read_header
from tests.checkpoints import opt_config, write_random_checkpoint
from tests.test_conversion_resume import finished_shards, kill_at
from tests.tiny import load

ROOT = Path(__file__).parent.parent
FOUR = Compression(weights=4, group_size=32)
NAME = "model.decoder.layers.1.fc1.weight"  # 64 x 32


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_checkpoint(tmp_path_factory.mktemp("source"), opt_config())


@pytest.fixture(scope="module")
def stores(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A store for each method."""
    made = {}
    for method in ("search", "minmax"):
        made[method] = tmp_path_factory.mktemp(method)
        convert(source, made[method], compression=FOUR, method=method)
    return made


@pytest.fixture
def store(stores: dict[str, Path], tmp_path: Path) -> Path:
    """One that a test may damage."""
    return Path(shutil.copytree(stores["search"], tmp_path / "copy"))


def shard_of(store: Path, name: str) -> Path:
    return store / str(json.loads((store / INDEX_NAME).read_text())["weight_map"][name])


def part(store: Path, name: str) -> torch.Tensor:
    with safe_open(shard_of(store, name), "pt") as file:
        return file.get_tensor(name)  # type: ignore[no-any-return]


def change_manifest(store: Path, **fields: Any) -> None:
    manifest = json.loads((store / MANIFEST_NAME).read_text())
    manifest["quantization"].update(fields)
    (store / MANIFEST_NAME).write_text(json.dumps(manifest))


def flip(store: Path, name: str, at: int, bit: int) -> None:
    """Changes one bit of a part, and has the manifest agree with it: only its source can tell."""
    shard = shard_of(store, name)
    content = bytearray(shard.read_bytes())
    content[read_header(shard)[name].offset + at] ^= 1 << bit
    shard.write_bytes(content)
    manifest, file = Manifest.load(store), str(shard.relative_to(store))
    digest = hashlib.sha256(content).hexdigest()
    shards = tuple(dataclasses.replace(s, sha256=digest) if s.file == file else s for s in manifest.shards)
    dataclasses.replace(manifest, shards=shards).save(store)


# ------------------------------------------------------------------------------------------------------ what lies there
def test_the_manifest_says_what_is_quantized(stores: dict[str, Path]) -> None:
    for method, store in stores.items():
        said = Manifest.load(store).quantization
        assert said is not None
        assert (said["layout_version"], said["method"], len(said["tensors"])) == (1, method, 18)
        assert said["tensors"][NAME] == {"bits": 4, "group_size": 32, "shape": [64, 32]}


@pytest.mark.parametrize("method", ["search", "minmax"])
def test_the_parts_are_what_the_reference_makes(source: Path, stores: dict[str, Path], method: str) -> None:
    fmt, store = GroupFormat(4, 32), stores[method]
    original = load_file(source / "model.safetensors")
    reference = {"search": search.quantize, "minmax": groupwise.quantize}[method]
    for name, value in original.items():
        if ".layers." in name and value.dim() == 2:
            expected = reference(value, fmt)
            assert torch.equal(part(store, name), expected.codes)
            assert torch.equal(part(store, f"{name}.scales"), expected.scales)
            assert torch.equal(part(store, f"{name}.minima"), expected.minima)
        else:
            assert torch.equal(part(store, name), value), name


def test_the_parts_of_a_tensor_lie_together_behind_what_is_not_quantized(stores: dict[str, Path]) -> None:
    names = list(read_header(shard_of(stores["search"], NAME)))
    quantized = [name for name in names if name.endswith((".scales", ".minima")) or f"{name}.scales" in names]
    assert names[-len(quantized) :] == quantized
    assert quantized == [f"{name}{end}" for name in quantized[2::3] for end in (".scales", ".minima", "")]


def test_a_store_is_smaller_by_what_the_format_says(source: Path, stores: dict[str, Path], tmp_path: Path) -> None:
    convert(source, tmp_path / "plain")
    elements = 3 * (4 * 32 * 32 + 2 * 32 * 64)
    plain, small = (
        sum(e.nbytes for e in extents_of(store).values()) for store in (tmp_path / "plain", stores["search"])
    )
    assert plain - small == elements * 2 - elements * 5 // 8  # 4 bits, and two times 16 for each group of 32


def extents_of(store: Path) -> dict[str, Any]:
    return {k: v for s in Manifest.load(store).shards for k, v in read_header(store / s.file).items()}


def test_rows_are_quantized_in_pieces(source: Path, stores: dict[str, Path], tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(pieces, "PIECE_BYTES", 3 * 32 * 2)
    again = convert(source, tmp_path / "store", compression=FOUR)
    assert again == Manifest.load(stores["search"])


# ------------------------------------------------------------------------------------------------------------ verifying
@pytest.mark.parametrize("method", ["search", "minmax"])
def test_verify(source: Path, stores: dict[str, Path], method: str) -> None:
    report = verify(stores[method], source)
    assert (report.quantized, report.shards) == (18, len(Manifest.load(stores[method]).shards))
    assert report.tensors == len(load_file(source / "model.safetensors"))


def test_verify_finds_a_flipped_bit(source: Path, store: Path) -> None:
    shard = shard_of(store, NAME)
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(StoreError, match=rf"shard {shard} is damaged"):
        verify(store, source)


@pytest.mark.parametrize(
    ("method", "end", "bit", "fact"),
    [
        ("search", "", 0, "is not what quantizing its source gives: codes differ first in row 5;"),
        ("search", ".scales", 0, "scales differ first in row 40;"),
        ("search", ".minima", 7, "minima differ first in row 40;"),
        ("minmax", "", 7, "errs by .* in row 5, column 1[6-9], where half a step is"),
        ("minmax", ".minima", 0, "minima differ first in row 40;"),
    ],
)
def test_verify_names_the_tensor_that_is_not_its_sources(
    source: Path, stores: dict[str, Path], tmp_path: Path, method: str, end: str, bit: int, fact: str
) -> None:
    """Also where every hash is right."""
    store = Path(shutil.copytree(stores[method], tmp_path / "copy"))
    flip(store, f"{NAME}{end}", 80, bit)  # of 16 bytes of codes in a row, or of two
    with pytest.raises(StoreError, match=rf"tensor '{NAME}' {'' if 'errs' in fact else '.*'}{fact}"):
        verify(store, source)


def test_verify_compares_with_the_source_as_it_is(source: Path, tmp_path: Path, stores: dict[str, Path]) -> None:
    other = Path(shutil.copytree(source, tmp_path / "other"))
    extent = read_header(other / "model.safetensors")[NAME]
    with (other / "model.safetensors").open("r+b") as file:
        file.seek(extent.offset + 2 * (7 * 32 + 19))
        file.write(torch.tensor(2.5).half().numpy().tobytes())
    for store, fact in ((stores["minmax"], "errs by .* in row 7, column 19"), (stores["search"], "in row 7;")):
        with pytest.raises(StoreError, match=rf"{NAME}.* {fact}"):
            verify(store, other)


# -------------------------------------------------------------------------------------------------- what is refused
@pytest.mark.parametrize(
    ("fields", "fact"),
    [
        ({"layout_version": 2}, r"layout version 2, this program reads version 1; upgrade flexgen_hf"),
        ({"layout_version": None}, "layout version None"),
        ({"method": "magic"}, "a quantization of method 'magic'"),
        ({"tensors": {NAME: {"bits": 5, "group_size": 32, "shape": [64, 32]}}}, f"'{NAME}' cannot be read .*5 bits"),
        ({"tensors": {NAME: {"bits": 8, "group_size": 32, "shape": [64, 32]}}}, f"'{NAME}' .* in 8 bits .*32"),
        ({"tensors": {NAME: {"bits": 4, "group_size": 32, "shape": [64, 0]}}}, f"'{NAME}' cannot be read .*shape"),
        ({"tensors": {NAME: {"bits": 4, "shape": [64, 32]}}}, f"'{NAME}' cannot be read .*group_size"),
        ({"tensors": {"nothing": {"bits": 4, "group_size": 32, "shape": [64, 32]}}}, r"lacks 'nothing\.scales'"),
    ],
)
def test_a_store_that_is_not_understood(store: Path, source: Path, tmp_path: Path, fields: Any, fact: str) -> None:
    change_manifest(store, **fields)
    with pytest.raises(StoreError, match=fact):
        load(store, tmp_path / "offload")
    with pytest.raises(StoreError, match=fact):
        verify(store, source)


def test_a_missing_part_is_named(store: Path) -> None:
    shards = [store / shard.file for shard in Manifest.load(store).shards]
    found = index_files(shards)
    assert found[NAME].shape == (64, 32)
    assert found[NAME].quantized is not None
    assert f"{NAME}.scales" not in found
    shard = shard_of(store, NAME)
    shard.write_bytes(shard.read_bytes().replace(f"{NAME}.minima".encode(), f"{NAME}.minimX".encode()))
    with pytest.raises(StoreError, match=rf"lacks '{NAME}\.minima', a part of a quantized tensor"):
        index_files(shards)


def test_a_quantized_store_is_no_source(stores: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="is a store that is quantized already; convert the checkpoint"):
        convert(stores["search"], tmp_path / "again")


def test_another_compression_does_not_replace_a_store(source: Path, store: Path) -> None:
    for other in ({"compression": Compression(weights=4)}, {"compression": FOUR, "method": "minmax"}, {}):
        with pytest.raises(ConversionError, match="quantized, revision None\\) with another compression, or as it was"):
            convert(source, store, **other)
    convert(source, store, compression=Compression(weights=8), force=True)
    verify(store, source)


def test_what_cannot_be_asked_for(source: Path, tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="method='magic' does not exist; use 'minmax' or 'search'"):
        convert(source, tmp_path / "store", compression=FOUR, method="magic")  # type: ignore[arg-type]
    with pytest.raises(PolicyError, match="'5bit' is unknown"):
        convert(source, tmp_path / "store", compression="5bit")
    assert not (tmp_path / "store").exists()


# ---------------------------------------------------------------------------------------------------------- resuming
def test_a_killed_conversion_goes_on(source: Path, stores: dict[str, Path], tmp_path: Path) -> None:
    out, total = tmp_path / "store", sum(shard.bytes for shard in Manifest.load(stores["search"]).shards)
    for share in (0.3, 0.7):
        kill_at(int(total * share), source, out, tmp_path / "mark", FOUR.to_dict())
        assert not is_store(out)
    times = {file: (out / file).stat().st_mtime_ns for file in finished_shards(out)}
    assert times
    assert convert(source, out, compression=FOUR) == Manifest.load(stores["search"])
    assert {file: (out / file).stat().st_mtime_ns for file in times} == times


def test_what_was_finished_under_another_compression_is_not_kept(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "store"
    kill_at(60_000, source, out, tmp_path / "mark")
    assert finished_shards(out)
    convert(source, out, compression=FOUR)
    verify(out, source)


def test_the_command_line(source: Path, stores: dict[str, Path], tmp_path: Path) -> None:
    out, options = tmp_path / "store", ("--compression", '{"weights": 4, "group_size": 32}', "--method", "minmax")
    command = [sys.executable, "-m", "conversion", str(source), str(out), *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert ": float16, 18 tensors quantized, " in done.stdout
    assert Manifest.load(out) == Manifest.load(stores["minmax"])
    command = [sys.executable, "-m", "conversion", "verify", str(out), str(source)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "(18 of them quantized)" in done.stdout
