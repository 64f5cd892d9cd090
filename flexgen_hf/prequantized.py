"""Checkpoints that another method has quantized: which are dequantized on their way, and which are refused by name.

Those that transformers itself can dequantize tensor by tensor, with an operation that is the definition of their
format, are read through it. All others would need their own kernels in the model's layers, which this engine runs as
transformers wrote them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from typing import Any

import torch

from .checkpoint_files import CheckpointTensor
from .errors import UnsupportedModelError

__all__ = ["DEQUANTIZED", "METHOD", "dequantizer", "method_of", "refuse_unread_scales", "stored_settings"]

#: the name of this package's own method
METHOD = "flexgen"

#: methods whose checkpoints become plain tensors when they are converted
DEQUANTIZED = ("fp8", "mxfp4")

_SPELLED = {"bitsandbytes_4bit": "bitsandbytes", "bitsandbytes_8bit": "bitsandbytes"}


def method_of(settings: Any) -> str | None:
    """The method that a `quantization_config` names, as a dict or an object; `None` if there is none."""
    if settings is None:
        return None
    fields = settings if isinstance(settings, Mapping) else vars(settings)
    method = fields.get("quant_method")
    method = getattr(method, "value", method)
    if method is None and (fields.get("load_in_4bit") or fields.get("load_in_8bit")):
        return "bitsandbytes"  # its first configurations did not name it
    return _SPELLED.get(str(method), str(method)) if method is not None else "an unnamed method"


def stored_settings(config: Any) -> Any:
    """The `quantization_config` that belongs to a checkpoint, wherever its configuration has it; `None` without one."""
    settings = getattr(config, "quantization_config", None)
    if settings is None and hasattr(config, "get_text_config"):
        settings = getattr(config.get_text_config(decoder=True), "quantization_config", None)
    return getattr(settings, "stored", None) if method_of(settings) == METHOD else settings


def dequantizer(settings: Any) -> Any:
    """What brings transformers' dequantizing operations into the mapping from checkpoint to model.

    Args:
        settings: the checkpoint's `quantization_config`; `None` for one that is not quantized.

    Returns:
        A quantizer of transformers, set to dequantize; `None` if there is nothing to do.

    Raises:
        UnsupportedModelError: the checkpoint's method is none of `DEQUANTIZED`.
    """
    method = method_of(settings)
    if method is None:
        return None
    if method not in DEQUANTIZED:
        raise UnsupportedModelError(_refusal(f"the checkpoint is quantized with {method}, which"))
    from transformers.quantizers.auto import AutoHfQuantizer

    fields = dict(settings) if isinstance(settings, Mapping) else settings.to_dict()
    return AutoHfQuantizer.from_config({**fields, "dequantize": True}, pre_quantized=True)


def refuse_unread_scales(
    keys: Mapping[str, Sequence[str]],
    found: Mapping[str, CheckpointTensor],
    meta: Mapping[str, torch.Tensor],
    dequantized: Set[str],
) -> None:
    """Refuses a checkpoint that is quantized although no configuration says so: its numbers would be wrong.

    Args:
        keys: state-dict name to the checkpoint's keys that make it up.
        found: the checkpoint's tensors by key.
        meta: the model's tensors by state-dict name.
        dequantized: state-dict names of what is dequantized, and may be stored in integers.

    Raises:
        UnsupportedModelError: a parameter is stored in integers, or in 8-bit floats beside a scale that nothing reads.
    """
    read = {key for group in keys.values() for key in group}
    scaled = {key.rpartition(".")[0] for key in found if key not in read and "scale" in key.rpartition(".")[2]}
    for name, group in keys.items():
        if not meta[name].dtype.is_floating_point:
            continue
        for key in group:
            dtype = found[key].dtype
            if not dtype.is_floating_point and name not in dequantized:
                raise UnsupportedModelError(_refusal(f"tensor {key!r} is stored as {dtype}, in a format that"))
            if dtype.itemsize == 1 and key.rpartition(".")[0] in scaled:
                raise UnsupportedModelError(
                    _refusal(f"tensor {key!r} is stored as {dtype} with a scale of its own, in a format that")
                )


def _refusal(fact: str) -> str:
    return (
        f"{fact} this engine cannot stream. Take the 16-bit checkpoint that it was made from, and compression='4bit' "
        "if it should be small"
    )
