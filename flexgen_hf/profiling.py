"""Measures this machine, in less than a minute: a `Hardware` of what the engine's own transfers and products reach.

Every number is the best of a few runs, for what disturbs a run only makes it slower. Disk speeds are those of the
offload folder, past the page cache where it lets that happen.
"""

from __future__ import annotations

import datetime
import functools
import itertools
import platform
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import get_max_memory
from torch.nn import functional

from .planning.budget import rings_of
from .planning.hardware import Curve, Hardware
from .policy import Policy, Tier
from .quantization import dispatch
from .quantization.groupwise import GroupFormat
from .storage.buffers import Buffer
from .storage.files import SpillFile
from .storage.lanes import Lanes
from .storage.ledger import Ledger
from .storage.workspace import Workspace

__all__ = ["measure"]

_MIB = 1 << 20

# Of memory that is free now, this part is planned with: in a moment it may be less.
_PART_OF_FREE_MEMORY = 0.85

# What is moved at a time, from a few tokens of a cell to a piece of weights.
_TRANSFERS = (64 << 10, 1 * _MIB, 8 * _MIB)
_ROWS = (1, 16, 128, 1024)
_WIDTH = 2048

# Each thing is measured for so long, and at least twice.
_SECONDS = 0.3
_SPILL_BYTES = 64 * _MIB


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
        folder: of the disk tier; a file of 64 MiB without a name lives in it meanwhile.
        said: called with what is measured next.
        seconds: for each number; None for 0.3. With 0, each thing is run twice: in a few seconds one gets a rough idea.

    Raises:
        StoreError: the folder cannot be written to.
        CapacityError: it has no room for that file.
    """
    space = Workspace(Ledger(), device, folder, rings_of(Policy()))
    try:
        return _Measuring(space, said, _SECONDS if seconds is None else seconds).hardware()
    finally:
        space.close()


class _Measuring:
    """The measurements of one machine."""

    def __init__(self, space: Workspace, said: Callable[[str], None], seconds: float) -> None:
        self._space, self._device, self._said, self._seconds = space, space.device, said, seconds

    def hardware(self) -> Hardware:
        direct, free = self._space.is_direct, get_max_memory()
        host = int(free["cpu"] * _PART_OF_FREE_MEMORY)
        disk = self._disk()
        self._said("links and memory")
        links = {} if direct else self._links()
        copied = self._copied()
        products = {name: self._products(dtype) for name, dtype in _DTYPES.items()}
        self._said("attention")
        attended = self._attended_bytes_per_s(self._device)
        unpacked, packed = self._packing()
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
            memory_bytes_per_s=2 * copied.points[-1][1],  # smaller ones stay in a cache
            attention_flops=self._attention_flops(),
            attention_bytes_per_s=attended,
            host_attention_bytes_per_s=0.0 if direct else self._attended_bytes_per_s(torch.device("cpu")),
            upcast_bytes_per_s=self._cast_bytes_per_s(),
            unpack_elements_per_s=unpacked,
            pack_elements_per_s=packed,
            unified=direct,
            direct=direct,
            transfer_s=self._transfer_s(),
            compute_s=self._compute_s(),
            sweep_s=self._sweep_s(),
        )
        fields = made.to_dict().keys() - {"format_version", "name", "unified", "direct", "sources"}
        return Hardware.from_dict({**made.to_dict(), "sources": dict.fromkeys(sorted(fields), how)})

    # -------------------------------------------------------------------------------------------------------- transfers
    def _disk(self) -> dict[str, Curve]:
        self._said("disk")
        buffer = Buffer(self._space.ledger, Tier.HOST, self._device, "profiling")
        memory = buffer.ensure(max(_TRANSFERS))
        file = SpillFile(self._space.folder, self._space.ledger, "profiling")
        try:
            start = file.reserve(_SPILL_BYTES)
            moves: dict[str, Callable[[int, int], int]] = {
                "host_to_disk": lambda at, size: file.write_run(at, memory, 0, size),
                "disk_to_host": lambda at, size: file.read_run(at, memory, 0, size),
                "cached_write": lambda at, size: file.write(at, memory[:size]),
                "cached_read": lambda at, size: file.read(at, memory[:size]),
            }
            return {name: self._curve(functools.partial(self._passes, move, start)) for name, move in moves.items()}
        finally:
            file.close()
            buffer.free()

    def _passes(self, move: _Move, start: int, size: int) -> float:
        """Seconds of a request, of many in a row through the file, for a device hides how long the last ones take."""
        count = max(1, min(_SPILL_BYTES // size, 16))
        places = itertools.cycle(range(0, _SPILL_BYTES - size + 1, size))

        def requests() -> None:
            for at in itertools.islice(places, count):
                move(start + at, size)

        return self._best(requests) / count

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

                return self._best(move)

            return one

        return {"host_to_device": self._curve(crossing(True)), "device_to_host": self._curve(crossing(False))}

    def _copied(self) -> Curve:
        def one(size: int) -> float:
            source = torch.zeros(8 * size, dtype=torch.uint8, device=self._device)
            target = torch.zeros_like(source)
            return self._best(lambda: target.copy_(source)) / 8

        return self._curve(one)

    def _cast_bytes_per_s(self) -> float:
        source = torch.zeros(4 * _MIB, dtype=torch.float16, device=self._device)
        target = torch.zeros(4 * _MIB, dtype=torch.float32, device=self._device)
        return 8 * _MIB / self._best(lambda: target.copy_(source))

    def _packing(self) -> tuple[float, float]:
        """Elements per second that are unpacked, and packed."""
        self._said("quantization")
        fmt, threads = GroupFormat(4, 64), torch.get_num_threads()
        dtype = torch.float32 if self._space.is_direct else torch.float16
        states = torch.randn(2048, 1024, device=self._device).to(dtype)
        packed = dispatch.quantize(states, fmt, threads=threads)
        pack = self._best(lambda: dispatch.quantize(states, fmt, threads=threads))
        unpack = self._best(lambda: dispatch.dequantize(packed, fmt, out=states, threads=threads))
        return states.numel() / unpack, states.numel() / pack

    # ---------------------------------------------------------------------------------------------------------- compute
    def _products(self, dtype: torch.dtype) -> Curve:
        self._said(f"matrix products in {str(dtype).removeprefix('torch.')}")
        weight = torch.randn(_WIDTH, _WIDTH, device=self._device).to(dtype)
        points = []
        for rows in _ROWS:
            x = torch.ones(rows, _WIDTH, dtype=dtype, device=self._device)
            points.append((rows, 2.0 * rows * _WIDTH**2 / self._best(functools.partial(functional.linear, x, weight))))
        return Curve(tuple(points))

    def _attention_flops(self) -> float:
        tokens, heads, dim = 256, 16, 64
        x = torch.ones(1, heads, tokens, dim, dtype=self._compute_dtype, device=self._device)
        seconds = self._best(lambda: functional.scaled_dot_product_attention(x, x, x, is_causal=True))
        return 2.0 * heads * tokens**2 * dim / seconds

    def _attended_bytes_per_s(self, device: torch.device) -> float:
        rows, tokens, heads, dim = 8, 512, 16, 64
        keys = torch.ones(rows, heads, tokens, dim, dtype=self._compute_dtype, device=device)
        query = keys[:, :, :1]
        seconds = self._best(lambda: functional.scaled_dot_product_attention(query, keys, keys))
        return 2 * keys.numel() * keys.element_size() / seconds

    @property
    def _compute_dtype(self) -> torch.dtype:
        return torch.float32 if self._space.is_direct else torch.float16

    # -------------------------------------------------------------------------------------------------------- overheads
    def _transfer_s(self) -> float:
        """A lane's wake-up."""
        self._said("overheads")
        with Lanes(["one"]) as lanes:
            return self._best(lambda: lanes.submit("one", "nothing", lambda: 0).wait())

    def _compute_s(self) -> float:
        """About as many small operations as a decoder layer has."""
        x = torch.ones(1, 64, dtype=self._compute_dtype, device=self._device)

        def layer() -> None:
            for _ in range(10):
                functional.silu(functional.layer_norm(x, (64,)) + x)

        return self._best(layer)

    def _sweep_s(self) -> float:
        """The choice of a token for a few rows."""
        logits = torch.zeros(8, 32000, device=self._device)
        return self._best(lambda: int(logits.float().argmax(-1).sum()))

    def _best(self, work: Callable[[], Any]) -> float:
        """The shortest time of several."""
        best, until, runs = float("inf"), time.perf_counter() + self._seconds, 0
        while runs < 2 or time.perf_counter() < until:
            started = time.perf_counter()
            work()
            if self._space.is_asynchronous:
                torch.accelerator.synchronize(self._device)
            best, runs = min(best, time.perf_counter() - started), runs + 1
        return max(best, 1e-9)


#: moves so many bytes at an offset
_Move = Callable[[int, int], int]

_DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16,
}  # fmt: skip
