"""Bytes in tiers: the account, reused buffers, files that leave nothing behind, and lanes that carry their errors."""

import contextlib
import errno
import gc
import os
import re
import subprocess
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flexgen_hf import CapacityError, StepError, StoreError, Tier
from flexgen_hf.storage import files
from flexgen_hf.storage.buffers import PAGE, Buffer, round_up, tensor_view
from flexgen_hf.storage.files import Files, SpillFile, check_offload_folder
from flexgen_hf.storage.lanes import Lanes, LaneUse, Ticket
from flexgen_hf.storage.ledger import Ledger, gib

CPU = torch.device("cpu")
MIB = 1 << 20


@contextlib.contextmanager
def small_disk(folder: Path, nbytes: int) -> Iterator[Path]:
    """A file system of this size; the test is skipped where none can be mounted."""
    folder.mkdir(exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={nbytes}", "tmpfs", str(folder)]
    if os.name != "posix" or os.geteuid() or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("mounting a file system takes root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)  # noqa: S607  wherever this system keeps it


def held(ledger: Ledger) -> dict[Tier, int]:
    return {tier: ledger.held(tier) for tier in Tier}


NOTHING = dict.fromkeys(Tier, 0)


class TestLedger:
    def test_counts_what_is_held_and_its_peak(self):
        ledger = Ledger()
        ledger.take(Tier.HOST, 100, "weights")
        ledger.take(Tier.HOST, 50, "KV cache")
        ledger.give(Tier.HOST, 100, "weights")
        assert held(ledger) == {Tier.DEVICE: 0, Tier.HOST: 50, Tier.DISK: 0}
        assert ledger.peaks()[Tier.HOST] == 150
        ledger.reset_peaks()
        assert ledger.peaks()[Tier.HOST] == 50
        assert ledger.free(Tier.HOST) is None

    def test_a_limit_is_not_passed(self):
        ledger = Ledger({Tier.DEVICE: 100})
        ledger.take(Tier.DEVICE, 100, "weights")
        with pytest.raises(CapacityError):
            ledger.take(Tier.DEVICE, 1, "KV cache")
        assert ledger.held(Tier.DEVICE) == 100
        assert ledger.free(Tier.DEVICE) == 0
        ledger.take(Tier.HOST, 10**12, "KV cache")  # the limit is the device's alone

    def test_device_and_host_may_be_one_memory(self):
        ledger = Ledger({Tier.DISK: 10}, shared=100)
        ledger.take(Tier.DEVICE, 60, "weights")
        assert (ledger.free(Tier.HOST), ledger.free(Tier.DEVICE), ledger.free(Tier.DISK)) == (40, 40, 10)
        ledger.take(Tier.HOST, 40, "KV cache")
        with pytest.raises(CapacityError, match="device and host tier together"):
            ledger.take(Tier.HOST, 1, "weight slots")
        ledger.take(Tier.DISK, 10, "KV cache")

    def test_the_refusal_has_the_numbers_who_holds_them_and_remedies(self):
        ledger = Ledger({Tier.HOST: 3 << 30})
        ledger.take(Tier.HOST, 2 << 30, "weights")
        ledger.take(Tier.HOST, 512 << 20, "KV cache")
        ledger.take(Tier.HOST, 5, "gone")
        ledger.give(Tier.HOST, 5, "gone")
        with pytest.raises(CapacityError) as caught:
            ledger.take(Tier.HOST, 1 << 30, "weight slots")
        message = str(caught.value)
        assert "weight slots needs 1.00 GiB but the host tier has 0.50 GiB left of 3.00 GiB" in message
        assert "held: weights 2.00 GiB, KV cache 0.50 GiB)" in message
        for remedy in ("max_memory", "batch_size", "num_batches", "lower tier"):
            assert remedy in message

    def test_threads_may_share_it(self):
        ledger = Ledger()

        def work():
            for _ in range(2000):
                ledger.take(Tier.HOST, 3, "x")
                ledger.give(Tier.HOST, 3, "x")

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert held(ledger) == NOTHING

    def test_sizes_for_people(self):
        assert [gib(n) for n in (0, 5 * MIB, 3 << 29)] == ["0.00 MiB", "5.00 MiB", "1.50 GiB"]


class TestBuffer:
    def test_starts_on_a_page_grows_and_is_accounted_for(self):
        ledger = Ledger()
        buffer = Buffer(ledger, Tier.HOST, CPU, "weight slots")
        assert buffer.nbytes == 0
        memory = buffer.ensure(5000)
        assert memory.dtype == torch.uint8
        assert memory.data_ptr() % PAGE == 0
        assert buffer.nbytes == ledger.held(Tier.HOST) == 2 * PAGE
        assert buffer.ensure(100).data_ptr() == memory.data_ptr()  # it does not shrink
        buffer.ensure(3 * PAGE)
        assert ledger.held(Tier.HOST) == 3 * PAGE
        # the old memory is given back before the new one is taken
        assert ledger.peaks()[Tier.HOST] == 3 * PAGE
        buffer.free()
        buffer.free()
        assert held(ledger) == NOTHING

    def test_without_a_size_it_cannot_be_used(self):
        with pytest.raises(RuntimeError, match="weight slots"):
            _ = Buffer(Ledger(), Tier.HOST, CPU, "weight slots").bytes

    def test_a_limit_refuses_it_and_nothing_stays_noted(self):
        ledger = Ledger({Tier.HOST: PAGE})
        buffer = Buffer(ledger, Tier.HOST, CPU, "KV cache")
        with pytest.raises(CapacityError, match="KV cache"):
            buffer.ensure(PAGE + 1)
        assert held(ledger) == NOTHING
        buffer.ensure(PAGE)

    def test_memory_that_the_system_refuses_is_not_noted(self):
        ledger = Ledger()
        buffer = Buffer(ledger, Tier.HOST, CPU, "KV cache")
        with pytest.raises(CapacityError, match=r"KV cache needs .* GiB .* host tier"):
            buffer.ensure(1 << 60)
        assert held(ledger) == NOTHING

    @pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
    def test_memory_goes_back_to_the_system(self):
        def resident() -> int:
            return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

        buffer = Buffer(Ledger(), Tier.HOST, CPU, "x")
        before = resident()
        buffer.ensure(64 * MIB).fill_(1)
        assert resident() - before > 60 * MIB
        buffer.free()
        assert resident() - before < 8 * MIB


class TestTensorView:
    @given(
        st.integers(0, 33),
        st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]),
        st.sampled_from([(), (0,), (3,), (2, 5), (2, 1, 3)]),
    )
    @settings(max_examples=100, deadline=None)
    def test_the_bytes_at_any_offset(self, offset, dtype, shape):
        value = torch.testing.make_tensor(shape, dtype=dtype, device="cpu")
        nbytes = value.numel() * value.element_size()
        memory = torch.zeros(200, dtype=torch.uint8)
        memory[offset : offset + nbytes] = value.reshape(-1).view(torch.uint8)
        view = tensor_view(memory, offset, dtype, shape)
        assert view.dtype == dtype
        assert view.shape == shape
        assert torch.equal(view, value)

    def test_aligned_it_is_no_copy(self):
        memory = torch.zeros(64, dtype=torch.uint8)
        tensor_view(memory, 8, torch.float32, (2,)).fill_(1.0)
        assert memory[8:16].any()
        assert not memory[:8].any()

    def test_of_a_part_that_is_itself_misaligned(self):
        memory = torch.arange(64, dtype=torch.uint8)
        assert tensor_view(memory[1:], 3, torch.uint8, (4,)).tolist() == [4, 5, 6, 7]
        assert torch.equal(tensor_view(memory[1:], 3, torch.int32, (2,)), memory[4:12].view(torch.int32))
        assert torch.equal(tensor_view(memory[1:], 4, torch.int32, (2,)), memory[5:13].clone().view(torch.int32))

    def test_memory_that_is_too_short(self):
        with pytest.raises(RuntimeError):
            tensor_view(torch.zeros(10, dtype=torch.uint8), 4, torch.float32, (2,))

    def test_round_up(self):
        assert [round_up(n) for n in (0, 1, PAGE, PAGE + 1)] == [0, PAGE, PAGE, 2 * PAGE]


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


