"""What transformers' own mixin of generation tests asks of a model, asked of ours: one check for each of its names.

The mixin (`GenerationTesterMixin`) is not a part of what transformers installs. The names are those of public copies of
the file up to transformers 5; ours is the code behind them. Where the mixin looks at shapes, these checks compare every
value with what transformers returns. Names whose subject does not exist here are skipped, each with its reason; where
we refuse the subject, the refusal is checked first.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, GenerationMixin

from flexgen_hf import FlexGenForCausalLM, UnsupportedModelError
from flexgen_hf.kv_cache import BlockCache

from .comparison import load_ours, load_plain, ragged, same_values, save_tiny
from .test_families import FAMILIES

NEW_TOKENS = 3
PROCESSORS: dict[str, Any] = {"bad_words_ids": [[1, 0]], "repetition_penalty": 1.2, "remove_invalid_values": True}
GREEDY: dict[str, Any] = {"do_sample": False, "num_beams": 1, **PROCESSORS}
SAMPLE: dict[str, Any] = {
    "do_sample": True,
    "num_beams": 1,
    "top_k": 10,
    "top_p": 0.7,
    "temperature": 0.7,
    **PROCESSORS,
}
BEAMS: dict[str, Any] = {
    "do_sample": False,
    "num_beams": 2,
    "length_penalty": 2.0,
    "early_stopping": False,
    **PROCESSORS,
}
BEAM_SAMPLE: dict[str, Any] = {**SAMPLE, **BEAMS, "do_sample": True}
OUTPUTS: dict[str, Any] = {
    "output_scores": True, "output_logits": True, "output_hidden_states": True, "output_attentions": True,
    "return_dict_in_generate": True,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Pair:
    """A model as transformers runs it, and as we do: over three tiers, in micro-batches of two rows."""

    folder: Path
    plain: Any
    ours: Any

    def generate(self, model: Any, prompts: dict[str, Any] | None = None, **settings: Any) -> Any:
        """What one of the two returns, with the same seed for both."""
        torch.manual_seed(5)
        given = ragged([3, 7, 5]) if prompts is None else prompts
        return model.generate(**given, **{"max_new_tokens": NEW_TOKENS, "pad_token_id": 1, **settings})

    def same(self, prompts: dict[str, Any] | None = None, **settings: Any) -> Any:
        """Asserts that both return the same, and returns it."""
        want, got = (self.generate(model, prompts, **settings) for model in (self.plain, self.ours))
        if isinstance(want, torch.Tensor):
            assert torch.equal(want, got)
        else:
            assert type(want) is type(got)
            assert torch.equal(want.sequences, got.sequences)
            same_values(dict(want), dict(got))
        return got

    def takes(self, name: str) -> bool:
        """Whether the model's forward has an argument."""
        return name in inspect.signature(self.plain.forward).parameters

    def refuses(self, match: str, **settings: Any) -> None:
        """Asserts that we refuse a call by name."""
        with pytest.raises(UnsupportedModelError, match=match):
            self.generate(self.ours, **settings)


@pytest.fixture(scope="module", params=["opt", "llama", "bloom", "mixtral"])
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = AutoConfig.for_model(**{**FAMILIES[request.param], "model_type": request.param})
    config.num_hidden_layers = 2
    return save_tiny(config, tmp_path_factory.mktemp("family") / "model", std=0.25)


@pytest.fixture(scope="module")
def pair(family: Path) -> Iterator[Pair]:
    with load_ours(family) as ours:
        yield Pair(family, load_plain(family), ours)


@pytest.fixture(scope="module")
def eager(family: Path) -> Iterator[Pair]:
    """With the implementation of attention that can return its weights."""
    with load_ours(family, attn_implementation="eager") as ours:
        yield Pair(family, load_plain(family, attn_implementation="eager"), ours)


# --------------------------------------------------------------------------------------------- ways to choose tokens
def greedy_generate(pair: Pair, _: Pair) -> None:
    assert pair.same(**GREEDY).shape == (3, 7 + NEW_TOKENS)


def greedy_generate_dict_outputs(_: Pair, eager: Pair) -> None:
    assert eager.same(**GREEDY, **OUTPUTS, use_cache=False).get("past_key_values") is None


def greedy_generate_dict_outputs_use_cache(_: Pair, eager: Pair) -> None:
    assert isinstance(eager.same(**GREEDY, **OUTPUTS, use_cache=True).past_key_values, BlockCache)


def sample_generate(pair: Pair, _: Pair) -> None:
    pair.same(**SAMPLE)


