"""How a model gets here: the quantization method `"flexgen"` in transformers' own registry.

transformers' `from_pretrained` does what it always does (Hub, revisions, shards, dtype, generation config). Our hook
before it loads weights takes every tensor out of its hands and notes where its bytes lie; the hook after it gives the
model our class and an executor. One of the two files that touch transformers' less public names.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import convert_file_size_to_int, get_max_memory
from huggingface_hub import cached_assets_path
from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    AutoHfQuantizer,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin, QuantizationMethod

from . import attention
from .architectures import Structure, describe
from .auto_policy import AutoPolicy, choices_of, read_hardware, read_workload, unbounded
from .checkpoint_files import CheckpointTensor, index_files, source_fingerprint, stores_of
from .checkpoints import plan_shards, planned_quantizing, read_checkpoint, target_dtype
from .default_policy import default_policy
from .errors import FlexGenError, PolicyError, StoreError, UnsupportedModelError
from .executor import Executor
from .experts import find_mixtures
from .families import is_tested
from .modeling import attach, say
from .placing import Placing, what_fits
from .planning.budget import Limit, rings_of
from .planning.hardware import Hardware
from .planning.plan import Freedom
from .planning.search import Planner
from .planning.shape import ModelShape
from .planning.workload import Workload
from .policy import AUTO, Compression, Policy, Tier
from .prequantized import METHOD, dequantizer, method_of
from .profile_cache import hardware_here
from .quantization.dispatch import kernels_loaded_beside
from .quantization.groupwise import GroupFormat
from .storage.buffers import return_freed_memory
from .storage.files import check_offload_folder
from .storage.ledger import Ledger
from .storage.workspace import Workspace, default_device
from .weights.format import FORMAT_VERSION, Manifest, TensorExtent
from .weights.quantized import LAYOUT_VERSION, QuantizedExtent, Quantizing
from .weights.stacked import StackedExtent
from .weights.tensors import StoredTensor
from .weights.writer import Origin, write_store

__all__ = ["METHOD", "register"]

_Extent = TensorExtent | QuantizedExtent | StackedExtent

logger = logging.getLogger(__name__)

# Of memory that nobody limited, this part is planned with: what is free now may be less in a moment.
_PART_OF_FREE_MEMORY = 0.85

# The compression with which "auto" may choose one.
_ANY = "any"


def register() -> None:
    """Makes transformers know the method `"flexgen"`. Calling it again does nothing."""
    if METHOD in AUTO_QUANTIZER_MAPPING:
        return
    register_quantization_config(METHOD)(FlexGenConfig)
    register_quantizer(METHOD)(FlexGenHfQuantizer)
    attention.register()
    _let_load_time_win()


def _let_load_time_win() -> None:
    """What is given at load wins over what config.json holds; transformers would ignore or refuse the former."""
    merge = AutoHfQuantizer.merge_quantization_configs.__func__  # type: ignore[attr-defined]

    @functools.wraps(merge)
    def merged(cls: Any, stored: Any, given: Any) -> Any:
        if method_of(given) != METHOD:
            return merge(cls, stored, given)
        if method_of(stored) != METHOD:
            dequantizer(stored)  # refuses it by name, if it must be
            return FlexGenConfig(**_options(given), stored=stored)
        wanted = {k: v for k, v in _options(given).items() if v is not None}
        kept = _options(stored)
        if "policy" in wanted:  # block sizes that are stored override the stored policy, not this one
            kept = {k: v for k, v in kept.items() if k not in ("batch_size", "num_batches")}
        return FlexGenConfig(**{**kept, **wanted})

    AutoHfQuantizer.merge_quantization_configs = classmethod(merged)  # type: ignore[method-assign,assignment]


def _options(config: Any) -> dict[str, Any]:
    options = dict(config) if isinstance(config, Mapping) else config.to_dict()
    return {name: value for name, value in options.items() if name != "quant_method"}


class FlexGenConfig(QuantizationConfigMixin):
    """What `quantization_config={"quant_method": "flexgen", ...}` may hold; plain JSON values are enough.

    Args:
        policy: a Policy, its dict, JSON text or file, the original's six percentages, or "auto"; None fills the fastest
            tiers.
        batch_size: overrides the policy's.
        num_batches: overrides the policy's.
        compression: a Compression, its dict or JSON, "4bit" (weights and cache), or None; with "auto" also "any".
        max_memory: bytes (or "14GiB") for 0 (the device), "cpu" and "disk".
        offload_folder: where cells and hidden states on disk go, and converted weights.
        device: where to compute; by default the accelerator, else the CPU.
        hardware: with "auto", the machine: a Hardware's dict, a file or a preset; None measures this one, once.
        workload: with "auto", `batch`, `prompt_len` and `max_new_tokens`, as far as they are known.
        objective: with "auto", "throughput" (as if None), "latency" or "block".
        deadline_s: of a block, with the objective "block".
        format_version: written into stores.
        stored: what the checkpoint's own configuration says of how another method has quantized it.

    Raises:
        PolicyError: an unknown option, or one that belongs to "auto" without it.
    """

    def __init__(  # noqa: PLR0913, PLR0917  one argument per key of the dict
        self,
        policy: Any = None,
        batch_size: int | None = None,
        num_batches: int | None = None,
        compression: Any = None,
        max_memory: Mapping[Any, Any] | None = None,
        offload_folder: str | None = None,
        device: str | None = None,
        hardware: Any = None,
        workload: Mapping[str, Any] | None = None,
        objective: str | None = None,
        deadline_s: float | None = None,
        format_version: int | None = None,
        stored: Any = None,
        quant_method: str = METHOD,
        **unknown: Any,
    ) -> None:
        if unknown:
            raise PolicyError(
                f"quantization_config: unknown option {sorted(unknown)[0]!r}; known are policy, batch_size, "
                "num_batches, compression, max_memory, offload_folder, device, hardware, workload, objective, "
                "deadline_s"
            )
        self.quant_method = quant_method  # type: ignore[assignment]
        self.policy, self.batch_size, self.num_batches = policy, batch_size, num_batches
        self.compression, self.max_memory = compression, max_memory
        self.offload_folder, self.device, self.format_version = offload_folder, device, format_version
        self.stored = stored
        self.hardware, self.workload, self.objective, self.deadline_s = hardware, workload, objective, deadline_s
        for name in ("hardware", "workload", "objective", "deadline_s"):
            if getattr(self, name) is not None and not self.is_auto:
                raise PolicyError(f"{name}: it says what policy='auto' is to find; give that policy, or leave it out")

    @property
    def is_auto(self) -> bool:
        """Whether the policy is to be found."""
        return isinstance(self.policy, str) and self.policy.strip() == AUTO

    @property
    def freedom(self) -> Freedom:
        """What of a policy is to be found, but for its compression."""
        return Freedom(
            batch_size=self.batch_size,
            num_batches=self.num_batches,
            objective=self.objective or "throughput",
            deadline_s=self.deadline_s,
        )

    def to_dict(self) -> dict[str, Any]:
        """What config.json keeps: the method and the format. A policy belongs to a machine, not to a checkpoint."""
        return {"quant_method": METHOD, "format_version": self.format_version or FORMAT_VERSION}

    def to_diff_dict(self) -> dict[str, Any]:
        """The same."""
        return self.to_dict()


class FlexGenHfQuantizer(HfQuantizer):
    """The two hooks through which transformers' own `from_pretrained` loads a model into our tiers."""

    quantization_config: FlexGenConfig

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        if isinstance(quantization_config, Mapping):
            quantization_config = FlexGenConfig(**quantization_config)
        super().__init__(quantization_config, **kwargs)
        self._tensors: list[StoredTensor] = []
        self._hook: Any = None
        # transformers lets gguf_file= pass for this method only, and asks once, before it validates the environment
        quantization_config.quant_method = QuantizationMethod.GGUF

    def validate_environment(self, *_: Any, **__: Any) -> None:
        """Nothing is missing that was not refused before."""
        self.quantization_config.quant_method = METHOD  # type: ignore[assignment]

    def read_header(self, gguf_file: str) -> None:
        """Called for a GGUF file before its weights are looked at."""
        if not Path(gguf_file).is_file():
            raise StoreError(f"{gguf_file} is not there; check gguf_file=")

    def update_dtype(self, dtype: Any) -> Any:
        """As transformers loads a GGUF file for which no type was asked."""
        return torch.get_default_dtype() if dtype is None else dtype

    def get_state_dict(self, *_: Any, **__: Any) -> dict[str, torch.Tensor]:
        """Of a GGUF file: nothing that transformers would have to load."""
        return {}

    @property
    def is_trainable(self) -> bool:
        """False: weights come and go."""
        return False

    def is_serializable(self) -> bool:
        """True: `save_pretrained` writes a store."""
        return True

    def update_device_map(self, device_map: Any) -> Any:
        """Refuses a device_map: the policy places the weights."""
        whole = {"": str(device_map[""])} if isinstance(device_map, Mapping) and set(device_map) == {""} else device_map
        if whole not in (None, "auto", "cpu", {"": "cpu"}):  # the last is what transformers makes of "cpu"
            raise PolicyError(f"device_map={device_map!r}: the policy places the weights; leave device_map out")
        return None

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Sequence[str] | None = None, dtype: torch.dtype | None = None, **_: Any
    ) -> Any:
        if not checkpoint_files:
            raise UnsupportedModelError("flexgen_hf loads checkpoints from files; a state_dict cannot be streamed")
        options = self.quantization_config
        _check(options)
        self._structure = describe(model)
        if not is_tested(model.config.model_type):
            logger.warning(
                "%s: model type %r is not among the families that flexgen_hf is tested with; compare a few outputs "
                "with plain transformers",
                type(model).__name__,
                model.config.model_type,
            )
        files = [Path(file) for file in checkpoint_files]
        _check_store(files)
        folder = _offload_folder(options)
        with torch.device("cpu"):  # transformers calls this where new tensors would be made on "meta"
            found = read_checkpoint(model, files, dtype)
            compression = self._compression = _compression(options, model, found)
            extents = _Checkpoint(self._structure, found, files, dtype or model.dtype).extents(compression, folder)
        self._tensors = [
            StoredTensor(name, self._structure.locate(name)[0], extent, target_dtype(model, name, dtype or model.dtype))
            for name, extent in extents.items()
        ]
        self._hide(model)
        return model

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        self._hook.remove()
        if self._own_ignore is None:
            del model._keys_to_ignore_on_load_unexpected
        else:
            model._keys_to_ignore_on_load_unexpected = self._own_ignore
        self._tie(model)
        build(model, self._structure, self._tensors, self._compression, self.quantization_config)
        return model

    def _tie(self, model: Any) -> None:
        """Ties what the checkpoint holds once. transformers leaves that out while both sides are on `meta`."""
        held = {tensor.name for tensor in self._tensors}
        for target, source in model.all_tied_weights_keys.items():
            if target not in held:
                owner, _, name = target.rpartition(".")
                setattr(model.get_submodule(owner), name, model.get_parameter_or_buffer(source))

    def _hide(self, model: Any) -> None:
        """Keeps transformers' loader from reading anything: no name is expected, every name may be unexpected."""
        self._hook = model.register_state_dict_post_hook(lambda _m, state, _prefix, _meta: state.clear())
        self._own_ignore = model.__dict__.get("_keys_to_ignore_on_load_unexpected")
        model._keys_to_ignore_on_load_unexpected = {""}


