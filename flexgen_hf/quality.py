"""What fewer bits cost: a model beside itself with quantized weights, with a quantized cache, and with both.

Knows models and token numbers; knows no tokenizer and no files. Three measures, all against the model as it is stored:

- *perplexity* of a text that is cut into windows, the rows of a block, and the share of tokens after which the same one
  is the likeliest;
- *error of each layer*: of its matrices, and of the hidden states behind it;
- *agreement*: how much of what is written after prompts, greedily, is the same.

A step of the engine sees its own tokens in full precision and earlier ones as the cache keeps them. One forward over a
whole window would therefore never read a quantized cache, and find it perfect. So a window is fed `chunk` tokens at a
time, each chunk with the cache of those before it. With a chunk of 1 every token sees what it would see if it were
being generated; with more, up to `chunk - 1` of its nearest predecessors are seen in full precision, in fewer sweeps.
All variants are fed in the same chunks; without a quantized cache, their size changes nothing but rounding.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from .errors import FlexGenError, PolicyError, StoreError
from .kv_cache import spans_of
from .policy import Compression
from .storage.ledger import gib
from .weights.pieces import read_extent
from .weights.quantized import QuantizedExtent
from .weights.stacked import StackedExtent
from .weights.tensors import StoredTensor

__all__ = [
    "STORED",
    "Comparison",
    "Quality",
    "Sample",
    "Settings",
    "Variant",
    "compare",
    "cut",
    "variants_of",
]

#: the variant that all others are measured against
STORED = "as stored"

# Hidden states of all layers are kept for so many tokens of the first window, to be compared with.
_STATE_TOKENS = 256


@dataclasses.dataclass(frozen=True)
class Settings:
    """How much is measured, and in what steps.

    Args:
        max_tokens: of the text, from its beginning.
        window: tokens that are seen together; each window begins anew.
        chunk: tokens of a window that are fed at a time.
        prompts: how many, taken from the text at equal distances.
        prompt_len: tokens of each.
        new_tokens: to write after each prompt.

    Raises:
        PolicyError: a number that cannot be meant.
    """

    max_tokens: int = 4096
    window: int = 512
    chunk: int = 16
    prompts: int = 8
    prompt_len: int = 64
    new_tokens: int = 32

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            least = 2 if field.name == "window" else 1
            if getattr(self, field.name) < least:
                raise PolicyError(f"quality: {field.name}={getattr(self, field.name)}; it must be at least {least}")


@dataclasses.dataclass(frozen=True, eq=False)
class Sample:
    """The tokens that are measured.

    Args:
        windows: (windows, window).
        prompts: (prompts, prompt_len).
    """

    windows: torch.Tensor
    prompts: torch.Tensor


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way to load the model.

    Args:
        name: for tables.
        source: folder or Hub id.
        compression: what is quantized; of a store that is quantized already, only the cache need be named.
    """

    name: str
    source: str
    compression: Compression


