"""What tests that compare with transformers share: tiny random models, ragged prompts, and the comparison itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_map_only
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.cache_utils import Cache

from flexgen_hf import FlexGenForCausalLM, Policy
from flexgen_hf.quantization import groupwise, search
from flexgen_hf.quantization.groupwise import GroupFormat
from flexgen_hf.weights.format import Manifest
from flexgen_hf.weights.quantized import Quantization

__all__ = [
    "BEAMS",
    "GREEDY",
    "SAMPLING",
    "THREE_TIERS",
    "as_quantized",
    "load_ours",
    "load_plain",
    "matrices",
    "put",
    "quantized_in",
    "ragged",
    "same_tokens",
    "same_values",
    "save_tiny",
]

GREEDY: dict[str, Any] = {"do_sample": False}
SAMPLING: dict[str, Any] = {"do_sample": True, "temperature": 1.2, "top_k": 40, "top_p": 0.95}
BEAMS: dict[str, Any] = {"do_sample": False, "num_beams": 3}

#: weights, cache and hidden states on all three tiers, in micro-batches of two
THREE_TIERS = Policy.parse("30 30 30 40 30 30", batch_size=2, num_batches=3)


def save_tiny(config: PretrainedConfig, folder: Path, *, std: float = 0.3, dtype: torch.dtype = torch.float32) -> Path:
    """Writes a checkpoint of `config` with random weights, large enough that every prompt gets tokens of its own.

    transformers' own initialization is so small that tiny models repeat one token, whatever goes wrong.
    """
    generator = torch.Generator().manual_seed(1)
    model: Any = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            noise = torch.randn(tensor.shape, generator=generator) * std
            is_norm = tensor.ndim == 1 and name.endswith("weight")
            tensor.copy_(1 + noise / 3 if is_norm else noise)
    model.generation_config.eos_token_id = None
    model.to(dtype).save_pretrained(folder)
    return folder


def ragged(
    lengths: Sequence[int] = (3, 7, 5, 2, 9, 4, 6), vocabulary: int = 90, *, pad: int = 1, left: bool = True
) -> dict[str, Any]:
    """Distinct prompts of different lengths as a tokenizer pads them: `input_ids` and `attention_mask`."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.full((len(lengths), max(lengths)), pad)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        tokens = slice(-length, None) if left else slice(0, length)
        ids[row, tokens] = torch.randint(3, vocabulary, (length,), generator=generator)
        mask[row, tokens] = 1
    return {"input_ids": ids, "attention_mask": mask}


def load_plain(folder: Path, **options: Any) -> Any:
    """The model as transformers loads it."""
    return AutoModelForCausalLM.from_pretrained(folder, **options)


def load_ours(folder: Path, policy: Policy | str = THREE_TIERS, **options: Any) -> Any:
    """The model as this package loads it; spill files go into the checkpoint's parent folder."""
    options = {"offload_folder": Path(folder).parent / "offload", **options}
    return FlexGenForCausalLM.from_pretrained(folder, policy=policy, **options)


def matrices(model: Any) -> list[str]:
    """Names of what is quantized of an OPT or a Mixtral if nothing else is asked for."""
    return [n for n, p in model.named_parameters() if ".layers." in n and p.dim() > 1 and ".gate." not in n]


def as_quantized(plain: Any, formats: Mapping[str, GroupFormat]) -> Any:
    """A model of transformers in float32 with the numbers that the reference makes of its weights in groups."""
    with torch.no_grad():
        for name, fmt in formats.items():
            weight = plain.get_parameter(name)
            weight.copy_(groupwise.dequantize(search.quantize(weight, fmt), fmt))
    return plain


def quantized_in(store: Path) -> dict[str, GroupFormat]:
    """What the manifest of a store says is quantized."""
    quantization = Quantization.of(Manifest.load(store), store)
    assert quantization is not None
    return quantization.formats()


def put(inputs: Any, device: torch.device | str) -> Any:
    """`inputs` with all their tensors on a device, where a user has to put them."""
    return tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), inputs)


def same_tokens(reference: Any, ours: Any, mode: dict[str, Any], inputs: dict[str, Any], **settings: Any) -> Any:
    """Asserts that both models generate the same tokens (with one seed, where they are drawn), and returns them.

    Each model gets its inputs on its own device, and is to return tokens there; those returned here are on the CPU.
    """
    settings = {"max_new_tokens": 6, "pad_token_id": 1, **mode, **settings}
    outputs = []
    for model in (reference, ours):
        torch.manual_seed(5)
        tokens = model.generate(**put({**inputs, **settings}, model.device))
        assert tokens.device == model.device
        outputs.append(tokens.cpu())
    want, got = outputs
    assert torch.equal(want, got), f"\nwant {want.tolist()}\ngot  {got.tolist()}"
    return got


def same_values(want: Any, got: Any, where: str = "output") -> None:
    """Asserts that two outputs of transformers have the same fields, and tensors equal but for rounding.

    A matrix product over fewer rows may round its last bit another way. Caches are compared row by row.
    """
    if isinstance(want, Cache):
        _same_cache(want, got, where)
    elif isinstance(want, torch.Tensor):
        assert want.shape == got.shape, f"{where}: {tuple(got.shape)} instead of {tuple(want.shape)}"
        torch.testing.assert_close(got.cpu(), want.cpu(), rtol=1e-4, atol=1e-4, msg=lambda text: f"{where}: {text}")
    elif isinstance(want, Mapping):
        assert set(want) == set(got), where
        for key, value in want.items():
            same_values(value, got[key], f"{where}.{key}")
    elif isinstance(want, (tuple, list)):
        assert len(want) == len(got), f"{where}: {len(got)} instead of {len(want)}"
        for index, (one, other) in enumerate(zip(want, got, strict=True)):
            same_values(one, other, f"{where}[{index}]")
    else:
        assert want == got, where


def _same_cache(want: Any, got: Any, where: str) -> None:
    assert want.get_seq_length() == got.get_seq_length(), where
    for layer, theirs in enumerate(want.layers):
        for what in ("keys", "values"):
            parts = [getattr(child.layers[layer], what).cpu() for child in getattr(got, "children", [got])]
            same_values(getattr(theirs, what), torch.cat(parts), f"{where}, {what} of layer {layer}")
