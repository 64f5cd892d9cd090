"""What a policy's shares bring with smaller and larger blocks, up to where memory is full and beyond."""

from __future__ import annotations

import bisect
import dataclasses
import itertools
from collections.abc import Iterator

from ..policy import Policy
from .cost import Prediction, predict
from .search import Plan, Planner
from .simulate import simulate

__all__ = ["BlockPoint", "Blocks", "blocks_of"]

# Curves of so many visits of layers by micro-batches are simulated, which takes a few seconds; of more, the closed form
# has to do.
_SIMULATED_VISITS = 4000

# How much larger than the plan's the largest block is that is looked at, and how many rows it has at most.
_TIMES_LARGER = 16
_MOST_ROWS = 8192


@dataclasses.dataclass(frozen=True)
class BlockPoint:
    """A block of some size.

    Args:
        policy: the plan's, with another block.
        predicted: of it.
        fits: whether memory is enough for it.
    """

    policy: Policy
    predicted: Prediction
    fits: bool


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Blocks of growing size under one policy's shares.

    Args:
        curves: points by the number of micro-batches, for each size of a micro-batch.
        chosen: the plan's own.
        largest: sequences of the largest block that fits at the plan's size of a micro-batch; None if memory is
            enough for all that were tried.
        full: what is full then, for example `"device"` or `"device and host"`.
        is_simulated: whether numbers are simulated; else they are those of the closed form, in which no lane waits.
    """

    curves: dict[int, tuple[BlockPoint, ...]]
    chosen: BlockPoint
    largest: int | None
    full: str
    is_simulated: bool


def blocks_of(planner: Planner, plan: Plan) -> Blocks:
    """Half, one and two times the plan's size of a micro-batch, and somewhat more micro-batches than memory holds.

    Where memory holds far more than the plan's block, curves end at 16 times that; they also end with the prompts.
    """
    policy = plan.policy
    size = policy.batch_size
    largest, full = _largest(planner, policy)
    most = max(2 * policy.num_batches, 4) if largest is None else largest + max(1, largest // 2)
    if planner.workload.num_prompts is not None:
        most = min(most, max(policy.num_batches, -(-planner.workload.num_prompts // size)))
    numbers = {rows: set(_numbers(-(-most * size // rows))) for rows in sorted({max(1, size // 2), size, 2 * size})}
    numbers[size] |= {policy.num_batches, largest or policy.num_batches}
    visits = len(planner.shape.layers) * sum(map(sum, numbers.values()))
    is_simulated = visits <= _SIMULATED_VISITS
    curves = {
        rows: tuple(_point(planner, policy, rows, number, is_simulated=is_simulated) for number in sorted(mine))
        for rows, mine in numbers.items()
    }
    chosen = BlockPoint(policy, plan.predicted, fits=planner.fits(planner.run(policy)))
    return Blocks(curves, chosen, None if largest is None else largest * size, full, is_simulated)


def _point(planner: Planner, policy: Policy, rows: int, number: int, *, is_simulated: bool) -> BlockPoint:
    run = planner.run(policy.replace(batch_size=rows, num_batches=number))
    return BlockPoint(run.policy, simulate(run) if is_simulated else predict(run), planner.fits(run))


def _numbers(most: int) -> Iterator[int]:
    """1, 2, 3, 4, 6, 8, 12, ... up to `most`, and `most` itself; some of them twice."""
    yield most
    for power in itertools.count():
        for number in (2**power, 3 * 2**power // 2):
            if number > most:
                return
            yield number


def _largest(planner: Planner, policy: Policy) -> tuple[int | None, str]:
    """The most micro-batches that fit, and the tiers that are full then; None if all that are tried fit, or none."""
    tried = [policy.replace(num_batches=number) for number in range(1, _most(planner, policy) + 1)]
    low = bisect.bisect_left(tried, True, key=lambda other: not planner.fits(planner.run(other)))
    if low in (0, len(tried)):
        return None, ""
    peaks = planner.run(tried[low]).peak_bytes
    full = [limit for limit in planner.limits if sum(peaks[tier] for tier in limit.tiers) > limit.nbytes]
    return low, " and ".join(tier for limit in full for tier in limit.tiers)


def _most(planner: Planner, policy: Policy) -> int:
    rows = _MOST_ROWS if planner.workload.num_prompts is None else planner.workload.num_prompts
    return max(policy.num_batches, min(_TIMES_LARGER * policy.num_batches, -(-rows // policy.batch_size)))
