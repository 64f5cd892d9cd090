"""Where HELM meets the engine: an executor and a client for its model-deployment mechanism.

HELM's own executor sends single requests; this one sends all of a scenario. Both are told by a deployment whose client
is `CLIENT` what to load; other deployments are left to HELM. They are plain classes with the methods that HELM calls,
because its base classes are not there to import unless HELM is.
"""

from __future__ import annotations

import dataclasses
import json
import threading
import time
from collections.abc import Sequence
from typing import Any

from tqdm import tqdm

from ...errors import StoreError
from .engine import Answer, Engine, Passage

__all__ = ["CLIENT", "BatchExecutor", "FlexGenClient", "batch_runner", "engine_of", "release", "require_helm"]

#: the class that a deployment names
CLIENT = "flexgen_hf.apps.helm.executing.FlexGenClient"

_HOW_TO_INSTALL = (
    "install it with pip install 'flexgen_hf[helm]', best into an environment of its own; "
    "then, where torch has no torchvision of its own release beside it, pip uninstall torchvision"
)


def require_helm() -> None:
    """Checks that HELM can be imported.

    Raises:
        StoreError: it is not installed, or cannot be imported.
    """
    try:
        import helm.benchmark.runner  # noqa: F401
    except ModuleNotFoundError as error:
        raise StoreError(f"HELM is not installed (no module {error.name!r}); {_HOW_TO_INSTALL}") from error
    except (ImportError, RuntimeError) as error:  # what torch raises for a torchvision of another release
        raise StoreError(f"HELM cannot be imported ({' '.join(str(error).split())}); {_HOW_TO_INSTALL}") from error


#: the engine that is loaded, by what it was loaded with
_loaded: dict[str, Engine] = {}

# HELM makes requests from several threads, and one model answers one call at a time.
_one_at_a_time = threading.RLock()


def engine_of(model: str, **options: Any) -> Engine:
    """The engine of a deployment. One is loaded at a time, and stays until another one is asked for.

    Args:
        model: Hub id, model folder, store or GGUF file.
        options: `chat`, `seed` and `least_shared` as `Engine` takes them, and what `from_pretrained` takes, as JSON
            has it.
    """
    name = json.dumps([model, options], sort_keys=True)
    with _one_at_a_time:
        if name not in _loaded:
            release()
            _loaded[name] = _load(model, dict(options))
        return _loaded[name]


def release() -> None:
    """Gives back the memory and the files of the engine that is loaded."""
    with _one_at_a_time:
        while _loaded:
            _loaded.popitem()[1].model.close()


def _load(model: str, options: dict[str, Any]) -> Engine:
    from ... import FlexGenForCausalLM
    from ...text import dtype_of_compute, load_tokenizer

    if isinstance(limits := options.get("max_memory"), dict):  # JSON has no numbers for names
        options["max_memory"] = {int(tier) if str(tier).isdecimal() else tier: size for tier, size in limits.items()}
    own = {name: options.pop(name) for name in ("chat", "seed", "least_shared") if name in options}
    revision = {"revision": options["revision"]} if "revision" in options else {}
    tokenizer = load_tokenizer(model, **revision)
    loaded = FlexGenForCausalLM.from_pretrained(model, **{"dtype": dtype_of_compute(), **options})
    return Engine(loaded, tokenizer, **own)


class FlexGenClient:
    """A client of HELM: one request at a time, as metrics and annotators ask for them.

    Args:
        tokenizer_name: of the deployment.
        model: as `engine_of` takes it, and so are `options`.
    """

    def __init__(self, tokenizer_name: str, model: str, **options: Any) -> None:
        self._tokenizer_name, self._model, self._options = tokenizer_name, model, options

    def make_request(self, request: Any) -> Any:
        """HELM's `RequestResult` of a request."""
        with _one_at_a_time:
            engine, started = engine_of(self._model, **self._options), time.time()
            (answer,) = engine.answer([request])
            job = _Job(started, time.time() - started, 1)
        return result_of(answer, request, _end_of_text(self._tokenizer_name), job)


