"""Every causal model type that the installed transformers has, at tiny size: is it run, and are its tokens the same?

Random weights, three tiers, ragged prompts padded on the left. A type is equal, refused by name, or cannot be built at
this size; anything else is a defect of this package. Knows the public interface only.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from transformers import AutoModelForCausalLM, PretrainedConfig

from . import FlexGenForCausalLM
from .architectures import describe
from .errors import UnsupportedModelError
from .policy import Policy
from .tiny_configs import VOCABULARY, causal_types, tiny_config

__all__ = ["Outcome", "prompts", "quiet", "sweep", "table", "try_type", "write_random"]

Verdict = Literal["equal", "refused", "not buildable", "DIFFERENT", "FAILS"]

_auto: Any = AutoModelForCausalLM

# Everything moves, and the last micro-batch is ragged.
_POLICY = "30 30 30 40 30 30"
_LENGTHS = (3, 7, 5)
_NEW_TOKENS = 4
_TOLERANCE = 1e-4
_MODES: tuple[dict[str, Any], ...] = ({"do_sample": False}, {"do_sample": False, "num_beams": 2})


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a model type.

    Args:
        model_type: as in a `config.json`.
        verdict: `"equal"`, `"refused"` or `"not buildable"`; the others are defects.
        layers: qualified name of the list of decoder layers, if it was found.
        reason: why not, in one line.
    """

    model_type: str
    verdict: Verdict
    layers: str = ""
    reason: str = ""

    @property
    def is_right(self) -> bool:
        """Whether nothing is silently wrong."""
        return self.verdict in ("equal", "refused", "not buildable")


def sweep(model_types: Iterable[str] | None = None) -> Iterator[Outcome]:
    """Tries model types one after the other, all of them if none are given."""
    for model_type in causal_types() if model_types is None else model_types:
        yield try_type(model_type)


def try_type(model_type: str) -> Outcome:
    """Runs a tiny random model of a type and compares it with transformers."""
    with quiet(), tempfile.TemporaryDirectory(prefix="flexgen-sweep-") as folder:
        try:
            config = tiny_config(model_type)
            with torch.device("meta"):
                model = _auto.from_config(config)
        except Exception as error:  # noqa: BLE001  whatever the code of a type raises
            return Outcome(model_type, "not buildable", reason=_line(error))
        try:
            layers = describe(model).layers_name
        except UnsupportedModelError as error:
            return Outcome(model_type, "refused", reason=_line(error))
        try:
            plain = write_random(config, Path(folder) / "model")
            want = _results(plain)
        except Exception as error:  # noqa: BLE001
            return Outcome(model_type, "not buildable", layers, _line(error))
        return _compared(model_type, layers, want, Path(folder))


def prompts(lengths: Iterable[int] = _LENGTHS, vocabulary: int = VOCABULARY, pad: int = 1) -> dict[str, torch.Tensor]:
    """Distinct prompts of these lengths, padded on the left: `input_ids` and `attention_mask`, (rows, tokens)."""
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randint(3, vocabulary - 6, (length,), generator=generator) for length in lengths]
    width = max(len(row) for row in rows)
    padded = [torch.nn.functional.pad(row, (width - len(row), 0), value=pad) for row in rows]
    masks = [torch.arange(width) >= width - len(row) for row in rows]
    return {"input_ids": torch.stack(padded), "attention_mask": torch.stack(masks).long()}


def write_random(config: PretrainedConfig, folder: Path, std: float = 0.25) -> Any:
    """Writes a checkpoint in float32 with random weights, and returns the model that it was written of.

    transformers' own initialization is so small that tiny models repeat one token, whatever goes wrong.
    """
    generator = torch.Generator().manual_seed(1)
    model = _auto.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            noise = torch.randn(tensor.shape, generator=generator) * std
            is_norm = tensor.ndim == 1 and name.endswith("weight")
            tensor.copy_(1 + noise / 3 if is_norm else noise)
    if model.generation_config is not None:
        model.generation_config.eos_token_id = None
    model.eval().save_pretrained(folder)
    return _auto.from_pretrained(folder, dtype=torch.float32).eval()


def table(outcomes: Iterable[Outcome]) -> str:
    """The outcomes as a table in Markdown, and how many there are of each kind."""
    listed = list(outcomes)
    lines = ["| type | layers | outcome |", "| --- | --- | --- |"]
    for outcome in listed:
        reason = f": {outcome.reason}" if outcome.reason else ""
        lines.append(f"| {outcome.model_type} | {outcome.layers} | {outcome.verdict}{reason.replace('|', '/')} |")
    verdicts = [outcome.verdict for outcome in listed]
    counts = ", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in dict.fromkeys(verdicts))
    return "\n".join([*lines, "", f"{len(listed)} types of transformers {transformers.__version__}: {counts}"])


# --------------------------------------------------------------------------------------------------------------- inside
def _compared(model_type: str, layers: str, want: list[torch.Tensor], folder: Path) -> Outcome:
    policy = Policy.parse(_POLICY, batch_size=2, num_batches=2)
    options: dict[str, Any] = {
        "policy": policy,
        "dtype": torch.float32,
        "device": "cpu",
        "offload_folder": folder / "offload",
    }
    try:
        with FlexGenForCausalLM.from_pretrained(folder / "model", **options) as ours:
            got = _results(ours)
    except UnsupportedModelError as error:
        return Outcome(model_type, "refused", layers, _line(error))
    except Exception as error:  # noqa: BLE001  a defect, and the next type is to be tried nevertheless
        return Outcome(model_type, "FAILS", layers, _line(error))
    for what, one, other in zip(("logits", "greedy search", "beam search"), want, got, strict=True):
        if one.shape != other.shape or not torch.allclose(one, other, rtol=_TOLERANCE, atol=_TOLERANCE):
            return Outcome(model_type, "DIFFERENT", layers, f"{what} differs")
    return Outcome(model_type, "equal", layers)


def _results(model: Any) -> list[torch.Tensor]:
    """Logits of the prompts' own tokens, and what is written after them in each mode, as float tensors."""
    given = prompts()
    with torch.no_grad():
        logits = model(**given).logits
    written = [model.generate(**given, **mode, max_new_tokens=_NEW_TOKENS, pad_token_id=1).double() for mode in _MODES]
    if not torch.isfinite(logits[given["attention_mask"].bool()]).all():
        raise FloatingPointError("logits that are not finite, with random weights")
    return [logits[given["attention_mask"].bool()].double(), *written]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what transformers says of tiny random models."""
    theirs: Any = transformers.logging
    before = theirs.get_verbosity()
    ours = logging.getLogger("flexgen_hf")
    level = ours.level
    theirs.set_verbosity_error()
    theirs.disable_progress_bar()
    ours.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        theirs.set_verbosity(before)
        theirs.enable_progress_bar()
        ours.setLevel(level)


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    text = text if isinstance(error, UnsupportedModelError) else f"{type(error).__name__}: {text}"
    return text if len(text) <= 160 else text[:157] + "..."
