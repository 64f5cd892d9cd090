"""How a model gets here and leaves: checkpoints of every layout, stores, options, refusals, budgets."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import logging
import re
import shutil
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, OPTForCausalLM, pipeline

from flexgen_hf import (
    CapacityError,
    ConversionError,
    FlexGenForCausalLM,
    Placement,
    Policy,
    PolicyError,
    StoreError,
    Tier,
    UnsupportedModelError,
)
from flexgen_hf.weights.format import Manifest, is_store

from .checkpoints import opt_config, with_keys
from .comparison import BEAMS, GREEDY, THREE_TIERS, load_ours, load_plain, ragged, same_tokens, save_tiny
from .test_traps import OWN_CACHES
from .trained import TINY_OPT

METHOD = {"quant_method": "flexgen"}


def digest(folder: Path) -> dict[str, tuple[str, int]]:
    """Content and time of change of every file below a folder."""
    return {
        str(path.relative_to(folder)): (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def open_files(folder: Path) -> list[str]:
    """Files below a folder that this process holds open, named or not."""
    links = []
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the one that lists the others
            links.append(str(entry.readlink()))
    return [link for link in links if link.startswith(str(folder))]


# ---------------------------------------------------------------------------------------------- layouts of a checkpoint
def layout(source: Path, out: Path, kind: str) -> Path:
    """The same weights in another of the layouts that Hub repositories have."""
    model = OPTForCausalLM.from_pretrained(source)
    if "safetensors" in kind:
        model.save_pretrained(out, max_shard_size="50KB" if "sharded" in kind else "5GB")
        return out
    model.config.save_pretrained(out)
    model.generation_config.save_pretrained(out)
    state = load_file(source / "model.safetensors")
    if "short keys" in kind:  # most facebook/opt-* repositories
        state = {key.removeprefix("model."): value for key, value in state.items()}
    if "sharded" not in kind:
        torch.save(state, out / "pytorch_model.bin")
        return out
    names, weight_map = sorted(state), {}
    for part in range(3):
        file = f"pytorch_model-{part + 1:05d}-of-00003.bin"
        weight_map.update(dict.fromkeys(names[part::3], file))
        torch.save({name: state[name] for name in names[part::3]}, out / file)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (out / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return out


LAYOUTS = ["safetensors", "sharded safetensors", "bin", "sharded bin", "bin, short keys", "sharded bin, short keys"]


@pytest.mark.parametrize("kind", LAYOUTS)
def test_every_layout(tiny_opt: Path, plain_opt: Any, prompts: Any, tmp_path: Path, kind: str) -> None:
    folder = layout(tiny_opt, tmp_path / "model", kind)
    assert len(list(folder.glob("*.safetensors")) + list(folder.glob("*.bin"))) > 1 or "sharded" not in kind
    before = digest(folder)
    with load_ours(folder) as ours:
        assert isinstance(ours, FlexGenForCausalLM)
        assert isinstance(ours, OPTForCausalLM)
        same_tokens(plain_opt, ours, GREEDY, prompts)
        same_tokens(plain_opt, ours, BEAMS, prompts)
    assert digest(folder) == before
    converted = list((tmp_path / "offload").glob("converted-*"))
    assert len(converted) == (1 if "bin" in kind else 0)


def test_a_bin_is_converted_once(tiny_opt: Path, plain_opt: Any, prompts: Any, tmp_path: Path) -> None:
    folder = layout(tiny_opt, tmp_path / "model", "bin")
    for _ in range(2):
        with load_ours(folder) as ours:
            same_tokens(plain_opt, ours, GREEDY, prompts)
        (converted,) = (tmp_path / "offload").iterdir()
        assert is_store(converted)
        times = {name: time for name, (_, time) in digest(converted).items() if "shards" in name}
    assert times == {name: time for name, (_, time) in digest(converted).items() if "shards" in name}


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("loaded", ["auto", torch.float32, torch.bfloat16, torch.float16])
def test_16_bit_safetensors_run_where_they_lie(tmp_path: Path, stored: torch.dtype, loaded: Any) -> None:
    """Cast on their way if need be; nothing is written, least of all a second copy."""
    folder = save_tiny(opt_config(), tmp_path / "model", dtype=stored)
    before = digest(tmp_path)
    plain = load_plain(folder, dtype=loaded)
    with load_ours(folder, dtype=loaded) as ours:
        assert ours.dtype is plain.dtype
        if loaded is torch.float32:
            same_tokens(plain, ours, BEAMS, ragged())
        else:
            assert ours.generate(**ragged(), max_new_tokens=2).shape == (7, 11)
    assert digest(tmp_path) == before
    assert not list(tmp_path.glob("offload/*"))


def test_experts_run_as_they_lie_or_are_converted_to_be_fused(tmp_path: Path) -> None:
    """Those of a checkpoint's safetensors lie apart, and each is read by itself; those in a pickle lie nowhere."""
    config = transformers.MixtralConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, eos_token_id=None,
    )  # fmt: skip
    folder = save_tiny(config, tmp_path / "model", dtype=torch.bfloat16)
    with load_ours(folder, dtype=torch.float32) as ours:
        want = same_tokens(load_plain(folder, dtype=torch.float32), ours, GREEDY, ragged())
        kinds = {tensor.stored_dtype for tensor in ours._executor.weights.stored}
        assert kinds == {torch.bfloat16}
    assert not list((tmp_path / "offload").glob("*"))
    pickled = with_keys(folder, tmp_path / "pickled", lambda key: key)
    with load_ours(pickled, dtype=torch.float32) as ours:
        assert torch.equal(same_tokens(load_plain(folder, dtype=torch.float32), ours, GREEDY, ragged()), want)
    (converted,) = (tmp_path / "offload").iterdir()
    assert is_store(converted)


