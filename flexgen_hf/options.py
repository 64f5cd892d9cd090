"""What several commands share: options of one name and meaning, and how these load a model.

Each alias is the whole declaration of an option but its default and, where it does not follow from the parameter, its
name. What options mean to the library is said by `loading_options`; transformers' errors become one line.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from .errors import FlexGenError, PolicyError, StoreError, UnsupportedModelError
from .policy import AUTO, Policy

__all__ = [
    "BatchSize", "Chat", "CompressionText", "DoSample", "DtypeName", "LeastShared", "MaxMemory", "NumBatches",
    "NumBeams", "OffloadFolder", "Percents", "PolicyText", "Progress", "Revision", "Temperature", "TopK", "TopP",
    "expanded", "given", "hide_loading_bar", "load_model", "load_tokenizer", "loading_options", "parse_max_memory",
    "parse_policy", "read_text", "refuse_missing_folder", "shows", "write_text",
]  # fmt: skip

_SixPercents = tuple[float, float, float, float, float, float]

DoSample = Annotated[
    bool | None,
    typer.Option("--do-sample/--greedy", help="Sample, or take the likeliest token.", show_default="the model's"),
]
Temperature = Annotated[float | None, typer.Option(help="Sampling temperature.")]
TopP = Annotated[float | None, typer.Option(help="Sample from this much of the probability.")]
TopK = Annotated[int | None, typer.Option(help="Sample from this many tokens.")]
NumBeams = Annotated[int | None, typer.Option(min=1, help="Beams of a beam search.")]

PolicyText = Annotated[
    str | None,
    typer.Option(
        help="Where weights, cache and hidden states live: six percentages (each on device and host, "
        "the rest on disk), for example `20 80 0 100 0 100`, a policy's JSON file, or `auto`, which finds the best."
    ),
]
Percents = Annotated[
    _SixPercents | None, typer.Option(help="The six percentages as six arguments.", metavar="W W C C H H")
]
BatchSize = Annotated[int | None, typer.Option("--batch-size", "--gpu-batch-size", help="Sequences of a micro-batch.")]
NumBatches = Annotated[
    int | None,
    typer.Option("--num-batches", "--num-gpu-batches", help="Micro-batches that share each loaded layer."),
]
CompressionText = Annotated[
    str | None,
    typer.Option(
        help='Quantize, for example `{"weights": 4}`; a checkpoint is converted once for it. With `--policy auto`, '
        "`any` leaves it to the search."
    ),
]
MaxMemory = Annotated[str | None, typer.Option(help="Limit of each tier, for example `0=14GiB,cpu=180GiB,disk=1TiB`.")]
OffloadFolder = Annotated[Path | None, typer.Option(help="Folder of the disk tier.", file_okay=False)]
DtypeName = Annotated[
    Literal["float16", "bfloat16", "float32"] | None,
    typer.Option("--dtype", help="Element type of compute.", show_default="float32 on a CPU, else the checkpoint's"),
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")]
Progress = Annotated[
    bool | None,
    typer.Option("--progress/--no-progress", help="Show progress on stderr.", show_default="on a terminal"),
]

Chat = Annotated[bool, typer.Option("--chat", help="Each prompt is a user's message in the chat template.")]
LeastShared = Annotated[
    int, typer.Option(min=0, help="Tokens of a common beginning that is computed once; 0 shares none.")
]


def shows(progress: bool | None) -> bool:
    """What `Progress` says; where nothing was said, a bar is shown on a terminal."""
    return sys.stderr.isatty() if progress is None else progress


def given(**options: Any) -> dict[str, Any]:
    """The options that were given: an absent one keeps the library's own default."""
    return {name: value for name, value in options.items() if value is not None}


