"""Attention over cells as they are kept: what plain attention makes of restored keys and values, but for rounding."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import LlamaConfig

from flexgen_hf import Compression, Placement, Policy, Tier, UnsupportedModelError
from flexgen_hf import attention as attention_module
from flexgen_hf import cell_attention as cell_attention_module
from flexgen_hf.cell_attention import KeptStates, kept_states
from flexgen_hf.cell_layout import CellShape
from flexgen_hf.quantization import attention_kernels, dispatch

from .comparison import GREEDY, load_ours, load_plain, put, ragged, save_tiny
from .kept import cache_as_kept

TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


def copy(target: torch.Tensor, source: torch.Tensor) -> None:
    target.copy_(source)


def states_of(shape: CellShape, tokens: int, new: int, generator: torch.Generator, scale: float = 1.0) -> KeptStates:
    """Kept tokens with neighbours that a kernel must leave alone, and a step's own."""
    kept, own = [], []
    memory = shape.views(torch.zeros(shape.nbytes(tokens + 2), dtype=torch.uint8), tokens + 2)
    for part, (heads, width) in enumerate((shape.key, shape.value)):
        rows = torch.randn(tokens, shape.batch, heads, width, generator=generator) * scale + 0.1
        shape.keep(part, rows.to(shape.compute_dtype), memory[part][1 : tokens + 1], copy)
        kept.append(memory[part][1 : tokens + 1])
        own.append(torch.randn(shape.batch, heads, new, width, generator=generator).to(shape.compute_dtype))
    return KeptStates(shape, (kept[0], kept[1]), (own[0], own[1]))


