"""The job: rows of a file through a model into a journal, and again where it was.

Knows files and their order of rows; how prompts become texts is `requests`' business.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ...continuous.engine import LEAST_SHARED
from ...errors import PolicyError
from . import openai
from .bar import Bar
from .inputs import InputRow, count_rows, format_of, read_rows
from .journal import Journal
from .requests import Prompting, Result, Writer
from .settings import check_options

__all__ = ["Job", "JobReport", "run"]

_ORDERS = ("input", "finished")


@dataclasses.dataclass(frozen=True)
class Job:
    """What is to be done with a file of prompts.

    Args:
        options: fields of `GenerationConfig` for all rows.
        prompting: how rows become prompts.
        kind: format of the input, one of `inputs.FORMATS`; by default what the file's ending says.
        column: of a table, the one with the prompts.
        order: "input": at the end the output is brought into the order of the input; "finished": it stays as it grew.
        window: rows that are read ahead and put in the order of their lengths.
        least_shared: tokens that a common beginning has at least for it to be computed once; None shares none.
        name: of the model, in answers and in what is compared when a job is continued.
        loading: what else of the model changes texts, as JSON takes it: dtype, revision, compression.
    """

    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    prompting: Prompting = dataclasses.field(default_factory=Prompting)
    kind: str | None = None
    column: str | None = None
    order: str = "input"
    window: int | None = None
    least_shared: int | None = LEAST_SHARED
    name: str = ""
    loading: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.order not in _ORDERS:
            raise PolicyError(f"order={self.order!r}: use one of {', '.join(_ORDERS)}")

    def to_dict(self) -> dict[str, Any]:
        """What makes two jobs the same, as JSON takes it."""
        return {
            "model": self.name,
            "options": {name: _plain(value) for name, value in sorted(self.options.items())},
            **dataclasses.asdict(self.prompting),
            "column": self.column,
            "loading": dict(self.loading),
        }


@dataclasses.dataclass(frozen=True)
class JobReport:
    """What a run of a job did.

    Args:
        rows: in the output now.
        computed: in this run.
        errors: of these, rows that are errors.
        prompt_tokens: of the prompts that were computed.
        tokens: that were written.
        seconds: from the first row to the last.
    """

    rows: int
    computed: int
    errors: int
    prompt_tokens: int
    tokens: int
    seconds: float

    def __str__(self) -> str:
        speed = f"{self.tokens / self.seconds:.2f} token/s" if self.seconds else "nothing to compute"
        before = f", {self.rows - self.computed} were there" if self.rows > self.computed else ""
        return (
            f"{self.computed} rows{before}, {self.errors} errors, {self.tokens} tokens in {self.seconds:.1f} s, {speed}"
        )


def run(  # noqa: PLR0913  a job is described by many things
    source: str | Path,
    output: str | Path,
    model: Any,
    tokenizer: Any = None,
    *,
    job: Job | None = None,
    options: Mapping[str, Any] | None = None,
    show_progress: bool = False,
    overwrite: bool = False,
    retry_errors: bool = False,
) -> JobReport:
    """Writes on after each row of a file; started again after whatever ended it, it goes on where it was.

    Args:
        source: the input, in any format that `inputs` reads; `-` is standard input.
        output: the JSON lines to write; OpenAI's answers for OpenAI's requests.
        model: from `FlexGenForCausalLM.from_pretrained`; or a function that returns model and tokenizer, which is
            called once the files are seen to be in order and there is something to do.
        tokenizer: the model's tokenizer.
        job: what is to be done.
        options: fields of `GenerationConfig`, in place of those of `job`.
        show_progress: a bar on stderr.
        overwrite: begin anew, whatever the output holds.
        retry_errors: rows whose output is an error are computed again.

    Raises:
        PolicyError: options that cannot be meant, or other ones than those of the job that is continued.
        StoreError: a file that cannot be read or written, or an input that has changed.
        CapacityError: the disk is full; the output is whole up to there.
    """
    job = job or Job()
    given = check_options(job.options if options is None else options)
    job = dataclasses.replace(job, options=given, name=job.name or _name_of(model))
    target = Path(output)
    format_of(source, job.kind)
    with Journal(target, job.to_dict(), overwrite=overwrite, retry_errors=retry_errors) as journal:
        rows = _Missing(read_rows(source, job.kind, job.column), journal)
        before = journal.count
        tally = _Tally()
        if rows.is_any:
            loaded, tokens = model() if tokenizer is None else (model, tokenizer)
            writer = Writer(loaded, tokens, job.options, job.prompting)
            total = count_rows(source, job.kind) if show_progress else None
            with Bar(total, before, lambda: loaded.last_run, shown=show_progress) as bar:
                _write(writer, rows, journal, job, tally, bar)
        if job.order == "input":
            journal.in_input_order()
        return tally.report(journal.count, journal.count - before)


def _write(writer: Writer, rows: _Missing, journal: Journal, job: Job, tally: _Tally, bar: Bar) -> None:
    results = writer.write(
        ((row.index, row.record, row.error) for row in rows),
        window=job.window,
        least_shared=job.least_shared,
        on_sweep=bar.sweep,
    )
    for result in results:
        digest = rows.digests.pop(result.index)
        line = _line(result, digest, job.name, int(journal.job["created"]))
        journal.append([(result.index, digest, line)])
        tally.add(result)
        bar.row()


class _Missing:
    """The rows that the journal does not have, with the digests of those that are on their way."""

    def __init__(self, rows: Iterator[InputRow], journal: Journal) -> None:
        self._rows = (row for row in rows if not journal.has(row.index, row.digest))
        self._first = next(self._rows, None)
        self.digests: dict[int, str] = {}

    @property
    def is_any(self) -> bool:
        """Whether there is one."""
        return self._first is not None

    def __iter__(self) -> Iterator[InputRow]:
        if self._first is not None:
            self.digests[self._first.index] = self._first.digest
            yield self._first
        for row in self._rows:
            self.digests[row.index] = row.digest
            yield row


class _Tally:
    """Counts what was done."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._errors = self._prompt_tokens = self._tokens = 0

    def add(self, result: Result) -> None:
        self._errors += result.error is not None
        self._prompt_tokens += result.prompt_tokens
        self._tokens += sum(text.tokens for text in result.texts)

    def report(self, rows: int, computed: int) -> JobReport:
        seconds = time.perf_counter() - self._started if computed else 0.0
        return JobReport(rows, computed, self._errors, self._prompt_tokens, self._tokens, seconds)


