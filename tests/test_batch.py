"""Batch jobs: a file in, a file out; killed at any moment and started again, as if nothing had happened."""

from __future__ import annotations

import csv
import errno
import itertools
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from flexgen_hf import CapacityError, FlexGenError, PolicyError, StoreError
from flexgen_hf.apps import batch
from flexgen_hf.apps.batch import inputs, openai
from flexgen_hf.apps.batch.journal import Journal
from flexgen_hf.apps.batch.requests import seed_of
from flexgen_hf.cli import app
from flexgen_hf.text import load_tokenizer

from .trained import TINY_OPT, sentences

ROOT = Path(__file__).parent.parent
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 6}


def write_lines(path: Path, records: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def alone(plain: Any, tokenizer: Any, prompt: str, seed: int | None = None, **options: Any) -> str:
    """What transformers writes after one prompt."""
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    if seed is not None:
        torch.manual_seed(seed)
    options = {"pad_token_id": tokenizer.pad_token_id, **options}
    made = plain.generate(ids, attention_mask=torch.ones_like(ids), **options)
    text: str = tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
    return text


# ----------------------------------------------------------------------------------------------------------- the texts
def test_a_file_of_prompts_becomes_a_file_of_texts(tmp_path: Path, model: Any, tokenizer: Any, plain: Any) -> None:
    asked = sentences(14)
    source = write_lines(
        tmp_path / "in.jsonl", [{"prompt": prompt, "id": f"row-{n}"} for n, prompt in enumerate(asked)]
    )
    report = batch.run(source, tmp_path / "out.jsonl", model, tokenizer, options=GREEDY)
    lines = read_lines(tmp_path / "out.jsonl")
    assert [line["text"] for line in lines] == [alone(plain, tokenizer, prompt, **GREEDY) for prompt in asked]
    assert [(line["index"], line["id"]) for line in lines] == [(n, f"row-{n}") for n in range(14)]
    assert [line["prompt_tokens"] for line in lines] == [len(tokenizer(p)["input_ids"]) for p in asked]
    assert all(line["completion_tokens"] == 6 and line["finish_reason"] == "length" for line in lines)
    assert (report.rows, report.computed, report.errors, report.tokens) == (14, 14, 0, 84)


def test_a_row_draws_the_same_in_any_block(tmp_path: Path, model: Any, tokenizer: Any, plain: Any) -> None:
    asked = sentences(9)
    options: dict[str, Any] = {"do_sample": True, "temperature": 1.4, "max_new_tokens": 8}
    prompting = batch.Prompting(seed=11)
    texts = {}
    for window in (2, 100):
        results = batch.texts(asked, model, tokenizer, options=options, prompting=prompting, window=window)
        texts[window] = {result.index: result.texts[0].text for result in results}
    want = {n: alone(plain, tokenizer, p, seed_of(11, n), **options) for n, p in enumerate(asked)}
    assert texts[2] == texts[100] == want
    assert len(set(want.values())) > 5


def test_options_of_rows(model: Any, tokenizer: Any, plain: Any) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": "the people", "options": {"max_new_tokens": 3}},
        {"prompt": "the people", "options": {"do_sample": True, "seed": 5}},
        {"prompt": "the people", "options": {"num_beams": 2, "num_return_sequences": 2}},
        {"prompt": tokenizer("the people")["input_ids"]},
    ]
    got = {result.index: result for result in batch.texts(rows, model, tokenizer, options=GREEDY)}
    greedy = alone(plain, tokenizer, "the people", **GREEDY)
    assert got[0].texts[0].text == alone(plain, tokenizer, "the people", max_new_tokens=3, do_sample=False)
    assert got[1].texts[0].text == alone(plain, tokenizer, "the people", 5, max_new_tokens=6, do_sample=True)
    assert len(got[2].texts) == 2
    assert got[3].texts[0].text == greedy


def test_a_stop_string_ends_a_text(model: Any, tokenizer: Any, plain: Any) -> None:
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 30}
    whole = alone(plain, tokenizer, "the people of", **options)
    stop = whole[len(whole) // 2 :][:3]
    (result,) = batch.texts(["the people of"], model, tokenizer, options={**options, "stop": stop})
    (text,) = result.texts
    assert text.text == whole[: whole.index(stop)]
    assert text.finish_reason == "stop"
    assert text.tokens < 30


def test_messages_go_through_the_chat_template(model: Any, tokenizer: Any, plain: Any, tmp_path: Path) -> None:
    conversation = [{"role": "user", "content": "the people"}]
    (refused,) = batch.texts([{"messages": conversation}], model, tokenizer, options=GREEDY)
    assert "no chat template" in str(refused.error)
    chatty = load_tokenizer(str(TINY_OPT))
    chatty.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }} of {% endfor %}"
    rows: list[Any] = [{"messages": conversation}, {"prompt": "the people"}, {"messages": "the people"}]
    results = batch.texts(rows, model, chatty, options=GREEDY, prompting=batch.Prompting(chat=True))
    got = {result.index: result for result in results}
    ids = chatty("user: the people of ", add_special_tokens=False)["input_ids"]
    want = tokenizer.decode(plain.generate(torch.tensor([ids]), **GREEDY)[0, len(ids) :], skip_special_tokens=True)
    assert got[0].texts[0].text == got[1].texts[0].text == want
    assert "not a list" in str(got[2].error)


