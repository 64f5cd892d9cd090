"""The command line: what it passes on, what it prints, and how it ends."""

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import flexgen_hf
from flexgen_hf import FlexGenError, Placement, Policy, PolicyError, cli, options
from flexgen_hf.text import dtype_of_compute
from tests.trained import TINY_OPT

ROOT = Path(__file__).parent.parent


class RecordedModel:
    """Stands in for a model: remembers how it was loaded and called, and writes the prompt again."""

    device = "cpu"
    policy = Policy()
    last_run = "what moved"

    def __init__(self, source, options):
        self.source, self.options, self.is_closed = source, options, False

    def generate(self, input_ids, attention_mask, **generation):
        import torch

        self.generation = generation
        return torch.cat([input_ids, input_ids], dim=1)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.is_closed = True


@pytest.fixture
def recorded(monkeypatch):
    """Models loaded by the command line, in order."""
    models = []

    class Loader:
        @staticmethod
        def from_pretrained(source, **options):
            models.append(RecordedModel(source, options))
            return models[-1]

    monkeypatch.setattr(flexgen_hf, "FlexGenForCausalLM", Loader, raising=False)
    return models


def run(*arguments, **settings):
    return CliRunner().invoke(cli.app, [str(a) for a in arguments], catch_exceptions=False, **settings)


