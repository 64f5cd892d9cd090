"""The benchmark: workloads, limits, processes, the choice of a peer's best setting, and the command."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from flexgen_hf import CapacityError, Policy, PolicyError, cli
from flexgen_hf.bench import limits as limits_module
from flexgen_hf.bench.command import parse_size
from flexgen_hf.bench.comparison import Peers, compare, equal_rows, jobs_of, summarize, table
from flexgen_hf.bench.limits import ControlGroup, Limits, drop_page_cache, why_not_permitted
from flexgen_hf.bench.shapes import SHAPES, config_of_shape, random_checkpoint, write_random_checkpoint
from flexgen_hf.bench.systems import DeviceSpec, Job, load
from flexgen_hf.bench.trial import Bench
from flexgen_hf.bench.workload import Workload

WORKLOAD = Workload(prompt_len=8, new_tokens=3, rows=4)
DISK = Policy.parse("0 0 0 100 0 100", batch_size=2, num_batches=2)
EMULATED = DeviceSpec("emulated:0", capacity_bytes=10 << 20, link_bytes_per_s=100e6)

TIMES = {"load_s", "prefill_s", "decode_s", "token_s", "tokens_per_s"}
WHERE = {
    "date",
    "command",
    "commit",
    "hardware",
    "versions",
    "limits",
    "device",
    "model",
    "workload",
    "dtype",
    "system",
}
RESULT = {"status", "peak_rss_bytes", "tokens_sha256", "row_sha256", "report"}

needs_groups = pytest.mark.skipif(why_not_permitted() is not None, reason=f"limits: {why_not_permitted()}")


@pytest.fixture(scope="module")
def work_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bench")


@pytest.fixture(scope="module")
def job(work_folder: Path) -> Job:
    model = random_checkpoint(work_folder, "tiny", torch.float16)
    return Job("flexgen", str(model), WORKLOAD, "float32", str(work_folder), flexgen={"policy": DISK.to_dict()})


def bench(work_folder: Path, **options: Any) -> Bench:
    return Bench(work_folder, **{"limits": Limits(), "context": {"command": "a test"}, **options})


class TestShapes:
    @pytest.mark.parametrize(
        ("name", "parameters"),
        [("opt-125m", 125e6), ("opt-350m", 331e6), ("opt-1.3b", 1.3e9), ("opt-30b", 30e9), ("opt-175b", 175e9)],
    )
    def test_a_shape_has_as_many_parameters_as_its_name_says(self, name: str, parameters: float) -> None:
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config_of_shape(name))
        assert model.num_parameters() == pytest.approx(parameters, rel=0.02)

    def test_an_unknown_shape_is_refused(self) -> None:
        with pytest.raises(PolicyError, match="no shape 'opt-7b'; known are tiny, opt-125m"):
            config_of_shape("opt-7b")

    def test_a_checkpoint_is_written_once(self, tmp_path: Path) -> None:
        first = random_checkpoint(tmp_path, "tiny", torch.float16)
        written = (first / "model.safetensors").stat()
        assert random_checkpoint(tmp_path, "tiny", torch.float16) == first
        assert (first / "model.safetensors").stat() == written
        assert random_checkpoint(tmp_path, "tiny", torch.float32) != first
        assert [path.name for path in first.parent.iterdir() if path.name.startswith(".")] == []

    def test_an_interrupted_writing_leaves_nothing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def interrupted(*_: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr("flexgen_hf.bench.shapes.random_pieces", interrupted)
        with pytest.raises(KeyboardInterrupt):
            random_checkpoint(tmp_path, "tiny", torch.float16)
        assert list((tmp_path / "checkpoints").iterdir()) == []

    def test_a_full_disk_is_refused_before_writing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
        with pytest.raises(CapacityError, match="GB free but the checkpoint takes"):
            write_random_checkpoint(tmp_path, config_of_shape("tiny"), torch.float16)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_logits_are_finite_and_tokens_differ(self, tmp_path: Path, dtype: torch.dtype) -> None:
        from transformers import AutoModelForCausalLM

        model: Any = AutoModelForCausalLM.from_pretrained(random_checkpoint(tmp_path, "tiny", dtype), dtype=dtype)
        prompts = Workload(16, 1, 8).prompts(128, 1)
        assert model(**prompts).logits.isfinite().all()
        tokens = model.generate(**prompts, max_new_tokens=8, do_sample=False, eos_token_id=None)[:, 16:]
        assert len({tuple(row.tolist()) for row in tokens}) == 8


class TestWorkload:
    def test_prompts_are_distinct_ragged_and_padded_on_the_left(self) -> None:
        prompts = Workload(16, 1, 20).prompts(vocab_size=128, pad_token=1)
        ids, mask = prompts["input_ids"], prompts["attention_mask"]
        assert ids.shape == mask.shape == (20, 16)
        lengths = mask.sum(1)
        assert lengths[0] == 16
        assert lengths.min() >= 8
        assert len(set(lengths.tolist())) > 3
        assert (mask.diff(dim=1) >= 0).all()
        assert (ids[mask == 0] == 1).all()
        assert (ids[mask == 1] >= 4).all()
        assert len({tuple(row.tolist()) for row in ids}) == 20

    def test_a_row_does_not_depend_on_how_many_there_are(self) -> None:
        few, many = Workload(16, 1, 3).prompts(128, 1), Workload(16, 1, 9).prompts(128, 1)
        assert torch.equal(few["input_ids"], many["input_ids"][:3])
        assert not torch.equal(few["input_ids"], Workload(16, 1, 3, seed=1).prompts(128, 1)["input_ids"])

    def test_nothing_to_do_is_refused(self) -> None:
        with pytest.raises(PolicyError, match="new_tokens=0 must be at least 1"):
            Workload(8, 0, 1)


class TestSystems:
    def test_a_job_goes_through_json(self, job: Job) -> None:
        emulated = dataclasses.replace(job, device=EMULATED)
        assert Job.from_json(emulated.to_json()) == emulated

    def test_an_unknown_system_is_refused(self, job: Job) -> None:
        with pytest.raises(PolicyError, match="no system 'vllm'"), load(dataclasses.replace(job, system="vllm")):
            pass


@pytest.mark.slow
@pytest.mark.parametrize("device", [DeviceSpec(), EMULATED], ids=["cpu", "emulated"])
def test_all_systems_write_the_same_tokens(job: Job, work_folder: Path, device: DeviceSpec) -> None:
    peers = Peers((4,), ("float32",), ("disk", "cpu") if device.is_emulated else ("disk",))
    job = dataclasses.replace(job, device=device)
    jobs = [each for system in ("flexgen", "accelerate", "transformers") for each in jobs_of(system, job, peers)]
    records: list[dict[str, Any]] = [
        {"setting": each.setting, "repeat": 1} | bench(work_folder).run(each) for each in jobs
    ]
    for record in records:
        assert record["status"] == "ok", record
        assert json.loads(json.dumps(record)) == record
        assert not (TIMES | WHERE | RESULT) - set(record)
        assert record["tokens_sha256"] == records[0]["tokens_sha256"]
        assert equal_rows(record, records[0]) == (4, 4)
        assert len(record["token_s"]) == 3
        assert sum(record["token_s"]) == pytest.approx(record["prefill_s"] + record["decode_s"])
        assert record["tokens_per_s"] == pytest.approx(12 / sum(record["token_s"]))
        assert record["peak_rss_bytes"] > 50e6
    assert len(set(records[0]["row_sha256"])) == 4
    assert records[0]["report"]["lanes"]["disk_to_host"]["bytes"] > 0
    assert not list(work_folder.glob("offload-*"))
    if device.is_emulated:
        ours, by_disk, by_cpu, whole = (record["device_use"] for record in records)
        assert whole["to_device_bytes"] < by_disk["to_device_bytes"] < by_cpu["to_device_bytes"]
        assert 0 < ours["to_device_bytes"] < by_cpu["to_device_bytes"]
        assert ours["peak_bytes"] < whole["peak_bytes"]
    shown = table(records)
    assert "accelerate (4 rows, float32, layers on disk): the same tokens as flexgen in 4 of 4 rows" in shown


class TestErrorsOfARun:
    def test_an_error_of_the_system_is_a_record(self, job: Job, work_folder: Path) -> None:
        broken = dataclasses.replace(job, device=DeviceSpec("emulated:0", capacity_bytes=1000))
        record = bench(work_folder).run(broken)
        assert record["status"] == "error"
        assert record["error_type"] == "CapacityError"
        assert "emulated device" in record["error"]

    def test_a_process_that_cannot_start_says_why(self, job: Job, work_folder: Path, monkeypatch: Any) -> None:
        monkeypatch.setattr(sys, "executable", "/bin/false")
        assert bench(work_folder).run(job)["error"].startswith("exit code 1")

    def test_a_run_that_takes_too_long_is_given_up(self, job: Job, work_folder: Path) -> None:
        assert bench(work_folder, timeout_s=0.1).run(job)["error"] == "took longer than 0.1 s"

    def test_the_table_lists_it(self, job: Job) -> None:
        records = compare({"flexgen": [job]}, 3, lambda _: {"system": "flexgen", "status": "error", "error": "no disk"})
        assert len(records) == 1  # what failed is not repeated
        assert "flexgen (4 rows, float32): no disk" in table(records)


class TestComparison:
    """With a fake in place of processes: the speed of each job is a function of its settings."""

    @staticmethod
    def run(job: Job) -> dict[str, Any]:
        speed = {"flexgen": 10.0, "transformers": 1.0}.get(job.system, job.workload.rows / len(job.dtype))
        return {
            "system": job.system, "status": "ok", "dtype": job.dtype, "tokens_per_s": speed, "prefill_s": 1.0,
            "decode_s": 4.0, "token_s": [1.0, 2.0, 2.0], "peak_rss_bytes": 5e6, "row_sha256": ["a", "b"],
            "report": {"bottleneck": "compute", "share_of_limit": 0.5},
        }  # fmt: skip

    def test_the_best_setting_of_a_peer_is_repeated(self, job: Job) -> None:
        peers = Peers((1, 9), ("float16", "bfloat16"))
        jobs = {system: jobs_of(system, job, peers) for system in ("flexgen", "accelerate")}
        assert [len(tried) for tried in jobs.values()] == [1, 4]
        records = compare(jobs, 3, self.run)
        order = [(r["repeat"], r["system"], r["setting"]) for r in records]
        best = "9 rows, float16, layers on disk"
        assert len(order) == 1 + 4 + 2 + 2
        assert order[5:] == [
            (2, "flexgen", "4 rows, float32"), (2, "accelerate", best),
            (3, "flexgen", "4 rows, float32"), (3, "accelerate", best),
        ]  # fmt: skip
        summaries = {(s.system, s.setting): s for s in summarize(records)}
        assert len(summaries["accelerate", best].records) == 3
        assert summaries["flexgen", "4 rows, float32"].sweep_s == 2.0

    def test_the_table_has_ratios_to_each_peer_at_its_best(self, job: Job) -> None:
        jobs = {s: jobs_of(s, job, Peers((16, 8), ("float16",))) for s in ("flexgen", "accelerate", "transformers")}
        lines = table(compare(jobs, 1, self.run)).splitlines()
        assert lines[0].split()[-4:] == ["x", "transformers", "x", "accelerate"]
        assert lines[1].split()[-2:] == ["10.00", f"{10 / (16 / 7):.2f}"]
        assert lines[-1] == "flexgen: compute busy 50% of the time in sweeps"  # in 16 bit tokens are not compared

    def test_each_record_is_told_at_once(self, job: Job) -> None:
        told: list[str] = []
        compare({"flexgen": [job], "transformers": [job]}, 1, self.run, lambda record: told.append(record["system"]))
        assert told == ["flexgen", "flexgen"]


class TestLimits:
    def test_they_are_refused_where_they_cannot_be_set(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("os.geteuid", lambda: 1000)
        with pytest.raises(CapacityError, match="only root may make control groups; run as root, or leave the limits"):
            ControlGroup(Limits(memory_bytes=1))

    def test_version_2_is_refused(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr("os.geteuid", lambda: 0)
        monkeypatch.setattr(limits_module, "_CGROUPS", tmp_path)
        with pytest.raises(CapacityError, match="no memory controller of version 1"):
            ControlGroup(Limits(memory_bytes=1))

    def test_no_limit_is_false(self) -> None:
        assert not Limits()
        assert Limits(read_bytes_per_s=1)

    def test_dropping_the_cache_leaves_the_files(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_bytes(bytes(10_000))
        drop_page_cache([tmp_path])
        assert (tmp_path / "file").read_bytes() == bytes(10_000)

    @needs_groups
    @pytest.mark.limits
    def test_too_much_memory_is_killed_and_said(self, tmp_path: Path) -> None:
        with ControlGroup(Limits(memory_bytes=50_000_000), [tmp_path]) as group:
            command = group.command([sys.executable, "-c", "x = b'x' * 200_000_000"])
            assert subprocess.run(command, check=False).returncode == -9
            assert group.out_of_memory_kills == 1
            assert group.peak_bytes <= 50_000_000
        assert not list(Path("/sys/fs/cgroup").glob(f"*/flexgen-bench-{os.getpid()}-*"))

    @needs_groups
    @pytest.mark.limits
    def test_reads_take_their_time(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_bytes(bytes(4_000_000))
        drop_page_cache([tmp_path])
        code = f"import time; t = time.time(); open({str(tmp_path / 'file')!r}, 'rb').read(); print(time.time() - t)"
        with ControlGroup(Limits(read_bytes_per_s=8_000_000), [tmp_path]) as group:
            done = subprocess.run(group.command([sys.executable, "-c", code]), check=True, capture_output=True)
        assert float(done.stdout) > 0.25

    @needs_groups
    @pytest.mark.limits
    def test_groups_are_removed_when_a_limit_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(CapacityError, match="does not take '-7'"), ControlGroup(Limits(memory_bytes=-7), []):
            pass
        assert not list(Path("/sys/fs/cgroup").glob(f"*/flexgen-bench-{os.getpid()}-*"))

    @needs_groups
    @pytest.mark.limits
    @pytest.mark.slow
    def test_a_killed_run_names_the_limit(self, job: Job, work_folder: Path) -> None:
        record = bench(work_folder, limits=Limits(memory_bytes=60_000_000)).run(job)
        assert record["error"] == "killed: needs more than the memory limit of 60 MB"
        assert record["group_peak_bytes"] <= 60_000_000
        assert not list(Path("/sys/fs/cgroup").glob(f"*/flexgen-bench-{os.getpid()}-*"))


class TestCommand:
    @staticmethod
    def invoke(*arguments: str) -> Any:
        return CliRunner().invoke(cli.app, ["bench", *arguments], catch_exceptions=True)

    @pytest.mark.slow
    def test_it_prints_a_table_and_appends_json_lines(self, work_folder: Path, tmp_path: Path) -> None:
        out = tmp_path / "results.jsonl"
        out.write_text("{}\n")
        result = self.invoke(
            *"tiny --systems flexgen,transformers --prompt-len 8 --new-tokens 3 --batch-size 2 --num-batches 2".split(),
            *["--policy", "0 0 0 100 0 100", "--repeats", "1", "--peer-batch-sizes", "4,2"],
            *["--work-folder", str(work_folder), "--out", str(out)],
        )
        assert result.exit_code == 0, result.output
        assert result.stdout.splitlines()[0].split()[:4] == ["system", "setting", "runs", "token/s"]
        records = [json.loads(line) for line in out.read_text().splitlines()[1:]]
        assert [record["system"] for record in records[:3]] == ["flexgen", "transformers", "transformers"]
        assert len(records) == 3
        assert all(record["command"].startswith("flexgen-hf") for record in records)
        assert {record["tokens_sha256"] for record in records if record["workload"]["rows"] == 4} == {
            records[0]["tokens_sha256"]
        }

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ("tiny --systems flexgen,vllm", "--systems: 'vllm' is unknown; use some of flexgen, accelerate"),
            ("tiny --link 1MB/s", "--link is the emulated device's; add --device emulated"),
            ("tiny --memory-limit much", "--memory-limit: 'much' is no size"),
            ("tiny --peer-batch-sizes 8,x", "--peer-batch-sizes: '8,x' is no list of whole numbers"),
            ("tiny --peer-dtypes ,", "--peer-dtypes: nothing is named"),
            ("./missing", "no model in './missing'; give a folder"),
        ],
    )
    def test_what_cannot_be_meant_is_refused(self, arguments: str, message: str, tmp_path: Path) -> None:
        result = self.invoke(*arguments.split(), "--work-folder", str(tmp_path))
        assert message in str(result.exception)

    @pytest.mark.parametrize(
        ("text", "size"), [("3000MB", 3_000_000_000), ("700MiB", 700 << 20), ("100MB/s", 10**8), ("1.5 GiB", 3 << 29)]
    )
    def test_sizes(self, text: str, size: int) -> None:
        assert parse_size(text, "--link") == size

    def test_the_help_names_every_shape(self) -> None:
        text = " ".join(self.invoke("--help").output.split())
        assert all(name in text for name in SHAPES)
