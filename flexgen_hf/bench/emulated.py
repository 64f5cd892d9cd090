"""Accelerators emulated in Python: an address space of their own, a capacity, and links of a given bandwidth.

A torch device type on the PrivateUse1 key whose tensors keep their values in CPU memory that only their device may
touch. An operation that mixes them with tensors of the CPU or of another device raises, as on a GPU; an allocation
beyond the capacity raises `torch.OutOfMemoryError`; a copy between host and device takes `bytes / bandwidth`, one at a
time in each direction, with the GIL released. Devices have no link to each other: a copy from one to another goes to
the host first and then to its target, and takes both links' time, one after the other. Arithmetic runs at the CPU's
speed, and draws from the CPU's random generator. So everything that a program does for a GPU, and forgets to do, can be
seen on a machine without one.

`"emulated"` without an index is `"emulated:0"`; there is no current device to set.

`torch.utils.backend_registration._setup_privateuseone_for_python_backend` is private in torch; tested with torch 2.13.
"""

from __future__ import annotations

import dataclasses
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ..storage.buffers import return_freed_memory
from ..storage.workspace import EMULATED

__all__ = ["EmulatedDevice", "Link", "configure", "install"]


# longer than a thread takes to wake up and ask for its next copy, shorter than anything that is worth measuring
_AT_ONCE_S = 0.002

# what a link may be behind its time: to sleep for less takes many times as long as was asked for
_BEHIND_S = 0.0005


@dataclasses.dataclass
class Link:
    """One direction between host and device.

    Args:
        bytes_per_s: its bandwidth; None is as fast as memory.
    """

    bytes_per_s: float | None = None
    bytes: int = 0
    busy_s: float = 0.0
    _lock: threading.Lock = dataclasses.field(default_factory=threading.Lock, repr=False)
    _free_at: float = 0.0

    def carry(self, nbytes: int, copy: Callable[[], Any]) -> Any:
        """Runs `copy`, and takes as long as `nbytes` need; copies in one direction queue.

        A real link goes from one queued copy to the next by itself. Here a thread must wake up in between, which takes
        longer the busier Python is; so a copy that comes at once after another counts from that one's end. And one that
        needs no time to speak of returns at once; what it needs is added to the next.
        """
        with self._lock:
            started = time.perf_counter()
            if started - self._free_at < _AT_ONCE_S:
                started = self._free_at
            result = copy()
            if self.bytes_per_s is None:
                self._free_at = time.perf_counter()
            else:
                self._free_at = started + nbytes / self.bytes_per_s
                behind = self._free_at - time.perf_counter()
                if behind > _BEHIND_S:
                    time.sleep(behind)
            self.bytes += nbytes
            self.busy_s += self._free_at - started
        return result


@dataclasses.dataclass
class EmulatedDevice:
    """One device: its capacity and what it did.

    Args:
        index: its number, as in `"emulated:1"`.
        capacity_bytes: None is without limit.
        to_device: the link from the host.
        to_host: the link to the host.
    """

    index: int = 0
    capacity_bytes: int | None = None
    to_device: Link = dataclasses.field(default_factory=Link)
    to_host: Link = dataclasses.field(default_factory=Link)
    used_bytes: int = 0
    peak_bytes: int = 0
    _lock: threading.RLock = dataclasses.field(default_factory=threading.RLock, repr=False)

    @property
    def device(self) -> torch.device:
        """As torch names it."""
        return torch.device(EMULATED, self.index)

    def take(self, nbytes: int) -> None:
        """Allocates.

        Raises:
            torch.OutOfMemoryError: the capacity would be passed.
        """
        with self._lock:
            if self.capacity_bytes is not None and self.used_bytes + nbytes > self.capacity_bytes:
                raise torch.OutOfMemoryError(
                    f"emulated device {self.index}: {nbytes} bytes asked for, {self.used_bytes} of "
                    f"{self.capacity_bytes} in use"
                )
            self.used_bytes += nbytes
            self.peak_bytes = max(self.peak_bytes, self.used_bytes)

    def give(self, nbytes: int) -> None:
        """Frees; called by whichever thread drops the last tensor."""
        with self._lock:
            self.used_bytes -= nbytes


class _Allocation:
    """A block of device memory, alive as long as a tensor uses it."""

    def __init__(self, owner: EmulatedDevice, nbytes: int) -> None:
        owner.take(nbytes)
        self.owner = owner
        weakref.finalize(self, owner.give, nbytes)


