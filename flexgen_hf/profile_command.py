"""The command `profile`: measures this machine and writes its numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .errors import PolicyError, StoreError

__all__ = ["profile_command"]


def profile_command(
    output: Annotated[
        Path | None, typer.Option(help="The JSON file.", dir_okay=False, show_default="standard output")
    ] = None,
    offload_folder: Annotated[
        Path, typer.Option(help="Folder of the disk tier, whose disk is measured.", file_okay=False)
    ] = Path(),
    threads: Annotated[
        int | None, typer.Option(min=1, help="Of torch's arithmetic.", show_default="torch's choice")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="Where models compute.", show_default="the accelerator, else cpu")
    ] = None,
) -> None:
    """Measures this machine in less than a minute, for `plan --hardware FILE`."""
    import torch

    from .profiling import measure
    from .storage.workspace import default_device

    try:
        chosen = default_device() if device is None else torch.device(device)
    except RuntimeError as error:
        raise PolicyError(f"--device: torch knows no {device!r}; leave it out") from error
    if threads is not None:
        torch.set_num_threads(threads)
    text = measure(chosen, offload_folder, lambda what: typer.echo(f"measuring {what}", err=True)).to_json()
    if output is None:
        typer.echo(text)
        return
    try:
        output.write_text(f"{text}\n", "utf-8")
    except OSError as error:
        raise StoreError(f"--output: cannot write {str(output)!r} ({error.strerror})") from error
