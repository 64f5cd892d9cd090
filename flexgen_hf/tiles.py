"""Products with matrices that are kept in another form than that of compute: 16-bit ones, and quantized ones.

A tile of rows is cast, or dequantized, into a buffer that stays in the processor's cache, and multiplied from there:
the whole matrix in the dtype of compute is never in memory. Knows tensors only.
"""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .planning.budget import TILE_BYTES
from .quantization import dispatch
from .quantization.groupwise import GroupFormat, Quantized

__all__ = ["TileCast", "TileDequantize"]

# What one thread makes at a time stays in its processor's cache. Smaller tiles are no faster, as calls take time too.
_CAST_TILE_BYTES = 2 << 20
_DEQUANTIZED_TILE_BYTES = 4 << 20

# Matrices of fewer bytes in the dtype of compute are not shared among threads.
_SHARED_BYTES = 1 << 19


class _Tiles:
    """Products by tiles whose rows are shared among as many threads as torch has.

    Each thread makes tiles of its share in a buffer of its own and multiplies from there alone. Two threads that make a
    tile together and then multiply from it together read from each other's caches: between cores that share none, that
    took three times as long as all the rest.

    Args:
        tile_bytes: the most that one thread makes at a time.
    """

    def __init__(self, tile_bytes: int) -> None:
        self._tile_bytes = tile_bytes
        self._buffers: dict[int, Tensor] = {}
        self._pool: concurrent.futures.ThreadPoolExecutor | None = None

    def release(self) -> None:
        """Ends the threads and gives the buffers back."""
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None
        self._buffers = {}

    def _product(self, rows: Tensor, count: int, threads: int, make: Callable[[int, int, Tensor], object]) -> Tensor:
        """The product of `rows` (n, in_features) with a matrix of `count` rows, (n, count).

        Args:
            rows: in the dtype of compute.
            count: out_features.
            threads: among which the matrix is shared.
            make: `make(first, last, tile)` writes rows of the matrix into a tile.
        """
        out = rows.new_empty((rows.shape[0], count))
        cuts = _cuts(count, threads)
        most = max(1, min(self._tile_bytes, TILE_BYTES // threads) // (rows.shape[1] * rows.element_size()))

        def work(number: int) -> None:
            first, last = cuts[number : number + 2]
            tile = self._tile(number, rows, min(last - first, most))
            for start in range(first, last, len(tile)):
                part = tile[: last - start]
                make(start, start + len(part), part)
                torch.mm(rows, part.t(), out=out[:, start : start + len(part)])

        self._share(work, threads)
        return out

    def _share(self, work: Callable[[int], None], threads: int) -> None:
        """Runs all shares: the first here, others in threads of this object.

        These see the caller's mode: it belongs to a thread.
        """
        if threads == 1:
            work(0)
            return
        given, is_inference = torch.get_num_threads(), torch.is_inference_mode_enabled()

        def alike(number: int) -> None:
            with torch.inference_mode() if is_inference else torch.no_grad():
                work(number)

        others = [self._started_pool(threads - 1).submit(alike, number) for number in range(1, threads)]
        torch.set_num_threads(1)
        try:
            work(0)
        finally:
            concurrent.futures.wait(others)
            torch.set_num_threads(given)
        for other in others:
            other.result()

    @staticmethod
    def _threads(count: int, row_bytes: int) -> int:
        """Each needs a row at least, and all tiles together stay within `TILE_BYTES`."""
        is_worth_it = count * row_bytes >= _SHARED_BYTES
        return max(1, min(torch.get_num_threads(), count, TILE_BYTES // row_bytes)) if is_worth_it else 1

    def _tile(self, number: int, like: Tensor, count: int) -> Tensor:
        """A tile of so many rows of the given length, in the buffer of a share."""
        size = count * like.shape[1]
        held = self._buffers[number] = _at_least(self._buffers.get(number), size, like)
        return held[:size].view(count, like.shape[1])

    def _started_pool(self, threads: int) -> concurrent.futures.ThreadPoolExecutor:
        if self._pool is None or self._pool._max_workers != threads:
            self.release()
            self._pool = concurrent.futures.ThreadPoolExecutor(threads, "flexgen-tiles", _alone)
            self._pool.submit(_let_others_sleep).result()
        return self._pool


class TileCast(_Tiles):
    """`torch.nn.functional.linear` for weights kept in another dtype, cast tile by tile into reused buffers."""

    def __init__(self) -> None:
        super().__init__(_CAST_TILE_BYTES)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The product.

        Args:
            x: (..., in_features) in the dtype of compute.
            weight: (out_features, in_features).
            bias: (out_features,) in the dtype of compute, or None.
        """
        if weight.dtype == x.dtype:
            return nn.functional.linear(x, weight, bias)
        count, width = weight.shape
        # a device shares its work by itself
        threads = self._threads(count, width * x.element_size()) if x.device.type == "cpu" else 1
        out = self._product(
            x.reshape(-1, width), count, threads, lambda first, last, tile: tile.copy_(weight[first:last])
        )
        if bias is not None:
            out += bias
        return out.view(*x.shape[:-1], count)


class TileDequantize(_Tiles):
    """`torch.nn.functional.linear` for quantized weights.

    Dequantizing alone is as much work as the product of a few rows. In float32, up to four rows are multiplied without
    a tile, as each weight is made.
    """

    def __init__(self) -> None:
        super().__init__(_DEQUANTIZED_TILE_BYTES)

    def linear(self, x: Tensor, weight: Quantized, fmt: GroupFormat, bias: Tensor | None) -> Tensor:
        """The product.

        Args:
            x: (..., in_features) in the dtype of compute, on the CPU.
            weight: of shape (out_features, in_features).
            fmt: its width and group size.
            bias: (out_features,) in the dtype of compute, or None.
        """
        count, width = weight.shape
        rows = x.reshape(-1, width)
        threads = self._threads(count, width * x.element_size()) if dispatch.has_kernels() else 1
        fused = dispatch.row_multiplier(weight, fmt, rows)
        if fused is not None:
            out, multiply = fused
            cuts = _cuts(count, threads)
            self._share(lambda number: multiply(*cuts[number : number + 2]), threads)
        else:
            out = self._product(rows, count, threads, dispatch.row_reader(weight, fmt))
        if bias is not None:
            out += bias
        return out.view(*x.shape[:-1], count)


def _cuts(count: int, threads: int) -> list[int]:
    """Where the share of each thread begins, and where the last one ends."""
    return [count * k // threads for k in range(threads + 1)]


def _at_least(held: Tensor | None, size: int, like: Tensor) -> Tensor:
    """A buffer of at least so many elements of the type and device of `like`: the one that is held, if it will do."""
    if held is None or held.dtype != like.dtype or held.device != like.device or held.numel() < size:
        return like.new_empty(size)
    return held


def _alone() -> None:
    """One thread for torch's arithmetic in this one."""
    torch.get_num_threads()  # a thread that never asked would be given the number anew, and forget this one
    torch.set_num_threads(1)


def _let_others_sleep() -> None:
    """Has torch's own threads go to sleep soon after their work, as long as this thread lives.

    GNU's OpenMP lets threads spin for milliseconds when they wait for more to do: longer than a product takes, on the
    cores that this module's threads need. Where there are more of them than processors, they spin a thousandth of that
    (`GOMP_SPINCOUNT` in its manual). So this thread has a team too, which does nothing after this.
    """
    torch.set_num_threads(2)
    torch.zeros(_SHARED_BYTES).relu_()  # large enough for torch to share it
    torch.set_num_threads(1)
