"""Everything that transformers' `generate` offers, with a model spread over three tiers in several micro-batches."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
)

from flexgen_hf import Policy, UnsupportedModelError
from flexgen_hf.kv_cache import BlockCache

from .comparison import (
    BEAMS,
    GREEDY,
    SAMPLING,
    THREE_TIERS,
    load_ours,
    load_plain,
    put,
    ragged,
    same_tokens,
    same_values,
    save_tiny,
)


@pytest.fixture(scope="module")
def ours(tiny_opt: Path, device: str) -> Iterator[Any]:
    with load_ours(tiny_opt, device=device) as model:
        yield model


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token per character, of which there are as many as the model has tokens."""
    vocabulary = {"<s>": 0, "<pad>": 1, "</s>": 2, **{chr(0x21 + i): 3 + i for i in range(93)}}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<s>"))  # noqa: S106
    made.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    made.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="</s>", padding_side="left")  # noqa: S106


# ------------------------------------------------------------------------------------------------ ways to choose tokens
@pytest.mark.parametrize(
    "mode",
    [
        {**SAMPLING, "num_return_sequences": 3},
        {**BEAMS, "num_return_sequences": 2},
        {**BEAMS, "num_return_sequences": 3, "early_stopping": True, "length_penalty": 0.5},
        {"do_sample": True, "num_beams": 3, "temperature": 1.1},
        {"do_sample": True, "num_beams": 2, "num_return_sequences": 2, "top_k": 10},
        {"do_sample": False, "num_beams": 7},
        {**GREEDY, "repetition_penalty": 1.5},
        {**GREEDY, "no_repeat_ngram_size": 2},
        {**BEAMS, "no_repeat_ngram_size": 2},
        {**GREEDY, "encoder_repetition_penalty": 1.3},
        {**GREEDY, "bad_words_ids": [[3], [25], [61, 3]]},
        {**GREEDY, "suppress_tokens": [3, 25]},
        {**GREEDY, "begin_suppress_tokens": [3, 25]},
        {**GREEDY, "sequence_bias": [[[11], 9.0], [[61, 3], -20.0]]},
        {**GREEDY, "forced_eos_token_id": 2},
        {**GREEDY, "renormalize_logits": True, "exponential_decay_length_penalty": (2, 1.5), "eos_token_id": 3},
        {"do_sample": True, "min_p": 0.05},
        {"do_sample": True, "typical_p": 0.9, "epsilon_cutoff": 1e-3, "eta_cutoff": 1e-3},
        {**SAMPLING, "use_cache": False},
        {**GREEDY, "use_cache": False},
        {**BEAMS, "use_cache": False},
        {**GREEDY, "guidance_scale": 1.5},
        {**GREEDY, "prefill_chunk_size": 4},
        {**GREEDY, "cache_implementation": "dynamic"},
    ],
    ids=lambda mode: " ".join(f"{name}={value}" for name, value in mode.items()),
)
def test_settings(plain_opt: Any, ours: Any, prompts: dict[str, Any], mode: dict[str, Any]) -> None:
    same_tokens(plain_opt, ours, mode, prompts)


@pytest.mark.parametrize("num_beams", [2, 5, 8])
def test_more_beams_than_a_micro_batch_has_rows(plain_opt: Any, ours: Any, num_beams: int) -> None:
    """The beams of a prompt stay together; a micro-batch is then as large as they are many."""
    assert ours.policy.batch_size == 2
    got = same_tokens(plain_opt, ours, {"num_beams": num_beams, "do_sample": False}, ragged([5, 2, 9]))
    assert got.shape[0] == 3


