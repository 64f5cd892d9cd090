"""What would fail in silence if a model of transformers were streamed naively: each is handled, or refused by name."""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, OPTForCausalLM
from transformers.quantizers.base import HfQuantizer

from flexgen_hf import FlexGenForCausalLM, Policy, PolicyError, UnsupportedModelError
from flexgen_hf.architectures import describe
from flexgen_hf.kv_cache import BlockCache

from .checkpoints import opt_config
from .comparison import BEAMS, GREEDY, load_ours, load_plain, ragged, same_tokens, same_values


@pytest.fixture(scope="module")
def ours(tiny_opt: Path) -> Iterator[Any]:
    with load_ours(tiny_opt) as model:
        yield model


@pytest.fixture
def generates(plain_opt: Any, ours: Any, prompts: dict[str, Any]) -> Iterator[None]:
    """The model generates what it should after whatever a test did to it."""
    yield
    same_tokens(plain_opt, ours, GREEDY, prompts)


# ------------------------------------------------------------------------------ 1. moving and casting, whole or in part
@pytest.mark.usefixtures("generates")
def test_moving_to_a_device_moves_nothing(ours: Any) -> None:
    """Pipelines and evaluation harnesses call `.to(device)` on what they are given."""
    assert ours.to("cuda:0") is ours
    assert ours.to(torch.device("cpu"), non_blocking=True) is ours
    assert ours.cuda() is ours
    assert ours.cuda(0) is ours
    assert ours.cpu() is ours
    assert ours.eval() is ours


@pytest.mark.usefixtures("generates")
def test_casting_is_refused_unless_it_changes_nothing(ours: Any) -> None:
    """torch would cast what happens to be in memory and leave the rest."""
    assert ours.to(torch.float32) is ours
    assert ours.float() is ours
    assert ours.to(dtype=torch.float32, device="cpu") is ours
    assert ours.to(torch.zeros(1)) is ours
    for cast in (
        lambda: ours.to(torch.float16),
        lambda: ours.to("cpu", torch.bfloat16),
        lambda: ours.to(torch.zeros(1, dtype=torch.float16)),
        ours.half,
        ours.bfloat16,
        ours.double,
    ):
        with pytest.raises(
            PolicyError, match=r"computes in torch.float32; load it with dtype=torch\.(b?float16|float64)"
        ):
            cast()


@pytest.mark.usefixtures("generates")
def test_what_torch_would_do_tensor_by_tensor_is_refused(ours: Any) -> None:
    for call in (lambda: ours.type(torch.float16), lambda: ours.to_empty(device="cpu"), ours.share_memory):
        with pytest.raises(PolicyError, match="neither moved nor cast"):
            call()


@pytest.mark.usefixtures("generates")
def test_changing_the_weights_is_refused(ours: Any, plain_opt: Any) -> None:
    with pytest.raises(UnsupportedModelError, match="cannot be trained"):
        ours.train()
    with pytest.raises(UnsupportedModelError, match="load_state_dict"):
        ours.load_state_dict(plain_opt.state_dict())
    with pytest.raises(UnsupportedModelError, match="table has 96 rows"):
        ours.resize_token_embeddings(100)
    assert ours.resize_token_embeddings(96) is ours.get_input_embeddings()
    ours.tie_weights()  # lm-eval calls it


# ---------------------------------------------------------------------------------------------- 2. `device` and `dtype`
def test_device_and_dtype_are_those_of_compute(ours: Any) -> None:
    """transformers takes them from the first parameter, which may lie on `meta`."""
    assert ours.device == torch.device("cpu")
    assert ours.dtype is torch.float32


def test_parameters_are_counted_truthfully(ours: Any, plain_opt: Any, prompts: dict[str, Any]) -> None:
    ours.generate(**prompts, max_new_tokens=2)
    assert ours.num_parameters() == plain_opt.num_parameters()
    assert {n: p.shape for n, p in ours.named_parameters()} == {n: p.shape for n, p in plain_opt.named_parameters()}


# ------------------------------------------------------------------------------------------------------ 3. other caches
@pytest.mark.parametrize("name", ["static", "offloaded", "offloaded_static", "quantized", "sliding_window"])
@pytest.mark.usefixtures("generates")
def test_another_cache_implementation_is_refused(ours: Any, prompts: dict[str, Any], name: str) -> None:
    with pytest.raises(UnsupportedModelError, match=f"cache_implementation='{name}': the policy places the cache"):
        ours.generate(**prompts, max_new_tokens=2, cache_implementation=name)


