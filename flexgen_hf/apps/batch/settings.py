"""How to generate: fields of transformers' `GenerationConfig` from a file and from options, checked before any work."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ...errors import PolicyError

__all__ = ["check_options", "generation_options", "parse_settings"]

#: what generate_each cannot run, with the values that ask for nothing
_REFUSED: dict[str, tuple[Any, ...]] = {
    "assistant_early_exit": (None,),
    "cache_implementation": (None, "dynamic"),
    "guidance_scale": (None, 1, 1.0),
    "output_attentions": (None, False),
    "output_hidden_states": (None, False),
    "prefill_chunk_size": (None,),
    "prompt_lookup_num_tokens": (None,),
    "use_cache": (None, True),
}

_NOT_SETTINGS = {"transformers_version", "_from_model_config"}


def generation_options(file: str | Path | None = None, settings: Iterable[str] = (), **options: Any) -> dict[str, Any]:
    """What `generate` is given for every row.

    Args:
        file: a `generation_config.json`, or the folder of one; its fields come first.
        settings: `"NAME=VALUE"`, the value as JSON or plain text; they override the file.
        options: fields that override both; None is not given.

    Raises:
        PolicyError: an unknown field, a value that transformers refuses, or what a batch job cannot do.
    """
    given = {} if file is None else _read(Path(file))
    given |= parse_settings(settings)
    given |= {name: value for name, value in options.items() if value is not None}
    return check_options(given)


def parse_settings(settings: Iterable[str]) -> dict[str, Any]:
    """Fields and values of `"NAME=VALUE"`, the value as JSON where it is JSON.

    Raises:
        PolicyError: no `=`.
    """
    found: dict[str, Any] = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals:
            raise PolicyError(f"--set: {setting!r} is not NAME=VALUE; write for example 'repetition_penalty=1.2'")
        try:
            found[name.strip()] = json.loads(text)
        except json.JSONDecodeError:
            found[name.strip()] = text
    return found


def check_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options with `stop` by its name in transformers, and drawn where something says how to draw.

    Raises:
        PolicyError: an unknown field, a value that transformers refuses, or what a batch job cannot do.
    """
    from transformers import GenerationConfig

    given = dict(options)
    if (stop := given.pop("stop", None)) is not None:
        given["stop_strings"] = [stop] if isinstance(stop, str) else list(stop)
    if "do_sample" not in given and any(given.get(name) is not None for name in ("temperature", "top_p", "top_k")):
        given["do_sample"] = True
    if given.get("temperature") == 0:  # as everybody understands it, though transformers refuses it
        given = {**given, "do_sample": False}
        del given["temperature"]
    config: Any = GenerationConfig
    known = vars(config())
    for name in given:
        if name.startswith("_") or name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise PolicyError(f"unknown generation setting {name!r}{hint}")
        if name in _REFUSED and given[name] not in _REFUSED[name]:
            raise PolicyError(f"{name}={given[name]!r}: a batch job cannot run it; leave it out, or call generate")
    _check_numbers(given)
    try:
        made: Any = config(**given)
        made.validate()
    except (ValueError, TypeError) as error:
        raise PolicyError(f"generation settings: {' '.join(str(error).split())}") from error
    # what transformers makes objects of, it makes here
    return {name: getattr(made, name, value) for name, value in given.items()}


def _check_numbers(given: Mapping[str, Any]) -> None:
    """What transformers would refuse row by row."""
    for name in ("max_new_tokens", "num_beams", "num_return_sequences"):
        value = given.get(name)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise PolicyError(f"{name}={value!r}: give a whole number above 0")
    for name, least, most in (("temperature", 0, None), ("repetition_penalty", 0, None), ("top_p", 0, 1)):
        value = given.get(name)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if value is not None and not (is_number and least < value and (most is None or value <= most)):
            raise PolicyError(f"{name}={value!r}: give a number above {least}{f', {most} at most' if most else ''}")
    top_k = given.get("top_k")
    if top_k is not None and (not isinstance(top_k, int) or isinstance(top_k, bool) or top_k < 0):
        raise PolicyError(f"top_k={top_k!r}: give a whole number that is not below 0")


def _read(file: Path) -> dict[str, Any]:
    file = file / "generation_config.json" if file.is_dir() else file
    try:
        found = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise PolicyError(f"--generation-config: cannot read {str(file)!r} as JSON ({error})") from error
    if not isinstance(found, dict):
        raise PolicyError(f"--generation-config: {str(file)!r} holds no object of settings")
    return {name: value for name, value in found.items() if name not in _NOT_SETTINGS and value is not None}
