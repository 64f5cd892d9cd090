"""What a model's configuration says of its tensors: bytes, FLOPs and cache of each stage and part.

Reads a `config.json`, generic over the names that families give to the same size. Knows no family by name, no torch and
no transformers. Matrices and tables are counted exactly; norms and biases only where the configuration tells of them.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import PolicyError, StoreError, UnsupportedModelError
from ..families import attends_plainly, is_tested
from ..policy import Compression
from .budget import ModelSizes, attends_kept

__all__ = [
    "DTYPES", "SMALL_SHARE", "LayerShape", "ModelShape", "TensorShape", "kept_row_bytes", "quantized_bytes",
    "read_config",
]  # fmt: skip

#: bytes of an element, by the name of its type
DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2}

_LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
_HIDDEN = ("hidden_size", "n_embd", "d_model")
_HEADS = ("num_attention_heads", "n_head", "n_heads")
_INNER = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size")
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
_ACTIVE = ("num_experts_per_tok", "experts_per_token", "moe_topk")

# Only these have a gated MLP without an RMS norm's epsilon beside it.
_GATED_ANYWAY = ("use_qkv_bias", "clip_qkv")

# State that is not keys and values.
_OTHER_STATE = ("state_size", "ssm_state_size", "mamba_d_state", "ssm_cfg", "rescale_every", "linear_num_value_heads")
_CACHE_KINDS = {"full_attention", "sliding_attention", "chunked_attention"}

#: a matrix with a smaller share of the elements of its layer's largest one is not worth the error: routers of experts,
#: above all, which decide by small differences
SMALL_SHARE = 1 / 128

# bytes of the scale and of the minimum of a group
_GROUP_BYTES = 2


def quantized_bytes(shape: tuple[int, ...], bits: int, group_size: int) -> int:
    """Bytes of a quantized tensor: codes, and a scale and a minimum for each group along the last dimension."""
    groups = math.prod(shape[:-1]) * -(-shape[-1] // group_size)
    return groups * (group_size * bits // 8 + 2 * _GROUP_BYTES)


def kept_row_bytes(heads: int, head_dim: int, compression: Compression, itemsize: int) -> int | None:
    """Bytes of the keys of one token of one row at home; None if they are kept as compute uses them."""
    bits = compression.cache
    if bits is None or (bits == 16 and itemsize <= 2):
        return None
    if bits == 16:
        return heads * head_dim * 2
    size = min(compression.group_size, -(-head_dim // 8) * 8)
    packed = heads * quantized_bytes((head_dim,), bits, size)
    return packed + packed % 2


@dataclasses.dataclass(frozen=True)
class TensorShape:
    """A tensor, or several of one kind that are always used together.

    Args:
        part: `"attention"`, `"mlp"`, `"experts"`, `"embedding"` or `"head"`.
        shape: its dimensions, the input dimension last; experts come first.
        kind: `"matrix"`, `"table"` of the vocabulary, or `"vector"`, which stays where compute is if it is outside the
            layers.
        used: the share of its elements that a token is multiplied with.
    """

    part: str
    shape: tuple[int, ...]
    kind: str = "matrix"
    used: float = 1.0

    @property
    def elements(self) -> int:
        """How many there are."""
        return math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class LayerShape:
    """A decoder layer.

    Args:
        tensors: its weights.
        window: tokens that a sliding layer attends to; None for all.
    """

    tensors: tuple[TensorShape, ...]
    window: int | None = None

    @functools.cached_property
    def elements(self) -> int:
        """Of all weights."""
        return sum(tensor.elements for tensor in self.tensors)

    @functools.cached_property
    def used_elements(self) -> int:
        """Elements of matrices that a token is multiplied with: of experts, those that it is sent to."""
        return round(sum(t.elements * t.used for t in self.tensors if t.kind == "matrix"))

    @functools.cached_property
    def experts(self) -> tuple[TensorShape, ...]:
        """Matrices of all experts, each with experts first; nothing if there are none."""
        return tuple(t for t in self.tensors if t.part == "experts" and len(t.shape) == 3)

    @property
    def num_experts(self) -> int:
        """How many experts there are."""
        return self.experts[0].shape[0] if self.experts else 0

    @functools.cached_property
    def shared_elements(self) -> int:
        """Elements of matrices that every token is multiplied with."""
        return sum(t.elements for t in self.tensors if t.kind == "matrix" and t not in self.experts)

    @functools.cached_property
    def shared_matrices(self) -> int:
        """How many matrices these are."""
        return sum(t.kind == "matrix" and t not in self.experts for t in self.tensors)

    @functools.cached_property
    def expert_elements(self) -> int:
        """Elements of one expert's matrices."""
        return sum(t.elements // t.shape[0] for t in self.experts)

    def chosen_experts(self, tokens: int) -> int:
        """How many experts `tokens` tokens are expected to choose together, if each chooses at random."""
        if not self.experts:
            return 0
        return round(self.num_experts * (1 - (1 - self.experts[0].used) ** tokens))

    def attended(self, tokens: int) -> int:
        """How many of so many tokens a query attends to."""
        return tokens if self.window is None else min(tokens, self.window)

    def bits_of(self, tensor: TensorShape, compression: Compression) -> int | None:
        """The width in which one of its tensors is kept; patterns are not looked at, for there are no names here."""
        if tensor.kind != "matrix" or compression.weights is None:
            return None
        largest = max(t.elements for t in self.tensors if t.kind == "matrix")
        packed = quantized_bytes(tensor.shape, compression.weights, compression.group_size)
        is_worth_it = tensor.elements >= largest * SMALL_SHARE and packed < 2 * tensor.elements
        return compression.weights if is_worth_it else None


@dataclasses.dataclass(frozen=True, eq=False)  # compared by identity: it is long, and a key of caches
class ModelShape:
    """A causal language model in numbers.

    Args:
        layers: decoder layers.
        outer: tensors before and after them; of a table that embedding and head share, one.
        hidden_size: elements of a token's hidden states.
        num_heads: query heads.
        key_heads: heads of keys and values as they are cached.
        head_dim: elements of a head's key, and of its value.
        latent: with latent attention, the elements that are cached for a token in place of keys, and of values.
        vocab_size: rows of the head's table.
        tied: embedding and head share their table.
        dtype: of compute.
        stored_itemsize: bytes of an element of the checkpoint.
        max_tokens: the longest sequence that positions reach; None if the configuration does not say it.
        name: for messages.
        attends_plainly: its attention is scaled dot products of what the cache returns; it can be computed on the host,
            and over cells as they are kept.
        is_tested: its family is one that this engine is tested with.
    """

    layers: tuple[LayerShape, ...]
    outer: tuple[TensorShape, ...]
    hidden_size: int
    num_heads: int
    key_heads: int
    head_dim: int
    vocab_size: int
    tied: bool = True
    dtype: str = "float16"
    stored_itemsize: int = 2
    max_tokens: int | None = None
    name: str = ""
    latent: tuple[int, int] | None = None
    attends_plainly: bool = True
    is_tested: bool = True

    @property
    def itemsize(self) -> int:
        """Bytes of an element in compute."""
        return DTYPES[self.dtype]

    @functools.cached_property
    def num_parameters(self) -> int:
        """Elements of all tensors, each once."""
        return sum(layer.elements for layer in self.layers) + sum(tensor.elements for tensor in self.outer)

    @functools.cached_property
    def active_parameters(self) -> int:
        """Elements of matrices that one token is multiplied with, the head's table included."""
        return sum(layer.used_elements for layer in self.layers) + self.head.elements

    @functools.cached_property
    def kinds_of_layers(self) -> list[int]:
        """For each layer the number of the first one that is like it."""
        first: dict[LayerShape, int] = {}
        return [first.setdefault(layer, number) for number, layer in enumerate(self.layers)]

    @property
    def head(self) -> TensorShape:
        """The table of the head."""
        tables = [tensor for tensor in self.outer if tensor.kind == "table"]
        return tables[-1]

    def cache_elements(self, tokens: int) -> int:
        """Elements of keys and values of one row of one layer."""
        return tokens * sum(heads * width for heads, width in self.cached)

    @property
    def cached(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Heads and width of keys and of values as they are cached."""
        if self.latent is not None:
            return (1, self.latent[0]), (1, self.latent[1])
        return (self.key_heads, self.head_dim), (self.key_heads, self.head_dim)

    def kept_bytes(self, compression: Compression) -> int:
        """Bytes of keys and values of a token of one row in one layer, at home."""
        kept = self._kept_rows(compression)
        return self.cache_elements(1) * self.itemsize if kept is None else sum(kept)

    def _kept_rows(self, compression: Compression) -> tuple[int, int] | None:
        """Bytes of a token's keys and of its values at home; None if they are kept as compute uses them."""
        keys, values = (kept_row_bytes(*states, compression, self.itemsize) for states in self.cached)
        return None if keys is None or values is None else (keys, values)

    def layer_flops(self, layer: LayerShape, tokens: int) -> float:
        """Floating-point operations of a layer's products with weights, for `tokens` tokens."""
        return 2.0 * layer.used_elements * tokens

    def attention_flops(self, layer: LayerShape, queries: int, past: int) -> float:
        """Of a layer's attention for one row: so many queries, each after what came before it."""
        pairs = sum(layer.attended(past + 1 + q) for q in (0, queries - 1)) / 2 * queries
        return 4.0 * pairs * self.num_heads * self.head_dim

    @functools.lru_cache(maxsize=32)  # noqa: B019  a frozen value; few are ever made
    def sizes(self, compression: Compression, *, direct: bool) -> ModelSizes:
        """What decides how much memory a call takes."""
        inner, sent = (
            max(sum(t.elements * t.used for t in layer.tensors if t.part == part and t.kind == "matrix")
                for layer in self.layers)
            for part in ("mlp", "experts")
        )  # fmt: skip
        windows = tuple(layer.window for layer in self.layers)
        key, value = (heads * width for heads, width in self.cached)
        kept = self._kept_rows(compression)
        return ModelSizes(
            num_layers=len(self.layers),
            hidden_size=self.hidden_size,
            inner_size=round(inner + sent) // self.hidden_size,
            query_size=self.num_heads * self.head_dim,
            key_size=key,
            value_size=None if key == value else value,
            num_heads=self.num_heads,
            vocab_size=self.vocab_size,
            itemsize=self.itemsize,
            kept_key_bytes=kept[0] if kept else None,
            kept_value_bytes=kept[1] if kept and key != value else None,
            windows=windows if any(windows) else (),
            attends_kept=attends_kept(compression, direct=direct, is_plain=self.attends_plainly),
            casts_head=direct and self.stored_itemsize != self.itemsize,
            makes_masks_late=self.attends_plainly,
            reads_once=self.is_tested,
            waits_for_experts=any(layer.experts for layer in self.layers),
        )

    def in_dtype(self, dtype: str) -> ModelShape:
        """The same model computed in another type.

        Raises:
            PolicyError: a type that is not known.
        """
        if dtype not in DTYPES:
            raise PolicyError(f"dtype: {dtype!r} is unknown; use one of {', '.join(DTYPES)}")
        return dataclasses.replace(self, dtype=dtype)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], *, name: str = "") -> ModelShape:
        """The shape that a configuration describes.

        Args:
            config: what `config.json` holds.
            name: for messages.

        Raises:
            UnsupportedModelError: a kind of model that cannot be streamed, or a size that the configuration lacks.

        >>> config = {"num_hidden_layers": 2, "hidden_size": 8, "num_attention_heads": 2, "vocab_size": 10}
        >>> ModelShape.from_config(config).kept_bytes(Compression())
        32
        """
        return _Reader(config, name).shape()