# ------------------------------------------------------------------------------------------------- the checkpoint
def _check_store(files: Sequence[Path]) -> None:
    """A store of ours says what its shards must be like; a shard that is not is refused before anything is read."""
    for folder in stores_of(files):
        Manifest.load(folder).check_files(folder)


def _check(options: FlexGenConfig) -> None:
    """Reads what can be read without the model, so that what cannot be meant is refused at once."""
    if options.is_auto:
        Policy.from_dict({name: size for name, size in _block(options).items() if size is not None})
        _ = options.freedom
        if options.compression == _ANY:
            return
    elif options.policy is not None:
        _policy(options)
    Compression.of(options.compression)


def _compression(options: FlexGenConfig, model: Any, found: Mapping[str, CheckpointTensor]) -> Compression:
    """What is asked for by itself, or else by the policy, or chosen where any is allowed."""
    if options.is_auto and options.compression == _ANY:
        return _chosen_compression(options, model, found)
    if options.compression is None and options.policy is not None and not options.is_auto:
        return _policy(options).compression
    return Compression.of(options.compression)


def _chosen_compression(options: FlexGenConfig, model: Any, found: Mapping[str, CheckpointTensor]) -> Compression:
    """The fastest one, by the sizes that the configuration tells; how weights are stored already is no choice."""
    stored = next((t.quantized.format.bits for t in found.values() if t.quantized is not None), None)
    device = _device(options)
    limits, shared = _limits(options, device)
    ledger = Ledger(limits, shared=shared)
    planner = Planner(
        _shape(model),
        _hardware(options, device),
        _workload(options, model),
        dataclasses.replace(options.freedom, compressions=choices_of(stored), host_attention=_may_attend(model)),
        limits=[*ledger.limits(), *_free_memory(ledger, device)],
    )
    chosen = planner.plan().policy.compression
    return chosen if stored is None else Compression(cache=chosen.cache)


