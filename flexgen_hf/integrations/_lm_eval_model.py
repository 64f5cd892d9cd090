"""The class that lm-eval calls. To be imported where lm-eval is installed; see `lm_eval`.

Tokens, prefixes, chat templates and the end of texts are those of lm-eval's `hf`, of which it is a subclass; what goes
through the model goes in blocks that share each loaded layer.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from lm_eval import utils
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.models.utils_hf import stop_sequences_criteria
from tqdm import tqdm

from ..errors import PolicyError
from ..text import named_file
from .lm_eval import likelihoods, load, written

__all__ = ["FlexGenLM"]

# What of an `hf` model's arguments concerns tokens and texts, not how the model is loaded.
_ABOUT_TEXTS = (
    "truncation max_length use_fast_tokenizer add_bos_token prefix_token_id think_end_token enable_thinking "
    "chat_template_args"
).split()

_Requests = list[tuple[Any, list[int], list[int]]]


class FlexGenLM(HFLM):  # type: ignore[misc]  # without lm-eval there is no such class to look at
    """A model of `FlexGenForCausalLM` for lm-eval.

    Args:
        pretrained: Hub id, model folder, store or GGUF file.
        tokenizer: another one than the model's.
        batch_size: rows of a micro-batch; 1 and `auto` leave it to the policy.
        max_batch_size: of no meaning here.
        arguments: those of `FlexGenForCausalLM.from_pretrained`, and those of lm-eval's `hf` about tokens and texts.
    """

    def __init__(
        self,
        pretrained: str,
        tokenizer: str | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,  # noqa: ARG002  lm-eval gives it to every model
        **arguments: Any,
    ) -> None:
        about_texts = {name: arguments.pop(name) for name in _ABOUT_TEXTS if name in arguments}
        model = load(pretrained, batch_size=batch_size, **arguments)
        of_files = {name: arguments[name] for name in ("subfolder", "trust_remote_code") if name in arguments}
        _, named = named_file(pretrained)
        with _without_warnings():
            super().__init__(
                pretrained=model,
                tokenizer=tokenizer,
                revision=arguments.get("revision") or "main",
                gguf_file=named.get("gguf_file", arguments.get("gguf_file")),
                batch_size=model.policy.block_size,
                **of_files,
                **about_texts,
            )
        self.pretrained = pretrained  # what lm-eval writes down is a name

    def _loglikelihood_tokens(
        self,
        requests: _Requests,
        disable_tqdm: bool = False,
        override_bs: int | None = None,  # noqa: ARG002
    ) -> list[tuple[float, bool]]:
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        pairs = [(context, continuation) for _, context, continuation in requests]
        for index, total, is_greedy in _shown(
            likelihoods(self.model, pairs, self.max_length), len(pairs), "loglikelihood", disable_tqdm
        ):
            answers[index] = total, is_greedy
            if (texts := requests[index][0]) is not None:  # rolling windows are no requests of their own
                self.cache_hook.add_partial("loglikelihood", texts, answers[index])
        return answers

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Natural logarithm of the probability of each whole text, in windows of what the model sees."""
        windows: _Requests = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            (text,) = request.args
            tokens = self.tok_encode(text)
            for window in utils.get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, 1):
                windows.append((None, *utils.make_disjoint_window(window)))
                owners.append(number)
        totals = [0.0] * len(requests)
        for owner, (total, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[owner] += total
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """What is written after each prompt, until one of its ends, or `max_gen_toks` tokens."""
        texts = [""] * len(requests)
        ends: list[list[str]] = [[] for _ in requests]
        prompts = (self._prompt(r.args[0], r.args[1], end) for r, end in zip(requests, ends, strict=True))
        for index, tokens in _shown(
            written(self.model, prompts, torch.initial_seed() % 2**62), len(requests), "generate_until", disable_tqdm
        ):
            texts[index] = self._text(tokens, ends[index])
            self.cache_hook.add_partial("generate_until", requests[index].args, texts[index])
        return texts

    def _prompt(self, context: str, settings: dict[str, Any], ends: list[str]) -> tuple[list[int], dict[str, Any]]:
        """Tokens of a prompt, and what `generate` takes beside them; `ends` receives what ends its text."""
        options = dict(normalize_gen_kwargs(settings, self.max_gen_toks))
        end = self.tok_decode(self.eot_token_id, skip_special_tokens=False)
        ends += handle_stop_sequences(options.pop("until", None), eos=end)
        new = options.pop("max_gen_toks")
        room = self.max_length - new
        if room < 1:
            raise PolicyError(
                f"max_gen_toks={new} is as much as the model sees in all ({self.max_length}); ask for fewer tokens"
            )
        ids, _ = self.tok_batch_encode([context], left_truncate_len=room, truncation=self.truncation)
        options.setdefault("max_length", ids.shape[1] + new)
        if not options.get("do_sample"):
            options.pop("temperature", None)
        options["pad_token_id"] = self.tokenizer.pad_token_id
        options["stopping_criteria"] = stop_sequences_criteria(self.tokenizer, ends, ids.shape[1], 1)
        return ids[0].tolist(), options

    def _text(self, tokens: Sequence[int], ends: list[str]) -> str:
        """The text of new tokens, without the thoughts before it, up to where it ends."""
        mark = self.think_end_token
        thought = isinstance(mark, int) and mark in tokens
        if thought:
            tokens = tokens[len(tokens) - list(reversed(tokens)).index(mark) :]
        text = self.tok_decode(list(tokens))
        text = text.lstrip() if isinstance(mark, int) else text
        done: str = postprocess_generated_text(text, ends, mark if isinstance(mark, str) else None)
        return done


def _shown(results: Iterator[Any], total: int, what: str, is_hidden: bool) -> Iterator[Any]:
    """The results, with lm-eval's kind of bar."""
    bar = tqdm(results, total=total, disable=is_hidden, desc=f"Running {what} requests")
    yield from bar


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """Keeps `hf` from warning that it was given a model: what it cannot do with one is not asked of it here."""
    logger = logging.getLogger(HFLM.__module__)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
