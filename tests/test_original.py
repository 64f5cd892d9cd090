"""The published rates, predicted: every row, with the same numbers of the machine."""

from __future__ import annotations

import statistics

import pytest

from flexgen_hf.bench.shapes import SHAPES
from flexgen_hf.planning.original import PUBLISHED, Comparison, compare
from flexgen_hf.planning.presets import preset
from flexgen_hf.planning.shape import ModelShape


@pytest.fixture(scope="module")
def comparison() -> list[Comparison]:
    shapes = {row.model: ModelShape.from_config(SHAPES[row.model].fields()) for row in PUBLISHED}
    return compare(shapes, preset("t4"))


def test_all_rows_are_there(comparison: list[Comparison]) -> None:
    assert len(comparison) == 18
    assert sum(made.row.is_compressed for made in comparison) == 9
    assert len({(made.row.model, made.row.prompt_len, made.row.is_compressed) for made in comparison}) == 18


def test_predictions_are_near_what_is_published(comparison: list[Comparison]) -> None:
    assert statistics.mean(abs(made.error) for made in comparison) <= 0.15
    assert max(abs(made.error) for made in comparison) <= 0.30


def test_the_original_s_losses_only_lose(comparison: list[Comparison]) -> None:
    for made in comparison:
        assert made.with_losses <= made.planned * 1.01, made.row


@pytest.mark.parametrize(
    ("model", "prompt_len", "rate"),
    [("opt-30b", 512, 7.14), ("opt-30b", 1024, 3.62), ("opt-30b", 256, 12.97), ("opt-175b", 512, 0.15),
     ("opt-6.7b", 512, 60.85)],
)  # fmt: skip
def test_the_authors_own_model_says_what_it_says(
    comparison: list[Comparison], model: str, prompt_len: int, rate: float
) -> None:
    (made,) = (m for m in comparison if (m.row.model, m.row.prompt_len) == (model, prompt_len) and m.original_model)
    assert made.original_model == pytest.approx(rate, abs=0.005)
