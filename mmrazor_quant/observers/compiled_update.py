"""One batch's update of an observer, and the scale and zero point that follow, as one compiled call.

One by one these are two dozen operations on a few numbers each, which cost more than the data they are about.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from mmrazor_quant.ops import compiled, qparams_from_range
from mmrazor_quant.ops.reference import number

Advance = Callable[..., tuple[Tensor, ...]]
"""``advance(low, high, *statistics, *constants)``: the new statistics, of which the first two are the range.

A function of tensors on the level of a module; ``low``, ``high`` and the statistics have shape [C], constants [].
"""

Scheme = tuple[int, int, bool, bool, float]
"""quant_min, quant_max, symmetric, power of two, least scale."""

_WORK = 2**17
"""What a call costs in eager, in the terms of :class:`compiled.switch`."""

_MANY = 64
"""Example for a number of channels."""


def advance_and_quantize(
    advance: Advance, scheme: Scheme, extremes: tuple[Tensor, Tensor], statistics: list[Tensor], constants: tuple
) -> tuple[Tensor, Tensor] | None:
    """Update statistics in place, and compute scale and zero point.

    Args:
        advance: How the statistics change.
        scheme: What makes scale and zero point of a range.
        extremes: Least and greatest values of the batch, shape [C] or [].
        statistics: Shape [C] each.
        constants: Further numbers for ``advance``.

    Returns:
        scale, float32, and zero_point, shape [C]; None if there is no compiled code (yet): nothing is done then.
    """
    # Of a tensor of a half type they are of that type.
    low, high = (e.reshape(-1).to(statistics[0].dtype) for e in extremes)
    tensors = (low, high, *statistics)
    if not compiled.usable(low, 1) or any(t.shape != low.shape or t.device != low.device for t in statistics):
        return None
    function = _function(advance, scheme)
    sizes = (1,) if low.numel() == 1 else (_MANY,)
    shapes = (*[sizes] * len(tensors), *[()] * len(constants))
    numbers = [number(value, low.device) for value in constants]
    with torch.no_grad():
        result = compiled.run(function, shapes, _WORK, *tensors, *numbers)
        if result is None:
            return None
        *new, scale, zero_point = result
        for old, value in zip(statistics, new):
            old.copy_(value)
    return scale, zero_point


@functools.cache
def _function(advance: Advance, scheme: Scheme) -> Callable[..., tuple[Tensor, ...]]:
    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        new = advance(*tensors)
        return *new, *qparams_from_range(new[0], new[1], *scheme)

    function.__module__ = advance.__module__
    function.__qualname__ = f'{advance.__qualname__}{scheme}'
    return function
