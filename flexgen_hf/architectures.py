"""Finds the stages of a Hugging Face causal language model; refuses by name what this engine cannot run.

It looks at module structure and configuration, never at weights, and runs on a model that lives on the `meta` device.
Of the families' names, it knows what `families` says.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Collection
from functools import cached_property
from typing import Any

from torch import nn
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from .errors import UnsupportedModelError
from .families import is_tested
from .state_trial import kept_between_tokens

__all__ = ["Structure", "describe"]

# Layer kinds of `config.layer_types` whose state is plain keys and values.
_CACHE_KINDS = frozenset({"full_attention", "sliding_attention", "chunked_attention"})


@dataclasses.dataclass(frozen=True)
class Structure:
    """The stages of a model: 0 is the embedding, 1..num_layers the decoder layers, num_layers + 1 the head.

    Args:
        model: the model, usually on `meta`.
        layers_name: qualified name of the `ModuleList` of decoder layers, e.g. `"model.decoder.layers"`.
    """

    model: nn.Module
    layers_name: str

    @cached_property
    def layers(self) -> list[nn.Module]:
        """The decoder layers in order."""
        return list(self.model.get_submodule(self.layers_name).children())

    @property
    def num_stages(self) -> int:
        """Decoder layers + 2."""
        return len(self.layers) + 2

    @property
    def head_stage(self) -> int:
        """Index of the head."""
        return len(self.layers) + 1

    @property
    def numbers_tokens_by_mask(self) -> bool:
        """Whether left padding changes nothing but what is masked: positions are counted from the first real token.

        Known of the tested families only.
        """
        return self._is_tested

    @property
    def reads_once(self) -> bool:
        """Whether the model's code reads what embeddings and last layer return once, right after it got it.

        Known of the tested families only: what is used up reads as NaN, so their tests would show it.
        """
        return self._is_tested

    @property
    def hands_states_on(self) -> bool:
        """Whether the model's code passes on what a cache returns to its attention function, and does nothing else.

        Known of the tested families only; others would be refused when they look at what has no memory.
        """
        return self._is_tested

    @property
    def _is_tested(self) -> bool:
        config: Any = self.model.config
        return is_tested(config.model_type)

    @cached_property
    def _head_names(self) -> tuple[str, ...]:
        # A module outside the layers belongs to the head if it is the output embedding, or was registered after the
        # layers. OPT registers its final norm and projection first; the executor learns such cases from the first
        # sweep, here a wrong guess would only cost a sequential read.
        names = [name for name, _ in self.outer_modules()]
        after = _registered_after(self.model, self.layers_name)
        head = getattr(self.model, "get_output_embeddings", lambda: None)()
        modules = dict(self.model.named_modules())
        return tuple(n for n in names if n in after or modules[n] is head)

    def outer_modules(self) -> list[tuple[str, nn.Module]]:
        """Modules outside the decoder layers that own parameters or persistent buffers, in registration order."""
        return [
            (name, module)
            for name, module in self.model.named_modules()
            if not (name + ".").startswith(self.layers_name + ".") and owns_state(module)
        ]

    def tables(self, held: Collection[str]) -> dict[str, int]:
        """The tables of embedding and head, with the stage that uses each first.

        Args:
            held: the names under which tensors are stored; a tied one has others besides.
        """
        model: Any = self.model
        modules = {0: model.get_input_embeddings(), self.head_stage: model.get_output_embeddings()}
        found: dict[str, int] = {}
        for stage, module in modules.items():
            weight = getattr(module, "weight", None)
            for name, parameter in model.named_parameters(remove_duplicate=False):
                if parameter is weight and name in held:
                    found.setdefault(name, stage)
        return found

    def locate(self, tensor_name: str) -> tuple[int, str]:
        """Stage and part (`"embedding"`, `"attention"`, `"mlp"`, `"experts"` or `"head"`) of a state-dict name."""
        if tensor_name.startswith(self.layers_name + "."):
            index, rest = tensor_name[len(self.layers_name) + 1 :].split(".", 1)
            return int(index) + 1, _part_of(rest)
        module_name = tensor_name.rpartition(".")[0]
        if module_name in self._head_names:
            return self.head_stage, "head"
        return 0, "embedding"

    def stage_name(self, stage: int) -> str:
        """`"embedding"`, `"layer 3"` (counted from 0) or `"head"`."""
        if stage == 0:
            return "embedding"
        return "head" if stage == self.head_stage else f"layer {stage - 1}"


def owns_state(module: nn.Module) -> bool:
    """Whether a module itself, not a child, holds tensors that a checkpoint would carry."""
    if any(p is not None for p in module._parameters.values()):
        return True
    skip = module._non_persistent_buffers_set
    return any(b is not None and name not in skip for name, b in module._buffers.items())


def describe(model: nn.Module) -> Structure:
    """Finds the decoder layers of `model` and checks that they can be run one at a time.

    Raises:
        UnsupportedModelError: encoder-decoder and multimodal models, models without one list of decoder layers, and
            models whose layers keep a kind of state that is not keys and values.
    """
    config: Any = model.config
    name = type(model).__name__
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{name} is an encoder-decoder model; only causal language models can be streamed")
    if any(key in vars(config) for key in ("vision_config", "audio_config")):
        raise UnsupportedModelError(f"{name} is multimodal; load its text model (for example its *ForCausalLM class)")
    structure = Structure(model, _find_layers(model))
    _check_state(model)
    return structure


def _find_layers(model: nn.Module) -> str:
    config: Any = model.config
    count = getattr(config.get_text_config(decoder=True), "num_hidden_layers", None)
    if not isinstance(count, int):
        raise UnsupportedModelError(
            f"{type(model).__name__} does not say in its configuration how many decoder layers it has; models of this "
            "build cannot be streamed"
        )
    lists = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    no_split = set(getattr(model, "_no_split_modules", None) or ())
    found = [n for n, m in lists if type(m[0]).__name__ in no_split]
    if not found and lists:
        found = [max(lists, key=lambda item: sum(p.numel() for p in item[1].parameters()))[0]]
    if len(found) != 1:
        raise UnsupportedModelError(
            f"{type(model).__name__} has {len(found)} lists of {count} decoder layers ({', '.join(found) or 'none'}), "
            "not one; models of this build cannot be streamed"
        )
    return str(found[0])


def _check_state(model: nn.Module) -> None:
    whole: Any = model.config
    config: Any = whole.get_text_config(decoder=True)
    name = type(model).__name__
    if getattr(model, "_is_stateful", False):
        raise UnsupportedModelError(f"{name} keeps state of its own kind between tokens; it cannot be streamed")
    if "past_key_values" not in inspect.signature(model.forward).parameters:
        raise UnsupportedModelError(
            f"{name}.forward has no past_key_values; its cache is of another kind and cannot be streamed"
        )
    # What transformers' own cache would be made of says it for models without `layer_types`, and for shared layers.
    made = {type(layer) for layer in DynamicCache(config=config).layers} - {DynamicLayer, DynamicSlidingWindowLayer}
    kinds = set(getattr(config, "layer_types", None) or ()) - _CACHE_KINDS
    if made or kinds:
        raise UnsupportedModelError(
            f"{name} has layers of kind {', '.join(sorted(kinds or {kind.__name__ for kind in made}))}, whose state is "
            "not keys and values of their own; this version runs full and sliding attention"
        )
    # Tested families are known not to.
    if not is_tested(whole.model_type) and (kept := kept_between_tokens(model)) is not None:
        raise UnsupportedModelError(
            f"{name} keeps state outside of its cache: {kept!r} changes with every token, and would be shared by the "
            "micro-batches that take turns; it cannot be streamed"
        )


def _registered_after(model: nn.Module, layers_name: str) -> set[str]:
    """Names of modules outside the layers that `named_modules` yields after them."""
    after: set[str] = set()
    seen = False
    for name, _ in model.named_modules():
        if name == layers_name:
            seen = True
        elif seen and not name.startswith(layers_name + "."):
            after.add(name)
    return after


def _part_of(name_in_layer: str) -> str:
    """Part of a tensor inside a layer, from the generic words of its module path."""
    path = name_in_layer.rpartition(".")[0]
    if re.search(r"(^|\.)experts(\.|$)", path):
        return "experts"
    return "attention" if re.search(r"att(e)?n", path) else "mlp"
