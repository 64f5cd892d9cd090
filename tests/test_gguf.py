"""GGUF files, made up in miniature: what transformers makes of them is the judge."""

from __future__ import annotations

import importlib.util
import json
import weakref
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from conversion.convert import convert
from conversion.sources import SourceOptions
from conversion.verify import verify
from flexgen_hf import FlexGenForCausalLM, StoreError, UnsupportedModelError, cli, gguf_files
from flexgen_hf.text import load_tokenizer
from flexgen_hf.weights.format import is_store

from .comparison import BEAMS, GREEDY, THREE_TIERS, load_ours, ragged, same_tokens, save_tiny
from .test_families import BASE, HEADS, TINY

gguf = pytest.importorskip("gguf", reason="gguf, which writes the files, is not installed")

LLAMA = {**TINY, "model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "eos_token_id": 2}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", LLAMA),
    "llama tied": ("llama", {**LLAMA, "tie_word_embeddings": True}),
    # transformers takes the width of experts from nowhere but its default
    "qwen3moe": ("qwen3moe", {**HEADS, "model_type": "qwen3_moe", "moe_intermediate_size": 768, "num_experts": 4,
                              "num_hidden_layers": 2, "num_experts_per_tok": 2, "mlp_only_layers": []}),
    "gpt2": ("gpt2", {**BASE, "model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 1024}),
    "bloom": ("bloom", {**BASE, "model_type": "bloom", "hidden_size": 32, "n_layer": 2, "n_head": 4}),
}  # fmt: skip


def write_gguf(file: Path, case: str, kind: str = "Q8_0", without: str = "none", parts: int = 0) -> Path:
    """Random weights in a GGUF file, its matrices of type `kind` where their rows are long enough for its blocks."""
    architecture, fields = CASES[case]
    config = AutoConfig.for_model(**fields)
    folder = save_tiny(config, file.parent / "made", std=0.25)
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_name("made up")
    _add_shape(writer, config, architecture)
    _add_tokenizer(writer, config.vocab_size)
    if parts:
        writer.add_uint16("split.count", parts)
    layers = config.num_hidden_layers
    names = gguf.get_tensor_name_map(
        next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture), layers
    )
    for name, values in _as_in_gguf(load_file(folder / "model.safetensors"), names, architecture).items():
        if without in name:
            continue
        if values.ndim > 1 and values.shape[-1] % 32 == 0:
            quantization = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(name, gguf.quantize(values, quantization), raw_dtype=quantization)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _add_shape(writer: Any, config: Any, architecture: str) -> None:
    writer.add_context_length(64)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    if architecture in ("gpt2", "bloom"):
        writer.add_feed_forward_length(4 * config.hidden_size)
        writer.add_layer_norm_eps(1e-5)
        return
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(config.head_dim)
    if architecture == "qwen3moe":
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)


def _add_tokenizer(writer: Any, tokens: int) -> None:
    letters = [*(chr(0x21 + number) for number in range(tokens - 4)), "ab"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(["<s>", "<pad>", "</s>", *letters])
    writer.add_token_types([3, 3, 3, *[1] * len(letters)])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(1)


def _as_in_gguf(state: dict[str, torch.Tensor], names: Any, architecture: str) -> dict[str, Any]:
    written: dict[str, Any] = {}
    experts: dict[str, dict[int, Any]] = defaultdict(dict)
    for name, tensor in state.items():
        stem, _, suffix = name.rpartition(".")
        values = tensor.float().numpy()
        if ".experts." in name:
            layer, expert, part = (stem.split(".")[at] for at in (2, 5, 6))
            experts[f"blk.{layer}.ffn_{part.removesuffix('_proj')}_exps.weight"][int(expert)] = values
        else:
            gguf_name = names.get_name(stem) or names.get_name(stem.removeprefix("transformer."))
            assert gguf_name is not None, name
            is_transposed = architecture == "gpt2" and values.ndim == 2 and ".h." in name
            written[f"{gguf_name}.{suffix}"] = values.T.copy() if is_transposed else values
    return written | {name: np.stack([each[number] for number in sorted(each)]) for name, each in experts.items()}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("llama") / "tiny.Q8_0.gguf", "llama")


