"""Group quantization as it is specified: literal bytes, the bound on a round trip, exact constants, refusals."""

import dataclasses
import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from flexgen_hf.errors import PolicyError, QuantizationError
from flexgen_hf.quantization.groupwise import GroupFormat, Quantized, dequantize, empty, pack, quantize, unpack

from .groups import KINDS, dtypes, formats, tensors

# Codes of one group of 8, and its bytes, by the docstring's words: planes of (element i + k * h) in bits p * k.
PACKED = {
    2: ([0, 1, 2, 3, 3, 2, 1, 0], [0b01_11_10_00, 0b00_10_11_01]),
    3: ([0, 1, 2, 3, 4, 5, 6, 7], [0b10_00_10_00, 0b11_01_11_01, 0b11110000]),
    4: ([0, 1, 2, 3, 15, 14, 13, 12], [0xF0, 0xE1, 0xD2, 0xC3]),
    8: ([0, 1, 2, 3, 255, 254, 128, 127], [0, 1, 2, 3, 255, 254, 128, 127]),
}


def padded(x: torch.Tensor, fmt: GroupFormat) -> torch.Tensor:
    """Float32 groups of `x`, written without the code under test."""
    missing = -x.shape[-1] % fmt.group_size
    rows = torch.cat([x.float(), *[x[..., -1:].float()] * missing], -1)
    return rows.view(*x.shape[:-1], rows.shape[-1] // fmt.group_size, fmt.group_size)


@pytest.mark.parametrize("bits", sorted(PACKED))
def test_packed_bytes_are_these(bits):
    codes, packed = (torch.tensor(values, dtype=torch.uint8) for values in PACKED[bits])
    fmt = GroupFormat(bits, 8)
    assert pack(codes, fmt).tolist() == packed.tolist()
    assert unpack(packed, fmt).tolist() == codes.tolist()


def test_a_whole_tensor_has_these_bytes():
    """Two rows of 12, groups of 8: the second group of a row is padded with the row's last element."""
    x = torch.tensor([[*range(8), 5, 6, 7, 20], [1] * 8 + [-2, -2, 13, 13]], dtype=torch.float32)
    q = quantize(x, GroupFormat(4, 8))
    assert q.minima.tolist() == [[0, 5], [1, -2]]
    # the smallest float16 not below 7 / 15
    assert q.scales.tolist() == [[0.466796875, 1], [0, 1]]
    assert q.codes.tolist() == [[0x90, 0xB2, 0xD4, 0xF6, 0xF0, 0xF1, 0xF2, 0xFF], [0] * 4 + [0xF0, 0xF0, 0xFF, 0xFF]]


@given(formats, st.integers(1, 7).map(lambda k: 8 * k), st.data())
def test_packing_is_reversible(fmt, size, data):
    fmt = dataclasses.replace(fmt, group_size=size)
    codes = torch.tensor(data.draw(st.lists(st.integers(0, fmt.top), min_size=size, max_size=size)), dtype=torch.uint8)
    assert torch.equal(unpack(pack(codes, fmt), fmt), codes)


@given(tensors(), formats, dtypes)
def test_a_round_trip_errs_by_half_a_step(x, fmt, dtype):
    q = quantize(x, fmt)
    assert (q.codes.shape, q.scales.shape) == (fmt.packed_shape(x.shape), fmt.groups(x.shape))
    assert q.nbytes == fmt.nbytes(x.shape)
    back = dequantize(q, fmt)
    assert back.shape == x.shape
    if x.numel() == 0:
        return
    groups, step, minimum = padded(x, fmt).double(), q.scales.double()[..., None], q.minima.double()[..., None]
    span = (groups.abs() + minimum.abs()).amax(-1, keepdim=True)
    rounding = 4 * span * torch.finfo(torch.float32).eps
    assert ((padded(back, fmt).double() - groups).abs() <= step / 2 + rounding).all()
    assert (minimum <= groups).all()
    assert (groups <= minimum + fmt.top * step + rounding).all()
    # the second rounding is torch's own
    assert torch.equal(dequantize(q, fmt, dtype), back.to(dtype))


@given(tensors(), formats)
def test_scale_and_minimum_are_as_tight_as_float16_allows(x, fmt):
    if x.numel() == 0:
        return
    q, groups = quantize(x, fmt), padded(x, fmt)
    smallest, largest = groups.amin(-1), groups.amax(-1)
    above = torch.nextafter(q.minima, torch.tensor(torch.inf, dtype=torch.float16))
    assert (above.float() > smallest).all()
    width = largest - q.minima.float()
    assert torch.equal(q.scales == 0, width == 0)
    below = torch.nextafter(q.scales, torch.zeros((), dtype=torch.float16)).float()
    assert ((below * fmt.top < width) | (q.scales == 0)).all()


@given(st.floats(-65504, 65504, width=16), formats, st.integers(1, 100), dtypes)
@example(-0.0, GroupFormat(), 64, torch.float32)
@example(2.0**-24, GroupFormat(2), 64, torch.float16)
def test_a_constant_that_float16_holds_is_exact(value, fmt, length, dtype):
    x = torch.full((2, length), value)
    q = quantize(x, fmt)
    assert not q.scales.any()
    assert torch.equal(dequantize(q, fmt, dtype), x.to(dtype))


def test_padding_widens_no_range():
    """Five elements of 100 and more, in a group of 64: padding with zeros would cost all precision."""
    x = torch.tensor([100.0, 100.25, 100.5, 100.75, 101.0])
    q = quantize(x, GroupFormat(2))
    assert (q.minima.item(), q.codes.shape) == (100, (16,))
    assert q.scales.item() < 0.334


def test_sizes_follow_from_shape_and_format():
    fmt = GroupFormat(4, 64)
    assert fmt.packed_shape((3, 5, 80)) == (3, 5, 64)
    assert fmt.groups((3, 5, 80)) == (3, 5, 2)
    assert fmt.nbytes((3, 5, 80)) == 15 * (64 + 8)
    assert fmt.bits_per_element == 4.5
    assert GroupFormat(3, 128).bits_per_element == 3.25


def test_a_tensor_of_many_chunks_is_like_its_rows(monkeypatch):
    x, fmt = torch.randn(50, 100, generator=torch.Generator().manual_seed(0)), GroupFormat()
    whole = quantize(x, fmt)
    monkeypatch.setattr("flexgen_hf.quantization.groupwise._CHUNK_ELEMENTS", 300)
    parts = quantize(x, fmt)
    assert torch.equal(parts.codes, whole.codes)
    assert torch.equal(dequantize(parts, fmt), dequantize(whole, fmt))


def test_results_go_where_they_are_asked_to_go():
    x, fmt = torch.randn(4, 6, 64), GroupFormat()
    expected = quantize(x, fmt)
    room = empty((6, 4, 64), fmt)
    turned = Quantized(
        codes=room.codes.transpose(0, 1),
        scales=room.scales.transpose(0, 1),
        minima=room.minima.transpose(0, 1),
        shape=(4, 6, 64),
    )
    assert quantize(x, fmt, out=turned) is turned
    assert torch.equal(room.codes, expected.codes.transpose(0, 1))
    assert torch.equal(room.scales, expected.scales.transpose(0, 1))
    values = torch.empty(6, 4, 64, dtype=torch.bfloat16)
    assert dequantize(turned, fmt, out=values.transpose(0, 1)).shape == x.shape
    assert torch.equal(values.transpose(0, 1), dequantize(expected, fmt, torch.bfloat16))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 65505.0, -1e30])
