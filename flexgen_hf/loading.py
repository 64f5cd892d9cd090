"""How a model gets here: the quantization method `"flexgen"` in transformers' own registry.

transformers' `from_pretrained` does what it always does (Hub, revisions, shards, dtype, generation config). Our hook
before it loads weights takes every tensor out of its hands and notes where its bytes lie; the hook after it gives the
model our class and an executor. One of the two files that touch transformers' less public names.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
import json
import logging
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import convert_file_size_to_int, get_max_memory
from huggingface_hub import cached_assets_path
from torch import nn
from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    AutoHfQuantizer,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin, QuantizationMethod

from . import attention
from .accounting import shape_of
from .architectures import Structure, describe, is_tested
from .cell_layout import kept_dtype
from .checkpoint_files import CheckpointTensor, index_files, source_fingerprint, stores_of
from .checkpoints import plan_shards, planned_quantizing, read_checkpoint, target_dtype
from .errors import PolicyError, StoreError, UnsupportedModelError
from .executor import Executor
from .experts import Mixture, find_mixtures
from .modeling import attach
from .planning.budget import Call, Demand, Limit, alternatives, difference, fits, rings_of, totals
from .planning.placement import assign
from .policy import Compression, Placement, Policy, Tier
from .prequantized import METHOD, dequantizer, method_of
from .quantization.groupwise import GroupFormat
from .storage.buffers import return_freed_memory
from .storage.files import check_offload_folder
from .storage.ledger import Ledger
from .storage.workspace import Workspace, default_device
from .weights.experts import split
from .weights.format import FORMAT_VERSION, Manifest, TensorExtent
from .weights.quantized import LAYOUT_VERSION, QuantizedExtent, Quantizing
from .weights.stacked import StackedExtent
from .weights.store import WeightStore
from .weights.tensors import StoredTensor
from .weights.writer import Origin, write_store

__all__ = ["METHOD", "register"]

_Extent = TensorExtent | QuantizedExtent | StackedExtent

logger = logging.getLogger(__name__)

# Of memory that nobody limited, this part is planned with: what is free now may be less in a moment.
_PART_OF_FREE_MEMORY = 0.85

# Without a policy, room is kept for prompts and answers of so many tokens together.
_PLANNED_TOKENS = 512


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
        policy: a Policy, its dict, JSON text or file, or the original's six percentages; None fills the fastest tiers.
        batch_size: overrides the policy's.
        num_batches: overrides the policy's.
        compression: a Compression, its dict or JSON, "4bit" (weights and cache), or None.
        max_memory: bytes (or "14GiB") for 0 (the device), "cpu" and "disk".
        offload_folder: where cells and hidden states on disk go, and converted weights.
        device: where to compute; by default the accelerator, else the CPU.
        format_version: written into stores.
        stored: what the checkpoint's own configuration says of how another method has quantized it.

    Raises:
        PolicyError: an unknown option.
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
        format_version: int | None = None,
        stored: Any = None,
        quant_method: str = METHOD,
        **unknown: Any,
    ) -> None:
        if unknown:
            raise PolicyError(
                f"quantization_config: unknown option {sorted(unknown)[0]!r}; known are policy, batch_size, "
                "num_batches, compression, max_memory, offload_folder, device"
            )
        self.quant_method = quant_method  # type: ignore[assignment]
        self.policy, self.batch_size, self.num_batches = policy, batch_size, num_batches
        self.compression, self.max_memory = compression, max_memory
        self.offload_folder, self.device, self.format_version = offload_folder, device, format_version
        self.stored = stored

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
        compression = _compression(options)
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
        build(model, self._structure, self._tensors, self.quantization_config)
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


def _compression(options: FlexGenConfig) -> Compression:
    """What is asked for by itself, or else by the policy."""
    given = options.compression
    if given is None and options.policy is not None:
        given = _policy(options).compression
    return Compression.of(given)


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
def build(model: Any, structure: Structure, tensors: Sequence[StoredTensor], options: FlexGenConfig) -> None:
    """Places the weights and gives the model an executor.

    Raises:
        CapacityError: the placement does not fit `max_memory`.
        PolicyError: the policy cannot be meant.
    """
    device = _device(options)
    limits, shared = _limits(options, device)
    ledger = Ledger(limits, shared=shared)
    given = _policy(options) if options.policy is not None else None
    compression = _compression(options)
    space = Workspace(ledger, device, _offload_folder(options), rings_of(given or Policy()))
    if space.is_direct and any(limit.tiers != (Tier.DISK,) for limit in ledger.limits()):
        return_freed_memory()
    one_batch = (given.num_batches if given is not None else options.num_batches) == 1
    mixtures = find_mixtures(structure.layers, structure.layers_name)
    place = functools.partial(_store, structure, tensors, space, mixtures=mixtures.values(), one_batch=one_batch)
    demand = _demand(model, structure, tensors, space, compression, place)
    demand = dataclasses.replace(demand, shape=dataclasses.replace(demand.shape, waits_for_experts=bool(mixtures)))
    policy = given or _default_policy(demand, options, [*ledger.limits(), *_free_memory(ledger, device)], model.config)
    policy = policy.replace(compression=compression)
    if policy.host_attention and not space.is_direct:  # on a CPU, cells on the host are attended to there anyway
        attention.check_supported(model)
        model.set_attn_implementation(attention.NAME)
    elif demand.shape.attends_kept or (policy.num_batches > 1 and demand.shape.makes_masks_late):
        model.set_attn_implementation(attention.NAME)
    store = place(policy.weights)
    ledger.check(store.needs, lambda: _what_fits(demand, policy, ledger.limits()))
    if policy.cache.disk or policy.hidden.disk:
        check_offload_folder(space.folder)
    try:
        store.load_homes()
    except BaseException:
        store.close()
        raise
    by_stage = {layer + 1: mixture for layer, mixture in mixtures.items()}
    attach(model, Executor(model, structure, store, policy, space, by_stage), demand)


def _store(
    structure: Structure,
    whole: Sequence[StoredTensor],
    space: Workspace,
    placement: Placement,
    *,
    mixtures: Collection[Mixture],
    one_batch: bool,
) -> WeightStore:
    """The weights as they would be placed; nothing is read or allocated yet."""
    tensors = split(whole, {name for mixture in mixtures for name in mixture.tensors})
    tables = structure.tables({t.name for t in tensors})
    streamable = {t.name for t in tensors if 0 < t.stage < structure.head_stage or t.name in tables}
    fixed = {t.name: Tier.DEVICE for t in tensors if t.name not in streamable}
    homes = assign([(t.name, t.stored_bytes) for t in tensors], placement, fixed)
    if space.is_direct:
        late = _late_names(tensors, structure, tables, mixtures, one_batch)
        tensors = [_cast_late(tensor, homes) if tensor.name in late else tensor for tensor in tensors]
    return WeightStore(
        _at_tables(tensors, tables),
        homes,
        num_stages=structure.num_stages,
        tied=_is_tied(structure),
        space=space,
        whole=_at_tables(whole, tables),
    )


def _demand(
    model: Any,
    structure: Structure,
    tensors: Sequence[StoredTensor],
    space: Workspace,
    compression: Compression,
    place: Callable[[Placement], WeightStore],
) -> Demand:
    """What the model takes of each tier under any policy with the same rings."""
    tables = structure.tables({t.name for t in tensors})
    casts_head = space.is_direct and any(t.is_cast for t in tensors if t.name in tables)
    dtype = model.dtype if isinstance(model.dtype, torch.dtype) else torch.float32
    hidden = int(model.config.get_text_config(decoder=True).hidden_size)
    inner: collections.Counter[int] = collections.Counter()
    for tensor in tensors:
        stage, part = structure.locate(tensor.name)
        if 0 < stage < structure.head_stage and part == "mlp" and len(tensor.extent.shape) == 2:
            inner[stage] += math.prod(tensor.extent.shape) // hidden
    shape = shape_of(model.config, max(inner.values(), default=0), dtype, compression, casts_head)
    is_plain = (
        model.config._attn_implementation == "sdpa"
        and structure.hands_states_on  # else the model's code may look into masks, too
        and attention.why_not_supported(model) is None
    )
    attends_kept = space.is_direct and is_plain and kept_dtype(dtype, compression) is torch.uint8
    shape = dataclasses.replace(
        shape, makes_masks_late=is_plain, reads_once=structure.reads_once, attends_kept=attends_kept
    )
    return Demand(
        shape,
        functools.lru_cache(maxsize=64)(lambda placement: place(placement).needs),
        direct=space.is_direct,
        pinned=space.is_asynchronous,
    )


def _what_fits(demand: Demand, policy: Policy, limits: Sequence[Limit]) -> str:
    """The end of a refusal to load: the largest shares of weights that fit."""
    found = alternatives(policy, lambda other: fits(totals(demand.weights(other.weights)), limits), blocks=False)
    return f"; fits with {difference(policy, found[0])}" if found else "; no placement of the weights fits"


def _at_tables(tensors: Sequence[StoredTensor], tables: Mapping[str, int]) -> list[StoredTensor]:
    return [dataclasses.replace(t, stage=tables[t.name]) if t.name in tables else t for t in tensors]


def _late_names(
    tensors: Sequence[StoredTensor],
    structure: Structure,
    tables: Mapping[str, int],
    mixtures: Collection[Mixture],
    one_batch: bool,
) -> set[str]:
    """What the executor casts or dequantizes where it is used, tile by tile, so that it is kept in its stored form.

    Of the tables, a whole copy in the dtype of compute would be the largest buffer of all. A layer's matrices are
    used in this way if there is one micro-batch: a tile that stays in the processor's cache costs less than a copy
    that is written to memory and read back. With more of them, one copy made on the way serves all. An expert is used
    once for all micro-batches, so it needs no copy however many there are.
    Only plain modules allow it: one that computes more with its weight (scales it, say) must see the right dtype.
    """
    model: Any = structure.model
    plain = type(model.get_input_embeddings()) is nn.Embedding and type(model.get_output_embeddings()) is nn.Linear
    late = {t.name for t in tensors if t.name in tables and plain and not t.is_quantized}
    fused = {name for mixture in mixtures if not mixture.is_transposed for name in mixture.tensors}
    late |= {t.name for t in tensors if t.expert >= 0 and t.name.partition("[")[0] in fused}
    if one_batch:
        for index, layer in enumerate(structure.layers):
            prefix = f"{structure.layers_name}.{index}"
            late |= {f"{prefix}.{name}.weight" for name, part in layer.named_modules() if type(part) is nn.Linear}
    return late


def _cast_late(tensor: StoredTensor, homes: Mapping[str, Tier]) -> StoredTensor:
    """The tensor as it is kept to be cast or dequantized where it is used. What is on the device is cast already."""
    if tensor.is_quantized:
        return dataclasses.replace(tensor, is_late=True)
    if tensor.is_cast and homes.get(tensor.name, Tier.DEVICE) is not Tier.DEVICE:
        return dataclasses.replace(tensor, dtype=tensor.stored_dtype, is_late=True)
    return tensor


def _is_tied(structure: Structure) -> bool:
    model: Any = structure.model
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    return head is not None and embedding is not None and head.weight is embedding.weight


def _policy(options: FlexGenConfig) -> Policy:
    fields = {"batch_size": options.batch_size, "num_batches": options.num_batches}
    if options.policy == "auto":
        raise PolicyError("policy='auto' is not available in this version; give a Policy, or leave it out")
    return Policy.of(options.policy, **{k: v for k, v in fields.items() if v is not None})


def _default_policy(demand: Demand, options: FlexGenConfig, limits: Sequence[Limit], config: Any) -> Policy:
    """Weights fill the fastest tiers first; cache and hidden states stay on the device if the weights do.

    Room is kept for everything else that the block needs for `_PLANNED_TOKENS` tokens: cache, slots, what compute
    takes. Where even weights on disk leave too little, the block becomes smaller, unless its shape was asked for.
    """
    text = config.get_text_config(decoder=True)
    longest = getattr(text, "max_position_embeddings", None) or _PLANNED_TOKENS
    tokens = min(_PLANNED_TOKENS, longest)
    memory = [limit for limit in limits if Tier.DISK not in limit.tiers]  # the disk's own limit is refused by itself

    def fit(policy: Policy) -> bool:
        return fits(demand.peak(policy, Call(policy.block_size, tokens, tokens)), memory)

    for size in _halved(options.batch_size, 8):
        whole = Policy(batch_size=size, num_batches=options.num_batches or 1)
        if fit(whole):
            return whole
    near = Placement.all_on(Tier.DEVICE if demand.direct else Tier.HOST)
    blocks = [(size, number) for size in _halved(options.batch_size, 8) for number in _halved(options.num_batches, 4)]
    policy = Policy(weights=Placement(disk=1.0), cache=near, hidden=near)
    for size, number in blocks:
        policy = policy.replace(batch_size=size, num_batches=number)
        if fit(policy):
            break
    for tier in (Tier.DEVICE, Tier.HOST):
        if tier is Tier.HOST and not any(limit.tiers == (Tier.HOST,) for limit in memory):
            continue  # one memory with the device, where resident weights are the ones that cost no casts
        policy = _filled(policy, tier, fit)
    return policy


def _halved(given: int | None, first: int) -> list[int]:
    """What was asked for, or `first` and its halves."""
    return [given] if given is not None else [first >> step for step in range(first.bit_length())]


def _filled(policy: Policy, tier: Tier, fit: Callable[[Policy], bool]) -> Policy:
    """The policy with as many thousandths of its weights as fit on `tier`, taken from the disk."""
    shares = policy.weights.to_dict()
    there, most = 0, int(shares["disk"] * 1000)
    while there < most:
        middle = (there + most + 1) // 2
        trial = Placement(**{**shares, tier.value: middle / 1000, "disk": shares["disk"] - middle / 1000})
        if fit(policy.replace(weights=trial)):
            there = middle
        else:
            most = middle - 1
    taken = {**shares, tier.value: there / 1000, "disk": shares["disk"] - there / 1000}
    return policy.replace(weights=Placement(**taken))


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
        if not limited & set(tiers)
    ]


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
        tier = {"cpu": Tier.HOST, "host": Tier.HOST, "disk": Tier.DISK, "device": Tier.DEVICE}.get(str(key))
        if tier is None and str(key).isdigit():
            tier = Tier.DEVICE
        if tier is None:
            raise PolicyError(f"max_memory: {key!r} is no tier; use 0 (the device), 'cpu' and 'disk'")
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
