"""The command `batch`: options in, a job of `apps.batch`, one line at the end."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from .errors import FlexGenError, PolicyError
from .options import (
    BatchSize,
    Chat,
    CompressionText,
    DoSample,
    DtypeName,
    LeastShared,
    MaxMemory,
    NumBatches,
    NumBeams,
    OffloadFolder,
    PolicyText,
    Progress,
    Revision,
    Temperature,
    TopK,
    TopP,
    load_model,
    load_tokenizer,
    loading_options,
    read_text,
    shows,
)

__all__ = ["batch_command"]

_Format = Literal["jsonl", "csv", "tsv", "parquet", "text"]
_Order = Literal["input", "finished"]

_NEW_TOKENS = 32


def batch_command(  # noqa: PLR0913, PLR0917  a command's options are its parameters
    source: Annotated[
        Path,
        typer.Argument(metavar="INPUT", help="JSON lines, CSV, Parquet or text; `-`; or a folder.", allow_dash=True),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="JSON lines to write; a folder for a folder.")],
    model: Annotated[str, typer.Option(help="Hub id, model folder, or converted store.")],
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens to write after each prompt.", show_default=str(_NEW_TOKENS))
    ] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends a text; may be given many times.")] = None,
    do_sample: DoSample = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    num_beams: NumBeams = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="Any field of GenerationConfig, as `NAME=VALUE`; may be given many times."),
    ] = None,
    generation_config: Annotated[
        Path | None, typer.Option(help="JSON file of such fields; options of the command override them.")
    ] = None,
    seed: Annotated[int, typer.Option(help="What is drawn for a row follows from it and the row's number.")] = 0,
    chat: Chat = False,
    chat_template: Annotated[Path | None, typer.Option(help="Jinja file, in place of the model's template.")] = None,
    truncate: Annotated[bool, typer.Option("--truncate", help="Take the end of prompts that are too long.")] = False,
    kind: Annotated[
        _Format | None, typer.Option("--format", help="Format of the input.", show_default="by its ending")
    ] = None,
    column: Annotated[
        str | None, typer.Option(help="Column of the prompts in a table.", show_default="prompt, or the only one")
    ] = None,
    order: Annotated[_Order, typer.Option(help="Of the output, once the job is done.")] = "input",
    window: Annotated[
        int | None, typer.Option(min=1, help="Rows that are read ahead and put in the order of their lengths.")
    ] = None,
    least_shared: LeastShared = 32,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Begin anew, whatever the output holds.")] = False,
    retry_errors: Annotated[bool, typer.Option("--retry-errors", help="Compute rows again that are errors.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Wait for more files in the folder, until Ctrl-C.")] = False,
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
    """Writes on after each row of a file. Started again after whatever ended it, it goes on where it was."""
    from .apps import batch

    options = batch.generation_options(
        generation_config,
        settings or (),
        stop=stop or None,
        do_sample=do_sample,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        num_beams=num_beams,
        max_new_tokens=max_new_tokens,
    )
    if options.get("max_length") is None:
        options.setdefault("max_new_tokens", _NEW_TOKENS)
    template = None if chat_template is None else read_text("--chat-template", chat_template)
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
        if template is not None:
            tokenizer.chat_template = template
        return load_model(model, loading), tokenizer

    job = batch.Job(
        options=options,
        prompting=batch.Prompting(chat=chat, truncate=truncate, seed=seed),
        kind=kind,
        column=column,
        order=order,
        window=window,
        least_shared=least_shared or None,
        name=model,
        loading={"dtype": dtype, "revision": revision, "compression": compression, "chat_template": template},
    )
    shown = shows(progress)
    if source.is_dir():
        _run_folder(source, output, load, job, shown, watch)
        return
    if watch:
        raise PolicyError(f"--watch: {str(source)!r} is no folder; give one into which files will be put")
    report = batch.run(
        source, output, load, job=job, show_progress=shown, overwrite=overwrite, retry_errors=retry_errors
    )
    typer.echo(str(report), err=True)


def _run_folder(source: Path, output: Path, load: Any, job: Any, shown: bool, watch: bool) -> None:
    """A job for each file; without `watch` until all that are there are done."""
    from .apps import batch

    failed = 0
    for path, came in batch.watch(source, output, load, job=job, show_progress=shown, until=lambda: not watch):
        failed += isinstance(came, FlexGenError)
        typer.echo(f"{path.name}: {'error: ' if isinstance(came, FlexGenError) else ''}{came}", err=True)
    if failed:
        raise FlexGenError(f"{failed} files could not be done; the lines above say why")