class TestFiles:
    @pytest.fixture
    def opened(self):
        opened = Files()
        yield opened
        opened.close()

    @pytest.fixture
    def big_file(self, tmp_path) -> Path:
        """A file of six pages and a bit."""
        path: Path = tmp_path / "shard"
        path.write_bytes(bytes(i * i % 251 for i in range(6 * PAGE + 300)))
        return path

    def test_bytes_at_an_offset(self, opened, tmp_path):
        (tmp_path / "shard").write_bytes(bytes(range(200)))
        memory = torch.zeros(50, dtype=torch.uint8)
        assert opened.read(tmp_path / "shard", 100, memory) == 50
        assert memory.tolist() == list(range(100, 150))

    def test_longer_than_one_system_call(self, opened, tmp_path, monkeypatch):
        monkeypatch.setattr(files, "_CALL_BYTES", 7)
        (tmp_path / "shard").write_bytes(bytes(range(200)))
        memory = torch.zeros(100, dtype=torch.uint8)
        assert opened.read(tmp_path / "shard", 1, memory) == 100
        assert memory.tolist() == list(range(1, 101))

    @given(st.integers(0, 3 * PAGE), st.integers(0, 3 * PAGE), st.integers(0, 2))
    @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    def test_a_run_past_the_page_cache(self, opened, big_file, offset, nbytes, pages_before):
        buffer = Buffer(Ledger(), Tier.HOST, CPU, "x")
        memory = buffer.ensure(8 * PAGE)
        at = pages_before * PAGE + offset % PAGE
        assert opened.read_run(big_file, offset, memory, at, nbytes) == nbytes
        assert memory[at : at + nbytes].numpy().tobytes() == big_file.read_bytes()[offset : offset + nbytes]

    def test_a_run_that_does_not_lie_as_in_the_file(self, opened, big_file):
        memory = torch.zeros(PAGE, dtype=torch.uint8)
        assert opened.read_run(big_file, 5000, memory, 7, 1000) == 1000
        assert memory[7:1007].numpy().tobytes() == big_file.read_bytes()[5000:6000]

    @pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="this system has none anywhere")
    def test_a_file_system_without_direct_reads(self, opened, big_file, monkeypatch):
        real = os.open

        def refuse(path: Path, flags: int) -> int:
            if flags & os.O_DIRECT:
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
            return real(path, flags)

        monkeypatch.setattr(os, "open", refuse)
        memory = Buffer(Ledger(), Tier.HOST, CPU, "x").ensure(2 * PAGE)
        for _ in range(2):
            assert opened.read_run(big_file, 100, memory, 100, 5000) == 5000
        assert memory[100:5100].numpy().tobytes() == big_file.read_bytes()[100:5100]
        assert opened.cached == {big_file}

    def test_a_run_in_a_file_that_ends_early(self, opened, big_file):
        memory = Buffer(Ledger(), Tier.HOST, CPU, "x").ensure(8 * PAGE)
        size = big_file.stat().st_size
        with pytest.raises(StoreError, match=f"ends at byte {size}, .* bytes early"):
            opened.read_run(big_file, 2 * PAGE, memory, 0, size)
        with pytest.raises(StoreError, match="No such file"):
            opened.read_run(big_file.with_name("gone"), 0, memory, 0, 10)

    def test_a_file_that_ends_early(self, opened, tmp_path):
        (tmp_path / "shard").write_bytes(bytes(200))
        with pytest.raises(StoreError, match=r"shard ends at byte 200, 50 bytes early; .*convert it again"):
            opened.read(tmp_path / "shard", 150, torch.zeros(100, dtype=torch.uint8))

    def test_a_file_that_is_not_there(self, opened, tmp_path):
        with pytest.raises(StoreError, match=r"cannot read .*shard \(No such file or directory\); restore the file"):
            opened.read(tmp_path / "shard", 0, torch.zeros(1, dtype=torch.uint8))

    @pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="reads /proc")
    def test_each_file_is_opened_once_and_closed(self, opened, tmp_path):
        (tmp_path / "shard").write_bytes(bytes(200))
        before = open_files()
        for offset in range(5):
            opened.read(tmp_path / "shard", offset, torch.zeros(10, dtype=torch.uint8))
        assert open_files() == before + 1
        opened.close()
        assert open_files() == before


