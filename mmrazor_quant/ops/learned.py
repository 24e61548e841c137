"""Fake quantization whose step, offset or clip range is learned: autograd functions, eager or compiled.

The forward is that of :mod:`.dispatch`; the gradients are those of :mod:`.learned_reference`. Parameters come as the
optimizer sees them: a step may be zero or negative, and is then used as the least allowed one, its gradient straight
through; with power-of-two scales it is rounded on the logarithmic scale, with the gradient of the identity there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import chunked, compiled, elementwise, learned_reference, reference
from .dispatch import Spec, like_strided, run_forward
from .layout import is_dense
from .learned_reference import Formula, Sums
from .qparams import effective_scale, gradient_of_scale
from .reference import Grid

MIN_NUMEL = 2**11
"""Gradients of smaller tensors are quicker in eager (measured on CPU)."""

_OPERATIONS = 20
"""Elementwise operations in a formula."""


def gradients(
    formula: Formula, grad: Tensor, x: Tensor, grid: Grid, ch_axis: int, *more: Tensor, min_numel: int = MIN_NUMEL
) -> Sums:
    """Compute the gradient of the input and the sums; see :func:`learned_reference.reduced`.

    Args:
        formula: One of :mod:`.learned_reference`.
        grad: Gradient of the result.
        x: Values.
        grid: Numbers of shape [1] or [C].
        ch_axis: Dimension of the channels; -1: per tensor.
        *more: What else the formula takes.
        min_numel: Smaller tensors are quicker in eager.

    Returns:
        Gradient of ``x``, and the sums, each of shape [1] or [C].
    """
    if torch.is_grad_enabled():  # under create_graph the gradient has to be differentiable itself
        return learned_reference.reduced(formula, grad, x, grid, ch_axis, *more)
    grad = like_strided(grad, x)
    if compiled.usable(x, min_numel) and is_dense(x):
        result = elementwise.run(formula, [grad, x], grid, ch_axis, _OPERATIONS, more, has_terms=True)
        if result is not None:
            return result
    if formula is learned_reference.step_terms and chunked.usable([grad, x], grid):
        return chunked.step(grad, x, grid)
    return learned_reference.reduced(formula, grad, x, grid, ch_axis, *more)


def _gradients(
    formula: Formula, grad: Tensor, x: Tensor, scale: Tensor, shift: Tensor, spec: Spec, *more: Tensor
) -> Sums:
    quant_min, quant_max, ch_axis = spec
    return gradients(formula, grad, x, reference.make_grid(x, scale, shift, quant_min, quant_max), ch_axis, *more)


class _LearnedStep(torch.autograd.Function):
    """Gradients of :func:`learned_reference.step_terms`, that of the scale times a factor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, spec: Spec, factor: float, is_pot: bool):
        step = effective_scale(scale, is_pot)
        ctx.save_for_backward(x, scale, step, zero_point)
        ctx.rest = spec, factor, is_pot
        return run_forward(x, step, zero_point, spec)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, step, zero_point = ctx.saved_tensors
        spec, factor, is_pot = ctx.rest
        step = _derivable(step, scale)
        inner, of_step = _gradients(learned_reference.step_terms, grad, x, step, zero_point, spec)
        return inner, gradient_of_scale(of_step, scale, step, factor, is_pot), None, None, None, None


class _LearnedOffset(torch.autograd.Function):
    """Gradients of :func:`learned_reference.offset_terms`, those of scale and offset times a factor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, offset: Tensor, spec: Spec, factor: float, is_pot: bool):
        step = effective_scale(scale, is_pot)
        ctx.save_for_backward(x, scale, step, offset)
        ctx.rest = spec, factor, is_pot
        return run_forward(x, step, offset, spec, reference.shifted_formula)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, step, offset = ctx.saved_tensors
        spec, factor, is_pot = ctx.rest
        step = _derivable(step, scale)
        inner, of_step, of_offset = _gradients(learned_reference.offset_terms, grad, x, step, offset, spec)
        of_offset = (of_offset * factor).to(offset.dtype)
        return inner, gradient_of_scale(of_step, scale, step, factor, is_pot), of_offset, None, None, None


class _LearnedClip(torch.autograd.Function):
    """Gradients of :func:`learned_reference.clip_terms`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, low: Tensor, high: Tensor, scale: Tensor, zero_point: Tensor, spec: Spec):
        ctx.save_for_backward(x, scale, zero_point)
        ctx.spec = spec
        return run_forward(x, scale, zero_point, spec)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, zero_point = ctx.saved_tensors
        inner, below, above = _gradients(learned_reference.clip_terms, grad, x, scale, zero_point, ctx.spec)
        return inner, below.to(scale.dtype), above.to(scale.dtype), None, None, None


