"""Checkpoints in 8-bit floats and quantized by others: read as transformers dequantizes them, or refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from conversion.convert import convert
from conversion.verify import verify
from flexgen_hf import StoreError, UnsupportedModelError
from flexgen_hf.weights.format import Manifest, is_store

from .checkpoints import opt_config
from .comparison import BEAMS, GREEDY, load_ours, load_plain, ragged, same_tokens, save_tiny
from .test_families import HEADS, TINY

BLOCK = 16
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}


def rewrite(source: Path, settings: Any, change: Callable[[str, torch.Tensor], dict[str, torch.Tensor]]) -> Path:
    """Replaces each tensor of a checkpoint by others, and says so in its configuration."""
    state = load_file(source / "model.safetensors")
    written = {new: value.contiguous() for name, old in state.items() for new, value in change(name, old).items()}
    save_file(written, source / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    if settings is not None:
        config["quantization_config"] = settings
    (source / "config.json").write_text(json.dumps(config))
    return source


def in_blocks(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """The matrices of layers in 8-bit floats, each block of 16 x 16 with the factor that makes its numbers of them."""
    if weight.dim() < 2 or ".layers." not in name or ".gate." in name:
        return {name: weight}
    rows, columns = (size // BLOCK for size in weight.shape)
    blocks = weight.reshape(rows, BLOCK, columns, BLOCK)
    scale = blocks.abs().amax(dim=(1, 3), keepdim=True) / torch.finfo(torch.float8_e4m3fn).max
    codes = (blocks / scale).to(torch.float8_e4m3fn).reshape(weight.shape)
    return {name: codes, f"{name}_scale_inv": scale.reshape(rows, columns)}


def fp8_checkpoint(folder: Path, family: str = "llama", **fields: Any) -> Path:
    config = AutoConfig.for_model(**{**TINY, "num_local_experts": 4, **fields, "model_type": family})
    return rewrite(save_tiny(config, folder, std=0.25), FP8, in_blocks)


def assert_runs_as_transformers_does(folder: Path, **options: Any) -> None:
    plain = load_plain(folder, dtype=torch.float32).float()  # transformers 5.20 leaves in bfloat16 what was in MXFP4
    with load_ours(folder, dtype=torch.float32, **options) as ours:
        got = same_tokens(plain, ours, GREEDY, ragged())
        same_tokens(plain, ours, BEAMS, ragged())
    assert len({tuple(row) for row in got[:, 9:].tolist()}) > 2  # the comparison could have failed


def assert_converts_to_what_transformers_loads(folder: Path, tmp_path: Path) -> None:
    plain = load_plain(folder, dtype=torch.bfloat16)
    convert(folder, tmp_path / "store", dtype="bfloat16")
    verify(tmp_path / "store", folder)
    again = load_plain(tmp_path / "store", dtype=torch.bfloat16)
    want, got = plain.state_dict(), again.state_dict()
    assert want.keys() == got.keys()
    for name, tensor in want.items():
        assert torch.equal(tensor.to(got[name].dtype), got[name]), name


# --------------------------------------------------------------------------------------------- 8-bit floats with scales
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_blocks_of_8_bit_floats(tmp_path: Path, family: str) -> None:
    """Dequantized once, a tensor at a time; of a mixture of experts before its experts are fused."""
    folder = fp8_checkpoint(tmp_path / "model", family)
    assert_runs_as_transformers_does(folder)
    (converted,) = (tmp_path / "offload").glob("converted-*")
    assert is_store(converted)
    with load_ours(folder, dtype=torch.float32):
        assert len(list((tmp_path / "offload").glob("converted-*"))) == 1  # and not again


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_blocks_of_8_bit_floats_are_converted(tmp_path: Path, family: str) -> None:
    assert_converts_to_what_transformers_loads(fp8_checkpoint(tmp_path / "model", family), tmp_path)


def test_blocks_of_8_bit_floats_become_groups_of_4_bits(tmp_path: Path) -> None:
    """Of the dequantized numbers, and not of the 8 bits without their factors."""
    folder = fp8_checkpoint(tmp_path / "model")
    convert(folder, tmp_path / "numbers", dtype="float32")
    for source in ("model", "numbers"):
        convert(tmp_path / source, tmp_path / f"{source}-4bit", compression="4bit", method="minmax", dtype="float32")
    want, got = (Manifest.load(tmp_path / f"{source}-4bit") for source in ("numbers", "model"))
    assert got.quantization is not None
    assert [shard.sha256 for shard in got.shards] == [shard.sha256 for shard in want.shards]


def test_a_scale_that_does_not_fit_is_named(tmp_path: Path) -> None:
    def broken(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        return {name: tensor[:, :1].repeat(1, 3) if name.endswith("1.mlp.up_proj.weight_scale_inv") else tensor}

    folder = rewrite(fp8_checkpoint(tmp_path / "model"), FP8, broken)
    with pytest.raises(StoreError, match=r"1\.mlp\.up_proj\.weight_scale_inv into .*failed .*config\.json"):
        load_ours(folder, dtype=torch.float32)


# ------------------------------------------------------------------------------------------ 8-bit floats without scales
@pytest.mark.parametrize("stored", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_plain_8_bit_floats(tmp_path: Path, stored: torch.dtype) -> None:
    """Nothing but a cast: they run where they lie, and become 16 bit when they are converted."""
    folder = save_tiny(opt_config(), tmp_path / "model")
    rewrite(folder, None, lambda name, tensor: {name: tensor.to(stored)})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": str(stored).removeprefix("torch.")}))
    assert_runs_as_transformers_does(folder)
    assert not list((tmp_path / "offload").glob("converted-*"))
    assert_converts_to_what_transformers_loads(folder, tmp_path)
    assert convert(folder, tmp_path / "by-itself").dtype == "bfloat16"
    with load_ours(folder, dtype=torch.float32, compression="4bit") as ours:
        assert any(tensor.is_quantized for tensor in ours.stored_weights)


# ---------------------------------------------------------------------------------------------------- 4 bits of GPT-OSS
def test_mxfp4(tmp_path: Path) -> None:
    """Experts of GPT-OSS: two numbers of 4 bits in a byte, 32 with one exponent."""
    generator = torch.Generator().manual_seed(2)

    def packed(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        if not name.endswith(("gate_up_proj", "down_proj")):
            return {name: tensor}
        experts, inner, outer = tensor.shape
        shape = (experts, outer, inner // 32, 16)
        return {
            f"{name}_blocks": torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator),
            f"{name}_scales": torch.randint(123, 126, shape[:-1], dtype=torch.uint8, generator=generator),
        }

    fields = {**HEADS, "intermediate_size": 64, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4}
    folder = save_tiny(AutoConfig.for_model("gpt_oss", **fields), tmp_path / "model", std=0.25)
    rewrite(folder, {"quant_method": "mxfp4", "modules_to_not_convert": []}, packed)
    assert_runs_as_transformers_does(folder)
    assert_converts_to_what_transformers_loads(folder, tmp_path)


# ------------------------------------------------------------------------------------------------------------- refusals
OTHERS = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm"},
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "bitsandbytes, unnamed": {"load_in_8bit": True},
    "hqq": {"quant_method": "hqq", "quant_config": {"weight_quant_params": {"nbits": 4, "group_size": 64}}},
    "compressed-tensors": {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {}},
    "quanto": {"quant_method": "quanto", "weights": "int4"},
    "torchao": {"quant_method": "torchao", "quant_type": "int4_weight_only"},
    "aqlm": {"quant_method": "aqlm"},
    "fbgemm_fp8": {"quant_method": "fbgemm_fp8"},
    "nvfp4": {"quant_method": "nvfp4"},
    "bitnet": {"quant_method": "bitnet"},
}


@pytest.mark.parametrize("case", OTHERS)
def test_other_methods_are_refused_before_weights_are_touched(tmp_path: Path, case: str) -> None:
    folder = save_tiny(opt_config(), tmp_path / "model")
    rewrite(folder, OTHERS[case], lambda name, tensor: {name: tensor})
    (folder / "model.safetensors").write_bytes(b"never read")
    refusal = (
        rf"quantized with {case.split(',', maxsplit=1)[0]}, which .*Take the 16-bit checkpoint .*compression='4bit'"
    )
    with pytest.raises(UnsupportedModelError, match=refusal):
        convert(folder, tmp_path / "store")
    with pytest.raises(UnsupportedModelError, match=refusal):
        load_ours(folder)
    with pytest.raises(UnsupportedModelError, match=refusal):
        AutoModelForCausalLM.from_pretrained(folder, quantization_config={"quant_method": "flexgen"})
    assert not (tmp_path / "store").exists()


def scaled(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    if not name.endswith("fc1.weight"):
        return {name: tensor}
    return {name: (tensor * 8).to(torch.float8_e4m3fn), f"{name}_scale": torch.tensor(0.125)}


def in_integers(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    return {name: (tensor * 8).to(torch.int8) if name.endswith("fc1.weight") else tensor}


@pytest.mark.parametrize(
    ("change", "fact"), [(scaled, r"float8_e4m3fn with a scale of its own"), (in_integers, r"stored as torch\.int8")]
)
@pytest.mark.parametrize("settings", [None, {"quant_method": "modelopt"}])
def test_what_no_configuration_explains_is_refused(tmp_path: Path, change: Any, fact: str, settings: Any) -> None:
    """Read as they are, the numbers would be wrong, and so would every token, without an error."""
    folder = rewrite(save_tiny(opt_config(), tmp_path / "model"), settings, change)
    with pytest.raises(UnsupportedModelError, match=rf"{fact}.*16-bit checkpoint"):
        load_ours(folder)
    with pytest.raises(UnsupportedModelError, match=rf"{fact}.*16-bit|quantized with modelopt.*16-bit"):
        convert(folder, tmp_path / "store")


def test_scales_of_a_known_method_that_nothing_reads_are_refused(tmp_path: Path) -> None:
    folder = rewrite(save_tiny(opt_config(), tmp_path / "model"), FP8, scaled)
    with pytest.raises(UnsupportedModelError, match="with a scale of its own"):
        load_ours(folder)