class TestSpillFile:
    def test_what_is_written_is_read_and_the_folder_stays_empty(self, tmp_path):
        ledger = Ledger()
        spill = SpillFile(tmp_path / "offload", ledger, "the KV cache")
        first, second = spill.reserve(100), spill.reserve(PAGE + 1)
        assert (first, second) == (0, PAGE)
        data = torch.arange(200, dtype=torch.uint8)
        assert spill.write(second + 5, data) == 200
        memory = torch.zeros(200, dtype=torch.uint8)
        assert spill.read(second + 5, memory) == 200
        assert torch.equal(memory, data)
        assert ledger.held(Tier.DISK) == 3 * PAGE
        assert list((tmp_path / "offload").iterdir()) == []
        spill.close()
        spill.close()
        assert held(ledger) == NOTHING

    def test_reading_what_was_never_reserved(self, tmp_path):
        with contextlib.closing(SpillFile(tmp_path, Ledger(), "the KV cache")) as spill:
            spill.reserve(PAGE)
            with pytest.raises(StoreError, match="the KV cache ends at byte 4096"):
                spill.read(PAGE, torch.zeros(1, dtype=torch.uint8))

    @given(st.data())
    @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    def test_runs_are_whole_pages_that_keep_what_is_around_them(self, tmp_path, data):
        """As a cell does it: a buffer that holds a stretch of the file is added to, and what was added is written."""
        kept, memory = bytearray(6 * PAGE), Buffer(Ledger(), Tier.HOST, CPU, "x").ensure(6 * PAGE)
        with contextlib.closing(SpillFile(tmp_path, Ledger(), "x")) as spill:
            spill.reserve(PAGE)
            start = spill.reserve(6 * PAGE)
            spill.write(start, torch.frombuffer(kept, dtype=torch.uint8))
            for value in range(1, 5):
                old = data.draw(st.integers(0, 6 * PAGE))
                first, new = data.draw(st.integers(0, old)), data.draw(st.integers(old, 6 * PAGE))
                memory.fill_(99)
                assert spill.read_run(start + first, memory, first, old - first) == old - first
                assert memory[first:old].numpy().tobytes() == kept[first:old]
                memory[old:new] = value
                assert spill.write_run(start + old, memory, old, new - old) == new - old
                kept[old:new] = bytes([value]) * (new - old)
                whole = torch.zeros(6 * PAGE, dtype=torch.uint8)
                spill.read(start, whole)
                written = whole.numpy().tobytes()
                assert written[:new] == kept[:new]
                assert written[round_up(new) :] == kept[round_up(new) :]  # up to there it is not in use yet
                kept[:] = written

    def test_the_bytes_that_runs_really_move_are_counted(self, tmp_path):
        with contextlib.closing(SpillFile(tmp_path, Ledger(), "x")) as spill:
            spill.reserve(4 * PAGE)
            memory = Buffer(Ledger(), Tier.HOST, CPU, "x").ensure(4 * PAGE)
            assert (spill.write_run(PAGE - 1, memory, PAGE - 1, 2), spill.read_run(7, memory, 7, 10)) == (2, 10)
            assert (spill.written_bytes, spill.read_bytes) == ((2, 10) if spill.notes else (2 * PAGE, PAGE))

    @pytest.mark.skipif(not hasattr(os, "RWF_NOWAIT"), reason="asks Linux what is in its page cache")
    def test_runs_go_past_the_page_cache(self, tmp_path):
        with contextlib.closing(SpillFile(tmp_path, Ledger(), "x")) as spill:
            spill.reserve(64 * PAGE)
            memory = Buffer(Ledger(), Tier.HOST, CPU, "x").ensure(64 * PAGE).fill_(7)

            def is_cached() -> bool:
                try:
                    return os.preadv(spill._file.fileno(), [bytearray(PAGE)], 32 * PAGE, os.RWF_NOWAIT) > 0
                except BlockingIOError:
                    return False

            spill.write_run(0, memory, 0, 64 * PAGE)
            spill.read_run(0, memory, 0, 64 * PAGE)
            try:
                cached = is_cached()
                spill.write(0, memory)
                if spill.notes or not is_cached():
                    pytest.skip("this file system does not allow O_DIRECT, or does not say what is in the cache")
            except OSError as error:
                pytest.skip(f"this file system does not say what is in the cache: {error.strerror}")
            assert not cached

    @pytest.mark.parametrize("when", ["opening", "moving"])
    def test_a_file_system_without_direct_transfers(self, tmp_path, monkeypatch, when):
        real_open, real_write = os.open, os.pwrite

        def refuse(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
            if flags & os.O_DIRECT:
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
            return real_open(path, flags, *args, **kwargs)

        def refuse_to_move(descriptor: int, data: Any, offset: int) -> int:
            if descriptor == spill._direct:
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
            return real_write(descriptor, data, offset)

        monkeypatch.setattr(os, *(("open", refuse) if when == "opening" else ("pwrite", refuse_to_move)))
        with contextlib.closing(SpillFile(tmp_path, Ledger(), "the KV cache")) as spill:
            spill.reserve(2 * PAGE)
            memory = Buffer(Ledger(), Tier.HOST, CPU, "x").ensure(2 * PAGE).fill_(5)
            assert spill.write_run(100, memory, 100, PAGE) == PAGE
            memory.zero_()
            assert spill.read_run(100, memory, 100, PAGE) == PAGE
            assert memory[100 : 100 + PAGE].unique().tolist() == [5]
            assert (spill.written_bytes, spill.read_bytes) == (PAGE, PAGE)
        assert spill.notes == [
            f"the KV cache: reads and writes go through the page cache: {tmp_path} does not allow O_DIRECT"
        ]

    @pytest.mark.parametrize(("at", "start"), [(7, 0), (5, 1), (5 + 2 * PAGE, 0)])
    def test_a_run_that_does_not_lie_as_in_the_file_is_refused(self, tmp_path, at, start):
        with contextlib.closing(SpillFile(tmp_path, Ledger(), "x")) as spill:
            spill.reserve(PAGE)
            memory = Buffer(Ledger(), Tier.HOST, CPU, "x").ensure(2 * PAGE)[start:]
            with pytest.raises(ValueError, match="does not lie in its buffer"):
                spill.write_run(5, memory, at, 10)

    def test_a_region_that_is_given_up_is_used_again(self, tmp_path):
        ledger = Ledger({Tier.DISK: 6 * PAGE})
        with contextlib.closing(SpillFile(tmp_path, ledger, "x")) as spill:
            regions = [spill.reserve(2 * PAGE) for _ in range(3)]
            spill.release(regions[1], 2 * PAGE - 5)
            assert spill.reserve(PAGE) == regions[1]
            assert spill.reserve(10) == regions[1] + PAGE
            with pytest.raises(CapacityError):
                spill.reserve(1)
            spill.release(regions[1] + PAGE, PAGE)
            spill.release(regions[0], 2 * PAGE)
            spill.release(regions[1], PAGE)
            assert spill.reserve(4 * PAGE) == regions[0]  # neighbours are one again
            assert ledger.held(Tier.DISK) == 6 * PAGE

    @given(st.lists(st.one_of(st.integers(1, 5), st.integers(-8, -1)), max_size=40))
    @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    def test_regions_never_overlap_and_none_is_lost(self, tmp_path, operations):
        ledger = Ledger()
        with contextlib.closing(SpillFile(tmp_path, ledger, "x")) as spill:
            used: list[tuple[int, int]] = []
            for operation in operations:
                if operation > 0:
                    used.append((spill.reserve(operation * PAGE), operation * PAGE))
                elif used:
                    spill.release(*used.pop(operation % len(used)))
                ends = [0, *(sum(region) for region in sorted(used))]
                assert all(offset >= end for (offset, _), end in zip(sorted(used), ends, strict=False))
            for region in used:
                spill.release(*region)
            size = ledger.held(Tier.DISK)
            assert size == 0 or spill.reserve(size) == 0
            assert ledger.held(Tier.DISK) == size

    def test_a_budget_refuses(self, tmp_path):
        ledger = Ledger({Tier.DISK: 2 * PAGE})
        with contextlib.closing(SpillFile(tmp_path, ledger, "the KV cache")) as spill:
            spill.reserve(PAGE)
            with pytest.raises(CapacityError, match=r"the disk tier has .* or keep more on device and host"):
                spill.reserve(PAGE + 1)
            assert spill.reserve(PAGE) == PAGE

    def test_a_full_disk_is_an_error_before_anything_is_written(self, tmp_path):
        ledger = Ledger()
        with small_disk(tmp_path / "disk", 16 * PAGE) as disk:
            spill = SpillFile(disk, ledger, "the KV cache")
            spill.reserve(4 * PAGE)
            with pytest.raises(CapacityError, match=r"the KV cache needs .* more in .*, which has 0\.05 MiB free; "):
                spill.reserve(100 * PAGE)
            assert ledger.held(Tier.DISK) == 4 * PAGE
            assert spill.reserve(8 * PAGE) == 4 * PAGE  # the part that had fitted was given back
            spill.close()
            assert list(disk.iterdir()) == []
            assert os.statvfs(disk).f_bfree * os.statvfs(disk).f_frsize >= 15 * PAGE

    @pytest.mark.parametrize("reason", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
    def test_every_way_of_being_full(self, tmp_path, monkeypatch, reason):
        def refuse(*_):
            raise OSError(reason, os.strerror(reason))

        ledger = Ledger()
        with contextlib.closing(SpillFile(tmp_path, ledger, "hidden states")) as spill:
            monkeypatch.setattr(os, "posix_fallocate", refuse)
            with pytest.raises(CapacityError, match=r"hidden states needs .* use another offload_folder"):
                spill.reserve(PAGE)
            assert held(ledger) == NOTHING

    def test_a_file_in_place_of_the_folder(self, tmp_path):
        (tmp_path / "offload").write_text("not a folder")
        with pytest.raises(StoreError, match=r"offload_folder '.*offload' \(File exists\); name a writable folder"):
            check_offload_folder(tmp_path / "offload")

    def test_two_in_one_folder(self, tmp_path):
        spills = [SpillFile(tmp_path, Ledger(), "x") for _ in range(2)]
        for number, spill in enumerate(spills):
            spill.reserve(PAGE)
            spill.write(0, torch.full((PAGE,), number + 1, dtype=torch.uint8))
        for number, spill in enumerate(spills):
            memory = torch.zeros(PAGE, dtype=torch.uint8)
            spill.read(0, memory)
            assert memory.unique().tolist() == [number + 1]
            spill.close()


def flexgen_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("flexgen-")]


def noting(done: list[Any], what: Any, moved: int = 0, after: threading.Event | None = None) -> Callable[[], int]:
    """Work that notes that it was done."""

    def work() -> int:
        assert after is None or after.wait(10)
        done.append(what)
        return moved

    return work


class TestLanes:
    @pytest.fixture(autouse=True)
    def no_thread_is_left(self):
        yield
        assert flexgen_threads() == []

    def test_a_lane_keeps_its_order_and_counts(self):
        done: list[Any] = []
        with Lanes(["read", "push"]) as lanes:
            assert sorted(flexgen_threads()) == ["flexgen-push", "flexgen-read"]
            tickets = [lanes.submit("read", n, noting(done, n, 10)) for n in range(20)]
            tickets[-1].wait()
        assert done == list(range(20))
        assert (lanes.uses["read"].steps, lanes.uses["read"].bytes) == (20, 200)
        assert lanes.uses["read"].busy_s >= 0
        assert (lanes.uses["push"].busy_s, lanes.uses["push"].steps) == (0, 0)

    def test_a_step_waits_for_what_it_names(self):
        order: list[str] = []
        gate = threading.Event()
        with Lanes(["read", "push"]) as lanes:
            first = lanes.submit("read", "first", noting(order, "first", after=gate))
            second = lanes.submit("push", "second", noting(order, "second"), [first])
            assert not second.done
            gate.set()
            second.wait()
        assert order == ["first", "second"]

    def test_a_step_may_wait_for_work_outside_of_the_lanes(self):
        outside = Ticket("compute")
        with Lanes(["read"]) as lanes:
            ticket = lanes.submit("read", "load", lambda: 0, [outside])
            assert not ticket.done
            outside.finish()
            ticket.wait()

    def test_closing_ends_what_was_submitted(self):
        done: list[Any] = []
        lanes = Lanes(["read"])
        for n in range(5):
            lanes.submit("read", n, noting(done, n, 0))
        lanes.close()
        assert done == [0, 1, 2, 3, 4]

    def test_an_error_names_its_lane_and_step_and_keeps_its_cause(self):
        def fail() -> int:
            raise StoreError("shard 3 ends early")

        with Lanes(["read"]) as lanes:
            ticket = lanes.submit("read", "weights of stage 3", fail)
            with pytest.raises(StepError) as caught:
                ticket.wait()
        assert (caught.value.lane, caught.value.step) == ("read", "weights of stage 3")
        assert isinstance(caught.value.__cause__, StoreError)
        message = "weights of stage 3 failed in lane 'read': StoreError: shard 3 ends early"
        assert str(caught.value) == message

    def test_what_waits_for_a_failed_step_fails_with_its_error_and_is_not_run(self):
        ran: list[Any] = []
        with Lanes(["read", "push"]) as lanes:
            failed = lanes.submit("read", "read", lambda: 1 // 0)
            push = lanes.submit("push", "push", noting(ran, "push"), [failed])
            after = lanes.submit("push", "after", noting(ran, "after"), [push])
            other = lanes.submit("read", "other", noting(ran, "other"))
            for ticket in (failed, push, after):
                with pytest.raises(StepError, match="read failed in lane 'read': ZeroDivisionError"):
                    ticket.wait()
            other.wait()
        assert ran == ["other"]  # the lane goes on with what does not depend on it

    def test_even_a_step_that_wants_to_end_the_thread(self):
        def leave() -> int:
            raise SystemExit(3)

        with Lanes(["read"]) as lanes:
            ticket = lanes.submit("read", "x", leave)
            with pytest.raises(StepError, match="SystemExit"):
                ticket.wait()
            lanes.submit("read", "y", lambda: 0).wait()

    def test_cancelling_runs_nothing_more_and_fails_every_ticket(self):
        started, gate = threading.Event(), threading.Event()
        ran: list[int] = []
        lanes = Lanes(["read"])

        def work() -> int:
            started.set()
            assert gate.wait(10)
            return 0

        running = lanes.submit("read", "running", work)
        waiting = lanes.submit("read", "waiting", noting(ran, 1))
        assert started.wait(10)
        closing = threading.Thread(target=lanes.close, kwargs={"cancel": True})
        closing.start()
        while not lanes._cancelled:
            time.sleep(0.001)
        gate.set()
        closing.join(10)
        running.wait()  # what had begun is ended well
        with pytest.raises(StepError, match=r"waiting failed in lane 'read': InterruptedError: the run was stopped"):
            waiting.wait()
        assert ran == []

    def test_an_error_in_the_with_block_cancels(self):
        ran: list[int] = []
        gate = Ticket("compute")

        def use_lanes() -> None:
            with Lanes(["read"]) as lanes:
                lanes.submit("read", "x", noting(ran, 1), [gate])
                gate.finish(InterruptedError("the run was stopped"))
                raise KeyError("mine")

        with pytest.raises(KeyError, match="mine"):
            use_lanes()
        assert ran == []

    def test_nothing_is_taken_after_the_end(self):
        lanes = Lanes(["read"])
        lanes.close()
        with pytest.raises(RuntimeError, match="closed"):
            lanes.submit("read", "late", lambda: 0)

    def test_a_waiting_lane_keeps_nothing_alive(self):
        class Payload:
            def work(self) -> int:
                return 1

        with Lanes(["read"]) as lanes:
            payload = Payload()
            gone = weakref.ref(payload)
            ticket = lanes.submit("read", "x", payload.work)
            ticket.wait()
            del payload
            lanes.submit("read", "y", lambda: 0).wait()
            gc.collect()
            assert gone() is None

    def test_before_step_runs_in_the_lane_before_each_step(self):
        seen = []
        with Lanes(["read"], before_step=lambda lane, step: seen.append((lane, step, threading.current_thread().name))):
            pass
        with Lanes(["read"], before_step=lambda *step: seen.append((*step, threading.current_thread().name))) as lanes:
            lanes.submit("read", "x", lambda: 0).wait()
        assert seen == [("read", "x", "flexgen-read")]

    def test_uses_survive_and_add_up(self):
        uses = {"read": LaneUse()}
        for _ in range(2):
            with Lanes(["read"], uses=uses) as lanes:
                lanes.submit("read", "x", lambda: 7).wait()
        assert (uses["read"].bytes, uses["read"].steps) == (14, 2)


class TestTicket:
    def test_the_first_end_counts(self):
        ticket = Ticket("x")
        ticket.finish(ValueError("first"))
        ticket.finish()
        with pytest.raises(ValueError, match=re.escape("first")):
            ticket.wait()

    def test_waits_for_the_device_once(self):
        class Event:
            waits = 0

            def synchronize(self):
                Event.waits += 1

        ticket = Ticket("x")
        ticket.finish(event=Event())
        ticket.wait()
        ticket.wait()
        assert Event.waits == 1
