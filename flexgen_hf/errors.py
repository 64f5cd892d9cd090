"""The exception tree. Every error states the fact, the value and the remedy.

```
FlexGenError
├── PolicyError            a placement, policy or option that cannot be meant            (also a ValueError)
├── CapacityError          a tier, a budget or a disk is too small for what was asked    (also a MemoryError)
├── StoreError             a store or checkpoint is missing, broken or of another format (also an OSError)
├── ConversionError        a checkpoint that cannot be turned into a store               (also a ValueError)
├── QuantizationError      a tensor that cannot be quantized                             (also a ValueError)
├── UnsupportedModelError  a model or option that cannot be run by this engine           (also a NotImplementedError)
└── StepError              a transfer or compute step failed; carries lane and step      (also a RuntimeError)
```

The second base class is what code written against Hugging Face already catches.
"""

from __future__ import annotations

__all__ = [
    "CapacityError",
    "ConversionError",
    "FlexGenError",
    "PolicyError",
    "QuantizationError",
    "StepError",
    "StoreError",
    "UnsupportedModelError",
]


class FlexGenError(Exception):
    """Base class of every error that this package raises on purpose."""


class PolicyError(FlexGenError, ValueError):
    """A placement, policy or option that cannot be meant."""


class CapacityError(FlexGenError, MemoryError):
    """A tier, a budget or a disk is too small for what was asked."""


class StoreError(FlexGenError, OSError):
    """A store or checkpoint is missing, broken or of another format version."""


class ConversionError(FlexGenError, ValueError):
    """A checkpoint that cannot be turned into a store."""


class QuantizationError(FlexGenError, ValueError):
    """A tensor that cannot be quantized, or that does not fit a quantized one."""


class UnsupportedModelError(FlexGenError, NotImplementedError):
    """A model, or an option of `generate`, that this engine cannot run."""


class StepError(FlexGenError, RuntimeError):
    """A step failed in its lane. `__cause__` is the original exception.

    Args:
        lane: name of the lane in which the step ran, e.g. `"disk_to_host"`.
        step: the step as the schedule names it, e.g. `"weights of stage 3"`.
        cause: the exception that the step raised.
    """

    def __init__(self, lane: str, step: str, cause: BaseException) -> None:
        super().__init__(f"{step} failed in lane {lane!r}: {type(cause).__name__}: {cause}")
        self.lane = lane
        self.step = step
        self.__cause__ = cause

    def __reduce__(self) -> tuple[type[StepError], tuple[str, str, BaseException | None]]:
        return StepError, (self.lane, self.step, self.__cause__)
