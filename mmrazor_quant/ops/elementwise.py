"""Running a formula of single elements through compiled code, whatever the memory format of the tensors.

The tensors are viewed in memory order, with as few dimensions as the channels allow, so that one compiled function
serves all shapes. Where a formula also gives terms to sum up, the sums are done in the same walk over memory.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from torch import Tensor

from . import compiled
from .layout import channel_view
from .reference import Grid

_TENSOR = {'flat': (2**20,), 'first': (64, 4608), 'last': (4608, 64), 'middle': (32, 64, 784)}
"""Example shapes of the tensors, by layout: where the channels are in the views; ``flat`` with one scale."""

_PARAMETER = {'flat': (1,), 'first': (64,), 'last': (64,), 'middle': (64,)}
"""Example shapes of what there is one of a scale."""

_SUMMED = {'first': (1,), 'last': (0,), 'middle': (0, 2)}
"""Dimensions of a view that share a channel."""

_CALL = 2**17
"""What an eager call costs, however small its tensors, in elements times operations."""


@functools.cache
def _function(formula: Callable, values: int, layout: str, has_terms: bool) -> Callable:
    """Make the function to compile of a formula, with so many tensors before the numbers of the grid."""

    def broadcast(p: Tensor) -> Tensor:
        return p.unsqueeze(1) if layout in ('first', 'middle') and p.dim() else p

    def total(term: Tensor) -> Tensor:
        return term.sum().reshape(1) if layout == 'flat' else term.sum(_SUMMED[layout])

    def function(*tensors: Tensor) -> Tensor | tuple[Tensor, ...]:
        result = formula(*tensors[:values], *(broadcast(p) for p in tensors[values:]))
        return (result[0], *(total(term) for term in result[1])) if has_terms else result

    function.__module__ = formula.__module__
    function.__qualname__ = f'{formula.__qualname__}[{values}, {layout}, {has_terms}]'
    return function


def run(
    formula: Callable, values: list[Tensor], grid: Grid, ch_axis: int, operations: int, more: tuple[Tensor, ...] = (),
    has_terms: bool = False,
) -> Tensor | tuple[Tensor, ...] | None:  # fmt: skip
    """Run the compiled version of a formula.

    Args:
        formula: ``formula(*values, *grid, *more)``: a tensor or, with ``has_terms``, a tensor and a tuple of terms.
        values: Dense tensors of equal shape and strides.
        grid: Numbers of shape [1] or [C] each.
        ch_axis: Dimension of the channels; -1: per tensor.
        operations: Elementwise operations in the formula.
        more: Further numbers, shaped as the scale.
        has_terms: Whether there are terms, to be summed over what shares a scale.

    Returns:
        A tensor of shape and strides of the values and, with ``has_terms``, the sums of shape [1] or [C]. None if
        there is no compiled code (yet), or where scale and tensor do not belong together: the eager formula has the
        message.
    """
    x = values[0]
    if grid.scale.numel() == 1:
        layout, views = 'flat', [v.as_strided((v.numel(),), (1,)) for v in values]
        grid = Grid(*(p.reshape(1) for p in grid[:3]), *grid[3:])
    elif grid.scale.shape != (x.shape[ch_axis],):
        return None
    else:
        views = [channel_view(v, ch_axis) for v in values]
        layout = 'middle' if views[0].dim() == 3 else 'last' if x.stride(ch_axis) == 1 else 'first'
    parameter = _PARAMETER[layout]
    shapes = (*[_TENSOR[layout]] * len(values), *[parameter] * 3, (), (), *[parameter] * len(more))
    function = _function(formula, len(values), layout, has_terms)
    result = compiled.run(function, shapes, x.numel() * operations + _CALL, *views, *grid, *more)
    if result is None:
        return None
    # Changed in place: a view made here could not be modified in place by the caller (an in-place ReLU, say).
    if has_terms:
        return result[0].as_strided_(x.shape, x.stride()), *result[1:]
    return result.as_strided_(x.shape, x.stride())