def _line(result: Result, digest: str, model: str, created: int) -> dict[str, Any]:
    """What is written for a row."""
    if openai.is_line(result.record):
        line_id = f"batch_req_{result.index}_{digest}"
        if result.error is not None:
            error = {"code": "invalid_request", "message": str(result.error)}
            return {"id": line_id, "custom_id": result.record["custom_id"], "response": None, "error": error}
        usage = result.prompt_tokens, sum(text.tokens for text in result.texts)
        return openai.answer(result.record, line_id, model, created, usage, result.texts)
    line: dict[str, Any] = {"index": result.index}
    if "id" in result.record:
        line["id"] = result.record["id"]
    if result.error is not None:
        line["error"] = {"type": type(result.error).__name__, "message": str(result.error)}
        return {**line, "digest": digest}
    first, *more = result.texts
    line |= {
        "text": first.text,
        "finish_reason": first.finish_reason,
        "prompt_tokens": result.prompt_tokens,
        "completion_tokens": first.tokens,
    }
    if more:
        line["texts"] = [dict(text._asdict()) for text in result.texts]
    return {**line, "digest": digest}


def _name_of(model: Any) -> str:
    return str(getattr(getattr(model, "config", None), "name_or_path", "") or "")


def _plain(value: Any) -> Any:
    """A setting as JSON takes it; transformers' own objects by their fields."""
    return value if isinstance(value, (str, int, float, bool, list, dict, type(None))) else vars(value)
