"""Probabilities of given continuations: many (context, continuation) pairs through the layers in large blocks.

A prompt's forward is the one that `generate` would make, up to the head. There only the hidden states that a
continuation is predicted from go on, a few at a time, through the model's own code behind its layers; so neither the
logits of a whole prompt nor those of a whole block are ever in memory. Pairs that are computed from the same tokens are
one row: four answers of one token each cost what one costs. What several rows begin with is computed once, as in
`generate_each`.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.utils.generic import ModelOutput

from ..architectures import Structure
from ..errors import PolicyError, UnsupportedModelError
from ..kv_cache import MicroBatchCache
from ..planning.budget import SCORED_AT_ONCE
from .engine import ContinuousBatches, Engine, Waiting
from .groups import Group, Member
from .texts import TextRequest, Written

__all__ = ["ScoreRequest", "Scored", "ScoringBatches"]


@dataclasses.dataclass(frozen=True, eq=False)
class ScoreRequest:
    """A context, and a continuation that was not written by the model.

    Args:
        context: tokens, at least one; where a text is to be scored from its first token on, the one that the model
            begins texts with.
        continuation: tokens, at least one.
        key: the caller's own; it comes back with the scores.
    """

    context: Sequence[int]
    continuation: Sequence[int]
    key: Any = None


@dataclasses.dataclass(frozen=True, eq=False)
class Scored:
    """What came of a request, on the CPU.

    Args:
        request: the request.
        log_probs: of each token of the continuation after all tokens before it, natural logarithm, float32,
            (continuation,).
        likeliest: the likeliest token at each of these places, (continuation,).
        error: what was wrong with this request; the tensors are empty then.
    """

    request: ScoreRequest
    log_probs: torch.Tensor
    likeliest: torch.Tensor
    error: Exception | None = None

    @property
    def is_greedy(self) -> torch.Tensor:
        """For each token of the continuation whether it is the likeliest one, bool, (continuation,)."""
        return self.likeliest == torch.tensor(list(self.request.continuation[: len(self.likeliest)]), dtype=torch.long)

    @property
    def total(self) -> float:
        """Logarithm of the probability of the whole continuation."""
        return float(self.log_probs.double().sum())


class ScoringBatches(ContinuousBatches):
    """See `FlexGenForCausalLM.score_each`.

    Args:
        engine: what it runs on.
        window: requests that are read ahead and put in order.
        least_shared: tokens that a common beginning has at least; None shares none.
        on_sweep: called after each sweep with the number of rows that it ended.
        vocabulary: tokens that the model knows.
    """

    def __init__(
        self,
        engine: Engine,
        window: int | None,
        least_shared: int | None,
        on_sweep: Callable[[int], None] | None,
        vocabulary: int,
    ) -> None:
        super().__init__(engine, window, least_shared, on_sweep)
        self._vocabulary = vocabulary

    def score(self, requests: Iterable[ScoreRequest]) -> Iterator[Scored]:
        """Scores all pairs; yields each as its sweep ends."""
        with _narrowed(self._executor.structure):
            for written in self.run(requests):
                yield from _scores(written)

    def _texts(self, source: Iterator[Any]) -> list[Waiting]:
        texts: list[Waiting] = []
        while not texts and (requests := list(itertools.islice(source, self._window))):
            good = []
            for request in requests:
                if (error := self._wrong(request)) is None:
                    good.append(request)
                else:
                    self._ended.append(Written(_row([request]), None, error))
            texts = [_ScoredRow(_row(together), self._engine.generate) for together in _of_the_same_tokens(good)]
        return texts

    def _wrong(self, request: ScoreRequest) -> PolicyError | None:
        if not len(request.context):
            return PolicyError(
                "the context has no tokens, so there is nothing to predict the first token from; begin with the token "
                "that the model begins texts with"
            )
        if not len(request.continuation):
            return PolicyError("the continuation has no tokens, so there is nothing to score; give it some text")
        outside = {token for token in (*request.context, *request.continuation) if not 0 <= token < self._vocabulary}
        if outside:
            return PolicyError(
                f"token {min(outside)} is not among the {self._vocabulary} of the model; take the model's own tokenizer"
            )
        return None

    def _make_group(self, child: MicroBatchCache, texts: Sequence[Member], first: int, width: int) -> Group:
        return _ScoredGroup(child, texts, first, width, self._groups)


# ----------------------------------------------------------------------------------------------------------- what waits
# The first forward of such a call is all that is wanted of it.
_ONE_FORWARD = {"max_new_tokens": 1, "do_sample": False, "num_beams": 1, "num_return_sequences": 1, "pad_token_id": 0}


def _row(requests: Sequence[ScoreRequest]) -> TextRequest:
    """The text that is computed for requests, of which the last begins with the tokens of each."""
    return TextRequest(_computed(requests[-1]), _ONE_FORWARD, key=requests)


def _computed(request: ScoreRequest) -> list[int]:
    """The tokens that the continuation is predicted from: all but the last."""
    return [*request.context, *request.continuation[:-1]]


def _of_the_same_tokens(requests: Iterable[ScoreRequest]) -> list[list[ScoreRequest]]:
    """Requests that one row serves: the tokens of each are what those of the next begin with."""
    rows: list[list[ScoreRequest]] = []
    before: list[int] | None = None
    for tokens, request in sorted(((_computed(r), r) for r in requests), key=lambda pair: pair[0]):
        if before is not None and tokens[: len(before)] == before:
            rows[-1].append(request)
        else:
            rows.append([request])
        before = tokens
    return rows


def _scores(written: Written) -> Iterator[Scored]:
    """What came of each request that a row was computed for."""
    nothing = torch.empty(0)
    start = 0
    for request in written.request.key:
        if written.error is not None:
            yield Scored(request, nothing, nothing.long(), written.error)
            continue
        log_probs, likeliest = (part[start : start + len(request.continuation)] for part in written.output)
        start += len(request.continuation)
        yield Scored(request, log_probs, likeliest)


class _ScoredRow(Waiting):
    """A text that ends with its first forward, whose arguments are those that `generate` makes for it."""

    @property
    def shareable(self) -> Sequence[int]:
        return self.request.ids[: min(self.places) + 1]

    @functools.cached_property
    def places(self) -> list[int]:
        """For each token that is scored the place of the token before it."""
        return [
            len(request.context) - 1 + number
            for request in self.request.key
            for number in range(len(request.continuation))
        ]

    @property
    def targets(self) -> list[int]:
        """The tokens that are scored, those of one request behind those of the other."""
        return [token for request in self.request.key for token in request.continuation]

    def advance(self, output: Any = None) -> None:
        if self.given is not None:
            self.given, self.result = None, output
            self.end()
            return
        super().advance()
        if not self.is_done and self.new_tokens != len(self.request.ids):
            self.end()
            self.failure = UnsupportedModelError(
                "score_each: generate would not compute a prompt at once; take prefill_chunk_size and "
                "prompt_lookup_num_tokens out of the model's generation config"
            )


# -------------------------------------------------------------------------------------------------------- what computes
class _ScoredGroup(Group):
    """A micro-batch of rows that are scored.

    Args:
        child: its cells.
        members: the rows, in order.
        first: the first token that the next forward computes; those before are in the cells.
        width: tokens of the longest row after the next forward.
        beside: the micro-batches of the sweep, itself among them.
    """

    def __init__(
        self,
        child: MicroBatchCache,
        members: Sequence[Member],
        first: int,
        width: int,
        beside: Sequence[Group],
    ) -> None:
        super().__init__(child, members, first, width)
        self._beside = beside
        for cell in child.cells:
            cell.keeps_new = False

    @property
    def scored_tokens(self) -> int:  # type: ignore[override]
        return sum(len(set(row.places)) for row in self.members if isinstance(row, _ScoredRow))

    def body(self, device: torch.device) -> Callable[[], Any]:
        call: Callable[..., Any] = super().body(device)
        if "logits_to_keep" in (self.live[0].given or {}):
            call = functools.partial(call, logits_to_keep=0)  # all of those that are handed on
        rows: list[int] = []
        columns: list[int] = []
        which: list[int] = []
        targets: list[int] = []
        for (start, _), row in self._live():
            assert isinstance(row, _ScoredRow)
            places = sorted(set(row.places))
            number = {place: len(columns) + at for at, place in enumerate(places)}
            which += [number[place] for place in row.places]
            targets += row.targets
            rows += [start] * len(places)
            columns += [place + self._new - len(row.request.ids) for place in places]
        asked = _Asked(*(torch.tensor(numbers, device=device) for numbers in (rows, columns, which, targets)))
        return functools.partial(_score, call, asked, max(1, SCORED_AT_ONCE // max(1, len(self._beside))))

    def receive(self, output: Any) -> list[Member]:
        log_probs, likeliest = output
        start, ended = 0, list[Member]()
        self.length, self._new = self.width, 1
        for _, row in self._live():
            assert isinstance(row, _ScoredRow)
            end = start + len(row.places)
            row.advance((log_probs[start:end], likeliest[start:end]))
            start = end
            ended.append(row)
        return ended


class _Asked(NamedTuple):
    """What is wanted of a micro-batch.

    Args:
        rows: of each hidden state that something is predicted from, (states,).
        columns: its place among the new tokens, (states,).
        which: of each token that is scored the number of its state, (tokens,).
        targets: the tokens, (tokens,).
    """

    rows: torch.Tensor
    columns: torch.Tensor
    which: torch.Tensor
    targets: torch.Tensor


def _score(call: Callable[[], Any], asked: _Asked, first: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs a forward, and what is behind its layers as often as it takes.

    Args:
        call: the forward of the micro-batch.
        asked: what is wanted.
        first: states of the first time; those of all micro-batches go through the head together then.

    Returns:
        Logarithms of the probabilities of the tokens, and the likeliest ones instead, each (tokens,), on the CPU.
    """
    states = _States(asked.rows, asked.columns)
    log_probs = torch.empty(asked.targets.shape, dtype=torch.float32, device=asked.targets.device)
    likeliest = torch.empty_like(asked.targets)
    token = _wanted.set(states)
    try:
        start, count = 0, first
        while start < len(asked.rows):
            states.span = slice(start, min(start + count, len(asked.rows)))
            logits = call().logits[0].float()
            here = ((asked.which >= states.span.start) & (asked.which < states.span.stop)).nonzero()[:, 0]
            row = asked.which[here] - start
            log_probs[here] = logits[row, asked.targets[here]] - logits.logsumexp(-1)[row]
            likeliest[here] = logits.argmax(-1)[row]
            start, count = states.span.stop, SCORED_AT_ONCE
    finally:
        _wanted.reset(token)
    return log_probs.cpu(), likeliest.cpu()


