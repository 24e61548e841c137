"""Fake quantization of a weight that a batch norm is folded into and taken out of again, without the two copies.

Folding multiplies each channel by a factor f, and a scale s quantizes the product; divided by f again, that is
quantization with the scale s / f, which may be negative. So the weight itself is quantized, with other scales.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import compiled, elementwise
from .dispatch import Spec, run_backward
from .layout import channel_view, is_dense
from .learned import gradients
from .learned_reference import step_terms
from .qparams import effective_scale, gradient_of_scale
from .reference import Grid, bounds, broadcast_grid, forward_formula

MIN_NUMEL = 2**9
"""Smaller weights are quicker in eager (measured on CPU)."""

_OPERATIONS = 20
"""Elementwise operations in a formula."""

_CALL = 2**16
"""What the numbers of the channels cost one by one, in elements times operations."""

_PER_CHANNEL = ((64, 4608), (64,), (64,), (64,), (), ())
_PER_TENSOR = ((64, 4608), (1,), (1,), (64,), (), ())
"""Example shapes."""


def folded_grid(x: Tensor, scale: Tensor, zero_point: Tensor, factor: Tensor, spec: Spec) -> Grid:
    """Make the grid of scales s / f; 0, and so is its inverse, in channels of factor 0.

    Args:
        x: Weight.
        scale: Shape [1] or [C].
        zero_point: Shape of ``scale``.
        factor: Shape [C].
        spec: Range of integers and dimension of the channels.

    Returns:
        Numbers of shape [C].
    """
    low, high = bounds(spec[0], spec[1], x.dtype, x.device)
    scale, factor = scale.to(low.dtype), factor.to(low.dtype)
    used = factor != 0
    own = torch.where(used, scale / factor, 0.0)
    return Grid(own, factor / scale, zero_point.to(low.dtype).expand(own.shape).contiguous(), low, high)


def folded_formula(x: Tensor, scale: Tensor, inverse: Tensor, zero_point: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Compute :func:`.reference.forward_formula`, and leave channels as they are whose scale is 0."""
    return torch.where(scale == 0, x, forward_formula(x, scale, inverse, zero_point, low, high))


def _fold(
    x: Tensor, scale: Tensor, zero_point: Tensor, factor: Tensor, spec: Spec, is_pot: bool
) -> tuple[Tensor, Tensor, Grid]:
    """Give the quantized weight, the scale in use, and the grid."""
    may_compile = compiled.usable(x, MIN_NUMEL) and is_dense(x)
    found = _fold_rows(x, scale, zero_point, factor, spec) if may_compile and not is_pot else None
    if found is not None:
        return found
    step = effective_scale(scale, is_pot)
    grid = folded_grid(x, step, zero_point, factor, spec)
    result = elementwise.run(folded_formula, [x], grid, spec[2], _OPERATIONS) if may_compile else None
    return folded_formula(x, *broadcast_grid(x, grid, spec[2])) if result is None else result, step, grid


def _fold_rows(
    x: Tensor, scale: Tensor, zero_point: Tensor, factor: Tensor, spec: Spec
) -> tuple[Tensor, Tensor, Grid] | None:
    """Give the same, numbers of the channels included, in one compiled call; for channels that are rows of memory."""
    inner = x.stride(spec[2])
    if inner == 1 or inner == x.numel() or inner * x.shape[spec[2]] != x.numel():
        return None
    low, high = bounds(spec[0], spec[1], x.dtype, x.device)
    tensors = (channel_view(x, spec[2]), scale.detach(), zero_point, factor, low, high)
    if any(t.dtype != torch.float32 for t in (x, scale, factor, low)):
        return None
    shapes = _PER_TENSOR if scale.numel() == 1 else _PER_CHANNEL
    found = compiled.run(_rows_formula, shapes, x.numel() * _OPERATIONS + _CALL, *tensors)
    if found is None:
        return None
    result, step, *numbers = found
    return result.as_strided_(x.shape, x.stride()), step, Grid(*numbers, low, high)


def _rows_formula(
    x: Tensor, scale: Tensor, zero_point: Tensor, factor: Tensor, low: Tensor, high: Tensor
) -> tuple[Tensor, ...]:
    step = effective_scale(scale)
    own = torch.where(factor != 0, step / factor, 0.0)
    grid = own, factor / step, zero_point.to(x.dtype).expand(own.shape)
    return folded_formula(x, *(p.unsqueeze(1) for p in grid), low, high), step, *(p.clone() for p in grid)


class _Folded(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, factor: Tensor, spec: Spec, grad_factor: float,
        is_pot: bool,
    ):  # fmt: skip
        result, step, grid = _fold(x, scale, zero_point, factor, spec, is_pot)
        ctx.save_for_backward(x, scale, step, *grid)
        ctx.rest = spec, grad_factor, is_pot
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, step, *numbers = ctx.saved_tensors
        spec, grad_factor, is_pot = ctx.rest
        grid, nothing = Grid(*numbers), (None,) * 5
        if not ctx.needs_input_grad[1]:
            return run_backward(grad, x, grid, spec[2], MIN_NUMEL), None, *nothing
        inner, of_own = gradients(step_terms, grad, x, grid, spec[2], min_numel=MIN_NUMEL)
        # d own / d step = 1 / f = own / step
        of_step = of_own * (grid.scale / step)
        of_step = of_step.sum().reshape(1) if scale.numel() == 1 else of_step
        return inner, gradient_of_scale(of_step, scale, step, grad_factor, is_pot), *nothing


def fake_quantize_folded(
    x: Tensor, scale: Tensor, zero_point: Tensor, factor: Tensor, quant_min: int, quant_max: int, ch_axis: int,
    grad_factor: float = 1.0, is_pot_scale: bool = False,
) -> Tensor:  # fmt: skip
    """Fake-quantize ``x * factor`` and divide the result by ``factor``.

    Args:
        x: Weight of any shape.
        scale: Scale of the product, shape [1] or [C]; a learned one if it requires a gradient.
        zero_point: Whole numbers, shape as ``scale``.
        factor: Shape [C]; has no gradient. Channels of factor 0 stay as they are.
        quant_min: Lowest integer.
        quant_max: Highest integer.
        ch_axis: Dimension of the channels.
        grad_factor: What the gradient of ``scale`` is multiplied with.
        is_pot_scale: Round the scale to a power of two.

    Returns:
        Shape and type of ``x``, with straight-through gradient and, for ``scale``, that of
        :func:`fake_quantize_learned`.
    """
    spec = (quant_min, quant_max, ch_axis)
    return _Folded.apply(x, scale, zero_point, factor, spec, grad_factor, is_pot_scale)
