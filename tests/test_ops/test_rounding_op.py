"""One step of learned rounding against torch's own Adam on the formulas of the paper, in float64."""

from __future__ import annotations

import math

import pytest
import torch

from mmrazor_quant import ops
from mmrazor_quant.ops.rounding import (
    RoundingGrid,
    RoundingState,
    RoundingStep,
    alpha_of,
    rounding_step,
    soft_integers,
    soft_rounding,
)

COUNT = 1000


def make(dtype: torch.dtype) -> tuple[RoundingState, RoundingGrid, torch.Tensor]:
    """State, grid and gradient of weights on a grid of 2 bits, some of them clipped."""
    generator = torch.Generator().manual_seed(0)
    rest = torch.rand(COUNT, generator=generator, dtype=dtype)
    base = torch.randint(-2, 5, (COUNT,), generator=generator).to(dtype)
    scale = torch.rand(COUNT, generator=generator, dtype=dtype) + 0.1
    full = torch.ones(COUNT, dtype=dtype)
    grid = RoundingGrid(base, scale, full, 0 * full, 3 * full)
    zeros = torch.zeros(COUNT, dtype=dtype)
    grad = torch.randn(COUNT, generator=generator, dtype=dtype)
    return RoundingState(alpha_of(rest), zeros, zeros), grid, grad


def test_alpha_is_where_rounding_is_what_is_left():
    rest = torch.linspace(0, 0.999, 50, dtype=torch.float64)

    assert torch.allclose(soft_rounding(alpha_of(rest)), rest, atol=1e-12)


@pytest.mark.parametrize('hardness', [0.0, 0.3, 1.0])
def test_values_between_soft_and_hard(hardness):
    state, grid, _ = make(torch.float64)

    values = soft_integers(state.alpha, grid, hardness) + grid.zero_point

    h = soft_rounding(state.alpha)
    wanted = grid.base + (1 - hardness) * h + hardness * (h >= 0.5)
    assert torch.allclose(values, wanted.clamp(0, 3))


@pytest.mark.parametrize('power', [20.0, 2.0])
@pytest.mark.parametrize('weight', [0.0, 0.7])
def test_steps_are_those_of_adam_on_loss_and_regularizer(weight, power):
    state, grid, grad = make(torch.float64)
    alpha = state.alpha.clone().requires_grad_()
    optimizer = torch.optim.Adam([alpha], lr=0.05)

    for t in range(1, 5):
        optimizer.zero_grad()
        h = soft_rounding(alpha)
        weights = ((grid.base + h).clamp(0, 3) - grid.zero_point) * grid.scale
        loss = (grad * weights).sum() + weight * (1 - (2 * h - 1).abs() ** power).sum()
        loss.backward()
        optimizer.step()
        numbers = (0.05 / (1 - 0.9**t), 1 / math.sqrt(1 - 0.999**t), weight, power, 0.0)
        step = RoundingStep(*(torch.tensor(n, dtype=torch.float64) for n in numbers))
        state, values = rounding_step(grad, state, grid, step)

        assert torch.allclose(state.alpha, alpha.detach(), atol=1e-6)
        expected = ((grid.base + soft_rounding(alpha.detach())).clamp(0, 3) - grid.zero_point) * grid.scale
        assert torch.allclose(values, expected, atol=1e-6)


@pytest.mark.slow
def test_compiled_and_eager_steps_are_equal():
    state, grid, grad = make(torch.float32)
    numbers = RoundingStep(*(torch.tensor(n) for n in (0.02, 3.0, 0.01, 11.0, 0.5)))
    with ops.eager_mode():
        expected, values = rounding_step(grad, state, grid, numbers)

    with ops.immediate_mode():
        found, compiled_values = rounding_step(grad, state, grid, numbers)

    for one, other in zip((*found, compiled_values), (*expected, values)):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-5)
