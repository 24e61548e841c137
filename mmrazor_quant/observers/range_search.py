"""Search for the range of least quantization error, for many channels at once, coarse to fine."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

ErrorFn = Callable[[Tensor, Tensor], Tensor]
"""From scale and zero point of M candidates, shape [M, C], to their errors, shape [M, C]."""

QParamsFn = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""From lower and upper ends of ranges to scale and zero point, of the same shape."""

Stages = tuple[tuple[Tensor, Tensor], ...]
"""Per stage M factors for the lower and M for the upper end, relative to the best range so far."""


def search_range(
    error: ErrorFn, to_qparams: QParamsFn, low: Tensor, high: Tensor, stages: Stages
) -> tuple[Tensor, Tensor]:
    """Find the best range [a, b] inside [low, high].

    Args:
        error: Error of candidates.
        to_qparams: Scale and zero point of candidates.
        low: Lowest ends, shape [C], not above 0.
        high: Highest ends, shape [C], not below 0.
        stages: Candidates to try.

    Returns:
        Lower and upper ends of the best ranges, shape [C].
    """
    best_low, best_high = low, high
    for shrink_low, shrink_high in stages:
        a = (best_low * shrink_low.to(low.device)).maximum(low)
        b = (best_high * shrink_high.to(low.device)).minimum(high)
        pick = error(*to_qparams(a, b)).argmin(0, keepdim=True)
        best_low, best_high = a.gather(0, pick)[0], b.gather(0, pick)[0]
    return best_low, best_high


def symmetric_limits(low: Tensor, high: Tensor, quant_min: int, quant_max: int) -> tuple[Tensor, Tensor]:
    """Give the widest range [-t, t] that is worth trying for data in [low, high].

    Args:
        low: Least values, shape [C].
        high: Greatest values, shape [C].
        quant_min: Lowest integer.
        quant_max: Highest integer.

    Returns:
        Lower and upper ends, shape [C].
    """
    t = torch.maximum(-low, high).clamp(min=0)
    if quant_max > 0:
        # Scales are ranges divided by half of the integers. With one positive integer less than negative ones, the
        # scale at which no positive value is clipped belongs to a slightly wider range.
        t = t * max(1.0, (quant_max - quant_min) / 2 / quant_max)
    return -t, t


def _down(factor: float, count: int) -> Tensor:
    """Factors 1, f, f^2, ..., shape [count, 1]."""
    return (factor ** torch.arange(count, dtype=torch.float32)).unsqueeze(1)


def _around(factor: float, half: int) -> Tensor:
    """Factors from f to 1 / f in equal ratios, shape [2 half + 1, 1]."""
    return (factor ** (torch.arange(-half, half + 1, dtype=torch.float32) / half)).unsqueeze(1)


def _pairs(a: Tensor) -> tuple[Tensor, Tensor]:
    return a.repeat_interleave(len(a), 0), a.repeat(len(a), 1)


@functools.cache
def symmetric_stages() -> Stages:
    """Stages for ranges with tied ends."""
    with torch.inference_mode(False):
        return tuple((f, f) for f in (_down(0.84, 36), _around(0.84, 8), _around(0.98, 6)))


@functools.cache
def pair_stages() -> Stages:
    """Stages that try all pairs of ends: for histograms, on which a candidate costs little."""
    with torch.inference_mode(False):
        return tuple(_pairs(f) for f in (_down(0.6, 14), _around(0.6, 4), _around(0.88, 3), _around(0.96, 2)))


@functools.cache
def line_stages() -> Stages:
    """Stages that shrink both ends together, then each by itself: for values, on which a candidate costs more."""
    with torch.inference_mode(False):
        both = _down(0.75, 18)
        stages = [(both, both)]
        for line in (_around(0.4, 10), _around(0.9, 5)):
            one = torch.ones_like(line)
            stages += [(line, one), (one, line)]
        return (*stages, _pairs(_around(0.985, 2)))
