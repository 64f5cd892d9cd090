"""What goes wrong outside of the program: each time the fact, the value and the remedy, and nothing left behind."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import flexgen_hf
from flexgen_hf import (
    CapacityError,
    FlexGenError,
    Placement,
    Policy,
    PolicyError,
    StepError,
    StoreError,
    Tier,
    UnsupportedModelError,
)
from tests.tiny import DISK, EVERYTHING_ON_DISK, batch, flexgen_threads, greedy, load, write_tiny_opt
from tests.trained import TINY_OPT

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return write_tiny_opt(tmp_path_factory.mktemp("checkpoint"), num_hidden_layers=2)


@pytest.fixture(scope="module")
def whole_store(tmp_path_factory, checkpoint) -> Path:
    folder = Path(tmp_path_factory.mktemp("store"))
    with load(checkpoint, folder) as model:
        model.save_pretrained(folder / "store")
    return Path(folder / "store")


@pytest.fixture
def store(whole_store, tmp_path) -> Path:
    """A store to break."""
    return Path(shutil.copytree(whole_store, tmp_path / "store"))


@pytest.fixture
def offload(tmp_path) -> Path:
    return Path(tmp_path) / "offload"


def shard(store: Path) -> Path:
    shards: list[Path] = sorted((store / "shards").iterdir())
    return shards[1]


# ----------------------------------------------------------------------------------------------------- broken stores


def cut_short(store: Path) -> None:
    size = shard(store).stat().st_size
    os.truncate(shard(store), size - 100)


def too_long(store: Path) -> None:
    with shard(store).open("ab") as file:
        file.write(bytes(100))


def flipped(at: int) -> Callable[[Path], None]:
    def flip(store: Path) -> None:
        with shard(store).open("r+b") as file:
            file.seek(at)
            byte = file.read(1)
            file.seek(at)
            file.write(bytes([byte[0] ^ 0xFF]))

    return flip


def gone(store: Path) -> None:
    shard(store).unlink()


def manifest_of_version(version: Any) -> Callable[[Path], None]:
    def change(store: Path) -> None:
        path = store / "flexgen_manifest.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "format_version": version}))

    return change


def manifest_cut_short(store: Path) -> None:
    path = store / "flexgen_manifest.json"
    path.write_text(path.read_text()[:-50])


BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "a shard cut short": (cut_short, r"shard .* has \d+ bytes, the manifest says \d+; convert .* again"),
    "a shard too long": (too_long, r"shard .* has \d+ bytes, the manifest says \d+; convert .* again"),
    "a shard gone": (gone, r"cannot be (read|found)|is missing|No such file"),
    "the header's length flipped": (flipped(6), r"it claims a header of \d+ bytes.*download or convert it again"),
    "the header flipped": (flipped(8), r"its header is not JSON .*download or convert it again"),
    "a later version": (manifest_of_version(99), r"has format version 99, this program reads version 1; upgrade"),
    "no version": (manifest_of_version("one"), r"its format_version is 'one'; convert the model again"),
    "a manifest cut short": (manifest_cut_short, r"it is not JSON .*; convert the model again"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_store_is_refused(store, offload, what):
    damage, words = BROKEN[what]
    damage(store)
    with pytest.raises(StoreError, match=words) as caught:
        load(store, offload)
    assert str(store) in str(caught.value)
    assert not offload.exists() or list(offload.iterdir()) == []


def test_the_store_itself_is_whole(store, offload, checkpoint):
    with load(store, offload) as model, load(checkpoint, offload) as plain:
        assert torch.equal(greedy(model, batch(3)).sequences, greedy(plain, batch(3)).sequences)


@pytest.mark.parametrize("policy", [Policy(), EVERYTHING_ON_DISK], ids=["device", "disk"])
def test_a_broken_checkpoint_is_refused(checkpoint, tmp_path, offload, policy):
    copy = Path(shutil.copytree(checkpoint, tmp_path / "copy"))
    weights = copy / "model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)
    with pytest.raises(StoreError, match=r"model\.safetensors is not a whole safetensors file: .*it is cut short"):
        load(copy, offload, policy)


def test_a_file_cut_short_while_it_is_used(checkpoint, tmp_path, offload):
    copy = Path(shutil.copytree(checkpoint, tmp_path / "copy"))
    with load(copy, offload) as model:
        os.truncate(copy / "model.safetensors", 5000)
        where = r"weights of stage \d, piece \d .* failed in lane .disk_to_host..* bytes early"
        with pytest.raises(StepError, match=where):
            greedy(model, batch(3))
        assert flexgen_threads() == []
        assert list(offload.iterdir()) == []


def test_a_tensor_that_is_missing(checkpoint, tmp_path, offload):
    from safetensors.torch import load_file, save_file

    copy = Path(shutil.copytree(checkpoint, tmp_path / "copy"))
    tensors = load_file(copy / "model.safetensors")
    del tensors["model.decoder.layers.1.fc1.weight"]
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(StoreError, match=r"lacks 1 of \d+ tensors of OPT.*: model\.decoder\.layers\.1\.fc1\.weight; "):
        load(copy, offload)


def test_a_model_of_an_unknown_type(checkpoint, tmp_path, offload):
    copy = Path(shutil.copytree(checkpoint, tmp_path / "copy"))
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "model_type": "nosuchmodel"}))
    with pytest.raises(ValueError, match="nosuchmodel"):  # transformers' own, as code written for it expects
        load(copy, offload)


def test_a_model_that_cannot_be_streamed(tmp_path, offload):
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=2, state_size=4)
    MambaForCausalLM(config).save_pretrained(tmp_path / "mamba")
    with pytest.raises(UnsupportedModelError, match="MambaForCausalLM"):
        load(tmp_path / "mamba", offload)


# --------------------------------------------------------------------------------------------------- too little room


class TestTooLittle:
    """The sizes of the model: 0.1 MiB of weights, of which one layer has 0.04; cells of 0.01 for seven rows."""

    def test_for_the_weights(self, checkpoint, offload):
        with pytest.raises(
            CapacityError, match=r"weights needs .* but RAM \(device and host tier together\) has .* left"
        ):
            load(checkpoint, offload, Policy(), max_memory={"cpu": "50KB"})

    def test_for_the_slots(self, checkpoint, offload):
        with pytest.raises(CapacityError, match=r"weight slots needs .*; raise max_memory"):
            load(checkpoint, offload, Policy(weights=DISK), max_memory={"cpu": "20KB"})

    @pytest.mark.parametrize("home", [Placement(device=1.0), Placement(host=1.0)], ids=["device", "host"])
    def test_for_the_cache(self, checkpoint, offload, home):
        policy = Policy(weights=DISK, cache=home, batch_size=4, num_batches=2)
        with load(checkpoint, offload, policy, max_memory={"cpu": "200KB"}) as model:
            held = model._executor.space.ledger.held(home_tier(home))
            with pytest.raises(CapacityError, match=r"KV cache needs .*lower batch_size or num_batches") as caught:
                greedy(model, batch(8), tokens=30)
            assert model._executor.space.ledger.held(home_tier(home)) == held
            del caught
            greedy(model, batch(2), tokens=2)  # less works

    def test_for_the_cells_slots(self, checkpoint, offload):
        policy = Policy(weights=DISK, cache=DISK, batch_size=8)
        with (
            load(checkpoint, offload, policy, max_memory={"cpu": "200KB"}) as model,
            pytest.raises(CapacityError, match=r"cache slots needs"),
        ):
            greedy(model, batch(8), tokens=30)

    @pytest.mark.parametrize("kind", ["cache", "hidden"])
    def test_for_the_disk_budget(self, checkpoint, offload, kind):
        policy = Policy(batch_size=4, num_batches=2).replace(**{kind: DISK})
        with load(checkpoint, offload, policy, max_memory={"disk": "8KB"}) as model:
            with pytest.raises(CapacityError, match=r"needs .* but the disk tier has .* left of"):
                greedy(model, batch(8), tokens=30)
            assert model._executor.space.ledger.held(Tier.DISK) == 0
            assert flexgen_threads() == []

    def test_for_the_weights_on_disk(self, checkpoint, offload):
        with pytest.raises(CapacityError, match=r"weights needs .* but the disk tier has 0\.05 MiB left"):
            load(checkpoint, offload, Policy(weights=DISK), max_memory={"disk": "50KB"})

    def test_for_weights_and_cache_on_disk_together(self, checkpoint, offload):
        policy = Policy(weights=DISK, cache=DISK, batch_size=4, num_batches=2)
        with (
            load(checkpoint, offload, policy, max_memory={"disk": "150KB"}) as model,
            pytest.raises(CapacityError, match=r"the KV cache needs .* \(held: weights"),
        ):
            greedy(model, batch(8), tokens=30)

    @pytest.mark.parametrize(
        ("max_memory", "words"),
        [({"gpu": "1GB"}, "'gpu' is no tier; use 0"), ({"cpu": "much"}, "'much' for 'cpu' is no size")],
    )
    def test_what_cannot_be_meant(self, checkpoint, offload, max_memory, words):
        with pytest.raises(PolicyError, match=words):
            load(checkpoint, offload, Policy(), max_memory=max_memory)


def home_tier(placement: Placement) -> Tier:
    return Tier.DEVICE if placement.device else Tier.HOST


# ---------------------------------------------------------------------------------------------------- offload folder


@pytest.mark.parametrize("policy", [Policy(cache=DISK), Policy(hidden=DISK)], ids=["cache", "hidden"])
def test_an_offload_folder_that_is_a_file(checkpoint, tmp_path, policy):
    (tmp_path / "offload").write_text("mine")
    with pytest.raises(
        StoreError, match=r"cannot write to offload_folder '.*offload' \(File exists\); name a writable"
    ):
        load(checkpoint, tmp_path / "offload", policy)
    assert (tmp_path / "offload").read_text() == "mine"


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write everywhere")
def test_an_offload_folder_that_is_not_writable(checkpoint, tmp_path):
    (tmp_path / "offload").mkdir(mode=0o500)
    with pytest.raises(StoreError, match="name a writable folder"):
        load(checkpoint, tmp_path / "offload", EVERYTHING_ON_DISK)


def test_an_offload_folder_that_is_not_needed_is_not_made(checkpoint, offload):
    with load(checkpoint, offload, Policy()) as model:
        greedy(model, batch(2))
    assert not offload.exists()


def test_an_offload_folder_that_goes_away(checkpoint, offload):
    with load(checkpoint, offload) as model:
        offload.rmdir()
        greedy(model, batch(3))  # it is made again
        offload.rmdir()
        offload.write_text("in the way")
        with pytest.raises(StoreError, match="name a writable folder"):
            greedy(model, batch(3))
        assert flexgen_threads() == []


# ------------------------------------------------------------------------------------------------------ the exceptions


class TestExceptions:
    def test_all_are_ours_and_what_code_for_transformers_catches(self):
        also = {
            flexgen_hf.CapacityError: MemoryError,
            flexgen_hf.ConversionError: ValueError,
            flexgen_hf.PolicyError: ValueError,
            flexgen_hf.StepError: RuntimeError,
            flexgen_hf.StoreError: OSError,
            flexgen_hf.UnsupportedModelError: NotImplementedError,
        }
        for error, other in also.items():
            assert issubclass(error, FlexGenError)
            assert issubclass(error, other)

    def test_a_step_error_survives_pickling(self):
        error = StepError("disk_to_host", "weights of stage 3 in sweep 2", StoreError("shard 3 ends early"))
        again = pickle.loads(pickle.dumps(error))  # noqa: S301  what was pickled in the line itself
        assert isinstance(again, StepError)
        assert (again.lane, again.step, str(again)) == (error.lane, error.step, str(error))
        assert isinstance(again.__cause__, StoreError)
        assert str(again.__cause__) == "shard 3 ends early"

    @pytest.mark.parametrize("kind", [CapacityError, StoreError, PolicyError, UnsupportedModelError])
    def test_so_do_the_others(self, kind):
        again = pickle.loads(pickle.dumps(kind("fact, value; remedy")))  # noqa: S301
        assert type(again) is kind
        assert str(again) == "fact, value; remedy"


# ------------------------------------------------------------------------------------------------------ command line


def generate_command(*arguments: Any) -> subprocess.CompletedProcess[str]:
    program = "import torch; torch.set_num_threads(1); from flexgen_hf.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", program, "generate", *map(str, arguments), "--prompt", "The people"],
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("what", ["a broken store", "too little memory", "a step that fails"])
def test_the_command_ends_with_one_line_and_an_exit_code(tmp_path, what):
    model, options = Path(shutil.copytree(TINY_OPT, tmp_path / "model")), ["--policy", "0 0 0 0 0 0"]
    if what == "a broken store":
        os.truncate(model / "model.safetensors", 100_000)
        words = "it is cut short"
    elif what == "too little memory":
        options += ["--max-memory", "cpu=100KB"]
        words = "raise max_memory"
    else:
        options += ["--max-memory", "disk=4MB", "--batch-size", "64", "--max-new-tokens", "2000"]
        words = "but the disk tier has"
    ended = generate_command(model, "--offload-folder", tmp_path / "offload", *options)
    assert ended.returncode == 1
    assert ended.stdout == ""
    assert ended.stderr.startswith("error: ")
    assert ended.stderr.count("\n") == 1
    assert words in ended.stderr
    assert not (tmp_path / "offload").exists() or list((tmp_path / "offload").iterdir()) == []
