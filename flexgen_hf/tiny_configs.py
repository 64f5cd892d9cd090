"""A configuration of a few kilobytes for any causal model type of transformers, made from the type's own defaults.

Sizes are made small by the names that families give to them; kinds of layers are kept, each once or more. Knows names
of fields, and of the few types whose defaults cannot be built or are not made small in this way; builds no model.
"""

from __future__ import annotations

import json
from typing import Any

from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

__all__ = ["NUM_LAYERS", "VOCABULARY", "causal_types", "tiny_config"]

#: decoder layers of a tiny model
NUM_LAYERS = 4

#: rows of its tables
VOCABULARY = 96

# A size, or null, and the names of fields that get it; those of no family in particular are left as they are.
_SIZES = """\
96 vocab_size unpadded_vocab_size vocab_size_per_layer_input encoder_hash_byte_group_vocab
4 num_hidden_layers n_layer num_layers n_layers decoder_layers encoder_layers num_blocks
32 hidden_size d_model n_embd embedding_size word_embed_proj_dim input_embedding_size output_embedding_size
32 embed_dim embedding_dim attention_hidden_size lru_width d_inner hidden_size_global
32 original_max_position_embeddings
4 num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads attention_heads
4 swa_num_attention_heads num_local_experts num_experts n_routed_experts moe_num_experts sliding_window
4 window_size sliding_window_size attention_window_size qk_rope_head_dim rotary_dim index_topk ssm_state_size
4 state_size mamba_d_state mamba_n_heads mamba_num_heads time_step_rank mamba_dt_rank linear_num_value_heads
2 num_key_value_heads num_kv_heads swa_num_key_value_heads num_global_key_value_heads num_experts_per_tok
2 num_experts_per_token moe_topk moe_k moe_top_k n_group num_expert_group zero_expert_num max_window_layers
2 index_n_heads linear_num_key_heads top_k_experts
1 topk_group first_k_dense_replace num_dense_layers mamba_n_groups n_groups pad_token_id
8 head_dim swa_head_dim global_head_dim kv_channels attention_head_dim qk_nope_head_dim index_head_dim
8 linear_key_head_dim linear_value_head_dim hidden_size_per_layer_input query_pre_attn_scalar
8 attention_chunk_size
12 v_head_dim qk_head_dim
16 kv_lora_rank q_lora_rank mamba_d_head mamba_head_dim image_size num_position_embeddings
24 moe_intermediate_size expert_ffn_hidden_size shared_expert_intermediate_size shared_intermediate_size
24 shared_experts_intermediate_size moe_shared_expert_intermediate_size
48 intermediate_size ffn_dim n_inner ffn_hidden_size decoder_ffn_dim encoder_ffn_dim d_ff dff dim_ff
48 intermediate_size_mlp dense_intermediate_size
64 max_position_embeddings n_positions n_ctx max_seq_len max_source_positions max_target_positions mamba_d_ssm
0 bos_token_id num_kv_shared_layers
null eos_token_id
"""
_SMALL: dict[str, Any] = {
    name: json.loads(size) for size, *names in map(str.split, _SIZES.splitlines()) for name in names
} | {"is_decoder": True}

# These are made of others where they are not given; some types forget to.
_ALSO_IF_MISSING = ("head_dim", "num_key_value_heads")

_KINDS = ("layer_types", "layers_block_type", "mlp_layer_types", "block_types", "indexer_types")

# What is not right for a type after all that, or has no default.
_OWN: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
    "dbrx": {
        "attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 48, "hidden_size": 32, "moe_top_k": 2},
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 4, "head_dim": 16},
    "opt": {"word_embed_proj_dim": 16},
    "reformer": {"axial_pos_embds": False},
    "xmod": {"default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip


def causal_types() -> list[str]:
    """The model types for which transformers has a causal language model, by name."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_config(model_type: str, **fields: Any) -> PretrainedConfig:
    """A tiny configuration.

    Args:
        model_type: as in a `config.json`.
        fields: what it shall say in any case.

    Raises:
        Exception: whatever the configuration's own code raises where it cannot be made small.
    """
    small = _small(AutoConfig.for_model(model_type)) | _OWN.get(model_type, {}) | fields
    made: PretrainedConfig = AutoConfig.for_model(model_type, **small)
    return made


def _small(default: PretrainedConfig) -> dict[str, Any]:
    """The fields of a configuration that are to be other than its defaults, nested configurations whole."""
    known = default.to_dict()
    layers = known.get("num_hidden_layers")
    made: dict[str, Any] = {}
    for name, value in known.items():
        if isinstance(value, (list, tuple)):
            if name in _KINDS and value and isinstance(value[0], str):
                made[name] = _each_kind(value)
            elif len(value) == layers:
                made[name] = [_SMALL.get(name, item) for item in value[:NUM_LAYERS]]
        elif name in _SMALL and (value is not None or name in _ALSO_IF_MISSING):
            made[name] = _SMALL[name]
    if "kv_lora_rank" in made:  # latent attention: each head has keys of its own, of which a part is rotated
        made["num_key_value_heads"] = made["num_attention_heads"]
        if "head_dim" in made and known.get("head_dim") == known.get("qk_rope_head_dim"):
            made["head_dim"] = made["qk_rope_head_dim"]
    for name in default.sub_configs:
        inner = getattr(default, name, None)
        if isinstance(inner, PretrainedConfig):
            made[name] = inner.to_dict() | _small(inner)
    return made


def _each_kind(kinds: list[str] | tuple[str, ...]) -> list[str]:
    """As many as there are layers, all kinds among them in turn."""
    found = list(dict.fromkeys(kinds))
    return [found[index % len(found)] for index in range(NUM_LAYERS)]
