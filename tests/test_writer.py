"""Writing stores: contents, casts, resuming, full disks, two processes, other stores in the way."""

import errno
import hashlib
import json
import multiprocessing
import os
import shutil
import subprocess
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from flexgen_hf.errors import CapacityError, ConversionError, StoreError
from flexgen_hf.policy import Placement, Tier
from flexgen_hf.storage.ledger import gib
from flexgen_hf.weights import pieces, writer
from flexgen_hf.weights.format import INDEX_NAME, Manifest, is_store
from flexgen_hf.weights.writer import JOURNAL_NAME, LOCK_NAME, Origin, ShardPlan, TensorPlan, write_store

ORIGIN = Origin("somewhere", "abc", "float16", "fingerprint-1")


def tensor(number: int) -> torch.Tensor:
    return torch.randn(6, 5, generator=torch.Generator().manual_seed(number))


def plans(count: int = 3, loaded: list[str] | None = None) -> list[ShardPlan]:
    """Shards of one fp16 matrix, one fp32 vector and one scalar each; `loaded` notes what is read."""

    def load(name: str, value: torch.Tensor) -> torch.Tensor:
        if loaded is not None:
            loaded.append(name)
        return value

    result = []
    for stage in range(count):
        values = {f"{stage}.w": tensor(stage), f"{stage}.b": tensor(stage)[0], f"{stage}.n": torch.tensor(stage)}
        dtypes = [torch.float16, torch.float32, torch.int64]
        members = [
            TensorPlan(name, dtype, tuple(value.shape), lambda n=name, v=value: load(n, v))  # type: ignore[misc]
            for (name, value), dtype in zip(values.items(), dtypes, strict=True)
        ]
        result.append(ShardPlan(stage, "mlp", members))
    return result


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_a_store_holds_what_was_planned(tmp_path):
    out = tmp_path / "store"
    seen = []
    manifest = write_store(
        out, plans(), ORIGIN, companions={"config.json": b"{}"}, progress=lambda *now: seen.append(now)
    )
    assert Manifest.load(out) == manifest
    assert (manifest.source, manifest.revision, manifest.dtype) == ("somewhere", "abc", "float16")
    assert {shard.tier for shard in manifest.shards} == {Tier.DISK}
    assert manifest.placement is None
    assert files(out) - {LOCK_NAME} == {
        "config.json", "flexgen_manifest.json", INDEX_NAME, *(shard.file for shard in manifest.shards)
    }  # fmt: skip
    for stage, shard in enumerate(manifest.shards):
        content = (out / shard.file).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (shard.bytes, shard.sha256)
        with safe_open(out / shard.file, "pt") as file:
            assert list(file.keys())
            assert torch.equal(file.get_tensor(f"{stage}.w"), tensor(stage).half())
            assert torch.equal(file.get_tensor(f"{stage}.b"), tensor(stage)[0])
            assert file.get_tensor(f"{stage}.n").item() == stage
    total = sum(shard.bytes for shard in manifest.shards)
    assert seen[-1] == (total, total)
    assert seen == sorted(seen)


def test_the_index_lets_transformers_find_tensors(tmp_path):
    write_store(tmp_path, plans(1), ORIGIN)
    assert json.loads((tmp_path / INDEX_NAME).read_text()) == {
        "metadata": {"total_size": 6 * 5 * 2 + 5 * 4 + 8},
        "weight_map": dict.fromkeys(("0.w", "0.b", "0.n"), "shards/stage-00000-mlp.safetensors"),
    }


def test_tensors_are_cast_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(pieces, "PIECE_BYTES", 12)
    manifest = write_store(tmp_path, plans(1), ORIGIN)
    with safe_open(tmp_path / manifest.shards[0].file, "pt") as file:
        assert torch.equal(file.get_tensor("0.w"), tensor(0).half())


def test_extents_are_read_in_pieces(tmp_path, monkeypatch):
    from flexgen_hf.weights.format import read_header

    monkeypatch.setattr(pieces, "PIECE_BYTES", 10)
    first = write_store(tmp_path / "a", plans(1), ORIGIN)
    extent = read_header(tmp_path / "a" / first.shards[0].file)["0.b"]
    plan = TensorPlan("x", torch.bfloat16, (5,), pytest.fail, extent)
    second = write_store(tmp_path / "b", [ShardPlan(0, "mlp", [plan])], ORIGIN)
    with safe_open(tmp_path / "b" / second.shards[0].file, "pt") as file:
        assert torch.equal(file.get_tensor("x"), tensor(0)[0].bfloat16())


