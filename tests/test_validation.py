"""`bench --validate-plan`: which policies are measured, that none is measured twice, and what is said of the errors."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from flexgen_hf import CapacityError, Compression, FlexGenError, Policy, PolicyError, Tier, cli
from flexgen_hf.bench.agreement import Agreement, choice_table, peak_ratios, table_of_policies
from flexgen_hf.bench.limits import Limits
from flexgen_hf.bench.shapes import random_checkpoint
from flexgen_hf.bench.systems import Job
from flexgen_hf.bench.validation import (
    PROCESS_BYTES,
    Case,
    Drawing,
    Ground,
    Measuring,
    Subject,
    chosen,
    drawn,
    grid,
    known_records,
)
from flexgen_hf.bench.workload import BenchWorkload
from flexgen_hf.planning.budget import fits
from flexgen_hf.planning.cost import limits_of
from flexgen_hf.planning.hardware import Hardware
from flexgen_hf.planning.presets import preset
from flexgen_hf.planning.schedule import Lane
from flexgen_hf.planning.search import COMPRESSIONS

MACHINE = dataclasses.replace(preset("cpu2"), cores=2, threads=2)
WORKLOAD = BenchWorkload(prompt_len=16, new_tokens=4, rows=8)
MB = 10**6


@pytest.fixture(scope="module")
def work_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bench")


@pytest.fixture(scope="module")
def subject(work_folder: Path) -> Subject:
    model = random_checkpoint(work_folder, "tiny", torch.float16)
    return Subject.of(Job("flexgen", str(model), WORKLOAD, "float32", str(work_folder), threads=2), PROCESS_BYTES + MB)


def record(case: Case, speed: float = 1.0) -> dict[str, Any]:
    """What a run says that writes so many times as many tokens per second as was predicted."""
    said = case.predicted(MACHINE)["simulated"]
    return {
        "status": "ok", "model": case.subject.job.model, "flexgen": {"policy": case.policy.to_dict()},
        "limits": dataclasses.asdict(case.limits), "load_s": 1.0, "prefill_s": said["prefill_s"] / speed,
        "decode_s": said["decode_s"] / speed, "tokens_per_s": said["tokens_per_s"] * speed,
        "peak_rss_bytes": 900, "rss_before_bytes": 400, "report": {
            "peak_bytes": {tier: size // 2 for tier, size in said["peak_bytes"].items()},
            "bottleneck": said["bottleneck"], "decode_bottleneck": said["decode_bottleneck"],
        },
    }  # fmt: skip


class Runs:
    """Runs that take no time; the more micro-batches a policy has, the faster."""

    def __init__(self, speed: Callable[[Policy], float] = lambda policy: float(policy.num_batches)) -> None:
        self.seen: list[tuple[Job, Limits, float | None]] = []
        self._speed = speed

    def __call__(self, job: Job, limits: Limits, timeout_s: float | None) -> dict[str, Any]:
        self.seen.append((job, limits, timeout_s))
        policy = Policy.from_dict(job.flexgen["policy"])
        subject = Subject.of(dataclasses.replace(job, store=None), limits.memory_bytes)
        return record(Case(subject, policy, limits.read_bytes_per_s, "grid"), self._speed(policy))


def measuring(runs: Runs, folder: Path, known: Any = None, told: list[Any] | None = None) -> Measuring:
    return Measuring(runs, MACHINE, folder, known or {}, (told if told is not None else []).append)


class TestCases:
    def test_drawn_ones_are_of_all_kinds_and_fit(self, subject: Subject) -> None:
        ground = Ground([subject], (None, 50 * MB))
        cases = drawn(ground, Drawing(16, (0.0, 100.0)), MACHINE)
        assert len({case.key for case in cases}) == 16
        assert {case.policy.compression for case in cases} == set(COMPRESSIONS)
        assert {case.disk_bytes_per_s for case in cases} == {None, 50 * MB}
        for case in cases:
            run = case.planned(MACHINE)
            assert fits(run.peak_bytes, limits_of(run.hardware))
            assert run.hardware.host_bytes == MB
            assert case.workload.rows == case.policy.block_size == sum(run.batches)

    def test_a_seed_always_draws_the_same(self, subject: Subject) -> None:
        first, again, other = (
            [case.key for case in drawn(Ground([subject], seed=seed), Drawing(4, (0.0, 9.0)), MACHINE)]
            for seed in (1, 1, 2)
        )
        assert first == again != other

    def test_too_few_that_take_so_long_are_an_error(self, subject: Subject) -> None:
        with pytest.raises(CapacityError, match="0 fit and take 1000 to 2000 s"):
            drawn(Ground([subject]), Drawing(2, (1000.0, 2000.0)), MACHINE)

    def test_a_grid_has_what_fits(self, subject: Subject) -> None:
        cases = grid(Ground([subject], (50 * MB,)), 40, MACHINE)
        assert len({case.key for case in cases}) == 40
        assert {case.policy.block_size for case in cases} == {4, 8}
        assert all(fits(c.planned(MACHINE).peak_bytes, limits_of(subject.machine(MACHINE, None))) for c in cases)
        narrow = dataclasses.replace(subject, memory_bytes=PROCESS_BYTES + 1000)
        with pytest.raises(CapacityError, match="no policy for 8 rows fits"):
            grid(Ground([narrow]), 40, MACHINE)

    def test_the_choice_is_the_planners(self, subject: Subject) -> None:
        case = chosen(Ground([subject], (50 * MB,)), MACHINE)
        others = grid(Ground([subject], (50 * MB,)), 10, MACHINE)
        best = max(c.predicted(MACHINE)["simulated"]["tokens_per_s"] for c in others)
        assert case.predicted(MACHINE)["simulated"]["tokens_per_s"] >= 0.95 * best

    def test_a_disk_limit_is_in_the_prediction(self, subject: Subject) -> None:
        policy = Policy.parse("0 0 0 100 0 100", batch_size=8)
        free, slow = (Case(subject, policy, rate, "grid").predicted(MACHINE) for rate in (None, 10**5))
        assert slow["simulated"]["decode_s"] > 2 * free["simulated"]["decode_s"]
        assert slow["simulated"]["decode_bottleneck"] == "disk_to_host"

    def test_a_limit_that_leaves_nothing_is_refused(self, subject: Subject) -> None:
        with pytest.raises(CapacityError, match="--memory-limit: of 1 MB, 700 MB are for Python"):
            Subject.of(subject.job, MB)

    def test_prompts_lengths_are_those_that_runs_get(self) -> None:
        mask = WORKLOAD.prompts(100, 1)["attention_mask"]
        assert WORKLOAD.lengths == tuple(mask.sum(1).tolist())


class TestMeasuring:
    def test_nothing_is_measured_twice(self, subject: Subject, work_folder: Path, tmp_path: Path) -> None:
        cases, runs, told = grid(Ground([subject], compressions=(Compression(),)), 3, MACHINE), Runs(), list[Any]()
        first = measuring(runs, work_folder, told=told)
        made = [first.record(case) for case in (*cases, *cases)]
        assert len(runs.seen) == len(told) == 3
        file = tmp_path / "out.jsonl"
        file.write_text("".join(json.dumps(line) + "\n" for line in ({}, *told, {**told[0], "status": "error"})))
        again = measuring(runs, work_folder, known_records(file))
        assert [again.record(case) for case in cases] == made[:3]
        assert len(runs.seen) == 3
        assert Hardware.from_dict(made[0]["validation"]["profile"]) == MACHINE

    def test_the_machine_may_be_profiled_again_in_between(self, subject: Subject, work_folder: Path) -> None:
        cases, runs = grid(Ground([subject], compressions=(Compression(),)), 5, MACHINE), Runs()
        later = [dataclasses.replace(MACHINE, name=f"{n} later", sweep_s=n) for n in (1.0, 2.0)]
        profiles = iter(later)
        told = list[Any]()
        measured = Measuring(runs, MACHINE, work_folder, {}, told.append, (lambda: next(profiles), 2))
        made = [measured.record(case) for case in (*cases, *cases)]
        machines = [MACHINE, MACHINE, later[0], later[0], later[1]]
        assert len(told) == 5
        assert [record["validation"]["profile"]["name"] for record in told] == [machine.name for machine in machines]
        for case, machine, once, twice in zip(cases, machines, made[:5], made[5:], strict=True):
            assert once["validation"]["simulated"] == case.predicted(machine)["simulated"]
            assert twice == once, "what is known keeps its own prediction"

    def test_a_run_gets_its_limits_and_budget(self, subject: Subject, work_folder: Path) -> None:
        runs = Runs()
        policy = Policy(batch_size=3, compression=Compression(cache=4))
        measuring(runs, work_folder).record(Case(subject, policy, 5 * MB, "random"))
        [(job, limits, _)] = runs.seen
        assert limits == Limits(PROCESS_BYTES + MB, 5 * MB, 5 * MB)
        assert job.flexgen["max_memory"] == {"cpu": MB}
        assert job.compression == Compression(cache=4)
        assert (job.workload.rows, job.threads, job.store) == (3, 2, None)

    def test_best_and_choice_run_again_in_turn(self, subject: Subject, work_folder: Path) -> None:
        ground = Ground([subject], compressions=(Compression(),))
        cases, choice, runs = grid(ground, 12, MACHINE), chosen(ground, MACHINE), Runs(lambda _: 1.0)
        made, others = measuring(runs, work_folder).best(choice, cases, 3)
        assert [record["repeat"] for record in made] == [1, 2, 3]
        assert [record["repeat"] for record in others] == [1] * 12 + [2, 3]
        fastest = max(others[:12], key=lambda record: float(record["tokens_per_s"]))
        assert {record["validation"]["key"] for record in others[12:]} == {fastest["validation"]["key"]}
        assert all(timeout_s is not None for _, _, timeout_s in runs.seen[1:13])
        table = choice_table(made, others)
        assert "the best of 12" in table
        ratio = made[0]["tokens_per_s"] / fastest["tokens_per_s"]
        assert f"Chosen over best: {ratio:.3f}." in table

    def test_a_failed_run_is_said(self, subject: Subject, work_folder: Path) -> None:
        def fail(*_: Any) -> dict[str, Any]:
            return {**record(case), "status": "error", "error": "killed"}

        case = grid(Ground([subject]), 1, MACHINE)[0]
        made = measuring(fail, work_folder).record(case)  # type: ignore[arg-type]
        assert "killed" in table_of_policies([made])
        assert Agreement.of([made]) is None


class TestAgreement:
    @pytest.fixture
    def records(self, subject: Subject) -> list[dict[str, Any]]:
        cases = drawn(Ground([subject]), Drawing(4, (0.0, 9.0)), MACHINE)
        return [
            {**record(case, speed), "repeat": 1, "validation": {"key": case.key, **case.predicted(MACHINE)}}
            for case, speed in zip(cases, (1.0, 1.25, 0.8, 1.0), strict=True)
        ]

    def test_errors_are_relative_to_what_was_measured(self, records: list[dict[str, Any]]) -> None:
        found = Agreement.of(records)
        assert found is not None
        assert found.prefill_error == pytest.approx((0.25 + 0.2) / 4)
        assert found.decode_error == pytest.approx((0.25 + 0.2) / 4)
        assert found.largest_error == pytest.approx(0.25)

    def test_ranks(self, records: list[dict[str, Any]]) -> None:
        for number, made in enumerate(records):
            made["validation"]["simulated"]["tokens_per_s"] = made["validation"]["closed_form"]["tokens_per_s"] = number
            made["tokens_per_s"] = 10 - number
        found = Agreement.of(records, "closed_form")
        assert found is not None
        assert found.rank == pytest.approx(-1.0)

    def test_peaks_and_the_table(self, records: list[dict[str, Any]]) -> None:
        low, high = peak_ratios(records)["memory"]
        assert low == pytest.approx(2.0, rel=0.01)
        assert high == pytest.approx(2.0, rel=0.01)
        lines = table_of_policies(records).splitlines()
        assert lines[0].startswith("| model | disk | policy | prefill s | error |")
        assert sum(line.startswith("| tiny |") for line in lines) == 4
        assert any(line.startswith("Simulated: mean error of prefill 11.2%") for line in lines)
        assert lines[-1] == "The busiest lane of decode is the predicted one in 4 of 4 runs."


class TestCommand:
    @staticmethod
    def invoke(*arguments: str) -> Any:
        return CliRunner().invoke(cli.app, ["bench", *arguments], catch_exceptions=True)

    @pytest.fixture
    def profile(self, tmp_path: Path) -> Path:
        file = tmp_path / "machine.json"
        file.write_text(MACHINE.to_json())
        return file

    def test_it_measures_prints_and_goes_on(self, work_folder: Path, tmp_path: Path, profile: Path) -> None:
        out = tmp_path / "results.jsonl"
        options = ["--validate-plan", "--prompt-len", "8", "--new-tokens", "3", "--run-seconds", "0-30"]
        options += ["--hardware", str(profile), "--work-folder", str(work_folder), "--out", str(out)]
        options += ["--compression", "none", "--read-limit", "none"]
        first = self.invoke("tiny", *options, "--policies", "1")
        assert first.exit_code == 0, first.output
        again = self.invoke("tiny", *options, "--policies", "1")
        assert again.stdout == first.stdout
        [line] = out.read_text().splitlines()
        made = json.loads(line)
        assert made["status"] == "ok"
        assert made["peak_rss_bytes"] >= made["rss_before_bytes"] > 10 * MB
        assert made["validation"]["simulated"]["peak_bytes"][Tier.DISK] >= 0

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ("tiny --policies 3", "--policies belongs to --validate-plan"),
            ("tiny --grid", "--grid belongs to --validate-plan"),
            ("tiny --profile-every 3", "--profile-every belongs to --validate-plan"),
            ("tiny --validate-plan --profile-every 3", "--profile-every measures the machine, --hardware says what"),
            ("--prompt-len 8", "MODEL_OR_SHAPE is missing"),
            ("tiny --validate-plan --policy 0,0,0,100,0,100", "--policy says nothing to --validate-plan"),
            ("tiny --validate-plan --write-limit 1MB/s", "--write-limit says nothing to --validate-plan"),
            ("tiny --validate-plan --read-limit none,fast", "--read-limit: 'fast' is no size"),
            ("tiny --validate-plan --run-seconds 30-4", "--run-seconds: '30-4' is no range"),
            ("tiny --validate-plan --run-seconds soon", "--run-seconds: 'soon' is no range"),
            ("tiny --validate-plan --compression 5bit", "compression: '5bit' is unknown"),
            ("tiny --validate-plan --device emulated", "--device: the emulated device is no machine"),
            ("tiny --validate-plan --threads 1", "was measured with 2 threads, not with --threads 1"),
            ("tiny,tiny:2 --validate-plan --grid", "--grid is for one model and one --read-limit"),
            ("tiny --validate-plan --grid --read-limit none,1MB/s", "--grid is for one model and one --read-limit"),
            ("tiny --validate-plan --memory-limit 600MB", "--memory-limit: of 600 MB"),
            ("missing --validate-plan", "no model in 'missing'"),
        ],
    )
    def test_what_cannot_be_meant_is_refused(
        self, arguments: str, message: str, work_folder: Path, profile: Path
    ) -> None:
        given = [*arguments.split(), "--work-folder", str(work_folder)]
        if "--validate-plan" in arguments:
            given += ["--hardware", str(profile)]
        error = self.invoke(*given).exception
        assert isinstance(error, FlexGenError)
        assert message in str(error)

    def test_a_file_of_something_else_is_refused(self, tmp_path: Path) -> None:
        file = tmp_path / "out.jsonl"
        file.write_text("no JSON\n")
        with pytest.raises(FlexGenError, match="--out: cannot go on with"):
            known_records(file)

    def test_one_more_machine_may_be_limited(self) -> None:
        slow = MACHINE.with_disk_limit(10**6, None)
        assert slow.link(Lane.DISK_TO_HOST).best == 10**6
        assert slow.link(Lane.HOST_TO_DISK) == MACHINE.host_to_disk
        with pytest.raises(PolicyError, match="a limit of the disk"):
            MACHINE.with_disk_limit(0, None)
