"""The loop that writes texts: who is computed with whom, sweep after sweep.

In each sweep all micro-batches go through the layers together: those whose texts decode, and those whose prompts are
computed. Between two sweeps texts that have ended leave; micro-batches that have become small are put together, and the
room goes to texts that wait. What several prompts begin with is computed once, in a row of its own, and copied.

Where a text is written changes nothing in it: rows do not see each other, and each draws its own random numbers.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch

from ..accounting import Account, Load
from ..errors import CapacityError, PolicyError
from ..executor import Executor
from ..kv_cache import MicroBatchCache, OpenBlock, Part
from .groups import Beginning, Group, capacity_for
from .prefixes import common_beginnings, common_length, in_good_order
from .texts import Text, TextRequest, Written

__all__ = ["LEAST_SHARED", "ContinuousBatches", "Engine", "Waiting"]

#: tokens that a common beginning has at least, by default
LEAST_SHARED = 32

# A window is so many blocks, and so many requests at least: enough to find neighbours of nearly the same length.
_WINDOW_BLOCKS = 16
_LEAST_WINDOW = 1024

# A new micro-batch is begun when this part of one can be filled; smaller ones would be put together right after.
_LEAST_PART = 4

# Cells are written anew, without what has ended, when what is left takes less than this share of them.
_WORTH_SHRINKING = 0.6

# A beginning that was computed for earlier requests is used for later ones if it has this share of theirs.
_CLOSE_ENOUGH = 0.8


@dataclasses.dataclass(frozen=True, eq=False)
class Engine:
    """What the loop is made of.

    Args:
        executor: runs sweeps.
        account: refuses what does not fit.
        block: makes and moves cells.
        generate: transformers' `generate` of the model.
        geometry: heads and width of keys, of values, and their dtype; None if that is only known once they are
            computed.
        context: tokens that a text may have at most; None if there is no saying.
    """

    executor: Executor
    account: Account
    block: OpenBlock
    generate: Callable[..., Any]
    geometry: tuple[tuple[int, int], tuple[int, int], torch.dtype] | None
    context: int | None


class Waiting(Text):
    """A text that was not begun, with the beginning that it shares with others, if it does."""

    beginning: Beginning | None = None
    shared = 0  # tokens of it that this text begins with

    @property
    def shareable(self) -> Sequence[int]:
        """The tokens of which all but the last may be known from another text."""
        return self.request.ids

    @property
    def known(self) -> int:
        """Tokens whose keys and values need not be computed."""
        return self.shared if self.beginning is not None and self.beginning.is_done else 0

    def needs_no_beginning(self) -> None:
        """Notes that it does not wait any more."""
        if self.beginning is not None:
            self.beginning.wanted -= 1


class ContinuousBatches:
    """See `FlexGenForCausalLM.generate_each`.

    Args:
        engine: what it runs on.
        window: requests that are read ahead and put in order.
        least_shared: tokens that a common beginning has at least; None shares none.
        on_sweep: called after each sweep with the number of new tokens.
    """

    def __init__(
        self,
        engine: Engine,
        window: int | None = None,
        least_shared: int | None = LEAST_SHARED,
        on_sweep: Callable[[int], None] | None = None,
    ) -> None:
        policy = engine.executor.policy
        self._executor, self._block, self._engine = engine.executor, engine.block, engine
        self._size, self._rows, self._places = policy.batch_size, policy.block_size, policy.num_batches
        self._window = max(_LEAST_WINDOW, _WINDOW_BLOCKS * self._rows) if window is None else window
        if self._window < 1:
            raise PolicyError(f"window={window}: give a number of requests above 0, or leave it out")
        # Kept in fewer bits, a beginning would be seen by the prompt in another precision than when computed with it.
        self._least_shared = None if engine.block.space.casts else least_shared
        self._on_sweep = on_sweep
        # Elsewhere padding would change what a text is.
        self._may_pad = engine.executor.structure.numbers_tokens_by_mask
        self._waiting: collections.deque[Waiting] = collections.deque()
        self._windows_read = 0
        self._groups: list[Group] = []
        self._heads: list[Group] = []  # beginnings that the next sweep computes
        self._beginnings: list[Beginning] = []
        self._place_of: dict[int, int] = {}  # of a group's cells, by their id
        self._largest = 0  # rows x tokens of the largest cells so far: the buffers that cells pass through hold them
        self._ended: list[Written] = []
        self._enter: Callable[[Sequence[Load]], None] = lambda _: None

    def run(self, requests: Iterable[Any]) -> Iterator[Written]:
        """Computes all texts, of requests that `_texts` knows; yields each as it ends."""
        source = iter(requests)
        with self._executor.session(), self._engine.account.sweeps() as self._enter:
            try:
                while True:
                    self._read(source)
                    if not (self._groups or self._waiting or self._heads):
                        break
                    with torch.no_grad():
                        self._place()
                        if self._groups or self._heads:
                            self._sweep()
                    yield from self._taken()
                yield from self._taken()
            finally:
                self._stop()

    # ---------------------------------------------------------------------------------------------------- what waits
    def _read(self, source: Iterator[TextRequest]) -> None:
        """Reads the next window when less than a block is left of the last one."""
        if len(self._waiting) >= self._rows:
            return
        texts = self._texts(source)
        self._share(texts)
        order = in_good_order(
            [len(text.request.ids) for text in texts],
            [int(text.request.options.get("max_new_tokens") or 0) for text in texts],
            [self._beginnings.index(text.beginning) if text.beginning is not None else -1 for text in texts],
        )
        # Every second window in the other direction: what is left of one and the first of the next are alike.
        self._waiting.extend(texts[i] for i in (order if self._windows_read % 2 == 0 else reversed(order)))
        self._windows_read += bool(texts)

    def _texts(self, source: Iterator[Any]) -> list[Waiting]:
        """The texts of the next window; none only if there are no more requests."""
        return [Waiting(request, self._engine.generate) for request in itertools.islice(source, self._window)]

    def _make_group(self, child: MicroBatchCache, texts: Sequence[Waiting], first: int, width: int) -> Group:
        """What computes them together."""
        return Group(child, texts, first, width)

    def _share(self, texts: Sequence[Waiting]) -> None:
        """Finds what texts begin with in common, among them and with earlier ones."""
        if self._least_shared is None or not texts:
            return
        earlier, self._beginnings = self._beginnings, [b for b in self._beginnings if b.wanted]
        for members, tokens in common_beginnings([text.shareable for text in texts], max(1, self._least_shared)):
            ids = texts[members[0]].request.ids[:tokens]
            close = [b for b in earlier if not b.failed and common_length(b.ids, ids) >= _CLOSE_ENOUGH * tokens]
            beginning = max(close, key=lambda b: common_length(b.ids, ids)) if close else Beginning(ids)
            if beginning not in self._beginnings:
                self._beginnings.append(beginning)
            for member in members:
                texts[member].beginning = beginning
                texts[member].shared = common_length(beginning.ids, ids)
            beginning.wanted += len(members)
        for beginning in earlier:
            if beginning not in self._beginnings and beginning.child is not None:
                self._drop(beginning.child)

    # ------------------------------------------------------------------------------------------------ between sweeps
    def _place(self) -> None:
        """Puts small micro-batches together and begins new ones, as far as there is room."""
        while (pair := self._pair()) is not None:
            self._join(pair)
        for group in [g for g in self._groups if self._is_wasteful(g)]:
            self._join([group])
        while self._waiting:
            room = self._rows - sum(group.live_rows for group in self._groups)
            if self._groups and room < min(len(self._waiting), -(-self._size // _LEAST_PART)):
                break
            self._make_room(min(room, self._size))
            if not self._begin(min(max(room, 1), self._size)):
                break
        for text in itertools.islice(self._waiting, self._size):  # so that they need not wait when it is their turn
            if text.beginning is not None and text.beginning.is_new and self._start(text):
                self._begin_beginning(text, text.beginning)

    def _make_room(self, rows: int) -> None:
        """Writes cells anew, without the rows of texts that have ended, until there is memory for `rows` more."""
        for group in sorted(self._groups, key=lambda g: g.live_rows - g.rows):
            if sum(g.rows for g in self._groups) + rows <= self._rows or group.live_rows == group.rows:
                return
            self._join([group])

    def _pair(self) -> list[Group] | None:
        """Two micro-batches that fit in one, without taking more memory than both; the smallest ones."""
        groups = sorted(self._groups, key=lambda group: group.live_rows)
        for one, other in itertools.combinations(groups, 2):
            rows = one.live_rows + other.live_rows
            if rows > self._size:
                continue
            width = self._width([one, other])
            held = sum(group.rows * group.child.cells[0].capacity for group in (one, other))
            tokens = {member.cache.tokens for group in (one, other) for member in group.live}
            made = rows * capacity_for([*one.live, *other.live], width)
            if made <= min(held, self._largest) and (self._may_pad or len(tokens) == 1):
                return [one, other]
        return None

    def _is_wasteful(self, group: Group) -> bool:
        left = group.live_rows * self._width([group])
        return left < _WORTH_SHRINKING * group.rows * group.width

    @staticmethod
    def _width(groups: Sequence[Group]) -> int:
        """Tokens of the longest text after the next forward."""
        return max(member.cache.tokens + member.new_tokens for group in groups for member in group.live)

    def _join(self, groups: Sequence[Group]) -> None:
        """Makes one micro-batch of several, or of one, out of the rows that go on and the tokens that they have."""
        self._executor.settle(weights=False)
        width = self._width(groups)
        members = [member for group in groups for member in group.live]
        place = self._place_of[id(groups[0].child)]
        child = self._block.make(place, capacity_for(members, width))
        self._reorder(groups)
        self._block.fill(child, [group.parts(width - 1) for group in groups], width - 1, move=True)
        for group in groups:
            self._groups.remove(group)
            del self._place_of[id(group.child)]
        self._groups.append(Group(child, members, width - 1, width))
        self._place_of[id(child)] = place

    def _reorder(self, groups: Sequence[Group]) -> None:
        """Brings rows in the order that beams want."""
        for group in groups:
            if (order := group.reordered()) is not None:
                self._executor.settle(weights=False)
                for cell in group.child.cells:
                    cell.select(order)

    # ---------------------------------------------------------------------------------------------------- beginnings
    def _begin(self, room: int) -> bool:
        """Begins a micro-batch of the next texts, of `room` rows at most; returns whether it could."""
        texts = self._next_texts(room)
        while texts:
            try:
                self._groups.append(self._group(texts))
            except CapacityError as error:
                back = texts[len(texts) // 2 :] if len(texts) > 1 else texts
                self._waiting.extendleft(reversed(back))
                if len(texts) == 1:
                    if self._groups:  # there will be room when they have ended
                        return False
                    self._waiting.popleft()
                    self._fail(texts[0], error)
                    return True
                texts = texts[: len(texts) // 2]
            else:
                for text in texts:
                    text.needs_no_beginning()
                return True
        return False

    def _next_texts(self, room: int) -> list[Waiting]:
        """The next texts that can be computed together, taken from those that wait."""
        texts: list[Waiting] = []
        rows = 0
        while self._waiting and rows < room:
            text = self._waiting[0]
            if not self._start(text):
                self._waiting.popleft()
                continue
            if (texts or self._groups) and rows + text.rows > room:
                break
            if texts and not (self._may_pad or text.new_tokens == texts[0].new_tokens):
                break
            beginning = text.beginning
            if beginning is not None and not (beginning.is_done or beginning.failed):
                if beginning.is_new:
                    self._begin_beginning(text, beginning)
                if not beginning.failed:
                    break
            texts.append(self._waiting.popleft())
            rows += text.rows
        return texts

    def _start(self, text: Waiting) -> bool:
        """Runs a text to its first forward; returns whether there is one."""
        if not text.is_started:
            text.advance()
            if not text.is_done and (context := self._engine.context) is not None and text.cache.limit > context:
                new = text.cache.limit + 1 - text.new_tokens
                error = PolicyError(
                    f"a prompt of {text.new_tokens} tokens and {new} new ones are more than the model's context of "
                    f"{context} tokens; shorten it, or ask for fewer new tokens"
                )
                self._fail(text, error)
            elif text.is_done:
                text.needs_no_beginning()
                self._end(text)
        return not text.is_done

    def _group(self, texts: Sequence[Waiting]) -> Group:
        """Cells for texts that are begun, filled with what is known of their prompts."""
        width = max(text.new_tokens for text in texts)
        first = width - max(text.new_tokens - text.known for text in texts)
        rows = sum(text.rows for text in texts)
        child = self._new_cells(rows, capacity_for(texts, width), filled=first > 0)
        try:
            if first:
                self._block.fill(child, _known_parts(texts, width - first), first)
            group = self._make_group(child, texts, first, width)
            self._check(group)
        except BaseException:
            self._drop(child)
            raise
        self._largest = max(self._largest, rows * child.cells[0].capacity)
        return group

    def _new_cells(self, rows: int, capacity: int, *, filled: bool) -> MicroBatchCache:
        """Empty cells in the place that fewest micro-batches have."""
        self._executor.settle(weights=False)
        used = collections.Counter(self._place_of.values())
        place = min(range(self._places), key=lambda number: used[number])
        child = self._block.make(place, capacity)
        self._place_of[id(child)] = place
        geometry = self._engine.geometry
        if geometry is None or filled:
            return child
        try:
            for cell in child.cells:
                cell.allocate(rows, *geometry)
        except BaseException:
            self._drop(child)
            raise
        return child

    def _check(self, group: Group) -> None:
        """Enters what the next sweep takes with this group in it.

        Raises:
            CapacityError: that does not fit.
        """
        groups = [*self._groups, *self._heads, group]
        self._enter(_loads(groups))
        self._block.children = [g.child for g in groups]
        self._block.prepare_sweep()

    def _begin_beginning(self, text: Waiting, beginning: Beginning) -> None:
        """Has what a text begins with computed in the next sweep."""
        beginning.prepare(text)
        try:
            child = self._new_cells(1, len(beginning.ids), filled=False)
            group = Group(child, [beginning], 0, len(beginning.ids))
            self._check(group)
        except CapacityError:
            beginning.failed, beginning.given = True, None
        else:
            self._heads.append(group)

    # -------------------------------------------------------------------------------------------------------- a sweep
    def _sweep(self) -> None:
        """One pass of all micro-batches through the layers."""
        # Hidden states go through buffers that must not grow on the way, so the largest come first.
        groups = sorted((*self._groups, *self._heads), key=lambda group: -group.rows * group.new_tokens)
        self._reorder(groups)
        children = [group.child for group in groups]
        if children != self._block.children:  # a step waits for those of the same number in the sweep before
            self._executor.settle(weights=False)
            self._block.children = children
        with contextlib.suppress(CapacityError):  # by its estimate, what was begun does not end
            self._enter(_loads(groups))
        rows = sum(group.rows for group in groups)
        tokens = sum(group.rows * group.new_tokens for group in groups)
        device = self._executor.space.device
        outputs = self._executor.run(
            [group.body(device) for group in groups],
            self._block,
            rows=rows,
            tokens=-(-tokens // rows),
            keep_hidden=False,
            last=not self._waiting and all(member.tokens_left <= 0 for group in groups for member in group.live),
        )
        news = sum(group.live_rows for group in groups if group not in self._heads)
        for group, output in zip(groups, outputs, strict=True):
            ended = group.receive(output)
            if group in self._heads:
                beginning = group.members[0]
                assert isinstance(beginning, Beginning)
                beginning.child = group.child
            else:
                for text in ended:
                    assert isinstance(text, Waiting)
                    self._end(text)
        self._heads = []
        for group in [group for group in self._groups if not group.live]:
            self._groups.remove(group)
            self._executor.settle(weights=False)
            self._drop(group.child)
        if self._on_sweep is not None:
            self._on_sweep(news)

    def _end(self, text: Waiting) -> None:
        self._ended.append(Written(text.request, text.result, text.failure, text.log_probs))

    def _fail(self, text: Waiting, error: Exception) -> None:
        text.end()
        text.needs_no_beginning()
        self._ended.append(Written(text.request, None, error))

    def _taken(self) -> list[Written]:
        ended, self._ended = self._ended, []
        return ended

    def _drop(self, child: MicroBatchCache) -> None:
        self._block.discard(child)
        self._place_of.pop(id(child), None)

    def _stop(self) -> None:
        """Ends what is still being written, and gives all cells back."""
        for text in (*self._waiting, *(member for group in self._groups for member in group.members)):
            if isinstance(text, Text):
                text.end()
        self._executor.release_cache()
        self._block.close()


def _known_parts(texts: Sequence[Waiting], computed: int) -> list[Part]:
    """For each text what its rows take from a beginning, if the last `computed` tokens of it are computed."""
    children = [text.beginning.child for text in texts if text.beginning is not None and text.known]
    parts = []
    for text in texts:
        known = max(0, text.new_tokens - computed)
        child = text.beginning.child if text.beginning is not None and known else children[0]
        assert child is not None
        parts.append(Part(child, torch.zeros(text.rows, dtype=torch.long), 0, known))
    return parts


def _loads(groups: Sequence[Group]) -> list[Load]:
    """What each micro-batch is in the account, with as many tokens before the new ones as there will be in the end."""
    return [
        Load(g.rows, g.new_tokens, max(g.length, g.child.cells[0].capacity - g.new_tokens), g.scored_tokens)
        for g in groups
    ]
