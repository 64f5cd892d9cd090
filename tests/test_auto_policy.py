"""`policy="auto"`: plans that run, hold their budgets, follow what is asked, and say why; machines measured once."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from flexgen_hf import (
    CapacityError,
    Compression,
    FlexGenForCausalLM,
    Policy,
    PolicyError,
    Tier,
    profile_cache,
    profiling,
)
from flexgen_hf.bench import emulated
from flexgen_hf.planning.budget import rings_of
from flexgen_hf.planning.hardware import Hardware, constant
from flexgen_hf.planning.presets import preset
from tests.tiny import batch, greedy, reference, write_tiny_opt

CPU = preset("cpu2")
CARD = preset("t4")
MIB = 1 << 20


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_opt(tmp_path_factory.mktemp("model"), max_position_embeddings=600)


@pytest.fixture(scope="module")
def in_16_bit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_opt(tmp_path_factory.mktemp("model"), torch.float16, max_position_embeddings=600)


@pytest.fixture(scope="module")
def offload(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("offload")


@pytest.fixture(autouse=True)
def no_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(*_: Any) -> Hardware:
        raise AssertionError("a machine is measured in a test that gives one")

    monkeypatch.setattr(profile_cache, "measure", measured)


@pytest.fixture(scope="module", autouse=True)
def a_device() -> Iterator[None]:
    emulated.install()
    emulated.configure()
    yield
    emulated.configure()


def load(folder: Path, offload: Path, device: str = "cpu", **options: Any) -> Any:
    hardware = CPU if device == "cpu" else CARD
    options = {"policy": "auto", "hardware": hardware, "dtype": torch.float32, "device": device, **options}
    return FlexGenForCausalLM.from_pretrained(folder, offload_folder=offload, **options)


def tokens_of(model: Any, prompts: dict[str, Any], **settings: Any) -> torch.Tensor:
    settings = {"max_new_tokens": 5, "pad_token_id": 1, "do_sample": False, **settings}
    there = {name: value.to(model.device) for name, value in prompts.items()}
    torch.manual_seed(3)
    output: torch.Tensor = model.generate(**there, **settings)
    return output.cpu()


def said_in(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Our lines on stderr since this was asked last."""
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("flexgen_hf: ")]


# ------------------------------------------------------------------------------------------------------- what it finds
def test_the_plan_is_said_once_for_load_and_again_for_what_is_asked(
    checkpoint: Path, offload: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING), load(checkpoint, offload, workload={"batch": 4, "prompt_len": 6}) as model:
        (line,) = said_in(capsys)
        assert line.startswith("flexgen_hf: plan for 4 sequences of 6 + 128 tokens on ")
        assert "everything fits on the device without offloading" in caplog.text
        assert model.plan.policy == model.policy
        assert model.plan.why[0].startswith("in prefill, ")
        assert model.plan.policy.block_size == 4
        greedy(model, batch(7), 4)
        assert model.plan.policy == model.policy == model.last_run.policy
        assert model.policy.block_size >= 7
        (line,) = said_in(capsys)
        assert line.startswith("flexgen_hf: plan for 7 sequences of 6 + 4 tokens on ")
        greedy(model, batch(7, seed=1), 4)
        assert not said_in(capsys)


def test_what_is_said_can_be_silenced(
    checkpoint: Path, offload: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FlexGenForCausalLM, "show_plan", False)
    with load(checkpoint, offload) as model:
        assert model.plan is not None
    assert not said_in(capsys)


def test_a_given_policy_has_no_plan(checkpoint: Path, offload: Path) -> None:
    with load(checkpoint, offload, policy=Policy(), hardware=None) as model:
        assert model.plan is None


def test_the_dict_of_the_quantizer_is_enough(checkpoint: Path, offload: Path) -> None:
    options = {
        "quant_method": "flexgen", "policy": "auto", "hardware": "cpu2", "workload": {"batch": 5}, "device": "cpu",
        "offload_folder": str(offload),
    }  # fmt: skip
    auto: Any = AutoModelForCausalLM.from_pretrained(checkpoint, quantization_config=options)
    with auto as model:
        assert model.plan.policy.block_size == 5


