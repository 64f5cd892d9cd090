"""A text that is being written: transformers' own `generate`, for one prompt, in a coroutine.

A call of the model inside it suspends it with the arguments of that call; whoever runs many texts puts these together,
and hands each its share of what the model returned. So sampling, processors, stopping criteria and beams are what they
are for the prompt alone. Knows nothing of micro-batches or tiers.
"""

from __future__ import annotations

import contextvars
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import greenlet
import torch
from transformers.cache_utils import Cache

from ..errors import PolicyError, UnsupportedModelError

__all__ = ["Text", "TextCache", "TextRequest", "Written", "current_text"]

#: arguments of forward with an entry for every token of every row
PER_TOKEN = ("input_ids", "position_ids", "token_type_ids")

_NOT_HERE = (
    "generate_each cannot run it: a text's forward needs the text's own cache and one new token at a time; leave out "
    "guidance_scale, use_cache=False, prefill_chunk_size and assisted decoding, or call generate"
)


@dataclasses.dataclass(frozen=True, eq=False)
class TextRequest:
    """A prompt, and how to go on from it.

    Args:
        ids: tokens of the prompt, at least one.
        options: what `generate` takes beside its inputs: `max_new_tokens`, `do_sample`, `generation_config`, ...
        seed: what is drawn for this text follows from it alone, wherever the text is computed; with None it is drawn
            from torch's own generator. Drawn are the numbers that `generate` would draw, for this prompt alone on a CPU
            after `torch.manual_seed(seed)`.
        key: the caller's own; it comes back with the text.
        log_probs: whether to return how likely each token was, which beams do not say of themselves.
    """

    ids: Sequence[int]
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    seed: int | None = None
    key: Any = None
    log_probs: bool = False


@dataclasses.dataclass(frozen=True, eq=False)
class Written:
    """What came of a request.

    Args:
        request: the request.
        output: what `generate` returned, prompt included, on the CPU; None if there was an error.
        error: what was wrong with this request.
        log_probs: if they were asked for, of each token that was written: the logarithm of its probability by the
            model's own logits, before temperature and processors, float32, (rows, new tokens). Those of padding behind
            a row's end mean nothing.
    """

    request: TextRequest
    output: Any = None
    error: Exception | None = None
    log_probs: torch.Tensor | None = None


