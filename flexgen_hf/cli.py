"""The command line: reads options, calls the library, prints. Every decision is the library's.

Percent, sizes as text and the original's spellings of options exist here only.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import typer

from conversion.commands import convert_command, verify_command

from . import __version__
from .batch_command import batch_command
from .bench.command import bench_command
from .errors import FlexGenError, PolicyError, StoreError, UnsupportedModelError
from .models_command import models_command
from .plan_command import plan_command
from .policy import AUTO, Compression, Policy
from .profile_command import profile_command

__all__ = ["app", "load_for_batch", "main", "parse_max_memory", "parse_policy", "read_prompts"]

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
app.command("bench")(bench_command)
app.command("plan")(plan_command)
app.command("profile")(profile_command)
app.command("models")(models_command)

_Dtype = Literal["float16", "bfloat16", "float32"]
_Objective = Literal["throughput", "latency", "block"]
_Percents = tuple[float, float, float, float, float, float]


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
    do_sample: Annotated[
        bool | None,
        typer.Option("--do-sample/--greedy", help="Sample, or take the likeliest token.", show_default="the model's"),
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="Sampling temperature.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Sample from this much of the probability.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Sample from this many tokens.")] = None,
    num_beams: Annotated[int | None, typer.Option(min=1, help="Beams of a beam search.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the sampling.")] = None,
    policy: Annotated[
        str | None,
        typer.Option(
            help="Where weights, cache and hidden states live: six percentages (each on device and host, "
            "the rest on disk), for example `20 80 0 100 0 100`, a policy's JSON file, or `auto`, which finds the best."
        ),
    ] = None,
    percent: Annotated[
        _Percents | None,
        typer.Option(help="The six percentages as six arguments.", metavar="W W C C H H"),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option("--batch-size", "--gpu-batch-size", help="Sequences of a micro-batch."),
    ] = None,
    num_batches: Annotated[
        int | None,
        typer.Option("--num-batches", "--num-gpu-batches", help="Micro-batches that share each loaded layer."),
    ] = None,
    overlap: Annotated[
        bool | None,
        typer.Option("--overlap/--no-overlap", help="Move data while computing.", show_default="overlap"),
    ] = None,
    compression: Annotated[
        str | None,
        typer.Option(
            help='Quantize, for example `{"weights": 4}`; a checkpoint is converted once for it. With `--policy auto`, '
            "`any` leaves it to the search."
        ),
    ] = None,
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
    loading = _given(
        policy=parse_policy(policy, percent, batch_size=batch_size, num_batches=num_batches, overlap=overlap),
        compression=compression,
        max_memory=parse_max_memory(max_memory) if max_memory else None,
        offload_folder=str(offload_folder) if offload_folder else None,
        dtype=dtype,
        revision=revision,
        hardware=hardware,
        objective=objective,
        deadline_s=deadline,
    )
    if do_sample is None and (temperature, top_p, top_k) != (None, None, None):
        do_sample = True
    sampling = _given(do_sample=do_sample, temperature=temperature, top_p=top_p, top_k=top_k, num_beams=num_beams)
    _refuse_missing_folder(model)
    tokenizer = _load_tokenizer(model, **_given(revision=revision))
    if loading.get("policy") == AUTO:
        loading.update(_given(batch_size=batch_size, num_batches=num_batches))
        longest = max(map(len, tokenizer(prompts)["input_ids"]))
        loading["workload"] = {"batch": len(prompts), "prompt_len": longest, "max_new_tokens": max_new_tokens}
    with _load(model, loading) as loaded:
        loaded.show_progress = sys.stderr.isatty() if progress is None else progress
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
    policy: Annotated[
        str | None, typer.Option(help="Six percentages, a JSON file or `auto`, as for `generate`.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", "--gpu-batch-size", help="Sequences of a micro-batch.")
    ] = None,
    num_batches: Annotated[
        int | None, typer.Option("--num-batches", "--num-gpu-batches", help="Micro-batches of a block.")
    ] = None,
    max_memory: Annotated[
        str | None, typer.Option(help="Limit of each tier, for example `0=14GiB,cpu=180GiB`.")
    ] = None,
    offload_folder: Annotated[
        Path | None, typer.Option(help="Folder of the disk tier, and of what is quantized for this.", file_okay=False)
    ] = None,
    dtype: Annotated[
        _Dtype | None,
        typer.Option(help="Element type of compute.", show_default="float32 on a CPU, else the checkpoint's"),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")] = None,
    output: Annotated[
        Path | None, typer.Option("--json", help="Write everything that was measured here.", dir_okay=False)
    ] = None,
) -> None:
    """What fewer bits cost: perplexity, error of each layer, agreement of what is written, with and without them."""
    from . import quality as measure

    settings = measure.Settings(max_tokens, window, chunk, prompts, prompt_len, new_tokens)
    what = compression or ("4bit" if store is None else '{"cache": 4}')
    variants = measure.variants_of(model, Compression.of(what), None if store is None else str(store))
    loading = _given(
        policy=parse_policy(policy, batch_size=batch_size, num_batches=num_batches),
        max_memory=parse_max_memory(max_memory) if max_memory else None,
        offload_folder=str(offload_folder) if offload_folder else None,
        dtype=dtype,
    )
    if loading.get("policy") == AUTO:
        loading.update(_given(batch_size=batch_size, num_batches=num_batches))
        loading["workload"] = {"prompt_len": window, "max_new_tokens": 1}
    words = _read_text(text)
    for source in {variant.source for variant in variants}:
        _refuse_missing_folder(source)
    tokenizer = _load_tokenizer(model, **_given(revision=revision))
    tokens = tokenizer(words, verbose=False)["input_ids"]
    if words.strip() and not tokens:  # transformers makes an empty tokenizer where there are no files for one
        raise StoreError(f"{model!r} has no tokenizer; save the one that the model was trained with into its folder")
    sample = measure.cut(tokens, settings)

    def load(variant: measure.Variant) -> Any:
        own = {"revision": revision} if revision is not None and variant.source == model else {}
        return _load(variant.source, {**loading, **own, "compression": variant.compression})

    result = measure.compare(load, variants, sample, settings, lambda line: typer.echo(line, err=True))
    typer.echo(str(result))
    if output is not None:
        _write_text(
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

    _hide_loading_bar()
    path.run(
        model,
        typer.echo,
        convert=convert_command,
        verify=verify_command,
        max_new_tokens=max_new_tokens,
    )


def parse_policy(text: str | None, percents: _Percents | None = None, **fields: Any) -> Policy | str | None:
    """The policy that the options describe, `"auto"`, or `None` if they say nothing.

    Args:
        text: six percentages, a JSON file's path, JSON text, or `auto`.
        percents: six percentages, as an alternative to `text`.
        fields: other fields of `Policy`; `None` is not given.

    Raises:
        PolicyError: both spellings, or something that cannot be meant.
    """
    if text is not None and percents is not None:
        raise PolicyError("--policy and --percent say the same thing; give one of them")
    fields = _given(**fields)
    if text == AUTO:
        if "overlap" in fields:
            raise PolicyError("--overlap: --policy auto finds it; leave it out")
        return AUTO
    if percents is not None:
        return Policy.parse(percents, **fields)
    if text is not None:
        return Policy.of(text, **fields)
    return Policy.from_dict(fields) if fields else None


def parse_max_memory(text: str) -> dict[int | str, str]:
    """Accelerate's `max_memory` from `"0=14GiB,cpu=180GiB,disk=1TiB"`; a number is an accelerator.

    Raises:
        PolicyError: a part that is not `NAME=SIZE`.
    """
    limits: dict[int | str, str] = {}
    for part in text.split(","):
        name, equals, size = (word.strip() for word in part.partition("="))
        if not (name and equals and size):
            raise PolicyError(f"--max-memory: {part!r} is not NAME=SIZE; write for example '0=14GiB,cpu=180GiB'")
        limits[int(name) if name.isdecimal() else name] = size
    return limits


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


def _given(**options: Any) -> dict[str, Any]:
    """The options that were given: an absent one keeps the library's own default."""
    return {name: value for name, value in options.items() if value is not None}


