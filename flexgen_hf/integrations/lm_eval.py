"""The model `flexgen` of lm-eval: its requests through `score_each` and `generate_each`, all of a task at once.

```
flexgen-hf lm-eval run --model flexgen --model_args pretrained=facebook/opt-30b,policy=auto --tasks hellaswag
```

What is here needs no lm-eval; the class that it calls is in `_lm_eval_model`. Releases of lm-eval that look for models
among entry points find it there by themselves; for the others the command above registers it.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ..continuous.scoring import ScoreRequest
from ..continuous.texts import TextRequest
from ..errors import FlexGenError, PolicyError
from ..options import given, load_model, loading_options

__all__ = ["NAME", "Likelihood", "likelihoods", "load", "main", "register", "written"]

#: what lm-eval knows the model by
NAME = "flexgen"

# Arguments of lm-eval's own loading, which this one has no part of, and what to do instead.
_NOT_OURS = dict.fromkeys(
    "parallelize max_memory_per_gpu max_cpu_memory tp_plan autogptq gptqmodel backend mixed_precision_dtype "
    "softmax_dtype logits_cache device_map".split(),
    "leave it out",
) | dict.fromkeys(("peft", "delta"), "merge it into the checkpoint before")

# With policy=auto, as far as nothing is known of a task.
_WORKLOAD: dict[str, Any] = {"batch": None, "prompt_len": 512, "max_new_tokens": 32}


class Likelihood(NamedTuple):
    """How likely one continuation is.

    Args:
        number: of the pair.
        total: natural logarithm of its probability.
        is_greedy: every token of it is the likeliest one.
    """

    number: int
    total: float
    is_greedy: bool


def load(pretrained: str, *, batch_size: int | str | None = None, **arguments: Any) -> Any:
    """Loads the model that lm-eval's `--model_args` describe.

    Args:
        pretrained: Hub id, model folder, store or GGUF file.
        batch_size: lm-eval's `--batch_size`: rows of a micro-batch. lm-eval gives 1 where nothing was asked, and 1 and
            `auto` leave it to the policy; the number of micro-batches is `num_batches` among the arguments.
        arguments: what `from_pretrained` takes, as text or as values: `policy`, `max_memory`, `compression`, ...

    Raises:
        PolicyError: an argument that cannot be meant.
    """
    for name, remedy in _NOT_OURS.items():
        if arguments.pop(name, None):
            raise PolicyError(f"model_args: {name} is of lm-eval's own way to load a model; {remedy}")
    size = str(batch_size or 1)
    if not size.startswith("auto") and not (size.isdecimal() and int(size)):
        raise PolicyError(f"--batch_size {size}: give the rows of a micro-batch, or 'auto'")
    texts = {name: arguments.pop(name) for name in ("policy", "max_memory") if isinstance(arguments.get(name), str)}
    rows = int(size) if size.isdecimal() and int(size) > 1 else None
    arguments = {"workload": dict(_WORKLOAD), **given(**arguments)}
    return load_model(pretrained, loading_options(batch_size=rows, **texts, **arguments))


def likelihoods(model: Any, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], longest: int) -> Iterator[Likelihood]:
    """How likely continuations are after their contexts, as they come.

    Args:
        model: has `score_each`.
        pairs: tokens of context and continuation.
        longest: tokens that the model can see. A context that is too long for it loses its beginning.

    Raises:
        FlexGenError: a continuation alone is longer; what is wrong with a request.
    """
    requests = (
        ScoreRequest(_fitting(context, continuation, longest), continuation, key=index)
        for index, (context, continuation) in enumerate(pairs)
    )
    for scored in model.score_each(requests):
        if scored.error is not None:
            raise scored.error
        yield Likelihood(scored.request.key, scored.total, bool(scored.is_greedy.all()))


def written(
    model: Any, prompts: Iterable[tuple[Sequence[int], Mapping[str, Any]]], seed: int = 0
) -> Iterator[tuple[int, list[int]]]:
    """What is written after prompts, as it ends: the prompt's index, and the new tokens.

    Args:
        model: has `generate_each`.
        prompts: tokens, and what `generate` takes beside them.
        seed: what is drawn for a prompt follows from it and the prompt's index.

    Raises:
        FlexGenError: what is wrong with a prompt.
    """
    requests = (
        TextRequest(ids, options, seed=(seed + index) % 2**63, key=index)
        for index, (ids, options) in enumerate(prompts)
    )
    for text in model.generate_each(requests):
        if text.error is not None:
            raise text.error
        yield text.request.key, text.output[0, len(text.request.ids) :].tolist()


def register() -> None:
    """Makes lm-eval know the model, if it does not yet.

    Raises:
        FlexGenError: lm-eval is not installed.
    """
    try:
        from lm_eval.api.registry import model_registry, register_model
    except ImportError as error:
        raise FlexGenError(f"lm-eval is not installed ({error}); pip install 'flexgen_hf[lm-eval]'") from error
    from ._lm_eval_model import FlexGenLM

    if NAME not in model_registry:
        register_model(NAME)(FlexGenLM)


def main(arguments: Sequence[str]) -> None:
    """lm-eval's own command line, which knows the model `flexgen` then.

    Args:
        arguments: lm-eval's.

    Raises:
        FlexGenError: lm-eval is not installed.
    """
    register()
    from lm_eval.__main__ import cli_evaluate

    with _arguments("lm-eval", *arguments):
        cli_evaluate()


@contextlib.contextmanager
def _arguments(*arguments: str) -> Iterator[None]:
    """Lets a program's parser see other arguments than this process was started with."""
    before, sys.argv = sys.argv, list(arguments)
    try:
        yield
    finally:
        sys.argv = before


def _fitting(context: Sequence[int], continuation: Sequence[int], longest: int) -> Sequence[int]:
    """The end of a context that the model can see with a continuation, whose last token it need not see."""
    if len(continuation) > longest:
        raise FlexGenError(
            f"a continuation has {len(continuation)} tokens, but the model sees at most {longest}; leave the task out"
        )
    return context[-(longest + 1 - len(continuation)) :]
