"""A model's weights as they would lie in tiers, and what the model takes of each; nothing is read or allocated yet."""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from . import attention
from .accounting import shape_of
from .architectures import Structure
from .experts import find_mixtures
from .planning.budget import Demand, Limit, ModelSizes, alternatives, attends_kept, difference, fits, rings_of, totals
from .planning.layout import PlannedTensor, Tensors
from .planning.placement import assign
from .planning.schedule import Rings
from .policy import Compression, Placement, Policy, Tier
from .storage.workspace import Workspace
from .weights.experts import split
from .weights.store import WeightStore
from .weights.tensors import StoredTensor

__all__ = ["Placing", "what_fits"]


class Placing:
    """The weights of one model, as any policy would place them.

    Args:
        model: on `meta`, with the attention that it was loaded with.
        structure: its stages.
        tensors: where its tensors lie in files.
        space: where it will compute.
        compression: how weights and cache are kept.
    """

    def __init__(
        self,
        model: Any,
        structure: Structure,
        tensors: Sequence[StoredTensor],
        space: Workspace,
        compression: Compression,
    ) -> None:
        self.space, self._whole = space, list(tensors)
        self._structure = structure
        mixtures = find_mixtures(structure.layers, structure.layers_name)
        #: by stage, the experts that are loaded and computed one by one
        self.mixtures = {layer + 1: mixture for layer, mixture in mixtures.items()}
        #: what has a home of its own: the tensors, but of experts each one's part
        self.tensors = split(tensors, {name for mixture in mixtures.values() for name in mixture.tensors})
        self._tables = structure.tables({t.name for t in tensors})
        self._demands: dict[tuple[Rings, bool], Demand] = {}
        #: what decides how much memory a call takes
        self.sizes = self._sizes(model, compression)

    def within(self, rings: Rings) -> Workspace:
        """The space with so many reused buffers."""
        return self.space if rings == self.space.rings else dataclasses.replace(self.space, rings=rings)

    def store(self, placement: Placement, rings: Rings, *, one_batch: bool) -> WeightStore:
        """The weights as they would be placed.

        Args:
            placement: their shares.
            rings: how many reused buffers there are.
            one_batch: a block is one micro-batch.
        """
        space, tensors = self.within(rings), self.tensors
        fixed = {t.name: Tier.DEVICE for t in tensors if not self._moves(t)}
        homes = assign([(t.name, t.stored_bytes) for t in tensors], placement, fixed, first=list(self._tables))
        if space.is_direct:
            late = self._late(one_batch=one_batch)
            tensors = [_cast_late(tensor, homes) if tensor.name in late else tensor for tensor in tensors]
        return WeightStore(
            _at_tables(tensors, self._tables),
            homes,
            num_stages=self._structure.num_stages,
            tied=_is_tied(self._structure),
            space=space,
            whole=_at_tables(self._whole, self._tables),
        )

    def demand(self, rings: Rings, *, one_batch: bool) -> Demand:
        """What the model takes of each tier under any policy with the same rings."""
        if (rings, one_batch) not in self._demands:

            @functools.lru_cache(maxsize=64)
            def needs(placement: Placement) -> Any:
                return self.store(placement, rings, one_batch=one_batch).needs

            self._demands[rings, one_batch] = Demand(
                self.sizes, needs, direct=self.space.is_direct, pinned=self.space.is_asynchronous
            )
        return self._demands[rings, one_batch]

    def demand_of(self, policy: Policy) -> Demand:
        """The same for the rings of a policy."""
        return self.demand(rings_of(policy), one_batch=policy.num_batches == 1)

    def planned(self) -> Tensors:
        """The tensors as a planner sees them."""
        late = self._late(one_batch=True)
        return Tensors(
            PlannedTensor(
                stage=tensor.stage,
                elements=math.prod(tensor.extent.shape),
                stored_bytes=tensor.stored_bytes,
                device_bytes=tensor.device_bytes,
                is_quantized=tensor.is_quantized,
                is_cast=tensor.is_cast,
                moves=self._moves(tensor),
                is_matrix=tensor.name in late,
                expert=tensor.expert,
                is_table=tensor.name in self._tables,
            )
            for tensor in _at_tables(self.tensors, self._tables)
        )

    # ---------------------------------------------------------------------------------------------------------- inside
    def _moves(self, tensor: StoredTensor) -> bool:
        """Whether it may be streamed; what is small and outside the layers stays on the device."""
        return 0 < tensor.stage < self._structure.head_stage or tensor.name in self._tables

    def _late(self, *, one_batch: bool) -> set[str]:
        """Names of the tensors that the executor can cast, or dequantize, where they are used, tile by tile.

        Of the tables, a whole copy in the dtype of compute would be the largest buffer of all. A layer's matrices are
        used in this way if there is one micro-batch: a tile that stays in the processor's cache costs less than a copy
        that is written to memory and read back. With more of them, one copy made on the way serves all. An expert is
        used once for all micro-batches, so it needs no copy however many there are.
        Only plain modules allow it: one that computes more with its weight (scales it, say) must see the right dtype.
        """
        model: Any = self._structure.model
        plain = type(model.get_input_embeddings()) is nn.Embedding and type(model.get_output_embeddings()) is nn.Linear
        late = {t.name for t in self.tensors if t.name in self._tables and plain and not t.is_quantized}
        fused = {n for mixture in self.mixtures.values() if not mixture.is_transposed for n in mixture.tensors}
        late |= {t.name for t in self.tensors if t.expert >= 0 and t.name.partition("[")[0] in fused}
        if one_batch:
            for index, layer in enumerate(self._structure.layers):
                prefix = f"{self._structure.layers_name}.{index}"
                late |= {f"{prefix}.{name}.weight" for name, part in layer.named_modules() if type(part) is nn.Linear}
        return late

    def _sizes(self, model: Any, compression: Compression) -> ModelSizes:
        structure, is_direct = self._structure, self.space.is_direct
        casts_head = is_direct and any(t.is_cast for t in self._whole if t.name in self._tables)
        dtype = model.dtype if isinstance(model.dtype, torch.dtype) else torch.float32
        hidden = int(model.config.get_text_config(decoder=True).hidden_size)
        inner: collections.Counter[int] = collections.Counter()
        for tensor in self._whole:
            stage, part = structure.locate(tensor.name)
            if 0 < stage < structure.head_stage and part == "mlp" and len(tensor.extent.shape) == 2:
                inner[stage] += math.prod(tensor.extent.shape) // hidden
        sizes = shape_of(model.config, max(inner.values(), default=0), dtype, compression, casts_head)
        is_plain = (
            model.config._attn_implementation == "sdpa"
            and structure.hands_states_on  # else the model's code may look into masks, too
            and attention.why_not_supported(model) is None
        )
        return dataclasses.replace(
            sizes,
            makes_masks_late=is_plain,
            reads_once=structure.reads_once,
            waits_for_experts=bool(self.mixtures),
            attends_kept=attends_kept(compression, direct=is_direct, is_plain=is_plain),
        )


def what_fits(demand: Demand, policy: Policy, limits: Sequence[Limit]) -> str:
    """The end of a refusal to load: the largest shares of weights that fit."""
    found = alternatives(policy, lambda other: fits(totals(demand.weights(other.weights)), limits), blocks=False)
    return f"; fits with {difference(policy, found[0])}" if found else "; no placement of the weights fits"


def _at_tables(tensors: Sequence[StoredTensor], tables: Mapping[str, int]) -> list[StoredTensor]:
    return [dataclasses.replace(t, stage=tables[t.name]) if t.name in tables else t for t in tensors]


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