def sample_generate_dict_output(_: Pair, eager: Pair) -> None:
    assert len(eager.same(**SAMPLE, **OUTPUTS, num_return_sequences=2, use_cache=False).sequences) == 6


def beam_search_generate(pair: Pair, _: Pair) -> None:
    pair.same(**BEAMS)


def beam_search_generate_dict_output(_: Pair, eager: Pair) -> None:
    eager.same(**BEAMS, **OUTPUTS, use_cache=False)


def beam_search_generate_dict_outputs_use_cache(_: Pair, eager: Pair) -> None:
    eager.same(**BEAMS, **OUTPUTS, use_cache=True)


def beam_sample_generate(pair: Pair, _: Pair) -> None:
    pair.same(**BEAM_SAMPLE)


def beam_sample_generate_dict_output(_: Pair, eager: Pair) -> None:
    eager.same(**BEAM_SAMPLE, **OUTPUTS, use_cache=False)


def model_parallel_beam_search(pair: Pair, _: Pair) -> None:
    """Saved and loaded anew, with weights in several places; the mixin's are accelerators, ours tiers."""
    again = pair.folder.parent / "again"
    pair.ours.save_pretrained(again)
    with load_ours(again, "20 40 0 100 0 100", device_map="auto") as ours:
        Pair(again, pair.plain, ours).same(num_beams=2)


# ----------------------------------------------------------------------------------------------- candidates from others
def _assisted(pair: Pair, eager: Pair, assistant: Any, **mode: Any) -> None:
    """Both check the same candidates; with greedy search nothing changes by them, and what is kept beside is whole."""
    settings = {**OUTPUTS, **mode, "max_new_tokens": 4, "eos_token_id": -1, "use_cache": True}
    assistant.generation_config.num_assistant_tokens = 2
    assistant.generation_config.num_assistant_tokens_schedule = "constant"
    got = eager.same(ragged([6]), **settings, assistant_model=assistant)
    if not mode["do_sample"]:
        alone = eager.generate(eager.ours, ragged([6]), **settings)
        assert torch.equal(got.sequences, alone.sequences)
        same_values(got.scores, alone.scores)


def assisted_decoding_matches_greedy_search_0_random(pair: Pair, eager: Pair) -> None:
    other = load_plain(save_tiny(pair.plain.config, pair.folder.parent / "draft", std=0.3), attn_implementation="eager")
    _assisted(pair, eager, other, **GREEDY)


def assisted_decoding_matches_greedy_search_1_same(pair: Pair, eager: Pair) -> None:
    _assisted(pair, eager, eager.ours, **GREEDY)


def assisted_decoding_sample(pair: Pair, eager: Pair) -> None:
    _assisted(pair, eager, eager.ours, **{**PROCESSORS, "do_sample": True})


def assisted_decoding_with_logits_to_keep(pair: Pair, _: Pair) -> None:
    if not pair.takes("logits_to_keep"):
        pytest.skip("this model has no logits_to_keep")
    settings = {"assistant_model": pair.ours, "max_new_tokens": 6, "do_sample": False}
    all_of_them = pair.generate(pair.ours, ragged([6]), **settings, logits_to_keep=0)
    assert torch.equal(all_of_them, pair.generate(pair.ours, ragged([6]), **settings))


def prompt_lookup_decoding_matches_greedy_search(_: Pair, eager: Pair) -> None:
    settings = {**GREEDY, **OUTPUTS, "max_new_tokens": 4, "eos_token_id": -1}
    got = eager.same(ragged([6]), **settings, prompt_lookup_num_tokens=2)
    alone = eager.generate(eager.ours, ragged([6]), **settings)
    assert torch.equal(got.sequences, alone.sequences)
    same_values(got.scores, alone.scores)


def prompt_lookup_decoding_stops_at_eos(pair: Pair, _: Pair) -> None:
    """What followed the last token before is the end of a text, which is no candidate."""
    ids = torch.tensor([[11, 12, 13, 51, 2, 14, 15, 51]])
    prompts = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    pair.same(prompts, do_sample=False, prompt_lookup_num_tokens=4, eos_token_id=2, max_new_tokens=6)


# -------------------------------------------------------------------------------------------------------------- prompts
def generate_without_input_ids(pair: Pair, _: Pair) -> None:
    pair.same({}, do_sample=False, remove_invalid_values=True)