class BatchExecutor:
    """HELM's executor, with all requests of a scenario in one call of the engine.

    Args:
        inner: HELM's own, which does what is not ours.
        show_progress: a bar on stderr.
    """

    def __init__(self, inner: Any, *, show_progress: bool = True) -> None:
        self._inner, self._show_progress = inner, show_progress
        self.context, self.execution_spec = inner.context, inner.execution_spec

    def execute(self, scenario_state: Any) -> Any:
        """The scenario's state with a result for each request.

        Raises:
            ExecutorError: HELM's own, for a request that has no answer; the run is void then, as it is in HELM.
        """
        from helm.benchmark.model_deployment_registry import get_model_deployment

        deployment = get_model_deployment(scenario_state.adapter_spec.model_deployment)
        if self.execution_spec.dry_run or deployment.client_spec.class_name != CLIENT:
            return self._inner.execute(scenario_state)
        states = scenario_state.request_states
        with _one_at_a_time:
            engine, started = engine_of(**deployment.client_spec.args), time.time()
            answers = self._answers(engine, [state.request for state in states])
            job = _Job(started, time.time() - started, len(states))
        _refuse_failures(answers)
        end = _end_of_text(deployment.tokenizer_name or deployment.name)
        done = [
            dataclasses.replace(state, result=result_of(answer, state.request, end, job))
            for state, answer in zip(states, answers, strict=True)
        ]
        return dataclasses.replace(scenario_state, request_states=done)

    def _answers(self, engine: Engine, requests: Sequence[Any]) -> list[Answer]:
        with tqdm(total=len(requests), unit="request", disable=not self._show_progress) as bar:
            return engine.answer(requests, bar.update)


def batch_runner(execution_spec: Any, *args: Any, show_progress: bool = True, **options: Any) -> Any:
    """HELM's `Runner` with `BatchExecutor`; `helm-run --runner-class-name` takes this function's name."""
    from helm.benchmark.runner import Runner

    runner = Runner(execution_spec, *args, **options)
    runner.executor = BatchExecutor(runner.executor, show_progress=show_progress)
    return runner


@dataclasses.dataclass(frozen=True)
class _Job:
    """When requests were sent, how many seconds they took together, and how many they were."""

    started: float
    seconds: float
    requests: int


def result_of(answer: Answer, request: Any, end_of_text: str | None, job: _Job) -> Any:
    """HELM's `RequestResult` of an answer, with texts cut by HELM's own rules."""
    from helm.common.request import ErrorFlags, RequestResult

    if answer.error is not None:
        return RequestResult(
            success=False,
            cached=False,
            error=f"{type(answer.error).__name__}: {answer.error}",
            error_flags=ErrorFlags(is_retriable=False, is_fatal=True),
            completions=[],
            embedding=[],
        )
    return RequestResult(
        success=True,
        cached=False,
        request_time=job.seconds / job.requests,
        request_datetime=int(job.started),
        completions=[_completion(one, answer.prompt, request, end_of_text) for one in answer.written],
        embedding=[],
        batch_size=job.requests,
        batch_request_time=job.seconds,
    )


def _completion(written: Passage, prompt: Passage | None, request: Any, end_of_text: str | None) -> Any:
    from helm.clients.client import truncate_sequence
    from helm.common.request import GeneratedOutput

    # Told that there is no echo, HELM cuts what was written, which is all that it is given here.
    bare = dataclasses.replace(request, echo_prompt=False)
    cut = truncate_sequence(_generated(written), bare, end_of_text or None, print_warning=False)
    if prompt is not None:
        cut = _generated(prompt) + cut
    return GeneratedOutput(cut.text, cut.logprob, cut.tokens, finish_reason={"reason": written.finish_reason})


def _generated(passage: Passage) -> Any:
    from helm.common.request import GeneratedOutput, Token

    tokens = [Token(text, value) for text, value in zip(passage.tokens, passage.log_probs, strict=True)]
    return GeneratedOutput(passage.text, sum(passage.log_probs), tokens)


def _end_of_text(tokenizer_name: str) -> str | None:
    from helm.benchmark.tokenizer_config_registry import get_tokenizer_config

    config = get_tokenizer_config(tokenizer_name)
    return None if config is None else config.end_of_text_token


def _refuse_failures(answers: Sequence[Answer]) -> None:
    from helm.benchmark.executor import ExecutorError

    failed = [answer.error for answer in answers if answer.error is not None]
    if failed:
        first = f"{type(failed[0]).__name__}: {failed[0]}"
        raise ExecutorError(f"{len(failed)} of {len(answers)} requests have no answer; the first: {first}")