def plain(file: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, **options)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1", "F16", "F32", "BF16"])
def test_every_type_of_block(tmp_path: Path, kind: str) -> None:
    file = write_gguf(tmp_path / f"tiny.{kind}.gguf", "llama", kind)
    with load_ours(file) as ours:
        assert ours.dtype is torch.float32
        got = same_tokens(plain(file), ours, GREEDY, ragged(), eos_token_id=-1)
    assert len({tuple(row) for row in got[:, 9:].tolist()}) > 2


@pytest.mark.parametrize("case", CASES)
def test_rules_of_transformers_for_names_and_rows(tmp_path: Path, case: str) -> None:
    """Rows of queries and keys in another order, transposed matrices, experts that are joined, tied heads."""
    file = write_gguf(tmp_path / "tiny.gguf", case)
    model = plain(file)
    with load_ours(file) as ours:
        assert isinstance(ours, type(model))
        same_tokens(model, ours, GREEDY, ragged(), eos_token_id=-1)
        same_tokens(model, ours, BEAMS, ragged(), eos_token_id=-1)
        assert len({tensor.name for tensor in ours.stored_weights} - set(model.state_dict())) == 0
        assert ours.generation_config.to_dict() == model.generation_config.to_dict()


def test_both_doors_and_once(llama: Path, tmp_path: Path) -> None:
    options = {"quant_method": "flexgen", "policy": THREE_TIERS.to_dict(), "offload_folder": str(tmp_path)}
    model = plain(llama)
    for _ in range(2):
        ours: Any = AutoModelForCausalLM.from_pretrained(
            llama.parent, gguf_file=llama.name, dtype=torch.float32, quantization_config=dict(options)
        )
        with ours:
            assert isinstance(ours, FlexGenForCausalLM)
            assert ours.config.quantization_config.quant_method == "flexgen"
            same_tokens(model, ours, GREEDY, ragged(), eos_token_id=-1)
    (converted,) = tmp_path.glob("converted-*")
    assert is_store(converted)


def test_four_bits(llama: Path, tmp_path: Path) -> None:
    """Quantized as the numbers in the file, which a store of them has too."""
    convert(llama, tmp_path / "numbers", dtype="float32")
    with (
        load_ours(llama, compression="4bit", offload_folder=tmp_path) as ours,
        load_ours(tmp_path / "numbers", compression="4bit", offload_folder=tmp_path) as same,
    ):
        assert any(tensor.is_quantized for tensor in ours.stored_weights)
        same_tokens(same, ours, GREEDY, ragged(), eos_token_id=-1)


