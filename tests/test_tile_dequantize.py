"""Quantized matrices multiplied from their codes: the same products, once per stage and sweep, and no slot for them."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from conversion.convert import convert
from flexgen_hf import Compression, Policy, Tier
from flexgen_hf.quantization import dispatch
from flexgen_hf.quantization.groupwise import GroupFormat
from flexgen_hf.tiles import TileDequantize

from .comparison import GREEDY, as_quantized, load_plain, matrices, ragged, same_tokens, save_tiny
from .tiny import batch, flexgen_threads, greedy, load, write_tiny_opt

FOUR = Compression(weights=4, group_size=32)
LAYERS = 3


@pytest.fixture
def tiles() -> Any:
    made = TileDequantize()
    yield made
    made.release()
    assert not flexgen_threads()


@pytest.fixture
def two_threads() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("bits", "dtype"),
    [*((bits, torch.float32) for bits in (2, 3, 4, 8)), (4, torch.bfloat16), (3, torch.float16)],
)
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 1), (701, 1000), (3001, 33), (5, 300_000)])
def test_the_product_is_that_of_the_whole_matrix(
    tiles: TileDequantize, two_threads: None, bits: int, dtype: torch.dtype, outputs: int, inputs: int
) -> None:
    """Also where a row is nearly a tile, where threads share the rows, and for the few rows that need no tile."""
    generator = torch.Generator().manual_seed(outputs)
    fmt = GroupFormat(bits, 32)
    q = dispatch.quantize(torch.randn(outputs, inputs, generator=generator) / inputs**0.5, fmt)
    bias = torch.randn(outputs, generator=generator).to(dtype)
    matrix = dispatch.dequantize(q, fmt, dtype)
    tolerance = 1e-4 if dtype is torch.float32 else 2e-2
    for rows, given in ((1, None), (3, bias), (4, bias), (7, None)):
        x = torch.randn(1, rows, inputs, generator=generator).to(dtype)
        expected = torch.nn.functional.linear(x, matrix, given)
        torch.testing.assert_close(tiles.linear(x, q, fmt, given), expected, rtol=tolerance, atol=tolerance)
    assert torch.get_num_threads() == 2


def test_it_works_where_the_caller_is_in_inference_mode(tiles: TileDequantize, two_threads: None) -> None:
    fmt = GroupFormat(4, 32)
    q = dispatch.quantize(torch.randn(600, 512), fmt)
    with torch.inference_mode():
        x = torch.randn(3, 512)
        got = tiles.linear(x, q, fmt, None)
        assert got.is_inference()
    assert tiles._pool is not None
    torch.testing.assert_close(got, x @ dispatch.dequantize(q, fmt).t(), rtol=1e-4, atol=1e-4)


def test_without_kernels_it_is_the_same(tiles: TileDequantize, monkeypatch: pytest.MonkeyPatch) -> None:
    fmt = GroupFormat(3, 32)
    q = dispatch.quantize(torch.randn(600, 512), fmt)
    x = torch.randn(3, 512)
    expected = tiles.linear(x, q, fmt, None)
    monkeypatch.setattr(dispatch, "_kernels", lambda: None)
    torch.testing.assert_close(tiles.linear(x, q, fmt, None), expected, rtol=1e-4, atol=1e-4)


# ----------------------------------------------------------------------------------------------------------- in a model
@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_opt(tmp_path_factory.mktemp("model") / "opt", torch.float16)


@pytest.fixture(scope="module")
def store(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("store")
    convert(folder, out, compression=FOUR)
    return out


@pytest.fixture(scope="module")
def expected(folder: Path) -> Any:
    model = load_plain(folder, dtype=torch.float32).eval()
    return as_quantized(model, dict.fromkeys(matrices(model), GroupFormat(4, 32)))


@pytest.mark.parametrize("weights", ["0 0", "0 100", "100 0", "30 30"])
@pytest.mark.parametrize("overlap", [True, False])
def test_same_tokens_from_codes_wherever_they_are(
    store: Path, expected: Any, tmp_path: Path, weights: str, overlap: bool
) -> None:
    policy = Policy.parse(f"{weights} 100 0 100 0", batch_size=7, num_batches=1, overlap=overlap)
    with load(store, tmp_path, policy) as model:
        got, run = greedy(model, batch(7)), model.last_run
        ledger = model._executor.space.ledger
        slots = {tier: ledger.held_as(tier, "weight slots") for tier in (Tier.DEVICE, Tier.HOST)}
        largest = max(t.device_bytes for t in model._executor.weights.stored if t.is_quantized)
        assert ledger.held_as(Tier.DEVICE, "dequantizing") == largest
    wanted = greedy(expected, batch(7))
    assert torch.equal(got.sequences, wanted.sequences)
    for ours, theirs in zip(got.logits, wanted.logits, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    count = 6 * LAYERS * len(run.sweeps)
    assert run.to_dict()["dequantizations"] == {"tensors": count, "per_stage_and_sweep": 1}
    assert run.to_dict()["lanes"]["host_to_device"]["bytes"] == 0
    assert slots[Tier.DEVICE] == 0
    assert (slots[Tier.HOST] > 0) == (weights in ("0 0", "30 30"))
    assert not flexgen_threads()


def test_with_several_micro_batches_one_copy_serves_all(store: Path, expected: Any, tmp_path: Path) -> None:
    policy = Policy.parse("30 30 100 0 100 0", batch_size=2, num_batches=4)
    with load(store, tmp_path, policy) as model:
        assert torch.equal(greedy(model, batch(7)).sequences, greedy(expected, batch(7)).sequences)
        assert model._executor.space.ledger.held_as(Tier.DEVICE, "weight slots") > 0
        assert model.last_run.dequantizations["per_stage_and_sweep"] == 1


def test_a_quantized_tied_table_goes_through_its_slot(folder: Path, tmp_path: Path) -> None:
    plain = load_plain(folder, dtype=torch.float32).eval()
    table = "model.decoder.embed_tokens.weight"
    plain = as_quantized(plain, {**dict.fromkeys(matrices(plain), GroupFormat(4, 32)), table: GroupFormat(8, 32)})
    compression = Compression(weights=4, tables=8, group_size=32)
    for weights in ("0 0", "0 100", "100 0"):
        policy = Policy.parse(f"{weights} 100 0 100 0", batch_size=7, num_batches=1)
        with load(folder, tmp_path, policy, compression=compression) as model:
            same_tokens(plain, model, GREEDY, ragged())
            assert model.last_run.dequantizations["per_stage_and_sweep"] == 1


def test_experts_are_multiplied_from_their_codes_with_any_number_of_micro_batches(tmp_path: Path) -> None:
    """Each is used once in a sweep, so there is nothing that a dequantized copy would be good for."""
    config = transformers.MixtralConfig(
        vocab_size=96, hidden_size=32, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, eos_token_id=None,
    )  # fmt: skip
    folder = save_tiny(config, tmp_path / "model", dtype=torch.bfloat16)
    plain = load_plain(folder, dtype=torch.float32).eval()
    plain = as_quantized(plain, dict.fromkeys(matrices(plain), GroupFormat(4, 32)))
    for weights, batches in itertools.product(("0 0", "0 100", "100 0"), (1, 4)):
        policy = Policy.parse(f"{weights} 100 0 100 0", batch_size=8 // batches, num_batches=batches)
        with load(folder, tmp_path, policy, compression=FOUR) as ours:
            same_tokens(plain, ours, GREEDY, ragged())
            assert ours.last_run.dequantizations["per_stage_and_sweep"] == 1
            slots = ours._executor.space.ledger.held_as(Tier.DEVICE, "weight slots")
            assert slots == 0 if batches == 1 else slots < 2 * 4 * 32 * 160  # an expert's matrix, and one more
