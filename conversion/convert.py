"""A checkpoint in, a store out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from flexgen_hf.errors import ConversionError
from flexgen_hf.policy import Compression, Placement
from flexgen_hf.weights.format import Manifest
from flexgen_hf.weights.quantized import Method
from flexgen_hf.weights.writer import Progress, write_store

from .sources import SourceOptions, open_source, parse_dtype

__all__ = ["convert"]


def convert(  # noqa: PLR0913 (the names that from_pretrained has, and those of the store)
    source: str | Path,
    out: str | Path,
    *,
    dtype: str | torch.dtype | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    trust_remote_code: bool = False,
    config: str | Path | None = None,
    gguf_file: str | None = None,
    weights_placement: Placement | None = None,
    compression: Compression | Mapping[str, Any] | str | None = None,
    method: Method = "search",
    force: bool = False,
    progress: Progress | None = None,
) -> Manifest:
    """Writes the store of a checkpoint, tensor by tensor; goes on where an interrupted run stopped.

    Args:
        source: Hub id; folder with a Hugging Face checkpoint; GGUF file; `NAME-np` folder of the original FlexGen;
            folder of metaseq's model-parallel shards.
        out: the store's folder.
        dtype: `"float16"`, `"bfloat16"`, `"float32"`, or `None` for the checkpoint's (of a quantized GGUF, float16).
        revision: branch, tag or commit on the Hub.
        token: Hub token.
        local_files_only: take Hub repositories from the cache only.
        trust_remote_code: run model code that the checkpoint brings along.
        config: folder with `config.json`, for numpy and metaseq folders whose shapes do not tell everything.
        gguf_file: name of the GGUF file to take from `source`.
        weights_placement: shares by which shards are given to tiers; `None` gives all to the disk.
        compression: which weights are quantized, tensor by tensor as they are written; a store has no cache, so what it
            says of that has no meaning here.
        method: `"search"` finds scales and minima with a smaller squared error, at some 50 million elements a second
            and core; `"minmax"` takes a twentieth of that.
        force: replace a store of something else in `out`.
        progress: called with bytes written and bytes in all.

    Returns:
        The store's manifest.

    Raises:
        ConversionError: the source is of no known format, or `out` holds another store.
        UnsupportedModelError: the model is of a kind that cannot be run.
        StoreError: the source is missing, incomplete or broken.
        CapacityError: the disk is too small.
        QuantizationError: a tensor that is to be quantized has elements beyond 65504, or not finite.
        PolicyError: a compression or method that does not exist.
    """
    if Path(source).expanduser().resolve() == Path(out).expanduser().resolve():
        raise ConversionError(f"{source} is both source and store; give another folder for the store")
    options = SourceOptions(
        dtype=parse_dtype(dtype),
        revision=revision,
        token=token,
        local_files_only=local_files_only,
        trust_remote_code=trust_remote_code,
        config=Path(config) if config is not None else None,
        gguf_file=gguf_file,
    )
    asked = Compression.of(compression)
    opened = open_source(source, options)
    return write_store(
        Path(out).expanduser(),
        opened.plans(opened.quantizing(asked, method)),
        opened.origin,
        companions=opened.companions,
        placement=weights_placement,
        force=force,
        progress=progress,
    )
