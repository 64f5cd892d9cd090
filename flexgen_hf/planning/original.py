"""The policies and rates that FlexGen's paper publishes, and a model of what its implementation loses by its defects.

The paper is arXiv 2303.06865: one T4 with 16 GB, 208 GB of RAM, 1.5 TB of NVMe, 32 tokens written after each prompt.
Beside each published rate stands what its authors' own cost model says with the constants that it ships, what this
planner says of the same policy, and what it says where the original's known losses are modelled too:

*shares*: a layer's tensors go to tiers by where their middle lies in the layer, so that `20 80` puts a twelfth on the
device. *barrier*: all transfers and compute meet after each layer of each micro-batch, so the next layer's weights hide
behind the first micro-batch only. *dequantizing*: quantized weights are unpacked once for each micro-batch, and
weights and cache by a chain of operations of PyTorch that go through memory again and again.

The rate of that chain is fitted to one published row, OPT-6.7B with prompts of 512 tokens, quantized, where nothing
moves; all other numbers are the machine's. Attention on the host goes to the cells on disk, too, there.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence

from ..policy import Compression, Policy, Tier
from .cost import Lanes, PlannedRun
from .hardware import Hardware
from .layout import PlannedTensor, WeightLayout
from .schedule import Lane, Route
from .shape import LayerShape, ModelShape
from .simulate import simulate
from .workload import Sweep, Workload

__all__ = ["PUBLISHED", "Comparison", "Published", "compare", "original_model_tokens_per_s"]

_GIB = 1 << 30

# elements per second that are unpacked by the chain of operations, from one published row; see above
_UNFUSED_ELEMENTS_PER_S = 1.1e10


@dataclasses.dataclass(frozen=True)
class Published:
    """A row of the paper's tables.

    Args:
        model: name of the model.
        prompt_len: tokens of a prompt.
        policy: what was run.
        tokens_per_s: what the paper says.
    """

    model: str
    prompt_len: int
    policy: Policy
    tokens_per_s: float

    @property
    def workload(self) -> Workload:
        """What was generated."""
        return Workload(self.prompt_len, 32)

    @property
    def is_compressed(self) -> bool:
        """Whether weights or cache are quantized."""
        return bool(self.policy.compression)


def _rows() -> Iterator[Published]:
    on_device, on_host = "100 0 100 0 100 0", "0 100 0 100 0 100"
    both, cache = Compression(weights=4, cache=4), Compression(cache=4)
    plain = [
        ("opt-6.7b", {256: (on_device, 4, 1, 53.29), 512: (on_device, 2, 1, 25.26), 1024: (on_device, 1, 1, 13.72)}),
        (
            "opt-30b",
            {
                256: ("10 90 0 100 0 100", 160, 2, 16.01),
                512: ("20 80 0 100 0 100", 48, 3, 7.32),
                1024: ("4 96 0 100 0 100", 20, 4, 3.50),
            },
        ),
        (
            "opt-175b",
            {
                256: ("0 50 0 0 0 100", 64, 8, 1.36),
                512: ("0 50 0 0 0 100", 32, 8, 0.69),
                1024: ("0 50 0 0 0 100", 12, 12, 0.35),
            },
        ),
    ]
    compressed = [
        ("opt-6.7b", on_device, both, {256: (128, 1, 56.72), 512: (72, 1, 29.12), 1024: (28, 1, 13.18)}),
        ("opt-30b", on_host, cache, {256: (128, 8, 16.86), 512: (64, 8, 8.38), 1024: (20, 12, 3.98)}),
        ("opt-175b", on_host, both, {256: (96, 3, 2.26), 512: (48, 3, 1.12), 1024: (12, 4, 0.42)}),
    ]
    for model, runs in plain:
        is_resident = model == "opt-6.7b"
        for prompt_len, (percents, size, number, rate) in runs.items():
            policy = Policy.parse(
                percents,
                batch_size=size,
                num_batches=number,
                overlap=not is_resident,
                host_attention=not is_resident,
            )
            yield Published(model, prompt_len, policy, rate)
    for model, percents, compression, sizes in compressed:
        for prompt_len, (size, number, rate) in sizes.items():
            policy = Policy.parse(
                percents,
                batch_size=size,
                num_batches=number,
                overlap=percents == on_host,
                compression=compression,
            )
            yield Published(model, prompt_len, policy, rate)


#: nine rows in 16 bit, and nine quantized ones
PUBLISHED: Sequence[Published] = tuple(_rows())


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Rates of one published policy, in tokens per second.

    Args:
        row: what is published.
        original_model: what the authors' cost model says; None of quantized runs, for which it has no terms.
        planned: what the planner says of the policy as this engine runs it.
        with_losses: what it says with the original's losses.
    """

    row: Published
    original_model: float | None
    planned: float
    with_losses: float

    @property
    def error(self) -> float:
        """Of the prediction with losses, as a share of the published rate."""
        return self.with_losses / self.row.tokens_per_s - 1


