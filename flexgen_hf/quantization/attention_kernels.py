"""A numba kernel for the CPU: one query per row attends to quantized keys and values, which stay as they are.

It goes through tokens in their order, a few at a time, and through all heads of each: what is read lies in one run per
token. Keys of one head and a few tokens become the numbers that `groupwise` specifies, in memory that stays in the
first cache, and are multiplied at once with all queries of their head; so do values. A row's softmax is kept up over
blocks of tokens: the largest score so far, and sums that are scaled down when a larger one comes. All in float32.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from .groupwise import GroupFormat, Quantized
from .kernel_parts import from_half, inlined, kernel, reordering_kernel, unpack
from .kernels import Grid, grid, share

__all__ = ["attend"]

# Tokens that are unpacked at once, and how many of those make a block of the softmax.
_TILE = 4
_BLOCK = 32 * _TILE

# Below this many elements of keys, starting threads takes longer than the work.
_SHARED_ELEMENTS = 1 << 17

_LOWEST = float(np.finfo(np.float32).min)


@inlined
def _exp(x: Any) -> Any:
    """The exponential of a float32 of at most 0, but for a last bit or two; 0 below float32's normal numbers."""
    turns = np.float32(np.float32(x * np.float32(1.44269504)) + np.float32(12582912))  # rounds, as in quantizing
    whole = np.float32(turns - np.float32(12582912))
    rest = np.float32(np.float32(x - whole * np.float32(0.693359375)) + whole * np.float32(2.12194440e-4))
    value = np.float32(1.9875691500e-4)
    value = np.float32(value * rest + np.float32(1.3981999507e-3))
    value = np.float32(value * rest + np.float32(8.3334519073e-3))
    value = np.float32(value * rest + np.float32(4.1665795894e-2))
    value = np.float32(value * rest + np.float32(1.6666665459e-1))
    value = np.float32(value * rest + np.float32(5.0000001201e-1))
    value = np.float32(np.float32(value * np.float32(rest * rest) + rest) + np.float32(1))
    power = np.int32(np.int32(turns.view(np.int32) - np.int32(0x4B400000) + np.int32(127)) << np.int32(23))
    return np.float32(value * power.view(np.float32)) if x > np.float32(-87) else np.float32(0)


@inlined
def _begins(parts: Any, token: Any, row: Any, head: Any) -> Any:
    """Where codes, scales and minima of a head begin."""
    (_, c0, c1, c2), (_, s0, s1, s2), (_, m0, m1, m2) = parts
    return token * c0 + row * c1 + head * c2, token * s0 + row * s1 + head * s2, token * m0 + row * m1 + head * m2


# A head of a few tokens becomes float32; tokens beyond the last one keep what was there. A function for the width that
# is used most, which unpacks and multiplies at once, is a quarter faster than one for all.


