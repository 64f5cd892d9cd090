"""A benchmark from HELM's descriptions of runs to the files that `helm-summarize` and HELM's server read."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...errors import FlexGenError, PolicyError
from .executing import CLIENT, batch_runner, release, require_helm

__all__ = ["HelmJob", "HelmReport", "HelmRun", "run"]


@dataclasses.dataclass(frozen=True)
class HelmJob:
    """What is to be run, and with what.

    Args:
        descriptions: HELM's run entries, such as `mmlu:model=text,subject=anatomy`. A `model` without a slash, or none,
            stands for this one.
        model: Hub id, model folder, store or GGUF file.
        options: how it is loaded and how it answers, as `engine_of` takes them: JSON, because HELM keeps them with the
            deployment.
        name: the model's name in HELM, `CREATOR/NAME`; by default the Hub id, or `local/FOLDER` (where HELM's files say
            `huggingface/`, `helm-summarize` looks for the model on the Hub).
        max_eval_instances: of each scenario, at most.
        num_train_trials: draws of few-shot examples; None leaves it to the scenario.
        max_sequence_length: tokens of prompt and completion into which HELM fits prompts, by fewer examples first; None
            for the model's context.
        suite: folder of the runs in the output.
        output_path: HELM's `benchmark_output`.
        local_path: HELM's folder of configurations and credentials.
        dry_run: make requests, and answer none.
        skip_completed_runs: leave out runs all of whose files are there.
    """

    descriptions: tuple[str, ...]
    model: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    name: str | None = None
    max_eval_instances: int = 1000
    num_train_trials: int | None = None
    max_sequence_length: int | None = None
    suite: str = "default"
    output_path: Path = Path("benchmark_output")
    local_path: Path = Path("prod_env")
    dry_run: bool = False
    skip_completed_runs: bool = False

    def __post_init__(self) -> None:
        if not self.descriptions:
            raise PolicyError("no description of a run; give for example 'mmlu:model=text,subject=anatomy'")
        if self.name is not None and self.name.count("/") != 1:
            raise PolicyError(f"name={self.name!r}: HELM's names of models are CREATOR/NAME")
        if self.max_eval_instances < 1:
            raise PolicyError(f"max_eval_instances={self.max_eval_instances}: give a number above 0")

    @property
    def helm_name(self) -> str:
        """The model's name in HELM."""
        if self.name is not None:
            return self.name
        path = Path(self.model).expanduser()
        is_id = not path.exists() and self.model.count("/") == 1
        return self.model if is_id else f"local/{path.stem if path.is_file() else path.resolve().name}"


@dataclasses.dataclass(frozen=True)
class HelmRun:
    """What came of a run.

    Args:
        name: HELM's.
        path: of its files.
        seconds: that it took, scenario and metrics included.
        requests: that were answered.
        metric: the scenario's main one and its value over all instances as they are; None if it has none.
    """

    name: str
    path: Path
    seconds: float
    requests: int = 0
    metric: tuple[str, float] | None = None

    def __str__(self) -> str:
        metric = f", {self.metric[0]} {self.metric[1]:.4g}" if self.metric else ""
        return f"{self.name}: {self.requests} requests in {self.seconds:.1f} s{metric}; {self.path}"


@dataclasses.dataclass(frozen=True)
class HelmReport:
    """What a job did.

    Args:
        runs: in the order in which they were run.
    """

    runs: tuple[HelmRun, ...]

    def __str__(self) -> str:
        return "\n".join(map(str, self.runs))


def run(job: HelmJob, *, show_progress: bool = False) -> HelmReport:
    """Runs scenarios with HELM's own runner, adapters and metrics, and all requests of each in one call of the engine.

    Args:
        job: what is to be run.
        show_progress: a bar of requests on stderr.

    Raises:
        StoreError: HELM is not installed.
        PolicyError: a description that HELM does not know.
        FlexGenError: runs that failed; those before and after them are written all the same.
    """
    require_helm()
    from helm.benchmark.executor import ExecutionSpec
    from helm.common.authentication import Authentication

    specs = _specs(job)
    execution = ExecutionSpec(
        auth=Authentication(""), url=None, local_path=str(job.local_path), parallelism=1, dry_run=job.dry_run
    )
    runner = batch_runner(
        execution,
        output_path=str(job.output_path),
        suite=job.suite,
        skip_instances=False,
        cache_instances=False,
        cache_instances_only=False,
        skip_completed_runs=job.skip_completed_runs,
        exit_on_error=True,
        show_progress=show_progress,
    )
    done: list[HelmRun] = []
    failed: list[tuple[str, Exception]] = []
    try:
        for spec in specs:
            started = time.perf_counter()
            try:
                runner.run_one(spec)
            except Exception as error:  # noqa: BLE001  HELM raises what it likes, and one run must not end the others
                failed.append((spec.name, error))
                continue
            path = job.output_path / "runs" / job.suite / spec.name
            done.append(HelmRun(spec.name, path, time.perf_counter() - started, _requests(path), _metric(spec, path)))
    finally:
        release()
    if failed:
        name, problem = failed[0]
        raise FlexGenError(
            f"{len(failed)} of {len(specs)} runs failed; the first, {name}: {type(problem).__name__}: "
            f"{' '.join(str(problem).split())}"
        ) from problem
    return HelmReport(tuple(done))


