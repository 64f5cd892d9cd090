"""Models by shape: configurations of the sizes in which OPT was published, and checkpoints of random weights for them.

Knows shapes and bytes. Speed does not depend on what the weights are, so a checkpoint that nobody has to download
measures as well as the real one.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CapacityError, PolicyError

if TYPE_CHECKING:
    import torch

__all__ = ["SHAPES", "config_of_shape", "random_checkpoint", "random_pieces", "write_random_checkpoint"]

#: layers, hidden size and attention heads by name; the rest follows
SHAPES: Mapping[str, tuple[int, int, int]] = {
    "tiny": (4, 64, 4),
    "opt-125m": (12, 768, 12),
    "opt-350m": (24, 1024, 16),
    "opt-1.3b": (24, 2048, 32),
    "opt-2.7b": (32, 2560, 32),
    "opt-6.7b": (32, 4096, 32),
    "opt-13b": (40, 5120, 40),
    "opt-30b": (48, 7168, 56),
    "opt-66b": (64, 9216, 72),
    "opt-175b": (96, 12288, 96),
}

# what differs from the other sizes, beside those three numbers
_SPECIAL: Mapping[str, Mapping[str, Any]] = {
    "tiny": {"vocab_size": 128, "max_position_embeddings": 256},
    "opt-350m": {"word_embed_proj_dim": 512, "do_layer_norm_before": False},
}

# goes into the names of cached checkpoints: raise it when the same configuration gives other bytes
_VERSION = 2

# at 1, what tied models write is their last token again and again, whatever came before it
_GAIN = 2.0


def config_of_shape(name: str) -> Any:
    """The `OPTConfig` of a shape.

    Raises:
        PolicyError: no such shape.
    """
    from transformers import OPTConfig

    if name not in SHAPES:
        raise PolicyError(f"no shape {name!r}; known are {', '.join(SHAPES)}")
    layers, hidden, heads = SHAPES[name]
    fields = {
        "num_hidden_layers": layers, "hidden_size": hidden, "num_attention_heads": heads, "ffn_dim": 4 * hidden,
        "word_embed_proj_dim": hidden, "vocab_size": 50272, "max_position_embeddings": 2048,
    }  # fmt: skip
    return OPTConfig(**{**fields, **_SPECIAL.get(name, {})})


def random_checkpoint(work_folder: str | Path, name: str, dtype: torch.dtype) -> Path:
    """The folder of a checkpoint of this shape, written at the first call and found by the later ones.

    It is whole or absent, also when the writing is interrupted or two processes write it at once.

    Raises:
        PolicyError: no such shape.
        CapacityError: the disk has no room for it.
    """
    config = config_of_shape(name)
    config.dtype = dtype
    described = json.dumps([_VERSION, config.to_dict()], sort_keys=True, default=str)
    key = hashlib.sha256(described.encode()).hexdigest()[:8]
    target = Path(work_folder) / "checkpoints" / f"{name}-{str(dtype).removeprefix('torch.')}-{key}"
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".writing_", dir=target.parent) as temporary:
        made = write_random_checkpoint(Path(temporary) / target.name, config, dtype)
        try:
            made.rename(target)
        except OSError:  # another process was faster
            if not target.is_dir():
                raise
    return target


def write_random_checkpoint(folder: str | Path, config: Any, dtype: torch.dtype) -> Path:
    """Writes a checkpoint of random weights as `save_pretrained` would lay it out, without holding it in memory.

    The weights are scaled so that logits are finite in 16 bit and differ from token to token.

    Args:
        folder: created if need be; gets `config.json` and `model.safetensors`.
        config: of any causal language model of transformers.
        dtype: of all weights.

    Raises:
        CapacityError: the disk has no room for it.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from ..weights.format import encode_header
    from ..weights.pieces import dtype_name

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config.dtype = dtype
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]
    state = {k: v for k, v in model.state_dict().items() if k not in model.all_tied_weights_keys}
    size, free = sum(v.numel() * v.element_size() for v in state.values()), shutil.disk_usage(folder).free
    if size > free:
        raise CapacityError(f"{folder} has {free / 1e9:.1f} GB free but the checkpoint takes {size / 1e9:.1f} GB")
    config.save_pretrained(folder)
    with (folder / "model.safetensors").open("wb") as file:
        layout = {k: (dtype_name(v.dtype), tuple(v.shape)) for k, v in state.items()}
        file.write(encode_header(layout, {"format": "pt"}))
        for piece in random_pieces(state):
            file.write(piece.view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())  # pages that are still to be written cannot be dropped from the cache
    return folder


def random_pieces(state: Mapping[str, torch.Tensor], step: int = 1 << 22) -> Iterator[torch.Tensor]:
    """Random values for each of these tensors in turn, in pieces of at most `step` elements. Always the same ones.

    Matrices double what they are applied to, so that the next token depends on all those before it; rows of tables have
    length one, the weights of norms are near one.
    """
    import torch

    generator = torch.Generator().manual_seed(0)
    for name, tensor in state.items():
        gain = _GAIN if tensor.dim() > 1 and "embed" not in name else 1.0
        scale = gain / math.sqrt(max(tensor.shape[-1], 1)) if tensor.dim() else 1.0
        mean = 1.0 if tensor.dim() == 1 and name.endswith(".weight") else 0.0
        for start in range(0, tensor.numel(), step):
            size = min(step, tensor.numel() - start)
            yield (mean + torch.randn(size, generator=generator) * scale).to(tensor.dtype)
