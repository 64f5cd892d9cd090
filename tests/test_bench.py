"""The benchmark: workloads, limits, processes, the choice of a peer's best setting, and the command."""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from typer.testing import CliRunner

from flexgen_hf import CapacityError, Compression, FlexGenError, Policy, PolicyError, StoreError, Tier, cli
from flexgen_hf.bench import limits as limits_module
from flexgen_hf.bench import tables, worker
from flexgen_hf.bench.comparison import Peers, compare, equal_rows, jobs_of, summarize, table
from flexgen_hf.bench.limits import ControlGroup, Limits, drop_page_cache, why_not_permitted
from flexgen_hf.bench.quantized import quantized_store
from flexgen_hf.bench.shapes import SHAPES, config_of_shape, random_checkpoint, write_random_checkpoint
from flexgen_hf.bench.sizes import Size, parse_max_memory, parse_size, parse_sum, weights_bytes
from flexgen_hf.bench.systems import SYSTEMS, DeviceSpec, Job, load, share_in_memory
from flexgen_hf.bench.trial import Bench
from flexgen_hf.bench.workload import BenchWorkload
from flexgen_hf.planning.presets import preset

WORKLOAD = BenchWorkload(prompt_len=8, new_tokens=3, rows=4)
DISK = Policy.parse("0 0 0 100 0 100", batch_size=2, num_batches=2)
EMULATED = DeviceSpec("emulated:0", capacity_bytes=10 << 20, link_bytes_per_s=100e6)

TIMES = {"load_s", "prefill_s", "decode_s", "decode_sweep_s", "token_s", "tokens_per_s"}
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
RESULT = {"status", "peak_rss_bytes", "tokens_sha256", "row_sha256", "report", "threads"}
RESULT |= {"disk_read_bytes", "disk_write_bytes"}

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

    @pytest.mark.parametrize(
        ("name", "layers", "nbytes", "cache", "table"),
        [("opt-30b-like", 48, 1.223e9, 0.0127, 0.012), ("opt-175b-like", 96, 1.364e9, 0.0073, 0.0035)],
    )
    def test_a_likeness_has_the_proportions_of_the_large_one(
        self, name: str, layers: int, nbytes: float, cache: float, table: float
    ) -> None:
        from transformers import AutoModelForCausalLM

        config = config_of_shape(name)
        with torch.device("meta"):
            weights = AutoModelForCausalLM.from_config(config).num_parameters() * 2
        assert config.num_hidden_layers == layers
        assert weights == pytest.approx(nbytes, rel=0.01)
        per_token = 2 * layers * config.num_key_value_heads * config.head_dim * 2
        assert 544 * per_token / weights == pytest.approx(cache, rel=0.2)
        assert config.vocab_size * config.hidden_size * 2 / weights == pytest.approx(table, rel=0.05)

    def test_a_shape_may_have_fewer_layers(self, tmp_path: Path) -> None:
        whole, cut = config_of_shape("opt-1.3b"), config_of_shape("opt-1.3b:6")
        assert {**cut.to_dict(), "num_hidden_layers": 24} == whole.to_dict()
        assert cut.num_hidden_layers == 6
        assert weights_bytes(random_checkpoint(tmp_path, "tiny:2", torch.float16)) < weights_bytes(
            random_checkpoint(tmp_path, "tiny", torch.float16)
        )

    @pytest.mark.parametrize("name", ["tiny:0", "tiny:", "tiny:x", "tiny:-1"])
    def test_no_number_of_layers_is_refused(self, name: str) -> None:
        with pytest.raises(PolicyError, match=r"is no number of layers; write for example 'tiny:6'"):
            config_of_shape(name)

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

    @pytest.mark.parametrize(
        ("name", "dtype"),
        [
            ("tiny", torch.float16),
            ("tiny", torch.bfloat16),
            ("opt-30b-like:2", torch.float32),
            ("opt-175b-like:2", torch.float32),
        ],
    )
    def test_logits_are_finite_and_tokens_differ(self, tmp_path: Path, name: str, dtype: torch.dtype) -> None:
        from transformers import AutoModelForCausalLM

        model: Any = AutoModelForCausalLM.from_pretrained(random_checkpoint(tmp_path, name, dtype), dtype=dtype)
        prompts = BenchWorkload(16, 1, 8).prompts(model.config.vocab_size, 1)
        assert model(**prompts).logits.isfinite().all()
        tokens = model.generate(**prompts, max_new_tokens=8, do_sample=False, eos_token_id=None)[:, 16:]
        assert len({tuple(row.tolist()) for row in tokens}) == 8


