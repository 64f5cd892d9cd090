"""The original's numpy folders and metaseq's shards, made up in miniature from a model, which is then the judge."""

import argparse
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import OPTForCausalLM

from conversion import opt_shapes
from conversion.convert import convert
from conversion.sources import SourceOptions
from conversion.verify import verify
from flexgen_hf.errors import ConversionError, StoreError
from flexgen_hf.weights.format import Manifest
from tests.checkpoints import opt_config


@pytest.fixture(autouse=True)
def heads_of_a_tiny_model(monkeypatch):
    monkeypatch.setitem(opt_shapes._HEADS, 32, 4)


def model(**fields: Any) -> Any:
    torch.manual_seed(0)
    return OPTForCausalLM(opt_config(**fields)).half().eval()


def randomized(made: Any) -> Any:
    """Biases and norms too: fresh models have zeros and ones there, which hide mistakes."""
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.1)
    return made


def assert_store_is(store: Path, made: Any) -> None:
    state, seen = made.state_dict(), set()
    for shard in Manifest.load(store).shards:
        with safe_open(store / shard.file, "pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                assert torch.equal(file.get_tensor(name), state[name]), name
                seen.add(name)
    assert state.keys() - seen == {"lm_head.weight"}
    config = json.loads((store / "config.json").read_text())
    for field in ("hidden_size", "ffn_dim", "num_hidden_layers", "num_attention_heads", "vocab_size",
                  "max_position_embeddings", "do_layer_norm_before", "word_embed_proj_dim"):  # fmt: skip
        assert config[field] == getattr(made.config, field), field
    assert config["architectures"] == ["OPTForCausalLM"]


# ------------------------------------------------------------------------------------------------- the numpy folders


def write_numpy(folder: Path, made: Any) -> Path:
    """As the original's download script leaves it: names without `model.`, the final norm renamed, the head a copy."""
    folder.mkdir()
    for name, tensor in made.model.state_dict().items():
        with (folder / name.replace("decoder.final_layer_norm", "decoder.layer_norm")).open("wb") as file:
            np.save(file, tensor.numpy())
    with (folder / "lm_head.weight").open("wb") as file:
        np.save(file, made.lm_head.weight.detach().numpy())
    return folder


def test_a_numpy_folder(tmp_path):
    made = randomized(model())
    source = write_numpy(tmp_path / "opt-tiny-np", made)
    manifest = convert(source, tmp_path / "store")
    assert manifest.dtype == "float16"
    assert_store_is(tmp_path / "store", made)
    verify(tmp_path / "store", source)


def test_a_numpy_folder_with_its_configuration_given(tmp_path, monkeypatch):
    made = randomized(model())
    source = write_numpy(tmp_path / "opt-tiny-np", made)
    monkeypatch.delitem(opt_shapes._HEADS, 32)
    with pytest.raises(ConversionError, match=r"hidden size 32 .*--config FOLDER"):
        convert(source, tmp_path / "store")
    made.config.save_pretrained(tmp_path / "config")
    convert(source, tmp_path / "store", config=tmp_path / "config")
    assert_store_is(tmp_path / "store", made)
    verify(tmp_path / "store", source, options=SourceOptions(config=tmp_path / "config"))


def test_broken_numpy_folders(tmp_path):
    source = write_numpy(tmp_path / "opt-tiny-np", model())
    (source / "decoder.layers.1.fc1.bias").write_bytes(b"\x93NUMPY\x01\x00garbage")
    with pytest.raises(StoreError, match=r"decoder\.layers\.1\.fc1\.bias"):
        convert(source, tmp_path / "store")
    with (source / "decoder.layers.1.fc1.bias").open("wb") as file:
        np.save(file, np.array([{"a": print}], dtype=object), allow_pickle=True)
    with pytest.raises(StoreError, match=r"decoder\.layers\.1\.fc1\.bias"):
        convert(source, tmp_path / "store")
    (source / "decoder.layers.1.fc1.bias").unlink()
    with pytest.raises(StoreError, match=r"lacks 1 of .*layers\.1\.fc1\.bias"):
        convert(source, tmp_path / "store")


# ---------------------------------------------------------------------------------------------------------- metaseq


def metaseq_state(made: Any) -> dict[str, torch.Tensor]:
    """metaseq's names, with q, k and v fused (in the order k, v, q)."""
    state = {
        name.replace("decoder.final_layer_norm", "decoder.layer_norm").replace("project_in.", "project_in_dim."): value
        for name, value in made.model.state_dict().items()
    }
    for name in [name for name in state if ".q_proj." in name]:
        parts = [state.pop(name.replace("q_proj", f"{letter}_proj")) for letter in "kvq"]
        state[name.replace("q_proj", "qkv_proj")] = torch.stack(parts)
    state["decoder.version"] = torch.tensor([3.0])
    return state


def model_parallel(state: Mapping[str, torch.Tensor], parts: int) -> list[dict[str, torch.Tensor]]:
    """Megatron's distribution: rows of q, k, v, fc1 and the embedding, columns of out_proj and fc2, else copies."""
    result: list[dict[str, torch.Tensor]] = [{} for _ in range(parts)]
    for name, value in state.items():
        if "qkv_proj" in name:  # (3, rows, ...): each part has its rows of k, of v, of q
            pieces = [piece.flatten(0, 1) for piece in value.chunk(parts, dim=1)]
        elif "fc1" in name or "embed_tokens" in name:
            pieces = list(value.chunk(parts, dim=0))
        elif name.endswith(("out_proj.weight", "fc2.weight")):
            pieces = list(value.chunk(parts, dim=1))
        else:
            pieces = [value] * parts
        for part, piece in zip(result, pieces, strict=True):
            part[name] = piece.contiguous().clone()
    return result


def fully_sharded(part: Mapping[str, torch.Tensor], shards: int) -> list[dict[str, Any]]:
    """fairscale's distribution: a flat parameter for each layer and one for the rest, cut evenly, the last padded."""
    groups: dict[str, dict[str, torch.Tensor]] = {}
    buffers = {name: value for name, value in part.items() if name.endswith("version")}
    for name in part.keys() - buffers.keys():
        path = ".".join(name.split(".")[:3]) if ".layers." in name else ""
        groups.setdefault(path, {})[name.removeprefix(f"{path}.")] = part[name]
    files: list[dict[str, Any]] = [
        {"model": dict(buffers), "shard_metadata": {"param_metadata": [], "buffer_names": list(buffers)}}
        for _ in range(shards)
    ]
    for path, tensors in groups.items():
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors.values()])
        size = math.ceil(flat.numel() / shards)
        for rank, file in enumerate(files):
            piece = flat[rank * size : (rank + 1) * size]
            padding = size - piece.numel()
            file["model"][f"{path}.flat_param_0" if path else "flat_param_0"] = torch.cat(
                [piece, piece.new_zeros(padding)]
            )
            info = {
                "names": list(tensors),
                "shapes": [tensor.shape for tensor in tensors.values()],
                "numels": [tensor.numel() for tensor in tensors.values()],
                "padding": padding,
            }
            entry = {"fsdp_path": path, "params": {"flat_param_0": info}, "no_broadcast_optim_state": False}
            file["shard_metadata"]["param_metadata"].append({**entry, "shared_param_info": []})
            file["cfg"] = argparse.Namespace(arch="transformer_lm", model_parallel_size=2)
    return files