def _specs(job: HelmJob) -> list[Any]:
    """HELM's run specs of the descriptions, for our model."""
    from helm.benchmark.config_registry import (
        register_builtin_configs_from_helm_package,
        register_configs_from_directory,
    )
    from helm.benchmark.presentation.run_entry import RunEntry
    from helm.benchmark.run import load_entry_point_plugins, run_entries_to_run_specs
    from helm.benchmark.runner import set_benchmark_output_path

    register_builtin_configs_from_helm_package()
    register_configs_from_directory(str(job.local_path))
    load_entry_point_plugins()
    _register(job)
    job.output_path.mkdir(parents=True, exist_ok=True)
    set_benchmark_output_path(str(job.output_path))  # scenarios look there while they are described
    specs = []
    for description in job.descriptions:
        try:
            found = run_entries_to_run_specs(
                [RunEntry(description, priority=1, groups=None)],
                max_eval_instances=job.max_eval_instances,
                num_train_trials=job.num_train_trials,
                models_to_run=[job.helm_name],
            )
        except Exception as error:  # asserts, missing arguments and wrong values of a scenario come in many types
            raise PolicyError(f"--description {description!r}: {type(error).__name__}: {error}") from error
        if not found:
            raise PolicyError(
                f"--description {description!r} is for another model than {job.helm_name!r}; write model=text"
            )
        specs += found
    return specs


def _register(job: HelmJob) -> None:
    """Tells HELM of the model: a deployment that our client and executor know, and its tokenizer."""
    from helm.benchmark.model_deployment_registry import ClientSpec, ModelDeployment, register_model_deployment
    from helm.benchmark.tokenizer_config_registry import TokenizerConfig, TokenizerSpec, register_tokenizer_config

    from ...text import load_tokenizer, named_file

    revision = {"revision": job.options["revision"]} if "revision" in job.options else {}
    tokenizer = load_tokenizer(job.model, **revision)
    folder, gguf = named_file(job.model)
    register_tokenizer_config(
        TokenizerConfig(
            name=job.helm_name,
            tokenizer_spec=TokenizerSpec(
                class_name="helm.tokenizers.huggingface_tokenizer.HuggingFaceTokenizer",
                args={"pretrained_model_name_or_path": folder, **gguf, **revision},
            ),
            end_of_text_token=tokenizer.eos_token or "",
            prefix_token=tokenizer.bos_token or "",
        )
    )
    register_model_deployment(
        ModelDeployment(
            name=f"flexgen/{job.helm_name.split('/')[1]}",
            client_spec=ClientSpec(class_name=CLIENT, args={"model": job.model, **job.options}),
            model_name=job.helm_name,
            tokenizer_name=job.helm_name,
            max_sequence_length=job.max_sequence_length or _context(job.model, tokenizer, folder, {**gguf, **revision}),
        )
    )


def _context(model: str, tokenizer: Any, folder: str, options: dict[str, str]) -> int:
    """Tokens that HELM may put into a prompt with its completion: it does not count those that the tokenizer adds."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, **options).get_text_config(decoder=True)
    known = [getattr(config, "max_position_embeddings", None), tokenizer.model_max_length]
    longest = min((length for length in known if length and length < 10**9), default=None)
    if longest is None:
        raise PolicyError(
            f"neither the configuration of {model!r} nor its tokenizer says how long a text may be; give "
            "--max-sequence-length"
        )
    return int(longest) - int(tokenizer.num_special_tokens_to_add(pair=False))


def _requests(path: Path) -> int:
    return len(_read(path / "scenario_state.json")["request_states"])


def _metric(spec: Any, path: Path) -> tuple[str, float] | None:
    """The scenario's main metric over instances that nothing was done to."""
    from helm.benchmark.scenarios.scenario import create_scenario

    try:
        about = create_scenario(spec.scenario_spec).get_metadata()
    except NotImplementedError:
        return None
    for stat in _read(path / "stats.json"):
        name = stat["name"]
        if name["name"] == about.main_metric and name.get("split") == about.main_split and "perturbation" not in name:
            return (about.main_metric, float(stat["mean"])) if "mean" in stat else None
    return None


def _read(file: Path) -> Any:
    return json.loads(file.read_text("utf-8"))
