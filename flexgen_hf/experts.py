"""Mixtures of experts: found in a model's layers, and computed an expert at a time for all micro-batches.

Method: transformers gives modules that hold the experts of a layer one interface, whatever the family
(`use_experts_implementation`): attributes say how their tensors lie, and `_apply_gate` or `act_fn` what comes between
the two products. Whoever implements that interface may compute experts in any order; here, each is computed once for
all tokens of the block that chose it, when its weights are there. Knows modules, tensors and the store of weights.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .errors import UnsupportedModelError
from .planning.budget import ROWS_AT_ONCE
from .planning.schedule import Route
from .report import ExpertUse
from .tiles import TileCast, TileDequantize
from .weights.experts import part_name
from .weights.store import WeightStore
from .weights.tensors import Unit

__all__ = ["Experts", "Mixture", "find_mixtures"]

#: multiplies `x` (rows, in_features) by the current expert's part of a parameter: `(name, x, is_transposed)`
Multiply = Callable[[str, torch.Tensor, bool], torch.Tensor]

# What transformers' decorator says of a module of experts.
_SAID = ("has_gate", "has_bias", "is_transposed", "_apply_gate", "num_experts")


@dataclasses.dataclass(frozen=True)
class Mixture:
    """The experts of a decoder layer.

    Args:
        name: qualified name of the module that holds them.
        module: that module.
        matrices: names of its parameters that hold a matrix for each expert.
    """

    name: str
    module: Any
    matrices: tuple[str, ...]

    @property
    def tensors(self) -> dict[str, str]:
        """State-dict names of the matrices, with their names in the module."""
        return {f"{self.name}.{matrix}": matrix for matrix in self.matrices}

    @property
    def is_transposed(self) -> bool:
        """Whether matrices have their input dimension first, unlike those of `nn.Linear`."""
        return bool(self.module.is_transposed)

    def apply(self, expert: int, x: torch.Tensor, multiply: Multiply) -> torch.Tensor:
        """What an expert makes of some tokens.

        Args:
            expert: its number.
            x: (tokens, hidden_size).
            multiply: by its matrices.
        """
        module = self.module
        first = "gate_up_proj" if module.has_gate else "up_proj"
        inner = self._biased(first, expert, multiply(first, x, self.is_transposed))
        inner = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
        out = self._biased("down_proj", expert, multiply("down_proj", inner, self.is_transposed))
        return module.post_expert_norm(out) if getattr(module, "has_post_expert_norm", False) else out

    def _biased(self, name: str, expert: int, out: torch.Tensor) -> torch.Tensor:
        return out.add_(getattr(self.module, f"{name}_bias")[expert]) if self.module.has_bias else out


def find_mixtures(layers: Sequence[nn.Module], layers_name: str) -> dict[int, Mixture]:
    """The layers whose experts can be loaded and computed one by one, by number.

    A layer with experts of another form than transformers' interface describes, or with two modules of them, is not
    among them: it is loaded and computed as a whole, like any other.

    Args:
        layers: the decoder layers, on `meta`.
        layers_name: qualified name of their list.
    """
    found = {}
    for index, layer in enumerate(layers):
        modules = [(name, part) for name, part in layer.named_modules() if _is_experts(part)]
        if len(modules) == 1:
            name, module = modules[0]
            matrices = tuple(key for key, p in module.named_parameters(recurse=False) if p.dim() == 3)
            found[index] = Mixture(f"{layers_name}.{index}.{name}", module, matrices)
    return found


def _is_experts(module: Any) -> bool:
    if not all(hasattr(module, name) for name in _SAID):
        return False
    matrices = {key: p for key, p in module.named_parameters(recurse=False) if p.dim() == 3}
    expected = {"gate_up_proj" if module.has_gate else "up_proj", "down_proj"}
    return matrices.keys() == expected and all(p.shape[0] == module.num_experts for p in matrices.values())


class _Request:
    """A micro-batch's tokens at a router: who goes where, and what came back so far."""

    def __init__(self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, experts: int) -> None:
        self.hidden, self.weights = hidden, weights.reshape(-1)
        self._top_k = index.shape[-1]
        chosen = index.reshape(-1)
        self._order = torch.argsort(chosen, stable=True)
        counts = torch.bincount(chosen.cpu(), minlength=experts)[:experts].tolist()
        self._starts = [0]
        for count in counts:
            self._starts.append(self._starts[-1] + count)
        #: experts that at least one token chose
        self.chosen = [expert for expert, count in enumerate(counts) if count]
        # sums of 16-bit numbers are kept in float32, as transformers keeps them
        self.sums = torch.zeros_like(hidden, dtype=torch.promote_types(hidden.dtype, torch.float32))

    def tokens_of(self, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The tokens that chose an expert, and their weights for it."""
        choices = self._order[self._starts[expert] : self._starts[expert + 1]]
        return torch.div(choices, self._top_k, rounding_mode="floor"), self.weights[choices]


class _Requests:
    """What the micro-batches of a block want of one layer's experts.

    Args:
        mixture: the layer's experts.
    """

    def __init__(self, mixture: Mixture) -> None:
        self.mixture = mixture
        self._count = int(mixture.module.num_experts)
        self._requests: dict[int, _Request] = {}
        self._known: set[int] = set()
        self._answered: set[int] = set()

    def arrive(self, batch: int, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> None:
        """Takes what a micro-batch's router has chosen; the arguments are those of transformers' experts.

        Args:
            batch: number of the micro-batch.
            hidden: (tokens, hidden_size).
            index: (tokens, choices) numbers of experts; others than there are stand for none.
            weights: (tokens, choices).

        Raises:
            UnsupportedModelError: the layer calls its experts a second time.
        """
        if batch in self._requests or batch in self._answered:
            raise UnsupportedModelError(
                f"{self.mixture.name} is called twice for the same tokens; a layer of this build cannot be streamed"
            )
        self._requests[batch] = _Request(hidden, index, weights, self._count)

    def new(self, batch: int) -> list[int]:
        """The experts that a micro-batch chose and none before it did."""
        request = self._requests.get(batch)
        fresh = [] if request is None else [expert for expert in request.chosen if expert not in self._known]
        self._known.update(fresh)
        return fresh

    def compute(self, expert: int, multiply: Multiply) -> None:
        """Runs an expert on all tokens that chose it, of all micro-batches.

        Tokens go in parts of as many as a micro-batch has, or `ROWS_AT_ONCE`: what an expert's activations take is
        bounded by what a layer's do.
        """
        wanted = {batch: r.tokens_of(expert) for batch, r in self._requests.items() if expert in r.chosen}
        most = max([ROWS_AT_ONCE, *(r.hidden.shape[0] for r in self._requests.values())])
        for part in _parts([(batch, len(tokens)) for batch, (tokens, _) in wanted.items()], most):
            self._compute(expert, {b: tuple(t[rows] for t in wanted[b]) for b, rows in part.items()}, multiply)

    def _compute(self, expert: int, wanted: Mapping[int, tuple[torch.Tensor, ...]], multiply: Multiply) -> None:
        inputs = [self._requests[batch].hidden[tokens] for batch, (tokens, _) in wanted.items()]
        x = inputs[0] if len(inputs) == 1 else torch.cat(inputs)
        out = self.mixture.apply(expert, x, multiply)
        out = out * torch.cat([weights for _, weights in wanted.values()])[:, None]
        parts = torch.split(out, [len(tokens) for tokens, _ in wanted.values()])
        for (batch, (tokens, _)), part in zip(wanted.items(), parts, strict=True):
            sums = self._requests[batch].sums
            sums.index_add_(0, tokens, part.to(sums.dtype))

    def result(self, batch: int) -> torch.Tensor:
        """What a micro-batch gets for its tokens, in their dtype, and only once."""
        request = self._requests.pop(batch)
        self._answered.add(batch)
        return request.sums.to(request.hidden.dtype)


def _parts(counts: Sequence[tuple[int, int]], most: int) -> Iterator[dict[int, slice]]:
    """Cuts rows of micro-batches into parts of at most so many: for each part, which rows of which."""
    part: dict[int, slice] = {}
    room = most
    for batch, count in counts:
        done = 0
        while done < count:
            size = min(room, count - done)
            part[batch] = slice(done, done + size)
            done, room = done + size, room - size
            if not room:
                yield part
                part, room = {}, most
    if part:
        yield part


class Experts:
    """All mixtures of a model while it runs: the requests of the layer that computes, and its experts' weights.

    Args:
        mixtures: by stage.
        weights: holds their experts as units of their own.
        tiles: multiplies by matrices in another dtype than that of compute.
        dequantized_tiles: multiplies by quantized matrices.
    """

    def __init__(
        self,
        mixtures: Mapping[int, Mixture],
        weights: WeightStore,
        tiles: TileCast,
        dequantized_tiles: TileDequantize,
    ) -> None:
        self._mixtures, self._weights = mixtures, weights
        self._tiles, self._dequantized_tiles = tiles, dequantized_tiles
        #: stages that have experts
        self.stages = frozenset(mixtures)
        self._requests: _Requests | None = None
        self._use = ExpertUse()

    def modules(self) -> Iterator[tuple[int, nn.Module]]:
        """The modules whose forward is to end in `arrive`, with their stages."""
        yield from ((stage, mixture.module) for stage, mixture in self._mixtures.items())

    def placeholders(self) -> list[nn.Parameter]:
        """The parameters of the model that are never filled: experts are used where they arrive."""
        return [getattr(mixture.module, name) for mixture in self._mixtures.values() for name in mixture.matrices]

    def begin(self, stage: int) -> None:
        """Makes room for the requests of a stage, if it has experts."""
        self._requests = _Requests(self._mixtures[stage]) if stage in self._mixtures else None

    def arrive(self, batch: int, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> None:
        """Takes what the router of a micro-batch has chosen; see `_Requests.arrive`."""
        assert self._requests is not None
        self._requests.arrive(batch, hidden, index, weights)

    def new(self, stage: int, batch: int) -> list[tuple[int, tuple[Route, ...]]]:
        """The experts that a micro-batch chose and none before it did, and how their pieces move."""
        assert self._requests is not None
        fresh = self._requests.new(batch)
        return [(expert, self._weights.routes_of(Unit(stage, expert))) for expert in fresh]

    def compute(self, stage: int, expert: int, slot: int) -> None:
        """Runs an expert, whose weights are in a slot or where they live, for all micro-batches."""
        unit, mixture = Unit(stage, expert), self._mixtures[stage]
        tensors = dict((*self._weights.resident(unit), *self._weights.tensors(unit, slot)))
        codes = {name: (held, fmt) for name, held, fmt in self._weights.codes(unit, slot)}

        def multiply(matrix: str, x: torch.Tensor, is_transposed: bool) -> torch.Tensor:
            name = part_name(f"{mixture.name}.{matrix}", expert)
            if name in codes:
                self._weights.dequantizations[name] += 1
                return self._dequantized_tiles.linear(x, *codes[name], None)
            if is_transposed:
                return x @ tensors[name]
            apart = (part_name(f"{mixture.name}.{matrix}", expert, number) for number in itertools.count())
            names = [name] if name in tensors else list(itertools.takewhile(tensors.__contains__, apart))
            for part in names:
                self._weights.casts[part] += tensors[part].dtype != x.dtype
            outs = [self._tiles.linear(x, tensors[part], None) for part in names]
            return outs[0] if len(outs) == 1 else torch.cat(outs, dim=-1)

        assert self._requests is not None
        self._requests.compute(expert, multiply)
        moved, read = bool(self._weights.routes_of(unit)), self._weights.bytes_from_disk(unit)
        self._use = ExpertUse(self._use.applied + 1, self._use.loaded + moved, self._use.read_bytes + read)

    def result(self, batch: int) -> torch.Tensor:
        """What a micro-batch's tokens get of the experts that they chose."""
        assert self._requests is not None
        return self._requests.result(batch)

    def take_use(self) -> ExpertUse:
        """What was done since this was last asked for."""
        use, self._use = self._use, ExpertUse()
        return use

    def clear(self) -> None:
        """Forgets what micro-batches wait for, after a run that was stopped."""
        self._requests, self._use = None, ExpertUse()
