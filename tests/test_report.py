"""What `last_run` says of a run."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from flexgen_hf import FlexGenForCausalLM, Policy, RunReport
from flexgen_hf.planning.schedule import Lane

from .checkpoints import opt_config, write_random_checkpoint


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


def test_the_text_names_policy_bottleneck_and_lanes(run: RunReport) -> None:
    text = str(run)
    for word in ("policy", "bottleneck", "disk_to_host", "weights", "cache", "peak"):
        assert word in text


def test_the_trace_has_one_track_per_lane_and_all_steps(run: RunReport, tmp_path: Path) -> None:
    run.trace(tmp_path / "run.json")
    rows = json.loads((tmp_path / "run.json").read_text())["traceEvents"]
    tracks = {row["tid"]: row["args"]["name"] for row in rows if row["ph"] == "M"}
    assert set(tracks.values()) == {lane.value for lane in Lane}
    steps = [row for row in rows if row["ph"] == "X"]
    assert len(steps) == sum(use.steps for use in run.lanes.values())
    for track in tracks:  # a lane does one thing at a time
        own = sorted((row["ts"], row["ts"] + row["dur"]) for row in steps if row["tid"] == track)
        assert all(end <= start + 1e-3 for (_, end), (start, _) in itertools.pairwise(own))
    assert min(row["ts"] for row in steps) == 0


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
