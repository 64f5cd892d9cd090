"""From a row to a request, and from what was written to a result; `texts` is both around a model, for pipelines.

A row is a dictionary: `prompt` (a text, or a list of tokens) or `messages` (through the chat template), and if it wants
`options` of its own (fields of `GenerationConfig`, and `seed`); or it is a line of OpenAI's batch format, with
`custom_id` and `body`.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ...continuous.engine import LEAST_SHARED
from ...continuous.texts import TextRequest, Written
from ...errors import FlexGenError, PolicyError
from . import openai
from .settings import check_options

__all__ = ["Completion", "Prompting", "Result", "seed_of", "texts"]


class Completion(NamedTuple):
    """A text that was written.

    Args:
        text: without the prompt, without special tokens, cut off before the first stop string.
        tokens: how many were written, the one that ended it included.
        finish_reason: "stop" if a token or a stop string ended it, "length" if it was to be no longer.
    """

    text: str
    tokens: int
    finish_reason: str


@dataclasses.dataclass(frozen=True, eq=False)
class Result:
    """What came of a row.

    Args:
        index: number of the row.
        record: the row.
        prompt_tokens: tokens of the prompt.
        texts: what was written, more than one if several sequences were to be returned; none if there was an error.
        error: what was wrong with the row.
        output: what `generate` returned.
    """

    index: int
    record: Mapping[str, Any]
    prompt_tokens: int = 0
    texts: tuple[Completion, ...] = ()
    error: Exception | None = None
    output: Any = None


@dataclasses.dataclass(frozen=True)
class Prompting:
    """How rows become prompts.

    Args:
        chat: a prompt that is a text is a message of a user, and goes through the chat template.
        truncate: of a prompt that does not fit into the model's context with what is to be written, the end is taken.
        seed: what is drawn for a row follows from it and the row's number.
    """

    chat: bool = False
    truncate: bool = False
    seed: int = 0


def seed_of(seed: int, index: int) -> int:
    """The seed of a row's random numbers: they do not depend on where and beside whom it is computed."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{index}".encode()).digest()[:8], "big") >> 1


def texts(  # noqa: PLR0913  a job is described by many things
    records: Iterable[Mapping[str, Any] | str],
    model: Any,
    tokenizer: Any,
    *,
    options: Mapping[str, Any] | None = None,
    prompting: Prompting = Prompting(),
    window: int | None = None,
    least_shared: int | None = LEAST_SHARED,
    on_sweep: Callable[[int], None] | None = None,
) -> Iterator[Result]:
    """Writes on after each row, and yields results as they are there.

    Args:
        records: rows, or prompts; read as far ahead as `window`.
        model: from `FlexGenForCausalLM.from_pretrained`.
        tokenizer: its tokenizer.
        options: fields of `GenerationConfig` for all rows.
        prompting: how rows become prompts.
        window: as `generate_each` takes it.
        least_shared: as `generate_each` takes it.
        on_sweep: as `generate_each` takes it.

    Raises:
        PolicyError: options that cannot be meant. What is wrong with one row comes as its `error`.
    """
    rows = enumerate({"prompt": r} if isinstance(r, str) else r for r in records)
    numbered = ((index, record, None) for index, record in rows)
    yield from Writer(model, tokenizer, options or {}, prompting).write(
        numbered, window=window, least_shared=least_shared, on_sweep=on_sweep
    )


@dataclasses.dataclass(frozen=True, eq=False)
class _Asked:
    """What is known of a request beside its tokens."""

    index: int
    record: Mapping[str, Any]
    error: Exception | None = None


