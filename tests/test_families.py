"""Families of models, each tiny: the tokens of transformers, with no code per family."""

from __future__ import annotations

import logging
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from conversion.convert import convert
from conversion.verify import verify
from flexgen_hf import Compression, Placement, Policy, UnsupportedModelError, attention
from flexgen_hf.accounting import cache_geometry
from flexgen_hf.architectures import Structure
from flexgen_hf.attention import why_not_supported
from flexgen_hf.bench import emulated
from flexgen_hf.families import TESTED, attends_plainly

from .checkpoints import opt_config
from .comparison import (
    BEAMS,
    GREEDY,
    SAMPLING,
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
SPARSE: dict[str, Any] = {"moe_intermediate_size": 24, "num_experts_per_tok": 2}
LATENT: dict[str, Any] = {
    **TINY, **SPARSE, "num_key_value_heads": 4, "n_routed_experts": 4, "n_shared_experts": 1,
    "first_k_dense_replace": 1, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4,
    "head_dim": 4, "v_head_dim": 12, "n_group": 2, "topk_group": 1,
}  # fmt: skip
MIXED = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]

#: name of the case -> fields of its config; what comes before a blank is the model type
FAMILIES: dict[str, dict[str, Any]] = {
    "opt": opt_config().to_dict(),
    "opt narrow tables": opt_config(word_embed_proj_dim=16, do_layer_norm_before=False).to_dict(),
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
    "gpt_bigcode": GPT,
    "gpt_bigcode heads": {**GPT, "multi_query": False},
    "gpt_neox": {**TINY, "num_key_value_heads": 4, "rotary_pct": 0.5},
    "glm": {**HEADS, "partial_rotary_factor": 0.5},
    "glm4_moe": {
        **HEADS,
        **SPARSE,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
    },
    "glm4": {**HEADS, "partial_rotary_factor": 0.5},
    "mistral": {**TINY, "sliding_window": 4},
    "mixtral": {**TINY, "num_local_experts": 4, "num_experts_per_tok": 2},
    "mpt": {**BASE, "d_model": 32, "n_heads": 4, "n_layers": 4, "max_seq_len": 64, "expansion_ratio": 2},
    "mixtral sliding": {**TINY, "num_local_experts": 3, "sliding_window": 5},
    "gemma2": {**HEADS, "sliding_window": 4, "layer_types": MIXED},
    "gemma3_text": {**HEADS, "sliding_window": 4, "layer_types": MIXED},
    "falcon": FALCON,
    "falcon new": {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2},
    "falcon alibi": {**FALCON, "alibi": True, "bias": True, "multi_query": False},
    "phi3": TINY,
    "stablelm": {**TINY, "partial_rotary_factor": 0.25, "use_qkv_bias": True},
    "olmo2": TINY,
    "cohere": TINY,
    "cohere2": {**HEADS, "sliding_window": 4, "layer_types": MIXED},
    "granite": TINY,
    "smollm3": {**TINY, "no_rope_layers": [1, 1, 0, 1]},
    "qwen2_moe": {
        **TINY,
        **SPARSE,
        "num_experts": 4,
        "shared_expert_intermediate_size": 40,
        "decoder_sparse_step": 2,
    },
    "olmoe": {**TINY, "num_experts": 5, "num_experts_per_tok": 2},
    "deepseek_v2": {**LATENT, "topk_method": "group_limited_greedy"},
    "deepseek_v3": LATENT,
    "gpt_oss": {**HEADS, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4, "layer_types": MIXED},
}