def compare(shapes: Mapping[str, ModelShape], hardware: Hardware) -> list[Comparison]:
    """Simulates every published policy.

    Args:
        shapes: of the published models, by name.
        hardware: the paper's machine.
    """
    found = []
    for row in PUBLISHED:
        shape = shapes[row.model]
        run = PlannedRun(shape, hardware, row.policy, row.workload)
        original = None if row.is_compressed else original_model_tokens_per_s(shape, row.policy, row.workload)
        lossy = OriginalRun(shape, hardware, row.policy, row.workload)
        found.append(Comparison(row, original, simulate(run).tokens_per_s, lossy.tokens_per_s()))
    return found


class OriginalRun(PlannedRun):
    """A policy as the original's implementation runs it; arguments are those of `PlannedRun`."""

    @functools.cached_property
    def layout(self) -> WeightLayout:
        """Tensors go to the tier in whose share their middle lies, in the order disk, host, device."""
        homes = list[Tier]()
        for stage in range(len(self.shape.layers) + 2):
            members = [tensor for tensor in self.tensors if tensor.stage == stage]
            half = len(members) if stage in (0, len(self.shape.layers) + 1) else self._attention_tensors(stage)
            homes += [*self._by_middle(members[:half]), *self._by_middle(members[half:])]
        return WeightLayout(
            self.tensors, self.policy, num_stages=len(self.shape.layers) + 2, direct=False, homes=homes, pieces=8
        )

    def _attention_tensors(self, stage: int) -> int:
        return sum(tensor.part == "attention" for tensor in self.shape.layers[stage - 1].tensors[:-1])

    def _by_middle(self, members: Sequence[PlannedTensor]) -> Iterator[Tier]:
        share = self.policy.weights
        total, before = sum(tensor.stored_bytes for tensor in members), 0
        for tensor in members:
            middle = (before + tensor.stored_bytes / 2) / total
            before += tensor.stored_bytes
            if middle < share.share(Tier.DISK):
                yield Tier.DISK
            else:
                yield Tier.HOST if middle < share.share(Tier.DISK) + share.host else Tier.DEVICE

    def stays(self, home: Tier) -> bool:
        """Attention on the host is for cells on disk, too."""
        return self.policy.host_attention and home is not Tier.DEVICE

    def cell_route(self, home: Tier) -> Route:
        """Cells that are attended on the host are read, and written back."""
        route = super().cell_route(home)
        return route._replace(push=route.push and not self.stays(home))

    def _unpacked_s(self, elements: float) -> float:  # noqa: ARG002  in compute: see `layer_s`
        return 0.0

    def layer_s(self, stage: int, rows: int, home: Tier, sweep: Sweep) -> float:
        """A layer of a micro-batch, its weights and its cell unpacked first."""
        members = (tensor for tensor in self.tensors if tensor.stage == stage and tensor.is_quantized)
        elements = float(sum(tensor.elements for tensor in members))
        if self.casts and sweep.past:
            elements += self.shape.cache_elements(rows * sweep.past)
        return super().layer_s(stage, rows, home, sweep) + elements / _UNFUSED_ELEMENTS_PER_S

    def sweep_s(self, sweep: Sweep) -> float:
        """A sweep with a barrier after each layer of each micro-batch."""
        combine = max if self.policy.overlap else sum
        total = self.head_s() + self.hardware.sweep_s
        known: dict[tuple[LayerShape, int, Tier, Tier, bool, tuple[object, ...]], float] = {}
        for stage in range(1, len(self.shape.layers) + 1):
            layer = self.shape.layers[stage - 1]
            following = stage + 1 if stage < len(self.shape.layers) else 1
            for batch, rows in enumerate(self.batches):
                pieces = self.layout.stages[following] if batch == 0 else ()
                key = (layer, rows, self.cells[stage - 1][batch], self.hidden[batch], batch == 0, pieces)
                if key not in known:
                    known[key] = combine(self._visit(stage, batch, sweep, following).values())
                total += known[key]
        return total

    def _visit(self, stage: int, batch: int, sweep: Sweep, following: int) -> Lanes:
        """Seconds of each lane between two barriers."""
        rows, home = self.batches[batch], self.cells[stage - 1][batch]
        lanes = dict.fromkeys(Lane, 0.0)
        lanes[Lane.COMPUTE] = self.layer_s(stage, rows, home, sweep)
        for lane, crosses in zip(_LINKS, self.cell_route(home), strict=True):
            if crosses and (sweep.past or lane in _LINKS[2:]):
                lanes[lane] += self.cell_s(lane, stage, rows, home, sweep)
        for lane, crosses in zip(_LINKS, self.hidden_route(self.hidden[batch]), strict=True):
            lanes[lane] += self.hidden_s(lane, rows, sweep) if crosses else 0.0
        if batch == 0:
            for piece in self.layout.stages[following]:
                for lane, crosses in zip(_LINKS, piece.route, strict=True):
                    lanes[lane] += self._weights_s(lane, piece) if crosses else 0.0
        return lanes

    def tokens_per_s(self) -> float:
        """Of one block."""
        prefill, decode = self.sweeps()
        seconds = self.sweep_s(prefill)
        if decode is not None:
            seconds += (self.workload.gen_len - 1) * self.sweep_s(decode)
        return sum(self.batches) * self.workload.gen_len / seconds


