"""Measures how fast a device computes what a model's layers consist of, with the engine's own tiles and kernels.

What is larger than a processor's cache when a model runs is so here too: matrices, keys and values are gone through
several in turn. Knows no disk, no links and no `Hardware`.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch.nn import functional
from transformers import AutoModelForCausalLM, OPTConfig

from .cell_layout import CellShape
from .planning.hardware import Curve
from .planning.schedule import Lane
from .policy import Compression
from .quantization import dispatch
from .quantization.groupwise import GroupFormat, Quantized
from .storage.lanes import Lanes
from .storage.workspace import Workspace
from .tiles import TileCast, TileDequantize

__all__ = ["SECONDS", "Compute", "Overheads", "median_of"]

_MIB = 1 << 20

# A product is slower than its matrix is read for few rows, and not faster for more than the last ones.
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 512)
_WIDTH = 2048

# So many bytes are gone through before anything comes again: more than a cache holds.
_BEYOND_CACHE = 128 * _MIB

#: each thing is measured for so long, and at least twice
SECONDS = 0.3

_DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16,
}  # fmt: skip
_FORMAT = GroupFormat(4, 64)

# Of a model whose products take little time. Weights go through the processor's caches as in a large one: what the
# engine itself looks at has to come from memory again, and takes twice as long.
_HIDDEN = 512
_SMALL: Mapping[str, Any] = {
    "hidden_size": _HIDDEN, "ffn_dim": 4 * _HIDDEN, "num_attention_heads": 8, "vocab_size": 128,
    "word_embed_proj_dim": _HIDDEN,
}  # fmt: skip
_LAYER_ELEMENTS = 12 * _HIDDEN**2
_LAYER_MATRICES = 6
_LAYERS = (2, 6)
_BATCHES, _TOKENS = 8, 16


def median_of(work: Callable[[], Any], device: torch.device, *, seconds: float, is_asynchronous: bool = False) -> float:
    """What work takes in seconds, the median of many times.

    Not the shortest: a long run is disturbed as often as these are. The first time, which makes threads and finds
    memory, does not count.
    """

    def timed() -> float:
        started = time.perf_counter()
        work()
        if is_asynchronous:
            torch.accelerator.synchronize(device)
        return time.perf_counter() - started

    timed()
    times, until = list[float](), time.perf_counter() + seconds
    while not times or time.perf_counter() < until:
        times.append(timed())
    return max(statistics.median(times), 1e-9)


class Compute:
    """The measurements of one device.

    Args:
        space: where to compute.
        seconds: for each number.
    """

    def __init__(self, space: Workspace, seconds: float) -> None:
        self._space, self._device, self._seconds = space, space.device, seconds
        self._median = functools.partial(
            median_of, device=space.device, seconds=seconds, is_asynchronous=space.is_asynchronous
        )

    @property
    def dtype(self) -> torch.dtype:
        """That in which this device is usually computed on."""
        return torch.float32 if self._space.is_direct else torch.float16

    # --------------------------------------------------------------------------------------------------------- products
    def products(self) -> dict[str, Curve]:
        """FLOP/s of products by rows, for each type of element."""
        return {name: self._curve(self._matrices(dtype), functional.linear, dtype) for name, dtype in _DTYPES.items()}

    def cast_products(self) -> Curve:
        """FLOP/s of products in float32 with matrices in float16, tile by tile."""
        tiles = TileCast()
        try:
            return self._curve(
                self._matrices(torch.float16), lambda x, weight: tiles.linear(x, weight, None), torch.float32
            )
        finally:
            tiles.release()

    def packed_products(self) -> Curve:
        """FLOP/s of products in float32 with matrices in 4 bits, tile by tile."""
        tiles = TileDequantize()
        try:
            return self._curve(self._packed(), lambda x, weight: tiles.linear(x, weight, _FORMAT, None), torch.float32)
        finally:
            tiles.release()

    def _curve(self, matrices: Sequence[Any], multiply: Callable[[Any, Any], Any], dtype: torch.dtype) -> Curve:
        turns = itertools.cycle(matrices)
        points = []
        for rows in _ROWS:
            x = torch.ones(rows, _WIDTH, dtype=dtype, device=self._device)
            seconds = self._mean(lambda x=x: multiply(x, next(turns)), len(matrices))  # type: ignore[misc]
            points.append((rows, 2.0 * rows * _WIDTH**2 / seconds))
        return Curve(tuple(points))

    def _mean(self, work: Callable[[], Any], count: int) -> float:
        """Seconds of one of so many in a row; of what takes long, of fewer."""
        if self._median(work, seconds=0.0) * count > self._seconds:
            return self._median(work)
        return self._median(lambda: [work() for _ in range(count)]) / count

    def _matrices(self, dtype: torch.dtype) -> list[torch.Tensor]:
        first = torch.randn(_WIDTH, _WIDTH, device=self._device).to(dtype)
        return [first, *(first.clone() for _ in range(_BEYOND_CACHE // first.nbytes - 1))]

    def _packed(self) -> list[Quantized]:
        weight = torch.randn(_WIDTH, _WIDTH, device=self._device)
        made = dispatch.quantize(weight, _FORMAT, threads=torch.get_num_threads())
        count = _BEYOND_CACHE // 2 // made.codes.nbytes
        return [
            Quantized(made.codes.clone(), made.scales.clone(), made.minima.clone(), made.shape) for _ in range(count)
        ]

    # -------------------------------------------------------------------------------------------------------- attention
    def attention_flops(self) -> float:
        """Of prompts that are padded, as far as the products are of use."""
        rows, tokens, heads, dim = 4, 256, 16, 64
        x = torch.ones(rows, heads, tokens, dim, dtype=self.dtype, device=self._device)
        mask = torch.ones(rows, 1, tokens, tokens, dtype=torch.bool, device=self._device).tril()
        seconds = self._median(lambda: functional.scaled_dot_product_attention(x, x, x, attn_mask=mask))
        return 2.0 * rows * heads * tokens**2 * dim / seconds

    def attended_bytes_per_s(self, device: torch.device, *, by_heads: bool = True) -> float:
        """Keys and values that a single query of each row goes through.

        Args:
            device: where they are.
            by_heads: a head's tokens lie one after the other, not those of all heads and rows.
        """
        rows, tokens, heads, dim = 8, 256, 16, 64
        first = torch.ones(rows, heads, tokens, dim, dtype=self.dtype, device=device)
        if not by_heads:
            first = first.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)
        cells = [(first.clone(), first.clone()) for _ in range(_BEYOND_CACHE // 2 // first.nbytes)]
        turns, query = itertools.cycle(cells), first[:, :, :1]
        mask = torch.ones(rows, 1, 1, tokens, dtype=torch.bool, device=device)
        seconds = self._mean(
            lambda: functional.scaled_dot_product_attention(query, *next(turns), attn_mask=mask), len(cells)
        )
        return 2 * first.nbytes / seconds

    def packed_attention_elements_per_s(self) -> float:
        """Keys and values in 4 bits that a single query of each row goes through; 0 where there is no kernel for it."""
        rows, tokens, heads, dim = 8, 256, 16, 64
        shape = CellShape(rows, (heads, dim), (heads, dim), torch.float32, Compression(cache=4))
        memory = torch.zeros(shape.nbytes(tokens), dtype=torch.uint8)
        keys, values = shape.views(memory, tokens)
        kept = shape.quantized(0, keys), shape.quantized(1, values)
        query, bias = torch.ones(rows, heads, dim), torch.zeros(rows, tokens + 1)
        attend = functools.partial(
            dispatch.attend, query, (query, query), kept, shape.formats, bias, torch.get_num_threads()
        )
        if attend() is None:
            return 0.0
        return 2.0 * rows * tokens * heads * dim / self._median(attend)

    # -------------------------------------------------------------------------------------------------- what lanes do
    def cast_bytes_per_s(self) -> float:
        """Bytes in float16 that a lane casts to float32."""
        source = torch.zeros(_BEYOND_CACHE // 4, dtype=torch.float16, device=self._device)
        target = torch.zeros(source.numel(), dtype=torch.float32, device=self._device)
        return source.nbytes / self._in_lane(lambda: target.copy_(source))

    def packing(self) -> tuple[float, float]:
        """Elements per second that a lane unpacks, and packs."""
        states = torch.randn(_WIDTH, _WIDTH, device=self._device).to(self.dtype)
        packed = dispatch.quantize(states, _FORMAT)
        unpack = self._in_lane(lambda: dispatch.dequantize(packed, _FORMAT, out=states))
        pack = self._in_lane(lambda: dispatch.quantize(states, _FORMAT))
        return states.numel() / unpack, states.numel() / pack

    def _in_lane(self, work: Callable[[], Any]) -> float:
        """Seconds of work in a thread that moves data."""
        found: list[float] = []

        def measured() -> int:
            found.append(self._median(work))
            return 0

        threads = torch.get_num_threads()
        with Lanes(["one"], around=self._space.in_lane) as lanes:
            lanes.submit("one", "measuring", measured).wait()
        torch.set_num_threads(threads)  # torch gives the last number set to threads that come later
        return found[0]

    # -------------------------------------------------------------------------------------------------- memory, Python
    def element_bytes_per_s(self) -> Curve:
        """Read and written where each element is looked at once and the result is put into new memory."""
        points = []
        for size in (64 << 10, 1 * _MIB, 4 * _MIB, 16 * _MIB):
            x = torch.ones(size // self.dtype.itemsize, dtype=self.dtype, device=self._device)
            points.append((size, 2 * size / self._median(functools.partial(functional.relu, x))))
        return Curve(tuple(points))

    def overheads(self, folder: Path, products: Mapping[str, Curve], cast_products: Curve | None) -> Overheads:
        """What the engine's own steps take beside products.

        On small models, with more and fewer layers and micro-batches, with weights that stay, that are brought and that
        are cast where they are used, and with keys and values in 4 bits.

        Args:
            folder: for the models, for as long as this takes.
            products: what `products` returned.
            cast_products: what that method returned; None where no tiles are cast.
        """
        few, many = _LAYERS
        runs = [
            _Run(few, batches=1), _Run(few, _BATCHES), _Run(many, _BATCHES),
            _Run(few, 1, "disk"), _Run(many, 1, "disk"),
            _Run(few, _BATCHES, cache=4), _Run(many, _BATCHES, cache=4),
        ]  # fmt: skip
        if cast_products is not None:
            runs += [_Run(layers, 1, "host", stored=torch.float16) for layers in _LAYERS]
        with tempfile.TemporaryDirectory(dir=folder) as place:
            alone, block, deep, brought, deeper, packed, more_packed, *tiled = self._times(Path(place), runs)
        layer = (deep.sweep_s - block.sweep_s) / ((many - few) * _BATCHES)
        packed_layer = (more_packed.sweep_s - packed.sweep_s) / ((many - few) * _BATCHES)
        product = 2.0 * _LAYER_ELEMENTS / products[str(self.dtype).removeprefix("torch.")].at(1)
        beside = max(1e-6, layer - product)
        forward = max(beside / 4, (block.sweep_s - alone.sweep_s) / (_BATCHES - 1) - few * layer)
        tile = 0.0
        if cast_products is not None:
            tiled_layer = (tiled[1].sweep_s - tiled[0].sweep_s) / (many - few)
            tile = tiled_layer - 2.0 * _LAYER_ELEMENTS / cast_products.at(1) - beside
        return Overheads(
            layer_s=beside,
            stage_s=max(0.0, (deeper.compute_s - brought.compute_s) / (many - few) - layer),
            forward_s=forward,
            sweep_s=max(0.0, alone.sweep_s - few * layer - forward) + alone.between_s,
            packed_s=max(0.0, packed_layer - layer),
            tile_s=max(0.0, tile) / _LAYER_MATRICES,
        )

    def _times(self, folder: Path, runs: Sequence[_Run]) -> list[_Times]:
        """Medians of each; they take turns, so that what is subtracted had the same machine."""
        times: list[list[_Times]] = [[] for _ in runs]
        with contextlib.ExitStack() as loaded, _without_bars():
            models = [loaded.enter_context(run.loaded(folder, self._device, self.dtype)) for run in runs]
            until = time.perf_counter() + self._seconds * len(runs)
            while len(times[0]) < 2 or time.perf_counter() < until:
                for run, model, found in zip(runs, models, times, strict=True):
                    prompts = torch.ones(run.batches, 8, dtype=torch.long, device=self._device)
                    model.generate(input_ids=prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=_TOKENS,
                                   min_new_tokens=_TOKENS, do_sample=False, pad_token_id=1)  # fmt: skip
                    found.append(_Times.of(model.last_run))
        return [_Times(*map(statistics.median, zip(*found, strict=True))) for found in times]


class Overheads(NamedTuple):
    """Seconds beside products, as `Hardware` has them.

    Args:
        layer_s: of a layer of one micro-batch.
        stage_s: of a layer whose weights were brought, before its first micro-batch.
        forward_s: of the rest of a micro-batch's forward.
        sweep_s: of the rest of a sweep, and between two.
        packed_s: of a layer of one micro-batch, what it takes more with keys and values in 4 bits.
        tile_s: of a product with a matrix that is cast tile by tile.
    """

    layer_s: float
    stage_s: float
    forward_s: float
    sweep_s: float
    packed_s: float
    tile_s: float


class _Times(NamedTuple):
    """Medians over the decode sweeps of a run: seconds, those of compute; and the mean of those between two."""

    sweep_s: float
    compute_s: float
    between_s: float

    @classmethod
    def of(cls, report: Any) -> _Times:
        sweeps = [sweep for sweep in report.sweeps if not sweep.is_prefill]
        return cls(
            statistics.median(sweep.seconds for sweep in sweeps),
            statistics.median(sweep.lanes[Lane.COMPUTE.value].busy_s for sweep in sweeps),
            (report.elapsed_s - report.prefill_s - report.decode_s) / len(report.sweeps),
        )


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """Without those that transformers shows for each of the small models."""
    bars: Any = transformers.logging
    were_shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if were_shown:
            bars.enable_progress_bar()


class _Run(NamedTuple):
    """What a small model computes with: some layers and micro-batches of a row, and where its weights are."""

    layers: int
    batches: int
    weights: str = "device"
    cache: int | None = None
    stored: torch.dtype = torch.float32

    def loaded(self, folder: Path, device: torch.device, dtype: torch.dtype) -> Any:
        """The model, from a checkpoint in the folder that is written if it is not there yet."""
        stored = folder / f"{self.layers}-{self.stored}"
        if not stored.is_dir():
            config = OPTConfig(num_hidden_layers=self.layers, max_position_embeddings=128, **_SMALL)
            made: Any = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
            made.to(self.stored).save_pretrained(stored)
        policy = {"weights": {self.weights: 1.0}, "cache": {"device": 1.0}, "hidden": {"device": 1.0}}
        options: dict[str, Any] = {"quant_method": "flexgen", "offload_folder": str(stored), "device": str(device)}
        options |= {} if self.cache is None else {"compression": {"cache": self.cache}}
        # by the way that transformers offers: what loads models lies above this
        return AutoModelForCausalLM.from_pretrained(
            str(stored),
            dtype=dtype,
            quantization_config={**options, "policy": {**policy, "batch_size": 1, "num_batches": self.batches}},
        )
