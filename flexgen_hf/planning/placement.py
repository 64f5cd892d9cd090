"""Which tensor goes to which tier, so that the shares come out as asked."""

from __future__ import annotations

import functools
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import TypeVar

from ..policy import Placement, Tier

__all__ = ["assign", "realised", "spread"]

_K = TypeVar("_K", bound=Hashable)


def assign(
    sizes: Sequence[tuple[_K, int]],
    placement: Placement,
    fixed: Mapping[_K, Tier] | None = None,
    first: Sequence[_K] = (),
) -> dict[_K, Tier]:
    """Distributes whole tensors among the tiers, as close to the shares as their sizes allow.

    Largest first, each to the tier that has the largest part of its own share still to get and can take it whole.
    Tensors of equal size therefore alternate between tiers in the proportion of the shares, which spreads what is
    streamed evenly over the layers, and small ones even out the rest.

    Args:
        sizes: (key, bytes) in the order of the model's stages.
        placement: the shares.
        fixed: keys whose tier is given; they count towards its share.
        first: keys that get their tier before all others, in this order, the fastest whose share can take them whole:
            those for which a buffer would have to be kept that nothing else uses, if they were streamed.

    Returns:
        The tier of each key. A tier with share 0 gets nothing but what is fixed to it.
    """
    tiers = [tier for tier in Tier if placement.share(tier) > 0]
    homes: dict[_K, Tier] = dict(fixed or {})
    free = [item for item in sizes if item[0] not in homes]
    if len(tiers) == 1:
        return homes | dict.fromkeys((key for key, _ in free), tiers[0])
    total = sum(size for _, size in sizes)
    shares = [placement.share(tier) for tier in tiers]
    left = [share * total for share in shares]
    for key, size in sizes:
        if key in homes and homes[key] in tiers:
            left[tiers.index(homes[key])] -= size
    turns = {key: turn for turn, key in enumerate(first)}
    for key, size in sorted(free, key=lambda item: (turns.get(item[0], len(turns)), -item[1])):
        chosen, most = -1, float("-inf")
        for number, room in enumerate(left):
            if room >= size and room / shares[number] > most:
                chosen, most = number, room / shares[number]
                if key in turns:
                    break
        if chosen < 0:  # none can take it whole: the one that it leaves with the smallest excess
            chosen = max(range(len(left)), key=left.__getitem__)
        left[chosen] -= size
        homes[key] = tiers[chosen]
    return homes


@functools.lru_cache(maxsize=1024)
def spread(count: int, placement: Placement) -> tuple[Tier, ...]:
    """The homes of so many things that are equally large, in their order."""
    homes = assign([(number, 1) for number in range(count)], placement)
    return tuple(homes[number] for number in range(count))


def realised(sizes: Iterable[tuple[_K, int]], homes: Mapping[_K, Tier]) -> dict[Tier, int]:
    """Bytes that each tier really got."""
    got = dict.fromkeys(Tier, 0)
    for key, size in sizes:
        got[homes[key]] += size
    return got
