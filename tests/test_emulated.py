"""The engine on a device with an address space, a capacity and links of its own."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from flexgen_hf import CapacityError, Policy, UnsupportedModelError
from flexgen_hf.bench import emulated
from flexgen_hf.executor import Executor

from .checkpoints import opt_config, write_random_checkpoint
from .comparison import BEAMS, GREEDY, SAMPLING, load_ours, load_plain, put, ragged, same_tokens, save_tiny


@pytest.fixture(autouse=True)
def device() -> Iterator[torch.device]:
    """The first of two devices, both without limits; other tests of this process compute on the CPU all the same."""
    made = emulated.install(2)
    for index in range(2):
        emulated.configure(index=index)
    yield made
    for index in range(2):
        emulated.configure(index=index)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    write_random_checkpoint(path, opt_config(), dtype=torch.float32)
    return path


MODES = {"greedy": GREEDY, "beams": BEAMS}


def load(folder: Path, tmp_path: Path, policy: Policy, **options: Any) -> Any:
    return load_ours(folder, policy, offload_folder=tmp_path, **{"device": "emulated:0", **options})


def test_nothing_stays_on_the_device(folder: Path, tmp_path: Path) -> None:
    gc.collect()
    before = emulated.configure().used_bytes
    with load(folder, tmp_path, Policy.parse("50 50 50 50 50 50", batch_size=2, num_batches=4)) as model:
        model.generate(**put(ragged(), model.device), max_new_tokens=4)
    del model
    gc.collect()
    assert emulated.configure().used_bytes == before


def test_a_full_device_is_an_error_that_leaves_the_model_usable(folder: Path, tmp_path: Path) -> None:
    policy = Policy.parse("100 0 100 0 100 0", batch_size=7)
    with load(folder, tmp_path, policy) as model:
        inputs = put(ragged(), model.device)
        # room for what generate keeps of the prompts, and none for their keys and values
        emulated.configure(capacity_bytes=emulated.configure().used_bytes + 10_000)
        with pytest.raises(CapacityError, match="emulated device"):
            model.generate(**inputs, max_new_tokens=4)
        emulated.configure()
        assert model.generate(**inputs, max_new_tokens=4).shape == (7, 13)


def test_a_budget_is_refused_before_work_starts(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CapacityError, match="raise max_memory"):
        load(folder, tmp_path, Policy.parse("100 0 100 0 100 0"), max_memory={0: 1000})


def test_embeddings_and_masks_of_a_prompt_do_not_pile_up(folder: Path, tmp_path: Path) -> None:
    """The models' own code names them until the last layer, those of every micro-batch."""
    tokens, peaks = 32, {}
    with load(folder, tmp_path, Policy.parse("0 100 0 100 0 100", batch_size=1, num_batches=24)) as model:
        embedding = tokens * model.config.hidden_size * 4
        for rows in (12, 24):
            ids = torch.randint(3, 90, (rows, tokens), generator=torch.Generator().manual_seed(rows))
            mask = torch.ones_like(ids)
            mask[1:, :5] = 0
            device = emulated.configure()
            model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=1, min_new_tokens=1)
            peaks[rows] = device.peak_bytes
    assert peaks[24] - peaks[12] < 12 * embedding


def test_a_family_that_is_not_tested_keeps_what_it_may_read_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forgotten: list[bool] = []
    monkeypatch.setattr(Executor, "_forget", lambda self, *_: forgotten.append(self._forgets))
    for is_tested in (True, False):
        monkeypatch.setattr("flexgen_hf.architectures.is_tested", lambda _, answer=is_tested: answer)
        with load(folder, tmp_path, Policy.parse("0 100 0 100 0 100", batch_size=4, num_batches=2)) as model:
            model.generate(**put(ragged(), model.device), max_new_tokens=1, min_new_tokens=1)
        assert set(forgotten) == {is_tested}
        forgotten.clear()


