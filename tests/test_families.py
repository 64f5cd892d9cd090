"""Families of models, each tiny: the tokens of transformers, with no code per family."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from flexgen_hf import Policy, attention
from flexgen_hf.accounting import cache_geometry
from flexgen_hf.bench import emulated
from flexgen_hf.families import TESTED, attends_plainly

from .checkpoints import opt_config
from .comparison import (
    BEAMS,
    GREEDY,
    as_quantized,
    load_ours,
    load_plain,
    quantized_in,
    ragged,
    same_tokens,
    same_values,
    save_tiny,
)

BASE: dict[str, Any] = {"vocab_size": 96, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": None}
TINY: dict[str, Any] = {
    **BASE, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
HEADS: dict[str, Any] = {**TINY, "head_dim": 16}  # wider than hidden_size / heads
FALCON: dict[str, Any] = {**BASE, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
GPT: dict[str, Any] = {**BASE, "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64}
MIXED = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]

#: name of the case -> fields of its config; what comes before a blank is the model type
FAMILIES: dict[str, dict[str, Any]] = {
    "opt": opt_config().to_dict(),
    "llama": TINY,
    "llama tied": {**TINY, "tie_word_embeddings": True},
    "qwen2": TINY,
    "qwen2 sliding": {**TINY, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2},
    "qwen3": HEADS,
    "qwen3_moe": {
        **HEADS,
        "moe_intermediate_size": 24,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "mlp_only_layers": [1],
    },
    "bloom": {**BASE, "hidden_size": 32, "n_layer": 4, "n_head": 4},
    "codegen": {**GPT, "rotary_dim": 4, "n_ctx": 64},
    "gptj": {**GPT, "rotary_dim": 4},
    "gpt2": GPT,
    "gpt_neox": {**TINY, "num_key_value_heads": 4, "rotary_pct": 0.5},
    "glm4": {**HEADS, "partial_rotary_factor": 0.5},
    "mistral": {**TINY, "sliding_window": 4},
    "mixtral": {**TINY, "num_local_experts": 4, "num_experts_per_tok": 2},
    "mixtral sliding": {**TINY, "num_local_experts": 3, "sliding_window": 5},
    "gemma2": {**HEADS, "sliding_window": 4, "layer_types": MIXED},
    "gemma3_text": {**HEADS, "sliding_window": 4, "layer_types": MIXED},
    "falcon": FALCON,
    "falcon alibi": {**FALCON, "alibi": True, "bias": True, "multi_query": False},
    "phi3": TINY,
    "gpt_oss": {**HEADS, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4, "layer_types": MIXED},
}


def save_family(case: str, folder: Path) -> Path:
    fields = {**FAMILIES[case], "model_type": case.split(maxsplit=1)[0]}
    return save_tiny(AutoConfig.for_model(**fields), folder, std=0.25)


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_family(request.param, tmp_path_factory.mktemp("family") / "model")


def test_the_tokens_of_transformers(checkpoint: Path) -> None:
    plain, prompts = load_plain(checkpoint), ragged()
    with load_ours(checkpoint) as ours:
        got = same_tokens(plain, ours, GREEDY, prompts)
        same_tokens(plain, ours, BEAMS, prompts)
        # Memory for the cache is taken before work starts, so its shape must be known from the config.
        cache = ours(**prompts, use_cache=True).past_key_values
        assert {cell.keys.shape[1::2] for cell in cache.cells()} == {cache_geometry(ours.config)}
        assert {cell.values.shape[1::2] for cell in cache.cells()} == {cache_geometry(ours.config)}
        with torch.no_grad():
            same_values(plain(**prompts).logits, ours(**prompts).logits)
    assert len({tuple(row) for row in got[:, 9:].tolist()}) > 2  # the comparison could have failed


def test_the_tokens_of_transformers_on_an_accelerator(checkpoint: Path) -> None:
    """What a family computes aside (positions, biases, masks, windows) is to be where its weights are."""
    with load_ours(checkpoint, device=emulated.install()) as ours:
        same_tokens(load_plain(checkpoint), ours, GREEDY, ragged(), max_new_tokens=8)


def test_the_tokens_of_quantized_weights(checkpoint: Path, tmp_path: Path) -> None:
    """Whatever a family calls its matrices, fuses or keeps apart."""
    compression = {"weights": 4, "group_size": 16}
    with load_ours(checkpoint, offload_folder=tmp_path, compression=compression) as ours:
        (store,) = tmp_path.glob("converted-*")
        plain = as_quantized(load_plain(checkpoint), formats := quantized_in(store))
        same_tokens(plain, ours, GREEDY, ragged(), max_new_tokens=8)
        assert ours.last_run.dequantizations["per_stage_and_sweep"] == 1
    layers = {
        name: p for name, p in plain.named_parameters() if ours._executor.structure.locate(name)[1] != "embedding"
    }
    assert sum(layers[name].numel() for name in formats) > 0.9 * sum(p.numel() for p in layers.values() if p.dim() > 1)


@pytest.mark.parametrize("percents", ["0 0 0 0 0 0", "0 100 0 100 0 100"])
def test_everything_on_one_tier_without_overlap(checkpoint: Path, percents: str) -> None:
    policy = Policy.parse(percents, batch_size=3, num_batches=2, overlap=False)
    with load_ours(checkpoint, policy) as ours:
        same_tokens(load_plain(checkpoint), ours, GREEDY, ragged(), max_new_tokens=8)


def test_families_said_to_be_tested_are() -> None:
    assert {name.split()[0] for name in FAMILIES} == TESTED


def test_a_family_that_is_not_tested_is_named_in_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = save_tiny(AutoConfig.for_model("olmo2", **TINY), tmp_path / "olmo2")
    with caplog.at_level(logging.WARNING, "flexgen_hf"), load_ours(folder):
        pass
    (record,) = caplog.records
    assert "'olmo2' is not among the families that flexgen_hf is tested with" in record.message
    assert "\n" not in record.message


# --------------------------------------------------------------------------------------------------- windows that slide
@pytest.fixture(scope="module")
def mistral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_family("mistral", tmp_path_factory.mktemp("mistral") / "model")


def test_only_what_is_in_the_window_is_loaded(mistral: Path) -> None:
    moved = []
    for tokens in (6, 26):
        with load_ours(mistral, Policy.parse("100 0 0 0 100 0", batch_size=2)) as ours:
            ours.generate(**ragged([8, 8]), **GREEDY, max_new_tokens=tokens)
            moved.append(ours.last_run.lanes["disk_to_host"].bytes)
    keys_and_values = 2 * 4 * 2 * 2 * 8 * 4  # of all layers, rows and heads, for one token in fp32
    assert moved[1] - moved[0] == 20 * 3 * keys_and_values


@pytest.mark.parametrize("percents", ["100 0 100 0 100 0", "100 0 0 100 100 0", "100 0 0 0 100 0"])
def test_operations_on_a_cache_that_slides(mistral: Path, percents: str) -> None:
    """Rows are moved with all their tokens, and tokens that were out of the window come back when it is cropped."""
    plain, prompts = load_plain(mistral), ragged()
    step = torch.arange(7, 14)[:, None]
    with load_ours(mistral, Policy.parse(percents, batch_size=3, num_batches=3)) as ours, torch.no_grad():
        logits = []
        for model in (plain, ours):
            out = model(**prompts, use_cache=True)
            rows = [6, 0, 3, 3, 1, 5, 2]
            out.past_key_values.reorder_cache(torch.tensor(rows))
            mask = torch.nn.functional.pad(prompts["attention_mask"][rows], (0, 1), value=1)
            logits.append(model(step, attention_mask=mask, past_key_values=out.past_key_values).logits)
        same_values(*logits)
        cache = ours(**prompts, use_cache=True).past_key_values
        cache.crop(-5)
        rest = {"input_ids": prompts["input_ids"][:, 4:], "attention_mask": prompts["attention_mask"]}
        same_values(plain(**prompts).logits[:, 4:], ours(**rest, past_key_values=cache).logits)


@pytest.mark.parametrize("name", sorted(TESTED))
def test_families_attend_as_is_said_of_them(name: str) -> None:
    """What a planner is told by a name, a model that is there says by itself."""
    config = AutoConfig.for_model(**{**FAMILIES[name], "model_type": name})
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)
    assert attends_plainly(name) == (attention.why_not_supported(model) is None)