def test_the_default_cache_implementation_is_ours(ours: Any, prompts: dict[str, Any]) -> None:
    settings = {"max_new_tokens": 2, "return_dict_in_generate": True}
    for name in (None, "dynamic"):
        out = ours.generate(**prompts, **settings, cache_implementation=name)
        assert isinstance(out.past_key_values, BlockCache)


# ------------------------------------------------------------------------------------ 4. experts copied for every token
def test_mixtures_of_experts_are_not_switched_for_decoding(ours: Any) -> None:
    """transformers would take `batched_mm` on accelerators: a copy of an expert for every token that uses it."""
    before = ours.config._experts_implementation
    with ours._optimize_model_for_decode():
        assert ours.config._experts_implementation == before
    assert type(ours)._optimize_model_for_decode is FlexGenForCausalLM._optimize_model_for_decode
    assert hasattr(transformers.GenerationMixin, "_optimize_model_for_decode")  # or else: what is it called now?


# ------------------------------------------------------------------------ 5. saving, uploading, and ways around forward
def test_saving_writes_weights_not_placeholders(ours: Any, plain_opt: Any, prompts: Any, tmp_path: Path) -> None:
    """transformers would write the state dict, which holds tensors on `meta`."""
    ours.save_pretrained(tmp_path / "saved")
    same_tokens(plain_opt, load_plain(tmp_path / "saved"), GREEDY, prompts)


@pytest.mark.parametrize(
    "option", [{"state_dict": {}}, {"safe_serialization": False}, {"push_to_hub": True}], ids=lambda o: next(iter(o))
)
def test_options_of_saving_that_a_store_cannot_follow_are_refused(ours: Any, tmp_path: Path, option: Any) -> None:
    with pytest.raises(UnsupportedModelError, match=next(iter(option))):
        ours.save_pretrained(tmp_path / "saved", **option)
    assert not (tmp_path / "saved").exists()


def test_only_the_main_process_saves(ours: Any, tmp_path: Path) -> None:
    ours.save_pretrained(tmp_path / "saved", is_main_process=False)
    assert not (tmp_path / "saved").exists()


def test_uploading_is_refused(ours: Any) -> None:
    with pytest.raises(UnsupportedModelError, match="upload it with huggingface_hub"):
        ours.push_to_hub("somebody/something")


@pytest.mark.usefixtures("generates")
def test_continuous_batching_is_refused(ours: Any, prompts: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedModelError, match="continuous batching"):
        ours.generate_batch([[5, 6]])
    with pytest.raises(UnsupportedModelError, match="continuous batching"):
        ours.generate(**prompts, cache_implementation="paged")


# --------------------------------------------------------------------------------------- 6. the signature, and `labels`
def test_forward_keeps_its_signature(ours: Any) -> None:
    """`generate` looks there for position_ids, attention_mask and logits_to_keep."""
    assert inspect.signature(ours.forward) == inspect.signature(OPTForCausalLM(opt_config()).forward)


def test_only_the_last_logits_are_computed_for_a_prompt(ours: Any, prompts: Any, monkeypatch: Any) -> None:
    shapes: list[torch.Size] = []
    run = type(ours._executor).run

    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        outputs = run(self, *args, **kwargs)
        shapes.extend(out.logits.shape for out in outputs)
        return outputs

    monkeypatch.setattr(type(ours._executor), "run", watched)
    ours.generate(**prompts, max_new_tokens=2)
    assert {shape[1] for shape in shapes} == {1}


def test_the_loss_is_not_a_mean_of_means(ours: Any, plain_opt: Any) -> None:
    inputs = ragged([9, 8, 2, 1, 4], left=False)
    labels = inputs["input_ids"].where(inputs["attention_mask"].bool(), torch.tensor(-100))
    with torch.no_grad():
        want = plain_opt(**inputs, labels=labels).loss
        rows = [slice(0, 2), slice(2, 4), slice(4, 5)]
        means = [plain_opt(inputs["input_ids"][r], inputs["attention_mask"][r], labels=labels[r]).loss for r in rows]
    assert abs(ours(**inputs, labels=labels).loss - want) < 1e-5 < abs(torch.stack(means).nanmean() - want)


