"""Speeds and capacities of a machine, measured or from documents; a JSON file of them; presets of known machines.

A *curve* is a speed as measured at several sizes. Knows nothing of models.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import PolicyError, StoreError
from ..policy import Tier
from .schedule import Lane

__all__ = ["FORMAT_VERSION", "Curve", "Hardware", "constant"]

#: goes up when fields change their meaning
FORMAT_VERSION = 1


@dataclasses.dataclass(frozen=True)
class Curve:
    """A speed that depends on a size: points `(size, speed)`, between which it is interpolated on logarithmic scales.

    Args:
        points: by increasing size; below the first and above the last the speed is theirs.

    Raises:
        PolicyError: no points, or sizes and speeds that are not positive numbers in increasing order of size.

    >>> Curve(((1, 10.0), (100, 1000.0))).at(10)
    100.0
    """

    points: tuple[tuple[float, float], ...]

    def __post_init__(self) -> None:
        points = tuple((_positive(size, "a size"), _positive(speed, "a speed")) for size, speed in self.points)
        if not points or any(a[0] >= b[0] for a, b in itertools.pairwise(points)):
            raise PolicyError(
                f"hardware: the points {list(points)} are not in order of their sizes; give each size once"
            )
        object.__setattr__(self, "points", points)

    def at(self, size: float) -> float:
        """The speed at a size."""
        points = self.points
        if size <= points[0][0] or len(points) == 1:
            return points[0][1]
        for (low, slow), (high, fast) in itertools.pairwise(points):
            if size <= high:
                share = math.log(size / low) / math.log(high / low)
                return round(math.exp(math.log(slow) + share * math.log(fast / slow)), 6)
        return points[-1][1]

    def at_most(self, speed: float) -> Curve:
        """The same curve with no point above a speed."""
        return Curve(tuple((size, min(own, speed)) for size, own in self.points))

    @property
    def best(self) -> float:
        """The highest speed."""
        return max(speed for _, speed in self.points)


def constant(speed: float) -> Curve:
    """A speed that is the same at all sizes."""
    return Curve(((1, speed),))


@dataclasses.dataclass(frozen=True)
class Hardware:
    """What a machine can hold and how fast it is. Bytes, seconds, and floating-point operations, no multiples of them.

    Args:
        name: for messages.
        device_bytes: memory of the compute device that is free for a model.
        host_bytes: RAM that is free for a model; with `unified`, of both together.
        disk_bytes: room on the disk.
        unified: device and host are one memory.
        direct: what is more, compute works where things lie on the host, as a CPU does.
        disk_to_host: reads past the page cache, by bytes of a request.
        host_to_disk: writes past it.
        disk_read_limit: bytes per second that reads may reach on average, by a control group or a rented disk; 0 is no
            limit.
        disk_write_limit: the same of writes.
        host_to_device: the link to the device.
        device_to_host: the link back.
        matmul_flops: products of matrices by rows, for each type of element.
        memory_bytes_per_s: the device's own memory.
        attention_flops: products of attention over a prompt, on the device.
        attention_bytes_per_s: keys and values that attention of single tokens goes through on the device.
        moved_attention_bytes_per_s: the same of cells that are not kept where and as they are attended to, which lie
            token by token; 0 if that is not known.
        host_attention_bytes_per_s: the same on the host; 0 if that is not known.
        upcast_bytes_per_s: 16-bit weights that are cast for compute in 32 bit, by a lane.
        unpack_elements_per_s: elements of 4 bits that are unpacked where compute is.
        pack_elements_per_s: elements that are packed into 4 bits there.
        cast_flops: products in 32 bit with 16-bit matrices, cast tile by tile for it, by rows; None if it is not known.
        packed_flops: the same with matrices in 4 bits.
        tile_s: of such a product, beside what these say; 0 if that is not known.
        packed_attention_elements_per_s: keys and values in 4 bits that attention of single tokens goes through; 0 if
            that is not known.
        packed_attention_s: of a layer of one micro-batch with keys and values in 4 bits, beside going through them.
        element_bytes_per_s: read and written where hidden states are gone through element by element and each result
            is put into new memory, by the bytes of a result; None if it is not known.
        fresh_bytes_per_s: memory of the host that is used for the first time, which takes a virtual machine long; 0 if
            it is not known.
        cached_read: reads from the page cache, for comparison; None if it was not measured.
        cached_write: writes into it.
        transfer_s: of a transfer, beside what it moves.
        compute_s: of a layer of one micro-batch, beside its products.
        stage_s: of a layer whose weights were brought, before its first micro-batch; 0 if that is not known.
        forward_s: of a micro-batch in a sweep, beside its layers; 0 if that is not known.
        sweep_s: of a sweep, for what happens between two: choosing tokens, masks.
        cores: of the processor, which compute and lanes that cast or unpack share; 0 where lanes take no time of
            compute's.
        threads: of compute, with which this was measured; of interest where there are `cores`.
        sources: where each number is from.

    Raises:
        PolicyError: a number that cannot be meant.
    """

    name: str
    device_bytes: int
    host_bytes: int
    disk_bytes: int
    disk_to_host: Curve
    host_to_disk: Curve
    host_to_device: Curve
    device_to_host: Curve
    matmul_flops: Mapping[str, Curve]
    memory_bytes_per_s: float
    attention_flops: float
    attention_bytes_per_s: float
    host_attention_bytes_per_s: float
    upcast_bytes_per_s: float
    unpack_elements_per_s: float
    pack_elements_per_s: float
    cast_flops: Curve | None = None
    packed_flops: Curve | None = None
    tile_s: float = 0.0
    moved_attention_bytes_per_s: float = 0.0
    packed_attention_elements_per_s: float = 0.0
    packed_attention_s: float = 0.0
    element_bytes_per_s: Curve | None = None
    fresh_bytes_per_s: float = 0.0
    disk_read_limit: float = 0.0
    disk_write_limit: float = 0.0
    unified: bool = False
    direct: bool = False
    cached_read: Curve | None = None
    cached_write: Curve | None = None
    transfer_s: float = 0.0
    compute_s: float = 0.0
    stage_s: float = 0.0
    forward_s: float = 0.0
    sweep_s: float = 0.0
    cores: int = 0
    threads: int = 1
    sources: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in _CURVES:
                if value is not None or _is_required(field):
                    object.__setattr__(self, field.name, _curve(value, field.name))
            elif field.name in _MAY_BE_ZERO:
                _number(value, field.name)
            elif field.name.endswith(("_bytes", "_flops", "_per_s", "threads")) and field.name != "matmul_flops":
                _positive(value, field.name)
        object.__setattr__(self, "matmul_flops", _curves_of_types(self.matmul_flops))
        if not isinstance(self.sources, Mapping):
            raise PolicyError("hardware: sources is not an object of texts")
        if not (isinstance(self.unified, bool) and isinstance(self.direct, bool)) or self.direct > self.unified:
            raise PolicyError("hardware: unified and direct are true or false, and direct only with unified")
        unknown = sorted(set(self.sources) - {field.name for field in dataclasses.fields(self)})
        if unknown:
            raise PolicyError(f"hardware: a source is given for {unknown[0]!r}, which is no field; {_known_fields()}")

    def link(self, lane: Lane) -> Curve:
        """The speed of a lane that moves bytes, by bytes of a transfer; of a limited disk, what it keeps up."""
        return self._links[lane]

    @functools.cached_property
    def _links(self) -> dict[Lane, Curve]:
        curves: dict[Lane, Curve] = {lane: getattr(self, lane.value) for lane in Lane if lane is not Lane.COMPUTE}
        for lane in self.limited_lanes:
            curves[lane] = curves[lane].at_most(self._disk_limits[lane])
        return curves

    @property
    def _disk_limits(self) -> dict[Lane, float]:
        return {Lane.DISK_TO_HOST: self.disk_read_limit, Lane.HOST_TO_DISK: self.disk_write_limit}

    @property
    def limited_lanes(self) -> list[Lane]:
        """Those of a disk that is used with a limit."""
        return [lane for lane, limit in self._disk_limits.items() if limit]

    def cores_of(self, lane: Lane) -> int:
        """Cores that a lane at work keeps busy, of those that all share: a transfer from or to the disk nearly none."""
        if not self.cores or lane in (Lane.DISK_TO_HOST, Lane.HOST_TO_DISK):
            return 0
        return min(self.threads, self.cores) if lane is Lane.COMPUTE else 1

    @functools.cached_property
    def parts_of_cores(self) -> dict[Lane, float]:
        """The part of the cores that each lane at work keeps busy; nothing where lanes share none."""
        return {lane: self.cores_of(lane) / self.cores for lane in Lane} if self.cores else {}

    def shared_s(self, seconds: Mapping[Lane, float]) -> float:
        """The shortest time in which the cores can do all that lanes want of them.

        Args:
            seconds: of each lane alone.
        """
        return sum(part * seconds[lane] for lane, part in self.parts_of_cores.items())

    def matmul(self, dtype: str, rows: float) -> float:
        """Floating-point operations per second of a product with so many rows; of an unknown type, the slowest's."""
        curve = self.matmul_flops.get(dtype) or min(self.matmul_flops.values(), key=lambda c: c.best)
        return curve.at(rows)

    @property
    def capacities(self) -> dict[tuple[Tier, ...], int]:
        """The most that tiers may hold; device and host together where they are one memory."""
        if self.unified:
            return {(Tier.DEVICE, Tier.HOST): self.host_bytes, (Tier.DISK,): self.disk_bytes}
        return {(Tier.DEVICE,): self.device_bytes, (Tier.HOST,): self.host_bytes, (Tier.DISK,): self.disk_bytes}

    def within(self, limits: Mapping[Tier, int], shared: int | None = None) -> Hardware:
        """The machine with less memory, as `max_memory` says.

        Args:
            limits: the most of each tier.
            shared: the most of device and host together, where they are one memory.
        """
        host = limits.get(Tier.HOST, self.host_bytes)
        return dataclasses.replace(
            self,
            device_bytes=limits.get(Tier.DEVICE, self.device_bytes),
            host_bytes=shared if shared is not None else host,
            disk_bytes=limits.get(Tier.DISK, self.disk_bytes),
        )

    def with_disk_limit(self, read_bytes_per_s: float | None, write_bytes_per_s: float | None) -> Hardware:
        """The machine with a disk that moves no more than this on average; None is no limit.

        Raises:
            PolicyError: a limit of nothing.
        """
        for limit in (read_bytes_per_s, write_bytes_per_s):
            if limit is not None:
                _positive(limit, "a limit of the disk")
        return dataclasses.replace(
            self, disk_read_limit=read_bytes_per_s or 0.0, disk_write_limit=write_bytes_per_s or 0.0
        )

    # ------------------------------------------------------------------------------------------------------- as JSON
    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `from_dict` is the way back."""
        made: dict[str, Any] = {"format_version": FORMAT_VERSION}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Curve):
                made[field.name] = [list(point) for point in value.points]
            elif field.name == "matmul_flops":
                made[field.name] = {dtype: [list(p) for p in curve.points] for dtype, curve in value.items()}
            else:
                made[field.name] = dict(value) if isinstance(value, Mapping) else value
        return made

    def to_json(self) -> str:
        """`to_dict` as indented JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Hardware:
        """The inverse of `to_dict`.

        Raises:
            PolicyError: a field that is unknown, missing or cannot be meant, or another version of the format.
        """
        given = dict(value)
        version = given.pop("format_version", FORMAT_VERSION)
        if version != FORMAT_VERSION:
            raise PolicyError(
                f"hardware: format version {version!r} is not {FORMAT_VERSION}; measure again with 'flexgen-hf profile'"
            )
        fields = {field.name: field for field in dataclasses.fields(cls)}
        for name in given:
            if name not in fields:
                near = difflib.get_close_matches(str(name), fields, 1)
                hint = f"did you mean {near[0]!r}?" if near else _known_fields()
                raise PolicyError(f"hardware: unknown field {name!r}; {hint}")
        missing = [n for n, f in fields.items() if n not in given and _is_required(f)]
        if missing:
            raise PolicyError(f"hardware: {missing[0]!r} is missing; measure again with 'flexgen-hf profile'")
        return cls(**given)

    @classmethod
    def load(cls, path: str | Path) -> Hardware:
        """The machine that a JSON file describes.

        Raises:
            StoreError: the file cannot be read, or is not JSON.
            PolicyError: what it says cannot be meant.
        """
        try:
            value = json.loads(Path(path).read_text("utf-8"))
        except OSError as error:
            raise StoreError(f"hardware: cannot read {str(path)!r} ({error.strerror}); check the path") from error
        except ValueError as error:
            raise StoreError(
                f"hardware: {str(path)!r} is not JSON ({error}); make it with 'flexgen-hf profile'"
            ) from error
        if not isinstance(value, Mapping):
            raise PolicyError(f"hardware: {str(path)!r} holds a {type(value).__name__}, not an object")
        return cls.from_dict(value)


