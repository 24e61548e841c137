"""What a config says about a reconstruction, and what follows for each iteration."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from mmrazor_quant.graph.units import GRANULARITIES

_FEW = 300
"""Iterations up to which the defaults are those of a short run."""


class Schedule(NamedTuple):
    """The numbers of one iteration.

    Args:
        rate: Learning rate of the rounding.
        act_rate: Learning rate of the activations' steps.
        regularization: Factor of the regularizer.
        power: Its exponent.
        hardness: How far weights are from soft towards hard rounding.
        scale_rate: Learning rate of the weights' scales.
        drop: Share of the elements that are float.
    """

    rate: float
    act_rate: float
    regularization: float
    power: float
    hardness: float
    scale_rate: float
    drop: float

    def of_weights(self) -> tuple[float, ...]:
        """Give the numbers that a step of the weights takes."""
        return self.rate, self.regularization, self.power, self.hardness, self.scale_rate


@dataclass
class Settings:
    """How units are reconstructed. The methods differ in their defaults only.

    Args:
        granularity: What a unit is: ``'layer'``, ``'block'``, ``'stage'`` or ``'island'``.
        iters: Iterations for each unit.
        batch_size: Samples in an iteration.
        mirror: Learn from each image mirrored left to right, too. None: with more than 300 iterations, which would
            otherwise fit the few calibration images more closely and others no better.
        lr: Learning rate of the rounding, with Adam. None: 0.03 up to 300 iterations; beyond, it falls with the square
            root of their number.
        act_lr: Learning rate of activation steps, relative to each step, with Adam; 0: steps stay as calibrated. Only
            fake quantizers with a learned step, such as :class:`QDropFakeQuantize`, have it.
        scale_lr: Learning rate of the weights' scales, relative to each, with Adam; 0: they stay as calibrated.
        hardening: After the warm-up, weights go from soft to hard rounding in a straight line and reach it when
            this times the rest of the iterations is 1; 0: they stay soft until the end.
        drop_prob: Share of the elements, of a unit's input and of the activations in it, that are float in an iteration
            (QDrop), at the start.
        drop_end: The same at the end, which it goes to in a straight line; None: ``drop_prob``.
        regularization: Factor of the regularizer of the rounding, where the loss is relative to the targets' square.
        warmup: Part of the iterations before the regularizer sets in.
        powers: Its exponent, at the start and at the end.
        lr_end: What the learning rate of the rounding falls to, along a cosine, as a part of ``lr``.
        act_stage: ``'joint'``: steps and rounding are learned together; ``'after'``: steps afterwards, in further
            iterations of the same number.
        fisher: Weigh squared errors by the squared gradients of the task's loss (BRECQ); needs annotated data.
        cache_gib: Memory for cached activations in GiB; what is beyond it goes to files in the work directory. None: no
            limit.
        seed: Seed of everything random.

    Raises:
        ValueError: A value that is not allowed.
    """

    granularity: str = 'block'
    iters: int = 300
    batch_size: int = 32
    mirror: bool | None = None
    lr: float | None = None
    act_lr: float = 1e-3
    scale_lr: float = 0.0
    hardening: float = 1.0
    drop_prob: float = 0.0
    drop_end: float | None = None
    regularization: float = 1e-2
    warmup: float = 0.2
    powers: tuple[float, float] = (20.0, 2.0)
    lr_end: float = 0.0
    act_stage: str = 'joint'
    fisher: bool = False
    cache_gib: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        _check('granularity', self.granularity, self.granularity in GRANULARITIES, f'one of {GRANULARITIES}')
        for name in ('iters', 'batch_size'):
            value = getattr(self, name)
            _check(name, value, type(value) is int and value >= 1, 'an int >= 1')
        self.lr = 3e-2 * min(1.0, math.sqrt(_FEW / self.iters)) if self.lr is None else self.lr
        self.mirror = self.iters > _FEW if self.mirror is None else self.mirror
        for name in ('lr', 'act_lr', 'scale_lr', 'hardening', 'regularization', 'lr_end'):
            highest = 1 if name in ('act_lr', 'scale_lr', 'lr_end') else math.inf
            value = getattr(self, name)
            _check(name, value, _is_number(value) and 0 <= value <= highest, f'a number from 0 to {highest}')
        self.drop_end = self.drop_prob if self.drop_end is None else self.drop_end
        for name in ('drop_prob', 'drop_end', 'warmup'):
            value = getattr(self, name)
            _check(name, value, _is_number(value) and 0 <= value < 1, 'a number from 0 to less than 1')
        pair = isinstance(self.powers, (list, tuple)) and len(self.powers) == 2 and all(map(_is_number, self.powers))
        _check('powers', self.powers, pair and min(self.powers) >= 1, 'two numbers >= 1')
        self.powers = tuple(map(float, self.powers))
        _check('act_stage', self.act_stage, self.act_stage in ('joint', 'after'), "'joint' or 'after'")
        for name in ('mirror', 'fisher'):
            value = getattr(self, name)
            _check(name, value, type(value) is bool, 'True or False')
        unlimited = self.cache_gib is None
        _check('cache_gib', self.cache_gib, unlimited or (_is_number(self.cache_gib) and self.cache_gib >= 0), 'GiB')
        _check('seed', self.seed, type(self.seed) is int and self.seed >= 0, 'an int >= 0')

    @property
    def cache_bytes(self) -> int | None:
        """The memory for cached activations."""
        return None if self.cache_gib is None else int(self.cache_gib * 2**30)

    def describe(self) -> str:
        """Give the settings in a line."""
        return ', '.join(f'{field.name}={getattr(self, field.name)}' for field in fields(self))

    def schedule(self, iteration: int) -> Schedule:
        """Give the numbers of an iteration."""
        done = (iteration + 1) / self.iters
        fall = 0.5 * (1.0 + math.cos(math.pi * done))
        annealed = max(0.0, (done - self.warmup) / (1.0 - self.warmup))
        start, end = self.powers
        return Schedule(
            self.lr * (self.lr_end + (1.0 - self.lr_end) * fall),
            self.act_lr * fall,
            self.regularization if done > self.warmup else 0.0,
            start + (end - start) * annealed,
            min(1.0, self.hardening * annealed),
            self.scale_lr * fall,
            self.drop_prob + (self.drop_end - self.drop_prob) * done,
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _check(name: str, value: Any, fine: bool, allowed: str) -> None:
    if not fine:
        raise ValueError(f'reconstruction.{name}: got {value!r}, allowed: {allowed}')
