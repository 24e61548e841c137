"""The formulas for one value of scale in eager, piece by piece, so that what they make on the way stays in the cache.

Bit-equal to the formulas on whole tensors, but for the order in which gradients are summed.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .layout import flat_view, is_dense, is_plain
from .reference import Grid

CHUNK = 2**16
"""Elements of a piece (measured on CPU)."""


def usable(values: list[Tensor], grid: Grid) -> bool:
    """Tell whether the functions below serve.

    Args:
        values: Tensors of equal shape.
        grid: Scale and bounds.

    Returns:
        True for one value of scale, more elements than a piece, and tensors that lie in memory in the same order.
    """
    x = values[0]
    if grid.scale.numel() != 1 or x.numel() <= CHUNK or x.device.type != 'cpu':
        return False
    return all(is_plain(v) and v.stride() == x.stride() for v in values) and is_dense(x)


def _pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    return zip(*(flat_view(t).split(CHUNK) for t in tensors))


def _work(x: Tensor, target: Tensor, low: Tensor) -> Tensor:
    """Give memory to compute in: that of the result, where it has the type to compute in."""
    return target if target.dtype == low.dtype == x.dtype else torch.empty_like(x, dtype=low.dtype)


def _numbers(grid: Grid) -> tuple[Tensor, ...]:
    return tuple(p.reshape(()) for p in grid)


def _round(u: Tensor, zero_point: Tensor, out: Tensor | None = None) -> Tensor:
    """Round to the grid; a zero point of zero, which on a CPU costs nothing to look at, is not added."""
    q = torch.round(u, out=out)
    return q.add_(zero_point) if zero_point else q


def forward(x: Tensor, grid: Grid) -> Tensor:
    """Compute :func:`.reference.forward_formula` for one scale."""
    result = torch.empty_like(x)
    scale, inverse, zero_point, low, high = _numbers(grid)
    for source, target in _pieces(x, result):
        q = torch.mul(source.to(low.dtype), inverse, out=_work(source, target, low))
        q = _round(q, zero_point, out=q).clamp_(low, high)
        q = (q.sub_(zero_point) if zero_point else q).mul_(scale)
        if q is not target:
            target.copy_(q)
    return result


def backward(grad: Tensor, x: Tensor, grid: Grid) -> Tensor:
    """Compute :func:`.reference.backward_formula` for one scale."""
    result = torch.empty_like(grad)
    _, inverse, zero_point, low, high = _numbers(grid)
    for g, v, target in _pieces(grad, x, result):
        q = torch.mul(v.to(low.dtype), inverse)
        q = _round(q, zero_point, out=q)
        torch.mul(g, q.eq_(q.clamp(low, high)), out=target)
    return result


def step(grad: Tensor, x: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Apply :func:`.learned_reference.step_terms` for one scale and sum its term.

    Returns:
        Gradient of ``x``; and that of the scale, shape [1].
    """
    result = torch.empty_like(grad)
    _, inverse, zero_point, low, high = _numbers(grid)
    nothing, total = low.new_zeros(()), low.new_zeros(())
    for g, v, target in _pieces(grad, x, result):
        u = torch.mul(v.to(low.dtype), inverse)
        q = _round(u, zero_point)
        d = q.clamp(low, high)
        inside = torch.eq(q, d)
        torch.mul(g, inside, out=target)
        d = d.sub_(zero_point) if zero_point else d
        # Not the difference of two sums: at many bits each is large, and their difference small.
        total += torch.dot(g.to(low.dtype), d.sub_(torch.where(inside, u, nothing, out=q)))
    return result, total.reshape(1)
