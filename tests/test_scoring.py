"""`score_each`: each continuation gets the probabilities that transformers gives it alone."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from flexgen_hf import FlexGenError, Placement, Policy, StepError, Tier, UnsupportedModelError
from flexgen_hf.bench import emulated
from flexgen_hf.continuous.scoring import Scored, ScoreRequest
from flexgen_hf.planning.budget import SCORED_AT_ONCE

from .comparison import THREE_TIERS, load_ours, load_plain, save_tiny
from .test_families import FAMILIES, TINY, save_family
from .tiny import EVERYTHING_ON_DISK, flexgen_threads, load, reference, write_tiny_opt

ON_HOST = Policy(cache=Placement(host=1.0), batch_size=4, num_batches=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_opt(tmp_path_factory.mktemp("scoring") / "model")


def pairs(count: int = 17, *, common: int = 0, longest: int = 9, seed: int = 5) -> list[ScoreRequest]:
    """Contexts of many lengths, some of them twice or with a common beginning, and continuations of many lengths."""
    draw = random.Random(seed)  # noqa: S311  the same pairs in every run

    def tokens(most: int) -> list[int]:
        return [draw.randrange(6, 90) for _ in range(draw.randint(1, most))]

    beginning, made, context = [draw.randrange(6, 90) for _ in range(common)], [], [0]
    for number in range(count):
        if number % 3:
            context = (beginning if number % 2 else []) + tokens(longest)
        made.append(ScoreRequest(context, tokens(1 if number % 4 == 0 else longest), key=number))
    return made


def alone(plain: Any, request: ScoreRequest) -> tuple[torch.Tensor, torch.Tensor]:
    """What one forward of transformers says of one pair."""
    ids = torch.tensor([[*request.context, *request.continuation]])
    with torch.no_grad():
        logits = plain(ids).logits[0, len(request.context) - 1 : -1].float()
    targets = ids[0, len(request.context) :]
    return logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0], logits.argmax(-1)


def same_scores(plain: Any, ours: Any, asked: Sequence[ScoreRequest], **options: Any) -> None:
    got: dict[Any, Scored] = {}
    for scored in ours.score_each(iter(asked), **options):
        assert scored.error is None, scored.error
        assert scored.request.key not in got
        got[scored.request.key] = scored
    assert set(got) == {request.key for request in asked}
    for request in asked:
        want, likeliest = alone(plain, request)
        scored = got[request.key]
        assert scored.request is request
        assert scored.log_probs.dtype == torch.float32
        torch.testing.assert_close(scored.log_probs, want, rtol=1e-4, atol=1e-4)
        assert torch.equal(scored.likeliest, likeliest)
        assert scored.is_greedy.tolist() == [a == b for a, b in zip(likeliest, request.continuation, strict=True)]
        assert scored.total == pytest.approx(float(want.sum()), abs=1e-4 * len(want))


# ----------------------------------------------------------------------------------------------------------- the scores
@pytest.mark.parametrize("policy", [EVERYTHING_ON_DISK, ON_HOST, Policy(batch_size=1, num_batches=3)], ids=str)
@pytest.mark.parametrize("shared", [None, 4])
def test_the_scores_of_transformers(folder: Path, tmp_path: Path, policy: Policy, shared: int | None) -> None:
    with load(folder, tmp_path, policy) as ours:
        same_scores(reference(folder), ours, pairs(common=12), least_shared=shared, window=8)


def test_more_tokens_than_are_looked_at_at_once(tmp_path: Path) -> None:
    folder = write_tiny_opt(tmp_path / "model", max_position_embeddings=256)
    draw = random.Random(2)  # noqa: S311
    asked = [
        ScoreRequest([2], [draw.randrange(6, 90) for _ in range(length)], key=length)
        for length in (2 * SCORED_AT_ONCE, SCORED_AT_ONCE, SCORED_AT_ONCE + 1, SCORED_AT_ONCE - 1, 3, 1)
    ]
    for policy in (Policy(batch_size=4, num_batches=2), Policy(batch_size=1, num_batches=1)):
        with load(folder, tmp_path / "o", policy) as ours:
            same_scores(reference(folder), ours, asked)


def test_what_is_likeliest_is_what_is_written(folder: Path, tmp_path: Path) -> None:
    """A greedy continuation is greedy at every place."""
    plain = reference(folder)
    asked = []
    for request in pairs(6):
        ids = torch.tensor([request.context])
        written = plain.generate(ids, max_new_tokens=7, do_sample=False, eos_token_id=None, pad_token_id=1)
        asked.append(ScoreRequest(request.context, written[0, ids.shape[1] :].tolist()))
    with load(folder, tmp_path) as ours:
        assert all(bool(scored.is_greedy.all()) for scored in ours.score_each(asked))


@pytest.mark.parametrize("case", FAMILIES)
def test_every_family(case: str, tmp_path: Path) -> None:
    """Logits that are scaled or capped behind the head, layers whose code stands one module deeper, experts."""
    checkpoint = save_family(case, tmp_path / "model")
    with load_ours(checkpoint) as ours:
        same_scores(load_plain(checkpoint), ours, pairs(9, common=9, longest=5), least_shared=4)


def test_a_family_that_is_not_tested_is_not_padded(tmp_path: Path) -> None:
    from transformers import AutoConfig

    checkpoint = save_tiny(AutoConfig.for_model("arcee", **TINY), tmp_path / "model")
    with load_ours(checkpoint) as ours:
        same_scores(load_plain(checkpoint), ours, pairs(9, longest=3), least_shared=4)


@pytest.mark.parametrize("host_attention", [False, True])
def test_on_an_accelerator(tiny_opt: Path, plain_opt: Any, host_attention: bool) -> None:
    policy = THREE_TIERS.replace(host_attention=host_attention)
    with load_ours(tiny_opt, policy, device=emulated.install()) as ours:
        same_scores(plain_opt, ours, pairs(11, common=9), least_shared=4)


def test_weights_that_are_stored_in_16_bit(tmp_path: Path) -> None:
    """The head's table is cast for a few tokens at a time, too."""
    folder = write_tiny_opt(tmp_path / "model", torch.bfloat16)
    with load(folder, tmp_path / "o", Policy(weights=Placement(disk=1.0), batch_size=3, num_batches=2)) as ours:
        same_scores(reference(folder), ours, pairs())


