"""A micro-batch of texts, each at its own place: what the model is called with, and whose what it returned is.

Rows are aligned on the right, as transformers pads prompts: a text of fewer tokens than its neighbours has padding on
the left, in the mask and in the cells. Knows nothing of what runs next to it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from ..errors import UnsupportedModelError
from ..kv_cache import MicroBatchCache, Part
from .texts import PER_TOKEN, TextCache

__all__ = ["Beginning", "Group", "Member", "capacity_for"]

_OURS = ("attention_mask", "past_key_values")


class Member(Protocol):
    """Who takes part in a forward: a text, or a beginning that is computed for several of them."""

    plain: Callable[..., Any] | None
    given: dict[str, Any] | None
    cache: TextCache

    @property
    def is_done(self) -> bool:
        """Whether it has ended."""

    @property
    def rows(self) -> int:
        """How many rows it takes."""

    @property
    def new_tokens(self) -> int:
        """Tokens of each row that it asks for, those that are known included."""

    @property
    def tokens_left(self) -> int:
        """Tokens that will be kept for it after the next forward, at most."""

    def advance(self, output: Any = None) -> None:
        """Goes on with what the model returned."""


class Beginning:
    """What several prompts begin with; once it is computed, `child` holds its keys and values in one row.

    Args:
        ids: the tokens.
    """

    rows = 1
    tokens_left = 0

    def __init__(self, ids: Sequence[int]) -> None:
        self.ids = list(ids)
        self.cache = TextCache()
        self.plain: Callable[..., Any] | None = None
        self.given: dict[str, Any] | None = None
        self.child: MicroBatchCache | None = None
        #: texts that wait and will need it
        self.wanted = 0
        #: it could not be computed, so every prompt is computed whole
        self.failed = False
        self.is_done = False

    @property
    def new_tokens(self) -> int:
        """All of them."""
        return len(self.ids)

    @property
    def is_new(self) -> bool:
        """Whether nothing was done for it yet."""
        return self.given is None and not self.is_done and not self.failed

    def prepare(self, like: Member) -> None:
        """Takes the arguments of forward from a text that begins with it, which has not run yet."""
        assert like.given is not None
        tokens = len(self.ids)
        self.plain = like.plain
        self.given = {n: v[:1, :tokens] if n in PER_TOKEN and v is not None else v for n, v in like.given.items()}

    def advance(self, output: Any = None) -> None:  # noqa: ARG002  nobody wants its logits
        """Its keys and values are there."""
        self.given, self.is_done = None, True


class Group:
    """A micro-batch.

    Args:
        child: its cells.
        members: whose rows are in them, in order.
        first: the first token that the next forward computes; those before are in the cells.
        width: tokens of the longest row after the next forward.
    """

    #: tokens whose probability the next forward is to give
    scored_tokens = 0

    def __init__(self, child: MicroBatchCache, members: Sequence[Member], first: int, width: int) -> None:
        self.child, self.members = child, list(members)
        self.length, self._new = first, width - first
        self.spans: list[tuple[int, int]] = []
        for member in members:
            start = self.spans[-1][1] if self.spans else 0
            self.spans.append((start, start + member.rows))

    @property
    def rows(self) -> int:
        """Rows of its cells, those of texts that have ended included."""
        return self.spans[-1][1]

    @property
    def live_rows(self) -> int:
        """Rows of texts that go on."""
        return sum(end - start for (start, end), _ in self._live())

    @property
    def live(self) -> list[Member]:
        """The texts that go on."""
        return [member for _, member in self._live()]

    @property
    def new_tokens(self) -> int:
        """Tokens of each row that the next forward computes."""
        return self._new

    @property
    def width(self) -> int:
        """Tokens of the longest row after the next forward."""
        return self.length + self._new

    def body(self, device: torch.device) -> Callable[[], Any]:
        """The next forward, with rows put together on `device`.

        Raises:
            UnsupportedModelError: texts ask the model for different things, or for what is not one row each.
        """
        live = self.live
        first = live[0]
        assert first.given is not None
        assert first.plain is not None
        call: dict[str, Any] = {}
        for name, value in first.given.items():
            if name in _OURS:
                continue
            if name in PER_TOKEN and value is not None:
                call[name] = self._together(name).to(device)
            elif isinstance(value, torch.Tensor) or any((m.given or {}).get(name) != value for m in live):
                raise UnsupportedModelError(
                    f"texts of one block ask the model for different {name}; give each its own call of generate"
                )
            else:
                call[name] = value
        return functools.partial(first.plain, **call, attention_mask=self._mask(device), past_key_values=self.child)

    def receive(self, output: Any) -> list[Member]:
        """Hands each text its share of what the forward returned; returns those that have ended by it."""
        logits = output.logits.to("cpu")
        ended = []
        self.length, self._new = self.width, 1
        for (start, end), member in self._live():
            member.cache.tokens += member.new_tokens
            member.advance(type(output)(logits=logits[start:end], past_key_values=member.cache))
            if member.is_done:
                ended.append(member)
        return ended

    def reordered(self) -> torch.Tensor | None:
        """The rows in the order that beams want, (rows,), or None if they want no other; they are asked once."""
        order = torch.arange(self.rows)
        for (start, end), member in self._live():
            if member.cache.order is not None:
                order[start:end] = start + member.cache.order
                member.cache.order = None
        return None if torch.equal(order, torch.arange(self.rows)) else order

    def parts(self, length: int) -> Part:
        """The rows of texts that go on, with the last `length` of their tokens."""
        rows = [torch.arange(start, end) for (start, end), _ in self._live()]
        return Part(self.child, torch.cat(rows), max(0, self.length - length), self.length)

    # ---------------------------------------------------------------------------------------------------------- inside
    def _live(self) -> list[tuple[tuple[int, int], Member]]:
        pairs = zip(self.spans, self.members, strict=True)
        return [(span, member) for span, member in pairs if not member.is_done]

    def _together(self, name: str) -> torch.Tensor:
        """(rows, new tokens): of each text the last ones, zeros where it has fewer, or has ended."""
        made = torch.zeros((self.rows, self._new), dtype=torch.long)
        for (start, end), member in self._live():
            value = (member.given or {}).get(name)
            if value is None or value.ndim != 2:
                raise UnsupportedModelError(
                    f"generate_each: {name} is not (rows, tokens) for every text, so texts cannot be computed "
                    "together; call generate"
                )
            tokens = min(self._new, value.shape[1])
            made[start:end, self._new - tokens :] = value[:, value.shape[1] - tokens :]
        return made

    def _mask(self, device: torch.device) -> torch.Tensor | None:
        """(rows, width), 1 for what a text sees; None if all see all."""
        mask = torch.zeros((self.rows, self.width), dtype=torch.long)
        mask[:, -1] = 1  # a row that has ended sees itself: attention to nothing is not a number
        for (start, end), member in self._live():
            mask[start:end, self.width - member.cache.tokens - member.new_tokens :] = 1
        return None if bool(mask.all()) else mask.to(device)


def capacity_for(members: Sequence[Member], width: int) -> int:
    """Tokens that cells have to hold in which the longest row is `width` after the next forward."""
    return width + max((member.tokens_left for member in members), default=0)
