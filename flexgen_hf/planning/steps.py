"""Lanes, steps and their names, and what has to move in a sweep: the words in which a schedule is written.

Values only; nothing here knows bytes, tensors or threads.
"""

from __future__ import annotations

import dataclasses
import enum
from typing import NamedTuple

__all__ = ["Lane", "Rings", "Route", "Step", "StepId", "Traffic", "What"]


class Lane(str, enum.Enum):
    """An ordered queue of work. Lanes run side by side; within one, order is the order of submission."""

    DISK_TO_HOST = "disk_to_host"
    HOST_TO_DEVICE = "host_to_device"
    DEVICE_TO_HOST = "device_to_host"
    HOST_TO_DISK = "host_to_disk"
    COMPUTE = "compute"

    def __str__(self) -> str:
        return self.value


class What(str, enum.Enum):
    """What a step moves or computes.

    A layer that is a mixture of experts is computed in three: the stage up to its router, for each micro-batch; each
    expert, for all of them; the rest of the stage, for each micro-batch again.
    """

    WEIGHTS = "weights"
    EXPERT = "expert"
    CACHE = "cache"
    HIDDEN = "hidden"
    STAGE = "stage"
    REST = "rest"

    def __str__(self) -> str:
        return self.value


class Route(NamedTuple):
    """The links that one piece of data crosses on its way to the device and back; all off: it is used where it is."""

    read: bool = False
    push: bool = False
    pull: bool = False
    write: bool = False

    @property
    def moves(self) -> bool:
        """Whether anything is moved at all, so that a slot is needed."""
        return any(self)


class StepId(NamedTuple):
    """The name of a step.

    `batch` is -1 where a step serves all micro-batches, and the number of the expert where it moves or computes one;
    `piece` counts parts of one load.
    """

    sweep: int
    lane: Lane
    what: What
    stage: int
    batch: int = -1
    piece: int = 0

    def __str__(self) -> str:
        is_expert, is_computed = self.what is What.EXPERT, self.lane is Lane.COMPUTE
        batch = f", micro-batch {self.batch}" if self.batch >= 0 and not is_expert else ""
        piece = f", piece {self.piece}" if self.what in (What.WEIGHTS, What.EXPERT) and not is_computed else ""
        what = f"expert {self.batch}" if is_expert else str(self.what)
        if is_computed:
            what = {What.STAGE: "compute", What.REST: "rest"}.get(self.what, f"compute of {what}")
        return f"{what} of stage {self.stage}{batch}{piece} in sweep {self.sweep}"


class Step(NamedTuple):
    """A unit of work in one lane.

    Args:
        id: its name.
        after: names of the steps it waits for. All of them come earlier in the schedule, or belong to an earlier sweep.
        slot: which reused buffer of its ring it fills or uses, -1 if none; for a compute step, that of its cell, or of
            its expert.
        staging: for a piece of weights that crosses both links, the buffer on the host that it passes through.
    """

    id: StepId
    after: tuple[StepId, ...] = ()
    slot: int = -1
    staging: int = -1


@dataclasses.dataclass(frozen=True)
class Rings:
    """How many reused buffers there are of each kind. More means more look-ahead and more memory.

    Args:
        layers: decoder layers whose weights can be where compute needs them.
        outer: the same for embedding and head.
        pieces: pieces of weights on their way from disk to device.
        cache: cells.
        hidden: hidden states.
        experts: experts of a layer, each loaded by itself.
    """

    layers: int = 2
    outer: int = 1
    pieces: int = 8
    cache: int = 3
    hidden: int = 3
    experts: int = 3


@dataclasses.dataclass(frozen=True)
class Traffic:
    """What has to move in one sweep.

    Args:
        weights: for each stage a route for each piece in which its weights are moved, none if they stay where they are;
            0 is the embedding, the last one the head. Experts are left out.
        cache: for each stage, a route for each micro-batch. Embedding and head have none.
        hidden: a route for each micro-batch, crossed between one decoder layer and the next.
        fresh_cache: the cells are empty, so nothing is loaded (the prompt's sweep).
        tied: the head computes with the embedding's weights, which stay in their slot.
        sparse: stages with experts of which only those are loaded and computed that a token has chosen.
    """

    weights: tuple[tuple[Route, ...], ...]
    cache: tuple[tuple[Route, ...], ...]
    hidden: tuple[Route, ...]
    fresh_cache: bool = False
    tied: bool = False
    sparse: frozenset[int] = frozenset()

    @property
    def num_batches(self) -> int:
        """Micro-batches of the block."""
        return len(self.hidden)

    @property
    def head(self) -> int:
        """Stage of the head."""
        return len(self.weights) - 1

    def following(self, *, table_is_there: bool) -> Traffic:
        """What moves in the sweep after this one.

        Args:
            table_is_there: the table that embedding and head share stays in its slot.
        """
        weights = ((), *self.weights[1:]) if table_is_there else self.weights
        return dataclasses.replace(self, weights=weights, fresh_cache=False)
