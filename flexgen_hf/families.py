"""The names of model families: which are tested, and whose attention is a kind of its own.

All that is said of a family by its name is here. Knows no torch, so that plans are made without it.
"""

from __future__ import annotations

__all__ = ["TESTED", "TESTED_WITH", "attends_plainly", "is_tested"]

#: model types compared with transformers in this project's own tests
TESTED = frozenset(
    "bloom codegen cohere cohere2 deepseek_v2 deepseek_v3 falcon gemma2 gemma3_text glm glm4 glm4_moe gpt2 gpt_bigcode "
    "gpt_neox gpt_oss gptj granite llama mistral mixtral mpt olmo2 olmoe opt phi3 qwen2 qwen2_moe qwen3 qwen3_moe "
    "smollm3 stablelm".split()
)

#: the version of transformers that they were compared with
TESTED_WITH = "5.23"

# Of these, attention is outside of transformers' interface, or expands what the cache returns.
_ATTENDS_IN_ITS_OWN_WAY = frozenset("bloom codegen deepseek_v2 deepseek_v3 falcon gptj mpt stablelm".split())


def is_tested(model_type: str) -> bool:
    """Whether this project's tests compare the family with transformers."""
    return model_type in TESTED


def attends_plainly(model_type: str) -> bool:
    """Whether attention is known to be scaled dot products of what the cache returns, through transformers' interface.

    A model that is there says it by itself (`attention.why_not_supported`); this is for those that need not be.
    """
    return is_tested(model_type) and model_type not in _ATTENDS_IN_ITS_OWN_WAY
