"""Models whose weights are quantized: the truth is transformers with the weights that the quantized ones stand for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
import transformers

from conversion.convert import convert
from flexgen_hf import Compression, FlexGenForCausalLM, Policy, PolicyError, Tier
from flexgen_hf.quantization.groupwise import GroupFormat
from flexgen_hf.weights import store as weight_store
from flexgen_hf.weights.format import Manifest, is_store

from .comparison import (
    BEAMS,
    GREEDY,
    SAMPLING,
    as_quantized,
    load_ours,
    load_plain,
    matrices,
    put,
    quantized_in,
    ragged,
    same_tokens,
    save_tiny,
)
from .kept import cache_as_kept, kept_bytes
from .tiny import batch, greedy, load, write_tiny_opt

FOUR = Compression(weights=4, group_size=32)
MATRICES_OF_A_LAYER = 6
LAYERS = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_opt(tmp_path_factory.mktemp("model") / "opt", torch.float16)


@pytest.fixture(scope="module")
def store(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("store")
    convert(folder, out, compression=FOUR)
    return out


def oracle(folder: Path, bits: int = 4, other: Mapping[str, int | None] = MappingProxyType({})) -> Any:
    """transformers' own model with the numbers that the reference makes of its matrices, of some in other widths."""
    model = load_plain(folder, dtype=torch.float32).eval()
    widths = {**dict.fromkeys(matrices(model), bits), **other}
    return as_quantized(model, {name: GroupFormat(width, 32) for name, width in widths.items() if width is not None})


@pytest.fixture(scope="module")
def expected(folder: Path) -> Any:
    return oracle(folder)


POLICIES = [
    Policy.parse("0 0 0 100 0 100", batch_size=2, num_batches=3),
    Policy.parse("0 100 0 100 0 100", batch_size=2, num_batches=3),
    Policy.parse("100 0 100 0 100 0", batch_size=2, num_batches=3),
    Policy.parse("30 30 30 40 30 30", batch_size=2, num_batches=3),
    Policy.parse("30 30 30 40 30 30", batch_size=7, num_batches=1),
    Policy.parse("30 30 30 40 30 30", batch_size=2, num_batches=4, layer_slots=1),
    Policy.parse("30 30 30 40 30 30", batch_size=2, num_batches=4, overlap=False),
]


