"""What the steps of a sweep take.

Method: bytes by the speed of their link at their size, products by their speed at their rows and no faster than their
matrix is read, and for each step what it takes beside that.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from ..errors import PolicyError
from ..policy import Tier
from .layout import Piece
from .placed import LOADS, PlacedRun
from .schedule import Lane, Step, What
from .shape import LayerShape
from .workload import Sweep

__all__ = ["TimedRun"]

# The lane that uses memory of the host first: what it fills. Homes of weights were filled by loading; what compute
# makes on the way comes and goes all the time.
_FILLED_BY: Mapping[tuple[str, Tier], Lane] = {
    ("weight slots", Tier.HOST): Lane.DISK_TO_HOST,
    ("weight slots", Tier.DEVICE): Lane.HOST_TO_DEVICE,
    ("weight staging", Tier.HOST): Lane.DISK_TO_HOST,
    ("KV cache", Tier.HOST): Lane.COMPUTE,
    ("KV cache", Tier.DEVICE): Lane.COMPUTE,
    ("cache slots", Tier.HOST): Lane.COMPUTE,
    ("cache slots", Tier.DEVICE): Lane.COMPUTE,
    ("hidden states", Tier.HOST): Lane.COMPUTE,
}

_Run = TypeVar("_Run", bound="TimedRun")

# Results of a token in a layer, of its hidden size: two norms, queries (scaled), keys, values, attention (put in
# order), two projections, two sums; and of its inner size: the first product and its activation.
_RESULTS = 12
_INNER_RESULTS = 2

# Logits are cast or copied to float32 and read for the largest.
_LOGITS_PASSES = 3

# What embeds a micro-batch's tokens goes through their states a few times.
_EMBEDDING_PASSES = 4


class TimedRun(PlacedRun):
    """A `PlacedRun` of which each step takes time; the arguments are the same."""

    @functools.cached_property
    def _seconds(self) -> dict[tuple[Any, ...], float]:
        """What was asked for so far."""
        return {}

    @functools.cached_property
    def fresh_s(self) -> dict[Lane, float]:
        """What the first sweep takes longer in each lane, whose buffers are memory that was never used before.

        On a device apart from the host nothing: its memory is given out at once.
        """
        seconds = dict.fromkeys(Lane, 0.0)
        if self.direct and self.hardware.fresh_bytes_per_s:
            needs = [*self.demand.weights(self.policy.weights), *self.demand.needs(self.policy, self.call)]
            for need in needs:
                lane = _FILLED_BY.get((need.what, need.tier))
                if lane is not None:
                    seconds[lane] += need.nbytes / self.hardware.fresh_bytes_per_s
        return seconds

    def at_full_speed(self: _Run) -> _Run:
        """The same run with a disk that nothing limits: this one, and what it was asked for so far, if nothing does."""
        if not self.hardware.limited_lanes:
            return self
        made = copy.copy(self)
        made.hardware = self.hardware.with_disk_limit(None, None)
        vars(made).pop("_seconds", None)
        return made

    def seconds(self, step: Step, sweep: Sweep) -> float:
        """What a step takes; of a limited disk, where nothing is left from before."""
        _, lane, what, stage, batch, piece = step.id
        if lane is Lane.COMPUTE:
            return self._computed_s(what, stage, batch, sweep)
        if what in (What.WEIGHTS, What.EXPERT):
            pieces = self.layout.stages[stage] if what is What.WEIGHTS else self.layout.experts[stage][batch]
            return self._once(self._weights_s, lane, pieces[piece])
        rows, own = self.batches[batch], self.without_padding(sweep, self.paddings[batch])
        if what is What.HIDDEN:
            return self._once(self.hidden_s, lane, rows, own)
        alike, home = self.kinds_of_layers[stage - 1], self.cells[stage - 1][batch]
        return self._once(self.cell_s, lane, alike, rows, home, own)

    def _computed_s(self, what: What, stage: int, batch: int, sweep: Sweep) -> float:
        if what is What.REST:
            return self.hardware.compute_s / 4
        if what is What.EXPERT:
            return self._once(self.expert_s, self.kinds_of_layers[stage - 1], sweep)
        if batch < 0:
            return self._once(self.head_s)
        rows, own = self.batches[batch], self.without_padding(sweep, self.paddings[batch])
        if stage == 0:
            return self._once(self.embedding_s, rows, own)
        alike, home = self.kinds_of_layers[stage - 1], self.cells[stage - 1][batch]
        begun = self.hardware.stage_s if batch == 0 and self.layout.stages[stage] else 0.0
        return begun + self._once(self.layer_s, alike, rows, home, own)

    def _once(self, method: Callable[..., float], *args: Any) -> float:
        """What a method returns; steps that are alike are asked for once."""
        key = (method.__name__, *args)
        if key not in self._seconds:
            self._seconds[key] = method(*args)
        return self._seconds[key]

    def _weights_s(self, lane: Lane, moved: Piece) -> float:
        if lane is Lane.DISK_TO_HOST:
            return self._moved_s(lane, moved.read)
        crossed = self._moved_s(lane, moved.pushed)
        return crossed + moved.cast / self.hardware.upcast_bytes_per_s + self._unpacked_s(moved.unpacked)

    def cell_s(self, lane: Lane, stage: int, rows: int, home: Tier, sweep: Sweep) -> float:
        """A cell's transfer in a lane: what attention sees to the device, new tokens back."""
        is_load = lane in LOADS
        tokens = self.cell_tokens(lane, self.shape.layers[stage - 1], rows, sweep)
        crosses = not self.direct and home is not Tier.DEVICE
        if lane in (Lane.DISK_TO_HOST, Lane.HOST_TO_DISK) or crosses:
            seconds = self._moved_s(lane, tokens * self.shape.kept_bytes(self.policy.compression))
        else:
            seconds = self.hardware.transfer_s
        is_packed_in_compute = self._attends_kept and sweep.past
        if not self.casts or is_packed_in_compute or lane in (Lane.DISK_TO_HOST, Lane.HOST_TO_DISK):
            return seconds
        return seconds + self._repacked_s(self.shape.cache_elements(1) * tokens, is_load=is_load)

    def hidden_s(self, lane: Lane, rows: int, sweep: Sweep) -> float:
        """Hidden states of a micro-batch across one link."""
        return self._moved_s(lane, self.hidden_bytes(rows, sweep))

    def _moved_s(self, lane: Lane, nbytes: float) -> float:
        return self.hardware.transfer_s + nbytes / self.hardware.link(lane).at(max(1.0, nbytes))

    def _unpacked_s(self, elements: float) -> float:
        return elements / self.hardware.unpack_elements_per_s

    def _repacked_s(self, elements: float, *, is_load: bool) -> float:
        """Keys and values to or from the form in which they are kept."""
        if self.policy.compression.cache == 16:
            return 2 * elements / self.hardware.upcast_bytes_per_s
        if is_load:
            return self._unpacked_s(elements)
        return elements / self.hardware.pack_elements_per_s

    def embedding_s(self, rows: int, sweep: Sweep) -> float:
        """The embedding of a micro-batch."""
        size = rows * sweep.tokens * self.shape.hidden_size * self.shape.itemsize
        return (
            self.hardware.forward_s or self.hardware.compute_s / 4
        ) + _EMBEDDING_PASSES * size / self.hardware.memory_bytes_per_s

    def head_s(self) -> float:
        """The head for the last token of all rows."""
        table, rows = self.shape.head.elements, sum(self.batches)
        late = self.layout.late[0 if self.shape.tied else -1] / self.shape.stored_itemsize
        return self._products_s(table, table, rows, late, matrices=1)

    def layer_s(self, stage: int, rows: int, home: Tier, sweep: Sweep) -> float:
        """A decoder layer, experts left out, for a micro-batch whose cell has this home."""
        layer, tokens = self.shape.layers[stage - 1], rows * sweep.tokens
        late = self.layout.late[stage] / self.shape.stored_itemsize
        shared = layer.shared_elements
        products = self._products_s(
            shared, shared, tokens, late, self.layout.late_unpacked[stage], matrices=layer.shared_matrices
        )
        work = products + self._passes_s(tokens) + self.attention_s(layer, rows, home, sweep)
        # what a CPU's thread does beside its products takes time of its own; a device is told ahead what to do next
        return work + self.hardware.compute_s if self.direct else max(work, self.hardware.compute_s)

    @property
    def between_s(self) -> float:
        """What happens between two sweeps: a copy of the logits is looked through for the next tokens."""
        size = sum(self.batches) * self.shape.vocab_size * 4
        return self.hardware.sweep_s + _LOGITS_PASSES * size / self.hardware.memory_bytes_per_s

    def _products_s(
        self, used: float, touched: float, rows: int, late: float, packed: float = 0.0, *, matrices: int
    ) -> float:
        """Products of so many rows with matrices, some of which are made tile by tile for it.

        Args:
            used: elements that a row is multiplied with.
            touched: elements that are read.
            rows: how many there are.
            late: elements that are kept in another type than that of compute.
            packed: elements that are kept in few bits.
            matrices: how many they are.
        """
        near = max(0.0, 1.0 - (late + packed) / touched) if touched else 1.0
        seconds = self._product_s(used * near, touched * near, rows)
        for elements, tiled, made_s in (
            (late, self.hardware.cast_flops, late * self.shape.stored_itemsize / self.hardware.upcast_bytes_per_s),
            (packed, self.hardware.packed_flops, self._unpacked_s(packed) / self.hardware.threads),
        ):
            share = min(1.0, elements / touched) if touched else 0.0
            if tiled is not None and self.shape.dtype == "float32":
                seconds += 2.0 * used * share * rows / tiled.at(rows) + share * matrices * self.hardware.tile_s
            else:
                seconds += made_s + self._product_s(used * share, touched * share, rows)
        return seconds

    def _passes_s(self, tokens: int) -> float:
        """What of a layer goes through hidden states element by element, results into new memory, and cells."""
        speed = self.hardware.element_bytes_per_s
        if speed is None:
            return 0.0
        width = self.shape.sizes(self.policy.compression, direct=self.direct).inner_size
        kept = self.shape.cache_elements(1)
        results = _RESULTS * self.shape.hidden_size + _INNER_RESULTS * width + kept
        size = tokens * self.shape.itemsize
        return 2.0 * results * size / speed.at(size * self.shape.hidden_size)

    def expert_s(self, stage: int, sweep: Sweep) -> float:
        """One of the experts that a block chooses, for the tokens that choose it."""
        layer, tokens = self.shape.layers[stage - 1], sum(self.batches) * sweep.tokens
        choices = tokens * layer.experts[0].used * layer.num_experts
        rows = max(1, round(choices / max(1, layer.chosen_experts(tokens))))
        elements, late, packed = layer.expert_elements, 0.0, 0.0
        if self.direct and self.policy.compression.weights is not None:
            packed = elements
        elif self.direct and self.shape.stored_itemsize != self.shape.itemsize:
            late = elements
        return (
            self._products_s(elements, elements, rows, late, packed, matrices=len(layer.experts))
            + self.hardware.compute_s / 4
        )

    def _product_s(self, used: float, touched: float, rows: int) -> float:
        """Products of so many rows with matrices: no faster than these are read."""
        computed = 2.0 * used * rows / self.hardware.matmul(self.shape.dtype, rows)
        return max(computed, touched * self.shape.itemsize / self.hardware.memory_bytes_per_s)

    def attention_s(self, layer: LayerShape, rows: int, home: Tier, sweep: Sweep) -> float:
        """Attention of a micro-batch, on the host if its cell stays there."""
        flops = rows * self.shape.attention_flops(layer, sweep.tokens, sweep.past)
        computed = flops / self.hardware.attention_flops
        if not sweep.past:
            return computed
        seen = rows * self.shape.cache_elements(layer.attended(sweep.past + sweep.tokens))
        if not self.stays(home):
            is_moved = self.casts or home is Tier.DISK or (not self.direct and home is Tier.HOST)
            speed = self.hardware.moved_attention_bytes_per_s if is_moved else 0.0
            return max(computed, seen * self.shape.itemsize / (speed or self.hardware.attention_bytes_per_s))
        if self._attends_kept:  # products are hidden behind unpacking
            added = self.shape.cache_elements(rows * sweep.tokens)
            speed = self.hardware.packed_attention_elements_per_s or self.hardware.unpack_elements_per_s
            beside = self.hardware.packed_attention_s + self._repacked_s(added, is_load=False)
            return max(computed, seen / speed) + beside
        crossing = rows * sweep.tokens * self.shape.num_heads * self.shape.head_dim * self.shape.itemsize
        there, back = (self._moved_s(lane, crossing) for lane in (Lane.DEVICE_TO_HOST, Lane.HOST_TO_DEVICE))
        unpacked = self._repacked_s(seen, is_load=True) if self.casts else 0.0
        return there + back + unpacked + seen * self.shape.itemsize / self._host_attention

    @property
    def _host_attention(self) -> float:
        speed = self.hardware.host_attention_bytes_per_s
        if not speed:
            raise PolicyError(f"host_attention: its speed on {self.hardware.name} is not known; leave it off")
        return speed
