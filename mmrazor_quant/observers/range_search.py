"""Search for the range whose quantization error sum |x - fq(x)|^p is least, for many channels at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .histogram import bin_edges, exact_dtype

ErrorFn = Callable[[Tensor, Tensor], Tensor]
"""From scale and zero point of M candidates, shape [M, C], to their errors, shape [M, C]."""

MAX_ELEMENTS = 2**22
"""Candidates are evaluated in groups, so that intermediate tensors keep to about this many elements."""


class Grid(NamedTuple):
    """The integers to quantize to."""

    quant_min: int
    quant_max: int


def _power(x: Tensor, p: float) -> Tensor:
    """|x|^p without a call of pow for the usual exponents."""
    if p == 2:
        return x * x
    if p == 1:
        return x.abs()
    if p == 3:
        return x.abs() * x * x
    return x.abs().pow(p)


def value_error(rows: Tensor, grid: Grid, p: float) -> ErrorFn:
    """Make the error function of the values themselves.

    Args:
        rows: Shape [C, K].
        grid: Integers to quantize to.
        p: Exponent.

    Returns:
        ``sum_k |x_ck - fq(x_ck)|^p`` as a function of scale and zero point.
    """

    def error(scale: Tensor, zero_point: Tensor) -> Tensor:
        group = max(1, MAX_ELEMENTS // rows.numel())
        parts = []
        for s, z in zip(scale.split(group), zero_point.split(group)):
            s, z = s.unsqueeze(-1), z.unsqueeze(-1).to(rows.dtype)
            q = (torch.round(rows * (1.0 / s)) + z).clamp(grid.quant_min, grid.quant_max)
            parts.append(_power((q - z) * s - rows, p).sum(-1))
        return torch.cat(parts)

    return error


def histogram_error(counts: Tensor, low: Tensor, high: Tensor, grid: Grid, p: float) -> ErrorFn:
    r"""Make the error function of a histogram, its counts taken as spread evenly over each bin.

    With u = x / s, the integral of the error from 0 to u is, for the nearest grid point k = clamp(round(u)) and
    r = u - k, in closed form

    .. math:: F(u) = k \frac{2 (1/2)^{p+1}}{p+1} + \mathrm{sign}(r) \frac{|r|^{p+1}}{p+1},

    inside the clip range as well as outside. So the sum over bins is exact whatever the ratio of bins to steps.

    Args:
        counts: Shape [C, bins].
        low: Lower ends of the histograms' ranges, shape [C].
        high: Upper ends, shape [C].
        grid: Integers to quantize to.
        p: Exponent.

    Returns:
        The error, up to a factor per channel, as a function of scale and zero point.
    """
    dtype = exact_dtype(counts.device)
    bins = counts.shape[1]
    edges = bin_edges(low.to(dtype), high.to(dtype), bins)
    density = torch.nn.functional.pad(counts.to(dtype), (1, 1))
    # sum_i n_i (F(e_i+1) - F(e_i)) = sum_i F(e_i) (n_i-1 - n_i)
    weights = density[:, :-1] - density[:, 1:]
    per_step = 0.5**p / (p + 1)

    def error(scale: Tensor, zero_point: Tensor) -> Tensor:
        group = max(1, MAX_ELEMENTS // edges.numel())
        parts = []
        for s, z in zip(scale.to(dtype).split(group), zero_point.to(dtype).split(group)):
            u = edges / s.unsqueeze(-1)
            k = torch.round(u)
            k = torch.minimum(torch.maximum(k, grid.quant_min - z.unsqueeze(-1)), grid.quant_max - z.unsqueeze(-1))
            r = u - k
            integral = k * per_step + r * _power(r, p) / (p + 1)
            # |s (u - k)|^p ds: p + 1 factors of s
            parts.append((integral * weights).sum(-1) * s ** (p + 1))
        return torch.cat(parts)

    return error


def _geometric(factor: float, count: int) -> Tensor:
    return factor ** torch.arange(count, dtype=torch.float32)


def _window(factor: float, half: int) -> Tensor:
    return factor ** (torch.arange(-half, half + 1, dtype=torch.float32) / half)


def _pairs(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return a.repeat_interleave(len(b)), b.repeat(len(a))


def search_symmetric(
    error: ErrorFn, to_qparams: Callable, low: Tensor, high: Tensor, grid: Grid
) -> tuple[Tensor, Tensor]:
    """Search over ranges [-t, t], coarse to fine.

    Args:
        error: Error of candidates.
        to_qparams: From lower and upper ends to scale and zero point.
        low: Least values, shape [C].
        high: Greatest values, shape [C].
        grid: Integers to quantize to.

    Returns:
        Lower and upper ends of the best ranges, shape [C].
    """
    largest = torch.maximum(-low, high).clamp(min=0)
    if grid.quant_max > 0:
        # A scale is (range / half of the integers): with fewer positive integers than negative ones, the scale
        # at which the largest value is not clipped belongs to a slightly larger range.
        largest = largest * max(1.0, (grid.quant_max - grid.quant_min) / 2 / grid.quant_max)
    best = largest
    for factors in (_geometric(0.84, 36), _window(0.84, 8), _window(0.98, 6)):
        t = (best * factors.to(best.device).unsqueeze(1)).minimum(largest)
        pick = error(*to_qparams(-t, t)).argmin(0, keepdim=True)
        best = t.gather(0, pick)[0]
    return -best, best


def search_asymmetric(
    error: ErrorFn, to_qparams: Callable, low: Tensor, high: Tensor, stages: list[tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """Search over ranges [a, b], in stages.

    Args:
        error: Error of candidates.
        to_qparams: From lower and upper ends to scale and zero point.
        low: Least values, shape [C].
        high: Greatest values, shape [C].
        stages: Per stage M factors for the lower and M for the upper end, relative to the best range so far.

    Returns:
        Lower and upper ends of the best ranges, shape [C].
    """
    low, high = low.clamp(max=0), high.clamp(min=0)
    best_low, best_high = low, high
    for shrink_low, shrink_high in stages:
        a = (best_low * shrink_low.to(low.device).unsqueeze(1)).maximum(low)
        b = (best_high * shrink_high.to(low.device).unsqueeze(1)).minimum(high)
        pick = error(*to_qparams(a, b)).argmin(0, keepdim=True)
        best_low, best_high = a.gather(0, pick)[0], b.gather(0, pick)[0]
    return best_low, best_high


def pair_stages() -> list[tuple[Tensor, Tensor]]:
    """Stages that try all pairs of ends: for histograms, whose candidates are cheap."""
    return [_pairs(_geometric(0.7, 12), _geometric(0.7, 12)), _pairs(_window(0.7, 4), _window(0.7, 4)),
            _pairs(_window(0.92, 3), _window(0.92, 3))]  # fmt: skip


def line_stages() -> list[tuple[Tensor, Tensor]]:
    """Stages that shrink both ends together, then each by itself: for values, whose candidates cost more."""
    both = _geometric(0.8, 16)
    wide, narrow = _window(0.5, 8), _window(0.9, 5)
    stages = [(both, both)]
    for line in (wide, narrow):
        one = torch.ones_like(line)
        stages += [(line, one), (one, line)]
    return stages
