"""A model's parameters as places into which tensors are put when their stage runs.

Knows modules and names; knows neither where the tensors come from nor when.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from .weights.store import WeightStore

__all__ = ["ParameterTable"]


class ParameterTable:
    """Where each tensor of the model is held: the dictionaries of its modules.

    Tensors are put straight into `module._parameters`: no new Parameter, no functional call. When they are taken out,
    the model's own `meta` parameters are back, so counting parameters stays truthful.

    Args:
        model: the model on `meta`, with tied tensors tied.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._places: dict[str, list[tuple[dict[str, Any], str]]] = {}
        self._placeholders: dict[str, Any] = {}
        names: dict[int, str] = {}
        for prefix, module in model.named_modules():
            for store, skip in ((module._parameters, ()), (module._buffers, module._non_persistent_buffers_set)):
                for key, value in store.items():
                    if value is None or key in skip:
                        continue
                    name = names.setdefault(id(value), f"{prefix}.{key}" if prefix else key)
                    self._places.setdefault(name, []).append((store, key))
                    self._places[f"{prefix}.{key}" if prefix else key] = self._places[name]
                    self._placeholders[name] = self._placeholders[f"{prefix}.{key}" if prefix else key] = value
        self._installed: dict[int, list[str]] = {}
        self._resident: list[str] = []
        self._left_out: set[int] = set()

    def leave_out(self, placeholders: Iterable[nn.Parameter]) -> None:
        """Says which of the model's own parameters no tensor will ever be put in place of."""
        self._left_out = set(map(id, placeholders))

    def install_resident(self, weights: WeightStore, model: nn.Module, device: torch.device) -> None:
        """Puts the tensors whose home is the device in for good, and moves computed buffers there."""
        for module in model.modules():  # rotary tables and the like: computed, in no checkpoint
            for key in module._non_persistent_buffers_set:
                buffer = module._buffers.get(key)
                if buffer is not None:
                    module._buffers[key] = buffer.to(device)
        for name, value in weights.resident():
            is_parameter = isinstance(self._placeholders[name], nn.Parameter)
            self._put(name, nn.Parameter(value, requires_grad=False) if is_parameter else value)
            self._resident.append(name)

    def install(self, stage: int, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Puts the tensors of a stage in, unless they are there."""
        if stage in self._installed:
            return
        self._installed[stage] = []
        for name, value in tensors:
            self._put(name, value)
            self._installed[stage].append(name)

    def uninstall(self, stage: int) -> None:
        """Puts the model's own placeholders back for a stage."""
        for name in self._installed.pop(stage, ()):
            self._put(name, self._placeholders[name])

    def clear(self, resident: bool = False) -> None:
        """Puts all placeholders back; those of resident tensors only if asked."""
        for stage in list(self._installed):
            self.uninstall(stage)
        if resident:
            for name in self._resident:
                self._put(name, self._placeholders[name])
            self._resident = []

    def dtype_of(self, module: nn.Module) -> torch.dtype | None:
        """The dtype in which the model was built to hold `module.weight`; None if it has no weight."""
        for name, places in self._places.items():
            if any(store is module._parameters and key == "weight" for store, key in places):
                return self._placeholders[name].dtype  # type: ignore[no-any-return]
        return None

    def owner(self, name: str) -> nn.Module:
        """The module that holds a tensor."""
        return self._model.get_submodule(name.rpartition(".")[0])

    def check_complete(self, modules: list[nn.Module], where: str) -> None:
        """Raises `RuntimeError` if a tensor of `modules` is missing.

        torch can multiply by a tensor on `meta` without an error and return garbage.
        """
        for module in modules:
            for name, tensor in (*module.named_parameters(), *module.named_buffers()):
                if tensor.device.type == "meta" and id(tensor) not in self._left_out:
                    raise RuntimeError(f"{where}: {name} has no weights when it is about to run")

    def _put(self, name: str, value: Any) -> None:
        for store, key in self._places[name]:
            store[key] = value
