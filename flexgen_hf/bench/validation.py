"""`bench --validate-plan`: policies measured as `bench` does, and predicted from this machine's profile.

Either policies drawn at random, for the errors of the prediction; or a grid of policies for one workload and the one
that the planner chooses for it, for how good the choice is. Measuring is `trial`'s, predicting is `planning`'s, what
comes of both is put together by `agreement`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import CapacityError, FlexGenError
from ..planning.budget import fits
from ..planning.cost import PlannedRun, limits_of, predict
from ..planning.hardware import Hardware
from ..planning.search import COMPRESSIONS, Freedom, Planner, prediction_to_dict
from ..planning.shape import ModelShape, read_config
from ..planning.simulate import simulate
from ..planning.workload import Workload as Planned
from ..policy import Compression, Placement, Policy, Tier
from .limits import Limits
from .quantized import quantized_store
from .systems import Job
from .trial import Record
from .workload import BenchWorkload

__all__ = ["Case", "Drawing", "Ground", "Measuring", "Subject", "chosen", "drawn", "grid", "known_records"]

#: of a limit on memory, what is left to Python, torch and transformers; with their files in the page cache
PROCESS_BYTES = 700_000_000

_SIZES = (1, 2, 4, 8, 16, 32)
_NUMBERS = (1, 2, 3, 4, 6, 8)
_WEIGHTS = ((100, 0), (50, 50), (0, 100), (50, 0), (0, 50), (20, 20), (0, 0))
_CACHE = (100, 50, 0)

# so many draws in a row that do not fit are enough
_MOST_DRAWS = 4_000

# a policy that takes so many times as long as the one that was chosen is not the best one
_GIVEN_UP = 3


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model that policies are measured with.

    Args:
        job: what all its runs have in common.
        shape: what the planner knows of it, in the dtype of compute.
        memory_bytes: the limit on memory of each run; None is no limit.
    """

    job: Job
    shape: ModelShape
    memory_bytes: int | None = None

    @classmethod
    def of(cls, job: Job, memory_bytes: int | None) -> Subject:
        """The model of a job.

        Raises:
            CapacityError: a limit that leaves nothing for a model.
        """
        if memory_bytes is not None and memory_bytes <= PROCESS_BYTES:
            raise CapacityError(
                f"--memory-limit: of {memory_bytes / 1e6:.0f} MB, {PROCESS_BYTES / 1e6:.0f} MB are for Python and its "
                "libraries; give more"
            )
        shape = ModelShape.from_config(read_config(job.model), name=Path(job.model).name)
        return cls(job, shape.in_dtype(job.dtype), memory_bytes)

    def machine(self, hardware: Hardware, disk_bytes_per_s: int | None) -> Hardware:
        """The machine as a run of this model sees it."""
        limited = hardware.with_disk_limit(disk_bytes_per_s, disk_bytes_per_s)
        if self.memory_bytes is None:
            return limited
        room = min(self.memory_bytes - PROCESS_BYTES, hardware.host_bytes)
        return limited.within({Tier.HOST: room}, shared=room if hardware.unified else None)


@dataclasses.dataclass(frozen=True)
class Case:
    """A policy with all that it takes to measure and to predict it.

    Args:
        subject: the model.
        policy: placements, block and compression.
        disk_bytes_per_s: limit on reads and on writes; None is no limit.
        kind: `"random"`, `"grid"` or `"chosen"`.
    """

    subject: Subject
    policy: Policy
    disk_bytes_per_s: int | None
    kind: str

    @property
    def workload(self) -> BenchWorkload:
        """No more rows than a block, and as many as there are if those are fewer."""
        asked = self.subject.job.workload
        rows = self.policy.block_size if self.kind == "random" else min(self.policy.block_size, asked.rows)
        return dataclasses.replace(asked, rows=rows)

    @property
    def limits(self) -> Limits:
        """Of the process that runs it."""
        return Limits(self.subject.memory_bytes, self.disk_bytes_per_s, self.disk_bytes_per_s)

    @property
    def key(self) -> str:
        """What is the same for two measurements of the same."""
        what = [
            Path(self.subject.job.model).name, self.subject.job.dtype, self.subject.job.threads,
            self.policy.to_dict(), dataclasses.asdict(self.workload), dataclasses.asdict(self.limits),
        ]  # fmt: skip
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]

    def planned(self, hardware: Hardware, *, pieces: int | None = None) -> PlannedRun:
        """The run as the planner sees it."""
        asked = self.workload
        workload = Planned(asked.prompt_len, asked.new_tokens, asked.rows, asked.lengths)
        machine = self.subject.machine(hardware, self.disk_bytes_per_s)
        return PlannedRun(self.subject.shape, machine, self.policy, workload, pieces=pieces)

    def predicted(self, hardware: Hardware) -> dict[str, Any]:
        """By simulation, and in closed form, in JSON values."""
        run = self.planned(hardware)
        by_simulation, in_closed_form = simulate(run), predict(run)
        return {
            "simulated": {
                **prediction_to_dict(by_simulation),
                "prefill_bottleneck": str(by_simulation.prefill_bottleneck),
                "decode_bottleneck": str(by_simulation.decode_bottleneck),
            },
            "closed_form": prediction_to_dict(in_closed_form),
        }

    def ready(self, work_folder: Path) -> Job:
        """The job, with weights that are quantized by now if they are to be."""
        job, compression = self.subject.job, self.policy.compression
        store = quantized_store(work_folder, Path(job.model), compression) if compression.of_weights else None
        budget = None if self.subject.memory_bytes is None else self.subject.memory_bytes - PROCESS_BYTES
        flexgen: dict[str, Any] = {"policy": self.policy.to_dict()}
        if budget is not None and job.device.name == "cpu":
            flexgen["max_memory"] = {"cpu": budget}
        if compression:
            flexgen["compression"] = compression.to_dict()
        return dataclasses.replace(
            job, workload=self.workload, flexgen=flexgen, store=None if store is None else str(store)
        )


