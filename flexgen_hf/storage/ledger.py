"""The account of what each tier holds: every buffer this package owns is taken from it and given back."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence

from ..errors import CapacityError
from ..planning.budget import Limit, Need
from ..policy import Tier

__all__ = ["Ledger", "gib"]


def gib(nbytes: float) -> str:
    """A size for people: `"1.50 GiB"`, or MiB below a tenth of a GiB."""
    return f"{nbytes / 2**30:.2f} GiB" if nbytes >= 2**30 / 10 else f"{nbytes / 2**20:.2f} MiB"


class Ledger:
    """Bytes held per tier, their peak, and the limits they may not pass.

    Args:
        limits: bytes per tier; a tier that is not named is not limited.
        shared: on a machine that computes in RAM, device and host are the same memory: one limit for both together.
    """

    def __init__(self, limits: Mapping[Tier, int] | None = None, *, shared: int | None = None) -> None:
        self._limits = [Limit((tier,), size, f"the {tier} tier") for tier, size in (limits or {}).items()]
        if shared is not None:
            self._limits.append(Limit((Tier.DEVICE, Tier.HOST), shared, "RAM (device and host tier together)"))
        self._held = dict.fromkeys(Tier, 0)
        self._peak = dict.fromkeys(Tier, 0)
        self._names: dict[Tier, dict[str, int]] = {tier: {} for tier in Tier}
        self._lock = threading.Lock()

    def take(self, tier: Tier, nbytes: int, what: str) -> None:
        """Notes that `what` now holds `nbytes` of `tier`.

        Raises:
            CapacityError: the tier's limit would be passed; nothing is noted then.
        """
        with self._lock:
            for limit in self._limits:
                held = sum(self._held[t] for t in limit.tiers)
                if tier in limit.tiers and held + nbytes > limit.nbytes:
                    raise CapacityError(self._refusal(limit, held, nbytes, what))
            self._held[tier] += nbytes
            self._peak[tier] = max(self._peak[tier], self._held[tier])
            self._names[tier][what] = self._names[tier].get(what, 0) + nbytes

    def check(self, needs: Sequence[Need], remedy: Callable[[], str] = lambda: "") -> None:
        """Looks whether all this could be taken, one after the other; takes nothing.

        Args:
            needs: what is wanted.
            remedy: called if something does not fit; what is put at the end of the message.

        Raises:
            CapacityError: with what does not fit, what there is, and the remedy.
        """
        trial = Ledger()
        with self._lock:
            trial._limits, trial._held = self._limits, dict(self._held)
            trial._names = {tier: dict(names) for tier, names in self._names.items()}
        try:
            for need in needs:
                trial.take(*need)
        except CapacityError as error:
            raise CapacityError(f"{error}{remedy()}") from None

    def limits(self, but: Mapping[Tier, int] | None = None) -> list[Limit]:
        """What each limit leaves for what is yet to be taken.

        Args:
            but: bytes held now that would be given back before.
        """
        others = {tier: self._held[tier] - (but or {}).get(tier, 0) for tier in Tier}
        return [
            Limit(limit.tiers, limit.nbytes - sum(others[tier] for tier in limit.tiers), limit.name)
            for limit in self._limits
        ]

    def held_as(self, tier: Tier, what: str) -> int:
        """Bytes of a tier that are listed under a name."""
        return self._names[tier].get(what, 0)

    def give(self, tier: Tier, nbytes: int, what: str) -> None:
        """Notes that `what` gave back `nbytes` of `tier`."""
        with self._lock:
            self._held[tier] -= nbytes
            self._names[tier][what] = self._names[tier].get(what, 0) - nbytes

    def held(self, tier: Tier) -> int:
        """Bytes held now."""
        return self._held[tier]

    def peaks(self) -> dict[Tier, int]:
        """The most that each tier held since the last `reset_peaks`."""
        return dict(self._peak)

    def reset_peaks(self) -> None:
        """Starts a new count of peaks from what is held now."""
        with self._lock:
            self._peak = dict(self._held)

    def free(self, tier: Tier) -> int | None:
        """Bytes left on `tier`, or `None` if it has no limit."""
        left = [limit.nbytes - sum(self._held[t] for t in limit.tiers) for limit in self._limits if tier in limit.tiers]
        return min(left) if left else None

    def _refusal(self, limit: Limit, held: int, nbytes: int, what: str) -> str:
        holders = {n: b for tier in limit.tiers for n, b in self._names[tier].items() if b}
        largest = ", ".join(f"{n} {gib(b)}" for n, b in sorted(holders.items(), key=lambda i: -i[1])[:4]) or "nothing"
        on_disk = Tier.DISK in limit.tiers
        other = "keep more on device and host" if on_disk else "move weights, cache or hidden states to a lower tier"
        return (
            f"{what} needs {gib(nbytes)} but {limit.name} has {gib(max(0, limit.nbytes - held))} left of "
            f"{gib(limit.nbytes)} (held: {largest}); raise max_memory, lower batch_size or num_batches, or "
            f"{other}"
        )
