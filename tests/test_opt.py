"""All of OPT: the shapes from 125m to 175b, the 350m variant, Galactica's, tied and untied heads, both paddings."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from flexgen_hf import Policy
from flexgen_hf.architectures import describe

from .checkpoints import opt_config
from .comparison import (
    BEAMS,
    GREEDY,
    SAMPLING,
    THREE_TIERS,
    load_ours,
    load_plain,
    ragged,
    same_tokens,
    same_values,
    save_tiny,
)
from .trained import TINY_OPT

VARIANTS: dict[str, dict[str, Any]] = {
    "as most": {},
    "untied": {"tie_word_embeddings": False},
    "350m": {"do_layer_norm_before": False, "word_embed_proj_dim": 16},
    "350m untied": {"do_layer_norm_before": False, "word_embed_proj_dim": 16, "tie_word_embeddings": False},
    "projected, norm first": {"word_embed_proj_dim": 48},
    "galactica": {"activation_function": "gelu", "enable_bias": False, "learned_embeddings": True},
    "galactica, plain norms": {
        "activation_function": "gelu", "enable_bias": False, "layer_norm_elementwise_affine": False,
    },
    "no final norm": {"_remove_final_layer_norm": True},
    "another activation": {"activation_function": "gelu_new"},
    "one layer": {"num_hidden_layers": 1},
    "two layers": {"num_hidden_layers": 2},
    "one head": {"num_attention_heads": 1},
}  # fmt: skip


@pytest.fixture(scope="module", params=VARIANTS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(opt_config(**VARIANTS[request.param]), tmp_path_factory.mktemp("opt") / "opt")


@pytest.mark.parametrize("left", [True, False], ids=["left padding", "right padding"])
def test_every_variant(checkpoint: Path, left: bool) -> None:
    """Right padding makes little sense with `generate`, but what transformers then gives is what we give."""
    plain, prompts = load_plain(checkpoint), ragged(left=left)
    for policy in (THREE_TIERS, Policy.parse("0 0 0 100 0 100", batch_size=3, num_batches=2)):
        with load_ours(checkpoint, policy) as ours:
            for mode in (GREEDY, SAMPLING, BEAMS):
                same_tokens(plain, ours, mode, prompts, max_new_tokens=4)
            with torch.no_grad():
                same_values(plain(**prompts).logits, ours(**prompts).logits)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_16_bit_checkpoint_in_fp32(tmp_path: Path, dtype: torch.dtype) -> None:
    """Every tensor is cast on its way, the tables where they are used; the 350m variant has every kind of them."""
    folder = save_tiny(opt_config(**VARIANTS["350m untied"]), tmp_path / "opt", dtype=dtype)
    plain = load_plain(folder, dtype=torch.float32)
    for percents in ("0 0 0 0 0 0", "0 100 0 100 0 100", "100 0 100 0 100 0", "30 30 30 30 30 30"):
        with load_ours(folder, Policy.parse(percents, batch_size=2, num_batches=3), dtype="float32") as ours:
            assert ours.dtype is torch.float32
            same_tokens(plain, ours, BEAMS, ragged())


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_table_is_read_once(tmp_path: Path, tied: bool) -> None:
    """It serves the embedding and the head, and stays where it is between two sweeps; two tables take turns."""
    folder = save_tiny(opt_config(tie_word_embeddings=tied), tmp_path / "opt")
    read = []
    for tokens in (4, 5):
        with load_ours(folder, Policy.parse("0 0 100 0 100 0", batch_size=4, num_batches=2)) as model:
            stored = {tensor.name: tensor.stored_bytes for tensor in model._executor.weights.stored}
            for _ in range(2):
                model.generate(**ragged(), **GREEDY, max_new_tokens=tokens)
                read.append(model.last_run.lanes["disk_to_host"].bytes)
    layers = sum(size for name, size in stored.items() if ".layers." in name)
    table = stored["model.decoder.embed_tokens.weight"]
    assert ("lm_head.weight" in stored) is not tied
    assert read[2] - read[0] == layers + (0 if tied else 2 * table)
    assert read[0] - read[1] == (table if tied else 0)  # it is still there for the next call


def test_a_checkpoint_that_is_tied_on_disk_only(tmp_path: Path) -> None:
    """An old checkpoint may hold the head although it is tied."""
    from safetensors.torch import load_file, save_file

    folder = save_tiny(opt_config(), tmp_path / "opt")
    state = load_file(folder / "model.safetensors")
    state["lm_head.weight"] = state["model.decoder.embed_tokens.weight"].clone()
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    with load_ours(folder) as ours:
        assert len(ours._executor.weights.stored) == len(state) - 1
        same_tokens(load_plain(folder), ours, GREEDY, ragged())


# -------------------------------------------------------------------------------------------------- the official shapes
#: name -> decoder layers, hidden size, heads, parameters
SHAPES = {
    "125m": (12, 768, 12, 125_239_296),
    "350m": (24, 1024, 16, 331_196_416),
    "1.3b": (24, 2048, 32, 1_315_758_080),
    "2.7b": (32, 2560, 32, 2_651_596_800),
    "6.7b": (32, 4096, 32, 6_658_473_984),
    "13b": (40, 5120, 40, 12_853_473_280),
    "30b": (48, 7168, 56, 29_974_540_288),
    "66b": (64, 9216, 72, 65_719_701_504),
    "175b": (96, 12288, 96, 174_604_468_224),
}


@pytest.mark.parametrize("name", SHAPES)
def test_the_official_shapes(name: str) -> None:
    layers, hidden, heads, parameters = SHAPES[name]
    variant = {"do_layer_norm_before": False, "word_embed_proj_dim": 512} if name == "350m" else {}
    config = opt_config(
        **{
            "vocab_size": 50272,
            "hidden_size": hidden,
            "word_embed_proj_dim": hidden,
            "ffn_dim": 4 * hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "max_position_embeddings": 2048,
            **variant,
        }
    )
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)
    structure = describe(model)
    assert structure.layers_name == "model.decoder.layers"
    assert structure.num_stages == layers + 2
    assert model.num_parameters() == parameters
    sizes: Counter[int] = Counter()
    for tensor_name, tensor in model.named_parameters():
        sizes[structure.locate(tensor_name)[0]] += tensor.numel()
    assert len({sizes[stage] for stage in range(1, layers + 1)}) == 1
    assert sizes[1] == 12 * hidden**2 + 13 * hidden
    assert sum(sizes.values()) == parameters


def test_the_shipped_model_is_an_opt(tmp_path: Path) -> None:
    """Trained weights make sharper distributions than random ones."""
    assert json.loads((TINY_OPT / "config.json").read_text())["model_type"] == "opt"
    plain = load_plain(TINY_OPT)
    with load_ours(TINY_OPT, offload_folder=tmp_path) as ours:
        for mode in (GREEDY, BEAMS):
            same_tokens(plain, ours, mode, ragged(vocabulary=200), max_new_tokens=8)
