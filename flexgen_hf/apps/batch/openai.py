"""OpenAI's batch format: lines of requests with `custom_id` and `body`, and the lines that answer them.

Specified at https://platform.openai.com/docs/api-reference/batch; bodies are those of `/v1/completions` and
`/v1/chat/completions`. Pure functions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...errors import PolicyError

__all__ = ["answer", "is_line", "request_of"]

#: what means the same here under another name
_NAMES = {
    "max_tokens": "max_new_tokens", "max_completion_tokens": "max_new_tokens", "top_p": "top_p", "top_k": "top_k",
    "n": "num_return_sequences", "stop": "stop", "seed": "seed", "temperature": "temperature",
    "repetition_penalty": "repetition_penalty",
}  # fmt: skip

#: what says nothing about the text
_WITHOUT_MEANING = {"model", "prompt", "messages", "user", "metadata", "store", "service_tier", "stream_options"}


def is_line(record: Mapping[str, Any]) -> bool:
    """Whether a row is a line of this format."""
    return "custom_id" in record and "body" in record


def request_of(record: Mapping[str, Any]) -> tuple[Mapping[str, Any], dict[str, Any]]:
    """The body of a line, with `prompt` or `messages`, and its options by their names here.

    Raises:
        PolicyError: a body that asks for what cannot be done.
    """
    body = record["body"]
    if not isinstance(body, Mapping):
        raise PolicyError(f"body is {body!r}; give an object with prompt or messages")
    options: dict[str, Any] = {}
    for name, value in body.items():
        if value is None or name in _WITHOUT_MEANING:
            continue
        if name in _NAMES:
            options[_NAMES[name]] = value
        elif name == "logit_bias":
            options["sequence_bias"] = [[[int(token)], float(bias)] for token, bias in value.items()]
        elif _asks_for_more(name, value):
            raise PolicyError(f"body asks for {name}={value!r}, which a batch job cannot do; leave it out")
    return body, _with_temperature(options)


def _asks_for_more(name: str, value: Any) -> bool:
    """Whether a field that is not known here says that something is to be done."""
    if name == "logprobs":
        return value is not False
    return bool(value) and not (name == "best_of" and value == 1)


def _with_temperature(options: dict[str, Any]) -> dict[str, Any]:
    """The options, greedy at temperature 0."""
    temperature = options.get("temperature")
    if temperature is None:
        return options
    if not isinstance(temperature, (int, float)) or temperature < 0:
        raise PolicyError(f"temperature={temperature!r}: give a number that is not below 0")
    if temperature:
        return {**options, "do_sample": True, "temperature": float(temperature)}
    drawing = ("temperature", "top_p", "top_k")
    return {**{name: value for name, value in options.items() if name not in drawing}, "do_sample": False}


def answer(
    record: Mapping[str, Any], line_id: str, model: str, created: int, usage: tuple[int, int], choices: Sequence[Any]
) -> dict[str, Any]:
    """The line that answers a request.

    Args:
        record: the request.
        line_id: of the answer, and of what it holds.
        model: its name.
        created: seconds since 1970.
        usage: tokens of the prompt, and written.
        choices: texts that were written, each with `text` and `finish_reason`.
    """
    is_chat = "messages" in record["body"]
    body = {
        "id": line_id,
        "object": "chat.completion" if is_chat else "text_completion",
        "created": created,
        "model": model,
        "choices": [
            {
                "index": number,
                **({"message": {"role": "assistant", "content": choice.text}} if is_chat else {"text": choice.text}),
                "logprobs": None,
                "finish_reason": choice.finish_reason,
            }
            for number, choice in enumerate(choices)
        ],
        "usage": {"prompt_tokens": usage[0], "completion_tokens": usage[1], "total_tokens": sum(usage)},
    }
    response = {"status_code": 200, "request_id": line_id, "body": body}
    return {"id": line_id, "custom_id": record["custom_id"], "response": response, "error": None}
