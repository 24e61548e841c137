"""What a config says about a reconstruction, and what follows for each iteration."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple


class Schedule(NamedTuple):
    """The numbers of one iteration.

    Args:
        rate: Learning rate of the rounding.
        act_rate: Learning rate of the activations' steps.
        regularization: Factor of the regularizer.
        power: Its exponent.
    """

    rate: float
    act_rate: float
    regularization: float
    power: float


@dataclass
class Settings:
    granularity: str = 'block'
    iters: int = 300
    batch_size: int = 32
    lr: float = 1e-2
    act_lr: float = 0.0
    drop_prob: float = 0.0
    regularization: float = 1e-2
    warmup: float = 0.2
    powers: tuple[float, float] = (20.0, 2.0)
    lr_end: float = 1.0

    def schedule(self, iteration: int) -> Schedule:
        """Give the numbers of an iteration."""
        done = (iteration + 1) / self.iters
        fall = 0.5 * (1.0 + math.cos(math.pi * done))
        annealed = max(0.0, (done - self.warmup) / max(1.0 - self.warmup, 1e-9))
        start, end = self.powers
        return Schedule(
            self.lr * (self.lr_end + (1.0 - self.lr_end) * fall),
            self.act_lr * fall,
            self.regularization if done > self.warmup else 0.0,
            start + (end - start) * annealed,
        )
