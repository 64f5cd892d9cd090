"""Finds the policy for a model, a machine and a workload, and says why.

For each shape of a block, a linear program (HiGHS) finds the shares of weights, cache and hidden states: the seconds of
each lane and the bytes of each tier are linear in them. Shapes of blocks are tried from coarse to fine, the best
policies are simulated, and the fastest of those wins. Method: FlexGen, arXiv 2303.06865, section 4.3.
"""

from __future__ import annotations

import collections
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ..errors import CapacityError, PolicyError
from ..policy import Compression, Placement, Policy, Tier
from .budget import Limit, fits, totals
from .cost import Lanes, PlannedRun, Prediction, limits_of, predict
from .hardware import Hardware
from .layout import WeightLayout
from .linear import KINDS, Program
from .placed import Known
from .plan import OBJECTIVES, Alternative, Freedom, Plan, prediction_to_dict
from .schedule import Lane
from .shape import ModelShape
from .simulate import simulate
from .workload import Sweep, Workload

__all__ = [
    "COMPRESSIONS", "OBJECTIVES", "Alternative", "Freedom", "Plan", "Planner", "compressions_of",
    "plan", "prediction_to_dict",
]  # fmt: skip

_FREE, _UNKNOWN = Freedom(), Known()

# No machine holds so many bytes: such a limit is none.
_UNLIMITED = 1 << 55

#: what a search chooses from where compression is left to it
COMPRESSIONS = (Compression(), Compression(cache=4), Compression(weights=4), Compression(weights=4, cache=4))

_SIZES = (1, 4, 16, 64, 256)
_NUMBERS = (1, 4, 16)
_LARGEST_BLOCK = 8192

# Sizes beside the best ones that are tried next, and then beside the best of these.
_FINER = ((0.5, 1.0, 2.0), (0.75, 1.0, 1.25, 1.5))
_REFINED = 3

# Layers that have room where compute needs them, and whether lanes work side by side. Less takes less memory, but what
# it frees has to be worth more than what it stops: it is tried where nothing fits otherwise, and room for one layer
# also where that for two is a large part of a tier.
_RINGS = ((2, True), (1, True), (2, False))
_LARGE_PART = 1 / 8

# Shares that go to lower tiers than a linear program says, until what it took for linear fits as it is.
_LOWER = (0.0, 0.01, 0.02, 0.04, 0.08, 0.16)

# How many policies of the closed form are simulated at most, and of those that are alike.
_SIMULATED = 6
_ALIKE = 2
_ALTERNATIVES = 3

# Fewer pieces than a run has make simulations shorter; a layer of several still begins to arrive early.
_PIECES = 4


def compressions_of(text: str) -> tuple[Compression, ...]:
    """What `--compression` leaves to choose from.

    Raises:
        PolicyError: it is neither `none`, `any`, nor one compression.
    """
    if text == "any":
        return COMPRESSIONS
    return (Compression.of(None if text == "none" else text),)


def plan(
    shape: ModelShape,
    hardware: Hardware,
    workload: Workload,
    freedom: Freedom = _FREE,
) -> Plan:
    """The best policy for a model on a machine.

    Args:
        shape: the model.
        hardware: the machine.
        workload: what is to be generated.
        freedom: what may be chosen.

    Raises:
        CapacityError: nothing fits; with what is missing, and how much.
        PolicyError: the workload is longer than the model's positions reach.
    """
    return Planner(shape, hardware, workload, freedom).plan()


