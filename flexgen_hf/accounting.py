"""What a call takes beside the weights: told in numbers, refused if it does not fit, in the account while it runs.

Knows the configuration of a model and the arguments of a call; `planning.budget` knows the bytes that follow from them.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from transformers import GenerationConfig
from transformers.cache_utils import Cache, DynamicCache

from .cell_layout import CellShape
from .kv_cache import BlockCache, Span
from .microbatches import wants
from .planning.budget import (
    ESTIMATED,
    Call,
    Demand,
    ModelSizes,
    Need,
    alternatives,
    difference,
    fits,
    largest,
    totals,
)
from .policy import Compression, Policy, Tier
from .storage.ledger import Ledger

__all__ = ["Account", "Load", "cache_geometry", "shape_of", "windows_of"]


class Load(NamedTuple):
    """A micro-batch of a sweep, in numbers.

    Args:
        rows: of it.
        tokens: new ones of each row.
        past: tokens before these.
        scored: tokens of all rows whose probability is asked for.
    """

    rows: int
    tokens: int
    past: int
    scored: int = 0


class Account:
    """Enters what the calls of one model take, and refuses the calls that do not fit.

    What the engine allocates, it takes from the ledger by itself. What the model's own code allocates is estimated and
    entered here, until the call ends.

    Args:
        config: of the model.
        demand: what the model takes under any policy.
        policy: the one in force.
        ledger: the account of the tiers.
        arguments: names that the model's forward takes.
    """

    def __init__(self, config: Any, demand: Demand, policy: Policy, ledger: Ledger, arguments: Collection[str]) -> None:
        self.demand = demand
        self._config, self._policy, self._ledger = config, policy, ledger
        self._all_logits = "logits_to_keep" not in arguments
        self._entries: _Entries | None = None  # of the call that is running

    @property
    def _is_eager(self) -> bool:
        return getattr(self._config, "_attn_implementation", None) == "eager"

    @contextlib.contextmanager
    def generation(self, *, may_be_cut: bool, tokens: int | None) -> Iterator[None]:
        """A call of `generate`: what `enter_generation` enters is in the account until it ends.

        Args:
            may_be_cut: whether the call may be cut into smaller blocks.
            tokens: of each prompt, those that a given cache holds included; None if the call does not say it.
        """
        before, self._entries = self._entries, _Entries(self._ledger, may_be_cut=may_be_cut, tokens=tokens)
        try:
            yield
        finally:
            self._entries.close()
            self._entries = before

    def enter_generation(
        self,
        settings: GenerationConfig,
        model_kwargs: Mapping[str, Any],
        prompts: int,
        length: int,
        *,
        keeps_past: bool = False,
    ) -> None:
        """Enters what a block of a call will take, and refuses what does not fit, before anything is computed.

        Args:
            settings: of the call.
            model_kwargs: the arguments that transformers will pass to forward.
            prompts: rows, before they are copied for beams and returned sequences.
            length: tokens that a row can get.
            keeps_past: cells of sliding layers keep what is out of their window.

        Raises:
            CapacityError: with the numbers, and with policies near to this one under which the call fits.
        """
        entries = self._entries
        if entries is not None:
            call = self.generated(settings, model_kwargs, prompts, length, entries.tokens)
            self._enter(dataclasses.replace(call, may_be_cut=entries.may_be_cut, keeps_past=keeps_past))

    def adopt(self, policy: Policy, demand: Demand) -> None:
        """Goes on with another policy, before anything of a call is entered."""
        self._policy, self.demand = policy, demand

    def held_by_others(self) -> dict[Tier, int]:
        """Bytes taken now that are neither the weights' nor what every call needs: of caches that a caller keeps."""
        mine = totals(self.demand.weights(self._policy.weights))
        pinned = self._ledger.held_as(Tier.HOST, "pinned buffers")
        held = {tier: max(0, self._ledger.held(tier) - mine[tier]) for tier in Tier}
        return {**held, Tier.HOST: max(0, held[Tier.HOST] - pinned)}

    @contextlib.contextmanager
    def forward(self, given: Mapping[str, Any], spans: Sequence[Span], tokens: int) -> Iterator[bool]:
        """A call of the model itself: refused if it does not fit, in the account until it ends.

        Inside of `generate`, whose entries cover it, nothing is done.

        Args:
            given: its arguments by name.
            spans: rows of each micro-batch.
            tokens: new ones of each row.

        Yields:
            Whether it is a call of its own.

        Raises:
            CapacityError: with the numbers, and with calls and policies near to this one that fit.
        """
        if self._entries is not None:
            yield False
            return
        cache, call = given.get("past_key_values"), self._forwarded(given, spans, tokens)
        with self.generation(may_be_cut=False, tokens=tokens):
            has_choice = not self._all_logits and given.get("logits_to_keep") is None and not call.has_loss
            self._enter(call, lambda fit: _smaller(call, fit, has_choice), lambda other: self._grown(cache, other))
            yield True

    @contextlib.contextmanager
    def sweeps(self) -> Iterator[Callable[[Sequence[Load]], None]]:
        """Micro-batches that come and go: what their sweeps are estimated to take is in the account.

        Yields:
            A function that takes the micro-batches of a sweep, and enters their estimates in place of those of the
            sweep before. It raises `CapacityError`, and changes nothing, if they do not fit beside what is held.
        """
        held: dict[tuple[Tier, str], int] = {}

        def enter(batches: Sequence[Load]) -> None:
            wanted: dict[tuple[Tier, str], int] = dict.fromkeys(held, 0)
            others: dict[tuple[Tier, str], int] = {}  # what the engine will take itself: room for hidden states
            for call in self._swept(batches):
                for need in self.demand.needs(self._policy, call):
                    sums = wanted if need.what in ESTIMATED else others
                    sums[need.tier, need.what] = sums.get((need.tier, need.what), 0) + need.nbytes
            more = {name: size - held.get(name, 0) for name, size in wanted.items()}
            still = {name: size - self._ledger.held_as(*name) for name, size in others.items()}
            needs = [*more.items(), *still.items()]
            self._ledger.check([Need(tier, size, what) for (tier, what), size in needs if size > 0])
            for (tier, what), size in more.items():
                (self._ledger.take if size > 0 else self._ledger.give)(tier, abs(size), what)
            held.update(wanted)

        try:
            yield enter
        finally:
            for (tier, what), size in held.items():
                self._ledger.give(tier, size, what)

    def _swept(self, batches: Sequence[Load]) -> list[Call]:
        """Those micro-batches of a sweep that compute prompts as one call, and those that decode as another."""
        calls = []
        for prompts in (True, False):
            some = [batch for batch in batches if (batch.tokens > 1) is prompts]
            if some:
                rows, tokens, past, scored = zip(*some, strict=True)
                calls.append(
                    Call(
                        rows=sum(rows),
                        tokens=max(tokens),
                        capacity=max(tokens) + max(past),
                        past=max(past),
                        may_be_cut=False,
                        makes_cache=False,
                        logit_tokens=max(tokens) if self._all_logits else 1,
                        scored=sum(scored),
                        eager=self._is_eager,
                        micro_batches=rows,
                    )
                )
        return calls

    def _enter(
        self,
        call: Call,
        smaller: Callable[[Callable[[Call], bool]], list[str]] = lambda _: [],
        beside: Callable[[Call], Sequence[Need]] = lambda _: (),
    ) -> None:
        """Enters what is estimated of a call, or refuses it.

        Args:
            call: in numbers.
            smaller: of those near to it, the ones that fit, in words.
            beside: what a call takes that follows from more than numbers.
        """
        assert self._entries is not None
        if self._entries.covers(call):  # a later block of the same call
            return
        demand = self.demand
        if self._ledger.held_as(Tier.HOST, "pinned buffers"):
            demand = dataclasses.replace(demand, pinned=False)

        def remedy() -> str:
            limits = self._ledger.limits(but=totals(demand.weights(self._policy.weights)))

            def fit(policy: Policy, other: Call) -> bool:
                needs = [*demand.weights(policy.weights), *demand.needs(policy, other), *beside(other)]
                return fits(totals(needs), limits)

            ways = smaller(lambda other: fit(self._policy, other))
            near = alternatives(self._policy, lambda other: fit(other, call.in_block(other)))
            ways += [difference(self._policy, other) for other in near[: 1 if ways else 2]]
            if not ways:
                return "; nothing near to this policy fits: ask for fewer rows or tokens"
            return "; fits with " + ", or with ".join(ways)

        needs = [*demand.needs(self._policy, call), *beside(call)]
        self._ledger.check(needs, remedy)
        self._entries.enter(call, [need for need in needs if need.what in ESTIMATED])

    def _grown(self, cache: Any, call: Call) -> list[Need]:
        """What a cache that is given takes more, with the copies that are made while it grows."""
        if isinstance(cache, BlockCache):
            if not (needs := cache.growth(call.past + call.tokens)):
                return []
            cell = max(cache.cells(), key=lambda cell: cell.nbytes)
            tier = Tier.DEVICE if cell.home is Tier.DEVICE else Tier.HOST
            return [*needs, Need(tier, cell.nbytes, "working set")]
        if isinstance(cache, Cache):
            shape = self.demand.shape
            token = 2 * call.rows * (shape.key_size or 0) * shape.itemsize  # of a layer
            return [Need(Tier.DEVICE, token * (shape.num_layers * call.tokens + call.past), "working set")]
        return []

    def _forwarded(self, given: Mapping[str, Any], spans: Sequence[Span], tokens: int) -> Call:
        """A call of the model itself in numbers."""
        cache, keep = given.get("past_key_values"), given.get("logits_to_keep")
        past = cache.get_seq_length() if isinstance(cache, Cache) else 0
        kept = keep.numel() if isinstance(keep, torch.Tensor) and keep.ndim else min(int(keep or 0), tokens)
        return Call(
            rows=spans[-1][1],
            tokens=tokens,
            capacity=max(1, past + tokens),
            past=past,
            may_be_cut=False,
            makes_cache=cache is None and wants(given, self._config, "use_cache"),
            logit_tokens=tokens if self._all_logits else kept or tokens,
            eager=self._is_eager,
            keeps_hidden=wants(given, self._config, "output_hidden_states"),
            keeps_attention=wants(given, self._config, "output_attentions"),
            has_loss=given.get("labels") is not None,
            keeps_past=True,
            micro_batches=() if cache is None else tuple(end - start for start, end in spans),
        )

    def generated(
        self,
        settings: GenerationConfig,
        model_kwargs: Mapping[str, Any],
        prompts: int,
        length: int,
        prompt_tokens: int | None,
    ) -> Call:
        """A call of `generate` in numbers, with all its rows in flight.

        Args:
            settings: of the call.
            model_kwargs: its other arguments.
            prompts: rows, before they are copied for beams and returned sequences.
            length: tokens that a row can get.
            prompt_tokens: of each prompt, those that a given cache holds included; None if the call does not say it.
        """
        given = model_kwargs.get("past_key_values")
        past = given.get_seq_length() if isinstance(given, Cache) else 0
        whole = length if prompt_tokens is None else prompt_tokens
        tokens = length if settings.use_cache is False else max(1, whole - past)
        beams = settings.num_beams or 1
        copies = max(beams, settings.num_return_sequences or 1)
        returned = bool(settings.return_dict_in_generate)
        keeps = returned * (bool(settings.output_logits) + bool(settings.output_scores))
        return Call(
            rows=prompts * copies,
            tokens=tokens,
            capacity=max(1, length),
            past=past,
            beams=beams,
            copies=copies,
            makes_cache=given is None and settings.use_cache is not False,
            logit_tokens=tokens if self._all_logits else 1,
            kept_logits=keeps * max(1, length + 1 - whole),
            samples=bool(settings.do_sample),
            eager=self._is_eager,
            keeps_hidden=returned and bool(settings.output_hidden_states),
        )


