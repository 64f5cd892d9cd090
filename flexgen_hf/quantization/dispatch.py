"""Which code quantizes: kernels for the CPU and for CUDA, plain torch elsewhere; the results are the same.

```python
fmt = GroupFormat(bits=4, group_size=64)
q = quantize(weight, fmt, name="model.layers.0.mlp.fc1.weight")
dequantize(q, fmt, torch.bfloat16, threads=2)
```
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

from ..errors import PolicyError
from . import groupwise, search
from .groupwise import GroupFormat, Quantized

__all__ = [
    "METHODS",
    "Method",
    "attend",
    "dequantize",
    "has_kernels",
    "kernels_loaded_beside",
    "quantize",
    "row_multiplier",
    "row_reader",
    "scratch_bytes",
]

Method = Literal["minmax", "search"]

#: how scales and minima may be found
METHODS: tuple[Method, ...] = ("minmax", "search")

_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Devices for which torch brings Triton along; ROCm is "cuda" as well.
_TRITON_DEVICES = ("cuda", "xpu")


@functools.cache
def _kernels() -> ModuleType | None:
    try:
        from . import kernels
    except ImportError:  # numba lags behind new releases of Python
        return None
    return kernels


def _triton_kernels(device: torch.device) -> ModuleType | None:
    if device.type not in _TRITON_DEVICES:
        return None
    from . import triton_kernels  # takes a while, and is not needed elsewhere

    return triton_kernels if triton_kernels.is_available() else None


def has_kernels() -> bool:
    """Whether there are kernels for the CPU, about four times as fast as plain torch."""
    return _kernels() is not None


@contextlib.contextmanager
def kernels_loaded_beside() -> Iterator[None]:
    """Loads the CPU's kernels in a thread, which takes most of a second, while the block waits for a disk."""

    def use() -> None:
        if has_kernels():
            fmt = GroupFormat(4, 64)
            dequantize(quantize(torch.zeros(1, fmt.group_size), fmt), fmt)

    loading = threading.Thread(target=use, name="flexgen kernels")
    loading.start()
    try:
        yield
    finally:
        loading.join()


def scratch_bytes(device: torch.device) -> int:
    """The most that dequantizing allocates on a device beside the result; kernels need nothing."""
    if device.type == "cpu":
        return 0 if has_kernels() else groupwise.SCRATCH_BYTES
    return 0 if _triton_kernels(device) is not None else groupwise.SCRATCH_BYTES


def quantize(
    x: Tensor,
    fmt: GroupFormat,
    name: str = "tensor",
    method: Method = "minmax",
    out: Quantized | None = None,
    threads: int = 1,
) -> Quantized:
    """Quantizes in groups along the last dimension.

    Args:
        x: floating point, at least one dimension; is worked on in float32.
        fmt: width and group size.
        name: what `x` is, for error messages.
        method: `"minmax"`, of which kernels make short work, for what is quantized on the way; `"search"` (see there)
            for what is quantized once and used often.
        out: where to put the result, as `groupwise.empty` makes it; a new one by default.
        threads: of the kernels; plain torch has threads of its own.

    Raises:
        QuantizationError: see `groupwise.quantize`.
        PolicyError: no such method.
    """
    if method not in METHODS:
        raise PolicyError(f"group quantization: method={method!r} does not exist; use 'minmax' or 'search'")
    kernels = _kernels()
    if kernels is not None and x.device.type == "cpu":
        return kernels.quantize(x, fmt, name, method, out, threads)  # type: ignore[no-any-return]
    if method == "search":
        return search.quantize(x, fmt, name, out)
    if (triton_kernels := _triton_kernels(x.device)) is not None:
        return triton_kernels.quantize(x, fmt, name, out)  # type: ignore[no-any-return]
    return groupwise.quantize(x, fmt, name, out)


def dequantize(
    q: Quantized,
    fmt: GroupFormat,
    dtype: torch.dtype = torch.float32,
    out: Tensor | None = None,
    threads: int = 1,
) -> Tensor:
    """The tensor that `q` stands for.

    Args:
        q: what `quantize` made with the same format.
        fmt: width and group size.
        dtype: of the result; that of `out` if it is given.
        out: where to put the result, of `q.shape`; a new tensor by default.
        threads: of the kernels; plain torch has threads of its own.

    Raises:
        QuantizationError: `q` is of another format, or `out` of another shape.
    """
    kernels = _kernels()
    target = dtype if out is None else out.dtype
    if target in _KERNEL_DTYPES:
        if kernels is not None and q.codes.device.type == "cpu":
            return kernels.dequantize(q, fmt, dtype, out, threads)  # type: ignore[no-any-return]
        if (triton_kernels := _triton_kernels(q.codes.device)) is not None:
            return triton_kernels.dequantize(q, fmt, dtype, out)  # type: ignore[no-any-return]
    return groupwise.dequantize(q, fmt, dtype, out)


def attend(
    query: Tensor,
    own: tuple[Tensor, Tensor],
    kept: tuple[Quantized, Quantized],
    formats: tuple[GroupFormat, GroupFormat],
    bias: Tensor,
    threads: int = 1,
) -> Tensor | None:
    """Attention of one query per row to keys and values that stay quantized, or None where there is no kernel for it.

    Args:
        query: see `attention_kernels.attend`, as what follows.
        own: key and value of one token more.
        kept: keys and values.
        formats: of keys and values.
        bias: what a mask adds to scores.
        threads: of the kernel.
    """
    if _kernels() is None or query.device.type != "cpu":
        return None
    from . import attention_kernels

    return attention_kernels.attend(query, own, kept, formats, bias, threads)


def row_reader(q: Quantized, fmt: GroupFormat) -> Callable[[int, int, Tensor], None]:
    """What dequantizes rows `first` to before `last` into a tensor on the CPU, at little cost for each call.

    Args:
        q: what `quantize` made with the same format, of two dimensions.
        fmt: width and group size.

    Raises:
        QuantizationError: `q` is of another format.
    """
    groupwise.check_parts(q, fmt)
    kernels = _kernels()
    fast = kernels.row_reader(q, fmt) if kernels is not None else None

    def read(first: int, last: int, out: Tensor) -> None:
        if fast is not None and out.dtype in _KERNEL_DTYPES:
            fast(first, last, out)
        else:
            codes, scales, minima = (part[first:last] for part in (q.codes, q.scales, q.minima))
            groupwise.dequantize(Quantized(codes, scales, minima, (last - first, q.shape[1])), fmt, out=out)

    return read


def row_multiplier(q: Quantized, fmt: GroupFormat, x: Tensor) -> tuple[Tensor, Callable[[int, int], None]] | None:
    """Multiplies a few rows by a quantized matrix while it is dequantized, nothing of which is written to memory.

    Args:
        q: what `quantize` made with the same format, of two dimensions.
        fmt: width and group size.
        x: (rows, length).

    Returns:
        The product, (rows, rows of `q`), and what computes its columns `first` to before `last`, which is to be called
        for all of them; None if another way is faster: without kernels, with many rows, and in 16 bit, where a weight
        is rounded before it is multiplied.

    Raises:
        QuantizationError: `q` is of another format.
    """
    groupwise.check_parts(q, fmt)
    if _kernels() is None or x.dtype is not torch.float32 or x.device.type != "cpu":
        return None
    from . import product_kernels

    return product_kernels.row_multiplier(q, fmt, x) if 0 < len(x) <= product_kernels.MOST_ROWS else None