class TextCache(Cache):
    """What a text's `generate` takes for its cache: it counts tokens. The tokens themselves are rows of a cell."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.tokens = 0
        #: the most tokens it will have to hold
        self.limit = 0
        #: beams of each prompt
        self.beams = 1
        #: row i is to become what row `order[i]` is, (rows,), before the next forward; None leaves all as they are
        self.order: torch.Tensor | None = None

    @property
    def is_compileable(self) -> bool:
        """False: what is around the model's forward may not be compiled with it."""
        return False

    def get_seq_length(self, layer_idx: int = 0) -> int:  # noqa: ARG002  transformers' own signature
        """Tokens of each row."""
        return self.tokens

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Notes that row i becomes what row `beam_idx[i]` is; `beam_idx` is (rows,)."""
        index = beam_idx.cpu()
        self.order = index if self.order is None else self.order[index]

    def update(self, *_: Any, **__: Any) -> Any:
        """Not meant to be called: attention updates cells."""
        raise RuntimeError("a TextCache holds no tokens")

    def crop(self, *_: Any) -> None:
        """Refused."""
        raise UnsupportedModelError(_NOT_HERE)


class Text(greenlet.greenlet):
    """The coroutine of one text. `advance` runs it to its next call of the model, or to its end.

    Args:
        request: what is to be written.
        generate: transformers' `generate` of the model.
    """

    def __init__(self, request: TextRequest, generate: Callable[..., Any]) -> None:
        super().__init__(self._write)
        self.request, self.cache = request, TextCache()
        #: the model's forward, and the arguments with which it is to be called next; None before the start, and after
        #: the end
        self.plain: Callable[..., Any] | None = None
        self.given: dict[str, Any] | None = None
        self.result: Any = None
        self.failure: Exception | None = None
        self._generate = generate
        self._logits: torch.Tensor | None = None  # that the next token is chosen by, (rows, vocabulary)
        self._log_probs: list[torch.Tensor] = []  # of each token so far, (rows,)
        self._random: torch.Tensor | None = None
        if request.seed is not None:
            self._random = torch.Generator().manual_seed(request.seed).get_state()
        self.gr_context = contextvars.copy_context()

    @property
    def is_started(self) -> bool:
        """Whether it has asked for its first forward, or ended before."""
        return self.given is not None or self.is_done

    @property
    def is_done(self) -> bool:
        """Whether it has ended."""
        return bool(self.dead)

    @property
    def rows(self) -> int:
        """Rows that it takes: more than one with beams, or several sequences to return."""
        assert self.given is not None
        return int(self.given["input_ids"].shape[0])

    @property
    def new_tokens(self) -> int:
        """Tokens of each row that the next forward is to compute, those of a known beginning included."""
        assert self.given is not None
        return int(self.given["input_ids"].shape[1])

    @property
    def log_probs(self) -> torch.Tensor | None:
        """How likely each token was that has been written, (rows, new tokens), if that was asked for."""
        if not self.request.log_probs or self.failure is not None:
            return None
        return torch.stack(self._log_probs, 1) if self._log_probs else torch.empty((1, 0))

    @property
    def tokens_left(self) -> int:
        """Tokens that the cache will have to hold more than after the next forward, at most."""
        return self.cache.limit - self.cache.tokens - self.new_tokens

    def advance(self, output: Any = None) -> None:
        """Goes on with what the model returned, if it was called, until it is called again."""
        self.parent = greenlet.getcurrent()
        arguments = () if self.given is None else (output,)
        self.given = None
        if self._random is None:
            self.switch(*arguments)
            return
        outer = torch.random.get_rng_state()
        torch.random.set_rng_state(self._random)
        try:
            self.switch(*arguments)
        finally:
            self._random = torch.random.get_rng_state()
            torch.random.set_rng_state(outer)

    def forward(self, plain: Callable[..., Any], given: dict[str, Any]) -> Any:
        """Called in the coroutine, by the model: suspends it, and returns what `advance` is given.

        Raises:
            UnsupportedModelError: not a call that can be made together with those of other texts.
        """
        ids = given.get("input_ids")
        is_plain = isinstance(ids, torch.Tensor) and given.get("past_key_values") is self.cache
        if not is_plain or (self.cache.tokens and ids is not None and ids.shape[1] > 1):
            raise UnsupportedModelError(_NOT_HERE)
        if self.request.log_probs and self.cache.beams > 1:
            raise UnsupportedModelError("log_probs: beams change places while they are written; leave num_beams out")
        assert ids is not None
        self._note(ids[:, -1])
        self.plain, self.given = plain, given
        assert self.parent is not None
        output = self.parent.switch()
        if self.request.log_probs:
            self._logits = output.logits[:, -1]
        return output

    def end(self) -> None:
        """Ends the coroutine where it is, without a result."""
        if not self.dead and bool(self):
            self.parent = greenlet.getcurrent()
            self.throw(greenlet.GreenletExit)

    def _write(self) -> None:
        ids = torch.tensor([list(self.request.ids)], dtype=torch.long)
        # Some configurations leave the cache out unless it is asked for.
        options = {"attention_mask": torch.ones_like(ids), "use_cache": True, **self.request.options}
        options["past_key_values"] = self.cache
        try:
            if not ids.numel():
                raise PolicyError("the prompt has no tokens, so there is nothing to go on from; give it some text")
            self.result = self._generate(input_ids=ids, **options)
            sequences = getattr(self.result, "sequences", self.result)
            self._note(sequences[:, ids.shape[1] + len(self._log_probs) :][:, :1].flatten())
        except Exception as error:  # noqa: BLE001  it is this request's, and must not end the others
            self.failure = error

    def _note(self, chosen: torch.Tensor) -> None:
        """Notes how likely chosen tokens were, (rows,); they are known when the next ones are asked for."""
        logits, self._logits = self._logits, None
        if logits is None or not chosen.numel():
            return
        found = torch.log_softmax(logits.float(), -1).gather(1, chosen.to(logits.device)[:, None])
        self._log_probs.append(found[:, 0].cpu())


def current_text() -> Text | None:
    """The text in whose coroutine this is called, or None."""
    current = greenlet.getcurrent()
    return current if isinstance(current, Text) else None
