"""Models whose cache is kept in few bits: the numbers are those of the compression, wherever cells live and move."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from transformers import MistralConfig

from flexgen_hf import Compression, Placement, Policy, StepError, Tier
from flexgen_hf.bench import emulated
from flexgen_hf.cell_layout import CellShape
from flexgen_hf.cells import Cell
from flexgen_hf.errors import QuantizationError
from flexgen_hf.quantization import dispatch

from .comparison import BEAMS, GREEDY, load_ours, load_plain, put, ragged, same_tokens, save_tiny
from .kept import cache_as_kept, kept_bytes

MODES = {"greedy": GREEDY, "beams": BEAMS}
WIDTHS = [2, 3, 4, 8]
MIXED = Placement(device=0.3, host=0.4)
PLACEMENTS = [*(Placement.all_on(tier) for tier in Tier), MIXED]

policies = st.builds(
    Policy,
    weights=st.sampled_from(PLACEMENTS),
    cache=st.sampled_from(PLACEMENTS),
    hidden=st.sampled_from(PLACEMENTS),
    batch_size=st.integers(1, 4),
    num_batches=st.integers(1, 3),
    overlap=st.booleans(),
    host_attention=st.booleans(),
    compression=st.builds(Compression, cache=st.sampled_from(WIDTHS), group_size=st.sampled_from([8, 64])),
)


@pytest.fixture(scope="module", autouse=True)
def emulated_device() -> None:
    emulated.install()
    emulated.configure()


def same_as_kept(plain: Any, ours: Any, mode: dict[str, Any], compression: Compression, **inputs: Any) -> torch.Tensor:
    """Asserts that we generate what transformers does with a cache that keeps what ours is to keep."""
    options = {"max_new_tokens": 6, "pad_token_id": 1, **mode}
    inputs = inputs or ragged()
    expected = plain.generate(**inputs, **options, past_key_values=cache_as_kept(compression))
    got = ours.generate(**put(inputs, ours.device), **options).cpu()
    assert torch.equal(got, expected), f"\nwant {expected.tolist()}\ngot  {got.tolist()}"
    return expected  # type: ignore[no-any-return]


class TestNumbers:
    @hypothesis.settings(max_examples=20, suppress_health_check=[hypothesis.HealthCheck.too_slow])
    @hypothesis.given(policy=policies, where=st.sampled_from(["cpu", "emulated:0"]), mode=st.sampled_from(list(MODES)))
    def test_any_policy_gives_the_tokens_of_transformers_with_such_a_cache(
        self, tiny_opt: Path, plain_opt: Any, policy: Policy, where: str, mode: str
    ) -> None:
        with load_ours(tiny_opt, policy, device=where) as ours:
            same_as_kept(plain_opt, ours, MODES[mode], policy.compression)

    @pytest.mark.parametrize("bits", WIDTHS)
    def test_movement_changes_no_number(self, tiny_opt: Path, device: str, bits: int) -> None:
        """Logits to the bit, for one shape of the block and one way to attend."""
        logits = []
        for cache, overlap in [*((cache, True) for cache in PLACEMENTS), (MIXED, False)]:
            compression = Compression(cache=bits)
            policy = Policy(cache=cache, batch_size=4, num_batches=2, overlap=overlap, compression=compression)
            with load_ours(tiny_opt, policy, device=device) as ours:
                made = ours.generate(
                    **put(ragged(), ours.device), **GREEDY, max_new_tokens=4, pad_token_id=1,
                    output_logits=True, return_dict_in_generate=True,
                )  # fmt: skip
            logits.append(torch.stack(made.logits).cpu())
        assert all(torch.equal(other, logits[0]) for other in logits)

    def test_few_bits_are_seen(self, tiny_opt: Path, plain_opt: Any) -> None:
        """Two bits change the tokens, so the tests above can fail; a prompt's first token sees its own step alone."""
        plain = plain_opt.generate(**ragged(), **GREEDY, max_new_tokens=6, pad_token_id=1)
        with load_ours(tiny_opt, Policy(batch_size=7, compression=Compression(cache=2))) as ours:
            got = same_as_kept(plain_opt, ours, GREEDY, Compression(cache=2))
        prompt = ragged()["input_ids"].shape[1]
        assert torch.equal(got[:, : prompt + 1], plain[:, : prompt + 1])
        assert not torch.equal(got, plain)

    @pytest.mark.parametrize("cache", [Placement(host=1.0), Placement(disk=1.0)], ids=["host", "disk"])
    def test_without_kernels_the_numbers_are_the_same(
        self, tiny_opt: Path, plain_opt: Any, monkeypatch: pytest.MonkeyPatch, cache: Placement
    ) -> None:
        monkeypatch.setattr(dispatch, "_kernels", lambda: None)
        policy = Policy(cache=cache, batch_size=4, num_batches=2, compression=Compression(cache=4))
        with load_ours(tiny_opt, policy) as ours:
            same_as_kept(plain_opt, ours, GREEDY, policy.compression)

    def test_a_sliding_window(self, tmp_path: Path, device: str) -> None:
        """Against transformers as long as nothing kept is seen, and placement against placement after that."""
        config = MistralConfig(
            vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=24, max_position_embeddings=64, sliding_window=6,
        )  # fmt: skip
        folder, tokens = save_tiny(config, tmp_path / "model"), []
        for cache in PLACEMENTS:
            policy = Policy(cache=cache, batch_size=2, num_batches=4, compression=Compression(cache=4))
            with load_ours(folder, policy, device=device) as ours:
                same_tokens(load_plain(folder), ours, GREEDY, ragged(), max_new_tokens=1)
                tokens.append(ours.generate(**put(ragged(), ours.device), **GREEDY, max_new_tokens=8).cpu())
        assert all(torch.equal(other, tokens[0]) for other in tokens)


