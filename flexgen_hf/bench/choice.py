"""`bench --policy auto`: the policy that the planner finds for a model, a workload and the limits of a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from ..errors import PolicyError
from ..planning.hardware import Hardware
from ..planning.plan import Freedom, Plan
from ..planning.search import Planner
from ..planning.workload import Workload as Planned
from ..policy import Tier
from .limits import Limits
from .systems import Job
from .validation import PROCESS_BYTES, Subject

__all__ = ["chosen_for", "machine_here", "profile_of", "with_plan"]


def profile_of(file: Path, threads: int | None) -> Hardware:
    """What `flexgen-hf profile` wrote.

    Raises:
        PolicyError: it was measured with another number of threads than runs are to have.
        StoreError: it cannot be read.
    """
    machine = Hardware.load(file)
    if threads is not None and machine.threads != threads:
        raise PolicyError(
            f"--hardware: {str(file)!r} was measured with {machine.threads} threads, not with --threads {threads}; "
            f"measure again with 'flexgen-hf profile --threads {threads}'"
        )
    return machine


def machine_here(
    file: Path | None, device: str, threads: int | None, work_folder: Path, said: Callable[[str], None]
) -> Hardware:
    """The machine that is given; else this one, as it was measured once.

    Args:
        file: what `flexgen-hf profile` wrote.
        device: where runs compute.
        threads: of torch's arithmetic.
        work_folder: whose disk is measured.
        said: called with a line before the machine is measured.

    Raises:
        PolicyError: a device that cannot be measured, or a file for another number of threads.
        StoreError: a file that cannot be read.
    """
    if device.startswith("emulated"):
        raise PolicyError("--policy auto: the emulated device is no machine that 'profile' measures; give percentages")
    if file is not None:
        return profile_of(file, threads)
    import torch

    from ..profile_cache import hardware_here

    if threads is not None:
        torch.set_num_threads(threads)
    return hardware_here(torch.device(device), work_folder, said)


def chosen_for(job: Job, limits: Limits, hardware: Hardware, freedom: Freedom) -> Plan:
    """The plan for our system's run.

    Args:
        job: with the rows of its workload, and with `max_memory` if there is to be one.
        limits: of the run.
        hardware: the machine, without them.
        freedom: what may be chosen.

    Raises:
        CapacityError: nothing fits.
    """
    subject, asked = Subject.of(job, limits.memory_bytes), job.workload
    machine = hardware.with_disk_limit(limits.read_bytes_per_s, limits.write_bytes_per_s)
    machine = subject.machine(machine, None)
    given = {Tier.of(tier): size for tier, size in (job.flexgen.get("max_memory") or {}).items()}
    room = {Tier.DEVICE: machine.device_bytes, Tier.HOST: machine.host_bytes, Tier.DISK: machine.disk_bytes}
    least = {tier: min(size, given.get(tier, size)) for tier, size in room.items()}
    machine = machine.within(least, least[Tier.HOST] if machine.unified else None)
    workload = Planned(asked.prompt_len, asked.new_tokens, asked.rows, asked.lengths)
    return Planner(subject.shape, machine, workload, freedom).plan()


def with_plan(job: Job, plan: Plan, limits: Limits) -> Job:
    """The job under the policy that was found, in as much RAM as the limit on memory leaves, if it is not told less."""
    flexgen = {**job.flexgen, "policy": plan.policy.to_dict()}
    if plan.policy.compression:
        flexgen["compression"] = plan.policy.compression.to_dict()
    if limits.memory_bytes is not None and job.device.name == "cpu" and not flexgen.get("max_memory"):
        flexgen["max_memory"] = {"cpu": limits.memory_bytes - PROCESS_BYTES}
    return dataclasses.replace(job, flexgen=flexgen)
