"""Defects of the original (FlexGen 0.1) that must not return. For each, a test by its name, and the defect put back.

A test that still passes with the defect in place proves nothing, so every one of them is run on it too. Defect 2 is in
`test_placement`, defect 8 in `test_conversion_resume`.
"""

import contextlib
import errno
import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from flexgen_hf import CapacityError, FlexGenError, FlexGenForCausalLM, Placement, Policy, StepError, Tier
from flexgen_hf import executor as executor_module
from flexgen_hf.planning.schedule import Lane, Schedule, Step, StepId, What
from flexgen_hf.storage.lanes import Lanes
from tests.test_storage import small_disk
from tests.tiny import (
    DISK,
    batch,
    flexgen_threads,
    greedy,
    load,
    pretend_accelerator,
    reference,
    watchdog,
    write_tiny_opt,
)
from tests.trained import TINY_OPT

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return write_tiny_opt(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert flexgen_threads() == []


def assert_same(model: Any, checkpoint: Path, prompts: dict[str, torch.Tensor]) -> None:
    """The model's tokens are transformers'."""
    assert torch.equal(greedy(model, prompts).sequences, greedy(reference(checkpoint), prompts).sequences)


# ------------------------------------------------------------------------------------------ 1: the next one's cache


def hold_until_the_next_cell_is_loaded(executor: Any) -> Callable[[str, StepId], None]:
    """The worst case for whoever loads ahead: compute begins only when the next cell has arrived, if it can arrive."""

    def before_step(lane: str, step: StepId) -> None:
        following = [(step.stage, step.batch + 1), (step.stage + 1, 0)]
        if lane != Lane.COMPUTE:
            return
        for stage, micro_batch in following:
            name = StepId(step.sweep, Lane.DISK_TO_HOST, What.CACHE, stage, micro_batch)
            if (ticket := executor._tickets.get(name)) is not None:
                deadline = time.monotonic() + 5
                while not ticket.done and time.monotonic() < deadline:
                    time.sleep(0.0005)
                return

    return before_step


class OneSharedWorkspace(Schedule):
    """The schedule with the defect: one slot for all cells, into which the next is loaded before this one is used."""

    def steps(self, *args: Any, **options: Any) -> Iterator[Step]:
        return (self.spoiled(step) for step in super().steps(*args, **options))

    @staticmethod
    def spoiled(step: Step) -> Step:
        if step.id.what is What.CACHE and step.id.lane is Lane.DISK_TO_HOST:
            own = tuple(name for name in step.after if (name.stage, name.batch) == (step.id.stage, step.id.batch))
            return step._replace(slot=0, after=own)
        return step._replace(slot=0) if step.id.what is What.CACHE or step.slot > 0 else step


class TestDefect1:
    """With overlap, host attention and several micro-batches, all but the last attended to the next one's cache."""

    POLICY = Policy(cache=DISK, batch_size=2, num_batches=3, host_attention=True, overlap=True)

    def attend(self, checkpoint, folder):
        prompts = batch(rows=6)
        assert len({tuple(row) for row in prompts["input_ids"].tolist()}) == 6
        with load(checkpoint, folder, self.POLICY) as model:
            model._executor.before_step = hold_until_the_next_cell_is_loaded(model._executor)
            assert_same(model, checkpoint, prompts)

    def test_defect_1_each_micro_batch_attends_to_its_own_cache(self, checkpoint, tmp_path):
        self.attend(checkpoint, tmp_path)

    def test_defect_1_put_back_is_noticed(self, checkpoint, tmp_path, monkeypatch):
        monkeypatch.setattr(executor_module, "Schedule", OneSharedWorkspace)
        with pytest.raises(AssertionError):
            self.attend(checkpoint, tmp_path)


# ------------------------------------------------------------------------------------------------- 5: errors that hang


class Saboteur:
    """Fails one step: the n-th of a lane. Counts the steps of all lanes."""

    def __init__(self, lane: Lane | None = None, moment: int = 0) -> None:
        self.lane, self.moment = lane, moment
        self.count: Counter[str] = Counter()
        self.failed: StepId | None = None

    def __call__(self, lane: str, step: StepId) -> None:
        self.count[lane] += 1
        if lane == self.lane and self.count[lane] == self.moment + 1:
            self.failed = step
            raise OSError(errno.EIO, "the disk is on fire")


def thread_that_dies(self: Lanes, lane: str, worker: int) -> None:
    """A lane with the defect: an exception ends the thread, and nobody hears of it."""
    while (item := self._queues[lane].get()) is not None:
        ticket, work, after = item
        if self._run(lane, worker, self.uses[lane], ticket, work, after) is not None:
            return
        ticket.finish()


class TestDefect5:
    """An exception in a copy thread, a full disk for example, hung the program for ever."""

    @pytest.fixture
    def model(self, checkpoint, tmp_path, monkeypatch):
        pretend_accelerator(monkeypatch)
        with load(checkpoint, tmp_path / "offload") as model:
            yield model

    @staticmethod
    def fail(model: Any, lane: Lane, moment: int, seconds: float = 30) -> tuple[BaseException, StepId]:
        saboteur = model._executor.before_step = Saboteur(lane, moment)
        try:
            with pytest.raises((StepError, OSError)) as caught:
                watchdog(lambda: greedy(model, batch(7)), seconds)
        finally:
            model._executor.before_step = None
        assert saboteur.failed is not None
        return caught.value, saboteur.failed

    @pytest.mark.parametrize("lane", list(Lane), ids=str)
    def test_defect_5_an_error_in_any_lane_at_any_step_arrives(self, checkpoint, tmp_path, model, lane):
        counting = model._executor.before_step = Saboteur()
        greedy(model, batch(7))
        before = {tier: model._executor.space.ledger.held(tier) for tier in Tier}
        steps = counting.count[lane]
        assert steps > 50
        for moment in {0, 1, steps // 4, steps // 2, steps - 2, steps - 1}:
            error, step = self.fail(model, lane, moment)
            if lane is Lane.COMPUTE:  # where the model's own code runs, errors keep their type
                assert isinstance(error, OSError)
                if sys.version_info >= (3, 11):
                    assert error.__notes__ == [f"{step} failed in lane 'compute'"]
            else:
                assert isinstance(error, StepError)
                assert (error.lane, error.step) == (lane.value, str(step))
                assert isinstance(error.__cause__, OSError)
                assert "the disk is on fire" in str(error)
            assert flexgen_threads() == []
            assert list((tmp_path / "offload").iterdir()) == []
            assert {tier: model._executor.space.ledger.held(tier) for tier in Tier} == before
        assert_same(model, checkpoint, batch(7))

    def test_defect_5_put_back_hangs(self, model, monkeypatch):
        monkeypatch.setattr(Lanes, "_work", thread_that_dies)
        model._executor.before_step = Saboteur(Lane.DISK_TO_HOST, 40)
        before = threading.active_count()
        with pytest.raises(TimeoutError):
            watchdog(lambda: greedy(model, batch(7)), seconds=1)
        deadline = time.monotonic() + 10
        while threading.active_count() > before and time.monotonic() < deadline:  # what waits for ever, is told
            for ticket in list(model._executor._tickets.values()):
                ticket.finish(InterruptedError("the test is over"))
            time.sleep(0.01)
        assert threading.active_count() == before

    @pytest.mark.parametrize("kind", ["cache", "hidden"])
    def test_defect_5_a_full_disk(self, checkpoint, tmp_path, kind):
        policy = Policy(batch_size=2, num_batches=4).replace(**{kind: DISK})
        # smaller than what the prompt takes, larger than nothing
        with small_disk(tmp_path / "disk", 3 * 4096) as disk, load(checkpoint, disk, policy) as model:
            with pytest.raises(CapacityError, match=r"more in '.*disk', which has 0\.0. MiB free; free space"):
                watchdog(lambda: greedy(model, batch(7)))
            assert flexgen_threads() == []
            assert list(disk.iterdir()) == []
            assert model._executor.space.ledger.held(Tier.DISK) == 0
            subprocess.run(["mount", "-o", "remount,size=4m", str(disk)], check=True)  # noqa: S607  as `small_disk`
            assert_same(model, checkpoint, batch(7))

    def test_an_error_between_the_steps(self, checkpoint, model):
        def fail(*_: Any) -> torch.Tensor:
            raise ZeroDivisionError("mine")

        with pytest.raises(ZeroDivisionError, match="mine"):
            watchdog(lambda: model.generate(**batch(7), max_new_tokens=4, logits_processor=[fail]))
        assert flexgen_threads() == []
        assert_same(model, checkpoint, batch(7))

    def test_what_was_lost_is_not_gone_on_with(self, model):
        """A cache of which some cells hold more tokens than others would give wrong tokens without a word."""
        prompts = {"input_ids": batch(3)["input_ids"]}
        cache = model(**prompts).past_key_values
        model._executor.before_step = Saboteur(Lane.COMPUTE, 3)
        with pytest.raises(OSError, match="fire"):
            model(**prompts, past_key_values=cache)
        model._executor.before_step = None
        with pytest.raises(FlexGenError, match="past_key_values was closed"):
            model(**prompts, past_key_values=cache)


# ------------------------------------------------------------------------------------------- 6: what is left behind


def named_file(dir: Path, **_: Any) -> Any:  # noqa: A002  the name of tempfile's parameter
    """With the defect: files of one name in the folder, which nobody removes."""
    return (Path(dir) / "t_0").open("w+b", buffering=0)


def generate_slowly(checkpoint: Path, offload: Path, pipe: Any, with_defect: bool = False) -> None:
    """In a process of its own: says when it is in the middle of generating, and how it went."""
    torch.set_num_threads(1)
    if with_defect:
        setattr(tempfile, "TemporaryFile", named_file)  # noqa: B010  mypy would not have it replaced
    model = load(checkpoint, offload)

    def before_step(lane: str, step: StepId) -> None:
        if lane == Lane.COMPUTE and step.sweep == 2 and step.stage == 2 and step.batch == 0:
            pipe.send("generating")
        if step.sweep >= 2:
            time.sleep(0.02)

    model._executor.before_step = before_step
    try:
        greedy(model, batch(7), tokens=6)
        pipe.send("done")
    except KeyboardInterrupt:
        pipe.send(("interrupted", flexgen_threads(), [path.name for path in offload.iterdir()]))


def generate_beside_another(checkpoint: Path, offload: Path, seed: int, barrier: Any, pipe: Any) -> None:
    """In a process of its own, at the same time as another."""
    torch.set_num_threads(1)
    with load(checkpoint, offload) as model:
        model._executor.before_step = lambda *_: time.sleep(0.0005)
        barrier.wait(120)
        for call in range(3):
            pipe.send(greedy(model, batch(7, seed=10 * seed + call)).sequences.tolist())


@pytest.fixture(scope="module")
def processes():
    """Processes that begin with everything imported, and with no thread of this one."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.test_defects", "transformers.models.opt.modeling_opt"])
    return context


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX systems")
class TestDefect6:
    """Offload files were left behind; two processes in one folder overwrote each other's files."""

    @staticmethod
    @contextlib.contextmanager
    def generating(processes, *args, **options) -> Iterator[tuple[Any, Any]]:
        """A process in the middle of generating, and the pipe from it."""
        ours, theirs = processes.Pipe()
        process = processes.Process(target=generate_slowly, args=(*args, theirs), kwargs=options)
        process.start()
        theirs.close()
        try:
            assert ours.poll(240)
            assert ours.recv() == "generating"
            yield process, ours
        finally:
            process.kill()
            process.join(30)

    def test_defect_6_nothing_is_left_behind_at_the_end(self, checkpoint, tmp_path):
        with load(checkpoint, tmp_path) as model:
            greedy(model, batch(7))
            assert list(tmp_path.iterdir()) == []
        assert list(tmp_path.iterdir()) == []

    def test_defect_6_nothing_is_left_behind_while_it_runs(self, checkpoint, tmp_path):
        seen: set[Path] = set()
        with load(checkpoint, tmp_path) as model:
            model._executor.before_step = lambda *_: seen.update(tmp_path.iterdir())
            greedy(model, batch(7))
        assert seen == set()

    def test_defect_6_nothing_is_left_behind_after_an_error(self, checkpoint, tmp_path):
        with load(checkpoint, tmp_path) as model:
            TestDefect5.fail(model, Lane.HOST_TO_DISK, 30)
            assert list(tmp_path.iterdir()) == []

    def test_defect_6_nothing_is_left_behind_by_ctrl_c(self, checkpoint, tmp_path, processes):
        with self.generating(processes, checkpoint, tmp_path) as (process, pipe):
            os.kill(process.pid, signal.SIGINT)
            assert pipe.poll(60)
            assert pipe.recv() == ("interrupted", [], [])
            process.join(30)
            assert process.exitcode == 0
        assert list(tmp_path.iterdir()) == []

    def test_defect_6_nothing_is_left_behind_by_a_kill(self, checkpoint, tmp_path, processes):
        with self.generating(processes, checkpoint, tmp_path) as (process, _):
            os.kill(process.pid, signal.SIGKILL)
            process.join(30)
            assert process.exitcode == -signal.SIGKILL
        assert list(tmp_path.iterdir()) == []

    def test_defect_6_two_processes_in_one_folder(self, checkpoint, tmp_path, processes):
        barrier = processes.Barrier(2)
        started = []
        for seed in (1, 2):
            ours, theirs = processes.Pipe()
            target = processes.Process(
                target=generate_beside_another, args=(checkpoint, tmp_path, seed, barrier, theirs)
            )
            target.start()
            theirs.close()
            started.append((seed, target, ours))
        for seed, process, pipe in started:
            for call in range(3):
                assert pipe.poll(240)
                expected = greedy(reference(checkpoint), batch(7, seed=10 * seed + call)).sequences
                assert pipe.recv() == expected.tolist()
            process.join(30)
            assert process.exitcode == 0
        assert list(tmp_path.iterdir()) == []

    def test_defect_6_put_back_leaves_files(self, checkpoint, tmp_path, processes, monkeypatch):
        with self.generating(processes, checkpoint, tmp_path, with_defect=True) as (process, _):
            os.kill(process.pid, signal.SIGKILL)
            process.join(30)
        assert [path.name for path in tmp_path.iterdir()] == ["t_0"]
        monkeypatch.setattr(tempfile, "TemporaryFile", named_file)
        with pytest.raises(AssertionError):
            self.test_defect_6_nothing_is_left_behind_at_the_end(checkpoint, tmp_path)

    def test_defect_6_put_back_mixes_up_two_runs(self, checkpoint, tmp_path, monkeypatch):
        """Two models in turns, a token each, as two processes would be."""
        self.in_turns(checkpoint, tmp_path)
        monkeypatch.setattr(tempfile, "TemporaryFile", named_file)
        with pytest.raises(AssertionError):
            self.in_turns(checkpoint, tmp_path)

    @staticmethod
    def in_turns(checkpoint: Path, folder: Path) -> None:
        prompts = [batch(4, seed=seed)["input_ids"] for seed in (1, 2)]
        plain, policy = reference(checkpoint), Policy(cache=DISK, batch_size=2, num_batches=2)
        with load(checkpoint, folder, policy) as one, load(checkpoint, folder, policy) as other:
            ours = [model(input_ids=ids) for model, ids in zip((one, other), prompts, strict=True)]
            theirs = [plain(input_ids=ids) for ids in prompts]
            token = torch.full((4, 1), 50)
            for model, our, their in zip((one, other), ours, theirs, strict=True):
                got = model(input_ids=token, past_key_values=our.past_key_values).logits
                expected = plain(input_ids=token, past_key_values=their.past_key_values).logits
                torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)


SLOW_GENERATE = """
import sys, time, torch
from pathlib import Path
from tests.tiny import batch, greedy, load
model = load(Path(sys.argv[1]), Path(sys.argv[2]))
def before_step(lane, step):
    if lane == "compute" and step.sweep == 2:
        print("generating", flush=True)
        time.sleep(0.1)
model._executor.before_step = before_step
greedy(model, batch(7), tokens=30)
"""


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX systems")
def test_ctrl_c_ends_the_program_and_leaves_nothing(checkpoint, tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW_GENERATE, str(checkpoint), str(tmp_path)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "generating\n"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == -signal.SIGINT
    assert errors.rstrip().endswith("KeyboardInterrupt")
    assert "Exception ignored" not in errors
    assert list(tmp_path.iterdir()) == []


# -------------------------------------------------------------------------------------------- 9: one way of generating


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(TINY_OPT, padding_side="left")


def both(checkpoint: Path, folder: Path, prompts: dict[str, torch.Tensor], **options: Any) -> tuple[Any, Any]:
    """What transformers generates and what we do, from the same seed."""
    policy = Policy(cache=Placement(device=0.5, disk=0.5), hidden=DISK, batch_size=2, num_batches=2)
    options = {"max_new_tokens": 8, "pad_token_id": 1, **options}
    with load(checkpoint, folder, policy) as model:
        results = []
        for each in (reference(checkpoint), model):
            torch.manual_seed(5)
            results.append(each.generate(**prompts, **options))
    return results[0], results[1]


def tokens_that_end_rows(checkpoint: Path, prompts: dict[str, torch.Tensor]) -> list[int]:
    """Two tokens which greedy search writes in some rows early, in some late, and in some not at all."""
    written = greedy(reference(checkpoint), prompts, tokens=8).sequences[:, prompts["input_ids"].shape[1] :]
    rows = [row.tolist() for row in written]
    for pair in itertools.combinations(sorted(set(written.flatten().tolist())), 2):
        ends = [min((row.index(token) for token in pair if token in row), default=8) for row in rows]
        if len(set(ends)) >= 4 and min(ends) < 3 and max(ends) == 8:
            return list(pair)
    raise AssertionError("no such tokens; take other prompts")


STOPPING = batch(7, seed=3)
SAMPLING: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 0.7},
    "top_k": {"top_k": 5},
    "top_p": {"top_p": 0.8, "top_k": 0},
    "min_p": {"min_p": 0.05},
    "typical_p": {"typical_p": 0.7},
    "several": {"temperature": 1.3, "top_k": 20, "top_p": 0.95, "repetition_penalty": 1.2},
    "num_return_sequences": {"num_return_sequences": 3},
}


