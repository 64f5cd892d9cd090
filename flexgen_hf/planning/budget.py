"""How many bytes of each tier a policy takes, before anything is taken, and which policies near to it take less.

Some needs are exact: what the weights take, homes of cells and hidden states, and the reused buffers that they pass
through. The account will show the same numbers. What the model's own code allocates while it computes can only be
estimated (`Demand.needs` has the formula); it is entered into the account as if it were ours, for as long as a call
lasts.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import NamedTuple, TypeVar

from ..policy import Compression, Placement, Policy, Tier
from .placement import spread
from .schedule import Rings

__all__ = [
    "ESTIMATED",
    "EXCHANGE_BYTES",
    "PAGE",
    "PINNED_BYTES",
    "ROWS_AT_ONCE",
    "SCORED_AT_ONCE",
    "TILE_BYTES",
    "Call",
    "Demand",
    "Limit",
    "ModelSizes",
    "Need",
    "alternatives",
    "attends_kept",
    "difference",
    "fits",
    "largest",
    "moves_to_front",
    "pages",
    "rings_of",
    "room_for",
    "totals",
]

#: names of the needs that are estimated; nobody but whoever asks takes them from the account
ESTIMATED = frozenset({"working set", "logits"})

#: bytes of a page of memory
PAGE = 4096

_Asked = TypeVar("_Asked", Policy, "Call")

#: beams that change rows are exchanged through blocks of about this size (`cells.exchange`)
EXCHANGE_BYTES = 2 << 20

#: the largest tile of what is cast where it is multiplied (`tiles.TileCast`)
TILE_BYTES = 8 << 20

#: tokens that an expert is multiplied with at a time, if a micro-batch does not have more: the weights are gone through
#: once for as many, so fewer would cost time; more would take room for activations (`experts`)
ROWS_AT_ONCE = 64

#: tokens whose logits are looked at together where continuations are scored, whatever the block: the head's table is
#: gone through once for as many (`continuous.scoring`)
SCORED_AT_ONCE = 64

#: pinned buffers of an accelerator's links, all together (`storage.pinned`)
PINNED_BYTES = 16 << 20


class Need(NamedTuple):
    """Bytes of a tier, and the name under which the account lists them."""

    tier: Tier
    nbytes: int
    what: str


@dataclasses.dataclass(frozen=True)
class Limit:
    """The most that some tiers may hold together.

    Args:
        tiers: on a machine that computes in RAM, device and host are one memory.
        nbytes: the most.
        name: for messages.
    """

    tiers: tuple[Tier, ...]
    nbytes: int
    name: str


@dataclasses.dataclass(frozen=True)
class ModelSizes:
    """The sizes of a model that decide how much memory a call takes.

    Args:
        num_layers: decoder layers.
        hidden_size: elements of a token's hidden states.
        inner_size: elements that the MLP has for a token at once, over all experts that it is sent to.
        query_size: query heads x head_dim.
        key_size: key heads x head_dim; None if the configuration does not say it.
        num_heads: query heads.
        vocab_size: rows of the head's table.
        value_size: as `key_size`, of values; None if they are as large as keys.
        windows: of each layer its sliding window, or None; none at all if no layer has one.
        itemsize: bytes of an element in compute.
        kept_key_bytes: of a token's keys of one row at home; None if they are kept as compute uses them.
        kept_value_bytes: of its values; None if they take as many as keys.
        attends_kept: on a CPU, attention takes cells as they are kept.
        casts_head: the head's table is kept in another dtype than that of compute, and cast tile by tile.
        makes_masks_late: with several micro-batches, masks are made where a layer attends.
        reads_once: with several micro-batches, embeddings are dropped after the first layer, and of what the last one
            returned all but the head's input.
        waits_for_experts: all micro-batches of a block wait at a layer's router for its experts, one of which is
            computed at a time.
    """

    num_layers: int
    hidden_size: int
    inner_size: int
    query_size: int
    key_size: int | None
    num_heads: int
    vocab_size: int
    itemsize: int
    kept_key_bytes: int | None = None
    kept_value_bytes: int | None = None
    value_size: int | None = None
    windows: tuple[int | None, ...] = ()
    attends_kept: bool = False
    casts_head: bool = False
    makes_masks_late: bool = False
    reads_once: bool = False
    waits_for_experts: bool = False


@dataclasses.dataclass(frozen=True)
class Call:
    """What one call of `generate`, or of the model itself, asks for.

    Args:
        rows: sequences in flight, beams and returned sequences counted each.
        tokens: of the prompt that are computed at once, padding included.
        capacity: tokens that the cache is allocated for.
        past: tokens that a given cache holds already.
        beams: rows that stay in one micro-batch.
        copies: rows that a prompt becomes; a block holds whole prompts.
        may_be_cut: rows do not influence each other, so a smaller block is another way to compute the same.
        makes_cache: cells are made for the call; not if the caller gives a cache or wants none.
        logit_tokens: tokens of a row whose logits the model returns at once.
        scored: tokens of all rows whose probability is asked for.
        kept_logits: how often the logits of one token of every row are held, in float32, until the call ends.
        samples: tokens are drawn, so logits are sorted and normalized.
        eager: attention writes its scores to memory.
        keeps_hidden: hidden states of all layers are returned.
        keeps_attention: attention weights of all layers are returned.
        has_loss: a loss is computed from the logits.
        keeps_past: cells of sliding layers keep what is out of their window, so that tokens can be taken back.
        micro_batches: rows of each, where a cache that is given says so and not the policy.
    """

    rows: int
    tokens: int
    capacity: int
    past: int = 0
    beams: int = 1
    copies: int = 1
    may_be_cut: bool = True
    makes_cache: bool = True
    logit_tokens: int = 1
    scored: int = 0
    kept_logits: int = 0
    samples: bool = False
    eager: bool = False
    keeps_hidden: bool = False
    keeps_attention: bool = False
    has_loss: bool = False
    keeps_past: bool = False
    micro_batches: tuple[int, ...] = ()

    def in_block(self, policy: Policy) -> Call:
        """The call with as many rows as are in flight with this policy."""
        if not self.may_be_cut:
            return self
        return dataclasses.replace(
            self, rows=min(self.rows, max(1, policy.block_size // self.copies) * max(1, self.copies))
        )

    def batches(self, policy: Policy) -> list[int]:
        """Rows of each micro-batch."""
        if self.micro_batches:
            return list(self.micro_batches)
        size = max(self.beams, policy.batch_size // self.beams * self.beams)
        return [min(size, self.rows - start) for start in range(0, self.rows, size)]


@dataclasses.dataclass(frozen=True)
class Demand:
    """What a model takes of each tier under any policy.

    Args:
        shape: its sizes.
        weights: what its weights take under a placement: homes, slots and staging.
        direct: compute works in host memory.
        pinned: the links of the device need pinned memory.
    """

    shape: ModelSizes
    weights: Callable[[Placement], Sequence[Need]]
    direct: bool = True
    pinned: bool = False

    def peak(self, policy: Policy, call: Call) -> dict[Tier, int]:
        """The most that each tier holds during a call, in bytes."""
        return totals([*self.weights(policy.weights), *self.needs(policy, call)])

    def needs(self, policy: Policy, call: Call) -> list[Need]:
        """What a call takes beside the weights, in the order in which it is taken.

        The two estimates, with R rows in flight of which r are in a micro-batch, T tokens of the prompt, s the bytes
        of an element in compute, h, f, q and k the elements that a token has as hidden states, in the MLP, as queries
        and as keys:

        *working set*: what the block holds while its prompt goes through the layers, and on top one layer at work.
        The block: 2 R T h s, the embeddings that the model's own code keeps in its frame (of tokens and of positions;
        2 r T h s where they are dropped after the first layer); R T h s d, the share d of hidden states that is not
        parked elsewhere; those of all layers if they are returned, and attention weights, twice where micro-batches are
        put together; 2 R T s head_dim of rotary tables; R T T masks of one byte (r T T where they are made late,
        R T T s where attention is eager); 48 bytes of ids and positions for each token that a row can get. A layer,
        whichever is larger: attention, r T s (2h + 5q + 2k) and the mask in the dtype of compute, r T T s, or where
        attention is eager a head's scores, r T T (2s, in 16 bit s + 8) each; the MLP, r T s (2h + f); a norm that
        computes in float32, r T h (2s + 12). While a block waits for experts, it holds R T h (3s + 4, in float64 4s) on
        top: what was added up so far, what the router saw, and what experts gave; and another R T h s where hidden
        states are parked elsewhere. An expert is computed for r T tokens at a time, at least for `ROWS_AT_ONCE`, as
        m of them: m s (3h + f).

        *logits*: 2s + 8 bytes for each row and entry of the vocabulary (the head's product, one copy, and transformers'
        in float32, those of the last token too, which its loop names until the next are there), 12 more with beams and
        28 more if tokens are drawn, 4 more for each step that is kept; s + 8 for each entry of the vocabulary and each
        of the `SCORED_AT_ONCE` tokens that are scored at a time, whose hidden states are kept until then; 2s for each
        further token whose logits are returned, and for a loss of each 4 more (8 in 16 bit: in float32, and their
        logarithms); and the tile of the head's table that is being cast.

        Measured on a CPU in 48 runs with all of that held (an OPT and a Llama of hidden size 512; float32, bfloat16 and
        float16; greedy, beams, sampling, eager), both together were 0.9 to 2.4 times what the process really took
        beyond the rest, where freed memory goes back to the system (`loading` sees to that); in float32 at least 1.03
        times. The three runs below 1, all in float16, lacked 3 MB at most.

        Args:
            policy: placements and block shape.
            call: what is asked for, already cut to a block.
        """
        batches = call.batches(policy)
        needs = [*self._cache(policy, call, batches), *self._hidden(policy, call, batches)]
        if self.pinned:
            needs.append(Need(Tier.HOST, PINNED_BYTES, "pinned buffers"))
        needs.append(Need(Tier.DEVICE, self._working_set(policy, call, batches), "working set"))
        needs.append(Need(Tier.DEVICE, self._logits(call), "logits"))
        return [need for need in needs if need.nbytes]

    # ------------------------------------------------------------------------------------------------- the exact part
    def _cache(self, policy: Policy, call: Call, batches: Sequence[int]) -> Iterator[Need]:
        """Homes of cells, then the largest of each kind of buffer that cells pass through."""
        shape = self.shape
        if not call.makes_cache or shape.key_size is None:
            return
        casts = shape.kept_key_bytes is not None
        kinds = self._kinds_of_cells(policy, call, batches)
        held = dict.fromkeys(Tier, 0)
        staging = working = 0
        for (window, rows, home), count in kinds.items():
            places = rows * room_for(call.capacity, window)
            kept = sum(pages(places * size) for size in self._kept)
            seen = sum(pages(places * size * shape.itemsize) for size in self._sizes)
            held[home] += count * kept
            if home is Tier.DISK:
                staging = max(staging, kept)
            stays = shape.attends_kept if self.direct else policy.host_attention and home is Tier.HOST
            if not stays and (casts or (not self.direct and home is not Tier.DEVICE)):
                working = max(working, seen)
        for tier in Tier:
            yield Need(tier, held[tier], "the KV cache" if tier is Tier.DISK else "KV cache")
        slots = rings_of(policy).cache
        yield Need(Tier.HOST, slots * staging, "cache slots")
        yield Need(Tier.DEVICE, slots * working, "cache slots")
        if call.beams > 1:
            yield from self._exchange(call, {home for _, _, home in kinds})

    def _kinds_of_cells(
        self, policy: Policy, call: Call, batches: Sequence[int]
    ) -> Mapping[tuple[int | None, int, Tier], int]:
        """How many cells there are of each window, number of rows and home."""
        shape = self.shape
        has_windows = shape.windows and not call.keeps_past
        windows = shape.windows if has_windows else (None,) * shape.num_layers
        one = next((tier for tier in Tier if policy.cache.share(tier) == 1), None)
        if one is None:
            homes = spread(shape.num_layers * len(batches), policy.cache)
            cells = zip(itertools.product(windows, batches), homes, strict=True)
            return collections.Counter((window, rows, home) for (window, rows), home in cells)
        sizes = collections.Counter(batches)
        layers = collections.Counter(windows)
        return {(window, rows, one): layers[window] * sizes[rows] for window in layers for rows in sizes}

    def _exchange(self, call: Call, homes: Collection[Tier]) -> Iterator[Need]:
        token = call.rows * max(self._kept)
        on_disk = Tier.DISK in homes
        # on disk, blocks begin on pages: of a number of tokens that is a power of two, at most 4096
        largest = max(EXCHANGE_BYTES, token * (PAGE if on_disk else 1))
        block = pages(min(largest, token * call.capacity))
        tiers = {home if home is Tier.DEVICE else Tier.HOST for home in homes}
        for tier in tiers:
            yield Need(tier, block, "cache scratch")
        if on_disk:
            yield Need(Tier.HOST, block, "cache scratch")

    @property
    def _sizes(self) -> tuple[int, int]:
        """Elements of a token's keys, and of its values."""
        key, value = self.shape.key_size or 0, self.shape.value_size
        return key, key if value is None else value

    @property
    def _kept(self) -> tuple[int, int]:
        """Bytes of a token's keys of one row at home, and of its values."""
        key, value = self.shape.kept_key_bytes, self.shape.kept_value_bytes
        if key is None:
            key, value = (size * self.shape.itemsize for size in self._sizes)
        return key, key if value is None else value

    def _hidden(self, policy: Policy, call: Call, batches: Sequence[int]) -> Iterator[Need]:
        """Homes of hidden states that are not where compute leaves them, and the buffers that they pass through."""
        if call.keeps_hidden:
            return
        homes = spread(len(batches), policy.hidden)
        token = self.shape.hidden_size * self.shape.itemsize
        sizes = {batch: pages(rows * call.tokens * token) for batch, rows in enumerate(batches)}
        on_host = 0 if self.direct else sum(size for batch, size in sizes.items() if homes[batch] is Tier.HOST)
        yield Need(Tier.HOST, on_host, "hidden states")
        yield Need(Tier.DISK, sum(size for batch, size in sizes.items() if homes[batch] is Tier.DISK), "hidden states")
        slots = rings_of(policy).hidden
        passing = max((size for batch, size in sizes.items() if homes[batch] is Tier.DISK), default=0)
        yield Need(Tier.HOST, (slots + (1 if self.direct else slots + 1)) * passing, "hidden slots")
        if not self.direct:
            moved = max((size for batch, size in sizes.items() if homes[batch] is not Tier.DEVICE), default=0)
            yield Need(Tier.DEVICE, slots * moved, "hidden slots")

    # ------------------------------------------------------------------------------------------------- the estimates
    def _working_set(self, policy: Policy, call: Call, batches: Sequence[int]) -> int:
        shape, tokens, size = self.shape, call.tokens, self.shape.itemsize
        rows, at_once = call.rows, max(batches, default=0)
        key = shape.query_size if shape.key_size is None else shape.key_size
        near = policy.hidden.device + (policy.hidden.host if self.direct else 0)
        parked = rings_of(policy).hidden * at_once / max(1, rows)  # on their way home or back
        several = len(batches) > 1
        parts = 2 if several else 1  # those of the micro-batches, and what they are put together to
        states = parts * (shape.num_layers + 1) if call.keeps_hidden else min(1.0, near + (parked if near < 1 else 0))
        embedded = at_once if several and shape.reads_once and not call.keeps_hidden else rows
        masked = at_once if several and shape.makes_masks_late and policy.num_batches > 1 and not call.eager else rows
        held = tokens * shape.hidden_size * size * (2 * embedded + rows * states)
        if call.keeps_attention:
            held += parts * shape.num_layers * shape.num_heads * rows * tokens * (call.past + tokens) * size
        held += 2 * rows * tokens * size * shape.query_size // shape.num_heads
        if shape.waits_for_experts:
            held += rows * tokens * shape.hidden_size * ((3 if near >= 1 else 4) * size + max(4, size))
        held += masked * tokens * (call.past + tokens) * (size if call.eager else 1) + 48 * rows * call.capacity
        scores = shape.num_heads * (2 * size if size >= 4 else size + 8) if call.eager else size
        attention = tokens * (2 * shape.hidden_size + 5 * shape.query_size + 2 * key) * size
        attention += tokens * (call.past + tokens) * scores
        mlp = tokens * (2 * shape.hidden_size + shape.inner_size) * size
        norm = tokens * shape.hidden_size * (2 * size + 12) if size < 4 else 0
        experts = (
            max(ROWS_AT_ONCE, at_once * tokens) * (3 * shape.hidden_size + shape.inner_size) * size
            if shape.waits_for_experts
            else 0
        )
        return int(held + max(at_once * max(attention, mlp, norm), experts))

    def _logits(self, call: Call) -> int:
        shape = self.shape
        entry = (2 * shape.itemsize + (12 if call.beams > 1 else 0)) * max(1, call.logit_tokens)
        if call.has_loss:
            entry += (4 if shape.itemsize >= 4 else 8) * call.logit_tokens
        entry += 8 + (28 if call.samples else 0) + 4 * call.kept_logits
        cast = TILE_BYTES if shape.casts_head else 0
        scored = min(call.scored, SCORED_AT_ONCE) * shape.vocab_size * (shape.itemsize + 8)
        scored += call.scored * shape.hidden_size * shape.itemsize
        return (
            call.rows * shape.vocab_size * entry
            + scored
            + min(cast, shape.vocab_size * shape.hidden_size * shape.itemsize)
        )


