"""The command `models`: which families this package is tested with and what each supports, and a sweep of all types.

Nothing in the tables is written by hand: a row is what the code says of a tiny model of the type, which is described
and not run; the sweep runs them.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import typer

__all__ = ["Family", "families", "families_table", "models_command"]


def models_command(
    types: Annotated[
        list[str] | None, typer.Argument(help="Model types as in a config.json.", show_default="all", metavar="TYPE")
    ] = None,
    sweep: Annotated[
        bool,
        typer.Option(
            "--sweep",
            help="Run a tiny random model of every causal type of the installed transformers, and compare its tokens.",
        ),
    ] = False,
) -> None:
    """The tested families and what each supports; with `--sweep`, what becomes of every type of transformers."""
    if not sweep:
        typer.echo(families_table(families(types)))
        return
    from .sweep import sweep as run
    from .sweep import table

    outcomes = []
    for outcome in run(types):
        outcomes.append(outcome)
        typer.echo(f"{outcome.model_type}: {outcome.verdict}", err=True)
    typer.echo(table(outcomes))
    if not all(outcome.is_right for outcome in outcomes):
        raise typer.Exit(1)


@dataclasses.dataclass(frozen=True)
class Family:
    """What is supported of a model type.

    Args:
        model_type: as in a `config.json`.
        model_class: its class in transformers.
        tiers: where weights, cache and hidden states may live.
        four_bit: what may be kept in groups of 4 bits.
        host_attention: empty if attention can be computed next to a cache on the host, else why not.
    """

    model_type: str
    model_class: str
    tiers: str
    four_bit: str
    host_attention: str


def families(types: list[str] | None = None) -> list[Family]:
    """The tested families, or of those only some types.

    Raises:
        UnsupportedModelError: a type that is not among them.
    """
    from .errors import UnsupportedModelError
    from .families import TESTED
    from .sweep import quiet

    wanted = sorted(TESTED) if types is None else types
    if unknown := sorted(set(wanted) - TESTED):
        raise UnsupportedModelError(
            f"{unknown[0]!r} is not among the tested families ({', '.join(sorted(TESTED))}); try it with --sweep"
        )
    with quiet():
        return [_family(name) for name in wanted]


def families_table(found: list[Family]) -> str:
    """Families as a table in Markdown."""
    from .families import TESTED_WITH

    lines = [
        "| type | class | weights, cache, hidden states on | 4 bit | host attention | compared with transformers |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {family.model_type} | {family.model_class} | {family.tiers} | {family.four_bit} | "
        f"{family.host_attention or 'yes'} | {TESTED_WITH} |"
        for family in found
    ]
    return "\n".join(lines)


def _family(model_type: str) -> Family:
    import torch
    import transformers

    from .architectures import describe
    from .attention import why_not_supported
    from .compression import weight_formats
    from .policy import Compression, Tier
    from .tiny_configs import tiny_config

    auto: Any = transformers.AutoModelForCausalLM
    with torch.device("meta"):
        model = auto.from_config(tiny_config(model_type))
    structure = describe(model)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    packed = weight_formats(structure, shapes, Compression(weights=4, group_size=16))
    reason = why_not_supported(model)
    return Family(
        model_type,
        type(model).__name__,
        ", ".join(tier.value for tier in Tier),
        "weights, cache" if packed else "cache",
        "" if reason is None else f"no: {reason}",
    )