def left_padding_compatibility(pair: Pair, _: Pair) -> None:
    """Further padding on the left changes no logits."""
    prompts = ragged([5, 3, 5])
    padded = {
        "input_ids": torch.nn.functional.pad(prompts["input_ids"], (4, 0), value=1),
        "attention_mask": torch.nn.functional.pad(prompts["attention_mask"], (4, 0), value=0),
    }
    settings = {"output_logits": True, "return_dict_in_generate": True, "do_sample": False}
    with torch.no_grad():
        same_values(pair.plain(**padded).logits[:, -1], pair.ours(**padded).logits[:, -1])
    got = [pair.same(given, **settings) for given in (prompts, padded)]
    same_values(got[0].logits, got[1].logits)


def generate_from_random_inputs_embeds(pair: Pair, _: Pair) -> None:
    prompts = ragged([6, 6])
    settings = {
        "do_sample": False,
        "output_scores": True,
        "return_dict_in_generate": True,
        "min_new_tokens": NEW_TOKENS,
    }
    embeddings = pair.plain.get_input_embeddings()(prompts["input_ids"])
    got = [
        pair.same({**prompts, "inputs_embeds": given}, **settings)
        for given in (embeddings, torch.rand_like(embeddings))
    ]
    assert not any(torch.allclose(one, other) for one, other in zip(got[0].scores, got[1].scores, strict=True))


def _from_embeddings(pair: Pair, num_beams: int) -> None:
    """With the tokens beside them and without; the embeddings are those of our own table."""
    prompts = ragged([6, 4])
    settings = {"num_beams": num_beams, "do_sample": False, "output_scores": True, "return_dict_in_generate": True}
    embeddings = pair.ours.get_input_embeddings()(prompts["input_ids"])
    mask = {"attention_mask": prompts["attention_mask"]}
    tokens = pair.same(prompts, **settings)
    both = pair.same({**prompts, "inputs_embeds": embeddings}, **settings)
    alone = pair.same({**mask, "inputs_embeds": embeddings}, **settings)
    assert torch.equal(tokens.sequences, both.sequences)
    assert torch.equal(tokens.sequences[:, 6:], alone.sequences)


def generate_from_inputs_embeds_0_greedy(pair: Pair, _: Pair) -> None:
    _from_embeddings(pair, 1)


def generate_from_inputs_embeds_1_beam_search(pair: Pair, _: Pair) -> None:
    _from_embeddings(pair, 2)


