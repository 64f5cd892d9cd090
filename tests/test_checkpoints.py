"""Finding tensors in checkpoints: names, ties, fused experts, pickles, refusals. The truth is transformers."""

import logging
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from flexgen_hf.architectures import describe
from flexgen_hf.checkpoint_files import source_fingerprint
from flexgen_hf.checkpoints import plan_shards, read_checkpoint, target_dtype
from flexgen_hf.errors import StoreError, UnsupportedModelError
from tests.checkpoints import opt_config, with_keys, write_random_checkpoint


def meta(config: Any, dtype: torch.dtype = torch.float32) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def weights(folder: Path) -> list[Path]:
    return sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")])


def assert_reads_as_transformers_does(folder: Path, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Compares every tensor with the model that transformers loads; returns what was found."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    empty = meta(AutoConfig.from_pretrained(folder), dtype)
    found = read_checkpoint(empty, weights(folder), dtype)
    state = model.state_dict()
    assert state.keys() - found.keys() <= set(model.all_tied_weights_keys)
    for name, tensor in found.items():
        loaded = tensor.load()
        assert (tuple(loaded.shape), loaded.dtype) == (tensor.shape, tensor.dtype)
        wanted = target_dtype(empty, name, dtype)
        assert state[name].dtype == wanted
        assert torch.equal(loaded.to(wanted), state[name]), name
        assert torch.equal(torch.cat([piece.clone() for piece in tensor.pieces()]), loaded.reshape(-1))
    return found


@pytest.fixture(scope="module")
def opt(tmp_path_factory) -> Path:
    return write_random_checkpoint(tmp_path_factory.mktemp("opt"), opt_config(), dtype=torch.float32)


def test_safetensors_are_used_where_they_lie(opt):
    found = assert_reads_as_transformers_does(opt)
    assert all(tensor.extent is not None for tensor in found.values())
    assert "lm_head.weight" not in found


def test_another_dtype_is_the_callers_to_decide(opt):
    found = assert_reads_as_transformers_does(opt, torch.float16)
    assert {tensor.extent.dtype for tensor in found.values()} == {"F32"}


@pytest.mark.parametrize("prefix", ["model.decoder.", "decoder."])
@pytest.mark.parametrize("tied", ["absent", "present"])
def test_pickles_with_the_keys_that_hub_repositories_have(opt, tmp_path, prefix, tied):
    folder = with_keys(opt, tmp_path, lambda key: key.replace("model.decoder.", prefix))
    if tied == "present":
        state = torch.load(folder / "pytorch_model.bin", weights_only=True)
        state["lm_head.weight"] = state[f"{prefix}embed_tokens.weight"]
        torch.save(state, folder / "pytorch_model.bin")
    found = assert_reads_as_transformers_does(folder)
    assert all(tensor.extent is None for tensor in found.values())
    assert "lm_head.weight" not in found


def test_a_tie_that_is_stored_under_the_targets_name(opt, tmp_path):
    state = load_file(opt / "model.safetensors")
    state["lm_head.weight"] = state.pop("model.decoder.embed_tokens.weight")
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text((opt / "config.json").read_text())
    assert "model.decoder.embed_tokens.weight" in assert_reads_as_transformers_does(tmp_path)


def test_equal_copies_of_a_tied_tensor_are_kept_once(opt, tmp_path):
    state = load_file(opt / "model.safetensors")
    state["lm_head.weight"] = state["model.decoder.embed_tokens.weight"].clone()
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text((opt / "config.json").read_text())
    assert "lm_head.weight" not in assert_reads_as_transformers_does(tmp_path)


def test_a_tie_that_the_checkpoint_denies_is_no_tie(opt, tmp_path, caplog):
    state = load_file(opt / "model.safetensors")
    state["lm_head.weight"] = state["model.decoder.embed_tokens.weight"] + 1
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text((opt / "config.json").read_text())
    with caplog.at_level(logging.WARNING, "flexgen_hf"):
        found = assert_reads_as_transformers_does(tmp_path)
    assert "lm_head.weight" in found
    assert "differ in the checkpoint" in caplog.text


def test_the_350m_variant(tmp_path):
    config = opt_config(word_embed_proj_dim=16, do_layer_norm_before=False)
    write_random_checkpoint(tmp_path, config, dtype=torch.float32)
    found = assert_reads_as_transformers_does(tmp_path)
    assert "model.decoder.project_in.weight" in found
    assert "model.decoder.final_layer_norm.weight" not in found


def mixtral(folder: Path) -> Path:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    torch.manual_seed(0)
    MixtralForCausalLM(config).save_pretrained(folder)
    return folder


def test_experts_are_fused_as_transformers_fuses_them(tmp_path):
    folder = mixtral(tmp_path)
    keys = load_file(folder / "model.safetensors").keys()
    assert any(".w1.weight" in key for key in keys)
    found = assert_reads_as_transformers_does(folder)
    fused = [name for name in found if name.endswith("experts.gate_up_proj")]
    assert len(fused) == 2
    assert all(found[name].extent is None for name in fused)
    for name in (fused[0], fused[0].replace("gate_up", "down")):
        stacked = found[name].stacked
        assert stacked is not None
        assert len(stacked.matrices) == 4
        assert torch.equal(stacked.read(), found[name].load())
    assert found["model.layers.0.self_attn.q_proj.weight"].extent is not None
    assert_reads_as_transformers_does(folder, torch.float16)


def test_parameters_that_the_model_keeps_in_fp32(opt):
    model = meta(AutoConfig.from_pretrained(opt), torch.float16)
    model._keep_in_fp32_modules_strict = {"final_layer_norm"}
    assert target_dtype(model, "model.decoder.final_layer_norm.weight", torch.float16) == torch.float32
    assert target_dtype(model, "model.decoder.embed_tokens.weight", torch.float16) == torch.float16


def test_missing_tensors_are_listed(opt, tmp_path):
    state = load_file(opt / "model.safetensors")
    for layer in (0, 2):
        del state[f"model.decoder.layers.{layer}.fc1.weight"]
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(
        StoreError, match=r"lacks 2 of \d+ tensors .*layers\.0\.fc1\.weight, .*layers\.2\.fc1\.weight; down"
    ):
        read_checkpoint(meta(AutoConfig.from_pretrained(opt)), [tmp_path / "model.safetensors"])


def test_a_tensor_of_another_shape_is_named(opt):
    config = AutoConfig.from_pretrained(opt)
    config.ffn_dim = 128
    with pytest.raises(StoreError, match=r"fc1\.bias' has shape \[64\] in the checkpoint but \[128\] by config\.json"):
        read_checkpoint(meta(config), weights(opt))


def test_tensors_without_a_use_are_reported_unless_the_model_expects_them(opt, tmp_path, caplog):
    state = {**load_file(opt / "model.safetensors"), "adapter.weight": torch.zeros(2)}
    save_file(state, tmp_path / "model.safetensors")
    model = meta(AutoConfig.from_pretrained(opt))
    with caplog.at_level(logging.WARNING, "flexgen_hf"):
        read_checkpoint(model, weights(tmp_path))
    assert "has no use for 1 tensors: adapter.weight" in caplog.text
    caplog.clear()
    model._keys_to_ignore_on_load_unexpected = {r"adapter\."}
    read_checkpoint(model, weights(tmp_path))
    assert not caplog.text


class Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str, ...]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_that_would_execute_is_refused_and_does_not(opt, tmp_path, legacy):
    trap = tmp_path / "executed"
    torch.save({"x": Malicious(trap)}, tmp_path / "m.bin", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(StoreError, match="nothing in it was executed"):
        read_checkpoint(meta(AutoConfig.from_pretrained(opt)), [tmp_path / "m.bin"])
    assert not trap.exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_plain_pickle_is_refused(opt, tmp_path):
    (tmp_path / "m.bin").write_bytes(pickle.dumps({"x": Malicious(tmp_path / "executed")}))
    with pytest.raises(StoreError, match="nothing in it was executed"):
        read_checkpoint(meta(AutoConfig.from_pretrained(opt)), [tmp_path / "m.bin"])
    assert not (tmp_path / "executed").exists()


def test_the_format_before_torch_1_6_is_read_with_a_warning(opt, tmp_path, caplog):
    state = load_file(opt / "model.safetensors")
    torch.save(state, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    (tmp_path / "config.json").write_text((opt / "config.json").read_text())
    assert not zipfile.is_zipfile(tmp_path / "pytorch_model.bin")
    with caplog.at_level(logging.WARNING, "flexgen_hf"):
        assert_reads_as_transformers_does(tmp_path)
    assert "must fit in memory" in caplog.text


@pytest.mark.parametrize(
    ("content", "fact"),
    [(b"", "cannot read|nothing in it was executed"), (b"PK\x03\x04 not really", "executed|cannot read")],
)
def test_a_broken_pickle_is_named(opt, tmp_path, content, fact):
    (tmp_path / "m.bin").write_bytes(content)
    with pytest.raises(StoreError, match=fact):
        read_checkpoint(meta(AutoConfig.from_pretrained(opt)), [tmp_path / "m.bin"])


def test_a_truncated_pickle_is_named(opt, tmp_path):
    torch.save(load_file(opt / "model.safetensors"), tmp_path / "m.bin")
    content = (tmp_path / "m.bin").read_bytes()
    (tmp_path / "m.bin").write_bytes(content[: len(content) // 2])
    with pytest.raises(StoreError, match=r"m\.bin"):
        read_checkpoint(meta(AutoConfig.from_pretrained(opt)), [tmp_path / "m.bin"])


def test_a_pickle_of_something_else_is_named(opt, tmp_path):
    torch.save([torch.zeros(2)], tmp_path / "m.bin")
    with pytest.raises(StoreError, match="no dictionary of tensors"):
        read_checkpoint(meta(AutoConfig.from_pretrained(opt)), [tmp_path / "m.bin"])


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes"])
def test_checkpoints_quantized_by_others_are_refused_by_name(opt, method):
    config = AutoConfig.from_pretrained(opt)
    config.quantization_config = {"quant_method": method, "bits": 4}
    model = meta(AutoConfig.from_pretrained(opt))
    model.config = config
    with pytest.raises(UnsupportedModelError, match=rf"quantized with {method}.*16-bit checkpoint"):
        read_checkpoint(model, weights(opt))


def test_the_fingerprint_follows_the_files(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"1")
    first = source_fingerprint([path])
    assert source_fingerprint([path]) == first
    os.utime(path, ns=(1, 1))
    assert source_fingerprint([path]) != first


def test_shards_follow_stages_and_parts(opt):
    model = meta(AutoConfig.from_pretrained(opt))
    found = read_checkpoint(model, weights(opt))
    shards = plan_shards(describe(model), found, dict.fromkeys(found, torch.float16))
    assert [(shard.stage, shard.part) for shard in shards[1:7]] == [
        (layer, part) for layer in (1, 2, 3) for part in ("attention", "mlp")
    ]
    assert sorted(tensor.name for shard in shards for tensor in shard.tensors) == sorted(found)
