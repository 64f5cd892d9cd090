"""An OPT of a few kilobytes with a long memory, what transformers writes with it, and what a run may leave behind."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, OPTForCausalLM, set_seed

from flexgen_hf import FlexGenForCausalLM, Placement, Policy
from flexgen_hf.storage.workspace import Workspace
from tests.checkpoints import opt_config

__all__ = [
    "DISK",
    "EVERYTHING_ON_DISK",
    "Accelerator",
    "batch",
    "flexgen_threads",
    "greedy",
    "load",
    "pretend_accelerator",
    "reference",
    "watchdog",
    "write_tiny_opt",
]

DISK = Placement(disk=1.0)

# Everything moves: what is wrong in moving shows here first. A ragged last micro-batch for seven rows.
EVERYTHING_ON_DISK = Policy(weights=DISK, cache=DISK, hidden=DISK, batch_size=2, num_batches=4)


def write_tiny_opt(folder: Path, dtype: torch.dtype = torch.float32, **config: Any) -> Path:
    """A checkpoint whose next token depends on all the tokens before it, not only on the last one."""
    set_seed(0)
    model: Any = OPTForCausalLM(opt_config(**config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, 0.3 if "embed" in name else 3 / parameter.shape[1] ** 0.5)
            elif "norm" not in name:
                parameter.normal_(0, 0.1)
    model.to(dtype).save_pretrained(folder)
    return folder


def batch(rows: int, tokens: int = 6, seed: int = 0) -> dict[str, torch.Tensor]:
    """Distinct prompts of different lengths, padded on the left."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, 96, (rows, tokens), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(1, rows):
        pad = int(torch.randint(0, tokens - 1, (1,), generator=generator))
        ids[row, :pad], mask[row, :pad] = 1, 0
    return {"input_ids": ids, "attention_mask": mask}


@functools.lru_cache(maxsize=4)
def reference(folder: Path) -> Any:
    """The same model as transformers runs it."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def load(folder: Path, offload: Path, policy: Policy | None = None, **options: Any) -> Any:
    """Our model, by default with everything on disk."""
    options = {"policy": policy or EVERYTHING_ON_DISK, "dtype": torch.float32, "device": "cpu", **options}
    return FlexGenForCausalLM.from_pretrained(folder, offload_folder=offload, **options)


def greedy(model: Any, prompts: dict[str, torch.Tensor], tokens: int = 4, eos: int = -1) -> Any:
    """Sequences and logits of so many tokens, or until `eos` in every row."""
    return model.generate(
        **prompts,
        max_new_tokens=tokens,
        do_sample=False,
        eos_token_id=eos,
        pad_token_id=1,
        output_logits=True,
        return_dict_in_generate=True,
    )


def pretend_accelerator(patch: pytest.MonkeyPatch) -> None:
    """Has everything pushed to the device and pulled from it, though both are the same memory: all lanes are used."""
    patch.setattr(Workspace, "is_direct", False)
    patch.setattr(Workspace, "is_asynchronous", False)


class Accelerator(Workspace):
    """Has its cells and hidden states pushed and pulled, as `pretend_accelerator` has everything."""

    @property
    def is_direct(self) -> bool:
        return False

    @property
    def is_asynchronous(self) -> bool:
        return False


def flexgen_threads() -> list[str]:
    """Names of the engine's threads that are alive."""
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("flexgen-")]


def watchdog(work: Callable[[], Any], seconds: float = 30.0) -> Any:
    """What `work` returns or raises, in a thread of its own.

    Raises:
        TimeoutError: it did not end in time.
    """
    result: list[Any] = []
    error: list[BaseException] = []

    def run() -> None:
        try:
            result.append(work())
        except BaseException as raised:  # noqa: BLE001  handed to the caller
            error.append(raised)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise TimeoutError(f"no end after {seconds} s")
    if error:
        raise error[0]
    return result[0]
