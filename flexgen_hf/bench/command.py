"""The command `bench`: options in, runs, a table and a file of JSON lines out."""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ..errors import FlexGenError, PolicyError, StoreError
from ..planning.plan import Freedom
from ..planning.search import compressions_of
from ..policy import Compression, Policy
from .sizes import parse_max_memory, parse_size, parse_sum

if TYPE_CHECKING:
    from .systems import DeviceSpec
    from .trial import Record

__all__ = ["bench_command"]

_Dtype = Literal["float16", "bfloat16", "float32"]


def bench_command(  # noqa: PLR0913, PLR0917  a command's options are its parameters
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL_OR_SHAPE",
            show_default=False,
            help="A model folder, or a shape, which gets random weights: tiny, opt-125m, opt-350m, opt-1.3b, "
            "opt-2.7b, opt-6.7b, opt-13b, opt-30b, opt-66b, opt-175b; "
            "opt-30b-like and opt-175b-like have the proportions of the large ones at a small size, mixtral-0.8b has "
            "experts. "
            "`opt-1.3b:6` is that shape with 6 layers. With --validate-plan there may be several, as `tiny,tiny:2`.",
        ),
    ] = None,
    systems: Annotated[
        str,
        typer.Option(
            help="Which to compare: flexgen, flexgen-ram (with nothing to move), accelerate, transformers, "
            "transformers-static (with a static cache, not compiled)."
        ),
    ] = "flexgen,accelerate,transformers",
    prompt_len: Annotated[int, typer.Option(min=1, help="Tokens of the longest prompt.")] = 128,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to write after each prompt.")] = 16,
    policy: Annotated[
        str | None,
        typer.Option(
            help="flexgen's: six percentages, a JSON file, or `auto`, the best for --rows prompts under the limits.",
            show_default="fastest tiers first",
        ),
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
    layer_slots: Annotated[
        int | None, typer.Option(min=1, help="flexgen's: streamed layers that have room on the device.")
    ] = None,
    max_memory: Annotated[
        str | None, typer.Option(help="flexgen's: `cpu=2300MB,0=0.29w,disk=20GB`; 0 is the device.")
    ] = None,
    compression: Annotated[
        str | None,
        typer.Option(
            help='flexgen\'s: `4bit` for weights and cache, or JSON such as `{"weights": 4}` or `{"cache": 16}`. '
            "Weights are quantized once, into a store in the work folder, before anything is measured; "
            "peers load the checkpoint as it is, whose bytes shares such as `0.29w` go on meaning. "
            "`any` leaves it to --policy auto.",
            show_default="the policy's; with --validate-plan any",
        ),
    ] = None,
    host_attention: Annotated[
        bool | None,
        typer.Option(
            "--host-attention/--no-host-attention", help="flexgen's: attend on the host to what is kept there."
        ),
    ] = None,
    dtype: Annotated[_Dtype, typer.Option(help="flexgen's element type of compute.")] = "float32",
    peer_batch_sizes: Annotated[
        str | None, typer.Option(help="Batch sizes that peers may choose from.", show_default="flexgen's block")
    ] = None,
    peer_dtypes: Annotated[
        str | None, typer.Option(help="Element types that peers may choose from.", show_default="flexgen's")
    ] = None,
    peer_offloads: Annotated[
        str, typer.Option(help="Where Accelerate may keep the layers: `disk`, `cpu`, `mixed:0.6` (that share in RAM).")
    ] = "disk",
    peer_new_tokens: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="Try a peer's settings with so many new tokens only; the best one by projection then runs whole.",
            show_default="all",
        ),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Of torch's arithmetic, for every system.", show_default="torch's choice")
    ] = None,
    repeats: Annotated[
        int,
        typer.Option(min=1, help="Runs of each system in its best setting; --grid: of best and chosen."),
    ] = 3,
    seed: Annotated[int, typer.Option(help="Of the prompts, and of what --validate-plan draws.")] = 0,
    memory_limit: Annotated[
        str | None, typer.Option(help="For each run, page cache included: `3000MB`, or `3.7w+600MB`. Needs root.")
    ] = None,
    read_limit: Annotated[
        str | None,
        typer.Option(
            help="Of the disk: `100MB/s`. Needs root. With --validate-plan for writes too, and there may be "
            "several, of which each policy gets one: `none,100MB/s`.",
        ),
    ] = None,
    write_limit: Annotated[str | None, typer.Option(help="Of the disk: `100MB/s`. Needs root.")] = None,
    time_limit: Annotated[float | None, typer.Option(help="Seconds after which a run is given up.")] = None,
    device: Annotated[str, typer.Option(help="Where to compute: `cpu`, `cuda:0`, ..., or `emulated`.")] = "cpu",
    device_memory: Annotated[
        str | None, typer.Option(help="Of the emulated device: `700MiB`, or `0.29w` for 0.29 times the weights.")
    ] = None,
    link: Annotated[str | None, typer.Option(help="Of the emulated device, each way: `100MB/s`.")] = None,
    weights_dtype: Annotated[_Dtype, typer.Option(help="Element type of a shape's weights on disk.")] = "float16",
    work_folder: Annotated[
        Path | None,
        typer.Option(help="For weights and files.", file_okay=False, show_default="in HF's cache"),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Append a JSON line for each run here. With --validate-plan, runs that are there are not repeated.",
            dir_okay=False,
        ),
    ] = None,
    validate_plan: Annotated[
        bool,
        typer.Option(
            "--validate-plan",
            help="Instead of systems, compare `plan` with runs: of policies that are drawn at random.",
        ),
    ] = False,
    grid: Annotated[
        bool,
        typer.Option(
            "--grid",
            help="With --validate-plan: of a grid of policies for one workload, and of `plan`'s choice for it.",
        ),
    ] = False,
    policies: Annotated[
        int | None,
        typer.Option(min=1, help="With --validate-plan: how many at most.", show_default="24, of a grid 32"),
    ] = None,
    run_seconds: Annotated[
        str, typer.Option(help="With --validate-plan: what a run is to take at least and at most, as predicted.")
    ] = "4-30",
    rows: Annotated[
        int, typer.Option(min=1, help="With --grid, and with --policy auto: prompts of the workload.")
    ] = 16,
    hardware: Annotated[
        Path | None,
        typer.Option(
            help="With --validate-plan or --policy auto: what `flexgen-hf profile` wrote, with as many threads.",
            dir_okay=False,
            show_default="measured first",
        ),
    ] = None,
    profile_every: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="With --validate-plan: profile the machine again after so many runs. One that others use as well is "
            "faster and slower in turn.",
            show_default="once, at first",
        ),
    ] = None,
) -> None:
    """Compares throughput with Accelerate's offloading and plain transformers, each run in a process of its own."""
    if validate_plan:
        from .validation_command import Asked, validate

        _refuse_given("says nothing to --validate-plan, which makes its own policies", {
            "--policy": policy, "--batch-size": batch_size, "--num-batches": num_batches, "--overlap": overlap,
            "--layer-slots": layer_slots, "--max-memory": max_memory, "--host-attention": host_attention,
            "--write-limit": write_limit, "--device-memory": device_memory, "--link": link,
        })  # fmt: skip
        options = Asked(
            models=model, is_grid=grid, policies=policies, rows=rows, prompt_len=prompt_len, new_tokens=new_tokens,
            seed=seed, dtype=dtype, threads=threads, device=device, compression=compression, memory_limit=memory_limit,
            disk_limits=read_limit, time_limit=time_limit, run_seconds=run_seconds, hardware=hardware,
            profile_every=profile_every, repeats=repeats, out=out,
        )  # fmt: skip
        folder = _work_folder(work_folder)
        validate(options, folder, lambda name: _model_folder(name, folder, weights_dtype), lambda r: _tell(r, out))
        return
    is_auto = policy == "auto"
    of_validation = {
        "--grid": grid or None, "--policies": policies, "--hardware": None if is_auto else hardware,
        "--profile-every": profile_every,
    }  # fmt: skip
    _refuse_given("belongs to --validate-plan", of_validation)
    if model is None:
        raise PolicyError("MODEL_OR_SHAPE is missing; give a model folder, or a shape such as opt-1.3b")
    from .choice import chosen_for, machine_here, with_plan
    from .comparison import Peers, compare, jobs_of, table
    from .limits import Limits
    from .systems import SYSTEMS, Job
    from .trial import Bench
    from .workload import BenchWorkload

    names = _words(systems, "--systems", SYSTEMS)
    fields = _given(
        batch_size=batch_size,
        num_batches=num_batches,
        overlap=overlap,
        host_attention=host_attention,
        layer_slots=layer_slots,
    )
    shares = None if is_auto else _policy(policy, **fields)
    sizes = _whole_numbers(peer_batch_sizes, "--peer-batch-sizes") if peer_batch_sizes else None
    dtypes = tuple(_words(peer_dtypes or dtype, "--peer-dtypes", ("float16", "bfloat16", "float32")))
    offloads = tuple(_offloads(peer_offloads))
    compressions = compressions_of(compression or "none") if is_auto else (_compression(compression, shares),)
    # all that can be misspelt is read before a checkpoint is written, which takes long; shares are of its weights
    ram, rates = parse_sum(memory_limit, "--memory-limit"), _rates(read_limit, write_limit)
    capacity, tiers = parse_sum(device_memory, "--device-memory"), parse_max_memory(max_memory, "--max-memory")
    where = _device(device, device_memory, link)
    folder = _work_folder(work_folder)
    machine = machine_here(hardware, device, threads, folder, _say) if is_auto else None
    weights = _model_folder(model, folder, weights_dtype)
    if capacity is not None:
        where = dataclasses.replace(where, capacity_bytes=capacity.of(weights))
    limits = Limits(None if ram is None else ram.of(weights), *rates)
    block = (shares or Policy()).block_size
    job = Job(
        system="flexgen",
        model=str(weights),
        workload=BenchWorkload(prompt_len, new_tokens, rows if is_auto else block, seed),
        dtype=dtype,
        offload_folder=str(folder),
        device=where,
        flexgen=_given(
            policy=None if shares is None else shares.to_dict(),
            max_memory={tier: size.of(weights) for tier, size in tiers.items()} or None,
            compression=compressions[0].to_dict() if compressions[0] else None,
        ),
        threads=threads,
    )
    context: dict[str, Any] = {"command": shlex.join(["flexgen-hf", *sys.argv[1:]])}
    if machine is not None:
        plan = chosen_for(job, limits, machine, Freedom(compressions=compressions, **fields))
        _say(f"chosen: {plan}")
        job, context["plan"] = with_plan(job, plan, limits), plan.to_dict()
        block = min(rows, plan.policy.block_size)
    job = dataclasses.replace(job, store=_store(folder, weights, job.compression, names))
    bench = Bench(folder, limits, time_limit, context)
    peers = Peers(tuple(sizes or [block]), dtypes, offloads)
    jobs = {name: jobs_of(name, job, peers) for name in names}
    records = compare(jobs, repeats, bench.run, lambda record: _tell(record, out), peer_new_tokens)
    typer.echo(table(records))
    if not any(record["status"] == "ok" for record in records):
        raise FlexGenError("no run came to an end; the lines above say why")