class TestCachesThatAreUsedAgain:
    @pytest.mark.parametrize("host_attention", [False, True])
    def test_continued_cropped_and_beyond_what_was_planned(
        self, tiny_opt: Path, plain_opt: Any, device: str, host_attention: bool
    ) -> None:
        policy = Policy(
            cache=MIXED, batch_size=2, num_batches=4, host_attention=host_attention, compression=Compression(cache=4)
        )
        inputs = ragged()
        with load_ours(tiny_opt, policy, device=device) as ours:
            ids = {ours: inputs["input_ids"].to(ours.device), plain_opt: inputs["input_ids"]}
            caches: dict[Any, Any] = {ours: None, plain_opt: cache_as_kept(policy.compression)}
            for step in range(3):
                for model, given in ids.items():
                    mask = torch.ones_like(given)
                    mask[:, : inputs["attention_mask"].shape[1]] = inputs["attention_mask"].to(model.device)
                    made = model.generate(
                        input_ids=given, attention_mask=mask, past_key_values=caches[model], **GREEDY,
                        max_new_tokens=4, pad_token_id=1, return_dict_in_generate=True,
                    )  # fmt: skip
                    ids[model], caches[model] = made.sequences, made.past_key_values
                assert torch.equal(ids[ours].cpu(), ids[plain_opt])
                self._hold_the_same(caches[ours], caches[plain_opt])
                if step == 1:
                    for cache in caches.values():
                        cache.crop(-3)
            caches[ours].close()

    @staticmethod
    def _hold_the_same(ours: Any, theirs: Any) -> None:
        for layer, kept in enumerate(theirs.layers):
            for name in ("keys", "values"):
                parts = [getattr(child.cells[layer], name).cpu() for child in ours.children]
                # another shape of the batch may round a last bit another way, and a code with it
                step = (getattr(kept, name).amax() - getattr(kept, name).amin()) / 15
                torch.testing.assert_close(torch.cat(parts), getattr(kept, name), rtol=0, atol=float(step))


