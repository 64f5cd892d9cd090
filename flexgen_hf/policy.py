"""Where things live and how a block is cut: frozen values that check themselves.

Knows nothing of torch, models or files. Shares are fractions of 1; percent exists only in `Policy.parse`
and at the command line.
"""

from __future__ import annotations

import dataclasses
import difflib
import enum
import fnmatch
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from .errors import PolicyError

__all__ = ["AUTO", "Compression", "Placement", "Policy", "Tier"]

#: what stands for the policy that is to be found
AUTO = "auto"

_T = TypeVar("_T")


class Tier(str, enum.Enum):
    """A place where bytes can live, fastest first."""

    DEVICE = "device"
    HOST = "host"
    DISK = "disk"

    def __str__(self) -> str:
        return self.value

    @classmethod
    def of(cls, name: Any) -> Tier:
        """The tier that a key of `max_memory` names: a number is the device, as is `"device"`, `"cpu"` is the host.

        Raises:
            PolicyError: no tier has this name.
        """
        text = str(name)
        if text.isdecimal():
            return cls.DEVICE
        try:
            return cls("host" if text == "cpu" else text)
        except ValueError:
            raise PolicyError(f"max_memory: {name!r} is no tier; use 0 (the device), 'cpu' and 'disk'") from None


@dataclasses.dataclass(frozen=True)
class Placement:
    """The shares of one kind of tensor among the tiers; they sum to 1.

    Args:
        device: share kept on the compute device.
        host: share kept in RAM.
        disk: share kept on disk. `None` (default) means "the rest", also for `host` when only `device` is given.

    Raises:
        PolicyError: a share is negative, not a number, or the shares do not sum to 1.

    >>> Placement(device=0.2, host=0.8)
    Placement(device=0.2, host=0.8, disk=0.0)
    """

    device: float = 0.0
    host: float = 0.0
    disk: float | None = None

    def __post_init__(self) -> None:
        for field in ("device", "host", "disk"):
            share = getattr(self, field)
            if field == "disk" and share is None:
                continue
            if isinstance(share, bool) or not isinstance(share, (int, float)) or not math.isfinite(share):
                raise PolicyError(f"placement: {field}={share!r} is not a number; give a share between 0 and 1")
            if not 0 <= share <= 1:
                hint = "; shares are fractions, 20 percent is 0.2" if share > 1 else ""
                raise PolicyError(f"placement: {field}={share!r} is outside 0..1{hint}")
        placed = self.device + self.host
        if self.disk is None:
            if placed > 1 + 1e-6:
                raise PolicyError(f"placement: device + host = {placed:g} is more than 1; lower one of them")
            object.__setattr__(self, "disk", max(0.0, round(1.0 - placed, 9)))
        elif abs(placed + self.disk - 1) > 1e-6:
            raise PolicyError(
                f"placement: device + host + disk = {placed + self.disk:g}, not 1; leave out disk to give it the rest"
            )
        for field in ("device", "host", "disk"):
            object.__setattr__(self, field, float(getattr(self, field)))

    def share(self, tier: Tier) -> float:
        """The share of `tier`, between 0 and 1."""
        return float(getattr(self, tier.value))

    @classmethod
    def all_on(cls, tier: Tier | str) -> Placement:
        """Everything on one tier."""
        return cls(**{"device": 0.0, "host": 0.0, "disk": 0.0, Tier(tier).value: 1.0})

    def percents(self) -> tuple[float, float]:
        """Device and host shares in percent, as the original's command line gives them."""
        return round(self.device * 100, 4), round(self.host * 100, 4)

    def to_dict(self) -> dict[str, float]:
        """The shares by tier name; `Placement(**d)` is the way back."""
        return {tier.value: self.share(tier) for tier in Tier}


# bits of an element of quantized tensors
_WIDTHS = (2, 3, 4, 8)


