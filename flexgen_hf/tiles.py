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

# What is cast at a time stays in the processor's cache where few rows are multiplied, and memory is the limit; where
# many are, a larger part makes the product more efficient.
_FEW_ROWS = 64
_SMALL_TILE_BYTES = 2 << 20

# Of what one thread dequantizes at a time; smaller tiles are no faster, as calls take time too.
_DEQUANTIZED_TILE_BYTES = 4 << 20

# Matrices of fewer bytes in the dtype of compute are not shared among threads.
_SHARED_BYTES = 1 << 19


class TileCast:
    """`torch.nn.functional.linear` for weights kept in another dtype, cast tile by tile into a reused buffer."""

    def __init__(self) -> None:
        self._buffer: Tensor | None = None

    def release(self) -> None:
        """Gives the buffer back."""
        self._buffer = None

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The product.

        Args:
            x: (..., in_features) in the dtype of compute.
            weight: (out_features, in_features).
            bias: (out_features,) in the dtype of compute, or None.
        """
        if weight.dtype == x.dtype:
            return nn.functional.linear(x, weight, bias)
        width = weight.shape[1]
        rows = x.reshape(-1, width)
        out = x.new_empty((rows.shape[0], weight.shape[0]))
        step = self._tile_rows(rows.shape[0], width * x.element_size())
        tile = self._tile(step * width, x).view(step, width)
        for start in range(0, weight.shape[0], step):
            part = slice(start, min(start + step, weight.shape[0]))
            cast = tile[: part.stop - part.start].copy_(weight[part])
            torch.mm(rows, cast.t(), out=out[:, part])
        if bias is not None:
            out += bias
        return out.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def _tile_rows(rows: int, row_bytes: int) -> int:
        return max(1, (_SMALL_TILE_BYTES if rows <= _FEW_ROWS else TILE_BYTES) // row_bytes)

    def _tile(self, size: int, like: Tensor) -> Tensor:
        self._buffer = _at_least(self._buffer, size, like)
        return self._buffer[:size]


class TileDequantize:
    """`torch.nn.functional.linear` for quantized weights.

    The rows of a matrix are shared among as many threads as torch has. Each dequantizes tiles of its share into a
    buffer of its own, and multiplies them with torch in that one thread: dequantizing alone is as much work as the
    product of a few rows. In float32, up to four rows are multiplied without a tile, as each weight is made.
    """

    def __init__(self) -> None:
        self._buffers: dict[int, Tensor] = {}
        self._pool: concurrent.futures.ThreadPoolExecutor | None = None

    def release(self) -> None:
        """Ends the threads and gives the buffers back."""
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None
        self._buffers = {}

    def linear(self, x: Tensor, weight: Quantized, fmt: GroupFormat, bias: Tensor | None) -> Tensor:
        """The product.

        Args:
            x: (..., in_features) in the dtype of compute, on the CPU.
            weight: of shape (out_features, in_features).
            fmt: its width and group size.
            bias: (out_features,) in the dtype of compute, or None.
        """
        count, width = weight.shape
        rows, row_bytes = x.reshape(-1, width), width * x.element_size()
        threads = self._threads(count, row_bytes)
        cuts = [count * k // threads for k in range(threads + 1)]
        fused = dispatch.row_multiplier(weight, fmt, rows)
        if fused is not None:
            out, multiply = fused
            self._share(lambda number: multiply(*cuts[number : number + 2]), threads)
        else:
            out = x.new_empty((rows.shape[0], count))
            read = dispatch.row_reader(weight, fmt)

            def work(number: int) -> None:
                first, last = cuts[number : number + 2]
                tile = self._tile(number, rows, min(last - first, self._tile_rows(threads, row_bytes)))
                for start in range(first, last, len(tile)):
                    part = tile[: last - start]
                    read(start, start + len(part), part)
                    torch.mm(rows, part.t(), out=out[:, start : start + len(part)])

            self._share(work, threads)
        if bias is not None:
            out += bias
        return out.view(*x.shape[:-1], count)

    def _share(self, work: Callable[[int], None], threads: int) -> None:
        """Runs all shares, several in threads of this object, which see the caller's mode: it belongs to a thread."""
        if threads == 1:
            work(0)
            return
        given, is_inference = torch.get_num_threads(), torch.is_inference_mode_enabled()

        def alike(number: int) -> None:
            with torch.inference_mode() if is_inference else torch.no_grad():
                work(number)

        list(self._started_pool(threads).map(alike, range(threads)))
        torch.set_num_threads(given)  # torch gives the last number set to threads that come later

    @staticmethod
    def _threads(count: int, row_bytes: int) -> int:
        """Each needs a row at least, and all tiles together stay within `TILE_BYTES`."""
        is_worth_it = dispatch.has_kernels() and count * row_bytes >= _SHARED_BYTES
        return max(1, min(torch.get_num_threads(), count, TILE_BYTES // row_bytes)) if is_worth_it else 1

    @staticmethod
    def _tile_rows(threads: int, row_bytes: int) -> int:
        return max(1, min(_DEQUANTIZED_TILE_BYTES, TILE_BYTES // threads) // row_bytes)

    def _tile(self, number: int, like: Tensor, count: int) -> Tensor:
        """A tile of so many rows of the given length, in the buffer of a share."""
        size = count * like.shape[1]
        held = self._buffers[number] = _at_least(self._buffers.get(number), size, like)
        return held[:size].view(count, like.shape[1])

    def _started_pool(self, threads: int) -> concurrent.futures.ThreadPoolExecutor:
        if self._pool is None or self._pool._max_workers != threads:
            self.release()
            self._pool = concurrent.futures.ThreadPoolExecutor(threads, "flexgen-tiles", _alone)
        return self._pool


def _at_least(held: Tensor | None, size: int, like: Tensor) -> Tensor:
    """A buffer of at least so many elements of the type and device of `like`: the one that is held, if it will do."""
    if held is None or held.dtype != like.dtype or held.device != like.device or held.numel() < size:
        return like.new_empty(size)
    return held


def _alone() -> None:
    """One thread for torch's arithmetic in this one."""
    torch.get_num_threads()  # a thread that never asked would be given the number anew, and forget this one
    torch.set_num_threads(1)
