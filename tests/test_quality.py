"""What fewer bits cost: the numbers are those of transformers with the same weights and a cache that keeps as much."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import OPTForCausalLM
from typer.testing import CliRunner

from conversion.convert import convert
from flexgen_hf import Compression, FlexGenError, FlexGenForCausalLM, Policy, PolicyError, StoreError, cli, quality
from flexgen_hf.quality import Settings, compare, cut, variants_of

from .checkpoints import opt_config
from .comparison import as_quantized, load_plain, quantized_in
from .kept import cache_as_kept
from .tiny import write_tiny_opt
from .trained import TINY_OPT

FOUR = Compression(weights=4, cache=4, group_size=32)
# three windows of 13 tokens in chunks of 5; four prompts of six
SETTINGS = Settings(max_tokens=40, window=13, chunk=5, prompts=4, prompt_len=6, new_tokens=5)
# everything is moved, and the last block and its last micro-batch are ragged
POLICY = Policy.parse("0 40 0 40 0 40", batch_size=1, num_batches=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_opt(tmp_path_factory.mktemp("model") / "opt", torch.float16)


@pytest.fixture(scope="module")
def tokens() -> list[int]:
    found: list[int] = torch.randint(4, 96, (44,), generator=torch.Generator().manual_seed(2)).tolist()
    return found


def measure(source: Path, tokens: list[int], offload: Path, compression: Compression = FOUR, **options: Any) -> Any:
    settings = options.pop("settings", SETTINGS)

    def load(variant: quality.Variant) -> Any:
        given = {"policy": POLICY, "dtype": torch.float32, "offload_folder": offload, **options.pop("loading", {})}
        return FlexGenForCausalLM.from_pretrained(variant.source, compression=variant.compression, **given)

    return compare(load, variants_of(str(source), compression, **options), cut(tokens, settings), settings)


@pytest.fixture(scope="module")
def measured(folder: Path, tokens: list[int], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """All four variants of the tiny OPT, by name."""
    found = measure(folder, tokens, tmp_path_factory.mktemp("offload"))
    return {variant.name: variant for variant in found.variants}


@pytest.fixture(scope="module")
def dequantized(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """transformers' model with the numbers that the quantized weights stand for."""
    store = tmp_path_factory.mktemp("store")
    convert(folder, store, compression=FOUR)
    return as_quantized(load_plain(folder, dtype=torch.float32).eval(), quantized_in(store))


def fed(model: Any, windows: torch.Tensor, compression: Compression) -> tuple[float, torch.Tensor]:
    """Mean loss and likeliest tokens of windows given to transformers in chunks, with a cache of that kind."""
    cache, logits = cache_as_kept(compression), []
    with torch.no_grad():
        for at in range(0, windows.shape[1] - 1, SETTINGS.chunk):
            part = windows[:, at : min(at + SETTINGS.chunk, windows.shape[1] - 1)]
            logits.append(model(part, past_key_values=cache).logits)
    found = torch.cat(logits, 1)
    return float(torch.nn.functional.cross_entropy(found.flatten(0, 1), windows[:, 1:].flatten())), found.argmax(-1)


class TestPerplexity:
    def test_as_stored_it_is_that_of_transformers_own_loss(self, measured, folder, tokens):
        windows = cut(tokens, SETTINGS).windows
        with torch.no_grad():
            loss = load_plain(folder, dtype=torch.float32)(windows, labels=windows).loss
        assert math.log(measured["as stored"].perplexity) == pytest.approx(float(loss), abs=1e-4)
        assert measured["as stored"].ratio == measured["as stored"].same_next == 1

    @pytest.mark.parametrize(
        ("name", "compression"),
        [("weights", Compression()), ("cache", Compression(cache=4, group_size=32)), ("weights and cache", FOUR)],
    )
    def test_with_fewer_bits_it_is_that_of_transformers_run_on_them(
        self, measured, folder, tokens, dequantized, name, compression
    ):
        plain = load_plain(folder, dtype=torch.float32).eval()
        windows = cut(tokens, SETTINGS).windows
        before, likeliest = fed(plain, windows, Compression())
        loss, other = fed(dequantized if "weights" in name else plain, windows, compression)
        assert abs(loss - before) > 1e-3  # or the test would show nothing
        assert math.log(measured[name].perplexity) == pytest.approx(loss, abs=1e-4)
        assert math.log(measured[name].ratio) == pytest.approx(loss - before, abs=1e-4)
        assert measured[name].same_next == pytest.approx(float((likeliest == other).float().mean()))

    def test_a_window_in_one_chunk_never_reads_the_cache(self, folder, tokens, tmp_path):
        whole = dataclasses.replace(SETTINGS, chunk=SETTINGS.window)
        found = measure(folder, tokens, tmp_path, Compression(cache=2), settings=whole)
        assert found.variants[1].ratio == 1
        assert found.variants[1].same_written < 1

    def test_the_error_of_the_ratio_is_that_of_windows(self, measured, folder, tokens, dequantized):
        plain, windows = load_plain(folder, dtype=torch.float32).eval(), cut(tokens, SETTINGS).windows
        more = [fed(dequantized, w, Compression())[0] - fed(plain, w, Compression())[0] for w in windows.split(1)]
        error = torch.tensor(more).std() / len(more) ** 0.5
        assert measured["weights"].ratio_error == pytest.approx(float(error) * measured["weights"].ratio, rel=1e-2)

    def test_one_window_has_no_error(self, folder, tokens, tmp_path):
        found = measure(folder, tokens[:14], tmp_path, Compression(cache=4), settings=SETTINGS)
        assert found.windows == 1
        assert found.variants[1].ratio_error is None


