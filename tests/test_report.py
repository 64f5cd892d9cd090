"""What `last_run` says of a run."""

from __future__ import annotations

import itertools
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from flexgen_hf import FlexGenForCausalLM, Policy, RunReport
from flexgen_hf.planning.schedule import Lane
from flexgen_hf.report import LaneWork, SweepRecord
from flexgen_hf.storage.lanes import LaneUse

from .checkpoints import opt_config, write_random_checkpoint
from .tiny import batch, load, write_tiny_opt


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunReport:
    """Three tokens for five prompts with everything on disk."""
    folder = tmp_path_factory.mktemp("model")
    write_random_checkpoint(folder, opt_config(), dtype=torch.float32)
    policy = Policy.parse("0 0 0 0 0 0", batch_size=2, num_batches=3)
    model: Any = FlexGenForCausalLM.from_pretrained(
        folder, policy=policy, offload_folder=tmp_path_factory.mktemp("off")
    )
    with model:
        model.generate(torch.randint(3, 90, (5, 7)), max_new_tokens=3, min_new_tokens=3, do_sample=False)
    report: RunReport = model.last_run
    return report


def test_counts(run: RunReport) -> None:
    assert run.generated_tokens == 15
    assert [sweep.tokens for sweep in run.sweeps] == [7, 1, 1]
    assert [sweep.is_prefill for sweep in run.sweeps] == [True, False, False]
    layers = opt_config().num_hidden_layers
    # the embedding, every layer for each of three micro-batches, and the head for all of them
    assert run.lanes["compute"].steps == 3 * (3 + 3 * layers + 1)


def test_every_streamed_byte_moves_once_per_sweep(run: RunReport) -> None:
    reads = [event for event in run.lanes["disk_to_host"].events if event.name.what == "weights"]
    per_stage: dict[tuple[int, int], int] = {}
    for event in reads:
        per_stage[event.name.sweep, event.name.stage] = per_stage.get((event.name.sweep, event.name.stage), 0) + 1
    assert set(per_stage.values()) == {1}
    table = sum(event.bytes for event in reads if event.name.stage == 0)
    layers = sum(event.bytes for event in reads if event.name.stage > 0)
    # bytes between tensors that lie close together are read along, at most once per run
    assert table + layers / 3 == pytest.approx(run.placement["weights"]["disk"], rel=0.02)  # type: ignore[index]


def test_the_dict_is_json_and_has_what_scripts_read(run: RunReport) -> None:
    text = json.loads(json.dumps(run.to_dict()))
    assert {"prefill_s", "decode_s", "tokens_per_s", "share_of_limit", "lanes", "peak_bytes", "placement"} <= set(text)
    assert set(text["lanes"]) == {lane.value for lane in Lane}
    assert set(text["lanes"]["disk_to_host"]) == {"busy_s", "idle_s", "bytes"}
    assert set(text["peak_bytes"]) == {"device", "host", "disk"}
    assert 0 < text["share_of_limit"] <= 1
    assert text["peak_bytes"]["disk"] > 0


def test_the_dict_lists_sweeps(run: RunReport) -> None:
    text = run.to_dict()
    assert text["rows"] == 5
    assert text["num_sweeps"] == 3
    assert [(s["rows"], s["tokens"], s["is_prefill"]) for s in text["sweeps"]] == [
        (5, 7, True),
        (5, 1, False),
        (5, 1, False),
    ]
    assert sum(s["seconds"] for s in text["sweeps"]) == text["prefill_s"] + text["decode_s"]
    assert text["prefill_tokens_per_s"] == 35 / text["prefill_s"]
    assert text["decode_tokens_per_s"] == 10 / text["decode_s"]


def test_a_long_list_of_sweeps_is_cut() -> None:
    sweeps = [SweepRecord(1, 1, 0.5, is_prefill=False)] * 1001
    text = RunReport(Policy(), sweeps=sweeps, lanes={"compute": LaneUse()}).to_dict()
    assert (len(text["sweeps"]), text["num_sweeps"], text["decode_s"]) == (1000, 1001, 500.5)


def test_every_lane_is_idle_when_it_is_not_busy(run: RunReport) -> None:
    text = run.to_dict()
    assert set(text["decode_lanes"]) == set(text["lanes"]) == {lane.value for lane in Lane}
    for sweep in run.sweeps:
        assert all(0 <= work.busy_s <= sweep.seconds for work in sweep.lanes.values())
    for lanes in (text["lanes"], text["decode_lanes"]):
        assert all(lane["idle_s"] >= 0 for lane in lanes.values())
    for lane in text["decode_lanes"].values():
        assert lane["busy_s"] + lane["idle_s"] == pytest.approx(text["decode_s"])


