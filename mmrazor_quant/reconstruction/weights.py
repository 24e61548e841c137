"""The weights of a unit while their rounding is learned: all of them in one piece of memory."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mmrazor_quant.fake_quants import AdaRoundFakeQuantize
from mmrazor_quant.ops.layout import channel_rows
from mmrazor_quant.ops.rounding import (
    MOMENTUM,
    MOMENTUM_OF_SQUARES,
    RoundingGrid,
    RoundingState,
    RoundingStep,
    alpha_of,
    rounding_step,
    soft_integers,
    soft_rounding,
)

from .adam import FlatAdam


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
        self.values = soft_integers(alpha, self.grid) * self.grid.scale
        self.grad = torch.zeros_like(alpha)
        self._steps = 0
        self._scales: FlatAdam | None = None
        self._first_scale = self.grid.scale.clone()
        self._factors: tuple[Tensor, ...] = ()
        for weight, value, grad in zip(weights, self._split(self.values), self._split(self.grad)):
            leaf = value.detach().requires_grad_()
            leaf.grad = grad
            weight.quantizer.stand_in(leaf)

    def _split(self, flat: Tensor) -> list[Tensor]:
        parts = flat.split([weight.value.numel() for weight in self.weights])
        return [part.view(weight.value.shape) for part, weight in zip(parts, self.weights)]

    def step(self, rate: float, regularization: float, power: float, hardness: float, scale_rate: float) -> None:
        """Do a step of Adam with the gradients there are.

        Args:
            rate: Learning rate.
            regularization: Factor of the regularizer, 0 while it rests.
            power: Its exponent.
            hardness: How far weights are from soft towards hard rounding.
            scale_rate: Learning rate of the scales, relative to them.
        """
        self._steps += 1
        if scale_rate > 0:
            self._step_scales(scale_rate)
        numbers = (
            rate / (1.0 - MOMENTUM**self._steps), 1.0 / math.sqrt(1.0 - MOMENTUM_OF_SQUARES**self._steps),
            regularization, power, hardness,
        )  # fmt: skip
        step = RoundingStep(*(torch.tensor(n, dtype=self.grad.dtype, device=self.grad.device) for n in numbers))
        self.state, values = rounding_step(self.grad, self.state, self.grid, step)
        # In place: the stand-ins are views.
        self.values.copy_(values)

    def _step_scales(self, rate: float) -> None:
        """Do a step of Adam on the logarithms of all scales, whose gradients are sums of gradient times value."""
        products = self._split(self.grad * self.values)
        grad = torch.cat([_rows(p, w.quantizer).sum(1) for p, w in zip(products, self.weights)])
        if self._scales is None:
            self._scales = FlatAdam(torch.zeros_like(grad))
        factors = torch.exp(self._scales.step(grad, rate))
        parts = factors.split([w.quantizer.scale.numel() for w in self.weights])
        for target, start, part, weight in zip(
            self._split(self.grid.scale), self._split(self._first_scale), parts, self.weights
        ):
            torch.mul(start, _shaped(part, target, weight.quantizer), out=target)
        self._factors = parts

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
        for weight, factor in zip(self.weights, self._factors):
            weight.quantizer.scale.mul_(factor)


def _grid(weight: Weight) -> tuple[RoundingGrid, Tensor]:
    """Make the flat grid of a weight, and what rounding down leaves of its values, in steps."""
    quantizer, value = weight.quantizer, weight.value.float()
    scale, zero_point = (
        _shaped(p.float(), value, quantizer).expand(value.shape).reshape(-1).clone()
        for p in (quantizer.scale, quantizer.zero_point)
    )
    # As the formula of rounding to nearest does it: by the reciprocal.
    steps = value.reshape(-1) * (1.0 / scale)
    base = torch.floor(steps)
    low, high = (torch.full_like(steps, bound) for bound in (quantizer.quant_min, quantizer.quant_max))
    return RoundingGrid(base + zero_point, scale, zero_point, low, high), steps - base


def _shaped(per_channel: Tensor, value: Tensor, quantizer: AdaRoundFakeQuantize) -> Tensor:
    """Reshape a number for each channel, or one for all, to broadcast against the weight."""
    shape = [1] * value.dim()
    if per_channel.numel() > 1:
        shape[quantizer.ch_axis] = -1
    return per_channel.reshape(shape)


def _rows(value: Tensor, quantizer: AdaRoundFakeQuantize) -> Tensor:
    """Give a row for each scale."""
    return channel_rows(value, quantizer.ch_axis if quantizer.scale.numel() > 1 else -1)
