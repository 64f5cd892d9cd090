"""What the formats without a configuration share: all of them hold OPT, whose configuration the shapes tell.

Knows names and shapes of OPT's tensors; reads no files.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from flexgen_hf.errors import ConversionError

__all__ = ["config_of", "transformers_name"]

# The number of attention heads is in no tensor's shape; these are the published models, by hidden size.
_HEADS = {768: 12, 1024: 16, 2048: 32, 2560: 32, 4096: 32, 5120: 40, 7168: 56, 9216: 72, 12288: 96}

_RENAMED = {
    "decoder.layer_norm.": "decoder.final_layer_norm.",
    "decoder.project_in_dim.": "decoder.project_in.",
    "decoder.project_out_dim.": "decoder.project_out.",
}


def transformers_name(key: str) -> str:
    """The name in transformers of a tensor's name in metaseq or in the original's numpy folders."""
    for old, new in _RENAMED.items():
        if key.startswith(old):
            return new + key[len(old) :]
    return key


def config_of(shapes: Mapping[str, tuple[int, ...]]) -> Any:
    """The configuration of an OPT model with tensors of these shapes, by transformers' names.

    Raises:
        ConversionError: a tensor is missing, or the number of heads cannot be told.
    """
    from transformers import OPTConfig

    embedding = _shape(shapes, "decoder.embed_tokens.weight")
    positions = _shape(shapes, "decoder.embed_positions.weight")
    hidden = positions[1]
    if hidden not in _HEADS:
        raise ConversionError(
            f"hidden size {hidden} is not one of a published OPT model, and no tensor tells the number of attention "
            "heads; give --config FOLDER with the model's config.json"
        )
    layers = {int(found[1]) for key in shapes if (found := re.match(r"decoder\.layers\.(\d+)\.", key))}
    return OPTConfig(
        vocab_size=embedding[0],
        word_embed_proj_dim=embedding[1],
        hidden_size=hidden,
        num_attention_heads=_HEADS[hidden],
        num_hidden_layers=len(layers),
        ffn_dim=_shape(shapes, "decoder.layers.0.fc1.weight")[0],
        max_position_embeddings=positions[0] - 2,  # the table begins with two rows that no token uses
        # the model that normalizes after attention and MLP is the one without a norm at the end
        do_layer_norm_before="decoder.final_layer_norm.weight" in shapes,
    )


def _shape(shapes: Mapping[str, tuple[int, ...]], name: str) -> tuple[int, ...]:
    if name not in shapes:
        raise ConversionError(f"the folder has no tensor {name!r}; it is incomplete, or not an OPT model")
    return shapes[name]
