"""Learned rounding of weights: the soft rounding function, and one step of its optimizer in one walk over memory.

Rounding is learned as in "Up or Down? Adaptive Rounding for Post-Training Quantization" (Nagel et al. 2020): the
integer of a weight is ``floor(w / s) + z + h(alpha)`` with a rectified sigmoid h in [0, 1] (eq. 23), which a
regularizer (eq. 24) drives to 0 or 1. Besides, the weights that the network is run with go from soft to hard rounding:
the weights not yet rounded adapt to those that are, and nothing is left to round in the end.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import compiled

ZETA, GAMMA = 1.1, -0.1
"""The range that the sigmoid is stretched to before it is clipped to [0, 1] (Nagel et al. 2020, eq. 23)."""

MOMENTUM, MOMENTUM_OF_SQUARES, EPSILON = 0.9, 0.999, 1e-8
"""Adam's constants (Kingma and Ba 2015)."""

_OPERATIONS = 40
_EXAMPLE = (2**16,)


class RoundingState(NamedTuple):
    """What changes while the rounding of weights is learned, all of shape [N], float32.

    Args:
        alpha: What h is applied to.
        average: Adam's running mean of the gradient.
        square: Adam's running mean of its square.
    """

    alpha: Tensor
    average: Tensor
    square: Tensor


class RoundingGrid(NamedTuple):
    """The grid of each weight, all of shape [N], float32.

    Args:
        base: ``floor(w / s) + z``, not clipped.
        scale: s.
        zero_point: z.
        low: Lowest integer.
        high: Highest integer.
    """

    base: Tensor
    scale: Tensor
    zero_point: Tensor
    low: Tensor
    high: Tensor


class RoundingStep(NamedTuple):
    """The numbers of one step, each of shape [], float32.

    Args:
        rate: Learning rate divided by ``1 - 0.9 ** t``.
        correction: ``1 / sqrt(1 - 0.999 ** t)``.
        weight: Factor of the regularizer.
        power: Its exponent, beta.
        hardness: In [0, 1], how far the values given are from those of soft rounding towards those of hard rounding.
    """

    rate: Tensor
    correction: Tensor
    weight: Tensor
    power: Tensor
    hardness: Tensor


def soft_rounding(alpha: Tensor) -> Tensor:
    """Compute h, the rectified sigmoid, in [0, 1]; shape of ``alpha``."""
    return torch.clamp(torch.sigmoid(alpha) * (ZETA - GAMMA) + GAMMA, 0.0, 1.0)


def alpha_of(rest: Tensor) -> Tensor:
    """Compute the alpha with ``soft_rounding(alpha) == rest``.

    Args:
        rest: Numbers in [0, 1], what rounding down leaves of a weight, in steps.

    Returns:
        Shape of ``rest``.
    """
    return -torch.log((ZETA - GAMMA) / (rest - GAMMA) - 1.0)


def soft_integers(alpha: Tensor, grid: RoundingGrid, hardness: Tensor | float = 0.0) -> Tensor:
    """Compute ``clamp(base + r, low, high) - z`` with r between h(alpha), at hardness 0, and its rounded value, at 1.

    Args:
        alpha: Shape [N].
        grid: Grid of each weight.
        hardness: In [0, 1].

    Returns:
        Shape [N].
    """
    h = soft_rounding(alpha)
    rounding = h + hardness * ((h >= 0.5).to(h.dtype) - h)
    return torch.minimum(torch.maximum(grid.base + rounding, grid.low), grid.high) - grid.zero_point


def _step_formula(
    grad: Tensor, alpha: Tensor, average: Tensor, square: Tensor, base: Tensor, scale: Tensor, zero_point: Tensor,
    low: Tensor, high: Tensor, rate: Tensor, correction: Tensor, weight: Tensor, power: Tensor, hardness: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    sigmoid = torch.sigmoid(alpha)
    stretched = sigmoid * (ZETA - GAMMA) + GAMMA
    h = torch.clamp(stretched, 0.0, 1.0)
    integer = base + h
    inside = (integer >= low) & (integer <= high)
    free = (stretched > 0.0) & (stretched < 1.0)
    slope = torch.where(free, sigmoid * (1.0 - sigmoid) * (ZETA - GAMMA), 0.0)
    # d/dh of weight * (1 - |2h - 1| ** power)
    centred = 2.0 * h - 1.0
    distance = torch.abs(centred).clamp(min=1e-8)
    of_regularizer = -2.0 * weight * power * torch.exp((power - 1.0) * torch.log(distance)) * torch.sign(centred)
    of_alpha = (torch.where(inside, grad * scale, 0.0) + of_regularizer) * slope
    average = average + (of_alpha - average) * (1.0 - MOMENTUM)
    square = square + (of_alpha * of_alpha - square) * (1.0 - MOMENTUM_OF_SQUARES)
    alpha = alpha - rate * average / (torch.sqrt(square) * correction + EPSILON)
    grid = RoundingGrid(base, scale, zero_point, low, high)
    return alpha, average, square, soft_integers(alpha, grid, hardness) * scale


def rounding_step(
    grad: Tensor, state: RoundingState, grid: RoundingGrid, step: RoundingStep
) -> tuple[RoundingState, Tensor]:
    """Do one step of Adam on alpha, for the gradient of a loss and that of the regularizer.

    Whatever the hardness, the gradient is that of soft rounding.

    Args:
        grad: Gradient of the loss with respect to the weights, shape [N].
        state: State before.
        grid: Grid of each weight.
        step: Numbers of the step.

    Returns:
        State afterwards, and the weights for it, shape [N].
    """
    tensors = (grad, *state, *grid, *step)
    if compiled.usable(grad, 1):
        shapes = (*[_EXAMPLE] * 9, *[()] * 5)
        result = compiled.run(_step_formula, shapes, grad.numel() * _OPERATIONS, *tensors)
        if result is not None:
            return RoundingState(*result[:3]), result[3]
    result = _step_formula(*tensors)
    return RoundingState(*result[:3]), result[3]