@pytest.mark.parametrize("number", range(len(POLICIES)))
def test_same_tokens_wherever_the_weights_are(
    store: Path, expected: Any, tmp_path: Path, device: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the policy; tensors are moved whole, or with every other policy in pieces of a few rows."""
    policy = POLICIES[number]
    if number % 2 == 0:
        monkeypatch.setattr(weight_store, "size_of_pieces", lambda *_, **__: 200)
    with load(store, tmp_path, policy, device=device) as model:
        got = greedy(model, put(batch(7), model.device))
        run = model.last_run
    wanted = greedy(expected, batch(7))
    assert torch.equal(got.sequences.cpu(), wanted.sequences)
    for ours, theirs in zip(got.logits, wanted.logits, strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=0, atol=1e-4)
    # of every tensor once in each sweep, wherever its home is
    count = MATRICES_OF_A_LAYER * LAYERS * len(run.sweeps)
    assert run.to_dict()["dequantizations"] == {"tensors": count, "per_stage_and_sweep": 1}
    assert f"dequantized {count} tensors, at most once per stage and sweep" in str(run)


@pytest.mark.parametrize("mode", [SAMPLING, BEAMS])
def test_same_tokens_however_they_are_chosen(
    store: Path, expected: Any, tmp_path: Path, device: str, mode: Any
) -> None:
    with load(store, tmp_path, POLICIES[3], device=device) as model:
        same_tokens(expected, model, mode, ragged())


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_other_widths(folder: Path, tmp_path: Path, device: str, bits: int) -> None:
    plain = oracle(folder, bits)
    with load(folder, tmp_path, POLICIES[3], device=device, compression=Compression(bits, group_size=32)) as model:
        same_tokens(plain, model, GREEDY, ragged())


def test_tables_and_widths_by_name(folder: Path, tmp_path: Path, device: str) -> None:
    """The tied table is dequantized once and stays in its slot."""
    compression = {"weights": 4, "group_size": 32, "tables": 8, "patterns": {"*.fc2": 8, "*.0.*.q_proj.weight": None}}

    layers = "model.decoder.layers"
    other: dict[str, int | None] = {f"{layers}.{j}.fc2.weight": 8 for j in range(LAYERS)}
    other |= {"model.decoder.embed_tokens.weight": 8, f"{layers}.0.self_attn.q_proj.weight": None}
    plain = oracle(folder, other=other)
    for policy in (POLICIES[2], POLICIES[3], POLICIES[4]):
        with load(folder, tmp_path, policy, device=device, compression=compression) as model:
            same_tokens(plain, model, GREEDY, ragged())
            assert model.last_run.dequantizations["per_stage_and_sweep"] == 1
    (out,) = tmp_path.glob("converted-*")
    assert out.name.rpartition("-")[0].endswith("-float32-4-8bit")


def test_experts_are_quantized_and_their_router_is_not(tmp_path: Path, device: str) -> None:
    config = transformers.MixtralConfig(
        vocab_size=96, hidden_size=32, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, eos_token_id=None,
    )  # fmt: skip
    model = save_tiny(config, tmp_path / "model", dtype=torch.bfloat16)
    plain = oracle(model)
    with load(model, tmp_path, POLICIES[3], device=device, compression=FOUR) as ours:
        same_tokens(plain, ours, GREEDY, ragged())
        assert ours.last_run.dequantizations["per_stage_and_sweep"] == 1
    (out,) = tmp_path.glob("converted-*")
    assert quantized_in(out).keys() == set(matrices(plain))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_compute_in_16_bit(store: Path, tmp_path: Path, device: str, dtype: torch.dtype) -> None:
    with load(store, tmp_path, POLICIES[3], device=device, dtype=dtype) as model:
        assert model.dtype == dtype
        first = greedy(model, put(batch(7), model.device))
    with load(store, tmp_path, POLICIES[0], device=device, dtype=dtype) as model:
        assert torch.equal(greedy(model, put(batch(7), model.device)).sequences, first.sequences)


def test_what_stays_on_the_device_stays_quantized(store: Path, folder: Path, tmp_path: Path, device: str) -> None:
    held = {}
    for name in (store, folder):
        with load(name, tmp_path, POLICIES[2], device=device) as model:
            held[name] = model._executor.space.ledger.held_as(Tier.DEVICE, "weights")
    elements = LAYERS * (4 * 32 * 32 + 2 * 32 * 64)
    assert held[folder] - held[store] == elements * 4 - elements // 2 - 2 * 2 * elements // 32


def test_codes_cross_the_link(store: Path, folder: Path, tmp_path: Path) -> None:
    homes, sweeps, table = {}, 4, 96 * 32 * 2
    policy = Policy.parse("0 100 100 0 100 0", batch_size=2, num_batches=3)
    for name in (store, folder):
        with load(name, tmp_path, policy, device="emulated:0", dtype=torch.float16) as model:
            greedy(model, put(batch(6), model.device), sweeps)
            homes[name] = model.last_run.placement["weights"][Tier.HOST]
            moved = model.last_run.to_dict()["lanes"]["host_to_device"]["bytes"]
        assert moved == (homes[name] - table) * sweeps + table  # the tied table stays where it is
    elements = LAYERS * (4 * 32 * 32 + 2 * 32 * 64)
    assert homes[folder] - homes[store] == elements * 2 - elements // 2 - 2 * 2 * elements // 32


# ---------------------------------------------------------------------------------------------------------- loading
def test_a_checkpoint_is_quantized_once_for_each_compression(folder: Path, expected: Any, tmp_path: Path) -> None:
    times = []
    for _ in range(2):
        with load(folder, tmp_path, POLICIES[0], compression=FOUR) as model:
            same_tokens(expected, model, GREEDY, ragged())
            assert model.policy.compression == FOUR
        (made,) = tmp_path.iterdir()
        assert is_store(made)
        times.append([path.stat().st_mtime_ns for path in sorted(made.rglob("*.safetensors"))])
    assert times[0] == times[1]
    with load(folder, tmp_path, POLICIES[0].replace(compression={"weights": 8, "group_size": 32})):
        assert len(list(tmp_path.iterdir())) == 2
    with load(folder, tmp_path, POLICIES[0]) as model:  # without a compression, as it lies
        assert model.last_run is None
        assert not any(tensor.is_quantized for tensor in model._executor.weights.stored)
    assert len(list(tmp_path.iterdir())) == 2


def test_what_is_not_quantized_keeps_its_16_bits(folder: Path, tmp_path: Path) -> None:
    with load(folder, tmp_path, compression=FOUR, dtype=torch.float32) as model:
        kinds = {tensor.stored_dtype for tensor in model._executor.weights.stored if not tensor.is_quantized}
    assert kinds == {torch.float16}


def test_a_store_refuses_another_compression(store: Path, expected: Any, tmp_path: Path) -> None:
    with load(store, tmp_path, compression=FOUR) as model:
        same_tokens(expected, model, GREEDY, ragged())
    fact = r"fc1\.weight was asked for in 8 bits, groups of 32, but the store has it in 4 bits, groups of 32; leave"
    with pytest.raises(PolicyError, match=fact):
        load(store, tmp_path, compression=Compression(weights=8, group_size=32))
    with pytest.raises(PolicyError, match=r"embed_tokens\.weight was asked for in 4 bits.*the store has it as it is"):
        load(store, tmp_path, compression=Compression(weights=4, group_size=32, tables=4))
    assert not list(tmp_path.iterdir())


def test_the_policy_and_the_dict_ask_for_it_too(folder: Path, expected: Any, tmp_path: Path) -> None:
    with load(folder, tmp_path, POLICIES[0].replace(compression=FOUR)) as model:
        same_tokens(expected, model, GREEDY, ragged())
    options = {"quant_method": "flexgen", "compression": json.dumps(FOUR.to_dict()), "offload_folder": str(tmp_path)}
    options |= {"policy": "0 0 0 100 0 100", "device": "cpu"}
    auto: Any = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=options
    )
    with auto as model:
        assert isinstance(model, FlexGenForCausalLM)
        same_tokens(expected, model, GREEDY, ragged())
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("number", [0, 3, 5])
def test_weights_and_cache_together(store: Path, expected: Any, tmp_path: Path, device: str, number: int) -> None:
    compression = Compression(weights=4, cache=4, group_size=32)
    settings: dict[str, Any] = {**GREEDY, "max_new_tokens": 6, "pad_token_id": 1}
    want = expected.generate(**ragged(), **settings, past_key_values=cache_as_kept(compression))
    with load(store, tmp_path, POLICIES[number], device=device, compression=compression) as model:
        assert torch.equal(model.generate(**put(ragged(), model.device), **settings).cpu(), want)


def test_four_bits_by_name_are_weights_and_cache(folder: Path, tmp_path: Path) -> None:
    with load(folder, tmp_path, compression="4bit") as model:
        model.generate(**ragged(), **GREEDY, max_new_tokens=2)
        assert (model.policy.compression.weights, model.policy.compression.cache) == (4, 4)
        sizes = model.last_run.to_dict()["placement"]
        config = model.config
    per_token = 2 * kept_bytes(config.num_attention_heads, config.hidden_size // config.num_attention_heads, 4)
    rows, tokens = ragged()["input_ids"].shape
    least = rows * (tokens + 2) * config.num_hidden_layers * per_token
    assert least <= sum(sizes["cache"].values()) <= least + 2 * 4096 * 4 * config.num_hidden_layers


def test_elements_that_cannot_be_quantized_are_named(tmp_path: Path) -> None:
    folder = write_tiny_opt(tmp_path / "opt", torch.bfloat16)
    model = load_plain(folder, dtype=torch.bfloat16)
    with torch.no_grad():
        model.model.decoder.layers[1].fc1.weight[3, 5] = 1e6
    model.save_pretrained(folder)
    with pytest.raises(ValueError, match=r"model\.decoder\.layers\.1\.fc1\.weight"):
        load(folder, tmp_path / "offload", compression=FOUR)
    assert not any(is_store(path) for path in (tmp_path / "offload").iterdir())


def test_a_saved_model_holds_what_its_weights_stand_for(store: Path, expected: Any, tmp_path: Path) -> None:
    with load(store, tmp_path / "offload") as model:
        model.save_pretrained(tmp_path / "saved")
    assert Manifest.load(tmp_path / "saved").quantization is None
    with load_ours(tmp_path / "saved", dtype=torch.float32) as model:
        same_tokens(expected, model, GREEDY, ragged())


def test_a_device_holds_more_layers_if_they_are_quantized(tmp_path: Path) -> None:
    """In float32 all of them, against codes of all and one layer in a slot."""
    wide = write_tiny_opt(tmp_path / "wide", torch.float16, hidden_size=256, word_embed_proj_dim=256, ffn_dim=1024)
    policy = Policy.parse("100 0 100 0 100 0", batch_size=1, num_batches=2, layer_slots=1)
    taken = {}
    for compression in (None, Compression(weights=4)):
        with load(wide, tmp_path / "offload", policy, compression=compression) as model:
            greedy(model, batch(2))
            taken[compression] = model.last_run.peak_bytes[Tier.DEVICE]
    elements = 4 * 256 * 256 + 2 * 256 * 1024
    saved = elements * (LAYERS * 4 - LAYERS * 4.5 / 8 - 4)
    assert abs(taken[None] - taken[Compression(weights=4)] - saved) < 4096  # a slot is of whole pages
