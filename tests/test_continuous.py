"""`generate_each`: each text is what transformers writes after its prompt alone, whatever is computed beside it."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flexgen_hf import CapacityError, FlexGenError, Placement, Policy, StepError, Tier, UnsupportedModelError
from flexgen_hf.bench import batches, emulated
from flexgen_hf.continuous.prefixes import Common, common_beginnings, common_length, in_good_order
from flexgen_hf.continuous.texts import TextRequest

from .comparison import THREE_TIERS, load_ours, load_plain, save_tiny
from .test_families import FAMILIES, TINY, save_family
from .tiny import EVERYTHING_ON_DISK, flexgen_threads, load, reference, write_tiny_opt

ENDS = [5, 17, 33, 60, 71]  # tokens that end a text of the tiny model, after one to many tokens
ON_HOST = Policy(cache=Placement(host=1.0), batch_size=4, num_batches=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_opt(tmp_path_factory.mktemp("continuous") / "model")


def requests(count: int = 19, *, common: int = 0, longest: int = 10, tokens: int = 12, **options: Any) -> list[Any]:
    """Prompts of many lengths; every third begins with the same tokens."""
    draw = random.Random(7)  # noqa: S311  the same prompts in every run
    beginning = [draw.randrange(6, 90) for _ in range(common)]
    made = []
    for number in range(count):
        ids = [draw.randrange(6, 90) for _ in range(draw.randint(1, longest))]
        own = {"do_sample": False, "eos_token_id": ENDS, "pad_token_id": 1, "max_new_tokens": draw.randint(1, tokens)}
        ids = beginning + ids if number % 3 == 0 else ids
        made.append(TextRequest(ids, {**own, **options}, seed=100 + number, key=number))
    return made


def alone(model: Any, request: TextRequest) -> torch.Tensor:
    """What `generate` makes of one prompt."""
    ids = torch.tensor([list(request.ids)])
    torch.manual_seed(request.seed or 0)
    made: torch.Tensor = model.generate(ids, attention_mask=torch.ones_like(ids), **request.options)
    return made


def same_texts(plain: Any, ours: Any, asked: Sequence[TextRequest], **options: Any) -> None:
    got = {}
    for written in ours.generate_each(iter(asked), **options):
        assert written.error is None, written.error
        assert written.request.key not in got
        got[written.request.key] = written.output.tolist()
    assert got == {request.key: alone(plain, request).tolist() for request in asked}


# ------------------------------------------------------------------------------------------------------------ the texts
@pytest.mark.parametrize("policy", [EVERYTHING_ON_DISK, ON_HOST, Policy(batch_size=1, num_batches=3)], ids=str)
@pytest.mark.parametrize("shared", [None, 4])
def test_the_texts_of_transformers(folder: Path, tmp_path: Path, policy: Policy, shared: int | None) -> None:
    asked = requests(common=12)
    with load(folder, tmp_path, policy) as ours:
        same_texts(reference(folder), ours, asked, least_shared=shared, window=8)
    assert len({len(alone(reference(folder), request)[0]) - len(request.ids) for request in asked}) > 4


@pytest.mark.parametrize(
    "mode",
    [
        {"do_sample": True, "temperature": 1.3, "top_k": 30, "top_p": 0.9},
        {"num_beams": 3},
        {"num_beams": 2, "do_sample": True, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 2},
        {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2, "min_new_tokens": 1},
    ],
    ids=str,
)
def test_what_generate_offers(folder: Path, tmp_path: Path, mode: dict[str, Any]) -> None:
    with load(folder, tmp_path) as ours:
        same_texts(reference(folder), ours, requests(11, common=9, **mode), least_shared=4)


def test_each_text_has_options_of_its_own(folder: Path, tmp_path: Path) -> None:
    modes: list[dict[str, Any]] = [{"num_beams": 3}, {"do_sample": True}, {"do_sample": True, "top_k": 3}, {}]
    asked = [
        TextRequest(request.ids, {**request.options, **mode}, request.seed, request.key)
        for request, mode in zip(requests(16), itertools.cycle(modes), strict=False)
    ]
    with load(folder, tmp_path, Policy(batch_size=4, num_batches=2)) as ours:
        same_texts(reference(folder), ours, asked)


@pytest.mark.parametrize("case", FAMILIES)
def test_every_family(case: str, tmp_path: Path) -> None:
    """Windows that slide, positions of every kind, experts: padding moves as texts come and go."""
    checkpoint = save_family(case, tmp_path / "model")
    asked = requests(9, common=9, tokens=8)
    with load_ours(checkpoint) as ours:
        same_texts(load_plain(checkpoint), ours, asked, least_shared=4)


def test_a_family_that_is_not_tested_is_not_padded(tmp_path: Path) -> None:
    from transformers import AutoConfig

    checkpoint = save_tiny(AutoConfig.for_model("arcee", **TINY), tmp_path / "model")
    with load_ours(checkpoint) as ours:
        same_texts(load_plain(checkpoint), ours, requests(9, longest=3), least_shared=4)


def test_angles_that_depend_on_the_longest_text_are_refused(tmp_path: Path) -> None:
    from transformers import AutoConfig

    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    checkpoint = save_tiny(AutoConfig.for_model("llama", **TINY, rope_parameters=rope), tmp_path / "model")
    with load_ours(checkpoint) as ours, pytest.raises(UnsupportedModelError, match="depends on the longest text"):
        ours.generate_each(requests(2))


@pytest.mark.parametrize("host_attention", [False, True])
def test_on_an_accelerator(tiny_opt: Path, plain_opt: Any, host_attention: bool) -> None:
    policy = THREE_TIERS.replace(host_attention=host_attention)
    with load_ours(tiny_opt, policy, device=emulated.install()) as ours:
        same_texts(plain_opt, ours, requests(11, common=9, num_beams=2), least_shared=4)


def test_a_compressed_cache_has_texts_that_do_not_depend_on_their_neighbours(folder: Path, tmp_path: Path) -> None:
    """What is kept in fewer bits is moved as it is kept; and a beginning is not shared, which would change numbers."""
    asked = requests(11, common=9)
    texts = []
    for policy in (Policy(batch_size=3, num_batches=2), Policy(batch_size=1)):
        with load(folder, tmp_path, policy, compression={"cache": 16}) as ours:
            texts.append({w.request.key: w.output.tolist() for w in ours.generate_each(asked, least_shared=4)})
            assert all(sweep.rows >= 1 for sweep in ours.last_run.sweeps)
    assert texts[0] == texts[1]


# ------------------------------------------------------------------------------------------------------------ the order
def test_who_ends_leaves_its_place(folder: Path, tmp_path: Path) -> None:
    """Far fewer sweeps than blocks that wait for their longest text, and no more rows than a block has."""
    asked = requests(64, tokens=24, eos_token_id=None)
    policy = Policy(batch_size=4, num_batches=2)
    with load(folder, tmp_path, policy) as ours:
        same_texts(reference(folder), ours, asked)
        sweeps = ours.last_run.sweeps
    limits = [request.options["max_new_tokens"] for request in asked]
    assert max(sweep.rows for sweep in sweeps) <= policy.block_size
    assert len(sweeps) < 1.25 * sum(limits) / policy.block_size
    assert len(sweeps) < 0.75 * sum(max(limits[i : i + 8]) for i in range(0, 64, 8))


def test_requests_are_read_as_they_are_needed(folder: Path, tmp_path: Path) -> None:
    read = 0

    def endless() -> Iterator[TextRequest]:
        nonlocal read
        for number in itertools.count():
            read += 1
            yield TextRequest(
                [7 + number % 80] * (1 + number % 5), {"max_new_tokens": 2, "pad_token_id": 1}, key=number
            )

    with load(folder, tmp_path) as ours:
        texts = ours.generate_each(endless(), window=16)
        first = [next(texts) for _ in range(20)]
        texts.close()
        assert read <= 48
        assert len({written.request.key for written in first}) == 20
        assert not flexgen_threads()
        same_texts(reference(folder), ours, requests(5))  # the model goes on to be of use


def test_a_beginning_is_computed_once(folder: Path, tmp_path: Path) -> None:
    asked = requests(12, common=20, longest=4, tokens=1)
    asked = [request for request in asked if len(request.ids) > 20] * 4
    computed = []
    for shared in (None, 4):
        with load(folder, tmp_path, Policy(batch_size=4, num_batches=4)) as ours:
            same_texts_of_one_key(ours, asked, shared)
            computed.append(sum(sweep.rows * sweep.tokens for sweep in ours.last_run.sweeps))
    assert computed[1] < 0.45 * computed[0]


def same_texts_of_one_key(ours: Any, asked: Sequence[TextRequest], shared: int | None) -> None:
    texts: dict[Any, set[str]] = {}
    for written in ours.generate_each(asked, least_shared=shared):
        texts.setdefault(written.request.key, set()).add(str(written.output.tolist()))
    assert all(len(found) == 1 for found in texts.values())


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=8), max_size=9), st.integers(1, 4))
def test_beginnings_are_common_and_save_as_much_as_any(prompts: list[list[int]], least: int) -> None:
    found = common_beginnings(prompts, least)
    members = [member for common in found for member in common.members]
    assert len(members) == len(set(members))
    for common in found:
        assert common.tokens >= least
        assert len(common.members) > 1
        beginnings = {tuple(prompts[member][: common.tokens]) for member in common.members}
        assert len(beginnings) == 1
        assert all(len(prompts[member]) > common.tokens for member in common.members)
    assert sum(c.tokens * (len(c.members) - 1) for c in found) == best_saving(prompts, least)


def best_saving(prompts: list[list[int]], least: int, depth: int = 0) -> int:
    """By going down the tree of all beginnings."""
    if len(prompts) < 2:
        return 0
    here = depth * (len(prompts) - 1) if depth >= least else 0
    nexts = {prompt[depth] for prompt in prompts if len(prompt) > depth + 1}
    return max(
        here,
        sum(
            best_saving([p for p in prompts if len(p) > depth + 1 and p[depth] == token], least, depth + 1)
            for token in nexts
        ),
    )


def test_the_larger_saving_is_taken() -> None:
    head, one, other = [1] * 10, [2] * 90, [3] * 90
    few = [[*head, 4, n] for n in range(2)]
    many = [[*head, *part, n] for part in (one, other) for n in range(5)]
    assert sorted(common_beginnings(few + many, 4)) == [
        Common((0, 1), 11),
        Common((2, 3, 4, 5, 6), 100),
        Common((7, 8, 9, 10, 11), 100),
    ]
    assert common_length([1, 2, 3], [1, 2]) == 2


def test_long_texts_come_first_and_neighbours_are_alike() -> None:
    assert in_good_order([3, 9, 5, 7], [0, 0, 0, 0], [-1, -1, -1, -1]) == [1, 3, 2, 0]
    assert in_good_order([3, 9, 5, 7], [8, 8, 16, 64], [-1, -1, -1, -1]) == [3, 2, 1, 0]
    assert in_good_order([3, 9, 5, 8], [0, 0, 0, 0], [0, -1, 0, 0]) == [1, 3, 2, 0]


# ------------------------------------------------------------------------------------------------------------- errors
def test_what_is_wrong_with_one_request_is_its_own_error(folder: Path, tmp_path: Path) -> None:
    asked = requests(6)
    wrong = [
        TextRequest([9] * 39, {"max_new_tokens": 10, "pad_token_id": 1}, key="long"),
        TextRequest([9, 8], {"max_new_tokens": -3}, key="negative"),
        TextRequest([9, 8], {"max_new_tokens": 3, "guidance_scale": 2.0, "pad_token_id": 1}, key="guided"),
        TextRequest([9, 8], {"max_new_tokens": 3, "no_such_option": 1}, key="unknown"),
        TextRequest([], {"max_new_tokens": 3}, key="empty"),
    ]
    mixed = [*asked[:3], *wrong, *asked[3:]]
    with load(folder, tmp_path) as ours:
        written = {w.request.key: w for w in ours.generate_each(mixed)}
    errors = {key: str(w.error) for key, w in written.items() if w.error is not None}
    assert set(errors) == {"long", "negative", "guided", "unknown", "empty"}
    assert "39 tokens and 10 new ones are more than the model's context of 40" in errors["long"]
    assert "guidance_scale" in errors["guided"]
    assert all(written[request.key].output.tolist() == alone(reference(folder), request).tolist() for request in asked)


def test_a_failing_lane_ends_the_job_and_leaves_the_model_usable(folder: Path, tmp_path: Path) -> None:
    with load(folder, tmp_path) as ours:
        steps = itertools.count()

        def fail(lane: str, _step: Any) -> None:
            if lane == "host_to_disk" and next(steps) == 40:
                raise OSError("the disk is gone")

        ours._executor.before_step = fail
        with pytest.raises(StepError, match="the disk is gone"):
            list(ours.generate_each(requests(9)))
        ours._executor.before_step = None
        assert not flexgen_threads()
        same_texts(reference(folder), ours, requests(5))


def test_a_budget_is_kept_with_fewer_rows_at_a_time(tmp_path: Path) -> None:
    """What does not fit waits for room; what cannot fit alone is an error of its own."""
    folder = write_tiny_opt(tmp_path / "model", num_hidden_layers=2, max_position_embeddings=4096)
    asked = [
        TextRequest([9 + n] * 5, {"max_new_tokens": 60, "pad_token_id": 1, "eos_token_id": None}, key=n)
        for n in range(12)
    ]
    asked.append(TextRequest([5] * 2000, {"max_new_tokens": 2000, "pad_token_id": 1}, key="too large"))
    policy = Policy(weights=Placement(disk=1.0), batch_size=6, num_batches=2)
    with load(folder, tmp_path / "o", policy, max_memory={"cpu": "1000KB"}) as ours:
        written = {w.request.key: w for w in ours.generate_each(asked)}
        report = ours.last_run
    assert isinstance(written.pop("too large").error, CapacityError)
    assert report.peak_bytes[Tier.DEVICE] + report.peak_bytes[Tier.HOST] <= 1000 * 1000
    assert 1 < report.rows < 12
    for request in asked[:-1]:
        assert written[request.key].output.tolist() == alone(reference(folder), request).tolist()


def test_a_window_of_nothing_is_refused(folder: Path, tmp_path: Path) -> None:
    with load(folder, tmp_path) as ours, pytest.raises(FlexGenError, match="window=-1"):
        ours.generate_each(requests(3), window=-1)


def test_a_text_knows_what_it_cannot_do(folder: Path, tmp_path: Path) -> None:
    request = TextRequest([9, 8, 7], {"max_new_tokens": 3, "prompt_lookup_num_tokens": 2, "pad_token_id": 1})
    with load(folder, tmp_path) as ours:
        (written,) = ours.generate_each([request])
    assert isinstance(written.error, UnsupportedModelError)


def test_the_benchmark_compares_the_same_texts(folder: Path, tmp_path: Path) -> None:
    with load(folder, tmp_path, Policy(batch_size=2, num_batches=2)) as ours:
        for is_known in (True, False):
            lengths = batches.many_lengths(ours, 12, (1, 9), (1, 12), is_known=is_known)
            assert lengths.different == 0
            assert lengths.sweeps[1] < lengths.sweeps[0]
        assert batches.common_beginning(ours, rows=4, prompt=40 - 2).different == 0