def test_what_is_given_is_kept(checkpoint: Path, offload: Path) -> None:
    with load(checkpoint, offload, batch_size=2, num_batches=3, compression={"cache": 4}) as model:
        assert (model.policy.batch_size, model.policy.num_batches) == (2, 3)
        assert torch.equal(tokens_of(model, batch(9)), tokens_of(model, batch(9)))
        assert (model.policy.batch_size, model.policy.num_batches) == (2, 3)
        assert model.policy.compression == Compression(cache=4)


def test_nothing_is_compressed_unless_it_is_allowed(in_16_bit: Path, offload: Path) -> None:
    slow_disk = dataclasses.replace(CPU, disk_to_host=constant(1e6))
    tight = {"cpu": 24 * MIB}
    with load(in_16_bit, offload, hardware=slow_disk, max_memory=tight) as model:
        assert not model.policy.compression
    with load(in_16_bit, offload, hardware=slow_disk, max_memory=tight, compression="any") as model:
        assert model.policy.compression.weights in (None, 4)
        tokens_of(model, batch(3))


def test_the_shortest_time_is_one_block_of_what_is_asked(checkpoint: Path, offload: Path) -> None:
    with load(checkpoint, offload, objective="latency") as model:
        assert model.policy.block_size == 1
        tokens_of(model, batch(3))
        assert model.plan.predicted.rows == 3


def test_the_largest_block_in_time(checkpoint: Path, offload: Path) -> None:
    with load(checkpoint, offload, objective="block", deadline_s=2.0) as model:
        assert model.plan.predicted.seconds <= 2.0
        assert model.policy.block_size > 32
    with pytest.raises(CapacityError, match="no block ends within"):
        load(checkpoint, offload, objective="block", deadline_s=1e-6)


def test_weights_move_where_that_pays(offload: Path, tmp_path: Path) -> None:
    """Loaded for a block that leaves little room for weights, asked for one that leaves much, behind a slow link."""
    wide: Any = {"hidden_size": 256, "word_embed_proj_dim": 256, "ffn_dim": 1024, "max_position_embeddings": 600}
    folder = write_tiny_opt(tmp_path / "model", num_hidden_layers=4, **wide)
    slow = dataclasses.replace(CARD, host_to_device=constant(4e6), disk_to_host=constant(4e6))
    options: Any = {"max_memory": {0: 80 * MIB, "cpu": 200 * MIB}, "batch_size": 8, "num_batches": 1}
    declared = {"batch": 8, "prompt_len": 500, "max_new_tokens": 2}
    with load(folder, offload, "emulated:0", hardware=slow, workload=declared, **options) as model:
        before, prompts = model.policy.weights, batch(2)
        assert before.device < 1
        plain = reference(folder)
        settings = {"max_new_tokens": 20, "min_new_tokens": 20}
        assert torch.equal(tokens_of(model, prompts, **settings), tokens_of(plain, prompts, **settings))
        assert model.policy.weights.device == 1
        assert model.last_run.placement["weights"][Tier.DEVICE] == sum(t.stored_bytes for t in model.stored_weights)
        for mode in ({"num_beams": 2}, {"do_sample": True}):
            assert torch.equal(tokens_of(model, prompts, **mode), tokens_of(plain, prompts, **mode))


@pytest.mark.parametrize("one_batch", [True, False])
def test_weights_that_move_on_a_cpu_change_their_form(in_16_bit: Path, offload: Path, one_batch: bool) -> None:
    """In 16 bit they are cast tile by tile for one micro-batch, and on their way for more: tokens stay the same."""
    loaded, then = (1, 2) if one_batch else (2, 1)
    with load(in_16_bit, offload, batch_size=4, num_batches=loaded) as model:
        placing, prompts = model._auto.placing, batch(6)
        spread = Policy.parse("30 30 100 0 100 0", batch_size=4, num_batches=then)
        model._auto = None
        for policy in (spread, spread.replace(weights=model.policy.weights)):
            place = functools.partial(placing.store, policy.weights, rings_of(policy), one_batch=then == 1)
            with model._executor.session():
                model._executor.adopt(policy, place)
            model._account.adopt(policy, placing.demand_of(policy))
            assert torch.equal(tokens_of(model, prompts), tokens_of(reference(in_16_bit), prompts))


