"""Fake quantization: the choice between the eager and the compiled formula, and the gradient."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from . import chunked, compiled, reference
from .compiled import Shapes
from .layout import channel_view, is_dense

MIN_NUMEL = 2**14
"""Smaller tensors are quicker in eager (measured on CPU)."""

_OPERATIONS = 8
"""Elementwise operations in a formula."""

_EXAMPLES: dict[str, Shapes] = {
    'flat': ((2**20,), (1,), (1,), (), ()),
    'first': ((64, 4608), (64,), (64,), (), ()),
    'last': ((4608, 64), (64,), (64,), (), ()),
    'middle': ((32, 64, 784), (64,), (64,), (), ()),
}
"""Example shapes by layout: of the tensor, of scale and zero point, of the bounds."""

Spec = tuple[int, int, int]
"""quant_min, quant_max, ch_axis."""


@contextlib.contextmanager
def eager_mode() -> Iterator[None]:
    """Use the eager formulas inside this context, in all threads."""
    before, compiled.switch.on = compiled.switch.on, False
    try:
        yield
    finally:
        compiled.switch.on = before


def _forward_before_last(x: Tensor, scale: Tensor, zero_point: Tensor, low: Tensor, high: Tensor) -> Tensor:
    return reference.forward_formula(x, scale.unsqueeze(1), zero_point.unsqueeze(1), low, high)


def _backward_before_last(
    grad: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor, low: Tensor, high: Tensor
) -> Tensor:
    return reference.backward_formula(grad, x, scale.unsqueeze(1), zero_point.unsqueeze(1), low, high)


def layout_of(values: list[Tensor], scale: Tensor, ch_axis: int) -> tuple[str, list[Tensor], Shapes] | None:
    """Arrange tensors for a compiled formula.

    Args:
        values: One or two dense tensors of equal shape and strides.
        scale: Shape [1] or [C].
        ch_axis: Dimension of the channels; -1: per tensor.

    Returns:
        Where the channels are in the views (``flat`` for one scale; ``first``, ``last`` or ``middle``), the views in
        memory order, and example shapes of views and parameters. None where scale and tensor do not belong together:
        the eager formula has the message.
    """
    x = values[0]
    if scale.numel() == 1:
        layout, views = 'flat', [v.as_strided((v.numel(),), (1,)) for v in values]
    elif scale.shape != (x.shape[ch_axis],):
        return None
    else:
        views = [channel_view(v, ch_axis) for v in values]
        layout = 'middle' if views[0].dim() == 3 else 'last' if x.stride(ch_axis) == 1 else 'first'
    shapes = _EXAMPLES[layout]
    return layout, views, shapes[:1] * len(views) + shapes[1:]


def _run(
    plain: Callable[..., Tensor], before_last: Callable[..., Tensor], values: list[Tensor], params: list, ch_axis: int
) -> Tensor | None:
    """Run a compiled formula on views in memory order.

    Args:
        plain: Formula for channels in the last dimension of a view, or for one value of scale.
        before_last: Formula for channels in the dimension before the last one.
        values: One or two dense tensors of equal shape and strides.
        params: scale, zero_point and the bounds.
        ch_axis: Dimension of the channels; -1: per tensor.

    Returns:
        Shape and strides of the values; None if there is no compiled code for them (yet).
    """
    x = values[0]
    found = layout_of(values, params[0], ch_axis)
    if found is None:
        return None
    layout, views, shapes = found
    function = before_last if layout in ('first', 'middle') else plain
    if layout == 'flat':
        params = [*(p.reshape(1) for p in params[:2]), *params[2:]]
    result = compiled.run(function, shapes, x.numel() * _OPERATIONS, *views, *params)
    # Changed in place: a view made here could not be modified in place by the caller (an in-place ReLU, say).
    return result if result is None else result.as_strided_(x.shape, x.stride())


def run_forward(x: Tensor, scale: Tensor, zero_point: Tensor, spec: Spec) -> Tensor:
    """Compute :func:`fake_quantize` without its gradient."""
    quant_min, quant_max, ch_axis = spec
    low, high = reference.bounds(quant_min, quant_max, x.dtype, x.device)
    if compiled.usable(x, MIN_NUMEL) and is_dense(x):
        params = [scale, zero_point, low, high]
        result = _run(reference.forward_formula, _forward_before_last, [x], params, ch_axis)
        if result is not None:
            return result
    if chunked.usable([x], scale):
        return chunked.forward(x, scale, zero_point, low, high)
    return reference.forward_formula(x, *reference.broadcastable(x, scale, zero_point, ch_axis), low, high)


def _backward(grad: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor, spec: Spec) -> Tensor:
    quant_min, quant_max, ch_axis = spec
    low, high = reference.bounds(quant_min, quant_max, x.dtype, x.device)
    # Under create_graph the gradient has to be differentiable itself, which the eager formula is.
    if compiled.usable(x, MIN_NUMEL) and is_dense(x) and not torch.is_grad_enabled():
        if grad.stride() != x.stride():
            grad = torch.empty_like(x, dtype=grad.dtype).copy_(grad)
        params = [scale, zero_point, low, high]
        result = _run(reference.backward_formula, _backward_before_last, [grad, x], params, ch_axis)
        if result is not None:
            return result
    if chunked.usable([grad, x], scale) and not torch.is_grad_enabled():
        return chunked.backward(grad, x, scale, zero_point, low, high)
    return reference.backward_formula(grad, x, *reference.broadcastable(x, scale, zero_point, ch_axis), low, high)


class _FakeQuantize(torch.autograd.Function):
    """Fake quantization with the straight-through gradient; keeps only the input and the small parameters."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, spec: Spec) -> Tensor:
        ctx.save_for_backward(x, scale, zero_point)
        ctx.spec = spec
        return run_forward(x, scale, zero_point, spec)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _backward(grad, *ctx.saved_tensors, ctx.spec), None, None, None


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
