"""Every causal model type of the pinned transformers: equal, refused by name, or not buildable at tiny size."""

from __future__ import annotations

import pytest
import transformers
from typer.testing import CliRunner

from flexgen_hf import UnsupportedModelError, cli
from flexgen_hf.architectures import Structure
from flexgen_hf.cells import Cell
from flexgen_hf.executor import Executor
from flexgen_hf.families import TESTED, TESTED_WITH
from flexgen_hf.models_command import families, families_table
from flexgen_hf.sweep import Outcome, table, try_type
from flexgen_hf.tiny_configs import causal_types

# What the sweep says of all types that are not equal, by words of its reason.
REFUSED = {
    "state of its own kind": "bailing_hybrid bamba deepseek_v4 falcon_h1 falcon_mamba granitemoehybrid jamba "
    "kimi_linear mamba mamba2 nemotron_h olmo_hybrid qwen3_5 qwen3_5_moe qwen3_5_moe_text qwen3_5_text qwen3_next "
    "recurrent_gemma rwkv xlstm zamba zamba2 zaya",
    "layers of kind indexed_attention": "axk2 deepseek_v32 glm_moe_dsa hy_v4",
    "layers of kind conv": "lfm2_moe lfm3",
    "layers of kind hybrid": "inkling2_text inkling_text",
    "layers of kind linear_attention": "minimax",
    "is multimodal": "gemma3 git got_ocr2 moss_transcribe_diarize phi4_multimodal",
    "no past_key_values": "openai-gpt reformer xlm xlnet",
    "decoder layers": "blt hrm_text longcat_flash",
}
NOT_BUILDABLE = (
    "dots3_note dots3_note_text emu3 gemma3n gemma4 gemma4_assistant gemma4_unified gemma4_unified_assistant mllama "
    "musicgen musicgen_melody prophetnet qwen4_exp qwen4_exp_text"
)
EXPECTED = {
    **{name: ("refused", words) for words, names in REFUSED.items() for name in names.split()},
    **dict.fromkeys(NOT_BUILDABLE.split(), ("not buildable", "")),
}


@pytest.mark.parametrize("model_type", causal_types())
def test_no_type_is_silently_wrong(model_type: str) -> None:
    outcome = try_type(model_type)
    assert outcome.is_right, outcome
    if transformers.__version__.startswith(TESTED_WITH):
        verdict, words = EXPECTED.get(model_type, ("equal", ""))
        assert outcome.verdict == verdict, outcome
        assert words in outcome.reason


def test_what_is_expected_is_of_types_that_there_are() -> None:
    assert EXPECTED.keys() <= set(causal_types())
    assert not EXPECTED.keys() & TESTED


def test_a_wrong_token_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Cell, "_first", property(lambda cell: max(0, cell.length - 2)))
    outcome = try_type("mistral")
    assert (outcome.verdict, outcome.is_right) == ("DIFFERENT", False)
    result = CliRunner().invoke(cli.app, ["models", "--sweep", "mistral"])
    assert result.exit_code == 1
    assert "| mistral | model.layers | DIFFERENT: greedy search differs |" in result.stdout


def test_an_error_of_ours_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Executor, "run", lambda *_, **__: 1 / 0)
    outcome = try_type("opt")
    assert (outcome.verdict, outcome.is_right) == ("FAILS", False)
    assert outcome.reason.startswith("ZeroDivisionError")


def test_the_table_of_a_sweep() -> None:
    outcomes = [Outcome("opt", "equal", "model.layers"), Outcome("mamba", "refused", reason="state | of its own")]
    assert table(outcomes).splitlines() == [
        "| type | layers | outcome |",
        "| --- | --- | --- |",
        "| opt | model.layers | equal |",
        "| mamba |  | refused: state / of its own |",
        "",
        f"2 types of transformers {transformers.__version__}: 1 equal, 1 refused",
    ]


def test_the_command_sweeps_and_says_where_it_is() -> None:
    result = CliRunner().invoke(cli.app, ["models", "--sweep", "opt", "mamba", "no_such_type"])
    assert result.exit_code == 0
    assert "| opt | model.decoder.layers | equal |" in result.stdout
    assert "| mamba |  | refused: MambaForCausalLM keeps state" in result.stdout
    assert "| no_such_type |  | not buildable: " in result.stdout
    assert "opt: equal" in result.stderr


def test_families_that_are_not_tested_are_not_in_the_table() -> None:
    assert [family.model_type for family in families()] == sorted(TESTED)
    with pytest.raises(UnsupportedModelError, match="'mamba' is not among the tested families"):
        families(["mamba"])


def test_the_table_of_families_follows_from_the_code(monkeypatch: pytest.MonkeyPatch) -> None:
    (row,) = families_table(families(["bloom"])).splitlines()[2:]
    assert row == (
        "| bloom | BloomForCausalLM | device, host, disk | weights, cache | no: its attention is outside of "
        f"transformers' interface | {TESTED_WITH} |"
    )
    monkeypatch.setattr("flexgen_hf.attention.why_not_supported", lambda _: None)
    monkeypatch.setattr(Structure, "locate", lambda *_: (0, "embedding"))
    (row,) = families_table(families(["bloom"])).splitlines()[2:]
    assert "| cache | yes |" in row
