"""Plans: as good as trying everything, no worse than what is published, honest about what does not fit."""

from __future__ import annotations

import dataclasses
import itertools
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from flexgen_hf import CapacityError, Compression, FlexGenError, Placement, Policy, PolicyError, Tier
from flexgen_hf.bench.shapes import SHAPES, shape_fields
from flexgen_hf.cli import app
from flexgen_hf.planning.cost import PlannedRun, predict
from flexgen_hf.planning.hardware import Hardware
from flexgen_hf.planning.layout import _Unit
from flexgen_hf.planning.original import PUBLISHED
from flexgen_hf.planning.presets import preset
from flexgen_hf.planning.search import Freedom, Planner, plan
from flexgen_hf.planning.shape import ModelShape
from flexgen_hf.planning.simulate import simulate
from flexgen_hf.planning.workload import Workload

from .tiny import batch, greedy, load, write_tiny_opt

ROOT = Path(__file__).parent.parent
SMALL = {"num_hidden_layers": 6, "hidden_size": 1024, "num_attention_heads": 16, "vocab_size": 2000}
MIB = 1 << 20


def small_machine(device: int, host: int) -> Hardware:
    """A T4 with so many MiB."""
    return dataclasses.replace(preset("t4"), device_bytes=device * MIB, host_bytes=host * MIB)


def everything(planner: Planner) -> Iterator[PlannedRun]:
    """Every policy of a small grid that fits."""
    placements = [Placement(device=d / 2, host=h / 2) for d in range(3) for h in range(3 - d)]
    for weights, cache, hidden in itertools.product(placements, placements, placements[::2]):
        for size, number, attention in itertools.product((4, 16), (1, 4), (False, True)):
            run = planner.run(Policy(weights, cache, hidden, size, number, host_attention=attention))
            if planner.fits(run):
                yield run


@pytest.mark.parametrize(("device", "host"), [(110, 200), (90, 400)])
def test_a_plan_is_as_good_as_the_best_of_a_grid(device: int, host: int) -> None:
    planner = Planner(ModelShape.from_config(SMALL), small_machine(device, host), Workload(64, 16))
    made = planner.plan()
    rates = [simulate(run).tokens_per_s for run in everything(planner)]
    assert len(rates) > 10
    assert made.predicted.tokens_per_s >= 0.97 * max(rates)
    assert made.predicted.peak_bytes[Tier.DEVICE] <= device * MIB
    assert made.predicted.peak_bytes[Tier.HOST] <= host * MIB


@pytest.mark.parametrize("cache", [None, *Tier])
def test_no_program_is_left_out_that_could_be_better(cache: Tier | None) -> None:
    """What is looked at before a program is solved is never more than what is found by solving it."""
    planner = Planner(ModelShape.from_config(SMALL), small_machine(110, 200), Workload(64, 16))
    solved = 0
    for size, number, slots in itertools.product((1, 16, 64), (1, 4), (1, 2)):
        program = planner._program(Policy(batch_size=size, num_batches=number, layer_slots=slots))
        if (solution := program.solve(cache, cache)) is not None:
            solved += 1
            assert 0 < program.least_s(cache, cache) <= solution.seconds * (1 + 1e-6)
    assert solved > 2