class Planner:
    """A search for one model, machine and workload.

    Args:
        shape: the model.
        hardware: the machine.
        workload: what is to be generated.
        freedom: what may be chosen.
        known: of a model that is there.
        limits: of tiers, beside what the machine holds.
        accepts: whether a policy fits, where that is known better than by the sums here; asked of what is to be chosen.
    """

    def __init__(
        self,
        shape: ModelShape,
        hardware: Hardware,
        workload: Workload,
        freedom: Freedom = _FREE,
        *,
        known: Known = _UNKNOWN,
        limits: Sequence[Limit] = (),
        accepts: Callable[[Policy], bool] = lambda _: True,
    ) -> None:
        self.shape, self.hardware, self.workload, self.freedom = shape, hardware, workload, freedom
        self.limits = _tightest([*limits_of(hardware), *limits])
        self._known_model, self._accepts = known, accepts
        self._corners: dict[tuple[Any, ...], _Corner] = {}
        self._simulations: dict[Policy, Prediction] = {}
        self._worth: dict[tuple[Any, ...], float] = {}  # of the best policy of its kind
        self._layouts: dict[tuple[Placement, Compression, bool], WeightLayout] = {}
        if shape.max_tokens is not None and workload.prompt_len + workload.gen_len > shape.max_tokens:
            raise PolicyError(
                f"workload: {workload.prompt_len} + {workload.gen_len} tokens are more than the {shape.max_tokens} "
                f"that {shape.name or 'the model'} has positions for; make prompts or answers shorter"
            )

    def run(self, policy: Policy) -> PlannedRun:
        """A policy in its place."""
        run = PlannedRun(self.shape, self.hardware, policy, self.workload, known=self._known_model, pieces=_PIECES)
        key = (policy.weights, policy.compression, policy.num_batches == 1)
        if key not in self._layouts:
            self._layouts[key] = run.layout
        run.layout = self._layouts[key]
        return run

    def fits(self, run: PlannedRun) -> bool:
        """Whether no tier is too small."""
        return fits(run.peak_bytes, self.limits)

    def plan(self) -> Plan:
        """Searches, simulates the best, and explains."""
        found = self._search()
        best = self._simulated(found) or self._last_resort()
        if best is None:
            raise CapacityError(self._missing())
        policy, predicted = best
        if self.freedom.objective == "block" and predicted.seconds > (self.freedom.deadline_s or 0):
            raise CapacityError(
                f"no block ends within {self.freedom.deadline_s:g} s: a single one of {predicted.rows} rows takes "
                f"{predicted.seconds:.1f} s; give more time, or shorter prompts or answers"
            )
        others = self._alternatives(policy, found)
        return Plan(
            policy, predicted, tuple(self._why(policy, predicted, others)), others, tuple(self._warnings(policy))
        )

    def explain(self, policy: Policy) -> Plan:
        """What is predicted of a given policy.

        Raises:
            CapacityError: it does not fit; with what is missing, and how much.
        """
        run = self.run(policy)
        if not self.fits(run):
            raise CapacityError(f"the policy {policy} does not fit: {'; '.join(self._short_of(run))}")
        predicted = simulate(run)
        return Plan(policy, predicted, tuple(self._why(policy, predicted, ())), (), tuple(self._warnings(policy)))

    # -------------------------------------------------------------------------------------------------------- search
    def _search(self) -> list[tuple[Policy, Prediction]]:
        found: dict[Policy, Prediction] = {}
        for rings in self._rings():
            for compression, attention in itertools.product(self.freedom.compressions, self._attentions):
                frame = Policy(host_attention=attention, compression=compression, **rings)
                for size, number in self._blocks(_SIZES, _NUMBERS):
                    self._try(frame.replace(batch_size=size, num_batches=number), found)
            if found:
                break
        for factors in _FINER:
            for place, policy in enumerate(self._leaders(found)):
                sizes = {max(1, round(policy.batch_size * factor)) for factor in factors}
                numbers = {max(1, round(policy.num_batches * factor)) for factor in factors}
                for size, number in self._blocks(sorted(sizes), sorted(numbers)):
                    block = policy.replace(batch_size=size, num_batches=number)
                    self._try(block, found)
                    if place == 0 and factors is _FINER[-1] and self._are_slots_large(block):
                        self._try(block.replace(layer_slots=1), found)
        return self._best_first(found)

    def _rings(self) -> list[dict[str, Any]]:
        """How many reused buffers there may be, the most first."""
        free = self.freedom
        pairs = [(free.layer_slots or slots, on if free.overlap is None else free.overlap) for slots, on in _RINGS]
        return [{"layer_slots": slots, "overlap": on} for slots, on in dict.fromkeys(pairs)]

    def _are_slots_large(self, policy: Policy) -> bool:
        """Whether the room for layers may be made smaller, and is a large part of a tier."""
        if self.freedom.layer_slots is not None or not policy.overlap or policy.layer_slots == 1:
            return False
        run = self.run(policy)
        slots = totals([need for need in run.layout.needs(run.rings) if need.what == "weight slots"])
        return any(sum(slots[tier] for tier in limit.tiers) > _LARGE_PART * limit.nbytes for limit in self.limits)

    def _leaders(self, found: Mapping[Policy, Prediction]) -> list[Policy]:
        """The best policies that differ in more than numbers."""
        leaders: dict[Any, Policy] = {}
        for policy, _ in self._best_first(found):
            leaders.setdefault(_character(policy), policy)
        return list(leaders.values())[:_REFINED]

    def _best_first(self, found: Mapping[Policy, Prediction]) -> list[tuple[Policy, Prediction]]:
        return sorted(found.items(), key=lambda item: -self._worth_of(item[1]))

    def _worth_of(self, prediction: Prediction) -> float:
        return self.freedom.worth(prediction, self.workload.num_prompts)

    def _simulated(self, found: Sequence[tuple[Policy, Prediction]]) -> tuple[Policy, Prediction] | None:
        """The best policy by simulation. The closed form is a bound, so what it says is worse need not be simulated."""
        best: tuple[Policy, Prediction] | None = None
        alike = collections.Counter[Any]()
        for policy, bound in found:
            if best is not None and self._worth_of(bound) <= self._worth_of(best[1]):
                break
            # with fewer slots the closed form promises more than it keeps: these don't take the others' places
            kind = _character(policy) if policy.layer_slots > 1 else None
            if alike[kind] == _ALIKE or (kind is not None and alike.total() - alike[None] == _SIMULATED):
                continue
            accepted = self._accepted(policy)
            if accepted is None:
                continue
            alike[kind] += 1
            made = self._simulations[accepted] = simulate(self.run(accepted))
            if best is None or self._worth_of(made) > self._worth_of(best[1]):
                best = accepted, made
        return best

    def _accepted(self, policy: Policy) -> Policy | None:
        """The policy, with as much as need be taken to lower tiers for it to be accepted."""
        for step in _LOWER:
            lower = policy.replace(**self._placements({kind: getattr(policy, kind) for kind in KINDS}, step))
            if self._accepts(lower):
                return lower
        return None

    def _last_resort(self) -> tuple[Policy, Prediction] | None:
        """The policy that takes least, if that one fits."""
        for policy in self._smallest():
            run = self.run(policy)
            if self.fits(run) and self._accepts(policy):
                return policy, simulate(run)
        return None

    @property
    def _attentions(self) -> tuple[bool, ...]:
        """Whether attention may be on the host."""
        is_possible = (
            not self.hardware.direct and self.hardware.host_attention_bytes_per_s and self.shape.attends_plainly
        )
        return (False, True) if self.freedom.host_attention and is_possible else (False,)

    def _blocks(self, sizes: Iterable[int], numbers: Iterable[int]) -> Iterator[tuple[int, int]]:
        """Shapes of blocks, no larger than the work."""
        free = self.freedom
        sizes = [free.batch_size] if free.batch_size is not None else sizes
        numbers = [free.num_batches] if free.num_batches is not None else list(numbers)
        rows = self.workload.num_prompts
        if free.objective == "latency":
            rows = rows or 1
        most = _LARGEST_BLOCK if rows is None else rows
        call = self._known_model.call
        made = set()
        for size, number in itertools.product(sizes, numbers):
            if free.batch_size is None:
                size = min(size, most)  # noqa: PLW2901  the last one is what there is
            needed = -(-most // size)
            if free.num_batches is None:
                # of rows that cannot be cut into blocks, all are in flight
                number = needed if call is not None and not call.may_be_cut else min(number, needed)  # noqa: PLW2901
                number = number if free.one_batch is None else 1 if free.one_batch else max(2, number)  # noqa: PLW2901
            if (size, number) not in made:
                made.add((size, number))
                yield size, number

    def _try(self, frame: Policy, found: dict[Policy, Prediction]) -> None:
        """Adds the best policy with this block, unless it cannot be better than what is known."""
        program = self._program(frame)
        for mode in _MODES:
            # Compared with its like only: where data comes from several tiers, the closed form promises the most.
            like = (frame.compression, frame.host_attention, frame.layer_slots, frame.overlap, mode)
            known = self._worth.get(like, float("-inf"))
            if self._worth_in(program.least_s(*mode), program) < known:
                continue
            solution = program.solve(*mode)
            if solution is None or self._worth_in(solution.seconds, program) < known:
                continue
            run = self._rounded(frame, solution.shares)
            if run is None or run.policy in found or (frame.host_attention and not run.policy.cache.host):
                continue
            found[run.policy] = predict(run)
            self._worth[like] = max(self._worth_of(found[run.policy]), known)

    def _worth_in(self, seconds: float, program: Program) -> float:
        """What a block would be worth that ends in so many seconds."""
        return self._worth_of(Prediction(0.0, seconds, program.rows, self.workload.gen_len, {}, {}, {}))

    def _rounded(self, frame: Policy, shares: Mapping[str, Placement]) -> PlannedRun | None:
        """The policy in whole percents that fits, with as much as need be taken to lower tiers."""
        for step in _LOWER:
            run = self.run(frame.replace(**self._placements(shares, step)))
            if self.fits(run):
                return run
        return None

    def _placements(self, shares: Mapping[str, Placement], step: float) -> dict[str, Placement]:
        """Whole percents, with `step` less on each faster tier; of what is given, that."""
        made = {kind: _floored(placement, step) for kind, placement in shares.items()}
        return made if self.freedom.weights is None else {**made, "weights": self.freedom.weights}

    # ---------------------------------------------------------------------------------------------- the linear program
    def _program(self, frame: Policy) -> Program:
        """Seconds and bytes as linear functions of the shares."""
        run = self.run(frame.replace(weights=_DISK, cache=_DISK, hidden=_DISK))
        prefill, decode = run.sweeps()
        phases = [(prefill, 1)] + ([(decode, self.workload.gen_len - 1)] if decode is not None else [])
        return Program(
            phases=[(self._linear_lanes(run, sweep), count) for sweep, count in phases],
            bytes_of=functools.partial(self._linear_bytes, run),
            limits=self.limits,
            rows=sum(run.batches),
            overhead_s=run.between_s * self.workload.gen_len,
            slots=run.rings.layers,
            overlap=frame.overlap,
            cores_of=self.hardware.parts_of_cores,
        )

    def _linear_lanes(self, run: PlannedRun, sweep: Sweep) -> dict[tuple[str, Tier], Lanes]:
        """Seconds of each lane for all of one kind on one tier."""
        made: dict[tuple[str, Tier], Lanes] = {}
        rows = collections.Counter(zip(run.batches, run.paddings, strict=True))
        layers = collections.Counter(run.kinds_of_layers)
        sweeps = {padding: run.without_padding(sweep, padding) for _, padding in rows}
        fixed = run.head_s() + sum(count * run.embedding_s(size, sweeps[p]) for (size, p), count in rows.items())
        for tier in Tier:
            cells, hidden = dict.fromkeys(Lane, 0.0), dict.fromkeys(Lane, 0.0)
            cells[Lane.COMPUTE] = fixed
            for (size, padding), count in rows.items():
                own = sweeps[padding]
                for stage, like in layers.items():
                    for lane, seconds in run.cell_lanes(stage, size, tier, own).items():
                        cells[lane] += count * like * seconds
                for lane, seconds in run.hidden_lanes(size, tier, own).items():
                    hidden[lane] += count * seconds
            made["cache", tier], made["hidden", tier] = cells, hidden
            made["weights", tier] = self._corner(run.policy, tier).lanes[bool(sweep.past)]
        return made

    def _linear_bytes(
        self, run: PlannedRun, cache: Tier | None, hidden: Tier | None
    ) -> dict[tuple[str, Tier], dict[Tier, int]]:
        """Bytes of each tier for all of one kind on one tier, and under `("fixed", ...)` those of buffers.

        Args:
            run: the block.
            cache: the tier that all cells are on; None if they may be anywhere.
            hidden: the same of hidden states.
        """
        made: dict[tuple[str, Tier], dict[Tier, int]] = {}
        call, demand = run.call, run.demand
        worst = run.policy.replace(
            cache=Placement.all_on(cache or Tier.DISK), hidden=Placement.all_on(hidden or Tier.DISK)
        )
        needs = demand.needs(worst, call)
        made["fixed", Tier.DEVICE] = totals([need for need in needs if need.what not in _HOMES])
        far = totals([need for need in needs if need.what == "working set"])
        for tier in Tier:
            there = Placement.all_on(tier)
            needs = demand.needs(worst.replace(cache=there, hidden=there), call)
            cells = totals([need for need in needs if need.what in _HOMES[:2]])
            states = totals([need for need in needs if need.what == _HOMES[2]])
            near = totals([need for need in needs if need.what == "working set"])
            made["weights", tier] = self._corner(run.policy, tier).held
            made["cache", tier] = cells
            made["hidden", tier] = {t: states[t] + max(0, near[t] - far[t]) for t in Tier}
        return made

    def _corner(self, policy: Policy, tier: Tier) -> _Corner:
        """All weights on one tier, or where they are given to be."""
        # with experts, a larger block needs more of the weights
        block = policy.block_size if any(layer.experts for layer in self.shape.layers) else 0
        key = (policy.compression, policy.num_batches == 1, policy.layer_slots, policy.overlap, tier, block)
        if key not in self._corners:
            run = self.run(policy.replace(weights=self.freedom.weights or Placement.all_on(tier)))
            prefill, decode = run.sweeps()
            lanes = (run.weight_lanes(prefill), run.weight_lanes(decode or Sweep(1, self.workload.prompt_len)))
            self._corners[key] = _Corner(lanes, totals(run.layout.needs(run.rings)))
        return self._corners[key]

    # ------------------------------------------------------------------------------------------------------ explaining
    def _smallest(self) -> Iterator[Policy]:
        """Policies of which none that takes less of a tier is known: everything on one tier, the smallest block."""
        free = self.freedom
        for compression, tier in itertools.product(free.compressions, (Tier.DISK, Tier.HOST)):
            there = Placement.all_on(tier)
            yield Policy(
                weights=free.weights or there,
                cache=there,
                hidden=there,
                batch_size=free.batch_size or 1,
                num_batches=free.num_batches or (2 if free.one_batch is False else 1),
                compression=compression,
                layer_slots=free.layer_slots or 1,
                overlap=bool(free.overlap),
            )

    def _missing(self) -> str:
        """What is missing for the smallest block."""
        best: list[str] | None = None
        for policy in self._smallest():
            short = self._short_of(self.run(policy))
            best = short if best is None or len(short) < len(best) else best
        return (
            f"{self.shape.name or 'the model'} does not fit {self.hardware.name} under any policy: "
            f"{'; '.join(best or ['no block of the given shape fits'])}; give more memory, another compression, or "
            "shorter prompts"
        )

    def _short_of(self, run: PlannedRun) -> list[str]:
        short = []
        for limit in self.limits:
            needed = sum(run.peak_bytes[tier] for tier in limit.tiers)
            if needed > limit.nbytes:
                tiers = " and ".join(limit.tiers)
                missing = _gib(needed - limit.nbytes)
                short.append(f"{tiers} needs {_gib(needed)} but has {_gib(limit.nbytes)}, {missing} too few")
        return short

    def _alternatives(self, policy: Policy, found: Sequence[tuple[Policy, Prediction]]) -> tuple[Alternative, ...]:
        """The best of each other choice of compression, attention and weights' home."""
        seen, made = {_character(policy)}, list[Alternative]()
        for other, predicted in found:
            if _character(other) not in seen and len(made) < _ALTERNATIVES:
                seen.add(_character(other))
                made.append(Alternative(other, self._simulations.get(other, predicted), _label(policy, other)))
        return tuple(made)

    def _why(self, policy: Policy, predicted: Prediction, others: Sequence[Alternative]) -> Iterator[str]:
        phases: list[tuple[str, Lanes, float]] = [
            ("prefill", predicted.prefill_lanes, predicted.prefill_s),
            ("decode", predicted.decode_lanes, predicted.decode_s),
        ]
        for name, lanes, seconds in phases:
            if seconds:
                lane = max(lanes, key=lanes.__getitem__)
                yield f"in {name}, {lane} is the limit: busy {min(1.0, lanes[lane] / seconds):.0%} of {seconds:.1f} s"
        for limit in [limit for limit in self.limits if limit.nbytes < _UNLIMITED]:
            held = sum(predicted.peak_bytes[tier] for tier in limit.tiers)
            tiers = " and ".join(limit.tiers)
            yield f"{tiers} holds {_gib(held)} of {_gib(limit.nbytes)}"
        larger = policy.replace(num_batches=policy.num_batches + 1)
        rows = self.workload.num_prompts
        if rows is not None and policy.block_size >= rows:
            yield f"the block takes all {rows} prompts"
        elif short := self._short_of(self.run(larger)):
            yield f"with one micro-batch more at these shares, {short[0]}"
        for other in others:
            yield f"{other.label} would write {other.predicted.tokens_per_s:.2f} token/s"

    def _warnings(self, policy: Policy) -> Iterator[str]:
        resident = policy.replace(
            weights=Placement(device=1.0),
            cache=Placement(device=1.0),
            hidden=Placement(device=1.0),
            host_attention=False,
        )
        if self.fits(self.run(resident)):
            yield "everything fits on the device without offloading; plain transformers is simpler and no slower"


_MODES: tuple[tuple[Tier | None, Tier | None], ...] = (
    (None, None),
    (Tier.DEVICE, Tier.DEVICE),
    (Tier.HOST, Tier.HOST),
)
_DISK = Placement(disk=1.0)
_HOMES = ("KV cache", "the KV cache", "hidden states")


class _Corner(NamedTuple):
    """All weights on one tier: seconds of each lane in the first sweep and in others, and bytes of each tier."""

    lanes: tuple[Lanes, Lanes]
    held: dict[Tier, int]


def _floored(placement: Placement, step: float) -> Placement:
    """Whole percents, with `step` less on each faster tier."""
    device = max(0.0, int(placement.device * 100 + 1e-6) / 100 - (step if placement.device < 1 else 0.0))
    host = int(placement.host * 100 + 1e-6) / 100
    if placement.share(Tier.DISK) < 1e-9:
        return Placement(device=device, host=1 - device)
    return Placement(device=device, host=max(0.0, host - (step if device == 0 else 0.0)))


def _character(policy: Policy) -> tuple[Compression, bool, Tier, bool]:
    """What makes two policies different in kind: compression, where attention is, where the cache is, all or most."""
    main = max(Tier, key=policy.cache.share)
    return policy.compression, policy.host_attention, main, policy.cache.share(main) > 0.995


def _label(policy: Policy, other: Policy) -> str:
    words = []
    if other.compression != policy.compression:
        words.append(str(other.compression) or "no compression")
    if other.host_attention != policy.host_attention:
        words.append(f"attention on the {'host' if other.host_attention else 'device'}")
    *_, main, is_all = _character(other)
    if (main, is_all) != _character(policy)[2:]:
        words.append(f"{'all' if is_all else 'most'} of the cache on {main}")
    return ", ".join(words)


def _tightest(limits: Iterable[Limit]) -> list[Limit]:
    """Of limits on the same tiers, the smallest."""
    found: dict[tuple[Tier, ...], Limit] = {}
    for limit in limits:
        if limit.tiers not in found or limit.nbytes < found[limit.tiers].nbytes:
            found[limit.tiers] = limit
    return list(found.values())


def _gib(nbytes: float) -> str:
    return f"{nbytes / 2**30:.2f} GiB"