class Writer:
    """A model with its tokenizer, and how it is to write.

    Args:
        model: has `generate_each`.
        tokenizer: its tokenizer.
        options: for all rows.
        prompting: how rows become prompts.
    """

    def __init__(self, model: Any, tokenizer: Any, options: Mapping[str, Any], prompting: Prompting) -> None:
        self._model, self._tokenizer, self._prompting = model, tokenizer, prompting
        self._options = check_options(options)
        self._context = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        self._defaults = model.generation_config

    def write(self, rows: Iterable[tuple[int, Mapping[str, Any], str | None]], **engine: Any) -> Iterator[Result]:
        """Results of rows, each given as (number, record, what is wrong with it already), as they are there."""
        for written in self._model.generate_each(map(self._request, rows), **engine):
            yield self._result(written)

    # ---------------------------------------------------------------------------------------------------------- inside
    def _request(self, row: tuple[int, Mapping[str, Any], str | None]) -> TextRequest:
        """A row as a request; what is wrong with it is in the request, which then has no tokens and ends at once."""
        index, record, error = row
        try:
            if error is not None:
                raise PolicyError(error)
            ids, options, seed = self._prepared(index, record)
            return TextRequest(ids, options, seed, _Asked(index, record))
        except Exception as problem:  # noqa: BLE001  tokenizers and templates raise what they like: it is this row's
            if not isinstance(problem, FlexGenError):
                problem = PolicyError(f"the prompt cannot be made ({type(problem).__name__}: {problem})")
            return TextRequest([], {}, None, _Asked(index, record, problem))

    def _prepared(self, index: int, record: Mapping[str, Any]) -> tuple[list[int], dict[str, Any], int]:
        """Tokens, options and seed of a row."""
        body, own = openai.request_of(record) if openai.is_line(record) else (record, record.get("options") or {})
        if not isinstance(own, Mapping):
            raise PolicyError(f"options is {own!r}; give an object of generation settings")
        own = dict(own)
        seed = own.pop("seed", None)
        if seed is not None and (not isinstance(seed, int) or isinstance(seed, bool)):
            raise PolicyError(f"seed={seed!r}: give a whole number")
        options = {**self._options, **(check_options(own) if own else {})}
        ids = self._tokens(body)
        if not ids:
            raise PolicyError("the prompt has no tokens, so there is nothing to go on from; give it some text")
        ids = self._fitted(ids, options)
        if options.get("stop_strings"):
            options["tokenizer"] = self._tokenizer
        options.setdefault("pad_token_id", self._tokenizer.pad_token_id)
        return ids, options, seed_of(self._prompting.seed, index) if seed is None else seed % 2**63

    def _tokens(self, body: Mapping[str, Any]) -> list[int]:
        prompt, messages = body.get("prompt"), body.get("messages")
        if prompt is None and messages is None:
            raise PolicyError(f"the row has no prompt and no messages, but {', '.join(map(repr, body)) or 'nothing'}")
        if prompt is not None and messages is not None:
            raise PolicyError("the row has a prompt and messages; give one of them")
        if isinstance(prompt, Sequence) and not isinstance(prompt, str):
            return self._given_tokens(prompt)
        if prompt is not None and not isinstance(prompt, str):
            raise PolicyError(f"the prompt is {prompt!r}; give a text, or a list of tokens")
        if prompt is not None and not self._prompting.chat:
            found: list[int] = self._tokenizer(prompt, verbose=False)["input_ids"]
            return found
        if not getattr(self._tokenizer, "chat_template", None):
            raise PolicyError("the model has no chat template; give prompts, or a template with --chat-template FILE")
        conversation = [{"role": "user", "content": prompt}] if messages is None else messages
        if not isinstance(conversation, list) or not all(isinstance(m, dict) and "role" in m for m in conversation):
            raise PolicyError("messages is not a list of objects with role and content")
        text = self._tokenizer.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)
        ids: list[int] = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def _given_tokens(self, prompt: Sequence[Any]) -> list[int]:
        most = self._model.config.get_text_config(decoder=True).vocab_size
        for token in prompt:
            if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < most:
                raise PolicyError(f"the prompt has {token!r} for a token; tokens are whole numbers below {most}")
        return list(prompt)

    def _fitted(self, ids: list[int], options: dict[str, Any]) -> list[int]:
        """The prompt, and in `options` a limit, that fit into the model's context."""
        wanted, context = options.get("max_new_tokens"), self._context
        if context is None or wanted is None:
            return ids
        if self._prompting.truncate and len(ids) + wanted > context:
            ids = ids[-max(1, context - wanted) :]
        if len(ids) >= context:
            raise PolicyError(
                f"the prompt has {len(ids)} tokens, but the model's context {context}; shorten it, or take its end "
                "with --truncate"
            )
        options["max_new_tokens"] = min(wanted, context - len(ids))
        return ids

    def _result(self, written: Written) -> Result:
        asked: _Asked = written.request.key
        error = asked.error or written.error
        if error is not None:
            return Result(asked.index, asked.record, len(written.request.ids), error=error)
        prompt, output = len(written.request.ids), written.output
        sequences = getattr(output, "sequences", output)
        done = tuple(self._completion(row[prompt:].tolist(), written.request.options) for row in sequences)
        return Result(asked.index, asked.record, prompt, done, output=output)

    def _completion(self, tokens: list[int], options: Mapping[str, Any]) -> Completion:
        ends = options.get("eos_token_id", getattr(self._defaults, "eos_token_id", None))
        ends = set() if ends is None else {ends} if isinstance(ends, int) else set(ends)
        last = next((place for place, token in enumerate(tokens) if token in ends), None)
        tokens = tokens if last is None else tokens[: last + 1]
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=True)
        places = [text.find(stop) for stop in options.get("stop_strings") or () if stop in text]
        if places:
            text = text[: min(places)]
        return Completion(text, len(tokens), "length" if last is None and not places else "stop")
