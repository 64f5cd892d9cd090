"""What prompts begin with in common, and the order in which they are best computed.

Pure functions over lists of tokens; runs nothing and keeps nothing.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import NamedTuple

__all__ = ["Common", "common_beginnings", "common_length", "in_good_order"]


class Common(NamedTuple):
    """A beginning that some prompts share.

    Args:
        members: numbers of the prompts.
        tokens: how many; each of the prompts has at least one more.
    """

    members: tuple[int, ...]
    tokens: int


def common_length(one: Sequence[int], other: Sequence[int]) -> int:
    """Tokens that two prompts have in common at their beginning."""
    most = min(len(one), len(other))
    if list(one[:most]) == list(other[:most]):
        return most
    return next(i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)


def common_beginnings(prompts: Sequence[Sequence[int]], least: int) -> list[Common]:
    """Groups prompts so that as many tokens as possible need not be computed: each prompt is in one group at most.

    Of prompts that share 10 tokens, some of which share 100, the larger saving is taken: once for all, or once for
    each of the closer groups. Method: intervals of the longest common prefixes of the sorted prompts, as in suffix
    arrays (Abouelhoda, Kurtz and Ohlebusch, 2004), each compared with the best that its parts can save.

    Args:
        prompts: tokens of each; the last token of a prompt is never part of a beginning, for its logits are needed.
        least: tokens that a beginning has at least.
    """
    beginnings = [list(prompt[:-1]) for prompt in prompts]
    order = sorted(range(len(prompts)), key=beginnings.__getitem__)
    shared = [common_length(beginnings[a], beginnings[b]) for a, b in itertools.pairwise(order)]
    open_ones = [_Interval(0, 0)]
    for end, length in enumerate([*shared, 0], start=1):
        first, closed = end - 1, None
        while open_ones[-1].length > length:
            closed = open_ones.pop()
            closed.close(end, least)
            first = closed.first
            if open_ones[-1].length >= length:
                open_ones[-1].take(closed)
                closed = None
        if open_ones[-1].length < length:
            open_ones.append(_Interval(length, first))
            if closed is not None:
                open_ones[-1].take(closed)
    return [Common(tuple(order[first:last]), length) for first, last, length in open_ones[0].groups]


@dataclasses.dataclass
class _Interval:
    """Sorted prompts from `first` on that share `length` tokens, and the best that was found within."""

    length: int
    first: int
    saved: int = 0
    groups: list[tuple[int, int, int]] = dataclasses.field(default_factory=list)

    def take(self, part: _Interval) -> None:
        self.saved += part.saved
        self.groups += part.groups

    def close(self, end: int, least: int) -> None:
        saved = self.length * (end - self.first - 1)
        if self.length >= least and saved > self.saved:
            self.saved, self.groups = saved, [(self.first, end, self.length)]


def in_good_order(lengths: Sequence[int], limits: Sequence[int], groups: Sequence[int]) -> list[int]:
    """The order in which prompts are best computed, those that are alike in length side by side.

    Prompts that may get at least twice as many tokens come first, so that the job does not end with a few long texts.
    Among these, prompts with a common beginning stay together; then the longest first.

    Args:
        lengths: tokens of each prompt.
        limits: the most tokens that each may get, 0 where there is no saying.
        groups: for each the number of its common beginning, -1 without one.
    """
    longest: dict[tuple[int, int], int] = {}
    for length, limit, group in zip(lengths, limits, groups, strict=True):
        place = (_doublings(limit), group)
        longest[place] = max(longest.get(place, 0), length)

    def key(number: int) -> tuple[int, int, int, int, int]:
        doublings, group = _doublings(limits[number]), groups[number]
        # those without a common beginning are no group
        head = longest[doublings, group] if group >= 0 else lengths[number]
        return -doublings, -head, group, -lengths[number], number

    return sorted(range(len(lengths)), key=key)


def _doublings(limit: int) -> int:
    return max(0, limit - 1).bit_length()
