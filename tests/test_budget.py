"""Budgets that hold: what a policy takes is known before, refused with a way out, and never passed."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, OPTConfig

from conversion.convert import convert
from flexgen_hf import CapacityError, Compression, FlexGenForCausalLM, Placement, Policy, Tier, loading
from flexgen_hf.accounting import Account, windows_of
from flexgen_hf.bench import emulated
from flexgen_hf.bench.shapes import write_random_checkpoint
from flexgen_hf.microbatches import joined
from flexgen_hf.planning.budget import (
    ESTIMATED,
    Call,
    Demand,
    Limit,
    ModelSizes,
    Need,
    alternatives,
    difference,
    fits,
    totals,
)
from tests.control_groups import PEAK_MEMORY, memory_limit, run_in
from tests.tiny import DISK, batch, greedy, load, pretend_accelerator, reference, write_tiny_opt

from .test_families import save_family

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_opt(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def in_16_bit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its weights are cast on their way."""
    return write_tiny_opt(tmp_path_factory.mktemp("model"), torch.float16)


@pytest.fixture(scope="module")
def quantized(in_16_bit: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its matrices are dequantized on their way."""
    out = tmp_path_factory.mktemp("store")
    convert(in_16_bit, out, compression=Compression(weights=4, group_size=32))
    return out


@pytest.fixture(scope="module")
def offload(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("offload")


@pytest.fixture(params=["direct", "pushed"])
def way(request: pytest.FixtureRequest) -> Iterator[None]:
    """Compute in host memory, or behind a link."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "pushed":
            pretend_accelerator(patch)
        yield


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """What each call was described as."""
    seen: list[Call] = []
    enter = Account._enter

    def noted(account: Account, call: Call, *args: Any) -> None:
        seen.append(call)
        enter(account, call, *args)

    monkeypatch.setattr(Account, "_enter", noted)
    return seen


# ------------------------------------------------------------------------------------------------------- what is needed
@st.composite
def placements(draw: Any) -> Placement:
    device = draw(st.integers(0, 10))
    host = draw(st.integers(0, 10 - device))
    return Placement(device=device / 10, host=host / 10)


@st.composite
def policies(draw: Any) -> Policy:
    return Policy(
        weights=draw(placements()),
        cache=draw(placements()),
        hidden=draw(placements()),
        batch_size=draw(st.integers(1, 5)),
        num_batches=draw(st.integers(1, 4)),
        overlap=draw(st.booleans()),
        compression=draw(st.sampled_from([None, *({"cache": bits} for bits in (2, 3, 4, 8, 16))])),
    )


@pytest.mark.usefixtures("way")
@hypothesis.given(policy=policies(), rows=st.integers(1, 9), tokens=st.integers(2, 20), new=st.integers(2, 12))
@hypothesis.settings(
    max_examples=25, deadline=None, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
def test_what_is_predicted_is_what_is_taken(  # noqa: PLR0917  fixtures and what is drawn
    checkpoint: Path,
    in_16_bit: Path,
    quantized: Path,
    offload: Path,
    calls: list[Call],
    policy: Policy,
    rows: int,
    tokens: int,
    new: int,
) -> None:
    """To the byte, on each tier, whatever moves and whatever is cast or dequantized."""
    for folder in (checkpoint, in_16_bit, quantized):
        calls.clear()
        with load(folder, offload, policy) as model:
            greedy(model, batch(rows, tokens), new)
            assert model._account.demand.peak(policy, calls[0]) == model.last_run.peak_bytes


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("case", ["mistral", "gemma3_text", "deepseek_v3", "gpt_bigcode"])
@pytest.mark.parametrize(
    ("percents", "bits"), [("0 0 0 0 0 0", None), ("30 30 30 40 100 0", 4), ("100 0 0 100 0 100", 16)]
)
def test_it_is_so_with_windows_and_latent_keys(
    tmp_path: Path, calls: list[Call], case: str, percents: str, bits: int | None
) -> None:
    """Cells of a sliding layer have room for its window only; keys may be wider than values."""
    folder = save_family(case, tmp_path / "model")
    policy = Policy.parse(percents, batch_size=2, num_batches=2, compression=Compression(cache=bits))
    with load(folder, tmp_path / "offload", policy) as model:
        greedy(model, batch(4, 9), 12)
        assert model._account.demand.peak(policy, calls[0]) == model.last_run.peak_bytes
        taken = model.last_run.to_dict()["placement"]["cache"]
        calls.clear()
        if any(windows_of(model.config)):
            model(**batch(4, 21), use_cache=True)  # may be cropped, so all is kept
            assert calls[0].keeps_past
            assert sum(model.last_run.to_dict()["placement"]["cache"].values()) >= sum(taken.values())


@pytest.mark.parametrize("bits", [None, 4])
def test_the_beams_of_a_prompt_need_no_more_than_is_predicted(
    checkpoint: Path, offload: Path, calls: list[Call], bits: int | None
) -> None:
    for share in (0.0, 0.5, 1.0):
        policy = Policy(weights=DISK, cache=Placement(device=share), batch_size=6, num_batches=2)
        policy = policy.replace(compression=Compression(cache=bits))
        calls.clear()
        with load(checkpoint, offload, policy) as model:
            model.generate(**batch(4), num_beams=3, do_sample=False, max_new_tokens=5, min_new_tokens=5)
            predicted, taken = model._account.demand.peak(policy, calls[0]), model.last_run.peak_bytes
        assert all(taken[tier] <= predicted[tier] for tier in Tier)
        assert sum(predicted.values()) <= 1.2 * sum(taken.values())


def write_small(folder: Path, family: str) -> Path:
    """A checkpoint large enough for its activations to be more than noise."""
    sizes: dict[str, Any] = {"vocab_size": 300, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    if family == "OPT":
        config: Any = OPTConfig(**sizes, word_embed_proj_dim=64, ffn_dim=256, max_position_embeddings=100)
    else:
        config = LlamaConfig(**sizes, intermediate_size=172, num_key_value_heads=2, max_position_embeddings=100)
    return write_random_checkpoint(folder, config, torch.float32)


@pytest.mark.parametrize("tokens", [8, 64])
@pytest.mark.parametrize("family", ["OPT", "Llama"])
@pytest.mark.parametrize("hidden", [Placement(device=1.0), Placement(host=1.0), DISK], ids=["device", "host", "disk"])
def test_estimates_are_upper_bounds_and_not_wild(
    tmp_path: Path, calls: list[Call], family: str, hidden: Placement, tokens: int
) -> None:
    """Against what a device holds that counts every tensor; its attention writes scores to memory, as eager does."""
    folder, device = write_small(tmp_path / "model", family), emulated.configure()
    policy = Policy(hidden=hidden, batch_size=4, num_batches=2)
    with FlexGenForCausalLM.from_pretrained(
        folder, policy=policy, device=str(emulated.install()), offload_folder=tmp_path, attn_implementation="eager"
    ) as model:
        device.peak_bytes = device.used_bytes
        greedy(model, batch(8, tokens), 2)
        needs = model._account.demand.needs(policy, calls[0])
        estimated = sum(need.nbytes for need in needs if need.what in ESTIMATED)
        taken = device.peak_bytes - (model.last_run.peak_bytes[Tier.DEVICE] - estimated)
    assert taken <= estimated <= 2.5 * taken


def test_logits_are_those_of_one_token_and_one_tensor(
    checkpoint: Path, offload: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The micro-batches' outputs are parts of one product, which is returned, not copied."""
    seen = []
    merge = FlexGenForCausalLM._forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        seen.append(output := merge(*args, **kwargs))
        return output

    monkeypatch.setattr(FlexGenForCausalLM, "_forward", forward)
    monkeypatch.setattr(torch, "cat", lambda parts, *a, cat=torch.cat, **k: _no_logits(cat(parts, *a, **k)))
    with load(checkpoint, offload, Policy(batch_size=3, num_batches=3)) as model:
        got = greedy(model, batch(7), 4)
    assert [tuple(output.logits.shape) for output in seen] == [(7, 1, 96)] * 4
    assert all(output.logits.untyped_storage().nbytes() == 7 * 96 * 4 for output in seen)
    assert torch.equal(got.sequences, greedy(reference(checkpoint), batch(7), 4).sequences)


def _no_logits(joined: torch.Tensor) -> torch.Tensor:
    assert joined.shape[-1] != 96, "logits were copied"
    return joined


def test_parts_that_are_not_one_tensor_arejoined() -> None:
    whole = torch.arange(24.0).reshape(6, 4)
    first, second, third = whole.split([2, 3, 1])
    assert joined([first, second, third]).data_ptr() == whole.data_ptr()
    for parts in (
        [second, first],
        [first, third],
        [first, second.clone()],
        [first, second * 2],
        [first, second[:, :0]],
    ):
        if parts[-1].shape[1] == 4:
            assert torch.equal(joined(parts), torch.cat(parts))
            assert joined(parts).data_ptr() != whole.data_ptr()


# ------------------------------------------------------------------------------------------------------------ a way out
def demand(**sizes: Any) -> Demand:
    """Of 8 layers of 1000 tokens' worth of nothing but cache and weights, in whole pages."""
    fields = {"num_layers": 8, "hidden_size": 1, "inner_size": 1, "query_size": 1, "key_size": 4096, "num_heads": 1,
              "vocab_size": 1, "itemsize": 1}  # fmt: skip

    def weights(placement: Placement) -> list[Need]:
        return [Need(tier, round(placement.share(tier) * 1_000_000), "weights") for tier in Tier]

    return Demand(ModelSizes(**{**fields, **sizes}), weights, direct=False)


def fit(nbytes: int, tier: Tier = Tier.DEVICE, rows: int = 32) -> Callable[[Policy], bool]:
    """Whether a call of 10 tokens fits, with so much of a tier."""
    wanted, call = demand(), Call(rows, 10, 10)
    limits = [Limit((tier,), nbytes, "it")]
    return lambda policy: fits(wanted.peak(policy, call.in_block(policy)), limits)


def test_the_nearest_alternatives_in_their_order() -> None:
    policy = Policy(weights=Placement(device=0.5), batch_size=8, num_batches=4)
    asked = fit(20_000_000)  # a row needs 8 x 2 x 40960 bytes
    found = alternatives(policy, asked)
    assert [difference(policy, other) for other in found] == [
        "batch_size=7 (block 28)",
        "21 % of the cache on the host",
    ]
    for other in found:
        assert asked(other)


@pytest.mark.parametrize(
    ("nbytes", "block"), [(17_000_000, 24), (10_000_000, 12), (5_000_000, 6), (1_300_000, 1), (1_000_000, None)]
)
def test_the_largest_block_is_found(nbytes: int, block: int | None) -> None:
    policy, asked = Policy(weights=Placement(device=0.5), batch_size=8, num_batches=4), fit(nbytes)
    blocks = [other.block_size for other in alternatives(policy, asked) if other.weights == policy.weights
              and other.cache == policy.cache]  # fmt: skip
    every = [Policy(weights=policy.weights, batch_size=b, num_batches=n) for b in range(1, 9) for n in range(1, 5)]
    assert blocks == ([max(other.block_size for other in every if asked(other))] if block else [])


def test_no_smaller_share_of_the_cache_has_to_go() -> None:
    policy, asked = Policy(weights=DISK, batch_size=8, num_batches=4), fit(12_000_000)
    other = alternatives(policy, asked)[1]
    share = round(other.cache.host * 100)
    assert other.cache.disk == 0
    assert asked(policy.replace(cache=Placement(device=1 - share / 100, host=share / 100)))
    assert not asked(policy.replace(cache=Placement(device=1 - (share - 1) / 100, host=(share - 1) / 100)))


def test_what_is_on_disk_goes_elsewhere_if_it_is_the_disk_that_is_full() -> None:
    policy = Policy(weights=DISK)
    asked = fit(300_000, Tier.DISK)
    (other,) = alternatives(policy, asked, blocks=False)
    assert difference(policy, other) == "70 % of the weights on the host"
    assert asked(other)


def test_cache_and_weights_on_disk_are_the_last_resort() -> None:
    policy = Policy(batch_size=8, num_batches=4)
    assert not alternatives(policy, lambda _: False)
    (other,) = alternatives(policy, lambda p: p.weights.disk == 1 and p.cache.disk == 1 and p.block_size <= 5)
    assert difference(policy, other) == (
        "batch_size=5 and num_batches=1 (block 5) and 100 % of the weights on disk and 100 % of the cache on disk"
    )


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("cut", [True, False], ids=["greedy", "sampling"])
def test_a_call_that_does_not_fit_is_refused_with_a_way_out(checkpoint: Path, offload: Path, cut: bool) -> None:
    """Nothing is computed and nothing stays; what the message says works, and so does a smaller call."""
    policy = Policy(weights=DISK, batch_size=4, num_batches=4)
    limits = {0: 400_000, "cpu": 600_000, "disk": 2_000_000}
    settings = {"do_sample": not cut, "max_new_tokens": 20, "min_new_tokens": 20}
    with load(checkpoint, offload, policy, max_memory=limits) as model:
        held = {tier: model._executor.space.ledger.held(tier) for tier in Tier}
        for _ in range(2):
            with pytest.raises(CapacityError, match=r"needs .* MiB left of .*; fits with ") as caught:
                model.generate(**batch(16, 12), **settings)
            assert model.last_run.sweeps == []
            assert {tier: model._executor.space.ledger.held(tier) for tier in Tier} == held
        model.generate(**batch(2, 4), do_sample=False, max_new_tokens=2)
        assert {tier: model._executor.space.ledger.held(tier) for tier in Tier} == held
    way_out = str(caught.value).partition("; fits with ")[2]
    first = way_out.partition(", or with")[0]
    policy = policy.replace(
        **{name: int(value) for name, value in re.findall(r"(batch_size|num_batches)=(\d+)", first)}
    )
    for share, kind, tier in re.findall(r"(\d+) % of the (cache|weights) on (?:the )?(host|disk)", first):
        part = int(share) / 100
        policy = policy.replace(**{kind: Placement(device=1 - part, host=part if tier == "host" else 0.0)})
    with load(checkpoint, offload, policy, max_memory=limits) as model:
        got = model.generate(**batch(16, 12), **settings, eos_token_id=None)
        assert all(model.last_run.peak_bytes[tier] <= size for tier, size in zip(Tier, limits.values(), strict=True))
    if cut:
        assert torch.equal(got, reference(checkpoint).generate(**batch(16, 12), **settings, eos_token_id=None))


def test_weights_that_do_not_fit_are_refused_with_the_shares_that_do(deep: Path, offload: Path) -> None:
    limits = {"cpu": 600_000}
    with pytest.raises(CapacityError, match=r"weights needs .*; fits with (\d+) % of the weights on disk") as caught:
        load(deep, offload, Policy(), max_memory=limits)
    share = int(re.search(r"(\d+) % of the weights on disk", str(caught.value))[1])  # type: ignore[index]
    load(deep, offload, Policy(weights=Placement(device=1 - share / 100)), max_memory=limits).close()
    with pytest.raises(CapacityError):  # a tensor is up to two percent of the model
        load(deep, offload, Policy(weights=Placement(device=1.03 - share / 100)), max_memory=limits)
    with pytest.raises(CapacityError, match="no placement of the weights fits"):
        load(deep, offload, Policy(), max_memory={"cpu": 10_000})


def test_what_is_entered_for_a_call_is_given_back(checkpoint: Path, offload: Path) -> None:
    with load(checkpoint, offload, Policy(batch_size=2, num_batches=2)) as model:
        ledger = model._executor.space.ledger
        during = []

        def note(_: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            during.append(ledger.held_as(Tier.DEVICE, "logits"))
            return scores

        model.generate(
            **batch(7),
            max_new_tokens=3,
            do_sample=False,
            logits_processor=[note],
        )
        assert min(during) > 0
        assert all(ledger.held_as(Tier.DEVICE, name) == 0 for name in ESTIMATED)

        def interrupt(*_: Any) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            model.generate(**batch(7), max_new_tokens=3, logits_processor=[interrupt])
        assert all(ledger.held_as(Tier.DEVICE, name) == 0 for name in ESTIMATED)


# ----------------------------------------------------------------------------------------------------- a plain forward
#: arguments of a forward, made from the prompts
FORWARDS: dict[str, Callable[[dict[str, torch.Tensor]], dict[str, Any]]] = {
    "plain": lambda _: {},
    "no cache": lambda _: {"use_cache": False},
    "labels": lambda prompts: {"labels": prompts["input_ids"]},
    "last logits": lambda _: {"logits_to_keep": 1},
    "hidden states": lambda _: {"output_hidden_states": True},
    "attention": lambda _: {"output_attentions": True},
}


def held(model: Any) -> dict[Tier, int]:
    """Bytes in the account."""
    return {tier: model._executor.space.ledger.held(tier) for tier in Tier}


@pytest.mark.parametrize("hidden", [Placement(device=1.0), DISK], ids=["device", "disk"])
@pytest.mark.parametrize("batches", [1, 2])
@pytest.mark.parametrize("family", ["OPT", "Llama"])
def test_what_a_forward_takes_is_predicted(
    tmp_path: Path, calls: list[Call], family: str, batches: int, hidden: Placement
) -> None:
    """What is ours to the byte; what is the model's is estimated from above, and not wildly."""
    folder, device = write_small(tmp_path / "model", family), emulated.configure()
    policy = Policy(hidden=hidden, batch_size=8 // batches, num_batches=batches)
    with FlexGenForCausalLM.from_pretrained(
        folder, policy=policy, device=str(emulated.install()), offload_folder=tmp_path, attn_implementation="eager"
    ) as model:
        prompts = {name: value.to(model.device) for name, value in batch(8, 48).items()}
        for name, make in FORWARDS.items():
            calls.clear()
            device.peak_bytes = device.used_bytes
            output = model(**prompts, **make(prompts))
            needs = model._account.demand.needs(policy, calls[0])
            estimated = sum(need.nbytes for need in needs if need.what in ESTIMATED)
            taken = device.peak_bytes - (model.last_run.peak_bytes[Tier.DEVICE] - estimated)
            assert taken <= estimated <= 2.5 * taken, name
            assert model._account.demand.peak(policy, calls[0]) == model.last_run.peak_bytes, name
            del output


def test_a_forward_is_described_by_its_arguments(checkpoint: Path, offload: Path, calls: list[Call]) -> None:
    prompts = batch(5)
    ids, mask = prompts["input_ids"], prompts["attention_mask"]
    with load(checkpoint, offload, Policy(batch_size=2, num_batches=2)) as model:
        embeds = model.get_input_embeddings()(ids)
        past = model(**prompts).past_key_values
        model(inputs_embeds=embeds, attention_mask=mask, use_cache=False)
        model(**prompts, logits_to_keep=torch.tensor([0, 3, 5]))
        model(ids[:, :2], attention_mask=torch.cat([mask, mask[:, :2]], 1), past_key_values=past)
        model(**prompts, past_key_values=DynamicCache(config=model.config), labels=ids)
    plain = Call(5, 6, 6, may_be_cut=False, logit_tokens=6)
    assert calls == [
        plain,
        replace(plain, makes_cache=False),
        replace(plain, logit_tokens=3),
        replace(plain, tokens=2, capacity=8, past=6, makes_cache=False, logit_tokens=2, micro_batches=(2, 2, 1)),
        replace(plain, makes_cache=False, has_loss=True, micro_batches=(5,)),
    ]


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("name", ["plain", "labels", "no cache", "last logits"])
def test_a_forward_that_does_not_fit_is_refused_with_a_way_out(checkpoint: Path, offload: Path, name: str) -> None:
    """Nothing is computed and nothing stays; every way that the message names works."""
    prompts = batch(16, 30)
    arguments = FORWARDS[name](prompts)
    policy, budget = Policy(weights=DISK, batch_size=4, num_batches=4), {"cpu": 740_000}
    with load(checkpoint, offload, policy, max_memory=budget) as model:
        before = held(model)
        for _ in range(2):
            with pytest.raises(CapacityError, match=r"needs .* MiB left of .*; fits with ") as caught:
                model(**prompts, **arguments)
            assert model.last_run.sweeps == []
            assert held(model) == before
        ways = str(caught.value).partition("; fits with ")[2].split(", or with ")
        (rows,) = re.findall(r"(\d+) of the 16 rows at a time", str(ways))
        fewer = {key: value[: int(rows)] for key, value in prompts.items()}
        more = {key: value[: int(rows) + 1] for key, value in prompts.items()}
        with torch.no_grad():
            want = reference(checkpoint)(**fewer, **FORWARDS[name](fewer)).logits
        torch.testing.assert_close(model(**fewer, **FORWARDS[name](fewer)).logits, want)
        with pytest.raises(CapacityError, match="fits with"):
            model(**more, **FORWARDS[name](more))
        settings = dict(re.findall(r"(logits_to_keep|use_cache)=(1|False)", str(ways)))
        if model._executor.space.is_direct:
            assert "use_cache" in settings or name != "last logits"
            assert "logits_to_keep" in settings or name != "no cache"
        if settings:
            model(**prompts, **arguments, **{key: json.loads(value.lower()) for key, value in settings.items()})
        assert held(model) == before
    for size in re.findall(r"batch_size=(\d+) \(block \d+\)'", str(ways)):
        with load(checkpoint, offload, policy.replace(batch_size=int(size)), max_memory=budget) as model:
            model(**prompts, **arguments)


def test_where_no_row_fits_fewer_tokens_may(checkpoint: Path, offload: Path) -> None:
    with load(checkpoint, offload, Policy(weights=DISK, batch_size=4), max_memory={"cpu": 150_000}) as model:
        prompts = batch(1, 30)
        with pytest.raises(CapacityError, match=r"fits with \d+ tokens of one row at a time") as caught:
            model(**prompts)
        tokens = int(re.search(r"with (\d+) tokens", str(caught.value))[1])  # type: ignore[index]
        model(prompts["input_ids"][:, :tokens])
        with pytest.raises(CapacityError):
            model(prompts["input_ids"][:, : tokens + 1])


@pytest.mark.parametrize("cache", [Placement(device=1.0), DISK], ids=["device", "disk"])
def test_a_cache_that_cannot_grow_is_kept(checkpoint: Path, offload: Path, cache: Placement) -> None:
    """The refusal names how many tokens can be taken at a time, and the cache takes them."""
    ids, policy = batch(4, 38)["input_ids"], Policy(weights=DISK, cache=cache, batch_size=2, num_batches=2)
    with load(checkpoint, offload, policy, max_memory={"cpu": 300_000}) as model:
        past = model(ids[:, :4]).past_key_values
        before = held(model)
        with pytest.raises(
            CapacityError, match=r"fits with (logits_to_keep=1, .*)?\d+ of the 34 tokens at a time"
        ) as caught:
            model(ids[:, 4:], past_key_values=past)
        assert held(model) == before
        tokens = 4 + int(re.search(r"(\d+) of the 34", str(caught.value))[1])  # type: ignore[index]
        got = model(ids[:, 4:tokens], past_key_values=past).logits
    with torch.no_grad():
        torch.testing.assert_close(got, reference(checkpoint)(ids[:, :tokens]).logits[:, 4:])


@pytest.mark.parametrize("cache", [Placement(device=1.0), DISK], ids=["device", "disk"])
def test_what_a_cache_grows_by_is_predicted(checkpoint: Path, offload: Path, cache: Placement) -> None:
    ids, policy = batch(5, 20)["input_ids"], Policy(weights=DISK, cache=cache, batch_size=2, num_batches=3)
    with load(checkpoint, offload, policy) as model:
        past = model(ids[:, :4]).past_key_values
        before = held(model)
        for start, end in ((4, 5), (5, 6), (6, 20)):
            grown = totals(past.growth(end))
            model(ids[:, start:end], past_key_values=past)
            taken = {tier: size - before[tier] for tier, size in held(model).items()}
            assert all(taken[tier] <= grown[tier] for tier in Tier)
            assert cache.disk or taken == grown
            assert sum(grown.values()) <= 1.7 * max(1, sum(taken.values()))
            before = held(model)


def test_what_a_forward_takes_is_in_the_account_while_it_runs(
    checkpoint: Path, offload: Path, calls: list[Call]
) -> None:
    with load(checkpoint, offload, Policy(batch_size=2, num_batches=2)) as model:
        ledger, during = model._executor.space.ledger, []
        model._executor.on_compute = lambda *_: during.append(ledger.held_as(Tier.DEVICE, "logits"))
        model(**batch(3))
        assert set(during) == {3 * 96 * (6 * 8 + 8)}
        assert all(ledger.held_as(Tier.DEVICE, name) == 0 for name in ESTIMATED)
        during.clear()
        model.generate(**batch(3), max_new_tokens=3, do_sample=False)
        assert set(during) == {3 * 96 * (8 + 8)}, "entered twice"
        assert len(calls) == 2


# ----------------------------------------------------------------------------------------------------- without a policy
@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_opt(tmp_path_factory.mktemp("deep"), num_hidden_layers=24)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("free", [100_000_000, 6_000_000, 2_000_000, 1_200_000])
def test_the_default_policy_leaves_room_for_the_rest(
    deep: Path, offload: Path, free: int, monkeypatch: pytest.MonkeyPatch, calls: list[Call]
) -> None:
    """The block that it plans for is then not refused, within most of the memory that is free."""
    monkeypatch.setattr(loading, "get_max_memory", lambda: {0: free, "cpu": free})
    with FlexGenForCausalLM.from_pretrained(deep, device="cpu", offload_folder=offload) as model:
        policy = model.policy
        greedy(model, batch(policy.block_size, 30), 10)
        peaks = model.last_run.peak_bytes
        together = [Tier.DEVICE, Tier.HOST] if model._executor.space.is_direct else [Tier.DEVICE]
        assert sum(peaks[tier] for tier in together) <= 0.85 * free
        assert calls[0].rows == policy.block_size
    assert (policy.weights == Placement(device=1.0)) == (free >= 2_000_000)


def test_the_default_policy_keeps_the_block_that_was_asked_for(deep: Path, offload: Path) -> None:
    options: dict[str, Any] = {"max_memory": {"cpu": 1_000_000}, "offload_folder": offload, "device": "cpu"}
    with FlexGenForCausalLM.from_pretrained(deep, batch_size=3, num_batches=2, **options) as model:
        assert (model.policy.batch_size, model.policy.num_batches) == (3, 2)
    with FlexGenForCausalLM.from_pretrained(deep, **options) as model:
        assert 0 < model.policy.weights.device < 1
        assert model.policy.block_size < 8


# ------------------------------------------------------------------------------------------------------ a control group
# Loads under a budget; where a call is refused, loads again with the block that the message names. Prints the anonymous
# memory before the work and at its peak.
WORKER = (
    PEAK_MEMORY
    + """
import json, re, sys
import torch
torch.set_num_threads(1)
from flexgen_hf import CapacityError, FlexGenForCausalLM, Policy

folder, offload, budget, rows, tokens = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])
ids = torch.randint(4, 200, (rows, tokens), generator=torch.Generator().manual_seed(0))
mask = torch.ones_like(ids)
mask[1:, :3] = 0
blocks, result = [(rows, 1)], None
with PeakMemory() as memory:
    while result is None:
        policy = Policy.parse("0 50 0 100 100 0", batch_size=blocks[-1][0], num_batches=blocks[-1][1])
        with FlexGenForCausalLM.from_pretrained(
            folder, policy=policy, max_memory={"cpu": budget}, offload_folder=offload, device="cpu", dtype=torch.float32
        ) as model:
            try:
                result = model.generate(ids, attention_mask=mask, max_new_tokens=6, min_new_tokens=6, do_sample=False)
            except CapacityError as error:
                blocks.append((int(re.search(r"batch_size=(\\d+)", str(error))[1]), 1))
print(json.dumps({"peak": memory.peak, "blocks": blocks, "tokens": result.tolist()}))
"""
)
BUDGET = 330 << 20
SLACK = 64 << 20


def _sizes(**sizes: Any) -> Any:
    return OPTConfig(**{"ffn_dim": 4 * sizes["hidden_size"], "word_embed_proj_dim": sizes["hidden_size"], **sizes})


@pytest.mark.limits
def test_a_run_stays_within_its_budget(tmp_path: Path) -> None:
    """Under a limit of the budget and little more: it is not killed, and computes what transformers computes."""
    small = _sizes(vocab_size=200, hidden_size=64, num_hidden_layers=2, num_attention_heads=4)
    large = _sizes(vocab_size=32000, hidden_size=768, num_hidden_layers=4, num_attention_heads=12)
    for name, config in (("small", small), ("large", large)):
        write_random_checkpoint(tmp_path / name, config, torch.float16)

    def work(group: Path, name: str, budget: int, rows: int, tokens: int) -> subprocess.CompletedProcess[str]:
        sizes = map(str, (budget, rows, tokens))
        return run_in(
            group, [sys.executable, "-c", WORKER, str(tmp_path / name), str(tmp_path / "offload"), *sizes], cwd=ROOT
        )

    with memory_limit(4 << 30) as group:
        warm = work(group, "small", 1 << 30, 2, 8)
    assert warm.returncode == 0, warm.stderr
    alone = json.loads(warm.stdout)["peak"]
    with memory_limit(alone + BUDGET + SLACK) as group:
        done = work(group, "large", BUDGET, 32, 128)
    assert done.returncode == 0, f"ended with {done.returncode}, killed if -9: {done.stderr[-2000:]}"
    got = json.loads(done.stdout)
    mib = f"{(got['peak'] - alone) / 2**20:.0f} MiB of {BUDGET >> 20}, in blocks {got['blocks']}"
    assert got["peak"] - alone <= BUDGET, mib
    assert got["peak"] - alone >= BUDGET / 2, mib
    assert len(got["blocks"]) > 1, mib
    ids = torch.randint(4, 200, (32, 128), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1:, :3] = 0
    plain: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "large", dtype=torch.float32)
    rows = slice(0, 8)
    want = plain.generate(ids[rows], attention_mask=mask[rows], max_new_tokens=6, min_new_tokens=6, do_sample=False)
    assert got["tokens"][rows] == want.tolist(), mib