@pytest.mark.parametrize(("kind", "dtype"), [("Q8_0", "float16"), ("BF16", "bfloat16"), ("F32", "float32")])
def test_conversion(tmp_path: Path, kind: str, dtype: str) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", "llama", kind)
    out = tmp_path / "store"
    assert convert(tmp_path, out, gguf_file="tiny.gguf").dtype == dtype
    verify(out, file)
    verify(out, tmp_path, options=SourceOptions(gguf_file="tiny.gguf"))
    want = plain(file, dtype=getattr(torch, dtype)).state_dict()
    got = AutoModelForCausalLM.from_pretrained(out, dtype=getattr(torch, dtype)).state_dict()
    assert all(torch.equal(want[name], got[name]) for name in want)
    assert json.loads((out / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    # the tokenizer comes along
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="tiny.gguf")
    for tokenizer in (AutoTokenizer.from_pretrained(out), load_tokenizer(str(file))):
        assert tokenizer("cab")["input_ids"] == theirs("cab")["input_ids"]


def test_one_tensor_at_a_time(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' reader, which takes all of them into memory, is asked for the configuration only."""
    from transformers import modeling_gguf_pytorch_utils as theirs

    asked: list[bool] = []
    alive: set[int] = set()
    most = [0]
    load, make = theirs.load_gguf_checkpoint, gguf_files._Rules.make

    def watched(*args: Any, **options: Any) -> Any:
        asked.append(options.get("return_tensors", False))
        return load(*args, **options)

    def counted(self: Any, name: str, tensors: Any) -> torch.Tensor:
        made = make(self, name, tensors)
        alive.add(id(made))
        weakref.finalize(made, alive.discard, id(made))
        most[0] = max(most[0], len(alive))
        return made

    monkeypatch.setattr(theirs, "load_gguf_checkpoint", watched)
    monkeypatch.setattr(gguf_files._Rules, "make", counted)
    convert(llama, tmp_path / "store")
    assert asked
    assert not any(asked)
    assert most[0] <= 2  # the last one may outlive the request for the next


# ------------------------------------------------------------------------------------------------------------- refusals
def test_without_the_package(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *of: None if name == "gguf" else find_spec(name, *of))
    for act in (lambda: load_ours(llama), lambda: convert(llama, tmp_path / "store")):
        with pytest.raises(StoreError, match=r"gguf, which is not installed: pip install 'flexgen_hf\[gguf\]'"):
            act()


def test_broken_files(llama: Path, tmp_path: Path) -> None:
    whole = llama.read_bytes()
    for name, content in {"empty": b"", "other": b"no such thing" * 99, "cut": whole[: len(whole) // 2]}.items():
        (tmp_path / f"{name}.gguf").write_bytes(content)
        with pytest.raises(StoreError, match=rf"{name}\.gguf is no GGUF file, or a broken one.*download"):
            convert(tmp_path / f"{name}.gguf", tmp_path / "store")
    with pytest.raises(StoreError, match=r"absent\.gguf is not there"):
        convert(tmp_path, tmp_path / "store", gguf_file="absent.gguf")
    (tmp_path / "config.json").write_text(json.dumps(CASES["llama"][1]))
    with pytest.raises(StoreError, match=r"holds GGUF files; name the one to convert with --gguf-file cut\.gguf"):
        convert(tmp_path, tmp_path / "store")


def test_a_missing_tensor(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", "llama", without="blk.1.ffn_up")
    for act in (lambda: load_ours(file), lambda: convert(file, tmp_path / "store")):
        with pytest.raises(StoreError, match=r"lacks 1 of \d+ tensors .*layers\.1\.mlp\.up_proj"):
            act()


def test_a_file_in_parts(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "tiny-00001-of-00002.gguf", "llama", parts=2)
    with pytest.raises(UnsupportedModelError, match=r"one of 2 parts.*llama-gguf-split --merge"):
        load_ours(file)


def test_a_type_that_nothing_reads(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def dequantize(_: Any, kind: Any) -> Any:
        raise NotImplementedError(kind.name)

    monkeypatch.setattr(gguf, "dequantize", dequantize)
    with pytest.raises(UnsupportedModelError, match=r"type (Q8_0|F32), which .* cannot dequantize"):
        load_ours(llama)


def test_the_command_line(llama: Path, tmp_path: Path) -> None:
    arguments = ["convert", str(llama.parent), str(tmp_path / "store"), "--gguf-file", llama.name]
    result = CliRunner().invoke(cli.app, arguments, catch_exceptions=False)
    assert "float16" in result.stdout
    arguments = ["verify", str(tmp_path / "store"), str(llama)]
    assert "equals" in CliRunner().invoke(cli.app, arguments, catch_exceptions=False).stdout
    arguments = ["generate", str(llama), "--prompt", "abc", "--max-new-tokens", "2"]
    assert CliRunner().invoke(cli.app, arguments, catch_exceptions=False).exit_code == 0
