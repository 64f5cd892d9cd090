"""The commands `convert` and `verify`: options in, one call of the library, a line of result or of error out."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer
from tqdm import tqdm

from flexgen_hf.errors import FlexGenError, PolicyError
from flexgen_hf.policy import Placement
from flexgen_hf.storage.ledger import gib

__all__ = ["app", "convert_command", "main", "verify_command"]

app = typer.Typer(
    name="conversion",
    help="Turns checkpoints into stores, and verifies them.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

_SourceArgument = Annotated[
    str,
    typer.Argument(
        metavar="SOURCE", help="Hub id, Hugging Face folder, GGUF file, original NAME-np folder, metaseq folder."
    ),
]
_StoreArgument = Annotated[Path, typer.Argument(metavar="STORE", help="The store's folder.")]
_Dtype = Annotated[
    str | None, typer.Option(help="float16, bfloat16 or float32.", show_default="the checkpoint's", metavar="TYPE")
]
_Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")]
_Token = Annotated[str | None, typer.Option(help="Hub token.", envvar="HF_TOKEN", show_default=False)]
_Local = Annotated[bool, typer.Option("--local-files-only", help="Take Hub models from the cache only.")]
_Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run model code that the checkpoint brings along.")]
_Config = Annotated[
    Path | None, typer.Option(help="Folder with config.json, for numpy and metaseq folders.", metavar="FOLDER")
]
_Gguf = Annotated[str | None, typer.Option(help="Name of the GGUF file to take from SOURCE.", metavar="NAME")]


@app.command("convert")
def convert_command(  # noqa: PLR0913, PLR0917 (a command's options are its parameters)
    source: _SourceArgument,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The store's folder; an interrupted run goes on there.")],
    dtype: _Dtype = None,
    weights: Annotated[
        str | None,
        typer.Option(
            help="Two percentages, weights on device and host, the rest on disk: gives each shard its tier.",
            metavar='"DEVICE HOST"',
        ),
    ] = None,
    compression: Annotated[
        str | None,
        typer.Option(
            help='Quantize matrices of layers: `4bit` (or 2, 3, 8), or JSON: `{"weights": 4, "group_size": 64}`.',
            metavar="WHAT",
        ),
    ] = None,
    method: Annotated[
        Literal["search", "minmax"], typer.Option(help="How to quantize: with a smaller error, or faster.")
    ] = "search",
    revision: _Revision = None,
    token: _Token = None,
    local_files_only: _Local = False,
    trust_remote_code: _Trust = False,
    config: _Config = None,
    gguf_file: _Gguf = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a store of another checkpoint in OUT.")] = False,
) -> None:
    """Converts a checkpoint into a store; run again after an interruption, it goes on."""
    from .convert import convert

    placement = parse_weights(weights) if weights is not None else None
    with _Bar("converting") as bar:
        manifest = convert(
            source,
            out,
            dtype=dtype,
            revision=revision,
            token=token,
            local_files_only=local_files_only,
            trust_remote_code=trust_remote_code,
            config=config,
            gguf_file=gguf_file,
            weights_placement=placement,
            compression=compression,
            method=method,
            force=force,
            progress=bar.update,
        )
    size = sum(shard.bytes for shard in manifest.shards)
    quantized = f", {len(manifest.quantization['tensors'])} tensors quantized" if manifest.quantization else ""
    typer.echo(f"{out}: {manifest.dtype}{quantized}, {len(manifest.shards)} shards, {gib(size)}")


@app.command("verify")
def verify_command(  # noqa: PLR0913, PLR0917 (a command's options are its parameters)
    store: _StoreArgument,
    source: _SourceArgument,
    revision: _Revision = None,
    token: _Token = None,
    local_files_only: _Local = False,
    trust_remote_code: _Trust = False,
    config: _Config = None,
    gguf_file: _Gguf = None,
) -> None:
    """Compares a store with its source, hash by hash and element by element; names the first difference."""
    from .sources import SourceOptions
    from .verify import verify

    options = SourceOptions(
        revision=revision,
        token=token,
        local_files_only=local_files_only,
        trust_remote_code=trust_remote_code,
        config=config,
        gguf_file=gguf_file,
    )
    with _Bar("verifying") as bar:
        report = verify(store, source, options=options, progress=bar.update)
    quantized = f" ({report.quantized} of them quantized)" if report.quantized else ""
    what = f"{report.shards} shards, {report.tensors} tensors{quantized}, {gib(report.bytes)}"
    typer.echo(f"{store} equals {source}: {what}")


def parse_weights(text: str) -> Placement:
    """Shares from two percentages, as the original's command line gives them.

    Raises:
        PolicyError: not two numbers, or more than 100 in all.
    """
    try:
        device, host = (float(word) / 100 for word in text.split())
    except ValueError:
        raise PolicyError(f"--weights {text!r} is not two percentages; write for example --weights '20 80'") from None
    return Placement(device=device, host=host)


def main() -> None:
    """Entry point of `python -m conversion`; `convert` is understood where no command is named."""
    arguments = sys.argv[1:]
    if arguments and arguments[0] not in ("convert", "verify", "--help"):
        arguments.insert(0, "convert")
    try:
        app(arguments, prog_name="python -m conversion")
    except FlexGenError as error:
        typer.echo(f"error: {error}", err=True)
        raise SystemExit(1) from None


class _Bar:
    """A progress bar on stderr that appears with the first byte and is hidden where stderr is no terminal."""

    def __init__(self, what: str) -> None:
        self._bar = tqdm(desc=what, unit="B", unit_scale=True, unit_divisor=1024, disable=None, delay=0.5)

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def update(self, done: int, total: int) -> None:
        """Shows that `done` of `total` bytes are through."""
        self._bar.total = total
        self._bar.update(done - self._bar.n)