# ---------------------------------------------------------------------------------------------------- behind the layers
class _States:
    """The hidden states behind the layers that something is predicted from.

    Args:
        rows: of each, (states,).
        columns: its place among the new tokens, (states,).
    """

    def __init__(self, rows: torch.Tensor, columns: torch.Tensor) -> None:
        self._rows, self._columns = rows, columns
        self._states: torch.Tensor | None = None
        self._kind: type[ModelOutput] = ModelOutput
        #: those that are handed on next
        self.span = slice(0)

    def part(self, run: Callable[[], Any]) -> ModelOutput:
        """What the layers returned, with the wanted states only, as one row: (1, states, hidden_size).

        Args:
            run: the layers; run the first time.
        """
        if self._states is None:
            output = run()
            hidden = getattr(output, "last_hidden_state", None)
            if not isinstance(output, ModelOutput) or not isinstance(hidden, torch.Tensor) or hidden.ndim != 3:
                raise UnsupportedModelError(
                    "score_each: the model's layers do not return their hidden states as last_hidden_state; compute "
                    "the probabilities from the logits that the model returns"
                )
            self._kind, self._states = type(output), hidden[self._rows, self._columns]
        return self._kind(last_hidden_state=self._states[None, self.span])


_wanted: contextvars.ContextVar[_States | None] = contextvars.ContextVar("_wanted", default=None)


@contextlib.contextmanager
def _narrowed(structure: Structure) -> Iterator[None]:
    """While it lasts, the module that holds the layers hands on what `_wanted` says, where it says something."""
    stack: nn.Module = structure.model.get_submodule(structure.layers_name.rpartition(".")[0])
    plain, before = stack.forward, stack.__dict__.get("forward")

    @functools.wraps(plain)
    def forward(*args: Any, **kwargs: Any) -> Any:
        states = _wanted.get()
        return plain(*args, **kwargs) if states is None else states.part(lambda: plain(*args, **kwargs))

    stack.__dict__["forward"] = forward
    try:
        yield
    finally:
        if before is None:
            del stack.__dict__["forward"]
        else:
            stack.__dict__["forward"] = before
