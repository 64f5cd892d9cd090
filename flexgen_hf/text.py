"""Text in, text out: a tokenizer as batched generation needs it, and prompts through a model.

Works with any Hugging Face causal language model; knows nothing of tiers or policies.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["complete", "dtype_of_compute", "load_tokenizer", "named_file"]


def dtype_of_compute() -> str:
    """The element type to load a model with: the checkpoint's on an accelerator, float32 on a CPU.

    Many CPUs compute in 16 bit, but several times slower than in 32; stored weights stay in 16 bit either way.
    """
    import torch

    return "auto" if torch.accelerator.is_available() else "float32"


def load_tokenizer(source: str, **hub_options: Any) -> Any:
    """The tokenizer of a model, ready for batches of prompts of different lengths.

    Args:
        source: Hub id, model folder, store, or GGUF file.
        hub_options: what `AutoTokenizer.from_pretrained` takes: `revision`, `token`, ...

    Returns:
        A tokenizer that pads on the left, as generation needs it; where the model has no padding token, with the
        end-of-sequence token (padding is masked, so any token serves).
    """
    from transformers import AutoTokenizer

    folder, options = named_file(source)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, padding_side="left", **options, **hub_options)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def named_file(source: str) -> tuple[str, dict[str, str]]:
    """What transformers calls a source: of a GGUF file its folder, and the option that names it."""
    path = Path(source)
    is_gguf = path.suffix == ".gguf" and path.is_file()
    return (str(path.parent), {"gguf_file": path.name}) if is_gguf else (source, {})


def complete(model: Any, tokenizer: Any, prompts: Sequence[str], **generation: Any) -> list[str]:
    """What the model writes after each prompt, without the prompt and without special tokens.

    Args:
        model: has `generate` and `device`.
        tokenizer: from `load_tokenizer`.
        prompts: any number of texts; more than a block are run block by block.
        generation: what `generate` takes: `max_new_tokens`, `do_sample`, ...
    """
    inputs = tokenizer(list(prompts), return_tensors="pt", padding=True, return_token_type_ids=False).to(model.device)
    output = model.generate(**inputs, pad_token_id=tokenizer.pad_token_id, **generation)
    written = output[:, inputs["input_ids"].shape[1] :]
    texts: list[str] = tokenizer.batch_decode(written, skip_special_tokens=True)
    return texts