class _Checkpoint:
    """A model's tensors in their files, and what has to be done before they can be used there."""

    def __init__(
        self, structure: Structure, found: Mapping[str, CheckpointTensor], files: Sequence[Path], dtype: torch.dtype
    ) -> None:
        self._structure, self._found, self._files, self._dtype = structure, found, files, dtype

    def extents(self, compression: Compression, folder: Path) -> dict[str, _Extent]:
        """Where each tensor's bytes lie. A checkpoint whose bytes do not lie in files as needed is converted once.

        Args:
            compression: what was asked for.
            folder: for what is converted.

        Raises:
            PolicyError: the checkpoint is quantized in another way than was asked for.
        """
        wanted = planned_quantizing(self._structure, self._found, compression) if compression.of_weights else {}
        stored = {name: t.quantized.format for name, t in self._found.items() if t.quantized is not None}
        if stored and compression.of_weights:
            _refuse_other_formats({name: how.format for name, how in wanted.items()}, stored)
        apart = self._may_lie_apart()
        lying: dict[str, _Extent | None] = {
            name: t.quantized or t.extent or (t.stacked if name in apart else None) for name, t in self._found.items()
        }
        extents = {name: extent for name, extent in lying.items() if extent is not None}
        if len(extents) == len(lying) and (stored or not wanted):
            return extents
        return self._converted(folder, wanted)

    def _may_lie_apart(self) -> set[str]:
        """The tensors of which each expert's matrix is used by itself, and its rows in several parts."""
        mixtures = find_mixtures(self._structure.layers, self._structure.layers_name).values()
        return {name for mixture in mixtures if not mixture.is_transposed for name in mixture.tensors}

    def _converted(self, folder: Path, quantizing: Mapping[str, Quantizing]) -> dict[str, _Extent]:
        fingerprint = source_fingerprint(self._files)
        dtype = str(self._dtype).removeprefix("torch.")
        label = re.sub(r"\W+", "-", str(getattr(self._structure.model.config, "name_or_path", ""))).strip("-")[-60:]
        out = folder / f"converted-{label}-{fingerprint[:12]}-{dtype}{_key(quantizing)}"
        what = f"quantizing {len(quantizing)} tensors" if quantizing else "what cannot be used where it lies"
        logger.info("converting once into %s: %s", out, what)
        plans = plan_shards(self._structure, self._found, self._dtypes(bool(quantizing)), quantizing)
        write_store(out, plans, Origin(str(self._files[0].parent), None, dtype, fingerprint))
        shards = [out / shard.file for shard in Manifest.load(out).shards]
        found: dict[str, _Extent | None] = {n: t.quantized or t.extent for n, t in index_files(shards).items()}
        return {name: extent for name, extent in found.items() if extent is not None}

    def _dtypes(self, is_quantized: bool) -> dict[str, torch.dtype]:
        """In which type each tensor is stored: that of the model, or beside quantized ones that of the checkpoint."""
        dtypes = {name: target_dtype(self._structure.model, name, self._dtype) for name in self._found}
        if is_quantized:
            dtypes |= {name: tensor.dtype for name, tensor in self._found.items() if tensor.dtype.itemsize < 4}
        return dtypes