# -------------------------------------------------------------------------------------- 7. what recipes do to a cache
def test_the_cache_has_every_operation_on_rows() -> None:
    """Recipes such as contrastive search select and repeat rows; a base class would do so on one micro-batch only."""
    from transformers.cache_utils import Cache

    theirs = {name for name, value in vars(Cache).items() if inspect.isfunction(value) and not name.startswith("_")}
    rows = {"reorder_cache", "crop", "reset", "batch_repeat_interleave", "batch_select_indices", "update"}
    assert rows < theirs
    assert rows < set(vars(BlockCache))


# ------------------------------------------------------------------------- 8. models that only seem to have been loaded
def test_a_model_that_escaped_the_engine_is_an_error(
    tiny_opt: Path, plain_opt: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A future transformers might not call our hooks; a model that fits nowhere must not be loaded whole, quietly."""
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: plain_opt)
    with pytest.raises(UnsupportedModelError, match="transformers loaded OPTForCausalLM by itself"):
        FlexGenForCausalLM.from_pretrained(tiny_opt)


def on_meta(config: Any) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


TINY: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 1,
}  # fmt: skip


def test_multimodal_models_are_refused() -> None:
    """Images have no rows to cut micro-batches from."""
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = AutoConfig.for_model("gemma3", text_config=TINY, vision_config=vision)
    with pytest.raises(UnsupportedModelError, match="Gemma3ForConditionalGeneration is multimodal; load its text"):
        describe(on_meta(config))


def test_encoder_decoder_models_are_refused() -> None:
    config = transformers.BartConfig(vocab_size=96, d_model=32, encoder_layers=1, decoder_layers=1)
    with torch.device("meta"):
        model = transformers.BartForConditionalGeneration(config)
    with pytest.raises(UnsupportedModelError, match="BartForConditionalGeneration is an encoder-decoder model"):
        describe(model)


RECURRENT = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "pad_token_id": 1, "state_size": 4}
#: families whose state between tokens is not keys and values
OWN_CACHES: dict[str, dict[str, Any]] = {
    "mamba": RECURRENT,
    "mamba2": {**RECURRENT, "num_heads": 4, "head_dim": 16},
    "falcon_mamba": RECURRENT,
    "rwkv": {**RECURRENT, "attention_hidden_size": 32, "intermediate_size": 48},
    "recurrent_gemma": {**TINY, "lru_width": 32, "attention_window_size": 4},
    "xlnet": {"vocab_size": 96, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48},
    "jamba": {**TINY, "num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1},
    "bamba": {**TINY, "attn_layer_indices": [1], "mamba_n_heads": 4, "mamba_d_head": 16},
    "qwen3_next": {**TINY, "num_experts": 2},
    "lfm2": {**TINY, "layer_types": ["conv", "full_attention", "conv", "full_attention"]},
}


@pytest.mark.parametrize("family", OWN_CACHES)
def test_models_with_a_cache_of_their_own_kind_are_refused(family: str) -> None:
    """By name, and before any weights are touched: the model is on `meta`."""
    model = on_meta(AutoConfig.for_model(family, **OWN_CACHES[family]))
    with pytest.raises(UnsupportedModelError, match=type(model).__name__):
        describe(model)


# ------------------------------------------------------------------------------------------------------- 9. compilation
def test_the_cache_is_not_for_compilers(ours: Any, prompts: dict[str, Any]) -> None:
    """A compileable cache would have `generate` compile forward, and make masks for the whole block."""
    cache = ours(**prompts, use_cache=True).past_key_values
    assert cache.is_compileable is False
    assert not any(cell.is_compileable for cell in cache.cells())


# -------------------------------------------------------------------------------------- 10. equality, and its tolerance
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_logits_differ_in_the_last_bits_only(
    tiny_opt: Path, prompts: dict[str, Any], dtype: torch.dtype
) -> None:
    """Smaller micro-batches are other matrix shapes, which round otherwise. So tokens are compared in fp32 only."""
    plain = load_plain(tiny_opt, dtype=dtype)
    with load_ours(tiny_opt, dtype=dtype) as model, torch.no_grad():
        assert model.dtype is dtype
        got, want = model(**prompts).logits, plain(**prompts).logits
        assert got.dtype is dtype
        seen = prompts["attention_mask"].bool()
        error = (got - want)[seen].float().abs().max() / want[seen].float().abs().max()
        assert error < 8 * torch.finfo(dtype).eps
        assert model.generate(**prompts, **BEAMS, max_new_tokens=4).shape == (7, 13)


# ---------------------------------------------------------------------------------------- 11. the policy of another day
def test_the_policy_given_at_load_wins(ours: Any, tmp_path: Path) -> None:
    """transformers would take what config.json holds, and say nothing."""
    ours.save_pretrained(tmp_path / "saved")
    for given in (Policy.parse("0 100 0 100 0 100", batch_size=3), Policy.parse("100 0 100 0 100 0", batch_size=5)):
        with load_ours(tmp_path / "saved", given) as model:
            assert model.policy == given
        options = {"quant_method": "flexgen", "policy": given.to_dict()}
        auto: Any = AutoModelForCausalLM
        with auto.from_pretrained(tmp_path / "saved", quantization_config=options) as model:
            assert model.policy == given


# ----------------------------------------------------------------------------------------------- what else is looked at
def test_the_class_keeps_the_names_that_others_look_at(ours: Any, plain_opt: Any) -> None:
    """Pipelines, saved configs and the capture of outputs go by the names of the class."""
    assert isinstance(ours, FlexGenForCausalLM)
    assert isinstance(ours, OPTForCausalLM)
    for name in ("__name__", "__qualname__", "__module__"):
        assert getattr(type(ours), name) == getattr(type(plain_opt), name)
    assert ours.can_generate()
    assert not hasattr(ours, "hf_device_map")  # pipelines would refuse a device


def test_the_hooks_that_loading_stands_on() -> None:
    """If one of these fails, transformers moved what loading.py builds on."""
    before = inspect.signature(HfQuantizer._process_model_before_weight_loading)
    assert any(p.kind is p.VAR_KEYWORD for p in before.parameters.values())
    source = inspect.getsource(transformers.PreTrainedModel.from_pretrained)
    preprocess = source[source.index("hf_quantizer.preprocess_model(") :]
    arguments = preprocess[: preprocess.index("\n            )")]
    assert "checkpoint_files=" in arguments
    assert "dtype=" in arguments
    # gguf_file= is let in for one method, by its name, before the environment is validated; then we are asked for this
    door = inspect.getsource(transformers.quantizers.auto.get_hf_quantizer)
    assert door.index("!= QuantizationMethod.GGUF") < door.index("validate_environment(")
    assert "hf_quantizer.read_header(checkpoint_files[0])" in source
    assert "hf_quantizer.get_state_dict(checkpoint_files[0], model)" in source


@pytest.mark.usefixtures("generates")
def test_inference_mode(plain_opt: Any, ours: Any, prompts: dict[str, Any]) -> None:
    """Buffers made inside must be writable outside, and by lanes, which are other threads."""
    with torch.inference_mode():
        same_tokens(plain_opt, ours, GREEDY, prompts)
        cache = ours(**prompts, use_cache=True).past_key_values
        theirs = plain_opt(**prompts, use_cache=True).past_key_values
    step = {
        "input_ids": torch.full((7, 1), 7),
        "attention_mask": torch.nn.functional.pad(prompts["attention_mask"], (0, 1), value=1),
    }
    same_values(plain_opt(**step, past_key_values=theirs).logits, ours(**step, past_key_values=cache).logits)


def test_a_closed_model_says_so(tiny_opt: Path, prompts: dict[str, Any]) -> None:
    model = load_ours(tiny_opt)
    model.close()
    model.close()
    for call in (
        lambda: model.generate(**prompts),
        lambda: model(**prompts),
        lambda: model.get_input_embeddings()(prompts["input_ids"]),
    ):
        with pytest.raises(RuntimeError, match="the model was closed; load it again"):
            call()


def test_layers_are_not_called_on_their_own(ours: Any) -> None:
    with pytest.raises(UnsupportedModelError, match="layer 0 was called outside of the model's forward"):
        ours.model.decoder.layers[0](torch.zeros(1, 1, 32))


def test_nothing_is_said_about_what_is_as_it_should_be(
    tiny_opt: Path, prompts: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
        warnings.simplefilter("error")
        with load_ours(tiny_opt) as model:
            model.generate(**prompts, max_new_tokens=2)
    assert not caplog.records
