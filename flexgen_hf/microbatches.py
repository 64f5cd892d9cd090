"""A call cut by rows: which calls may be cut, the share of each micro-batch in the arguments, what they return as one.

Pure functions over arguments and outputs; runs nothing and keeps nothing.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.cache_utils import Cache
from transformers.utils.generic import ModelOutput

from .errors import UnsupportedModelError
from .kv_cache import BlockCache, Span

__all__ = ["by_name", "flat", "joined", "may_be_cut", "merged", "part_of", "prompt_tokens", "row_inputs", "wants"]

# Arguments of generate that may look at the batch as a whole, or at row numbers.
_SEES_WHOLE_BATCH = frozenset(
    "logits_processor stopping_criteria prefix_allowed_tokens_fn assistant_model streamer negative_prompt_ids "
    "negative_prompt_attention_mask custom_generate prompt_lookup_num_tokens past_key_values inputs_embeds".split()
)
_ROW_INPUTS = ("inputs", "input_ids", "attention_mask", "position_ids", "token_type_ids")


# -------------------------------------------------------------------------------------------------------- arguments
def by_name(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name."""
    signature = inspect.signature(function)
    return flat(signature.bind(*args, **kwargs), signature)


def flat(bound: inspect.BoundArguments, signature: inspect.Signature) -> dict[str, Any]:
    """Bound arguments by name, `self` left out and free ones beside the named."""
    given = dict(bound.arguments)
    given.pop("self", None)
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            given.update(given.pop(name, {}))
    return given


def row_inputs(call: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The arguments of `generate` that have one row per prompt; the ids come first."""
    return {n: call[n] for n in _ROW_INPUTS if isinstance(call.get(n), torch.Tensor) and call[n].ndim == 2}


def prompt_tokens(call: Mapping[str, Any]) -> int | None:
    """Tokens of each prompt of a call of `generate`, padding included; None if the call does not say it."""
    prompt = next(iter(row_inputs(call).values()), call.get("inputs_embeds"))
    return prompt.shape[1] if isinstance(prompt, torch.Tensor) and prompt.ndim > 1 else None


def may_be_cut(call: Mapping[str, Any], settings: GenerationConfig) -> bool:
    """Whether the rows of a call of `generate` do not influence each other."""
    rows = row_inputs(call)
    if not rows or any(value is not None for name, value in call.items() if name in _SEES_WHOLE_BATCH):
        return False
    if any(isinstance(v, (torch.Tensor, Cache)) for n, v in call.items() if n not in rows):
        return False
    if settings.do_sample or settings.return_dict_in_generate:
        return False
    # with these, rows go on until the last one stops
    return settings.max_time is None and settings.stop_strings is None


def part_of(name: str, value: Any, batch: int, span: Span, rows: int) -> Any:
    """The share of one micro-batch in an argument of forward.

    Args:
        name: of the argument.
        value: for all rows.
        batch: number of the micro-batch.
        span: its rows, the last excluded.
        rows: in all.
    """
    if isinstance(value, BlockCache):
        return value.children[batch]
    if isinstance(value, dict):
        return {key: part_of(name, item, batch, span, rows) for key, item in value.items()}
    if not isinstance(value, torch.Tensor) or value.ndim == 0 or name in ("logits_to_keep", "cache_position"):
        return value
    if name == "position_ids" and value.ndim == 3:  # (axes, batch, tokens)
        return value[:, span[0] : span[1]]
    return value[span[0] : span[1]] if value.shape[0] == rows else value


def wants(given: Mapping[str, Any], config: Any, name: str) -> bool:
    """Whether a call of forward asks for something, or where it does not say so, the configuration."""
    asked = given.get(name)
    return bool(getattr(config, name, False) if asked is None else asked)


# ---------------------------------------------------------------------------------------------------------- outputs
def merged(outputs: Sequence[Any], cache: Any, *, strict: bool = True, apart: Collection[str] = ()) -> Any:
    """Joins what the micro-batches returned, field by field, along the first axis.

    Args:
        outputs: of each micro-batch.
        cache: what takes the place of theirs.
        strict: refuse a number on which they differ; otherwise it is left out.
        apart: fields that the caller will replace.

    Raises:
        UnsupportedModelError: a number that is one for all rows, such as the loss of a router, is different in each.
    """
    first = outputs[0]
    if isinstance(first, Cache):
        return cache
    if isinstance(first, ModelOutput):
        fields = {key: [output[key] for output in outputs] for key in first}
        return type(first)(
            **{
                key: parts[0] if key in apart else _agreed(key, parts, strict) if _is_number(parts[0])
                else merged(parts, cache, strict=strict)
                for key, parts in fields.items()
            }
        )  # fmt: skip
    if isinstance(first, torch.Tensor) and first.ndim:
        return joined(outputs)
    if isinstance(first, (tuple, list)):
        return type(first)(merged(parts, cache, strict=strict) for parts in zip(*outputs, strict=True))
    return _agreed("an output", outputs, strict) if _is_number(first) else first


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) or (isinstance(value, torch.Tensor) and value.ndim == 0)


def _agreed(name: str, parts: Sequence[Any], strict: bool) -> Any:
    """The number that all micro-batches returned. A mean of theirs would be another than that of all rows at once."""
    first, *others = map(float, parts)
    if all(other == first or (math.isnan(other) and math.isnan(first)) for other in others):
        return parts[0]
    if not strict:
        return None
    raise UnsupportedModelError(
        f"{name} is one number for all rows, and not the same in each of {len(parts)} micro-batches, from which it "
        "can't be put together; pass one micro-batch at a time, or leave out what asks for it (output_router_logits, "
        "say)"
    )


def joined(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """The parts one behind the other. Logits are parts of one tensor already: it is returned, not a copy."""
    first, rows = parts[0], 0
    for part in parts:
        if (
            type(part) is not torch.Tensor
            or not part.is_contiguous()
            or part.dtype != first.dtype
            or part.shape[1:] != first.shape[1:]
            or part.untyped_storage().data_ptr() != first.untyped_storage().data_ptr()
            or part.storage_offset() != first.storage_offset() + rows * first.stride(0)
        ):
            return torch.cat(list(parts))
        rows += part.shape[0]
    return first.as_strided((rows, *first.shape[1:]), first.stride(), first.storage_offset())