def _key(quantizing: Mapping[str, Quantizing]) -> str:
    """What tells stores of one checkpoint under different compressions apart, for the name of a folder."""
    if not quantizing:
        return ""
    bits = {how.format.bits for how in quantizing.values()}
    how = [LAYOUT_VERSION, *((n, q.format.bits, q.format.group_size, q.method) for n, q in sorted(quantizing.items()))]
    digest = hashlib.sha256(json.dumps(how).encode()).hexdigest()[:8]
    return f"-{'-'.join(map(str, sorted(bits)))}bit-{digest}"


def _refuse_other_formats(wanted: Mapping[str, GroupFormat], stored: Mapping[str, GroupFormat]) -> None:
    for name in sorted(wanted.keys() | stored.keys()):
        if wanted.get(name) != stored.get(name):
            asked, has = (
                "as it is" if fmt is None else f"in {fmt.bits} bits, groups of {fmt.group_size}"
                for fmt in (wanted.get(name), stored.get(name))
            )
            raise PolicyError(
                f"compression: {name} was asked for {asked}, but the store has it {has}; leave compression out, or "
                "load the checkpoint that the store was made from"
            )


# ------------------------------------------------------------------------------------------------------ the parts
def build(
    model: Any,
    structure: Structure,
    tensors: Sequence[StoredTensor],
    compression: Compression,
    options: FlexGenConfig,
) -> None:
    """Places the weights and gives the model an executor.

    Raises:
        CapacityError: the placement does not fit `max_memory`.
        PolicyError: the policy cannot be meant.
    """
    device, folder = _device(options), _offload_folder(options)
    limits, shared = _limits(options, device)
    ledger = Ledger(limits, shared=shared)
    given = None if options.policy is None or options.is_auto else _policy(options)
    rings = rings_of(given or Policy())
    placing = Placing(model, structure, tensors, Workspace(ledger, device, folder, rings), compression)
    if placing.space.is_direct and any(limit.tiers != (Tier.DISK,) for limit in ledger.limits()):
        return_freed_memory()
    one_batch = (given.num_batches if given is not None else options.num_batches) == 1
    memory = [*ledger.limits(), *_free_memory(ledger, device)]
    auto = _auto(model, placing, options, memory, compression) if options.is_auto else None
    if auto is not None:
        policy = auto.plan.policy
        rings, one_batch = rings_of(policy), policy.num_batches == 1
    demand = placing.demand(rings, one_batch=one_batch)
    if auto is None:
        policy = given or default_policy(demand, options.batch_size, options.num_batches, memory, model.config)
    policy = policy.replace(compression=compression)
    attention.attend_for(model, policy, demand.shape, direct=placing.space.is_direct)
    store = placing.store(policy.weights, rings, one_batch=one_batch)
    ledger.check(store.needs, lambda: what_fits(demand, policy, ledger.limits()))
    if policy.cache.disk or policy.hidden.disk:
        check_offload_folder(folder)
    try:
        uses_kernels = compression.cache is not None or any(tensor.is_quantized for tensor in tensors)
        with kernels_loaded_beside() if uses_kernels else contextlib.nullcontext():
            store.load_homes()
    except BaseException:
        store.close()
        raise
    executor = Executor(model, structure, store, policy, placing.within(rings), placing.mixtures)
    attach(model, executor, demand, auto)


