"""Attention where the cache lives: a query visits keys and values on the host instead of fetching them.

In decode a step's queries are thousands of times smaller than the keys and values they attend to. A cell that lives on
the host and is attended there sends only its new tokens over the link and gets queries in return (FlexGen, arXiv
2303.06865, section 4.1). Registered in transformers' own registries of attention and mask functions, together: a
registered attention without a mask function would silently drop padding.
"""

from __future__ import annotations

from typing import Any

import torch

from .cell_attention import KeptStates, kept_states
from .errors import UnsupportedModelError
from .families import is_tested
from .planning.budget import ModelSizes
from .policy import Policy

__all__ = ["NAME", "attend_for", "check_supported", "is_replaceable", "register", "why_not_supported"]

#: the name under which transformers knows the attention and mask functions
NAME = "flexgen"

# Options of attention that torch's kernel does not know.
_MORE = ("softcap", "s_aux")


def register() -> None:
    """Makes `attn_implementation="flexgen"` known. Calling it again changes nothing."""
    # In here: the import of transformers' models ends in our registration, which needs this module to be complete.
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, _mask)


def check_supported(model: Any) -> None:
    """Raises `UnsupportedModelError` if a model's attention cannot be sent to where the cache is."""
    if (reason := why_not_supported(model)) is not None:
        raise UnsupportedModelError(
            f"host_attention: {type(model).__name__} cannot attend on the host, {reason}; leave host_attention out"
        )


def why_not_supported(model: Any) -> str | None:
    """Why a model cannot use the attention of this file, or None if it can."""
    config = model.config.get_text_config(decoder=True)
    if not getattr(model, "_supports_attention_backend", False):
        return "its attention is outside of transformers' interface"
    if not getattr(model, "_supports_sdpa", False) and not is_tested(model.config.model_type):
        return "its attention needs more than scaled dot products"  # of tested families it is known what
    if getattr(config, "kv_lora_rank", None):
        return "it expands keys and values on the device after they leave the cache"
    return None


def is_replaceable(model: Any) -> bool:
    """Whether a model attends as it does by default, or as we made it, and not in a way that its user chose."""
    return getattr(model.config, "_attn_implementation", None) in ("sdpa", NAME)


def attend_for(model: Any, policy: Policy, sizes: ModelSizes, *, direct: bool) -> None:
    """Gives a model the attention of this file where a policy needs it.

    Args:
        model: whose attention it is.
        policy: that will be in force.
        sizes: of the model.
        direct: compute works in host memory, so cells on the host are attended to there anyway.

    Raises:
        UnsupportedModelError: attention on the host is asked for, and cannot be had.
    """
    if policy.host_attention and not direct:
        check_supported(model)
        model.set_attn_implementation(NAME)
    elif sizes.attends_kept or (policy.num_batches > 1 and sizes.makes_masks_late):
        model.set_attn_implementation(NAME)


class _LateMask:
    """A mask that is made where and when a layer attends.

    Models make the mask of a prompt once, for all layers, and hold it until the last one: for each micro-batch a tensor
    of prompt length squared, all of them on the device at once. Whether one is needed at all is looked up in values on
    the device, which takes until the link is free: that is done in the first layer only.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        self._options = options
        self._is_needed = True

    def make(self) -> torch.Tensor | None:
        """(batch, 1, new tokens, tokens), or None where causal attention needs no mask."""
        made = _plain_mask(**self._options) if self._is_needed else None
        self._is_needed = made is not None
        self._options["allow_is_causal_skip"] = False  # what follows knows
        return made


def _mask(**options: Any) -> torch.Tensor | _LateMask | None:
    """What transformers asks for once for all layers; a single token's mask is small, and made at once."""
    return _LateMask(options) if int(options["q_length"]) > 1 else _plain_mask(**options)


