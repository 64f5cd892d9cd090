"""Where everything of a model lies under a policy, and what of it moves in a sweep.

A model that need not exist, on a machine that need not be there. Knows bytes and links, no seconds.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

from ..policy import Compression, Policy, Tier
from .budget import Call, Demand, ModelSizes, moves_to_front, pages, rings_of, room_for
from .hardware import Hardware
from .layout import Piece, PlannedTensor, WeightLayout, routes_of, tensors_of
from .placement import spread
from .schedule import Choose, Lane, Route, Traffic
from .shape import LayerShape, ModelShape
from .workload import Sweep, Workload, call_of

__all__ = ["LOADS", "Known", "PlacedRun"]

#: the lanes that bring what compute needs
LOADS = (Lane.DISK_TO_HOST, Lane.HOST_TO_DEVICE)

_GOLDEN = 0.6180339887


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


class PlacedRun:
    """A model under a policy on a machine: where all of it lies, and what of it moves.

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

    # ------------------------------------------------------------------------------------------------------------ homes
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

    @functools.cached_property
    def kinds_of_layers(self) -> list[int]:
        """For each layer the stage of the first one that is like it."""
        first: dict[tuple[int, int, int], int] = {}
        return [
            first.setdefault((kind, self.layout.late[stage], self.layout.late_unpacked[stage]), stage)
            for stage, kind in enumerate(self.shape.kinds_of_layers, start=1)
        ]

    @functools.cached_property
    def kinds_of_cells(self) -> dict[tuple[int, int, int, Tier], int]:
        """How many cells there are of each kind: the first stage of those alike, rows, padding, and home."""
        counts: collections.Counter[tuple[int, int, int, Tier]] = collections.Counter()
        for (stage, homes), layers in collections.Counter(zip(self.kinds_of_layers, self.cells, strict=True)).items():
            for (rows, padding), home in zip(zip(self.batches, self.paddings, strict=True), homes, strict=True):
                counts[stage, rows, padding, home] += layers
        return counts

    # ------------------------------------------------------------------------------------------------------- what moves
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

    def cell_tokens(self, lane: Lane, layer: LayerShape, rows: int, sweep: Sweep) -> float:
        """Tokens of a cell that pass a lane, of all its rows; of decode, as many as in a sweep on average.

        Of a sliding layer, the last token of the window is a new one. A prompt that is longer than its cell has room
        for is kept only as far as later tokens see it. To disk, the whole window goes whenever it moves to the front.
        """
        window = layer.window
        if lane in LOADS:
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

    def hidden_bytes(self, rows: int, sweep: Sweep) -> int:
        """Size of a micro-batch's hidden states."""
        return rows * sweep.tokens * self.shape.hidden_size * self.shape.itemsize

    @staticmethod
    def without_padding(sweep: Sweep, padding: int) -> Sweep:
        """What of a sweep a micro-batch computes, and what of it is in its cells."""
        if not padding:
            return sweep
        return Sweep(sweep.tokens, sweep.past - padding) if sweep.past else Sweep(sweep.tokens - padding, 0)

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
        peak = self.demand.peak(self.policy, self.call)
        return {**peak, Tier.DISK: peak[Tier.DISK] - self._left_out_on_disk}

    @property
    def _left_out_on_disk(self) -> int:
        """Of hidden states on disk, what padding would take that micro-batches leave out."""
        if self.call.keeps_hidden:
            return 0
        whole = Sweep(self.call.tokens, 0)
        return sum(
            pages(self.hidden_bytes(rows, whole)) - pages(self.hidden_bytes(rows, self.without_padding(whole, padding)))
            for rows, padding, home in zip(self.batches, self.paddings, self.hidden, strict=True)
            if home is Tier.DISK
        )


@functools.lru_cache(maxsize=256)
def _evenly(experts: tuple[int, ...]) -> tuple[int, ...]:
    """Experts in an order in which the first ones are spread evenly, however many of them one takes."""
    return tuple(sorted(experts, key=lambda expert: expert * _GOLDEN % 1))  # multiples of the golden ratio