_LINKS = (Lane.DISK_TO_HOST, Lane.HOST_TO_DEVICE, Lane.DEVICE_TO_HOST, Lane.HOST_TO_DISK)


def original_model_tokens_per_s(shape: ModelShape, policy: Policy, workload: Workload) -> float:
    """What the authors' cost model says of a policy in 16 bit, with the constants that it ships for the T4."""
    prompt, steps, hidden = workload.prompt_len, workload.gen_len, shape.hidden_size
    block, size = policy.block_size, policy.batch_size
    inner = max(t.shape[0] for t in shape.layers[0].tensors if (t.part, t.kind) == ("mlp", "matrix"))
    moved = 1 - policy.weights.device
    far_cache, far_hidden = 1 - policy.cache.device, 1 - policy.hidden.device
    weights = 8 * hidden**2 + 4 * hidden * inner
    states, cache = 2 * hidden * block, 4 * hidden * block
    length, disk = prompt + steps / 2, policy.weights.share(Tier.DISK)
    prefill = max(
        (moved * weights + far_hidden * prompt * states) / (12.89 * _GIB)
        + (disk * weights + policy.hidden.share(Tier.DISK) * prompt * states) / (0.473 * _GIB),
        far_cache * (prompt + 1) * cache / (0.97 * _GIB)
        + far_hidden * prompt * states / (4.82 * _GIB)
        + policy.cache.share(Tier.DISK) * (prompt + 1) * cache / (0.746 * _GIB),
        prompt * block * weights / 21.24e12 + cache * prompt**2 / 9.97e12,
    )
    few_rows, narrow = max(0.0, math.log2(64 / size)), max(0.0, math.log2(4096 / hidden))
    host = 0.0123e12 * max(0.1, 1 + 0.0168 * few_rows * narrow - 0.0328 * few_rows - 0.0621 * narrow)
    decode = (moved * weights + far_hidden * states) / (12.89 * _GIB) + max(
        far_hidden * states / (4.82 * _GIB),
        policy.cache.share(Tier.DISK) * length * cache / (0.473 * _GIB) + disk * weights / (0.95 * 0.473 * _GIB),
        policy.cache.share(Tier.DISK) * cache / (2.015 * _GIB),
        block * weights / 4.3e12 + policy.cache.device * length * cache / 0.079e12 + far_cache * length * cache / host,
    )
    return block * steps / (len(shape.layers) * (prefill + (steps - 1) * decode))
