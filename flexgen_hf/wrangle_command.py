"""The command `wrangle`: options in, a job of `apps.wrangle`, its scores on the last line."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from .errors import PolicyError
from .options import (
    BatchSize,
    CompressionText,
    DtypeName,
    MaxMemory,
    NumBatches,
    OffloadFolder,
    PolicyText,
    Progress,
    Revision,
    given,
    load_model,
    load_tokenizer,
    loading_options,
    shows,
    write_text,
)

if TYPE_CHECKING:
    from .apps import wrangle

__all__ = ["wrangle_command"]

_Task = Literal["entity_matching", "imputation", "error_detection", "schema_matching"]
_Way = Literal["random", "clusters", "manual"]


def wrangle_command(  # noqa: PLR0913, PLR0917  a command's options are its parameters
    task: Annotated[_Task, typer.Option(help="What is to be done.")],
    model: Annotated[str, typer.Option(help="Hub id, model folder, or converted store.")],
    data: Annotated[Path | None, typer.Option(help="Folder of a data set, or a CSV file.")] = None,
    left: Annotated[Path | None, typer.Option(help="CSV of entities to be matched, with --right and --pairs.")] = None,
    right: Annotated[Path | None, typer.Option(help="CSV of the others.")] = None,
    pairs: Annotated[
        Path | None, typer.Option(help="CSV of two ids each, and a label (1 or 0) where it is known.")
    ] = None,
    column: Annotated[
        str | None,
        typer.Option(help="Of an imputation: the column to fill in.", show_default="that of a published set"),
    ] = None,
    clean: Annotated[
        Path | None,
        typer.Option(
            help="Of an error detection: CSV of what is right.", show_default="NAME_clean.csv beside the file"
        ),
    ] = None,
    made_errors: Annotated[
        float, typer.Option(min=0, max=1, help="Of an error detection: put errors into so much of the cells.")
    ] = 0.0,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Predictions to write, .jsonl or .csv.", dir_okay=False)
    ] = None,
    filled: Annotated[
        Path | None, typer.Option(help="Of an imputation in a CSV file: the table with its empty cells filled in.")
    ] = None,
    summary: Annotated[Path | None, typer.Option("--json", help="Write the scores here.", dir_okay=False)] = None,
    shots: Annotated[int, typer.Option(min=0, help="Examples that each prompt shows.")] = 10,
    choose: Annotated[
        _Way, typer.Option(help="How they are chosen: `clusters` shows the likes of what goes wrong in validation.")
    ] = "random",
    examples: Annotated[
        Path | None,
        typer.Option(help='JSON lines of examples to show, `{"text": ..., "label": ...}` or `{"id": ...}` each.'),
    ] = None,
    question: Annotated[
        str | None, typer.Option(help="What is asked; {thing}, {column} and {cell} are filled in.")
    ] = None,
    instruction: Annotated[str | None, typer.Option(help='What is said before all; "" says nothing.')] = None,
    thing: Annotated[str | None, typer.Option(help="What a row describes, for example Product.")] = None,
    drop: Annotated[list[str] | None, typer.Option(help="Column to leave out; may be given many times.")] = None,
    max_samples: Annotated[
        int | None, typer.Option(min=1, help="Answer so many examples at most, drawn at random.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of all that is drawn.")] = 0,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens of an answer.", show_default="4, of a value 16")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Questions go through the chat template.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Begin anew, whatever the output holds.")] = False,
    policy: PolicyText = None,
    batch_size: BatchSize = None,
    num_batches: NumBatches = None,
    compression: CompressionText = None,
    max_memory: MaxMemory = None,
    offload_folder: OffloadFolder = None,
    dtype: DtypeName = None,
    revision: Revision = None,
    progress: Progress = None,
) -> None:
    """Matches entities and schemas, fills in missing values, finds errors: tables through prompts.

    Killed and started again with the same options, it goes on where it was.
    """
    from .apps import batch, wrangle
    from .apps.wrangle.predictions import refuse_ending

    if output is not None:
        refuse_ending(output)
    chosen = wrangle.Shots(shots, "manual" if examples is not None else choose, examples, seed)
    dataset = _read(task, data, (left, right, pairs), column, clean, made_errors, seed).limited(max_samples, seed)
    if filled is not None and (task != "imputation" or data is None or not data.is_file()):
        raise PolicyError("--filled: only an imputation in a CSV file has a table to fill in; leave it out")
    wording = dataclasses.replace(
        wrangle.Wording.of(task, dataset.name), **given(question=question, instruction=instruction, thing=thing)
    )
    wording = dataclasses.replace(wording, dropped=(*wording.dropped, *(drop or ())))
    loading = loading_options(
        policy=policy,
        batch_size=batch_size,
        num_batches=num_batches,
        compression=compression,
        max_memory=max_memory,
        offload_folder=offload_folder,
        dtype=dtype,
        revision=revision,
    )

    def load() -> tuple[Any, Any]:
        tokenizer = load_tokenizer(model, revision=revision)  # at once, while a model takes its time
        return load_model(model, loading), tokenizer

    outcome = wrangle.run(
        dataset,
        load,
        wording=wording,
        shots=chosen,
        job=batch.Job(
            options=given(max_new_tokens=max_new_tokens),
            prompting=batch.Prompting(chat=chat, seed=seed),
            name=model,
            loading={"dtype": dtype, "revision": revision, "compression": compression},
        ),
        output=output,
        overwrite=overwrite,
        show_progress=shows(progress),
    )
    if filled is not None and data is not None:
        answers = {p.id: p.answer for p in outcome.predictions if p.answer is not None}
        wrangle.write_table(wrangle.with_answers(wrangle.read_table(data), dataset.test[0].column, answers), filled)
    if summary is not None:
        write_text("--json", summary, json.dumps(outcome.to_dict(), indent=1) + "\n")
    typer.echo(str(outcome))


def _read(
    task: str,
    data: Path | None,
    three: tuple[Path | None, Path | None, Path | None],
    column: str | None,
    clean: Path | None,
    made_errors: float,
    seed: int,
) -> wrangle.Data:
    from .apps import wrangle

    if data is not None and three == (None, None, None):
        return wrangle.read(task, data, column=column, clean=clean, made_errors=made_errors, seed=seed)
    left, right, pairs = three
    if data is not None or left is None or right is None or pairs is None or task != "entity_matching":
        raise PolicyError("give --data, or for entity_matching --left, --right and --pairs, all three of them")
    return wrangle.read_pair(left, right, pairs, seed=seed)