class TestLayers:
    def test_errors_of_states_are_those_behind_each_layer(self, measured, folder, tokens, dequantized):
        window = cut(tokens, SETTINGS).windows[:1, :256]
        with torch.no_grad():
            before, after = (
                model(window, output_hidden_states=True).hidden_states[1:]
                for model in (load_plain(folder, dtype=torch.float32).eval(), dequantized)
            )
        wanted = [((a - b).norm(dim=-1) / b.norm(dim=-1)).mean().item() for b, a in zip(before, after, strict=True)]
        assert list(measured["weights"].states) == pytest.approx(wanted, rel=1e-3)
        assert measured["as stored"].states == (0, 0, 0)
        assert all(0 < small < large for small, large in zip(measured["cache"].states[1:], wanted[1:], strict=True))

    def test_errors_of_weights_are_those_of_each_layers_parameters(self, measured, folder, dequantized):
        plain = load_plain(folder, dtype=torch.float32)
        changed = {n: p for n, p in dequantized.named_parameters() if ".layers.1." in n}
        wrong = sum((p - plain.get_parameter(n)).square().sum().item() for n, p in changed.items())
        whole = sum(plain.get_parameter(n).square().sum().item() for n in changed)
        assert measured["weights"].layers[1] == pytest.approx((wrong / whole) ** 0.5, rel=1e-4)
        name = "model.decoder.layers.1.fc1.weight"
        of_one = (changed[name] - plain.get_parameter(name)).norm() / plain.get_parameter(name).norm()
        assert measured["weights and cache"].weights[name] == pytest.approx(float(of_one.detach()), rel=1e-4)
        assert measured["cache"].layers == (0, 0, 0)
        assert measured["cache"].weights == {}
        assert (
            measured["cache"].weights_bytes == measured["as stored"].weights_bytes > measured["weights"].weights_bytes
        )


