"""This machine as it was measured once, kept in Hugging Face's cache of assets; measured anew when it has changed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import platform
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import cached_assets_path

from .errors import FlexGenError
from .planning.hardware import FORMAT_VERSION, Hardware
from .profiling import measure

__all__ = ["hardware_here", "machine_of"]

logger = logging.getLogger(__name__)


def hardware_here(device: torch.device, folder: Path, said: Callable[[str], None] = lambda _: None) -> Hardware:
    """What was measured of this machine, or what is measured of it now, in less than a minute.

    Args:
        device: where models compute.
        folder: of the disk tier, whose disk is measured.
        said: called with a line before the machine is measured.

    Raises:
        StoreError: the folder cannot be written to.
        CapacityError: it has no room for what is written to measure it.
    """
    machine = machine_of(device, folder)
    file = _file(machine)
    if (known := _read(file, machine)) is not None:
        return known
    said(f"measuring this machine once, in less than a minute; kept in {file or 'no file, for no folder can be made'}")
    made = measure(device, folder)
    if file is not None:
        _write(file, {"machine": machine, "hardware": made.to_dict()})
    return made


def machine_of(device: torch.device, folder: Path) -> dict[str, Any]:
    """What a profile depends on; where any of it differs, another one is made. JSON values."""
    names = (line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name"))
    return {
        "format": FORMAT_VERSION,
        "node": platform.node(),
        "cpu": next(names, platform.processor()),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "ram_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "torch": torch.__version__,
        "device": str(device),
        "device_name": _name_of(device),
        "disk": _disk_of(folder),
    }


def _name_of(device: torch.device) -> str:
    """Of an accelerator, what its driver calls it."""
    ask = getattr(getattr(torch, device.type, None), "get_device_name", None)
    return str(ask(device)) if ask is not None else device.type


def _disk_of(folder: Path) -> str:
    """What is mounted where a folder is, or will be: device, kind of file system and place."""
    path = folder.expanduser().absolute()
    while not path.exists():
        path = path.parent
    path = path.resolve()
    best = ""
    found = str(path.stat().st_dev)
    for line in _lines("/proc/self/mountinfo"):
        fields, _, rest = line.partition(" - ")
        place, kind = fields.split()[4], rest.split()
        if path.is_relative_to(place) and len(place) >= len(best) and len(kind) > 1:
            best, found = place, f"{kind[1]} {kind[0]} {place}"
    return found


def _lines(file: str) -> list[str]:
    try:
        return Path(file).read_text("utf-8", errors="replace").splitlines()
    except OSError:
        return []


# ------------------------------------------------------------------------------------------------------------ the file
def _file(machine: dict[str, Any]) -> Path | None:
    """Where the profile of a machine is kept; None if there is no place for it."""
    digest = hashlib.sha256(json.dumps(machine, sort_keys=True).encode()).hexdigest()[:16]
    try:
        return Path(cached_assets_path("flexgen_hf", namespace="profiles", subfolder="default")) / f"{digest}.json"
    except OSError:
        return None


def _read(file: Path | None, machine: dict[str, Any]) -> Hardware | None:
    """The profile in a file; None if there is none, or none of this machine, or none that can be read."""
    if file is None:
        return None
    try:
        kept = json.loads(file.read_text("utf-8"))
        return Hardware.from_dict(kept["hardware"]) if kept["machine"] == machine else None
    except (OSError, ValueError, KeyError, TypeError, FlexGenError):
        return None


def _write(file: Path, content: dict[str, Any]) -> None:
    """Keeps a profile, whole or not at all: another process may read or write it at the same time."""
    temporary = None
    try:
        with tempfile.NamedTemporaryFile("w", dir=file.parent, suffix=".tmp", delete=False, encoding="utf-8") as made:
            temporary = Path(made.name)
            made.write(json.dumps(content, indent=2))
        temporary.replace(file)
    except OSError as error:
        logger.warning("the profile of this machine cannot be kept in %s (%s); it will be measured again", file, error)
        if temporary is not None:
            with contextlib.suppress(OSError):
                temporary.unlink()
