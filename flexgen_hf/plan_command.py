"""The command `plan`: options in, one search without torch, a table or JSON out."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer

from . import plots
from .bench.shapes import SHAPES, is_shape, shape_fields
from .bench.sizes import parse_max_memory
from .errors import PolicyError, StoreError
from .planning.cost import Prediction
from .planning.hardware import Hardware
from .planning.original import PUBLISHED, Comparison, compare
from .planning.plan import OBJECTIVES, Freedom, Plan
from .planning.presets import hardware_of, preset
from .planning.search import Planner, compressions_of
from .planning.shape import ModelShape, read_config
from .planning.workload import Workload
from .policy import Policy, Tier

__all__ = ["plan_command", "shape_of_model"]

_Dtype = Literal["float16", "bfloat16", "float32"]
_Objective = Literal["throughput", "latency", "block"]
assert set(_Objective.__args__) == set(OBJECTIVES)  # type: ignore[attr-defined]


def plan_command(  # noqa: PLR0913, PLR0917  a command's options are its parameters
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="Hub id (only its configuration is fetched) or model folder.")
    ] = None,
    shape: Annotated[
        str | None, typer.Option(help="A known shape instead of a model, for example `opt-175b` or `opt-1.3b:6`.")
    ] = None,
    hardware: Annotated[
        str, typer.Option(help="A preset (t4, rtx3090, rtx4090, a10g, l4, a100, h100, m2max, cpu2) or a JSON file.")
    ] = "t4",
    prompt_len: Annotated[int, typer.Option(min=1, help="Tokens of each prompt.")] = 512,
    gen_len: Annotated[int, typer.Option(min=1, help="Tokens written after each.")] = 32,
    num_prompts: Annotated[
        int | None, typer.Option(min=1, help="How many prompts there are.", show_default="any number")
    ] = None,
    policy: Annotated[
        str | None,
        typer.Option(help="Predict this policy instead of searching: six percentages, or a policy's JSON file."),
    ] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Sequences of a micro-batch.")] = None,
    num_batches: Annotated[int | None, typer.Option(min=1, help="Micro-batches that share each loaded layer.")] = None,
    overlap: Annotated[bool | None, typer.Option("--overlap/--no-overlap", help="With --policy.")] = None,
    host_attention: Annotated[
        bool | None,
        typer.Option(
            "--host-attention/--no-host-attention",
            help="Attend on the host to cells that live there.",
            show_default="the search's choice",
        ),
    ] = None,
    compression: Annotated[
        str, typer.Option(help="`none`, `4bit`, a Compression's JSON, or `any` to leave it to the search.")
    ] = "none",
    max_memory: Annotated[
        str | None, typer.Option(help="Limit of each tier, for example `0=14GiB,cpu=180GiB,disk=1TiB`.")
    ] = None,
    objective: Annotated[
        _Objective, typer.Option(help="The most tokens per second, the shortest time, or the largest block in time.")
    ] = "throughput",
    deadline: Annotated[float | None, typer.Option(min=0, help="Seconds that a block may take.")] = None,
    dtype: Annotated[_Dtype | None, typer.Option(help="Element type of compute.", show_default="the model's")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Write the plan as JSON.")] = False,
    plot: Annotated[
        Path | None, typer.Option(help="Draw the plan into this file: .png, .svg or .pdf; needs matplotlib.")
    ] = None,
    paper: Annotated[
        bool, typer.Option("--paper", help="Instead of planning, predict the published policies of FlexGen's paper.")
    ] = False,
) -> None:
    """Finds the best policy for a model on a machine, which need not be this one, and says why."""
    if plot is not None:
        if paper:
            raise PolicyError("--plot draws a plan, and --paper makes none; give one of them")
        plots.check_file(plot)
    if paper:
        typer.echo("\n".join(_paper_table(compare(_paper_shapes(), preset("t4")))))
        return
    machine = _limited(hardware_of(hardware), max_memory)
    found = shape_of_model(model, shape)
    found = found.in_dtype(dtype) if dtype is not None else found
    workload = Workload(prompt_len, gen_len, num_prompts)
    freedom = Freedom(
        compressions=compressions_of(compression),
        host_attention=host_attention is not False,
        batch_size=batch_size,
        num_batches=num_batches,
        objective=objective,
        deadline_s=deadline,
    )
    planner = Planner(found, machine, workload, freedom)
    if policy is None:
        plan = planner.plan()
    else:
        fields = {
            "batch_size": batch_size, "num_batches": num_batches, "overlap": overlap, "host_attention": host_attention,
            "compression": None if compression == "none" else freedom.compressions[0],
        }  # fmt: skip
        plan = planner.explain(
            Policy.of(policy, **{name: value for name, value in fields.items() if value is not None})
        )
    if plot is not None:
        plots.save(plots.draw_plan(plan, planner), plot)
    if as_json:
        typer.echo(json.dumps(plan.to_dict(), indent=2))
    else:
        typer.echo("\n".join(_table(plan, found, machine, workload)))


def shape_of_model(model: str | None, shape: str | None) -> ModelShape:
    """The shape that is meant: of a folder, of a model on the Hub, or a known one.

    Raises:
        PolicyError: neither a model nor a shape, or both.
        StoreError: no such model.
    """
    if (model is None) == (shape is None):
        raise PolicyError(f"give MODEL or --shape, one of them; known shapes are {', '.join(SHAPES)}")
    if shape is not None:
        return ModelShape.from_config(shape_fields(shape), name=shape)
    assert model is not None
    path = Path(model).expanduser()
    if path.is_dir():
        return ModelShape.from_config(read_config(path), name=path.name)
    if is_shape(model):
        raise PolicyError(f"no model {model!r}; for the shape of that name, write --shape {model}")
    return ModelShape.from_config(read_config(_fetched(model)), name=model)


def _fetched(model: str) -> Path:
    """The folder to which the configuration of a model on the Hub was fetched."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(model, "config.json")).parent
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = " ".join(str(error).split())
        raise StoreError(
            f"no folder {model!r}, and its configuration cannot be fetched from the Hub ({reason}); give a model's "
            "folder, or --shape"
        ) from error