# ------------------------------------------------------------------------------------------------- which are measured
@dataclasses.dataclass(frozen=True)
class Ground:
    """What policies are drawn from, or made of.

    Args:
        subjects: models.
        disk_limits: bytes per second; None is no limit.
        compressions: of weights and cache.
        seed: of all draws.
    """

    subjects: Sequence[Subject]
    disk_limits: Sequence[int | None] = (None,)
    compressions: Sequence[Compression] = COMPRESSIONS
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Drawing:
    """What of random policies is measured.

    Args:
        count: how many.
        seconds: what a run may take at least and at most, as predicted: a short one measures overheads, a long one
            patience.
    """

    count: int
    seconds: tuple[float, float] = (4.0, 30.0)


def drawn(ground: Ground, drawing: Drawing, hardware: Hardware) -> list[Case]:
    """Policies at random: each model with each compression and disk limit in turn, all else by chance.

    Raises:
        CapacityError: too few of them fit, or take a time within bounds.
    """
    rng, made, draws = random.Random(ground.seed), dict[str, Case](), 0  # noqa: S311  no secret
    kinds = list(itertools.product(ground.compressions, ground.subjects, ground.disk_limits))
    rng.shuffle(kinds)
    frames = itertools.cycle(kinds)
    while len(made) < drawing.count:
        compression, subject, rate = next(frames)
        for _ in range(_MOST_DRAWS // 40):
            draws += 1
            case = Case(subject, _at_random(rng, compression), rate, "random")
            if case.key not in made and _is_wanted(case.planned(hardware, pieces=4), drawing.seconds):
                made[case.key] = case
                break
        if draws > _MOST_DRAWS:
            raise CapacityError(
                f"--validate-plan: of {draws} policies drawn, {len(made)} fit and take {drawing.seconds[0]:g} to "
                f"{drawing.seconds[1]:g} s; give more memory, --run-seconds, or other models"
            )
    return list(made.values())


def _at_random(rng: random.Random, compression: Compression) -> Policy:
    return Policy(
        weights=_placement(rng),
        cache=_on_host(rng),
        hidden=_on_host(rng),
        batch_size=rng.choice(_SIZES),
        num_batches=rng.choice(_NUMBERS),
        overlap=rng.random() > 0.15,
        layer_slots=rng.choice((1, 2, 2)),
        compression=compression,
    )


def _placement(rng: random.Random) -> Placement:
    """Whole tenths; one time in three all on one tier."""
    if rng.random() < 1 / 3:
        return Placement.all_on(rng.choice(list(Tier)))
    low, high = sorted(rng.randint(0, 10) for _ in range(2))
    return Placement(device=low / 10, host=(high - low) / 10)


def _on_host(rng: random.Random) -> Placement:
    """Half of the time all on the host, else in tenths on host and disk."""
    return Placement(host=rng.choice((1.0, rng.randint(0, 10) / 10)))


def _is_wanted(run: PlannedRun, seconds: tuple[float, float]) -> bool:
    if not fits(run.peak_bytes, limits_of(run.hardware)):
        return False
    return seconds[0] <= predict(run).seconds <= seconds[1]


def grid(ground: Ground, count: int, hardware: Hardware) -> list[Case]:
    """At most so many of a grid's policies that fit: tiers, shapes of blocks, compressions; which, is chance.

    Raises:
        CapacityError: none fits.
    """
    [subject], [rate] = ground.subjects, ground.disk_limits
    cases = {}
    for weights, cache, (size, number), compression in itertools.product(
        _WEIGHTS, _CACHE, _blocks(subject.job.workload.rows), ground.compressions
    ):
        policy = Policy(
            weights=Placement(device=weights[0] / 100, host=weights[1] / 100), cache=Placement(host=cache / 100),
            hidden=Placement(host=1.0), batch_size=size, num_batches=number, compression=compression,
        )  # fmt: skip
        case = Case(subject, policy, rate, "grid")
        if fits(case.planned(hardware).peak_bytes, limits_of(subject.machine(hardware, rate))):
            cases[case.key] = case
    if not cases:
        raise CapacityError(
            f"--grid: no policy for {subject.job.workload.rows} rows fits; give more memory or fewer rows"
        )
    found = list(cases.values())
    return random.Random(ground.seed).sample(found, min(count, len(found)))  # noqa: S311  no secret


def _blocks(rows: int) -> Iterator[tuple[int, int]]:
    """Shapes of a block of all rows, in at most eight micro-batches, and of half of them."""
    for block in sorted({rows, max(1, rows // 2)}):
        yield from ((block // number, number) for number in (1, 2, 4, 8) if block % number == 0)


def chosen(ground: Ground, hardware: Hardware) -> Case:
    """The policy that the planner chooses for the grid's workload.

    Raises:
        CapacityError: nothing fits.
    """
    [subject], [rate] = ground.subjects, ground.disk_limits
    asked = subject.job.workload
    workload = Planned(asked.prompt_len, asked.new_tokens, asked.rows, asked.lengths)
    freedom = Freedom(compressions=tuple(ground.compressions), host_attention=False)
    made = Planner(subject.shape, subject.machine(hardware, rate), workload, freedom).plan()
    return Case(subject, made.policy, rate, "chosen")


# ---------------------------------------------------------------------------------------------------------- measuring
class Measuring:
    """Measures cases, each once, and keeps what is known already.

    Args:
        run: runs a job under limits, given up after so many seconds, and says what came of it.
        hardware: the machine's profile.
        work_folder: for quantized weights.
        known: records of an earlier call, by key.
        tell: is given each new record as it comes.
        again: if the machine is to be profiled anew after some runs: how, and after how many.
    """

    def __init__(
        self,
        run: Callable[[Job, Limits, float | None], Record],
        hardware: Hardware,
        work_folder: Path,
        known: Mapping[str, Sequence[Record]],
        tell: Callable[[Record], None],
        again: tuple[Callable[[], Hardware], int] | None = None,
    ) -> None:
        self._run, self._hardware, self._folder, self._tell, self._again = run, hardware, work_folder, tell, again
        self._known = {key: list(records) for key, records in known.items()}
        self._done = 0

    def record(self, case: Case, repeat: int = 1, timeout_s: float | None = None) -> Record:
        """What the case's run of this number did, with what is predicted of it.

        It is measured unless it is known. With new profiles in between, what is known keeps its own prediction.
        """
        held = self._known.setdefault(case.key, [])
        known = next((record for record in held if record["repeat"] == repeat), None)
        if known is not None:
            if self._again is not None:
                return known
            return {**known, "validation": {**known["validation"], **self._validated(case)}}
        self._profile_again()
        validated, job = self._validated(case), case.ready(self._folder)
        measured = self._run(job, case.limits, timeout_s)
        profile = self._hardware.to_dict()
        record = {
            "repeat": repeat, "setting": job.setting, **measured, "validation": {**validated, "profile": profile}
        }  # fmt: skip
        held.append(record)
        self._tell(record)
        return record

    def _validated(self, case: Case) -> dict[str, Any]:
        return {"key": case.key, "kind": case.kind, **case.predicted(self._hardware)}

    def _profile_again(self) -> None:
        if self._again is not None and self._done and self._done % self._again[1] == 0:
            self._hardware = self._again[0]()
        self._done += 1

    def best(self, choice: Case, cases: Sequence[Case], repeats: int) -> tuple[list[Record], list[Record]]:
        """The grid beside what was chosen.

        The fastest of the grid and what was chosen run again, in turn, so that the best is not the luckiest of many.

        Returns:
            The records of the choice, and those of the grid, the repeated ones included.
        """
        first = self.record(choice)
        patience = None
        if first["status"] == "ok":
            patience = _GIVEN_UP * (first["load_s"] + first["prefill_s"] + first["decode_s"]) + 30
        of_grid = [(case, self.record(case, timeout_s=patience)) for case in cases]
        done = [(case, record) for case, record in of_grid if record["status"] == "ok"]
        made, others = [first], [record for _, record in of_grid]
        if done:
            fastest, _ = max(done, key=lambda pair: float(pair[1]["tokens_per_s"]))
            for repeat in range(2, repeats + 1):
                made.append(self.record(choice, repeat))
                others.append(self.record(fastest, repeat))
        return made, others


def known_records(file: Path | None) -> dict[str, list[Record]]:
    """The measurements of an earlier call by key, from the file that it has written; failed ones are not known.

    Raises:
        FlexGenError: the file cannot be read.
    """
    found: dict[str, list[Record]] = {}
    if file is None or not file.exists():
        return found
    try:
        lines = file.read_text("utf-8").splitlines()
        records = [json.loads(line) for line in lines if line.strip()]
    except (OSError, ValueError) as error:
        raise FlexGenError(f"--out: cannot go on with {str(file)!r} ({error}); name another file") from error
    for record in records:
        if isinstance(record, dict) and "validation" in record and record["status"] == "ok":
            found.setdefault(record["validation"]["key"], []).append(record)
    return found
