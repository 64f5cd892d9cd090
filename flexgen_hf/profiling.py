"""Measures this machine, in less than a minute: a `Hardware` of what the engine's own transfers and products reach.

Every number is the best of a few runs, for what disturbs a run only makes it slower. Disk speeds are those of the
offload folder, past the page cache where it lets that happen.
"""

from __future__ import annotations

import datetime
import functools
import itertools
import os
import platform
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate.utils import get_max_memory

from .planning.budget import rings_of
from .planning.hardware import Curve, Hardware
from .policy import Policy, Tier
from .profiled_compute import SECONDS, Compute, median_of
from .storage.buffers import Buffer, host_memory, return_freed_memory
from .storage.files import SpillFile
from .storage.lanes import Lanes, Ticket
from .storage.ledger import Ledger
from .storage.workspace import Workspace

__all__ = ["measure"]

_MIB = 1 << 20

# Of memory that is free now, this part is planned with: in a moment it may be less.
_PART_OF_FREE_MEMORY = 0.85

# What is moved at a time, from a few tokens of a cell to a piece of weights.
_TRANSFERS = (64 << 10, 1 * _MIB, 8 * _MIB)
_SPILL_BYTES = 64 * _MIB

# Where in memory requests go, of which two are at work at a time.
_PLACES = (0, max(_TRANSFERS))

# As much as a small run uses.
_FRESH_BYTES = 256 * _MIB


def measure(
    device: torch.device,
    folder: Path,
    said: Callable[[str], None] = lambda _: None,
    *,
    seconds: float | None = None,
) -> Hardware:
    """Measures a device of this machine and the disk under a folder.

    Args:
        device: where models compute.
        folder: of the disk tier; a file of 64 MiB without a name and two tiny models live in it meanwhile.
        said: called with what is measured next.
        seconds: for each number; None for 0.3 s. With 0, each thing is run twice and timed once, for a rough idea.

    Raises:
        StoreError: the folder cannot be written to.
        CapacityError: it has no room for that file.
    """
    space = Workspace(Ledger(), device, folder, rings_of(Policy()))
    try:
        return _Measuring(space, said, SECONDS if seconds is None else seconds).hardware()
    finally:
        space.close()


