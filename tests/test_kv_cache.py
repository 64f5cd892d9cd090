"""The cache of a block against transformers' own: whatever is done to it, wherever cells live, it holds the same."""

import contextlib
import gc
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.cache_utils import Cache

from flexgen_hf import CapacityError, Compression, FlexGenError, Placement, Policy, Tier, UnsupportedModelError
from flexgen_hf import cells as cells_module
from flexgen_hf.bench import emulated
from flexgen_hf.cell_attention import kept_states
from flexgen_hf.cell_space import CacheSpace
from flexgen_hf.cells import Cell
from flexgen_hf.kv_cache import BlockCache, spans_of
from flexgen_hf.planning.budget import room_for
from flexgen_hf.planning.schedule import Rings
from flexgen_hf.storage import files
from flexgen_hf.storage.buffers import PAGE, round_up
from flexgen_hf.storage.ledger import Ledger
from flexgen_hf.storage.workspace import Workspace
from tests.kept import cache_as_kept, kept_bytes
from tests.tiny import Accelerator, greedy, load, pretend_accelerator, reference, write_tiny_opt
from tests.tiny import batch as prompts

LAYERS, HEADS, DIM = 2, 2, 3
HOMES = {
    "device": [Tier.DEVICE],
    "host": [Tier.HOST],
    "disk": [Tier.DISK],
    "mixed": [Tier.DISK, Tier.DEVICE, Tier.HOST],
}