def _limited(hardware: Hardware, max_memory: str | None) -> Hardware:
    if max_memory is None:
        return hardware
    limits = {}
    for tier, size in parse_max_memory(max_memory, "--max-memory").items():
        if size.weights:
            raise PolicyError(f"--max-memory: {tier}: a share of the weights is not known here; give the size in bytes")
        limits[Tier.of(tier)] = size.nbytes
    shared = limits.get(Tier.HOST) if hardware.unified else None
    return hardware.within(limits, shared)


# --------------------------------------------------------------------------------------------------------------- output
def _table(plan: Plan, shape: ModelShape, hardware: Hardware, workload: Workload) -> Iterator[str]:
    made = plan.predicted
    yield f"model       {shape.name}, {shape.num_parameters / 1e9:.2f} G parameters, compute in {shape.dtype}"
    yield f"machine     {hardware.name}"
    yield f"workload    {workload.prompt_len} + {workload.gen_len} tokens, block of {made.rows} sequences"
    yield f"policy      {plan.policy}"
    if plan.policy.compression:
        yield f"compression {plan.policy.compression}"
    yield f"predicted   {made.tokens_per_s:.2f} token/s: prefill {made.prefill_s:.1f} s, decode {made.decode_s:.1f} s"
    yield f"bottleneck  {made.bottleneck}"
    yield from _lanes(made)
    yield "peak        " + ", ".join(f"{tier} {size / 2**30:.2f} GiB" for tier, size in made.peak_bytes.items())
    yield from (f"why         {text}" for text in plan.why)
    for other in plan.alternatives:
        yield f"alternative {other.predicted.tokens_per_s:.2f} token/s: {other.policy}"
    yield from (f"warning     {text}" for text in plan.warnings)


def _lanes(made: Prediction) -> Iterator[str]:
    for lane, prefill in made.prefill_lanes.items():
        decode = made.decode_lanes[lane]
        if prefill or decode:
            yield f"  {lane!s:<16}prefill {prefill:10.1f} s   decode {decode:10.1f} s"


def _paper_shapes() -> dict[str, ModelShape]:
    return {row.model: shape_of_model(None, row.model) for row in PUBLISHED}


def _paper_table(rows: Sequence[Comparison]) -> Iterator[str]:
    """Markdown, for docs/benchmarks.md."""
    yield "| model | prompt | compressed | published | authors' own model | this engine | with their losses | error |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- |"
    for made in rows:
        own = "" if made.original_model is None else f"{made.original_model:.2f}"
        yield (
            f"| {made.row.model} | {made.row.prompt_len} | {'yes' if made.row.is_compressed else ''} | "
            f"{made.row.tokens_per_s:.2f} | {own} | {made.planned:.2f} | {made.with_losses:.2f} | {made.error:+.0%} |"
        )
    errors = [abs(made.error) for made in rows]
    yield f"\nMean error {sum(errors) / len(errors):.1%}, largest {max(errors):.1%}."