def test_what_float16_cannot_bound_is_refused_by_name_and_place(value):
    x = torch.zeros(3, 4, 100)
    x[2, 1, 70] = x[2, 3, 0] = value
    with pytest.raises(QuantizationError, match=r"model\.layers\.0\.fc1\.weight\[2, 1, 70\] is .*at most 65504"):
        quantize(x, GroupFormat(), name="model.layers.0.fc1.weight")


@pytest.mark.parametrize("x", [torch.zeros(()), torch.zeros(3, 8, dtype=torch.int64)])
def test_only_rows_of_floating_point_are_quantized(x):
    with pytest.raises(QuantizationError, match="only floating-point tensors"):
        quantize(x, GroupFormat())


def test_parts_of_another_shape_or_format_are_refused():
    q = quantize(torch.zeros(4, 64), GroupFormat())
    with pytest.raises(QuantizationError, match="use the format that made them"):
        dequantize(q, GroupFormat(8))
    with pytest.raises(QuantizationError, match="have the shape"):
        dequantize(dataclasses.replace(q, minima=q.minima.float()), GroupFormat())
    with pytest.raises(QuantizationError, match="does not fit"):
        dequantize(q, GroupFormat(), out=torch.empty(64, 4))
    with pytest.raises(QuantizationError, match="make them equal"):
        quantize(torch.zeros(64, 4), GroupFormat(), out=q)
    with pytest.raises(QuantizationError, match="scales of a tensor"):
        quantize(torch.zeros(4, 64), GroupFormat(), out=dataclasses.replace(q, scales=q.scales[:2]))


@pytest.mark.parametrize("arguments", [{"bits": 5}, {"bits": True}, {"group_size": 0}, {"group_size": 12}])
def test_formats_that_do_not_exist_are_refused(arguments):
    with pytest.raises(PolicyError, match=r"do not exist|positive multiple of 8"):
        GroupFormat(**arguments)


def test_every_filling_is_within_the_range():
    generator = torch.Generator().manual_seed(1)
    for make in KINDS.values():
        quantize(make(100, generator), GroupFormat())