def _plain_mask(**options: Any) -> torch.Tensor | None:
    from transformers.masking_utils import sdpa_mask

    made: torch.Tensor | None = sdpa_mask(**options)
    return made


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | _LateMask | None,
    **options: Any,
) -> tuple[torch.Tensor, Any]:
    """Scaled dot-product attention, as transformers computes it, on the device of `key`.

    Args:
        module: the attention module.
        query: (batch, heads, new tokens, head_dim), on the device of compute.
        key: (batch, kv heads, tokens, head_dim), on that device or on the host, or a stand-in of a cell's.
        value: as `key`.
        attention_mask: (batch, 1, new tokens, tokens), what makes it, or None.
        options: scaling, dropout and what else transformers passes.

    Returns:
        The output (batch, new tokens, heads, head_dim) on the device of `query`, and no attention weights.
    """
    from transformers import AttentionInterface

    plain: Any = AttentionInterface()["sdpa"]  # type: ignore[no-untyped-call]
    if any(options.get(name) is not None for name in _MORE):
        plain = _with_cap_and_sinks
    if isinstance(attention_mask, _LateMask):
        attention_mask = attention_mask.make()
    if (kept := kept_states(key)) is not None:
        return _attend_to_kept(plain, module, query, kept, attention_mask, **options), None
    if key.device.type == "meta":
        raise UnsupportedModelError(
            f"{type(module).__name__} changes keys after they left the cache, but they are attended as they are kept; "
            "leave host_attention or the compression of the cache out"
        )
    if key.device == query.device:
        output, weights = plain(module, query, key, value, attention_mask, **options)
        return output, weights
    there = {name: _to(item, key.device) for name, item in options.items()}
    output, weights = plain(module, query.to(key.device), key, value, _to(attention_mask, key.device), **there)
    return output.to(query.device), weights


def _attend_to_kept(
    plain: Any,
    module: torch.nn.Module,
    query: torch.Tensor,
    kept: KeptStates,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> torch.Tensor:
    """As `_attend`, over a cell as it is kept. What more than scores and a mask is asked for gets whole keys."""
    there, mask = query.to(kept.device), _to(attention_mask, kept.device)
    is_more = options.get("dropout") or any(options.get(name) is not None for name in ("position_bias", *_MORE))
    if is_more or (mask is None and query.shape[2] > 1):
        keys, values = kept.restored()
        options = {name: _to(item, kept.device) for name, item in options.items()}
        output: torch.Tensor = plain(module, there, keys, values, mask, **options)[0]
    else:
        scaling = options.get("scaling")
        scaling = query.shape[3] ** -0.5 if scaling is None else scaling
        output = kept.attend(there, mask, scaling).transpose(1, 2).contiguous()
    return output.to(query.device)


def _with_cap_and_sinks(
    _module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """What torch's kernel cannot: scores are bounded by a soft cap, or each head has a sink that takes a share.

    Args:
        query: (batch, heads, new tokens, head_dim).
        key: (batch, kv heads, tokens, head_dim).
        value: as `key`.
        attention_mask: true where a query sees a token, or what is added to scores; None if all before it are seen.
        scaling: of scores.
        softcap: scores stay within it, by a tangent.
        s_aux: a score of each head that competes with those of tokens, (heads,).
    """
    groups = query.shape[1] // key.shape[1]
    scores = torch.unflatten(query, 1, (key.shape[1], groups)) @ key[:, :, None].transpose(-1, -2)
    scores = scores.flatten(1, 2) * (query.shape[3] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if attention_mask is None:
        sees = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device)
        attention_mask = sees.tril(scores.shape[-1] - scores.shape[-2])
    if attention_mask.dtype is torch.bool:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    else:
        scores = scores + attention_mask
    if s_aux is not None:
        scores = torch.cat([scores, s_aux.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], -1)
    weights = torch.softmax(scores, -1, dtype=torch.float32).to(query.dtype)[..., : key.shape[2]]
    output = torch.unflatten(weights, 1, (key.shape[1], groups)) @ value[:, :, None]
    return output.flatten(1, 2).transpose(1, 2).contiguous(), None


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, torch.Tensor) else value
