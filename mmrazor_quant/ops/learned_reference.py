"""Gradients of fake quantization whose parameters are learned: elementwise terms, and their sums in eager torch.

A formula maps one element to the gradient of the input and to the terms whose sums, over all elements that share a
parameter, are gradients of parameters. The compiled path runs the same formulas, with the sums in the same walk over
memory. With u = x / s, q = round(u) + z and d = clamp(q) - z, an element lies inside if the clamp left it alone.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .reference import Grid, broadcast_grid, broadcastable, integers

Terms = tuple[Tensor, tuple[Tensor, ...]]
"""Gradient of the input, and what is summed to gradients of the parameters."""

Formula = Callable[..., Terms]
"""``formula(grad, x, *grid, *more)``, parameters broadcastable."""

Sums = tuple[Tensor, ...]
"""Gradient of the input, and those of the parameters."""


def step_terms(
    grad: Tensor, x: Tensor, scale: Tensor, inverse: Tensor, zero_point: Tensor, low: Tensor, high: Tensor
) -> Terms:
    """Gradients for a learned step (Esser et al. 2020, eq. 3 and 5, with a zero point).

    Args:
        grad: Gradient of the result, shape and type of ``x``.
        x: Values.
        scale: See :class:`.reference.Grid`, and so the others; not needed.
        inverse: ``1 / scale``.
        zero_point: Integer of value zero.
        low: Lowest integer.
        high: Highest integer.

    Returns:
        ``grad`` inside and 0 outside; and for the scale ``grad * (d - u)`` inside, ``grad * d`` outside.
    """
    u = x.to(low.dtype) * inverse
    q = torch.round(u) + zero_point
    d = torch.clamp(q, low, high)
    inside = q == d
    of_scale = grad.to(low.dtype) * (d - zero_point - torch.where(inside, u, 0.0))
    return grad * inside, (of_scale,)


def offset_terms(
    grad: Tensor, x: Tensor, scale: Tensor, inverse: Tensor, offset: Tensor, low: Tensor, high: Tensor
) -> Terms:
    """Gradients for a learned step and a learned, unrounded offset (Bhalgat et al. 2020, eq. 5 and 6).

    Args:
        grad: Gradient of the result.
        x: Values.
        scale: See :class:`.reference.Grid`, and so the others.
        inverse: ``1 / scale``.
        offset: Value of integer zero.
        low: Lowest integer.
        high: Highest integer.

    Returns:
        As :func:`step_terms` for ``x - offset``; and for the offset 0 inside, ``grad`` outside.
    """
    shifted = x.to(low.dtype) - offset
    inner, of_scale = step_terms(grad, shifted, scale, inverse, torch.zeros_like(low), low, high)
    return inner, (*of_scale, grad.to(low.dtype) - inner.to(low.dtype))


def clip_terms(
    grad: Tensor, x: Tensor, scale: Tensor, inverse: Tensor, zero_point: Tensor, low: Tensor, high: Tensor
) -> Terms:
    """Gradients for a learned clip range (Choi et al. 2018, eq. 3), at both ends.

    Args:
        grad: Gradient of the result.
        x: Values.
        scale: See :class:`.reference.Grid`, and so the others; not needed.
        inverse: ``1 / scale``.
        zero_point: Integer of value zero.
        low: Lowest integer.
        high: Highest integer.

    Returns:
        ``grad`` inside and 0 outside; for the lower end ``grad`` below it, for the upper end ``grad`` above it.
    """
    q = integers(x, inverse, zero_point)
    below, above, g = q < low, q > high, grad.to(low.dtype)
    return grad * (~below & ~above), (g * below, g * above)


def soft_terms(
    grad: Tensor, x: Tensor, scale: Tensor, inverse: Tensor, zero_point: Tensor, low: Tensor, high: Tensor,
    alpha: Tensor,
) -> Terms:  # fmt: skip
    r"""Gradients of differentiable soft quantization (Gong et al. 2019, eq. 5 to 9), whose forward is the hard one.

    Between two neighbours of the grid the soft function is, with r = u - floor(u) - 1/2 and
    kappa = log(2 / alpha - 1), in steps: 1/2 + tanh(kappa r) / (2 (1 - alpha)).

    Args:
        grad: Gradient of the result.
        x: Values.
        scale: See :class:`.reference.Grid`, and so the others.
        inverse: ``1 / scale``.
        zero_point: Integer of value zero.
        low: Lowest integer.
        high: Highest integer.
        alpha: Broadcastable, in (0, 1): how far the soft function is from the hard one.

    Returns:
        ``grad`` times the slope of the soft function inside, 0 outside; for alpha its derivative inside; and the two
        terms of :func:`clip_terms`.
    """
    a = alpha.to(low.dtype)
    u = x.to(low.dtype) * inverse
    q, g = torch.round(u) + zero_point, grad.to(low.dtype)
    below, above = q < low, q > high
    r = torch.where(below | above, 0.0, u - torch.floor(u) - 0.5)
    kappa, width = torch.log(2.0 / a - 1.0), 1.0 - a
    t = torch.tanh(kappa * r)
    slope = 0.5 * kappa * (1.0 - t * t) / width
    d_kappa = -2.0 / (a * (2.0 - a))
    of_alpha = 0.5 * scale * (t / (width * width) + d_kappa * r * (1.0 - t * t) / width)
    inner = g * (~below & ~above)
    return (inner * slope).to(grad.dtype), (inner * of_alpha, g * below, g * above)


def reduced(formula: Formula, grad: Tensor, x: Tensor, grid: Grid, ch_axis: int, *more: Tensor) -> Sums:
    """Apply a formula to whole tensors and sum its terms.

    Args:
        formula: One of the above.
        grad: Gradient of the result.
        x: Values.
        grid: Numbers of shape [1] or [C].
        ch_axis: Dimension of the channels; -1: per tensor.
        *more: What else the formula takes, shaped as the scale.

    Returns:
        Gradient of ``x``, and the sums, each of shape [1] or [C].
    """
    more = tuple(broadcastable(x, p, p, ch_axis)[0] for p in more)
    inner, terms = formula(grad, x, *broadcast_grid(x, grid, ch_axis), *more)
    if grid.scale.numel() == 1:
        return inner, *(t.sum().reshape(1) for t in terms)
    dims = [d for d in range(x.dim()) if d != ch_axis]
    return inner, *(t.sum(dims) if dims else t for t in terms)