class _Entries:
    """What is in the account, during a call, for memory that the model's own code allocates.

    Args:
        ledger: the account.
        may_be_cut: whether the call may be cut into smaller blocks.
        tokens: of each prompt, those that a given cache holds included; None if the call does not say it.
    """

    def __init__(self, ledger: Ledger, *, may_be_cut: bool, tokens: int | None) -> None:
        self.may_be_cut, self.tokens = may_be_cut, tokens
        self._ledger, self._needs = ledger, list[Need]()
        self._call: Call | None = None

    def covers(self, call: Call) -> bool:
        """Whether what is entered is enough for `call`."""
        entered = self._call
        return (
            entered is not None
            and call.rows <= entered.rows
            and dataclasses.replace(call, rows=entered.rows, may_be_cut=entered.may_be_cut) == entered
        )

    def enter(self, call: Call, needs: Sequence[Need]) -> None:
        """Takes it, in place of what was taken for an earlier call."""
        self.close()
        for need in needs:
            self._ledger.take(*need)
            self._needs.append(need)
        self._call = call

    def close(self) -> None:
        """Gives it back."""
        while self._needs:
            self._ledger.give(*self._needs.pop())
        self._call = None


def _smaller(call: Call, fit: Callable[[Call], bool], may_keep_fewer_logits: bool) -> list[str]:
    """Calls of the model near to one that does not fit, which do, in words."""
    ways = []
    if may_keep_fewer_logits and fit(dataclasses.replace(call, logit_tokens=1)):
        ways.append("logits_to_keep=1")
    if call.makes_cache and fit(dataclasses.replace(call, makes_cache=False)):
        ways.append("use_cache=False")
    one = call  # of the rows of a given cache, none may be missing
    if not call.micro_batches:
        fewer = largest(1, call.rows - 1, lambda rows: dataclasses.replace(call, rows=rows), fit)
        if fewer is not None:
            return [*ways, f"{fewer.rows} of the {call.rows} rows at a time"]
        one = dataclasses.replace(call, rows=1)

    def shorter(tokens: int) -> Call:
        logits = min(tokens, call.logit_tokens)
        return dataclasses.replace(one, tokens=tokens, capacity=call.past + tokens, logit_tokens=logits)

    fewer = None if ways else largest(1, call.tokens - 1, shorter, fit)
    if fewer is not None:
        of = f"of the {call.tokens} tokens" if call.micro_batches else "tokens of one row"
        ways.append(f"{fewer.tokens} {of} at a time")
    return ways


