"""How much a block computes for each byte that it moves, and what that allows: the numbers of a roofline.

Method: Williams, Waterman, Patterson, "Roofline: an insightful visual performance model", 2009; with one roof for each
lane, and for the memories that compute reads, instead of one for the main memory.
"""

from __future__ import annotations

import collections
import dataclasses

from ..policy import Tier
from .cost import PlannedRun, Prediction, crossed
from .schedule import Lane
from .shape import LayerShape
from .workload import Sweep

__all__ = ["DEVICE_MEMORY", "HOST_MEMORY", "Roof", "Roofline", "roofline"]

#: names of the roofs that are no lanes: what compute itself reads, and what attention on the host reads
DEVICE_MEMORY = "device memory"
HOST_MEMORY = "attention on the host"


@dataclasses.dataclass(frozen=True)
class Roof:
    """What a sweep moves over one link or reads from one memory, and how fast that goes.

    Args:
        name: of the lane or the memory.
        nbytes: of one sweep.
        bytes_per_s: as transfers of these sizes reach it.
        intensity: floating-point operations of the sweep for each of these bytes.
    """

    name: str
    nbytes: float
    bytes_per_s: float
    intensity: float

    @property
    def flops_per_s(self) -> float:
        """The most that it allows."""
        return self.intensity * self.bytes_per_s


@dataclasses.dataclass(frozen=True)
class Roofline:
    """One sweep of a block.

    Args:
        flops: its floating-point operations.
        seconds: what it takes.
        peak_flops_per_s: how fast its products are where nothing else limits them.
        roofs: of all that moves, the lowest first.
    """

    flops: float
    seconds: float
    peak_flops_per_s: float
    roofs: tuple[Roof, ...]

    @property
    def achieved(self) -> float:
        """Floating-point operations per second of the whole sweep."""
        return self.flops / self.seconds

    @property
    def attainable(self) -> float:
        """The most that the lowest roof allows."""
        return min([self.peak_flops_per_s, *(roof.flops_per_s for roof in self.roofs)])

    @property
    def binding(self) -> str:
        """The name of the lowest roof; "compute" if that is the peak."""
        lowest = self.roofs[0] if self.roofs else None
        return "compute" if lowest is None or lowest.flops_per_s > self.peak_flops_per_s else lowest.name


def roofline(run: PlannedRun, predicted: Prediction) -> Roofline:
    """The mean sweep of decode; the prompt's if there is no other.

    Args:
        run: the block.
        predicted: what it takes.
    """
    prefill, decode = run.sweeps()
    sweep = decode or prefill
    seconds = predicted.decode_s / (run.workload.gen_len - 1) if decode else predicted.prefill_s
    kinds = _kinds(run)
    flops, at_peak_s = _products(run, sweep, kinds)
    times = run.lanes(sweep)
    moved = {str(lane): (size, times[lane]) for lane, size in _moved(run, sweep, kinds).items()}
    moved |= _read(run, sweep, kinds)
    roofs = [Roof(name, size, size / s, flops / size) for name, (size, s) in moved.items() if size and s]
    return Roofline(flops, seconds, flops / at_peak_s, tuple(sorted(roofs, key=lambda roof: roof.flops_per_s)))


# layer, rows, home, and how many there are
_Kinds = list[tuple[LayerShape, int, Tier, int]]


def _kinds(run: PlannedRun) -> _Kinds:
    """Each kind of cell."""
    layers = run.shape.layers
    found = collections.Counter[tuple[int, int, Tier]]()
    for (stage, rows, _, home), count in run.kinds_of_cells.items():
        found[stage, rows, home] += count
    return [(layers[stage - 1], rows, home, count) for (stage, rows, home), count in found.items()]


def _products(run: PlannedRun, sweep: Sweep, kinds: _Kinds) -> tuple[float, float]:
    """Floating-point operations of a sweep, and their seconds at full speed."""
    shape, hardware = run.shape, run.hardware
    flops = seconds = 0.0
    for layer, rows, _, count in kinds:
        tokens = rows * sweep.tokens
        products = shape.layer_flops(layer, tokens)
        attention = rows * shape.attention_flops(layer, sweep.tokens, sweep.past)
        flops += count * (products + attention)
        seconds += count * (products / hardware.matmul(shape.dtype, tokens) + attention / hardware.attention_flops)
    rows = sum(run.batches)
    head = 2.0 * shape.head.elements * rows
    return flops + head, seconds + head / hardware.matmul(shape.dtype, rows)


def _moved(run: PlannedRun, sweep: Sweep, kinds: _Kinds) -> dict[Lane, float]:
    """Bytes that pass each lane; where nothing crosses a link, those that are cast or unpacked."""
    moved: dict[Lane, float] = dict.fromkeys(Lane, 0.0)
    packed = (run.policy.compression.weights or 16) / 8
    for piece, count in run.pieces(sweep).items():
        moved[Lane.DISK_TO_HOST] += count * piece.read
        if piece.pushes:
            moved[Lane.HOST_TO_DEVICE] += count * (piece.pushed or piece.cast or piece.unpacked * packed)
    kept = run.shape.kept_bytes(run.policy.compression)
    for layer, rows, home, count in kinds:
        for lane in crossed(run.cell_route(home), is_fresh=not sweep.past):
            moved[lane] += count * kept * run.cell_tokens(lane, layer, rows, sweep)
    for rows, home in zip(run.batches, run.hidden, strict=True):
        for lane in crossed(run.hidden_route(home)):
            moved[lane] += (len(run.shape.layers) - 1) * run.hidden_bytes(rows, sweep)
    return moved


def _read(run: PlannedRun, sweep: Sweep, kinds: _Kinds) -> dict[str, tuple[float, float]]:
    """Bytes and seconds of what compute reads from memory: matrices for each micro-batch, experts once, the cache."""
    shape, hardware = run.shape, run.hardware
    weights, seen = float(shape.head.elements * shape.itemsize), {DEVICE_MEMORY: 0.0, HOST_MEMORY: 0.0}
    is_kept = run.direct and run.stays(Tier.HOST)  # attended as it is kept
    a_token = shape.kept_bytes(run.policy.compression) if is_kept else shape.cache_elements(1) * shape.itemsize
    tokens = sum(run.batches) * sweep.tokens
    weights += sum(layer.chosen_experts(tokens) * layer.expert_elements for layer in shape.layers) * shape.itemsize
    for layer, rows, home, count in kinds:
        weights += count * layer.shared_elements * shape.itemsize
        if sweep.past:
            where = HOST_MEMORY if run.stays(home) and not run.direct else DEVICE_MEMORY
            seen[where] += count * rows * layer.attended(sweep.past + sweep.tokens) * a_token
    near, far = seen[DEVICE_MEMORY], seen[HOST_MEMORY]
    near_s = weights / hardware.memory_bytes_per_s + near / hardware.attention_bytes_per_s
    made = {DEVICE_MEMORY: (weights + near, near_s)}
    return made | ({HOST_MEMORY: (far, far / hardware.host_attention_bytes_per_s)} if far else {})