def test_every_byte_belongs_to_a_sweep_or_comes_after_the_last(run: RunReport) -> None:
    reads, writes = run.lanes["disk_to_host"].bytes, run.lanes["host_to_disk"].bytes
    assert sum(sweep.lanes["disk_to_host"].bytes for sweep in run.sweeps) == reads > 0
    assert 0 < sum(sweep.lanes["host_to_disk"].bytes for sweep in run.sweeps) <= writes
    for name, work in run.decode_lanes.items():
        assert work.bytes == sum(sweep.lanes[name].bytes for sweep in run.sweeps[1:])


def test_prefill_and_decode_have_bottlenecks_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = 0.0  # of the report: only what this test calls slow takes time, however loaded the machine is
    monkeypatch.setattr("time.perf_counter", lambda: clock)
    with load(write_tiny_opt(tmp_path / "model"), tmp_path) as model:

        def before_step(name: str, _step: Any) -> None:
            nonlocal clock
            running = model.last_run.running
            slow = Lane.COMPUTE if running is not None and running.is_prefill else Lane.DISK_TO_HOST
            if running is not None and name == slow:
                clock += 1 / 64  # exact in floating point

        model._executor.before_step = before_step
        model.generate(**batch(5), max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=1)
        run = model.last_run
    prefill = run.sweeps[0]
    assert prefill.seconds == len(run.lanes["compute"].events) / len(run.sweeps) / 64 > 0
    assert prefill.lanes["compute"].busy_s > 0.99 * prefill.seconds >= 0.99 * prefill.lanes["disk_to_host"].busy_s
    assert run.decode_bottleneck == "disk_to_host"
    assert 0.8 < run.decode_share_of_limit <= 1
    assert run.decode_share_of_limit == run.decode_lanes["disk_to_host"].busy_s / run.decode_s
    assert f"in decode disk_to_host, {run.decode_share_of_limit:.0%}" in str(run)


def test_bytes_that_move_between_sweeps_count_for_the_next_and_seconds_for_none() -> None:
    use = LaneUse()
    run = RunReport(Policy(), lanes={"disk_to_host": use})
    run.begin_sweep(2, 7, is_prefill=True)
    use.end("in the sweep", use.begin(), 10)
    run.end_sweep()
    started = use.begin()
    time.sleep(0.05)
    use.end("between the sweeps", started, 100)
    run.begin_sweep(2, 1, is_prefill=False)
    use.end("in the next sweep", use.begin(), 1000)
    run.end_sweep()
    assert [sweep.lanes["disk_to_host"].bytes for sweep in run.sweeps] == [10, 1100]
    assert run.decode_lanes["disk_to_host"].busy_s <= run.decode_s < 0.05 < use.busy_s


def test_busy_seconds_of_two_workers_count_once() -> None:
    use = LaneUse()
    run = RunReport(Policy(), lanes={"disk_to_host": use})
    run.begin_sweep(2, 1, is_prefill=False)
    first, second = use.begin(), use.begin()
    time.sleep(0.02)
    use.end("one", first)
    use.end("another", second, worker=1)
    run.end_sweep()
    assert 0.02 <= run.sweeps[0].lanes["disk_to_host"].busy_s <= run.sweeps[0].seconds
    assert run.to_dict()["decode_lanes"]["disk_to_host"]["idle_s"] >= 0


def test_a_run_without_decode_has_no_bottleneck_there() -> None:
    sweep = SweepRecord(2, 7, 1.0, is_prefill=True, lanes={"compute": LaneWork(0.5, 0)})
    run = RunReport(Policy(), sweeps=[sweep], lanes={"compute": LaneUse()})
    assert (run.decode_bottleneck, run.decode_share_of_limit, run.decode_tokens_per_s) == ("none", 0.0, 0.0)
    assert "in decode" not in str(run)
    assert RunReport(Policy()).to_dict()["sweeps"] == []


def test_the_sweep_in_which_an_error_ended_the_call_is_still_there(tmp_path: Path) -> None:
    def broken(lane: str, step: Any) -> None:
        if lane == Lane.COMPUTE and len(model.last_run.sweeps) == 1:
            raise ValueError(str(step))

    with load(write_tiny_opt(tmp_path / "model"), tmp_path) as model:
        model._executor.before_step = broken
        with pytest.raises(ValueError, match="compute of stage 0"):
            model.generate(**batch(5), max_new_tokens=4, do_sample=False, pad_token_id=1)
        run = model.last_run
    assert (run.running.rows, run.running.tokens, run.running.is_prefill) == (5, 1, False)
    assert len(run.sweeps) == 1


