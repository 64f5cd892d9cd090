"""The command `wrangle`: options in, a data set through `apps.wrangle`, one line at the end."""

from __future__ import annotations

import dataclasses
import json
import sys
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
    write_text,
)

if TYPE_CHECKING:
    from .apps.wrangle import Data, Wording

__all__ = ["wrangle_command"]

_Task = Literal["entity_matching", "imputation", "error_detection", "schema_matching"]
_Way = Literal["random", "clusters", "manual"]


def wrangle_command(  # noqa: PLR0913, PLR0917  a command's options are its parameters
    model: Annotated[str | None, typer.Option(help="Hub id, model folder, or converted store.")] = None,
    task: Annotated[_Task, typer.Option(help="What is asked about the rows.")] = "entity_matching",
    data: Annotated[Path | None, typer.Option(help="Folder of a published data set, or a CSV file.")] = None,
    left: Annotated[Path | None, typer.Option(help="CSV file: entities to be matched with those of --right.")] = None,
    right: Annotated[Path | None, typer.Option(help="CSV file: the other entities.")] = None,
    pairs: Annotated[
        Path | None, typer.Option(help="CSV file: an id of --left, one of --right, and where known the label, 1 or 0.")
    ] = None,
    column: Annotated[
        str | None, typer.Option(help="Column that is to be filled in.", show_default="known for published sets")
    ] = None,
    clean: Annotated[
        Path | None,
        typer.Option(help="CSV file: what is right in --data, as the same table or as `tid, attribute, correct_val`."),
    ] = None,
    made_errors: Annotated[
        float, typer.Option(help="Share of cells into which errors are put, to count how many are found.")
    ] = 0.0,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Predictions to write, `.jsonl` or `.csv`.")
    ] = None,
    filled: Annotated[Path | None, typer.Option(help="CSV file to write: --data with its holes filled in.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write counts, scores and speed here.")] = None,
    shots: Annotated[int, typer.Option(min=0, help="Examples that each prompt shows.")] = 10,
    choose: Annotated[
        _Way, typer.Option(help="How they are chosen; `clusters` are of what the model gets wrong in the valid split.")
    ] = "random",
    examples: Annotated[
        Path | None, typer.Option(help='Examples by hand: JSON lines, `{"text": ..., "label": ...}` or `{"id": ...}`.')
    ] = None,
    question: Annotated[
        str | None,
        typer.Option(help="What is asked; may have `{thing}`, `{column}`, `{cell}`.", show_default="by data"),
    ] = None,
    instruction: Annotated[
        str | None, typer.Option(help="What is said before the examples; empty says nothing.", show_default="by data")
    ] = None,
    thing: Annotated[str | None, typer.Option(help="What a row describes.", show_default="by data")] = None,
    drop: Annotated[
        list[str] | None, typer.Option(help="Attribute to leave out; may be given many times.", show_default="by data")
    ] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Test rows that are drawn, in place of all.")] = None,
    seed: Annotated[int, typer.Option(help="What is drawn follows from it.")] = 0,
    stop: Annotated[
        list[str] | None,
        typer.Option(help="Text that ends an answer; may be given many times.", show_default="a line break"),
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens of an answer.", show_default="4, of an imputation 16")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Each prompt is a user's message in the chat template.")] = False,
    show_prompt: Annotated[bool, typer.Option("--show-prompt", help="Print the first prompt, load nothing.")] = False,
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
    """Matches entities or schemas, fills in what is missing, finds what is wrong, by prompts with a few examples."""
    from .apps import batch, wrangle

    if filled is not None and (task != "imputation" or data is None or not data.is_file()):
        raise PolicyError("--filled: only a CSV file (--data FILE --task imputation) can be filled in; leave it out")
    if left is not None or right is not None or pairs is not None:
        if task != "entity_matching" or data is not None or left is None or right is None or pairs is None:
            raise PolicyError("--left, --right and --pairs go together, with --task entity_matching, without --data")
        read = wrangle.read_pair(left, right, pairs, seed=seed)
    elif data is not None:
        read = wrangle.read(task, data, column=column, clean=clean, made_errors=made_errors, seed=seed)
    else:
        raise PolicyError("which data? give --data, or --left, --right and --pairs")
    read = read.limited(samples, seed)
    wording = _wording(read, question=question, instruction=instruction, thing=thing, dropped=drop)
    chosen = wrangle.Shots(shots, "manual" if examples is not None and choose == "random" else choose, examples, seed)
    if show_prompt:
        typer.echo(wrangle.first_prompt(read, wording=wording, shots=chosen))
        return
    if model is None:
        raise PolicyError("which model? give --model, or --show-prompt to see what one would be asked")
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
        tokenizer = load_tokenizer(model, revision=revision)
        return load_model(model, loading), tokenizer

    outcome = wrangle.run(
        read,
        load,
        wording=wording,
        shots=chosen,
        job=batch.Job(
            options=given(stop=stop or None, max_new_tokens=max_new_tokens),
            prompting=batch.Prompting(chat=chat, seed=seed),
            name=model,
            loading={"dtype": dtype, "revision": revision, "compression": compression},
        ),
        output=output,
        overwrite=overwrite,
        show_progress=sys.stderr.isatty() if progress is None else progress,
    )
    if filled is not None and data is not None:
        wrangle.write_filled(data, read.test[0].column, {p.id: p.answer for p in outcome.predictions}, filled)
    if json_file is not None:
        write_text("--json", json_file, json.dumps({"model": model, **outcome.to_dict()}, indent=1) + "\n")
    typer.echo(str(outcome))


def _wording(read: Data, *, dropped: list[str] | None, **said: Any) -> Wording:
    """The data set's wording, but for what the options say."""
    from .apps.wrangle import Wording

    found = Wording.of(read.task, read.name)
    return dataclasses.replace(found, **given(dropped=tuple(dropped) if dropped else None, **said))