def test_a_path_may_be_a_string_and_arguments_are_transformers_own(
    tiny_opt: Path, plain_opt: Any, prompts: Any
) -> None:
    model = FlexGenForCausalLM.from_pretrained(
        str(tiny_opt), policy="20 80 0 100 0 100", batch_size=2, local_files_only=True, attn_implementation="eager"
    )
    assert model.config._attn_implementation == "eager"
    same_tokens(plain_opt, model, GREEDY, prompts)
    model, info = FlexGenForCausalLM.from_pretrained(tiny_opt, policy=THREE_TIERS, output_loading_info=True)
    assert isinstance(model, FlexGenForCausalLM)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]


def test_the_dtype_of_a_checkpoint_that_does_not_say(tmp_path: Path) -> None:
    folder = save_tiny(opt_config(), tmp_path / "model", dtype=torch.bfloat16)
    config = json.loads((folder / "config.json").read_text())
    config.pop("dtype")
    (folder / "config.json").write_text(json.dumps(config))
    with load_ours(folder) as model:
        assert model.dtype is load_plain(folder).dtype is torch.bfloat16


# ------------------------------------------------------------------------------------------------ without our own class
def test_auto_model_with_a_dict(tiny_opt: Path, plain_opt: Any, prompts: Any) -> None:
    """Code that takes a YAML file only can name us."""
    options = {"quant_method": "flexgen", "policy": "20 80 0 100 0 100", "batch_size": 2}
    auto: Any = AutoModelForCausalLM
    with auto.from_pretrained(tiny_opt, quantization_config=options) as model:
        assert isinstance(model, FlexGenForCausalLM)
        assert model.policy == Policy.parse("20 80 0 100 0 100", batch_size=2)
        same_tokens(plain_opt, model, GREEDY, prompts)