def save_family(case: str, folder: Path) -> Path:
    fields = {**FAMILIES[case], "model_type": case.split(maxsplit=1)[0]}
    return save_tiny(AutoConfig.for_model(**fields), folder, std=0.25)


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def checkpoint(case: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_family(case, tmp_path_factory.mktemp("family") / "model")


@pytest.fixture(scope="module")
def plain(checkpoint: Path) -> Any:
    return load_plain(checkpoint)


def random_policy(case: str, number: int) -> Policy:
    """Where things live and the shape of the block, other ones for each case."""
    draw = random.Random(f"{case} {number}")  # noqa: S311  not for cryptography

    def placement() -> Placement:
        device = draw.choice([0.0, 0.3, 1.0])
        return Placement(device=device, host=0.0 if device == 1 else draw.choice([0.0, 0.4, 1 - device]))

    return Policy(
        weights=placement(),
        cache=placement(),
        hidden=placement(),
        batch_size=draw.randint(1, 4),
        num_batches=draw.randint(1, 3),
        overlap=draw.random() < 0.8,
        layer_slots=draw.randint(1, 2),
    )


def test_the_tokens_of_transformers(checkpoint: Path, plain: Any) -> None:
    prompts = ragged()
    with load_ours(checkpoint) as ours:
        got = same_tokens(plain, ours, GREEDY, prompts)
        same_tokens(plain, ours, BEAMS, prompts, max_new_tokens=4)
        # Memory for the cache is taken before work starts, so its shape must be known from the config.
        cache = ours(**prompts, use_cache=True).past_key_values
        seen = {(cell.keys.shape[1::2], cell.values.shape[1::2]) for cell in cache.cells()}
        assert seen == {cache_geometry(ours.config)}
        with torch.no_grad():
            same_values(plain(**prompts).logits, ours(**prompts).logits)
    assert len({tuple(row) for row in got[:, 9:].tolist()}) > 2  # the comparison could have failed


def test_the_tokens_of_transformers_with_any_policy(case: str, checkpoint: Path, plain: Any) -> None:
    for number, mode in enumerate((SAMPLING, GREEDY)):
        with load_ours(checkpoint, random_policy(case, number)) as ours:
            same_tokens(plain, ours, mode, ragged((4, 9, 1, 6, 11)), max_new_tokens=5)


def test_the_tokens_of_transformers_on_an_accelerator(case: str, checkpoint: Path, plain: Any) -> None:
    """What a family computes aside (positions, biases, masks, windows) is to be where its weights are."""
    policy = random_policy(case, 2).replace(host_attention=why_not_supported(plain) is None)
    with load_ours(checkpoint, policy, device=emulated.install()) as ours:
        same_tokens(plain, ours, GREEDY, ragged(), max_new_tokens=5)


def test_attention_on_the_host_is_done_or_refused(checkpoint: Path, plain: Any) -> None:
    """Before weights are read: a file of weights that is not there would be another error."""
    policy = Policy.parse("100 0 0 100 100 0", batch_size=2, num_batches=2, host_attention=True)
    reason = why_not_supported(plain)
    if reason is not None:
        with pytest.raises(UnsupportedModelError, match="cannot attend on the host"):
            load_ours(checkpoint, policy, device=emulated.install())
        return
    with load_ours(checkpoint, policy, device=emulated.install()) as ours:
        same_tokens(plain, ours, GREEDY, ragged((9, 4, 6)), max_new_tokens=3)
        decode = ours.last_run.to_dict()["decode_lanes"]
        keys_and_values = sum(cell.nbytes for cell in ours._make_cache(3, 12).cells())
        assert decode["host_to_device"]["bytes"] < keys_and_values  # they were not brought to the device


def test_a_quantized_store_holds_the_family(checkpoint: Path, tmp_path: Path) -> None:
    """Whatever a family calls its matrices, fuses or keeps apart; verified, and run as the reference dequantizes it."""
    store = tmp_path / "store"
    convert(checkpoint, store, compression={"weights": 4, "group_size": 16})
    report = verify(store, checkpoint)
    plain = as_quantized(load_plain(checkpoint), formats := quantized_in(store))
    assert report.quantized == len(formats)
    with load_ours(store) as ours:
        same_tokens(plain, ours, GREEDY, ragged(), max_new_tokens=5)
        assert ours.last_run.dequantizations["per_stage_and_sweep"] == 1
    layers = {
        name: p for name, p in plain.named_parameters() if ours._executor.structure.locate(name)[1] != "embedding"
    }
    assert sum(layers[name].numel() for name in formats) > 0.9 * sum(p.numel() for p in layers.values() if p.dim() > 1)


def test_a_cache_in_groups_is_attended_as_it_is_kept(
    case: str, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or brought to where compute is, with the same tokens: what a family does with keys is known."""
    policy = random_policy(case, 3).replace(compression=Compression(cache=4))
    with load_ours(checkpoint, policy) as ours:
        monkeypatch.setattr(Structure, "hands_states_on", property(lambda _: False))
        with load_ours(checkpoint, policy) as other:
            same_tokens(other, ours, GREEDY, ragged((7, 3, 5)), max_new_tokens=4)


def test_families_said_to_be_tested_are() -> None:
    assert {name.split()[0] for name in FAMILIES} == TESTED


def test_a_family_that_is_not_tested_is_named_in_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = save_tiny(AutoConfig.for_model("arcee", **TINY), tmp_path / "arcee")
    with caplog.at_level(logging.WARNING, "flexgen_hf"), load_ours(folder):
        pass
    (record,) = caplog.records
    assert "'arcee' is not among the families that flexgen_hf is tested with" in record.message
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


@pytest.mark.parametrize("percents", ["100 0 100 0 100 0", "100 0 0 0 100 0"])
def test_tokens_that_are_taken_back(mistral: Path, percents: str) -> None:
    """Candidates that were wrong leave the cache; then the window needs what had left it."""
    plain = load_plain(mistral)
    prompt = {name: tensor.repeat(1, 3) for name, tensor in ragged([5]).items()}  # says itself what comes next
    with load_ours(mistral, Policy.parse(percents, batch_size=1)) as ours:
        same_tokens(plain, ours, GREEDY, prompt, max_new_tokens=12, prompt_lookup_num_tokens=3)
        same_tokens(plain, ours, GREEDY, prompt, max_new_tokens=8, assistant_model=load_plain(mistral))
        want = plain.generate(**prompt, **GREEDY, max_new_tokens=8, pad_token_id=1)
        assert torch.equal(
            want, plain.generate(**prompt, **GREEDY, max_new_tokens=8, pad_token_id=1, assistant_model=ours)
        )


@pytest.mark.parametrize("percents", ["100 0 0 0 100 0", "0 0 0 100 0 100"])
def test_a_prompt_in_chunks_goes_through_a_window(mistral: Path, percents: str) -> None:
    with load_ours(mistral, Policy.parse(percents, batch_size=2, num_batches=2)) as ours:
        same_tokens(load_plain(mistral), ours, GREEDY, ragged([17, 12, 15]), max_new_tokens=6, prefill_chunk_size=5)


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
