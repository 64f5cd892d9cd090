"""`FlexGenForCausalLM`: the class that a loaded model gets, beside the Hugging Face class it already has.

Generation is transformers' own; what is here cuts batches into blocks and micro-batches and refuses by name what would
otherwise go wrong in silence. One of the two files that touch transformers' less public names.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.generation.configuration_utils import GenerationMode

from . import attention
from .accounting import Account, cache_geometry, windows_of
from .auto_policy import AutoPolicy
from .cell_space import CacheSpace
from .checkpoint_files import CheckpointTensor, source_fingerprint
from .checkpoints import plan_shards
from .continuous.engine import LEAST_SHARED, ContinuousBatches, Engine
from .continuous.scoring import Scored, ScoreRequest, ScoringBatches
from .continuous.texts import TextCache, TextRequest, Written, current_text
from .errors import ConversionError, PolicyError, StoreError, UnsupportedModelError
from .executor import Executor
from .fixed_weights import FixedWeights
from .gguf_files import refuse_missing_reader
from .kv_cache import BlockCache, OpenBlock, Span, spans_of
from .microbatches import by_name, flat, may_be_cut, merged, part_of, prompt_tokens, row_inputs, wants
from .padding import back_in_order, common_padding, in_order, longest_first, without_padding
from .planning.budget import Demand, rings_of
from .planning.hardware import Hardware
from .planning.placement import assign
from .planning.plan import Plan
from .planning.workload import Workload
from .policy import Compression, Policy
from .progress import Progress
from .report import RunReport
from .rotary import FurthestPosition
from .weights.tensors import StoredTensor
from .weights.writer import Origin, write_store

__all__ = ["FlexGenForCausalLM", "attach", "say"]


class FlexGenForCausalLM(FixedWeights):
    """A causal language model whose weights, cache and hidden states live on device, host and disk.

    Not instantiated: `from_pretrained` returns an object of the model's own Hugging Face class (`OPTForCausalLM`, ...)
    that is an instance of this class as well.

    >>> model = FlexGenForCausalLM.from_pretrained("facebook/opt-30b", policy="20 80 0 100 0 100")  # doctest: +SKIP
    """

    config: Any
    generation_config: Any
    #: whether `generate` shows a progress bar on stderr; set it on a model, or here for all of them
    show_progress: bool = False
    #: whether `policy="auto"` says on stderr, in a line, what it found; set it here before a model is loaded
    show_plan: bool = True
    _executor: Executor
    _account: Account
    _furthest: FurthestPosition
    _auto: AutoPolicy | None

    def __init__(self, *_: Any, **__: Any) -> None:
        raise TypeError("use FlexGenForCausalLM.from_pretrained(...)")

    @classmethod
    def from_pretrained(  # noqa: PLR0913  as many as transformers' own, all by name
        cls,
        pretrained_model_name_or_path: str | Path,
        *args: Any,
        policy: Policy | dict[str, Any] | str | Path | None = None,
        compression: Compression | dict[str, Any] | str | None = None,
        max_memory: dict[Any, Any] | None = None,
        offload_folder: str | Path | None = None,
        device: str | torch.device | None = None,
        batch_size: int | None = None,
        num_batches: int | None = None,
        hardware: Hardware | dict[str, Any] | str | Path | None = None,
        workload: dict[str, int | None] | None = None,
        objective: str | None = None,
        deadline_s: float | None = None,
        **kwargs: Any,
    ) -> Any:
        """Loads a model from the Hub, a local folder, or a converted store.

        Args:
            pretrained_model_name_or_path: Hub id or folder, as transformers takes it; or a local `.gguf` file.
            policy: a `Policy`, its dict, JSON text or file (what `flexgen-hf plan --json` writes is one), six
                percentages, or `"auto"`, which finds the best one for this machine, the model, `max_memory` and the
                workload, and then for what `generate` is asked (see `plan`); None fills the fastest tiers first.
            compression: a `Compression`, its dict or JSON, or `"4bit"` for weights and cache. With `weights` (or
                `tables`, or `patterns`), a checkpoint that is not quantized is converted once into `offload_folder`; a
                quantized store needs none, and refuses another one. With `cache=4` (or 2, 3, 8), keys and values are
                kept in groups along head_dim, each with a scale and a minimum of 16 bits; with `cache=16` in float16
                where compute uses float32. Values above 65504 are refused in groups, and overflow in float16. With
                `policy="auto"`, `"any"` leaves it to the search whether weights, or the cache, go into 4 bits; where
                nothing is said, nothing is compressed and tokens are those of transformers.
            max_memory: the most each tier may hold, e.g. `{0: "14GiB", "cpu": "180GiB", "disk": "1TiB"}`; 0 is the
                device. On a machine without accelerator "cpu" limits device and host together, and the C library is
                told to return freed memory to the system.
            offload_folder: where cache and hidden states on disk go, and weights that had to be converted.
            device: where to compute; by default the accelerator, else the CPU.
            batch_size: overrides the policy's.
            num_batches: overrides the policy's.
            hardware: for `"auto"`, the machine: a `Hardware`, a file that `flexgen-hf profile` wrote, or a preset; by
                default this one, which is measured once and kept in Hugging Face's cache of assets.
            workload: for `"auto"`, what is to be generated, as far as it is known: `batch` (prompts; None for as many
                as are fastest), `prompt_len` and `max_new_tokens`. By default 32 prompts, 384 and 128 tokens.
            objective: for `"auto"`, `"throughput"`, `"latency"` (the shortest time), or `"block"` (the largest block
                that ends within `deadline_s`).
            deadline_s: seconds, for `"block"`.
            kwargs: everything else that transformers' `from_pretrained` takes (dtype, revision, token, gguf_file, ...).

        Raises:
            PolicyError: an option that cannot be meant.
            CapacityError: what was asked does not fit.
            StoreError: a missing or broken file.
            UnsupportedModelError: a model that cannot be streamed.
        """
        options = {
            "quant_method": "flexgen",
            "policy": policy.to_dict() if isinstance(policy, Policy) else policy,
            "hardware": hardware.to_dict() if isinstance(hardware, Hardware) else hardware,
            "workload": workload,
            "objective": objective,
            "deadline_s": deadline_s,
            "compression": compression.to_dict() if isinstance(compression, Compression) else compression,
            "max_memory": max_memory,
            "offload_folder": None if offload_folder is None else str(offload_folder),
            "device": None if device is None else str(device),
            "batch_size": batch_size,
            "num_batches": num_batches,
        }
        if kwargs.pop("quantization_config", None) is not None:
            raise PolicyError("quantization_config: pass policy=, compression= and max_memory= themselves")
        kwargs["quantization_config"] = {name: value for name, value in options.items() if value is not None}
        path = Path(pretrained_model_name_or_path)
        if path.suffix == ".gguf" and path.is_file():
            pretrained_model_name_or_path, kwargs["gguf_file"] = path.parent, path.name
        if kwargs.get("gguf_file") is not None:
            refuse_missing_reader()
        try:
            model = AutoModelForCausalLM.from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        except SafetensorError as error:  # transformers looks for the dtype before we check the files
            raise StoreError(
                f"a file of {str(pretrained_model_name_or_path)!r} is not in the safetensors format ({error}); "
                "download it again"
            ) from error
        if not isinstance(model[0] if isinstance(model, tuple) else model, FlexGenForCausalLM):  # output_loading_info
            raise UnsupportedModelError(
                f"transformers loaded {type(model).__name__} by itself, in a way that this version of flexgen_hf does "
                "not know; load a checkpoint of weights, with transformers of the range that setup.cfg names"
            )
        return model

    # ------------------------------------------------------------------------------------------------ what we add
    @property
    def policy(self) -> Policy:
        """The policy in force."""
        return self._executor.policy

    @property
    def plan(self) -> Plan | None:
        """What `policy="auto"` found: the policy, what is predicted of it, why, and what else there was; else None.

        At first for the workload that was declared, after `generate` for what that was asked to do.
        """
        return None if self._auto is None else self._auto.plan

    @property
    def last_run(self) -> RunReport | None:
        """What the last `generate` or `forward` did."""
        return self._executor.last_run

    @property
    def stored_weights(self) -> list[StoredTensor]:
        """Every tensor of the model and where its bytes lie in files."""
        return self._executor.weights.stored

    def close(self) -> None:
        """Gives back all memory and files; the model cannot be used afterwards."""
        self._executor.close()

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ------------------------------------------------------------------------------------------ what we change
    @property
    def device(self) -> torch.device:
        """Where compute happens; parameters may be anywhere."""
        return self._executor.space.device

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The `generate` of transformers, whole. A larger batch is cut into blocks where that changes nothing.

        Sampling draws random numbers for all rows of a batch together, and user functions may look at row numbers: such
        calls keep all rows in flight, in as many micro-batches as it takes.
        """
        whole = super().generate  # type: ignore[misc]
        call = by_name(whole, args, kwargs)
        with torch.no_grad(), self._executor.session() as report:
            settings = self._settings(whole, call)
            self._plan_for(call, settings)
            # Prompts of one length together: what of their padding is common is left out.
            order = longest_first(call, settings) if self._executor.structure.numbers_tokens_by_mask else None
            call = call if order is None else in_order(call, order)
            prompts = self._prompts_per_block(call, settings)
            is_cut = may_be_cut(call, settings) and not self._furthest.is_needed
            account = self._account.generation(may_be_cut=is_cut, tokens=prompt_tokens(call))
            with account, self._progress(report, call, settings, prompts) as shown:
                # What is returned gets no name: an error of the last transfers would keep it, and its cache, alive.
                if prompts is not None:
                    generate = functools.partial(self._generate_in_blocks, shown(whole), prompts, _pad_token(settings))
                else:
                    generate = shown(whole)
                return generate(**call) if order is None else back_in_order(generate(**call), order)

    def generate_each(
        self,
        requests: Iterable[TextRequest],
        *,
        window: int | None = None,
        least_shared: int | None = LEAST_SHARED,
        on_sweep: Callable[[int], None] | None = None,
    ) -> Iterator[Written]:
        """Goes on from prompts that come one by one, however many, with as many in flight as a block holds.

        Each text is what `generate` makes of its prompt alone, with its own options and its own random numbers. A text
        that ends leaves its place to one that waits, whose prompt is computed in the sweep in which the others get
        their next token. What several prompts begin with is computed once.

        Args:
            requests: the prompts; read as far ahead as `window`.
            window: so many requests are put in the order of their lengths; by default 16 blocks, 1024 at least.
            least_shared: tokens that a common beginning has at least for it to be computed once; None computes each
                prompt whole.
            on_sweep: called after each sweep with the number of tokens that it brought.

        Yields:
            Texts as they end. What is wrong with one request comes as its `error`.

        Raises:
            StepError: something could not be moved.
            UnsupportedModelError: a model that cannot be run in this way.
        """
        return ContinuousBatches(self._engine("generate_each"), window, least_shared, on_sweep).run(requests)

    def score_each(
        self,
        requests: Iterable[ScoreRequest],
        *,
        window: int | None = None,
        least_shared: int | None = LEAST_SHARED,
        on_sweep: Callable[[int], None] | None = None,
    ) -> Iterator[Scored]:
        """How likely given continuations are, however many (context, continuation) pairs there are.

        Each forward takes a block of them. Pairs of one context share what they can: continuations of one token are
        one row, and what several rows begin with is computed once. Logits are made for a few tokens at a time.

        Args:
            requests: the pairs; read as far ahead as `window`.
            window: so many requests are put in the order of their lengths; by default 16 blocks, 1024 at least.
            least_shared: tokens that a common beginning has at least for it to be computed once; None computes each
                context whole.
            on_sweep: called after each sweep with the number of rows that it brought.

        Yields:
            For each pair `log_probs`, float32 (continuation,), and `likeliest`, the greedy choices, (continuation,), as
            they come. What is wrong with one request comes as its `error`.

        Raises:
            StepError: something could not be moved.
            UnsupportedModelError: a model that cannot be run in this way.

        >>> request = ScoreRequest(context=[2, 100, 7], continuation=[8, 9], key="mine")
        >>> [(s.request.key, s.total) for s in model.score_each([request])]  # doctest: +SKIP
        [('mine', -7.31)]
        """
        vocabulary = self.config.get_text_config(decoder=True).vocab_size
        engine = self._engine("score_each")
        return ScoringBatches(engine, window, least_shared, on_sweep, vocabulary).score(requests)

    def _engine(self, name: str) -> Engine:
        """What texts are computed with that come and go.

        Raises:
            UnsupportedModelError: a model that cannot be run in this way.
        """
        if self._furthest.is_needed:
            raise UnsupportedModelError(
                f"{name}: {type(self).__name__} turns tokens by an angle that depends on the longest text "
                "beside them, so texts cannot be computed together; give them to the model one at a time"
            )
        windows = windows_of(self.config)
        places = [((layer, place), 1) for layer in range(len(windows)) for place in range(self.policy.num_batches)]
        homes = assign(places, self.policy.cache)
        block = OpenBlock(self._cache_space(), lambda layer, place: homes[layer, place], windows)
        return Engine(
            executor=self._executor,
            account=self._account,
            block=block,
            generate=super().generate,  # type: ignore[misc]
            geometry=None if (geometry := cache_geometry(self.config)) is None else (*geometry, self.dtype),
            context=getattr(self.config.get_text_config(decoder=True), "max_position_embeddings", None),
        )

    def _plan_for(self, call: dict[str, Any], settings: GenerationConfig) -> None:
        """With `policy="auto"`, goes on with the policy that is best for a call; a given cache has its own blocks."""
        auto, executor, width = self._auto, self._executor, prompt_tokens(call)
        if auto is None or executor.is_busy or width is None or call.get("past_key_values") is not None:
            return
        prompts = next(iter(row_inputs(call).values()), call.get("inputs_embeds"))
        assert prompts is not None
        length = max(width + 1, self._longest(call, settings, width)) - 1
        asked = self._account.generated(settings, call, prompts.shape[0], length, width)
        is_assisted = bool(settings.is_assistant or settings.prompt_lookup_num_tokens or call.get("assistant_model"))
        is_cut = may_be_cut(call, settings) and not self._furthest.is_needed
        asked = dataclasses.replace(asked, may_be_cut=is_cut, keeps_past=is_assisted)
        workload = Workload(width, length + 1 - width, asked.rows)
        before, can_attend = self.policy, attention.is_replaceable(self)
        is_moved = auto.choose_again(asked, workload, self._account.held_by_others(), host_attention=can_attend)
        policy = auto.plan.policy
        if policy == before and not is_moved:
            return
        rings, placing = rings_of(policy), auto.placing
        place = functools.partial(placing.store, policy.weights, rings, one_batch=policy.num_batches == 1)
        executor.adopt(policy, place if is_moved else None)
        self._account.adopt(policy, placing.demand(rings, one_batch=auto.one_batch))
        if can_attend:
            attention.attend_for(self, policy, placing.sizes, direct=executor.space.is_direct)
        say(auto.said(workload))

    def _longest(self, call: dict[str, Any], settings: GenerationConfig, width: int) -> int:
        """Tokens that a row of a call can get, by transformers' rules."""
        if settings.max_new_tokens is not None:
            return width + int(settings.max_new_tokens)
        given = (call.get("generation_config"), self.generation_config)
        if call.get("max_length") or any(getattr(one, "max_length", None) is not None for one in given):
            return int(settings.max_length)
        longest = getattr(self.config, "max_position_embeddings", None)
        return min(width + int(settings.max_length), longest or sys.maxsize)

    @contextlib.contextmanager
    def _progress(
        self, report: RunReport, call: dict[str, Any], settings: GenerationConfig, prompts: int | None
    ) -> Iterator[Callable[[Any], Any]]:
        """Shows, if that is wanted, the calls of the function that is passed through what the context yields."""
        executor = self._executor
        if not self.show_progress or executor.on_compute is not None:  # a call inside of one that is shown
            yield lambda generate: generate
            return
        rows, width = next((tensor.shape for tensor in row_inputs(call).values()), (0, 0))
        tokens = settings.max_new_tokens
        if tokens is None and width and call.get("max_length"):
            tokens = max(0, call["max_length"] - width)
        blocks = 1 if prompts is None else -(-rows // prompts)
        with Progress(report, len(executor.structure.layers), blocks, tokens) as progress:
            executor.on_compute = progress.step
            try:
                yield progress.block
            finally:
                executor.on_compute = None

    def _settings(self, generate: Any, call: dict[str, Any]) -> GenerationConfig:
        """The settings of a call as transformers resolves them, from arguments, a given config and the model's."""
        named = inspect.signature(generate).parameters
        free = {name: value for name, value in call.items() if name not in named}
        prepare: Any = self._prepare_generation_config  # type: ignore[attr-defined]
        settings: GenerationConfig = prepare(call.get("generation_config"), **free)[0]
        return settings

    def _prompts_per_block(self, call: dict[str, Any], settings: GenerationConfig) -> int | None:
        """How many prompts fill a block, or None if the call is not to be cut."""
        if self._furthest.is_needed or not may_be_cut(call, settings):
            return None
        rows = row_inputs(call)
        copies = max(settings.num_beams or 1, settings.num_return_sequences or 1)
        prompts = max(1, self.policy.block_size // copies)
        return prompts if next(iter(rows.values())).shape[0] > prompts else None

    def _generate_in_blocks(self, generate: Any, prompts: int, pad: int, /, **call: Any) -> torch.Tensor:
        rows = row_inputs(call)
        rest = {name: value for name, value in call.items() if name not in rows}
        total = next(iter(rows.values())).shape[0]
        blocks = []
        for start, end in spans_of(total, prompts):
            blocks.append(generate(**rest, **{name: value[start:end] for name, value in rows.items()}))
            self._executor.release_cache()  # before the next block takes as much
        width = max(block.shape[1] for block in blocks)
        return torch.cat([torch.nn.functional.pad(block, (0, width - block.shape[1]), value=pad) for block in blocks])

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], generation_mode: Any, batch_size: int, length: int
    ) -> Any:
        wanted = generation_config.cache_implementation
        if wanted not in (None, "dynamic"):
            raise UnsupportedModelError(
                f"cache_implementation={wanted!r}: the policy places the cache; leave cache_implementation out"
            )
        given = model_kwargs.get("past_key_values")
        if isinstance(given, TextCache):
            given.limit, given.beams = length, generation_config.num_beams or 1
            return super()._prepare_cache_for_generation(  # type: ignore[misc]
                generation_config, model_kwargs, generation_mode, batch_size, length
            )
        # candidates that turn out wrong are taken back, and then what was out of a window is in it again
        takes_back = generation_mode is GenerationMode.ASSISTED_GENERATION or bool(generation_config.is_assistant)
        self._account.enter_generation(generation_config, model_kwargs, batch_size, length, keeps_past=takes_back)
        if isinstance(given, BlockCache):
            given.reserve(length)
        if given is not None or generation_config.use_cache is False:
            prepare: Any = super()._prepare_cache_for_generation  # type: ignore[misc]
            return prepare(generation_config, model_kwargs, generation_mode, batch_size, length)
        copies = max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
        beams = generation_config.num_beams or 1
        cache = self._make_cache(batch_size * copies, length, whole_groups_of=beams, keeps_past=takes_back)
        cache.may_leave_padding = (
            self._executor.structure.numbers_tokens_by_mask
            and generation_mode in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
            and not (generation_config.return_dict_in_generate or generation_config.is_assistant)
        )
        model_kwargs["past_key_values"] = cache
        return None

    def _make_cache(self, rows: int, capacity: int, whole_groups_of: int = 1, *, keeps_past: bool = True) -> BlockCache:
        """An empty cache for `rows` rows; the beams of a prompt stay in one micro-batch."""
        policy = self.policy
        size = max(whole_groups_of, policy.batch_size // whole_groups_of * whole_groups_of)
        spans = spans_of(rows, size)
        windows = windows_of(self.config)
        homes = assign([((j, k), 1) for j in range(len(windows)) for k in range(len(spans))], policy.cache)
        cache = BlockCache(
            self._cache_space(),
            spans,
            lambda layer, batch: homes[layer, batch],
            windows,
            max(1, capacity),
            keeps_past=keeps_past,
        )
        if (geometry := cache_geometry(self.config)) is not None:
            cache.preallocate(*geometry, self.dtype)
        return cache

    def _cache_space(self) -> CacheSpace:
        """What the cells of a block will share."""
        policy = self.policy
        # the user may have set another attention since the model was loaded
        attends_kept = self._account.demand.shape.attends_kept and self.config._attn_implementation == attention.NAME
        return CacheSpace(
            self._executor.space, policy.host_attention, policy.compression, self.dtype, attends_kept=attends_kept
        )

    def _optimize_model_for_decode(self) -> Any:
        # transformers would switch mixtures of experts to an implementation that copies an expert for every token.
        return contextlib.nullcontext()

    def generate_batch(self, *_: Any, **__: Any) -> Any:
        """Refused: continuous batching bypasses forward."""
        raise UnsupportedModelError("generate_batch (continuous batching) bypasses forward; use generate")

    def save_pretrained(self, save_directory: str | Path, *_: Any, **kwargs: Any) -> None:
        """Writes a store, which both this package and plain transformers load; what is quantized is dequantized for it.

        Args:
            save_directory: the folder; a store that is there already is replaced.
            kwargs: `push_to_hub`, `state_dict` and `safe_serialization=False` are refused, `is_main_process=False`
                writes nothing; the rest of transformers' arguments has no meaning for a store.
        """
        for name, harmless in (("push_to_hub", False), ("state_dict", None), ("safe_serialization", True)):
            if kwargs.get(name, harmless) is not harmless:
                raise UnsupportedModelError(
                    f"save_pretrained({name}={_short(kwargs[name])}): a store holds the model's own weights in "
                    "safetensors, and is written to a folder; leave the argument out"
                )
        if not kwargs.get("is_main_process", True):
            return
        out, stored = Path(save_directory).resolve(), self._executor.weights.stored
        files = {part.file for tensor in stored for part in tensor.parts}
        if any(out in file.resolve().parents for file in files):
            raise ConversionError(f"the model is loaded from {str(out)!r}; save it to another folder")
        tensors = {tensor.name: CheckpointTensor.of_stored(tensor.extent, self.dtype) for tensor in stored}
        held = self.state_dict()  # type: ignore[attr-defined]
        plans = plan_shards(self._executor.structure, tensors, {name: held[name].dtype for name in tensors})
        dtype = str(self.dtype).removeprefix("torch.")
        write_store(
            out, plans, Origin(str(self.config.name_or_path), None, dtype, source_fingerprint(files)), force=True
        )
        self.config.save_pretrained(save_directory)
        if self.generation_config is not None:
            self.generation_config.save_pretrained(save_directory)

    def push_to_hub(self, *_: Any, **__: Any) -> None:
        """Refused."""
        raise UnsupportedModelError("push_to_hub: save_pretrained to a folder and upload it with huggingface_hub")

    # --------------------------------------------------------------------------------------------------- forward
    def _forward(self, plain: Any, signature: inspect.Signature, *args: Any, **kwargs: Any) -> Any:
        """Cuts the rows into micro-batches, runs `plain` on each in the executor, joins what they return."""
        given = flat(signature.bind(self, *args, **kwargs), signature)
        if (text := current_text()) is not None:
            return text.forward(functools.partial(plain, self), given)
        return_dict, given["return_dict"] = given.get("return_dict"), True
        source = given["input_ids"] if given.get("input_ids") is not None else given.get("inputs_embeds")
        if source is None:
            raise ValueError("forward needs input_ids or inputs_embeds")
        rows, tokens = source.shape[:2]
        spans = self._spans(given.get("past_key_values"), rows)
        with torch.no_grad(), self._executor.session(), self._account.forward(given, spans, tokens) as is_alone:
            cache = given.get("past_key_values")
            if cache is None and wants(given, self.config, "use_cache"):
                cache = given["past_key_values"] = self._make_cache(rows, tokens)
            blocks = cache if isinstance(cache, BlockCache) else None
            bodies = self._bodies(plain, given, spans, tokens)
            keep = wants(given, self.config, "output_hidden_states")
            with self._furthest.among(given):
                outputs = self._executor.run(bodies, blocks, rows=rows, tokens=tokens, keep_hidden=keep)
            if is_alone:
                self._executor.settle()  # what is refused below would stop what is on its way to the cache
            output = self._put_together(outputs, given, strict=is_alone)
        wants_dict = return_dict if return_dict is not None else getattr(self.config, "return_dict", True)
        return output if wants_dict else output.to_tuple()

    def _bodies(
        self, plain: Any, given: Mapping[str, Any], spans: Sequence[Span], tokens: int
    ) -> list[Callable[[], Any]]:
        """The model's own forward with the arguments of each micro-batch."""
        cache, rows, is_prompt = given.get("past_key_values"), spans[-1][1], False
        padding = [0] * len(spans)
        if isinstance(cache, BlockCache):
            is_prompt = cache.get_seq_length() == 0
            # With the logits of all tokens, or hidden states, rows of different length could not be put together.
            if (
                is_prompt
                and cache.may_leave_padding
                and given.get("logits_to_keep") == 1
                and not self._asks_for_all(given)
            ):
                cache.padding = common_padding(given.get("attention_mask"), spans, tokens)
            padding = cache.padding
        return [
            functools.partial(
                plain,
                self,
                **{
                    name: without_padding(name, part_of(name, value, batch, span, rows), padding[batch], is_prompt)
                    for name, value in given.items()
                },
            )
            for batch, span in enumerate(spans)
        ]

    def _asks_for_all(self, given: Mapping[str, Any]) -> bool:
        """Whether a forward is asked for values of every token."""
        asked = ("output_hidden_states", "output_attentions", "output_router_logits")
        return any(wants(given, self.config, name) for name in asked)

    def _spans(self, cache: Any, rows: int) -> list[Span]:
        """The rows of each micro-batch; a cache of another kind than ours is used as it is, whole."""
        if not isinstance(cache, BlockCache):
            return spans_of(rows, self.policy.batch_size if cache is None else rows)
        if cache.spans[-1][1] != rows:
            raise ValueError(f"past_key_values holds {cache.spans[-1][1]} rows but the input has {rows}")
        return cache.spans

    def _put_together(self, outputs: list[Any], given: Mapping[str, Any], *, strict: bool) -> Any:
        """What the micro-batches returned as one.

        The loss is that of all rows at once: a mean of the micro-batches' means would weigh tokens unequally.

        Raises:
            UnsupportedModelError: the model has a loss of its own kind, as its micro-batches show, or returns another
                number that is one for all rows.
        """
        has_loss = given.get("labels") is not None and len(outputs) > 1
        function: Any = self.loss_function if has_loss else None  # type: ignore[attr-defined]
        settings = {"vocab_size": self.config.get_text_config(decoder=True).vocab_size}
        if given.get("num_items_in_batch") is not None:
            settings["num_items_in_batch"] = given["num_items_in_batch"]
        row = 0
        for part in outputs if has_loss else ():
            labels = given["labels"][row : row + part.logits.shape[0]]
            row += part.logits.shape[0]
            if not torch.allclose(function(part.logits, labels, **settings), part.loss, rtol=1e-3, equal_nan=True):
                raise UnsupportedModelError(
                    f"{type(self).__name__} computes another loss than that of the next token, which can't be put "
                    "together from micro-batches; pass one micro-batch at a time, or compute it from the logits"
                )
        output = merged(outputs, given.get("past_key_values"), strict=strict, apart=("loss",) if has_loss else ())
        if has_loss:
            output["loss"] = function(output.logits, given["labels"], **settings)
        return output


def say(line: str) -> None:
    """A line on stderr about a plan, unless `FlexGenForCausalLM.show_plan` is off."""
    if FlexGenForCausalLM.show_plan:
        sys.stderr.write(f"flexgen_hf: {line}\n")


def attach(model: Any, executor: Executor, demand: Demand, auto: AutoPolicy | None = None) -> None:
    """Gives `model` a class that is both its own and `FlexGenForCausalLM`."""
    plain = type(model)
    signature = inspect.signature(plain.forward)

    @functools.wraps(plain.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self._forward(plain.forward, signature, *args, **kwargs)

    # generate() looks at the signature; pipelines, saved configs and output capturing look at the three names.
    forward.__signature__ = signature  # type: ignore[attr-defined]
    names = {"forward": forward, "__module__": plain.__module__, "__qualname__": plain.__qualname__}
    model.__class__ = type(plain.__name__, (FlexGenForCausalLM, plain), names)
    object.__setattr__(model, "_executor", executor)
    object.__setattr__(model, "_auto", auto)
    account = Account(model.config, demand, executor.policy, executor.space.ledger, signature.parameters)
    object.__setattr__(model, "_account", account)
    object.__setattr__(model, "_furthest", FurthestPosition(model))


def _short(value: Any) -> str:
    return repr(value) if isinstance(value, (bool, str)) else f"a {type(value).__name__}"


def _pad_token(settings: GenerationConfig) -> int:
    """What rows that ended are filled up with: the padding token, else the first token that ends a text."""
    pad: Any = settings.pad_token_id if settings.pad_token_id is not None else settings.eos_token_id
    if isinstance(pad, torch.Tensor):
        pad = pad.flatten().tolist()
    return int((pad[0] if isinstance(pad, (list, tuple)) else pad) or 0)
