"""What is read from a configuration, against the models that transformers builds of it and our own accounting."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from flexgen_hf import Compression, PolicyError, StoreError, UnsupportedModelError
from flexgen_hf.accounting import cache_geometry, shape_of, windows_of
from flexgen_hf.architectures import describe
from flexgen_hf.bench.shapes import SHAPES, config_of_shape
from flexgen_hf.cell_layout import CellShape
from flexgen_hf.families import attends_plainly
from flexgen_hf.planning.shape import ModelShape, kept_row_bytes, quantized_bytes, read_config
from flexgen_hf.quantization.groupwise import GroupFormat

from .test_families import FAMILIES, HEADS, TINY

SPARSE = {"moe_intermediate_size": 24, "num_experts_per_tok": 2}
#: families that are not tested with generation, for what their configurations have of their own
OTHERS: dict[str, dict[str, Any]] = {
    "olmo": TINY,
    "phi": TINY,
    "starcoder2": TINY,
}  # fmt: skip
CASES = {**FAMILIES, **OTHERS}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, ModelShape]:
    """A model of transformers without memory, and what its saved configuration says."""
    config = AutoConfig.for_model(**{**CASES[request.param], "model_type": request.param.split(maxsplit=1)[0]})
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return model, ModelShape.from_config(read_config(tmp_path))


def test_matrices_are_counted_exactly_and_the_rest_nearly(case: tuple[Any, ModelShape]) -> None:
    model, shape = case
    structure = describe(model)
    for index, layer in enumerate(structure.layers):
        matrices = sum(p.numel() for n, p in layer.named_parameters() if p.dim() > 1 and not n.endswith("bias"))
        said = sum(t.elements for t in shape.layers[index].tensors if t.kind == "matrix")
        assert said == matrices, f"layer {index}"
    assert shape.num_parameters == pytest.approx(sum(p.numel() for p in model.parameters()), rel=0.05)
    assert shape.tied == (model.get_input_embeddings().weight is model.get_output_embeddings().weight)
    assert shape.head.shape == tuple(model.get_output_embeddings().weight.shape)


def test_the_cache_is_that_of_the_accounting(case: tuple[Any, ModelShape]) -> None:
    model, shape = case
    assert shape.cached == cache_geometry(model.config)
    assert [layer.window for layer in shape.layers] == windows_of(model.config)


@pytest.mark.parametrize("name", ["opt", "llama", "qwen3_moe", "gemma2", "falcon", "deepseek_v3"])
@pytest.mark.parametrize("bits", [None, 4, 16])
def test_the_sizes_are_those_of_the_accounting(name: str, bits: int | None) -> None:
    config = AutoConfig.for_model(**{**FAMILIES[name], "model_type": name})
    with torch.device("meta"):
        structure = describe(AutoModelForCausalLM.from_config(config))
    matrices = [
        sum(p.numel() for n, p in layer.named_parameters() if p.dim() == 2 and structure_part(structure, i, n) == "mlp")
        for i, layer in enumerate(structure.layers)
    ]
    compression = Compression(cache=bits)
    inner = max(matrices) // config.hidden_size
    expected = shape_of(config, inner, torch.float32, compression, casts_head=False)
    shape = ModelShape.from_config(json.loads(config.to_json_string(use_diff=False))).in_dtype("float32")
    assert dataclasses.replace(shape, stored_itemsize=4).sizes(compression, direct=True) == dataclasses.replace(
        expected,
        makes_masks_late=attends_plainly(name),
        reads_once=True,
        attends_kept=bits == 4 and attends_plainly(name),
    )


def structure_part(structure: Any, index: int, name: str) -> str:
    return str(structure.locate(f"{structure.layers_name}.{index}.{name}")[1])


@pytest.mark.parametrize(("name", "parameters"), [("opt-6.7b", 6.66e9), ("opt-30b", 29.97e9), ("opt-175b", 174.6e9)])
def test_known_models_have_their_size(name: str, parameters: float) -> None:
    shape = ModelShape.from_config(SHAPES[name].fields())
    assert shape.num_parameters == pytest.approx(parameters, rel=0.002)
    assert shape.kept_bytes(Compression()) == 4 * SHAPES[name].hidden


@pytest.mark.parametrize("name", SHAPES)
def test_the_fields_of_a_shape_are_those_of_its_configuration(name: str) -> None:
    whole = json.loads(config_of_shape(name).to_json_string(use_diff=False))
    assert ModelShape.from_config(SHAPES[name].fields()).layers == ModelShape.from_config(whole).layers


def test_flops_follow_from_what_a_token_uses() -> None:
    fields = {**HEADS, **SPARSE, "num_experts": 4, "rms_norm_eps": 1e-6}
    shape = ModelShape.from_config(fields)
    layer = shape.layers[0]
    attention, expert, router = 32 * 64 * 2 + 32 * 32 * 2, 3 * 32 * 24, 4 * 32
    assert layer.used_elements == attention + 2 * expert + router
    assert shape.layer_flops(layer, 7) == 2 * 7 * layer.used_elements
    assert (layer.shared_elements, layer.expert_elements) == (attention + router, expert)
    assert [layer.chosen_experts(tokens) for tokens in (1, 2, 10_000)] == [2, 3, 4]
    assert shape.attention_flops(layer, 1, 9) == 4 * 10 * 64  # one query, ten keys and values of 4 heads x 16
    assert shape.attention_flops(layer, 3, 0) == 4 * (1 + 2 + 3) * 64


def test_a_window_bounds_what_is_attended() -> None:
    shape = ModelShape.from_config({**TINY, "sliding_window": 4})
    assert [shape.layers[0].attended(n) for n in (3, 9)] == [3, 4]


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 4),
    st.integers(1, 100),
    st.sampled_from([2, 3, 4, 8, 16, None]),
    st.sampled_from([8, 64]),
    st.sampled_from([torch.float32, torch.float16]),
)
def test_kept_bytes_are_those_of_a_cell(heads: int, dim: int, bits: int | None, group: int, dtype: torch.dtype) -> None:
    compression = Compression(cache=bits, group_size=group)
    cell = CellShape(1, (heads, dim), (heads, dim), dtype, compression)
    kept = kept_row_bytes(heads, dim, compression, dtype.itemsize)
    assert (heads * dim * dtype.itemsize if kept is None else kept) == cell.token_bytes(0)


@pytest.mark.parametrize("shape", [(3, 64), (5, 70), (2, 3, 128)])
def test_quantized_bytes_are_those_of_the_format(shape: tuple[int, ...]) -> None:
    assert quantized_bytes(shape, 4, 64) == GroupFormat(4, 64).nbytes(shape)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"is_encoder_decoder": True}, "encoder-decoder"),
        ({"vision_config": {}}, "multimodal"),
        ({"state_size": 16}, "state_size"),
        ({"layer_types": ["linear_attention"]}, "linear_attention"),
        ({"hidden_size": None}, "'hidden_size'"),
        ({"dtype": "int8"}, "'int8'"),
    ],
)
def test_what_cannot_be_planned_is_refused_by_name(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(UnsupportedModelError, match=words):
        ModelShape.from_config({**TINY, **fields})
    with pytest.raises(PolicyError, match="'int8'"):
        ModelShape.from_config(TINY).in_dtype("int8")


@pytest.mark.parametrize(("text", "words"), [(None, "cannot read"), ("[1]", "a list"), ("{", "not JSON")])
def test_a_folder_without_a_configuration_is_refused(tmp_path: Path, text: str | None, words: str) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(StoreError, match=words):
        read_config(tmp_path)
