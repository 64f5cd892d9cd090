"""How the keys and values of a cell lie in memory and in a file: as computed, cast, or in groups of few bits.

Tokens lie one after the other, and the rows of a micro-batch within a token: `(tokens, batch, *row)`, keys in one part
and values in another that begins on a page. As computed, and in 16 bit, a row of a token is `(heads, head_dim)`.

What is attended where it lives, as it is kept, never goes to a file and lies *by heads*, `(batch, heads, capacity,
head_dim)`: a head's tokens are read one after the other, by which attention on a CPU is two to three times as fast in
16 bit. Its views have the axes of all others.

In groups it is a record of bytes that belongs to this row alone: the scales of all its heads, their minima, their codes
(see `quantization.groupwise`), and a byte more if their number is odd. So a token's bytes are contiguous: what a step
adds to a file is one request for keys and one for values, as it is without compression, where scales, minima and codes
in parts of their own would take six, of a page each at least. A row that beams or batches move takes its record along,
which nobody has to unpack. Kernels write and read records where they lie; plain torch goes through copies of codes,
scales and minima.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import torch

from .policy import Compression
from .quantization.dispatch import dequantize, quantize
from .quantization.groupwise import GROUP_DTYPE, GroupFormat, Quantized
from .storage.buffers import round_up, tensor_view

__all__ = ["CellShape", "kept_dtype"]

#: target, source: copies across the link too, as `Workspace.copy` does
_Copy = Callable[[torch.Tensor, torch.Tensor], None]

_AS_COMPUTED = Compression()


def kept_dtype(dtype: torch.dtype, compression: Compression) -> torch.dtype:
    """The dtype in which keys and values of `dtype` are kept; uint8 stands for groups."""
    if compression.cache is None or (compression.cache == 16 and dtype.itemsize <= 2):
        return dtype
    return torch.float16 if compression.cache == 16 else torch.uint8


@dataclasses.dataclass(frozen=True)
class CellShape:
    """Shape of one token's keys (part 0) and values (part 1) in a cell.

    Args:
        batch: rows.
        key: heads and head_dim of keys.
        value: heads and head_dim of values.
        compute_dtype: of keys and values where they are computed with.
        compression: how they are kept.
    """

    batch: int
    key: tuple[int, int]
    value: tuple[int, int]
    compute_dtype: torch.dtype
    compression: Compression = _AS_COMPUTED

    def in_compute(self) -> CellShape:
        """The same as compute sees it."""
        return dataclasses.replace(self, compression=_AS_COMPUTED)

    @functools.cached_property
    def dtype(self) -> torch.dtype:
        """Of what is kept."""
        return kept_dtype(self.compute_dtype, self.compression)

    def row(self, part: int) -> tuple[int, ...]:
        """Shape of a row of a token: (heads, head_dim), or (bytes,) in groups."""
        return self._rows[part]

    def token_bytes(self, part: int) -> int:
        """Bytes of one token."""
        return self.batch * math.prod(self.row(part)) * self.dtype.itemsize

    def views(
        self, memory: torch.Tensor, capacity: int, *, by_heads: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values over `memory`, each (capacity, batch, *row).

        Args:
            memory: at least `nbytes(capacity)`.
            capacity: tokens.
            by_heads: they lie there as (batch, heads, capacity, head_dim); not for groups.
        """
        first, second = (
            self._view(memory, start, capacity, part, by_heads) for part, (start, _) in enumerate(self.parts(capacity))
        )
        return first, second

    def parts(self, capacity: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Of keys and of values: where they begin, and the bytes of one token."""
        key, value = self.token_bytes(0), self.token_bytes(1)
        return (0, key), (round_up(capacity * key), value)

    def nbytes(self, capacity: int) -> int:
        """Bytes of a cell."""
        return sum(round_up(capacity * self.token_bytes(part)) for part in range(2))

    def keep(self, part: int, states: torch.Tensor, rows: torch.Tensor, copy: _Copy) -> None:
        """Puts keys or values where they are kept; in groups, they cross the link packed.

        Args:
            part: 0 for keys, 1 for values.
            states: of some tokens, (tokens, batch, heads, head_dim), where they were computed.
            rows: their place, (tokens, batch, *row).
            copy: see `_Copy`.

        Raises:
            QuantizationError: an element that groups cannot hold.
        """
        if self.dtype is not torch.uint8:
            copy(rows, states)
            return
        packed = rows if rows.device == states.device else torch.empty_like(rows, device=states.device)
        name, room = ("keys", "values")[part], self.quantized(part, packed)
        quantize(states, self.formats[part], name, out=room, threads=torch.get_num_threads())
        if packed is not rows:
            copy(rows, packed)

    def restore(self, part: int, rows: torch.Tensor, states: torch.Tensor, copy: _Copy) -> None:
        """Puts what is kept where it is computed with; the way back of `keep`, with the same arguments."""
        if self.dtype is not torch.uint8:
            copy(states, rows)
            return
        packed = rows
        if rows.device != states.device:
            packed = torch.empty_like(rows, device=states.device)
            copy(packed, rows)
        dequantize(self.quantized(part, packed), self.formats[part], out=states, threads=torch.get_num_threads())

    @functools.cached_property
    def formats(self) -> tuple[GroupFormat, GroupFormat]:
        """Of keys and values in groups, along head_dim; one shorter than a group is one, a multiple of 8 long."""
        assert self.compression.cache is not None
        bits, size = self.compression.cache, self.compression.group_size
        keys, values = (GroupFormat(bits, min(size, round_up(width, 8))) for _, width in (self.key, self.value))
        return keys, values

    def quantized(self, part: int, rows: torch.Tensor) -> Quantized:
        """The parts of keys or values in groups, (tokens, batch, *row), all views."""
        fmt, heads = self.formats[part], (self.key, self.value)[part]
        groups, codes = fmt.groups(heads), fmt.packed_shape(heads)
        size = math.prod(groups) * GROUP_DTYPE.itemsize
        scales = torch.unflatten(rows[..., :size].view(GROUP_DTYPE), -1, groups)
        minima = torch.unflatten(rows[..., size : 2 * size].view(GROUP_DTYPE), -1, groups)
        packed = torch.unflatten(rows[..., 2 * size : 2 * size + math.prod(codes)], -1, codes)
        return Quantized(packed, scales, minima, (*rows.shape[:-1], *heads))

    # ---------------------------------------------------------------------------------------------------------- inside
    def _view(self, memory: torch.Tensor, start: int, capacity: int, part: int, by_heads: bool) -> torch.Tensor:
        if not by_heads:
            return tensor_view(memory, start, self.dtype, (capacity, self.batch, *self.row(part)))
        heads, width = self.row(part)
        return tensor_view(memory, start, self.dtype, (self.batch, heads, capacity, width)).permute(2, 0, 1, 3)

    @functools.cached_property
    def _rows(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        if self.dtype is not torch.uint8:
            return self.key, self.value
        sizes = [fmt.nbytes(heads) for fmt, heads in zip(self.formats, (self.key, self.value), strict=True)]
        return (round_up(sizes[0], GROUP_DTYPE.itemsize),), (round_up(sizes[1], GROUP_DTYPE.itemsize),)
