"""Converting needs little memory, however large the checkpoint: measured, under a limit that would not forgive more."""

import sys
from pathlib import Path

import pytest
import torch

from conversion.verify import verify
from tests.checkpoints import opt_config, write_random_checkpoint
from tests.control_groups import PEAK_MEMORY, memory_limit, run_in

ROOT = Path(__file__).parent.parent

# Prints the process's own memory (anonymous, in bytes) after the imports, and its peak while converting.
CONVERT = f"""{PEAK_MEMORY}
import sys
import torch, transformers
from transformers import AutoModelForCausalLM, OPTForCausalLM
from conversion.convert import convert
import conversion.sources
from flexgen_hf.quantization import dispatch

dispatch.has_kernels()  # imports a compiler
with PeakMemory() as memory:
    convert(sys.argv[1], sys.argv[2], dtype=sys.argv[3], compression=sys.argv[4] or None)
print(memory.before, memory.peak)
"""

SHAPE = {
    "vocab_size": 50272, "hidden_size": 1024, "word_embed_proj_dim": 1024, "ffn_dim": 4096, "num_hidden_layers": 12,
    "num_attention_heads": 16, "max_position_embeddings": 2048,
}  # fmt: skip
LARGEST_TENSOR_BYTES = 50272 * 1024 * 2


@pytest.mark.limits
@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "dtype", "compression"),
    [
        ("safetensors", "float16", ""),
        ("bin", "float16", ""),
        ("bin", "bfloat16", ""),
        ("safetensors", "float16", "8bit"),
        ("bin", "float16", '{"weights": 4, "tables": 8}'),
    ],
)
def test_conversion_stays_small(tmp_path, kind, dtype, compression):
    with memory_limit(560 << 20) as group:
        source = write_random_checkpoint(tmp_path / "source", opt_config(**SHAPE), kind, torch.float16)
        command = [sys.executable, "-c", CONVERT, str(source), str(tmp_path / "store"), dtype, compression]
        result = run_in(group, command, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    before, peak = map(int, result.stdout.split())
    assert peak - before < 2 * LARGEST_TENSOR_BYTES, f"{(peak - before) >> 20} MiB above the imports"
    verify(tmp_path / "store", source)