def test_a_source_that_ends_early_is_named(tmp_path):
    path = tmp_path / "source"
    path.write_bytes(bytes(100))
    from flexgen_hf.weights.format import TensorExtent

    plan = TensorPlan("x", torch.float32, (50,), pytest.fail, TensorExtent(path, 0, 200, "F32", (50,)))
    with pytest.raises(StoreError, match=r"source has 100 bytes but a tensor in it ends at byte 200"):
        write_store(tmp_path / "out", [ShardPlan(0, "mlp", [plan])], ORIGIN)


def test_a_tensor_of_another_shape_is_refused(tmp_path):
    plan = TensorPlan("x", torch.float32, (50,), lambda: torch.zeros(5, 10))
    with pytest.raises(StoreError, match=r"'x' has shape \[5, 10\] where the model needs \[50\]"):
        write_store(tmp_path, [ShardPlan(0, "mlp", [plan])], ORIGIN)
    assert not list(tmp_path.glob("shards/*"))


def test_an_interrupted_run_goes_on(tmp_path):
    def stop(done: int, total: int) -> None:
        if done > total * 0.7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_store(tmp_path, plans(), ORIGIN, progress=stop)
    assert not is_store(tmp_path)
    assert not list(tmp_path.rglob("*.tmp"))
    journal = json.loads((tmp_path / JOURNAL_NAME).read_text())
    assert [entry["file"] for entry in journal["shards"]] == [plan.file for plan in plans()[:2]]

    loaded: list[str] = []
    manifest = write_store(tmp_path, plans(loaded=loaded), ORIGIN)
    assert {name[0] for name in loaded} == {"2"}
    assert manifest == write_store(tmp_path / "fresh", plans(), ORIGIN)
    assert not (tmp_path / JOURNAL_NAME).exists()


@pytest.mark.parametrize("change", ["source", "dtype", "layout", "truncated shard", "broken journal"])
def test_what_an_interrupted_run_left_is_used_only_if_it_fits(tmp_path, change):
    def stop(done: int, total: int) -> None:
        if done > total * 0.7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_store(tmp_path, plans(), ORIGIN, progress=stop)
    origin, new, loaded = ORIGIN, plans(), list[str]()
    new = plans(loaded=loaded)
    expected = {"0", "1", "2"}
    if change == "source":
        origin = Origin("somewhere", "abc", "float16", "fingerprint-2")
    elif change == "dtype":
        origin = Origin("somewhere", "abc", "bfloat16", "fingerprint-1")
    elif change == "layout":
        new = new[:2]
        expected = {"0", "1"}
    elif change == "truncated shard":
        (tmp_path / new[0].file).write_bytes(b"short")
        expected = {"0", "2"}
    else:
        (tmp_path / JOURNAL_NAME).write_bytes(b"{")
    manifest = write_store(tmp_path, new, origin)
    assert {name[0] for name in loaded} == expected
    manifest.check_files(tmp_path)
    assert {path.name for path in (tmp_path / "shards").iterdir()} == {
        Path(shard.file).name for shard in manifest.shards
    }


def test_what_a_kill_between_two_steps_leaves_is_tidied_up(tmp_path):
    (tmp_path / "flexgen_journal.json.4711.tmp").touch()  # while the journal was replaced
    write_store(tmp_path, plans(), ORIGIN)
    assert not list(tmp_path.rglob("*.tmp"))
    (tmp_path / JOURNAL_NAME).write_text("{}")  # after the manifest, before the journal was removed
    write_store(tmp_path, plans(), ORIGIN)
    assert not (tmp_path / JOURNAL_NAME).exists()


def test_a_finished_store_is_left_alone(tmp_path):
    loaded: list[str] = []
    first = write_store(tmp_path, plans(), ORIGIN)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    assert write_store(tmp_path, plans(loaded=loaded), ORIGIN) == first
    assert not loaded
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}


def test_a_finished_store_that_lost_a_shard_gets_it_back(tmp_path):
    loaded: list[str] = []
    first = write_store(tmp_path, plans(), ORIGIN)
    (tmp_path / first.shards[1].file).unlink()
    assert write_store(tmp_path, plans(loaded=loaded), ORIGIN) == first
    assert {name[0] for name in loaded} == {"1"}
    first.check_files(tmp_path)


def test_another_placement_moves_shards_in_the_manifest_only(tmp_path):
    loaded: list[str] = []
    write_store(tmp_path, plans(), ORIGIN)
    moved = write_store(tmp_path, plans(loaded=loaded), ORIGIN, placement=Placement(host=1.0))
    assert not loaded
    assert {shard.tier for shard in moved.shards} == {Tier.HOST}
    assert Manifest.load(tmp_path) == moved
    assert moved.placement == {"device": 0.0, "host": 1.0, "disk": 0.0}


