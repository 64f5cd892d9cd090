"""HELM: what its requests ask for, how they are answered together, and its own files at the end."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from flexgen_hf import FlexGenError, Policy, PolicyError, StoreError, UnsupportedModelError
from flexgen_hf.apps import helm
from flexgen_hf.apps.helm import executing
from flexgen_hf.apps.helm.requests import StopAtText, digest_of, read
from flexgen_hf.cli import app
from flexgen_hf.continuous.texts import TextRequest

from .trained import TINY_OPT, sentences

needs_helm = pytest.mark.skipif(
    importlib.util.find_spec("helm") is None, reason="HELM is not installed (pip install '.[helm]')"
)


@dataclasses.dataclass(frozen=True)
class Request:
    """HELM's, as far as it is read here."""

    prompt: str = ""
    temperature: float = 1.0
    num_completions: int = 1
    top_k_per_token: int = 1
    max_tokens: int = 100
    stop_sequences: list[str] = dataclasses.field(default_factory=list)
    echo_prompt: bool = False
    top_p: float = 1
    presence_penalty: float = 0
    frequency_penalty: float = 0
    random: str | None = None
    messages: list[dict[str, str]] | None = None
    multimodal_prompt: Any = None
    embedding: bool = False


@pytest.fixture(scope="module")
def engine(model: Any, tokenizer: Any) -> helm.Engine:
    return helm.Engine(model, tokenizer)


def alone(plain: Any, tokenizer: Any, prompt: str, seed: int = 0, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """What transformers writes after one prompt, and how likely each token was by the model's own logits."""
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    torch.manual_seed(seed)
    made = plain.generate(**inputs, **options, return_dict_in_generate=True, output_logits=True, pad_token_id=1)
    scores = plain.compute_transition_scores(made.sequences, made.logits, normalize_logits=True)
    return made.sequences[:, inputs["input_ids"].shape[1] :], scores


# ---------------------------------------------------------------------------------------------------- log-probabilities
@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False, "max_new_tokens": 7},
        {"do_sample": True, "temperature": 0.4, "top_k": 5, "max_new_tokens": 4},
        {"do_sample": True, "num_return_sequences": 3, "repetition_penalty": 1.4, "max_new_tokens": 5},
        {"do_sample": False, "max_new_tokens": 1},
    ],
    ids=str,
)
def test_log_probabilities_are_those_of_the_models_logits(
    model: Any, plain: Any, tokenizer: Any, options: dict[str, Any]
) -> None:
    texts = sentences(8)
    asked = [
        TextRequest(tokenizer(text)["input_ids"], {**options, "pad_token_id": 1}, 50 + number, number, log_probs=True)
        for number, text in enumerate(texts)
    ]
    for written in model.generate_each(asked):
        sequences, scores = alone(plain, tokenizer, texts[written.request.key], 50 + written.request.key, **options)
        assert torch.equal(written.output[:, len(written.request.ids) :], sequences)
        torch.testing.assert_close(written.log_probs, scores.float(), rtol=1e-4, atol=1e-4)


def test_log_probabilities_are_left_out_unless_asked_for(model: Any) -> None:
    (written,) = model.generate_each([TextRequest([5, 6, 7], {"max_new_tokens": 2})])
    assert written.log_probs is None


def test_beams_have_no_log_probabilities(model: Any) -> None:
    (written,) = model.generate_each([TextRequest([5, 6], {"max_new_tokens": 2, "num_beams": 2}, log_probs=True)])
    assert isinstance(written.error, UnsupportedModelError)
    assert "num_beams" in str(written.error)


# -------------------------------------------------------------------------------------------------------- what is asked
def test_temperature_nothing_is_greedy_and_several_texts_are_copies(tokenizer: Any) -> None:
    asked = read(Request("the people", temperature=0, num_completions=3, max_tokens=5), tokenizer)
    assert asked.options["do_sample"] is False
    assert (asked.rows, asked.copies, asked.options["max_new_tokens"]) == (1, 3, 5)
    assert list(asked.ids) == tokenizer("the people")["input_ids"]


def test_a_temperature_samples_from_the_whole_distribution(tokenizer: Any) -> None:
    options = read(Request("the", temperature=0.7, top_p=0.9, num_completions=2, top_k_per_token=1), tokenizer).options
    assert {name: options[name] for name in ("do_sample", "temperature", "top_p", "top_k", "num_return_sequences")} == {
        "do_sample": True,
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 0,
        "num_return_sequences": 2,
    }