@dataclasses.dataclass(frozen=True)
class Quality:
    """What one variant came to.

    Args:
        name: of the variant.
        weights_bytes: of all weights, as they are stored.
        perplexity: of the windows; the first token of each is given, not predicted.
        ratio: of this perplexity to that of the model as it is stored.
        ratio_error: standard error of the ratio, from how windows differ; `None` if there is but one.
        same_next: share of the text's tokens after which the likeliest next token is the same.
        same_written: share of greedily written tokens that are the same, place by place.
        prefix: of what was written, so many tokens from the beginning are the same, on average.
        states: for each layer the relative error of the hidden states behind it: of a token's vector, the length of
            the difference by the length of the vector, the mean over tokens, because models have a few tokens whose
            vectors are hundreds of times as long as all others. Behind the last layer: behind the final norm.
        layers: for each layer the relative error of all its weights together.
        weights: the same for each quantized tensor, by name.
    """

    name: str
    weights_bytes: int
    perplexity: float
    ratio: float
    ratio_error: float | None
    same_next: float
    same_written: float
    prefix: float
    states: tuple[float, ...]
    layers: tuple[float, ...]
    weights: Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """All variants, the model as it is stored first. `str()` of it is a table.

    Args:
        settings: how much was measured.
        windows: how many the text was cut into.
        variants: one or more.
    """

    settings: Settings
    windows: int
    variants: tuple[Quality, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        settings = self.settings
        head = (
            f"{self.windows * settings.window} tokens in {self.windows} windows of {settings.window}, fed "
            f"{settings.chunk} at a time; {settings.prompts} prompts of {settings.prompt_len} tokens, "
            f"{settings.new_tokens} written after each"
        )
        legend = (
            "next: the likeliest next token is the same, at every place of the text. written, prefix: greedily written "
            "tokens\nthat are the same, place by place, and how many of them before the first that is not."
        )
        return "\n\n".join([head, _columns(self._summary()), legend, _columns(self._by_layer())])

    def _summary(self) -> Iterator[Sequence[str]]:
        yield "", "weights", "perplexity", "ratio", "next", "written", "prefix"
        for v in self.variants:
            error = "" if v.ratio_error is None or v.name == STORED else f" +- {v.ratio_error:.4f}"
            agreement = f"{v.same_next:.1%}", f"{v.same_written:.1%}", f"{v.prefix:.1f}"
            yield v.name, gib(v.weights_bytes), f"{v.perplexity:.4f}", f"{v.ratio:.4f}{error}", *agreement

    def _by_layer(self) -> Iterator[Sequence[str]]:
        others = [v for v in self.variants if v.name != STORED]
        weights = next((v for v in others if v.weights), None)
        yield "relative error of layer", "its weights", *(f"states: {v.name}" for v in others)
        for layer in range(len(self.variants[0].states)):
            own = f"{weights.layers[layer]:.2%}" if weights else "0"
            yield str(layer), own, *(f"{v.states[layer]:.2%}" for v in others)


def variants_of(model: str, compression: Compression, store: str | None = None) -> list[Variant]:
    """The model as it is stored, then with quantized weights, a quantized cache and both, as far as was asked for.

    Args:
        model: folder or Hub id of the checkpoint.
        compression: what to quantize.
        store: a quantized store made from `model`, to take the weights from.

    Raises:
        PolicyError: nothing would be quantized.
    """
    of_weights = compression.of_weights or store is not None
    cache = compression.cache
    found = [Variant(STORED, model, Compression())]
    if of_weights:
        found.append(Variant("weights", store or model, dataclasses.replace(compression, cache=None)))
    if cache is not None:
        found.append(Variant("cache", model, Compression(cache=cache, group_size=compression.group_size)))
    if of_weights and cache is not None:
        found.append(Variant("weights and cache", store or model, compression))
    if len(found) == 1:
        raise PolicyError("quality: nothing is quantized; give compression='4bit', or a quantized store of the model")
    return found


def cut(tokens: Sequence[int], settings: Settings) -> Sample:
    """Windows and prompts of a text.

    Raises:
        FlexGenError: it is too short.
    """
    used = torch.tensor(tokens[: settings.max_tokens])
    count = len(used) // settings.window
    least = max(settings.window, settings.prompt_len + settings.prompts - 1)
    if len(used) < least:
        limit = "" if len(tokens) < settings.max_tokens else f" (max_tokens={settings.max_tokens})"
        raise FlexGenError(
            f"the text has {len(used)} tokens{limit}, but a window of {settings.window} and {settings.prompts} prompts "
            f"of {settings.prompt_len} need {least}; give a longer text, or a smaller window and fewer prompts"
        )
    last = len(used) - settings.prompt_len
    starts = [last * k // max(1, settings.prompts - 1) for k in range(settings.prompts)]
    return Sample(
        used[: count * settings.window].view(count, settings.window),
        torch.stack([used[start : start + settings.prompt_len] for start in starts]),
    )


def compare(
    load: Callable[[Variant], Any],
    variants: Sequence[Variant],
    sample: Sample,
    settings: Settings,
    say: Callable[[str], None] = lambda _: None,
) -> Comparison:
    """Measures the variants one after the other; only one model is in memory at a time.

    Args:
        load: returns an open model of `FlexGenForCausalLM`, which is closed here.
        variants: from `variants_of`; the first is what the others are compared with.
        sample: from `cut`.
        settings: the same as given to `cut`.
        say: receives a line before each variant.

    Raises:
        StoreError: the model as it is stored is quantized already.
        FlexGenError: windows are longer than the model can see; what loading and running raise.
    """
    reference: _Measured | None = None
    found = []
    for variant in variants:
        say(f"measuring: {variant.name}")
        with load(variant) as model:
            _check(model, settings)
            if reference is None:
                _refuse_quantized(variant, model.stored_weights)
            measured = _measure(model, sample, settings)
        reference = reference or measured
        found.append(_compared(variant.name, measured, reference))
    return Comparison(settings, sample.windows.shape[0], tuple(found))


@dataclasses.dataclass(frozen=True, eq=False)
class _Measured:
    """What is kept of a variant to compare others with.

    Args:
        losses: negative logarithm of each predicted token's probability, float32, (windows, window - 1).
        likeliest: the likeliest token at each of those places.
        states: behind each layer, float32, (tokens, hidden).
        written: greedily, (prompts, new tokens).
        stored: the weights in their files.
    """

    losses: torch.Tensor
    likeliest: torch.Tensor
    states: list[torch.Tensor]
    written: torch.Tensor
    stored: dict[str, StoredTensor]


def _check(model: Any, settings: Settings) -> None:
    longest = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    needed = max(settings.window, settings.prompt_len + settings.new_tokens)
    if longest is not None and needed > longest:
        raise FlexGenError(
            f"the model sees at most {longest} tokens, but a window has {settings.window}, and a prompt with what is "
            f"written after it {settings.prompt_len + settings.new_tokens}; make them smaller"
        )


def _refuse_quantized(variant: Variant, stored: Sequence[StoredTensor]) -> None:
    count = sum(tensor.is_quantized for tensor in stored)
    if count:
        raise StoreError(
            f"{variant.source!r} is a store with {count} quantized tensors, so there is nothing to compare it with; "
            "give the checkpoint that it was made from as the model, and this one as the store of weights (--store)"
        )


def _measure(model: Any, sample: Sample, settings: Settings) -> _Measured:
    losses, likeliest = _scores(model, sample.windows, settings.chunk)
    return _Measured(
        losses,
        likeliest,
        _states(model, sample.windows[:1, :_STATE_TOKENS], settings.chunk),
        _written(model, sample.prompts, settings.new_tokens),
        {tensor.name: tensor for tensor in model.stored_weights},
    )


def _scores(model: Any, windows: torch.Tensor, chunk: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and likeliest token at each place of the windows but the last."""
    losses = torch.empty(windows.shape[0], windows.shape[1] - 1)
    likeliest = torch.empty_like(losses, dtype=torch.long)
    for start, end in spans_of(windows.shape[0], model.policy.block_size):
        rows = windows[start:end]
        for at, output in _fed(model, rows[:, :-1], chunk):
            for row, logits in enumerate(output.logits):  # in float32, logits of one row and chunk at a time
                places = slice(at, at + logits.shape[0])
                expected = rows[row, 1:][places].to(logits.device)
                losses[start + row, places] = torch.nn.functional.cross_entropy(
                    logits.float(), expected, reduction="none"
                ).cpu()
                likeliest[start + row, places] = logits.argmax(-1).cpu()
    return losses, likeliest


def _states(model: Any, window: torch.Tensor, chunk: int) -> list[torch.Tensor]:
    parts: dict[int, list[torch.Tensor]] = collections.defaultdict(list)
    for _, output in _fed(model, window, chunk, output_hidden_states=True):
        for layer, states in enumerate(output.hidden_states[1:]):  # the first are the embedding's
            parts[layer].append(states[0].float().cpu())
    return [torch.cat(part) for part in parts.values()]


def _fed(model: Any, rows: torch.Tensor, chunk: int, **options: Any) -> Iterator[tuple[int, Any]]:
    """Feeds a block chunk by chunk; yields the place of each chunk's first token, and what the model returned."""
    past = None
    try:
        for at in range(0, rows.shape[1], chunk):
            part = rows[:, at : at + chunk].to(model.device)
            mask = torch.ones(rows.shape[0], at + part.shape[1], dtype=torch.long, device=model.device)
            output = model(
                input_ids=part, attention_mask=mask, past_key_values=past, use_cache=True, return_dict=True, **options
            )
            past = output.past_key_values
            yield at, output
    finally:
        if past is not None:
            past.close()


def _written(model: Any, prompts: torch.Tensor, new_tokens: int) -> torch.Tensor:
    """What is written greedily after the prompts. The end of the text is not allowed, so that all are equally long."""
    prompts = prompts.to(model.device)
    written: torch.Tensor = model.generate(
        input_ids=prompts,
        attention_mask=torch.ones_like(prompts),
        do_sample=False,
        num_beams=1,
        min_new_tokens=new_tokens,
        max_new_tokens=new_tokens,
        pad_token_id=0,
    )
    return written[:, prompts.shape[1] :].cpu()


def _compared(name: str, measured: _Measured, reference: _Measured) -> Quality:
    more = (measured.losses - reference.losses).double().mean(1)
    ratio = math.exp(float(more.mean()))
    same = (measured.written == reference.written).float()
    by_layer, by_name = _weight_errors(measured.stored, reference.stored, len(reference.states))
    return Quality(
        name=name,
        weights_bytes=sum(tensor.stored_bytes for tensor in measured.stored.values()),
        perplexity=math.exp(float(measured.losses.double().mean())),
        ratio=ratio,
        ratio_error=ratio * float(more.std()) / math.sqrt(len(more)) if len(more) > 1 else None,
        same_next=float((measured.likeliest == reference.likeliest).float().mean()),
        same_written=float(same.mean()),
        prefix=float(same.cumprod(1).sum(1).mean()),
        states=tuple(map(_relative, measured.states, reference.states)),
        layers=by_layer,
        weights=by_name,
    )


def _relative(states: torch.Tensor, reference: torch.Tensor) -> float:
    return float(((states - reference).norm(dim=-1) / reference.norm(dim=-1).clamp_min(1e-30)).mean())


def _weight_errors(
    stored: Mapping[str, StoredTensor], reference: Mapping[str, StoredTensor], layers: int
) -> tuple[tuple[float, ...], dict[str, float]]:
    """Relative errors of all weights of each layer and of each quantized tensor, which are read one at a time."""
    wrong, whole = [0.0] * layers, [0.0] * layers
    by_name = {}
    if not any(tensor.is_quantized for tensor in stored.values()):
        return tuple(wrong), {}
    for name, tensor in sorted(stored.items()):
        known = _reference_of(tensor, reference)
        square, error = float(known.square().sum(dtype=torch.double)), 0.0
        if isinstance(tensor.extent, QuantizedExtent):
            error = float((tensor.extent.dequantize(torch.float32) - known).square().sum(dtype=torch.double))
            by_name[name] = math.sqrt(error / square) if square else 0.0
        if 0 < tensor.stage <= layers:
            wrong[tensor.stage - 1] += error
            whole[tensor.stage - 1] += square
    return tuple(math.sqrt(e / w) if w else 0.0 for e, w in zip(wrong, whole, strict=True)), by_name


def _reference_of(tensor: StoredTensor, reference: Mapping[str, StoredTensor]) -> torch.Tensor:
    same = reference.get(tensor.name)
    if same is None or same.extent.shape != tensor.extent.shape:
        has = "no such tensor" if same is None else f"one of shape {same.extent.shape}"
        raise StoreError(
            f"{tensor.extent.file} holds {tensor.name} of shape {tensor.extent.shape}, but the model has {has}; "
            "give the checkpoint that the store was made from"
        )
    extent = same.extent
    return (extent.read() if isinstance(extent, StackedExtent) else read_extent(same.parts[0])).float()


def _columns(rows: Iterator[Sequence[str]]) -> str:
    """A table: the first column flush left, the others flush right."""
    table = list(rows)
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = (
        "  ".join(
            cell.rjust(width) if at else cell.ljust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in table
    )
    return "\n".join(line.rstrip() for line in lines)
