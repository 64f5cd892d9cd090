"""Which tensor goes to which tier, so that the shares come out as asked."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import TypeVar

from ..policy import Placement, Tier

__all__ = ["assign", "realised"]

_K = TypeVar("_K", bound=Hashable)


def assign(
    sizes: Sequence[tuple[_K, int]], placement: Placement, fixed: Mapping[_K, Tier] | None = None
) -> dict[_K, Tier]:
    """Distributes whole tensors among the tiers, as close to the shares as their sizes allow.

    Largest first, each to the tier that has the largest part of its own share still to get and can take it whole.
    Tensors of equal size therefore alternate between tiers in the proportion of the shares, which spreads what is
    streamed evenly over the layers, and small ones even out the rest.

    Args:
        sizes: (key, bytes) in the order of the model's stages.
        placement: the shares.
        fixed: keys whose tier is given; they count towards its share.

    Returns:
        The tier of each key. A tier with share 0 gets nothing but what is fixed to it.
    """
    total = sum(size for _, size in sizes)
    tiers = [tier for tier in Tier if placement.share(tier) > 0]
    left = {tier: placement.share(tier) * total for tier in tiers}
    homes: dict[_K, Tier] = dict(fixed or {})
    for key, size in sizes:
        if key in homes and homes[key] in left:
            left[homes[key]] -= size
    free = [item for item in sizes if item[0] not in homes]
    for key, size in sorted(free, key=lambda item: -item[1]):
        # Where none can take it whole, the one that it leaves with the smallest excess.
        fits = [tier for tier in tiers if left[tier] >= size] or [max(tiers, key=lambda tier: left[tier])]
        tier = max(fits, key=lambda tier: left[tier] / placement.share(tier))
        left[tier] -= size
        homes[key] = tier
    return homes


def realised(sizes: Iterable[tuple[_K, int]], homes: Mapping[_K, Tier]) -> dict[Tier, int]:
    """Bytes that each tier really got."""
    got = dict.fromkeys(Tier, 0)
    for key, size in sizes:
        got[homes[key]] += size
    return got