def test_what_is_drawn_follows_from_the_request(tokenizer: Any) -> None:
    request = Request("the people")
    same = read(dataclasses.replace(request), tokenizer).seed
    assert read(request, tokenizer).seed == same
    others = [dataclasses.replace(request, random="1"), dataclasses.replace(request, max_tokens=3)]
    assert len({same, read(request, tokenizer, seed=1).seed, *(read(other, tokenizer).seed for other in others)}) == 4


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"presence_penalty": 0.5}, "presence_penalty=0.5"),
        ({"frequency_penalty": 1}, "frequency_penalty=1"),
        ({"embedding": True}, "embedding=True"),
        ({"multimodal_prompt": "a picture"}, "multimodal_prompt"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"num_completions": 0}, "num_completions=0"),
        ({"messages": [{"role": "user", "content": "hello"}]}, "messages"),
        ({"prompt": "", "messages": [{"role": "user", "content": "hello"}]}, "chat template"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(tokenizer: Any, fields: dict[str, Any], word: str) -> None:
    with pytest.raises(PolicyError, match=word):
        read(dataclasses.replace(Request("the people"), **fields), tokenizer)


def test_chat_goes_through_the_template(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}")
    expected = tokenizer("user: peace", add_special_tokens=False)["input_ids"]
    messages = [{"role": "user", "content": "peace"}]
    assert list(read(Request("peace"), tokenizer, chat=True).ids) == expected
    assert list(read(Request(messages=messages), tokenizer).ids) == expected


def test_a_stop_string_is_looked_for_behind_the_prompt_only(tokenizer: Any) -> None:
    ids = tokenizer("the people of the States of peace with nations", add_special_tokens=False)["input_ids"]
    text = tokenizer.decode(ids)
    stop = StopAtText(tokenizer, 0, [text[14:20]])
    behind = StopAtText(tokenizer, len(ids), [text[14:20]])
    until = stop.tokens_until(ids)
    assert until is not None
    assert text[14:20] in tokenizer.decode(ids[:until])
    assert text[14:20] not in tokenizer.decode(ids[: until - 1])
    assert [bool(stop(torch.tensor([ids[:count]]), None)) for count in (until - 1, until)] == [False, True]
    assert not bool(behind(torch.tensor([ids]), None))


# ----------------------------------------------------------------------------------------------------- what is answered
def test_requests_of_all_kinds_are_answered_together(engine: helm.Engine, plain: Any, tokenizer: Any) -> None:
    texts = sentences(9)
    requests = [
        Request(
            text,
            temperature=(0, 0.8)[number % 2],
            max_tokens=2 + number,
            num_completions=1 + number % 3,
            top_p=0.9 if number % 2 else 1,
        )
        for number, text in enumerate(texts)
    ]
    counted: list[int] = []
    for request, answer in zip(requests, engine.answer(requests, counted.append), strict=True):
        asked = read(request, tokenizer)
        options = {name: value for name, value in asked.options.items() if name != "pad_token_id"}
        sequences, scores = alone(plain, tokenizer, request.prompt, asked.seed, **options)
        assert answer.error is None
        assert len(answer.written) == request.num_completions
        for copy, written in enumerate(answer.written):
            row = 0 if request.temperature == 0 else copy
            count = len(written.tokens)
            assert written.text == tokenizer.decode(sequences[row][:count])
            assert written.tokens == tuple(tokenizer.decode([token]) for token in sequences[row][:count].tolist())
            assert written.log_probs == pytest.approx(scores[row][:count].tolist(), abs=1e-4)
            assert written.finish_reason == ("length" if count == request.max_tokens else "endoftext")
    assert sum(counted) == len(requests)


def test_a_text_ends_with_a_stop_string(engine: helm.Engine, plain: Any, tokenizer: Any) -> None:
    prompt = "the people of these United States"
    whole, _ = alone(plain, tokenizer, prompt, do_sample=False, max_new_tokens=12)
    text = tokenizer.decode(whole[0])
    stop = text[len(text) // 2 : len(text) // 2 + 3]
    (answer,) = engine.answer([Request(prompt, temperature=0, max_tokens=12, stop_sequences=[stop, "zzz"])])
    (written,) = answer.written
    assert stop in written.text
    assert text.startswith(written.text)
    assert text.index(stop) == written.text.index(stop)
    assert stop not in "".join(written.tokens[:-1])
    assert written.finish_reason == "stop"


def test_rows_that_end_before_others_have_no_padding(engine: helm.Engine) -> None:
    request = Request("the people", temperature=1.5, num_completions=4, max_tokens=12, stop_sequences=["a", "e"])
    (answer,) = engine.answer([request])
    lengths = {len(written.tokens) for written in answer.written}
    assert len(lengths) > 1
    for written in answer.written:
        assert written.finish_reason == "stop" or len(written.tokens) == 12
        assert not any(letter in "".join(written.tokens[:-1]) for letter in "ae")


def test_the_prompt_is_echoed_with_how_likely_it_is(engine: helm.Engine, plain: Any, tokenizer: Any) -> None:
    requests = [Request(text, temperature=0, max_tokens=0, echo_prompt=True) for text in (*sentences(5), "the")]
    requests.append(dataclasses.replace(requests[0], max_tokens=3))
    for request, answer in zip(requests, engine.answer(requests), strict=True):
        ids = tokenizer(request.prompt, return_tensors="pt")["input_ids"]
        logits = plain(ids).logits[0].log_softmax(-1)
        expected = [0.0, *logits[:-1].gather(1, ids[0, 1:, None])[:, 0].tolist()]
        assert answer.prompt is not None
        assert answer.prompt.log_probs == pytest.approx(expected, abs=1e-4)
        assert answer.prompt.tokens == tuple(tokenizer.decode([token]) for token in ids[0].tolist())
        assert len(answer.written) == 1
        assert len(answer.written[0].tokens) == request.max_tokens
    assert len(tokenizer("the")["input_ids"]) == 1


def test_the_same_request_is_computed_once(engine: helm.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    generate_each = engine.model.generate_each

    def recorded(requests: Any, **options: Any) -> Any:
        seen.extend(requests)
        return generate_each(requests, **options)

    monkeypatch.setattr(engine.model, "generate_each", recorded)
    request = Request("the people", max_tokens=3)
    answers = engine.answer([request, dataclasses.replace(request, random="1"), dataclasses.replace(request)])
    assert len(seen) == 2
    assert answers[0] == answers[2]
    assert digest_of(request) != digest_of(dataclasses.replace(request, random="1"))


def test_what_is_wrong_with_one_request_is_its_own_error(engine: helm.Engine) -> None:
    good = Request("the people", temperature=0, max_tokens=2)
    answers = engine.answer(
        [good, dataclasses.replace(good, presence_penalty=1), dataclasses.replace(good, max_tokens=9**9)]
    )
    assert answers[0].error is None
    assert isinstance(answers[1].error, PolicyError)
    assert "context" in str(answers[2].error)


# ---------------------------------------------------------------------------------------------------------- a job of it
def test_without_helm_it_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("helm", "helm.benchmark", "helm.benchmark.runner"):
        monkeypatch.setitem(sys.modules, name, None)
    arguments = ["helm", "--description", "mmlu:subject=anatomy", "--model", str(TINY_OPT), "-o", str(tmp_path)]
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, StoreError)
    assert "pip install 'flexgen_hf[helm]'" in str(result.exception)
    assert "torchvision" in str(result.exception)


def test_the_command_in_the_originals_spelling(monkeypatch: pytest.MonkeyPatch) -> None:
    jobs: list[helm.HelmJob] = []

    def record(job: helm.HelmJob, **_: Any) -> helm.HelmReport:
        jobs.append(job)
        return helm.HelmReport((helm.HelmRun("a run", Path("here"), 2.0, 3, ("exact_match", 0.5)),))

    monkeypatch.setattr(helm, "run", record)
    line = (
        "helm --description mmlu:model=text,subject=abstract_algebra,data_augmentation=canonical --pad-to-seq-len 512 "
        f"--model {TINY_OPT} "
        "--percent 20 80 0 100 0 100 --gpu-batch-size 48 --num-gpu-batches 3 --max-eval-instance 100"
    )
    result = CliRunner().invoke(app, line.split(), catch_exceptions=False)
    (job,) = jobs
    assert job.descriptions == ("mmlu:model=text,subject=abstract_algebra,data_augmentation=canonical",)
    assert (job.max_eval_instances, job.helm_name) == (100, "local/tiny-opt")
    policy = Policy.from_dict(job.options["policy"])
    assert policy == Policy.parse((20, 80, 0, 100, 0, 100), batch_size=48, num_batches=3)
    assert "workload" not in job.options
    assert json.loads(json.dumps(job.options)) == job.options
    assert result.stdout == "a run: 3 requests in 2.0 s, exact_match 0.5; here\n"
    automatic = line[: line.index("--percent")] + "--policy auto"
    CliRunner().invoke(app, automatic.split(), catch_exceptions=False)
    assert jobs[1].options["workload"] == {"prompt_len": 512}


def test_a_loaded_engine_is_that_of_the_options(monkeypatch: pytest.MonkeyPatch) -> None:
    from flexgen_hf import FlexGenForCausalLM

    happened: list[Any] = []

    class Model:
        def __init__(self, _: str, **options: Any) -> None:
            happened.append(options)

        def close(self) -> None:
            happened.append("closed")

    monkeypatch.setattr(FlexGenForCausalLM, "from_pretrained", Model)
    options = {"max_memory": {"0": "1GiB", "cpu": "2GiB"}, "chat": True, "dtype": "float32"}
    first = executing.engine_of(str(TINY_OPT), **options)
    assert executing.engine_of(str(TINY_OPT), **options) is first
    executing.engine_of(str(TINY_OPT), dtype="float32")
    executing.release()
    loaded = {"dtype": "float32", "max_memory": {0: "1GiB", "cpu": "2GiB"}}
    assert happened == [loaded, "closed", {"dtype": "float32"}, "closed"]


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"descriptions": ()}, "no description"),
        ({"name": "opt"}, "CREATOR/NAME"),
        ({"max_eval_instances": 0}, "max_eval_instances=0"),
    ],
)
def test_a_job_that_cannot_be_meant(fields: dict[str, Any], word: str) -> None:
    with pytest.raises(PolicyError, match=word):
        helm.HelmJob(**{"descriptions": ("mmlu",), "model": "opt", **fields})