def _refuse_given(why: str, options: Mapping[str, Any]) -> None:
    """Refuses the first of these options that something was said of."""
    for name, value in options.items():
        if value is not None:
            raise PolicyError(f"{name} {why}; leave it out")


def _say(line: str) -> None:
    typer.echo(line, err=True)


def _words(text: str, option: str, known: Any) -> list[str]:
    words = [word.strip() for word in text.split(",") if word.strip()]
    for word in words:
        if word not in known:
            raise PolicyError(f"{option}: {word!r} is unknown; use some of {', '.join(known)}")
    if not words:
        raise PolicyError(f"{option}: nothing is named; use some of {', '.join(known)}")
    return list(dict.fromkeys(words))


def _offloads(text: str) -> list[str]:
    from .systems import share_in_memory

    words = [word.strip() for word in text.split(",")]
    for word in words:
        try:
            share_in_memory(word)
        except PolicyError as error:
            raise PolicyError(f"--peer-offloads: {error}") from None
    return list(dict.fromkeys(words))


def _whole_numbers(text: str, option: str) -> list[int]:
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and int(word) for word in words):
        raise PolicyError(f"{option}: {text!r} is no list of whole numbers; write for example '8,24'")
    return [int(word) for word in words]


def _policy(text: str | None, **fields: Any) -> Policy | None:
    """None if nothing about it was said: then flexgen fills the fastest tiers first."""
    fields = _given(**fields)
    if text is not None:
        return Policy.of(text, **fields)
    return Policy.from_dict(fields) if fields else None


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _compression(text: str | None, policy: Policy | None) -> Compression:
    """What is asked for by itself, or else by the policy."""
    if text is None and policy is not None:
        return policy.compression
    return Compression.of(text)