class Pair:
    """A block cache and transformers' own, to which the same is done; `bits` are those in which both keep tokens."""

    def __init__(
        self,
        folder: Path,
        homes: Sequence[Tier],
        rows: int = 5,
        batch_size: int = 2,
        *,
        capacity: int = 4,
        space: type[Workspace] = Workspace,
        ledger: Ledger | None = None,
        dim: int = DIM,
        window: int | None = None,
        keeps_past: bool = True,
        host_attention: bool = False,
        bits: int | None = None,
        group_size: int = 64,
    ) -> None:
        self.folder, self.rows, self.window = folder, rows, window
        self.compression = Compression(cache=bits, group_size=group_size)
        self.dim, self.value_dim = dim, dim + 1
        self.ledger = ledger or Ledger()
        workspace = space(self.ledger, torch.device("cpu"), folder, Rings(cache=2))
        self.space = CacheSpace(workspace, host_attention, self.compression)
        spans = spans_of(rows, batch_size)
        self.ours = BlockCache(
            self.space,
            spans,
            lambda layer, batch: homes[(layer + batch) % len(homes)],
            [window] * LAYERS,
            capacity,
            keeps_past=keeps_past,
        )
        self.theirs = self.theirs_anew()
        self._random = torch.Generator().manual_seed(0)

    def theirs_anew(self) -> Cache:
        """What transformers would begin with."""
        return cache_as_kept(self.compression)

    def append(self, tokens: int, dtype: torch.dtype = torch.float32) -> None:
        """What one sweep does: each cell to its slot, computed with, home again; all keys and values as returned."""
        self.ours.prepare_sweep()
        slot, held = 0, self.ours.get_seq_length()
        first = max(0, held - self.window + 1) if held and self.window is not None else 0
        for layer in range(LAYERS):
            keys, values = (self._states(tokens, dim, dtype) for dim in (self.dim, self.value_dim))
            expected = self.theirs.update(keys, values, layer)
            for batch, (start, end) in enumerate(self.ours.spans):
                cell = self.ours.children[batch].cells[layer]
                slot = (slot + 1) % self.space.num_slots
                got = self._visit(cell, slot, keys[start:end], values[start:end])
                for ours, theirs in zip(got, expected, strict=True):
                    assert same(ours, theirs[start:end, :, first:])

    def _states(self, tokens: int, dim: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.randn(self.rows, HEADS, tokens, dim, generator=self._random).to(dtype)

    @staticmethod
    def _visit(cell: Cell, slot: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        route = cell.route
        if cell.get_seq_length() and route.read:
            cell.read(slot)
        if cell.get_seq_length() and route.push:
            cell.push(slot)
        cell.bind(slot if route.moves else -1)
        got = cell.update(keys, values)
        kept = kept_states(got[0])
        got = (got[0].clone(), got[1].clone()) if kept is None else kept.restored()
        if route.pull:
            cell.pull(slot)
        if route.write:
            cell.write(slot)
        return got

    def crop(self, tokens: int) -> None:
        seen_then = max(0, self.ours.get_seq_length() - tokens - (self.window or 0) + 1)
        if self.window is not None and seen_then < next(self.ours.cells()).dropped:
            with pytest.raises(UnsupportedModelError, match="has forgotten those before"):
                self.ours.crop(-tokens)
            return
        for cache in (self.ours, self.theirs):
            cache.crop(-tokens)

    def reorder(self, rows: Sequence[int]) -> None:
        for cache in (self.ours, self.theirs):
            cache.reorder_cache(torch.LongTensor(rows))

    def select(self, rows: Sequence[int]) -> None:
        self.rows = len(rows)
        for cache in (self.ours, self.theirs):
            cache.batch_select_indices(torch.tensor(rows))

    def repeat(self, times: int) -> None:
        self.rows *= times
        for cache in (self.ours, self.theirs):
            cache.batch_repeat_interleave(times)

    def check(self) -> None:
        """Both hold the same."""
        assert self.ours.get_seq_length() == self.theirs.get_seq_length()
        assert self.ours.spans[-1][1] == self.rows
        assert list(self.folder.iterdir()) == []
        for batch, (start, end) in enumerate(self.ours.spans):
            for layer in range(LAYERS):
                cell = self.ours.children[batch].cells[layer]
                if not self.theirs.get_seq_length():
                    assert cell.get_seq_length() == 0
                    continue
                theirs: Any = self.theirs.layers[layer]
                assert same(cell.keys, theirs.keys[start:end, :, cell.dropped :])
                assert same(cell.values, theirs.values[start:end, :, cell.dropped :])
                assert not cell.dropped or self.window is not None

    def close(self) -> None:
        self.ours.close()
        assert {tier: self.ledger.held(tier) for tier in Tier} == dict.fromkeys(Tier, 0)


def same(ours: torch.Tensor | None, theirs: torch.Tensor) -> bool:
    """Whether both are equal to the bit, dtypes too."""
    return ours is not None and ours.dtype == theirs.dtype and torch.equal(ours, theirs)


@pytest.fixture(params=[Workspace, Accelerator], ids=["cpu", "accelerator"])
def space(request) -> type[Workspace]:
    chosen: type[Workspace] = request.param
    return chosen


@pytest.fixture(params=list(HOMES))
def homes(request) -> list[Tier]:
    return HOMES[request.param]


@pytest.fixture(params=[None, 16, 4], ids=["as computed", "in 16 bit", "in groups"])
def pair(request, tmp_path, homes, space) -> Iterator[Pair]:
    with contextlib.closing(Pair(tmp_path, homes, space=space, bits=request.param)) as pair:
        yield pair
        pair.check()


class TestAsTransformersDoes:
    def test_append(self, pair):
        pair.append(2)
        pair.check()
        pair.append(1)
        pair.append(1)

    def test_grow_beyond_capacity_in_the_middle(self, pair):
        pair.append(3)
        for _ in range(6):  # from a capacity of 4 to one of 9, and the slots with it
            pair.append(1)
            pair.check()

    def test_grow_beyond_capacity_at_the_start(self, pair):
        pair.append(11)
        pair.append(1)

    def test_grow_by_much_at_once(self, pair):
        pair.append(2)
        pair.append(30)
        pair.append(1)

    def test_reserve_in_between(self, pair):
        pair.append(3)
        pair.ours.reserve(50)
        assert pair.ours.capacity == 50
        pair.check()
        pair.append(20)
        pair.ours.reserve(10)
        pair.append(1)

    def test_crop(self, pair):
        pair.append(4)
        pair.append(2)
        pair.crop(3)
        pair.check()
        pair.append(2)
        pair.crop(0)

    def test_crop_everything(self, pair):
        pair.append(3)
        pair.crop(3)
        pair.append(2)

    def test_reorder_within_micro_batches(self, pair):
        pair.append(3)
        pair.reorder([1, 0, 2, 2, 4])
        pair.check()
        pair.append(1)

    def test_reorder_across_micro_batches(self, pair):
        pair.append(3)
        pair.reorder([4, 4, 0, 1, 2])
        pair.check()
        pair.append(2)
        pair.reorder([1, 2, 3, 4, 0])
        pair.append(1)

    def test_reorder_before_anything_is_held(self, pair):
        pair.reorder([4, 3, 2, 1, 0])
        pair.append(1)

    def test_select_fewer_rows(self, pair):
        pair.append(3)
        pair.select([4, 1, 3])
        assert pair.ours.spans == [(0, 2), (2, 3)]
        pair.check()
        pair.append(2)
        pair.select([2])
        assert pair.ours.spans == [(0, 1)]
        pair.append(1)

    def test_select_more_rows_than_there_were(self, pair):
        pair.append(3)
        pair.select([0, 0, 1, 1, 2, 2, 3, 3, 4, 4])
        pair.check()
        pair.append(1)

    def test_repeat(self, pair):
        pair.append(3)
        pair.repeat(3)
        assert pair.ours.spans == [(0, 6), (6, 12), (12, 15)]
        pair.check()
        pair.append(2)

    def test_reset(self, pair):
        pair.append(3)
        for cell in pair.ours.cells():
            cell.reset()
        pair.theirs = pair.theirs_anew()
        pair.append(2)

    def test_preallocated(self, pair):
        pair.ours.preallocate((HEADS, DIM), (HEADS, DIM), torch.float32)
        pair.append(3)
        pair.append(3)

    def test_preallocated_for_another_shape(self, pair):
        pair.ours.preallocate((7, 5), (7, 5), torch.float16)
        pair.append(3)
        pair.append(3)

    def test_half_precision(self, pair):
        pair.append(3, torch.bfloat16)
        pair.append(1, torch.bfloat16)

    def test_nothing_yet(self, pair):
        assert pair.ours.get_seq_length() == 0
        assert all(cell.keys is None and cell.values is None for cell in pair.ours.cells())


OPERATIONS = st.one_of(
    st.tuples(st.just("append"), st.integers(1, 5)),
    st.tuples(st.just("crop"), st.integers(0, 3)),
    st.tuples(st.just("reorder"), st.randoms(use_true_random=False)),
    st.tuples(st.just("select"), st.randoms(use_true_random=False)),
    st.tuples(st.just("repeat"), st.integers(1, 2)),
)


# A token's keys of a micro-batch from 24 bytes to some pages, seldom ending where a page ends.
SETTINGS = st.fixed_dictionaries(
    {
        "homes": st.sampled_from(list(HOMES.values())),
        "space": st.sampled_from([Workspace, Accelerator]),
        "batch_size": st.integers(1, 5),
        "dim": st.sampled_from([3, 57, 256, 683]),
        "window": st.sampled_from([None, None, 1, 2, 7]),
        "keeps_past": st.booleans(),
        "host_attention": st.booleans(),
        "bits": st.sampled_from([None, 16, 8, 4, 3, 2]),
        "group_size": st.sampled_from([8, 64]),
    }
)


@pytest.mark.parametrize("is_direct", [True, False], ids=["past the page cache", "through it"])
@given(st.lists(OPERATIONS, min_size=1, max_size=8), SETTINGS, st.sampled_from([1, 2 << 20]))
@settings(max_examples=100, deadline=None)
def test_any_sequence_of_operations(tmp_path_factory, is_direct, operations, options, block_bytes):
    folder = tmp_path_factory.mktemp("offload", numbered=True)
    opening = contextlib.nullcontext() if is_direct else mock.patch.object(files, "_open_direct", return_value=None)
    with (
        opening,
        mock.patch.object(cells_module, "_BLOCK_BYTES", block_bytes),
        contextlib.closing(Pair(folder, rows=4, **options)) as pair,
    ):
        for name, value in operations:
            if name in ("reorder", "select", "repeat") and pair.theirs.get_seq_length() == 0:
                continue  # a DynamicCache of no tokens leaves these out but still expects the old number of rows
            if name in ("reorder", "select"):
                count = pair.rows if name == "reorder" else value.randint(1, pair.rows)
                getattr(pair, name)([value.randrange(pair.rows) for _ in range(count)])
            elif name == "repeat" and pair.rows * value > 16:
                continue
            else:
                getattr(pair, name)(min(value, pair.theirs.get_seq_length()) if name == "crop" else value)
            pair.check()


class TestWindows:
    """A cell keeps its window, and room for a few tokens more, wherever it lives and however it is kept."""

    @pytest.mark.parametrize("window", [1, 2, 5, 16])
    @pytest.mark.parametrize("bits", [None, 16, 4])
    @pytest.mark.parametrize("prompt", [3, 30])
    def test_no_more_than_the_window_is_kept(self, tmp_path, homes, space, window, bits, prompt):
        options: dict[str, Any] = {"space": space, "window": window, "bits": bits, "dim": 57, "keeps_past": False}
        with contextlib.closing(Pair(tmp_path, homes, capacity=64, rows=3, **options)) as pair:
            room = room_for(64, window)
            pair.append(prompt)
            for step in range(20):
                pair.append(1)
                if step % 6 == 5:
                    pair.reorder([2, 0, 0])
                assert all(cell.held <= room for cell in pair.ours.cells())
            pair.check()
            for cell in pair.ours.cells():
                assert cell.nbytes == cell._known().nbytes(room)
                assert window - 1 <= cell.held
            pair.crop(1)  # done, or refused if a token would come back that is forgotten
            pair.append(4)  # several at once: the cell grows, if it must
            pair.append(1)
            pair.check()

    @pytest.mark.parametrize("host_attention", [False, True])
    def test_what_will_be_taken_back_is_kept(self, tmp_path, homes, space, host_attention):
        options: dict[str, Any] = {"space": space, "window": 3, "host_attention": host_attention, "keeps_past": False}
        with contextlib.closing(Pair(tmp_path, homes, capacity=40, **options)) as pair:
            pair.append(9)
            pair.ours.activate_past_recording()
            for _ in range(5):
                pair.append(4)
                pair.crop(3)
            pair.check()

    def test_rows_take_what_is_forgotten_along(self, tmp_path, homes):
        with contextlib.closing(Pair(tmp_path, homes, capacity=40, window=4, keeps_past=False)) as pair:
            pair.append(7)
            pair.select([4, 0, 3])
            pair.append(1)
            pair.repeat(2)
            pair.append(1)
            pair.check()
            pair.ours.reset()
            assert pair.ours.get_seq_length() == 0


class TestOnDisk:
    """Whole pages are moved, though a token's keys end anywhere in them."""

    @pytest.mark.parametrize("window", [None, 1, 5])
    @pytest.mark.parametrize("dim", [3, 57, 683])
    def test_a_long_sequence(self, tmp_path, space, dim, window):
        with contextlib.closing(Pair(tmp_path, [Tier.DISK], space=space, dim=dim, window=window)) as pair:
            pair.append(9)
            for step in range(40):
                pair.append(1)
                if step % 10 == 0:
                    pair.crop(step % 7)
            pair.check()

    @pytest.mark.parametrize("bits", [None, 16, 4, 3])
    @pytest.mark.parametrize("dim", [57, 683])
    def test_a_step_writes_the_pages_of_its_tokens_and_no_others(self, tmp_path, space, dim, bits):
        options: dict[str, Any] = {"space": space, "dim": dim, "bits": bits, "capacity": 200}
        with contextlib.closing(Pair(tmp_path, [Tier.DISK], rows=2, **options)) as pair:
            spill, page, moved = pair.space.spill, 1 if pair.space.notes else PAGE, 0
            for old, new in ((0, 150), *((token, token + 1) for token in range(150, 160))):
                pair.append(new - old)
                for size in (2 * kept_bytes(HEADS, d, bits) for d in (pair.dim, pair.value_dim)):
                    moved += LAYERS * (round_up(new * size, page) - old * size // page * page)
                assert spill.written_bytes == moved

    def test_bytes_are_reported_as_they_are_needed_not_as_pages(self, tmp_path):
        with contextlib.closing(Pair(tmp_path, [Tier.DISK], rows=2)) as pair:
            pair.append(3)
            cell = pair.ours.children[0].cells[0]
            token = 2 * HEADS * (pair.dim + pair.value_dim) * 4
            assert cell.read(0) == 3 * token
            cell.bind(0)
            cell.update(torch.zeros(2, HEADS, 2, pair.dim), torch.zeros(2, HEADS, 2, pair.value_dim))
            assert cell.write(0) == 2 * token
            cell.crop(-2)

    def test_a_folder_without_direct_transfers_is_noted(self, tmp_path, monkeypatch):
        with contextlib.closing(Pair(tmp_path, [Tier.HOST])) as pair:
            pair.append(1)
            assert pair.space.notes == []
        monkeypatch.setattr(files, "_open_direct", lambda _: None)
        with contextlib.closing(Pair(tmp_path, [Tier.DISK])) as pair:
            pair.append(1)
            assert "the KV cache: reads and writes go through the page cache" in pair.space.notes[0]

    def test_cells_that_grow_use_again_what_others_gave_up(self, tmp_path):
        with contextlib.closing(Pair(tmp_path, [Tier.DISK], rows=8, batch_size=1, dim=256)) as pair:
            pair.append(4)
            for _ in range(60):
                pair.append(1)
            live = pair.ours.placement()[Tier.DISK]
            assert pair.ledger.held(Tier.DISK) < 2.5 * live
            held = pair.ledger.held(Tier.DISK)
            for rows in ([0, 1], range(8), [3], [3] * 8):
                pair.select([row % pair.rows for row in rows])
                pair.append(1)
            pair.check()
            assert pair.ledger.held(Tier.DISK) <= held + live


class TestIn16Bit:
    """Kept in half the bytes, computed with in float32."""

    @pytest.mark.parametrize("tier", list(Tier))
    def test_half_the_bytes_at_home(self, tmp_path, space, tier):
        placed, held = [], []
        for bits in (None, 16):
            options: dict[str, Any] = {"space": space, "capacity": 64, "dim": 64, "bits": bits}
            with contextlib.closing(Pair(tmp_path, [tier], rows=4, **options)) as pair:
                pair.ours.preallocate((HEADS, 64), (HEADS, 64), torch.float32)
                placed.append(pair.ours.placement()[tier])
                held.append(pair.ledger.held(tier))
        assert placed == held
        assert placed[1] == placed[0] / 2

    @pytest.mark.parametrize("tier", list(Tier))
    def test_slots_are_accounted_for_and_sized_once(self, tmp_path, space, tier):
        with contextlib.closing(Pair(tmp_path, [tier], rows=4, capacity=64, space=space, bits=16)) as pair:
            pair.value_dim = pair.dim
            pair.ours.preallocate((HEADS, pair.dim), (HEADS, pair.dim), torch.float32)
            home = pair.ours.cells().__next__().nbytes
            before = dict(pair.ledger.peaks())
            pair.append(60)
            held = pair.ledger.peaks()
            slots = pair.space.num_slots
            wanted = {**before, Tier.DEVICE: before[Tier.DEVICE] + slots * 2 * PAGE}
            wanted[Tier.HOST] += slots * home if tier is Tier.DISK else 0
            assert held == wanted
            pair.append(1)
            assert pair.ledger.peaks() == held

    def test_nothing_changes_where_compute_uses_16_bit(self, tmp_path, space):
        made = space(Ledger(), torch.device("cpu"), tmp_path, Rings())
        cache = CacheSpace(made, compression=Compression(cache=16), dtype=torch.bfloat16)
        plain = CacheSpace(made, dtype=torch.bfloat16)
        assert [Cell(cache, tier, 4).route for tier in Tier] == [Cell(plain, tier, 4).route for tier in Tier]
        assert not cache.casts
        assert cache.shape(1, (2, 3), (2, 3), torch.bfloat16).dtype == torch.bfloat16

    def test_a_step_sees_its_own_tokens_in_full_precision_and_later_ones_as_they_are_kept(self, tmp_path, space):
        with contextlib.closing(Pair(tmp_path, [Tier.HOST], rows=1, space=space, bits=16)) as pair:
            cell = pair.ours.children[0].cells[0]
            third = torch.full((1, HEADS, 1, DIM), 1 / 3)
            kept = third.half().float()
            pair.ours.prepare_sweep()
            for held in range(3):
                keys, _ = pair._visit(cell, 0, third, third)
                assert torch.equal(keys, torch.cat([kept] * held + [third], 2))

    @pytest.mark.parametrize("window", [None, 1, 3])
    def test_attended_on_the_host_through_a_window(self, tmp_path, window):
        options: dict[str, Any] = {"space": Accelerator, "bits": 16, "host_attention": True, "window": window}
        with contextlib.closing(Pair(tmp_path, [Tier.HOST, Tier.DISK], **options)) as pair:
            for tokens in (2, 1, 1, 2, 1, 3, 1):
                pair.append(tokens)
            pair.check()

    @pytest.mark.parametrize("host_attention", [False, True])
    def test_attended_on_the_host_it_needs_no_buffer(self, tmp_path, host_attention):
        options: dict[str, Any] = {"space": Accelerator, "bits": 16, "host_attention": host_attention}
        with contextlib.closing(Pair(tmp_path, [Tier.HOST], rows=4, capacity=64, **options)) as pair:
            for _ in range(3):
                pair.append(20)
            beside = sum(pair.ledger.held(tier) for tier in Tier) - sum(pair.ours.placement().values())
            assert beside == (0 if host_attention else pair.space.num_slots * 2 * PAGE)


class TestAttendedAtHome:
    """A head's tokens lie together, as attention reads them."""

    @pytest.mark.parametrize("home", [Tier.DEVICE, Tier.HOST])
    @pytest.mark.parametrize("tokens", [1, 2, 5])  # the last one makes cells grow
    def test_by_heads(self, tmp_path, space, home, tokens):
        options: dict[str, Any] = {"space": space, "host_attention": home is Tier.HOST}
        with contextlib.closing(Pair(tmp_path, [home], rows=2, **options)) as pair:
            pair.append(3)
            keys, values = (torch.zeros(2, HEADS, tokens, dim) for dim in (pair.dim, pair.value_dim))
            seen = pair.ours.children[0].cells[0].update(keys, values)
            assert all(part[row, head].is_contiguous() for part in seen for row in range(2) for head in range(HEADS))

    def test_rows_change_places_with_those_of_cells_that_lie_token_by_token(self, tmp_path, space):
        options: dict[str, Any] = {"space": space, "rows": 6, "capacity": 9}
        with contextlib.closing(Pair(tmp_path, [Tier.DEVICE, Tier.DISK, Tier.HOST], **options)) as pair:
            pair.append(3)
            pair.reorder([5, 3, 3, 0, 1, 4])
            pair.append(1)
            pair.check()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return write_tiny_opt(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(params=["cpu", "accelerator"])
def device(request, monkeypatch) -> str:
    if request.param == "accelerator":
        pretend_accelerator(monkeypatch)
    return str(request.param)


def policy(cache: Placement, **fields: Any) -> Policy:
    return Policy(cache=cache, compression=Compression(cache=16), batch_size=2, num_batches=3, **fields)


class TestModelsWithCellsIn16Bit:
    @pytest.mark.parametrize("overlap", [True, False])
    @pytest.mark.parametrize(
        "cache",
        [Placement(device=1.0), Placement(host=1.0), Placement(disk=1.0), Placement(device=0.3, host=0.4, disk=0.3)],
        ids=["device", "host", "disk", "mixed"],
    )
    def test_greedy(self, checkpoint, tmp_path, device, cache, overlap):
        expected = greedy(reference(checkpoint), prompts(5), tokens=8)
        with load(checkpoint, tmp_path, policy(cache, overlap=overlap)) as model:
            for _ in range(2):
                got = greedy(model, prompts(5), tokens=8)
                assert torch.equal(got.sequences, expected.sequences)
                for ours, theirs in zip(got.logits, expected.logits, strict=True):
                    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-2 * float(theirs.std()))
                assert any(not torch.equal(o, t) for o, t in zip(got.logits[1:], expected.logits[1:], strict=True))
            assert torch.equal(got.logits[0], greedy(model, prompts(5), tokens=1).logits[0])

    @pytest.mark.parametrize("host_attention", [False, True])
    def test_beams_over_all_tiers(self, checkpoint, tmp_path, device, host_attention):
        options: dict[str, Any] = {"num_beams": 3, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 1}
        expected = reference(checkpoint).generate(**prompts(5), **options)
        placed = policy(Placement(device=0.3, host=0.4, disk=0.3), host_attention=host_attention)
        with load(checkpoint, tmp_path, placed) as model:
            assert torch.equal(model.generate(**prompts(5), **options), expected)

    @pytest.mark.parametrize("host_attention", [False, True])
    @pytest.mark.parametrize("beams", [1, 3])
    def test_on_a_device_with_memory_of_its_own(self, checkpoint, tmp_path, host_attention, beams):
        emulated.install()
        emulated.configure()
        options: dict[str, Any] = {"num_beams": beams, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 1}
        expected = reference(checkpoint).generate(**prompts(5), **options)
        placed = policy(
            Placement(device=0.3, host=0.4, disk=0.3), hidden=Placement(disk=1.0), host_attention=host_attention
        )
        with load(checkpoint, tmp_path, placed, device="emulated:0") as model:
            assert torch.equal(model.generate(**prompts(5), **options).cpu(), expected)

    def test_a_cache_used_again_and_cropped(self, checkpoint, tmp_path, device):
        given = prompts(3)
        plain = reference(checkpoint)
        with load(checkpoint, tmp_path, policy(Placement(device=0.3, host=0.4, disk=0.3))) as model:
            caches: list[Any] = [None, None]
            ids = [given["input_ids"]] * 2
            mask = given["attention_mask"]
            for step in range(3):
                outputs = [
                    m.generate(
                        input_ids=ids[k],
                        attention_mask=torch.cat([mask, mask.new_ones(3, ids[k].shape[1] - mask.shape[1])], 1),
                        past_key_values=caches[k],
                        max_new_tokens=4,
                        do_sample=False,
                        eos_token_id=-1,
                        pad_token_id=1,
                        return_dict_in_generate=True,
                    )
                    for k, m in enumerate((model, plain))
                ]
                ids, caches = [o.sequences for o in outputs], [o.past_key_values for o in outputs]
                assert torch.equal(*ids)
                if step == 1:
                    for cache in caches:
                        cache.crop(-3)
            caches[0].close()

    def test_the_argument_of_from_pretrained(self, checkpoint, tmp_path):
        sizes = {}
        for compression in (None, Compression(cache=16), {"cache": 16}):
            with load(
                checkpoint, tmp_path, Policy(cache=Placement(disk=1.0), batch_size=64), compression=compression
            ) as model:
                greedy(model, prompts(64), tokens=2)
                sizes[str(compression)] = sum(model.last_run.placement["cache"].values())
        plain, *rest = sizes.values()
        assert rest == [plain / 2] * 2


class TestBeams:
    @pytest.mark.parametrize("bits", [None, 16, 4])
    def test_reordering_takes_little_memory_beside_homes_and_slots(self, tmp_path, monkeypatch, homes, space, bits):
        monkeypatch.setattr(cells_module, "_BLOCK_BYTES", 16 << 10)
        monkeypatch.setattr(Cell, "get", lambda _: pytest.fail("a cell was copied as a whole"))
        options: dict[str, Any] = {"space": space, "dim": 64, "capacity": 600, "bits": bits}
        with contextlib.closing(Pair(tmp_path, homes, rows=8, batch_size=4, **options)) as pair:
            pair.value_dim = pair.dim
            pair.ours.preallocate((HEADS, pair.dim), (HEADS, pair.dim), torch.float32)
            pair.append(590)
            before = sum(pair.ledger.held(tier) for tier in Tier)
            pair.ledger.reset_peaks()
            for rows in ([1, 0, 3, 3, 4, 7, 7, 5], [7, 6, 5, 4, 3, 2, 1, 0]):
                pair.reorder(rows)
                pair.append(1)
            assert sum(pair.ledger.peaks().values()) <= before + (160 << 10)
            smallest = min(cell.nbytes for cell in pair.ours.cells())
            assert smallest > 300 << 10  # a copy of a cell would have been seen
            monkeypatch.undo()
            pair.check()

    def test_beams_that_stay_where_they_are_are_not_touched(self, tmp_path):
        with contextlib.closing(Pair(tmp_path, [Tier.DISK])) as pair:
            pair.append(3)
            spill, moved = pair.space.spill, 0
            moved = spill.read_bytes + spill.written_bytes
            pair.reorder([0, 1, 2, 3, 4])
            assert spill.read_bytes + spill.written_bytes == moved
            pair.reorder([0, 1, 3, 2, 4])
            some = spill.read_bytes + spill.written_bytes - moved
            pair.reorder([1, 0, 3, 2, 4])
            assert 0 < some < spill.read_bytes + spill.written_bytes - moved - some


class TestAccount:
    def test_preallocation_takes_what_is_needed(self, tmp_path):
        with contextlib.closing(Pair(tmp_path, HOMES["mixed"], capacity=100)) as pair:
            pair.ours.preallocate((HEADS, DIM), (HEADS, DIM), torch.float32)
            placement = pair.ours.placement()
            assert {tier: pair.ledger.held(tier) for tier in Tier} == placement
            before = pair.ledger.held(Tier.DISK)
            pair.value_dim = DIM
            pair.append(100)
            assert pair.ledger.held(Tier.DISK) == before

    @pytest.mark.parametrize("tier", list(Tier))
    def test_a_tier_that_is_too_small_refuses_and_nothing_stays(self, tmp_path, tier):
        pair = Pair(tmp_path, [tier], capacity=100, ledger=Ledger({tier: 20_000}))
        with pytest.raises(CapacityError, match=f"the KV cache needs|KV cache needs .* the {tier} tier"):
            pair.ours.preallocate((HEADS, DIM), (HEADS, DIM), torch.float32)
        assert pair.ledger.held(tier) == 0

    def test_micro_batches_that_are_gone_give_back_their_memory(self, tmp_path):
        with contextlib.closing(Pair(tmp_path, [Tier.HOST], capacity=1000)) as pair:
            pair.append(2)
            pair.select([0])
            assert pair.ledger.held(Tier.HOST) == sum(pair.ours.placement().values())

    @pytest.mark.parametrize("tier", list(Tier))
    def test_a_collected_cache_gives_everything_back(self, tmp_path, tier):
        pair = Pair(tmp_path, [tier])
        pair.append(2)
        ledger = pair.ledger
        assert ledger.held(tier)
        del pair
        gc.collect()
        assert {t: ledger.held(t) for t in Tier} == dict.fromkeys(Tier, 0)


class TestRefusals:
    def test_keys_that_change_their_shape_within_a_sequence(self, pair):
        pair.append(2)
        cell = pair.ours.children[0].cells[0]
        with pytest.raises(UnsupportedModelError, match="within one sequence"):
            cell.update(torch.zeros(2, HEADS + 1, 1, DIM), torch.zeros(2, HEADS + 1, 1, DIM + 1))

    def test_a_cell_on_disk_that_is_not_in_a_slot(self, tmp_path):
        with contextlib.closing(Pair(tmp_path, [Tier.DISK])) as pair:
            cell = pair.ours.children[0].cells[0]
            with pytest.raises(UnsupportedModelError, match="used the cache of another layer"):
                cell.update(torch.zeros(2, HEADS, 1, DIM), torch.zeros(2, HEADS, 1, DIM))

    def test_the_block_itself_is_not_updated(self, pair):
        with pytest.raises(RuntimeError, match="micro-batches"):
            pair.ours.update(torch.zeros(1), torch.zeros(1), 0)

    def test_a_closed_cache(self, tmp_path):
        pair = Pair(tmp_path, [Tier.DISK])
        pair.append(2)
        pair.close()
        with pytest.raises(FlexGenError, match="closed"):
            pair.append(1)

    def test_crop_to_a_positive_length(self, pair):
        pair.append(3)
        with pytest.raises(ValueError, match="negative"):
            pair.ours.crop(2)


def test_spans():
    assert spans_of(7, 3) == [(0, 3), (3, 6), (6, 7)]
    assert spans_of(2, 5) == [(0, 2)]
    assert spans_of(0, 5) == []