def test_layers_and_experts_that_are_alike_are_cut_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever their number: a plan for very many experts takes no longer for it."""
    cut, cuts = _Unit.cut, []

    def counted(unit: _Unit) -> Any:
        cuts.append(unit)
        return cut(unit)

    monkeypatch.setattr(_Unit, "cut", counted)
    config = {**SMALL, "num_experts": 32, "num_experts_per_tok": 4, "moe_intermediate_size": 64}
    run = PlannedRun(
        ModelShape.from_config(config), preset("t4"), Policy.parse("20 50 0 100 0 100", batch_size=4), Workload(64, 4)
    )
    assert sum(map(len, run.layout.experts)) == 6 * 32
    assert len(cuts) < 32


@pytest.mark.parametrize("row", [r for r in PUBLISHED if r.prompt_len == 512 and r.model != "opt-6.7b"],
                         ids=lambda row: f"{row.model}{' compressed' * row.is_compressed}")  # fmt: skip
def test_plans_are_no_worse_than_what_is_published(row: Any) -> None:
    shape = ModelShape.from_config(shape_fields(row.model), name=row.model)
    made = plan(shape, preset("t4"), row.workload, Freedom(compressions=(row.policy.compression,)))
    assert made.predicted.tokens_per_s >= row.tokens_per_s
    assert made.policy.compression == row.policy.compression
    capacities = preset("t4").capacities
    assert all(made.predicted.peak_bytes[tier] <= capacities[tier,] for tier in Tier)


def small_plan(workload: Workload = Workload(64, 16), **freedom: Any) -> Any:  # noqa: B008
    return plan(ModelShape.from_config(SMALL, name="small"), small_machine(110, 300), workload, Freedom(**freedom))


def test_a_plan_says_why() -> None:
    made = small_plan()
    assert made.why[0].startswith("in prefill, ")
    assert any("device holds" in text for text in made.why)
    assert str(made).endswith(f"limited by {made.predicted.bottleneck}")
    for other in made.alternatives:
        assert other.label
        assert other.policy != made.policy


def test_what_is_given_is_kept() -> None:
    made = small_plan(batch_size=3, num_batches=5, host_attention=False)
    assert (made.policy.batch_size, made.policy.num_batches, made.policy.host_attention) == (3, 5, False)
    assert small_plan(Workload(64, 16, 7)).policy.block_size < 14  # no block larger than the work needs


def test_the_shortest_time_is_no_longer_than_that_of_the_best_rate() -> None:
    prompts = Workload(64, 16, 4)
    assert small_plan(prompts, objective="latency").predicted.seconds <= small_plan(prompts).predicted.seconds * 1.001


def test_the_largest_block_in_time() -> None:
    best = small_plan()
    seconds = best.predicted.seconds / 2
    made = small_plan(objective="block", deadline_s=seconds)
    assert made.predicted.seconds <= seconds
    assert made.predicted.rows > 1
    with pytest.raises(CapacityError, match="no block ends within"):
        small_plan(objective="block", deadline_s=1e-6)


def test_a_device_too_small_for_two_layers_has_room_for_one() -> None:
    """With a layer of 24 MiB and room for 40, two can't be there, and a plan is found all the same."""
    machine, shape = small_machine(64, 400), ModelShape.from_config(SMALL)
    given = Freedom(batch_size=8, num_batches=2)
    with pytest.raises(CapacityError):
        plan(shape, machine, Workload(64, 16), dataclasses.replace(given, layer_slots=2, overlap=True))
    made = plan(shape, machine, Workload(64, 16), given)
    assert made.policy.layer_slots == 1
    assert made.predicted.peak_bytes[Tier.DEVICE] <= 64 * MIB


def test_the_smallest_device_does_one_thing_after_the_other() -> None:
    shape, given = ModelShape.from_config(SMALL), Freedom(batch_size=8, num_batches=2)
    sizes = range(60, 30, -1)
    found = []
    for size in sizes:
        try:
            found.append(plan(shape, small_machine(size, 400), Workload(64, 16), given).policy)
        except CapacityError:
            break
    assert not found[-1].overlap


def test_room_for_one_layer_costs_what_it_stops() -> None:
    """Its weights cross the link when the layer before is computed; the closed form knows it, as the simulator does."""
    shape = ModelShape.from_config(SMALL)
    two, one = (
        PlannedRun(
            shape, preset("t4"), Policy.parse("0 100 100 0 100 0", batch_size=64, layer_slots=slots), Workload(256, 4)
        )
        for slots in (2, 1)
    )
    assert predict(one).seconds > predict(two).seconds
    assert predict(one).seconds <= 1.02 * simulate(one).seconds


def test_what_attends_in_its_own_way_is_unpacked_and_stays_on_the_device() -> None:
    """Not through transformers' interface: neither over cells as they are kept, nor on the host."""
    for family, is_plain in (("opt", True), ("bloom", False), ("gemma2", True), ("mpt", False), ("unheard of", False)):
        shape = ModelShape.from_config({**SMALL, "model_type": family})
        sizes = shape.sizes(Compression(cache=4), direct=True)
        assert sizes.attends_kept is is_plain
        assert sizes.makes_masks_late is is_plain
        attentions = Planner(shape, preset("t4"), Workload(64, 16))._attentions
        assert attentions == ((False, True) if is_plain else (False,))


def test_compression_is_chosen_where_it_pays() -> None:
    choices = (Compression(), Compression(weights=4, cache=4))
    assert small_plan(compressions=choices).predicted.tokens_per_s >= small_plan().predicted.tokens_per_s


def test_what_is_missing_is_said() -> None:
    tiny = dataclasses.replace(small_machine(8, 8), disk_bytes=10 * MIB)
    with pytest.raises(CapacityError, match=r"small does not fit .* host needs .* GiB but has 0\.01 GiB, .* too few"):
        plan(ModelShape.from_config(SMALL, name="small"), tiny, Workload(64, 16))
    planner = Planner(ModelShape.from_config(SMALL), small_machine(100, 100), Workload(64, 16))
    with pytest.raises(CapacityError, match=r"device needs .* GiB but has 0\.10 GiB"):
        planner.explain(Policy(batch_size=64))


