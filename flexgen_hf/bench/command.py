"""The command `bench`: options in, runs, a table and a file of JSON lines out."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ..errors import FlexGenError, PolicyError, StoreError
from ..policy import Policy

if TYPE_CHECKING:
    from .systems import DeviceSpec
    from .trial import Record

__all__ = ["bench_command", "parse_size"]

_Dtype = Literal["float16", "bfloat16", "float32"]
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_UNITS |= {"ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30, "ti": 1 << 40}


def bench_command(  # noqa: PLR0913, PLR0917  a command's options are its parameters
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL_OR_SHAPE",
            help="A model folder, or a shape, which gets random weights: tiny, opt-125m, opt-350m, opt-1.3b, "
            "opt-2.7b, opt-6.7b, opt-13b, opt-30b, opt-66b, opt-175b.",
        ),
    ],
    systems: Annotated[str, typer.Option(help="Which to compare.")] = "flexgen,accelerate,transformers",
    prompt_len: Annotated[int, typer.Option(min=1, help="Tokens of the longest prompt.")] = 128,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to write after each prompt.")] = 16,
    policy: Annotated[
        str | None, typer.Option(help="flexgen's: six percentages or a JSON file.", show_default="fastest tiers first")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", "--gpu-batch-size", help="flexgen's: sequences of a micro-batch.")
    ] = None,
    num_batches: Annotated[
        int | None, typer.Option("--num-batches", "--num-gpu-batches", help="flexgen's: micro-batches of a block.")
    ] = None,
    overlap: Annotated[
        bool | None, typer.Option("--overlap/--no-overlap", help="flexgen's: move data while computing.")
    ] = None,
    dtype: Annotated[_Dtype, typer.Option(help="flexgen's element type of compute.")] = "float32",
    peer_batch_sizes: Annotated[
        str | None, typer.Option(help="Batch sizes that peers may choose from.", show_default="flexgen's block")
    ] = None,
    peer_dtypes: Annotated[
        str | None, typer.Option(help="Element types that peers may choose from.", show_default="flexgen's")
    ] = None,
    peer_offloads: Annotated[
        str, typer.Option(help="Where Accelerate may keep the layers: `disk`, `cpu` or both.")
    ] = "disk",
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each system in its best setting.")] = 3,
    seed: Annotated[int, typer.Option(help="Of the prompts.")] = 0,
    memory_limit: Annotated[
        str | None, typer.Option(help="For each run, page cache included: `3000MB`. Needs root.")
    ] = None,
    read_limit: Annotated[str | None, typer.Option(help="Of the disk: `100MB/s`. Needs root.")] = None,
    write_limit: Annotated[str | None, typer.Option(help="Of the disk: `100MB/s`. Needs root.")] = None,
    time_limit: Annotated[float | None, typer.Option(help="Seconds after which a run is given up.")] = None,
    device: Annotated[str, typer.Option(help="Where to compute: `cpu`, `cuda:0`, ..., or `emulated`.")] = "cpu",
    device_memory: Annotated[str | None, typer.Option(help="Of the emulated device: `700MiB`.")] = None,
    link: Annotated[str | None, typer.Option(help="Of the emulated device, each way: `100MB/s`.")] = None,
    weights_dtype: Annotated[_Dtype, typer.Option(help="Element type of a shape's weights on disk.")] = "float16",
    work_folder: Annotated[
        Path | None,
        typer.Option(help="For weights and files.", file_okay=False, show_default="in HF's cache"),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Append a JSON line for each run here.", dir_okay=False)] = None,
) -> None:
    """Compares throughput with Accelerate's offloading and plain transformers, each run in a process of its own."""
    from .comparison import Peers, compare, jobs_of, table
    from .limits import Limits
    from .systems import SYSTEMS, Job
    from .trial import Bench
    from .workload import Workload

    names = _words(systems, "--systems", SYSTEMS)
    shares = _policy(policy, batch_size=batch_size, num_batches=num_batches, overlap=overlap)
    block = (shares or Policy()).block_size
    peers = Peers(
        tuple(_whole_numbers(peer_batch_sizes, "--peer-batch-sizes") if peer_batch_sizes else [block]),
        tuple(_words(peer_dtypes or dtype, "--peer-dtypes", ("float16", "bfloat16", "float32"))),
        tuple(_words(peer_offloads, "--peer-offloads", ("disk", "cpu"))),
    )
    limits = Limits(
        parse_size(memory_limit, "--memory-limit"),
        parse_size(read_limit, "--read-limit"),
        parse_size(write_limit, "--write-limit"),
    )
    where = _device(device, device_memory, link)
    folder = _work_folder(work_folder)
    job = Job(
        system="flexgen",
        model=str(_model_folder(model, folder, weights_dtype)),
        workload=Workload(prompt_len, new_tokens, block, seed),
        dtype=dtype,
        offload_folder=str(folder),
        device=where,
        flexgen={} if shares is None else {"policy": shares.to_dict()},
    )
    bench = Bench(folder, limits, time_limit, {"command": shlex.join(["flexgen-hf", *sys.argv[1:]])})
    jobs = {name: jobs_of(name, job, peers) for name in names}
    records = compare(jobs, repeats, bench.run, lambda record: _tell(record, out))
    typer.echo(table(records))
    if not any(record["status"] == "ok" for record in records):
        raise FlexGenError("no run came to an end; the lines above say why")


