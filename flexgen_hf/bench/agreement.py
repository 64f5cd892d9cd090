"""What was predicted beside what was measured: errors, rank correlations, peaks; as tables in Markdown.

Knows records of `validation`; runs nothing.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..policy import Policy
from .trial import Record

__all__ = ["Agreement", "choice_table", "peak_ratios", "table_of_policies"]

_COMPUTE_MEMORY = ("device", "host")


@dataclasses.dataclass(frozen=True)
class Agreement:
    """How well a way to predict agrees with what was measured.

    Args:
        prefill_error: mean of the absolute relative errors.
        decode_error: the same of decode; of runs that have any.
        largest_error: of all of both.
        rank: Spearman's correlation of predicted and measured token/s.
        decode_rank: of the seconds of decode.
        prefill_rank: of the seconds of prefill.
        count: how many runs.
    """

    prefill_error: float
    decode_error: float
    largest_error: float
    rank: float
    decode_rank: float
    prefill_rank: float
    count: int

    @classmethod
    def of(cls, records: Iterable[Record], way: str = "simulated") -> Agreement | None:
        """Of the runs that came to an end; None if there are fewer than two.

        Args:
            records: measured and predicted.
            way: `"simulated"` or `"closed_form"`.
        """
        done = [record for record in records if record["status"] == "ok"]
        if len(done) < 2:
            return None
        errors = {phase: _errors(done, way, phase) for phase in ("prefill_s", "decode_s")}
        return cls(
            prefill_error=_mean(errors["prefill_s"]),
            decode_error=_mean(errors["decode_s"]),
            largest_error=max(map(abs, (*errors["prefill_s"], *errors["decode_s"]))),
            rank=_rank(done, way, "tokens_per_s"),
            decode_rank=_rank(done, way, "decode_s"),
            prefill_rank=_rank(done, way, "prefill_s"),
            count=len(done),
        )

    def __str__(self) -> str:
        return (
            f"mean error of prefill {self.prefill_error:.1%}, of decode {self.decode_error:.1%}, largest "
            f"{self.largest_error:.1%}; rank correlation {self.rank:.3f} of token/s, {self.prefill_rank:.3f} of "
            f"prefill, {self.decode_rank:.3f} of decode; {self.count} runs"
        )


def _predicted(record: Record, way: str, what: str) -> float:
    return float(record["validation"][way][what])


def _errors(records: Iterable[Record], way: str, what: str) -> list[float]:
    return [_predicted(record, way, what) / record[what] - 1 for record in records if record[what] > 0]


def _mean(errors: Sequence[float]) -> float:
    return statistics.fmean(map(abs, errors)) if errors else 0.0


def _rank(records: Sequence[Record], way: str, what: str) -> float:
    from scipy.stats import spearmanr

    pairs = [(_predicted(record, way, what), record[what]) for record in records]
    return float(spearmanr(*zip(*pairs, strict=True)).statistic)


def peak_ratios(records: Iterable[Record]) -> dict[str, tuple[float, float]]:
    """The least and the most of predicted over measured peak bytes: of memory, of the disk, and of the process.

    Memory is device and host together, which on a CPU are one. *process* compares the prediction of memory with what
    the process grew by from the moment before it loaded the model.
    """
    found: dict[str, list[float]] = {}
    for record in records:
        if record["status"] == "ok":
            for name, (said, taken) in _peaks(record).items():
                if taken > 0:
                    found.setdefault(name, []).append(said / taken)
    return {name: (min(ratios), max(ratios)) for name, ratios in found.items()}


def _peaks(record: Record) -> dict[str, tuple[float, float]]:
    """Predicted and measured bytes."""
    said, taken = record["validation"]["simulated"]["peak_bytes"], record["report"]["peak_bytes"]
    memory = [float(sum(peaks.get(tier, 0) for tier in _COMPUTE_MEMORY)) for peaks in (said, taken)]
    grown = record["peak_rss_bytes"] - record["rss_before_bytes"]
    disk = (float(said.get("disk", 0)), float(taken.get("disk", 0)))
    return {"memory": (memory[0], memory[1]), "disk": disk, "process": (memory[0], float(grown))}


# ------------------------------------------------------------------------------------------------------------- tables
def table_of_policies(records: Sequence[Record]) -> str:
    """Every run in a row, and what follows from all of them."""
    done = [record for record in records if record["status"] == "ok"]
    lines = [_line(_COLUMNS), _line("---" for _ in _COLUMNS)]
    lines += [_line(cell(record) for cell in _COLUMNS.values()) for record in done]
    lines += ["", *_failed(records)]
    for way, name in (("simulated", "Simulated"), ("closed_form", "In closed form")):
        if (agreement := Agreement.of(done, way)) is not None:
            lines.append(f"{name}: {agreement}.")
    lines += _peak_lines(done)
    same = sum(_limits_of(record)[0] == _limits_of(record)[1] for record in done)
    lines.append(f"The busiest lane of decode is the predicted one in {same} of {len(done)} runs.")
    return "\n".join(lines)


def choice_table(choice: Sequence[Record], of_grid: Sequence[Record]) -> str:
    """The grid, fastest first, and how near to its best the chosen policy comes."""
    by_key: dict[str, list[Record]] = {}
    for record in of_grid:
        if record["status"] == "ok":
            by_key.setdefault(record["validation"]["key"], []).append(record)
    groups = sorted(by_key.values(), key=lambda records: -_speed(records))
    lines = [_line(_COLUMNS), _line("---" for _ in _COLUMNS)]
    made = [record for record in choice if record["status"] == "ok"]
    lines += [_line(cell(first) for cell in _COLUMNS.values()) for first, *_ in (*([made] if made else []), *groups)]
    lines += ["", *_failed([*choice, *of_grid])]
    if (agreement := Agreement.of(records[0] for records in groups)) is not None:
        lines.append(f"Simulated: {agreement}.")
    lines += _peak_lines([*made, *(records[0] for records in groups)])
    if made and groups:
        best = groups[0]
        lines.append(
            f"Chosen, the first row: {_speed(made):.3f} token/s (median of {len(made)}); the best of {len(groups)}: "
            f"{_speed(best):.3f} (median of {len(best)}). Chosen over best: {_speed(made) / _speed(best):.3f}."
        )
    return "\n".join(lines)


def _speed(records: Sequence[Record]) -> float:
    return statistics.median(float(record["tokens_per_s"]) for record in records)


def _peak_lines(records: Sequence[Record]) -> Iterator[str]:
    found = [f"{name} {low:.3f} to {high:.3f}" for name, (low, high) in peak_ratios(records).items()]
    if found:
        yield f"Predicted over measured peak bytes: {', '.join(found)}."


def _failed(records: Iterable[Record]) -> Iterator[str]:
    for record in records:
        if record["status"] != "ok":
            yield f"- {_policy(record)}: {record['error']}"


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _model(record: Record) -> str:
    return Path(record["model"]).name.partition("-float")[0].partition("-bfloat")[0]


def _disk(record: Record) -> str:
    rate = record["limits"]["read_bytes_per_s"]
    return f"{rate / 1e6:.0f} MB/s" if rate else "-"


def _policy(record: Record) -> str:
    policy = Policy.from_dict(record["flexgen"]["policy"])
    shares = " ".join(f"{s:g}" for p in (policy.weights, policy.cache, policy.hidden) for s in p.percents())
    extras = [str(policy.compression)] if policy.compression else []
    extras += [] if policy.overlap else ["no overlap"]
    extras += ["1 layer slot"] if policy.layer_slots == 1 else []
    return ", ".join([f"`{shares}` {policy.batch_size} x {policy.num_batches}", *extras])


def _seconds(what: str) -> Callable[[Record], str]:
    return lambda record: f"{_predicted(record, 'simulated', what):.2f} / {record[what]:.2f}"


def _error(what: str) -> Callable[[Record], str]:
    def cell(record: Record) -> str:
        errors = _errors([record], "simulated", what)
        return f"{errors[0]:+.0%}" if errors else "-"

    return cell


def _limits_of(record: Record) -> tuple[str, str]:
    """The busiest lane of decode, or of all where there is none: predicted and measured."""
    report, said = record["report"], record["validation"]["simulated"]
    if report["decode_bottleneck"] == "none":
        return said["prefill_bottleneck"], report["bottleneck"]
    return said["decode_bottleneck"], report["decode_bottleneck"]


def _megabytes(name: str) -> Callable[[Record], str]:
    return lambda record: " / ".join(f"{size / 1e6:.0f}" for size in _peaks(record)[name])


#: head of a column -> its cell of a record; of two numbers, predicted / measured
_COLUMNS: Mapping[str, Callable[[Record], Any]] = {
    "model": _model,
    "disk": _disk,
    "policy": _policy,
    "prefill s": _seconds("prefill_s"),
    "error": _error("prefill_s"),
    "decode s": _seconds("decode_s"),
    "error ": _error("decode_s"),
    "token/s": lambda record: f"{_predicted(record, 'simulated', 'tokens_per_s'):.2f} / {record['tokens_per_s']:.2f}",
    "limit of decode": lambda record: " / ".join(_limits_of(record)),
    "memory MB": _megabytes("memory"),
    "disk MB": _megabytes("disk"),
    "process MB": lambda record: f"{_peaks(record)['process'][1] / 1e6:.0f}",
}
