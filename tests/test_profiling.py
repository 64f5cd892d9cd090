"""A machine that is measured: whole, in a form that plans are made for, and nothing left behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from flexgen_hf import PolicyError, StoreError, profiled_compute, profiling
from flexgen_hf.cli import app
from flexgen_hf.planning.hardware import Hardware
from flexgen_hf.planning.search import plan
from flexgen_hf.planning.shape import ModelShape
from flexgen_hf.planning.workload import Workload

from .test_hardware import NUMBERS
from .test_planner import SMALL


@pytest.fixture(autouse=True)
def in_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiling, "SECONDS", 0.0)
    monkeypatch.setattr(profiled_compute, "_BEYOND_CACHE", 1 << 25)
    monkeypatch.setattr(profiled_compute, "_ROWS", (1, 16))


@pytest.fixture
def threads() -> Iterator[int]:
    """Those of torch, which the test may change."""
    given = torch.get_num_threads()
    yield given
    torch.set_num_threads(given)


def test_a_machine_is_measured_and_planned_for(tmp_path: Path, threads: int) -> None:
    folder, file = tmp_path / "disk", tmp_path / "machine.json"
    result = CliRunner().invoke(
        app,
        ["profile", "--device", "cpu", "--offload-folder", str(folder), "--output", str(file), "--threads", "1"],
        catch_exceptions=False,
    )
    assert result.exit_code == 0, result.output
    assert all(line.startswith("measuring ") for line in result.output.splitlines()), "and no bars"
    hardware = Hardware.load(file)
    assert hardware.direct
    assert hardware.cached_read is not None
    assert hardware.cast_flops is not None
    assert hardware.packed_flops is not None
    assert hardware.threads == 1
    assert hardware.cores >= 1
    assert set(hardware.sources) >= NUMBERS
    assert list(folder.iterdir()) == []
    made = plan(ModelShape.from_config(SMALL).in_dtype("float32"), hardware, Workload(16, 4, 8))
    assert made.predicted.tokens_per_s > 0


def test_what_cannot_be_measured_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for options, error in (
        (["--device", "abacus"], PolicyError),
        (["--device", "cpu", "--offload-folder", str(tmp_path / "file" / "below")], StoreError),
        (["--device", "cpu", "--offload-folder", str(tmp_path), "--output", str(tmp_path / "no" / "x")], StoreError),
    ):
        assert isinstance(CliRunner().invoke(app, ["profile", *options]).exception, error)


def test_each_number_may_have_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[float] = []

    def noted(work: Callable[[], Any], device: torch.device, *, seconds: float, is_asynchronous: bool) -> float:
        given.append(seconds)
        work()
        return 1.0

    for module in (profiling, profiled_compute):
        monkeypatch.setattr(module, "median_of", noted)
    profiling.measure(torch.device("cpu"), tmp_path, seconds=0.05)
    profiling.measure(torch.device("cpu"), tmp_path)
    assert set(given) == {0.05, 0.0}