@pytest.fixture(scope="module")
def store(tiny_opt: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("store") / "opt"
    with load_ours(tiny_opt) as model:
        model.save_pretrained(out)
    return out


def test_auto_model_with_a_store(store: Path, plain_opt: Any, prompts: Any) -> None:
    auto: Any = AutoModelForCausalLM
    with auto.from_pretrained(store) as model:
        assert isinstance(model, FlexGenForCausalLM)
        same_tokens(plain_opt, model, GREEDY, prompts)


def test_a_policy_given_at_load_wins_over_a_stored_one(
    store: Path, plain_opt: Any, prompts: Any, tmp_path: Path
) -> None:
    """Also over one that somebody wrote into config.json by hand."""
    copy = tmp_path / "copy"
    shutil.copytree(store, copy)
    config = json.loads((copy / "config.json").read_text())
    assert set(config["quantization_config"]) == {"quant_method", "format_version"}  # a policy belongs to a machine
    config["quantization_config"].update(policy="0 100 0 100 0 100", batch_size=7)
    (copy / "config.json").write_text(json.dumps(config))
    auto: Any = AutoModelForCausalLM
    with auto.from_pretrained(copy) as model:
        assert model.policy == Policy.parse("0 100 0 100 0 100", batch_size=7)
    with load_ours(copy, "0 0 0 0 0 0", batch_size=3) as model:
        assert model.policy == Policy.parse("0 0 0 0 0 0", batch_size=3)
        same_tokens(plain_opt, model, GREEDY, prompts)
    with load_ours(copy, Policy()) as model:
        assert model.policy == Policy()


# ------------------------------------------------------------------------------------------------------------- saving
def test_a_saved_model_loads_with_ours(store: Path, tiny_opt: Path, plain_opt: Any, prompts: Any) -> None:
    assert is_store(store)
    names = {path.name for path in store.iterdir()}
    assert {"config.json", "generation_config.json", "flexgen_manifest.json", "shards"} <= names
    with load_ours(store) as model:
        same_tokens(plain_opt, model, GREEDY, prompts)
        same_tokens(plain_opt, model, BEAMS, prompts)
        files = {tensor.extent.file.parent.name for tensor in model._executor.weights.stored}
        assert files == {"shards"}  # read where they lie


def test_a_saved_model_loads_where_we_are_not_installed(store: Path, plain_opt: Any, prompts: Any) -> None:
    code = f"""
        import sys, torch, transformers
        model = transformers.AutoModelForCausalLM.from_pretrained({str(store)!r})
        ids, mask = torch.tensor({prompts["input_ids"].tolist()}), torch.tensor({prompts["attention_mask"].tolist()})
        print(model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=1).tolist())
        assert not any(name.startswith("flexgen") for name in sys.modules), "that was ours"
        assert type(model).__mro__[1].__name__ == "OPTPreTrainedModel"
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False, cwd="/"
    )
    assert done.returncode == 0, done.stderr
    want = plain_opt.generate(**prompts, max_new_tokens=6, do_sample=False, pad_token_id=1)
    assert json.loads(done.stdout.strip().splitlines()[-1]) == want.tolist()


@pytest.mark.parametrize("loaded", ["auto", torch.float32])
def test_what_is_saved_has_the_dtype_of_the_model(tmp_path: Path, loaded: Any) -> None:
    folder = save_tiny(opt_config(), tmp_path / "model", dtype=torch.float16)
    with load_ours(folder, dtype=loaded) as model:
        model.save_pretrained(tmp_path / "saved")
    want = torch.float32 if loaded is torch.float32 else torch.float16
    for shard in Manifest.load(tmp_path / "saved").shards:
        assert {t.dtype for t in load_file(tmp_path / "saved" / shard.file).values()} == {want}
    assert load_plain(tmp_path / "saved").dtype is want
    with load_ours(tmp_path / "saved") as model:
        assert model.dtype is want
        same_tokens(
            load_plain(folder, dtype=torch.float32),
            load_ours(tmp_path / "saved", dtype=torch.float32),
            GREEDY,
            ragged(),
        )


def test_saving_twice_into_one_folder(tiny_opt: Path, plain_opt: Any, prompts: Any, tmp_path: Path) -> None:
    with load_ours(tiny_opt) as model:
        model.save_pretrained(tmp_path / "saved")
        model.save_pretrained(tmp_path / "saved")
    other = save_tiny(opt_config(num_hidden_layers=1), tmp_path / "other")
    with load_ours(other) as model:
        model.save_pretrained(tmp_path / "again")
    with load_ours(tiny_opt) as model:  # over a store of another model
        model.save_pretrained(tmp_path / "again")
    for name in ("saved", "again"):
        with load_ours(tmp_path / name) as model:
            same_tokens(plain_opt, model, GREEDY, prompts)


def test_saving_what_was_saved(store: Path, plain_opt: Any, prompts: Any, tmp_path: Path) -> None:
    with load_ours(store) as model:
        model.save_pretrained(tmp_path / "second")
    with load_ours(tmp_path / "second") as model:
        same_tokens(plain_opt, model, GREEDY, prompts)


@pytest.mark.parametrize("where", [".", "sub/.."])
def test_saving_onto_what_the_model_reads_from_is_refused(tiny_opt: Path, store: Path, where: str) -> None:
    for folder in (tiny_opt, store):
        before = digest(folder)
        with load_ours(folder) as model, pytest.raises(ConversionError, match="save it to another folder"):
            model.save_pretrained(folder / where)
        assert digest(folder) == before


# ----------------------------------------------------------------------------------------------------------- pipelines
TEXTS = ["Once upon a time", "The", "A little girl named Lily went to the", "One day", "Tom"]


def test_pipeline_with_a_model(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY_OPT, padding_side="left")
    settings = {"do_sample": False, "max_new_tokens": 8, "batch_size": 3}
    want = pipeline("text-generation", model=load_plain(TINY_OPT), tokenizer=tokenizer)(TEXTS, **settings)
    with load_ours(TINY_OPT, offload_folder=tmp_path) as model, caplog.at_level(logging.WARNING):
        transformers.logging.enable_propagation()
        got = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")(TEXTS, **settings)
        transformers.logging.disable_propagation()
    assert got == want
    assert "not supported" not in caplog.text


@pytest.mark.parametrize("how", ["model_kwargs", "a store"])
def test_pipeline_by_name(tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture) -> None:
    options = {"quantization_config": {"quant_method": "flexgen", "policy": "20 80 0 100 0 100", "batch_size": 2}}
    folder = TINY_OPT
    if how == "a store":
        folder = tmp_path / "saved"
        with load_ours(TINY_OPT, offload_folder=tmp_path) as model:
            model.save_pretrained(folder)
        transformers.AutoTokenizer.from_pretrained(TINY_OPT).save_pretrained(folder)
        options = {}
    with caplog.at_level(logging.WARNING):
        transformers.logging.enable_propagation()
        made: Any = pipeline("text-generation", model=str(folder), model_kwargs=options)
        made.tokenizer.padding_side = "left"
        got = made(TEXTS, do_sample=False, max_new_tokens=8, batch_size=3)
        transformers.logging.disable_propagation()
    assert isinstance(made.model, FlexGenForCausalLM)
    plain = pipeline("text-generation", model=str(TINY_OPT))
    assert got == [plain(text, do_sample=False, max_new_tokens=8) for text in TEXTS]
    assert "not supported" not in caplog.text


# ----------------------------------------------------------------------------------------- options that cannot be meant
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"policy": "20 80"}, PolicyError, "not 6"),
        ({"policy": {"wieghts": {}}}, PolicyError, "did you mean 'weights'"),
        ({"policy": "/nowhere/policy.json"}, PolicyError, "cannot read '/nowhere/policy.json'"),
        ({"batch_size": 0}, PolicyError, "batch_size=0 must be a whole number"),
        ({"num_batches": -1}, PolicyError, "num_batches=-1"),
        ({"compression": "5bit"}, PolicyError, "'5bit' is unknown"),
        ({"max_memory": {"gpu": "1GiB"}}, PolicyError, "'gpu' is no tier"),
        ({"max_memory": {"cpu": "plenty"}}, PolicyError, "'plenty' for 'cpu' is no size"),
        ({"device_map": "balanced"}, PolicyError, "device_map"),
        ({"device_map": {"model": 0}}, PolicyError, "device_map"),
        ({"quantization_config": {"load_in_4bit": True}}, PolicyError, "quantization_config: pass policy="),
        ({"device": "nonsense"}, PolicyError, "device='nonsense'"),
    ],
    ids=str,
)
def test_options_that_cannot_be_meant(
    tiny_opt: Path, tmp_path: Path, options: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        FlexGenForCausalLM.from_pretrained(tiny_opt, offload_folder=tmp_path / "offload", **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("device_map", ["auto", "cpu"])
def test_a_device_map_that_leaves_the_choice(tiny_opt: Path, plain_opt: Any, prompts: Any, device_map: str) -> None:
    with load_ours(tiny_opt, device_map=device_map) as model:
        same_tokens(plain_opt, model, GREEDY, prompts)
        assert not hasattr(model, "hf_device_map")


def test_unknown_options_are_named(tiny_opt: Path) -> None:
    with pytest.raises(PolicyError, match="unknown option 'polcy'; known are policy, batch_size"):
        AutoModelForCausalLM.from_pretrained(tiny_opt, quantization_config={"quant_method": "flexgen", "polcy": ""})
    with pytest.raises(TypeError, match="polcy"):
        FlexGenForCausalLM.from_pretrained(tiny_opt, polcy="20 80 0 100 0 100")


def test_not_to_be_called_but_loaded() -> None:
    with pytest.raises(TypeError, match=r"use FlexGenForCausalLM\.from_pretrained"):
        FlexGenForCausalLM(opt_config())


# ------------------------------------------------------------------------------------------ checkpoints that are broken
def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    for name in (tmp_path / "nowhere", "./nowhere/at/all"):
        with pytest.raises(OSError, match="nowhere"):
            FlexGenForCausalLM.from_pretrained(name, local_files_only=True)


def test_a_folder_without_weights(tmp_path: Path) -> None:
    opt_config().save_pretrained(tmp_path)
    with pytest.raises(OSError, match="no file named"):
        FlexGenForCausalLM.from_pretrained(tmp_path)


def test_a_model_type_that_nobody_knows(tiny_opt: Path, tmp_path: Path) -> None:
    config = json.loads((tiny_opt / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "nonesuch"}))
    with pytest.raises(ValueError, match="nonesuch"):
        FlexGenForCausalLM.from_pretrained(tmp_path)


def test_a_truncated_file(tiny_opt: Path, tmp_path: Path) -> None:
    folder = layout(tiny_opt, tmp_path / "model", "safetensors")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(StoreError, match=r"model\.safetensors"):
        load_ours(folder)
    assert not list(tmp_path.glob("offload/*"))


@pytest.mark.parametrize("content", [b"", b"not a header, nor anything else", b"\xff" * 100])
def test_a_file_of_something_else(tiny_opt: Path, tmp_path: Path, content: bytes) -> None:
    folder = layout(tiny_opt, tmp_path / "model", "safetensors")
    (folder / "model.safetensors").write_bytes(content)
    for options in ({}, {"dtype": "float32"}):
        with pytest.raises(StoreError, match="model"):
            load_ours(folder, **options)


def test_a_store_with_a_broken_shard(store: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(store, copy)
    shard = sorted((copy / "shards").iterdir())[1]
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(StoreError, match=re.escape(shard.name)):
        load_ours(copy)
    shard.unlink()
    with pytest.raises((StoreError, OSError), match=re.escape(shard.name)):
        load_ours(copy)


def test_a_store_of_another_format(store: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(store, copy)
    manifest = json.loads((copy / "flexgen_manifest.json").read_text())
    (copy / "flexgen_manifest.json").write_text(json.dumps({**manifest, "format_version": 99}))
    with pytest.raises(StoreError, match="99"):
        load_ours(copy)


def test_a_state_dict_instead_of_files(plain_opt: Any) -> None:
    with pytest.raises(UnsupportedModelError, match="a state_dict cannot be streamed"):
        OPTForCausalLM.from_pretrained(
            None, config=plain_opt.config, state_dict=plain_opt.state_dict(), quantization_config=METHOD
        )


@pytest.mark.parametrize("family", ["mamba", "rwkv", "recurrent_gemma"])
def test_families_with_their_own_cache_are_refused_before_weights_are_read(
    tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    AutoConfig.for_model(family, **OWN_CACHES[family]).save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"not to be looked at")
    monkeypatch.setattr("flexgen_hf.loading.read_checkpoint", None)
    with pytest.raises(UnsupportedModelError, match=r"not keys and values|state of its own kind"):
        load_ours(tmp_path / "model", dtype="float32")  # "auto" would have transformers look


def test_checkpoints_quantized_by_others_are_refused(tiny_opt: Path, tmp_path: Path) -> None:
    folder = layout(tiny_opt, tmp_path / "model", "safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match="quantized with gptq, which"):
        load_ours(folder)


# -------------------------------------------------------------------------------------------------------------- budgets
@pytest.fixture
def nothing_left(tmp_path: Path) -> Iterator[None]:
    """No thread, no file, no open file is left behind."""
    before = set(threading.enumerate())
    yield
    gc.collect()
    assert not [thread for thread in threading.enumerate() if thread not in before]
    assert not list(tmp_path.rglob("offload/*"))
    assert not open_files(tmp_path)


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize(
    ("percents", "limits", "message"),
    [
        ("100 0 100 0 100 0", {0: 50_000}, r"weights needs .* the device tier has 0\.0\d MiB left of 0.05 MiB"),
        ("0 100 0 100 0 100", {0: "1GiB", "cpu": "30KB"}, r"weights needs .* the host tier has .* left of 0.03 MiB"),
        ("0 100 0 100 0 100", {"cpu": "30KB"}, r"RAM \(device and host tier together\)"),
        ("0 0 0 0 0 0", {"disk": "30KB"}, r"weights needs .* the disk tier has .* left of 0.03 MiB .*; fits with"),
    ],
)
def test_weights_that_do_not_fit(tiny_opt: Path, tmp_path: Path, percents: str, limits: Any, message: str) -> None:
    with pytest.raises(CapacityError, match=message):
        load_ours(tiny_opt, Policy.parse(percents), max_memory=limits, offload_folder=tmp_path / "offload")


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize(
    ("percents", "limits", "message"),
    [
        ("100 0 100 0 100 0", {0: "200KB"}, "KV cache needs .* but the device tier has"),
        ("100 0 0 100 100 0", {0: "1MB", "cpu": "50KB"}, "KV cache needs .* but the host tier has"),
        ("100 0 0 0 100 0", {"disk": "50KB"}, "KV cache needs .* but the disk tier has"),
        ("100 0 100 0 0 0", {"disk": "4KB"}, "hidden states needs .* but the disk tier has"),
    ],
)
def test_a_cache_that_does_not_fit(
    tiny_opt: Path, plain_opt: Any, tmp_path: Path, percents: str, limits: Any, message: str
) -> None:
    """Refused before work starts, and the model is as good as before."""
    policy = Policy.parse(percents, batch_size=8)
    with load_ours(tiny_opt, policy, max_memory=limits, offload_folder=tmp_path / "offload") as model:
        big = ragged([9] * 16)
        for _ in range(2):
            with pytest.raises(CapacityError, match=message):
                model.generate(**big, max_new_tokens=20)
        if "hidden" not in message:
            assert not model.last_run.sweeps
            same_tokens(plain_opt, model, GREEDY, ragged([3, 2]), max_new_tokens=2)
        held = {tier: model._executor.space.ledger.held(tier) for tier in Tier}
    gc.collect()
    assert held[Tier.DISK] == 0
    assert all(model._executor.space.ledger.held(tier) == 0 for tier in Tier)


@pytest.fixture(scope="module")
def deep_opt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With enough layers for one to be a small part of the whole."""
    return save_tiny(opt_config(num_hidden_layers=24), tmp_path_factory.mktemp("deep") / "opt", std=0.15)


def test_budgets_are_kept(deep_opt: Path, prompts: Any, tmp_path: Path) -> None:
    limits = {0: 600_000, "cpu": 900_000, "disk": 600_000}
    with load_ours(deep_opt, max_memory=limits, offload_folder=tmp_path / "offload") as model:
        same_tokens(load_plain(deep_opt), model, GREEDY, prompts)
        peaks = model.last_run.peak_bytes
    assert all(0 < peaks[tier] <= limit for tier, limit in zip(Tier, limits.values(), strict=True))


def test_without_a_policy_the_fastest_tiers_are_filled_first(deep_opt: Path, prompts: Any) -> None:
    plain = load_plain(deep_opt)
    with FlexGenForCausalLM.from_pretrained(deep_opt) as model:
        assert model.policy.weights == Placement(device=1.0)
        same_tokens(plain, model, GREEDY, prompts)
    with FlexGenForCausalLM.from_pretrained(deep_opt, max_memory={"cpu": 1_000_000}, batch_size=2) as model:
        assert 0 < model.policy.weights.device < 1
        assert model.policy.weights.disk == pytest.approx(1 - model.policy.weights.device)
        same_tokens(plain, model, GREEDY, ragged([3, 4]))


# --------------------------------------------------------------------------------------------------------------- shares
@pytest.mark.parametrize("shares", [(30, 30), (10, 20), (75, 0), (0, 45), (5, 90), (33.3, 33.3)])
def test_shares_are_honoured(deep_opt: Path, shares: tuple[float, float]) -> None:
    """Within 2 % or the largest tensor, on a model with enough layers for 2 % to be the larger."""
    policy = Policy.parse([*shares, *shares, 100, 0], batch_size=2, num_batches=2)
    with load_ours(deep_opt, policy) as model:
        model.generate(**ragged([3, 5, 2, 4]), max_new_tokens=2)
        largest = {
            "weights": max(tensor.stored_bytes for tensor in model._executor.weights.stored),
            "cache": sum(model.last_run.placement["cache"].values()) // 48,
        }
        for kind, placement in (("weights", policy.weights), ("cache", policy.cache)):
            got = model.last_run.placement[kind]
            for tier in Tier:
                error = abs(got[tier] - placement.share(tier) * sum(got.values()))
                assert error <= max(0.02 * sum(got.values()), largest[kind]), (kind, tier, got)
        assert largest["weights"] < 0.02 * sum(model.last_run.placement["weights"].values())
