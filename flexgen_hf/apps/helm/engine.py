"""A model that answers many requests of HELM at once. Knows their fields, not HELM itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

from ...continuous.engine import LEAST_SHARED
from ...continuous.scoring import ScoreRequest
from ...continuous.texts import TextRequest, Written
from ...errors import FlexGenError
from .requests import Asked, digest_of, read

__all__ = ["Answer", "Engine", "Passage"]


@dataclasses.dataclass(frozen=True)
class Passage:
    """A text with its tokens, special ones included; what was written is not cut at stop strings, which is for HELM.

    Args:
        text: all of it.
        tokens: the text of each token.
        log_probs: of each token, by the model's own logits before temperature; natural logarithm.
        finish_reason: "endoftext" if a token ended it, "stop" if a stop string did, "length" if it was to be no longer.
    """

    text: str
    tokens: tuple[str, ...] = ()
    log_probs: tuple[float, ...] = ()
    finish_reason: str = "length"


@dataclasses.dataclass(frozen=True)
class Answer:
    """What came of a request.

    Args:
        written: as many texts as were asked for; none if there was an error.
        prompt: the prompt, if it was to be echoed: each token after those before it, the first one with 0.
        error: what was wrong with the request.
    """

    written: tuple[Passage, ...] = ()
    prompt: Passage | None = None
    error: Exception | None = None


class Engine:
    """A model with its tokenizer, and how it answers.

    Args:
        model: has `generate_each` and `score_each`.
        tokenizer: the model's.
        chat: prompts are messages of a user, and go through the chat template.
        seed: what is drawn follows from it and the request.
        least_shared: tokens of a common beginning (few-shot examples) that is computed once; None shares none.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        chat: bool = False,
        seed: int = 0,
        least_shared: int | None = LEAST_SHARED,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self._chat, self._seed, self._least_shared = chat, seed, least_shared

    def answer(self, requests: Iterable[Any], on_answer: Callable[[int], None] = lambda _: None) -> list[Answer]:
        """Answers of requests, in their order. Each has its own parameters; they share blocks all the same.

        Args:
            requests: have the fields of HELM's; the same one again gets the same answer.
            on_answer: called as answers come with the number of requests that got one.

        Raises:
            StepError: something could not be moved. What is wrong with one request is its answer's `error`.
        """
        places: dict[str, list[int]] = {}
        asked: dict[str, Asked] = {}
        answers: list[Answer] = []
        for place, request in enumerate(requests):
            name = digest_of(request, self._seed)
            places.setdefault(name, []).append(place)
            answers.append(Answer())
            if len(places[name]) > 1:
                continue
            try:
                asked[name] = read(request, self.tokenizer, chat=self._chat, seed=self._seed)
            except FlexGenError as error:
                answers[place] = Answer(error=error)
        prompts = self._prompts(asked)
        for name, answer in self._written(asked):
            echoed = prompts.get(name)
            if answer.error is None and echoed is not None:
                answer = dataclasses.replace(answer, prompt=echoed.prompt, error=echoed.error)  # noqa: PLW2901
            answers[places[name][0]] = answer
            on_answer(len(places[name]))
        for first, *others in places.values():
            for place in others:
                answers[place] = answers[first]
        return answers

    # ---------------------------------------------------------------------------------------------------------- inside
    def _prompts(self, asked: dict[str, Asked]) -> dict[str, Answer]:
        """Of requests that want their prompt echoed, how likely it is."""
        echoed = {name: one for name, one in asked.items() if one.echo}
        found = {
            name: Answer(prompt=self._passage(one.ids, [0.0])) for name, one in echoed.items() if len(one.ids) == 1
        }
        pairs = [ScoreRequest(one.ids[:1], one.ids[1:], name) for name, one in echoed.items() if name not in found]
        for scored in self.model.score_each(pairs, least_shared=self._least_shared) if pairs else ():
            if scored.error is None:
                prompt = self._passage(echoed[scored.request.key].ids, [0.0, *scored.log_probs.tolist()])
                found[scored.request.key] = Answer(prompt=prompt)
            else:
                found[scored.request.key] = Answer(error=scored.error)
        return found

    def _written(self, asked: dict[str, Asked]) -> Iterable[tuple[str, Answer]]:
        """What is written after each prompt, as it ends."""
        requests = []
        for name, one in asked.items():
            if one.tokens:
                requests.append(TextRequest(one.ids, one.options, one.seed, name, log_probs=True))
            else:
                yield name, Answer((Passage(""),) * (one.rows * one.copies))
        for written in self.model.generate_each(requests, least_shared=self._least_shared) if requests else ():
            yield written.request.key, self._answer(asked[written.request.key], written)

    def _answer(self, asked: Asked, written: Written) -> Answer:
        if written.error is not None:
            return Answer(error=written.error)
        assert written.log_probs is not None
        rows = written.output[:, len(asked.ids) :].tolist()
        made = [self._ended(asked, ids, values) for ids, values in zip(rows, written.log_probs.tolist(), strict=True)]
        return Answer(tuple(made) * asked.copies)

    def _ended(self, asked: Asked, ids: list[int], log_probs: list[float]) -> Passage:
        """A row without the token that ended it, and without the padding behind, if others of its request went on."""
        ends = getattr(self.model.generation_config, "eos_token_id", None)
        ends = set() if ends is None else {ends} if isinstance(ends, int) else set(ends)
        end = next((place for place, token in enumerate(ids) if token in ends), None)
        reason = "length" if end is None else "endoftext"
        ids = ids[:end]
        if asked.stop is not None and (count := asked.stop.tokens_until(ids)) is not None:
            ids, reason = ids[:count], "stop"
        return self._passage(ids, log_probs, reason)

    def _passage(self, ids: Iterable[int], log_probs: list[float], reason: str = "length") -> Passage:
        ids = list(ids)
        tokens = tuple(self.tokenizer.decode([token]) for token in ids)
        return Passage(self.tokenizer.decode(ids), tokens, tuple(log_probs[: len(ids)]), reason)