_devices = [EmulatedDevice()]
_allocations: weakref.WeakValueDictionary[tuple[int, int], _Allocation] = weakref.WeakValueDictionary()
_lock = threading.RLock()
_library: list[Any] = []


class DeviceTensor(torch.Tensor):
    """A tensor on an emulated device; `held` is a CPU tensor that only the device of `allocation` may touch."""

    held: torch.Tensor
    allocation: _Allocation

    @staticmethod
    def __new__(cls, values: torch.Tensor, requires_grad: bool = False) -> Any:
        """Accelerate rebuilds a parameter as `cls(values, requires_grad=...)`, also one it takes off the device."""
        if isinstance(values, DeviceTensor):
            return _on(values.allocation.owner, values.held)
        return torch.nn.Parameter(values, requires_grad=False)

    def data_ptr(self) -> int:
        """The address, by which Accelerate tells tied parameters; torch would say 0 for every tensor."""
        return self.held.data_ptr()

    def tolist(self) -> Any:
        """The values, moved to the host; torch refuses subclasses."""
        return self.cpu().tolist()

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy on the device; torch would ask for a storage that is not there."""
        return memo.setdefault(id(self), self.clone())

    def __repr__(self) -> str:  # type: ignore[override]
        return f"{self.held!r} on {self.device}"

    def __format__(self, spec: str) -> str:
        return format(self.item() if self.dim() == 0 else repr(self), spec)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Has attention run as one kernel, as on a GPU; torch knows none for this device and would make the scores.

        Other frequent functions run as a whole too, which saves most of what torch takes to ask us for each of the
        operations that they are made of: a GPU takes a tenth of that for a launch.
        """
        kwargs = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention:
            owner = _common_owner("scaled_dot_product_attention", args, kwargs)
            return _on(owner, func(*_values(args), **_values(kwargs)))
        if func in _WHOLE and (only := _only_owner(args, kwargs)) is not None:
            return _of_call(only, args, func(*_values(args), **_values(kwargs)))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Runs an operation on the values."""
        name = func._schema.name
        if name == "aten::_to_copy":
            return _to_copy(func, args[0], dict(kwargs or {}))
        if name == "aten::copy_":
            return _copy(args[0], args[1])
        if name == "aten::_local_scalar_dense":
            return _scalar(args[0])
        return _run(func, name, args, dict(kwargs or {}))


def _on(owner: EmulatedDevice, values: torch.Tensor) -> Any:
    """Makes the CPU tensor `values` one of the device; nobody else may use its memory from now on."""
    allocation = _allocation_of(owner, values)
    made: Any = torch.Tensor._make_wrapper_subclass(
        DeviceTensor,
        values.shape,
        strides=values.stride(),
        storage_offset=values.storage_offset(),
        dtype=values.dtype,
        layout=values.layout,
        device=owner.device,
        requires_grad=False,
    )
    made.held, made.allocation = values, allocation
    return made


def _values(x: Any) -> Any:
    """An argument of an operation with device tensors replaced by their values; torch's own tree_map takes longer."""
    if isinstance(x, DeviceTensor):
        return x.held
    if isinstance(x, list):
        return [_values(item) for item in x]
    if isinstance(x, tuple):  # an index in several dimensions is one
        return tuple(map(_values, x))
    if isinstance(x, dict):
        return {name: _values(item) for name, item in x.items()}
    return x


def _tensors(x: Any) -> Iterator[torch.Tensor]:
    """The tensors in an argument of an operation."""
    if isinstance(x, torch.Tensor):
        yield x
    elif isinstance(x, (list, tuple)):
        for item in x:
            yield from _tensors(item)
    elif isinstance(x, dict):
        yield from _tensors(list(x.values()))


def _owner(x: torch.Tensor) -> EmulatedDevice | None:
    return x.allocation.owner if isinstance(x, DeviceTensor) else None


def _device(name: str | torch.device) -> EmulatedDevice | None:
    """The emulated device of this name; None for those that are not emulated."""
    device = torch.device(name)
    if device.type != EMULATED:
        return None
    index = device.index or 0
    if index >= len(_devices):
        raise RuntimeError(f"{device}: there are {len(_devices)} emulated devices; call install({index + 1}) first")
    return _devices[index]


