"""On what, with what and by which commit a number was measured."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

from .. import __version__

__all__ = ["commit", "describe_machine", "describe_versions", "now"]

_PACKAGES = ("torch", "transformers", "accelerate", "safetensors")


def describe_machine(folder: Path) -> dict[str, Any]:
    """Processor, cores that may be used, RAM, and what there is of the disk that holds `folder`. JSON values."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    usage = shutil.disk_usage(folder)
    return {
        "cpu": next(names, platform.processor()),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "ram_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "disk_bytes": usage.total,
        "system": platform.platform(),
    }


def describe_versions() -> dict[str, str]:
    """Python's version and those of the packages that matter."""
    versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return {"python": platform.python_version(), "flexgen_hf": __version__, **versions}


def commit() -> str | None:
    """The commit of this package's working tree, with `-dirty` if it has changes; None outside of one."""
    git, here = shutil.which("git"), Path(__file__).parent
    if git is None:
        return None
    described = subprocess.run(  # noqa: S603  a fixed command
        [git, "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
        cwd=here, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return described.stdout.strip() or None


def now() -> str:
    """Date and time in UTC, ISO 8601."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