@pytest.mark.parametrize(("model", "name"), [("a/b", "a/b"), ("gpt", "local/gpt"), ("/models/x", "local/x")])
def test_models_are_named_as_helm_names_them(model: str, name: str) -> None:
    assert helm.HelmJob(("mmlu",), model).helm_name == name


# ------------------------------------------------------------------------------------------------------------ with HELM
# what HELM's own client says otherwise: it takes the logarithms behind the temperature, which is 1e-7 for 0, so all of
# them are 0; it does not say why a text ended; and it takes its own time
OTHERWISE = ("logprob", "perplexity", "bits_per_byte", "finish_reason", "runtime", "batch_size")


def stats_of(folder: Path) -> dict[str, Any]:
    found = {}
    for stat in json.loads((folder / "stats.json").read_text()):
        name = stat.pop("name")
        if not any(word in name["name"] for word in OTHERWISE):
            found[json.dumps(name, sort_keys=True)] = stat
    return found


DEPLOYMENT = """
model_deployments:
  - name: huggingface/SUITE
    model_name: huggingface/tiny-opt
    tokenizer_name: huggingface/tiny-opt
    max_sequence_length: 511
    client_spec:
      class_name: CLASS
      args: ARGUMENTS
"""
TOKENIZER = f"""
tokenizer_configs:
  - name: huggingface/tiny-opt
    tokenizer_spec:
      class_name: helm.tokenizers.huggingface_tokenizer.HuggingFaceTokenizer
      args: {{pretrained_model_name_or_path: {TINY_OPT}}}
    end_of_text_token: "</s>"
    prefix_token: "</s>"
"""