def _store(work_folder: Path, model_folder: Path, compression: Compression, systems: list[str]) -> str | None:
    """The model's quantized weights, where they are asked for by a system that can use them."""
    from .quantized import quantized_store
    from .systems import is_ours

    if not (compression.of_weights and any(map(is_ours, systems))):
        return None
    typer.echo(f"quantizing what is not quantized yet of {model_folder.name}: {compression}", err=True)
    return str(quantized_store(work_folder, model_folder, compression))


def _rates(read_limit: str | None, write_limit: str | None) -> tuple[int | None, int | None]:
    return parse_size(read_limit, "--read-limit"), parse_size(write_limit, "--write-limit")


def _device(name: str, memory: str | None, link: str | None) -> DeviceSpec:
    """The device, without its capacity, which may be a share of weights that are not known yet."""
    from .systems import DeviceSpec

    if name in ("emulated", "emulated:0"):
        return DeviceSpec("emulated:0", link_bytes_per_s=parse_size(link, "--link"))
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
    from .shapes import SHAPES, is_shape, random_checkpoint

    if is_shape(model):
        import torch

        return random_checkpoint(work_folder, model, getattr(torch, weights_dtype))
    folder = Path(model).expanduser()
    if not (folder / "config.json").is_file():
        known = ", ".join(SHAPES)
        raise StoreError(f"no model in {model!r}; give a folder ('hf download' makes one), or one of {known}")
    return folder.resolve()


def _tell(record: Record, out: Path | None) -> None:
    run = f"run {record['repeat']}" if record["repeat"] else f"{record['workload']['new_tokens']} tokens to choose by"
    speed = f"{record['tokens_per_s']:.3f} token/s" if record["status"] == "ok" else record["error"]
    typer.echo(f"{record['system']} ({record['setting']}), {run}: {speed}", err=True)
    if out is None:
        return
    try:
        with out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
    except OSError as error:
        raise FlexGenError(f"--out: cannot write {str(out)!r} ({error.strerror})") from error
