"""What a policy costs in closed form: the seconds of each lane in a sweep, added up without making the steps.

Method: the cost model of FlexGen (arXiv 2303.06865, section 4.3) with what it leaves out: transfers that share a link
add up, each step has an overhead, and a product is no faster than its matrix is read.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Mapping

from ..policy import Tier
from .budget import Limit
from .hardware import Hardware
from .placed import LOADS
from .schedule import Lane, Route
from .seconds import TimedRun
from .workload import Sweep

__all__ = ["Lanes", "PlannedRun", "Prediction", "crossed", "limits_of", "predict"]

#: seconds of each lane
Lanes = dict[Lane, float]


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What a run of one block will take.

    Args:
        prefill_s: the sweep over prompts.
        decode_s: the sweeps over one new token per row.
        rows: sequences of the block.
        gen_len: tokens written after each prompt.
        peak_bytes: the most that each tier holds.
        prefill_lanes: seconds at work of each lane in the sweep over prompts.
        decode_lanes: the same in all other sweeps.
    """

    prefill_s: float
    decode_s: float
    rows: int
    gen_len: int
    peak_bytes: Mapping[Tier, int]
    prefill_lanes: Lanes
    decode_lanes: Lanes

    @property
    def seconds(self) -> float:
        """Of the whole block."""
        return self.prefill_s + self.decode_s

    @property
    def tokens_per_s(self) -> float:
        """Generated tokens per second of prefill and decode."""
        return self.rows * self.gen_len / self.seconds

    @property
    def prefill_bottleneck(self) -> Lane:
        """The lane that is busiest while prompts are computed."""
        return max(self.prefill_lanes, key=lambda lane: self.prefill_lanes[lane])

    @property
    def decode_bottleneck(self) -> Lane:
        """The lane that is busiest afterwards."""
        return max(self.decode_lanes, key=lambda lane: self.decode_lanes[lane])

    @property
    def bottleneck(self) -> Lane:
        """The lane that is busiest in all."""
        return max(Lane, key=lambda lane: self.prefill_lanes[lane] + self.decode_lanes[lane])


class PlannedRun(TimedRun):
    """A `TimedRun` whose lanes are added up; the arguments are the same."""

    def lanes(self, sweep: Sweep) -> Lanes:
        """Seconds at work of each lane in one sweep."""
        lanes = self.weight_lanes(sweep)
        for (stage, rows, padding, home), count in self.kinds_of_cells.items():
            own = self.without_padding(sweep, padding)
            for lane, seconds in self.cell_lanes(stage, rows, home, own).items():
                lanes[lane] += count * seconds
        for rows, padding, home in zip(self.batches, self.paddings, self.hidden, strict=True):
            own = self.without_padding(sweep, padding)
            lanes[Lane.COMPUTE] += self.embedding_s(rows, own)
            for lane, seconds in self.hidden_lanes(rows, home, own).items():
                lanes[lane] += seconds
        lanes[Lane.COMPUTE] += self.head_s()
        if not sweep.past:
            for lane, seconds in self.fresh_s.items():
                lanes[lane] += seconds
        return lanes

    def weight_lanes(self, sweep: Sweep) -> Lanes:
        """Seconds of each lane for all weights that a sweep needs, and of the products with experts."""
        lanes = dict.fromkeys(Lane, 0.0)
        lanes[Lane.COMPUTE] = self.hardware.stage_s * sum(map(bool, self.layout.stages[1:-1]))
        sparse = [stage for stage, experts in enumerate(self.layout.experts) if experts]
        for stage, layers in collections.Counter(self.kinds_of_layers[stage - 1] for stage in sparse).items():
            rest = len(self.batches) * self.hardware.compute_s / 4
            count = len(self.chosen(stage, len(self.batches), sweep))
            lanes[Lane.COMPUTE] += layers * (count * self.expert_s(stage, sweep) + rest)
        for piece, count in self.pieces(sweep).items():
            if piece.read:
                lanes[Lane.DISK_TO_HOST] += count * self._weights_s(Lane.DISK_TO_HOST, piece)
            if piece.pushes:
                lanes[Lane.HOST_TO_DEVICE] += count * self._weights_s(Lane.HOST_TO_DEVICE, piece)
        return lanes

    @functools.cached_property
    def pushed_between_layers_s(self) -> float:
        """Seconds of the link for the weights of all layers but the first, which crosses it while others work."""
        return sum(
            self._weights_s(Lane.HOST_TO_DEVICE, piece)
            for pieces in self.layout.stages[2:-1]
            for piece in pieces
            if piece.pushes
        )

    def cell_lanes(self, stage: int, rows: int, home: Tier, sweep: Sweep) -> Lanes:
        """Seconds of each lane for one layer of a micro-batch and its cell."""
        lanes = {Lane.COMPUTE: self.layer_s(stage, rows, home, sweep)}
        for lane in crossed(self.cell_route(home), is_fresh=not sweep.past):
            lanes[lane] = self.cell_s(lane, stage, rows, home, sweep)
        return lanes

    def hidden_lanes(self, rows: int, home: Tier, sweep: Sweep) -> Lanes:
        """Seconds of each lane for the hidden states of a micro-batch, between all layers."""
        between = len(self.shape.layers) - 1
        return {lane: between * self.hidden_s(lane, rows, sweep) for lane in crossed(self.hidden_route(home))}


def limits_of(hardware: Hardware) -> list[Limit]:
    """What the machine holds."""
    return [Limit(tiers, size, hardware.name) for tiers, size in hardware.capacities.items()]


def predict(run: PlannedRun) -> Prediction:
    """In closed form: in each sweep the busiest lane hides all others, or the cores that they share are busiest.

    Without overlap, seconds add up. With room for one layer, its weights cross the link when the layer before is
    computed, so these two add up as well.
    """
    prefill, decode = run.sweeps()
    steps = run.workload.gen_len - 1
    of_prefill = run.lanes(prefill)
    of_decode = {lane: steps * s for lane, s in run.lanes(decode).items()} if decode else dict.fromkeys(Lane, 0.0)

    pushed = run.pushed_between_layers_s if run.rings.layers == 1 else 0.0

    def ends(lanes: Lanes, sweeps: int) -> float:
        if not run.policy.overlap:
            return sum(lanes.values())
        return max(*lanes.values(), run.hardware.shared_s(lanes), lanes[Lane.COMPUTE] + sweeps * pushed)

    between = run.between_s
    return Prediction(
        prefill_s=ends(of_prefill, 1) + between,
        decode_s=ends(of_decode, steps) + steps * between,
        rows=sum(run.batches),
        gen_len=run.workload.gen_len,
        peak_bytes=run.peak_bytes,
        prefill_lanes=of_prefill,
        decode_lanes=of_decode,
    )


def crossed(route: Route, *, is_fresh: bool = False) -> list[Lane]:
    """The lanes of a route; of an empty cell, nothing is loaded."""
    lanes = (Lane.DISK_TO_HOST, Lane.HOST_TO_DEVICE, Lane.DEVICE_TO_HOST, Lane.HOST_TO_DISK)
    return [lane for lane, crosses in zip(lanes, route, strict=True) if crosses and not (is_fresh and lane in LOADS)]
