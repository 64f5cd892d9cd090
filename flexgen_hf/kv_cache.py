"""The key-value cache of a block, made of cells: one per (layer, micro-batch).

Knows which rows belong to which micro-batch; where a cell lives and how it moves is the cell's own business.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from transformers.cache_utils import Cache

from .cell_layout import CellShape
from .cell_space import CacheSpace, SlotBytes
from .cells import Cell, exchange
from .errors import CapacityError, FlexGenError
from .planning.budget import Need
from .policy import Tier

__all__ = ["BlockCache", "MicroBatchCache", "OpenBlock", "Part", "Span", "spans_of"]

Span = tuple[int, int]


def spans_of(rows: int, batch_size: int) -> list[Span]:
    """Cuts `rows` rows into micro-batches; the last one may be ragged."""
    return [(start, min(start + batch_size, rows)) for start in range(0, rows, batch_size)]


class MicroBatchCache(Cache):
    """What the model's forward sees of a `BlockCache`: the cells of one micro-batch."""

    def __init__(self, cells: list[Cell]) -> None:
        self.cells = cells
        super().__init__(layers=list(cells))


class BlockCache(Cache):
    """The cache of a block, a transformers `Cache` made of one child per micro-batch.

    Args:
        space: what the cells share; the block cache owns it.
        spans: rows of each micro-batch.
        homes: `homes(layer, batch)` is the tier of a cell.
        windows: for each layer its sliding window, or None.
        capacity: tokens to allocate for; a cell of a sliding-window layer has room for its window only.
        keeps_past: cells of sliding-window layers keep everything, too.
    """

    def __init__(
        self,
        space: CacheSpace,
        spans: Sequence[Span],
        homes: Callable[[int, int], Tier],
        windows: Sequence[int | None],
        capacity: int,
        *,
        keeps_past: bool = True,
    ) -> None:
        self.space, self.spans, self.capacity = space, list(spans), capacity
        #: columns of left padding that each micro-batch leaves out: its cells hold so many tokens fewer
        self.padding = [0] * len(self.spans)
        #: whether it may; then rows stay in their micro-batches
        self.may_leave_padding = False
        #: called before cells are touched outside a sweep; the executor sets it to wait for its lanes
        self.settle: Callable[[], None] = lambda: None
        self.children = [
            MicroBatchCache(
                [
                    Cell(space, homes(layer, k), capacity, window, keeps_past=keeps_past)
                    for layer, window in enumerate(windows)
                ]
            )
            for k in range(len(self.spans))
        ]
        super().__init__(layers=[])
        self._close = weakref.finalize(self, space.close)

    # `layers` is what transformers' masks and length queries look at; all children have the same lengths.
    @property
    def layers(self) -> list[Any]:
        """The cells of the first micro-batch."""
        return list(self.children[0].cells)

    @layers.setter
    def layers(self, _: Any) -> None:
        pass

    @property
    def is_compileable(self) -> bool:
        """False: placement happens outside of what a compiler may see."""
        return False

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens of each row, those of padding that is left out included."""
        return int(self.children[0].cells[layer_idx].length) + self.padding[0]

    @property
    def is_empty(self) -> bool:
        """Whether no micro-batch has any token yet."""
        return all(child.cells[0].length == 0 for child in self.children)

    def cells(self) -> Iterator[Cell]:
        """Every cell."""
        for child in self.children:
            yield from child.cells

    def preallocate(self, key: tuple[int, int], value: tuple[int, int], dtype: torch.dtype) -> None:
        """Takes all homes before work starts, so that a tier that is too small refuses here.

        Args:
            key: heads and width of keys.
            value: heads and width of values.
            dtype: of compute.

        Raises:
            CapacityError: a tier or the disk is too small; the cache is closed then.
        """
        try:
            for (start, end), child in zip(self.spans, self.children, strict=True):
                for cell in child.cells:
                    cell.allocate(end - start, key, value, dtype)
        except BaseException:
            self.close()  # whoever handles the error may keep this object alive
            raise

    def prepare_sweep(self) -> None:
        """Makes the slots large enough for every cell that will be loaded.

        Raises:
            FlexGenError: the cache was closed, which an error in the middle of a sweep does.
            CapacityError: a tier is too small for the slots.
        """
        if not self._close.alive:
            raise FlexGenError("this past_key_values was closed, by close() or by an error; begin with a new one")
        needs = _largest(cell.slot_bytes for cell in self.cells())
        if not self.space.holds(needs):
            self.settle()
            self.space.ensure(needs)

    def growth(self, tokens: int) -> list[Need]:
        """The most that homes and slots would take more if every row got `tokens` tokens in all."""
        grown = [(cell.home, cell.growth(tokens)) for cell in self.cells()]
        needs = [Need(home, more.home, "the KV cache" if home is Tier.DISK else "KV cache") for home, more in grown]
        needs += self.space.growth(_largest(more.slots for _, more in grown), max(more.bounce for _, more in grown))
        return [need for need in needs if need.nbytes]

    def reserve(self, capacity: int) -> None:
        """Makes room for `capacity` tokens."""
        self.settle()
        self.capacity = max(self.capacity, capacity)
        for cell in self.cells():
            cell.reserve(capacity)

    def placement(self) -> dict[Tier, int]:
        """Bytes whose home is each tier."""
        sizes = dict.fromkeys(Tier, 0)
        for cell in self.cells():
            sizes[cell.home] += cell.nbytes
        return sizes

    def update(self, *_: Any, **__: Any) -> Any:
        """Not meant to be called: attention updates the children."""
        raise RuntimeError("a BlockCache is updated through its micro-batches")

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Row i of the block becomes what row `beam_idx[i]` was; `beam_idx` is (rows,)."""
        self.settle()
        index = beam_idx.cpu()
        if torch.equal(index, torch.arange(index.numel())):
            return
        parts = [index[start:end] - start for start, end in self.spans]
        if all(
            bool(((part >= 0) & (part < end - start)).all())
            for part, (start, end) in zip(parts, self.spans, strict=True)
        ):
            for child, part in zip(self.children, parts, strict=True):
                for cell in child.cells:
                    cell.select(part)
        else:
            self._gather(index)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps the rows `indices` of the block, in that order, in as many micro-batches as they fill."""
        self.settle()
        rows, width = int(indices.numel()), self.spans[0][1] - self.spans[0][0]
        self._gather(indices.cpu(), spans_of(rows, max(width, -(-rows // len(self.spans)))))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row; micro-batches grow by the same factor."""
        self.settle()
        for cell in self.cells():
            cell.batch_repeat_interleave(repeats)
        self.spans = [(start * repeats, end * repeats) for start, end in self.spans]

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last `-tokens_to_remove` tokens of every row."""
        self.settle()
        for cell in self.cells():
            cell.check_crop(tokens_to_remove)  # all, before one of them is cropped
        for cell in self.cells():
            cell.crop(tokens_to_remove)

    def reset(self) -> None:
        """Forgets everything, keeps the memory."""
        self.settle()
        self.padding = [0] * len(self.spans)
        for cell in self.cells():
            cell.reset()

    def activate_past_recording(self) -> None:
        """From now on, cells keep all tokens, so that any number of these can be cropped."""
        for cell in self.cells():
            cell.keep_past()
        self.reserve(self.capacity)

    def close(self) -> None:
        """Gives all memory and files back. Called when the cache is collected, at the latest."""
        self.settle()
        self._close()

    def _gather(self, index: torch.Tensor, spans: list[Span] | None = None) -> None:
        """Reorders rows that move between micro-batches: in place, or if their number changes, a layer at a time."""
        assert len(set(self.padding)) == 1, "rows cannot change micro-batches of different padding"
        in_place = spans in (None, self.spans)
        self.spans = spans or self.spans
        for layer in range(len(self.layers)):
            cells = [child.cells[layer] for child in self.children]
            if not cells[0].is_initialized or cells[0].length == 0:
                continue
            rows = [index[start:end] for start, end in self.spans]
            if in_place:
                exchange(cells, rows)
            else:
                _rebuild(cells, rows)
        for child in self.children[len(self.spans) :]:
            for cell in child.cells:
                cell.discard()
        self.children = self.children[: len(self.spans)]


class Part(NamedTuple):
    """Some rows of a micro-batch, and which of their tokens.

    Args:
        child: the micro-batch.
        rows: numbers of rows, (rows,), with repetitions if wanted.
        first: the first token that is meant.
        last: the last one, excluded.
    """

    child: MicroBatchCache
    rows: torch.Tensor
    first: int
    last: int


class OpenBlock(BlockCache):
    """A block whose micro-batches come and go, each as far in its texts as it is: `children` are those of a sweep.

    Whoever changes `children`, or the cells of one, has waited until no lane is busy with them. Cells of sliding-window
    layers keep everything: rows that are put together have windows of their own.

    Args:
        space: what the cells share; the block cache owns it.
        homes: `homes(layer, place)` is the tier of a cell; a micro-batch has the homes of some place.
        windows: for each layer its sliding window, or None.
    """

    def __init__(self, space: CacheSpace, homes: Callable[[int, int], Tier], windows: Sequence[int | None]) -> None:
        super().__init__(space, [], homes, windows, capacity=1)
        self._homes, self._windows = homes, list(windows)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens of the micro-batch that has most."""
        return max((int(child.cells[layer_idx].length) for child in self.children), default=0)

    def make(self, place: int, capacity: int) -> MicroBatchCache:
        """Empty cells for `capacity` tokens, of a micro-batch that is not in the block yet; they take no memory."""
        windows = enumerate(self._windows)
        return MicroBatchCache([Cell(self.space, self._homes(j, place), capacity, window) for j, window in windows])

    def fill(self, target: MicroBatchCache, parts: Sequence[Part], length: int, *, move: bool = False) -> None:
        """Gives empty cells the rows of `parts`, one behind the other, each with its last token at the end.

        What is left of the first of `length` tokens is zero. Rows go as they are kept, so nothing is rounded anew.

        Args:
            target: what `make` returned.
            parts: where the rows come from; no part has more than `length` tokens.
            length: tokens that `target` holds then.
            move: what the parts are taken from is given back, layer by layer, before `target` takes its memory; where
                its tier has no room then, as the parts were on others, it goes to the next below.

        Raises:
            CapacityError: a tier is full.
        """
        for layer, cell in enumerate(target.cells):
            sources = [part.child.cells[layer] for part in parts]
            shape = sources[0].shape
            whole = {id(source): _whole(source) for source in sources}
            kept = [
                [
                    whole[id(source)][which][part.first : part.last].index_select(
                        1, part.rows.to(whole[id(source)][which].device)
                    )
                    for source, part in zip(sources, parts, strict=True)
                ]
                for which in (0, 1)
            ]
            if move:
                for source in sources:
                    source.discard()
            _allocate(cell, sum(len(part.rows) for part in parts), shape, may_sink=move)
            cell.put(_right_aligned(kept[0], length), _right_aligned(kept[1], length), 0)

    def discard(self, child: MicroBatchCache) -> None:
        """Gives back what a micro-batch's cells hold."""
        for cell in child.cells:
            cell.discard()


