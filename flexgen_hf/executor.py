"""Runs the schedule: the only file where storage, weights, cache, hidden states and a model's layers meet.

Each micro-batch runs Hugging Face's own forward in a coroutine. A decoder layer's call suspends it; the schedule's
compute steps resume the right one in the right order. Nothing inside the model is split or written anew.
"""

from __future__ import annotations

import collections
import contextlib
import contextvars
import functools
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import greenlet
import torch
from torch import nn

from .architectures import Structure
from .errors import UnsupportedModelError
from .experts import Experts, Mixture
from .hidden_states import HiddenStates
from .kv_cache import BlockCache
from .parameters import ParameterTable
from .planning.placement import assign
from .planning.schedule import Lane, Route, Schedule, Step, StepId, Traffic, What
from .policy import Policy, Tier
from .quantization.groupwise import GroupFormat, Quantized
from .report import RunReport, peak_rss_bytes
from .storage.lanes import Lanes, LaneUse, Ticket
from .storage.workspace import Workspace
from .tiles import TileCast, TileDequantize
from .weights.store import WeightStore
from .weights.tensors import Unit

__all__ = ["Executor"]

_TRANSFER_LANES = tuple(lane.value for lane in Lane if lane is not Lane.COMPUTE)

# Disks need a second request at hand while the first one ends.
_WORKERS = {Lane.DISK_TO_HOST.value: 2}


class _Row(greenlet.greenlet):
    """The coroutine of one micro-batch."""

    def __init__(self, run: Callable[[], Any], batch: int) -> None:
        super().__init__(run)
        self.batch = batch
        self.at = 0  # the stage it is suspended before; 0 before it started
        self.waits_for_experts = False  # it is suspended in the middle of that stage
        self.held: list[torch.Tensor] = []  # what the model's own frame goes on naming, though it is used up
        self.head_input: torch.Tensor | None = None
        self.head_output: torch.Tensor | None = None
        self.result: Any = None
        # Output capturing and similar features of transformers keep their state in context variables.
        self.gr_context = contextvars.copy_context()

    def suspend(self, stage: int) -> None:
        """Hands control back to the executor until `stage` is due for this micro-batch."""
        assert self.parent is not None
        self.parent.switch(stage)


