"""The command line: reads options, calls the library, prints. Every decision is the library's.

Percent, sizes as text and the original's spellings of options exist here only.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import typer

from conversion.commands import convert_command, verify_command

from . import __version__
from .batch_command import batch_command
from .bench.command import bench_command
from .errors import FlexGenError, StoreError
from .helm_command import helm_command
from .lm_eval_command import lm_eval_command
from .models_command import models_command
from .options import (
    BatchSize,
    CompressionText,
    DoSample,
    DtypeName,
    MaxMemory,
    NumBatches,
    NumBeams,
    OffloadFolder,
    Percents,
    PolicyText,
    Progress,
    Revision,
    Temperature,
    TopK,
    TopP,
    given,
    hide_loading_bar,
    load_model,
    load_tokenizer,
    loading_options,
    read_text,
    refuse_missing_folder,
    shows,
    write_text,
)
from .plan_command import plan_command
from .policy import AUTO, Compression
from .profile_command import profile_command
from .wrangle_command import wrangle_command

__all__ = ["app", "main", "read_prompts"]

app = typer.Typer(
    name="flexgen-hf",
    help="Generates text with models that do not fit on the accelerator, or not in RAM.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
app.command("convert")(convert_command)
app.command("verify")(verify_command)
app.command("batch")(batch_command)
app.command("wrangle")(wrangle_command)
app.command("helm")(helm_command)
app.command("bench")(bench_command)
app.command("plan")(plan_command)
app.command("profile")(profile_command)
app.command("models")(models_command)
# all that is not our own help is lm-eval's to read
app.command("lm-eval", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(lm_eval_command)

_Objective = Literal["throughput", "latency", "block"]


def main() -> NoReturn:
    """The entry point `flexgen-hf`: an error of ours is one line on stderr and exit code 1."""
    try:
        app()
    except FlexGenError as error:
        typer.echo(f"error: {error}", err=True)
        raise SystemExit(1) from None
    raise SystemExit(0)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"flexgen-hf {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    _version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Generates text with models that do not fit on the accelerator, or not in RAM."""