@pytest.mark.parametrize(
    ("upcasts", "line"),
    [
        ({"tensors": 12, "per_stage_and_sweep": 1}, "casts       12 tensors, at most once per stage and sweep"),
        ({"tensors": 12, "per_stage_and_sweep": 3}, "casts       12 tensors, at most 3 times per stage and sweep"),
        ({}, None),
    ],
)
def test_casts(upcasts: dict[str, int], line: str | None) -> None:
    run = RunReport(Policy(), upcasts=upcasts)
    assert run.to_dict()["upcasts"] == {"tensors": 0, "per_stage_and_sweep": 0, **upcasts}
    assert run.to_dict()["dequantizations"] == {"tensors": 0, "per_stage_and_sweep": 0}
    assert [row for row in str(run).splitlines() if row.startswith(("casts", "dequ"))] == ([line] if line else [])


def test_the_text_names_policy_bottleneck_and_lanes(run: RunReport) -> None:
    text = str(run)
    for word in ("policy", "bottleneck", "disk_to_host", "weights", "cache", "peak"):
        assert word in text
    assert f"prefill     {run.prefill_tokens_per_s:.2f} token/s of prompts" in text
    assert f"decode      {run.decode_tokens_per_s:.2f} token/s" in text


def test_the_trace_has_one_track_per_worker_of_a_lane_and_all_steps(run: RunReport, tmp_path: Path) -> None:
    run.trace(tmp_path / "run.json")
    rows = json.loads((tmp_path / "run.json").read_text())["traceEvents"]
    tracks = {row["tid"]: row["args"]["name"] for row in rows if row["name"] == "thread_name"}
    assert {name.split(",")[0] for name in tracks.values()} == {lane.value for lane in Lane}
    steps = [row for row in rows if row["ph"] == "X"]
    assert len(steps) == sum(use.steps for use in run.lanes.values())
    assert {row["tid"] for row in steps} <= set(tracks)
    for track in tracks:  # a worker does one thing at a time
        own = sorted((row["ts"], row["ts"] + row["dur"]) for row in steps if row["tid"] == track)
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(own))
    assert min(row["ts"] for row in steps) == 0


def test_viewers_can_read_the_trace(run: RunReport, tmp_path: Path) -> None:
    run.trace(tmp_path / "run.json")
    rows = json.loads((tmp_path / "run.json").read_text())["traceEvents"]
    assert {row["ph"] for row in rows} == {"M", "X"}
    assert all(isinstance(row[key], int) for row in rows for key in ("pid", "tid"))
    for row in rows:
        if row["ph"] == "X":
            assert isinstance(row["name"], str)
            assert row["ts"] >= 0
            assert row["dur"] >= 0
    assert {row["args"]["name"] for row in rows if row["name"] == "process_name"} == {"flexgen_hf"}
    names = {row["tid"]: row["args"]["name"] for row in rows if row["name"] == "thread_name"}
    places = {row["tid"]: row["args"]["sort_index"] for row in rows if row["name"] == "thread_sort_index"}
    assert set(names) == set(places)
    order = [name.split(",")[0] for _, name in sorted((places[thread], name) for thread, name in names.items())]
    lanes = ["disk_to_host", "host_to_device", "compute", "device_to_host", "host_to_disk"]
    assert list(dict.fromkeys(order)) == lanes  # as data passes through them


def test_a_trace_separates_what_workers_do_at_the_same_time(tmp_path: Path) -> None:
    use = LaneUse()
    first, second = use.begin(), use.begin()
    use.end("one", first, 1)
    use.end("another", second, 2, worker=1)
    RunReport(Policy(), lanes={"disk_to_host": use}).trace(tmp_path / "run.json")
    rows = json.loads((tmp_path / "run.json").read_text())["traceEvents"]
    names = {row["tid"]: row["args"]["name"] for row in rows if row["name"] == "thread_name"}
    assert {names[row["tid"]]: row["name"] for row in rows if row["ph"] == "X"} == {
        "disk_to_host": "one",
        "disk_to_host, worker 1": "another",
    }


def test_blocks_of_one_call_do_not_hold_their_caches_together(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path / "model", opt_config(), dtype=torch.float32)
    peaks = []
    for rows in (2, 6):
        model: Any = FlexGenForCausalLM.from_pretrained(
            tmp_path / "model", policy=Policy.parse("100 0 0 0 100 0", batch_size=2), offload_folder=tmp_path / "off"
        )
        with model:
            model.generate(torch.randint(3, 90, (rows, 7)), max_new_tokens=3, min_new_tokens=3, do_sample=False)
        peaks.append(model.last_run.to_dict()["peak_bytes"]["disk"])
    assert peaks[0] == peaks[1] > 0