def helm_run(suite: str, output: Path, description: str, client: str, arguments: dict[str, Any], *options: str) -> Path:
    """A run by HELM's own command with the client that is named in its file of deployments."""
    from helm.benchmark import run

    env = output / suite
    env.mkdir()
    deployment = DEPLOYMENT.replace("SUITE", suite).replace("CLASS", client)
    (env / "model_deployments.yaml").write_text(deployment.replace("ARGUMENTS", json.dumps(arguments)))
    (env / "tokenizer_configs.yaml").write_text(TOKENIZER)
    line = f"--run-entries {description} --models-to-run huggingface/tiny-opt -m 3 --suite {suite} -n 2 --exit-on-error"
    where = ["-o", str(output), "--local-path", str(env), "--disable-cache"]
    run.helm_run(run.build_parser().parse_args([*line.split(), *where, *options]))
    (folder,) = (output / "runs" / suite).glob(description.partition(":")[0] + "*")
    return folder


@needs_helm
@pytest.mark.parametrize("description", ["synthetic_reasoning:mode=pattern_match,model=text"])
def test_the_files_and_metrics_of_helms_own_client(tmp_path: Path, description: str) -> None:
    job = helm.HelmJob(
        (description,),
        str(TINY_OPT),
        {"policy": Policy(batch_size=2, num_batches=2).to_dict(), "dtype": "float32"},
        max_eval_instances=3,
        suite="ours",
        max_sequence_length=511,
        output_path=tmp_path,
        local_path=tmp_path / "env",
    )
    (run,) = helm.run(job).runs
    assert run.requests == 3
    files = {"run_spec.json", "scenario.json", "scenario_state.json", "stats.json", "per_instance_stats.json"}
    assert {file.name for file in run.path.iterdir()} >= files
    client = "helm.clients.huggingface_client.HuggingFaceClient"
    arguments = {"pretrained_model_name_or_path": str(TINY_OPT), "apply_chat_template": False}
    other = helm_run("theirs", tmp_path, description, client, {**arguments, "torch_dtype": "torch.float32"})
    assert stats_of(run.path) == stats_of(other)
    runner = ["--runner-class-name", "flexgen_hf.apps.helm.batch_runner"]
    again = helm_run("plugged", tmp_path, description, executing.CLIENT, {"model": str(TINY_OPT)}, *runner)
    executing.release()
    assert stats_of(again) == stats_of(run.path)
    ours, plain, plugged = (json.loads((path / "scenario_state.json").read_text()) for path in (run.path, other, again))
    assert {state["result"]["batch_size"] for state in plugged["request_states"]} == {3}
    for one, same in zip(ours["request_states"], plain["request_states"], strict=True):
        assert one["request"]["prompt"] == same["request"]["prompt"]
        (mine,), (his,) = one["result"]["completions"], same["result"]["completions"]
        assert mine["text"] == his["text"]
        assert [token["text"] for token in mine["tokens"]] == [token["text"] for token in his["tokens"]]