@app.command()
def generate(  # noqa: PLR0913, PLR0917  a command's options are its parameters
    model: Annotated[str, typer.Argument(help="Hub id, model folder, or converted store.", metavar="MODEL")],
    prompt: Annotated[list[str] | None, typer.Option("--prompt", help="A prompt; may be given many times.")] = None,
    prompts_file: Annotated[
        Path | None, typer.Option(help="File with one prompt a line; `-` reads standard input.", allow_dash=True)
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to write after each prompt.")] = 32,
    do_sample: DoSample = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    num_beams: NumBeams = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the sampling.")] = None,
    policy: PolicyText = None,
    percent: Percents = None,
    batch_size: BatchSize = None,
    num_batches: NumBatches = None,
    overlap: Annotated[
        bool | None,
        typer.Option("--overlap/--no-overlap", help="Move data while computing.", show_default="overlap"),
    ] = None,
    compression: CompressionText = None,
    hardware: Annotated[
        str | None,
        typer.Option(help="With `--policy auto`: a file of `profile`, or a preset.", show_default="this machine"),
    ] = None,
    objective: Annotated[
        _Objective | None,
        typer.Option(
            help="With `--policy auto`: the most tokens per second, the shortest time, or the largest block in time.",
            show_default="throughput",
        ),
    ] = None,
    deadline: Annotated[
        float | None, typer.Option(min=0, help="With `--objective block`: seconds that a block may take.")
    ] = None,
    max_memory: MaxMemory = None,
    offload_folder: OffloadFolder = None,
    dtype: DtypeName = None,
    revision: Revision = None,
    progress: Progress = None,
    report: Annotated[bool, typer.Option("--report", help="Show the policy and what moved, on stderr.")] = False,
    trace: Annotated[
        Path | None, typer.Option(help="Write what each lane did when, for ui.perfetto.dev.", dir_okay=False)
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Write JSON lines with `prompt` and `text` here.", dir_okay=False)
    ] = None,
) -> None:
    """Writes on after each prompt, the prompts run as blocks."""
    prompts = read_prompts(prompt or [], prompts_file)
    if do_sample is None and (temperature, top_p, top_k) != (None, None, None):
        do_sample = True
    sampling = given(do_sample=do_sample, temperature=temperature, top_p=top_p, top_k=top_k, num_beams=num_beams)
    loading = loading_options(
        policy=policy,
        percent=percent,
        batch_size=batch_size,
        num_batches=num_batches,
        overlap=overlap,
        compression=compression,
        max_memory=max_memory,
        offload_folder=offload_folder,
        dtype=dtype,
        revision=revision,
        hardware=hardware,
        objective=objective,
        deadline_s=deadline,
    )
    tokenizer = load_tokenizer(model, revision=revision)
    if loading.get("policy") == AUTO:
        longest = max(map(len, tokenizer(prompts)["input_ids"]))
        loading["workload"] = {"batch": len(prompts), "prompt_len": longest, "max_new_tokens": max_new_tokens}
    with load_model(model, loading) as loaded:
        loaded.show_progress = shows(progress)
        texts = _complete(loaded, tokenizer, prompts, seed, max_new_tokens=max_new_tokens, **sampling)
        if report:
            typer.echo(str(loaded.last_run), err=True)
        if trace is not None:
            loaded.last_run.trace(trace)
    _write(prompts, texts, output)


@app.command()
def quality(  # noqa: PLR0913, PLR0917  a command's options are its parameters
    model: Annotated[str, typer.Argument(help="Hub id or model folder, not quantized.", metavar="MODEL")],
    text: Annotated[Path, typer.Option(help="File of the text; one that the model was not trained on.")],
    compression: Annotated[
        str | None,
        typer.Option(
            help='What to quantize: `4bit`, or JSON such as `{"weights": 4, "cache": 4, "group_size": 32}`.',
            show_default='4bit; with --store, {"cache": 4}',
        ),
    ] = None,
    store: Annotated[
        Path | None,
        typer.Option(help="Take quantized weights from this store, made from MODEL by `convert`.", file_okay=False),
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=2, help="Tokens of the text.")] = 4096,
    window: Annotated[int, typer.Option(min=2, help="Tokens that are seen together.")] = 512,
    chunk: Annotated[
        int, typer.Option(min=1, help="Tokens fed at a time; earlier ones are seen as the cache keeps them.")
    ] = 16,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts, taken from the text.")] = 8,
    prompt_len: Annotated[int, typer.Option(min=1, help="Tokens of each.")] = 64,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to write after each.")] = 32,
    policy: PolicyText = None,
    batch_size: BatchSize = None,
    num_batches: NumBatches = None,
    max_memory: MaxMemory = None,
    offload_folder: OffloadFolder = None,
    dtype: DtypeName = None,
    revision: Revision = None,
    output: Annotated[
        Path | None, typer.Option("--json", help="Write everything that was measured here.", dir_okay=False)
    ] = None,
) -> None:
    """What fewer bits cost: perplexity, error of each layer, agreement of what is written, with and without them."""
    from . import quality as measure

    settings = measure.Settings(max_tokens, window, chunk, prompts, prompt_len, new_tokens)
    what = compression or ("4bit" if store is None else '{"cache": 4}')
    variants = measure.variants_of(model, Compression.of(what), None if store is None else str(store))
    loading = loading_options(
        policy=policy,
        batch_size=batch_size,
        num_batches=num_batches,
        max_memory=max_memory,
        offload_folder=offload_folder,
        workload={"prompt_len": window, "max_new_tokens": 1},
        dtype=dtype,
    )
    words = read_text("--text", text)
    for source in {variant.source for variant in variants}:
        refuse_missing_folder(source)
    tokenizer = load_tokenizer(model, revision=revision)
    tokens = tokenizer(words, verbose=False)["input_ids"]
    if words.strip() and not tokens:  # transformers makes an empty tokenizer where there are no files for one
        raise StoreError(f"{model!r} has no tokenizer; save the one that the model was trained with into its folder")
    sample = measure.cut(tokens, settings)

    def load(variant: measure.Variant) -> Any:
        own = {"revision": revision} if revision is not None and variant.source == model else {}
        return load_model(variant.source, {**loading, **own, "compression": variant.compression})

    result = measure.compare(load, variants, sample, settings, lambda line: typer.echo(line, err=True))
    typer.echo(str(result))
    if output is not None:
        write_text(
            "--json", output, json.dumps({"model": model, "text": str(text), **result.to_dict()}, indent=1) + "\n"
        )


@app.command()
def demo(
    model: Annotated[
        str, typer.Option(help="`auto` (the best within reach), `opt-125m`, `smollm2` or `tiny-opt`.")
    ] = "auto",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to write after each prompt.")] = 32,
) -> None:
    """Runs the whole path on a real trained model: convert, verify, load over three tiers, generate, report."""
    from . import demo as path

    hide_loading_bar()
    path.run(
        model,
        typer.echo,
        convert=convert_command,
        verify=verify_command,
        max_new_tokens=max_new_tokens,
    )


def read_prompts(given: list[str], file: Path | None) -> list[str]:
    """The prompts of the command line and then those of the file, one a line; empty lines are left out.

    Raises:
        FlexGenError: the file cannot be read, or there is no prompt at all.
    """
    lines: list[str] = []
    if file is not None:
        try:
            lines = (sys.stdin.read() if str(file) == "-" else file.read_text("utf-8")).splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise FlexGenError(f"--prompts-file: cannot read {str(file)!r} ({error})") from error
    prompts = given + [line for line in lines if line.strip()]
    if not prompts:
        raise FlexGenError("no prompt; give --prompt TEXT, or --prompts-file FILE with one a line")
    return prompts


def _complete(model: Any, tokenizer: Any, prompts: list[str], seed: int | None, **generation: Any) -> list[str]:
    from .text import complete

    if seed is not None:
        from transformers import set_seed

        set_seed(seed)
    return complete(model, tokenizer, prompts, **generation)


def _write(prompts: list[str], texts: list[str], output: Path | None) -> None:
    if output is None:
        for prompt, text in zip(prompts, texts, strict=True):
            typer.echo(f"> {prompt}\n{text}\n")
        return
    lines = (json.dumps({"prompt": p, "text": t}, ensure_ascii=False) for p, t in zip(prompts, texts, strict=True))
    write_text("--output", output, "".join(f"{line}\n" for line in lines))