class TestQuantizedStores:
    @pytest.fixture
    def model(self, job: Job) -> Path:
        return Path(job.model)

    def test_a_store_is_written_once(self, model: Path, tmp_path: Path) -> None:
        store = quantized_store(tmp_path, model, Compression(weights=4, cache=4))
        assert store.name.startswith(f"{model.name}-4bit-")
        written = [(file, file.stat().st_mtime_ns) for file in sorted(store.glob("*/*.safetensors"))]
        assert quantized_store(tmp_path, model, Compression(weights=4)) == store
        assert written == [(file, file.stat().st_mtime_ns) for file in sorted(store.glob("*/*.safetensors"))]

    def test_another_compression_or_checkpoint_is_another_store(self, model: Path, tmp_path: Path) -> None:
        asked = [
            Compression(weights=4),
            Compression(weights=4, group_size=32),
            Compression(weights=4, tables=8),
            Compression(weights=4, patterns={"*.fc2": 8}),
            Compression(weights=8),
        ]
        stores = [quantized_store(tmp_path, model, compression) for compression in asked]
        assert len(set(stores)) == len(asked)
        assert "-4bit-8bit-" in stores[2].name
        other = random_checkpoint(tmp_path, "tiny:2", torch.float16)
        copied = tmp_path / model.name
        copied.mkdir()
        for file in other.iterdir():
            (copied / file.name).write_bytes(file.read_bytes())
        assert quantized_store(tmp_path, copied, asked[0]) not in stores

    def test_an_interrupted_writing_is_finished(
        self, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from flexgen_hf.weights.quantized import Quantizing

        whole = quantized_store(tmp_path / "whole", model, Compression(weights=4))
        quantize, left = Quantizing.run, iter(range(5))

        def interrupted(self: Quantizing, *given: Any) -> Any:
            if next(left, None) is None:
                raise KeyboardInterrupt
            return quantize(self, *given)

        with monkeypatch.context() as patch:
            patch.setattr(Quantizing, "run", interrupted)
            with pytest.raises(KeyboardInterrupt):
                quantized_store(tmp_path, model, Compression(weights=4))
        store = quantized_store(tmp_path, model, Compression(weights=4))
        for file in whole.glob("*/*.safetensors"):
            assert (store / file.relative_to(whole)).read_bytes() == file.read_bytes()


class TestWorkload:
    def test_prompts_are_distinct_ragged_and_padded_on_the_left(self) -> None:
        prompts = BenchWorkload(16, 1, 20).prompts(vocab_size=128, pad_token=1)
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
        few, many = BenchWorkload(16, 1, 3).prompts(128, 1), BenchWorkload(16, 1, 9).prompts(128, 1)
        assert torch.equal(few["input_ids"], many["input_ids"][:3])
        assert not torch.equal(few["input_ids"], BenchWorkload(16, 1, 3, seed=1).prompts(128, 1)["input_ids"])

    def test_nothing_to_do_is_refused(self) -> None:
        with pytest.raises(PolicyError, match="new_tokens=0 must be at least 1"):
            BenchWorkload(8, 0, 1)


class TestSystems:
    def test_a_job_goes_through_json(self, job: Job) -> None:
        emulated = dataclasses.replace(job, device=EMULATED)
        assert Job.from_json(emulated.to_json()) == emulated

    def test_an_unknown_system_is_refused(self, job: Job) -> None:
        with pytest.raises(PolicyError, match="no system 'vllm'"), load(dataclasses.replace(job, system="vllm")):
            pass

    def test_every_system_writes_the_same_tokens_in_this_process(self, job: Job, tmp_path: Path) -> None:
        job = dataclasses.replace(job, offload_folder=str(tmp_path))
        records = {
            system: worker.run(dataclasses.replace(job, system=system, offload="mixed:0.5")) for system in SYSTEMS
        }
        assert {record["tokens_sha256"] for record in records.values()} == {records["flexgen"]["tokens_sha256"]}
        assert records["flexgen"]["disk_read_bytes"] > 0  # past the page cache, or never in it
        assert all(r["decode_sweep_s"] == statistics.median(r["token_s"][1:]) > 0 for r in records.values())
        report = records["flexgen-ram"]["report"]
        assert report["policy"]["batch_size"] == 2
        assert all(report["policy"][kind]["device"] == 1 for kind in ("weights", "cache", "hidden"))
        assert not report["lanes"]["disk_to_host"]["bytes"]

    def test_quantized_weights_are_those_that_transformers_gets_dequantized(self, job: Job, tmp_path: Path) -> None:
        compression = Compression(weights=4)
        store = quantized_store(tmp_path, Path(job.model), compression)
        flexgen = {**job.flexgen, "compression": compression.to_dict()}
        job = dataclasses.replace(job, offload_folder=str(tmp_path), store=str(store), flexgen=flexgen)
        records = [worker.run(dataclasses.replace(job, system=system)) for system in ("flexgen", "flexgen-ram")]
        assert all(record["report"]["dequantizations"]["tensors"] for record in records)
        with load(job) as model:
            model.save_pretrained(tmp_path / "dequantized")
        assert (
            records[0]["report"]["lanes"]["disk_to_host"]["bytes"]
            < 0.5
            * worker.run(dataclasses.replace(job, store=None, flexgen={"policy": DISK.to_dict()}))["report"]["lanes"][
                "disk_to_host"
            ]["bytes"]
        )
        expected = worker.run(dataclasses.replace(job, system="transformers", model=str(tmp_path / "dequantized")))
        assert {record["tokens_sha256"] for record in records} == {expected["tokens_sha256"]}
        plain = worker.run(dataclasses.replace(job, system="transformers"))
        assert plain["tokens_sha256"] != expected["tokens_sha256"]

    def test_kernels_are_there_before_the_measurement(self, job: Job, tmp_path: Path) -> None:
        modules = [
            pytest.importorskip(f"flexgen_hf.quantization.{name}")
            for name in ("kernels", "attention_kernels", "product_kernels")
        ]

        def compiled() -> dict[str, int]:
            """How often each kernel was compiled, or read from numba's cache."""
            found = (item for module in modules for item in vars(module).items())
            return {name: len(kernel.signatures) for name, kernel in found if hasattr(kernel, "signatures")}

        compression = Compression(weights=4, cache=4)
        flexgen = {**job.flexgen, "compression": compression.to_dict()}
        store = str(quantized_store(tmp_path, Path(job.model), compression))
        job = dataclasses.replace(job, offload_folder=str(tmp_path), store=store, flexgen=flexgen)
        worker._warm_up(job)
        before = compiled()
        assert all(before[name] for name in ("_rows_to_float32", "_quantize_float32", "_attend_row"))
        worker.run(job)
        assert compiled() == before

    def test_the_static_cache_is_one_and_is_not_compiled(self, job: Job) -> None:
        job = dataclasses.replace(job, system="transformers-static")
        assert job.generation["disable_compile"]
        with load(job) as model:
            prompts = WORKLOAD.prompts(128, 1)
            output = model.generate(**prompts, max_new_tokens=3, return_dict_in_generate=True, **job.generation)
        assert type(output.past_key_values).__name__ == "StaticCache"

    def test_threads_are_those_asked_for(self, job: Job) -> None:
        before = torch.get_num_threads()
        try:
            one = worker.run(dataclasses.replace(job, system="transformers", threads=1))
            two = worker.run(dataclasses.replace(job, system="transformers", threads=2))
        finally:
            torch.set_num_threads(before)
        assert (one["threads"], two["threads"]) == (1, 2)

    @pytest.mark.parametrize(
        ("offload", "homes"),
        [
            ("disk", ["disk"] * 4),
            ("cpu", ["cpu"] * 4),
            ("mixed:0.5", ["cpu", "cpu", "disk", "disk"]),
            ("mixed:0.6", ["cpu", "cpu", "disk", "disk"]),
            ("mixed:0.7", ["cpu", "cpu", "cpu", "disk"]),
        ],
    )
    def test_the_first_layers_are_in_memory(self, job: Job, offload: str, homes: list[str]) -> None:
        from flexgen_hf.bench.systems import _device_map

        found = _device_map(dataclasses.replace(job, system="accelerate", offload=offload))
        assert [home for name, home in found.items() if ".layers." in name] == homes

    @pytest.mark.parametrize("offload", ["mixed", "mixed:", "mixed:1.5", "mixed:nan", "ram", ""])
    def test_an_unknown_offload_is_refused(self, offload: str) -> None:
        with pytest.raises(PolicyError, match=r"is unknown; use disk, cpu, or for example mixed:0\.6"):
            share_in_memory(offload)


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


class TestSearch:
    """A peer's settings are tried with few new tokens; a fake says how long prefill and a sweep take in each."""

    SECONDS: ClassVar = {1: (0.1, 1.0), 2: (8.0, 0.5), 4: (100.0, 0.1)}  # by rows: prefill, sweep

    def run(self, job: Job) -> dict[str, Any]:
        prefill_s, sweep_s = self.SECONDS[job.workload.rows]
        tokens = job.workload.new_tokens
        decode_s = sweep_s * (tokens - 1)
        return {
            "system": job.system, "status": "ok", "dtype": job.dtype, "prefill_s": prefill_s, "decode_s": decode_s,
            "token_s": [prefill_s, *[sweep_s] * (tokens - 1)], "peak_rss_bytes": 5e6, "row_sha256": ["a"],
            "tokens_per_s": job.workload.tokens / (prefill_s + decode_s), "report": None,
            "workload": dataclasses.asdict(job.workload),
        }  # fmt: skip

    @staticmethod
    def jobs(job: Job, new_tokens: int) -> dict[str, list[Job]]:
        job = dataclasses.replace(job, workload=dataclasses.replace(WORKLOAD, new_tokens=new_tokens))
        return {"transformers": jobs_of("transformers", job, Peers((1, 2, 4), ("float32",)))}

    @pytest.mark.parametrize(("new_tokens", "rows"), [(5, 1), (20, 2), (5000, 4)])
    def test_the_best_one_by_projection_runs_whole(self, job: Job, new_tokens: int, rows: int) -> None:
        records = compare(self.jobs(job, new_tokens), 2, self.run, search_tokens=4)
        order = [(r["repeat"], r["workload"]["rows"], r["workload"]["new_tokens"]) for r in records]
        assert order == [(0, 1, 4), (0, 2, 4), (0, 4, 4), (1, rows, new_tokens), (2, rows, new_tokens)]
        [summary] = summarize(records)
        assert len(summary.records) == 2
        chosen = next(r for r in records if not r["repeat"] and r["workload"]["rows"] == rows)
        assert chosen["projected_tokens_per_s"] == pytest.approx(records[-1]["tokens_per_s"])
        assert table(records).count("not chosen") == 2

    def test_it_is_of_no_use_for_as_few_tokens(self, job: Job) -> None:
        records = compare(self.jobs(job, 4), 1, self.run, search_tokens=4)
        assert [record["repeat"] for record in records] == [1, 1, 1]

    def test_one_setting_needs_no_search(self, job: Job) -> None:
        records = compare({"flexgen": self.jobs(job, 8)["transformers"][:1]}, 1, self.run, search_tokens=4)
        assert [record["repeat"] for record in records] == [1]

    def test_the_next_best_runs_where_the_best_fails(self, job: Job) -> None:
        def run(job: Job) -> dict[str, Any]:
            if job.workload.rows == 2 and job.workload.new_tokens == 20:
                return {"system": job.system, "status": "error", "error": "killed"}
            return self.run(job)

        records = compare(self.jobs(job, 20), 2, run, search_tokens=4)
        assert [(r["repeat"], r["setting"][0], r["status"]) for r in records[3:]] == [
            (1, "2", "error"), (1, "1", "ok"), (2, "1", "ok"),
        ]  # fmt: skip

    def test_a_setting_that_fails_in_the_search_is_left_out(self, job: Job) -> None:
        failed = {"system": "transformers", "status": "error", "error": "killed"}
        records = compare(self.jobs(job, 20), 2, lambda _: failed, search_tokens=4)
        assert [record["repeat"] for record in records] == [0, 0, 0]
        assert table(records).count("killed") == 3


class TestTables:
    @staticmethod
    def record(system: str, speed: float, **fields: Any) -> dict[str, Any]:
        policy = Policy.parse("0 20 0 100 50 50", batch_size=4, num_batches=3, compression={"cache": 16})
        report = {
            "bottleneck": "compute", "share_of_limit": 0.5, "decode_bottleneck": "disk_to_host",
            "decode_share_of_limit": 0.987, "policy": policy.to_dict(),
        }  # fmt: skip
        is_ours = system.startswith("flexgen")
        return {
            "date": "2026-01-02T03:04:05+00:00", "command": "flexgen-hf bench tiny", "commit": "abc",
            "hardware": {"cpu": "a cpu", "cores": 2, "ram_bytes": 8 << 30, "system": "Linux"},
            "versions": {"torch": "2.13"}, "limits": {"memory_bytes": 3_000_000_000, "read_bytes_per_s": None},
            "device": {"name": "emulated:0", "capacity_bytes": 7_000_000, "link_bytes_per_s": 1e8},
            "system": system, "setting": "12 rows, float32" + ("" if is_ours else ", layers on disk"), "repeat": 1,
            "dtype": "float32", "workload": {"rows": 12, "new_tokens": 3}, "status": "ok", "tokens_per_s": speed,
            "prefill_s": 1.0, "decode_s": 4.0, "token_s": [1.0, 1.5, 2.5], "decode_sweep_s": 2.0,
            "peak_rss_bytes": 400e6, "disk_read_bytes": 300e6, "threads": 2, "report": report if is_ours else None,
            "device_use": {"to_device_bytes": 60e6, "peak_bytes": 5e6}, **fields,
        }  # fmt: skip

    @staticmethod
    def rows(text: str) -> list[dict[str, str]]:
        lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
        return [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]

    def test_it_has_medians_ratios_and_where_they_are_from(self) -> None:
        ours = [self.record("flexgen", speed, repeat=n) for n, speed in enumerate((4.0, 9.0, 6.0), 1)]
        text = tables.markdown([*ours, self.record("accelerate", 2.0), self.record("transformers", 3.0)])
        lines = text.splitlines()
        assert lines[0] == "`flexgen-hf bench tiny`"
        assert lines[2] == (
            "2026-01-02, commit abc; 2 cores of a cpu, 2 threads, 8 GiB RAM, memory limit 3000 MB, device emulated:0, "
            "device memory 7 MB, link 100 MB/s, torch 2.13"
        )
        flexgen, accelerate, _ = self.rows(text)
        assert flexgen == {
            "system": "flexgen", "setting": "float32, 0 20 0 100 50 50, cache 16 bit", "block": "4 x 3", "runs": "3",
            "token/s": "6.000", "prefill s": "1.00", "sweep s": "2.000", "to device MB/sweep": "20.0",
            "disk read MB/sweep": "100.0", "process MB": "400.0", "device MB": "5.0",
            "limit in decode": "disk_to_host 99%", "x best peer": "2.00",
        }  # fmt: skip
        assert (accelerate["setting"], accelerate["block"]) == ("float32, layers on disk", "12")
        assert (accelerate["limit in decode"], accelerate["x best peer"]) == ("-", "0.67")

    def test_another_command_or_commit_is_another_table(self) -> None:
        others = [{"command": "another"}, {"commit": "def"}, {"date": "2026-01-05T00:00:00+00:00"}]
        records = [self.record("flexgen", 1.0, **fields) for fields in ({}, *others)]
        text = tables.markdown(records)
        assert text.count("`flexgen-hf bench tiny`") == 2
        assert text.count("`another`") == 1
        assert "2026-01-02 to 2026-01-05, commit abc" in text

    def test_reads_are_compared_with_their_limit(self) -> None:
        ours = self.record("flexgen", 1.0, decode_s=10.0)
        ours["limits"] = {**ours["limits"], "read_bytes_per_s": 50_000_000}
        ours["report"]["decode_lanes"] = {"disk_to_host": {"busy_s": 4.0, "idle_s": 6.0, "bytes": 480_000_000}}
        assert self.rows(tables.markdown([ours]))[0]["of the read limit"] == "96%"
        assert "96% of the disk's read limit used in decode" in table([ours])

    def test_older_records_are_read(self) -> None:
        old = self.record("flexgen", 1.0)
        for name in ("decode_sweep_s", "disk_read_bytes", "threads", "device_use"):
            del old[name]
        for name in ("decode_bottleneck", "decode_share_of_limit"):
            del old["report"][name]
        [row] = self.rows(tables.markdown([old]))
        assert (row["sweep s"], row["limit in decode"]) == ("2.000", "compute 50%")
        assert "device MB" not in row

    def test_failed_and_shortened_runs_are_no_rows(self) -> None:
        failed = {"status": "error", "error": "killed", "setting": "9 rows, float32"}
        searched = self.record("transformers", 99.0, repeat=0, projected_tokens_per_s=99.0)
        text = tables.markdown([self.record("flexgen", 1.0), searched, self.record("accelerate", 0.0, **failed)])
        assert [row["system"] for row in self.rows(text)] == ["flexgen"]
        assert text.splitlines()[-1] == "- accelerate (9 rows, float32): killed"

    def test_it_runs_as_a_module(self, tmp_path: Path) -> None:
        file = tmp_path / "out.jsonl"
        file.write_text(json.dumps(self.record("flexgen", 1.0)) + "\n\n")
        command = [sys.executable, "-m", "flexgen_hf.bench.tables"]
        done = subprocess.run([*command, str(file)], capture_output=True, text=True, check=True)
        assert done.stdout == tables.markdown([self.record("flexgen", 1.0)]) + "\n"

    @pytest.mark.parametrize(
        ("text", "message"), [("nonsense", "line 1: not JSON"), ("{}", "'command' is missing"), ("3", "is missing")]
    )
    def test_what_is_no_record_is_refused(self, tmp_path: Path, text: str, message: str) -> None:
        (tmp_path / "out.jsonl").write_text(text)
        with pytest.raises(FlexGenError, match=message):
            list(tables.read_records([tmp_path / "out.jsonl"]))
        with pytest.raises(FlexGenError, match="cannot read"):
            list(tables.read_records([tmp_path / "missing.jsonl"]))


class TestSizes:
    @pytest.mark.parametrize(
        ("text", "size"), [("3000MB", 3_000_000_000), ("700MiB", 700 << 20), ("100MB/s", 10**8), ("1.5 GiB", 3 << 29)]
    )
    def test_bytes(self, text: str, size: int) -> None:
        assert parse_size(text, "--link") == size

    @pytest.mark.parametrize(
        ("text", "size"),
        [
            ("600MB", Size(600_000_000)),
            ("0.29w", Size(0, 0.29)),
            ("3.7w+600MB", Size(600_000_000, 3.7)),
            ("1MB + 2w + 1MiB", Size(1_000_000 + (1 << 20), 2.0)),
        ],
    )
    def test_sums(self, text: str, size: Size) -> None:
        assert parse_sum(text, "--memory-limit") == size

    @pytest.mark.parametrize("text", ["", "w", "0w", "much", "3w+", "-1MB", "2w*3", "0MB"])
    def test_what_is_no_sum_is_refused(self, text: str) -> None:
        with pytest.raises(PolicyError, match=r"--device-memory: .* is no size; write for example '700MB', '0.29w'"):
            parse_sum(text, "--device-memory")

    def test_shares_are_of_the_weights(self, job: Job) -> None:
        from safetensors.torch import load_file

        model = Path(job.model)
        stored = sum(tensor.nbytes for tensor in load_file(model / "model.safetensors").values())
        assert weights_bytes(model) == stored
        assert Size(100, 0.5).of(model) == 100 + stored // 2

    def test_shards_count_together(self, job: Job, tmp_path: Path) -> None:
        from transformers import AutoModelForCausalLM

        AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float16).save_pretrained(
            tmp_path, max_shard_size="100KB"
        )
        assert (tmp_path / "model.safetensors.index.json").is_file()
        assert weights_bytes(tmp_path) == weights_bytes(Path(job.model))

    def test_bytes_need_no_weights(self, tmp_path: Path) -> None:
        assert Size(100).of(tmp_path) == 100
        with pytest.raises(StoreError, match="has no safetensors file, so a share of its weights is not known"):
            Size(100, 0.5).of(tmp_path)

    def test_max_memory(self) -> None:
        expected = {"cpu": Size(2_300_000_000), "0": Size(0, 0.29), "disk": Size(20_000_000_000)}
        assert parse_max_memory("cpu=2300MB, 0=0.29w,disk=20GB", "--max-memory") == expected
        assert parse_max_memory(None, "--max-memory") == {}

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("cpu", "'cpu' is not TIER=SIZE with a tier of 0, device, cpu, host, disk"),
            ("gpu=3GB", "'gpu=3GB' is not TIER=SIZE"),
            ("cpu=much", "'much' in 'much' is no size"),
            ("cpu=1GB,cpu=2GB", "'cpu' is named twice"),
        ],
    )
    def test_what_is_no_max_memory_is_refused(self, text: str, message: str) -> None:
        with pytest.raises(PolicyError, match=message):
            parse_max_memory(text, "--max-memory")


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
            (
                "tiny --systems flexgen,vllm",
                "--systems: 'vllm' is unknown; use some of flexgen, flexgen-ram, accelerate",
            ),
            ("tiny --link 1MB/s", "--link is the emulated device's; add --device emulated"),
            ("tiny --memory-limit much", "--memory-limit: 'much' in 'much' is no size"),
            ("tiny --read-limit 1w", "--read-limit: '1w' is no size"),
            ("tiny --device emulated --device-memory 1x", "--device-memory: '1x' in '1x' is no size"),
            ("tiny --max-memory cpu", "--max-memory: 'cpu' is not TIER=SIZE"),
            ("tiny --compression 5bit", "compression: '5bit' is unknown"),
            ("tiny --peer-offloads disk,ram", "--peer-offloads: 'ram' is unknown"),
            ("tiny --policy auto --device emulated", "--policy auto: the emulated device is no machine"),
            ("tiny --hardware machine.json", "--hardware belongs to --validate-plan"),
            ("tiny:x", "'x' is no number of layers"),
            ("tiny --peer-batch-sizes 8,x", "--peer-batch-sizes: '8,x' is no list of whole numbers"),
            ("tiny --peer-dtypes ,", "--peer-dtypes: nothing is named"),
            ("./missing", "no model in './missing'; give a folder"),
        ],
    )
    def test_what_cannot_be_meant_is_refused(self, arguments: str, message: str, tmp_path: Path) -> None:
        result = self.invoke(*arguments.split(), "--work-folder", str(tmp_path))
        assert message in str(result.exception)

    def test_options_reach_the_runs(self, work_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        seen: dict[str, Any] = {}

        def compare(jobs: Any, repeats: int, run: Any, _tell: Any, search_tokens: int | None) -> list[Any]:
            seen.update(jobs=jobs, limits=run.__self__.limits, search_tokens=search_tokens)
            return []

        monkeypatch.setattr("flexgen_hf.bench.comparison.compare", compare)
        self.invoke(
            *"tiny:2 --systems flexgen,accelerate --device emulated --device-memory 0.5w --link 1MB/s".split(),
            *"--max-memory cpu=2w+1MB,0=0.25w --host-attention --batch-size 3 --threads 2 --compression 4bit".split(),
            *"--memory-limit 2w+600MB --read-limit 5MB/s --peer-offloads mixed:0.5,disk --peer-new-tokens 4".split(),
            *["--policy", "0 0 0 100 0 100", "--work-folder", str(work_folder)],
        )
        [ours], peers = seen["jobs"]["flexgen"], seen["jobs"]["accelerate"]
        weights = weights_bytes(Path(ours.model))
        assert ours.device == DeviceSpec("emulated:0", weights // 2, 1_000_000)
        assert ours.flexgen["max_memory"] == {"cpu": 2 * weights + 1_000_000, "0": weights // 4}
        assert ours.flexgen["compression"] == Compression(weights=4, cache=4).to_dict()
        assert ours.setting == "3 rows, float32, weights 4 bit, cache 4 bit"
        assert ours.folder == str(quantized_store(work_folder, Path(ours.model), Compression(weights=4)))
        assert {(job.folder, job.setting.count("bit")) for job in peers} == {(ours.model, 0)}
        assert ours.flexgen["policy"]["host_attention"]
        assert seen["limits"] == Limits(2 * weights + 600_000_000, 5_000_000)
        assert seen["search_tokens"] == 4
        assert [job.offload for job in peers] == ["mixed:0.5", "disk"]
        assert {job.threads for job in (ours, *peers)} == {2}

    @pytest.mark.parametrize(
        ("arguments", "asked", "has_store"),
        [
            (["--systems", "transformers", "--compression", "4bit"], {"weights": 4, "cache": 4}, False),
            (["--systems", "flexgen-ram", "--compression", '{"cache": 16}'], {"cache": 16}, False),
            (["--systems", "flexgen", "--policy", '{"compression": {"weights": 8}}'], {"weights": 8}, True),
            (["--systems", "flexgen", "--policy", '{"compression": "4bit"}', "--compression", "{}"], {}, False),
        ],
    )
    def test_a_store_is_made_where_weights_are_to_be_quantized(
        self, arguments: list[str], asked: Any, has_store: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen: list[Job] = []

        def seen_jobs(jobs: Any, *_: Any) -> list[Any]:
            seen.extend(*jobs.values())
            return []

        monkeypatch.setattr("flexgen_hf.bench.comparison.compare", seen_jobs)
        self.invoke("tiny:1", *arguments, "--work-folder", str(tmp_path))
        assert Compression.of(seen[0].flexgen.get("compression")) == Compression(**asked)
        assert len(list((tmp_path / "checkpoints").iterdir())) == 1 + has_store
        assert (seen[0].store is not None) == has_store

    @pytest.mark.parametrize(("memory", "is_on_disk"), [("cpu=1GB", False), ("cpu=600kB", True)])
    def test_the_planner_finds_a_policy_for_the_limits(
        self, memory: str, is_on_disk: bool, work_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        profile, seen = tmp_path / "machine.json", dict[str, Any]()
        profile.write_text(preset("cpu2").to_json())

        def compare(jobs: Any, _repeats: int, run: Any, *_: Any) -> list[Any]:
            seen.update(jobs=jobs, context=run.__self__.context)
            return []

        monkeypatch.setattr("flexgen_hf.bench.comparison.compare", compare)
        self.invoke(
            *"tiny --policy auto --rows 5 --prompt-len 8 --new-tokens 3 --systems flexgen,accelerate".split(),
            *["--hardware", str(profile), "--max-memory", memory, "--work-folder", str(work_folder)],
        )
        [ours], [peer] = seen["jobs"]["flexgen"], seen["jobs"]["accelerate"]
        policy = Policy.from_dict(ours.flexgen["policy"])
        assert (policy.weights.share(Tier.DISK) > 0) == is_on_disk
        assert seen["context"]["plan"]["policy"] == ours.flexgen["policy"]
        assert ours.workload.rows == 5
        assert peer.workload.rows == min(5, policy.block_size)

    def test_the_help_names_every_shape(self) -> None:
        text = " ".join(self.invoke("--help").output.split())
        assert all(name in text for name in SHAPES)