def generate_with_and_without_position_ids(pair: Pair, _: Pair) -> None:
    if not pair.takes("position_ids"):
        pytest.skip("this model has no position_ids")
    prompts = ragged([3, 7, 5])
    positions = (prompts["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    without = pair.same(prompts, do_sample=False)
    assert torch.equal(pair.same({**prompts, "position_ids": positions}, do_sample=False), without)


def prepare_inputs_for_generation_kwargs_forwards(pair: Pair, _: Pair) -> None:
    prompts = ragged([3, 5])
    want, got = (
        model.prepare_inputs_for_generation(**prompts, use_cache=True, of_a_users_own="value")
        for model in (pair.plain, pair.ours)
    )
    assert got["of_a_users_own"] == "value"
    same_values(want, got)


def _without_padding(pair: Pair) -> None:
    """Two prompts in one row, told apart by positions that begin anew: their logits are those of two rows."""
    if not pair.takes("position_ids"):
        pytest.skip("this model has no position_ids")
    ids = torch.arange(20, 31)[None]
    positions = torch.cat([torch.arange(6), torch.arange(5)])[None]
    with torch.no_grad():
        want, got = (
            model(input_ids=ids, position_ids=positions, use_cache=False).logits for model in (pair.plain, pair.ours)
        )
        same_values(want, got)
        same_values(pair.ours(input_ids=ids[:, :6], use_cache=False).logits, got[:, :6])
        if pair.plain.config.model_type != "opt":  # the mask of transformers' OPT does not look at positions
            same_values(pair.ours(input_ids=ids[:, 6:], use_cache=False).logits, got[:, 6:])


def eager_padding_matches_padding_free_with_position_ids(_: Pair, eager: Pair) -> None:
    _without_padding(eager)


def sdpa_padding_matches_padding_free_with_position_ids(pair: Pair, _: Pair) -> None:
    _without_padding(pair)


# ------------------------------------------------------------------------------------------------------------ the cache
def past_key_values_format(pair: Pair, _: Pair) -> None:
    """One layer of the cache for each of the model, its keys and values as (rows, heads, tokens, head_dim)."""
    prompts = ragged([5, 5])
    with torch.no_grad():
        want, got = (model(**prompts, use_cache=True).past_key_values for model in (pair.plain, pair.ours))
    assert len(got.layers) == len(want.layers) == pair.plain.config.num_hidden_layers
    for theirs, ours in zip(want.layers, got.layers, strict=True):
        assert (ours.keys.shape, ours.values.shape) == (theirs.keys.shape, theirs.values.shape)
    same_values(want, got)


def generate_continue_from_past_key_values(pair: Pair, _: Pair) -> None:
    """Three tokens and one are four tokens, with the cache that they leave."""
    settings = {"do_sample": False, "eos_token_id": -1, "return_dict_in_generate": True}
    prompts = ragged([3, 7, 5])
    whole = pair.same(prompts, **settings, max_new_tokens=4)
    first = pair.generate(pair.ours, prompts, **settings, max_new_tokens=3)
    mask = torch.nn.functional.pad(prompts["attention_mask"], (0, 3), value=1)
    more = {"input_ids": first.sequences, "attention_mask": mask, "past_key_values": first.past_key_values}
    rest = pair.generate(pair.ours, more, **settings, max_new_tokens=1)
    assert torch.equal(whole.sequences, rest.sequences)
    plain = pair.generate(pair.plain, prompts, **settings, max_new_tokens=4)
    same_values(plain.past_key_values, rest.past_key_values)


def generate_continue_from_inputs_embeds(pair: Pair, _: Pair) -> None:
    settings = {"do_sample": False, "eos_token_id": -1, "return_dict_in_generate": True}
    table = pair.ours.get_input_embeddings()
    embeddings = table(ragged([6, 6])["input_ids"])
    whole = pair.same({"inputs_embeds": embeddings}, **settings, max_new_tokens=4)
    first = pair.generate(pair.ours, {"inputs_embeds": embeddings}, **settings, max_new_tokens=3)
    more = {
        "inputs_embeds": torch.cat([embeddings, table(first.sequences)], 1),
        "past_key_values": first.past_key_values,
    }
    rest = pair.generate(pair.ours, more, **settings, max_new_tokens=1)
    assert torch.equal(whole.sequences, torch.cat([first.sequences, rest.sequences], 1))
    plain = pair.generate(pair.plain, {"inputs_embeds": embeddings}, **settings, max_new_tokens=4)
    same_values(plain.past_key_values, rest.past_key_values)


def _refuses_cache(implementation: str, reason: str) -> Callable[[Pair, Pair], None]:
    def check(pair: Pair, _: Pair) -> None:
        pair.refuses("the policy places the cache", cache_implementation=implementation, do_sample=False)
        pytest.skip(reason)

    return check


# ------------------------------------------------------------------------------------------------------------ the model
def generate_methods_with_logits_to_keep(pair: Pair, _: Pair) -> None:
    if not pair.takes("logits_to_keep"):
        pytest.skip("this model has no logits_to_keep")
    prompts = ragged([3, 7, 5])
    settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": 5}
    assert torch.equal(pair.same(prompts, **settings, logits_to_keep=0), pair.same(prompts, **settings))


def inherits_generation_mixin(pair: Pair, _: Pair) -> None:
    assert type(pair.ours).__bases__ == (FlexGenForCausalLM, type(pair.plain))
    assert GenerationMixin in type(pair.plain).__bases__
    assert pair.ours.can_generate()


def eager_matches_sdpa_generate(pair: Pair, eager: Pair) -> None:
    settings: dict[str, Any] = {"do_sample": False, "output_scores": True, "return_dict_in_generate": True}
    one, other = (each.generate(each.ours, **settings, max_new_tokens=10) for each in (pair, eager))
    assert torch.equal(one.sequences, other.sequences)
    same_values(one.scores, other.scores)


def _skipped(reason: str) -> Callable[[Pair, Pair], None]:
    def check(_pair: Pair, _eager: Pair) -> None:
        pytest.skip(reason)

    return check


_PLACED = "refused by name: the policy places the cache, which is allocated for its full length before work starts"
_STATIC = _refuses_cache("static", _PLACED)
_QUANTIZED = _refuses_cache("quantized", "refused by name: a quantized cache is compression={'cache': 4} here")
_COMPILED = _skipped("weights come and go between layers, which no compiled graph could hold; models are not compiled")
_FLASH = _skipped("flash attention needs a GPU and its own package")
_REMOVED = _skipped("transformers 5 has it no longer: such code comes from the Hub, by custom_generate=")
_MASKS = _skipped("transformers 5 has no head_mask any longer")

#: the mixin's names; a parametrized test has one for each case
NAMES = """
    test_greedy_generate
    test_greedy_generate_dict_outputs
    test_greedy_generate_dict_outputs_use_cache
    test_sample_generate
    test_sample_generate_dict_output
    test_beam_search_generate
    test_beam_search_generate_dict_output
    test_beam_search_generate_dict_outputs_use_cache
    test_beam_sample_generate
    test_beam_sample_generate_dict_output
    test_model_parallel_beam_search
    test_generate_without_input_ids
    test_assisted_decoding_matches_greedy_search_0_random
    test_assisted_decoding_matches_greedy_search_1_same
    test_assisted_decoding_sample
    test_assisted_decoding_with_logits_to_keep
    test_prompt_lookup_decoding_matches_greedy_search
    test_prompt_lookup_decoding_stops_at_eos
    test_left_padding_compatibility
    test_past_key_values_format
    test_generate_from_random_inputs_embeds
    test_generate_from_inputs_embeds_0_greedy
    test_generate_from_inputs_embeds_1_beam_search
    test_generate_continue_from_past_key_values
    test_generate_continue_from_inputs_embeds
    test_generate_methods_with_logits_to_keep
    test_generate_with_and_without_position_ids
    test_prepare_inputs_for_generation_kwargs_forwards
    test_inherits_generation_mixin
    test_eager_matches_sdpa_generate
    test_eager_padding_matches_padding_free_with_position_ids
    test_sdpa_padding_matches_padding_free_with_position_ids
    test_generate_with_static_cache
    test_generate_from_inputs_embeds_with_static_cache
    test_generate_with_quant_cache
    test_generate_compile_model_forward_fullgraph
    test_generate_compilation_all_outputs
    test_eager_matches_fa2_generate
    test_eager_matches_fa3_generate
    test_flash_attention_2_continue_generate_with_position_ids
    test_flash_attention_2_padding_matches_padding_free_with_position_ids
    test_flash_attention_2_padding_matches_padding_free_with_position_ids_and_fa_kwargs
    test_flash_attention_3_padding_matches_padding_free_with_position_ids
    test_flash_attention_3_padding_matches_padding_free_with_position_ids_and_fa_kwargs
    test_constrained_beam_search_generate
    test_constrained_beam_search_generate_dict_output
    test_group_beam_search_generate
    test_group_beam_search_generate_dict_output
    test_contrastive_generate
    test_contrastive_generate_dict_outputs_use_cache
    test_contrastive_generate_low_memory
    test_dola_decoding_sample
    test_generate_with_head_masking
""".split()

#: those whose subject does not exist here
SKIPPED: dict[str, Callable[[Pair, Pair], None]] = {
    "test_generate_with_static_cache": _STATIC,
    "test_generate_from_inputs_embeds_with_static_cache": _STATIC,
    "test_generate_with_quant_cache": _QUANTIZED,
    "test_generate_compile_model_forward_fullgraph": _COMPILED,
    "test_generate_compilation_all_outputs": _COMPILED,
    "test_eager_matches_fa2_generate": _FLASH,
    "test_eager_matches_fa3_generate": _FLASH,
    "test_flash_attention_2_continue_generate_with_position_ids": _FLASH,
    "test_flash_attention_2_padding_matches_padding_free_with_position_ids": _FLASH,
    "test_flash_attention_2_padding_matches_padding_free_with_position_ids_and_fa_kwargs": _FLASH,
    "test_flash_attention_3_padding_matches_padding_free_with_position_ids": _FLASH,
    "test_flash_attention_3_padding_matches_padding_free_with_position_ids_and_fa_kwargs": _FLASH,
    "test_constrained_beam_search_generate": _REMOVED,
    "test_constrained_beam_search_generate_dict_output": _REMOVED,
    "test_group_beam_search_generate": _REMOVED,
    "test_group_beam_search_generate_dict_output": _REMOVED,
    "test_contrastive_generate": _REMOVED,
    "test_contrastive_generate_dict_outputs_use_cache": _REMOVED,
    "test_contrastive_generate_low_memory": _REMOVED,
    "test_dola_decoding_sample": _REMOVED,
    "test_generate_with_head_masking": _MASKS,
}


#: each name and its check, which is the function of this file that is called so
CHECKS = {name: SKIPPED.get(name) or globals()[name.removeprefix("test_")] for name in NAMES}


@pytest.mark.parametrize("name", CHECKS)
def test_generation(pair: Pair, eager: Pair, name: str) -> None:
    CHECKS[name](pair, eager)


def test_what_is_skipped_is_in_the_mixin() -> None:
    assert SKIPPED.keys() < set(NAMES)


def test_transformers_still_keeps_its_mixin_to_itself() -> None:
    """The day it is installed with the rest, it is to be run itself."""
    installed = importlib.metadata.files("transformers") or []
    assert installed
    assert not [file for file in installed if str(file).endswith("generation/test_utils.py")]
