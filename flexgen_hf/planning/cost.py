"""What a policy costs: the seconds of a step, the seconds of a lane in closed form, the peak bytes of a tier.

A `PlannedRun` is a model that need not exist, on a machine that need not be there, under one policy. Whoever simulates
it asks for the seconds of each step; the closed form adds them up without making the steps. Method: the cost model of
FlexGen (arXiv 2303.06865, section 4.3) with what it leaves out: transfers that share a link add up, each step has an
overhead, and a product is no faster than its matrix is read.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from ..errors import PolicyError
from ..policy import Compression, Policy, Tier
from .budget import Call, Demand, Limit, ModelSizes, moves_to_front, rings_of, room_for
from .hardware import Hardware
from .layout import Piece, PlannedTensor, WeightLayout, routes_of, tensors_of
from .placement import spread
from .schedule import Choose, Lane, Route, Step, Traffic, What
from .shape import LayerShape, ModelShape

__all__ = [
    "Known", "Lanes", "PlannedRun", "Prediction", "Sweep", "Workload", "call_of", "crossed", "limits_of", "predict",
]  # fmt: skip

#: seconds of each lane
Lanes = dict[Lane, float]

# Results of a token in a layer, of its hidden size: two norms, queries (scaled), keys, values, attention (put in
# order), two projections, two sums; and of its inner size: the first product and its activation.
_RESULTS = 12
_INNER_RESULTS = 2

# Logits are cast or copied to float32 and read for the largest.
_LOGITS_PASSES = 3

_GOLDEN = 0.6180339887

# What embeds a micro-batch's tokens goes through their states a few times.
_EMBEDDING_PASSES = 4

_LOADS = (Lane.DISK_TO_HOST, Lane.HOST_TO_DEVICE)


@dataclasses.dataclass(frozen=True)
class Workload:
    """What is to be generated.

    Args:
        prompt_len: tokens of each prompt.
        gen_len: tokens written after each.
        num_prompts: how many prompts there are; None for as many as a block takes.
        lengths: tokens of each prompt without its padding, where they are known: the first ones are those of a block.

    Raises:
        PolicyError: a number below 1, or a prompt that is longer than they are said to be.
    """

    prompt_len: int
    gen_len: int
    num_prompts: int | None = None
    lengths: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for field in ("prompt_len", "gen_len", "num_prompts"):
            value = getattr(self, field)
            if field == "num_prompts" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise PolicyError(f"workload: {field}={value!r} must be a whole number of at least 1")
        if self.lengths and not 1 <= min(self.lengths) <= max(self.lengths) <= self.prompt_len:
            raise PolicyError(f"workload: lengths are not all from 1 to prompt_len={self.prompt_len}")

    def paddings(self, batches: Sequence[int]) -> list[int]:
        """Columns on the left that are padding in all rows of a micro-batch, prompts being in order of their lengths.

        Args:
            batches: rows of each micro-batch.
        """
        rows = sum(batches)
        if len(batches) == 1 or len(self.lengths) < rows:
            return [0] * len(batches)
        lengths = sorted(self.lengths[:rows], reverse=True)
        firsts = itertools.accumulate(batches[:-1], initial=0)
        return [self.prompt_len - lengths[first] for first in firsts]


@dataclasses.dataclass(frozen=True)
class Known:
    """What is known of a model and a call that are there, beyond what a configuration and a workload say.

    Args:
        tensors: the model's weights under a compression.
        sizes: what decides how much memory a call takes, under a compression.
        pinned: the links of the device need pinned memory; None if they do wherever there are links.
        call: with all its rows; None for a plain one of the workload.
    """

    tensors: Callable[[Compression], Sequence[PlannedTensor]] | None = None
    sizes: Callable[[Compression], ModelSizes] | None = None
    pinned: bool | None = None
    call: Call | None = None


class Sweep(NamedTuple):
    """One pass over all stages.

    Args:
        tokens: new ones of each row.
        past: tokens of each row in the cache before it.
    """

    tokens: int
    past: int


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


class PlannedRun:
    """A model under a policy on a machine.

    Args:
        shape: the model.
        hardware: the machine.
        policy: placements and block.
        workload: what is to be generated.
        known: of a model that is there.
        pieces: see `WeightLayout`.
    """

    def __init__(
        self,
        shape: ModelShape,
        hardware: Hardware,
        policy: Policy,
        workload: Workload,
        *,
        known: Known = Known(),
        pieces: int | None = 8,
    ) -> None:
        self.shape, self.hardware, self.policy, self.workload = shape, hardware, policy, workload
        self.tensors = (known.tensors or functools.partial(tensors_of, shape))(policy.compression)
        self.direct = hardware.direct
        self.rings = rings_of(policy)
        self.call = call_of(policy, workload) if known.call is None else known.call.in_block(policy)
        self.batches = self.call.batches(policy)
        self.paddings = workload.paddings(self.batches)
        self._sizes = (known.sizes or functools.partial(shape.sizes, direct=self.direct))(policy.compression)
        self._pinned = known.pinned if known.pinned is not None else not self.direct
        self.casts, self._attends_kept = self._sizes.kept_key_bytes is not None, self._sizes.attends_kept
        self._max_pieces, self._is_exact = pieces, known.tensors is not None
        self._seconds: dict[tuple[Any, ...], float] = {}

    @functools.cached_property
    def cells(self) -> list[tuple[Tier, ...]]:
        """For each layer the home of the cell of each micro-batch."""
        batches = len(self.batches)
        homes = spread(len(self.shape.layers) * batches, self.policy.cache)
        return [homes[first : first + batches] for first in range(0, len(homes), batches)]

    @functools.cached_property
    def hidden(self) -> tuple[Tier, ...]:
        """The home of each micro-batch's hidden states."""
        return spread(len(self.batches), self.policy.hidden)

    @functools.cached_property
    def layout(self) -> WeightLayout:
        """Where its weights are."""
        return WeightLayout(
            self.tensors,
            self.policy,
            num_stages=len(self.shape.layers) + 2,
            direct=self.direct,
            pieces=self._max_pieces,
            exact=self._is_exact,
        )

    # ---------------------------------------------------------------------------------------------------- what moves
    def stays(self, home: Tier) -> bool:
        """Whether a cell with this home is attended where it is kept."""
        return self._attends_kept or (self.policy.host_attention and not self.direct and home is Tier.HOST)

    def cell_route(self, home: Tier) -> Route:
        """The links that a cell with this home crosses."""
        moved = self.casts or (not self.direct and home is not Tier.DEVICE)
        return Route(home is Tier.DISK, moved and not self.stays(home), moved, home is Tier.DISK)

    def hidden_route(self, home: Tier) -> Route:
        """The links that hidden states with this home cross between two layers."""
        moved = not self.direct and home is not Tier.DEVICE
        return Route(home is Tier.DISK, moved, moved, home is Tier.DISK)

    def traffic(self, *, fresh: bool, table_is_there: bool = False) -> Traffic:
        """What moves in a sweep.

        Args:
            fresh: the cache is empty.
            table_is_there: the table that embedding and head share is in its slot.
        """
        routes = self.layout.routes
        nothing = (Route(),) * len(self.batches)
        cells = {homes: tuple(map(self.cell_route, homes)) for homes in set(self.cells)}
        return Traffic(
            weights=((), *routes[1:]) if table_is_there else routes,
            cache=(nothing, *(cells[homes] for homes in self.cells), nothing),
            hidden=tuple(self.hidden_route(home) for home in self.hidden),
            fresh_cache=fresh,
            tied=self.shape.tied,
            sparse=frozenset(stage for stage, experts in enumerate(self.layout.experts) if experts),
        )

    def chosen(self, stage: int, batches: int, sweep: Sweep) -> tuple[int, ...]:
        """The experts that the first so many micro-batches are expected to choose, spread evenly over the tiers."""
        count = self.shape.layers[stage - 1].chosen_experts(sum(self.batches[:batches]) * sweep.tokens)
        return _evenly(tuple(self.layout.experts[stage]))[:count]

    def chooser(self, sweep: Sweep) -> Choose:
        """What each micro-batch of a sweep is expected to choose that none before it did."""

        @functools.cache
        def chosen(alike: int, batches: int) -> tuple[int, ...]:
            return self.chosen(alike, batches, sweep)

        def choose(stage: int, batch: int) -> list[tuple[int, tuple[Route, ...]]]:
            alike, pieces = self.kinds_of_layers[stage - 1], self.layout.experts[stage]
            fresh = chosen(alike, batch + 1)[len(chosen(alike, batch)) :]
            return [(expert, routes_of(pieces[expert])) for expert in fresh]

        return choose

    # -------------------------------------------------------------------------------------------- seconds of one step
    def seconds(self, step: Step, sweep: Sweep) -> float:
        """What a step takes."""
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

    @staticmethod
    def without_padding(sweep: Sweep, padding: int) -> Sweep:
        """What of a sweep a micro-batch computes, and what of it is in its cells."""
        if not padding:
            return sweep
        return Sweep(sweep.tokens, sweep.past - padding) if sweep.past else Sweep(sweep.tokens - padding, 0)

    def _weights_s(self, lane: Lane, moved: Piece) -> float:
        if lane is Lane.DISK_TO_HOST:
            return self._moved_s(lane, moved.read)
        crossed = self._moved_s(lane, moved.pushed)
        return crossed + moved.cast / self.hardware.upcast_bytes_per_s + self._unpacked_s(moved.unpacked)

    def cell_s(self, lane: Lane, stage: int, rows: int, home: Tier, sweep: Sweep) -> float:
        """A cell's transfer in a lane: what attention sees to the device, new tokens back."""
        is_load = lane in _LOADS
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

    def cell_tokens(self, lane: Lane, layer: LayerShape, rows: int, sweep: Sweep) -> float:
        """Tokens of a cell that pass a lane, of all its rows; of decode, as many as in a sweep on average.

        Of a sliding layer, the last token of the window is a new one. A prompt that is longer than its cell has room
        for is kept only as far as later tokens see it. To disk, the whole window goes whenever it moves to the front.
        """
        window = layer.window
        if lane in _LOADS:
            return rows * (sweep.past if window is None else min(sweep.past, window - 1))
        if window is None:
            return rows * sweep.tokens
        if not sweep.past:
            has_room = sweep.tokens <= room_for(self.call.capacity, window)
            return rows * (sweep.tokens if has_room else max(1, window - 1))
        again = self._moves_to_front(window) * (window - 1) if lane is Lane.HOST_TO_DISK else 0.0
        return rows * (sweep.tokens + again)

    def _moves_to_front(self, window: int) -> float:
        """How often a sliding layer's cells move their window to the front, in a sweep of decode."""
        sweeps = self.workload.gen_len - 1
        return moves_to_front(self.workload.prompt_len, self.call.capacity, window) / sweeps if sweeps else 0.0

    def hidden_s(self, lane: Lane, rows: int, sweep: Sweep) -> float:
        """Hidden states of a micro-batch across one link."""
        return self._moved_s(lane, self.hidden_bytes(rows, sweep))

    def hidden_bytes(self, rows: int, sweep: Sweep) -> int:
        """Size of a micro-batch's hidden states."""
        return rows * sweep.tokens * self.shape.hidden_size * self.shape.itemsize

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
        return self._products_s(table, table, rows, late)

    def layer_s(self, stage: int, rows: int, home: Tier, sweep: Sweep) -> float:
        """A decoder layer, experts left out, for a micro-batch whose cell has this home."""
        layer, tokens = self.shape.layers[stage - 1], rows * sweep.tokens
        late = self.layout.late[stage] / self.shape.stored_itemsize
        shared = layer.shared_elements
        products = self._products_s(shared, shared, tokens, late, self.layout.late_unpacked[stage])
        work = products + self._passes_s(tokens) + self.attention_s(layer, rows, home, sweep)
        # what a CPU's thread does beside its products takes time of its own; a device is told ahead what to do next
        return work + self.hardware.compute_s if self.direct else max(work, self.hardware.compute_s)

    @property
    def between_s(self) -> float:
        """What happens between two sweeps: a copy of the logits is looked through for the next tokens."""
        size = sum(self.batches) * self.shape.vocab_size * 4
        return self.hardware.sweep_s + _LOGITS_PASSES * size / self.hardware.memory_bytes_per_s

    def _products_s(self, used: float, touched: float, rows: int, late: float, packed: float = 0.0) -> float:
        """Products of so many rows with matrices, some of which are made tile by tile for it.

        Args:
            used: elements that a row is multiplied with.
            touched: elements that are read.
            rows: how many there are.
            late: elements that are kept in another type than that of compute.
            packed: elements that are kept in few bits.
        """
        near = max(0.0, 1.0 - (late + packed) / touched) if touched else 1.0
        seconds = self._product_s(used * near, touched * near, rows)
        for elements, tiled, made_s in (
            (late, self.hardware.cast_flops, late * self.shape.stored_itemsize / self.hardware.upcast_bytes_per_s),
            (packed, self.hardware.packed_flops, self._unpacked_s(packed) / self.hardware.threads),
        ):
            share = min(1.0, elements / touched) if touched else 0.0
            if tiled is not None and self.shape.dtype == "float32":
                seconds += 2.0 * used * share * rows / tiled.at(rows)
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
        return self._products_s(elements, elements, rows, late, packed) + self.hardware.compute_s / 4

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

    # ------------------------------------------------------------------------------------------------- in closed form
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
        return lanes

    def pieces(self, sweep: Sweep) -> Mapping[Piece, int]:
        """The pieces of weights that move in a sweep, and how many there are of each kind.

        A table that embedding and head share is among them in the first sweep only, and of experts those that a block
        is expected to choose.
        """
        loads = collections.Counter(self.layout.stages[1 if self.shape.tied and sweep.past else 0 :])
        for stage, experts in enumerate(self.layout.experts):
            if experts:
                loads.update([experts[expert] for expert in self.chosen(stage, len(self.batches), sweep)])
        counts: collections.Counter[Piece] = collections.Counter()
        for pieces, count in loads.items():
            for piece in pieces:
                counts[piece] += count
        return counts

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

    @functools.cached_property
    def kinds_of_cells(self) -> dict[tuple[int, int, int, Tier], int]:
        """How many cells there are of each kind: the first stage of those alike, rows, padding, and home."""
        counts: collections.Counter[tuple[int, int, int, Tier]] = collections.Counter()
        for (stage, homes), layers in collections.Counter(zip(self.kinds_of_layers, self.cells, strict=True)).items():
            for (rows, padding), home in zip(zip(self.batches, self.paddings, strict=True), homes, strict=True):
                counts[stage, rows, padding, home] += layers
        return counts

    @functools.cached_property
    def kinds_of_layers(self) -> list[int]:
        """For each layer the stage of the first one that is like it."""
        first: dict[tuple[int, int, int], int] = {}
        return [
            first.setdefault((kind, self.layout.late[stage], self.layout.late_unpacked[stage]), stage)
            for stage, kind in enumerate(self.shape.kinds_of_layers, start=1)
        ]

    def sweeps(self) -> tuple[Sweep, Sweep | None]:
        """The sweep over prompts, and one that stands for all others."""
        steps = self.workload.gen_len - 1
        middle = Sweep(1, self.workload.prompt_len + (steps - 1) // 2) if steps else None
        return Sweep(self.workload.prompt_len, 0), middle

    # ------------------------------------------------------------------------------------------------------ peak bytes
    @functools.cached_property
    def demand(self) -> Demand:
        """What the model takes; of weights, what this policy takes."""
        return Demand(self._sizes, lambda _: self.layout.needs(self.rings), direct=self.direct, pinned=self._pinned)

    @functools.cached_property
    def peak_bytes(self) -> dict[Tier, int]:
        """The most that each tier holds."""
        return self.demand.peak(self.policy, self.call)


@functools.lru_cache(maxsize=256)
def _evenly(experts: tuple[int, ...]) -> tuple[int, ...]:
    """Experts in an order in which the first ones are spread evenly, however many of them one takes."""
    return tuple(sorted(experts, key=lambda expert: expert * _GOLDEN % 1))  # multiples of the golden ratio


def call_of(policy: Policy, workload: Workload) -> Call:
    """One block of a workload."""
    rows = policy.block_size if workload.num_prompts is None else min(policy.block_size, workload.num_prompts)
    return Call(rows, workload.prompt_len, workload.prompt_len + workload.gen_len - 1)


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
    return [lane for lane, crosses in zip(lanes, route, strict=True) if crosses and not (is_fresh and lane in _LOADS)]
