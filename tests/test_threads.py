"""Threads that move data leave the cores to compute, and leave nothing behind."""

import contextlib
import threading
from collections import defaultdict
from pathlib import Path

import pytest
import torch

from flexgen_hf.planning.schedule import Lane
from flexgen_hf.storage.lanes import Lanes
from tests.tiny import batch, flexgen_threads, greedy, load, pretend_accelerator, write_tiny_opt


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return write_tiny_opt(tmp_path_factory.mktemp("threads") / "model")


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def threads_of_a_new_thread() -> int:
    seen = []
    thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    return seen[0]


def test_lanes_compute_with_one_thread_and_the_caller_with_its_own(checkpoint, tmp_path, monkeypatch, two_threads):
    pretend_accelerator(monkeypatch)
    seen: dict[str, set[int]] = defaultdict(set)
    with load(checkpoint, tmp_path) as model:
        model._executor.before_step = lambda lane, _: seen[lane].add(torch.get_num_threads())
        greedy(model, batch(7))
    assert seen == {lane.value: {2 if lane is Lane.COMPUTE else 1} for lane in Lane}
    assert torch.get_num_threads() == 2
    assert threads_of_a_new_thread() == 2


def test_the_disk_has_two_requests_in_flight(checkpoint, tmp_path):
    both = threading.Barrier(2, timeout=5)
    met = threading.Event()

    def meet(lane: str, _: object) -> None:
        if lane == Lane.DISK_TO_HOST and not met.is_set():
            with contextlib.suppress(threading.BrokenBarrierError):
                both.wait()
                met.set()

    with load(checkpoint, tmp_path) as model:
        model._executor.before_step = meet
        greedy(model, batch(7))
    assert met.is_set()
    workers = {event.worker for event in model.last_run.lanes[Lane.DISK_TO_HOST].events}
    assert workers == {0, 1}


def test_a_thread_that_cannot_be_set_up_is_an_error_at_once():
    def broken():
        raise RuntimeError("no stream")

    with pytest.raises(RuntimeError, match="no stream"):
        Lanes(["read", "push"], workers={"read": 3}, around=broken)
    assert flexgen_threads() == []
