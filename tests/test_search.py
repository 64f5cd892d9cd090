"""The search for scales and minima: no group is worse for it, most are better, and all code finds the same."""

import functools

import pytest
import torch
from hypothesis import given

from flexgen_hf.errors import PolicyError, QuantizationError
from flexgen_hf.quantization import dispatch, groupwise, kernels, search
from flexgen_hf.quantization.groupwise import GroupFormat, Quantized

from .groups import formats, tensors


def squared_errors(x: torch.Tensor, q: Quantized, fmt: GroupFormat) -> torch.Tensor:
    """Of each group, without its padding, in float64."""
    wrong = (groupwise.dequantize(q, fmt).double() - x.double()).square()
    missing = -x.shape[-1] % fmt.group_size
    wrong = torch.nn.functional.pad(wrong, (0, missing))
    return wrong.view(*x.shape[:-1], wrong.shape[-1] // fmt.group_size, fmt.group_size).sum(-1)


@given(tensors(), formats)
def test_no_group_is_worse(x, fmt):
    q = search.quantize(x, fmt)
    assert q.nbytes == fmt.nbytes(x.shape)
    if x.numel():
        assert (squared_errors(x, q, fmt) <= squared_errors(x, groupwise.quantize(x, fmt), fmt)).all()


@given(tensors(), formats)
def test_the_kernel_is_as_specified(x, fmt):
    expected, made = search.quantize(x, fmt), kernels.quantize(x, fmt, method="search")
    for name in ("codes", "scales", "minima"):
        one, other = getattr(expected, name).view(torch.uint8), getattr(made, name).view(torch.uint8)
        assert torch.equal(one, other), name


# what is left of the squared error of normally distributed weights
@pytest.mark.parametrize(("bits", "left"), [(2, 0.55), (3, 0.76), (4, 0.87)])
def test_random_weights_lose_less(bits, left):
    x, fmt = torch.randn(128, 512, generator=torch.Generator().manual_seed(0)), GroupFormat(bits)
    before, after = (squared_errors(x, dispatch.quantize(x, fmt, method=m), fmt).sum() for m in ("minmax", "search"))
    assert after < left * before


def test_an_outlier_is_given_up_for_the_others():
    """In 2 bits, one element at 6 would leave all others, within -1 and 1, two codes."""
    x = torch.cat([torch.linspace(-1, 1, 63), torch.tensor([6.0])])
    fmt = GroupFormat(2)
    plain, searched = (dispatch.quantize(x, fmt, method=m) for m in ("minmax", "search"))
    assert searched.scales < plain.scales
    assert squared_errors(x, searched, fmt) < squared_errors(x, plain, fmt)


def test_a_constant_stays_exact():
    x = torch.full((3, 100), 0.75)
    q = dispatch.quantize(x, GroupFormat(2), method="search")
    assert torch.equal(dispatch.dequantize(q, GroupFormat(2)), x)


def test_what_cannot_be_searched_is_refused():
    x = torch.zeros(3, 64)
    with pytest.raises(PolicyError, match="method='mse' does not exist"):
        dispatch.quantize(x, GroupFormat(), method="mse")  # type: ignore[arg-type]
    x[1, 2] = float("nan")
    for quantize in (search.quantize, functools.partial(kernels.quantize, method="search")):
        with pytest.raises(QuantizationError, match=r"^w\[1, 2\] is nan"):
            quantize(x, GroupFormat(), "w")
