"""Attention over what a cell keeps, without bringing it to the form of compute as a whole.

A single query per row goes through kept tokens in a kernel, where there is one. Otherwise a block of tokens at a time
is restored, and the softmax is kept up over blocks: the largest score so far, and sums that are scaled down when a
larger one comes (Milakov and Gimelshein, arXiv 1805.02867). Both compute in float32; the step's own tokens are seen as
they are.

transformers hands keys and values from the cache to attention. What it is handed here are stand-ins without memory.
"""

from __future__ import annotations

import dataclasses

import torch

from .cell_layout import CellShape
from .planning.budget import EXCHANGE_BYTES
from .quantization import dispatch

__all__ = ["KeptStates", "kept_states"]

_MARK = "flexgen_kept"

# Up to so many queries at once, a kernel that multiplies one after the other is faster than a product of matrices.
_MOST_SHARED = 8

_LOWEST = torch.finfo(torch.float32).min


@dataclasses.dataclass(frozen=True, eq=False)
class KeptStates:
    """The keys and values that a step sees of a cell.

    Args:
        shape: of the cell.
        kept: keys and values of the tokens before the step, (tokens, batch, *row), as they are kept.
        own: those of the step, (batch, heads, new tokens, head_dim), as they were computed, on the same device.
    """

    shape: CellShape
    kept: tuple[torch.Tensor, torch.Tensor]
    own: tuple[torch.Tensor, torch.Tensor]

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self.kept[0].device

    def stand_ins(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Tensors of the shape and dtype that keys and values would have, on `meta`; `kept_states` knows them again."""
        tokens = self.kept[0].shape[0] + self.own[0].shape[2]
        keys, values = (
            torch.empty((own.shape[0], own.shape[1], tokens, own.shape[3]), dtype=own.dtype, device="meta")
            for own in self.own
        )
        keys.__dict__[_MARK] = values.__dict__[_MARK] = self
        return keys, values

    def restored(self) -> tuple[torch.Tensor, torch.Tensor]:
        """All of them as compute sees them, (batch, heads, tokens, head_dim) each."""
        keys, values = (
            torch.cat([self._restored(part, 0, self.kept[part].shape[0], own.dtype), own], 2)
            for part, own in enumerate(self.own)
        )
        return keys, values

    def attend(self, query: torch.Tensor, mask: torch.Tensor | None, scaling: float) -> torch.Tensor:
        """Scaled dot-product attention.

        Args:
            query: (batch, heads, new tokens, head_dim), on the device of what is kept; heads are a multiple of those
                of keys, and as many in a row share one.
            mask: (batch or 1, heads or 1, new tokens, tokens), true or 0 where a query sees a token; None if all do.
            scaling: of scores.

        Returns:
            (batch, heads, new tokens, head_dim of values) in the dtype of `query`.
        """
        tokens = self.kept[0].shape[0] + self.own[0].shape[2]
        if mask is None:
            bias = query.new_zeros((1, 1, 1, tokens), dtype=torch.float32)
        elif mask.dtype is torch.bool:
            bias = torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, -torch.inf)
        else:
            bias = mask.float()
        query = query.float() * scaling
        output = self._by_kernel(query, bias)
        return (self._in_blocks(query, bias) if output is None else output).to(self.own[0].dtype)

    # ---------------------------------------------------------------------------------------------------------- inside
    def _by_kernel(self, query: torch.Tensor, bias: torch.Tensor) -> torch.Tensor | None:
        shared = query.shape[1] // self.own[0].shape[1]
        if self.shape.dtype is not torch.uint8 or query.shape[2] > 1 or bias.shape[1] > 1 or shared > _MOST_SHARED:
            return None
        kept = self.shape.quantized(0, self.kept[0]), self.shape.quantized(1, self.kept[1])
        own = self.own[0][:, :, 0], self.own[1][:, :, 0]
        made = dispatch.attend(query[:, :, 0], own, kept, self.shape.formats, bias[:, 0, 0], torch.get_num_threads())
        return None if made is None else made[:, :, None]

    def _in_blocks(self, query: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        heads, old = self.own[0].shape[1], self.kept[0].shape[0]
        shared = query.shape[1] // heads
        query = torch.unflatten(query, 1, (heads, shared))
        bias = torch.unflatten(bias, 1, (heads, shared)) if bias.shape[1] > 1 else bias[:, :, None]
        sums = _Sums(query, self.own[1].shape[3])
        own = self.own[0].float(), self.own[1].float()
        sums.add(own[0], own[1], bias[..., old:])
        for start in range(0, old, self._block):
            end = min(start + self._block, old)
            keys, values = (self._restored(part, start, end, torch.float32) for part in (0, 1))
            sums.add(keys, values, bias[..., start:end])
        return sums.mean().flatten(1, 2)

    @property
    def _block(self) -> int:
        """Tokens that are restored at a time."""
        elements = sum(own.shape[0] * own.shape[1] * own.shape[3] for own in self.own)
        return max(1, EXCHANGE_BYTES // (elements * torch.float32.itemsize))

    def _restored(self, part: int, start: int, end: int, dtype: torch.dtype) -> torch.Tensor:
        """Some tokens, (batch, heads, tokens, head_dim)."""
        rows = self.kept[part][start:end]
        states = torch.empty((*rows.shape[:2], *self.shape.in_compute().row(part)), dtype=dtype, device=rows.device)
        self.shape.restore(part, rows, states, _copy)
        return states.permute(1, 2, 0, 3)


def kept_states(key: torch.Tensor) -> KeptStates | None:
    """What a tensor stands in for, if it is a stand-in."""
    found: KeptStates | None = key.__dict__.get(_MARK)
    return found


def _copy(target: torch.Tensor, source: torch.Tensor) -> None:
    target.copy_(source)


class _Sums:
    """Weighted sums of values that grow block by block, for each query.

    Args:
        query: (batch, kv heads, query heads of each, new tokens, head_dim).
        width: head_dim of values.
    """

    def __init__(self, query: torch.Tensor, width: int) -> None:
        self._query, self._queries = query.flatten(2, 3), query.shape[2:4]
        self._largest = self._query.new_full((*self._query.shape[:3], 1), _LOWEST)
        self._total = torch.zeros_like(self._largest)
        self._weighted = self._query.new_zeros((*self._query.shape[:3], width))

    def add(self, keys: torch.Tensor, values: torch.Tensor, bias: torch.Tensor) -> None:
        """A block of tokens, (batch, kv heads, tokens, head_dim); `bias` broadcasts to scores of the query's axes."""
        scores = torch.unflatten(self._query @ keys.transpose(-1, -2), 2, self._queries)
        scores = (scores + bias).flatten(2, 3)
        largest = torch.maximum(self._largest, scores.amax(-1, keepdim=True))
        weights, smaller = (scores - largest).exp_(), (self._largest - largest).exp_()
        self._total = self._total * smaller + weights.sum(-1, keepdim=True)
        self._weighted = self._weighted * smaller + weights @ values
        self._largest = largest

    def mean(self) -> torch.Tensor:
        """The output, with the query's axes; 0 for a query that sees nothing."""
        made = self._weighted / self._total.clamp_min(torch.finfo(torch.float32).tiny)
        return torch.unflatten(made, 2, self._queries)