def run_as_process(*arguments):
    """The installed command's exit code and both its outputs, off the network."""
    return subprocess.run(
        [sys.executable, "-c", "from flexgen_hf.cli import main; main()", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def run_on_a_terminal(*arguments):
    """The installed command's exit code, what it wrote to stdout, and what to a terminal that is its stderr."""
    import fcntl
    import termios

    terminal, stderr = os.openpty()
    fcntl.ioctl(stderr, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))  # rows, columns, and pixels of both
    ended = subprocess.run(
        [sys.executable, "-c", "from flexgen_hf.cli import main; main()", *arguments],
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        check=False,
    )
    os.close(stderr)
    screen = b""
    try:
        while written := os.read(terminal, 4096):
            screen += written
    except OSError:  # how Linux says that the other end is closed and nothing is left
        pass
    os.close(terminal)
    return ended.returncode, ended.stdout, screen.decode()


class TestGenerate:
    def test_what_is_not_given_is_left_to_the_library(self, recorded):
        result = run("generate", TINY_OPT, "--prompt", "The people")
        assert result.exit_code == 0
        (model,) = recorded
        assert model.source == str(TINY_OPT)
        assert model.options == {"dtype": dtype_of_compute()}
        assert model.generation == {"pad_token_id": 1, "max_new_tokens": 32}
        assert model.is_closed

    def test_everything_given_is_passed_on(self, recorded):
        options = "--policy|20 80 0 100 0 100|--batch-size|48|--num-batches|3|--no-overlap|--offload-folder|/o"
        options += "|--max-memory|0=14GiB,cpu=180GiB,disk=1TiB|--dtype|float16|--revision|main"
        options += '|--compression|{"weights": 4}'
        options += "|--max-new-tokens|5|--num-beams|3|--do-sample|--temperature|0.5|--top-p|0.9|--top-k|7"
        assert run("generate", TINY_OPT, "--prompt", "a", *options.split("|")).exit_code == 0
        (model,) = recorded
        assert model.options == {
            "policy": Policy.parse("20 80 0 100 0 100", batch_size=48, num_batches=3, overlap=False),
            "compression": '{"weights": 4}',
            "max_memory": {0: "14GiB", "cpu": "180GiB", "disk": "1TiB"},
            "offload_folder": "/o",
            "dtype": "float16",
            "revision": "main",
        }
        assert model.generation == {
            "pad_token_id": 1,
            "max_new_tokens": 5,
            "num_beams": 3,
            "do_sample": True,
            "temperature": 0.5,
            "top_p": 0.9,
            "top_k": 7,
        }

    def test_auto_is_told_what_there_is_to_do(self, recorded, tmp_path):
        options = ["--policy", "auto", "--batch-size", "2", "--hardware", "cpu2", "--objective", "latency"]
        run("generate", TINY_OPT, "--prompt", "a b c", "--prompt", "a", "--max-new-tokens", "3", *options)
        given = recorded[0].options
        assert (given["policy"], given["batch_size"], given["hardware"]) == ("auto", 2, "cpu2")
        assert given["objective"] == "latency"
        assert given["workload"]["batch"] == 2
        assert given["workload"]["max_new_tokens"] == 3
        assert given["workload"]["prompt_len"] > 1

    def test_the_originals_spellings(self, recorded):
        original = "--percent 20 80 0 100 0 100 --gpu-batch-size 48 --num-gpu-batches 3".split()
        assert run("generate", TINY_OPT, "--prompt", "a", *original).exit_code == 0
        assert recorded[0].options["policy"] == Policy.parse("20 80 0 100 0 100", batch_size=48, num_batches=3)

    def test_prompts_of_a_file_and_of_standard_input(self, recorded, tmp_path):
        file = tmp_path / "prompts.txt"
        file.write_text("The people\n\nOur country\n")
        from_file = run("generate", TINY_OPT, "--prompt", "Peace", "--prompts-file", file)
        assert [line for line in from_file.stdout.splitlines() if line.startswith(">")] == [
            "> Peace",
            "> The people",
            "> Our country",
        ]
        piped = run("generate", TINY_OPT, "--prompts-file", "-", input="The people\n")
        assert piped.stdout.startswith("> The people\nThe people")

    def test_the_output_is_json_lines(self, recorded, tmp_path):
        out = tmp_path / "out.jsonl"
        result = run("generate", TINY_OPT, "--prompt", "The people", "--prompt", "Peace", "--output", out)
        assert result.stdout == ""
        lines = [json.loads(line) for line in out.read_text().splitlines()]
        assert lines == [{"prompt": "The people", "text": "The people"}, {"prompt": "Peace", "text": "Peace"}]

    def test_the_report_goes_to_stderr(self, recorded):
        result = run("generate", TINY_OPT, "--prompt", "Peace", "--report")
        assert result.stderr == "what moved\n"
        assert "what moved" not in result.stdout

    def test_the_trace_goes_to_a_file(self, tmp_path):
        file = tmp_path / "run.json"
        options = ["--max-new-tokens", "2", "--percent", "0", "0", "0", "0", "0", "0", "--offload-folder", tmp_path]
        assert run("generate", TINY_OPT, "--prompt", "Peace", "--trace", file, *options).exit_code == 0
        rows = json.loads(file.read_text())["traceEvents"]
        assert "compute" in {row["args"]["name"] for row in rows if row["name"] == "thread_name"}

    @pytest.mark.parametrize(("option", "shown"), [([], False), (["--progress"], True), (["--no-progress"], False)])
    def test_progress_is_shown_on_demand_where_stderr_is_no_terminal(self, recorded, option, shown):
        assert run("generate", TINY_OPT, "--prompt", "Peace", *option).exit_code == 0
        assert recorded[0].show_progress is shown

    def test_progress_goes_to_stderr(self):
        options = ["--prompt", "Peace", "--max-new-tokens", "3"]
        plain = run("generate", TINY_OPT, *options)
        assert plain.stderr == ""
        shown = run("generate", TINY_OPT, *options, "--progress")
        assert "3/3 [" in shown.stderr
        assert shown.stdout == plain.stdout != ""

    @pytest.mark.parametrize("option", [None, "--no-progress"])
    def test_progress_is_shown_on_a_terminal(self, option):
        words = ["generate", str(TINY_OPT), "--prompt", "Peace", "--max-new-tokens", "3", *filter(None, [option])]
        code, stdout, screen = run_on_a_terminal(*words)
        assert code == 0
        assert stdout.startswith("> Peace\n")
        assert ("prefill" in screen) == ("3/3 [" in screen) == (option is None)

    def test_a_sampling_option_means_sampling(self, recorded):
        run("generate", TINY_OPT, "--prompt", "a", "--temperature", "0.7")
        run("generate", TINY_OPT, "--prompt", "a", "--greedy")
        assert [model.generation.get("do_sample") for model in recorded] == [True, False]

    def test_a_seed_seeds_torch(self, recorded):
        import torch

        run("generate", TINY_OPT, "--prompt", "a", "--seed", "7")
        first = torch.rand(1)
        run("generate", TINY_OPT, "--prompt", "a", "--seed", "7")
        assert torch.equal(first, torch.rand(1))

    def test_the_engine_writes_what_transformers_writes(self):
        import torch
        from transformers import AutoModelForCausalLM

        from flexgen_hf.text import complete, load_tokenizer

        prompts = ["The people of the United States", "Peace", "It is my duty to report"]
        tokenizer, plain = (
            load_tokenizer(str(TINY_OPT)),
            AutoModelForCausalLM.from_pretrained(TINY_OPT, dtype="float32"),
        )
        with torch.no_grad():
            expected = complete(plain, tokenizer, prompts, max_new_tokens=8)
        given = [word for prompt in prompts for word in ("--prompt", prompt)]
        options = "--max-new-tokens 8 --dtype float32 --percent 30 40 30 40 30 40 --batch-size 2".split()
        result = run("generate", TINY_OPT, *given, *options)
        assert result.stdout == "".join(f"> {p}\n{t}\n\n" for p, t in zip(prompts, expected, strict=True))


class TestReadingOptions:
    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("14GiB", "'14GiB' is not NAME=SIZE"),
            ("0=", "'0=' is not NAME=SIZE"),
            ("0=1GiB,", "'' is not NAME=SIZE"),
        ],
    )
    def test_refused_max_memory(self, text, words):
        with pytest.raises(PolicyError) as refusal:
            options.parse_max_memory(text)
        assert words in str(refusal.value)

    def test_no_option_is_no_policy(self):
        assert options.parse_policy(None, None, batch_size=None, overlap=None) is None

    def test_fields_alone_are_a_policy(self):
        assert options.parse_policy(None, None, batch_size=3) == Policy(batch_size=3)

    def test_two_spellings_of_one_thing_are_refused(self):
        with pytest.raises(PolicyError, match="give one of them"):
            options.parse_policy("20 80 0 100 0 100", (20, 80, 0, 100, 0, 100))

    def test_a_policy_file(self, tmp_path):
        file = tmp_path / "policy.json"
        file.write_text(Policy(weights=Placement(host=1.0)).to_json())
        assert options.parse_policy(str(file), batch_size=2) == Policy(weights=Placement(host=1.0), batch_size=2)

    def test_no_prompt_is_refused(self, tmp_path):
        with pytest.raises(FlexGenError, match="give --prompt TEXT"):
            cli.read_prompts([], None)
        with pytest.raises(FlexGenError, match="cannot read"):
            cli.read_prompts([], tmp_path / "missing.txt")