def test_a_given_cache_goes_on_in_its_own_blocks(checkpoint: Path, offload: Path) -> None:
    with load(checkpoint, offload) as model:
        prompts = batch(3)
        first = greedy(model, prompts, 3)
        policy = model.policy
        ids = first.sequences
        mask = torch.cat([prompts["attention_mask"], torch.ones(3, 3, dtype=torch.long)], 1)
        more = model.generate(ids, attention_mask=mask, past_key_values=first.past_key_values, max_new_tokens=3,
                              do_sample=False, pad_token_id=1)  # fmt: skip
        assert model.policy == policy
    assert torch.equal(more, tokens_of(reference(checkpoint), prompts, max_new_tokens=6))


# ------------------------------------------------------------------------------------------------------------- budgets
@hypothesis.given(
    device_name=st.sampled_from(["cpu", "emulated:0"]),
    room=st.integers(17, 60),
    host=st.integers(2, 40),
    declared=st.tuples(st.integers(1, 40), st.integers(1, 60), st.integers(1, 40)),
    asked=st.tuples(st.integers(1, 9), st.integers(2, 40), st.integers(1, 12)),
    mode=st.sampled_from([{}, {}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}]),
    halves=st.booleans(),
    compression=st.sampled_from([None, None, {"cache": 4}]),
)
@hypothesis.settings(
    max_examples=30,
    deadline=None,
    phases=[hypothesis.Phase.explicit, hypothesis.Phase.reuse, hypothesis.Phase.generate],  # shrinking takes minutes
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
def test_what_is_planned_is_never_refused_and_never_wrong(  # noqa: PLR0917  fixtures and what is drawn
    checkpoint: Path,
    in_16_bit: Path,
    offload: Path,
    device_name: str,
    room: int,
    host: int,
    declared: tuple[int, int, int],
    asked: tuple[int, int, int],
    mode: dict[str, Any],
    halves: bool,
    compression: dict[str, int] | None,
) -> None:
    """A budget is kept, or refused while loading; what a plan was found for is run, with transformers' tokens."""
    folder = in_16_bit if halves else checkpoint
    limits: dict[Any, int] = (
        {"cpu": (room + host) * MIB // 2} if device_name == "cpu" else {0: room * MIB // 2, "cpu": host * MIB}
    )
    workload = dict(zip(("batch", "prompt_len", "max_new_tokens"), declared, strict=True))
    options: dict[str, Any] = {"max_memory": limits, "workload": workload, "compression": compression}
    try:
        model = load(folder, offload, device_name, **options)
    except CapacityError:
        return
    with model:
        rows, tokens, new = asked
        prompts = batch(rows, tokens)
        plans: list[Any] = []
        searched = model._auto._searched

        def noted(*given: Any) -> Any:
            plans.append(searched(*given))
            return plans[-1]

        model._auto._searched = noted
        try:
            got = tokens_of(model, prompts, max_new_tokens=new, **mode)
        except CapacityError:
            assert not plans, f"refused though {plans[-1].policy} was found"
            return
        assert model.policy == model.plan.policy
        held = model.last_run.peak_bytes
        if device_name == "cpu":
            assert held[Tier.DEVICE] + held[Tier.HOST] <= limits["cpu"]
        else:
            assert held[Tier.DEVICE] <= limits[0]
            assert held[Tier.HOST] <= limits["cpu"]
        if not mode.get("do_sample") and compression is None:
            assert torch.equal(got, tokens_of(reference(folder), prompts, max_new_tokens=new, **mode))


# ---------------------------------------------------------------------------------------------------- what is refused
@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"hardware": "t5"}, PolicyError, "no preset 't5'"),
        ({"hardware": 3}, PolicyError, "is no machine"),
        ({"hardware": "t4"}, PolicyError, "a device apart"),
        ({"hardware": {"name": "x"}}, PolicyError, "is missing"),
        ({"workload": {"bach": 3}}, PolicyError, "did you mean 'batch'"),
        ({"workload": 3}, PolicyError, "is no mapping"),
        ({"workload": {"batch": 0}}, PolicyError, "num_prompts=0"),
        ({"workload": {"prompt_len": 590, "max_new_tokens": 30}}, PolicyError, "590 .* 30 tokens are more"),
        ({"objective": "speed"}, PolicyError, "'speed' is unknown"),
        ({"objective": "block"}, PolicyError, "belong together"),
        ({"batch_size": 0}, PolicyError, "batch_size=0"),
        ({"compression": "5bit"}, PolicyError, "'5bit' is unknown"),
        ({"max_memory": {"cpu": "1MiB"}}, CapacityError, "does not fit"),
        ({"policy": "0 0 0 0 0 0"}, PolicyError, "hardware: it says what policy='auto' is to find"),
        ({"policy": Policy(), "hardware": None, "compression": "any"}, PolicyError, "'any' is unknown"),
    ],
)  # fmt: skip
def test_errors_are_clear(
    checkpoint: Path, offload: Path, options: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        load(checkpoint, offload, **options)


# --------------------------------------------------------------------------------------------- a machine, measured once
@pytest.fixture
def assets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(profile_cache, "cached_assets_path", lambda *_, **__: tmp_path)
    return tmp_path


def test_this_machine_is_measured_once(
    checkpoint: Path, offload: Path, assets: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(profile_cache, "measure", functools.partial(profiling.measure, seconds=0.0))
    with load(checkpoint, offload, hardware=None) as model:
        tokens_of(model, batch(2))
        assert "measuring this machine once" in capsys.readouterr().err
    (file,) = assets.iterdir()
    assert Hardware.from_dict(json.loads(file.read_text())["hardware"]).direct
    with load(checkpoint, offload, hardware=None):
        assert "measuring" not in capsys.readouterr().err


def test_a_profile_is_made_anew_when_it_cannot_be_used(
    assets: Path, offload: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []

    def measure(*_: Any) -> Hardware:
        made.append("measured")
        return CPU

    monkeypatch.setattr(profile_cache, "measure", measure)
    here = torch.device("cpu"), offload

    def measured() -> int:
        made.clear()
        assert profile_cache.hardware_here(*here) == CPU
        return len(made)

    assert [measured(), measured()] == [1, 0]
    (file,) = assets.iterdir()
    whole = json.loads(file.read_text())
    broken = {**whole["hardware"], "disk_to_host": "fast"}
    for text in ("{", "[]", json.dumps({**whole, "hardware": broken}), json.dumps({**whole, "machine": {}})):
        file.write_text(text)
        assert [measured(), measured()] == [1, 0]
    threads = torch.get_num_threads()
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads + 1)
    assert [measured(), measured()] == [1, 0]


def test_a_profile_that_cannot_be_kept_is_no_error(
    offload: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(profile_cache, "measure", lambda *_: CPU)
    monkeypatch.setattr(profile_cache, "cached_assets_path", lambda *_, **__: tmp_path / "missing")
    assert profile_cache.hardware_here(torch.device("cpu"), offload) is CPU
    assert "cannot be kept" in caplog.text


def test_a_machine_is_known_by_what_speeds_depend_on(tmp_path: Path) -> None:
    machine = profile_cache.machine_of(torch.device("cpu"), tmp_path / "not" / "made" / "yet")
    assert machine == json.loads(json.dumps(machine))
    assert machine["torch"] == torch.__version__
    assert machine["disk"]
    assert machine != profile_cache.machine_of(torch.device("cpu:0"), tmp_path)
