"""lm-eval's model `flexgen` gives what its model `hf` gives for the same checkpoint; most of it without lm-eval."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from flexgen_hf import FlexGenError, PolicyError
from flexgen_hf.cli import app
from flexgen_hf.integrations import lm_eval as integration

from .tiny import load, reference, write_tiny_opt
from .trained import TINY_OPT

needs_lm_eval = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="needs lm-eval: pip install 'flexgen_hf[lm-eval]'"
)

QUESTIONS = [
    ("Congress has the power to declare", [" war", " peace and", " the", " a tax on the people"]),
    ("The President shall be Commander in", [" Chief", " the", " Congress of the United States"]),
    ("", ["Fellow citizens", " The"]),
    ("Fellow citizens of the Senate and of the House of", [" Representatives", " the"]),
]
STORIES = [
    "Since your last meeting the country has been at peace with all nations. " * 2,
    "The Secretary of the Treasury reports a surplus.",
    "It is a matter of congratulation that the finances are in order, and that the debt is paid. " * 40,
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_opt(tmp_path_factory.mktemp("lm_eval") / "model")


# ------------------------------------------------------------------------------------------------------ without lm-eval
def test_likelihoods_are_those_of_the_end_that_the_model_sees(folder: Path, tmp_path: Path) -> None:
    pairs = [([2, 9, 8, 7], [6, 5]), (list(range(6, 60)), [60, 61, 62]), ([9], list(range(10, 50)))]
    with load(folder, tmp_path) as ours:
        got = {found.number: found for found in integration.likelihoods(ours, pairs, longest=40)}
    assert set(got) == {0, 1, 2}
    for index, (context, continuation) in enumerate(pairs):
        ids = torch.tensor([[*context, *continuation][-41:]])
        with torch.no_grad():
            logits = reference(folder)(ids[:, :-1]).logits[0, -len(continuation) :]
        want = logits.log_softmax(-1).gather(-1, torch.tensor(continuation)[:, None]).sum()
        assert got[index].total == pytest.approx(float(want), abs=1e-3)
        assert got[index].is_greedy == (logits.argmax(-1).tolist() == continuation)


def test_a_continuation_that_the_model_cannot_see_is_refused(folder: Path, tmp_path: Path) -> None:
    with load(folder, tmp_path) as ours, pytest.raises(FlexGenError, match="41 tokens, but the model sees at most 40"):
        list(integration.likelihoods(ours, [([9], [8] * 41)], longest=40))


def test_what_is_wrong_with_a_request_ends_the_evaluation(folder: Path, tmp_path: Path) -> None:
    with load(folder, tmp_path) as ours:
        with pytest.raises(PolicyError, match="token 1000"):
            list(integration.likelihoods(ours, [([9], [8]), ([9], [1000])], longest=40))
        with pytest.raises(PolicyError, match="context of 40"):
            list(integration.written(ours, [([9] * 39, {"max_new_tokens": 9, "pad_token_id": 1})]))


def test_what_is_written_is_what_generate_writes(folder: Path, tmp_path: Path) -> None:
    options = {"max_new_tokens": 5, "do_sample": True, "pad_token_id": 1, "eos_token_id": None}
    prompts = [([9 + n, 8, 7], options) for n in range(5)]
    with load(folder, tmp_path) as ours:
        got = dict(integration.written(ours, prompts, seed=3))
    for index, (ids, _) in enumerate(prompts):
        torch.manual_seed(3 + index)
        want = reference(folder).generate(torch.tensor([ids]), **options)
        assert got[index] == want[0, 3:].tolist()


def test_arguments_as_text(folder: Path, tmp_path: Path) -> None:
    options = {"offload_folder": str(tmp_path), "dtype": "float32"}
    text = {"policy": "0 50 0 100 0 100", "num_batches": 3, "max_memory": "cpu=4GiB"}
    with integration.load(str(folder), batch_size="2", **text, **options) as model:
        assert (model.policy.batch_size, model.policy.num_batches) == (2, 3)
        assert model.policy.weights.host == 0.5
    for left in (1, "1", "auto", "auto:4", None):
        with integration.load(str(folder), batch_size=left, policy={"batch_size": 5}, **options) as model:
            assert model.policy.batch_size == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"parallelize": True}, "parallelize is of lm-eval's own way"),
        ({"peft": "adapter"}, "merge it into the checkpoint"),
        ({"batch_size": "many"}, "--batch_size many"),
        ({"batch_size": "0"}, "--batch_size 0"),
        ({"policy": "0 0 0"}, "3 numbers"),
        ({"policy": "100 0 100 0 100 0", "max_memory": "4GiB"}, "--max-memory"),
    ],
)
def test_arguments_that_cannot_be_meant(folder: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        integration.load(str(folder), **arguments)


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    result = CliRunner().invoke(app, ["lm-eval", "run", "--model", "flexgen"])
    assert isinstance(result.exception, FlexGenError)
    assert "pip install 'flexgen_hf[lm-eval]'" in str(result.exception)


# --------------------------------------------------------------------------------------------------------- with lm-eval
@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The models `hf` and `flexgen` of one checkpoint; everything of the second moves."""
    registry = pytest.importorskip("lm_eval.api.registry")
    integration.register()
    ours = registry.get_model("flexgen").create_from_arg_obj(
        {
            "pretrained": str(TINY_OPT),
            "dtype": "float32",
            "policy": "0 0 0 0 0 0",
            "num_batches": 3,
            "offload_folder": str(tmp_path_factory.mktemp("offload")),
        },
        {"batch_size": "2", "max_batch_size": None, "device": None},
    )
    theirs = registry.get_model("hf").create_from_arg_obj(
        {"pretrained": str(TINY_OPT), "dtype": "float32"}, {"batch_size": 2, "device": "cpu"}
    )
    yield theirs, ours
    ours.model.close()


