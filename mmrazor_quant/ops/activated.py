"""An addition, an activation that clamps and fake quantization in one walk over memory, without gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from . import compiled
from .layout import is_dense
from .normalized import Quantization, unit_grid
from .normalized_reference import clamped_sum
from .reference import forward_formula, number, work_dtype

MIN_NUMEL = 2**15
"""Smaller tensors are left to the operations one by one."""

_WORK = 2**4
"""Elementwise operations in a formula."""

_VALUES, _NUMBER = (2**20,), ()
"""Example shapes."""


def usable(x: Tensor, other: Tensor | None, quantization: Quantization) -> bool:
    """Tell whether :func:`fake_quantize_activated` takes these; asking counts as work done without it.

    Args:
        x: Input of the activation.
        other: What is added before it.
        quantization: How the result is quantized.

    Returns:
        True without gradients for dense float32 tensors of equal strides that are large enough, up to 24 bits per
        tensor with ranges that are known, once compiling has become worthwhile.
    """
    if torch.is_grad_enabled() or x.dtype != torch.float32 or not compiled.usable(x, MIN_NUMEL) or not is_dense(x):
        return False
    if quantization.scale.numel() != 1 or quantization.from_range is not None:
        return False
    if other is not None and (other.dtype, other.shape, other.stride()) != (x.dtype, x.shape, x.stride()):
        return False
    wide = work_dtype(x.dtype, quantization.quant_min, quantization.quant_max) != x.dtype
    return not wide and compiled.switch.is_due(usable, x.numel() * _WORK)


def fake_quantize_activated(
    x: Tensor, other: Tensor | None, ends: tuple[float, float], quantization: Quantization, has_plain: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Add, clamp, and fake-quantize; equal to the operations one by one, to the last bit.

    Args:
        x: See :func:`usable`.
        other: Added before the activation, shape of ``x``; None: nothing.
        ends: What the activation clamps to: (0, inf) is ReLU, (-inf, inf) none.
        quantization: How the result is quantized.
        has_plain: Whether the result is needed unquantized too.

    Returns:
        The quantized result, and the unquantized one or None.
    """
    _, grid = unit_grid(x, quantization)
    values = [x] if other is None else [x, other]
    flat = [v.as_strided((v.numel(),), (1,)) for v in values]
    numbers = *(number(end, x.device) for end in ends), *grid
    function = _FUNCTIONS[has_plain, len(values)]
    shapes = (*[_VALUES] * len(values), *[_NUMBER] * len(numbers))
    result = compiled.call(function, shapes, *flat, *numbers)
    result = function(*flat, *numbers) if result is None else result
    quantized, plain = result if has_plain else (result, None)
    # Changed in place: a view made here could not be modified in place by the caller.
    return quantized.as_strided_(x.shape, x.stride()), None if plain is None else plain.as_strided_(x.shape, x.stride())


def _quantized_one(x: Tensor, low: Tensor, high: Tensor, *grid: Tensor) -> Tensor:
    return forward_formula(clamped_sum(x, low, high), *grid)


def _quantized_sum(x: Tensor, other: Tensor, low: Tensor, high: Tensor, *grid: Tensor) -> Tensor:
    return forward_formula(clamped_sum(x, low, high, other), *grid)


def _both_of_one(x: Tensor, low: Tensor, high: Tensor, *grid: Tensor) -> tuple[Tensor, Tensor]:
    y = clamped_sum(x, low, high)
    return forward_formula(y, *grid), y


def _both_of_sum(x: Tensor, other: Tensor, low: Tensor, high: Tensor, *grid: Tensor) -> tuple[Tensor, Tensor]:
    y = clamped_sum(x, low, high, other)
    return forward_formula(y, *grid), y


_FUNCTIONS = {
    (False, 1): _quantized_one,
    (False, 2): _quantized_sum,
    (True, 1): _both_of_one,
    (True, 2): _both_of_sum,
}
"""By whether the activation is a result too, and the number of tensors."""
