"""One run in a process of its own, under limits, with a cold page cache. Its record is JSON, errors included."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flexgen_hf

from . import machine
from .limits import ControlGroup, Limits, drop_page_cache
from .systems import Job

__all__ = ["Bench", "Record"]

#: a run as one JSON object; `status` is `"ok"` or `"error"`
Record = dict[str, Any]

# of what a process said before it died
_LAST_WORDS = 600


@dataclasses.dataclass(frozen=True)
class Bench:
    """Where and under which conditions jobs run.

    Args:
        work_folder: holds the systems' files while they run.
        limits: for each run; needs root.
        timeout_s: a run that takes longer is ended; None waits.
        context: goes into every record: the command line, ...
    """

    work_folder: Path
    limits: Limits
    timeout_s: float | None = None
    context: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def run(self, job: Job) -> Record:
        """Runs a job and says what came of it. A failed run is a record too.

        Raises:
            CapacityError: the limits cannot be set here.
        """
        drop_page_cache([Path(job.folder)], everything=bool(self.limits))
        with contextlib.ExitStack() as stack:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="offload-", dir=self.work_folder))
            group = self._group(job, stack)
            result = self._run(dataclasses.replace(job, offload_folder=folder), group)
            if group is not None:
                result["group_peak_bytes"] = group.peak_bytes
        return self._describe(job) | result

    def _group(self, job: Job, stack: contextlib.ExitStack) -> ControlGroup | None:
        if not self.limits:
            return None
        return stack.enter_context(ControlGroup(self.limits, [self.work_folder, Path(job.folder)]))

    def _run(self, job: Job, group: ControlGroup | None) -> Record:
        command = [sys.executable, "-m", "flexgen_hf.bench.worker"]
        try:
            done = subprocess.run(  # noqa: S603  this interpreter
                group.command(command) if group is not None else command,
                input=job.to_json(), capture_output=True, text=True, check=False, env=_environment(),
                timeout=self.timeout_s,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return {"status": "error", "error": f"took longer than {self.timeout_s:g} s"}
        killed = group is not None and group.out_of_memory_kills > 0
        return self._result(done, killed)

    def _result(self, done: subprocess.CompletedProcess[str], was_out_of_memory: bool) -> Record:
        lines = done.stdout.splitlines()
        if done.returncode == 0 and lines:
            result: Record = json.loads(lines[-1])
            return {"status": "error" if "error" in result else "ok"} | result
        if was_out_of_memory and self.limits.memory_bytes is not None:
            error = f"killed: needs more than the memory limit of {self.limits.memory_bytes / 1e6:.0f} MB"
        elif done.returncode < 0:
            error = f"killed by {signal.Signals(-done.returncode).name}"
        else:
            error = f"exit code {done.returncode}: {' '.join(done.stderr[-_LAST_WORDS:].split())}"
        return {"status": "error", "error": error}

    def _describe(self, job: Job) -> Record:
        described = json.loads(job.to_json())
        del described["offload_folder"]
        return {
            "date": machine.now(),
            **self.context,
            **described,
            "limits": dataclasses.asdict(self.limits),
            "commit": machine.commit(),
            "hardware": machine.describe_machine(self.work_folder),
            "versions": machine.describe_versions(),
        }


def _environment() -> dict[str, str]:
    # the working tree that runs now is the one to measure, installed or not
    root = str(Path(flexgen_hf.__file__).parent.parent)
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "TQDM_DISABLE": "1"}
