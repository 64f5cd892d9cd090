"""Reused memory: page-aligned buffers, and tensors that are views of them."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
from collections.abc import Sequence

import torch

from ..errors import CapacityError
from ..policy import Tier
from .ledger import Ledger, gib

__all__ = ["PAGE", "Buffer", "host_memory", "return_freed_memory", "round_up", "tensor_view"]

PAGE = 4096

# Of x86 and of most others; smaller memory cannot hold one.
_HUGE_PAGE = 2 << 20

# Freed blocks of more than this go back to the system; smaller ones cost more time than room.
_KEPT_BYTES = 1 << 20

# from <malloc.h>
_M_MMAP_THRESHOLD = -3


def round_up(nbytes: int, multiple: int = PAGE) -> int:
    """The next multiple."""
    return -(-nbytes // multiple) * multiple


class Buffer:
    """Bytes of one tier that grow on demand and are accounted for.

    Host buffers start on a page and go back to the operating system when freed (an anonymous mapping, not the heap).

    Args:
        ledger: the account.
        tier: `Tier.DEVICE` or `Tier.HOST`.
        device: where `Tier.DEVICE` is.
        what: the name under which it is accounted for.
        pinned: host memory from which an accelerator's link copies at its full speed. There is little of it: for
            staging, not for homes.
    """

    def __init__(self, ledger: Ledger, tier: Tier, device: torch.device, what: str, *, pinned: bool = False) -> None:
        self._ledger, self._tier, self._what, self._pinned = ledger, tier, what, pinned and tier is Tier.HOST
        self._device = device if tier is Tier.DEVICE else torch.device("cpu")
        self._bytes: torch.Tensor | None = None

    @property
    def tier(self) -> Tier:
        """Where it is."""
        return self._tier

    @property
    def nbytes(self) -> int:
        """Size now."""
        return 0 if self._bytes is None else self._bytes.numel()

    @property
    def bytes(self) -> torch.Tensor:
        """The memory as a uint8 tensor of shape (nbytes,)."""
        if self._bytes is None:
            raise RuntimeError(f"{self._what}: buffer used before it was given a size")
        return self._bytes

    def ensure(self, nbytes: int) -> torch.Tensor:
        """Grows to at least `nbytes`; what was in it is lost when it grows. Nobody may be using it.

        Raises:
            CapacityError: the tier or the system has not enough.
        """
        nbytes = round_up(max(nbytes, 1))
        if nbytes > self.nbytes:
            self.free()
            self._ledger.take(self._tier, nbytes, self._what)
            try:
                self._bytes = _allocate(nbytes, self._device, self._pinned)
            except (OSError, OverflowError, torch.OutOfMemoryError, torch.AcceleratorError) as error:
                self._ledger.give(self._tier, nbytes, self._what)
                raise CapacityError(
                    f"{self._what} needs {gib(nbytes)} on the {self._tier} tier, which the system refuses ({error}); "
                    "give max_memory less than there is, or lower batch_size or num_batches"
                ) from error
        return self.bytes

    def free(self) -> None:
        """Gives the memory back."""
        if self._bytes is not None:
            self._ledger.give(self._tier, self.nbytes, self._what)
            self._bytes = None


def _allocate(nbytes: int, device: torch.device, pinned: bool) -> torch.Tensor:
    if pinned:
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
    if device.type != "cpu":
        return torch.empty(nbytes, dtype=torch.uint8, device=device)
    return host_memory(nbytes)


def host_memory(nbytes: int) -> torch.Tensor:
    """Ordinary memory, uint8 and (nbytes,), from a page on; in nobody's account.

    It goes back to the system with its last tensor. Where the system has huge pages for those who ask, large memory is
    in them: a matrix that is gone through once is limited by how fast its pages are found, too.
    """
    nbytes = max(nbytes, 1)
    if nbytes < _HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.frombuffer(_anonymous(nbytes), dtype=torch.uint8)
    # Address space for one more, so that the first byte can be where a huge page begins; it is never touched, and the
    # last part of a page is asked for in small ones, so that nobody holds more than the account says.
    mapped = _anonymous(nbytes + _HUGE_PAGE)
    memory = torch.frombuffer(mapped, dtype=torch.uint8)
    first = -memory.data_ptr() % _HUGE_PAGE
    with contextlib.suppress(OSError):  # a kernel without them
        mapped.madvise(mmap.MADV_HUGEPAGE, first, round_up(nbytes))
    return memory[first : first + nbytes]


def _anonymous(nbytes: int) -> mmap.mmap:
    # shared memory, Python's default, cannot use huge pages and is accounted elsewhere
    if hasattr(mmap, "MAP_PRIVATE"):
        return mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return mmap.mmap(-1, nbytes)


def tensor_view(memory: torch.Tensor, offset: int, dtype: torch.dtype, shape: Sequence[int]) -> torch.Tensor:
    """A tensor over bytes of `memory` from `offset`.

    Args:
        memory: uint8, shape (n,).
        offset: in bytes. If it is not a multiple of the element size, the bytes are copied.
    """
    nbytes = dtype.itemsize
    for size in shape:
        nbytes *= size
    part = memory[offset : offset + nbytes]
    if part.storage_offset() % dtype.itemsize:
        part = part.clone()
    return part.view(dtype).view(tuple(shape))


def return_freed_memory() -> None:
    """Has the C library return freed memory to the system, so that what a process holds is what it uses.

    glibc learns to keep ever larger blocks, of up to 32 MiB, for the next use. Activations of all sizes leave holes
    then: the process was measured to hold up to twice of what it used, in nobody's account. A threshold that is set
    stays as it is. It holds for the whole process; where the user has set one, it is left alone.
    """
    if "MALLOC_MMAP_THRESHOLD_" in os.environ:
        return
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another C library
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _KEPT_BYTES)