def cache_geometry(config: Any) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """(heads, width) of keys and of values as they are cached, or None if the config does not say it plainly."""
    text = config.get_text_config(decoder=True)
    if latent := getattr(text, "kv_lora_rank", None):  # what keys and values are made of, and what of keys is rotated
        rotated = getattr(text, "qk_rope_head_dim", None)
        return ((1, latent), (1, rotated)) if isinstance(latent, int) and isinstance(rotated, int) else None
    heads = _said(text, "num_key_value_heads") or _said(text, "num_attention_heads")
    if getattr(text, "multi_query", False) and not getattr(text, "new_decoder_architecture", False):
        heads = 1
    width, size = _said(text, "head_dim"), _said(text, "hidden_size")
    if width is None and size and (queries := _said(text, "num_attention_heads")):
        width = size // queries
    return None if not isinstance(heads, int) or not isinstance(width, int) else ((heads, width), (heads, width))


def windows_of(config: Any) -> list[int | None]:
    """For each layer the length of its sliding window, or None, as transformers' own cache would have it."""
    return [getattr(layer, "sliding_window", None) for layer in DynamicCache(config=config).layers]


def _said(text: Any, name: str) -> Any:
    """What a configuration says for all layers; None if it says nothing, or something else for each layer."""
    try:
        return getattr(text, name, None)
    except RuntimeError:
        return None