# --------------------------------------------------------------------------------------------------------- the sharing
def test_answers_of_one_token_are_one_row(folder: Path, tmp_path: Path) -> None:
    asked = [
        ScoreRequest([9 + question, 8, 7, 30 + question], [answer], key=(question, answer))
        for question, answer in itertools.product(range(6), (11, 12, 13, 14))
    ]
    with load(folder, tmp_path, Policy(batch_size=8)) as ours:
        same_scores(reference(folder), ours, asked)
        (sweep,) = ours.last_run.sweeps
        assert (sweep.rows, sweep.tokens) == (6, 4)


def test_what_one_row_begins_with_needs_no_other(folder: Path, tmp_path: Path) -> None:
    asked = [ScoreRequest([9, 8], [7, 6, 5][:length], key=length) for length in (1, 2, 3)]
    asked.append(ScoreRequest([9], [8, 7, 6, 5, 4], key="all"))
    with load(folder, tmp_path, Policy(batch_size=8)) as ours:
        same_scores(reference(folder), ours, asked)
        assert [sweep.rows for sweep in ours.last_run.sweeps] == [1]


def test_a_common_context_is_computed_once(folder: Path, tmp_path: Path) -> None:
    context = [7 + n % 50 for n in range(25)]
    asked = [ScoreRequest([*context, 60 + n], [61 + n, 5, 70 - n], key=n) for n in range(12)]
    computed = []
    for shared in (None, 4):
        with load(folder, tmp_path, Policy(batch_size=4, num_batches=4)) as ours:
            same_scores(reference(folder), ours, asked, least_shared=shared)
            computed.append(sum(sweep.rows * sweep.tokens for sweep in ours.last_run.sweeps))
    assert computed[1] < 0.3 * computed[0]


def test_weights_are_read_once_for_a_block(folder: Path, tmp_path: Path) -> None:
    policy = Policy(weights=Placement(disk=1.0), batch_size=4, num_batches=3)
    asked = [ScoreRequest([9 + n, 8 + n], [7, 6 + n], key=n) for n in range(24)]
    with load(folder, tmp_path, policy) as ours:
        same_scores(reference(folder), ours, asked)
        assert [sweep.rows for sweep in ours.last_run.sweeps] == [12, 12]


def test_requests_are_read_as_they_are_needed(folder: Path, tmp_path: Path) -> None:
    read = 0

    def endless() -> Iterator[ScoreRequest]:
        nonlocal read
        for number in itertools.count():
            read += 1
            yield ScoreRequest([7 + number % 80] * (1 + number % 5), [9, 8], key=number)

    with load(folder, tmp_path) as ours:
        scores = ours.score_each(endless(), window=16)
        assert len({next(scores).request.key for _ in range(20)}) == 20
        scores.close()
        assert read <= 64
        assert not flexgen_threads()
        same_scores(reference(folder), ours, pairs(5))  # the model goes on to be of use
        ids = torch.tensor([[9, 8, 7]])
        torch.testing.assert_close(ours(ids).logits, reference(folder)(ids).logits)


