"""`bench --validate-plan`, from options to tables."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import typer

from ..errors import PolicyError
from ..planning.hardware import Hardware
from ..planning.search import compressions_of
from .agreement import choice_table, table_of_policies
from .choice import profile_of
from .limits import Limits, why_not_permitted
from .sizes import Size, parse_size, parse_sum
from .systems import DeviceSpec, Job
from .trial import Bench, Record
from .validation import PROCESS_BYTES, Drawing, Ground, Measuring, Subject, chosen, drawn, grid, known_records
from .workload import BenchWorkload

__all__ = ["Asked", "validate"]

_MODELS = "opt-125m,opt-1.3b:4"
_MODEL_OF_GRID = "opt-1.3b:4"
_DISK_LIMITS = "none,100MB/s,300MB/s"
_COUNT, _COUNT_OF_GRID = 24, 32

# Not all of a model fits, and files that are read in passing find little room in the page cache.
_MEMORY = Size(PROCESS_BYTES + 200_000_000, 1.0)


@dataclasses.dataclass(frozen=True)
class Asked:
    """The options of a call, as they were written; None is what nothing was said of. `bench --help` explains them."""

    models: str | None = None
    is_grid: bool = False
    policies: int | None = None
    rows: int = 16
    prompt_len: int = 128
    new_tokens: int = 16
    seed: int = 0
    dtype: str = "float32"
    threads: int | None = None
    device: str = "cpu"
    compression: str | None = None
    memory_limit: str | None = None
    disk_limits: str | None = None
    time_limit: float | None = None
    run_seconds: str = "4-30"
    hardware: Path | None = None
    profile_every: int | None = None
    repeats: int = 3
    out: Path | None = None


def validate(
    asked: Asked, work_folder: Path, model_folder: Callable[[str], Path], tell: Callable[[Record], None]
) -> None:
    """Measures policies beside what `plan` says of them, and prints tables in Markdown.

    Args:
        asked: the options.
        work_folder: for weights and files.
        model_folder: finds a model by its name, or makes it.
        tell: is given each record as it comes.

    Raises:
        PolicyError: an option that cannot be meant.
        CapacityError: limits that cannot be set here, or under which nothing fits.
        StoreError: no such model or profile.
        FlexGenError: `--out` cannot be read.
    """
    if asked.device.startswith("emulated"):
        raise PolicyError("--device: the emulated device is no machine that 'profile' measures; use cpu or cuda:0")
    names = [name.strip() for name in (asked.models or (_MODEL_OF_GRID if asked.is_grid else _MODELS)).split(",")]
    rates, memory, seconds = _disk_limits(asked), _memory(asked), _seconds(asked.run_seconds)
    if asked.is_grid and (len(names) > 1 or len(rates) > 1):
        raise PolicyError("--grid is for one model and one --read-limit; give one of each")
    if asked.profile_every is not None and asked.hardware is not None:
        raise PolicyError("--profile-every measures the machine, --hardware says what it is; give one of them")
    compressions = compressions_of(asked.compression or "any")
    known = known_records(asked.out)
    models = [model_folder(name) for name in names]
    machine = _machine(asked, work_folder, known)
    subjects = [_subject(asked, model, work_folder, memory, machine.threads) for model in models]
    ground = Ground(subjects, rates, compressions, asked.seed)
    bench = Bench(work_folder, Limits(), asked.time_limit, {"command": shlex.join(["flexgen-hf", *sys.argv[1:]])})

    def run(job: Job, limits: Limits, timeout_s: float | None) -> Record:
        patience = bench.timeout_s if bench.timeout_s is not None else timeout_s
        return dataclasses.replace(bench, limits=limits, timeout_s=patience).run(job)

    again = None if asked.profile_every is None else (lambda: _measured(asked, work_folder), asked.profile_every)
    measuring = Measuring(run, machine, work_folder, known, tell, again)
    if asked.is_grid:
        choice = chosen(ground, machine)
        cases = grid(ground, asked.policies or _COUNT_OF_GRID, machine)
        typer.echo(choice_table(*measuring.best(choice, cases, asked.repeats)))
        return
    cases = drawn(ground, Drawing(asked.policies or _COUNT, seconds), machine)
    typer.echo(table_of_policies([measuring.record(case) for case in cases]))


def _disk_limits(asked: Asked) -> list[int | None]:
    if asked.disk_limits is None:
        if asked.is_grid or why_not_permitted() is not None:
            return [None]
        return _disk_limits(dataclasses.replace(asked, disk_limits=_DISK_LIMITS))
    words = [word.strip() for word in asked.disk_limits.split(",")]
    return list(dict.fromkeys(None if word == "none" else parse_size(word, "--read-limit") for word in words))


def _seconds(text: str) -> tuple[float, float]:
    first, dash, last = text.partition("-")
    try:
        bounds = float(first), float(last)
    except ValueError:
        bounds = (1.0, 0.0)
    if not dash or not 0 <= bounds[0] < bounds[1]:
        raise PolicyError(f"--run-seconds: {text!r} is no range; write for example '4-30'")
    return bounds


def _memory(asked: Asked) -> Size | None:
    given = parse_sum(asked.memory_limit, "--memory-limit")
    return _MEMORY if given is None and why_not_permitted() is None else given


def _machine(asked: Asked, work_folder: Path, known: dict[str, list[Record]]) -> Hardware:
    """The profile that is given; else the one with which the file of records began; else a new one."""
    if asked.hardware is not None:
        return profile_of(asked.hardware, asked.threads)
    profiles = [record["validation"]["profile"] for records in known.values() for record in records]
    if profiles:
        return Hardware.from_dict(profiles[0])
    return _measured(asked, work_folder)


def _measured(asked: Asked, work_folder: Path) -> Hardware:
    import torch

    from ..profiling import measure

    if asked.threads is not None:
        torch.set_num_threads(asked.threads)
    return measure(torch.device(asked.device), work_folder, lambda what: typer.echo(f"measuring {what}", err=True))


def _subject(asked: Asked, model: Path, work_folder: Path, memory: Size | None, threads: int) -> Subject:
    job = Job(
        system="flexgen",
        model=str(model),
        workload=BenchWorkload(asked.prompt_len, asked.new_tokens, asked.rows, asked.seed),
        dtype=asked.dtype,
        offload_folder=str(work_folder),
        device=DeviceSpec(asked.device),
        threads=threads,
    )
    return Subject.of(job, None if memory is None else memory.of(model))