def _auto(
    model: Any, placing: Placing, options: FlexGenConfig, memory: Sequence[Limit], compression: Compression
) -> AutoPolicy:
    """The plan to load with, said in a line on stderr."""
    space = placing.space
    freedom = dataclasses.replace(options.freedom, compressions=(compression,), host_attention=_may_attend(model))
    limits = list(memory)
    if not any(Tier.DISK in limit.tiers for limit in limits):
        # what is streamed lies there already
        room = int(_PART_OF_FREE_MEMORY * _free_disk(space.folder)) + sum(t.stored_bytes for t in placing.tensors)
        limits.append(Limit((Tier.DISK,), room, "free disk"))
    auto = AutoPolicy(_shape(model), _hardware(options, space.device), freedom, limits, placing)
    workload = _workload(options, model)
    is_eager = getattr(model.config, "_attn_implementation", None) == "eager"
    for warning in auto.choose(workload, eager=is_eager).warnings:
        logger.warning("policy='auto': %s", warning)
    say(auto.said(workload))
    return auto


def _workload(options: FlexGenConfig, model: Any) -> Workload:
    settings = getattr(model, "generation_config", None)
    usual = getattr(settings, "max_new_tokens", None)
    return read_workload(options.workload, model.config, usual, options.freedom.objective)