def test_openai_lines_are_answered_by_openai_lines(tmp_path: Path, model: Any, tokenizer: Any, plain: Any) -> None:
    body = {"model": "m", "prompt": "the people", "max_tokens": 5, "temperature": 0}
    bodies = [body, {**body, "n": 2, "temperature": 1.0, "seed": 3}, {**body, "logprobs": 1}, {**body, "echo": True}]
    lines = [
        {"custom_id": f"c{n}", "method": "POST", "url": "/v1/completions", "body": made}
        for n, made in enumerate(bodies)
    ]
    batch.run(write_lines(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl", model, tokenizer)
    first, several, *refused = read_lines(tmp_path / "out.jsonl")
    choice = {"index": 0, "text": alone(plain, tokenizer, "the people", do_sample=False, max_new_tokens=5)}
    answer = first["response"]["body"]
    assert answer["choices"] == [{**choice, "logprobs": None, "finish_reason": "length"}]
    prompt = len(tokenizer("the people")["input_ids"])
    assert answer["usage"] == {"prompt_tokens": prompt, "completion_tokens": 5, "total_tokens": prompt + 5}
    assert (first["custom_id"], first["error"], first["response"]["status_code"]) == ("c0", None, 200)
    assert answer["object"] == "text_completion"
    assert len(several["response"]["body"]["choices"]) == 2
    for line, name in zip(refused, ("logprobs", "echo"), strict=True):
        assert line["response"] is None
        assert name in line["error"]["message"]


def test_what_an_openai_body_asks_for() -> None:
    def options(**body: Any) -> dict[str, Any]:
        return openai.request_of({"custom_id": "c", "body": {"prompt": "p", **body}})[1]

    assert options(max_completion_tokens=7, stop="x") == {"max_new_tokens": 7, "stop": "x"}
    assert options(temperature=0.5, top_p=0.9) == {"temperature": 0.5, "top_p": 0.9, "do_sample": True}
    assert options(temperature=0, top_p=0.9) == {"do_sample": False}
    assert options(frequency_penalty=0, stream=False, best_of=1, tools=[]) == {}
    assert options(logit_bias={"5": -100}) == {"sequence_bias": [[[5], -100.0]]}
    refused: list[dict[str, Any]] = [{"presence_penalty": 1}, {"stream": True}, {"temperature": -1}, {"logprobs": 0}]
    for wrong in [*refused, {"tools": [{}]}]:
        with pytest.raises(PolicyError):
            options(**wrong)


# ---------------------------------------------------------------------------------------------------------- the inputs
def test_inputs_of_every_format(tmp_path: Path) -> None:
    texts = ["one", 'two, with "quotes"\nand a line', "drei äöü"]
    with (tmp_path / "t.csv").open("w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file).writerows([["id", "question"], *([n, text] for n, text in enumerate(texts))])
    (tmp_path / "t.tsv").write_text("prompt\none\ntwo\n")
    (tmp_path / "t.txt").write_text("one\n\n  two \n")
    (tmp_path / "t.jsonl").write_text('"one"\n\n{"prompt": "two"}')
    rows = list(inputs.read_rows(tmp_path / "t.csv", column="question"))
    assert [row.record for row in rows] == [{"prompt": text, "id": str(n)} for n, text in enumerate(texts)]
    assert [row.record["prompt"] for row in inputs.read_rows(tmp_path / "t.tsv")] == ["one", "two"]
    assert [row.record["prompt"] for row in inputs.read_rows(tmp_path / "t.txt")] == ["one", "  two "]
    assert [row.record["prompt"] for row in inputs.read_rows(tmp_path / "t.jsonl")] == ["one", "two"]
    assert [inputs.count_rows(tmp_path / f"t.{kind}") for kind in ("tsv", "txt", "jsonl")] == [2, 2, 2]
    with pytest.raises(PolicyError, match="no column 'prompt'; the table has 'id', 'question'"):
        list(inputs.read_rows(tmp_path / "t.csv"))
    with pytest.raises(StoreError, match="cannot read the input"):
        list(inputs.read_rows(tmp_path / "missing.jsonl"))


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = pyarrow.table({"id": [4, 5], "question": ["one", "two"], "other": [1.0, 2.0]})
    parquet.write_table(table, tmp_path / "t.parquet")
    rows = list(inputs.read_rows(tmp_path / "t.parquet", column="question"))
    assert [row.record for row in rows] == [{"prompt": "one", "id": 4}, {"prompt": "two", "id": 5}]
    assert inputs.count_rows(tmp_path / "t.parquet") == 2
    chats = pyarrow.table({"messages": [[{"role": "user", "content": "one"}]]})
    parquet.write_table(chats, tmp_path / "c.parquet")
    (row,) = inputs.read_rows(tmp_path / "c.parquet")
    assert row.record == {"messages": [{"role": "user", "content": "one"}]}


def test_parquet_without_pyarrow_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(FlexGenError, match=r"pip install 'flexgen_hf\[parquet\]'"):
        list(inputs.read_rows(tmp_path / "t.parquet"))


def test_wrong_rows_are_error_rows(tmp_path: Path, model: Any, tokenizer: Any) -> None:
    lines = [
        b'{"prompt": "the people"}',
        b'{"prompt": "the peo',
        b'{"prompt": "\xff"}',
        b"[1, 2]",
        b"{}",
        b'{"prompt": ""}',
        b'{"prompt": 7}',
        b'{"prompt": "a", "messages": []}',
        b'{"prompt": "a", "options": {"max_new_token": 3}}',
        b'{"prompt": [1, 99999999]}',
        json.dumps({"prompt": "people " * 600}).encode(),
        b'{"prompt": "of these"}',
    ]
    (tmp_path / "in.jsonl").write_bytes(b"\n".join(lines))
    report = batch.run(tmp_path / "in.jsonl", tmp_path / "out.jsonl", model, tokenizer, options=GREEDY)
    got = read_lines(tmp_path / "out.jsonl")
    messages = [line.get("error", {}).get("message", "") for line in got]
    wanted = [
        "", "line 2 is not JSON", "line 3 is not UTF-8", "line 4 is list", "no prompt and no messages", "no tokens",
        "give a text", "give one of them", "did you mean 'max_new_tokens'?", "99999999", "context", "",
    ]  # fmt: skip
    for message, part in zip(messages, wanted, strict=True):
        assert bool(message) == bool(part), (message, part)
        assert part in message
    assert report.errors == 10
    (result,) = batch.texts(
        [{"prompt": "people " * 600}], model, tokenizer, options=GREEDY, prompting=batch.Prompting(truncate=True)
    )
    assert result.prompt_tokens + 6 == model.config.max_position_embeddings
    assert result.texts[0].tokens == 6


def test_an_empty_file_has_an_empty_output_and_needs_no_model(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text("\n")

    def load() -> Any:
        raise AssertionError("the model was loaded")

    report = batch.run(tmp_path / "in.jsonl", tmp_path / "out.jsonl", load)
    assert (report.rows, (tmp_path / "out.jsonl").read_text()) == (0, "")


def test_a_long_input_is_read_as_it_is_needed(model: Any, tokenizer: Any) -> None:
    read = 0

    def endless() -> Iterator[str]:
        nonlocal read
        while True:
            read += 1
            yield f"the people of {read}"

    results = batch.texts(endless(), model, tokenizer, options={"max_new_tokens": 1}, window=8)
    assert [result.error for result in itertools.islice(results, 30)] == [None] * 30
    assert read < 60


# --------------------------------------------------------------------------------------------------------- the journal
def job_of(**fields: Any) -> dict[str, Any]:
    return {"model": "m", "options": {}, **fields}


def row(index: int, **fields: Any) -> tuple[int, str, dict[str, Any]]:
    digest = inputs.digest_of(str(index).encode())
    return index, digest, {"index": index, "text": f"text {index}", "digest": digest, **fields}


@pytest.mark.parametrize("torn", [b"", b"{", b'{"index": 9, "text": "te', b'{"index": 2, "digest": "12"}', b"\0\0\n"])
def test_a_torn_line_is_cut_off(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "out.jsonl"
    with Journal(path, job_of()) as journal:
        journal.append([row(3), row(0)])
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    with Journal(path, job_of()) as journal:
        assert journal.count == 2
        assert [journal.has(i, row(i)[1]) for i in range(5)] == [True, False, False, True, False]
        assert path.read_bytes() == whole
        journal.append([row(1)])
        journal.in_input_order()
    assert [line["index"] for line in read_lines(path)] == [0, 1, 3]


def test_a_job_is_not_continued_as_another(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with Journal(path, job_of(options={"eos_token_id": (1, 2)})) as journal:
        journal.append([row(0)])
        with pytest.raises(StoreError, match="another process writes"):
            Journal(path, job_of())
    with pytest.raises(PolicyError, match="begun with model='m', not 'n'"):
        Journal(path, job_of(model="n", options={"eos_token_id": (1, 2)}))
    same = Journal(path, job_of(options={"eos_token_id": (1, 2)}))
    with same, pytest.raises(StoreError, match="row 0 of the input is not the one"):
        same.has(0, "ab" * 8)
    path.write_text(path.read_text() + "hello\n" + json.dumps(row(2)[2]) + "\n")
    with pytest.raises(StoreError, match="line 2 of"):
        Journal(path, job_of(options={"eos_token_id": [1, 2]}))
    with Journal(path, job_of(model="n"), overwrite=True) as journal:
        assert journal.count == 0
    (tmp_path / "other").write_text("mine\n")
    with pytest.raises(StoreError, match="not of a batch job"):
        Journal(tmp_path / "other", job_of())
    assert (tmp_path / "other").read_text() == "mine\n"
    with pytest.raises(StoreError, match="cannot write the output"):
        Journal(tmp_path / "no" / "such" / "folder", job_of())


def test_errors_are_computed_again_if_that_is_wanted(tmp_path: Path, model: Any, tokenizer: Any) -> None:
    source = write_lines(tmp_path / "in.jsonl", ["the people", {"messages": [{"role": "user", "content": "a"}]}, "of"])
    output = tmp_path / "out.jsonl"
    assert batch.run(source, output, model, tokenizer, options=GREEDY).errors == 1
    assert batch.run(source, output, model, tokenizer, options=GREEDY).computed == 0
    chatty = load_tokenizer(str(TINY_OPT))
    chatty.chat_template = "{{ messages[0].content }}"
    report = batch.run(source, output, model, chatty, options=GREEDY, retry_errors=True)
    assert (report.rows, report.computed, report.errors) == (3, 1, 0)
    assert ["text" in line for line in read_lines(output)] == [True] * 3


@pytest.mark.parametrize("written", [0, 7])
def test_a_full_disk_loses_nothing(tmp_path: Path, written: int) -> None:
    path = tmp_path / "out.jsonl"
    with Journal(path, job_of()) as journal:
        journal.append([row(0)])
        file = journal._file

        class Full:
            fileno, close = file.fileno, file.close

            @property
            def closed(self) -> bool:
                return file.closed

            def write(self, data: bytes) -> int:
                if len(data) > 7 and written:
                    return file.write(data[:written])
                raise OSError(errno.ENOSPC, "No space left on device")

        journal._file = Full()  # type: ignore[assignment]
        with pytest.raises(CapacityError, match=r"the disk is full .* 1 rows are safe"):
            journal.append([row(1)])
    assert [line["index"] for line in read_lines(path)] == [0]
    with Journal(path, job_of()) as journal:
        journal.append([row(1)])
    assert [line["index"] for line in read_lines(path)] == [0, 1]


SCRIPT = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from flexgen_hf import FlexGenForCausalLM, Policy
from flexgen_hf.apps import batch
from flexgen_hf.text import load_tokenizer
folder, source, output, offload, kills = sys.argv[1:]
options = {"do_sample": True, "max_new_tokens": 8}
policy = Policy(batch_size=3, num_batches=2)
loaded = FlexGenForCausalLM.from_pretrained(folder, policy=policy, dtype="float32", offload_folder=offload)
tokenizer = load_tokenizer(folder)
import os, random, signal, time
draw = random.Random(5)
for _ in range(int(kills)):
    child = os.fork()
    if not child:
        batch.run(source, output, loaded, tokenizer, options=options, job=batch.Job(window=16))
        os._exit(0)
    time.sleep(draw.uniform(0, 0.25))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
report = batch.run(source, output, loaded, tokenizer, options=options, job=batch.Job(window=16))
print(report.computed)
"""


def test_killed_at_random_moments_and_started_again(tmp_path: Path) -> None:
    """The children are forked from a process that has the model, so that they are killed at work, not in imports."""
    source = write_lines(tmp_path / "in.jsonl", [*sentences(120), {"nothing": 1}, *sentences(20, seed=1)])
    computed = []
    for name, kills in (("undisturbed", 0), ("killed", 20)):
        arguments = [TINY_OPT, source, tmp_path / f"{name}.jsonl", tmp_path, kills]
        command = [sys.executable, "-c", SCRIPT, *map(str, arguments)]
        made = subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT)
        assert made.returncode == 0, made.stderr
        computed.append(int(made.stdout.split()[-1]))
    assert (tmp_path / "killed.jsonl").read_bytes() == (tmp_path / "undisturbed.jsonl").read_bytes()
    assert len(read_lines(tmp_path / "killed.jsonl")) == 141
    assert computed[0] == 141


# ------------------------------------------------------------------------------------------------ a folder, the command
def test_a_folder_is_a_queue(tmp_path: Path, model: Any, tokenizer: Any) -> None:
    queue, out = tmp_path / "queue", tmp_path / "out"
    queue.mkdir()
    write_lines(queue / "a.jsonl", ["the people"])
    (queue / "b.csv").write_text("x,y\n1,2\n")
    (queue / ".c.jsonl").write_text('"hidden"\n')
    (queue / "readme.md").write_text("not an input\n")
    job = batch.Job(options=GREEDY)
    came: list[tuple[str, Any]] = []
    looks = iter(range(3))

    def late() -> bool:
        if next(looks) == 0:
            (queue / "d.txt").write_text("of these\n")
            with (queue / "a.jsonl").open("a") as file:
                file.write('"in every year"\n')
            return False
        return True

    for path, what in batch.watch(queue, out, lambda: (model, tokenizer), job=job, every_s=0.01, until=late):
        came.append((path.name, what))
    assert [name for name, _ in came] == ["a.jsonl", "b.csv", "a.jsonl", "d.txt"]
    assert "no column 'prompt'" in str(came[1][1])
    assert (came[2][1].rows, came[2][1].computed) == (2, 1)
    assert sorted(path.name for path in out.glob("*.jsonl")) == ["a.jsonl", "b.csv.jsonl", "d.txt.jsonl"]
    with pytest.raises(StoreError, match="would be taken for inputs"):
        next(batch.watch(queue, queue, lambda: (model, tokenizer)))


def test_the_command(tmp_path: Path, tokenizer: Any, plain: Any) -> None:
    asked = sentences(5)
    (tmp_path / "in.txt").write_text("\n".join(asked))
    config = tmp_path / "g.json"
    config.write_text(json.dumps({"do_sample": True, "repetition_penalty": 1.5, "transformers_version": "5"}))
    arguments = ["batch", tmp_path / "in.txt", "-o", tmp_path / "out.jsonl", "--model", TINY_OPT, "--greedy"]
    more = ["--max-new-tokens", 4, "--generation-config", config, "--set", "no_repeat_ngram_size=2", "--no-progress"]
    tiers = ["--policy", "0 100 0 100 0 100", "--batch-size", 2, "--num-batches", 2, "--offload-folder", tmp_path]
    result = CliRunner().invoke(app, [*map(str, arguments), *map(str, more), *map(str, tiers)])
    assert result.exit_code == 0, result.output
    assert "5 rows, 0 errors, 20 tokens" in result.stderr
    options: dict[str, Any] = {
        "max_new_tokens": 4,
        "do_sample": False,
        "repetition_penalty": 1.5,
        "no_repeat_ngram_size": 2,
    }
    want = [alone(plain, tokenizer, prompt, **options) for prompt in asked]
    assert [line["text"] for line in read_lines(tmp_path / "out.jsonl")] == want


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "no_equals"], "not NAME=VALUE"),
        (["--set", "temprature=2"], "did you mean 'temperature'"),
        (["--set", "use_cache=false"], "a batch job cannot run it"),
        (["--temperature", "-1"], "temperature"),
        (["--generation-config", "missing.json"], "cannot read 'missing.json'"),
        (["--watch"], "no folder"),
    ],
)
def test_what_the_command_refuses(tmp_path: Path, arguments: list[str], message: str) -> None:
    source = write_lines(tmp_path / "in.jsonl", ["a"])
    result = CliRunner().invoke(app, ["batch", str(source), "-o", str(tmp_path / "o"), "--model", "m", *arguments])
    assert isinstance(result.exception, FlexGenError)
    assert message in str(result.exception)
    assert not (tmp_path / "o").exists()


def test_the_bar_shows_rows_and_speed(tmp_path: Path, model: Any, tokenizer: Any, capfd: Any) -> None:
    source = write_lines(tmp_path / "in.jsonl", sentences(7))
    batch.run(source, tmp_path / "out.jsonl", model, tokenizer, options=GREEDY, show_progress=True)
    shown = capfd.readouterr().err
    assert "7/7" in shown
    assert "token/s" in shown
