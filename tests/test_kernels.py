"""The CPU's kernels do what plain torch does, bit for bit, in any thread, and are called where they can be."""

import concurrent.futures
import functools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexgen_hf.errors import QuantizationError
from flexgen_hf.quantization import dispatch, groupwise, kernels
from flexgen_hf.quantization.groupwise import GroupFormat, Quantized

from .groups import dtypes, formats, tensors

ROOT = Path(__file__).parent.parent


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal to the last bit, the sign of zero included; a NaN is equal to none."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[a.dtype.itemsize]
    return a.dtype == b.dtype and not bool(a.isnan().any()) and torch.equal(a.view(integers), b.view(integers))


def same_parts(a: Quantized, b: Quantized) -> bool:
    return all(same_bits(getattr(a, name), getattr(b, name)) for name in ("codes", "scales", "minima"))


@settings(max_examples=300)
@given(tensors(), formats)
def test_quantizing_is_as_specified(x, fmt):
    assert same_parts(kernels.quantize(x, fmt), groupwise.quantize(x, fmt))


@settings(max_examples=300)
@given(tensors(), formats, dtypes)
def test_dequantizing_is_as_specified(x, fmt, dtype):
    q = groupwise.quantize(x, fmt)
    assert same_bits(kernels.dequantize(q, fmt, dtype), groupwise.dequantize(q, fmt, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_code_under_every_scale_and_minimum(dtype):
    """All finite float16 as minimum and, if not negative, as scale: each rounding to 16 bits is met, up to infinity."""
    fmt = GroupFormat(8, 8)
    finite = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    finite = finite[finite.isfinite()]
    generator = torch.Generator().manual_seed(0)
    minima = torch.cat([finite, torch.zeros_like(finite)])
    scales = torch.cat([finite.abs()[torch.randperm(len(finite), generator=generator)], finite.abs()])
    codes = torch.randint(0, 256, (len(minima), 8), dtype=torch.uint8, generator=generator)
    q = Quantized(codes, scales[:, None], minima[:, None], (len(minima), 8))
    assert same_bits(kernels.dequantize(q, fmt, dtype), groupwise.dequantize(q, fmt, dtype))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("threads", [2, 3])
def test_threads_share_rows_and_change_nothing(bits, threads, monkeypatch):
    monkeypatch.setattr(kernels, "_SHARED_ELEMENTS", 1)
    x, fmt = torch.randn(17, 200, generator=torch.Generator().manual_seed(1)), GroupFormat(bits)
    q = kernels.quantize(x, fmt, threads=threads)
    assert same_parts(q, groupwise.quantize(x, fmt))
    assert same_bits(kernels.dequantize(q, fmt, threads=threads), groupwise.dequantize(q, fmt))


def test_many_threads_may_call_at_once():
    x, fmt = torch.randn(64, 256, generator=torch.Generator().manual_seed(2)), GroupFormat()
    expected = groupwise.dequantize(groupwise.quantize(x, fmt), fmt, torch.bfloat16)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        made = pool.map(lambda _: kernels.dequantize(kernels.quantize(x, fmt), fmt, torch.bfloat16), range(16))
    assert all(same_bits(one, expected) for one in made)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 65505.0])
@pytest.mark.parametrize("threads", [1, 3])
def test_refusals_are_the_same(value, threads, monkeypatch):
    monkeypatch.setattr(kernels, "_SHARED_ELEMENTS", 1)
    x = torch.zeros(5, 4, 100)
    x[2, 1, 70] = x[2, 3, 0] = x[4, 0, 0] = value
    messages = []
    for quantize in (groupwise.quantize, functools.partial(kernels.quantize, threads=threads)):
        with pytest.raises(QuantizationError, match=r"^key\[2, 1, 70\] is ") as caught:
            quantize(x, GroupFormat(), "key")
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


def test_parts_of_another_format_are_refused_before_they_are_read():
    q = groupwise.quantize(torch.zeros(4, 64), GroupFormat(4))
    with pytest.raises(QuantizationError, match="use the format that made them"):
        kernels.dequantize(q, GroupFormat(8))
    with pytest.raises(QuantizationError, match="use the format that made them"):
        kernels.quantize(torch.zeros(4, 64), GroupFormat(8), out=q)


