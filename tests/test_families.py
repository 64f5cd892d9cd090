"""Families of models, each tiny: the tokens of transformers, with no code per family."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import PretrainedConfig

from flexgen_hf import Policy
from flexgen_hf.architectures import TESTED

from .checkpoints import opt_config
from .comparison import BEAMS, GREEDY, load_ours, load_plain, ragged, same_tokens, same_values, save_tiny

BASE = {"vocab_size": 96, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": None}
TINY = {
    **BASE, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
HEADS = {**TINY, "head_dim": 16}  # wider than hidden_size / heads
GPT = {**BASE, "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64}
MIXED = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]

#: name of the case -> its config; what comes before a blank is the model type
FAMILIES: dict[str, Callable[[], PretrainedConfig]] = {
    "opt": opt_config,
    "llama": lambda: transformers.LlamaConfig(**TINY),
    "llama tied": lambda: transformers.LlamaConfig(**TINY, tie_word_embeddings=True, rope_theta=1e4),
    "qwen2": lambda: transformers.Qwen2Config(**TINY),
    "qwen2 sliding": lambda: transformers.Qwen2Config(
        **TINY, use_sliding_window=True, sliding_window=4, max_window_layers=2
    ),
    "qwen3": lambda: transformers.Qwen3Config(**HEADS),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(
        **HEADS, moe_intermediate_size=24, num_experts=4, num_experts_per_tok=2, mlp_only_layers=[1]
    ),
    "bloom": lambda: transformers.BloomConfig(**BASE, hidden_size=32, n_layer=4, n_head=4),
    "codegen": lambda: transformers.CodeGenConfig(**GPT, rotary_dim=4, n_ctx=64),
    "gptj": lambda: transformers.GPTJConfig(**GPT, rotary_dim=4),
    "gpt2": lambda: transformers.GPT2Config(**GPT),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(
        **{k: v for k, v in TINY.items() if k != "num_key_value_heads"}, rotary_pct=0.5
    ),
    "glm4": lambda: transformers.Glm4Config(**HEADS, partial_rotary_factor=0.5),
    "mistral": lambda: transformers.MistralConfig(**TINY, sliding_window=4),
    "mixtral": lambda: transformers.MixtralConfig(**TINY, num_local_experts=4, num_experts_per_tok=2),
    "mixtral sliding": lambda: transformers.MixtralConfig(**TINY, num_local_experts=3, sliding_window=5),
    "gemma2": lambda: transformers.Gemma2Config(**HEADS, sliding_window=4, layer_types=MIXED),
    "gemma3_text": lambda: transformers.Gemma3TextConfig(**HEADS, sliding_window=4, layer_types=MIXED),
    "falcon": lambda: transformers.FalconConfig(**BASE, hidden_size=32, num_hidden_layers=4, num_attention_heads=4),
    "falcon alibi": lambda: transformers.FalconConfig(
        **BASE, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, alibi=True, bias=True, multi_query=False
    ),
    "phi3": lambda: transformers.Phi3Config(**TINY),
    "gpt_oss": lambda: transformers.GptOssConfig(
        **HEADS, num_local_experts=4, num_experts_per_tok=2, sliding_window=4, layer_types=MIXED
    ),
}


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    name = request.param.replace(" ", "-")
    return save_tiny(FAMILIES[request.param](), tmp_path_factory.mktemp(name) / name, std=0.25)


def test_the_tokens_of_transformers(checkpoint: Path) -> None:
    plain, prompts = load_plain(checkpoint), ragged()
    with load_ours(checkpoint) as ours:
        got = same_tokens(plain, ours, GREEDY, prompts)
        same_tokens(plain, ours, BEAMS, prompts)
        with torch.no_grad():
            same_values(plain(**prompts).logits, ours(**prompts).logits)
    assert len({tuple(row) for row in got[:, 9:].tolist()}) > 2  # the comparison could have failed


@pytest.mark.parametrize("percents", ["0 0 0 0 0 0", "0 100 0 100 0 100"])
def test_everything_on_one_tier_without_overlap(checkpoint: Path, percents: str) -> None:
    policy = Policy.parse(percents, batch_size=3, num_batches=2, overlap=False)
    with load_ours(checkpoint, policy) as ours:
        same_tokens(load_plain(checkpoint), ours, GREEDY, ragged(), max_new_tokens=8)


def test_families_said_to_be_tested_are() -> None:
    assert {name.split()[0] for name in FAMILIES} == TESTED


def test_a_family_that_is_not_tested_is_named_in_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = save_tiny(transformers.Olmo2Config(**TINY), tmp_path / "olmo2")
    with caplog.at_level(logging.WARNING, "flexgen_hf"), load_ours(folder):
        pass
    (record,) = caplog.records
    assert "'olmo2' is not among the families that flexgen_hf is tested with" in record.message
    assert "\n" not in record.message


# --------------------------------------------------------------------------------------------------- windows that slide
@pytest.fixture(scope="module")
def mistral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = transformers.MistralConfig(**TINY, sliding_window=4)
    return save_tiny(config, tmp_path_factory.mktemp("mistral") / "mistral", std=0.25)


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
