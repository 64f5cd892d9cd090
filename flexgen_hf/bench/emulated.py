"""An accelerator emulated in Python: an address space of its own, a capacity, and links of a given bandwidth.

A torch device on the PrivateUse1 key whose tensors keep their values in CPU memory that only this device may touch.
An operation that mixes it with CPU tensors raises, as on a GPU; an allocation beyond the capacity raises
`torch.OutOfMemoryError`; a copy between host and device takes `bytes / bandwidth`, one at a time in each direction,
with the GIL released. Arithmetic runs at the CPU's speed. So everything that a program does for a GPU, and forgets to
do, can be seen on a machine without one.

`torch.utils.backend_registration._setup_privateuseone_for_python_backend` is private in torch; tested with torch 2.13.
"""

from __future__ import annotations

import dataclasses
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

from ..storage.workspace import EMULATED

__all__ = ["EmulatedDevice", "Link", "configure", "install"]


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

    def carry(self, nbytes: int, copy: Callable[[], Any]) -> Any:
        """Runs `copy`, and takes as long as `nbytes` need; copies in one direction queue."""
        with self._lock:
            started = time.perf_counter()
            result = copy()
            if self.bytes_per_s is not None:
                time.sleep(max(0.0, nbytes / self.bytes_per_s - (time.perf_counter() - started)))
            self.bytes += nbytes
            self.busy_s += time.perf_counter() - started
        return result


@dataclasses.dataclass
class EmulatedDevice:
    """One device: its capacity and what it did.

    Args:
        capacity_bytes: None is without limit.
        to_device: the link from the host.
        to_host: the link to the host.
    """

    capacity_bytes: int | None = None
    to_device: Link = dataclasses.field(default_factory=Link)
    to_host: Link = dataclasses.field(default_factory=Link)
    used_bytes: int = 0
    peak_bytes: int = 0

    def take(self, nbytes: int) -> None:
        """Allocates.

        Raises:
            torch.OutOfMemoryError: the capacity would be passed.
        """
        if self.capacity_bytes is not None and self.used_bytes + nbytes > self.capacity_bytes:
            raise torch.OutOfMemoryError(
                f"emulated device: {nbytes} bytes asked for, {self.used_bytes} of {self.capacity_bytes} in use"
            )
        self.used_bytes += nbytes
        self.peak_bytes = max(self.peak_bytes, self.used_bytes)

    def give(self, nbytes: int) -> None:
        """Frees."""
        self.used_bytes -= nbytes


class _Allocation:
    """A block of device memory, alive as long as a tensor uses it."""

    def __init__(self, device: EmulatedDevice, nbytes: int) -> None:
        device.take(nbytes)
        weakref.finalize(self, device.give, nbytes)


_device = EmulatedDevice()
_allocations: weakref.WeakValueDictionary[int, _Allocation] = weakref.WeakValueDictionary()
_lock = threading.RLock()
_library: list[Any] = []