@needs_helm
def test_a_client_answers_like_helms_own(tmp_path: Path) -> None:
    from helm.benchmark.tokenizer_config_registry import TokenizerConfig, TokenizerSpec, register_tokenizer_config
    from helm.clients.huggingface_client import HuggingFaceClient
    from helm.common.cache import BlackHoleCacheConfig
    from helm.common.request import Request as HelmRequest
    from helm.tokenizers.huggingface_tokenizer import HuggingFaceTokenizer

    name = "huggingface/tiny-opt"
    tokens = HuggingFaceTokenizer(BlackHoleCacheConfig(), name, str(TINY_OPT))
    spec = TokenizerSpec("helm.tokenizers.huggingface_tokenizer.HuggingFaceTokenizer", {})
    register_tokenizer_config(TokenizerConfig(name, spec, "</s>", "</s>"))
    his = HuggingFaceClient(BlackHoleCacheConfig(), tokens, str(TINY_OPT), "</s>", apply_chat_template=False)
    mine = executing.FlexGenClient(name, str(TINY_OPT), offload_folder=str(tmp_path))
    try:
        asked: list[dict[str, Any]] = [
            {"max_tokens": 0, "echo_prompt": True}, {"max_tokens": 6, "stop_sequences": [" people"]},
        ]  # fmt: skip
        for fields in asked:
            request = HelmRequest(model=name, prompt="the people of these States", temperature=0, **fields)
            (ours,), (theirs,) = (client.make_request(request).completions for client in (mine, his))
            assert ours.text == theirs.text
            assert [token.text for token in ours.tokens] == [token.text for token in theirs.tokens]
            if request.echo_prompt:
                assert [t.logprob for t in ours.tokens] == pytest.approx([t.logprob for t in theirs.tokens], abs=1e-4)
        refused = mine.make_request(dataclasses.replace(request, presence_penalty=1))
        assert not refused.success
        assert not refused.error_flags.is_retriable
    finally:
        executing.release()


@needs_helm
@pytest.mark.parametrize(
    ("description", "word"),
    [
        ("no_such_scenario:model=text", "no_such_scenario"),
        ("synthetic_reasoning:mode=pattern_match,model=openai/gpt2", "another model"),
    ],
)
def test_a_description_that_helm_does_not_know(tmp_path: Path, description: str, word: str) -> None:
    job = helm.HelmJob((description,), str(TINY_OPT), output_path=tmp_path, local_path=tmp_path / "env")
    with pytest.raises(PolicyError, match=word):
        helm.run(job)


@needs_helm
def test_a_run_that_fails_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: Any, requests: Any, on_answer: Any) -> Any:
        return [helm.Answer(error=PolicyError("no room")) for _ in requests]

    monkeypatch.setattr(helm.Engine, "answer", fails)
    description = "synthetic_reasoning:mode=pattern_match,model=text"
    job = helm.HelmJob((description,), str(TINY_OPT), max_eval_instances=2, output_path=tmp_path, local_path=tmp_path)
    with pytest.raises(FlexGenError, match=r"1 of 1 runs failed.*synthetic.*2 of 2 requests.*no room"):
        helm.run(job)
