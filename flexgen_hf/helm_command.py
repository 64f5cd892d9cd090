"""The command `helm`: options in, a job of `apps.helm`, a line per run at the end. Spellings are the original's too."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import (
    BatchSize,
    Chat,
    CompressionText,
    DtypeName,
    LeastShared,
    MaxMemory,
    NumBatches,
    OffloadFolder,
    Percents,
    PolicyText,
    Progress,
    Revision,
    expanded,
    given,
    hide_loading_bar,
    load_tokenizer,
    loading_options,
    shows,
)
from .policy import Policy

__all__ = ["helm_command"]


def helm_command(  # noqa: PLR0913, PLR0917  a command's options are its parameters
    description: Annotated[
        list[str],
        typer.Option(help="HELM's description of a run, such as `mmlu:model=text,subject=anatomy`; may be repeated."),
    ],
    model: Annotated[str, typer.Option(help="Hub id, model folder, converted store, or GGUF file.")],
    name: Annotated[
        str | None,
        typer.Option(help="The model in HELM's tables, `CREATOR/NAME`.", show_default="the Hub id, or local/FOLDER"),
    ] = None,
    max_eval_instances: Annotated[
        int, typer.Option("--max-eval-instances", "--max-eval-instance", "-m", min=1, help="Instances of a scenario.")
    ] = 1000,
    num_train_trials: Annotated[
        int | None, typer.Option(min=1, help="Draws of few-shot examples.", show_default="the scenario's")
    ] = None,
    pad_to_seq_len: Annotated[
        int | None,
        typer.Option(min=1, help="Prompt tokens that `--policy auto` plans for; prompts are not padded to it."),
    ] = None,
    max_sequence_length: Annotated[
        int | None,
        typer.Option(
            min=1, help="Tokens of prompt and answer into which HELM fits prompts.", show_default="the model's context"
        ),
    ] = None,
    suite: Annotated[str, typer.Option(help="Folder of the runs, below `runs` in the output.")] = "default",
    output_path: Annotated[
        Path, typer.Option("--output-path", "-o", help="Where HELM keeps scenarios and runs.", file_okay=False)
    ] = Path("benchmark_output"),
    local_path: Annotated[
        Path, typer.Option(help="HELM's own configurations and credentials.", file_okay=False)
    ] = Path("prod_env"),
    chat: Chat = False,
    seed: Annotated[int, typer.Option(help="What is drawn follows from it and the request.")] = 0,
    least_shared: LeastShared = 32,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Make the requests, and answer none.")] = False,
    skip_completed_runs: Annotated[
        bool, typer.Option("--skip-completed-runs", help="Leave out runs all of whose files are there.")
    ] = False,
    policy: PolicyText = None,
    percent: Percents = None,
    batch_size: BatchSize = None,
    num_batches: NumBatches = None,
    compression: CompressionText = None,
    max_memory: MaxMemory = None,
    offload_folder: OffloadFolder = None,
    dtype: DtypeName = None,
    revision: Revision = None,
    progress: Progress = None,
) -> None:
    """Runs benchmarks of Stanford's HELM (extra `helm`), a scenario's requests in blocks, into HELM's own files."""
    from .apps import helm

    hide_loading_bar()
    load_tokenizer(model, revision=revision)  # what is wrong with the model is said before HELM does anything
    options = loading_options(
        policy=policy,
        percent=percent,
        batch_size=batch_size,
        num_batches=num_batches,
        max_memory=max_memory,
        offload_folder=offload_folder,
        workload={"prompt_len": pad_to_seq_len} if pad_to_seq_len else None,
        compression=compression,
        dtype=dtype,
        revision=revision,
    )
    if isinstance(options.get("policy"), Policy):
        options["policy"] = options["policy"].to_dict()
    job = helm.HelmJob(
        descriptions=tuple(description),
        model=expanded(model),
        options={**options, "chat": chat, "seed": seed, "least_shared": least_shared or None},
        dry_run=dry_run,
        skip_completed_runs=skip_completed_runs,
        max_sequence_length=max_sequence_length,
        max_eval_instances=max_eval_instances,
        suite=suite,
        output_path=output_path,
        local_path=local_path,
        **given(name=name, num_train_trials=num_train_trials),
    )
    typer.echo(str(helm.run(job, show_progress=shows(progress))))
