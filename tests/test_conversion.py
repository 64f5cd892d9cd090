"""Converting and verifying, as a library and as commands. The truth is the model that transformers loads."""

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
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from conversion import commands, hub
from conversion.convert import convert
from conversion.verify import verify
from flexgen_hf.errors import ConversionError, PolicyError, StoreError, UnsupportedModelError
from flexgen_hf.policy import Placement
from flexgen_hf.weights.format import Manifest, is_store, read_header
from tests.checkpoints import opt_config, with_keys, write_random_checkpoint

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = write_random_checkpoint(tmp_path_factory.mktemp("source"), opt_config(), dtype=torch.float32)
    (folder / "generation_config.json").write_text('{"eos_token_id": 2}')
    (folder / "tokenizer.json").write_text("{}")
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "notes.md").write_text("not part of a model")
    return folder


def contents(store: Path) -> dict[str, torch.Tensor]:
    result = {}
    for shard in Manifest.load(store).shards:
        with safe_open(store / shard.file, "pt") as file:
            result.update({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 (not a mapping)
    return result


def assert_same_as_transformers(store: Path, source: Path, dtype: torch.dtype) -> None:
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    stored, state = contents(store), model.state_dict()
    assert state.keys() - stored.keys() <= set(model.all_tied_weights_keys)
    for name, value in stored.items():
        assert value.dtype == state[name].dtype
        assert torch.equal(value, state[name]), name


@pytest.mark.parametrize("dtype", [None, "float16", "bf16"])
def test_a_store_holds_the_model(source, tmp_path, dtype):
    manifest = convert(source, tmp_path / "store", dtype=dtype)
    wanted = {None: torch.float32, "float16": torch.float16, "bf16": torch.bfloat16}[dtype]
    assert manifest.dtype == str(wanted).removeprefix("torch.")
    assert_same_as_transformers(tmp_path / "store", source, wanted)
    report = verify(tmp_path / "store", source)
    assert report.shards == len(manifest.shards)
    assert report.tensors == len(contents(tmp_path / "store"))


def test_the_other_files_come_along(source, tmp_path):
    store = tmp_path / "store"
    manifest = convert(source, store, dtype="float16")
    assert (manifest.source, manifest.revision, manifest.quantization) == (str(source.resolve()), None, None)
    names = {path.name for path in store.iterdir()} - {".flexgen.lock"}
    assert names == {
        "config.json", "generation_config.json", "tokenizer.json", "merges.txt", "flexgen_manifest.json",
        "model.safetensors.index.json", "shards",
    }  # fmt: skip
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (source, store))
    assert after == {
        **before, "dtype": "float16", "quantization_config": {"quant_method": "flexgen", "format_version": 1}
    }  # fmt: skip


def test_shards_are_aligned_and_sorted_by_stage(source, tmp_path):
    manifest = convert(source, tmp_path / "store")
    assert [shard.stage for shard in manifest.shards] == sorted(shard.stage for shard in manifest.shards)
    for shard in manifest.shards:
        extents = list(read_header(tmp_path / "store" / shard.file).values())
        assert extents[0].offset % 4096 == 0
        assert all(extent.offset % 4 == 0 for extent in extents)


def test_plain_transformers_loads_a_store(source, tmp_path):
    store = tmp_path / "store"
    convert(source, store)
    code = (
        "import sys, torch\n"
        "from transformers import AutoModelForCausalLM\n"
        "a, b = (AutoModelForCausalLM.from_pretrained(f).state_dict() for f in sys.argv[1:])\n"
        "assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(source), str(store)], check=True, cwd=tmp_path)


def test_sharded_and_pickled_checkpoints(source, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(source)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert (tmp_path / "sharded" / "model.safetensors.index.json").exists()
    state = load_file(source / "model.safetensors")
    pickled = with_keys(source, tmp_path / "pickled", lambda key: key.removeprefix("model."))
    parts = tmp_path / "pickled parts"
    parts.mkdir()
    names = list(state)
    shutil.copy(source / "config.json", parts)
    for number, chosen in enumerate((names[::2], names[1::2])):
        torch.save({name: state[name] for name in chosen}, parts / f"pytorch_model-{number}.bin")
    index = {name: f"pytorch_model-{position % 2}.bin" for position, name in enumerate(names)}
    (parts / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    for number, folder in enumerate((tmp_path / "sharded", pickled, parts)):
        store = tmp_path / f"store {number}"
        convert(folder, store)
        assert_same_as_transformers(store, source, torch.float32)
        verify(store, folder)


def test_a_store_can_be_converted_again(source, tmp_path):
    convert(source, tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "b", dtype="float16")
    assert_same_as_transformers(tmp_path / "b", source, torch.float16)
    verify(tmp_path / "b", tmp_path / "a")


def test_weights_placement_gives_shards_their_tiers(source, tmp_path):
    manifest = convert(source, tmp_path / "store", weights_placement=Placement(device=0.25, host=0.75))
    assert manifest.placement == {"device": 0.25, "host": 0.75, "disk": 0.0}
    assert {str(shard.tier) for shard in manifest.shards} == {"device", "host"}


def damaged(store: Path, name: str, index: int, byte: int) -> Path:
    """Changes one byte of a tensor; returns the shard."""
    for shard in Manifest.load(store).shards:
        extents = read_header(store / shard.file)
        if name in extents:
            with (store / shard.file).open("r+b") as file:
                file.seek(extents[name].offset + index)
                file.write(bytes([byte]))
            return store / shard.file
    raise AssertionError(name)


def test_verify_finds_a_damaged_shard(source, tmp_path):
    convert(source, tmp_path / "store")
    shard = damaged(tmp_path / "store", "model.decoder.layers.1.fc1.weight", 100, 77)
    with pytest.raises(StoreError, match=rf"shard {shard} is damaged: its SHA-256 is [0-9a-f]+, the manifest says"):
        verify(tmp_path / "store", source)
    convert(source, tmp_path / "store", force=True)
    verify(tmp_path / "store", source)


def test_verify_names_the_first_difference(source, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(source, other)
    convert(source, tmp_path / "store")
    name = "model.decoder.layers.1.fc1.weight"  # 64 x 32 floats
    extent = read_header(other / "model.safetensors")[name]
    with (other / "model.safetensors").open("r+b") as file:
        for row, column in ((50, 3), (7, 19)):
            file.seek(extent.offset + 4 * (row * 32 + column))
            file.write(torch.tensor(2.5).numpy().tobytes())
    was = load_file(source / "model.safetensors")[name][7, 19].item()
    with pytest.raises(StoreError) as caught:
        verify(tmp_path / "store", other)
    assert f"tensor '{name}' differs first at index [7, 19]: the store has {was!r}, the source gives 2.5" in str(
        caught.value
    )


def test_verify_sees_a_store_of_another_model(source, tmp_path):
    other = write_random_checkpoint(tmp_path / "other", opt_config(num_hidden_layers=2), dtype=torch.float32)
    convert(source, tmp_path / "store")
    with pytest.raises(StoreError, match=r"has tensor 'model\.decoder\.layers\.2\..*', which its source has not"):
        verify(tmp_path / "store", other)


def test_an_own_store_is_never_overwritten_by_accident(source, tmp_path):
    other = write_random_checkpoint(tmp_path / "other", opt_config(num_hidden_layers=2))
    convert(source, tmp_path / "store")
    for arguments in ({"source": other}, {"source": source, "dtype": "float16"}):
        with pytest.raises(ConversionError, match="--force"):
            convert(out=tmp_path / "store", **arguments)
    verify(tmp_path / "store", source)
    convert(other, tmp_path / "store", force=True)
    verify(tmp_path / "store", other)


def test_sources_that_cannot_be(source, tmp_path, monkeypatch):
    def offline(*_args: object, **_kwargs: object) -> list[str]:
        raise OSError("no route to host")

    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", offline)
    for given, error, fact in (
        ("./nowhere", StoreError, "is not a folder"),
        (source / "config.json", StoreError, "is not a folder"),
        ("no-such-organisation/no-such-model", ConversionError, r"neither a folder nor .*cached snapshot"),
        ("a name with spaces!", ConversionError, "neither a folder nor"),
        (tmp_path, StoreError, r"has no config\.json"),
    ):
        with pytest.raises(error, match=fact):
            convert(given, tmp_path / "store")
    with pytest.raises(ConversionError, match="both source and store"):
        convert(source, source)
    with pytest.raises(ConversionError, match="dtype 'int8' is not one of"):
        convert(source, tmp_path / "store", dtype="int8")
    assert not is_store(tmp_path / "store")


def copy_with_config(source: Path, folder: Path, **fields: object) -> Path:
    shutil.copytree(source, folder)
    text = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**text, **fields}))
    return folder


def test_models_that_cannot_be(source, tmp_path):
    unknown = copy_with_config(source, tmp_path / "unknown", model_type="perceptron-9000")
    with pytest.raises(UnsupportedModelError, match="perceptron-9000"):
        convert(unknown, tmp_path / "store")
    quantized = copy_with_config(source, tmp_path / "gptq", quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(UnsupportedModelError, match="quantized with gptq"):
        convert(quantized, tmp_path / "store")
    (tmp_path / "empty").mkdir()
    shutil.copy(source / "config.json", tmp_path / "empty")
    with pytest.raises(StoreError, match=r"holds no weights .*pytorch_model\.bin"):
        convert(tmp_path / "empty", tmp_path / "store")
    (tmp_path / "empty" / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-1.safetensors"}}')
    with pytest.raises(StoreError, match=r"lacks 1 of 1 weight files: model-1\.safetensors"):
        convert(tmp_path / "empty", tmp_path / "store")
    (tmp_path / "empty" / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../../secret"}}')
    with pytest.raises(StoreError, match="no usable weight_map"):
        convert(tmp_path / "empty", tmp_path / "store")
    assert not is_store(tmp_path / "store")


def test_what_is_taken_from_the_hub():
    assert hub.weight_patterns(["README.md", "model.safetensors", "pytorch_model.bin"]) == hub._SAFETENSORS
    assert hub.weight_patterns(["model-00001-of-00002.safetensors", "tf_model.h5"]) == hub._SAFETENSORS
    assert hub.weight_patterns(["pytorch_model.bin", "flax_model.msgpack"]) == hub._PICKLES


def test_without_a_connection_the_cache_serves(source, tmp_path, monkeypatch):
    commit = "0123456789012345678901234567890123456789"
    repository = tmp_path / "hub" / "models--org--name"
    shutil.copytree(source, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path / "hub"))

    class ConnectionLostError(Exception):
        """As HTTP libraries have it: an exception of no standard kind."""

    def offline(*_args: object, **_kwargs: object) -> list[str]:
        raise ConnectionLostError("no route to host")

    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", offline)
    for local_files_only in (False, True):
        manifest = convert("org/name", tmp_path / "store", local_files_only=local_files_only)
        assert (manifest.source, manifest.revision) == ("org/name", commit)


def test_a_hub_model_records_its_revision(source, tmp_path, monkeypatch):
    commit = "0123456789012345678901234567890123456789"
    snapshot = tmp_path / "snapshots" / commit
    shutil.copytree(source, snapshot)
    asked: dict[str, Any] = {}

    def snapshot_download(name: str, **arguments: object) -> str:
        asked.update(arguments, name=name)
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", lambda *_a, **_k: ["model.safetensors"])
    manifest = convert("org/name", tmp_path / "store", revision="main", token="secret")  # noqa: S106 (no token)
    assert (manifest.source, manifest.revision) == ("org/name", commit)
    assert (asked["name"], asked["revision"], asked["token"]) == ("org/name", "main", "secret")
    assert not any("bin" in pattern for pattern in asked["allow_patterns"])
    verify(tmp_path / "store", "org/name")
    assert asked["revision"] == commit


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "conversion", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_the_command_line(source, tmp_path):
    done = run(source, tmp_path / "store", "--dtype", "float16", "--weights", "20 80")
    assert (done.returncode, done.stdout.split(":")[1].split(",")[0]) == (0, " float16")
    assert Manifest.load(tmp_path / "store").placement == {"device": 0.2, "host": 0.8, "disk": 0.0}
    result = CliRunner().invoke(commands.app, ["verify", str(tmp_path / "store"), str(source)])
    assert result.exit_code == 0
    assert "equals" in result.output
    damaged(tmp_path / "store", "model.decoder.layers.0.fc2.bias", 0, 55)
    done = run("verify", tmp_path / "store", source)
    assert done.returncode == 1
    assert done.stderr.startswith("error: shard ")
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_weights_percentages_are_checked():
    from conversion.commands import parse_weights

    assert parse_weights("20 30") == Placement(device=0.2, host=0.3, disk=0.5)
    for text in ("20", "a b", "20 30 50"):
        with pytest.raises(PolicyError, match="two percentages"):
            parse_weights(text)
    with pytest.raises(PolicyError, match="more than 1"):
        parse_weights("80 30")
