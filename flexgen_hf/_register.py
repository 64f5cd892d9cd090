"""Tells transformers of this package, once transformers is there; imports neither it nor torch.

`AutoModelForCausalLM.from_pretrained(store)` looks our quantization method up in transformers' registry, so the
registry must know us after `import flexgen_hf`, whichever of the two is imported first. But planning for a machine
needs no torch, and importing transformers to register with it would cost seconds. So the registration waits: a finder
at the head of `sys.meta_path` finds nothing itself, it only appends the registration to the import of the two modules
after which the registry is ready, and leaves `sys.meta_path` when it has done so.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

__all__ = ["when_imported"]

_REGISTRY = "transformers.quantizers"
# It imports the registry in its own midst, where nothing that needs it can be imported yet; so its end is awaited.
_USER = "transformers.modeling_utils"


def when_imported(register: Callable[[], None]) -> None:
    """Calls `register` once transformers' quantizer registry can be imported: now, or when it has been.

    Args:
        register: is called once, with the registry imported. What it raises reaches whoever imported transformers.
    """
    if _complete(_REGISTRY) and not _underway(_USER):
        register()
    else:
        sys.meta_path.insert(0, _AfterImport(register))


class _AfterImport(MetaPathFinder):
    """Lets every other finder find, and appends `register` to the loading of the awaited modules."""

    def __init__(self, register: Callable[[], None]) -> None:
        self._register = register
        self._searching = False

    def find_spec(self, fullname: str, *_path_and_target: object) -> ModuleSpec | None:
        """The spec that the other finders give, with `register` appended for the awaited modules; else `None`."""
        if fullname not in (_REGISTRY, _USER) or self._searching:
            return None
        self._searching = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._searching = False
        if spec is not None and spec.loader is not None:
            self._append_to(spec)
        return spec

    def _append_to(self, spec: ModuleSpec) -> None:
        loader = spec.loader
        assert loader is not None
        load = loader.exec_module

        def load_and_register(module: ModuleType) -> None:
            load(module)
            if self in sys.meta_path and (spec.name == _USER or not _underway(_USER)):
                sys.meta_path.remove(self)
                self._register()

        # On the instance: the loader keeps its class and everything else that inspection tools ask of it.
        loader.exec_module = load_and_register  # type: ignore[method-assign]


def _complete(name: str) -> bool:
    return name in sys.modules and not _underway(name)


def _underway(name: str) -> bool:
    spec = getattr(sys.modules.get(name), "__spec__", None)
    return bool(getattr(spec, "_initializing", False))
