"""Fake quantization: the choice between the eager and the compiled formula, and the gradient."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from . import chunked, compiled, elementwise, reference
from .layout import is_dense

MIN_NUMEL = 2**14
"""Smaller tensors are quicker in eager (measured on CPU)."""

_OPERATIONS = 8
"""Elementwise operations in a formula."""

Spec = tuple[int, int, int]
"""quant_min, quant_max, ch_axis."""

Formula = Callable[..., Tensor]

FORWARD = reference.forward_formula


@contextlib.contextmanager
def eager_mode() -> Iterator[None]:
    """Use the eager formulas inside this context, in all threads."""
    before, compiled.switch.on = compiled.switch.on, False
    try:
        yield
    finally:
        compiled.switch.on = before


def run_forward(x: Tensor, scale: Tensor, shift: Tensor, spec: Spec, formula: Formula = FORWARD) -> Tensor:
    """Compute a formula without gradients.

    Args:
        x: Values of any shape.
        scale: Shape [1] or [C].
        shift: Zero point, or offset, shape as ``scale``.
        spec: Range of integers and dimension of the channels.
        formula: :func:`.reference.forward_formula` or :func:`.reference.shifted_formula`.

    Returns:
        Shape, memory format and type of ``x``.
    """
    quant_min, quant_max, ch_axis = spec
    grid = reference.make_grid(x, scale, shift, quant_min, quant_max)
    if compiled.usable(x, MIN_NUMEL) and is_dense(x):
        result = elementwise.run(formula, [x], grid, ch_axis, _OPERATIONS)
        if result is not None:
            return result
    if formula is FORWARD and chunked.usable([x], grid):
        return chunked.forward(x, grid)
    return formula(x, *reference.broadcast_grid(x, grid, ch_axis))


def run_backward(grad: Tensor, x: Tensor, grid: reference.Grid, ch_axis: int, min_numel: int = MIN_NUMEL) -> Tensor:
    """Compute :func:`.reference.backward_formula`.

    Args:
        grad: Gradient of the result.
        x: Values of any shape.
        grid: Numbers of shape [1] or [C].
        ch_axis: Dimension of the channels; -1: per tensor.
        min_numel: Smaller tensors are quicker in eager.

    Returns:
        Gradient of ``x``.
    """
    # Under create_graph the gradient has to be differentiable itself, which the eager formula is.
    if not torch.is_grad_enabled():
        grad = like_strided(grad, x)
        if compiled.usable(x, min_numel) and is_dense(x):
            result = elementwise.run(reference.backward_formula, [grad, x], grid, ch_axis, _OPERATIONS)
            if result is not None:
                return result
        if chunked.usable([grad, x], grid):
            return chunked.backward(grad, x, grid)
    return reference.backward_formula(grad, x, *reference.broadcast_grid(x, grid, ch_axis))


def like_strided(grad: Tensor, x: Tensor) -> Tensor:
    """Give a gradient the strides of a dense tensor of its shape; it is not changed."""
    if grad.stride() == x.stride() or not is_dense(x):
        return grad
    return torch.empty_like(x, dtype=grad.dtype).copy_(grad)


class _FakeQuantize(torch.autograd.Function):
    """Fake quantization with the straight-through gradient; keeps only the input and the small parameters."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, spec: Spec) -> Tensor:
        ctx.save_for_backward(x, scale, zero_point)
        ctx.spec = spec
        return run_forward(x, scale, zero_point, spec)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, zero_point = ctx.saved_tensors
        quant_min, quant_max, ch_axis = ctx.spec
        grid = reference.make_grid(x, scale, zero_point, quant_min, quant_max)
        return run_backward(grad, x, grid, ch_axis), None, None, None


def fake_quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int, ch_axis: int = -1
) -> Tensor:
    """Quantize and dequantize.

    Bit-equal to ``torch.fake_quantize_per_{tensor,channel}_affine`` where those take the range and its integers are
    exact in float32; beyond (more than 24 bits) computed in float64, so that the result is as good as float32 allows.
    Half types are computed in float32. NaN stays NaN.

    Args:
        x: Floating-point values of any shape.
        scale: Positive, shape [1] or [C].
        zero_point: Whole numbers, shape as ``scale``.
        quant_min: Lowest integer.
        quant_max: Highest integer.
        ch_axis: Dimension of the channels; -1: per tensor.

    Returns:
        ``(clamp(round(x * (1 / scale)) + zero_point, quant_min, quant_max) - zero_point) * scale`` in shape, memory
        format and type of ``x``. Its gradient with respect to ``x`` is 1 where the clip changed nothing and 0
        elsewhere (the straight-through estimator); there is none with respect to the parameters.
    """
    spec = (quant_min, quant_max, ch_axis)
    if torch.is_grad_enabled():
        if x.requires_grad:
            return _FakeQuantize.apply(x, scale, zero_point, spec)
        with torch.no_grad():
            return run_forward(x, scale, zero_point, spec)
    return run_forward(x, scale, zero_point, spec)
