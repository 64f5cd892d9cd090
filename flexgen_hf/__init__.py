"""High-throughput generation with Hugging Face models that do not fit on the accelerator, or not in RAM.

```python
from flexgen_hf import FlexGenForCausalLM

model = FlexGenForCausalLM.from_pretrained("facebook/opt-30b", policy="auto", offload_folder="/nvme")
```

Importing this package imports neither torch nor transformers: policies and plans are made without them. It does one
thing: transformers, when it is imported (before or after), learns the quantization method `"flexgen"`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ._register import when_imported
from .errors import (
    CapacityError,
    ConversionError,
    FlexGenError,
    PolicyError,
    QuantizationError,
    StepError,
    StoreError,
    UnsupportedModelError,
)
from .policy import Compression, Placement, Policy, Tier

if TYPE_CHECKING:
    from .modeling import FlexGenForCausalLM
    from .report import RunReport

__version__ = "0.1.0"

__all__ = [
    "CapacityError",
    "Compression",
    "ConversionError",
    "FlexGenError",
    "FlexGenForCausalLM",
    "Placement",
    "Policy",
    "PolicyError",
    "QuantizationError",
    "RunReport",
    "StepError",
    "StoreError",
    "Tier",
    "UnsupportedModelError",
]

# names whose modules import torch, and so are imported when they are first asked for
_LAZY = {"FlexGenForCausalLM": "modeling", "RunReport": "report"}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _register_method() -> None:
    # The module registers itself when its import is complete. If it was imported first, its own import of transformers
    # has led here, and it is not complete yet.
    importlib.import_module(".loading", __name__)


when_imported(_register_method)