class _Soft(torch.autograd.Function):
    """Gradients of :func:`learned_reference.soft_terms`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, low: Tensor, high: Tensor, alpha: Tensor, scale: Tensor, zero_point: Tensor, spec: Spec
    ):
        ctx.save_for_backward(x, scale, zero_point, alpha)
        ctx.spec = spec
        return run_forward(x, scale, zero_point, spec)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, zero_point, alpha = ctx.saved_tensors
        inner, *sums = _gradients(learned_reference.soft_terms, grad, x, scale, zero_point, ctx.spec, alpha)
        of_alpha, below, above = (s.to(scale.dtype) for s in sums)
        return inner, below, above, of_alpha, None, None, None


class _Unused(torch.autograd.Function):
    """The identity, with a gradient of zero for parameters that this call does not need."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *params: Tensor) -> Tensor:
        ctx.save_for_backward(*params)
        # No view, which could not be modified in place by what follows.
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return grad, *[torch.zeros_like(p) for p in ctx.saved_tensors]


def _derivable(step: Tensor, scale: Tensor) -> Tensor:
    """Give the step in use; where gradients of gradients are asked for, as a function of the parameter."""
    return step + (scale - scale.detach()) if torch.is_grad_enabled() else step


def fake_quantize_learned(
    x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int, ch_axis: int = -1,
    grad_factor: float = 1.0, is_pot_scale: bool = False,
) -> Tensor:  # fmt: skip
    """Quantize and dequantize with a learned step (LSQ; Esser et al. 2020).

    Args:
        x: Floating-point values of any shape.
        scale: The learned step, shape [1] or [C].
        zero_point: Whole numbers, shape as ``scale``.
        quant_min: Lowest integer.
        quant_max: Highest integer.
        ch_axis: Dimension of the channels; -1: per tensor.
        grad_factor: What the gradient of ``scale`` is multiplied with (g of the paper).
        is_pot_scale: Round the step to a power of two.

    Returns:
        As :func:`fake_quantize`; with a gradient for ``scale`` too.
    """
    return _LearnedStep.apply(x, scale, zero_point, (quant_min, quant_max, ch_axis), grad_factor, is_pot_scale)


def fake_quantize_offset(
    x: Tensor, scale: Tensor, offset: Tensor, quant_min: int, quant_max: int, ch_axis: int = -1,
    grad_factor: float = 1.0, is_pot_scale: bool = False,
) -> Tensor:  # fmt: skip
    """Quantize and dequantize with a learned step and a learned offset (LSQ+; Bhalgat et al. 2020, eq. 1 and 2).

    Args:
        x: Floating-point values of any shape.
        scale: The learned step, shape [1] or [C].
        offset: The value that integer 0 stands for, floating point, shape as ``scale``; not rounded to the grid.
        quant_min: Lowest integer.
        quant_max: Highest integer.
        ch_axis: Dimension of the channels; -1: per tensor.
        grad_factor: What the gradients of ``scale`` and ``offset`` are multiplied with.
        is_pot_scale: Round the step to a power of two.

    Returns:
        ``clamp(round((x - offset) * (1 / scale)), quant_min, quant_max) * scale + offset`` in shape, memory format
        and type of ``x``, with gradients for all three.
    """
    return _LearnedOffset.apply(x, scale, offset, (quant_min, quant_max, ch_axis), grad_factor, is_pot_scale)


def fake_quantize_clip(
    x: Tensor, low: Tensor, high: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int,
    ch_axis: int = -1,
) -> Tensor:  # fmt: skip
    """Quantize and dequantize with a learned clip range (PACT; Choi et al. 2018).

    Args:
        x: Floating-point values of any shape.
        low: Lower end of the range, shape [1] or [C]; only for its gradient.
        high: Upper end, likewise.
        scale: Positive, computed from the range, shape as ``low``.
        zero_point: Whole numbers, shape as ``low``.
        quant_min: Lowest integer.
        quant_max: Highest integer.
        ch_axis: Dimension of the channels; -1: per tensor.

    Returns:
        As :func:`fake_quantize`; the gradient of ``low`` is the sum over the elements below the range, that of
        ``high`` the one over those above it.
    """
    return _LearnedClip.apply(x, low, high, scale, zero_point, (quant_min, quant_max, ch_axis))


def fake_quantize_soft(
    x: Tensor, low: Tensor, high: Tensor, alpha: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int,
    quant_max: int, ch_axis: int = -1,
) -> Tensor:  # fmt: skip
    """Quantize and dequantize, with the gradient of a soft staircase (DSQ; Gong et al. 2019).

    Args:
        x: Floating-point values of any shape.
        low: Lower end of the range, shape [1] or [C]; only for its gradient.
        high: Upper end, likewise.
        alpha: In (0, 1), shape as ``low``: distance of the soft staircase to the hard one.
        scale: Positive, computed from the range, shape as ``low``.
        zero_point: Whole numbers, shape as ``low``.
        quant_min: Lowest integer.
        quant_max: Highest integer.
        ch_axis: Dimension of the channels; -1: per tensor.

    Returns:
        As :func:`fake_quantize`, with gradients for ``x``, ``low``, ``high`` and ``alpha``.
    """
    return _Soft.apply(x, low, high, alpha, scale, zero_point, (quant_min, quant_max, ch_axis))


def unused(x: Tensor, *params: Tensor) -> Tensor:
    """Pass a tensor on, and give parameters that it does not depend on a gradient of zero.

    Data-parallel training waits for the gradient of every parameter in every step.

    Args:
        x: Any tensor.
        *params: Parameters.

    Returns:
        A copy of ``x``.
    """
    return _Unused.apply(x, *params)