_CURVES = (
    "disk_to_host", "host_to_disk", "host_to_device", "device_to_host", "cached_read", "cached_write",
    "cast_flops", "packed_flops", "element_bytes_per_s",
)  # fmt: skip
_MAY_BE_ZERO = (
    "host_attention_bytes_per_s", "tile_s", "transfer_s", "compute_s", "stage_s", "forward_s", "sweep_s", "cores",
    "packed_attention_elements_per_s", "packed_attention_s", "moved_attention_bytes_per_s", "disk_read_limit",
    "disk_write_limit", "fresh_bytes_per_s",
)  # fmt: skip


def _is_required(field: Any) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _known_fields() -> str:
    return f"known are {', '.join(field.name for field in dataclasses.fields(Hardware))}"


def _number(value: Any, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
        raise PolicyError(f"hardware: {what}={value!r} is not a number of at least 0")
    return value


def _positive(value: Any, what: str) -> float:
    number = _number(value, what)
    if not number:
        raise PolicyError(f"hardware: {what} is 0; give a positive number")
    return number


def _curve(value: Any, what: str) -> Curve:
    if isinstance(value, Curve):
        return value
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return constant(_positive(value, what))
    if (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and all(isinstance(p, Sequence) and len(p) == 2 for p in value)
    ):
        return Curve(tuple((size, speed) for size, speed in value))
    raise PolicyError(f"hardware: {what}={value!r} is no speed; give a number, or a list of [size, speed]")


def _curves_of_types(value: Any) -> dict[str, Curve]:
    if not isinstance(value, Mapping) or not value:
        raise PolicyError(f"hardware: matmul_flops={value!r} is no object; give {{'float16': [[rows, speed], ...]}}")
    return {str(dtype): _curve(curve, f"matmul_flops[{dtype!r}]") for dtype, curve in value.items()}
