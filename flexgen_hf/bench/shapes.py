"""Models by shape: configurations of the sizes in which OPT was published, and checkpoints of random weights for them.

Knows shapes and bytes. Speed does not depend on what the weights are, so a checkpoint that nobody has to download
measures as well as the real one.

`opt-30b-like` and `opt-175b-like` are small models in which bytes stand to each other as in OPT-30B and OPT-175B, so
that what is known of these on a large machine can be emulated on a small one. An OPT of a small hidden size cannot do
that: its cache is far too large beside its weights. These are Llamas with as many layers as the original, with
12 hidden^2 parameters in each as OPT has, and one head of keys and values. In 16 bit, for sequences of 544 tokens:

| | weights | layers | cache of a sequence / weights | table of the vocabulary / weights |
| --- | --- | --- | --- | --- |
| OPT-30B | 60.0 GB | 48 | 0.0125 | 0.0120 |
| opt-30b-like | 1.223 GB | 48 | 0.0109 | 0.0120 |
| OPT-175B | 349 GB | 96 | 0.0073 | 0.0035 |
| opt-175b-like | 1.364 GB | 96 | 0.0074 | 0.0035 |

`mixtral-0.8b` is a Mixtral of 1.58 GB in 16 bit, of which 1.41 GB are experts: 8 layers of 8 experts, of which a token
is sent to 2. Its routers' random weights spread tokens over all experts.

What does not scale: hidden states, and all else that a layer computes, are 7 and 16 times as large beside the
weights as in the original.
"""

from __future__ import annotations

import dataclasses
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

__all__ = [
    "SHAPES", "Shape", "config_of_shape", "is_shape", "random_checkpoint", "random_pieces", "shape_fields",
    "write_random_checkpoint",
]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Shape:
    """What a configuration follows from.

    Args:
        layers: decoder layers.
        hidden: elements of a hidden state.
        heads: of queries.
        special: fields of the configuration that differ from those that follow.
        is_opt: an OPT; otherwise a Llama, whose attention may have fewer heads of keys and values than of queries, or
            with experts among the special fields a Mixtral.
    """

    layers: int
    hidden: int
    heads: int
    special: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    is_opt: bool = True

    def fields(self) -> dict[str, Any]:
        """The fields of the configuration that differ from its class's own, or that decide its size."""
        fields: dict[str, Any] = {
            "num_hidden_layers": self.layers,
            "hidden_size": self.hidden,
            "num_attention_heads": self.heads,
            "max_position_embeddings": 2048,
        }
        if self.is_opt:
            fields |= {"ffn_dim": 4 * self.hidden, "word_embed_proj_dim": self.hidden, "vocab_size": 50272}
        else:
            fields |= {"pad_token_id": 1, "tie_word_embeddings": True, "rms_norm_eps": 1e-6}
        return {**fields, **self.special}

    def config(self) -> Any:
        """The configuration, a class of transformers."""
        from transformers import LlamaConfig, MixtralConfig, OPTConfig

        if self.is_opt:
            return OPTConfig(**self.fields())
        has_experts = "num_local_experts" in self.special
        return MixtralConfig(**self.fields()) if has_experts else LlamaConfig(**self.fields())


def _like(layers: int, hidden: int, heads: int, head_dim: int, intermediate_size: int, vocab_size: int) -> Shape:
    # the intermediate size gives a layer 12 hidden^2 parameters, as OPT's has
    special = {
        "head_dim": head_dim,
        "num_key_value_heads": 1,
        "intermediate_size": intermediate_size,
        "vocab_size": vocab_size,
    }
    return Shape(layers, hidden, heads, special, is_opt=False)


def _mixture(layers: int, hidden: int, heads: int, intermediate_size: int) -> Shape:
    special = {
        "num_key_value_heads": heads // 4,
        "intermediate_size": intermediate_size,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "vocab_size": 32000,
        "tie_word_embeddings": False,
    }
    return Shape(layers, hidden, heads, special, is_opt=False)


#: by name; `"opt-1.3b:6"` is the shape `opt-1.3b` with 6 layers
SHAPES: Mapping[str, Shape] = {
    "tiny": Shape(4, 64, 4, {"vocab_size": 128, "max_position_embeddings": 256}),
    "opt-125m": Shape(12, 768, 12),
    "opt-350m": Shape(24, 1024, 16, {"word_embed_proj_dim": 512, "do_layer_norm_before": False}),
    "opt-1.3b": Shape(24, 2048, 32),
    "opt-2.7b": Shape(32, 2560, 32),
    "opt-6.7b": Shape(32, 4096, 32),
    "opt-13b": Shape(40, 5120, 40),
    "opt-30b": Shape(48, 7168, 56),
    "opt-66b": Shape(64, 9216, 72),
    "opt-175b": Shape(96, 12288, 96),
    "opt-30b-like": _like(48, hidden=1024, heads=8, head_dim=128, intermediate_size=3328, vocab_size=7168),
    "opt-175b-like": _like(96, hidden=768, heads=16, head_dim=48, intermediate_size=2528, vocab_size=3112),
    "mixtral-0.8b": _mixture(8, hidden=1024, heads=8, intermediate_size=3584),
}

# goes into the names of cached checkpoints: raise it when the same configuration gives other bytes
_VERSION = 2

# at 1, what tied models write is their last token again and again, whatever came before it
_GAIN = 2.0


def is_shape(text: str) -> bool:
    """Whether this is the name of a shape, with or without a number of layers behind it."""
    return text.partition(":")[0] in SHAPES


def config_of_shape(name: str) -> Any:
    """The configuration of a shape: an `OPTConfig`, or a `LlamaConfig` or `MixtralConfig` for those that are none.

    Args:
        name: one of `SHAPES`, or one with a number of layers, such as `"opt-1.3b:6"`.

    Raises:
        PolicyError: no such shape, or no number of layers.
    """
    return _named(name).config()


def shape_fields(name: str) -> dict[str, Any]:
    """The fields of the configuration of a shape, without transformers; arguments and errors of `config_of_shape`."""
    return _named(name).fields()


def _named(name: str) -> Shape:
    base, colon, layers = name.partition(":")
    if base not in SHAPES:
        raise PolicyError(f"no shape {name!r}; known are {', '.join(SHAPES)}")
    shape = SHAPES[base]
    if colon:
        if not (layers.isdecimal() and int(layers)):
            raise PolicyError(f"shape {name!r}: {layers!r} is no number of layers; write for example '{base}:6'")
        shape = dataclasses.replace(shape, layers=int(layers))
    return shape


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
    target = Path(work_folder) / "checkpoints" / f"{name.replace(':', 'x')}-{str(dtype).removeprefix('torch.')}-{key}"
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
