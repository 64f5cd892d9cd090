"""Triton's kernels do what plain torch does, bit for bit: on an accelerator, or run by Triton's interpreter."""

import os

import pytest
import torch
from hypothesis import given, settings

from flexgen_hf.errors import QuantizationError
from flexgen_hf.quantization import dispatch, groupwise, triton_kernels

from .groups import dtypes, formats, tensors

if not triton_kernels.is_available():
    pytest.skip("needs triton, of torch's builds for accelerators", allow_module_level=True)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("without an accelerator, needs TRITON_INTERPRET=1 in the environment", allow_module_level=True)
# where there is an accelerator, by the way that users take
dequantize = dispatch.dequantize if DEVICE == "cuda" else triton_kernels.dequantize
quantize = dispatch.quantize if DEVICE == "cuda" else triton_kernels.quantize


@settings(max_examples=60)
@given(tensors(), formats)
def test_quantizing_is_as_specified(x, fmt):
    made, expected = quantize(x.to(DEVICE), fmt), groupwise.quantize(x, fmt)
    for name in ("codes", "scales", "minima"):
        one, other = getattr(made, name).cpu(), getattr(expected, name)
        assert torch.equal(one.view(torch.uint8), other.view(torch.uint8)), name


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 65505.0])
def test_refusals_are_the_same(value):
    x = torch.zeros(5, 4, 100, device=DEVICE)
    x[2, 1, 70] = x[2, 3, 0] = value
    with pytest.raises(QuantizationError, match=r"^key\[2, 1, 70\] is "):
        quantize(x, groupwise.GroupFormat(), "key")


def test_records_are_written_where_they_lie():
    fmt = groupwise.GroupFormat(3, 24)
    x, room = torch.randn(6, 3, 50, device=DEVICE), groupwise.empty((3, 6, 50), fmt, DEVICE)
    codes, scales, minima = (part.transpose(0, 1) for part in (room.codes, room.scales, room.minima))
    out = groupwise.Quantized(codes, scales, minima, tuple(x.shape))
    quantize(x, fmt, out=out)
    assert torch.equal(groupwise.dequantize(out, fmt), groupwise.dequantize(groupwise.quantize(x, fmt), fmt))


@settings(max_examples=60)
@given(tensors(), formats, dtypes)
def test_dequantizing_is_as_specified(x, fmt, dtype):
    q = groupwise.quantize(x.to(DEVICE), fmt)
    expected, made = groupwise.dequantize(q, fmt, dtype), dequantize(q, fmt, dtype)
    assert torch.equal(made.cpu().view(torch.uint8), expected.cpu().view(torch.uint8))


def test_memory_in_another_order_is_written_too():
    fmt = groupwise.GroupFormat()
    q = groupwise.quantize(torch.randn(3, 5, 70, device=DEVICE), fmt)
    out = torch.empty(70, 5, 3, device=DEVICE).permute(2, 1, 0)
    assert dequantize(q, fmt, out=out) is out
    assert torch.equal(out, groupwise.dequantize(q, fmt))
