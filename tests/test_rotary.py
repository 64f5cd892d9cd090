"""Rotary variants, beyond the length that a model was trained with, with padding on the left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from flexgen_hf import Policy

from .comparison import BEAMS, GREEDY, SAMPLING, load_ours, load_plain, ragged, same_tokens, same_values, save_tiny
from .test_families import HEADS, TINY

TRAINED = 16  # tokens; prompts are longer and shorter

LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [1.5, 2.0, 3.0, 4.0]}
VARIANTS: dict[str, dict[str, Any]] = {
    "llama linear": {"rope_type": "linear", "factor": 2.0},
    "llama dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "llama yarn": {"rope_type": "yarn", "factor": 4.0},
    "llama llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "phi3 longrope": LONGROPE,
    "qwen3 dynamic": {"rope_type": "dynamic", "factor": 3.0},
}


@pytest.fixture(params=VARIANTS)
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    family, kind = request.param.split()
    scaling = {**VARIANTS[request.param], "rope_theta": 10000.0}
    if kind != "dynamic":
        scaling["original_max_position_embeddings"] = TRAINED
    fields = {**(HEADS if family == "qwen3" else TINY), "rope_parameters": scaling}
    # "dynamic" counts from max_position_embeddings on
    fields |= {"max_position_embeddings": TRAINED if kind == "dynamic" else 64}
    if family == "phi3":
        fields["original_max_position_embeddings"] = TRAINED
    return save_tiny(AutoConfig.for_model(family, **fields), tmp_path / "model")


def test_long_positions(checkpoint: Path) -> None:
    """Some rows are beyond that length from the start, some get there; more prompts than a block has places."""
    plain, prompts = load_plain(checkpoint), ragged((24, 3, 14, 9, 20))
    with load_ours(checkpoint, Policy.parse("30 30 30 40 30 30", batch_size=2, num_batches=2)) as ours:
        for mode in (GREEDY, SAMPLING, BEAMS):
            same_tokens(plain, ours, mode, prompts, max_new_tokens=5)
        positions = (prompts["attention_mask"].cumsum(1) - 1).clamp_min(0)
        with torch.no_grad():
            want, got = (model(**prompts, position_ids=positions).logits for model in (plain, ours))
        same_values(want, got)


def test_short_ones_after_long_ones(checkpoint: Path) -> None:
    """Frequencies go back to what they were; prompts that are all short get there while they are written on."""
    plain = load_plain(checkpoint)
    with load_ours(checkpoint, Policy.parse("0 0 0 0 0 0", batch_size=2, num_batches=1)) as ours:
        for lengths in ((20, 5, 3), (4, 9, 2), (14, 7, 11)):
            same_tokens(plain, ours, GREEDY, ragged(lengths), max_new_tokens=5)