class _Measuring:
    """The measurements of one machine."""

    def __init__(self, space: Workspace, said: Callable[[str], None], seconds: float) -> None:
        self._space, self._device, self._said, self._seconds = space, space.device, said, seconds
        self._median = functools.partial(
            median_of, device=space.device, seconds=seconds, is_asynchronous=space.is_asynchronous
        )

    def hardware(self) -> Hardware:
        direct, free = self._space.is_direct, get_max_memory()
        host = int(free["cpu"] * _PART_OF_FREE_MEMORY)
        if direct:  # as a run with a limit on its memory does; before the heap has room that would be used instead
            return_freed_memory()
        disk = self._disk()
        self._said("links and memory")
        fresh = self._fresh_bytes_per_s(host) if direct else 0.0
        links = {} if direct else self._links()
        copied = self._copied()
        compute = Compute(self._space, self._seconds)
        self._said("matrix products")
        products = compute.products()
        cast, tiled = (compute.cast_products(), compute.packed_products()) if direct else (None, None)
        self._said("attention and quantization")
        unpacked, packed = compute.packing()
        self._said("overheads")
        beside = compute.overheads(self._space.folder, products, cast)
        today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
        how = f"measured by flexgen-hf profile on {today}, torch {torch.__version__}"
        made = Hardware(
            name=f"{platform.node() or 'this machine'}, {self._device.type}",
            device_bytes=host if direct else int(free.get(self._device.index or 0, 0) * _PART_OF_FREE_MEMORY) or host,
            host_bytes=host,
            disk_bytes=int(shutil.disk_usage(self._space.folder).free),
            disk_to_host=disk["disk_to_host"],
            host_to_disk=disk["host_to_disk"],
            cached_read=disk["cached_read"],
            cached_write=disk["cached_write"],
            host_to_device=links.get("host_to_device", copied),
            device_to_host=links.get("device_to_host", copied),
            matmul_flops=products,
            fresh_bytes_per_s=fresh,
            memory_bytes_per_s=2 * copied.points[-1][1],  # smaller ones stay in a cache
            attention_flops=compute.attention_flops(),
            attention_bytes_per_s=compute.attended_bytes_per_s(self._device),
            moved_attention_bytes_per_s=compute.attended_bytes_per_s(self._device, by_heads=False),
            host_attention_bytes_per_s=0.0 if direct else compute.attended_bytes_per_s(torch.device("cpu")),
            upcast_bytes_per_s=compute.cast_bytes_per_s(),
            unpack_elements_per_s=unpacked,
            pack_elements_per_s=packed,
            cast_flops=cast,
            packed_flops=tiled,
            packed_attention_elements_per_s=compute.packed_attention_elements_per_s() if direct else 0.0,
            packed_attention_s=beside.packed_s,
            element_bytes_per_s=compute.element_bytes_per_s(),
            unified=direct,
            direct=direct,
            transfer_s=self._transfer_s(),
            compute_s=beside.layer_s,
            stage_s=beside.stage_s,
            forward_s=beside.forward_s,
            tile_s=beside.tile_s,
            sweep_s=beside.sweep_s,
            cores=_cores() if direct else 0,
            threads=torch.get_num_threads(),
        )
        fields = made.to_dict().keys() - {"format_version", "name", "unified", "direct", "sources"}
        return Hardware.from_dict({**made.to_dict(), "sources": dict.fromkeys(sorted(fields), how)})

    # -------------------------------------------------------------------------------------------------------- transfers
    def _disk(self) -> dict[str, Curve]:
        self._said("disk")
        buffer = Buffer(self._space.ledger, Tier.HOST, self._device, "profiling")
        memory = buffer.ensure(len(_PLACES) * max(_TRANSFERS))
        file = SpillFile(self._space.folder, self._space.ledger, "profiling")
        try:
            start = file.reserve(_SPILL_BYTES)
            moves: dict[str, _Move] = {
                "host_to_disk": lambda at, place, size: file.write_run(at, memory, place, size),
                "disk_to_host": lambda at, place, size: file.read_run(at, memory, place, size),
                "cached_write": lambda at, place, size: file.write(at, memory[place : place + size]),
                "cached_read": lambda at, place, size: file.read(at, memory[place : place + size]),
            }
            with Lanes(moves, workers={"disk_to_host": 2}) as lanes:  # as a run has
                submits = {name: functools.partial(lanes.submit, name) for name in moves}
                return {
                    name: self._curve(functools.partial(self._passes, submits[name], move, start))
                    for name, move in moves.items()
                }
        finally:
            file.close()
            buffer.free()

    def _passes(self, submit: Callable[[str, Callable[[], int]], Ticket], move: _Move, start: int, size: int) -> float:
        """Seconds of a request, of many in a row through the file, for a device hides how long the last ones take."""
        count = max(1, min(_SPILL_BYTES // size, 16))
        offsets = itertools.cycle(range(0, _SPILL_BYTES - size + 1, size))
        places = itertools.cycle(_PLACES)

        def requests() -> None:
            tickets = [
                submit("a request", functools.partial(move, start + at, next(places), size))
                for at in itertools.islice(offsets, count)
            ]
            for ticket in tickets:
                ticket.wait()

        return self._median(requests) / count

    def _curve(self, seconds_per_request: Callable[[int], float]) -> Curve:
        return Curve(tuple((size, size / seconds_per_request(size)) for size in _TRANSFERS))

    def _links(self) -> dict[str, Curve]:
        """Between host and device, as the engine copies."""

        def crossing(to_device: bool) -> Callable[[int], float]:
            def one(size: int) -> float:
                near = torch.zeros(size, dtype=torch.uint8)
                far = torch.zeros(size, dtype=torch.uint8, device=self._device)
                target, source = (far, near) if to_device else (near, far)

                def move() -> None:
                    self._space.copy(target, source)
                    self._space.finish_copies()

                return self._median(move)

            return one

        return {"host_to_device": self._curve(crossing(True)), "device_to_host": self._curve(crossing(False))}

    def _fresh_bytes_per_s(self, free: int) -> float:
        """Of memory that the system has to find, once: what it gave back comes faster the second time."""
        size = min(_FRESH_BYTES, free // 4)
        started = time.perf_counter()
        host_memory(size).fill_(1)
        return size / (time.perf_counter() - started)

    def _copied(self) -> Curve:
        def one(size: int) -> float:
            source = torch.zeros(8 * size, dtype=torch.uint8, device=self._device)
            target = torch.zeros_like(source)
            return self._median(lambda: target.copy_(source)) / 8

        return self._curve(one)

    # -------------------------------------------------------------------------------------------------------- overheads
    def _transfer_s(self) -> float:
        """A lane's wake-up."""
        with Lanes(["one"]) as lanes:
            return self._median(lambda: lanes.submit("one", "nothing", lambda: 0).wait())


def _cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


#: moves, at an offset of the file and a place in memory, so many bytes
_Move = Callable[[int, int, int], int]