class DeviceTensor(torch.Tensor):
    """A tensor on the emulated device; `held` is a CPU tensor that only the device may touch."""

    held: torch.Tensor
    allocation: _Allocation

    @staticmethod
    def __new__(cls, values: torch.Tensor, requires_grad: bool = False) -> Any:
        """Puts `values` on the device; accelerate rebuilds parameters as `cls(values, requires_grad=...)`."""
        values = _values(values)
        if values.device.type == "meta":  # accelerate takes a parameter off the device, and makes its like again later
            return torch.nn.Parameter(values, requires_grad=False)
        allocation = _allocation_of(values)
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            values.shape,
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            layout=values.layout,
            device=torch.device(EMULATED, 0),
            requires_grad=False,
        )
        made.held, made.allocation = values, allocation
        return made

    def data_ptr(self) -> int:
        """The address, by which Accelerate tells tied parameters; torch would say 0 for every tensor."""
        return self.held.data_ptr()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Has attention run as one kernel, as on a GPU; torch knows none for this device and would make the scores."""
        kwargs = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention:
            _refuse_mixture("scaled_dot_product_attention", (args, kwargs))
            return DeviceTensor(func(*tree_map(_values, args), **tree_map(_values, kwargs)))
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
        return _run(func, name, args, dict(kwargs or {}))


def _values(x: Any) -> Any:
    return x.held if isinstance(x, DeviceTensor) else x


def _allocation_of(values: torch.Tensor) -> _Allocation:
    storage = values.untyped_storage()
    with _lock:
        known = _allocations.get(storage.data_ptr())
        if known is None or storage.nbytes() == 0:
            known = _Allocation(_device, storage.nbytes())
            _allocations[storage.data_ptr()] = known
        return known


def _to_copy(func: Any, source: torch.Tensor, kwargs: dict[str, Any]) -> Any:
    """`.to(...)`: the one way on and off the device, beside copy_."""
    target = kwargs.pop("device", None)
    from_device = isinstance(source, DeviceTensor)
    target_type = torch.device(target).type if target is not None else (EMULATED if from_device else "cpu")
    if target_type == "meta":
        return func(_values(source), device="meta", **kwargs)

    def copy() -> torch.Tensor:
        out = func(_values(source), **kwargs)
        return out.clone() if out.data_ptr() == _values(source).data_ptr() else out  # type: ignore[no-any-return]

    to_device = target_type == EMULATED
    if from_device == to_device:
        out = copy()
    else:
        nbytes = source.numel() * source.element_size()
        out = (_device.to_device if to_device else _device.to_host).carry(nbytes, copy)
    return DeviceTensor(out) if to_device else out


def _copy(target: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    to_device, from_device = isinstance(target, DeviceTensor), isinstance(source, DeviceTensor)

    def copy() -> Any:
        return _values(target).copy_(_values(source))

    if to_device == from_device:
        copy()
    else:
        nbytes = source.numel() * source.element_size()
        (_device.to_device if to_device else _device.to_host).carry(nbytes, copy)
    return target


def _refuse_mixture(name: str, arguments: Any) -> None:
    for tensor in tree_leaves(arguments):
        if isinstance(tensor, torch.Tensor) and not isinstance(tensor, DeviceTensor) and tensor.dim() > 0:
            raise RuntimeError(f"{name}: a {tensor.device} tensor of shape {tuple(tensor.shape)} meets device tensors")


def _run(func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
    _refuse_mixture(name, (args, kwargs))
    target = torch.device(kwargs["device"]).type if kwargs.get("device") is not None else None
    if target == EMULATED:
        kwargs["device"] = "cpu"
    out = func(*tree_map(_values, args), **tree_map(_values, kwargs))
    if name == "aten::set_":
        args[0].allocation = _allocation_of(args[0].held)
    if args and isinstance(args[0], DeviceTensor) and out is args[0].held:
        return args[0]  # an in-place operation returns its own tensor
    if target in ("cpu", "meta"):
        return out
    return tree_map(lambda x: DeviceTensor(x) if isinstance(x, torch.Tensor) else x, out)


class _Module:
    """What torch asks of a device module."""

    def is_available(self) -> bool:
        return True

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def is_initialized(self) -> bool:
        return True

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        pass


def install() -> torch.device:
    """Registers the device with torch, once per process; returns it. There is no way back."""
    if not _library:
        from torch.utils import backend_registration

        backend_registration._setup_privateuseone_for_python_backend(EMULATED, backend_module=_Module())
        _library.append(_kernels())
    return torch.device(EMULATED, 0)


def configure(
    capacity_bytes: int | None = None, to_device: float | None = None, to_host: float | None = None
) -> EmulatedDevice:
    """Gives the device another capacity and other links (bytes per second); counters start anew.

    Raises:
        torch.OutOfMemoryError: more is in use than the new capacity.
    """
    if capacity_bytes is not None and _device.used_bytes > capacity_bytes:
        raise torch.OutOfMemoryError(f"{_device.used_bytes} bytes are in use, more than {capacity_bytes}")
    _device.capacity_bytes, _device.peak_bytes = capacity_bytes, _device.used_bytes
    _device.to_device, _device.to_host = Link(to_device), Link(to_host)
    return _device


def _kernels() -> Any:
    """The few operations that reach a device before any of its tensors is involved."""
    library: Any = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]

    def factory(op: Any) -> Callable[..., torch.Tensor]:
        return lambda *args, **kwargs: DeviceTensor(op(*args, **{**kwargs, "device": "cpu", "pin_memory": False}))

    def scalar(tensor: torch.Tensor) -> Any:
        return _device.to_host.carry(tensor.element_size(), lambda: _values(tensor).item())

    def copy_from(source: torch.Tensor, target: torch.Tensor, _non_blocking: bool = False) -> torch.Tensor:
        return _copy(target, source)

    library.impl("empty.memory_format", factory(torch.ops.aten.empty.memory_format), "PrivateUse1")
    library.impl("empty_strided", factory(torch.ops.aten.empty_strided.default), "PrivateUse1")
    library.impl("_copy_from", copy_from, "PrivateUse1")
    library.impl("_local_scalar_dense", scalar, "PrivateUse1")
    return library
