"""The policy where none is given: weights fill the fastest tiers first, by sums alone, whatever would be fastest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from .planning.budget import Call, Demand, Limit, fits
from .policy import Placement, Policy, Tier

__all__ = ["PLANNED_TOKENS", "default_policy"]

#: room is kept for prompts and answers of so many tokens together
PLANNED_TOKENS = 512


def default_policy(
    demand: Demand, batch_size: int | None, num_batches: int | None, limits: Sequence[Limit], config: Any
) -> Policy:
    """Weights fill the fastest tiers first; cache and hidden states stay on the device if the weights do.

    Room is kept for everything else that the block needs for `PLANNED_TOKENS` tokens: cache, slots, what compute
    takes. Where even weights on disk leave too little, the block becomes smaller, unless its shape was asked for.

    Args:
        demand: what the model takes.
        batch_size: if it was asked for.
        num_batches: if it was asked for.
        limits: of the tiers, and of memory that nobody limited.
        config: of the model.
    """
    text = config.get_text_config(decoder=True)
    longest = getattr(text, "max_position_embeddings", None) or PLANNED_TOKENS
    tokens = min(PLANNED_TOKENS, longest)
    memory = [limit for limit in limits if Tier.DISK not in limit.tiers]  # the disk's own limit is refused by itself

    def fit(policy: Policy) -> bool:
        return fits(demand.peak(policy, Call(policy.block_size, tokens, tokens)), memory)

    for size in _halved(batch_size, 8):
        whole = Policy(batch_size=size, num_batches=num_batches or 1)
        if fit(whole):
            return whole
    near = Placement.all_on(Tier.DEVICE if demand.direct else Tier.HOST)
    blocks = [(size, number) for size in _halved(batch_size, 8) for number in _halved(num_batches, 4)]
    policy = Policy(weights=Placement(disk=1.0), cache=near, hidden=near)
    for size, number in blocks:
        policy = policy.replace(batch_size=size, num_batches=number)
        if fit(policy):
            break
    for tier in (Tier.DEVICE, Tier.HOST):
        if tier is Tier.HOST and not any(limit.tiers == (Tier.HOST,) for limit in memory):
            continue  # one memory with the device, where resident weights are the ones that cost no casts
        policy = _filled(policy, tier, fit)
    return policy


def _halved(given: int | None, first: int) -> list[int]:
    """What was asked for, or `first` and its halves."""
    return [given] if given is not None else [first >> step for step in range(first.bit_length())]


def _filled(policy: Policy, tier: Tier, fit: Callable[[Policy], bool]) -> Policy:
    """The policy with as many thousandths of its weights as fit on `tier`, taken from the disk."""
    shares = policy.weights.to_dict()
    there, most = 0, int(shares["disk"] * 1000)
    while there < most:
        middle = (there + most + 1) // 2
        trial = Placement(**{**shares, tier.value: middle / 1000, "disk": shares["disk"] - middle / 1000})
        if fit(policy.replace(weights=trial)):
            there = middle
        else:
            most = middle - 1
    taken = {**shares, tier.value: there / 1000, "disk": shares["disk"] - there / 1000}
    return policy.replace(weights=Placement(**taken))
