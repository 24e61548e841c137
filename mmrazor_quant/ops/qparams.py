"""From a range of values to scale and zero point."""

from __future__ import annotations

import torch
from torch import Tensor

from .reference import integer_dtype

MIN_SCALE = torch.finfo(torch.float32).tiny
"""Smallest normal float32. Scales stay in [MIN_SCALE, 1 / MIN_SCALE]: their reciprocals are normal too."""

_FLOAT32_EXPONENT_BITS = 0x7F800000


def qparams_from_range(
    min_val: Tensor,
    max_val: Tensor,
    quant_min: int,
    quant_max: int,
    symmetric: bool,
    is_pot_scale: bool = False,
    eps: float = MIN_SCALE,
) -> tuple[Tensor, Tensor]:
    """Compute scale and zero point of the grid that covers a range, with zero exactly on the grid.

    With the range widened to contain zero and ``n = quant_max - quant_min``:

    * asymmetric: ``scale = (max - min) / n``, ``zero_point = quant_min - round(min / scale)``;
    * symmetric, integers of both signs: ``scale = max(-min, max) / (n / 2)``, ``zero_point = 0``;
    * symmetric, integers of one sign only: ``scale = max / quant_max`` (or ``min / quant_min``), ``zero_point = 0``.

    A range of nothing but zero gets scale 1. No step depends on the data in Python.

    Args:
        min_val: Lower ends, any shape, finite.
        max_val: Upper ends, the same shape.
        quant_min: Lowest integer.
        quant_max: Highest integer.
        symmetric: Whether the zero point is fixed to 0.
        is_pot_scale: Round scales to the nearest power of two (on the logarithmic scale).
        eps: Lower bound of the scale.

    Returns:
        scale (float32) and zero_point (int32; int64 where the range does not fit int32), shaped as ``min_val``.
    """
    low = min_val.to(torch.float32).clamp(max=0.0)
    high = max_val.to(torch.float32).clamp(min=0.0)
    scale = _symmetric_scale(low, high, quant_min, quant_max) if symmetric else _span(low, high, quant_max - quant_min)
    # Compared with 0, not with eps: a small but real range has to keep a small scale.
    scale = torch.where(scale == 0, torch.ones_like(scale), scale.clamp(max(eps, MIN_SCALE), 1.0 / MIN_SCALE))
    if is_pot_scale:
        scale = round_to_power_of_two(scale)
    zero_dtype = integer_dtype(quant_min, quant_max)
    if symmetric:
        return scale, torch.zeros_like(scale, dtype=zero_dtype)
    zero_point = quant_min - torch.round(low / scale).to(torch.int64)
    return scale, zero_point.clamp(quant_min, quant_max).to(zero_dtype)


def _symmetric_scale(low: Tensor, high: Tensor, quant_min: int, quant_max: int) -> Tensor:
    if quant_min >= 0:
        return high / quant_max
    if quant_max <= 0:
        return low / quant_min
    return torch.maximum(-low, high) / ((quant_max - quant_min) / 2)


def _span(low: Tensor, high: Tensor, steps: int) -> Tensor:
    span = high - low
    # The width of a range near the largest float32 is infinite; dividing the ends first avoids that.
    return torch.where(torch.isinf(span), high / steps - low / steps, span / steps)


def effective_scale(scale: Tensor, is_pot_scale: bool = False) -> Tensor:
    """Give the scale that a learned one stands for.

    Args:
        scale: Any numbers, float32; an optimizer may have made them zero or negative.
        is_pot_scale: Whether it has to be a power of two.

    Returns:
        Positive numbers in [MIN_SCALE, 1 / MIN_SCALE], the same shape; powers of two if asked for. Applied again, it
        changes nothing.
    """
    scale = scale.clamp(MIN_SCALE, 1.0 / MIN_SCALE)
    return round_to_power_of_two(scale) if is_pot_scale else scale


def gradient_of_scale(of_step: Tensor, scale: Tensor, step: Tensor, factor: float, is_pot_scale: bool) -> Tensor:
    """Turn the gradient of a scale in use into that of the learned parameter, straight through the rounding.

    Args:
        of_step: Gradient of the scale in use.
        scale: The parameter.
        step: ``effective_scale(scale, is_pot_scale)``.
        factor: What the gradient is multiplied with.
        is_pot_scale: Whether the scale was rounded to a power of two.

    Returns:
        Shape and type of ``scale``.
    """
    if is_pot_scale:  # d step / d scale = step / scale, from log2(step) = round(log2(scale))
        of_step = of_step * (step / effective_scale(scale))
    return (of_step if factor == 1.0 else of_step * factor).to(scale.dtype)


def round_to_power_of_two(scale: Tensor) -> Tensor:
    """Round to ``2 ** round(log2(scale))``, exactly.

    Args:
        scale: Positive normal float32 numbers, any shape.

    Returns:
        float32 powers of two, the same shape.
    """
    # Through the bits, since log2 and exp2 of vectorised libraries may be one unit off.
    floor = (scale.view(torch.int32) & _FLOAT32_EXPONENT_BITS).view(torch.float32)
    up = (scale >= floor * 2**0.5) & (floor < 1.0 / MIN_SCALE)
    return torch.where(up, floor * 2, floor)