def test_beams_never_cross_micro_batches(ours: Any, prompts: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """So reordering them is a matter of each cell alone."""
    crossed: list[torch.Tensor] = []
    monkeypatch.setattr(BlockCache, "_gather", lambda self, index, *_: crossed.append(index))
    ours.generate(**put(prompts, ours.device), **BEAMS, max_new_tokens=8)
    assert not crossed


# ------------------------------------------------------------------------------------------------- users' own functions
class Forbid(LogitsProcessor):
    """Forbids a token that depends on the row, as a processor may."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        rows = torch.arange(len(scores), device=scores.device)
        scores[rows, input_ids[:, -1]] = -float("inf")
        scores[rows, rows + 3] = -float("inf")
        return scores


class StopRows(StoppingCriteria):
    """Stops each row at a length of its own."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        return torch.arange(len(input_ids), device=input_ids.device) + 11 <= input_ids.shape[1]


@pytest.mark.parametrize("mode", [GREEDY, SAMPLING, BEAMS], ids=["greedy", "sampling", "beams"])
def test_logits_processor(plain_opt: Any, ours: Any, prompts: dict[str, Any], mode: dict[str, Any]) -> None:
    same_tokens(plain_opt, ours, mode, prompts, logits_processor=LogitsProcessorList([Forbid()]))


@pytest.mark.parametrize("mode", [GREEDY, SAMPLING], ids=["greedy", "sampling"])
def test_stopping_criteria(plain_opt: Any, ours: Any, prompts: dict[str, Any], mode: dict[str, Any]) -> None:
    got = same_tokens(
        plain_opt, ours, mode, prompts, stopping_criteria=StoppingCriteriaList([StopRows()]), eos_token_id=95
    )
    assert (got == 1).sum() > (prompts["input_ids"] == 1).sum()  # some rows stopped before others
    same_tokens(plain_opt, ours, mode, prompts, stopping_criteria=StoppingCriteriaList([StopRows()]))
    same_tokens(plain_opt, ours, mode, prompts, stopping_criteria=[MaxLengthCriteria(12)])


@pytest.mark.parametrize("mode", [GREEDY, BEAMS], ids=["greedy", "beams"])
def test_prefix_allowed_tokens_fn(plain_opt: Any, ours: Any, prompts: dict[str, Any], mode: dict[str, Any]) -> None:
    """The function is given row numbers, so it must see the whole batch."""

    def allowed(row: int, tokens: torch.Tensor) -> list[int]:
        return list(range(3 + 10 * row, 13 + 10 * row))

    got = same_tokens(plain_opt, ours, mode, prompts, prefix_allowed_tokens_fn=allowed)
    new = got[:, prompts["input_ids"].shape[1] :]
    assert all(((row - 3) // 10 == index).all() for index, row in enumerate(new))


def test_stop_strings(plain_opt: Any, ours: Any, tokenizer: Any, prompts: dict[str, Any]) -> None:
    free = plain_opt.generate(**prompts, max_new_tokens=8, do_sample=False)[:, prompts["input_ids"].shape[1] :]
    stops = [tokenizer.decode(free[0, 2:4]), tokenizer.decode(free[3, 1:2])]
    settings = {"stop_strings": stops, "tokenizer": tokenizer, "max_new_tokens": 8}
    same_tokens(plain_opt, ours, GREEDY, prompts, **settings)  # rows that stopped go on until the last one has
    got = same_tokens(plain_opt, ours, GREEDY, prompts, **settings, eos_token_id=95)
    assert (got[0] == 1).sum() > (prompts["input_ids"][0] == 1).sum()


def test_rows_that_stop_go_on_until_the_last_one_has(
    plain_opt: Any, ours: Any, tokenizer: Any, prompts: dict[str, Any]
) -> None:
    """Without a token that ends texts, transformers does not fill up what has met its stop string."""
    prompts = {name: value[[0, 1, 2, 3, 4, 6, 5]] for name, value in prompts.items()}
    free = plain_opt.generate(**prompts, max_new_tokens=8, do_sample=False)[:, prompts["input_ids"].shape[1] :]
    assert not set(free[6].tolist()) & set(free[:6, 0].tolist())
    stops = [
        tokenizer.decode(token) for token in free[:6, 0].unique()
    ]  # those of the first block, but not the last row
    got = same_tokens(plain_opt, ours, GREEDY, prompts, stop_strings=stops, tokenizer=tokenizer, max_new_tokens=8)
    assert torch.equal(got[:, 9:], free)


def test_custom_generate(plain_opt: Any, ours: Any, prompts: dict[str, Any]) -> None:
    def every_other(model: Any, input_ids: Any, generation_config: Any, **kwargs: Any) -> Any:
        """Takes the second best token, from a forward over everything."""
        attention_mask = kwargs["attention_mask"]
        for _ in range(generation_config.max_new_tokens):
            logits = model(input_ids=input_ids, attention_mask=attention_mask).logits[:, -1]
            input_ids = torch.cat([input_ids, logits.topk(2).indices[:, 1:]], 1)
            attention_mask = torch.nn.functional.pad(attention_mask, (0, 1), value=1)
        return input_ids

    same_tokens(plain_opt, ours, GREEDY, prompts, custom_generate=every_other, max_new_tokens=3)


def test_streamer(plain_opt: Any, ours: Any, tokenizer: Any) -> None:
    prompt = ragged([6])
    want = plain_opt.generate(**prompt, **GREEDY, max_new_tokens=8)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    call = {**put(prompt, ours.device), **GREEDY, "max_new_tokens": 8, "streamer": streamer}
    thread = threading.Thread(target=ours.generate, kwargs=call)
    thread.start()
    text = "".join(streamer)
    thread.join()
    assert text == tokenizer.decode(want[0, 6:])


def test_two_threads_take_turns(plain_opt: Any, ours: Any) -> None:
    wants, gots = {}, {}
    threads = []
    for k, lengths in enumerate(([5, 2], [9, 1, 4])):
        wants[k] = plain_opt.generate(**ragged(lengths), **GREEDY, max_new_tokens=6)

        def run(k: int = k, lengths: list[int] = list(lengths)) -> None:  # noqa: B006
            gots[k] = ours.generate(**put(ragged(lengths), ours.device), **GREEDY, max_new_tokens=6).cpu()

        threads.append(threading.Thread(target=run))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(wants[k], gots[k]) for k in wants)


# ------------------------------------------------------------------------------------------------------------- outputs
ALL_OUTPUTS = {
    "return_dict_in_generate": True,
    "output_scores": True,
    "output_logits": True,
    "output_hidden_states": True,
    "output_attentions": True,
}


@pytest.mark.parametrize("mode", [GREEDY, SAMPLING, BEAMS], ids=["greedy", "sampling", "beams"])
def test_outputs(plain_opt_eager: Any, ours_eager: Any, prompts: dict[str, Any], mode: dict[str, Any]) -> None:
    """Scores, logits, hidden states, attentions, the cache; and the probabilities of what was chosen."""
    settings = {**mode, **ALL_OUTPUTS, "max_new_tokens": 4, "pad_token_id": 1}
    torch.manual_seed(5)
    want = plain_opt_eager.generate(**prompts, **settings)
    torch.manual_seed(5)
    got = ours_eager.generate(**prompts, **settings)
    assert torch.equal(want.sequences, got.sequences)
    same_values(dict(want), dict(got))
    beams = {"beam_indices": got.beam_indices} if mode is BEAMS else {}
    chosen = [
        model.compute_transition_scores(out.sequences, out.scores, normalize_logits=True, **beams)
        for model, out in ((plain_opt_eager, want), (ours_eager, got))
    ]
    same_values(*chosen)


@pytest.fixture(scope="module")
def plain_opt_eager(tiny_opt: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_opt, attn_implementation="eager")


@pytest.fixture(scope="module")
def ours_eager(tiny_opt: Path) -> Iterator[Any]:
    with load_ours(tiny_opt, attn_implementation="eager") as model:
        yield model


def test_the_report_of_the_last_run(ours: Any, prompts: dict[str, Any]) -> None:
    ours.generate(**put(prompts, ours.device), **GREEDY, max_new_tokens=4)
    report = ours.last_run
    assert report.generated_tokens == 7 * 4
    assert all(use.bytes > 0 for name, use in report.lanes.items() if name in ("disk_to_host", "host_to_disk"))
    assert "30" in str(report)


# ----------------------------------------------------------------------------------------------- candidates from others
@pytest.mark.parametrize("mode", [GREEDY, SAMPLING], ids=["greedy", "sampling"])
def test_assisted_decoding(plain_opt: Any, ours: Any, mode: dict[str, Any]) -> None:
    """Ours as the model that checks, as the one that drafts, and as both."""
    prompt = ragged([6])
    torch.manual_seed(5)
    want = plain_opt.generate(**prompt, **mode, assistant_model=plain_opt, max_new_tokens=12)
    for target, draft in ((ours, plain_opt), (plain_opt, ours), (ours, ours)):
        torch.manual_seed(5)
        got = target.generate(**put(prompt, target.device), **mode, assistant_model=draft, max_new_tokens=12)
        assert torch.equal(got.cpu(), want)


def test_a_draft_that_is_often_wrong(plain_opt: Any, ours: Any, tmp_path: Path) -> None:
    """Then the cache is cropped."""
    from .checkpoints import opt_config
    from .comparison import load_plain, save_tiny

    draft = load_plain(save_tiny(opt_config(num_hidden_layers=1), tmp_path / "draft"))
    want = plain_opt.generate(**ragged([6]), **GREEDY, max_new_tokens=12)
    for settings in ({}, {"num_assistant_tokens": 5, "num_assistant_tokens_schedule": "constant"}):
        draft.generation_config.update(**settings)
        got = ours.generate(**put(ragged([6]), ours.device), **GREEDY, assistant_model=draft, max_new_tokens=12)
        assert torch.equal(got.cpu(), want)


def test_a_good_draft_saves_sweeps(plain_opt: Any, ours: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    eager = GenerationConfig(num_assistant_tokens=5, assistant_confidence_threshold=0.0)
    monkeypatch.setattr(plain_opt, "generation_config", eager)
    ours.generate(**put(ragged([6]), ours.device), **GREEDY, assistant_model=plain_opt, max_new_tokens=12)
    assert len(ours.last_run.sweeps) <= 4


def test_prompt_lookup(plain_opt: Any, ours: Any) -> None:
    prompt = {"input_ids": torch.tensor([[5, 6, 7, 8, 5, 6, 7, 9, 5, 6]])}
    prompt["attention_mask"] = torch.ones_like(prompt["input_ids"])
    for mode in (GREEDY, SAMPLING):
        same_tokens(plain_opt, ours, mode, prompt, prompt_lookup_num_tokens=3, max_new_tokens=10)


# ---------------------------------------------------------------------------------------------- inputs of other kinds
@pytest.mark.parametrize("mode", [GREEDY, SAMPLING, BEAMS], ids=["greedy", "sampling", "beams"])
def test_inputs_embeds(plain_opt: Any, ours: Any, prompts: dict[str, Any], mode: dict[str, Any]) -> None:
    embedded = plain_opt.get_input_embeddings()(prompts["input_ids"]).detach()
    own = ours.get_input_embeddings()(put(prompts["input_ids"], ours.device))
    assert torch.equal(embedded, own.cpu())
    inputs = {"inputs_embeds": own, "attention_mask": prompts["attention_mask"]}
    same_tokens(plain_opt, ours, mode, inputs)
    same_tokens(plain_opt, ours, mode, {**prompts, **inputs})


def test_negative_prompts(plain_opt: Any, ours: Any, prompts: dict[str, Any]) -> None:
    negative = ragged([4, 4, 4, 4, 4, 4, 4])
    settings = {
        "guidance_scale": 1.5,
        "negative_prompt_ids": negative["input_ids"],
        "negative_prompt_attention_mask": negative["attention_mask"],
    }
    same_tokens(plain_opt, ours, GREEDY, prompts, **settings)


def test_generation_config(plain_opt: Any, ours: Any, prompts: dict[str, Any]) -> None:
    config = GenerationConfig(num_beams=2, max_new_tokens=5, pad_token_id=1, do_sample=False)
    want, got = (
        model.generate(inputs["input_ids"], generation_config=config, attention_mask=inputs["attention_mask"])
        for model, inputs in ((plain_opt, prompts), (ours, put(prompts, ours.device)))
    )
    assert torch.equal(want, got.cpu())


def test_a_prompt_by_position_and_no_mask(plain_opt: Any, ours: Any) -> None:
    ids = ragged([5, 5, 5, 5, 5])["input_ids"]
    want = plain_opt.generate(ids, **GREEDY, max_new_tokens=5, pad_token_id=1)
    ids = put(ids, ours.device)
    assert torch.equal(ours.generate(ids, **GREEDY, max_new_tokens=5, pad_token_id=1).cpu(), want)
    assert torch.equal(ours.generate(inputs=ids, **GREEDY, max_new_tokens=5, pad_token_id=1).cpu(), want)


def test_no_prompt_at_all(plain_opt: Any, ours: Any) -> None:
    settings = {**GREEDY, "bos_token_id": 2, "max_new_tokens": 5}
    assert torch.equal(ours.generate(**settings).cpu(), plain_opt.generate(**settings))


# ---------------------------------------------------------------------------------------------------------- the cache
def test_continuing_from_a_returned_cache(plain_opt: Any, ours: Any, prompts: dict[str, Any]) -> None:
    """A first call's cache is taken up by a second one, which has the whole text, and by a third."""
    settings = {**GREEDY, "max_new_tokens": 4, "return_dict_in_generate": True, "pad_token_id": 1}
    wants: dict[str, Any] = {"cache": None}
    gots: dict[str, Any] = {"cache": None}
    for model, state in ((plain_opt, wants), (ours, gots)):
        inputs = put(prompts, model.device)
        for _ in range(3):
            out = model.generate(**inputs, **settings, past_key_values=state["cache"])
            state["cache"], new = out.past_key_values, out.sequences.shape[1] - inputs["input_ids"].shape[1]
            mask = torch.nn.functional.pad(inputs["attention_mask"], (0, new), value=1)
            inputs = {"input_ids": out.sequences, "attention_mask": mask}
        state["tokens"] = out.sequences
    assert isinstance(gots["cache"], BlockCache)
    assert torch.equal(wants["tokens"], gots["tokens"].cpu())
    same_values(wants["cache"], gots["cache"])


def test_continuing_with_further_text(plain_opt: Any, ours: Any, prompts: dict[str, Any]) -> None:
    settings = {**GREEDY, "max_new_tokens": 3, "return_dict_in_generate": True, "pad_token_id": 1}
    more = torch.arange(5, 5 + 21).view(7, 3)
    tokens = []
    for model in (plain_opt, ours):
        inputs = put(prompts, model.device)
        first = model.generate(**inputs, **settings)
        ids = torch.cat([first.sequences, more.to(model.device)], 1)
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 6), value=1)
        second = model.generate(ids, attention_mask=mask, **settings, past_key_values=first.past_key_values)
        tokens.append(second.sequences.cpu())
    assert torch.equal(*tokens)


def test_beams_from_a_returned_cache(plain_opt: Any, ours: Any, prompts: dict[str, Any]) -> None:
    """A cache of one row per prompt is repeated for its beams before use, as transformers' documentation shows."""
    tokens = []
    for model in (plain_opt, ours):
        inputs = put(prompts, model.device)
        out = model(**{k: v[:, :-1] for k, v in inputs.items()}, use_cache=True)
        cache = out.past_key_values
        cache.batch_repeat_interleave(3)
        got = model.generate(**inputs, **BEAMS, past_key_values=cache, max_new_tokens=5, pad_token_id=1)
        tokens.append(got.cpu())
    assert torch.equal(*tokens)


@pytest.mark.parametrize("mode", [GREEDY, SAMPLING, BEAMS], ids=["greedy", "sampling", "beams"])
def test_a_users_own_cache(plain_opt: Any, ours: Any, prompts: dict[str, Any], mode: dict[str, Any]) -> None:
    """It is used as it is, and filled in place."""
    caches = [DynamicCache(config=plain_opt.config) for _ in range(2)]
    tokens = []
    for model, cache in zip((plain_opt, ours), caches, strict=True):
        torch.manual_seed(5)
        inputs = put(prompts, model.device)
        got = model.generate(**inputs, **mode, past_key_values=cache, max_new_tokens=5, pad_token_id=1)
        tokens.append(got.cpu())
    assert torch.equal(*tokens)
    same_values(caches[0], caches[1])


def test_operations_on_a_filled_cache(plain_opt: Any, ours: Any, prompts: dict[str, Any]) -> None:
    """Whatever order of rows and length an operation leaves, the next tokens are those of transformers."""

    def crop(cache: Any) -> list[int]:
        cache.crop(-2)
        return list(range(7))

    def reorder(cache: Any) -> list[int]:
        cache.reorder_cache(torch.tensor([6, 0, 3, 3, 1, 5, 2]))
        return [6, 0, 3, 3, 1, 5, 2]

    def select(cache: Any) -> list[int]:
        cache.batch_select_indices(torch.tensor([4, 1, 6]))
        return [4, 1, 6]

    def repeat(cache: Any) -> list[int]:
        cache.batch_repeat_interleave(2)
        return [row for row in range(7) for _ in range(2)]

    def reset(cache: Any) -> list[int]:
        cache.reset()
        return list(range(7))

    for operation in (crop, reorder, select, repeat, reset):
        logits = []
        for model in (plain_opt, ours):
            cache = model(**put(prompts, model.device), use_cache=True).past_key_values
            rows = operation(cache)
            known = cache.get_seq_length()
            ids, mask = prompts["input_ids"][rows], prompts["attention_mask"][rows]
            ids = torch.nn.functional.pad(ids, (0, 3), value=7)[:, known : known + 3]
            mask = torch.nn.functional.pad(mask, (0, 3), value=1)[:, : known + 3]
            inputs = put({"input_ids": ids, "attention_mask": mask}, model.device)
            logits.append(model(**inputs, past_key_values=cache).logits)
        same_values(logits[0], logits[1], operation.__name__)


# ---------------------------------------------------------------------------------------------------- ends and lengths
@pytest.mark.parametrize("mode", [GREEDY, SAMPLING, BEAMS], ids=["greedy", "sampling", "beams"])
def test_rows_that_finish_early(plain_opt: Any, ours: Any, prompts: dict[str, Any], mode: dict[str, Any]) -> None:
    got = same_tokens(plain_opt, ours, mode, prompts, eos_token_id=[3, 61, 64], max_new_tokens=12)
    ends = [(row[9:] == 1).sum().item() for row in got]
    assert len(set(ends)) > 1


def test_lengths(plain_opt: Any, ours: Any, prompts: dict[str, Any]) -> None:
    for settings in (
        {"max_length": 13, "max_new_tokens": None},
        {"min_length": 12, "eos_token_id": [3, 61]},
        {"min_new_tokens": 3, "eos_token_id": [3, 61]},
        {"max_new_tokens": 1},
        {"max_new_tokens": 31},  # as long as the model's positions allow
    ):
        same_tokens(plain_opt, ours, GREEDY, prompts, **settings)


@pytest.mark.parametrize("mode", [GREEDY, BEAMS, {**BEAMS, "num_return_sequences": 2}], ids=["greedy", "beams", "two"])
def test_blocks_of_different_length_are_padded_alike(tiny_opt: Path, plain_opt: Any, mode: dict[str, Any]) -> None:
    """A batch larger than a block is cut; a block that ends early is as wide in the end as the widest."""
    lengths = [3, 7, 5, 2, 9, 4, 6, 1, 1, 8, 2]
    with load_ours(tiny_opt, Policy.parse("30 30 30 40 30 30", batch_size=1, num_batches=2)) as model:
        for eos in ([3, 61, 64], [25, 11, 3, 80], list(range(3, 96))):
            same_tokens(plain_opt, model, mode, ragged(lengths), eos_token_id=eos, max_new_tokens=10)
            same_tokens(plain_opt, model, mode, ragged(lengths), eos_token_id=eos, max_new_tokens=10, pad_token_id=None)


# ------------------------------------------------------------------------------------------------------- plain forward
def test_forward_with_right_padding(plain_opt: Any, ours: Any) -> None:
    inputs = ragged(left=False)
    with torch.no_grad():
        same_values(plain_opt(**inputs).logits, ours(**put(inputs, ours.device)).logits)


@pytest.mark.parametrize("use_cache", [True, False])
def test_forward_returns_what_transformers_returns(
    plain_opt_eager: Any, ours_eager: Any, prompts: dict[str, Any], use_cache: bool
) -> None:
    settings = {"use_cache": use_cache, "output_hidden_states": True, "output_attentions": True}
    with torch.no_grad():
        same_values(dict(plain_opt_eager(**prompts, **settings)), dict(ours_eager(**prompts, **settings)))
        as_tuple = ours_eager(**prompts, use_cache=use_cache, return_dict=False)
        same_values(plain_opt_eager(**prompts, use_cache=use_cache, return_dict=False), as_tuple)
        for keep in (2, torch.tensor([8, 0, 3, 3, 1, 2, 7])):  # as many as there are rows
            want, got = (model(**prompts, logits_to_keep=keep).logits for model in (plain_opt_eager, ours_eager))
            same_values(want, got)


def test_the_loss_is_that_of_all_rows_together(plain_opt: Any, ours: Any) -> None:
    """A mean of the micro-batches' means would weigh the tokens of long rows less."""
    inputs = ragged(left=False)
    labels = inputs["input_ids"].where(inputs["attention_mask"].bool(), torch.tensor(-100))
    with torch.no_grad():
        inputs["labels"] = labels
        want, got = plain_opt(**inputs), ours(**put(inputs, ours.device))
    assert abs(want.loss - got.loss.cpu()) < 1e-5
    assert list(want) == list(got)
    as_tuple = ours(**put(inputs, ours.device), return_dict=False)
    assert abs(want.loss - as_tuple[0].cpu()) < 1e-5


def test_several_micro_batches_and_tiers_were_at_work(ours: Any, prompts: dict[str, Any]) -> None:
    """What the tests of this file stand on."""
    out = ours.generate(**put(prompts, ours.device), **GREEDY, max_new_tokens=3, return_dict_in_generate=True)
    assert len(out.past_key_values.spans) == 4
    for kind in ("weights", "cache"):
        assert all(size > 0 for size in ours.last_run.placement[kind].values()), kind
    assert ours.policy == THREE_TIERS


@pytest.fixture(scope="module")
def tiny_mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture of experts, which can return what its router costs."""
    from transformers import MixtralConfig

    config = MixtralConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, router_aux_loss_coef=0.5,
    )  # fmt: skip
    return save_tiny(config, tmp_path_factory.mktemp("mixture") / "model")


def test_a_loss_of_another_kind_is_refused(tiny_mixture: Path) -> None:
    """Mixtures of experts add a term for their router, which is no mean over tokens."""
    plain, inputs = load_plain(tiny_mixture), ragged([4, 4, 4])
    labels = inputs["input_ids"]
    with load_ours(tiny_mixture) as model, torch.no_grad():
        same_values(plain(**inputs, labels=labels).loss, model(**inputs, labels=labels).loss)
        one = {name: value[:2] for name, value in inputs.items()}  # a single micro-batch is what the model says it is
        settings = {"output_router_logits": True}
        same_values(plain(**one, labels=labels[:2], **settings).loss, model(**one, labels=labels[:2], **settings).loss)
        with pytest.raises(UnsupportedModelError, match="MixtralForCausalLM computes another loss"):
            model(**inputs, labels=labels, **settings)


def test_a_number_that_is_one_for_all_rows_is_refused(tiny_mixture: Path) -> None:
    """The router's cost of a batch is no mean of its micro-batches'. It is returned where they agree."""
    plain, inputs, settings = load_plain(tiny_mixture), ragged([5, 2, 4]), {"output_router_logits": True}
    one = {name: value[:2] for name, value in inputs.items()}
    twice = {name: torch.cat([value, value]) for name, value in one.items()}
    with load_ours(tiny_mixture) as model, torch.no_grad():
        assert model.policy.batch_size == 2
        with pytest.raises(UnsupportedModelError, match=r"aux_loss is one number for all rows.* 2 micro-batches"):
            model(**inputs, **settings)
        for prompts in (one, twice):
            want, got = plain(**prompts, **settings), model(**prompts, **settings)
            same_values(want.aux_loss, got.aux_loss)
            same_values(want.router_logits, got.router_logits)
        for each in (plain, model):
            each.config.output_router_logits = True
        same_tokens(plain, model, GREEDY, inputs, max_new_tokens=1)  # nobody sees it there