def test_another_store_in_the_way_is_replaced_only_by_force(tmp_path):
    first = write_store(tmp_path, plans(), ORIGIN)
    other = Origin("elsewhere", None, "float16", "fingerprint-2")
    with pytest.raises(ConversionError, match=r"already holds a store of somewhere .*--force"):
        write_store(tmp_path, plans(2), other)
    assert Manifest.load(tmp_path) == first
    first.check_files(tmp_path)
    second = write_store(tmp_path, plans(2), other, force=True)
    assert Manifest.load(tmp_path) == second
    assert len(list((tmp_path / "shards").iterdir())) == 2


def test_an_unusable_manifest_in_the_way_is_replaced_only_by_force(tmp_path):
    manifest = write_store(tmp_path, plans(), ORIGIN)
    (tmp_path / "flexgen_manifest.json").write_text(manifest.encode().decode().replace('version": 1', 'version": 9'))
    with pytest.raises(ConversionError, match=r"format version 9.*--force"):
        write_store(tmp_path, plans(), ORIGIN)
    assert write_store(tmp_path, plans(), ORIGIN, force=True) == manifest


def test_force_writes_every_shard_again(tmp_path):
    loaded: list[str] = []
    write_store(tmp_path, plans(), ORIGIN)
    write_store(tmp_path, plans(loaded=loaded), ORIGIN, force=True)
    assert {name[0] for name in loaded} == {"0", "1", "2"}


def test_a_disk_too_small_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage(1 << 20, 1 << 20, 8 << 10))
    needed = gib(sum(len(plan.header()) + plan.data_bytes for plan in plans()))
    with pytest.raises(CapacityError, match=rf"needs {needed} more but its disk has 0\.01 MiB free"):
        write_store(tmp_path, plans(), ORIGIN)
    assert files(tmp_path) <= {LOCK_NAME}


def test_a_disk_that_fills_midway_keeps_finished_shards(tmp_path, monkeypatch):
    full = {"after": 2}
    write_fully = writer._write_fully

    def fail(write: object, block: memoryview) -> None:
        if len(block) >= 4096:
            full["after"] -= 1
        if full["after"] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        write_fully(write, block)  # type: ignore[arg-type]

    monkeypatch.setattr(writer, "_write_fully", fail)
    with pytest.raises(
        CapacityError, match=r"is full .* while writing shards/stage-00002-mlp.* finished shards are kept"
    ):
        write_store(tmp_path, plans(), ORIGIN)
    assert not list(tmp_path.rglob("*.tmp"))
    assert len(list((tmp_path / "shards").iterdir())) == 2
    monkeypatch.undo()
    loaded: list[str] = []
    write_store(tmp_path, plans(loaded=loaded), ORIGIN)
    assert {name[0] for name in loaded} == {"2"}


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_really_full_disk(tmp_path, monkeypatch):
    mount = tmp_path / "small"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=40k", "tmpfs", str(mount)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("this machine lets even root mount nothing")
    try:
        with pytest.raises(CapacityError, match="needs"):
            write_store(mount / "store", plans(20), ORIGIN)
        assert not list(mount.rglob("*.safetensors*"))
        monkeypatch.setattr(writer._Job, "check_space", lambda _job: None)  # as if something else ate the space
        with pytest.raises(CapacityError, match="is full"):
            write_store(mount / "store", plans(20), ORIGIN)
        assert not list(mount.rglob("*.tmp"))
        assert list(mount.rglob("*.safetensors"))
        assert not is_store(mount / "store")
    finally:
        command = ["umount", str(mount)]
        subprocess.run(command, check=True)


def _convert_slowly(out: Path, marks: Path) -> None:
    def load(name: str) -> torch.Tensor:
        marks.mkdir(exist_ok=True)
        (marks / f"{name}-{os.getpid()}").touch()
        return torch.zeros(4)

    members = [
        ShardPlan(stage, "mlp", [TensorPlan(f"t{stage}", torch.float32, (4,), lambda n=f"t{stage}": load(n))])  # type: ignore[misc]
        for stage in range(30)
    ]
    write_store(out, members, ORIGIN)


def test_two_processes_write_one_store_once(tmp_path):
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_convert_slowly, args=(tmp_path / "store", tmp_path / "marks")) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0]
    marks = [path.name.split("-")[0] for path in (tmp_path / "marks").iterdir()]
    assert sorted(marks) == sorted({f"t{stage}" for stage in range(30)})
    Manifest.load(tmp_path / "store").check_files(tmp_path / "store")


def test_an_unsupported_type_is_named(tmp_path):
    plan = TensorPlan("x", torch.complex64, (2,), lambda: torch.zeros(2, dtype=torch.complex64))
    with pytest.raises(StoreError, match="complex64 cannot be written"):
        write_store(tmp_path, [ShardPlan(0, "mlp", [plan])], ORIGIN)