def parse_size(text: str | None, option: str) -> int | None:
    """Bytes, or bytes per second: `"3000MB"` is 3e9 of them, `"700MiB"` 700 x 2^20, `"100MB/s"` 1e8 a second.

    Raises:
        PolicyError: something else.
    """
    if text is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]i?)?(b(?:/s)?)?", text.strip().lower())
    size = int(float(found[1]) * _UNITS[found[2] or ""]) if found else 0
    if size <= 0:
        raise PolicyError(f"{option}: {text!r} is no size; write for example '3000MB' or '100MB/s'")
    return size


def _words(text: str, option: str, known: Any) -> list[str]:
    words = [word.strip() for word in text.split(",") if word.strip()]
    for word in words:
        if word not in known:
            raise PolicyError(f"{option}: {word!r} is unknown; use some of {', '.join(known)}")
    if not words:
        raise PolicyError(f"{option}: nothing is named; use some of {', '.join(known)}")
    return list(dict.fromkeys(words))


def _whole_numbers(text: str, option: str) -> list[int]:
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and int(word) for word in words):
        raise PolicyError(f"{option}: {text!r} is no list of whole numbers; write for example '8,24'")
    return [int(word) for word in words]


def _policy(text: str | None, **fields: Any) -> Policy | None:
    """None if nothing about it was said: then flexgen fills the fastest tiers first."""
    fields = {name: value for name, value in fields.items() if value is not None}
    if text is not None:
        return Policy.of(text, **fields)
    return Policy.from_dict(fields) if fields else None


def _device(name: str, memory: str | None, link: str | None) -> DeviceSpec:
    from .systems import DeviceSpec

    if name in ("emulated", "emulated:0"):
        return DeviceSpec("emulated:0", parse_size(memory, "--device-memory"), parse_size(link, "--link"))
    for option, value in (("--device-memory", memory), ("--link", link)):
        if value is not None:
            raise PolicyError(f"{option} is the emulated device's; add --device emulated, or leave it out")
    return DeviceSpec(name)


def _work_folder(given: Path | None) -> Path:
    if given is None:
        from huggingface_hub import cached_assets_path

        given = Path(cached_assets_path("flexgen_hf", namespace="bench", subfolder="default"))
    given.mkdir(parents=True, exist_ok=True)
    return given.resolve()


def _model_folder(model: str, work_folder: Path, weights_dtype: str) -> Path:
    from .shapes import SHAPES, random_checkpoint

    if model in SHAPES:
        import torch

        return random_checkpoint(work_folder, model, getattr(torch, weights_dtype))
    folder = Path(model).expanduser()
    if not (folder / "config.json").is_file():
        raise StoreError(
            f"no model in {model!r}; give a folder ('hf download' makes one), or one of {', '.join(SHAPES)}"
        )
    return folder.resolve()


def _tell(record: Record, out: Path | None) -> None:
    speed = f"{record['tokens_per_s']:.3f} token/s" if record["status"] == "ok" else record["error"]
    typer.echo(f"{record['system']} ({record['setting']}), run {record['repeat']}: {speed}", err=True)
    if out is None:
        return
    try:
        with out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
    except OSError as error:
        raise FlexGenError(f"--out: cannot write {str(out)!r} ({error.strerror})") from error
