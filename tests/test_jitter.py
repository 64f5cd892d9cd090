"""Whatever each lane is held up by, the tokens are transformers': seeded random delays in every lane."""

import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from flexgen_hf import Placement, Policy
from flexgen_hf.planning.schedule import Lane
from tests.tiny import batch, flexgen_threads, greedy, load, pretend_accelerator, reference, write_tiny_opt

# Two hundred schedules in all, a few dozen in each test.
SCHEDULES, TESTS = 200, 8

PLACEMENTS = [
    Placement(disk=1.0),
    Placement(disk=1.0),
    Placement(device=0.5, disk=0.5),
    Placement(device=0.3, host=0.3, disk=0.4),
    Placement(host=1.0),
    Placement(device=1.0),
]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> list[Path]:
    """One in the dtype of compute and one that is cast on the way, so that one more lane is used."""
    folder = tmp_path_factory.mktemp("checkpoints")
    return [
        write_tiny_opt(folder / "tied", num_hidden_layers=3),
        write_tiny_opt(folder / "half", torch.float16, num_hidden_layers=2, tie_word_embeddings=False),
    ]


def jitter(seed: int, longest_s: float) -> Callable[[str, Any], None]:
    """Holds up about every fourth step; which ones and how long depends on the seed and the step alone."""
    slow = random.Random(seed).choice([*map(str, Lane), "none"])  # noqa: S311  no secret

    def before_step(lane: str, step: Any) -> None:
        dice = random.Random(f"{seed} {step}")  # noqa: S311
        if dice.random() < (0.6 if lane == slow else 0.2):
            time.sleep(dice.random() * longest_s)

    return before_step


def draw(dice: random.Random) -> Policy:
    return Policy(
        weights=dice.choice(PLACEMENTS),
        cache=dice.choice(PLACEMENTS),
        hidden=dice.choice(PLACEMENTS),
        batch_size=dice.randint(1, 3),
        num_batches=dice.randint(1, 4),
        overlap=dice.random() < 0.75,
        layer_slots=dice.randint(1, 2),
    )


@pytest.mark.parametrize("part", range(TESTS))
def test_the_same_tokens_however_the_lanes_race(checkpoints, tmp_path, monkeypatch, part):
    if part % 2:
        pretend_accelerator(monkeypatch)
    for seed in range(part, SCHEDULES, TESTS):
        dice = random.Random(seed)  # noqa: S311
        policy, checkpoint = draw(dice), dice.choice(checkpoints)
        with load(checkpoint, tmp_path, policy) as model:
            model._executor.before_step = jitter(seed, 0.0007)
            for call in range(2):  # the second one finds what the first one loaded ahead
                prompts = batch(rows=dice.randint(1, policy.block_size), tokens=dice.randint(2, 6), seed=seed + call)
                # some runs end early, with the next sweep's weights already on their way
                eos = int(dice.choice([-1, greedy(reference(checkpoint), prompts).sequences[0, -3]]))
                expected = greedy(reference(checkpoint), prompts, eos=eos)
                got = greedy(model, prompts, eos=eos)
                where = f"seed {seed}, call {call}, {policy}"
                assert torch.equal(got.sequences, expected.sequences), where
                for ours, theirs in zip(got.logits, expected.logits, strict=True):
                    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4, msg=where)
        assert list(tmp_path.iterdir()) == []
    assert flexgen_threads() == []