def test_streamed_weights_cross_the_link_once_per_sweep(folder: Path, tmp_path: Path) -> None:
    with load(folder, tmp_path, Policy.parse("0 100 100 0 100 0", batch_size=2, num_batches=4)) as model:
        counted = emulated.configure()
        model.generate(**put(ragged(), model.device), max_new_tokens=1, min_new_tokens=1)
        once = model.last_run.to_dict()["lanes"]["host_to_device"]["bytes"]
        model.generate(**put(ragged(), model.device), max_new_tokens=5, min_new_tokens=5)
        layers = model.last_run.to_dict()["lanes"]["host_to_device"]["bytes"] / 5
    streamed = model.last_run.to_dict()["placement"]["weights"]["host"]
    assert once == streamed  # the tied table too: the first sweep loads it
    assert layers < streamed  # later ones find it where it is
    assert counted.to_device.bytes >= once


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["opt", "llama"])
def test_attention_on_the_host_gives_the_same_tokens(tmp_path: Path, kind: str, mode: str) -> None:
    from transformers import LlamaConfig

    sizes: dict[str, Any] = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3}  # grouped queries
    config = opt_config() if kind == "opt" else LlamaConfig(**sizes)
    write_random_checkpoint(tmp_path / kind, config, dtype=torch.float32)
    plain = load_plain(tmp_path / kind)
    counted = {}
    for attends in (True, False):
        policy = Policy.parse("100 0 0 70 100 0", batch_size=2, num_batches=3, host_attention=attends)
        with load(tmp_path / kind, tmp_path, policy) as model:
            same_tokens(plain, model, MODES[mode], ragged())
            counted[attends] = model.last_run.to_dict()["lanes"]["host_to_device"]["bytes"]
    assert counted[True] < counted[False] / 2  # only cells on disk are moved to the device


def test_a_family_that_cannot_attend_on_the_host_is_refused_by_name(tmp_path: Path) -> None:
    from transformers import BloomConfig

    config = BloomConfig(vocab_size=97, hidden_size=32, n_layer=2, n_head=4)
    write_random_checkpoint(tmp_path / "bloom", config, dtype=torch.float32)
    with pytest.raises(UnsupportedModelError, match="host_attention: BloomForCausalLM cannot"):
        load(tmp_path / "bloom", tmp_path, Policy.parse("0 100 0 100 0 100", host_attention=True))


def test_mixing_with_host_tensors_raises() -> None:
    with pytest.raises(RuntimeError, match=r"a cpu tensor of shape \(3,\) meets tensors of emulated:0"):
        torch.ones(3, device="emulated:0") + torch.ones(3)
    assert (torch.ones(3, device="emulated:0") + torch.tensor(1)).tolist() == [2, 2, 2]  # numbers may


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
    assert device.to_device.busy_s >= 0.0999


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
    with pytest.raises(RuntimeError, match="meets tensors of emulated:0"):
        attend(query, key.cpu(), value)


# ----------------------------------------------------------------------------------------------------- several devices
def use() -> list[int]:
    """Bytes in use on each of two devices."""
    gc.collect()
    return [emulated.configure(index=index).used_bytes for index in range(2)]


def test_each_device_has_its_own_memory() -> None:
    before = use()
    there = torch.zeros(500, device="emulated:1")
    assert (there.device.index, (there + 1)[:2].device.index) == (1, 1)
    assert use() == [before[0], before[1] + 2000]
    emulated.configure(capacity_bytes=before[1] + 3000, index=1)
    with pytest.raises(torch.OutOfMemoryError, match="emulated device 1: 2000 bytes asked for"):
        torch.ones_like(there)
    here = there.to("emulated:0")  # where there is room
    assert (here.device.index, use()) == (0, [before[0] + 2000, before[1] + 2000])
    assert torch.get_device_module("emulated").device_count() == torch.accelerator.device_count() == 2


@pytest.mark.parametrize("shape", [(3,), ()])
def test_mixing_devices_raises(shape: tuple[int, ...]) -> None:
    with pytest.raises(RuntimeError, match=r"aten::add: a emulated:1 tensor of shape .* meets tensors of emulated:0"):
        torch.ones(3, device="emulated:0") + torch.ones(shape, device="emulated:1")
    with pytest.raises(RuntimeError, match="meets tensors of emulated:0"):
        torch.ones(3, device="emulated:0")[torch.zeros(1, dtype=torch.long, device="emulated:1")]


def test_a_copy_from_device_to_device_takes_both_links() -> None:
    devices = [
        emulated.configure(to_device=20_000_000, to_host=5_000_000, index=0),
        emulated.configure(to_device=10_000_000, to_host=20_000_000, index=1),
    ]
    source = torch.arange(125_000, device="emulated:0")
    moved = source.to("emulated:1")
    assert [(device.to_device.bytes, device.to_host.bytes) for device in devices] == [(0, 1_000_000), (1_000_000, 0)]
    assert devices[0].to_host.busy_s >= 0.1999
    assert devices[1].to_device.busy_s >= 0.0999
    source.zero_()  # the two share no memory
    source.copy_(moved)
    assert [(device.to_device.bytes, device.to_host.bytes) for device in devices] == [(1_000_000,) * 2] * 2
    assert torch.equal(source.cpu(), torch.arange(125_000))