def instances(kind: str, *arguments: tuple[Any, ...]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, made, number) for number, made in enumerate(arguments)]


@needs_lm_eval
def test_the_same_likelihoods(both: Any) -> None:
    theirs, ours = both
    asked = instances("loglikelihood", *[(context, answer) for context, answers in QUESTIONS for answer in answers])
    asked += instances("loglikelihood", (STORIES[2] * 3, " The end"))  # longer than the model sees
    want = theirs.loglikelihood(asked, disable_tqdm=True)
    got = ours.loglikelihood(asked, disable_tqdm=True)
    assert [total for total, _ in got] == pytest.approx([total for total, _ in want], abs=1e-3)
    assert [greedy for _, greedy in got] == [greedy for _, greedy in want]
    assert len({greedy for _, greedy in want}) == 2


@needs_lm_eval
def test_the_same_likelihoods_of_whole_texts(both: Any) -> None:
    theirs, ours = both
    asked = instances("loglikelihood_rolling", *[(text,) for text in STORIES])
    assert len(ours.tok_encode(STORIES[2])) > ours.max_length  # more than one window
    want = theirs.loglikelihood_rolling(asked, disable_tqdm=True)
    assert ours.loglikelihood_rolling(asked, disable_tqdm=True) == pytest.approx(want, rel=1e-5)


@needs_lm_eval
def test_the_same_texts(both: Any) -> None:
    theirs, ours = both
    settings = [
        {"until": ["."], "max_gen_toks": 12},
        {"until": [" the", "\n"], "max_gen_toks": 9, "do_sample": False, "temperature": 0.0},
        {"until": [], "max_gen_toks": 7, "repetition_penalty": 1.3},
    ]
    asked = instances(
        "generate_until", *[(context, dict(made)) for context, _ in QUESTIONS if context for made in settings]
    )
    asked += instances("generate_until", (STORIES[2] * 3, dict(settings[0])))
    want = theirs.generate_until(asked, disable_tqdm=True)
    assert ours.generate_until(asked, disable_tqdm=True) == want
    assert len(set(want)) > 6
    assert ours.tokenizer_name == theirs.tokenizer_name
    history = [{"role": "user", "content": "What is a tax?"}]
    for model in both:
        model.tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}> {{ m.content }}\n{% endfor %}"
    assert ours.apply_chat_template(history) == theirs.apply_chat_template(history)


@needs_lm_eval
def test_more_tokens_than_the_model_sees_are_refused(both: Any) -> None:
    _, ours = both
    with pytest.raises(PolicyError, match="max_gen_toks=100000"):
        ours.generate_until(instances("generate_until", ("Congress", {"until": [], "max_gen_toks": 100_000})))


@needs_lm_eval
def test_a_task_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The two models give the same numbers for one task, and what they were computed from is the same."""
    rows = [{"question": context, "choices": answers, "answer": 0} for context, answers in QUESTIONS if context]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "congress",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "questions.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1.0},
    }
    (tmp_path / "congress.yaml").write_text(json.dumps(task))
    found = []
    for model, own in (("hf", ""), ("flexgen", f",policy=0 50 0 100 0 100,offload_folder={tmp_path / 'o'}")):
        out = tmp_path / model
        arguments = ["lm-eval", "run", "--model", model, "--tasks", "congress", "--include_path", str(tmp_path)]
        arguments += ["--model_args", f"pretrained={TINY_OPT},dtype=float32{own}", "--log_samples"]
        result = CliRunner().invoke(app, [*arguments, "--output_path", str(out), "--device", "cpu"])
        assert result.exception is None, result.output
        (results,) = out.rglob("results_*.json")
        (samples,) = out.rglob("samples_*.jsonl")
        accuracy = json.loads(results.read_text())["results"]["congress"]["acc,none"]
        lines = map(json.loads, samples.read_text().splitlines())
        found.append((accuracy, {line["doc_id"]: line["filtered_resps"] for line in lines}))
    assert found[0][0] == found[1][0]
    assert found[0][1].keys() == found[1][1].keys()
    for number, answers in found[0][1].items():
        want = [float(total) for total, _ in answers]
        assert [float(total) for total, _ in found[1][1][number]] == pytest.approx(want, abs=1e-3)