def room_for(tokens: int, window: int | None) -> int:
    """For how many of `tokens` tokens a cell has room.

    With a window, for those that the next token sees, and for an eighth of them more. When these are used up, the
    window is moved to the front: eight tokens for each new one.
    """
    return tokens if window is None else min(tokens, max(1, window - 1) + max(1, window // 8))


def moves_to_front(prompt: int, tokens: int, window: int) -> int:
    """How often a cell moves its window to the front, from the prompt until it has got so many tokens in all.

    Args:
        prompt: tokens that come at once. If there is no room for them, those are kept that the next token sees.
        tokens: in all, for which the cell was made.
        window: of its layer.
    """
    room = room_for(tokens, window)
    first = room if prompt <= room else prompt + room - max(1, window - 1)  # tokens when there is no place for another
    return -(-(tokens - first) // (room - window + 1)) if tokens > first else 0


def attends_kept(compression: Compression, *, direct: bool, is_plain: bool) -> bool:
    """Whether attention takes cells as they are kept, so that nothing is unpacked into slots: the one rule for it.

    Args:
        compression: how cells are kept.
        direct: compute works in host memory.
        is_plain: the model's attention is scaled dot products of what the cache returns, through transformers'
            interface, and its code does nothing else with that.
    """
    return direct and is_plain and compression.groups_cache


def pages(nbytes: int) -> int:
    """Bytes of the whole pages that hold so many."""
    return -(-nbytes // PAGE) * PAGE


def rings_of(policy: Policy) -> Rings:
    """How many reused buffers a policy takes."""
    if not policy.overlap:
        return Rings(layers=1, cache=1, hidden=1, experts=1)
    return Rings(layers=policy.layer_slots, experts=policy.layer_slots + 1)


def totals(needs: Sequence[Need]) -> dict[Tier, int]:
    """Bytes of each tier."""
    held = dict.fromkeys(Tier, 0)
    for need in needs:
        held[need.tier] += need.nbytes
    return held


def fits(peak: Mapping[Tier, int], limits: Sequence[Limit]) -> bool:
    """Whether no limit is passed."""
    return all(sum(peak[tier] for tier in limit.tiers) <= limit.nbytes for limit in limits)


# ------------------------------------------------------------------------------------------------------ what would fit
def alternatives(policy: Policy, fit: Callable[[Policy], bool], *, blocks: bool = True) -> list[Policy]:
    """Policies near to one that does not fit, which do; the nearest first.

    In this order: the same placements with the largest smaller block; the same block with more of the cache on a lower
    tier; with more of the weights there; with less of either on disk, where it is the disk that is too small. Where
    none of these is enough, the largest block with cache and weights on disk; nothing if that does not fit either.

    Args:
        policy: the one that does not fit.
        fit: whether a policy fits.
        blocks: whether block and cache may change; not where it is the weights alone that do not fit.
    """
    found = []
    if blocks:
        found += [_smaller_block(policy, fit), _lower(policy, "cache", fit)]
    found.append(_lower(policy, "weights", fit))
    found += [_off_disk(policy, kind, fit) for kind in (("cache", "weights") if blocks else ("weights",))]
    if blocks and not any(found):
        below = policy.replace(cache=Placement(disk=1.0), weights=Placement(disk=1.0))
        found = [below if fit(below) else _smaller_block(below, fit)]
    return [other for other in found if other is not None]


def _smaller_block(policy: Policy, fit: Callable[[Policy], bool]) -> Policy | None:
    """The largest block below the policy's; of two that are equal the one of larger micro-batches."""
    best: Policy | None = None
    for number in range(policy.num_batches, 0, -1):
        if best is not None and number * policy.batch_size <= best.block_size:
            break

        def make(size: int, number: int = number) -> Policy:
            return policy.replace(batch_size=size, num_batches=number)

        candidate = largest(1, policy.batch_size, make, fit)
        if candidate is not None and (best is None or candidate.block_size >= best.block_size):
            best = candidate
    return best


def _lower(policy: Policy, kind: str, fit: Callable[[Policy], bool]) -> Policy | None:
    """The smallest share more, in whole percents, that has to go to the host, or if that is not enough to disk."""
    placement: Placement = getattr(policy, kind)
    for tier in (Tier.HOST, Tier.DISK):
        first = int(placement.share(tier) * 100) + 1
        most = round(100 * sum(placement.share(other) for other in _down_to(tier)))

        def make(left: int, tier: Tier = tier, most: int = most) -> Policy:
            return policy.replace(**{kind: _shifted(placement, tier, (most - left) / 100)})

        found = largest(0, most - first, make, fit)  # counted from the end: with more percent, more fits
        if found is not None:
            return found
    return None


def _off_disk(policy: Policy, kind: str, fit: Callable[[Policy], bool]) -> Policy | None:
    """The largest share, in whole percents, that may stay on disk if the rest goes to the host."""
    placement: Placement = getattr(policy, kind)

    def make(percent: int) -> Policy:
        share = percent / 100
        return policy.replace(**{kind: Placement(device=placement.device, host=1 - placement.device - share)})

    return largest(0, math.ceil(placement.share(Tier.DISK) * 100) - 1, make, fit)


def _down_to(tier: Tier) -> list[Tier]:
    return list(Tier)[: list(Tier).index(tier) + 1]


def _shifted(placement: Placement, tier: Tier, share: float) -> Placement:
    """A placement with this share on `tier`, what is more taken from the tiers above it in proportion."""
    shares = {other: placement.share(other) for other in Tier}
    above = _down_to(tier)[:-1]
    there = sum(shares[other] for other in above)
    left = max(0.0, there - (share - shares[tier]))
    for other in above:
        shares[other] *= left / there if there else 0.0
    if tier is Tier.HOST:
        shares[tier] += there - left
    return Placement(device=shares[Tier.DEVICE], host=shares[Tier.HOST])


def largest(first: int, last: int, make: Callable[[int], _Asked], fit: Callable[[_Asked], bool]) -> _Asked | None:
    """What `make` makes of the largest number that fits, found by bisection; None if the first does not fit."""
    if first > last:
        return None
    best = make(first)
    if not fit(best):
        return None
    while first < last:
        middle = (first + last + 1) // 2
        candidate = make(middle)
        if fit(candidate):
            first, best = middle, candidate
        else:
            last = middle - 1
    return best


def difference(policy: Policy, other: Policy) -> str:
    """What differs in `other`, for people: `"num_batches=3 (block 24)"`, `"40 % of the cache on disk"`."""
    words = []
    block = [f"{name}={getattr(other, name)}" for name in ("batch_size", "num_batches")
             if getattr(policy, name) != getattr(other, name)]  # fmt: skip
    if block:
        words.append(f"{' and '.join(block)} (block {other.block_size})")
    for kind in ("weights", "cache"):
        before, after = getattr(policy, kind), getattr(other, kind)
        for tier in (Tier.HOST, Tier.DISK):
            if after.share(tier) > before.share(tier) + 1e-9:
                on = "disk" if tier is Tier.DISK else "the host"
                words.append(f"{after.share(tier) * 100:.0f} % of the {kind} on {on}")
    return " and ".join(words) or "the same policy"