# ----------------------------------------------------------------------------------------------------------- the memory
def test_logits_are_made_for_a_few_tokens_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest logits have as many rows as are looked at at once, not as many as there are tokens."""
    folder = write_tiny_opt(tmp_path / "model", max_position_embeddings=256)
    sizes = []
    plain = torch.nn.functional.linear

    def linear(x: torch.Tensor, weight: torch.Tensor, bias: Any = None) -> torch.Tensor:
        out = plain(x, weight, bias)
        if out.shape[-1] == reference(folder).config.vocab_size:
            sizes.append(out.numel() // out.shape[-1])
        return out

    asked = [ScoreRequest([2], [9 + n] * 200, key=n) for n in range(8)]
    with load(folder, tmp_path / "o", Policy(batch_size=2, num_batches=4)) as ours:
        monkeypatch.setattr(torch.nn.functional, "linear", linear)
        assert len(list(ours.score_each(asked))) == 8
    assert sum(sizes) == 8 * 200
    assert max(sizes) == SCORED_AT_ONCE


def test_a_budget_is_kept_with_fewer_rows_at_a_time(tmp_path: Path) -> None:
    folder = write_tiny_opt(tmp_path / "model", num_hidden_layers=2, max_position_embeddings=4096)
    asked = [ScoreRequest([2, 9 + n], [9 + n, 5] * 40, key=n) for n in range(12)]
    policy = Policy(weights=Placement(disk=1.0), batch_size=6, num_batches=2)
    with load(folder, tmp_path / "o", policy, max_memory={"cpu": "1000KB"}) as ours:
        scored = list(ours.score_each([*asked, ScoreRequest([2], [5] * 4000, key="too large")]))
        report = ours.last_run
        assert [type(s.error).__name__ for s in scored if s.request.key == "too large"] == ["CapacityError"]
        assert report.peak_bytes[Tier.DEVICE] + report.peak_bytes[Tier.HOST] <= 1000 * 1000
        assert 1 < report.rows < 12
        same_scores(reference(folder), ours, asked)


# ----------------------------------------------------------------------------------------------------------- the errors
def test_what_is_wrong_with_one_request_is_its_own_error(folder: Path, tmp_path: Path) -> None:
    good = pairs(6)
    wrong = [
        ScoreRequest([], [9], key="no context"),
        ScoreRequest([9], [], key="no continuation"),
        ScoreRequest([9, 100], [8], key="unknown"),
        ScoreRequest([9], [8, -1], key="negative"),
        ScoreRequest([9] * 30, [8] * 12, key="long"),
    ]
    with load(folder, tmp_path) as ours:
        for asked in ([*good[:3], *wrong, *good[3:]], wrong):
            scored = {s.request.key: s for s in ours.score_each(asked, window=4)}
            assert set(scored) == {request.key for request in asked}
            errors = {key: str(s.error) for key, s in scored.items() if s.error is not None}
            assert set(errors) == {request.key for request in wrong}
            assert all(scored[request.key].log_probs.numel() == 0 for request in wrong)
        # as long as the context is: its last token is not computed
        (longest,) = ours.score_each([ScoreRequest([9] * 30, [8] * 11)])
        assert longest.error is None
    assert "no tokens" in errors["no context"]
    assert "no tokens" in errors["no continuation"]
    assert "token 100 is not among the" in errors["unknown"]
    assert "token -1 is not among the" in errors["negative"]
    assert "more than the model's context of 40" in errors["long"]


def test_a_prompt_in_chunks_is_refused(folder: Path, tmp_path: Path) -> None:
    with load(folder, tmp_path) as ours:
        ours.generation_config.prefill_chunk_size = 2
        (scored,) = ours.score_each([ScoreRequest([9, 8, 7, 6, 5], [8])])
    assert isinstance(scored.error, UnsupportedModelError)
    assert "prefill_chunk_size" in str(scored.error)


def test_angles_that_depend_on_the_longest_text_are_refused(tmp_path: Path) -> None:
    from transformers import AutoConfig

    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    checkpoint = save_tiny(AutoConfig.for_model("llama", **TINY, rope_parameters=rope), tmp_path / "model")
    with load_ours(checkpoint) as ours, pytest.raises(UnsupportedModelError, match=r"score_each: .* the longest text"):
        ours.score_each(pairs(2))


def test_a_window_of_nothing_is_refused(folder: Path, tmp_path: Path) -> None:
    with load(folder, tmp_path) as ours, pytest.raises(FlexGenError, match="window=-1"):
        ours.score_each(pairs(3), window=-1)


def test_a_failing_lane_ends_the_job_and_leaves_the_model_usable(folder: Path, tmp_path: Path) -> None:
    with load(folder, tmp_path) as ours:
        steps = itertools.count()

        def fail(lane: str, _step: Any) -> None:
            if lane == "disk_to_host" and next(steps) == 5:
                raise OSError("the disk is gone")

        ours._executor.before_step = fail
        with pytest.raises(StepError, match="the disk is gone"):
            list(ours.score_each(pairs(9)))
        ours._executor.before_step = None
        assert not flexgen_threads()
        same_scores(reference(folder), ours, pairs(5))