def _hardware(options: FlexGenConfig, device: torch.device) -> Hardware:
    """The machine that was given, or this one as it was measured, without what was free then."""
    if options.hardware is not None:
        return read_hardware(options.hardware, direct=device.type == "cpu")
    return unbounded(hardware_here(device, _offload_folder(options), say))


def _may_attend(model: Any) -> bool:
    """Whether attention on the host may be chosen."""
    return attention.why_not_supported(model) is None and attention.is_replaceable(model)


def _shape(model: Any) -> ModelShape:
    """A model's shape, computed in the dtype that it was loaded in.

    Raises:
        UnsupportedModelError: it cannot be planned for.
    """
    config = model.config.get_text_config(decoder=True)
    try:
        shape = ModelShape.from_config(config.to_dict(), name=type(model).__name__)
        shape = shape.in_dtype(str(model.dtype).removeprefix("torch."))
    except FlexGenError as error:
        raise UnsupportedModelError(f"policy='auto': {error}; give a policy") from error
    is_plain = attention.why_not_supported(model) is None
    return dataclasses.replace(shape, attends_plainly=is_plain)


def _policy(options: FlexGenConfig) -> Policy:
    return Policy.of(options.policy, **{k: v for k, v in _block(options).items() if v is not None})


def _block(options: FlexGenConfig) -> dict[str, int | None]:
    return {"batch_size": options.batch_size, "num_batches": options.num_batches}


def _free_memory(ledger: Ledger, device: torch.device) -> list[Limit]:
    """For planning, limits on memory that nobody limited: most of what is free now."""
    free = get_max_memory()
    limited = {tier for limit in ledger.limits() for tier in limit.tiers}
    rooms: list[tuple[tuple[Tier, ...], int]]
    if device.type == "cpu":
        rooms = [((Tier.DEVICE, Tier.HOST), free["cpu"])]
    else:
        rooms = [((Tier.DEVICE,), free.get(device.index or 0, 0)), ((Tier.HOST,), free["cpu"])]
    return [
        Limit(tiers, int(size * _PART_OF_FREE_MEMORY), "free memory")
        for tiers, size in rooms
        if not limited & set(tiers) and size  # of a device that does not say how much it has, nothing is known
    ]


def _free_disk(folder: Path) -> int:
    """Bytes that are free where a folder is, or will be."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(there).free


def _device(options: FlexGenConfig) -> torch.device:
    if options.device is not None:
        try:
            return torch.device(options.device)
        except RuntimeError as error:
            raise PolicyError(f"device={options.device!r}: torch knows no such device; leave it out") from error
    return default_device()


def _limits(options: FlexGenConfig, device: torch.device) -> tuple[dict[Tier, int], int | None]:
    """The budget of each tier, and on a machine that computes in RAM the budget that device and host share.

    Raises:
        PolicyError: a key that is no tier, or a size that is none.
    """
    limits: dict[Tier, int] = {}
    for key, size in (options.max_memory or {}).items():
        tier = Tier.of(key)
        try:
            limits[tier] = convert_file_size_to_int(size)
        except (ValueError, TypeError) as error:
            raise PolicyError(f"max_memory: {size!r} for {key!r} is no size; write bytes or '14GiB'") from error
    if device.type == "cpu" and Tier.HOST in limits and Tier.DEVICE not in limits:
        return {t: s for t, s in limits.items() if t is Tier.DISK}, limits[Tier.HOST]
    return limits, None


def _offload_folder(options: FlexGenConfig) -> Path:
    if options.offload_folder is not None:
        return Path(options.offload_folder)
    try:
        return Path(cached_assets_path("flexgen_hf", namespace="offload", subfolder="default"))
    except OSError as error:
        raise StoreError(f"no default offload folder ({error}); pass offload_folder") from error


# The one module whose import does something: it is imported by the hook that waits for transformers, for this purpose.
register()
