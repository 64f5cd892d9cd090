"""Hidden states between layers: whatever their home, what a layer gets is what the one before returned."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from flexgen_hf import Tier
from flexgen_hf.hidden_states import HiddenStates
from flexgen_hf.planning.schedule import Rings
from flexgen_hf.storage import files
from flexgen_hf.storage.buffers import round_up
from flexgen_hf.storage.ledger import Ledger
from flexgen_hf.storage.workspace import Workspace
from tests.tiny import Accelerator

HIDDEN = 33


@pytest.fixture(params=[Workspace, Accelerator], ids=["cpu", "accelerator"])
def space(request, tmp_path) -> Workspace:
    made: Workspace = request.param(Ledger(), torch.device("cpu"), tmp_path, Rings(hidden=2))
    return made


@contextlib.contextmanager
def opened(homes: Sequence[Tier], space: Workspace) -> Iterator[HiddenStates]:
    with contextlib.closing(HiddenStates(homes, space)) as hidden:
        yield hidden
    assert {tier: space.ledger.held(tier) for tier in Tier} == dict.fromkeys(Tier, 0)


def layer(hidden: HiddenStates, inputs: Sequence[torch.Tensor], write_late: bool = False) -> list[torch.Tensor]:
    """One layer's end and the next one's start for all micro-batches, as the lanes do it: their moves in order."""
    batches = range(len(inputs))
    placeholders = [hidden.park(batch, (inputs[batch].clone(),)) for batch in batches]
    writes = []
    for batch in batches:
        if hidden.route(batch).pull:
            hidden.pull(batch)
        if hidden.route(batch).write:
            writes.append(batch)
            if not write_late:
                assert hidden.write(writes.pop()) == inputs[batch].numel() * inputs[batch].element_size()
    for batch in writes:
        hidden.write(batch)
    outputs = []
    for batch in batches:
        if hidden.route(batch).read:
            hidden.read(batch, batch % 2)
        if hidden.route(batch).push:
            hidden.push(batch, batch % 2)
        outputs.append(hidden.restore(batch, placeholders[batch], {})[0][0].clone())
    return outputs


def states(rows: Sequence[int], tokens: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [torch.randn(count, tokens, HIDDEN).to(dtype) for count in rows]


@pytest.mark.parametrize("write_late", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_come_back_in_prompt_and_decode(space, dtype, write_late):
    homes = [Tier.DISK, Tier.HOST, Tier.DISK, Tier.DEVICE, Tier.DISK, Tier.DISK, Tier.DISK, Tier.HOST]
    with opened(homes, space) as hidden:
        for tokens in (50, 50, 1, 1, 80, 1):
            given = states([4, 4, 4, 4, 4, 4, 4, 2], tokens, dtype)
            for ours, theirs in zip(layer(hidden, given, write_late), given, strict=True):
                assert torch.equal(ours, theirs)


def test_states_that_do_not_lie_one_after_the_other(space):
    with opened([Tier.DISK, Tier.HOST], space) as hidden:
        given = [torch.randn(HIDDEN, 7, 3).permute(2, 1, 0) for _ in range(2)]
        for ours, theirs in zip(layer(hidden, given), given, strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("tier", [Tier.HOST, Tier.DISK])
def test_all_memory_is_accounted_for_and_used_again(space, tier):
    """Each home on the host of an accelerator has a buffer; on the way to disk there are a few, however many homes."""
    batches, nbytes = 6, round_up(4 * 50 * HIDDEN * 4)
    with opened([tier] * batches, space) as hidden:
        layer(hidden, states([4] * batches, 50))
        direct, rings = space.is_direct, space.rings.hidden
        if tier is Tier.DISK:
            expected = {Tier.DISK: batches, Tier.HOST: rings + (1 if direct else rings + 1), Tier.DEVICE: rings}
        else:
            expected = {Tier.DISK: 0, Tier.HOST: batches, Tier.DEVICE: rings}
        expected = {t: n * nbytes for t, n in expected.items()}
        if direct:
            expected[Tier.DEVICE] = 0
            expected[Tier.HOST] *= tier is Tier.DISK
        assert {t: space.ledger.held(t) for t in Tier} == expected
        for _ in range(3):
            layer(hidden, states([4] * batches, 50), write_late=True)
            layer(hidden, states([4] * batches, 1))
        assert space.ledger.peaks() == expected


def test_regions_that_grow_leave_their_room_to_others(space):
    with opened([Tier.DISK] * 4, space) as hidden:
        for tokens in range(1, 200, 20):
            given = states([3] * 4, tokens)
            for ours, theirs in zip(layer(hidden, given), given, strict=True):
                assert torch.equal(ours, theirs)
        needed = 4 * round_up(3 * 181 * HIDDEN * 4)
        assert space.ledger.held(Tier.DISK) < 2.5 * needed


def test_pulls_that_run_ahead_leave_a_buffer_to_write_with(tmp_path):
    """What finds no buffer when it is to be pulled is taken when it is to be written, though others were faster."""
    space = Accelerator(Ledger(), torch.device("cpu"), tmp_path, Rings(hidden=2))
    with opened([Tier.DISK] * 9, space) as hidden:
        given = states([2] * 9, 5)
        placeholders = [hidden.park(batch, (given[batch].clone(),)) for batch in range(9)]
        moved = [hidden.pull(batch) for batch in range(4)]
        for batch in range(9):
            hidden.write(batch)
            if batch + 4 < 9:
                moved.append(hidden.pull(batch + 4))
        assert 0 < moved.count(0) < len(moved)
        for batch in range(9):
            hidden.read(batch, 0)
            hidden.push(batch, 0)
            assert torch.equal(hidden.restore(batch, placeholders[batch], {})[0][0], given[batch])


def test_a_folder_without_direct_transfers_is_noted(space, monkeypatch):
    monkeypatch.setattr(files, "_open_direct", lambda _: None)
    with opened([Tier.HOST], space) as hidden:
        layer(hidden, states([2], 3))
        assert hidden.notes == []
    with opened([Tier.DISK], space) as hidden:
        given = states([2], 3)
        assert torch.equal(layer(hidden, given)[0], given[0])
    assert hidden.notes[0].startswith("hidden states: reads and writes go through the page cache")


def test_nothing_is_left_in_the_folder(space, tmp_path: Path):
    with opened([Tier.DISK], space) as hidden:
        layer(hidden, states([2], 3))
        assert list(tmp_path.iterdir()) == []