class TestBytes:
    @pytest.mark.parametrize("heads", [(2, 64), (4, 80), (3, 24), (1, 3)], ids=str)
    @pytest.mark.parametrize("bits", [None, *WIDTHS, 16])
    def test_of_a_token(self, heads: tuple[int, int], bits: int | None) -> None:
        shape = CellShape(5, heads, heads, torch.float32, Compression(cache=bits))
        assert shape.token_bytes(0) == shape.token_bytes(1) == 5 * kept_bytes(*heads, bits)

    def test_as_one_would_reckon(self) -> None:
        """32 heads of 64 in 4 bits: half a byte an element, and 4 bytes a head; in 3 bits an odd number is rounded."""
        assert CellShape(1, (32, 64), (32, 64), torch.float16, Compression(cache=4)).token_bytes(0) == 32 * (32 + 4)
        assert CellShape(1, (1, 8), (1, 8), torch.float16, Compression(cache=3)).token_bytes(0) == 3 + 4 + 1

    @pytest.mark.parametrize("bits", WIDTHS)
    def test_what_crosses_disk_and_link_is_packed(self, tiny_opt: Path, device: str, bits: int) -> None:
        moved: dict[str, dict[str, int]] = {}
        for width in (None, bits):
            policy = Policy(
                cache=Placement(disk=1.0), weights=Placement(device=1.0), hidden=Placement(device=1.0),
                batch_size=4, num_batches=2, compression=Compression(cache=width),
            )  # fmt: skip
            with load_ours(tiny_opt, policy, device=device) as ours:
                ours.generate(**put(ragged(), ours.device), **GREEDY, max_new_tokens=5, pad_token_id=1)
                moved[str(width)] = lane_bytes(ours.last_run)
        plain, packed = moved.values()
        for lane in ("disk_to_host", "host_to_disk"):
            assert packed[lane] * kept_bytes(4, 8, None) == plain[lane] * kept_bytes(4, 8, bits)
            assert packed[lane] > 0

    @pytest.mark.parametrize("bits", WIDTHS)
    def test_the_links_of_a_device_carry_packed_bytes(self, tiny_opt: Path, bits: int) -> None:
        """Counted by the links themselves, which carry the same beside the cache but for a flag per quantized piece."""
        carried = []
        device = emulated.configure()
        for width in (None, bits):
            policy = Policy(
                cache=Placement(host=1.0), batch_size=4, num_batches=2, compression=Compression(cache=width)
            )
            with load_ours(tiny_opt, policy, device="emulated:0") as ours:
                inputs = put(ragged([20, 25, 30, 28, 26, 24, 22]), ours.device)
                before = device.to_device.bytes, device.to_host.bytes
                ours.generate(**inputs, **GREEDY, max_new_tokens=8, pad_token_id=1)
                carried.append((device.to_device.bytes - before[0], device.to_host.bytes - before[1]))
        plain, packed = carried
        saved = 2 * 3 * (kept_bytes(4, 8, None) - kept_bytes(4, 8, bits))  # keys and values, layers
        held = [4 * tokens + 3 * (tokens - 6) for tokens in range(30, 38)]  # the shorter ones' common padding is not
        assert plain[0] - packed[0] == saved * sum(held[:-1])  # each step needs all tokens before it
        assert 0 <= saved * held[-1] - (plain[1] - packed[1]) <= 2 * 3 * 2 * 8


def lane_bytes(report: Any) -> dict[str, int]:
    return {lane: report.lanes[lane].bytes for lane in ("disk_to_host", "host_to_disk")}


class TestRefusals:
    def test_keys_that_groups_cannot_hold(self, tiny_opt: Path, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """By name, and the model is usable after it."""
        policy = Policy(cache=Placement(host=1.0), batch_size=4, num_batches=2, compression=Compression(cache=4))
        update = Cell.update
        with load_ours(tiny_opt, policy, device=device) as ours:
            inputs = put(ragged(), ours.device)
            expected = ours.generate(**inputs, **GREEDY, max_new_tokens=3, pad_token_id=1)
            with monkeypatch.context() as patch:
                patch.setattr(Cell, "update", lambda cell, keys, values: update(cell, keys * 1e9, values))
                with pytest.raises(StepError, match=r"keys\[.*\] is .*; quantized tensors hold") as caught:
                    ours.generate(**inputs, **GREEDY, max_new_tokens=3, pad_token_id=1)
            assert isinstance(caught.value.__cause__, QuantizationError)
            again = ours.generate(**inputs, **GREEDY, max_new_tokens=3, pad_token_id=1)
            assert torch.equal(again.cpu(), expected.cpu())