def write_metaseq(folder: Path, made: Any, parts: int, shards: int) -> Path:
    folder.mkdir()
    for number, part in enumerate(model_parallel(metaseq_state(made), parts)):
        if not shards:
            torch.save({"model": part, "args": argparse.Namespace()}, folder / f"reshard-model_part-{number}.pt")
            continue
        for rank, file in enumerate(fully_sharded(part, shards)):
            torch.save(file, folder / f"checkpoint_last-model_part-{number}-shard{rank}.pt")
    return folder


@pytest.mark.parametrize(("parts", "shards"), [(1, 0), (4, 0), (1, 3), (2, 5)])
def test_metaseq_shards(tmp_path, parts, shards):
    made = randomized(model())
    source = write_metaseq(tmp_path / "OPT", made, parts, shards)
    manifest = convert(source, tmp_path / "store")
    assert manifest.dtype == "float16"
    assert_store_is(tmp_path / "store", made)
    verify(tmp_path / "store", source)


def test_shards_whose_metadata_lies_beside_them(tmp_path):
    made = randomized(model())
    source = tmp_path / "OPT"
    source.mkdir()
    for number, part in enumerate(model_parallel(metaseq_state(made), 2)):
        (file,) = fully_sharded(part, 1)
        metadata = file.pop("shard_metadata")
        torch.save(file, source / f"reshard-model_part-{number}-shard0.pt")
    with pytest.raises(ConversionError, match=r"flat-meta\.json"):
        convert(source, tmp_path / "store")
    described = {}
    for entry in metadata["param_metadata"]:
        info, path = entry["params"]["flat_param_0"], entry["fsdp_path"]
        names = [f"{path}.{name}" if path else name for name in info["names"]]
        described[f"{path}.flat_param_0" if path else "flat_param_0"] = {
            "names": names, "shapes": [list(shape) for shape in info["shapes"]], "numels": info["numels"]
        }  # fmt: skip
    (source / "flat-meta.json").write_text(json.dumps(described))
    convert(source, tmp_path / "store")
    assert_store_is(tmp_path / "store", made)


def test_one_file_with_everything(tmp_path):
    made = randomized(model())
    source = tmp_path / "OPT"
    source.mkdir()
    (state,) = model_parallel(metaseq_state(made), 1)
    torch.save({"model": state}, source / "restored.pt")
    convert(source, tmp_path / "store")
    assert_store_is(tmp_path / "store", made)


def test_rows_that_fill_the_vocabulary_up_are_dropped(tmp_path):
    made = randomized(model(vocab_size=94))
    state = metaseq_state(made)
    state["decoder.embed_tokens.weight"] = torch.cat([state["decoder.embed_tokens.weight"], torch.ones(2, 32).half()])
    source = tmp_path / "OPT"
    source.mkdir()
    for number, part in enumerate(model_parallel(state, 4)):
        torch.save({"model": part}, source / f"reshard-model_part-{number}.pt")
    made.config.save_pretrained(tmp_path / "config")
    convert(source, tmp_path / "store", config=tmp_path / "config")
    assert_store_is(tmp_path / "store", made)


@pytest.mark.parametrize("gone", ["model_part-1-shard0", "model_part-0-shard1", "model_part-1-shard2"])
def test_a_missing_shard_is_noticed(tmp_path, gone):
    source = write_metaseq(tmp_path / "OPT", model(), 3, 3)
    for path in source.glob(f"*{gone}.pt"):
        path.unlink()
    with pytest.raises(StoreError, match=r"lacks .*part 1|lacks .*shard 1|a shard is missing|lacks model-parallel"):
        convert(source, tmp_path / "store")


class Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str, ...]]:
        return os.mkdir, (str(self.path),)


def test_a_shard_that_would_execute_does_not(tmp_path):
    source = write_metaseq(tmp_path / "OPT", model(), 1, 0)
    trap = tmp_path / "executed"
    torch.save({"model": {}, "cfg": Malicious(trap)}, source / "reshard-model_part-0.pt")
    with pytest.raises(StoreError, match="nothing in it was executed"):
        convert(source, tmp_path / "store")
    assert not trap.exists()
