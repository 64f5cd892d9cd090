"""`python -m flexgen_hf.bench.batches`: what `generate_each` gains over `generate` in fixed blocks, on one model.

Two comparisons, each with the same texts on both sides. *Rows of many lengths*: the rows in the order of a file, a
block at a time, each block until its longest row ends, against rows that leave their place when they end. *A common
beginning*: prompts that share most of their tokens, each computed whole, against the common part computed once.
"""

from __future__ import annotations

import dataclasses
import json
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.utils import logging

from .. import FlexGenForCausalLM
from ..continuous.texts import TextRequest
from ..policy import Policy
from .shapes import random_checkpoint

__all__ = ["Comparison", "common_beginning", "main", "many_lengths"]

_PAD = 1

Row = tuple[list[int], int]  # prompt, and how many tokens are to be written after it


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Two ways to the same texts.

    Args:
        name: of what was compared.
        before_s: seconds of the plain way.
        after_s: seconds of `generate_each`.
        tokens: that were written by each.
        different: texts that are not the same; in float32 a near tie may be decided by rounding.
        sweeps: of each.
    """

    name: str
    before_s: float
    after_s: float
    tokens: int
    different: int
    sweeps: tuple[int, int]

    def __str__(self) -> str:
        return (
            f"{self.name}: {self.before_s:.2f} s and {self.sweeps[0]} sweeps before, {self.after_s:.2f} s and "
            f"{self.sweeps[1]} after; {self.before_s / self.after_s:.2f} times the token/s, "
            f"{self.after_s / self.before_s:.2f} of the time; {self.different} texts differ"
        )


class _EndsAfter(StoppingCriteria):
    """Ends a text as an end token would: nobody knows when until it happens."""

    def __init__(self, length: int) -> None:
        self._length = length

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:  # noqa: ARG002  transformers' signature
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= self._length)


def many_lengths(
    model: Any,
    rows: int = 256,
    prompts: tuple[int, int] = (8, 256),
    tokens: tuple[int, int] = (1, 64),
    *,
    is_known: bool = True,
) -> Comparison:
    """Rows with prompts and outputs of all lengths in these ranges.

    Args:
        model: ours; its policy says what a block is.
        rows: how many.
        prompts: shortest and longest prompt.
        tokens: fewest and most tokens that are written after one.
        is_known: each row says how many tokens it is to get; otherwise it ends by itself, and says only the most.
    """
    drawn = _rows(model, rows, prompts, tokens)

    def fixed() -> tuple[list[list[int]], int]:
        texts, sweeps = [], 0
        for start in range(0, rows, model.policy.block_size):
            block = drawn[start : start + model.policy.block_size]
            inputs = _padded([prompt for prompt, _ in block])
            output = model.generate(
                **inputs, do_sample=False, max_new_tokens=max(limit for _, limit in block), **_never_ends()
            )
            sweeps += len(model.last_run.sweeps)
            written = output[:, inputs["input_ids"].shape[1] :].tolist()
            texts += [text[:limit] for text, (_, limit) in zip(written, block, strict=True)]
        return texts, sweeps

    def options(prompt: list[int], limit: int) -> dict[str, Any]:
        if is_known:
            return {"max_new_tokens": limit}
        ends = StoppingCriteriaList([_EndsAfter(len(prompt) + limit)])
        return {"max_new_tokens": tokens[1], "stopping_criteria": ends}

    name = f"{rows} rows of many lengths, {'known' if is_known else 'unknown'}"
    return _compared(name, fixed, lambda: _each(model, drawn, options))


def common_beginning(model: Any, rows: int = 64, prompt: int = 256, share: float = 0.75) -> Comparison:
    """Prompts of which this share is the same in all; a single token is written, so that prefill is measured."""
    drawn = _rows(model, rows, (prompt, prompt), (1, 1))
    beginning = drawn[0][0][: int(prompt * share)]
    drawn = [(beginning + own[len(beginning) :], limit) for own, limit in drawn]

    def options(_: list[int], limit: int) -> dict[str, Any]:
        return {"max_new_tokens": limit}

    return _compared(
        f"{rows} prompts of {prompt} tokens, {share:.0%} in common",
        lambda: _each(model, drawn, options, least_shared=None),
        lambda: _each(model, drawn, options),
    )


def _each(
    model: Any, rows: Sequence[Row], options: Callable[[list[int], int], dict[str, Any]], **engine: Any
) -> tuple[list[list[int]], int]:
    """Texts of `generate_each`, and its sweeps."""
    requests = [
        TextRequest(prompt, {"do_sample": False, **_never_ends(), **options(prompt, limit)}, key=number)
        for number, (prompt, limit) in enumerate(rows)
    ]
    texts: dict[int, list[int]] = {}
    for written in model.generate_each(requests, **engine):
        if written.error is not None:
            raise written.error
        texts[written.request.key] = written.output[0, len(written.request.ids) :].tolist()
    return [texts[number] for number in range(len(rows))], len(model.last_run.sweeps)


def _compared(
    name: str, before: Callable[[], tuple[list[list[int]], int]], after: Callable[[], tuple[list[list[int]], int]]
) -> Comparison:
    seconds, made = [], []
    for way in (before, after):
        started = time.perf_counter()
        made.append(way())
        seconds.append(time.perf_counter() - started)
    (want, swept), (got, swept_after) = made
    different = sum(one != other for one, other in zip(want, got, strict=True))
    return Comparison(name, seconds[0], seconds[1], sum(map(len, got)), different, (swept, swept_after))


def _rows(model: Any, count: int, prompts: tuple[int, int], tokens: tuple[int, int]) -> list[Row]:
    draw = random.Random(0)  # noqa: S311  the same rows in every run
    most = model.config.get_text_config(decoder=True).vocab_size - 1
    return [
        ([draw.randint(4, most) for _ in range(draw.randint(*prompts))], draw.randint(*tokens)) for _ in range(count)
    ]


def _padded(prompts: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), _PAD)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    return {"input_ids": ids, "attention_mask": mask}


def _never_ends() -> dict[str, Any]:
    return {"eos_token_id": -1, "pad_token_id": _PAD}


def _main(  # noqa: PLR0913, PLR0917  a command's options are its parameters
    shape: Annotated[str, typer.Option(help="A shape of `flexgen-hf bench`.")] = "opt-125m",
    what: Annotated[Literal["all", "known", "unknown", "common"], typer.Option(help="Which comparison.")] = "all",
    rows: Annotated[int, typer.Option(min=1, help="Rows of many lengths.")] = 256,
    prompt: Annotated[int, typer.Option(min=2, help="Tokens of a prompt with a common beginning.")] = 256,
    policy: Annotated[str, typer.Option(help="Six percentages.")] = "0 100 0 100 0 100",
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences of a micro-batch.")] = 16,
    num_batches: Annotated[int, typer.Option(min=1, help="Micro-batches of a block.")] = 4,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of torch.")] = None,
    work_folder: Annotated[Path, typer.Option(help="Where the checkpoint and spill files go.")] = Path("bench-work"),
    output: Annotated[Path | None, typer.Option("--json", help="Append what was measured to this file.")] = None,
) -> None:
    """Runs the comparisons and prints them."""
    # An end token that never comes would be warned of for each row.
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    if threads is not None:
        torch.set_num_threads(threads)
    folder = random_checkpoint(work_folder, shape, torch.float16)
    with FlexGenForCausalLM.from_pretrained(
        folder,
        policy=Policy.parse(policy, batch_size=batch_size, num_batches=num_batches),
        dtype="float32",
        offload_folder=work_folder,
    ) as model:
        common_beginning(model, rows=4, prompt=32)  # what is slow for the first time only
        ways: dict[str, Callable[[], Comparison]] = {
            "known": lambda: many_lengths(model, rows),
            "unknown": lambda: many_lengths(model, rows, is_known=False),
            "common": lambda: common_beginning(model, batch_size * num_batches, prompt),
        }
        for name, way in ways.items():
            if what in ("all", name):
                result = way()
                typer.echo(str(result))
                if output is not None:
                    record = {"shape": shape, "policy": policy, "block": [batch_size, num_batches]}
                    with output.open("a", encoding="utf-8") as file:
                        file.write(json.dumps({**record, **dataclasses.asdict(result)}) + "\n")


def main() -> None:
    """The comparisons, with the options of the command line."""
    typer.run(_main)


if __name__ == "__main__":
    main()
