"""Quantization error sum |x - fq(x)|^p of many candidate scales at once, on values and on histograms."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import compiled
from .reference import bounds

MIN_NUMEL = 2**14
"""Fewer evaluations (candidates times values) are quicker in eager."""

MIN_ROW = 64
"""Shorter rows, as of depthwise convolutions, too: compiled code runs along rows."""

_EAGER_NUMEL = 2**20
"""Eager evaluations go in groups of about this many, which keeps intermediate tensors in the cache."""

_OPERATIONS = 20
"""Elementwise operations in a formula, powers and float64 counted as several."""

# Example shapes: values or (edges, weights); scale and zero point of the candidates; the bounds and the exponent.
_CANDIDATES = ((8, 64), (8, 64), (), (), ())
_VALUES = ((64, 4608), *_CANDIDATES)
_HISTOGRAM = ((64, 2049), (64, 2049), *_CANDIDATES)


def _square(x: Tensor, p: Tensor) -> Tensor:
    return x * x


def _power(x: Tensor, p: Tensor) -> Tensor:
    # Twice as fast as pow when compiled; 0 becomes 2^-inf = 0.
    return torch.exp2(p * torch.log2(x.abs()))


def _value_formula(power: Callable, x: Tensor, scale: Tensor, zero_point: Tensor, low: Tensor, high: Tensor, p: Tensor):
    s, z = scale.unsqueeze(-1), zero_point.unsqueeze(-1)
    q = torch.minimum(torch.maximum(torch.round(x * (1.0 / s)) + z, low), high)
    return power((q - z) * s - x, p).sum(-1)


def _histogram_formula(
    power: Callable, edges: Tensor, weights: Tensor, scale: Tensor, zero_point: Tensor, low: Tensor, high: Tensor,
    p: Tensor,
) -> Tensor:  # fmt: skip
    z = zero_point.unsqueeze(-1)
    u = edges / scale.unsqueeze(-1)
    k = torch.minimum(torch.maximum(torch.round(u), low - z), high - z)
    r = u - k
    return ((k * torch.exp2(-p) + r * power(r, p)) * weights).sum(-1)


def _value_error_2(*args: Tensor) -> Tensor:
    return _value_formula(_square, *args)


def _value_error_p(*args: Tensor) -> Tensor:
    return _value_formula(_power, *args)


def _histogram_error_2(*args: Tensor) -> Tensor:
    return _histogram_formula(_square, *args)


def _histogram_error_p(*args: Tensor) -> Tensor:
    return _histogram_formula(_power, *args)


def _evaluate(function: Callable, shapes: compiled.Shapes, data: list[Tensor], scale, zero_point, *rest) -> Tensor:
    evaluations = len(scale) * data[0].numel()
    worthwhile = evaluations >= MIN_NUMEL and data[0].shape[-1] >= MIN_ROW
    if worthwhile and compiled.usable(data[0], 1):
        with torch.no_grad():
            result = compiled.run(function, shapes, evaluations * _OPERATIONS, *data, scale, zero_point, *rest)
        if result is not None:
            return result
    group = max(1, _EAGER_NUMEL // data[0].numel())
    groups = zip(scale.split(group), zero_point.split(group))
    return torch.cat([function(*data, s, z, *rest) for s, z in groups])


def value_error(rows: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int, p: float) -> Tensor:
    """Compute the quantization error of values.

    Args:
        rows: Values per channel, float32, shape [C, K].
        scale: M candidates per channel, float32, shape [M, C].
        zero_point: Shape [M, C].
        quant_min: Lowest integer.
        quant_max: Highest integer.
        p: Exponent.

    Returns:
        ``sum_k |rows[c, k] - fq(rows[c, k]; scale[m, c])|^p``, shape [M, C].
    """
    rows = rows.contiguous()
    rest = (*bounds(quant_min, quant_max, rows.dtype, rows.device), rows.new_tensor(p))
    function = _value_error_2 if p == 2 else _value_error_p
    return _evaluate(function, _VALUES, [rows], scale.to(rows.dtype), zero_point.to(rows.dtype), *rest)


def histogram_error(
    edges: Tensor, weights: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int, p: float
) -> Tensor:
    r"""Compute the quantization error of values known by a histogram, taken as spread evenly over each bin.

    With u = x / s, the integral of the error from 0 to u has, for the nearest grid point k = clamp(round(u)) and
    r = u - k, the closed form

    .. math:: F(u) = \frac{k \, 2^{-p} + r |r|^p}{p + 1},

    inside the clip range as well as outside. So the error within a bin is exact, whatever the ratio of bins to steps.

    Args:
        edges: Edges of the bins per channel, shape [C, bins + 1].
        weights: Density of the bin to the left of each edge less that of the bin to its right, shape [C, bins + 1].
        scale: M candidates per channel, shape [M, C].
        zero_point: Shape [M, C].
        quant_min: Lowest integer.
        quant_max: Highest integer.
        p: Exponent.

    Returns:
        The integral of density times |x - fq(x)|^p, shape [M, C].
    """
    scale, zero_point = scale.to(edges.dtype), zero_point.to(edges.dtype)
    rest = (*bounds(quant_min, quant_max, edges.dtype, edges.device), edges.new_tensor(p))
    function = _histogram_error_2 if p == 2 else _histogram_error_p
    # In units of x, |x - fq(x)|^p dx has p + 1 factors of s.
    return _evaluate(function, _HISTOGRAM, [edges, weights], scale, zero_point, *rest) * (scale ** (p + 1) / (p + 1))
