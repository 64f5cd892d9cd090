"""`policy="auto"`: the policy that is found while a model is loaded, and found anew for what `generate` is asked.

At load, a search over everything decides where weights live and how much room there is for them, for the workload that
was declared. A call of `generate` says what is really to be done: the shape of the block and the homes of cache and
hidden states follow it at no cost. Weights stay where they are unless it pays to read them anew. Whatever is chosen has
passed the account's own sums before.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .errors import CapacityError, PolicyError
from .placing import Placing
from .planning.budget import Call, Limit, fits, rings_of
from .planning.hardware import Hardware
from .planning.placed import Known
from .planning.plan import Freedom, Plan
from .planning.presets import hardware_of
from .planning.schedule import Lane
from .planning.search import Planner
from .planning.shape import ModelShape
from .planning.workload import Workload
from .policy import Compression, Policy, Tier

__all__ = ["DEFAULT_WORKLOAD", "AutoPolicy", "choices_of", "read_hardware", "read_workload", "unbounded"]

#: what is planned for where nothing is said: prompts, tokens of each, and tokens after each
DEFAULT_WORKLOAD = Workload(384, 128, 32)

_WORDS = {"batch": "num_prompts", "prompt_len": "prompt_len", "max_new_tokens": "gen_len"}

# A call whose tokens differ by less than this factor from those planned for is run with the same plan.
_ALIKE = 1.25

# To place weights anew is thought of only for calls that are to take longer, for the search takes time too.
_LONG_S = 5.0

# Rows of a call that takes as many as a block can have.
_MANY_ROWS = 1 << 20

# For a limit where there is none.
_NO_LIMIT = 1 << 60


class AutoPolicy:
    """The plan of one model on this machine.

    Args:
        shape: the model.
        hardware: the machine.
        freedom: what may be chosen.
        limits: of the tiers.
        placing: where its weights would be.
    """

    def __init__(
        self, shape: ModelShape, hardware: Hardware, freedom: Freedom, limits: Sequence[Limit], placing: Placing
    ) -> None:
        self._shape, self._hardware, self._freedom = shape, hardware, freedom
        self._limits = list(limits)
        #: where its weights would be
        self.placing = placing
        self._tensors = placing.planned()
        self._plan: Plan | None = None
        self._planned: Call | None = None  # for which the plan was made
        #: whether weights lie in the form that they have for a single micro-batch
        self.one_batch = False

    @property
    def plan(self) -> Plan:
        """The plan in force."""
        assert self._plan is not None
        return self._plan

    def said(self, workload: Workload) -> str:
        """The plan in a line."""
        count = "blocks" if workload.num_prompts is None else f"{workload.num_prompts} sequences"
        tokens = f"{workload.prompt_len} + {workload.gen_len} tokens"
        return f"plan for {count} of {tokens} on {self._hardware.name}: {self.plan}"

    def choose(self, workload: Workload, *, eager: bool = False) -> Plan:
        """The plan to load with.

        Args:
            workload: what was declared.
            eager: attention writes its scores to memory.

        Raises:
            CapacityError: nothing fits.
            PolicyError: the workload is longer than the model's positions reach.
        """
        if self._shape.max_tokens is not None and workload.prompt_len + workload.gen_len > self._shape.max_tokens:
            raise PolicyError(
                f"workload: {workload.prompt_len} + {workload.gen_len} tokens are more than the "
                f"{self._shape.max_tokens} that the model has positions for; declare a shorter one"
            )
        rows = _MANY_ROWS if workload.num_prompts is None else workload.num_prompts
        length = workload.prompt_len + workload.gen_len - 1
        self._planned = Call(rows, workload.prompt_len, length, eager=eager)
        self._plan = self._searched(workload, self._planned, self._freedom, self._limits)
        self.one_batch = self._plan.policy.num_batches == 1
        return self._plan

    def choose_again(self, call: Call, workload: Workload, held: Mapping[Tier, int], *, host_attention: bool) -> bool:
        """Plans for a call of `generate`; `plan` is what was found.

        Args:
            call: with all its rows.
            workload: the same for the planner, with rows for prompts.
            held: bytes that are taken now by what is neither weights nor taken for a call.
            host_attention: whether attention may be on the host.

        Returns:
            Whether the weights are to be placed anew.

        Raises:
            CapacityError: no block ends within the deadline.
        """
        limits = [dataclasses.replace(m, nbytes=m.nbytes - sum(held[t] for t in m.tiers)) for m in self._limits]
        if self._serves(call, limits):
            return False
        now = self.plan.policy
        free = dataclasses.replace(
            self._freedom,
            compressions=(now.compression,),
            host_attention=host_attention and self._freedom.host_attention,
            layer_slots=now.layer_slots,
            overlap=now.overlap,
        )
        as_they_lie = dataclasses.replace(
            free, weights=now.weights, one_batch=self.one_batch if self._hardware.direct else None
        )
        error: CapacityError | None = None
        found: list[Plan | None] = []
        for freedom in (as_they_lie, free):
            if found and found[0] is not None and self._seconds(found[0], call) < _LONG_S:
                break
            try:
                found.append(self._searched(workload, call, freedom, limits))
            except CapacityError as missing:
                error = missing
                found.append(None)
        kept, moved = found[0], found[1] if len(found) > 1 else None
        if kept is None and moved is None:
            if self._freedom.objective == "block" and error is not None:
                raise error
            return False  # the account will refuse the call, and say what would fit
        is_moved = moved is not None and (
            kept is None or self._seconds(moved, call) + self._reading_s(moved.policy) < self._seconds(kept, call)
        )
        self._plan, self._planned = moved if is_moved else kept, call
        if not is_moved:
            return False
        self.one_batch = self.plan.policy.num_batches == 1
        return True

    # ---------------------------------------------------------------------------------------------------------- inside
    def _searched(self, workload: Workload, call: Call, freedom: Freedom, limits: Sequence[Limit]) -> Plan:
        placing = self.placing

        def accepts(policy: Policy) -> bool:
            return fits(placing.demand_of(policy).peak(policy, call.in_block(policy)), limits)

        known = Known(lambda _: self._tensors, lambda _: placing.sizes, placing.space.is_asynchronous, call)
        shape = dataclasses.replace(
            self._shape, max_tokens=None
        )  # a model that is there says by itself what is too long
        return Planner(shape, self._hardware, workload, freedom, known=known, limits=limits, accepts=accepts).plan()

    def _serves(self, call: Call, limits: Sequence[Limit]) -> bool:
        """Whether the plan in force was made for such a call, and has room for this one."""
        planned, policy = self._planned, self.plan.policy
        assert planned is not None
        near = all(
            one <= _ALIKE * other and other <= _ALIKE * one
            for one, other in ((call.tokens, planned.tokens), (call.capacity, planned.capacity))
        )
        same = dataclasses.replace(call, tokens=planned.tokens, capacity=planned.capacity) == planned
        demand = self.placing.demand(rings_of(policy), one_batch=self.one_batch)
        return near and same and fits(demand.peak(policy, call.in_block(policy)), limits)

    def _seconds(self, plan: Plan, call: Call) -> float:
        """Of all blocks of a call."""
        return plan.predicted.seconds * -(-call.rows // plan.predicted.rows)

    def _reading_s(self, policy: Policy) -> float:
        """Of placing weights anew: what is kept in memory is read from disk."""
        nbytes = sum(tensor.stored_bytes for tensor in self._tensors) * (1 - policy.weights.share(Tier.DISK))
        return nbytes / self._hardware.link(Lane.DISK_TO_HOST).best


# ------------------------------------------------------------------------------------------------------ what is given
def read_workload(given: Any, config: Any, max_new_tokens: int | None, objective: str = "throughput") -> Workload:
    """The workload that was declared; where it says nothing, the usual one, as far as the model's positions reach.

    Args:
        given: a mapping of `batch`, `prompt_len` and `max_new_tokens`, or None.
        config: of the model.
        max_new_tokens: that the model generates if a call does not say it; None if that is not known.
        objective: of the search: the shortest time is usually that of one prompt, the largest block has any number.

    Raises:
        PolicyError: a field that is unknown, or cannot be meant.
    """
    given = {} if given is None else given
    if not isinstance(given, Mapping):
        raise PolicyError(f"workload: {given!r} is no mapping; give for example {{'batch': 64, 'prompt_len': 512}}")
    for name in given:
        if name not in _WORDS:
            near = difflib.get_close_matches(str(name), _WORDS, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(_WORDS)}"
            raise PolicyError(f"workload: unknown field {name!r}; {hint}")
    said = {_WORDS[name]: value for name, value in given.items()}
    usual = dataclasses.asdict(DEFAULT_WORKLOAD)
    usual["num_prompts"] = {"latency": 1, "block": None}.get(objective, usual["num_prompts"])
    if isinstance(max_new_tokens, int) and max_new_tokens > 0:
        usual["gen_len"] = max_new_tokens
    longest = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    if isinstance(longest, int):
        if "gen_len" not in said:
            usual["gen_len"] = max(1, min(usual["gen_len"], longest // 2, longest - _number(said.get("prompt_len"))))
        written = _number(said.get("gen_len", usual["gen_len"]))
        usual["prompt_len"] = max(1, min(usual["prompt_len"], longest - written))
    return Workload(**{**usual, **said})


def _number(value: Any) -> int:
    return value if isinstance(value, int) else 1


def read_hardware(given: Any, *, direct: bool) -> Hardware:
    """The machine that was given: a `Hardware`, its dict, a file's path, or a preset's name.

    Args:
        given: one of these.
        direct: the model computes in host memory.

    Raises:
        PolicyError: none of these, or a machine of another kind than the one that computes.
        StoreError: a file that cannot be read.
    """
    if isinstance(given, Hardware):
        hardware = given
    elif isinstance(given, Mapping):
        hardware = Hardware.from_dict(given)
    elif isinstance(given, (str, Path)):
        hardware = hardware_of(given)
    else:
        raise PolicyError(f"hardware: {given!r} is no machine; give a Hardware, a file of 'flexgen-hf profile', "
                          "or a preset's name")  # fmt: skip
    if hardware.direct != direct:
        here, there = ("in host memory", "a device apart from it") if direct else ("apart from the host", "a CPU")
        raise PolicyError(
            f"hardware: {hardware.name} is {there}, but this model computes {here}; leave hardware out to measure this "
            "machine, or give device="
        )
    return hardware


def unbounded(hardware: Hardware) -> Hardware:
    """A machine with its speeds alone: what was free when it was measured says nothing of what is free now."""
    return dataclasses.replace(hardware, device_bytes=_NO_LIMIT, host_bytes=_NO_LIMIT, disk_bytes=_NO_LIMIT)


def choices_of(bits: int | None) -> tuple[Compression, ...]:
    """What `compression="any"` leaves to choose from, for weights that are stored in so many bits, or in none."""
    weights = (None, 4) if bits is None else (bits,)
    return tuple(Compression(weights=w, cache=c) for w in weights for c in (None, 4))