@kernel
def _restore_4_bit(parts: Any, where: Any, size: Any, out: Any) -> None:
    token, last, row, head = where
    half = size // 2
    for k in range(min(_TILE, last - token)):
        code_at, scale_at, minimum_at = _begins(parts, token + k, row, head)
        for group in range(out.shape[1] // size):
            scale, minimum = from_half(parts[1][0][scale_at + group]), from_half(parts[2][0][minimum_at + group])
            packed = parts[0][0][code_at + group * half : code_at + (group + 1) * half]
            low = out[k, group * size : group * size + half]
            high = out[k, group * size + half : (group + 1) * size]
            for i in range(half):
                low[i] = np.float32(packed[i] & np.uint8(15)) * scale + minimum
                high[i] = np.float32(packed[i] >> np.uint8(4)) * scale + minimum


@kernel
def _restore(parts: Any, where: Any, fmt: Any, scratch: Any, out: Any) -> None:
    token, last, row, head = where
    bits, size = fmt
    codes, third, nbytes = scratch[:size], scratch[size : 2 * size], size * bits // 8
    for k in range(min(_TILE, last - token)):
        code_at, scale_at, minimum_at = _begins(parts, token + k, row, head)
        for group in range(out.shape[1] // size):
            scale, minimum = from_half(parts[1][0][scale_at + group]), from_half(parts[2][0][minimum_at + group])
            unpack(parts[0][0][code_at + group * nbytes : code_at + (group + 1) * nbytes], bits, codes, third)
            target = out[k, group * size : (group + 1) * size]
            for i in range(size):
                target[i] = np.float32(codes[i]) * scale + minimum


@inlined
def _restore_tile(parts: Any, where: Any, fmt: Any, scratch: Any, out: Any) -> None:
    if fmt[0] == 4:
        _restore_4_bit(parts, where, fmt[1], out)
    else:
        _restore(parts, where, fmt, scratch, out)


@reordering_kernel
def _products(query: Any, tile: Any, scores: Any) -> None:
    """Of a query with the keys of a few tokens."""
    zero = np.float32(0)
    first, second, third, fourth = zero, zero, zero, zero
    one, two, three, four = tile[0], tile[1], tile[2], tile[3]
    for i in range(query.shape[0]):
        first += query[i] * one[i]
        second += query[i] * two[i]
        third += query[i] * three[i]
        fourth += query[i] * four[i]
    scores[0], scores[1], scores[2], scores[3] = first, second, third, fourth


@reordering_kernel
def _add_weighted(weights: Any, tile: Any, sums: Any) -> None:
    """Values of a few tokens, by their weights."""
    one, two, three, four = tile[0], tile[1], tile[2], tile[3]
    first, second, third, fourth = weights[0], weights[1], weights[2], weights[3]
    for i in range(sums.shape[0]):
        sums[i] += first * one[i] + second * two[i] + third * three[i] + fourth * four[i]


@inlined
def _soften(scores: Any, bias: Any, sums: Any, state: Any) -> None:
    """Scores of a block to weights under the largest score so far; what was summed before is scaled down to it.

    `state` holds that largest score, and the sum of all weights.
    """
    largest = state[0]
    for i in range(scores.shape[0]):
        scores[i] = np.float32(scores[i] + bias[i])
        largest = max(largest, scores[i])
    smaller, total = _exp(np.float32(state[0] - largest)), np.float32(0)
    for i in range(scores.shape[0]):
        scores[i] = _exp(np.float32(scores[i] - largest))
    for i in range(scores.shape[0]):
        total += scores[i]
    if smaller != np.float32(1):
        for i in range(sums.shape[0]):
            sums[i] *= smaller
    state[0], state[1] = largest, np.float32(np.float32(state[1] * smaller) + total)


@inlined
def _score(work: Any, query: Any, keys: Any, tokens: Any, heads: Any) -> None:
    """Products of queries and keys for a block of tokens."""
    (codes, floats, scores), (parts, fmt), (start, end), (first, last, row) = work, keys, tokens, heads
    shared = query.shape[0] // (last - first)
    for token in range(start, end, _TILE):
        for head in range(first, last):
            _restore_tile(parts, (token, end, row, head), fmt, codes, floats[0])
            for k in range((head - first) * shared, (head - first + 1) * shared):
                _products(query[k], floats[0], scores[k, token - start : token - start + _TILE])


@inlined
def _weigh(work: Any, values: Any, tokens: Any, heads: Any, out: Any) -> None:
    """Adds the weighted values of a block of tokens."""
    (codes, floats, scores), (parts, fmt), (start, end), (first, last, row) = work, values, tokens, heads
    shared = out.shape[0] // (last - first)
    for token in range(start, end, _TILE):
        for head in range(first, last):
            _restore_tile(parts, (token, end, row, head), fmt, codes, floats[1])
            for k in range((head - first) * shared, (head - first + 1) * shared):
                _add_weighted(scores[k, token - start : token - start + _TILE], floats[1], out[k])


@kernel
def _attend_row(work: Any, query: Any, kept: Any, bias: Any, heads: Any, state: Any, out: Any) -> None:
    """Some heads of one row. `out` and `state` (see `_soften`) hold what the step's own token gives."""
    scores = work[2]
    for start in range(0, bias.shape[0], _BLOCK):
        tokens = start, min(start + _BLOCK, bias.shape[0])
        count = tokens[1] - start
        _score(work, query, kept[0], tokens, heads)
        for k in range(query.shape[0]):
            _soften(scores[k, :count], bias[start : tokens[1]], out[k], state[k])
            for i in range(count, min(_BLOCK, count + _TILE)):  # the last few are weighed together with nothing
                scores[k, i] = np.float32(0)
        _weigh(work, kept[1], tokens, heads, out)
    for k in range(query.shape[0]):
        for i in range(out.shape[1]):
            out[k, i] /= max(state[k, 1], np.float32(1e-38))


def attend(
    query: Tensor,
    own: tuple[Tensor, Tensor],
    kept: tuple[Quantized, Quantized],
    formats: tuple[GroupFormat, GroupFormat],
    bias: Tensor,
    threads: int = 1,
) -> Tensor:
    """Scaled dot-product attention of one query per row over what is kept and one token more.

    Args:
        query: (rows, heads, head_dim), multiplied by the scale already.
        own: key and value of the token more, (rows, kv heads, head_dim) each.
        kept: keys and values, (tokens, rows, kv heads, head_dim) each, with rows contiguous each (see `kernels.grid`).
        formats: of keys and values.
        bias: what a mask adds to scores, (1 or rows, tokens + 1), the token more last.
        threads: among how many threads heads and rows are shared; the caller's is one of them.

    Returns:
        (rows, heads, head_dim of values), float32.
    """
    rows, kv_heads, width = own[1].shape
    shared = query.shape[1] // kv_heads
    query, key, bias = query.float(), own[0].float(), bias.float()
    score = (torch.unflatten(query, 1, (kv_heads, shared)) @ key[..., None])[..., 0].flatten(1) + bias[:, -1:]
    is_seen = score > _LOWEST
    out: Tensor = own[1].float().repeat_interleave(shared, 1) * is_seen[..., None]
    states, results = torch.stack([score.clamp_min(_LOWEST), is_seen.float()], -1).numpy(), out.numpy()
    queries, biases = query.contiguous().numpy(), bias[:, :-1].contiguous().numpy()
    parts = _parts(kept[0], formats[0]), _parts(kept[1], formats[1])
    places = [f.groups((size,))[0] * f.group_size for f, size in zip(formats, (key.shape[-1], width), strict=True)]

    def work(first: int, last: int) -> int:
        codes = np.empty(2 * max(f.group_size for f in formats), np.uint8)
        floats = np.zeros((_TILE, places[0]), np.float32), np.zeros((_TILE, places[1]), np.float32)
        room = codes, floats, np.zeros((len(queries[0]), _BLOCK), np.float32)
        for row in range(first // kv_heads, -(-last // kv_heads)):
            low, high = max(0, first - row * kv_heads), min(kv_heads, last - row * kv_heads)
            some, heads = (row, slice(low * shared, high * shared)), (low, high, row)
            _attend_row(room, queries[some], parts, biases[row % len(biases)], heads, states[some], results[some])
        return -1

    share(work, rows * kv_heads, min(threads, kept[0].codes.shape[0] * key.numel() // _SHARED_ELEMENTS))
    return out


def _parts(q: Quantized, fmt: GroupFormat) -> tuple[tuple[Grid | None, ...], tuple[int, int]]:
    return (grid(q.codes), grid(q.scales), grid(q.minima)), (fmt.bits, fmt.group_size)