def _refuse_missing_folder(model: str) -> None:
    # transformers would take such a path for a Hub id and say so at length
    path = Path(model).expanduser()
    if (path.is_absolute() or model.startswith((".", "~")) or len(path.parts) > 2) and not (
        path.is_dir() or (path.suffix == ".gguf" and path.is_file())
    ):
        raise StoreError(f"no folder {model!r}; give a Hub id, a model folder, or a store made by 'flexgen-hf convert'")


def _load_tokenizer(model: str, **hub_options: Any) -> Any:
    from transformers import AutoConfig

    from .gguf_files import refuse_missing_reader
    from .text import load_tokenizer, named_file

    with _loading_errors(model):
        folder, options = named_file(_expanded(model))
        if options:
            refuse_missing_reader()
        # first, because its errors say what is wrong; the tokenizer's would not know the model's type either
        AutoConfig.from_pretrained(folder, **options, **hub_options)
        return load_tokenizer(_expanded(model), **hub_options)


def _load(model: str, options: dict[str, Any]) -> Any:
    from . import FlexGenForCausalLM
    from .text import dtype_of_compute

    _hide_loading_bar()
    with _loading_errors(model):
        return FlexGenForCausalLM.from_pretrained(_expanded(model), **{"dtype": dtype_of_compute(), **options})


def load_for_batch(model: str, **options: Any) -> tuple[Any, Any]:
    """Model and tokenizer for the command `batch`; `options` are its own, as text."""
    memory, folder = options.pop("max_memory"), options.pop("offload_folder")
    shape = {name: options.pop(name) for name in ("batch_size", "num_batches")}
    options |= {
        "policy": parse_policy(options["policy"], **shape),
        "max_memory": parse_max_memory(memory) if memory else None,
        "offload_folder": str(folder) if folder else None,
    }
    _refuse_missing_folder(model)
    tokenizer = _load_tokenizer(model, **_given(revision=options["revision"]))
    return _load(model, _given(**options)), tokenizer


@contextlib.contextmanager
def _loading_errors(model: str) -> Iterator[None]:
    """What transformers raises for a wrong name or type becomes one line."""
    try:
        yield
    except FlexGenError:
        raise
    except OSError as error:
        raise StoreError(f"cannot load {model!r}: {_one_line(error)}") from error
    except (ValueError, KeyError, ImportError) as error:
        raise UnsupportedModelError(f"cannot load {model!r}: {_one_line(error)}") from error


def _expanded(model: str) -> str:
    return str(Path(model).expanduser()) if model.startswith("~") else model


def _hide_loading_bar() -> None:
    # transformers would show the progress of a loading that is not its own, and so an empty bar
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # type: ignore[no-untyped-call]


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
    _write_text("--output", output, "".join(f"{line}\n" for line in lines))


def _read_text(file: Path) -> str:
    try:
        return file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise FlexGenError(
            f"--text: cannot read {str(file)!r} ({error}); give a file of plain text in UTF-8"
        ) from error


def _write_text(option: str, file: Path, text: str) -> None:
    try:
        file.write_text(text, "utf-8")
    except OSError as error:
        raise FlexGenError(f"{option}: cannot write {str(file)!r} ({error.strerror})") from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
