"""What the cost model says of bytes is what a run takes, from the configuration alone; seconds add up."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, LlamaConfig, MixtralConfig, OPTConfig

from flexgen_hf import Compression, Placement, Policy, PolicyError, Tier
from flexgen_hf.bench.shapes import shape_fields, write_random_checkpoint
from flexgen_hf.planning.budget import PINNED_BYTES, pages
from flexgen_hf.planning.cost import PlannedRun, predict
from flexgen_hf.planning.hardware import Hardware, constant
from flexgen_hf.planning.presets import preset
from flexgen_hf.planning.schedule import Lane, What
from flexgen_hf.planning.shape import ModelShape, read_config
from flexgen_hf.planning.simulate import every_sweep, steps_of
from flexgen_hf.planning.workload import Sweep, Workload

from .comparison import save_tiny
from .test_families import FAMILIES
from .tiny import batch, greedy, load, pretend_accelerator

POLICIES = [
    Policy(batch_size=4, num_batches=2),
    Policy.parse("0 0 0 0 0 0", batch_size=3, num_batches=2),
    Policy.parse("30 40 20 50 0 100", batch_size=4, num_batches=2),
    Policy.parse("0 100 0 100 0 100", batch_size=4, num_batches=2, compression=Compression(cache=4)),
    Policy.parse("0 50 0 0 0 100", batch_size=8, num_batches=1, layer_slots=1),
    Policy.parse("50 0 100 0 100 0", batch_size=2, num_batches=3, overlap=False),
]


@pytest.fixture(scope="module", params=["OPT", "Llama in 16 bit", "Mixtral in 16 bit"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Large enough for pages to be small beside what lies in them."""
    sizes: dict[str, Any] = {"vocab_size": 1000, "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
    if request.param == "OPT":
        config: Any = OPTConfig(**sizes, word_embed_proj_dim=128, ffn_dim=512, max_position_embeddings=128)
        return write_random_checkpoint(tmp_path_factory.mktemp("model"), config, torch.float32)
    sizes |= {"intermediate_size": 344, "num_key_value_heads": 2, "max_position_embeddings": 128}
    config = LlamaConfig(**sizes) if request.param.startswith("Llama") else MixtralConfig(**sizes, num_local_experts=4)
    return write_random_checkpoint(tmp_path_factory.mktemp("model"), config, torch.float16)


@pytest.fixture(params=["direct", "pushed"])
def way(request: pytest.FixtureRequest) -> Iterator[Hardware]:
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "pushed":
            pretend_accelerator(patch)
        yield preset("cpu2" if request.param == "direct" else "t4")


def test_peaks_are_never_below_those_of_a_run_and_little_above(checkpoint: Path, way: Hardware, tmp_path: Path) -> None:
    shape = ModelShape.from_config(read_config(checkpoint)).in_dtype("float32")
    for policy in POLICIES:
        with load(checkpoint, tmp_path, policy) as model:
            prompts = batch(policy.block_size, 40)
            model.generate(**prompts, max_new_tokens=8, min_new_tokens=8, do_sample=False)
            taken = model.last_run.peak_bytes
        said = PlannedRun(shape, way, policy, Workload(40, 8)).peak_bytes
        said[Tier.HOST] -= 0 if way.direct else PINNED_BYTES  # this accelerator is none, and has no link
        assert all(taken[tier] <= said[tier] for tier in Tier), (policy, taken, said)
        assert all(said[tier] <= 1.15 * taken[tier] for tier in Tier), (policy, taken, said)


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3_text"])
@pytest.mark.parametrize(("window", "tokens"), [(4, 9), (18, 7), (18, 29)])
def test_of_windows_as_many_bytes_pass_each_lane_as_in_a_run(
    family: str, window: int, tokens: int, way: Hardware, tmp_path: Path
) -> None:
    """Loads in each sweep; what is written, with windows that move to the front, in all of them together."""
    config = AutoConfig.for_model(**{**FAMILIES[family], "model_type": family, "sliding_window": window})
    folder = save_tiny(config, tmp_path / "model", std=0.25)
    policy = Policy.parse("100 0 30 30 100 0", batch_size=2, num_batches=2)
    prompts = {"input_ids": torch.arange(4, 4 + 4 * tokens).reshape(4, tokens) % 90 + 4}
    with load(folder, tmp_path / "offload", policy) as model:
        greedy(model, prompts, 22)
        uses = {Lane(lane): use.events for lane, use in model.last_run.lanes.items()}
    moved: collections.Counter[tuple[Lane, int]] = collections.Counter()
    said: dict[tuple[Lane, int], float] = collections.defaultdict(float)
    for lane, events in uses.items():
        for event in events:
            if event.name.what is What.CACHE:
                moved[lane, event.name.sweep] += event.bytes
    shape = ModelShape.from_config(read_config(folder)).in_dtype("float32")
    planned = PlannedRun(shape, way, policy, Workload(tokens, 22, 4))
    sweeps = every_sweep(planned)
    for number, steps in enumerate(steps_of(planned, sweeps)):
        for step in steps:
            if step.id.what is What.CACHE:
                layer, rows = shape.layers[step.id.stage - 1], planned.batches[step.id.batch]
                passed = planned.cell_tokens(step.id.lane, layer, rows, sweeps[number])
                said[step.id.lane, number] += passed * shape.kept_bytes(policy.compression)
    assert {lane for lane, _ in moved} == set(Lane) - {Lane.COMPUTE} - ({*_LINKS} if way.direct else set())
    assert all(moved[key] == said[key] for key in moved if key[0] is not Lane.HOST_TO_DISK)
    written = [sum(n for (lane, _), n in c.items() if lane is Lane.HOST_TO_DISK) for c in (moved, said)]
    assert written[0] == pytest.approx(written[1])


_LINKS = (Lane.HOST_TO_DEVICE, Lane.DEVICE_TO_HOST)
OPT = {"num_hidden_layers": 24, "hidden_size": 2048, "num_attention_heads": 32, "vocab_size": 50272}


def run(policy: Policy, hardware: str = "t4", workload: Workload = Workload(128, 32)) -> PlannedRun:  # noqa: B008
    return PlannedRun(ModelShape.from_config(OPT), preset(hardware), policy, workload)


def test_seconds_of_lanes_are_bytes_over_speeds() -> None:
    planned = run(Policy.parse("0 0 0 100 0 100", batch_size=8, num_batches=4))
    weights = sum(tensor.stored_bytes for tensor in planned.tensors if tensor.moves and tensor.stage)  # the table stays
    lanes = planned.lanes(Sweep(1, 128))
    assert lanes[Lane.DISK_TO_HOST] == pytest.approx(weights / 2650e6, rel=0.02)
    cache = 24 * 32 * 128 * 4 * 2048
    hidden = 23 * 32 * 2048 * 2
    assert lanes[Lane.HOST_TO_DEVICE] == pytest.approx((weights + cache + hidden) / (12.89 * 2**30), rel=0.1)
    assert lanes[Lane.HOST_TO_DISK] == 0


def test_a_product_is_no_faster_than_its_matrix_is_read() -> None:
    one, many = (run(Policy(batch_size=size), workload=Workload(1, 2)).layer_s(1, size, Tier.DEVICE, Sweep(1, 1))
                 for size in (1, 64))  # fmt: skip
    assert one == pytest.approx(24 * 2048**2 / 220e9, rel=0.01)
    assert many < 1.2 * one


def test_attention_on_the_host_moves_no_cache() -> None:
    moved, stays = (run(Policy.parse("100 0 0 100 100 0", batch_size=8, host_attention=on)) for on in (False, True))
    decode = Sweep(1, 128)
    assert stays.lanes(decode)[Lane.HOST_TO_DEVICE] == 0 < moved.lanes(decode)[Lane.HOST_TO_DEVICE]
    assert stays.lanes(decode)[Lane.COMPUTE] > moved.lanes(decode)[Lane.COMPUTE]


def test_of_experts_those_are_read_that_a_block_is_expected_to_choose() -> None:
    shape = ModelShape.from_config(shape_fields("mixtral-0.8b"))
    (layer,) = set(shape.layers)
    apart = shape.num_parameters - 8 * 8 * layer.expert_elements
    for rows, experts in ((1, 2), (2, 4), (64, 8)):
        policy = Policy.parse("0 0 100 0 100 0", batch_size=rows)
        planned = PlannedRun(shape, preset("cpu2"), policy, Workload(128, 32))
        pieces = [piece for stage in planned.layout.stages for piece in stage]
        chosen = planned.chosen(1, 1, Sweep(1, 128))
        pieces += [piece for expert in chosen for piece in planned.layout.experts[1][expert]] * 8
        assert len(chosen) == experts
        assert sum(p.read for p in pieces) == pytest.approx(2 * (apart + 8 * experts * layer.expert_elements), rel=1e-3)
        lanes = planned.lanes(Sweep(1, 128))
        link = preset("cpu2").link(Lane.DISK_TO_HOST)
        assert lanes[Lane.DISK_TO_HOST] == pytest.approx(sum(p.read for p in pieces) / link.at(1 << 30), rel=0.2)


def test_compression_trades_bytes_for_unpacking() -> None:
    plain = run(Policy.parse("0 0 0 0 100 0", batch_size=8, num_batches=2))
    packed = run(plain.policy.replace(compression="4bit"))
    decode = Sweep(1, 128)
    ratio = packed.lanes(decode)[Lane.DISK_TO_HOST] / plain.lanes(decode)[Lane.DISK_TO_HOST]
    assert 0.28 < ratio < 0.40  # 4.5 of 16 bits, and the tables are not quantized
    assert predict(packed).peak_bytes[Tier.DISK] < 0.4 * predict(plain).peak_bytes[Tier.DISK]


def test_a_block_is_no_larger_than_the_work() -> None:
    assert run(Policy(batch_size=8, num_batches=4), workload=Workload(8, 2, 13)).batches == [8, 5]


def test_micro_batches_leave_padding_out() -> None:
    workload = Workload(128, 32, lengths=(128, 70, 64, 100, 90, 80))
    assert workload.paddings([2, 2, 2]) == [0, 128 - 90, 128 - 70]
    assert workload.paddings([6]) == [0]
    assert workload.paddings([4, 4]) == [0, 0]  # more rows than is known of
    policy = Policy.parse("0 100 0 0 100 0", batch_size=2, num_batches=3)
    ragged, equal = (run(policy, workload=w) for w in (workload, Workload(128, 32)))
    for sweep in (Sweep(128, 0), Sweep(1, 128)):
        saved = {
            lane: ragged.lanes(sweep)[lane] / equal.lanes(sweep)[lane] for lane in (Lane.HOST_TO_DISK, Lane.COMPUTE)
        }
        assert saved[Lane.COMPUTE] <= 1
        assert saved[Lane.HOST_TO_DISK] == pytest.approx(1 if sweep.past else (128 + 90 + 70) / 3 / 128, rel=0.05)
    assert ragged.peak_bytes == equal.peak_bytes
    on_disk = dataclasses.replace(policy, hidden=Placement.all_on(Tier.DISK))
    short, long = (run(on_disk, workload=w).peak_bytes[Tier.DISK] for w in (workload, Workload(128, 32)))
    token = 2 * ragged.shape.hidden_size * ragged.shape.itemsize  # of the two rows of a micro-batch
    assert long - short == sum(pages(128 * token) - pages(tokens * token) for tokens in (90, 70))


def test_tiles_cost_what_was_measured_of_them() -> None:
    policy = Policy.parse("0 0 0 100 0 100", batch_size=8, compression=Compression(weights=4))
    shape = ModelShape.from_config(OPT).in_dtype("float32")
    plain = preset("cpu2")
    tiled = dataclasses.replace(plain, packed_flops=constant(1e9), cast_flops=constant(2e9))
    packed, cast = (
        PlannedRun(shape, tiled, p, Workload(128, 32)) for p in (policy, policy.replace(compression=Compression()))
    )
    flops = 2 * 8 * 12 * 2048**2
    around = plain.compute_s + packed.attention_s(shape.layers[0], 8, Tier.HOST, Sweep(1, 1))
    assert packed.layer_s(1, 8, Tier.HOST, Sweep(1, 1)) == pytest.approx(flops / 1e9 + around, rel=0.01)
    assert cast.layer_s(1, 8, Tier.HOST, Sweep(1, 1)) == pytest.approx(flops / 2e9 + around, rel=0.01)
    assert cast.head_s() == pytest.approx(2 * 8 * 2048 * 50272 / 2e9, rel=0.01)
    slow = dataclasses.replace(tiled, tile_s=1.0)
    for policy, made in ((packed.policy, packed), (cast.policy, cast)):
        other = PlannedRun(shape, slow, policy, Workload(128, 32))
        assert other.layer_s(1, 8, Tier.HOST, Sweep(1, 1)) - made.layer_s(1, 8, Tier.HOST, Sweep(1, 1)) == (
            pytest.approx(6, rel=0.01)
        )
        assert other.head_s() - made.head_s() == pytest.approx(1)


def test_a_speed_that_is_not_known_is_refused() -> None:
    policy = Policy(cache=Placement(host=1.0), host_attention=True)
    with pytest.raises(PolicyError, match="speed on Apple M2 Max"):
        run(policy, "m2max").lanes(Sweep(1, 128))


@pytest.mark.parametrize("field", ["prompt_len", "gen_len", "num_prompts"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True])
def test_a_workload_that_cannot_be_meant_is_refused(field: str, value: Any) -> None:
    with pytest.raises(PolicyError, match=f"workload: {field}="):
        Workload(**{"prompt_len": 1, "gen_len": 1, field: value})
