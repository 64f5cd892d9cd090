"""Models that keep something beside their cache, found without weights; and refused before any is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from flexgen_hf import UnsupportedModelError
from flexgen_hf.architectures import describe
from flexgen_hf.families import TESTED
from flexgen_hf.state_trial import kept_between_tokens
from flexgen_hf.tiny_configs import tiny_config

from .comparison import load_ours
from .test_families import TINY


class NotingConfig(LlamaConfig):
    model_type = "noting"


class NotingLayer(LlamaDecoderLayer):
    """Adds a little of the last token's hidden states, which it notes in itself."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        self.noted = 0.9 * getattr(self, "noted", 0.0) + hidden_states[:, -1:]
        return super().forward(hidden_states + self.noted, *args, **kwargs)


class CountingLayer(LlamaDecoderLayer):
    """Counts its tokens."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.notes = {"tokens": [0]}

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        self.notes["tokens"][0] += hidden_states.shape[1]
        return super().forward(hidden_states, *args, **kwargs)


class BufferLayer(LlamaDecoderLayer):
    """Writes into a buffer, in place."""

    last: torch.Tensor

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.register_buffer("last", torch.zeros(1), persistent=False)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        self.last.copy_(hidden_states.flatten()[:1])
        return super().forward(hidden_states, *args, **kwargs)


class TableLayer(LlamaDecoderLayer):
    """Makes a table when it first runs, which stays as it is."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if not hasattr(self, "table"):
            self.table = hidden_states.new_ones(hidden_states.shape[-1])
        return super().forward(hidden_states * self.table, *args, **kwargs)


class NotingForCausalLM(LlamaForCausalLM):
    config_class = NotingConfig
    layer: type[LlamaDecoderLayer] = NotingLayer

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model.layers = nn.ModuleList(self.layer(config, index) for index in range(config.num_hidden_layers))


def made_of(layer: type[LlamaDecoderLayer]) -> Any:
    kind = type("MadeForCausalLM", (NotingForCausalLM,), {"layer": layer, "__module__": __name__})
    with torch.device("meta"):
        return kind(NotingConfig(**TINY))


@pytest.mark.parametrize(
    ("layer", "kept"),
    [
        (NotingLayer, "model.layers.0.noted"),
        (CountingLayer, "model.layers.0.notes"),
        (BufferLayer, "model.layers.0.last"),
        (TableLayer, None),
        (LlamaDecoderLayer, None),
    ],
)
def test_what_changes_with_a_token_is_found(layer: type[LlamaDecoderLayer], kept: str | None) -> None:
    model = made_of(layer)
    found = kept_between_tokens(model)
    assert (found is None) == (kept is None)
    assert kept is None or str(found).startswith(kept)
    assert not hasattr(model.model.layers[0], "noted"), "the trial was made on the model itself"


@pytest.mark.parametrize("model_type", sorted(TESTED))
def test_nothing_is_found_in_tested_families(model_type: str) -> None:
    auto: Any = AutoModelForCausalLM
    with torch.device("meta"):
        model = auto.from_config(tiny_config(model_type))
    assert kept_between_tokens(model) is None
    assert describe(model).layers


def test_a_made_up_architecture_is_refused_before_weights_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    AutoConfig.register("noting", NotingConfig, exist_ok=True)
    AutoModelForCausalLM.register(NotingConfig, NotingForCausalLM, exist_ok=True)
    NotingConfig(**TINY, architectures=["NotingForCausalLM"]).save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"not to be looked at")
    monkeypatch.setattr("flexgen_hf.loading.read_checkpoint", None)
    with pytest.raises(UnsupportedModelError, match=r"NotingForCausalLM keeps state outside of its cache: .*noted"):
        load_ours(tmp_path / "model", dtype="float32")