class Executor:
    """Runs blocks of sequences through a model whose weights live in tiers.

    Args:
        model: the Hugging Face model; its layers, input and output embeddings get an entry point of ours.
        structure: where its stages are.
        weights: the store.
        policy: placements, block shape, overlap.
        space: where it computes and keeps its bytes.
        mixtures: by stage, the experts that the store holds one by one; they get an entry point of ours, too.
    """

    def __init__(
        self,
        model: nn.Module,
        structure: Structure,
        weights: WeightStore,
        policy: Policy,
        space: Workspace,
        mixtures: Mapping[int, Mixture],
    ) -> None:
        self.model, self.structure, self.weights, self.policy = model, structure, weights, policy
        self.space = space
        #: called in each lane before each step; tests inject delays and errors here
        self.before_step: Callable[[str, Any], None] | None = None
        #: called as `on_compute(stage, micro-batch)` after each compute step; shows progress
        self.on_compute: Callable[[int, int], None] | None = None
        self.last_run: RunReport | None = None
        self._lock = threading.RLock()
        self._depth = 0
        self._closed = False
        self._schedule = Schedule(space.rings, overlap=policy.overlap)
        self._sweep = 0  # the one that runs, or the next one
        self._loads: collections.Counter[Unit] = collections.Counter()  # how often each unit was pushed
        self._installs: collections.Counter[Unit] = collections.Counter()  # how often it was used
        self._tickets: dict[StepId, Ticket] = {}
        self._weight_slots: dict[tuple[int, int], int] = {}  # (sweep, stage) -> slot
        self._outer_loaded = False
        self._lanes: Lanes | None = None
        self._hidden: HiddenStates | None = None
        self._cache: BlockCache | None = None  # held as long as lanes may write to it
        self._uses: dict[str, LaneUse] = {}
        self._embedding_dtype: torch.dtype | None = None
        self._forgets = False  # what a prompt's embeddings and last layer return is dropped once it is used up
        self._checked: set[int] = set()  # stages whose modules were seen to have all their tensors
        self._parameters = ParameterTable(model)
        self._tiles, self._dequantized_tiles = TileCast(), TileDequantize()
        self._codes: dict[str, tuple[Quantized, GroupFormat]] = {}  # of the stage that computes
        self._multiplied: list[Any] = []  # modules whose products are ours
        self._mixtures = mixtures
        self._experts = Experts(mixtures, weights, self._tiles, self._dequantized_tiles)
        self._parameters.leave_out(self._experts.placeholders())
        self._parameters.install_resident(weights, model, space.device)
        self._patch()

    # ------------------------------------------------------------------------------------------------------- a session
    @contextlib.contextmanager
    def session(self) -> Iterator[RunReport]:
        """Lanes and temporary files live inside; a `generate` call is one session. Sessions nest.

        When an error passes through, lanes are stopped and what is temporary is dropped; the next session starts anew.
        """
        with self._lock:
            if self._closed:
                raise RuntimeError("the model was closed; load it again")
            self._depth += 1
            try:
                if self._depth == 1:
                    self._open()
                assert self.last_run is not None
                yield self.last_run
                if self._depth == 1:
                    self.settle()
            except BaseException:
                self._abort()
                raise
            finally:
                self._depth -= 1
                if self._depth == 0:
                    self._close()

    def _open(self) -> None:
        self._uses = {lane.value: LaneUse() for lane in Lane}
        self.space.ledger.reset_peaks()
        self.weights.casts.clear()
        self.weights.dequantizations.clear()
        self._loads.clear()
        self._installs.clear()
        self.last_run = RunReport(policy=self.policy, lanes=self._uses)
        self.last_run.placement["weights"] = self.weights.placement
        self._started = time.perf_counter()

    def _close(self) -> None:
        assert self.last_run is not None
        if self._lanes is not None:
            self._lanes.close()
            self._lanes = None
        if self._cache is not None:
            self.last_run.notes += self._cache.space.notes
        if self._hidden is not None:
            self.last_run.notes += self._hidden.notes
        self._cache = None
        self._tiles.release()
        self._dequantized_tiles.release()
        self._codes.clear()
        self._drop_hidden()
        self.last_run.upcasts = self._counted(self.weights.casts)
        self.last_run.dequantizations = self._counted(self.weights.dequantizations)
        self.last_run.elapsed_s = time.perf_counter() - self._started
        self.last_run.peak_bytes = self.space.ledger.peaks()
        self.last_run.peak_rss_bytes = peak_rss_bytes()
        self.last_run.notes += self.weights.notes

    def _counted(self, made: collections.Counter[str]) -> dict[str, int]:
        """How many tensors were cast, or dequantized, in this session, and how often one at most per load."""
        units = self.weights.units
        used = {name: max(1, self._loads[units[name]], self._installs[units[name]]) for name in made}
        most = max((-(-count // used[name]) for name, count in made.items()), default=0)
        return {"tensors": made.total(), "per_stage_and_sweep": most}

    def _abort(self) -> None:
        """Stops the lanes where they are and forgets what was on its way."""
        for ticket in self._tickets.values():
            ticket.finish(InterruptedError("the run was stopped"))
        if self._lanes is not None:
            self._lanes.close(cancel=True)
            self._lanes = None
        self._tickets.clear()
        self._weight_slots.clear()
        self._outer_loaded = False
        self._experts.clear()
        self._schedule.restart()
        self._sweep = self._schedule.sweep
        self._parameters.clear()
        self._drop_hidden()

    def _drop_hidden(self) -> None:
        if self._hidden is not None:
            self._hidden.close()
            self._hidden = None

    def settle(self, *, weights: bool = True) -> None:
        """Waits until no lane moves anything, or without `weights` anything else; raises the first error."""
        for name, ticket in list(self._tickets.items()):
            if weights or name.what not in _OF_WEIGHTS:
                ticket.wait()

    def release_cache(self) -> None:
        """Lets go of the last run's cache, which is held while lanes may write to it."""
        self.settle()
        self._cache = None

    @property
    def is_busy(self) -> bool:
        """Whether a call runs inside of another one's session."""
        return self._depth > 1

    def adopt(self, policy: Policy, place: Callable[[], WeightStore] | None = None) -> None:
        """Goes on with another policy of the same rings, before anything of a session was computed.

        Args:
            policy: the new one.
            place: gives the weights as they are to be placed, if they are to be placed anew; what they take is given
                back before. If that fails the model cannot be used any more.
        """
        assert not self.is_busy
        self.policy = policy
        if place is not None:
            self._abort()
            self._parameters.clear(resident=True)
            self.weights.close()
            try:
                self.weights = place()
                self.weights.load_homes()
            except BaseException:
                self.close()
                raise
            self._experts = Experts(self._mixtures, self.weights, self._tiles, self._dequantized_tiles)
            self._parameters.install_resident(self.weights, self.model, self.space.device)
            self._patch_products()
        if self.last_run is not None:
            self.last_run.policy = policy
            self.last_run.placement["weights"] = self.weights.placement

    def close(self) -> None:
        """Gives back the weights' memory and files."""
        with self._lock:
            self._abort()
            self._closed = True
            self._parameters.clear(resident=True)
            self.weights.close()
            self.space.close()

    # --------------------------------------------------------------------------------------------------------- a sweep
    def run(
        self,
        bodies: Sequence[Callable[[], Any]],
        cache: BlockCache | None,
        *,
        rows: int,
        tokens: int,
        keep_hidden: bool,
        last: bool | None = None,
    ) -> list[Any]:
        """Runs one forward per micro-batch, layer by layer over all of them.

        Args:
            bodies: the forward of each micro-batch.
            cache: their cells, if they have any.
            rows: sequences in all.
            tokens: new tokens of each; where micro-batches differ in it, the largest come first, and it is the mean,
                rounded up.
            keep_hidden: the caller wants the hidden states of every layer, so they stay where they are.
            last: no other sweep will follow; None if the capacity of the cache says so.

        Returns:
            What each body returned.

        Raises:
            StepError: something could not be moved. What the model's own code raises comes as it is, with a note that
                names the step. The cache is closed then: some of its cells hold more tokens than others.
        """
        with _closed_on_error(cache), self.session() as report:
            fresh = cache is None or cache.is_empty
            report.begin_sweep(rows, tokens, fresh)
            if cache is not self._cache:
                self.settle()  # the last writes of the cache before go to memory that ends with it
                self._cache = cache
            if cache is not None:
                cache.settle = self.settle
                cache.prepare_sweep()
            hidden = self._hidden_states(len(bodies), keep_hidden)
            # Of all micro-batches, embeddings would stay on the device until the last layer, its output until the head.
            self._forgets = self.structure.reads_once and len(bodies) > 1 and tokens > 1 and not keep_hidden
            coroutines = [_Row(body, batch) for batch, body in enumerate(bodies)]
            try:
                # Nothing is loaded ahead for a sweep that will not come: the cache is as long as it was meant to get.
                if last is None:
                    last = cache is None or cache.get_seq_length() + tokens >= cache.capacity
                self._execute(self._traffic(cache, hidden, fresh), coroutines, cache, hidden, last)
            finally:
                _end(coroutines)
            if cache is not None:
                report.placement["cache"] = cache.placement()
            report.end_sweep(self._experts.take_use())
            return [coroutine.result for coroutine in coroutines]

    def _traffic(self, cache: BlockCache | None, hidden: HiddenStates, fresh: bool) -> Traffic:
        batches = range(len(hidden.homes))
        nothing = tuple(Route() for _ in batches)
        routes = list(self.weights.routes())
        if self._outer_loaded:
            routes[0] = ()
        layers = [
            tuple(cache.children[k].cells[layer].next_route for k in batches) if cache is not None else nothing
            for layer in range(len(self.structure.layers))
        ]
        return Traffic(
            weights=tuple(routes),
            cache=(nothing, *layers, nothing),
            hidden=tuple(hidden.route(k) for k in batches),
            fresh_cache=fresh,
            tied=self.weights.tied,
            sparse=self._experts.stages,
        )

    def _execute(
        self, traffic: Traffic, coroutines: list[_Row], cache: BlockCache | None, hidden: HiddenStates, last: bool
    ) -> None:
        sweep = self._sweep = self._schedule.sweep
        is_kept = traffic.tied and bool(self.weights.routes()[0])
        following = None
        if self.policy.overlap and not last:
            following = traffic.following(table_is_there=is_kept)
        # Rings bound how far ahead loads can be; to list more than that ahead would only take memory.
        ahead = (self.space.rings.layers + 1) * traffic.num_batches
        work: collections.deque[Step] = collections.deque()

        def choose(stage: int, batch: int) -> Sequence[tuple[int, tuple[Route, ...]]]:
            while work:
                self._compute(work.popleft(), coroutines, cache)
            return self._experts.new(stage, batch)

        for step in self._schedule.steps(traffic, following, choose):
            if step.id.lane is Lane.COMPUTE:
                self._tickets[step.id] = Ticket(step.id)
                work.append(step)
            else:
                self._submit(step, cache, hidden)
            if len(work) > ahead:
                self._compute(work.popleft(), coroutines, cache)
        if is_kept and not self._outer_loaded:
            self._outer_loaded = True
            self._weight_slots[-1, 0] = self._weight_slots[sweep, 0]
        for step in work:
            self._compute(step, coroutines, cache)
        self._sweep = self._schedule.sweep
        self._prune()

    def _submit(self, step: Step, cache: BlockCache | None, hidden: HiddenStates) -> None:
        if self._lanes is None:
            self._lanes = self._start_lanes()
        if step.id.what is What.WEIGHTS:
            self._weight_slots[step.id.sweep, step.id.stage] = step.slot
        if step.id.what in _OF_WEIGHTS:
            self._loads[_unit(step)] += step.id.piece == 0 and step.id.lane is Lane.HOST_TO_DEVICE
        work = self._transfer(step, cache, hidden)
        if self.space.is_asynchronous:
            work = functools.partial(self._finished, work)
        self._tickets[step.id] = self._lanes.submit(step.id.lane.value, step.id, work, self._awaited(step))

    def _finished(self, work: Callable[[], int]) -> int:
        moved = work()
        self.space.finish_copies()
        return moved

    def _start_lanes(self) -> Lanes:
        lanes = Lanes(
            _TRANSFER_LANES,
            workers=_WORKERS,
            around=self.space.in_lane,
            before_step=self.before_step,
            uses=self._uses,
        )
        # Lanes set the number of their own thread to one; torch gives the last number set to threads that come later.
        torch.set_num_threads(torch.get_num_threads())
        return lanes

    def _awaited(self, step: Step) -> list[Ticket]:
        """The tickets of what a step waits for. What is no longer listed is from a sweep that was waited for."""
        for name in step.after:
            assert name in self._tickets or name.sweep < self._sweep, f"{step.id} waits for {name}, which is not listed"
        return [self._tickets[name] for name in step.after if name in self._tickets]

    def _transfer(self, step: Step, cache: BlockCache | None, hidden: HiddenStates) -> Callable[[], int]:
        """The function that moves what a step names."""
        _, lane, what, stage, batch, piece = step.id
        verb = _VERBS[lane]
        if what in _OF_WEIGHTS:
            return functools.partial(getattr(self.weights, verb), _unit(step), piece, step.slot, step.staging)
        if what is What.CACHE:
            assert cache is not None
            return functools.partial(getattr(cache.children[batch].cells[stage - 1], verb), step.slot)
        if verb in ("read", "push"):
            return functools.partial(getattr(hidden, verb), batch, step.slot)
        return functools.partial(getattr(hidden, verb), batch)

    def _compute(self, step: Step, coroutines: list[_Row], cache: BlockCache | None) -> None:
        stage, batch = step.id.stage, step.id.batch
        for ticket in self._awaited(step):
            ticket.wait()
        with self._uses[Lane.COMPUTE.value].at_work(step.id), _noted(step):
            if self.before_step is not None:
                self.before_step(Lane.COMPUTE.value, step.id)
            if step.id.what is What.EXPERT:
                self._installs[_unit(step)] += 1
                self._experts.compute(stage, batch, step.slot)
            elif step.id.what is What.REST:
                self._run_rest(coroutines[batch], stage)
            else:
                self._run_stage(step, coroutines, cache)
            is_part = step.id.what is What.EXPERT or (step.id.what is What.STAGE and stage in self._experts.stages)
            if batch in (-1, len(coroutines) - 1) and not is_part:
                self._uninstall(stage)
        self._tickets[step.id].finish(event=self._event())
        if self.on_compute is not None:
            self.on_compute(stage, -1 if step.id.what is What.EXPERT else batch)

    def _run_stage(self, step: Step, coroutines: list[_Row], cache: BlockCache | None) -> None:
        """A stage, or of a layer with experts what comes before them."""
        stage, batch = step.id.stage, step.id.batch
        if batch <= 0:
            self._install(stage)
            self._experts.begin(stage)
        if cache is not None and 0 < stage < self.structure.head_stage:
            cache.children[batch].cells[stage - 1].bind(step.slot)
        if stage == self.structure.head_stage:
            self._run_head(coroutines)
        else:
            self._resume(coroutines[batch], stage)

    def _run_rest(self, coroutine: _Row, stage: int) -> None:
        """What a layer does after its experts; nothing where it did without them."""
        if coroutine.waits_for_experts:
            coroutine.waits_for_experts = False
            self._resume(coroutine, stage)

    def _resume(self, coroutine: _Row, stage: int) -> None:
        """Runs a micro-batch from the stage it is suspended before to the next one."""
        if coroutine.dead:
            raise UnsupportedModelError(
                f"{type(self.model).__name__} ended its forward before {self.structure.stage_name(stage)}; models that "
                "skip layers cannot be streamed"
            )
        if coroutine.at != stage:
            raise UnsupportedModelError(
                f"{type(self.model).__name__} wants to run {self.structure.stage_name(coroutine.at)} when "
                f"{self.structure.stage_name(stage)} is due; models that skip, repeat or reorder layers cannot be "
                "streamed"
            )
        result = coroutine.switch()
        if bool(coroutine):  # suspended before its next stage
            coroutine.at = result
        else:
            coroutine.result = result

    def _run_head(self, coroutines: Sequence[_Row]) -> None:
        """The head for all micro-batches at once, so that its table is gone through (and cast) once."""
        waiting = [c for c in coroutines if not c.dead]  # those are done whose model has no module for its head
        if any(c.at != self.structure.head_stage for c in waiting):
            raise UnsupportedModelError(
                f"{type(self.model).__name__} did not go from its last layer to its head, so it cannot be streamed"
            )
        head: Any = self.model
        head = head.get_output_embeddings()
        inputs = [c.head_input for c in waiting if c.head_input is not None]
        alike = len(inputs) == len(waiting) and len({x.shape[1:] for x in inputs}) == 1
        if alike and type(head) is nn.Linear:
            logits = self._tiles.linear(torch.cat(inputs), head.weight, head.bias)
            for coroutine, part in zip(waiting, torch.split(logits, [x.shape[0] for x in inputs]), strict=True):
                coroutine.head_output = part
        for coroutine in waiting:
            self._resume(coroutine, self.structure.head_stage)

    # ------------------------------------------------------------------------------------------ inside the model's code
    def _patch(self) -> None:
        for index, layer in enumerate(self.structure.layers):
            layer.__dict__["flexgen_forward"] = layer.forward
            layer.__dict__["forward"] = functools.partial(self._enter_layer, index + 1, layer)
        self._patch_products()
        for stage, experts in self._experts.modules():
            experts.__dict__["forward"] = functools.partial(self._enter_experts, stage)
        model: Any = self.model
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        if embedding is not None:
            self._embedding_dtype = self._parameters.dtype_of(embedding)
            embedding.__dict__["flexgen_forward"] = embedding.forward
            embedding.__dict__["forward"] = functools.partial(self._enter_embedding, embedding)
        for _, module in self.structure.outer_modules():
            if module is not embedding and module is not head:  # of positions, norms
                module.__dict__["flexgen_forward"] = module.forward
                module.__dict__["forward"] = functools.partial(self._enter_outer, module)
        if head is not None and head is not embedding:
            head.__dict__["flexgen_forward"] = head.forward
            head.__dict__["forward"] = functools.partial(self._enter_head, head)

    def _patch_products(self) -> None:
        """Has matrices multiplied here that arrive in another form than that of compute; no others."""
        for module in self._multiplied:
            del module.__dict__["forward"]
        self._multiplied = []
        for index in range(len(self.structure.layers)):
            for name in self.weights.late(index + 1):
                linear: Any = self._parameters.owner(name)
                linear.__dict__["forward"] = functools.partial(self._multiply, name, linear)
                self._multiplied.append(linear)

    def _enter_layer(self, stage: int, layer: Any, *args: Any, **kwargs: Any) -> Any:
        coroutine = self._current(f"layer {stage - 1}")
        coroutine.suspend(stage)
        hidden = self._hidden
        assert hidden is not None
        # Experts come when all micro-batches are at their router, by when the slot is another's.
        args, kwargs = hidden.restore(coroutine.batch, args, kwargs, outlives_slot=stage in self._experts.stages)
        output = layer.flexgen_forward(*args, **kwargs)
        states = output[0] if isinstance(output, (tuple, list)) else output
        if stage == 1:
            self._forget(coroutine, states)
        if stage == self.structure.head_stage - 1:
            coroutine.held.append(states)
            return output
        return hidden.park(coroutine.batch, output)

    def _enter_experts(
        self, stage: int, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """The forward of a module of experts, under transformers' own names."""
        coroutine = self._current("a mixture of experts")
        self._experts.arrive(coroutine.batch, hidden_states, top_k_index, top_k_weights)
        coroutine.waits_for_experts = True
        coroutine.suspend(stage)
        return self._experts.result(coroutine.batch)

    def _forget(self, coroutine: _Row, needed: torch.Tensor) -> None:
        """Frees what is used up and the model's frame goes on naming, but for `needed`; whoever reads it reads NaN."""
        held, coroutine.held = coroutine.held, []
        for tensor in held if self._forgets else ():
            if tensor.data_ptr() != needed.data_ptr():
                tensor.set_(tensor.new_full((), math.nan).expand(tensor.shape))  # type: ignore[call-overload]

    def _multiply(self, name: str, linear: Any, x: torch.Tensor) -> torch.Tensor:
        """The forward of a layer's matrix that is kept in its stored dtype, or in codes."""
        if name in self._codes:
            self.weights.dequantizations[name] += 1
            return self._dequantized_tiles.linear(x, *self._codes[name], linear.bias)
        self.weights.casts[name] += linear.weight.dtype != x.dtype
        return self._tiles.linear(x, linear.weight, linear.bias)

    def _enter_head(self, head: Any, *args: Any, **kwargs: Any) -> Any:
        coroutine = self._current("the head")
        if coroutine.at != self.structure.head_stage:
            is_plain = len(args) == 1 and not kwargs and isinstance(args[0], torch.Tensor)
            coroutine.head_input = args[0] if is_plain else None
            if is_plain and self._forgets:
                self._keep_alone(coroutine, args[0])
            coroutine.suspend(self.structure.head_stage)
            if coroutine.head_output is not None:
                output, coroutine.head_output = coroutine.head_output, None  # whoever scores comes again
                return output
        if type(head) is nn.Linear and len(args) == 1 and not kwargs:
            return self._tiles.linear(args[0], head.weight, head.bias)
        return head.flexgen_forward(*args, **kwargs)

    def _keep_alone(self, coroutine: _Row, head_input: torch.Tensor) -> None:
        """Has the head's input, the last token's part of what the last layer returned, be all that is left of it."""
        if all(head_input.numel() < tensor.numel() for tensor in coroutine.held):
            kept = head_input.clone()
            self._forget(coroutine, kept)
            head_input.set_(kept)  # type: ignore[call-overload]

    def _enter_embedding(self, embedding: Any, *args: Any, **kwargs: Any) -> Any:
        current = greenlet.getcurrent()
        if isinstance(current, _Row):
            embedded = self._embed(embedding, *args, **kwargs)
            current.held.append(embedded)
            return embedded
        # Callers may embed tokens themselves, to pass inputs_embeds.
        with self.session():
            self.settle()
            arrived = self._outer_loaded or (self._sweep, 0) in self._weight_slots
            if self.weights.routes()[0] and not arrived:
                self.weights.fetch_now(Unit(0))
                self._weight_slots[self._sweep, 0] = 0
            self._install(0)
            try:
                return self._embed(embedding, *args, **kwargs)
            finally:
                self._uninstall(0)

    def _enter_outer(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        output = module.flexgen_forward(*args, **kwargs)
        current = greenlet.getcurrent()
        if isinstance(current, _Row) and isinstance(output, torch.Tensor):
            current.held.append(output)
        return output

    def _embed(self, embedding: Any, *args: Any, **kwargs: Any) -> Any:
        output = embedding.flexgen_forward(*args, **kwargs)
        # A table that is kept in its stored dtype is cast row by row, where rows are taken.
        wanted = self._embedding_dtype
        return output.to(wanted) if wanted is not None and isinstance(output, torch.Tensor) else output

    def _current(self, what: str) -> _Row:
        current = greenlet.getcurrent()
        if not isinstance(current, _Row):
            raise UnsupportedModelError(f"{what} was called outside of the model's forward; its weights are not loaded")
        return current

    # --------------------------------------------------------------------------------------------------------- helpers
    def _install(self, stage: int) -> None:
        source = self._weights_stage(stage)
        unit, slot = Unit(source), self._weights_slot(source)
        self._installs[unit] += 1
        self._parameters.install(source, self.weights.tensors(unit, slot))
        self._codes = {name: (codes, fmt) for name, codes, fmt in self.weights.codes(unit, slot)}
        if stage not in self._checked:
            # torch can multiply by a tensor on `meta` without an error and return garbage, so this is looked at once.
            self._parameters.check_complete(self._modules_of(stage), self.structure.stage_name(stage))
            self._checked.add(stage)

    def _uninstall(self, stage: int) -> None:
        if not (self.weights.tied and stage in (0, self.structure.head_stage)):
            self._parameters.uninstall(stage)

    def _modules_of(self, stage: int) -> list[nn.Module]:
        model: Any = self.model
        if 0 < stage < self.structure.head_stage:
            return [self.structure.layers[stage - 1]]
        head = model.get_output_embeddings()
        if stage == self.structure.head_stage:
            return [] if head is None else [head]
        return [module for _, module in self.structure.outer_modules() if module is not head]

    def _weights_stage(self, stage: int) -> int:
        return 0 if self.weights.tied and stage == self.structure.head_stage else stage

    def _weights_slot(self, stage: int) -> int:
        if stage == 0 and self._outer_loaded:
            return self._weight_slots[-1, 0]
        return self._weight_slots.get((self._sweep, stage), -1)

    def _hidden_states(self, batches: int, keep: bool) -> HiddenStates:
        homes = [Tier.DEVICE] * batches
        if not keep:
            placed = assign([(k, 1) for k in range(batches)], self.policy.hidden)
            homes = [placed[k] for k in range(batches)]
        if self._hidden is None or self._hidden.homes != homes:
            if self._hidden is not None:
                self.settle()
                self._hidden.close()
            self._hidden = HiddenStates(homes, self.space)
        return self._hidden

    def _event(self) -> Any:
        """On a device that computes asynchronously, an event after everything issued so far."""
        if not self.space.is_asynchronous:
            return None
        event = torch.Event(self.space.device)
        event.record()
        return event

    def _prune(self) -> None:
        """Forgets tickets and slots of sweeps that nothing can wait for any more."""
        for name in [n for n in self._tickets if n.sweep < self._sweep - 1]:
            self._tickets.pop(name).wait()
        for key in [k for k in self._weight_slots if 0 <= k[0] < self._sweep]:
            del self._weight_slots[key]


_VERBS = {
    Lane.DISK_TO_HOST: "read",
    Lane.HOST_TO_DEVICE: "push",
    Lane.DEVICE_TO_HOST: "pull",
    Lane.HOST_TO_DISK: "write",
}


_OF_WEIGHTS = (What.WEIGHTS, What.EXPERT)


def _unit(step: Step) -> Unit:
    """What a step of weights moves, or what an expert's step computes with."""
    return Unit(step.id.stage, step.id.batch if step.id.what is What.EXPERT else -1)


@contextlib.contextmanager
def _closed_on_error(cache: BlockCache | None) -> Iterator[None]:
    """Whoever handles the error may keep the cache alive; what it holds is of no use and should not take room."""
    try:
        yield
    except BaseException:
        if cache is not None:
            cache.close()
        raise


@contextlib.contextmanager
def _noted(step: Step) -> Iterator[None]:
    """The model's own errors keep their type, as code written for transformers expects, and say where they arose."""
    try:
        yield
    except Exception as error:
        if sys.version_info >= (3, 11):
            error.add_note(f"{step.id} failed in lane '{step.id.lane}'")
        raise


def _end(coroutines: list[_Row]) -> None:
    """Ends coroutines that an error left suspended, so that they give back what they hold."""
    for coroutine in coroutines:
        if not coroutine.dead and bool(coroutine):
            coroutine.throw(greenlet.GreenletExit)