class TestAgreement:
    def test_it_is_that_of_transformers_tokens(self, measured, folder, tokens, dequantized):
        prompts = cut(tokens, SETTINGS).prompts
        one, other = (
            model.generate(prompts, do_sample=False, max_new_tokens=5, min_new_tokens=5, pad_token_id=0)[:, 6:]
            for model in (load_plain(folder, dtype=torch.float32).eval(), dequantized)
        )
        same = one == other
        prefixes = [row.index(False) if False in row else len(row) for row in same.tolist()]
        assert 0 < same.float().mean() < 1  # or the test would show nothing
        assert measured["weights"].same_written == pytest.approx(float(same.float().mean()))
        assert measured["weights"].prefix == sum(prefixes) / len(prefixes)

    def test_what_loses_nothing_changes_nothing(self, tokens, tmp_path):
        """Weights that are sixteen numbers at equal distances are what their codes stand for."""
        model: Any = OPTForCausalLM(opt_config())
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".layers." in name and parameter.dim() == 2:
                    codes = torch.randint(0, 16, (parameter.numel() // 32, 32), generator=generator)
                    codes[:, 0], codes[:, 1] = 0, 15
                    parameter.copy_((codes.view_as(parameter) - 7.5) / 16)
        model.save_pretrained(tmp_path / "opt")
        found = measure(tmp_path / "opt", tokens, tmp_path, Compression(weights=4, group_size=32)).variants[1]
        assert found.weights
        assert set(found.weights.values()) == {0}
        assert (found.ratio, found.same_next, found.same_written, found.prefix) == (1, 1, 1, 5)
        assert found.states == found.layers == (0, 0, 0)


class TestStores:
    def test_weights_come_from_a_store(self, folder, tokens, tmp_path, measured):
        convert(folder, tmp_path / "store", compression=FOUR)
        found = measure(folder, tokens, tmp_path, Compression(cache=4, group_size=32), store=str(tmp_path / "store"))
        assert [variant.name for variant in found.variants] == list(measured)
        assert found.variants[-1] == measured["weights and cache"]

    def test_a_quantized_store_has_nothing_to_be_compared_with(self, folder, tokens, tmp_path):
        convert(folder, tmp_path / "store", compression=FOUR)
        with pytest.raises(StoreError, match=r"store with 18 quantized tensors.*give the checkpoint.*--store"):
            measure(tmp_path / "store", tokens, tmp_path, Compression(cache=4))

    def test_a_store_of_another_model_is_refused(self, folder, tokens, tmp_path):
        other = write_tiny_opt(tmp_path / "other", ffn_dim=48)
        convert(other, tmp_path / "store", compression=Compression(weights=4, group_size=8))
        with pytest.raises(StoreError, match=r"fc1\S* of shape \(48,.*but the model has one of shape"):
            measure(folder, tokens, tmp_path, Compression(), store=str(tmp_path / "store"))


class TestRefusals:
    def test_nothing_to_compare(self):
        with pytest.raises(PolicyError, match="nothing is quantized; give compression='4bit'"):
            variants_of("model", Compression())

    @pytest.mark.parametrize("given", [{"window": 1}, {"chunk": 0}, {"prompts": 0}, {"max_tokens": 0}])
    def test_numbers_that_cannot_be_meant(self, given):
        with pytest.raises(PolicyError, match=f"{next(iter(given))}={next(iter(given.values()))}; it must be at least"):
            Settings(**given)

    def test_a_text_that_is_too_short(self, tokens):
        with pytest.raises(
            FlexGenError, match=r"text has 12 tokens, but a window of 13 .* need 13; give a longer text"
        ):
            cut(tokens[:12], SETTINGS)
        with pytest.raises(FlexGenError, match=r"8 tokens \(max_tokens=8\).* need 9"):
            cut(tokens, Settings(max_tokens=8, window=4, prompts=4, prompt_len=6))

    def test_windows_beyond_what_the_model_sees(self, folder, tokens, tmp_path):
        far = Settings(max_tokens=40, window=13, prompts=2, prompt_len=6, new_tokens=4000)
        with pytest.raises(FlexGenError, match=r"sees at most .* but a window has 13.* written after it 4006"):
            measure(folder, tokens, tmp_path, settings=far)


class TestWhatIsCut:
    def test_prompts_lie_at_equal_distances_from_the_first_token_to_the_last(self):
        sample = cut(list(range(100)), Settings(max_tokens=90, window=40, prompts=3, prompt_len=10))
        assert sample.windows[:, 0].tolist() == [0, 40]
        assert sample.prompts[:, 0].tolist() == [0, 40, 80]
        assert sample.prompts[2].tolist() == list(range(80, 90))

    @pytest.mark.parametrize(
        ("compression", "names"),
        [
            (Compression(weights=4), ["weights"]),
            (Compression(patterns={"*.fc1": 8}), ["weights"]),
            (Compression(cache=4), ["cache"]),
            (FOUR, ["weights", "cache", "weights and cache"]),
        ],
    )
    def test_variants_are_what_was_asked_for(self, compression, names):
        first, *others = variants_of("model", compression)
        assert not first.compression
        assert [variant.name for variant in others] == names
        assert others[-1].compression == compression


class TestTheCommand:
    def run(self, *arguments: Any) -> Any:
        return CliRunner().invoke(cli.app, ["quality", *map(str, arguments)], catch_exceptions=False)

    @pytest.fixture
    def text(self, tmp_path: Path) -> Path:
        file = tmp_path / "text.txt"
        file.write_text("Fellow citizens of the Senate and House of Representatives, our country has peace. " * 5)
        return file

    OPTIONS = "--max-tokens 64 --window 32 --chunk 8 --prompts 2 --prompt-len 8 --new-tokens 4".split()

    def test_a_table_and_json_of_the_shipped_model(self, text, tmp_path):
        out = tmp_path / "quality.json"
        options = [*self.OPTIONS, "--batch-size", "2", "--offload-folder", tmp_path, "--json", out]
        result = self.run(TINY_OPT, "--text", text, *options)
        assert result.exit_code == 0
        assert "64 tokens in 2 windows of 32, fed 8 at a time; 2 prompts of 8 tokens, 4 written" in result.stdout
        assert [line.partition(": ")[2] for line in result.stderr.splitlines()] == [
            "as stored", "weights", "cache", "weights and cache",
        ]  # fmt: skip
        read = json.loads(out.read_text())
        assert read["settings"]["window"] == 32
        both = read["variants"][3]
        row = next(line for line in result.stdout.splitlines() if line.startswith("weights and cache"))
        assert f"{both['perplexity']:.4f}  {both['ratio']:.4f} +- {both['ratio_error']:.4f}" in row
        assert len(both["weights"]) == 4 * 6
        assert all(f"{error:.2%}" in result.stdout for error in (*both["layers"], *both["states"]))

    def test_a_store(self, text, tmp_path):
        convert(TINY_OPT, tmp_path / "store", compression=Compression(weights=8), method="minmax")
        result = self.run(TINY_OPT, "--text", text, *self.OPTIONS, "--store", tmp_path / "store")
        assert result.exit_code == 0
        assert "weights and cache" in result.stdout

    def test_a_missing_text(self, tmp_path):
        with pytest.raises(FlexGenError, match=r"--text: cannot read .*nowhere.txt.* give a file of plain text"):
            self.run(TINY_OPT, "--text", tmp_path / "nowhere.txt")

    def test_a_missing_store(self, text, tmp_path):
        with pytest.raises(StoreError, match=r"no folder .*nowhere"):
            self.run(TINY_OPT, "--text", text, "--store", tmp_path / "nowhere")

    def test_no_tokenizer(self, text, folder):
        with pytest.raises(FlexGenError, match=f"'{folder}' has no tokenizer; save the one"):
            self.run(folder, "--text", text)
