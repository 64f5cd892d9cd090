"""Quantized stores of the checkpoints that are measured: made once, before anything is measured, beside the rest.

Knows files and what was asked for; the store itself is `conversion`'s.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from ..policy import Compression

__all__ = ["quantized_store"]


def quantized_store(work_folder: str | Path, model_folder: Path, compression: Compression) -> Path:
    """The folder of a checkpoint's store in this compression, made at the first call and found by the later ones.

    An interrupted call leaves what it has written to the next one, which goes on.

    Args:
        work_folder: where the bench keeps its files.
        model_folder: the checkpoint.
        compression: what it says of weights; what it says of the cache makes no other store.

    Raises:
        FlexGenError: the checkpoint cannot be converted, as `conversion.convert` says.
    """
    from conversion.convert import convert

    from ..checkpoint_files import source_fingerprint
    from ..weights.format import FORMAT_VERSION
    from ..weights.quantized import LAYOUT_VERSION

    how = {name: value for name, value in compression.to_dict().items() if name != "cache"}
    source = source_fingerprint(file for file in model_folder.iterdir() if file.is_file())
    described = json.dumps([FORMAT_VERSION, LAYOUT_VERSION, source, how])
    key = hashlib.sha256(described.encode()).hexdigest()[:8]
    widths = {bits for bits in (*dict(compression.patterns).values(), compression.weights, compression.tables) if bits}
    width = "-".join(f"{bits}bit" for bits in sorted(widths))
    target = Path(work_folder) / "checkpoints" / f"{model_folder.name}-{width}-{key}"
    convert(model_folder, target, compression=compression)
    return target
