"""Shared fixtures: tiny checkpoints, random and trained, what transformers and we make of them, ragged prompts."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch

from flexgen_hf import Policy
from flexgen_hf.bench import emulated
from flexgen_hf.text import load_tokenizer

from .checkpoints import opt_config
from .comparison import load_ours, load_plain, ragged, save_tiny
from .trained import TINY_OPT

# A shell that starts the tests in the background has them ignore Ctrl-C, and all their processes inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The same examples in every run: a change is to blame for what it breaks, not the draw.
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis.settings.load_profile("repeatable")

# Two test processes share two noisy cores; torch's threads would only wait for each other.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_opt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny OPT in fp32 whose tokens differ from prompt to prompt. Tests leave it as it is."""
    return save_tiny(opt_config(), tmp_path_factory.mktemp("tiny-opt") / "opt")


@pytest.fixture(scope="session")
def plain_opt(tiny_opt: Path) -> Any:
    """What transformers makes of `tiny_opt`."""
    return load_plain(tiny_opt)


@pytest.fixture(scope="module", params=["cpu", "emulated:0"])
def device(request: pytest.FixtureRequest) -> str:
    """Where to compute: in host memory, and on a device whose tensors are apart from it."""
    emulated.install()
    emulated.configure()
    return str(request.param)


@pytest.fixture
def prompts() -> dict[str, Any]:
    """Seven distinct, ragged, left-padded prompts."""
    return ragged()


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """Of the trained tiny OPT."""
    return load_tokenizer(str(TINY_OPT))


@pytest.fixture(scope="session")
def plain() -> Any:
    """What transformers makes of the trained tiny OPT."""
    return load_plain(TINY_OPT, dtype=torch.float32)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """What we make of the trained tiny OPT, in blocks of two micro-batches of three rows."""
    folder = tmp_path_factory.mktemp("offload")
    with load_ours(TINY_OPT, Policy(batch_size=3, num_batches=2), dtype=torch.float32, offload_folder=folder) as loaded:
        yield loaded
