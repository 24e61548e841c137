"""Adam for a few parameters in one tensor."""

from __future__ import annotations

import torch
from torch import Tensor

from mmrazor_quant.ops.rounding import MOMENTUM, MOMENTUM_OF_SQUARES


class FlatAdam:
    """Adam (Kingma and Ba 2015).

    Args:
        values: Start values, shape [N].
    """

    def __init__(self, values: Tensor) -> None:
        self.values = values
        self._average, self._square = torch.zeros_like(values), torch.zeros_like(values)
        self._steps = 0

    def step(self, grad: Tensor, rate: float) -> Tensor:
        """Do a step.

        Args:
            grad: Gradient, shape [N].
            rate: Learning rate.

        Returns:
            The values afterwards.
        """
        self._steps += 1
        self._average.lerp_(grad, 1.0 - MOMENTUM)
        self._square.lerp_(grad * grad, 1.0 - MOMENTUM_OF_SQUARES)
        average = self._average / (1.0 - MOMENTUM**self._steps)
        square = self._square / (1.0 - MOMENTUM_OF_SQUARES**self._steps)
        self.values = self.values - rate * average / (square.sqrt() + 1e-12)
        return self.values