def test_a_device_that_is_not_there_is_named() -> None:
    for attempt in (lambda: torch.zeros(3, device="emulated:7"), lambda: torch.zeros(3).to("emulated:7")):
        with pytest.raises(RuntimeError, match=r"emulated:7: there are \d emulated devices; call install\(8\) first"):
            attempt()
    assert emulated.install(1) == torch.device("emulated:0")  # takes no device away
    assert torch.get_device_module("emulated").device_count() >= 2


def test_a_model_on_the_second_device_leaves_the_first_alone(folder: Path, tmp_path: Path) -> None:
    before, plain = use(), load_plain(folder)
    first = emulated.configure()
    for attends in (False, True):
        policy = Policy.parse("30 30 30 40 30 30", batch_size=2, num_batches=2, host_attention=attends)
        with load(folder, tmp_path, policy, device="emulated:1") as model:
            for mode in (GREEDY, SAMPLING, BEAMS):
                same_tokens(plain, model, mode, ragged())
            assert model.device == torch.device("emulated:1")
            assert emulated._devices[1].used_bytes > before[1]
    assert (first.peak_bytes, first.to_device.bytes, first.to_host.bytes) == (before[0], 0, 0)


def test_accelerate_spreads_a_model_over_two_devices(tmp_path: Path) -> None:
    """What the emulation is worth: a program that knows nothing of it finds two devices."""
    plain = load_plain(save_tiny(opt_config(num_hidden_layers=4), tmp_path / "opt"))
    ends = ("model.decoder.embed_tokens", "model.decoder.embed_positions", "lm_head")
    where = {**dict.fromkeys(ends, "emulated:0"), "model.decoder.final_layer_norm": "emulated:1"}
    where |= {f"model.decoder.layers.{j}": f"emulated:{j // 2}" for j in range(4)}
    before = use()
    spread = load_plain(tmp_path / "opt", device_map=where)
    held = [now - then for now, then in zip(use(), before, strict=True)]
    layers = [sum(p.numel() * p.element_size() for p in plain.model.decoder.layers[j].parameters()) for j in (2, 3)]
    assert sum(layers) <= held[1] < sum(layers) + 1000  # and a norm
    for mode in (GREEDY, SAMPLING, BEAMS):
        same_tokens(plain, spread, mode, ragged())


# --------------------------------------------------------------------------------------- what torch asks of a tensor
def test_tensors_that_an_operation_resizes() -> None:
    assert torch.arange(5, device="emulated:1").tolist() == [0, 1, 2, 3, 4]
    assert torch.eye(2, device="emulated:0").tolist() == [[1, 0], [0, 1]]
    before = use()[0]
    grown = torch.empty(0, device="emulated:0")
    torch.add(torch.ones(100, device="emulated:0"), 1, out=grown)
    assert (grown.shape, use()[0] - before) == ((100,), 400)


def test_copies_text_and_numbers() -> None:
    device = emulated.configure()
    tensor = torch.tensor([1, 2], device="emulated:0")
    copied = copy.deepcopy(tensor)
    tensor += 1
    assert (copied.tolist(), copied.device) == ([1, 2], tensor.device)
    assert str(tensor) == "tensor([2, 3]) on emulated:0"
    moved = device.to_host.bytes
    assert f"{tensor[1]:03d}" == "003"
    assert device.to_host.bytes == moved + 8


def test_what_a_gpu_takes_and_the_cpu_does_not() -> None:
    values = torch.tensor([0, 2, 2, 3], dtype=torch.int32, device="emulated:0")
    counts = torch.histc(values, bins=4, min=0, max=3)
    assert (counts.tolist(), counts.dtype) == ([1, 0, 2, 1], torch.int32)
    assert values[torch.tensor([3, 0])].tolist() == [3, 0]  # an index may come from the host
    values[torch.tensor([1])] = 7
    assert values.tolist() == [0, 7, 2, 3]


def test_functions_that_run_as_a_whole_meet_the_same_rules():
    here, host = torch.ones(3, device="emulated:0"), torch.ones(3)
    for attempt in (
        lambda: torch.cat([here, host]),
        lambda: here.mul(host),
        lambda: torch.nn.functional.linear(here, torch.ones(2, 3)),
        lambda: here.add(torch.ones(3, device="emulated:1")),
    ):
        with pytest.raises(RuntimeError, match="meets tensors of emulated:0"):
            attempt()
    assert here.contiguous() is here
    assert here[torch.tensor([0, 2])].tolist() == [1, 1]  # indices may be on the host
    taken = torch.empty(3, device="emulated:0")
    assert torch.cat([here[:1], here[1:]], out=taken) is taken
    before = emulated.configure().used_bytes
    product = torch.nn.functional.linear(torch.ones(2, 8, device="emulated:0"), torch.ones(500, 8, device="emulated:0"))
    assert emulated.configure().used_bytes >= before + product.numel() * product.element_size()
