"""What a request of HELM asks for, in terms of `generate_each`. Knows its fields, not HELM itself.

Fields by their names in `helm.common.request.Request`. What cannot be done is refused by name: an answer as if less had
been asked for would change a benchmark in silence.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from ...errors import PolicyError

__all__ = ["Asked", "StopAtText", "digest_of", "read"]

#: fields that nothing here can serve, with the values that ask for nothing
_REFUSED: dict[str, tuple[Any, ...]] = {
    "embedding": (False, None),
    "presence_penalty": (0, None),
    "frequency_penalty": (0, None),
    "multimodal_prompt": (None,),
    "image_generation_parameters": (None,),
    "response_format": (None,),
}


@dataclasses.dataclass(frozen=True, eq=False)
class Asked:
    """A request, read.

    Args:
        ids: tokens of the prompt, special ones included.
        options: what `generate` is given.
        stop: what else than a token ends a text.
        tokens: to be written at most; 0 writes nothing.
        rows: sequences that are drawn.
        copies: of each of them; several greedy sequences are one and the same.
        echo: whether the prompt, and how likely it is, is part of the answer.
        seed: of what is drawn.
    """

    ids: tuple[int, ...]
    options: dict[str, Any]
    stop: StopAtText | None
    tokens: int
    rows: int
    copies: int
    echo: bool
    seed: int


def read(request: Any, tokenizer: Any, *, chat: bool = False, seed: int = 0) -> Asked:
    """Reads a request.

    `temperature` 0 is greedy. Else tokens are drawn from the whole distribution at that temperature, as far as `top_p`
    allows; `top_k_per_token` is how many candidates per token a client may report, of which HELM's results have no
    place for more than the chosen one. What is drawn follows from `seed` and the request, `random` included, so the
    same request has the same answer.

    Args:
        request: has the fields of HELM's.
        tokenizer: the model's.
        chat: a prompt is a message of a user, and goes through the chat template.
        seed: of the job.

    Raises:
        PolicyError: a field whose value cannot be served.
    """
    for name, nothing in _REFUSED.items():
        if (value := getattr(request, name, nothing[0])) not in nothing:
            raise PolicyError(f"{name}={value!r}: HELM asks for what this engine does not do; leave the scenario out")
    greedy, count = request.temperature == 0, int(request.num_completions)
    if request.temperature < 0 or count < 1 or request.max_tokens < 0:
        raise PolicyError(
            f"temperature={request.temperature}, num_completions={count}, max_tokens={request.max_tokens}: "
            "none of them may be below 0, and at least one completion is needed"
        )
    ids = tuple(_tokens(request, tokenizer, chat=chat))
    if not ids:
        raise PolicyError("the prompt has no tokens, so there is nothing to go on from; give it some text")
    options: dict[str, Any] = {
        "max_new_tokens": int(request.max_tokens),
        "pad_token_id": tokenizer.pad_token_id,
        "do_sample": not greedy,
    }
    if not greedy:
        options |= {"temperature": float(request.temperature), "top_p": float(request.top_p), "top_k": 0}
        options["num_return_sequences"] = count
    stops = [stop for stop in request.stop_sequences if stop]
    stop = StopAtText(tokenizer, len(ids), stops) if stops else None
    if stop is not None:
        options["stopping_criteria"] = StoppingCriteriaList([stop])
    return Asked(
        ids,
        options,
        stop,
        tokens=int(request.max_tokens),
        rows=1 if greedy else count,
        copies=count if greedy else 1,
        echo=bool(request.echo_prompt),
        seed=int(digest_of(request, seed)[:15], 16),
    )


def digest_of(request: Any, seed: int = 0) -> str:
    """A name for all that a request says: the same for requests that have the same answer."""
    text = json.dumps([seed, dataclasses.asdict(request)], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


class StopAtText(StoppingCriteria):
    """Ends a row when what it has written, as text, has one of some strings in it.

    transformers' own `stop_strings` also finds a string that begins in the prompt, where HELM does not look for it.

    Args:
        tokenizer: the model's.
        prompt: tokens of the prompt.
        stops: the strings.
    """

    def __init__(self, tokenizer: Any, prompt: int, stops: Sequence[str]) -> None:
        self._tokenizer, self._prompt, self._stops = tokenizer, prompt, tuple(stops)
        # A string that is there since the last token begins within so many tokens: each has a byte at least. Some more,
        # because tokenizers take liberties with the first ones of a text.
        self._tail = max(len(stop.encode()) for stop in stops) + 8

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:  # noqa: ARG002  transformers'
        """Which of the rows have ended, bool, (rows,)."""
        rows = input_ids[:, self._prompt :].tolist()
        return torch.tensor([self._has_ended(row) for row in rows], dtype=torch.bool, device=input_ids.device)

    def tokens_until(self, written: list[int]) -> int | None:
        """Tokens of a row up to the one with which it ended; None if it did not."""
        return next((count for count in range(1, len(written) + 1) if self._has_ended(written[:count])), None)

    def _has_ended(self, written: list[int]) -> bool:
        """Whether the last token of a row, or one shortly before it, completes a string."""
        text = self._tokenizer.decode(written[-self._tail :])
        return any(stop in text for stop in self._stops)


def _tokens(request: Any, tokenizer: Any, *, chat: bool) -> list[int]:
    messages = getattr(request, "messages", None)
    if messages and request.prompt:
        raise PolicyError("the request has a prompt and messages; HELM means one of them")
    if not (messages or chat):
        return list(tokenizer(request.prompt, verbose=False)["input_ids"])
    if not getattr(tokenizer, "chat_template", None):
        raise PolicyError("the model has no chat template; leave --chat and scenarios of messages out")
    conversation = messages or [{"role": "user", "content": request.prompt}]
    text = tokenizer.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
