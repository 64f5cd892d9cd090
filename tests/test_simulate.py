"""The simulator does what the executor does, step by step, and its clock keeps to what the steps say."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from flexgen_hf import Compression, Policy, Tier
from flexgen_hf.bench.shapes import shape_fields
from flexgen_hf.planning.cost import PlannedRun, Prediction, predict
from flexgen_hf.planning.hardware import Hardware
from flexgen_hf.planning.layout import Piece, PlannedTensor
from flexgen_hf.planning.placed import Known
from flexgen_hf.planning.presets import PRESETS, preset
from flexgen_hf.planning.schedule import Lane, Step, StepId, What
from flexgen_hf.planning.shape import ModelShape, read_config
from flexgen_hf.planning.simulate import Clock, Event, SharingClock, Throttle, every_sweep, play, simulate, steps_of
from flexgen_hf.planning.workload import Sweep, Workload
from flexgen_hf.weights.tensors import StoredTensor

from .test_budget import placements
from .tiny import batch, greedy, load, pretend_accelerator, write_tiny_opt


@pytest.fixture(scope="module", params=[torch.float32, torch.float16], ids=["as computed", "cast"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_opt(tmp_path_factory.mktemp("model"), request.param)


@pytest.fixture(scope="module")
def offload(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("offload")


@pytest.fixture(params=["direct", "pushed"])
def way(request: pytest.FixtureRequest) -> Iterator[Hardware]:
    """Compute in host memory, or behind a link; a machine of that kind."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "pushed":
            pretend_accelerator(patch)
        yield preset("cpu2" if request.param == "direct" else "t4")


policies = st.builds(
    Policy,
    weights=placements(),
    cache=placements(),
    hidden=placements(),
    batch_size=st.integers(1, 4),
    num_batches=st.integers(1, 3),
    overlap=st.booleans(),
    layer_slots=st.integers(1, 2),
    compression=st.sampled_from([Compression(), Compression(cache=4), Compression(cache=16)]),
)


def recorded(model: Any, rows: int, tokens: int, new: int) -> tuple[list[Step], dict[StepId, Any]]:
    """The steps that an executor lists in a call of generate, and what it notes of each."""
    listed: list[Step] = []
    schedule = model._executor._schedule
    steps = schedule.steps

    def noted(*args: Any) -> Iterator[Step]:
        for step in steps(*args):
            listed.append(step)
            yield step

    schedule.steps = noted
    greedy(model, batch(rows, tokens), new)
    events = [event for use in model.last_run.lanes.values() for event in use.events]
    return listed, {event.name: event for event in events}


def planned(model: Any, checkpoint: Path, hardware: Hardware, workload: Workload) -> PlannedRun:
    """The same run as the planner sees it."""
    shape = ModelShape.from_config(read_config(checkpoint)).in_dtype("float32")
    weights = model._executor.weights
    stored = [_planned_tensor(model, tensor) for tensor in weights.stored]
    run = PlannedRun(shape, hardware, model.policy, workload, known=Known(lambda _: stored), pieces=None)
    routes = weights.routes()
    assert [set(pieces) for pieces in run.layout.routes] == [set(pieces) for pieces in routes]
    # where tensors of a stage lie apart in their file, what is read in place comes in more pieces
    run.layout.stages = [tuple(Piece(read=r.read, pushes=r.push) for r in pieces) for pieces in routes]
    return run


def _planned_tensor(model: Any, tensor: StoredTensor) -> PlannedTensor:
    structure = model._executor.structure
    is_table = tensor.name in structure.tables({tensor.name})
    moves = 0 < tensor.stage < structure.head_stage or is_table
    elements = tensor.stored_bytes // tensor.stored_dtype.itemsize
    return PlannedTensor(
        stage=tensor.stage,
        elements=elements,
        stored_bytes=tensor.stored_bytes,
        device_bytes=elements * 4,
        is_cast=tensor.is_cast or tensor.is_late,
        moves=moves,
        is_matrix=len(tensor.extent.shape) == 2 and (moves or tensor.is_late),
        is_table=is_table,
    )


