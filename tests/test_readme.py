"""What the README tells people to type exists; what is declared as a dependency is used, and the reverse."""

import ast
import configparser
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import typer.main

from flexgen_hf import Policy, cli
from flexgen_hf.bench.shapes import shape_fields
from flexgen_hf.models_command import families, families_table
from flexgen_hf.planning.presets import preset
from flexgen_hf.planning.search import Planner
from flexgen_hf.planning.shape import ModelShape
from flexgen_hf.planning.workload import Workload

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SETUP = configparser.ConfigParser()
SETUP.read(ROOT / "setup.cfg")


def blocks(language: str) -> list[str]:
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    return [text for tag, text in fenced if tag == language]


def lines_with(program: str) -> list[str]:
    return [line for block in blocks("") for line in block.splitlines() if line.startswith(program)]


@pytest.mark.parametrize("line", lines_with("flexgen-hf "))
def test_commands_and_options_exist(line):
    _, command, *words = line.split()
    commands: Any = typer.main.get_command(cli.app)
    options = {name for parameter in commands.commands[command].params for name in parameter.opts}
    assert {word for word in words if word.startswith("--")} <= options


@pytest.mark.parametrize(
    "line", [line for line in lines_with("flexgen-hf ") if re.search("opt-30b.*(batch-size|gpu)", line)]
)
def test_policies_fit_a_t4_as_plan_says(line):
    """OPT-30B, prompts of 512 tokens, 64 to write."""
    (percents,) = re.findall(r"--(?:policy|percent) \"?([\d ]+\d)", line)
    (size,), (number,) = (
        re.findall(rf"--{name} (\d+)", line) for name in ("(?:gpu-)?batch-size", "num-(?:gpu-)?batches")
    )
    planner = Planner(ModelShape.from_config(shape_fields("opt-30b")), preset("t4"), Workload(512, 64))
    assert planner.fits(planner.run(Policy.parse(percents, batch_size=int(size), num_batches=int(number))))


@pytest.mark.parametrize("line", lines_with("make "))
def test_targets_exist(line):
    assert re.search(rf"^{line.split()[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_the_table_of_families_is_what_the_command_prints():
    assert families_table(families()) in README


@pytest.mark.parametrize("block", blocks("python"))
def test_python_is_python(block):
    ast.parse(block)


def test_linked_files_exist():
    for target in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ROOT / target).exists(), target


def test_dependencies_are_those_that_are_imported():
    declared = {re.split(r"[<>=!~]", line)[0] for line in SETUP["options"]["install_requires"].split()}
    imported = set()
    for file in [*(ROOT / "flexgen_hf").rglob("*.py"), *(ROOT / "conversion").rglob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                imported.add(node.module.split(".")[0])
    comes_with_torch = {"triton"}  # where there is CUDA; elsewhere nothing needs it
    optional = {  # with the extra that brings it
        "matplotlib": "plots",
        "gguf": "gguf",
        "helm": "helm",
        "pyarrow": "parquet",
        "lm_eval": "lm-eval",
    }
    assert all(name in SETUP["options.extras_require"][extra] for name, extra in optional.items())
    third_party = imported - set(sys.stdlib_module_names) - {"flexgen_hf", "conversion"} - comes_with_torch
    assert third_party - optional.keys() == declared
