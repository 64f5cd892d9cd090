"""The main promise: for any policy, exactly the tokens that transformers gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flexgen_hf import Placement, Policy, Tier
from flexgen_hf.bench import emulated

from .comparison import BEAMS, GREEDY, SAMPLING, load_ours, ragged, same_tokens

MODES = {"greedy": GREEDY, "sampling": SAMPLING, "beams": BEAMS}

#: all on one tier, two and two, and shares that no model divides into evenly
PLACEMENTS = [
    *(Placement.all_on(tier) for tier in Tier),
    Placement(device=0.5, host=0.5),
    Placement(host=0.5, disk=0.5),
    Placement(device=0.5, disk=0.5),
    Placement(device=0.3, host=0.3),
    Placement(device=0.1, host=0.2),
    Placement(device=0.6, host=0.35),
]

FIELDS: dict[str, Any] = {
    "weights": st.sampled_from(PLACEMENTS),
    "cache": st.sampled_from(PLACEMENTS),
    "hidden": st.sampled_from(PLACEMENTS),
    "batch_size": st.integers(1, 4),
    "num_batches": st.integers(1, 3),
    "overlap": st.booleans(),
    "layer_slots": st.integers(1, 3),
}
policies = st.builds(Policy, **FIELDS)
policies_of_an_accelerator = st.builds(Policy, **FIELDS, host_attention=st.booleans())

batches = st.lists(st.integers(1, 12), min_size=1, max_size=9)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(policy=policies, lengths=batches)
def test_any_policy_gives_the_tokens_of_transformers(
    tiny_opt: Path, plain_opt: Any, policy: Policy, lengths: list[int]
) -> None:
    """Blocks of 1 to 12 prompts and batches of 1 to 9: ragged last micro-batches, and more prompts than a block."""
    with load_ours(tiny_opt, policy) as ours:
        for mode in MODES.values():
            same_tokens(plain_opt, ours, mode, ragged(lengths))


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(policy=policies_of_an_accelerator, lengths=batches, mode=st.sampled_from(list(MODES)))
def test_any_policy_gives_the_tokens_of_transformers_on_an_accelerator(
    tiny_opt: Path, plain_opt: Any, policy: Policy, lengths: list[int], mode: str
) -> None:
    """One mode for each policy: a device that is emulated takes its time."""
    with load_ours(tiny_opt, policy, device=emulated.install()) as ours:
        same_tokens(plain_opt, ours, MODES[mode], ragged(lengths))


@pytest.mark.parametrize("overlap", [True, False], ids=["overlap", "one after the other"])
@pytest.mark.parametrize("mode", MODES)
def test_a_ragged_last_micro_batch_in_a_ragged_last_block(
    tiny_opt: Path, plain_opt: Any, device: str, mode: str, overlap: bool
) -> None:
    policy = Policy.parse("30 30 30 40 30 30", batch_size=2, num_batches=2, overlap=overlap)
    with load_ours(tiny_opt, policy, device=device) as ours:
        same_tokens(plain_opt, ours, MODES[mode], ragged())  # blocks of 4 and 3, the latter as 2 and 1


@pytest.mark.parametrize("percents", ["100 0 100 0 100 0", "0 100 0 100 0 100", "0 0 0 0 0 0", "30 30 30 30 30 30"])
@pytest.mark.parametrize("mode", MODES)
def test_a_model_serves_one_call_after_the_other(
    tiny_opt: Path, plain_opt: Any, device: str, percents: str, mode: str
) -> None:
    """Whatever a call leaves in slots, spill files and lanes, the next one is not to see it."""
    with load_ours(tiny_opt, Policy.parse(percents, batch_size=3, num_batches=2), device=device) as ours:
        for lengths in ([2, 9, 4], [12], [1, 1, 5, 3, 8, 2, 2, 6]):
            same_tokens(plain_opt, ours, MODES[mode], ragged(lengths), max_new_tokens=4)


def test_the_comparison_can_fail(tiny_opt: Path, plain_opt: Any) -> None:
    """Tokens differ from prompt to prompt, and follow from what lies to the left of the last token."""
    prompts = ragged()
    tokens = plain_opt.generate(**prompts, **GREEDY, max_new_tokens=6)[:, prompts["input_ids"].shape[1] :]
    assert len({tuple(row) for row in tokens.tolist()}) == len(tokens)
    changed = {**prompts, "input_ids": prompts["input_ids"].clone()}
    changed["input_ids"][:, -2] += 1
    assert not plain_opt.generate(**changed, **GREEDY, max_new_tokens=6)[:, 9:].equal(tokens)