def plainly(states: KeptStates, query: torch.Tensor, mask: torch.Tensor | None, scaling: float) -> torch.Tensor:
    """In float64, over all keys and values as they are restored."""
    keys, values = (part.double().repeat_interleave(query.shape[1] // part.shape[1], 1) for part in states.restored())
    scores = query.double() @ keys.transpose(-1, -2) * scaling
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype is torch.bool else scores + mask.double()
    return scores.softmax(-1) @ values


@st.composite
def cases(draw: st.DrawFn) -> tuple[KeptStates, torch.Tensor, torch.Tensor | None, float]:
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    batch, heads, shared = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 4, 9]))
    widths = draw(st.tuples(st.integers(1, 80), st.integers(1, 80)))
    compression = Compression(
        cache=draw(st.sampled_from([2, 3, 4, 8, 16])), group_size=draw(st.sampled_from([8, 24, 64]))
    )
    shape = CellShape(batch, (heads, widths[0]), (heads, widths[1]), dtype, compression)
    tokens, new = draw(st.integers(0, 300)), draw(st.sampled_from([1, 1, 1, 3]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    states = states_of(shape, tokens, new, generator)
    query = torch.randn(batch, heads * shared, new, widths[0], generator=generator).to(dtype)
    rows, columns = draw(st.sampled_from([1, batch])), draw(st.sampled_from([1, 1, heads * shared]))
    mask = torch.rand(rows, columns, new, tokens + new, generator=generator) < 0.7
    mask[..., tokens:] = torch.ones(new, new).tril().bool()
    kind = draw(st.sampled_from(["bool", "additive", "none"]))
    if kind == "additive":
        mask = torch.where(mask, torch.randn(mask.shape, generator=generator), torch.finfo(dtype).min).to(dtype)
    sees_all = kind == "none" and new == 1
    return states, query, None if sees_all else mask, draw(st.sampled_from([1.0, widths[0] ** -0.5]))


@settings(max_examples=60)
@given(cases())
def test_kernel_and_blocks_do_what_plain_attention_does(case: Any) -> None:
    states, query, mask, scaling = case
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cell_attention_module, "EXCHANGE_BYTES", 1 << 14)
        made = states.attend(query, mask, scaling)
    assert made.dtype == query.dtype
    torch.testing.assert_close(
        made.double(), plainly(states, query, mask, scaling), rtol=0, atol=TOLERANCES[query.dtype]
    )


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_kernel_and_blocks_agree(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = CellShape(3, (2, 72), (2, 40), torch.float32, Compression(cache=bits))
    generator = torch.Generator().manual_seed(0)
    states, query = states_of(shape, 259, 1, generator, scale=3.0), torch.randn(3, 8, 1, 72, generator=generator)
    by_kernel = states.attend(query, None, 0.5)
    monkeypatch.setattr(dispatch, "_kernels", lambda: None)
    torch.testing.assert_close(by_kernel, states.attend(query, None, 0.5), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("threads", [2, 3, 5])
def test_threads_share_heads_and_rows_and_change_nothing(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_kernels, "_SHARED_ELEMENTS", 1)
    shape = CellShape(3, (2, 64), (2, 64), torch.float32, Compression(cache=4))
    generator = torch.Generator().manual_seed(1)
    states, query = states_of(shape, 50, 1, generator), torch.randn(3, 4, 64, generator=generator)
    arguments: Any = (
        query, (states.own[0][:, :, 0], states.own[1][:, :, 0]),
        (shape.quantized(0, states.kept[0]), shape.quantized(1, states.kept[1])), shape.formats, torch.zeros(1, 51),
    )  # fmt: skip
    attend: Any = attention_kernels.attend
    assert torch.equal(attend(*arguments, threads), attend(*arguments))


@pytest.mark.parametrize("new", [1, 2])
def test_a_query_that_sees_nothing_gets_nothing(new: int) -> None:
    shape = CellShape(1, (2, 16), (2, 16), torch.float32, Compression(cache=4))
    states = states_of(shape, 9, new, torch.Generator().manual_seed(2))
    mask = torch.zeros(1, 1, new, 9 + new, dtype=torch.bool)
    assert not states.attend(torch.ones(1, 2, new, 16), mask, 1.0).any()


def test_large_scores_do_not_overflow() -> None:
    shape = CellShape(1, (1, 64), (1, 64), torch.float32, Compression(cache=4))
    states = states_of(shape, 200, 1, torch.Generator().manual_seed(3), scale=1000.0)
    query = torch.randn(1, 1, 1, 64, generator=torch.Generator().manual_seed(4)) * 100
    torch.testing.assert_close(
        states.attend(query, None, 1.0).double(), plainly(states, query, None, 1.0), rtol=1e-3, atol=1
    )


class TestStandIns:
    SHAPE = CellShape(2, (2, 16), (2, 24), torch.float32, Compression(cache=4))

    def states(self, new: int = 1) -> KeptStates:
        return states_of(self.SHAPE, 7, new, torch.Generator().manual_seed(5))

    def test_look_like_keys_and_values(self) -> None:
        states = self.states()
        keys, values = states.stand_ins()
        assert (keys.shape, values.shape) == ((2, 2, 8, 16), (2, 2, 8, 24))
        assert kept_states(keys) is states
        assert kept_states(torch.empty(1)) is None

    def test_keys_that_were_changed_are_refused(self) -> None:
        keys, values = self.states().stand_ins()
        with pytest.raises(UnsupportedModelError, match=r"Linear changes keys .* leave host_attention or"):
            attention_module._attend(nn.Linear(1, 1), torch.ones(2, 2, 1, 16), keys * 2, values, None)

    @pytest.mark.parametrize(
        "options", [{}, {"position_bias": torch.arange(8.0).expand(1, 4, 1, 8)}], ids=["plain", "more"]
    )
    def test_attention_is_that_of_transformers(self, options: dict[str, Any]) -> None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        states, module = self.states(), nn.Module()
        module.num_key_value_groups = 2  # type: ignore[assignment]
        query = torch.randn(2, 4, 1, 16, generator=torch.Generator().manual_seed(6))
        made, _ = attention_module._attend(module, query, *states.stand_ins(), None, **options)
        wanted, _ = sdpa_attention_forward(module, query, *states.restored(), None, **options)
        torch.testing.assert_close(made, wanted, rtol=0, atol=1e-5)


class TestModels:
    @pytest.mark.parametrize("bits", [3, 4])
    def test_shared_heads_and_a_cell_on_each_tier(self, tmp_path: Path, device: str, bits: int) -> None:
        config = LlamaConfig(
            vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, head_dim=24, max_position_embeddings=64,
        )  # fmt: skip
        folder = save_tiny(config, tmp_path / "model")
        compression = Compression(cache=bits)
        policy = Policy(
            cache=Placement(device=0.3, host=0.4, disk=0.3), batch_size=3, num_batches=3, host_attention=True,
            compression=compression,
        )  # fmt: skip
        options = {**GREEDY, "max_new_tokens": 8, "pad_token_id": 1}
        expected = load_plain(folder).generate(**ragged(), **options, past_key_values=cache_as_kept(compression))
        with load_ours(folder, policy, device=device) as ours:
            assert torch.equal(ours.generate(**put(ragged(), ours.device), **options).cpu(), expected)

    @pytest.mark.parametrize("tier", list(Tier))
    @pytest.mark.parametrize("implementation", ["sdpa", "eager"])
    def test_on_a_cpu_no_cell_is_unpacked(self, tiny_opt: Path, tier: Tier, implementation: str) -> None:
        """Of slots there is what a cell on disk is read to; other attention than ours takes whole keys, from slots."""
        compression = Compression(cache=4)
        policy = Policy(cache=Placement.all_on(tier), batch_size=4, num_batches=1, compression=compression)
        with load_ours(tiny_opt, policy, attn_implementation=implementation) as ours:
            made = ours.generate(
                **ragged((3, 7, 5, 2)), **GREEDY, max_new_tokens=4, pad_token_id=1, return_dict_in_generate=True
            )
            cells = list(made.past_key_values.cells())
            assert all(bool(cell.slot_bytes.working) == (implementation == "eager") for cell in cells)
            assert all(bool(cell.slot_bytes.staging) == (tier is Tier.DISK) for cell in cells)
            assert all(cell.route.push == (implementation == "eager") for cell in cells)
            made.past_key_values.close()
            del made, cells
            gc.collect()