class TestDefect9:
    """Only greedy and temperature; one integer stop token; no stop with several micro-batches; equal prompts only."""

    @pytest.mark.parametrize("rows", [1, 3, 4, 7, 9])
    def test_defect_9_any_number_of_ragged_prompts(self, checkpoint, tmp_path, rows):
        expected, got = both(checkpoint, tmp_path, batch(rows), do_sample=False)
        assert torch.equal(got, expected)

    @pytest.mark.parametrize("name", SAMPLING)
    def test_defect_9_sampling(self, checkpoint, tmp_path, name):
        expected, got = both(checkpoint, tmp_path, batch(7), do_sample=True, **SAMPLING[name])
        assert torch.equal(got, expected)

    @pytest.mark.parametrize(
        "options",
        [
            {"num_beams": 3},
            {"num_beams": 2, "num_return_sequences": 2, "length_penalty": 0.5},
            {"repetition_penalty": 1.5},
            {"no_repeat_ngram_size": 2},
            {"bad_words_ids": [[81], [56]]},
            {"min_new_tokens": 6},
        ],
        ids=lambda options: next(iter(options)),
    )
    def test_defect_9_searching(self, checkpoint, tmp_path, options):
        expected, got = both(checkpoint, tmp_path, batch(7), do_sample=False, **options)
        assert torch.equal(got, expected)

    @pytest.mark.parametrize("rows", [7, 4])
    def test_defect_9_several_stop_tokens_and_rows_that_end_at_different_times(self, checkpoint, tmp_path, rows):
        prompts = {name: value[:rows] for name, value in STOPPING.items()}
        stops = tokens_that_end_rows(checkpoint, STOPPING)
        expected, got = both(checkpoint, tmp_path, prompts, do_sample=False, eos_token_id=stops)
        assert torch.equal(got, expected)
        assert (got == 1).any()

    def test_defect_9_the_run_ends_when_all_rows_have(self, checkpoint, tmp_path):
        stops = list(range(2, 96))
        expected, got = both(checkpoint, tmp_path, batch(7), do_sample=False, eos_token_id=stops)
        assert torch.equal(got, expected)
        assert got.shape[1] == 7

    def test_defect_9_stop_strings(self, tokenizer, tmp_path):
        texts = ["The people of", "We", "In the last four years the government", "Peace", "Our country and its"]
        prompts = dict(tokenizer(texts, return_tensors="pt", padding=True, return_token_type_ids=False))
        options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 12, "tokenizer": tokenizer}
        free, _ = both(TINY_OPT, tmp_path, prompts, **options)
        width = prompts["input_ids"].shape[1]
        words = tokenizer.decode(free[0, width:], skip_special_tokens=True).split()
        stops = [words[1], words[3]]
        expected, got = both(TINY_OPT, tmp_path, prompts, stop_strings=stops, **options)
        assert torch.equal(got, expected)
        ended = [tokenizer.decode(row, skip_special_tokens=True) for row in got[:, width:]]
        assert any(text.rstrip().endswith(tuple(stops)) for text in ended)

    @pytest.mark.parametrize(
        ("options", "instead"),
        [
            ({"do_sample": False}, {"attention_mask": torch.ones_like(STOPPING["attention_mask"])}),
            ({"do_sample": True, "top_k": 5}, {"do_sample": False}),
            ({"do_sample": False, "eos_token_id": None}, {"eos_token_id": -1}),
            ({"do_sample": False, "num_beams": 3}, {"num_beams": 1}),
        ],
        ids=["prompts of one length", "greedy only", "no end of sequence", "no beams"],
    )
    def test_defect_9_put_back_is_noticed(self, checkpoint, tmp_path, monkeypatch, options, instead):
        """What the original did not know, it did otherwise without a word."""
        if "eos_token_id" in options:
            options = {**options, "eos_token_id": tokens_that_end_rows(checkpoint, STOPPING)}
        whole = FlexGenForCausalLM.generate

        def generate(self: Any, *args: Any, **given: Any) -> Any:
            return whole(self, *args, **{**given, **instead})

        monkeypatch.setattr(FlexGenForCausalLM, "generate", generate)
        expected, got = both(checkpoint, tmp_path, STOPPING, **options)
        assert not torch.equal(got, expected)
