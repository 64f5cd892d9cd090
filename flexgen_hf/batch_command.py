"""The command `batch`: options in, a job of `apps.batch`, one line at the end."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from .errors import FlexGenError, PolicyError, StoreError

__all__ = ["batch_command"]

_Dtype = Literal["float16", "bfloat16", "float32"]
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
    do_sample: Annotated[
        bool | None,
        typer.Option("--do-sample/--greedy", help="Sample, or take the likeliest token.", show_default="the model's"),
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="Sampling temperature.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Sample from this much of the probability.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Sample from this many tokens.")] = None,
    num_beams: Annotated[int | None, typer.Option(min=1, help="Beams of a beam search.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="Any field of GenerationConfig, as `NAME=VALUE`; may be given many times."),
    ] = None,
    generation_config: Annotated[
        Path | None, typer.Option(help="JSON file of such fields; options of the command override them.")
    ] = None,
    seed: Annotated[int, typer.Option(help="What is drawn for a row follows from it and the row's number.")] = 0,
    chat: Annotated[bool, typer.Option("--chat", help="Each prompt is a user's message in the chat template.")] = False,
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
    least_shared: Annotated[
        int, typer.Option(min=0, help="Tokens of a common beginning that is computed once; 0 shares none.")
    ] = 32,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Begin anew, whatever the output holds.")] = False,
    retry_errors: Annotated[bool, typer.Option("--retry-errors", help="Compute rows again that are errors.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Wait for more files in the folder, until Ctrl-C.")] = False,
    policy: Annotated[str | None, typer.Option(help="Six percentages or a JSON file, as for `generate`.")] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", "--gpu-batch-size", help="Sequences of a micro-batch.")
    ] = None,
    num_batches: Annotated[
        int | None, typer.Option("--num-batches", "--num-gpu-batches", help="Micro-batches of a block.")
    ] = None,
    compression: Annotated[str | None, typer.Option(help="As for `generate`.")] = None,
    max_memory: Annotated[
        str | None, typer.Option(help="Limit of each tier, for example `0=14GiB,cpu=180GiB,disk=1TiB`.")
    ] = None,
    offload_folder: Annotated[Path | None, typer.Option(help="Folder of the disk tier.", file_okay=False)] = None,
    dtype: Annotated[
        _Dtype | None,
        typer.Option(help="Element type of compute.", show_default="float32 on a CPU, else the checkpoint's"),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")] = None,
    progress: Annotated[
        bool | None,
        typer.Option("--progress/--no-progress", help="Show progress on stderr.", show_default="on a terminal"),
    ] = None,
) -> None:
    """Writes on after each row of a file. Started again after whatever ended it, it goes on where it was."""
    from .apps import batch
    from .cli import load_for_batch  # the command line is above its commands

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
    template = _read_template(chat_template)

    def load() -> tuple[Any, Any]:
        loaded, tokenizer = load_for_batch(
            model,
            policy=policy,
            batch_size=batch_size,
            num_batches=num_batches,
            compression=compression,
            max_memory=max_memory,
            offload_folder=offload_folder,
            dtype=dtype,
            revision=revision,
        )
        if template is not None:
            tokenizer.chat_template = template
        return loaded, tokenizer

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
    shown = sys.stderr.isatty() if progress is None else progress
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


def _read_template(file: Path | None) -> str | None:
    try:
        return None if file is None else file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise StoreError(f"--chat-template: cannot read {str(file)!r} ({error})") from error
