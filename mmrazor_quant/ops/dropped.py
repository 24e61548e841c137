"""Fake quantization with a learned step that leaves a random part of the elements as they are (Wei et al. 2022)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import compiled, elementwise, reference
from .dispatch import MIN_NUMEL, Spec, like_strided
from .layout import is_dense
from .learned_reference import Terms, reduced, step_terms
from .qparams import effective_scale, gradient_of_scale

_OPERATIONS = 20
"""Elementwise operations in a formula."""


def dropped_formula(
    x: Tensor, kept: Tensor, scale: Tensor, inverse: Tensor, zero_point: Tensor, low: Tensor, high: Tensor
) -> Tensor:
    """Give ``x`` where it is kept and its fake-quantized value elsewhere; see :class:`.reference.Grid`."""
    return torch.where(kept, x, reference.forward_formula(x, scale, inverse, zero_point, low, high))


def dropped_terms(
    grad: Tensor, x: Tensor, kept: Tensor, scale: Tensor, inverse: Tensor, zero_point: Tensor, low: Tensor, high: Tensor
) -> Terms:
    """Gradients of :func:`dropped_formula`: those of a learned step where ``x`` was quantized, else the identity's.

    Args:
        grad: Gradient of the result.
        x: Values.
        kept: Boolean, shape of ``x``.
        scale: See :class:`.reference.Grid`, and so the others.
        inverse: ``1 / scale``.
        zero_point: Integer of value zero.
        low: Lowest integer.
        high: Highest integer.

    Returns:
        As :func:`.learned_reference.step_terms`.
    """
    inner, (of_scale,) = step_terms(grad, x, scale, inverse, zero_point, low, high)
    return torch.where(kept, grad, inner), (torch.where(kept, torch.zeros_like(of_scale), of_scale),)


class _Dropped(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, kept: Tensor, spec: Spec, factor: float, is_pot: bool
    ):
        step = effective_scale(scale, is_pot)
        ctx.save_for_backward(x, scale, step, zero_point, kept)
        ctx.rest = spec, factor, is_pot
        grid = reference.make_grid(x, step, zero_point, spec[0], spec[1])
        if compiled.usable(x, MIN_NUMEL) and is_dense(x) and kept.stride() == x.stride():
            result = elementwise.run(dropped_formula, [x, kept], grid, spec[2], _OPERATIONS)
            if result is not None:
                return result
        return dropped_formula(x, kept, *reference.broadcast_grid(x, grid, spec[2]))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, step, zero_point, kept = ctx.saved_tensors
        spec, factor, is_pot = ctx.rest
        grid = reference.make_grid(x, step, zero_point, spec[0], spec[1])
        inner, of_step = _gradients(like_strided(grad, x), x, kept, grid, spec[2])
        return inner, gradient_of_scale(of_step, scale, step, factor, is_pot), None, None, None, None, None


def _gradients(grad: Tensor, x: Tensor, kept: Tensor, grid: reference.Grid, ch_axis: int) -> tuple[Tensor, Tensor]:
    if compiled.usable(x, MIN_NUMEL) and is_dense(x) and kept.stride() == x.stride():
        result = elementwise.run(dropped_terms, [grad, x, kept], grid, ch_axis, _OPERATIONS, has_terms=True)
        if result is not None:
            return result

    def terms(grad: Tensor, x: Tensor, *grid: Tensor) -> Terms:
        return dropped_terms(grad, x, kept, *grid)

    return reduced(terms, grad, x, grid, ch_axis)


def fake_quantize_dropped(
    x: Tensor, scale: Tensor, zero_point: Tensor, kept: Tensor, quant_min: int, quant_max: int, ch_axis: int = -1,
    grad_factor: float = 1.0, is_pot_scale: bool = False,
) -> Tensor:  # fmt: skip
    """Fake-quantize with a learned step, except for the elements that are kept (QDrop; Wei et al. 2022, eq. 10).

    Args:
        x: Floating-point values of any shape.
        scale: The learned step, shape [1] or [C].
        zero_point: Whole numbers, shape as ``scale``.
        kept: Boolean, shape of ``x``: which elements stay as they are.
        quant_min: Lowest integer.
        quant_max: Highest integer.
        ch_axis: Dimension of the channels; -1: per tensor.
        grad_factor: What the gradient of ``scale`` is multiplied with.
        is_pot_scale: Round the step to a power of two.

    Returns:
        Shape and type of ``x``, with gradients for ``x`` and ``scale``.
    """
    spec = (quant_min, quant_max, ch_axis)
    return _Dropped.apply(x, scale, zero_point, kept, spec, grad_factor, is_pot_scale)
