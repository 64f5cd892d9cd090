"""The progress bar of `generate`: what it counts, when it is shown, and how it ends."""

from __future__ import annotations

import re
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from flexgen_hf import Policy, RunReport, progress
from flexgen_hf.planning.schedule import Lane
from flexgen_hf.storage.lanes import LaneUse

from .tiny import batch, load, reference, write_tiny_opt

LAYERS = 3  # of the tiny model
FRAME = re.compile(
    r"(?:block (?P<block>\d+)/(?P<blocks>\d+), )?(?P<phase>prefill|decode) layer (?P<layer>\d+)/(?P<layers>\d+)"
    r"(?:\|.*\|)? (?P<n>\d+)(?:/(?P<total>\d+))? \[(?P<facts>[^\]]*)\]"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_opt(tmp_path_factory.mktemp("progress") / "model")


@pytest.fixture
def ours(folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Iterator[Any]:
    """A model that shows its progress, in blocks of eight rows; nothing is written before the test begins."""
    with load(folder, tmp_path) as model:
        model.show_progress = True
        capfd.readouterr()
        yield model


@pytest.fixture
def _every_step_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_REDRAW_S", 0.0)


def generate(model: Any, rows: int = 3, tokens: int = 4, **options: Any) -> Any:
    options = {"max_new_tokens": tokens, "do_sample": False, "eos_token_id": -1, "pad_token_id": 1, **options}
    return model.generate(**batch(rows), **options)


def frames(capfd: pytest.CaptureFixture[str]) -> list[dict[str, str]]:
    """What was drawn since the last look, in order."""
    drawn = [FRAME.search(line) for line in capfd.readouterr().err.split("\r")]
    return [frame.groupdict() for frame in drawn if frame is not None]


def test_nothing_is_shown_unless_asked_for(ours: Any, capfd: pytest.CaptureFixture[str]) -> None:
    shown = generate(ours)
    assert "prefill" in capfd.readouterr().err
    ours.show_progress = False
    hidden = generate(ours)
    assert capfd.readouterr() == ("", "")
    assert torch.equal(shown, hidden)


def test_a_model_is_silent_by_default(folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with load(folder, tmp_path) as model:
        capfd.readouterr()
        generate(model)
    assert capfd.readouterr() == ("", "")


def test_it_counts_what_the_run_did(ours: Any, capfd: pytest.CaptureFixture[str]) -> None:
    ours._executor.before_step = lambda lane, _step: time.sleep(0.02 * (lane == Lane.DISK_TO_HOST))
    generate(ours, rows=5, tokens=4)
    out, err = capfd.readouterr()
    assert out == ""
    assert err.endswith("\n")
    last = FRAME.search(err.split("\r")[-1])
    assert last is not None
    run = ours.last_run
    assert (last["phase"], last["layer"]) == ("decode", str(LAYERS))
    assert int(last["n"]) == int(last["total"]) == len(run.sweeps) == 4
    speed, lane, share = re.findall(r"([\d.]+) token/s, (\w+) (\d+)%", last["facts"])[0]
    assert float(speed) == pytest.approx(run.generated_tokens / run.elapsed_s, rel=0.3)
    assert lane == run.bottleneck == "disk_to_host"
    assert int(share) / 100 == pytest.approx(run.lanes[lane].busy_s / run.elapsed_s, abs=0.2)


@pytest.mark.usefixtures("_every_step_is_drawn")
def test_it_moves_within_a_sweep(ours: Any, capfd: pytest.CaptureFixture[str]) -> None:
    generate(ours, rows=5, tokens=2)
    seen = frames(capfd)
    assert {frame["layers"] for frame in seen} == {str(LAYERS)}
    places = [(frame["phase"], int(frame["layer"]), int(frame["n"])) for frame in seen]
    sweeps = [(phase, layer, n) for n, phase in enumerate(("prefill", "decode")) for layer in range(LAYERS + 1)]
    assert set(places) == {*sweeps, ("prefill", LAYERS, 1), ("decode", LAYERS, 2)}
    assert [n for *_, n in places] == sorted(n for *_, n in places)
    layers = [layer for phase, layer, _ in places if phase == "prefill"]
    assert layers == sorted(layers)
    assert len(layers) == 1 + 3 * (1 + LAYERS) + 1  # the beginning, every step of three micro-batches, and the head
    # there is no speed before there is a token
    assert [("token/s" in frame["facts"]) for frame in seen] == [n > 0 for *_, n in places]


@pytest.mark.usefixtures("_every_step_is_drawn")
def test_a_cut_batch_is_one_bar(ours: Any, capfd: pytest.CaptureFixture[str]) -> None:
    generate(ours, rows=19, tokens=3)
    seen = frames(capfd)
    assert {frame["total"] for frame in seen} == {"9"}
    for number in (1, 2, 3):
        block = [frame for frame in seen if frame["block"] == str(number)]
        assert {frame["blocks"] for frame in block} == {"3"}
        assert [block[0]["phase"], block[-1]["phase"]] == ["prefill", "decode"]
        assert {int(frame["n"]) for frame in block} == set(range(3 * number - 3, 3 * number + 1))
    assert len(ours.last_run.sweeps) == 9


@pytest.mark.usefixtures("_every_step_is_drawn")
def test_rows_that_end_early_shorten_the_bar(folder: Path, ours: Any, capfd: pytest.CaptureFixture[str]) -> None:
    alone = {name: tensor[:1] for name, tensor in batch(1).items()}
    end = int(generate(reference(folder), rows=1, tokens=6)[0, alone["input_ids"].shape[1] + 2])
    generate(ours, rows=1, tokens=6, eos_token_id=end)
    seen = frames(capfd)
    assert seen[0]["total"] == "6"
    count = len(ours.last_run.sweeps)
    assert count < 6
    assert (seen[-1]["n"], seen[-1]["total"]) == (str(count), str(count))


@pytest.mark.parametrize(
    ("options", "total"),
    [({"max_length": 9}, "3"), ({"max_new_tokens": 3, "num_beams": 2}, "3"), ({"min_length": 1}, None)],
)
def test_how_many_tokens_there_will_be(
    ours: Any, options: dict[str, Any], total: str | None, capfd: pytest.CaptureFixture[str]
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers' about a call that does not say how many
        generate(ours, **{"max_new_tokens": None, **options})
    last = frames(capfd)[-1]
    assert last["total"] == total
    assert int(last["n"]) == len(ours.last_run.sweeps)


def test_the_rows_of_a_beam_search_count(ours: Any, capfd: pytest.CaptureFixture[str]) -> None:
    generate(ours, rows=4, tokens=3, num_beams=2)
    run = ours.last_run
    assert run.generated_tokens == 4 * 2 * 3
    speed = float(re.findall(r"([\d.]+) token/s", frames(capfd)[-1]["facts"])[0])
    assert run.generated_tokens / run.elapsed_s <= speed * 1.01  # elapsed_s is a little more than the bar sees
    assert speed <= run.tokens_per_s * 1.01  # sampling is no part of a sweep


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()])
@pytest.mark.usefixtures("_every_step_is_drawn")
def test_it_ends_with_an_error(ours: Any, error: BaseException, capfd: pytest.CaptureFixture[str]) -> None:
    def broken(lane: str, step: Any) -> None:
        if lane == Lane.COMPUTE and step.stage == 2 and len(ours.last_run.sweeps) == 1:
            raise error

    ours._executor.before_step = broken
    with pytest.raises(type(error)):
        generate(ours)
    err = capfd.readouterr().err
    assert err.endswith("\n")
    last = FRAME.search(err.split("\r")[-1])
    assert last is not None
    assert (last["phase"], last["layer"], last["n"], last["total"]) == ("decode", "1", "1", "4")
    ours._executor.before_step = None
    ours.show_progress = False
    generate(ours)
    assert capfd.readouterr() == ("", "")


@pytest.mark.usefixtures("_every_step_is_drawn")
def test_an_interrupt_while_it_draws_leaves_other_bars_usable(ours: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from tqdm import tqdm

    def interrupted(**state: Any) -> str:
        if "layer 2" in state["prefix"] and not interruptions:
            interruptions.append(state["prefix"])
            raise KeyboardInterrupt
        return ""

    interruptions: list[str] = []
    monkeypatch.setattr(progress._Bar, "format_meter", staticmethod(interrupted))
    with pytest.raises(KeyboardInterrupt):
        generate(ours)
    assert interruptions

    def draw_another() -> None:
        with tqdm.get_lock():
            drawn.append(True)

    drawn: list[bool] = []
    other = threading.Thread(target=draw_another, daemon=True)
    other.start()
    other.join(timeout=10)
    assert drawn


def test_no_thread_is_left(ours: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress._Bar, "monitor", None, raising=False)  # other bars may have started tqdm's thread
    before = set(threading.enumerate())
    generate(ours)
    assert set(threading.enumerate()) <= before


def test_a_call_inside_of_a_shown_one_shows_nothing(ours: Any, capfd: pytest.CaptureFixture[str]) -> None:
    def nested(_batch: int, _ids: torch.Tensor) -> list[int]:
        if not called:
            called.append(True)
            generate(ours, rows=1, tokens=1)
        return list(range(96))

    called: list[bool] = []
    generate(ours, rows=2, tokens=3, prefix_allowed_tokens_fn=nested)
    assert called
    assert capfd.readouterr().err.count("\n") == 1


def test_it_fits_on_eighty_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    use = LaneUse()
    report = RunReport(Policy(), lanes={"host_to_device": use})

    def sweep() -> None:
        report.begin_sweep(144, 512, is_prefill=True)
        with use.at_work("a step"):
            time.sleep(0.05)
        bar.step(49, -1)

    with progress.Progress(report, layers=48, tokens=512) as bar:
        monkeypatch.setattr(bar._bar, "dynamic_ncols", lambda _file: (79, 24))
        bar.block(sweep)()
        shown = str(bar._bar)
    assert len(shown) <= 79
    assert re.search(r" 1/1 \[.* token/s, host_to_device \d+%\]$", shown)