def _allocation_of(owner: EmulatedDevice, values: torch.Tensor) -> _Allocation:
    storage = values.untyped_storage()
    key = (owner.index, storage.data_ptr())
    with _lock:
        known = _allocations.get(key)
        if known is None or storage.nbytes() == 0:
            known = _Allocation(owner, storage.nbytes())
            _allocations[key] = known
        return known


def _move(
    source: torch.Tensor, end: EmulatedDevice | None, copy: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Runs `copy` on the values of `source`, over the links from where it is to `end`; None is the host."""
    start, values = _owner(source), _values(source)
    nbytes = source.numel() * source.element_size()
    if start is end:
        return copy(values)
    if start is not None and end is not None:
        values = start.to_host.carry(nbytes, values.clone)
    link = end.to_device if end is not None else start.to_host  # type: ignore[union-attr]  # not both are the host
    return link.carry(nbytes, lambda: copy(values))  # type: ignore[no-any-return]


def _to_copy(func: Any, source: torch.Tensor, kwargs: dict[str, Any]) -> Any:
    """`.to(...)`: the one way on and off a device, beside copy_."""
    target = kwargs.pop("device", None)
    if target is not None and torch.device(target).type == "meta":
        return func(_values(source), device="meta", **kwargs)

    def copy(values: torch.Tensor) -> torch.Tensor:
        out = func(values, **kwargs)
        return out.clone() if out.data_ptr() == values.data_ptr() else out  # type: ignore[no-any-return]

    end = _device(target) if target is not None else _owner(source)
    out = _move(source, end, copy)
    return out if end is None else _on(end, out)


def _copy(target: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    _move(source, _owner(target), _values(target).copy_)
    return target


def _scalar(tensor: torch.Tensor) -> Any:
    """The value of a tensor of one element, as a Python number."""
    owner, values = _owner(tensor), _values(tensor)
    return values.item() if owner is None else owner.to_host.carry(values.element_size(), values.item)


def _common_owner(name: str, *arguments: Any) -> EmulatedDevice:
    """The device of all tensors among `arguments`; numbers in tensors on the host are welcome, as on a GPU.

    Raises:
        RuntimeError: they are on several devices, or on the host too.
    """
    tensors = list(_tensors(arguments))
    owner = next(tensor.allocation.owner for tensor in tensors if isinstance(tensor, DeviceTensor))
    for tensor in tensors:
        is_number = not isinstance(tensor, DeviceTensor) and tensor.dim() == 0
        if _owner(tensor) is not owner and not is_number:
            raise RuntimeError(
                f"{name}: a {tensor.device} tensor of shape {tuple(tensor.shape)} meets tensors of {owner.device}"
            )
    return owner


#: functions of tensors of one device, which neither copy between devices nor write into what they are given
_WHOLE = frozenset({
    torch.nn.functional.linear, torch.nn.functional.silu, torch.cat, torch.rsqrt,
    *(getattr(torch.Tensor, name) for name in (
        "__getitem__ add mul sub neg pow mean rsqrt cos sin view reshape transpose permute unsqueeze expand contiguous"
    ).split()),
})  # fmt: skip


def _only_owner(args: Any, kwargs: dict[str, Any]) -> EmulatedDevice | None:
    """The device of all tensors of a call of one of `_WHOLE`; None where something needs a closer look."""
    owner: EmulatedDevice | None = None
    if "out" in kwargs or "device" in kwargs:
        return None
    for arg in (*args, *kwargs.values()):
        for tensor in arg if isinstance(arg, (list, tuple)) else (arg,):
            if isinstance(tensor, DeviceTensor):
                if owner is not None and tensor.allocation.owner is not owner:
                    return None
                owner = tensor.allocation.owner
            elif isinstance(tensor, (torch.Tensor, list, tuple)):
                return None
    return owner


def _of_call(owner: EmulatedDevice, args: Any, out: torch.Tensor) -> Any:
    """What a call of one of `_WHOLE` returned; some return what they were given."""
    first = args[0] if args else None
    return first if isinstance(first, DeviceTensor) and out is first.held else _on(owner, out)


def _histogram(values: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return torch.histc(values.double(), *args, **kwargs).to(values.dtype)


#: operations that a GPU has for dtypes for which the CPU has none; models take them where they see no CPU
_AS_ON_A_GPU: dict[str, Callable[..., Any]] = {"aten::histc": _histogram}

#: operations whose indices may be on the host: torch moves them to a GPU
_INDEXING = {"aten::index", "aten::index_put", "aten::index_put_"}


def _index_for(tensor: DeviceTensor, index: torch.Tensor | None) -> torch.Tensor | None:
    on_host = index is not None and index.device.type == "cpu"
    return index.to(tensor.device) if on_host else index  # type: ignore[union-attr]  # not None


def _run(func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
    if name in _INDEXING and isinstance(args[0], DeviceTensor):
        args = (args[0], [_index_for(args[0], index) for index in args[1]], *args[2:])
    owner: EmulatedDevice | None = _common_owner(name, args, kwargs)
    if kwargs.get("device") is not None:  # of what is made like another tensor, elsewhere
        target = torch.device(kwargs["device"])
        owner = _device(target)
        kwargs["device"] = target if target.type == "meta" else "cpu"
    out = _AS_ON_A_GPU.get(name, func)(*_values(args), **_values(kwargs))
    for given in (kwargs.get("out"), *args[:1]):
        if isinstance(given, DeviceTensor) and out is given.held:
            return _follow(given)  # an operation that writes into a tensor returns it
    return out if owner is None else _placed(owner, out)


def _placed(owner: EmulatedDevice, out: Any) -> Any:
    """What an operation returned, its tensors on the device."""
    if isinstance(out, torch.Tensor):
        return _on(owner, out)
    return type(out)(_placed(owner, item) for item in out) if isinstance(out, (list, tuple)) else out


def _follow(tensor: DeviceTensor) -> DeviceTensor:
    """Has a tensor follow what an operation made of its values, which may have another shape or more memory now."""
    seen = _on(tensor.allocation.owner, tensor.held)
    if (seen.shape, seen.stride()) != (tensor.shape, tensor.stride()):
        tensor.data = seen
    tensor.allocation = seen.allocation
    return tensor


class _Module:
    """What torch asks of a device module."""

    def is_available(self) -> bool:
        return True

    def device_count(self) -> int:
        return len(_devices)

    def current_device(self) -> int:
        return 0

    def is_initialized(self) -> bool:
        return True

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        pass


def install(count: int = 1) -> torch.device:
    """Registers the device type with torch, once per process, with at least `count` devices; returns the first.

    There is no way back: a later call may add devices, and takes none away.
    """
    _devices.extend(EmulatedDevice(index) for index in range(len(_devices), count))
    if not _library:
        from torch.utils import backend_registration

        backend_registration._setup_privateuseone_for_python_backend(EMULATED, backend_module=_Module())
        _library.append(_kernels())
        return_freed_memory()  # devices' memory is the process's: what is free there is to be free here
    return _devices[0].device


def configure(
    capacity_bytes: int | None = None,
    to_device: float | None = None,
    to_host: float | None = None,
    *,
    index: int = 0,
) -> EmulatedDevice:
    """Gives a device another capacity and other links (bytes per second); its counters start anew.

    Raises:
        IndexError: there is no such device; `install(count)` makes more.
        torch.OutOfMemoryError: more is in use than the new capacity.
    """
    chosen = _devices[index]
    if capacity_bytes is not None and chosen.used_bytes > capacity_bytes:
        raise torch.OutOfMemoryError(f"{chosen.used_bytes} bytes are in use, more than {capacity_bytes}")
    chosen.capacity_bytes, chosen.peak_bytes = capacity_bytes, chosen.used_bytes
    chosen.to_device, chosen.to_host = Link(to_device), Link(to_host)
    return chosen


def _kernels() -> Any:
    """The few operations that reach a device before any of its tensors is involved."""
    library: Any = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]

    def factory(op: Any) -> Callable[..., torch.Tensor]:
        def make(*args: Any, device: torch.device, **kwargs: Any) -> torch.Tensor:
            owner = _device(device)
            assert owner is not None  # the key that led here
            return _on(owner, op(*args, **{**kwargs, "device": "cpu", "pin_memory": False}))  # type: ignore[no-any-return]

        return make

    def copy_from(source: torch.Tensor, target: torch.Tensor, _non_blocking: bool = False) -> torch.Tensor:
        return _copy(target, source)

    library.impl("empty.memory_format", factory(torch.ops.aten.empty.memory_format), "PrivateUse1")
    library.impl("empty_strided", factory(torch.ops.aten.empty_strided.default), "PrivateUse1")
    library.impl("_copy_from", copy_from, "PrivateUse1")
    library.impl("_local_scalar_dense", _scalar, "PrivateUse1")
    return library