def test_more_tokens_than_positions_are_refused() -> None:
    shape = ModelShape.from_config({**SMALL, "max_position_embeddings": 100})
    with pytest.raises(PolicyError, match="90 \\+ 16 tokens are more than the 100"):
        plan(shape, preset("t4"), Workload(90, 16))


def test_a_model_that_fits_gets_a_warning() -> None:
    made = plan(ModelShape.from_config(SMALL), preset("a100"), Workload(64, 16, 8))
    assert any("without offloading" in text for text in made.warnings)
    assert not small_plan(batch_size=16, num_batches=4).warnings


@pytest.mark.parametrize(
    ("freedom", "words"),
    [({"objective": "speed"}, "'speed' is unknown"), ({"objective": "block"}, "belong together"),
     ({"deadline_s": 3.0}, "belong together")],
)  # fmt: skip
def test_freedom_that_cannot_be_meant_is_refused(freedom: dict[str, Any], words: str) -> None:
    with pytest.raises(PolicyError, match=words):
        Freedom(**freedom)


# ------------------------------------------------------------------------------------------------------- the command
def run(*options: str) -> str:
    result = CliRunner().invoke(app, ["plan", *options], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_the_command_needs_no_torch() -> None:
    code = (
        "import sys; sys.argv = ['flexgen-hf', 'plan', '--shape', 'opt-1.3b', '--hardware', 't4']\n"
        "from flexgen_hf.cli import main\n"
        "try: main()\nexcept SystemExit as end: assert end.code == 0\n"
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "token/s" in result.stdout
    assert result.stdout.endswith("[]\n")


def test_a_policy_of_the_command_runs_as_it_is(tmp_path: Path) -> None:
    checkpoint = write_tiny_opt(tmp_path / "model")
    text = run(str(checkpoint), "--hardware", "cpu2", "--prompt-len", "6", "--gen-len", "4", "--num-prompts", "6",
               "--dtype", "float32", "--json")  # fmt: skip
    made = json.loads(text)
    assert {"prefill_s", "decode_s", "tokens_per_s", "peak_bytes", "bottleneck"} <= made["predicted"].keys()
    assert {"policy", "predicted", "why", "alternatives"} <= made.keys()
    file = tmp_path / "plan.json"
    file.write_text(text)
    with load(checkpoint, tmp_path, str(file)) as model:  # type: ignore[arg-type]
        assert model.policy == Policy.from_dict(made["policy"])
        greedy(model, batch(6), 4)
        assert all(model.last_run.peak_bytes[tier] <= preset("cpu2").host_bytes for tier in Tier)


def test_a_given_policy_is_predicted() -> None:
    options = ["--shape", "opt-30b", "--policy", "0 100 0 100 0 100", "--batch-size", "20", "--num-batches", "4"]
    text = run(*options, "--host-attention", "--compression", "4bit")
    assert "block 20 x 4, host attention" in text
    assert "cache 4 bit" in text
    assert "alternative" not in text


def test_memory_can_be_limited() -> None:
    text = run("--shape", "opt-6.7b", "--hardware", "rtx4090", "--max-memory", "0=8GiB,cpu=20GiB", "--json")
    peaks = json.loads(text)["predicted"]["peak_bytes"]
    assert peaks["device"] <= 8 << 30
    assert peaks["host"] <= 20 << 30


def test_the_published_table() -> None:
    assert sum(line.startswith("| opt-") for line in run("--paper").splitlines()) == len(PUBLISHED)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--shape opt-7b", "no shape 'opt-7b'"),
        ("--shape opt-30b --hardware t5", "no preset 't5'; known are t4"),
        ("--shape opt-30b --hardware missing.json", "cannot read 'missing.json'"),
        ("opt-30b", "write --shape opt-30b"),
        ("", "give MODEL or --shape"),
        ("model --shape opt-30b", "one of them"),
        ("--shape opt-30b --compression 5bit", "'5bit' is unknown"),
        ("--shape opt-30b --objective block", "belong together"),
        ("--shape opt-30b --max-memory 0=3w", "a share of the weights"),
        ("--shape opt-175b --max-memory 0=1GiB,cpu=1GiB,disk=1GiB", "does not fit"),
    ],
)
def test_errors_are_clear(options: str, words: str) -> None:
    result = CliRunner().invoke(app, ["plan", *options.split()])
    assert result.exit_code != 0
    assert isinstance(result.exception, FlexGenError)
    assert words in str(result.exception)


def test_all_shapes_have_fields() -> None:
    assert all(ModelShape.from_config(shape_fields(name)).num_parameters for name in SHAPES)