class _Reader:
    """Reads one configuration."""

    def __init__(self, config: Mapping[str, Any], name: str) -> None:
        self.config, self.name = config, name or str(config.get("model_type") or "the model")
        self._refuse()
        self.layers = self._size(_LAYERS)
        self.hidden = self._size(_HIDDEN)
        self.heads = self._size(_HEADS)
        self.head_dim = self._known("head_dim", default=self.hidden // self.heads)
        self.rotated = self._known("qk_rope_head_dim")
        self.latent = (rank, self.rotated) if (rank := self._known("kv_lora_rank")) else None
        if self.latent:
            self.head_dim = self._known("qk_nope_head_dim") + self.rotated
        self.inner = self._known(*_INNER, default=4 * self.hidden)  # MPT's own ratio is not looked at by its model
        self.is_rms = any(key in config for key in ("rms_norm_eps", "norm_eps"))
        is_scaled = config.get("logit_scale") is not None  # Cohere; MPT names it too, and has none
        self.is_gated = self.is_rms or is_scaled or any(key in config for key in _GATED_ANYWAY)

    def shape(self) -> ModelShape:
        vocab = self._size(("vocab_size",))
        tied = self.config.get("tie_word_embeddings", True) is not False
        family = self.config.get("model_type")
        stored = str(self.config.get("dtype") or self.config.get("torch_dtype") or "float16").removeprefix("torch.")
        if stored not in DTYPES:
            raise UnsupportedModelError(f"{self.name}: dtype {stored!r} is unknown; known are {', '.join(DTYPES)}")
        return ModelShape(
            layers=tuple(self._layer(index) for index in range(self.layers)),
            outer=tuple(self._outer(vocab, tied)),
            hidden_size=self.hidden,
            num_heads=self.heads,
            key_heads=self._cached(),
            head_dim=self.head_dim,
            vocab_size=vocab,
            tied=tied,
            dtype=stored,
            stored_itemsize=DTYPES[stored],
            max_tokens=self._known("max_position_embeddings", "n_positions", "seq_length", "max_seq_len") or None,
            name=self.name,
            latent=self.latent,
            # sizes without a family's name are taken for those of one that is tested
            attends_plainly=self.latent is None and (family is None or attends_plainly(str(family))),
            is_tested=family is None or is_tested(str(family)),
        )

    # ------------------------------------------------------------------------------------------------- what it holds
    def _known(self, *names: str, default: int = 0) -> int:
        for name in names:
            value = self.config.get(name)
            if isinstance(value, int) and not isinstance(value, bool):
                return value
        return default

    def _size(self, names: tuple[str, ...]) -> int:
        value = self._known(*names)
        if value < 1:
            raise UnsupportedModelError(
                f"{self.name}: the configuration has no {names[0]!r} (nor another name of it), so its size is unknown; "
                "give a config.json of a causal language model, or --shape"
            )
        return value

    def _refuse(self) -> None:
        config, name = self.config, self.name
        if config.get("is_encoder_decoder"):
            raise UnsupportedModelError(f"{name} is an encoder-decoder model; only causal language models are planned")
        if any(key in config for key in ("vision_config", "audio_config", "text_config")):
            raise UnsupportedModelError(f"{name} is multimodal; plan for its text model")
        kinds = set(config.get("layer_types") or ()) - _CACHE_KINDS
        other = [key for key in _OTHER_STATE if config.get(key) is not None]
        if kinds or other:
            raise UnsupportedModelError(
                f"{name} keeps state that is not keys and values ({', '.join(sorted(kinds) or other)}); it cannot be "
                "streamed"
            )

    def _cached(self) -> int:
        """Heads of keys and values as they are cached."""
        heads = self._known("num_key_value_heads", default=self.heads)
        if self.config.get("multi_query") and not self.config.get("new_decoder_architecture"):
            heads = 1
        return heads

    # ------------------------------------------------------------------------------------------------------ a layer
    def _layer(self, index: int) -> LayerShape:
        made = [*self._attention(), *(self._experts() if self._is_sparse(index) else self._mlp(self.inner, "mlp"))]
        made.append(TensorShape("attention", (2 * self.hidden * (1 if self.is_rms else 2),), "vector"))
        return LayerShape(tuple(made), self._window(index))

    def _attention(self) -> list[TensorShape]:
        hidden, heads = self.hidden, self.heads
        if self.latent:
            return self._latent_attention(self.latent[0])
        keys = self._known("num_kv_heads", "num_key_value_heads", default=heads)
        if self.config.get("multi_query"):
            keys = keys if self.config.get("new_decoder_architecture") else 1
        elif "new_decoder_architecture" in self.config and not self.config["new_decoder_architecture"]:
            keys = heads
        query, key = heads * self.head_dim, keys * self.head_dim
        made = [TensorShape("attention", shape) for shape in ((query, hidden), (key, hidden), (key, hidden))]
        made.append(TensorShape("attention", (hidden, query)))
        has_bias = bool(self.config.get("attention_bias", self.config.get("bias", not self.is_rms)))
        return [*made, TensorShape("attention", (query + 2 * key + hidden,), "vector")] if has_bias else made

    def _latent_attention(self, rank: int) -> list[TensorShape]:
        """Queries and keys through matrices of low rank; what of keys is rotated is one for all heads."""
        hidden, query, value = self.hidden, self.heads * self.head_dim, self.heads * self._known("v_head_dim")
        low = self._known("q_lora_rank")
        shapes = [(low, hidden), (query, low)] if low else [(query, hidden)]
        shapes += [(rank + self.rotated, hidden), (query - self.heads * self.rotated + value, rank), (hidden, value)]
        return [TensorShape("attention", shape) for shape in shapes]

    def _mlp(self, inner: int, part: str) -> list[TensorShape]:
        shapes = [(inner, self.hidden)] * (2 if self.is_gated else 1) + [(self.hidden, inner)]
        made = [TensorShape(part, shape) for shape in shapes]
        has_bias = bool(self.config.get("mlp_bias", self.config.get("enable_bias", not self.is_gated)))
        return [*made, TensorShape(part, (inner + self.hidden,), "vector")] if has_bias else made

    def _experts(self) -> list[TensorShape]:
        """A router, experts of which a token uses some, and those that all tokens use."""
        count, inner = self._known(*_EXPERTS), self._known("moe_intermediate_size", default=self.inner)
        used = min(1.0, self._known(*_ACTIVE, default=1) / count)
        shapes = [(count, 2 * inner if self.is_gated else inner, self.hidden), (count, self.hidden, inner)]
        made = [TensorShape("experts", shape, used=used) for shape in shapes]
        made.append(TensorShape("mlp", (count, self.hidden)))
        if gated := self._known("shared_expert_intermediate_size"):
            return [*made, TensorShape("mlp", (1, self.hidden)), *self._mlp(gated, "mlp")]
        shared = self._known("n_shared_experts") * inner
        return [*made, *(self._mlp(shared, "mlp") if shared else ())]

    def _is_sparse(self, index: int) -> bool:
        if not self._known(*_EXPERTS):
            return False
        step = max(1, self._known("decoder_sparse_step", default=1))
        is_dense = index < self._known("first_k_dense_replace") or index in (self.config.get("mlp_only_layers") or ())
        return not is_dense and (index + 1) % step == 0

    def _window(self, index: int) -> int | None:
        window, kinds = self._known("sliding_window"), self.config.get("layer_types")
        chunk = self._known("attention_chunk_size")
        if kinds:
            named = {"sliding_attention": window, "chunked_attention": chunk}
            return (named.get(kinds[index]) or None) if index < len(kinds) else None
        if self.config.get("use_sliding_window") is False:
            return chunk or None
        return window or chunk or None

    # -------------------------------------------------------------------------------------------- around the layers
    def _outer(self, vocab: int, tied: bool) -> list[TensorShape]:
        width = self._known("word_embed_proj_dim", default=self.hidden)
        made = [TensorShape("embedding", (vocab, width), "table")]
        if width != self.hidden:
            made += [TensorShape("embedding", (self.hidden, width)), TensorShape("head", (width, self.hidden))]
        positions = self._known("n_positions") if self.config.get("rotary_dim") is None else 0
        if "word_embed_proj_dim" in self.config:  # two rows more than positions
            positions = self._known("max_position_embeddings") + 2
        if positions:
            made.append(TensorShape("embedding", (positions, self.hidden)))
        made.append(TensorShape("head", (self.hidden * (1 if self.is_rms else 2),), "vector"))
        return made if tied else [*made, TensorShape("head", (vocab, width), "table")]


def read_config(folder: str | Path) -> dict[str, Any]:
    """The configuration in a model's folder.

    Raises:
        StoreError: there is none, or it is not JSON.
    """
    file = Path(folder) / "config.json"
    try:
        config = json.loads(file.read_text("utf-8"))
    except OSError as error:
        raise StoreError(f"cannot read {str(file)!r} ({error.strerror}); give a model's folder, or --shape") from error
    except ValueError as error:
        raise StoreError(f"{str(file)!r} is not JSON ({error}); download it again") from error
    if not isinstance(config, dict):
        raise StoreError(f"{str(file)!r} holds a {type(config).__name__}, not an object; download it again")
    return config