@hypothesis.given(policy=policies, rows=st.integers(1, 8), tokens=st.integers(2, 9), new=st.integers(1, 4))
@hypothesis.settings(
    max_examples=8,
    deadline=None,
    phases=[hypothesis.Phase.explicit, hypothesis.Phase.reuse, hypothesis.Phase.generate],  # shrinking takes minutes
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
def test_the_simulator_runs_the_steps_of_the_executor(
    checkpoint: Path, offload: Path, way: Hardware, policy: Policy, rows: int, tokens: int, new: int
) -> None:
    """Step by step: the same ones, in the same order in each lane, waiting for the same others."""
    rows = min(rows, policy.block_size)
    with load(checkpoint, offload, policy) as model:
        listed, events = recorded(model, rows, tokens, new)
        run = planned(model, checkpoint, way, Workload(tokens, new, rows))
    assert list(itertools.chain(*steps_of(run, every_sweep(run)))) == listed
    timeline = play(run, every_sweep(run), keep_events=True)
    assert {event.step.id for event in timeline.events} == events.keys()
    for lane in Lane:
        simulated = [event.step.id for event in timeline.events if event.lane is lane]
        real = sorted((e for name, e in events.items() if name.lane is lane), key=lambda event: event.started)
        if lane is not Lane.DISK_TO_HOST:  # its two workers may begin a moment apart in either order
            assert simulated == [event.name for event in real]
    for step in listed:
        assert all(events[name].ended <= events[step.id].started for name in step.after if name in events), step.id


@hypothesis.given(policy=policies, new=st.integers(1, 4))
@hypothesis.settings(max_examples=40, deadline=None)
def test_the_clock_keeps_to_what_the_steps_say(policy: Policy, new: int) -> None:
    shape = ModelShape.from_config(
        {"num_hidden_layers": 3, "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 99}
    )
    run = PlannedRun(shape, preset("t4"), policy, Workload(8, new))
    timeline = play(run, every_sweep(run), keep_events=True)
    ended = {event.step.id: event.ended for event in timeline.events}
    for event in timeline.events:
        assert event.started >= max((ended[name] for name in event.step.after if name in ended), default=0)
        assert event.ended - event.started == pytest.approx(
            run.seconds(event.step, timeline.sweeps[event.step.id.sweep])
        )
    for lane in Lane:
        mine = [event for event in timeline.events if event.lane is lane]
        assert all(a.ended <= b.started for a, b in itertools.pairwise(mine))
    assert list(timeline.ends) == sorted(timeline.ends)


@hypothesis.given(policy=policies, new=st.integers(1, 3))
@hypothesis.settings(max_examples=20, deadline=None)
def test_where_lanes_share_nothing_both_clocks_say_the_same(policy: Policy, new: int) -> None:
    shape = ModelShape.from_config(
        {"num_hidden_layers": 3, "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 99}
    )
    run = PlannedRun(shape, preset("t4"), policy, Workload(8, new))
    sweeps = every_sweep(run)
    ended: list[dict[StepId, tuple[float, float]]] = []
    for clock in (Clock({}), SharingClock(run.hardware, {})):
        events: list[Event] = []
        for steps in steps_of(run, sweeps):
            events += clock.sweep(steps, lambda step: run.seconds(step, sweeps[step.id.sweep]), 1e-4)
        events += clock.finish()
        ended.append({event.step.id: (event.started, event.ended) for event in events})
    assert ended[0].keys() == ended[1].keys()
    assert all(ended[0][name] == pytest.approx(ended[1][name]) for name in ended[0])


def test_lanes_that_take_cores_share_them() -> None:
    """Casts and products take longer side by side than alone, and never longer than one after the other."""
    alone = preset("cpu2")
    policy = Policy.parse("0 100 0 100 0 100", batch_size=4, num_batches=4)
    seconds = {}
    for threads in (0, 1, 2):
        hardware = dataclasses.replace(alone, cores=2 if threads else 0, threads=max(1, threads))
        run = PlannedRun(large(policy).shape.in_dtype("float32"), hardware, policy, Workload(128, 16))
        seconds[threads] = simulate(run).decode_s
        lanes = run.lanes(Sweep(1, 128))
        assert lanes[Lane.HOST_TO_DEVICE] > 0
        assert seconds[threads] >= 0.99 * 15 * hardware.shared_s(lanes)
        assert seconds[threads] >= 0.9 * predict(run).decode_s
        assert seconds[threads] <= 1.02 * (15 * (sum(lanes.values()) + run.between_s))
    assert seconds[0] == pytest.approx(seconds[1])  # two cores for two threads
    assert seconds[2] > 1.05 * seconds[0]


def large(policy: Policy, hardware: str = "t4", gen_len: int = 16, name: str = "opt") -> PlannedRun:
    fields = {"num_hidden_layers": 24, "hidden_size": 2048, "num_attention_heads": 32, "vocab_size": 50272}
    return PlannedRun(ModelShape.from_config(fields), preset(hardware), policy, Workload(128, gen_len))


@hypothesis.given(policy=policies)
@hypothesis.settings(max_examples=30, deadline=None)
def test_the_closed_form_is_the_simulation_nearly(policy: Policy) -> None:
    """No lane can end before its own work; with many micro-batches there is always something to do."""
    run = large(policy.replace(batch_size=16, num_batches=4, layer_slots=2))
    fast, exact = predict(run), simulate(run)
    for lane in Lane:
        assert fast.prefill_lanes[lane] == pytest.approx(exact.prefill_lanes[lane], rel=0.02, abs=1e-9)
        assert fast.decode_lanes[lane] == pytest.approx(exact.decode_lanes[lane], rel=0.02, abs=0.02)
    assert fast.seconds <= exact.seconds * 1.02
    assert exact.seconds <= fast.seconds * 1.4


@pytest.mark.parametrize("way_of", ["t4", "cpu2"])
@pytest.mark.parametrize("batches", [1, 4])
def test_of_experts_those_are_simulated_that_a_block_is_expected_to_choose(way_of: str, batches: int) -> None:
    """Each is loaded and computed once; the closed form has the same work."""
    shape = ModelShape.from_config(shape_fields("mixtral-0.8b"))
    policy = Policy.parse("20 30 0 100 0 100", batch_size=4 // batches, num_batches=batches)
    run = PlannedRun(shape, preset(way_of), policy, Workload(64, 16), pieces=4)
    prompt, token = steps_of(run, [Sweep(64, 0), Sweep(1, 64)])
    for steps, count in ((prompt, 8), (token, round(8 * (1 - 0.75**4)))):
        computed = [s.id for s in steps if s.id.what is What.EXPERT and s.id.lane is Lane.COMPUTE]
        assert len(computed) == len(set(computed)) == 8 * count
        loaded = {(s.id.stage, s.id.batch) for s in steps if s.id.what is What.EXPERT and s.id.lane is not Lane.COMPUTE}
        assert loaded <= {(name.stage, name.batch) for name in computed}
    fast, exact = predict(run), simulate(run)
    for lane in Lane:
        assert fast.decode_lanes[lane] == pytest.approx(exact.decode_lanes[lane], rel=0.02, abs=0.02)
    assert fast.seconds <= exact.seconds * 1.02


def test_a_lane_that_is_twice_as_fast_takes_half() -> None:
    policy = Policy.parse("0 0 0 100 0 100", batch_size=8, num_batches=4)
    run = large(policy)
    fast = dataclasses.replace(preset("t4"), disk_to_host=preset("t4").disk_to_host.__class__(((1, 5300e6),)))
    faster = PlannedRun(run.shape, fast, policy, run.workload)
    assert predict(run).bottleneck is Lane.DISK_TO_HOST
    assert predict(faster).decode_s == pytest.approx(predict(run).decode_s / 2, rel=0.05)


def test_a_single_token_needs_no_decode() -> None:
    made = simulate(large(Policy(), gen_len=1))
    assert made.decode_s == 0 == sum(made.decode_lanes.values())
    assert made.tokens_per_s == pytest.approx(8 / made.prefill_s)


def test_without_overlap_lanes_add_up() -> None:
    policy = Policy.parse("0 100 0 100 0 100", batch_size=8, num_batches=2)
    together, apart = (simulate(large(policy.replace(overlap=on))) for on in (True, False))
    assert apart.decode_s > together.decode_s
    assert apart.decode_s >= sum(apart.decode_lanes.values())


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_can_be_simulated(name: str) -> None:
    made: Prediction = simulate(large(Policy.parse("0 50 0 50 0 50", batch_size=8, num_batches=2), name))
    assert made.tokens_per_s > 0
    assert set(made.peak_bytes) == set(Tier)


def test_steps_of_weights_are_the_pieces_of_the_layout() -> None:
    run = large(Policy.parse("0 50 100 0 100 0", batch_size=8))
    (steps,) = steps_of(run, [Sweep(128, 0)])
    moved = [step.id for step in steps if step.id.what is What.WEIGHTS]
    assert len(moved) == sum(sum(piece.route) for stage in run.layout.stages for piece in stage)


def test_a_limited_disk_makes_up_for_what_it_did_not_use() -> None:
    """With one layer slot the disk waits for compute; what it missed it may read faster, but not of long ago."""
    read = Step(StepId(0, Lane.DISK_TO_HOST, What.WEIGHTS, 0), ())
    throttle = Throttle(lambda _: 0.01)
    assert throttle.seconds(read, 5.0, 0.05) == pytest.approx(0.05)
    assert throttle.seconds(read, 5.05, 0.05) == pytest.approx(0.05), "at once"
    assert throttle.seconds(read, 5.13, 0.05) == pytest.approx(0.02), "0.03 s were left"
    assert throttle.seconds(read, 5.24, 0.05) == pytest.approx(0.01), "no faster than the disk is"
    assert throttle.seconds(read, 9.0, 0.05) == pytest.approx(0.05), "long ago"


@pytest.mark.parametrize("factor", [0.5, 1.0, 2.0])
def test_a_simulated_limit_is_one_on_average(factor: float) -> None:
    """Without overlap the disk reads at its full speed what the limit left over while a layer was computed."""
    policy = Policy.parse("0 0 0 100 0 100", batch_size=1, num_batches=1, overlap=False)
    shape = ModelShape.from_config(
        {"num_hidden_layers": 4, "hidden_size": 256, "num_attention_heads": 4, "vocab_size": 99}
    )
    workload = Workload(8, 9)
    run = PlannedRun(shape, preset("cpu2"), policy, workload)
    full = simulate(run)
    [_, decode] = run.sweeps()
    assert decode is not None
    read = 8 * sum(piece.read * count for piece, count in run.pieces(decode).items())
    rate = factor * read / full.decode_s
    limited = simulate(PlannedRun(shape, preset("cpu2").with_disk_limit(rate, None), policy, workload))
    at_least = max(full.decode_s, read / rate)
    assert at_least * 0.95 <= limited.decode_s <= at_least * 1.1


@pytest.mark.parametrize("weights", ["0 0", "0 100"])
def test_the_first_sweep_uses_memory_for_the_first_time(weights: str) -> None:
    """As many bytes as its cells, slots and hidden states take; later sweeps use the same ones again."""
    policy = Policy.parse(f"{weights} 0 100 0 100", batch_size=2, num_batches=3, layer_slots=1)
    shape = ModelShape.from_config(
        {"num_hidden_layers": 12, "hidden_size": 256, "num_attention_heads": 4, "vocab_size": 99}
    ).in_dtype("float32")
    workload = Workload(64, 5)
    runs = [
        PlannedRun(shape, dataclasses.replace(preset("cpu2"), fresh_bytes_per_s=speed, cores=cores), policy, workload)
        for cores in (0, 2)
        for speed in (0.0, 1e6)
    ]
    for usual, fresh in zip(runs[::2], runs[1::2], strict=True):
        assert not any(usual.fresh_s.values())
        added = {lane: seconds for lane, seconds in fresh.fresh_s.items() if seconds}
        cells = sum(need.nbytes for need in fresh.demand.needs(policy, fresh.call) if need.what == "KV cache")
        assert added[Lane.COMPUTE] >= cells / 1e6 > 0
        assert (Lane.DISK_TO_HOST in added) == (weights == "0 0")
        for predicted in (simulate, predict):
            before, after = predicted(usual), predicted(fresh)
            assert after.decode_s == pytest.approx(before.decode_s)
            assert max(before.prefill_s, *added.values()) <= after.prefill_s * 1.001
            assert after.prefill_s <= 1.001 * before.prefill_s + 2 * sum(added.values())
            for lane in Lane:
                grown = after.prefill_lanes[lane] - before.prefill_lanes[lane]
                assert grown == pytest.approx(added.get(lane, 0.0), rel=0.01, abs=1e-6) or fresh.hardware.cores