def shape_of(
    config: Any, inner_size: int, dtype: torch.dtype, compression: Compression, casts_head: bool
) -> ModelSizes:
    """The sizes of a model that decide how much memory a call takes.

    Args:
        config: of the model.
        inner_size: rows of the matrices of a layer's MLP, experts left out.
        dtype: of compute.
        compression: in how many bits keys and values are kept.
        casts_head: the head's table is cast tile by tile.
    """
    text = config.get_text_config(decoder=True)
    geometry = cache_geometry(config)
    heads = int(_said(text, "num_attention_heads") or 1)
    cell = None if geometry is None else CellShape(1, *geometry, dtype, compression)
    key, value = (None, None) if geometry is None else (states[0] * states[1] for states in geometry)
    kept = None if cell is None or cell.dtype == dtype else (cell.token_bytes(0), cell.token_bytes(1))
    windows = tuple(windows_of(config))
    width = _said(text, "head_dim") or int(text.hidden_size) // heads
    if getattr(text, "kv_lora_rank", None):
        width = (_said(text, "qk_nope_head_dim") or 0) + (_said(text, "qk_rope_head_dim") or 0)
    expert = _said(text, "moe_intermediate_size") or _said(text, "intermediate_size") or 0
    expert = max(expert) if isinstance(expert, (list, tuple)) else expert
    return ModelSizes(
        num_layers=int(text.num_hidden_layers),
        hidden_size=int(text.hidden_size),
        # an expert multiplies by three matrices, as gated MLPs do
        inner_size=inner_size + 3 * expert * (getattr(text, "num_experts_per_tok", None) or 0),
        query_size=heads * width if geometry is not None else int(text.hidden_size),
        key_size=key,
        num_heads=heads,
        vocab_size=int(text.vocab_size),
        itemsize=dtype.itemsize,
        kept_key_bytes=kept[0] if kept else None,
        kept_value_bytes=kept[1] if kept and key != value else None,
        value_size=None if key == value else value,
        windows=windows if any(windows) else (),
        casts_head=casts_head,
    )
