"""Padding on the left: prompts of one length together, and what a micro-batch leaves out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from flexgen_hf import Policy
from flexgen_hf.padding import back_in_order, common_padding, in_order, longest_first, without_padding

from .comparison import BEAMS, GREEDY, SAMPLING, load_ours, ragged, same_tokens

LENGTHS = (3, 12, 5, 2, 9, 4, 6)


def mask_of(*padding: int, tokens: int = 6) -> torch.Tensor:
    mask = torch.ones(len(padding), tokens, dtype=torch.long)
    for row, columns in enumerate(padding):
        mask[row, :columns] = 0
    return mask


class Noted(BaseStreamer):
    def __init__(self) -> None:
        self.values: list[torch.Tensor] = []

    def put(self, value: torch.Tensor) -> None:
        self.values.append(value)

    def end(self) -> None:
        pass


@pytest.mark.parametrize(
    ("padding", "spans", "left_out"),
    [
        ((0, 2, 3, 3), [(0, 2), (2, 4)], [0, 3]),
        ((2, 2, 3, 5), [(0, 2), (2, 4)], [2, 3]),
        ((4, 3, 1, 2), [(0, 2), (2, 4)], [1, 1]),  # a later one is longer: the first keeps as much
        ((6, 6), [(0, 2)], [5]),  # no token at all: one is left to compute
        ((1, 0), [(0, 1), (1, 2)], [0, 0]),
    ],
)
def test_what_is_padding_in_all_rows_is_left_out(
    padding: tuple[int, ...], spans: list[tuple[int, int]], left_out: list[int]
) -> None:
    assert common_padding(mask_of(*padding), spans, 6) == left_out


@pytest.mark.parametrize("mask", [None, mask_of(1, 1)[:, None, None], {"full_attention": mask_of(1, 1)}, mask_of(1, 1)])
def test_of_another_kind_of_mask_nothing_is_known(mask: Any) -> None:
    assert common_padding(mask, [(0, 1), (1, 2)], 7) == [0, 0]


def test_arguments_lose_the_same_columns() -> None:
    ids = torch.arange(12).view(2, 6)
    for name in ("input_ids", "attention_mask", "position_ids", "token_type_ids"):
        assert without_padding(name, ids, 2, is_prompt=True).tolist() == [[2, 3, 4, 5], [8, 9, 10, 11]]
    assert without_padding("position_ids", ids.expand(3, 2, 6), 2, is_prompt=True).shape == (3, 2, 4)
    assert without_padding("inputs_embeds", torch.zeros(2, 6, 5), 2, is_prompt=True).shape == (2, 4, 5)
    token = ids[:, :1]
    assert without_padding("input_ids", token, 2, is_prompt=False) is token
    assert without_padding("attention_mask", ids, 2, is_prompt=False).shape == (2, 4)
    assert without_padding("logits_to_keep", 1, 2, is_prompt=True) == 1


def test_prompts_go_longest_first_and_come_back() -> None:
    inputs = ragged(LENGTHS)
    order = longest_first(inputs, GenerationConfig())
    assert order is not None
    assert [LENGTHS[row] for row in order.tolist()] == sorted(LENGTHS, reverse=True)
    moved = in_order(inputs, order)
    assert moved["attention_mask"].sum(1).tolist() == sorted(LENGTHS, reverse=True)
    assert back_in_order(moved["input_ids"], order).equal(inputs["input_ids"])
    copies = moved["input_ids"].repeat_interleave(3, 0)
    assert back_in_order(copies, order).equal(inputs["input_ids"].repeat_interleave(3, 0))


@pytest.mark.parametrize(
    ("call", "settings"),
    [
        (ragged((9, 5, 5, 1)), {}),  # they are in this order
        ({"input_ids": ragged(LENGTHS)["input_ids"]}, {}),
        ({**ragged(LENGTHS), "logits_processor": [print]}, {}),  # may look at row numbers
        (ragged(LENGTHS), {"do_sample": True}),  # draws for all rows in their order
    ],
)
def test_prompts_stay_where_order_matters_or_is_right(call: dict[str, Any], settings: dict[str, Any]) -> None:
    assert longest_first(call, GenerationConfig(**settings)) is None


@pytest.mark.parametrize("percents", ["0 0 0 0 0 0", "100 0 100 0 100 0", "30 30 30 30 30 30"])
@pytest.mark.parametrize("mode", [GREEDY, SAMPLING, BEAMS, {**BEAMS, "num_return_sequences": 2}], ids=str)
def test_the_same_tokens(tiny_opt: Path, plain_opt: Any, percents: str, mode: dict[str, Any]) -> None:
    with load_ours(tiny_opt, Policy.parse(percents, batch_size=2, num_batches=2)) as ours:
        same_tokens(plain_opt, ours, mode, ragged(LENGTHS))


def test_cells_do_not_hold_what_is_left_out(tiny_opt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And it is not read again for every token."""
    lengths = (12, 12, 3, 3)
    read = {}
    for leaves in (True, False):
        monkeypatch.setattr("flexgen_hf.architectures.Structure.numbers_tokens_by_mask", leaves)
        with load_ours(tiny_opt, Policy.parse("100 0 0 0 100 0", batch_size=2, num_batches=2)) as ours:
            ours.generate(**ragged(lengths), max_new_tokens=3, min_new_tokens=3)
            caches = ours.last_run.to_dict()["decode_lanes"]["disk_to_host"]["bytes"]
        read[leaves] = caches
    # two sweeps read 12 + 13 tokens of the long rows, 3 + 4 of the short ones
    assert read[True] * (25 + 25) == read[False] * (25 + 7)


def test_a_streamer_gets_rows_in_their_order(tiny_opt: Path, plain_opt: Any) -> None:
    want, got = Noted(), Noted()
    with load_ours(tiny_opt, Policy.parse("0 100 0 100 0 100", batch_size=2, num_batches=4)) as ours:
        for model, streamer in ((plain_opt, want), (ours, got)):
            model.generate(**ragged(LENGTHS), max_new_tokens=4, do_sample=False, streamer=streamer)
    assert [value.tolist() for value in got.values] == [value.tolist() for value in want.values]


@pytest.mark.parametrize("option", ["output_hidden_states", "output_attentions", "output_logits"])
def test_what_is_returned_for_every_token_keeps_its_columns(tiny_opt: Path, plain_opt: Any, option: str) -> None:
    settings: dict[str, Any] = {"max_new_tokens": 3, "return_dict_in_generate": True, option: True}
    options = {"attn_implementation": "eager"} if option == "output_attentions" else {}
    with load_ours(tiny_opt, Policy.parse("0 100 0 100 0 100", batch_size=2, num_batches=4), **options) as ours:
        got = ours.generate(**ragged(LENGTHS), do_sample=False, **settings)
        assert got.past_key_values.padding == [0, 0, 0, 0]
        assert got.sequences.shape == (7, 15)