def _allocate(cell: Cell, rows: int, shape: CellShape, *, may_sink: bool) -> None:
    """Takes the home of a cell like one of `shape`; if it may sink and the tier is full, on a lower one."""
    tiers = list(Tier)
    for tier in tiers[tiers.index(cell.home) :]:
        cell.home = tier
        try:
            cell.allocate(rows, shape.key, shape.value, shape.compute_dtype)
        except CapacityError:
            if not may_sink or tier is tiers[-1]:
                raise
        else:
            return


def _whole(cell: Cell) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values as they are kept, (tokens, rows, *row), where they are if they need not be read."""
    if cell.home is Tier.DISK:
        return cell.get()
    tokens = (0, cell.length)
    return cell.block(0, tokens), cell.block(1, tokens)


def _right_aligned(parts: Sequence[torch.Tensor], length: int) -> torch.Tensor:
    """(length, rows of all parts, *row), zero where a part has no token."""
    first = parts[0]
    made = first.new_zeros((length, sum(part.shape[1] for part in parts), *first.shape[2:]))
    row = 0
    for part in parts:
        made[length - part.shape[0] :, row : row + part.shape[1]] = part.to(made.device)
        row += part.shape[1]
    return made


def _largest(slots: Iterable[SlotBytes]) -> SlotBytes:
    """Of each kind of buffer the largest."""
    return SlotBytes(*map(max, zip(SlotBytes(), *slots, strict=True)))


def _rebuild(cells: Sequence[Cell], rows: Sequence[torch.Tensor]) -> None:
    """Gives cell k the rows `rows[k]` of all cells, one behind the other; it may have had another number of rows."""
    pairs, dropped = [cell.get() for cell in cells], cells[0].dropped
    device = pairs[0][0].device
    keys, values = (torch.cat([pair[i].to(device) for pair in pairs], 1) for i in (0, 1))
    for cell, wanted in zip(cells, rows, strict=False):
        index = wanted.to(device)
        cell.put(keys.index_select(1, index), values.index_select(1, index), dropped)
