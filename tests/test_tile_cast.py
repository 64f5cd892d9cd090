"""Matrices kept in 16 bit and cast where they are multiplied: the same products, and once per stage and sweep."""

from pathlib import Path

import pytest
import torch

from flexgen_hf import Policy
from flexgen_hf.tiles import TileCast
from tests.tiny import DISK, batch, greedy, load, reference, write_tiny_opt


@pytest.fixture(scope="module")
def half(tmp_path_factory) -> Path:
    return write_tiny_opt(tmp_path_factory.mktemp("tile") / "half", torch.float16, num_hidden_layers=3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rows", [1, 64, 65, 130])
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 1), (700, 2048), (3000, 33), (5, 600_000)])
def test_the_product_is_that_of_the_whole_matrix(rows, outputs, inputs, dtype):
    rows = min(rows, 2) if inputs > 100_000 else rows  # a row of the matrix larger than a tile
    generator = torch.Generator().manual_seed(outputs)
    x = torch.randn(2, rows, inputs, generator=generator)
    weight = torch.randn(outputs, inputs, generator=generator).to(dtype)
    bias = torch.randn(outputs, generator=generator)
    tiles = TileCast()
    for given in (None, bias):
        expected = torch.nn.functional.linear(x, weight.float(), given)
        torch.testing.assert_close(tiles.linear(x, weight, given), expected, rtol=1e-4, atol=1e-3)


def test_one_tile_serves_matrices_of_all_sizes():
    tiles = TileCast()
    for inputs in (10, 3000, 20, 3000):
        x, weight = torch.randn(3, inputs), torch.randn(40, inputs).half()
        torch.testing.assert_close(
            tiles.linear(x, weight, None), torch.nn.functional.linear(x, weight.float()), rtol=1e-4, atol=1e-3
        )


@pytest.mark.parametrize("weights", ["0 0", "0 100", "30 30"])
def test_with_one_micro_batch_nothing_is_written_to_memory_in_float32(half, tmp_path, weights):
    prompts = batch(5)
    for num_batches in (1, 3):
        policy = Policy.parse(
            f"{weights} 100 0 100 0", batch_size=5 if num_batches == 1 else 2, num_batches=num_batches
        )
        with load(half, tmp_path, policy) as model:
            got = greedy(model, prompts)
            report = model.last_run.to_dict()
        expected = greedy(reference(half), prompts)
        assert torch.equal(got.sequences, expected.sequences)
        for ours, theirs in zip(got.logits, expected.logits, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
        assert report["upcasts"]["tensors"] > 0
        assert report["upcasts"]["per_stage_and_sweep"] == 1


def test_what_is_too_large_to_be_cast_at_once_is_pushed_only_with_several_micro_batches(tmp_path):
    wide = write_tiny_opt(
        tmp_path / "wide", torch.float16, num_hidden_layers=1, hidden_size=256, word_embed_proj_dim=256, ffn_dim=1024
    )
    pushed = {}
    for num_batches in (1, 2):
        policy = Policy(weights=DISK, batch_size=4 // num_batches, num_batches=num_batches)
        with load(wide, tmp_path / "offload", policy) as model:
            assert torch.equal(greedy(model, batch(4)).sequences, greedy(reference(wide), batch(4)).sequences)
            pushed[num_batches] = model.last_run.to_dict()["lanes"]["host_to_device"]["bytes"]
    assert pushed[1] == 0
    assert pushed[2] >= 4 * 2 * 256 * 1024 * 2  # the MLP's two matrices, in each of four sweeps
