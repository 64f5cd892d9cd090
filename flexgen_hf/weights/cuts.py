"""How stored tensors are read and pushed: long reads of a file, and pieces of about one size.

Knows extents and where in a buffer their bytes land; knows neither tiers nor memory.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from ..planning.layout import PIECE_BYTES
from ..planning.schedule import Route
from ..storage.buffers import PAGE, round_up
from .quantized import QuantizedExtent
from .tensors import StoredTensor

__all__ = ["Piece", "Run", "Segment", "cut", "in_file_order", "parts_of", "runs_of"]

# Tensors this close together in a file are read with the bytes between them: one request is cheaper than two.
_GAP_BYTES = 16 << 10


@dataclasses.dataclass(frozen=True)
class Run:
    """A contiguous part of a file that is read with one request into one part of a buffer."""

    file: Path
    offset: int
    nbytes: int
    at: int


@dataclasses.dataclass(frozen=True)
class Segment:
    """Elements of a tensor, or rows of a quantized one, that cross to the device together.

    Args:
        tensor: whose they are.
        first: the first of them.
        count: how many.
        at: where their bytes begin in the memory that they come from, for each part of the tensor; nothing if they are
            on the device.
    """

    tensor: StoredTensor
    first: int
    count: int
    at: tuple[int, ...]


@dataclasses.dataclass
class Piece:
    """A part of a stage's weights that moves as one: from disk into its place, through staging, or from the host."""

    runs: list[Run] = dataclasses.field(default_factory=list)
    segments: list[Segment] = dataclasses.field(default_factory=list)

    @property
    def route(self) -> Route:
        """The links that it crosses."""
        return Route(read=bool(self.runs), push=bool(self.segments))

    @property
    def staging_bytes(self) -> int:
        """Size of the buffer that it passes through; 0 if it is read into its place."""
        return max((round_up(run.at + run.nbytes) for run in self.runs), default=0) if self.segments else 0


def _unit(tensor: StoredTensor) -> tuple[int, list[int]]:
    """What a tensor may be cut into, elements or rows: how many there are, and their bytes in each part."""
    extent = tensor.extent
    if isinstance(extent, QuantizedExtent):
        return extent.rows, [extent.row_bytes(part) for part in extent.parts]
    size = tensor.stored_dtype.itemsize
    return tensor.stored_bytes // size, [size]


def runs_of(tensors: Sequence[StoredTensor]) -> tuple[list[Run], list[tuple[StoredTensor, Sequence[int]]], int]:
    """Groups extents into long reads, and says where in a buffer each part of a tensor lands, and how large that is."""
    runs: list[Run] = []
    parts = sorted({part for t in tensors for part in t.parts}, key=lambda part: (str(part.file), part.offset))
    at = {part: _add_run(runs, part.file, part.offset, part.nbytes) for part in parts}
    places: list[tuple[StoredTensor, Sequence[int]]] = [(t, [at[part] for part in t.parts]) for t in tensors]
    return runs, places, round_up(runs[-1].at + runs[-1].nbytes) if runs else 0


def in_file_order(tensors: Iterable[StoredTensor]) -> list[StoredTensor]:
    """The tensors in the order in which they lie."""
    return sorted(tensors, key=lambda tensor: (str(tensor.extent.file), tensor.extent.offset))


def parts_of(run: Run) -> Iterator[Run]:
    """A long read in parts that begin on pages of the file, so that no two of them touch the same page."""
    done = 0
    while done < run.nbytes:
        size = min(PIECE_BYTES - (run.offset + done) % PAGE, run.nbytes - done)
        yield Run(run.file, run.offset + done, size, run.at + done)
        done += size


def cut(
    tensors: Sequence[StoredTensor], nbytes: int, held: Mapping[StoredTensor, Sequence[int]] | None = None
) -> list[Piece]:
    """Cuts tensors into pieces, between elements or rows; short tensors share one.

    Args:
        tensors: what is to be moved.
        nbytes: about how large a piece is to be.
        held: where each part of a tensor is in the host arena (nowhere, if it is on the device); None if they are read
            from their files through staging.
    """
    pieces: list[Piece] = []
    filled = nbytes
    for tensor in tensors:
        total, sizes = _unit(tensor)
        size, first = sum(sizes), 0
        while first < total:
            room = (nbytes - filled) // size
            if room <= 0:
                pieces.append(Piece())
                filled, room = 0, max(1, nbytes // size)
            piece, count = pieces[-1], min(room, total - first)
            if held is None:
                at = _read_parts(piece, tensor, first, count)
                filled = piece.runs[-1].at + piece.runs[-1].nbytes
            else:
                at = tuple(begin + first * unit for begin, unit in zip(held[tensor], sizes, strict=False))
                filled += count * size
            piece.segments.append(Segment(tensor, first, count, at))
            first += count
    return pieces


def _read_parts(piece: Piece, tensor: StoredTensor, first: int, count: int) -> tuple[int, ...]:
    """Adds elements or rows of a tensor to what a piece reads; returns where the bytes of each part land."""
    _, sizes = _unit(tensor)
    places = {}
    for part, size in sorted(zip(tensor.parts, sizes, strict=True), key=lambda item: item[0].offset):
        places[part] = _add_run(piece.runs, part.file, part.offset + first * size, count * size)
    return tuple(places[part] for part in tensor.parts)


def _add_run(runs: list[Run], file: Path, offset: int, nbytes: int) -> int:
    """Adds an extent to the reads of a buffer, joined to the last one if it is near; returns where its bytes land.

    A run begins in the buffer at the same distance from a page boundary as in the file, so that the file's alignment
    carries over.
    """
    last = runs[-1] if runs else None
    end = last.offset + last.nbytes if last is not None else 0
    if last is not None and last.file == file and 0 <= offset - end <= _GAP_BYTES:
        runs[-1] = dataclasses.replace(last, nbytes=offset + nbytes - last.offset)
    else:
        at = round_up(last.at + last.nbytes) if last is not None else 0
        runs.append(Run(file, offset, nbytes, at + offset % PAGE))
    return runs[-1].at + offset - runs[-1].offset
