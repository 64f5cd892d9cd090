"""Conversions that are killed: what is on disk is always either an unfinished conversion or a whole store."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from conversion.convert import convert
from conversion.verify import verify
from flexgen_hf.errors import StoreError
from flexgen_hf.weights.format import MANIFEST_NAME, Manifest, is_store
from flexgen_hf.weights.writer import JOURNAL_NAME
from tests.checkpoints import opt_config, write_random_checkpoint

ROOT = Path(__file__).parent.parent

# Converts, but stops for good when so many bytes are written: the moment of the kill is the same on every machine.
CONVERT = """
import sys, time
from pathlib import Path
from conversion.convert import convert

source, out, stop_at, mark, compression = sys.argv[1:]

def progress(done, total):
    if done >= int(stop_at):
        Path(mark).touch()
        time.sleep(600)

convert(source, out, progress=progress, compression=compression)
"""


def kill_at(count: int, source: Path, out: Path, mark: Path, compression: dict[str, Any] | None = None) -> None:
    """Starts a conversion and kills it once it has written `count` bytes."""
    mark.unlink(missing_ok=True)
    command = [sys.executable, "-c", CONVERT, str(source), str(out), str(count), str(mark)]
    command.append(json.dumps(compression or {}))
    with subprocess.Popen(command, cwd=ROOT) as process:
        try:
            wait_for(lambda: mark.exists() or process.poll() is not None)
            assert process.poll() is None, "the conversion ended before it could be killed"
        finally:
            process.send_signal(signal.SIGKILL)


def wait_for(condition: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the process did not come that far"
        time.sleep(0.01)


def finished_shards(out: Path) -> list[str]:
    return [entry["file"] for entry in json.loads((out / JOURNAL_NAME).read_text())["shards"]]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return write_random_checkpoint(tmp_path_factory.mktemp("source"), opt_config(num_hidden_layers=6))


@pytest.mark.parametrize("seed", [0])
def test_killed_three_times_a_conversion_still_ends_well(source, tmp_path, seed):
    out, mark = tmp_path / "store", tmp_path / "mark"
    total = sum(shard.bytes for shard in convert(source, tmp_path / "whole").shards)
    draw = random.Random(seed)  # noqa: S311 (no cryptography)
    kept = 0
    for count in sorted(draw.randrange(4096, total) for _ in range(3)):
        kill_at(count, source, out, mark)
        assert not is_store(out)
        assert len(list(out.rglob("*.tmp"))) <= 1
        assert len(finished_shards(out)) >= kept
        kept = len(finished_shards(out))
        with pytest.raises(StoreError, match="interrupted conversion"):
            Manifest.load(out)
    before = {file: (out / file).stat().st_mtime_ns for file in finished_shards(out)}
    assert before
    manifest = convert(source, out)
    assert {file: (out / file).stat().st_mtime_ns for file in before} == before
    assert manifest == Manifest.load(tmp_path / "whole")
    verify(out, source)
    assert not list(out.rglob("*.tmp"))
    assert not (out / JOURNAL_NAME).exists()


def test_a_killed_conversion_of_a_changed_source_starts_over(source, tmp_path):
    changed = write_random_checkpoint(tmp_path / "changed", opt_config(num_hidden_layers=6))
    kill_at(50_000, changed, tmp_path / "store", tmp_path / "mark")
    assert finished_shards(tmp_path / "store")
    with (changed / "model.safetensors").open("r+b") as file:
        file.seek(-2, os.SEEK_END)
        file.write(b"\x00\x3c")
    convert(changed, tmp_path / "store")
    verify(tmp_path / "store", changed)


class Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str, ...]]:
        return os.mkdir, (str(self.path),)


def test_defect_8_conversion_is_safe_atomic_resumed_and_verified(source, tmp_path):
    """The original unpickled without `weights_only`, left half-written folders, began anew, and verified nothing."""
    trap, evil = tmp_path / "executed", tmp_path / "evil"
    evil.mkdir()
    (evil / "config.json").write_text((source / "config.json").read_text())
    torch.save({"model.decoder.embed_tokens.weight": Malicious(trap)}, evil / "pytorch_model.bin")
    with pytest.raises(StoreError, match="nothing in it was executed"):
        convert(evil, tmp_path / "evil store")
    assert not trap.exists()
    assert not is_store(tmp_path / "evil store")

    out = tmp_path / "store"
    kill_at(60_000, source, out, tmp_path / "mark")
    assert not (out / MANIFEST_NAME).exists()
    done = {file: (out / file).stat().st_mtime_ns for file in finished_shards(out)}
    assert done
    manifest = convert(source, out)
    assert done.items() <= {shard.file: (out / shard.file).stat().st_mtime_ns for shard in manifest.shards}.items()

    verify(out, source)
    shard = out / manifest.shards[2].file
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(StoreError, match="is damaged"):
        verify(out, source)
