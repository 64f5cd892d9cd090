"""Sizes as text: bytes, bytes per second, and shares of a checkpoint's weights.

A share makes a limit follow the model: `0.29w` is 0.29 times the bytes of the weights, whatever model is measured.
"""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

from ..errors import PolicyError, StoreError
from ..weights.format import read_header

__all__ = ["Size", "parse_max_memory", "parse_size", "parse_sum", "weights_bytes"]

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_UNITS |= {"ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30, "ti": 1 << 40}
_NUMBER = r"(\d+(?:\.\d+)?)\s*"
_TIERS = ("0", "device", "cpu", "host", "disk")


@dataclasses.dataclass(frozen=True)
class Size:
    """Bytes, a part of which may be a share of the weights of a checkpoint that is not known yet.

    Args:
        nbytes: the part that is known.
        weights: times the bytes of the weights.
    """

    nbytes: int = 0
    weights: float = 0.0

    def of(self, model_folder: Path) -> int:
        """Bytes for this checkpoint.

        Raises:
            StoreError: the weights are asked for, and no safetensors file is there.
        """
        return self.nbytes + (int(self.weights * weights_bytes(model_folder)) if self.weights else 0)


def parse_size(text: str | None, option: str) -> int | None:
    """Bytes, or bytes per second: `"3000MB"` is 3e9 of them, `"700MiB"` 700 x 2^20, `"100MB/s"` 1e8 a second.

    Raises:
        PolicyError: something else.
    """
    if text is None:
        return None
    found = re.fullmatch(_NUMBER + r"([kmgt]i?)?(b(?:/s)?)?", text.strip().lower())
    size = int(float(found[1]) * _UNITS[found[2] or ""]) if found else 0
    if size <= 0:
        raise PolicyError(f"{option}: {text!r} is no size; write for example '3000MB' or '100MB/s'")
    return size


def parse_sum(text: str | None, option: str) -> Size | None:
    """A sum of sizes, each in bytes or as a share of the weights: `"600MB"`, `"0.29w"`, `"3.7w+600MB"`.

    Raises:
        PolicyError: something else.
    """
    if text is None:
        return None
    nbytes, weights = 0, 0.0
    for term in text.split("+"):
        share = re.fullmatch(_NUMBER + "w", term.strip().lower())
        if share is not None and float(share[1]) > 0:
            weights += float(share[1])
            continue
        try:
            nbytes += parse_size(term, option) or 0
        except PolicyError:
            raise PolicyError(
                f"{option}: {term.strip()!r} in {text!r} is no size; write for example '700MB', '0.29w' for 0.29 times "
                "the bytes of the weights, or a sum such as '3.7w+600MB'"
            ) from None
    return Size(nbytes, weights)


def parse_max_memory(text: str | None, option: str) -> dict[str, Size]:
    """What each tier may hold, from `"cpu=2300MB,0=0.29w,disk=20GB"`; 0 is the device.

    Raises:
        PolicyError: a part that is not `TIER=SIZE`, a tier that is unknown or named twice.
    """
    limits: dict[str, Size] = {}
    for part in text.split(",") if text is not None else ():
        tier, equals, size = (word.strip() for word in part.partition("="))
        if not equals or tier not in _TIERS:
            raise PolicyError(
                f"{option}: {part.strip()!r} is not TIER=SIZE with a tier of {', '.join(_TIERS)}; write for example "
                "'0=0.29w,cpu=2300MB,disk=20GB'"
            )
        if tier in limits:
            raise PolicyError(f"{option}: {tier!r} is named twice in {text!r}; leave one of them out")
        limits[tier] = parse_sum(size, option) or Size()
    return limits


def weights_bytes(model_folder: Path) -> int:
    """Bytes of all tensors of a checkpoint, as they are stored.

    Raises:
        StoreError: no safetensors file is there, or a broken one.
    """
    index = model_folder / "model.safetensors.index.json"
    if index.is_file():
        names = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
    else:
        names = {"model.safetensors"}
        if not (model_folder / "model.safetensors").is_file():
            raise StoreError(
                f"{str(model_folder)!r} has no safetensors file, so a share of its weights is not known; give the size "
                "in bytes, or convert the checkpoint with 'flexgen-hf convert'"
            )
    return sum(extent.nbytes for name in names for extent in read_header(model_folder / name).values())
