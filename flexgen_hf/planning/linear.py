"""A linear program over nine shares: weights, cache and hidden states, each on device, host and disk.

Knows numbers only: seconds of each lane and bytes of each tier for all of a kind on a tier.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from ..policy import Placement, Tier
from .budget import Limit
from .schedule import Lane

__all__ = ["KINDS", "Program", "Solution"]

KINDS = ("weights", "cache", "hidden")
_SHARES = [(kind, tier) for kind in KINDS for tier in Tier]

_PerLane = Mapping[Lane, float]
_PerTier = Mapping[Tier, float]


class Solution(NamedTuple):
    """The best shares, and the seconds of a block with them."""

    seconds: float
    shares: dict[str, Placement]


@dataclasses.dataclass(frozen=True)
class Program:
    """Shares that make a block end soonest.

    Args:
        phases: for each kind of sweep the seconds of each lane, by kind and tier, and how many such sweeps there are.
        bytes_of: bytes of each tier, by kind and tier, and of buffers under `("fixed", Tier.DEVICE)`; where all cells,
            or all hidden states, are on one given tier, there are fewer buffers.
        limits: of the tiers.
        rows: of the block.
        overhead_s: what comes on top.
        slots: layers that have room where compute needs them; with one, its weights cross the link between two layers'
            compute.
        overlap: lanes work side by side.
        cores_of: the part of the cores, which lanes share, that each keeps busy; nothing where they share none.
    """

    phases: Sequence[tuple[Mapping[tuple[str, Tier], _PerLane], int]]
    bytes_of: Callable[[Tier | None, Tier | None], Mapping[tuple[str, Tier], _PerTier]]
    limits: Sequence[Limit]
    rows: int
    overhead_s: float = 0.0
    slots: int = 2
    overlap: bool = True
    cores_of: Mapping[Lane, float] = dataclasses.field(default_factory=dict)

    def solve(self, cache: Tier | None = None, hidden: Tier | None = None) -> Solution | None:
        """The best shares; None if no shares fit.

        Args:
            cache: the tier that all cells are to be on; None for any.
            hidden: the same of hidden states.
        """
        from scipy.optimize import linprog

        sizes = self.bytes_of(cache, hidden)
        times = [count for _, count in self.phases]
        rows = [[*row, *(-1.0 if other == phase else 0.0 for other in range(len(times)))] for phase, row in self._lanes]
        bounds = [0.0] * len(rows)
        limits = [(self._held(limit, sizes), limit.nbytes - self._fixed(limit, sizes)) for limit in self.limits]
        rows += [[held / 2**30 for held in row] for row, _ in limits]
        bounds += [room / 2**30 for _, room in limits]
        if min(bounds) < 0:
            return None
        whole = [[1.0 if kind == one else 0.0 for one, _ in _SHARES] + [0.0] * len(times) for kind in KINDS]
        given = {"cache": cache, "hidden": hidden}
        ranges = [(0.0, 0.0 if given.get(kind) not in (None, tier) else 1.0) for kind, tier in _SHARES] + [
            (0.0, None)
        ] * len(times)
        found = linprog(
            [*_TIE_BREAK, *times],
            A_ub=rows,
            b_ub=bounds,
            A_eq=whole,
            b_eq=[1.0] * len(KINDS),
            bounds=ranges,
            method="highs",
        )
        if not found.success:
            return None
        return Solution(float(sum(c * t for c, t in zip(times, found.x[9:], strict=True))) + self.overhead_s,
                        _placements(found.x))  # fmt: skip

    def least_s(self, cache: Tier | None = None, hidden: Tier | None = None) -> float:
        """What `solve` cannot go below: for each lane, each kind where it takes the least of it, though it may not fit.

        Args:
            cache: as of `solve`.
            hidden: as of `solve`.
        """
        given = {"cache": cache, "hidden": hidden}
        choices = [[n for n, (own, tier) in enumerate(_SHARES) if own == kind and given.get(kind) in (None, tier)]
                   for kind in KINDS]  # fmt: skip
        longest = [0.0] * len(self.phases)
        for phase, row in self._lanes:
            longest[phase] = max(longest[phase], sum(min(row[n] for n in numbers) for numbers in choices))
        return sum(count * s for (_, count), s in zip(self.phases, longest, strict=True)) + self.overhead_s

    @functools.cached_property
    def _lanes(self) -> list[tuple[int, list[float]]]:
        """Seconds of the work of each lane, by shares, with the phase that is no shorter than they are together."""
        found = []
        for phase, (lanes, _) in enumerate(self.phases):
            rows = [[sum(lanes[share][lane] for lane in together(share[0])) for share in _SHARES]
                    for together in self._one_after_the_other()]  # fmt: skip
            rows.append([sum(part * lanes[share][lane] for lane, part in self.cores_of.items()) for share in _SHARES])
            found += [(phase, row) for row in rows]
        return found

    def _one_after_the_other(self) -> list[Callable[[str], Sequence[Lane]]]:
        """Lanes whose seconds add up, by kind of what they work on."""
        if not self.overlap:
            return [lambda _: tuple(Lane)]
        alone: list[Callable[[str], Sequence[Lane]]] = [lambda _, lane=lane: (lane,) for lane in Lane]  # type: ignore[misc]
        if self.slots > 1:
            return alone
        push = (Lane.COMPUTE, Lane.HOST_TO_DEVICE)
        return [*alone, lambda kind: push if kind == "weights" else (Lane.COMPUTE,)]

    def _held(self, limit: Limit, sizes: Mapping[tuple[str, Tier], _PerTier]) -> list[float]:
        return [*(sum(sizes[share][tier] for tier in limit.tiers) for share in _SHARES), *([0.0] * len(self.phases))]

    def _fixed(self, limit: Limit, sizes: Mapping[tuple[str, Tier], _PerTier]) -> float:
        return sum(sizes["fixed", Tier.DEVICE][tier] for tier in limit.tiers)


# Of shares that are equally fast, those on faster tiers: seconds that are far too few to matter.
_TIE_BREAK = [1e-6 * list(Tier).index(tier) for _, tier in _SHARES]


def _placements(shares: Sequence[float]) -> dict[str, Placement]:
    made = {}
    for number, kind in enumerate(KINDS):
        device, host, disk = (max(0.0, float(share)) for share in shares[3 * number : 3 * number + 3])
        total = device + host + disk
        made[kind] = Placement(device=device / total, host=min(1 - device / total, host / total))
    return made
