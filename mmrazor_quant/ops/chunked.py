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


class _Numbers:
    """The grid as Python numbers, with the zero point taken off the bounds: quicker than tensors of one element."""

    def __init__(self, grid: Grid) -> None:
        scale, inverse, zero_point, low, high = (p.item() for p in grid)
        self.scale, self.inverse, self.dtype = scale, inverse, grid.low.dtype
        self.low, self.high = low - zero_point, high - zero_point

    def work(self, x: Tensor, count: int) -> list[Tensor]:
        """Give memory for pieces, each piece's in turn: fresh memory would cost as much as what is computed in it."""
        return [torch.empty(CHUNK, dtype=self.dtype, device=x.device) for _ in range(count)]


def forward(x: Tensor, grid: Grid) -> Tensor:
    """Compute :func:`.reference.forward_formula` for one scale."""
    result, numbers = torch.empty_like(x), _Numbers(grid)
    in_place = numbers.dtype == x.dtype
    work = None if in_place else numbers.work(x, 1)[0]
    for source, target in _pieces(x, result):
        q = target if in_place else work[: len(source)]
        torch.mul(source if in_place else source.to(numbers.dtype), numbers.inverse, out=q)
        q.round_().clamp_(numbers.low, numbers.high).mul_(numbers.scale)
        if q is not target:
            target.copy_(q)
    return result


def backward(grad: Tensor, x: Tensor, grid: Grid) -> Tensor:
    """Compute :func:`.reference.backward_formula` for one scale."""
    result, numbers = torch.empty_like(grad), _Numbers(grid)
    work = numbers.work(x, 2)
    for g, v, target in _pieces(grad, x, result):
        q, d = (w[: len(v)] for w in work)
        torch.mul(v.to(numbers.dtype), numbers.inverse, out=q).round_()
        torch.clamp(q, numbers.low, numbers.high, out=d)
        torch.mul(g, q.eq_(d), out=target)
    return result


def step(grad: Tensor, x: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Apply :func:`.learned_reference.step_terms` for one scale and sum its term.

    Returns:
        Gradient of ``x``; and that of the scale, shape [1].
    """
    result, numbers, total = torch.empty_like(grad), _Numbers(grid), grid.low.new_zeros(())
    work = numbers.work(x, 4)
    for g, v, target in _pieces(grad, x, result):
        u, q, d, inside = (w[: len(v)] for w in work)
        torch.mul(v.to(numbers.dtype), numbers.inverse, out=u)
        torch.round(u, out=q)
        _keep_between(u, q, numbers.low - 1, numbers.high + 1, out=inside)
        torch.clamp(q, numbers.low, numbers.high, out=d)
        torch.mul(g, q.eq_(d), out=target)
        # Not the difference of two sums: at many bits each is large, and their difference small.
        total += torch.dot(g.to(numbers.dtype), d.sub_(inside))
    return result, total.reshape(1)


def _keep_between(x: Tensor, q: Tensor, low: float, high: float, out: Tensor) -> Tensor:
    """Copy ``x`` where ``q`` is strictly between two numbers, and 0 elsewhere: in one operation, unlike ``where``."""
    return torch.ops.aten.hardtanh_backward.grad_input(x, q, low, high, grad_input=out)
