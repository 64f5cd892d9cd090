"""The job: a data set through a model, by `apps.batch`, into predictions and what they are worth."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ...errors import PolicyError, StoreError
from .. import batch
from .choosing import Shots, Shown, at_random, by_clusters, read_shown, tried
from .examples import Data, Example
from .metrics import Scores
from .predictions import Prediction, refuse_ending, scored, write_predictions
from .wording import Wording

__all__ = ["Outcome", "prompts", "run"]

# An answer ends with its line: what would follow is the next question, which a model goes on to make up.
_STOP = "\n"
# A decision is one word, a value a few; what is longer is no answer.
_NEW_TOKENS = {"imputation": 16}
_NEW_TOKENS_OF_DECISIONS = 4


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a run made of a data set.

    Args:
        name: of the data set.
        task: of the data set.
        predictions: one for each example that was to be answered, in their order.
        scores: what they are worth; None if no label is known.
        job: what the batch job did in this run; tokens and seconds are of it.
    """

    name: str
    task: str
    predictions: Sequence[Prediction]
    scores: Scores | None
    job: batch.JobReport

    @property
    def unreadable(self) -> int:
        """Texts in which no answer was found."""
        return sum(p.answer is None and p.error is None for p in self.predictions)

    @property
    def errors(self) -> int:
        """Examples for which nothing was written."""
        return sum(p.error is not None for p in self.predictions)

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens of prompts and answers in a second, a shared beginning counted for each; None if all was there."""
        return (self.job.prompt_tokens + self.job.tokens) / self.job.seconds if self.job.seconds else None

    def to_dict(self) -> dict[str, Any]:
        """The summary as JSON takes it."""
        scores = self.scores
        worth = ("precision", "recall", "f1", "accuracy")
        return {
            "name": self.name,
            "task": self.task,
            "samples": len(self.predictions),
            "unreadable": self.unreadable,
            "errors": self.errors,
            **{what: None if scores is None else getattr(scores, what) for what in worth},
            "tokens_per_s": self.tokens_per_s,
            "prompt_tokens": self.job.prompt_tokens,
            "tokens": self.job.tokens,
            "seconds": self.job.seconds,
        }

    def __str__(self) -> str:
        scores = self.scores
        worth = "no labels"
        if scores is not None:
            worth = (
                f"precision {scores.precision:.3f}, recall {scores.recall:.3f}, F1 {scores.f1:.3f}, "
                f"accuracy {scores.accuracy:.3f}"
            )
        speed = "nothing to compute" if self.tokens_per_s is None else f"{self.tokens_per_s:.1f} token/s with prompts"
        return (
            f"{self.task} {self.name}: {len(self.predictions)} rows, {self.unreadable} without an answer, "
            f"{self.errors} errors, {worth}, {speed}"
        )


def run(  # noqa: PLR0913  a job is described by many things
    data: Data,
    model: Any,
    tokenizer: Any = None,
    *,
    wording: Wording | None = None,
    shots: Shots | None = None,
    job: batch.Job | None = None,
    output: str | Path | None = None,
    overwrite: bool = False,
    show_progress: bool = False,
) -> Outcome:
    """Asks a model every question of a data set.

    Args:
        data: from `read` or `read_pair`.
        model: from `FlexGenForCausalLM.from_pretrained`; or a function that returns model and tokenizer, which is
            called once there is something to ask.
        tokenizer: the model's tokenizer.
        wording: how questions are put; by default as the data set's name and task suggest.
        shots: which examples prompts show; by default ten at random.
        job: how texts are written: options of `generate`, chat, window. An answer ends with its line, and after 4
            tokens (16 of an imputation), unless the options say otherwise.
        output: of the predictions, `.jsonl` or `.csv`. What was written so far is in `OUTPUT.answers.jsonl`; started
            again after whatever ended it, the job goes on from there.
        overwrite: begin anew, whatever is there.
        show_progress: a bar on stderr.

    Returns:
        A prediction for each example of the test split, whatever became of it, and what they are worth.

    Raises:
        PolicyError: nothing to be answered, no examples to be shown, or other questions than those of the job that is
            continued.
        StoreError: a file that cannot be read or written.
    """
    wording = wording or Wording.of(data.task, data.name)
    if wording.task != data.task:
        raise PolicyError(f"the wording is of {wording.task}, the data of {data.task}; give one of the same task")
    if not data.test:
        raise PolicyError(f"{data.name!r} has no examples to be answered; its test split is empty")
    job = _with_limits(job or batch.Job(), data.task)
    if tokenizer is None:
        model = functools.cache(model)
    with _files(output) as (asked, answers):
        _write(asked, prompts(data, wording, _shown(data, wording, shots or Shots(), model, tokenizer, job)))
        report = batch.run(asked, answers, model, tokenizer, job=job, overwrite=overwrite, show_progress=show_progress)
        # a text may hold what splitlines takes for the end of a line, such as U+2028
        with answers.open(encoding="utf-8", newline="\n") as file:
            lines = [json.loads(line) for line in file]
    by_index = {line["index"]: line for line in lines}
    predictions = [Prediction.of(example, by_index[n], wording) for n, example in enumerate(data.test)]
    if output is not None:
        write_predictions(predictions, Path(output))
    return Outcome(data.name, data.task, predictions, scored(predictions, wording), report)


def prompts(
    data: Data, wording: Wording, shown: Sequence[Shown], examples: Sequence[Example] | None = None
) -> list[str]:
    """The prompts of the examples to be answered, or of others: the instruction, what is shown, the question."""
    examples = data.test if examples is None else examples
    instruction = wording.instructed(examples[0])
    before = [instruction, *(f"{question} {' '.join(answer.split())}" for question, answer in shown)]
    beginning = "".join(f"{part}\n\n" for part in before if part)
    return [beginning + wording.asked(example) for example in examples]


def _shown(data: Data, wording: Wording, shots: Shots, model: Any, tokenizer: Any, job: batch.Job) -> Sequence[Shown]:
    """What all prompts show."""
    if shots.file is not None:
        return read_shown(shots.file, data, wording)
    chosen = at_random(data, shots.count, shots.seed)
    if shots.how == "clusters" and shots.count:
        candidates = [example for example in tried(data, shots) if example not in set(chosen)]
        if not candidates:
            raise PolicyError(f"{data.name!r} has no labelled validation examples; choose the shown ones at random")
        asked = prompts(data, wording, _said(chosen, wording), candidates)
        mistaken = _mistakes(asked, candidates, wording, model, tokenizer, job)
        questions = [wording.asked(example) for example in mistaken]
        telling = [mistaken[place] for place in by_clusters(questions, shots.count, shots.seed)]
        chosen = [*telling, *chosen][: shots.count]  # what goes right needs no telling, so random ones fill up
    return _said(chosen, wording)


def _said(examples: Sequence[Example], wording: Wording) -> list[Shown]:
    return [(wording.asked(example), example.label or "") for example in examples]


def _mistakes(
    asked: Sequence[str], examples: Sequence[Example], wording: Wording, model: Any, tokenizer: Any, job: batch.Job
) -> list[Example]:
    """The examples that the model gets wrong, in their order."""
    wrong = set()
    if tokenizer is None:
        model, tokenizer = model()
    for result in batch.texts(asked, model, tokenizer, options=job.options, prompting=job.prompting):
        answer = wording.read(result.texts[0].text) if result.error is None else None
        label = examples[result.index].label or ""
        if answer is None or wording.compared(answer) != wording.compared(label):
            wrong.add(result.index)
    return [examples[place] for place in sorted(wrong)]


def _with_limits(job: batch.Job, task: str) -> batch.Job:
    options = {"stop": [_STOP], "do_sample": False, **job.options}
    if "stop_strings" in options:
        del options["stop"]
    if options.get("max_length") is None:
        options.setdefault("max_new_tokens", _NEW_TOKENS.get(task, _NEW_TOKENS_OF_DECISIONS))
    return dataclasses.replace(job, options=options, kind="jsonl", order="input")


@contextlib.contextmanager
def _files(output: str | Path | None) -> Iterator[tuple[Path, Path]]:
    """Where prompts and answers go: the answers beside the output, if there is to be one."""
    with tempfile.TemporaryDirectory() as folder:
        asked = Path(folder) / "prompts.jsonl"
        if output is None:
            yield asked, Path(folder) / "answers.jsonl"
            return
        refuse_ending(Path(output))
        yield asked, Path(output).with_name(f"{Path(output).name}.answers.jsonl")


def _write(path: Path, asked: Sequence[str]) -> None:
    try:
        with path.open("w", encoding="utf-8") as file:
            for prompt in asked:
                file.write(json.dumps({"prompt": prompt}) + "\n")
    except OSError as error:
        raise StoreError(
            f"cannot write the prompts into {str(path.parent)!r} ({error.strerror}); free some space"
        ) from error