def test_memory_is_used_where_it_lies():
    x, fmt = torch.randn(6, 3, 64, generator=torch.Generator().manual_seed(4)), GroupFormat()
    room = groupwise.empty((10, 3, 64), fmt)
    part = Quantized(room.codes[2:8], room.scales[2:8], room.minima[2:8], (6, 3, 64))
    assert dispatch.quantize(x, fmt, out=part) is part
    assert same_bits(room.codes[2:8], groupwise.quantize(x, fmt).codes)
    slot = torch.zeros(10, 3, 64, dtype=torch.float16)
    dispatch.dequantize(part, fmt, out=slot[2:8])
    assert same_bits(slot[2:8], groupwise.dequantize(part, fmt, torch.float16))
    assert not slot[:2].any()
    assert not slot[8:].any()


@st.composite
def turned(draw: st.DrawFn) -> tuple[torch.Tensor, GroupFormat]:
    fmt = draw(formats)
    return torch.randn(3, draw(st.integers(1, 90)), 5).transpose(1, 2), fmt


@given(turned(), dtypes)
def test_memory_in_another_order_is_read_and_written_too(drawn, dtype):
    x, fmt = drawn
    expected = groupwise.quantize(x.contiguous(), fmt)
    room = groupwise.empty((5, 3, x.shape[-1]), fmt)
    codes, scales, minima = (part.transpose(0, 1) for part in (room.codes, room.scales, room.minima))
    q = dispatch.quantize(x, fmt, out=Quantized(codes, scales, minima, tuple(x.shape)))
    assert same_parts(q, expected)
    out = torch.empty(x.shape[::-1], dtype=dtype).permute(2, 1, 0)
    assert same_bits(dispatch.dequantize(q, fmt, out=out), groupwise.dequantize(expected, fmt, dtype))


def test_without_numba_plain_torch_does_it(monkeypatch):
    x, fmt = torch.randn(3, 100), GroupFormat()
    monkeypatch.setitem(sys.modules, "flexgen_hf.quantization.kernels", None)
    monkeypatch.delattr("flexgen_hf.quantization.kernels", raising=False)
    dispatch._kernels.cache_clear()
    try:
        assert not dispatch.has_kernels()
        q = dispatch.quantize(x, fmt)
        assert same_parts(q, groupwise.quantize(x, fmt))
        assert same_bits(dispatch.dequantize(q, fmt), groupwise.dequantize(q, fmt))
    finally:
        dispatch._kernels.cache_clear()


def test_dtypes_without_a_kernel_go_to_plain_torch():
    q = groupwise.quantize(torch.randn(3, 100), GroupFormat())
    assert dispatch.dequantize(q, GroupFormat(), torch.float64).dtype == torch.float64
    assert dispatch.has_kernels()


def test_kernels_work_where_no_folder_can_be_written():
    """Numba refuses to keep machine code when it finds no folder for it; then it is compiled in each process."""
    code = """
import torch
from numba.core import caching
caching.FunctionCache._impl_class._locator_classes.clear()
from flexgen_hf.quantization import groupwise, kernels
x = torch.randn(2, 64)
fmt = groupwise.GroupFormat()
q = groupwise.quantize(x, fmt)
assert torch.equal(kernels.dequantize(q, fmt), groupwise.dequantize(q, fmt))
print(type(kernels._rows_to_float32._cache).__name__)
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (0, "NullCache\n"), result.stderr


def test_numba_is_imported_for_kernels_only():
    code = "import flexgen_hf.quantization.dispatch, sys; print('numba' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout == "False\n"


def test_a_round_trip_of_a_cast_tensor_is_that_of_its_float32():
    x, fmt = torch.randn(4, 64).bfloat16(), GroupFormat()
    assert same_parts(kernels.quantize(x, fmt), groupwise.quantize(x.float(), fmt))
