"""Tensors on which group quantization is tried: ordinary ones, and groups at every edge of float16."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from flexgen_hf.quantization.groupwise import GroupFormat

# fillings of a row, by name: each takes the row's length and a generator
KINDS = {
    "normal": lambda n, g: torch.randn(n, generator=g),
    "tiny": lambda n, g: torch.randn(n, generator=g) * 1e-7,  # below float16's smallest normal number
    "subnormal": lambda n, g: torch.randn(n, generator=g) * 1e-40,  # below float32's
    "large": lambda n, g: (torch.rand(n, generator=g) * 2 - 1) * 65504,
    "offset": lambda n, g: torch.randn(n, generator=g) * 1e-3 + 100,
    "constant": lambda n, g: torch.full((n,), float(torch.randn((), generator=g).half())),
    "odd constant": lambda n, g: torch.full((n,), float(torch.randn((), generator=g)) / 3),
    "zeros of both signs": lambda n, g: torch.randint(0, 2, (n,), generator=g) * -0.0,
    "ties": lambda n, g: torch.randint(0, 31, (n,), generator=g) / 2,
    "extremes": lambda n, g: torch.randint(0, 2, (n,), generator=g) * 131008.0 - 65504.0,
}

formats = st.builds(GroupFormat, st.sampled_from([2, 3, 4, 8]), st.sampled_from([8, 16, 24, 64, 72, 128]))
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    """A tensor of one to three dimensions, each row with a filling of its own; some are not contiguous."""
    rows = draw(st.lists(st.integers(0, 3), max_size=2))
    length = draw(st.integers(0, 150))
    dtype = draw(dtypes)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    x = torch.empty(*rows, length)
    for row in x.view(-1, length) if x.numel() else []:
        row.copy_(KINDS[draw(st.sampled_from(sorted(KINDS)))](length, generator))
    # bfloat16 would round the largest float16 up to a number that is refused
    x = x.clamp(-65280, 65280) if dtype is torch.bfloat16 else x
    x = x.to(dtype)
    return x.transpose(0, 1).contiguous().transpose(0, 1) if draw(st.booleans()) and x.dim() > 1 else x
