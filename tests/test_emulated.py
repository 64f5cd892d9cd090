"""The engine on a device with an address space, a capacity and links of its own."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from flexgen_hf import CapacityError, FlexGenForCausalLM, Policy, UnsupportedModelError
from flexgen_hf.bench import emulated

from .checkpoints import opt_config, write_random_checkpoint


@pytest.fixture(autouse=True)
def device() -> Iterator[torch.device]:
    """The device without limits; other tests of this process compute on the CPU all the same."""
    made = emulated.install()
    emulated.configure()
    yield made
    emulated.configure()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    write_random_checkpoint(path, opt_config(), dtype=torch.float32)
    return path


def prompts() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)
    lengths = [3, 7, 5, 2, 9, 4, 6]
    ids = torch.randint(3, 90, (len(lengths), max(lengths)), generator=generator)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        mask[row, -length:] = 1
    return {"input_ids": ids.where(mask.bool(), torch.ones_like(ids)), "attention_mask": mask}


MODES: dict[str, dict[str, Any]] = {"greedy": {"do_sample": False}, "beams": {"do_sample": False, "num_beams": 3}}


def load(folder: Path, tmp_path: Path, policy: Policy, **options: Any) -> Any:
    return FlexGenForCausalLM.from_pretrained(
        folder, policy=policy, offload_folder=tmp_path, device="emulated:0", **options
    )


PERCENTS = ["100 0 100 0 100 0", "0 100 0 100 0 100", "0 0 0 0 0 0", "30 30 30 30 30 30", "0 50 50 0 0 50"]


@pytest.mark.parametrize(
    ("percents", "overlap", "mode"), list(itertools.product(PERCENTS, [True, False], MODES)), ids=str
)
def test_the_same_tokens_as_transformers(folder: Path, tmp_path: Path, percents: str, overlap: bool, mode: str) -> None:
    from transformers import AutoModelForCausalLM

    plain: Any = AutoModelForCausalLM.from_pretrained(folder)
    want = plain.generate(**prompts(), max_new_tokens=6, **MODES[mode])
    policy = Policy.parse(percents, batch_size=2, num_batches=3, overlap=overlap)
    with load(folder, tmp_path, policy) as model:
        got = model.generate(**prompts(), max_new_tokens=6, **MODES[mode])
    assert torch.equal(got.cpu(), want)


def test_nothing_stays_on_the_device(folder: Path, tmp_path: Path) -> None:
    gc.collect()
    before = emulated.configure().used_bytes
    with load(folder, tmp_path, Policy.parse("50 50 50 50 50 50", batch_size=2, num_batches=4)) as model:
        model.generate(**prompts(), max_new_tokens=4)
    del model
    gc.collect()
    assert emulated.configure().used_bytes == before


def test_a_full_device_is_an_error_that_leaves_the_model_usable(folder: Path, tmp_path: Path) -> None:
    policy = Policy.parse("100 0 100 0 100 0", batch_size=7)
    with load(folder, tmp_path, policy) as model:
        emulated.configure(capacity_bytes=emulated.configure().used_bytes + 1000)
        with pytest.raises(CapacityError, match="emulated device"):
            model.generate(**prompts(), max_new_tokens=4)
        emulated.configure()
        assert model.generate(**prompts(), max_new_tokens=4).shape == (7, 13)


def test_a_budget_is_refused_before_work_starts(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CapacityError, match="raise max_memory"):
        load(folder, tmp_path, Policy.parse("100 0 100 0 100 0"), max_memory={0: 1000})


def test_streamed_weights_cross_the_link_once_per_sweep(folder: Path, tmp_path: Path) -> None:
    with load(folder, tmp_path, Policy.parse("0 100 100 0 100 0", batch_size=2, num_batches=4)) as model:
        counted = emulated.configure()
        model.generate(**prompts(), max_new_tokens=1, min_new_tokens=1)
        once = model.last_run.to_dict()["lanes"]["host_to_device"]["bytes"]
        model.generate(**prompts(), max_new_tokens=5, min_new_tokens=5)
        layers = model.last_run.to_dict()["lanes"]["host_to_device"]["bytes"] / 5
    streamed = model.last_run.to_dict()["placement"]["weights"]["host"]
    assert once == streamed  # the tied table too: the first sweep loads it
    assert layers < streamed  # later ones find it where it is
    assert counted.to_device.bytes >= once


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["opt", "llama"])
def test_attention_on_the_host_gives_the_same_tokens(tmp_path: Path, kind: str, mode: str) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig

    sizes: dict[str, Any] = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3}  # grouped queries
    config = opt_config() if kind == "opt" else LlamaConfig(**sizes)
    write_random_checkpoint(tmp_path / kind, config, dtype=torch.float32)
    plain: Any = AutoModelForCausalLM.from_pretrained(tmp_path / kind)
    want = plain.generate(**prompts(), max_new_tokens=6, **MODES[mode])
    counted = {}
    for attends in (True, False):
        policy = Policy.parse("100 0 0 70 100 0", batch_size=2, num_batches=3, host_attention=attends)
        with load(tmp_path / kind, tmp_path, policy) as model:
            assert torch.equal(model.generate(**prompts(), max_new_tokens=6, **MODES[mode]).cpu(), want)
            counted[attends] = model.last_run.to_dict()["lanes"]["host_to_device"]["bytes"]
    assert counted[True] < counted[False] / 2  # only cells on disk are moved to the device


def test_a_family_that_cannot_attend_on_the_host_is_refused_by_name(tmp_path: Path) -> None:
    from transformers import BloomConfig

    config = BloomConfig(vocab_size=97, hidden_size=32, n_layer=2, n_head=4)
    write_random_checkpoint(tmp_path / "bloom", config, dtype=torch.float32)
    with pytest.raises(UnsupportedModelError, match="host_attention: BloomForCausalLM cannot"):
        load(tmp_path / "bloom", tmp_path, Policy.parse("0 100 0 100 0 100", host_attention=True))


def test_mixing_with_host_tensors_raises() -> None:
    with pytest.raises(RuntimeError, match="meets device tensors"):
        torch.ones(3, device="emulated:0") + torch.ones(3)


def test_capacity_follows_the_life_of_tensors() -> None:
    gc.collect()  # models of other tests that an error still holds
    before = emulated.configure().used_bytes
    device = emulated.configure(capacity_bytes=before + 4000)
    tensor = torch.zeros(500, device="emulated:0")
    view = tensor[:10].view(2, 5)
    with pytest.raises(torch.OutOfMemoryError):
        torch.zeros(600, device="emulated:0")
    del tensor
    assert device.used_bytes == before + 2000
    del view
    assert device.used_bytes == before


def test_a_link_takes_its_time() -> None:
    device = emulated.configure(to_device=10_000_000)
    torch.zeros(250_000).to("emulated:0")
    assert device.to_device.bytes == 1_000_000
    assert device.to_device.busy_s >= 0.1


def test_attention_takes_no_room_for_its_scores() -> None:
    tokens, attend = 512, torch.nn.functional.scaled_dot_product_attention
    query, key, value = (torch.randn(1, 4, tokens, 8, device="emulated:0") for _ in range(3))
    mask = torch.ones(1, 1, tokens, tokens, dtype=torch.bool, device="emulated:0")
    device = emulated.configure()
    held = device.used_bytes
    output = attend(query, key, value, attn_mask=mask)
    expected = attend(query.cpu(), key.cpu(), value.cpu(), attn_mask=mask.cpu())
    torch.testing.assert_close(output.cpu(), expected)
    assert device.peak_bytes - held < tokens * tokens * 4  # one head's scores
    with pytest.raises(RuntimeError, match="meets device tensors"):
        attend(query, key.cpu(), value)