def _check_bits(field: str, bits: Any, known: tuple[int, ...]) -> None:
    if bits is not None and (isinstance(bits, bool) or bits not in known):
        exist = ", ".join(map(str, known))
        raise PolicyError(f"compression: {field}={bits!r} bits do not exist; use {exist} or None for no change")


def _checked_patterns(patterns: Any) -> tuple[tuple[str, int | None], ...]:
    """Pairs of a pattern and its bits, of which the first that fits counts, so each pattern is there once."""
    pairs = patterns.items() if isinstance(patterns, Mapping) else patterns
    try:
        found = dict(pairs)
    except (TypeError, ValueError):
        found = {None: None}
    for name, bits in found.items():
        if not isinstance(name, str) or not name:
            raise PolicyError(f"compression: patterns={patterns!r} are not names with bits; use {{'*.fc2': 8}}")
        _check_bits(f"patterns[{name!r}]", bits, _WIDTHS)
    return tuple(found.items())


@dataclasses.dataclass(frozen=True)
class Compression:
    """Group quantization of weights and cache, each on its own; or a cache in 16 bit under compute in 32.

    A cache in 16 bit is not quantized but cast: where compute uses float32, keys and values are kept in float16, a
    step's own new ones being seen in full precision. Where compute uses 16 bit already, it changes nothing.

    Args:
        weights: bits per element of decoder-layer matrices (2, 3, 4 or 8), or `None` for those of the checkpoint.
            Norms, biases and small matrices (of routers, say) keep theirs.
        cache: bits per element of keys and values (2, 3, 4, 8 or 16), or `None` for those of compute.
        group_size: elements that share a scale and a minimum.
        tables: bits per element of the tables of embedding and head; `None` leaves them as they are.
        patterns: widths, or `None`, for matrices by name: a mapping of patterns, as in file names, to bits, or pairs of
            them. A pattern is compared with the name of the tensor and with that of its module; the first one that fits
            wins over `weights` and `tables`.

    Raises:
        PolicyError: a width that does not exist, a group size that is not a positive multiple of 8, a pattern that is
            no text.

    >>> Compression(weights=4, patterns={"*.fc2": 8}).bits("model.layers.3.fc2.weight", 4)
    8
    """

    weights: int | None = None
    cache: int | None = None
    group_size: int = 64
    tables: int | None = None
    patterns: Mapping[str, int | None] | tuple[tuple[str, int | None], ...] = ()

    def __post_init__(self) -> None:
        for field, known in {"weights": _WIDTHS, "cache": (*_WIDTHS, 16), "tables": _WIDTHS}.items():
            _check_bits(field, getattr(self, field), known)
        size = self.group_size
        if isinstance(size, bool) or not isinstance(size, int) or size <= 0 or size % 8:
            raise PolicyError(f"compression: group_size={size!r} must be a positive multiple of 8, e.g. 64")
        object.__setattr__(self, "patterns", _checked_patterns(self.patterns))

    def __bool__(self) -> bool:
        return self.of_weights or self.cache is not None

    @property
    def of_weights(self) -> bool:
        """Whether any weights may be quantized."""
        return any(bits is not None for bits in (self.weights, self.tables, *dict(self.patterns).values()))

    @property
    def groups_cache(self) -> bool:
        """Whether keys and values are kept in groups; in 16 bit they are only cast."""
        return self.cache in _WIDTHS

    def bits(self, name: str, otherwise: int | None) -> int | None:
        """The width of a matrix: that of the first pattern that fits its name, or what is given for all."""
        for pattern, bits in dict(self.patterns).items():
            if any(fnmatch.fnmatchcase(text, pattern) for text in (name, name.rpartition(".")[0])):
                return bits
        return otherwise

    @classmethod
    def of(cls, value: Compression | Mapping[str, Any] | str | None) -> Compression:
        """Reads what a user may write: a `Compression`, its dict or JSON, `"4bit"` (weights and cache) or `None`."""
        if value is None:
            return cls()
        if isinstance(value, Compression):
            return value
        if isinstance(value, str):
            if value in ("2bit", "3bit", "4bit", "8bit"):
                return cls(weights=int(value[0]), cache=int(value[0]))
            if value.lstrip().startswith("{"):
                return cls.of(_parse_object(value, "compression", "Compression"))
            raise PolicyError(f"compression: {value!r} is unknown; use '4bit', a Compression, its JSON, or None")
        return _build(cls, value, "compression")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `Compression(**d)` is the way back."""
        return {**{f.name: getattr(self, f.name) for f in dataclasses.fields(self)}, "patterns": dict(self.patterns)}

    def __str__(self) -> str:
        widths = {"weights": self.weights, "cache": self.cache, "tables": self.tables}
        words = [f"{name} {bits} bit" for name, bits in widths.items() if bits is not None]
        words += [f"{name} {bits} bit" if bits else f"{name} as it is" for name, bits in dict(self.patterns).items()]
        words += [f"groups of {self.group_size}"] if words and self.group_size != Compression.group_size else []
        return ", ".join(words)


@dataclasses.dataclass(frozen=True)
class Policy:
    """Three placements, the shape of a block, and how it is run.

    A *block* is all sequences in flight, `batch_size * num_batches`; a loaded layer serves the whole block before the
    next one is loaded.

    Args:
        weights: where the model's weights live.
        cache: where keys and values live; a cell (one layer of one micro-batch) has one home.
        hidden: where hidden states wait between layers.
        batch_size: sequences of a micro-batch, what one compute step sees.
        num_batches: micro-batches of a block.
        overlap: move data while the device computes. Off means one step after the other.
        compression: group quantization of weights and cache.
        host_attention: attend to cells that live on the host on the host, instead of moving them.
        layer_slots: decoder layers that have room where compute needs them, beside those that live there. With 1 a
            small device has more left for the rest; the next layer then crosses the link between two layers'
            compute, which costs little where the disk is the limit.

    Raises:
        PolicyError: a field that is unknown or cannot be meant.

    >>> Policy.parse("20 80 0 100 0 100", batch_size=48, num_batches=3).block_size
    144
    """

    weights: Placement = Placement(device=1.0)
    cache: Placement = Placement(device=1.0)
    hidden: Placement = Placement(device=1.0)
    batch_size: int = 8
    num_batches: int = 1
    overlap: bool = True
    compression: Compression = Compression()
    host_attention: bool = False
    layer_slots: int = 2

    def __post_init__(self) -> None:
        for field in ("weights", "cache", "hidden"):
            value = getattr(self, field)
            if isinstance(value, Mapping):
                object.__setattr__(self, field, _build(Placement, value, f"policy: {field}"))
            elif not isinstance(value, Placement):
                raise PolicyError(f"policy: {field}={value!r} is not a Placement; use Placement(device=, host=, disk=)")
        object.__setattr__(self, "compression", Compression.of(self.compression))
        for field in ("batch_size", "num_batches", "layer_slots"):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise PolicyError(f"policy: {field}={value!r} must be a whole number of at least 1")
        for field in ("overlap", "host_attention"):
            if not isinstance(getattr(self, field), bool):
                raise PolicyError(f"policy: {field}={getattr(self, field)!r} must be True or False")

    @property
    def block_size(self) -> int:
        """Sequences in flight."""
        return self.batch_size * self.num_batches

    def replace(self, **changes: Any) -> Policy:
        """A copy with some fields changed, checked like a new one."""
        return Policy.from_dict({**{f.name: getattr(self, f.name) for f in dataclasses.fields(self)}, **changes})

    @classmethod
    def parse(cls, percents: str | Iterable[float], **fields: Any) -> Policy:
        """Reads the original's six percentages: weights, cache and hidden states, each on device and host.

        Args:
            percents: `"w_device w_host c_device c_host h_device h_host"` in percent; the rest of each is on disk.
            fields: every other field of `Policy`, by name.

        Raises:
            PolicyError: not six numbers, or a pair outside 0..100.
        """
        text = percents if isinstance(percents, str) else " ".join(map(str, percents))
        words = text.replace(",", " ").split()
        try:
            numbers = [float(word) for word in words]
        except ValueError:
            raise PolicyError(f"policy: {text!r} holds something that is not a number; {_SIX}") from None
        if len(numbers) != 6:
            raise PolicyError(f"policy: {text!r} has {len(numbers)} numbers, not 6; {_SIX}")
        placements = {}
        for name, device, host in zip(("weights", "cache", "hidden"), numbers[0::2], numbers[1::2], strict=True):
            if not (0 <= device <= 100 and 0 <= host <= 100 and device + host <= 100 + 1e-6):
                raise PolicyError(f"policy: {name} {device:g} + {host:g} percent is outside 0..100; {_SIX}")
            placements[name] = Placement(device=device / 100, host=host / 100)
        return cls.from_dict({**placements, **fields})

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Policy:
        """The inverse of `to_dict`; unknown fields are refused with the nearest known one."""
        return _build(cls, value, "policy")

    @classmethod
    def from_json(cls, text: str) -> Policy:
        """The inverse of `to_json`; of what `flexgen-hf plan --json` writes, the policy in it."""
        value = _parse_object(text, "policy", "Policy")
        return cls.from_dict(value["policy"] if {"policy", "predicted"} <= value.keys() else value)

    @classmethod
    def of(cls, value: Policy | Mapping[str, Any] | str | Path, **fields: Any) -> Policy:
        """Reads what a user may write: a `Policy`, its dict, a JSON file's path, JSON text, or six percentages."""
        if isinstance(value, Policy):
            policy = value
        elif isinstance(value, Mapping):
            policy = cls.from_dict(value)
        elif isinstance(value, Path) or value.strip().endswith(".json"):
            try:
                policy = cls.from_json(Path(value).read_text())
            except OSError as error:
                raise PolicyError(f"policy: cannot read {str(value)!r} ({error.strerror}); check the path") from error
        elif value.lstrip().startswith("{"):
            policy = cls.from_json(value)
        else:
            return cls.parse(value, **fields)
        return policy.replace(**fields) if fields else policy

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values of every field."""
        return {
            "weights": self.weights.to_dict(),
            "cache": self.cache.to_dict(),
            "hidden": self.hidden.to_dict(),
            "batch_size": self.batch_size,
            "num_batches": self.num_batches,
            "overlap": self.overlap,
            "compression": self.compression.to_dict(),
            "host_attention": self.host_attention,
            "layer_slots": self.layer_slots,
        }

    def to_json(self) -> str:
        """`to_dict` as indented JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    def __str__(self) -> str:
        shares = "  ".join(
            f"{name} {'/'.join(f'{getattr(self, name).share(tier) * 100:g}' for tier in Tier)}"
            for name in ("weights", "cache", "hidden")
        )
        extras = "".join(
            f", {text}"
            for text, on in (
                ("no overlap", not self.overlap),
                ("host attention", self.host_attention),
                (f"{self.layer_slots} layer slot{'s' * (self.layer_slots > 1)}", self.layer_slots != 2),
            )
            if on
        )
        return f"{shares} (% on device/host/disk), block {self.batch_size} x {self.num_batches}{extras}"


_SIX = "give weights, cache and hidden as device and host percent, e.g. '20 80 0 100 0 100'"


def _parse_object(text: str, what: str, kind: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise PolicyError(f"{what}: not JSON ({error}); write one with json.dumps({kind}(...).to_dict())") from error
    if not isinstance(value, dict):
        raise PolicyError(f"{what}: the JSON holds a {type(value).__name__}, not an object with {kind}'s fields")
    return value


def _build(cls: type[_T], value: Mapping[str, Any], what: str) -> _T:
    known = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
    for name in value:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
            raise PolicyError(f"{what}: unknown field {name!r}; {hint}")
    return cls(**value)