class TestEndings:
    def test_version(self):
        assert run("--version").stdout == f"flexgen-hf {flexgen_hf.__version__}\n"

    def test_the_commands(self):
        screen = run("--help").stdout
        assert all(f" {name} " in screen for name in ("convert", "demo", "generate", "quality", "verify"))

    @pytest.mark.parametrize("command", ["convert", "demo", "generate", "quality", "verify"])
    def test_every_option_is_explained(self, command):
        assert run(command, "--help").exit_code == 0

    @pytest.mark.parametrize("wrong", [["--prmpt", "a"], ["--prompt", "a", "--dtype", "float17"]])
    def test_a_wrong_option_is_exit_code_two(self, wrong):
        assert run("generate", TINY_OPT, *wrong).exit_code == 2

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (["./nowhere", "--prompt", "a"], "no folder './nowhere'"),
            ([TINY_OPT, "--prompt", "a", "--policy", "20 80"], "has 2 numbers, not 6"),
            ([TINY_OPT, "--prompt", "a", "--policy", "auto", "--no-overlap"], "--policy auto finds it"),
            ([TINY_OPT, "--prompt", "a", "--hardware", "cpu2"], "what policy='auto' is to find"),
            ([TINY_OPT, "--prompt", "a", "--max-memory", "cpu=100KiB"], "raise max_memory"),
            ([TINY_OPT], "no prompt"),
            (["nobody/nothing", "--prompt", "a"], "cannot load 'nobody/nothing'"),
        ],
    )
    def test_an_error_is_one_line_and_exit_code_one(self, arguments, words):
        ended = run_as_process("generate", *arguments)
        assert ended.returncode == 1
        assert ended.stdout == ""
        assert ended.stderr.startswith("error: ")
        assert ended.stderr.count("\n") == 1
        assert words in ended.stderr

    def test_an_unknown_model_type_is_one_line(self, tmp_path):
        (tmp_path / "config.json").write_text('{"model_type": "nosuchmodel"}')
        ended = run_as_process("generate", tmp_path, "--prompt", "a")
        assert ended.returncode == 1
        assert ended.stderr.startswith(f"error: cannot load '{tmp_path}'")
        assert ended.stderr.count("\n") == 1
        assert "nosuchmodel" in ended.stderr

    def test_an_interrupt_is_exit_code_130(self, monkeypatch):
        def interrupted(*_):
            raise KeyboardInterrupt

        monkeypatch.setattr(cli, "read_prompts", interrupted)
        assert run("generate", TINY_OPT).exit_code == 130