def loading_options(  # noqa: PLR0913  options of commands, each as it was typed
    *,
    policy: str | None = None,
    percent: _SixPercents | None = None,
    batch_size: int | None = None,
    num_batches: int | None = None,
    overlap: bool | None = None,
    max_memory: str | None = None,
    offload_folder: Path | None = None,
    workload: dict[str, int] | None = None,
    **others: Any,
) -> dict[str, Any]:
    """Arguments of `from_pretrained` that commands' options describe.

    Args:
        policy: see `parse_policy`.
        percent: the same as six numbers.
        batch_size: of the policy, or what `auto` is held to.
        num_batches: likewise.
        overlap: of the policy.
        max_memory: see `parse_max_memory`.
        offload_folder: of the disk tier.
        workload: what `auto` plans for; of no meaning to another policy.
        others: passed on, if given.

    Raises:
        PolicyError: a policy or a limit that cannot be meant.
    """
    found = parse_policy(policy, percent, batch_size=batch_size, num_batches=num_batches, overlap=overlap)
    held = given(batch_size=batch_size, num_batches=num_batches, workload=workload) if found == AUTO else {}
    return held | given(
        policy=found,
        max_memory=parse_max_memory(max_memory) if max_memory else None,
        offload_folder=str(offload_folder) if offload_folder else None,
        **others,
    )


def parse_policy(text: str | None, percents: _SixPercents | None = None, **fields: Any) -> Policy | str | None:
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
    fields = given(**fields)
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


def load_tokenizer(model: str, *, revision: str | None = None) -> Any:
    """The tokenizer of a Hub id, a model folder, a store or a GGUF file; what is wrong with it is said before weights
    are looked for.

    Raises:
        StoreError: there is none.
        UnsupportedModelError: of a type that the installed transformers does not know.
    """
    from transformers import AutoConfig

    from . import text
    from .gguf_files import refuse_missing_reader

    refuse_missing_folder(model)
    hub_options = given(revision=revision)
    with _loading_errors(model):
        folder, options = text.named_file(expanded(model))
        if options:
            refuse_missing_reader()
        # first, because its errors say what is wrong; the tokenizer's would not know the model's type either
        AutoConfig.from_pretrained(folder, **options, **hub_options)
        return text.load_tokenizer(expanded(model), **hub_options)


def load_model(model: str, options: dict[str, Any]) -> Any:
    """`FlexGenForCausalLM.from_pretrained` with a dtype in which this machine computes, and without a bar.

    Raises:
        StoreError: nothing there, or not readable.
        UnsupportedModelError: of a type that cannot be run.
    """
    from . import FlexGenForCausalLM
    from .text import dtype_of_compute

    refuse_missing_folder(model)
    hide_loading_bar()
    with _loading_errors(model):
        return FlexGenForCausalLM.from_pretrained(expanded(model), **{"dtype": dtype_of_compute(), **options})


def refuse_missing_folder(model: str) -> None:
    """Refuses what can only be a path and is not there: transformers would take it for a Hub id and say so at length.

    Raises:
        StoreError: no such folder or GGUF file.
    """
    path = Path(model).expanduser()
    if (path.is_absolute() or model.startswith((".", "~")) or len(path.parts) > 2) and not (
        path.is_dir() or (path.suffix == ".gguf" and path.is_file())
    ):
        raise StoreError(f"no folder {model!r}; give a Hub id, a model folder, or a store made by 'flexgen-hf convert'")


def expanded(model: str) -> str:
    """A model's name with the home folder in place of `~`."""
    return str(Path(model).expanduser()) if model.startswith("~") else model


def hide_loading_bar() -> None:
    """Hides the bar of transformers, which would show the progress of a loading that is not its own: nothing."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # type: ignore[no-untyped-call]


def read_text(option: str, file: Path, remedy: str = "give a file of plain text in UTF-8") -> str:
    """The text of a file that an option names.

    Raises:
        FlexGenError: it cannot be read.
    """
    try:
        return file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise FlexGenError(f"{option}: cannot read {str(file)!r} ({error}); {remedy}") from error


def write_text(option: str, file: Path, text: str) -> None:
    """Writes the file that an option names.

    Raises:
        FlexGenError: it cannot be written.
    """
    try:
        file.write_text(text, "utf-8")
    except OSError as error:
        raise FlexGenError(f"{option}: cannot write {str(file)!r} ({error.strerror})") from error


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


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
