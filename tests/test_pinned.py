"""Copies through a bounded pool: every byte arrives once and in order, whatever fits a buffer. Without a real link."""

import threading

import pytest
import torch

from flexgen_hf.policy import Tier
from flexgen_hf.storage.ledger import Ledger
from flexgen_hf.storage.pinned import PinnedPool


class Event:
    """Notes in which order it is recorded and waited for."""

    log: list[str]

    def __init__(self, log: list[str]) -> None:
        self.log = log

    def record(self) -> None:
        self.log.append("record")

    def synchronize(self) -> None:
        self.log.append("wait")


@pytest.fixture
def log() -> list[str]:
    return []


@pytest.fixture
def ledger() -> Ledger:
    return Ledger()


@pytest.fixture
def pool(ledger, log) -> PinnedPool:
    return PinnedPool(ledger, lambda: Event(log), pin=False, nbytes=64)


@pytest.mark.parametrize("to_device", [True, False])
@pytest.mark.parametrize("size", [0, 1, 16, 17, 32, 33, 100])
def test_everything_arrives(pool, log, size, to_device):
    source = torch.arange(size, dtype=torch.float32).view(-1, 1)
    target = torch.full((size, 1), -1.0)
    pool.copy(target, source, to_device=to_device)
    assert torch.equal(target, source)
    assert log.count("record") == log.count("wait") == -(-size // 16)


def test_one_buffer_is_filled_while_the_other_one_crosses(pool, log):
    pool.copy(torch.empty(64), torch.zeros(64), to_device=True)
    assert log == ["record", "record", "wait", "record", "wait", "record", "wait", "wait"]


def test_an_error_gives_the_buffers_back(pool, log):
    for _ in range(5):  # more often than there are pairs
        with pytest.raises(RuntimeError):
            pool.copy(torch.empty(16), torch.zeros(8), to_device=True)
    pool.copy(torch.empty(8), torch.zeros(8), to_device=True)


def test_two_directions_at_once(pool):
    sources = [torch.randn(1000) for _ in range(8)]
    targets = [torch.empty(1000) for _ in range(8)]
    threads = [
        threading.Thread(target=pool.copy, args=pair, kwargs={"to_device": bool(number % 2)})
        for number, pair in enumerate(zip(targets, sources, strict=True))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert all(torch.equal(target, source) for target, source in zip(targets, sources, strict=True))


def test_the_pool_is_accounted_for_and_given_back(pool, ledger):
    assert ledger.held(Tier.HOST) == pool.nbytes == 4 * 64
    pool.close()
    assert ledger.held(Tier.HOST) == 0
