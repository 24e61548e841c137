"""The formulas for one value of scale in eager, piece by piece, so that what they make on the way stays in the cache.

Bit-equal to the formulas on whole tensors, but for the order in which gradients are summed.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .layout import flat_view, is_dense, is_plain
from .learned_reference import reduced, step_terms
from .reference import Grid

CHUNK = 2**19
"""Elements of a piece (measured on CPU)."""

MIN_NUMEL = 2**16
"""Smaller tensors stay in the cache as a whole."""


def usable(values: list[Tensor], grid: Grid) -> bool:
    """Tell whether the functions below serve.

    Args:
        values: Tensors of equal shape.
        grid: Scale and bounds.

    Returns:
        True for one value of scale, large tensors, and tensors that lie in memory in the same order.
    """
    x = values[0]
    if grid.scale.numel() != 1 or x.numel() <= MIN_NUMEL or x.device.type != 'cpu':
        return False
    return all(is_plain(v) and v.stride() == x.stride() for v in values) and is_dense(x)


def _pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    return zip(*(flat_view(t).split(CHUNK) for t in tensors))


class _Bounds:
    """The bounds as Python numbers, with the zero point taken off: quicker than tensors of one element."""

    def __init__(self, grid: Grid) -> None:
        zero_point = grid.shift.item()
        self.low, self.high = grid.low.item() - zero_point, grid.high.item() - zero_point


def _work(x: Tensor, dtype: torch.dtype, count: int) -> list[Tensor]:
    """Give memory for pieces, each piece's in turn: fresh memory would cost as much as what is computed in it."""
    return [torch.empty(min(CHUNK, x.numel()), dtype=dtype, device=x.device) for _ in range(count)]


def _fitting(work: list[Tensor], piece: Tensor) -> list[Tensor]:
    return work if not work or len(piece) == len(work[0]) else [w[: len(piece)] for w in work]


def forward(x: Tensor, grid: Grid) -> Tensor:
    """Compute :func:`.reference.forward_formula` for one scale."""
    result, dtype, bounds = torch.empty_like(x), grid.low.dtype, _Bounds(grid)
    scale, inverse = grid.scale.reshape(()), grid.inverse.reshape(())
    in_place = dtype == x.dtype
    work = [] if in_place else _work(x, dtype, 1)
    for source, target in _pieces(x, result):
        q = target if in_place else _fitting(work, source)[0]
        torch.mul(source.to(dtype), inverse, out=q).round_().clamp_(bounds.low, bounds.high).mul_(scale)
        if not in_place:
            target.copy_(q)
    return result


def backward(grad: Tensor, x: Tensor, grid: Grid) -> Tensor:
    """Compute :func:`.reference.backward_formula` for one scale."""
    result, dtype, bounds = torch.empty_like(grad), grid.low.dtype, _Bounds(grid)
    inverse, work = grid.inverse.reshape(()), _work(x, dtype, 2)
    for g, v, target in _pieces(grad, x, result):
        q, d = _fitting(work, v)
        torch.mul(v.to(dtype), inverse, out=q).round_()
        torch.clamp(q, bounds.low, bounds.high, out=d)
        torch.mul(g, q.eq_(d), out=target)
    return result


def step(grad: Tensor, x: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Apply :func:`.learned_reference.step_terms` for one scale and sum its term.

    Returns:
        Gradient of ``x``; and that of the scale, shape [1].
    """
    result, dtype, bounds = torch.empty_like(grad), grid.low.dtype, _Bounds(grid)
    in_place = dtype == grad.dtype
    inverse, work, terms = grid.inverse.reshape(()), _work(x, dtype, 2 if in_place else 3), []
    below, above = bounds.low - 1, bounds.high + 1
    for g, v, target in _pieces(grad.to(dtype), x, result):
        u, q, *spare = _fitting(work, v)
        kept = target if in_place else spare[0]
        torch.mul(v.to(dtype), inverse, out=u)
        torch.round(u, out=q)
        _keep_between(g, q, below, above, out=kept)
        if not in_place:
            target.copy_(kept)
        _keep_between(u, q, below, above, out=u)
        # Not the difference of two sums: at many bits each is large, and their difference small.
        terms.append(torch.dot(g, q.clamp_(bounds.low, bounds.high).sub_(u)))
    of_scale = torch.stack(terms).sum().reshape(1)
    # What is neither kept nor left out of the gradient, NaN, shows in the sum.
    return (result, of_scale) if of_scale.isfinite() else reduced(step_terms, grad, x, grid, -1)


def _keep_between(x: Tensor, q: Tensor, low: float, high: float, out: Tensor) -> Tensor:
    """Copy ``x`` where ``q`` is strictly between two numbers, and 0 elsewhere: in one operation, unlike ``where``."""
    return torch.ops.aten.hardtanh_backward.grad_input(x, q, low, high, grad_input=out)
