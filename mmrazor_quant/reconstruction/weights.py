"""The weights of a unit while their rounding is learned: all of them in one piece of memory."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mmrazor_quant.fake_quants import AdaRoundFakeQuantize
from mmrazor_quant.ops.rounding import (
    MOMENTUM,
    MOMENTUM_OF_SQUARES,
    RoundingGrid,
    RoundingState,
    RoundingStep,
    alpha_of,
    rounding_step,
    soft_rounding,
    soft_values,
)


@dataclass(frozen=True)
class Weight:
    """A weight to learn the rounding of.

    Args:
        quantizer: Its quantizer, calibrated.
        value: The float weight, with a batch norm folded in.
    """

    quantizer: AdaRoundFakeQuantize
    value: Tensor


class RoundedWeights:
    """The weights of soft rounding, which stand in for the quantized weights, and their optimizer.

    Args:
        weights: The weights of a unit.

    Attributes:
        grad: Gradient of the loss with respect to all values, shape [N]; to be set to 0 before each step.
    """

    def __init__(self, weights: list[Weight]) -> None:
        self.weights = weights
        grids = [_grid(weight) for weight in weights]
        self.grid = RoundingGrid(*(torch.cat(parts) for parts in zip(*(grid for grid, _ in grids))))
        alpha = alpha_of(torch.cat([rest for _, rest in grids]))
        self.state = RoundingState(alpha, torch.zeros_like(alpha), torch.zeros_like(alpha))
        self.values = soft_values(alpha, self.grid)
        self.grad = torch.zeros_like(alpha)
        self._steps = 0
        for weight, value, grad in zip(weights, self._split(self.values), self._split(self.grad)):
            leaf = value.detach().requires_grad_()
            leaf.grad = grad
            weight.quantizer.stand_in(leaf)

    def _split(self, flat: Tensor) -> list[Tensor]:
        parts = flat.split([weight.value.numel() for weight in self.weights])
        return [part.view(weight.value.shape) for part, weight in zip(parts, self.weights)]

    def step(self, rate: float, regularization: float, power: float) -> None:
        """Do a step of Adam with the gradients there are.

        Args:
            rate: Learning rate.
            regularization: Factor of the regularizer, 0 while it rests.
            power: Its exponent.
        """
        self._steps += 1
        numbers = (
            rate / (1.0 - MOMENTUM**self._steps), 1.0 / math.sqrt(1.0 - MOMENTUM_OF_SQUARES**self._steps),
            regularization, power,
        )  # fmt: skip
        step = RoundingStep(*(torch.tensor(n, dtype=self.grad.dtype, device=self.grad.device) for n in numbers))
        self.state, values = rounding_step(self.grad, self.state, self.grid, step)
        # In place: the stand-ins are views.
        self.values.copy_(values)

    def undecided(self) -> float:
        """Give the share of weights whose h is still between 0.05 and 0.95."""
        h = soft_rounding(self.state.alpha)
        return ((h - 0.5).abs() < 0.45).float().mean().item()

    def integers(self) -> list[Tensor]:
        """Give the integers of hard rounding, of the shape of each weight."""
        up = (soft_rounding(self.state.alpha) >= 0.5).to(self.grid.base.dtype)
        integers = torch.minimum(torch.maximum(self.grid.base + up, self.grid.low), self.grid.high)
        return self._split(integers)

    def finish(self) -> None:
        """Give the quantizers the integers of hard rounding."""
        for weight, integers in zip(self.weights, self.integers()):
            weight.quantizer.stand_in(None)
            weight.quantizer.set_integers(integers)


def _grid(weight: Weight) -> tuple[RoundingGrid, Tensor]:
    """Make the flat grid of a weight, and what rounding down leaves of its values, in steps."""
    quantizer, value = weight.quantizer, weight.value.float()
    shape = [1] * value.dim()
    if quantizer.scale.numel() > 1:
        shape[quantizer.ch_axis] = -1
    scale, zero_point = (
        p.float().reshape(shape).expand(value.shape).reshape(-1) for p in (quantizer.scale, quantizer.zero_point)
    )
    # As the formula of rounding to nearest does it: by the reciprocal.
    steps = value.reshape(-1) * (1.0 / scale)
    base = torch.floor(steps)
    low, high = (torch.full_like(steps, bound) for bound in (quantizer.quant_min, quantizer.quant_max))
    return RoundingGrid(base + zero_point, scale, zero_point, low, high), steps - base
