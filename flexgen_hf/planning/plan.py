"""A plan: a policy, what is predicted of it, and why; and what a search for one may choose."""

from __future__ import annotations

import dataclasses
from typing import Any

from ..errors import PolicyError
from ..policy import Compression, Placement, Policy
from .cost import Prediction
from .schedule import Lane

__all__ = ["OBJECTIVES", "Alternative", "Freedom", "Plan", "prediction_to_dict"]

OBJECTIVES = ("throughput", "latency", "block")


@dataclasses.dataclass(frozen=True)
class Freedom:
    """What a search may choose.

    Args:
        compressions: to choose from.
        host_attention: whether attention on the host may be chosen.
        batch_size: rows of a micro-batch, if they are given.
        num_batches: micro-batches, if they are given.
        weights: where they live, if that is given.
        layer_slots: layers that have room where compute needs them, if they are given.
        overlap: whether lanes work side by side, if it is given.
        one_batch: whether there is to be a single micro-batch, or more than one; None for either.
        objective: `"throughput"`, `"latency"` (the shortest time for the workload's prompts, or for one), or `"block"`
            (the largest block that ends within `deadline_s`).
        deadline_s: for `"block"`.

    Raises:
        PolicyError: an objective that does not exist, or a deadline missing.
    """

    compressions: tuple[Compression, ...] = (Compression(),)
    host_attention: bool = True
    batch_size: int | None = None
    num_batches: int | None = None
    weights: Placement | None = None
    layer_slots: int | None = None
    overlap: bool | None = None
    one_batch: bool | None = None
    objective: str = "throughput"
    deadline_s: float | None = None

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            raise PolicyError(f"objective: {self.objective!r} is unknown; use one of {', '.join(OBJECTIVES)}")
        if (self.objective == "block") != (self.deadline_s is not None):
            raise PolicyError("objective: 'block' and a deadline belong together; give both or neither")

    def worth(self, prediction: Prediction, prompts: int | None = None) -> float:
        """What a search makes as large as possible.

        Args:
            prediction: of one block.
            prompts: rows of all blocks; None for those of this one.
        """
        if self.objective == "throughput":
            return prediction.tokens_per_s
        if self.objective == "latency":
            return -prediction.seconds * -(-(prompts or prediction.rows) // prediction.rows)
        assert self.deadline_s is not None
        if prediction.seconds > self.deadline_s:
            return -prediction.seconds
        return prediction.rows + prediction.tokens_per_s / 1e9  # of blocks of one size, the fastest


@dataclasses.dataclass(frozen=True)
class Alternative:
    """Another policy, and what it would bring."""

    policy: Policy
    predicted: Prediction
    label: str


@dataclasses.dataclass(frozen=True)
class Plan:
    """A policy with what is predicted of it, and why it was chosen.

    Args:
        policy: the choice.
        predicted: by simulation; of alternatives that were not simulated, in closed form.
        why: sentences for people.
        alternatives: the next best ones that differ in more than numbers.
        warnings: what speaks against offloading at all.
    """

    policy: Policy
    predicted: Prediction
    why: tuple[str, ...]
    alternatives: tuple[Alternative, ...] = ()
    warnings: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `Policy.from_dict(d["policy"])` is the policy."""
        return {
            "policy": self.policy.to_dict(),
            "predicted": prediction_to_dict(self.predicted),
            "why": list(self.why),
            "alternatives": [
                {"label": other.label, "policy": other.policy.to_dict(), **prediction_to_dict(other.predicted)}
                for other in self.alternatives
            ],
            "warnings": list(self.warnings),
        }

    def __str__(self) -> str:
        made, compression = self.predicted, self.policy.compression
        kept = f", {compression}" if compression else ""
        return f"{self.policy}{kept}: {made.tokens_per_s:.2f} token/s predicted, limited by {made.bottleneck}"


def prediction_to_dict(made: Prediction) -> dict[str, Any]:
    """A prediction in plain JSON values."""
    return {
        "prefill_s": made.prefill_s,
        "decode_s": made.decode_s,
        "tokens_per_s": made.tokens_per_s,
        "rows": made.rows,
        "peak_bytes": {str(tier): size for tier, size in made.peak_bytes.items()},
        "bottleneck": str(made.bottleneck),
        "lanes": {str(lane): made.prefill_lanes[lane] + made.decode_lanes[lane] for lane in Lane},
    }
