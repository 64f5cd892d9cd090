"""Checkpoints made up for tests: random weights in the layouts that real ones have, written a tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from flexgen_hf.bench import shapes

__all__ = ["opt_config", "write_random_checkpoint"]


def opt_config(**overrides: Any) -> Any:
    """An OPT of a few kilobytes; `overrides` are fields of OPTConfig."""
    from transformers import OPTConfig

    tiny = {
        "vocab_size": 96, "hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 64, "num_hidden_layers": 3,
        "num_attention_heads": 4, "max_position_embeddings": 40, "dropout": 0.0,
    }  # fmt: skip
    return OPTConfig(**{**tiny, **overrides})


def write_random_checkpoint(
    folder: str | Path, config: PretrainedConfig, kind: str = "safetensors", dtype: torch.dtype = torch.float16
) -> Path:
    """Writes a checkpoint of random weights as `save_pretrained` would lay it out, without holding it in memory.

    Args:
        folder: created if need be; gets `config.json` and one file of weights.
        config: of a causal language model.
        kind: `"safetensors"` or `"bin"`.
        dtype: of all weights.
    """
    if kind == "safetensors":
        return shapes.write_random_checkpoint(folder, config, dtype)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config.dtype = dtype
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    state = {k: v for k, v in model.state_dict().items() if k not in model.all_tied_weights_keys}
    _write_bin(folder / "pytorch_model.bin", state)
    return folder


def _write_bin(path: Path, state: Mapping[str, torch.Tensor]) -> None:
    """The weights go into a raw file first, whose mapping `torch.save` then copies."""
    raw = path.with_suffix(".raw")
    sizes = [tensor.numel() * tensor.element_size() for tensor in state.values()]
    with raw.open("wb") as file:
        for piece in shapes.random_pieces(state):
            file.write(piece.view(torch.uint8).numpy().data)
    storage = torch.UntypedStorage.from_file(str(raw), shared=False, nbytes=sum(sizes))
    tensors, at = {}, 0
    for (name, tensor), size in zip(state.items(), sizes, strict=True):
        tensors[name] = torch.empty(0, dtype=tensor.dtype).set_(storage[at : at + size]).view(tensor.shape)
        at += size
    torch.save(tensors, path)
    raw.unlink()


def with_keys(source: Path, target: Path, rename: Any) -> Path:
    """A copy of a safetensors checkpoint as `pytorch_model.bin`, under other keys: what old Hub repositories hold."""
    from safetensors.torch import load_file

    target.mkdir(parents=True, exist_ok=True)
    state = {rename(key): value for key, value in load_file(source / "model.safetensors").items()}
    torch.save(state, target / "pytorch_model.bin")
    (target / "config.json").write_text(json.dumps(json.loads((source / "config.json").read_text())))
    return target
