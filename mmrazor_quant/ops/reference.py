"""Quantization formulas in eager torch: what the compiled path runs as well, and its fall-back.

The arithmetic is torch's own (``torch.fake_quantize_per_{tensor,channel}_affine``): multiplication by the reciprocal
of the scale, rounding half to even, then the zero point, then the clip. Bounds come as tensors, so that one compiled
function serves all bit widths; their type is the one to compute in.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

EXACT_FLOAT32_LEVELS = 2**24
"""Integers up to this are exact in float32; wider ranges are computed in float64."""


def work_dtype(dtype: torch.dtype, quant_min: int, quant_max: int) -> torch.dtype:
    """Choose the type to compute in.

    Args:
        dtype: Type of the tensor to quantize.
        quant_min: Lowest integer.
        quant_max: Highest integer.

    Returns:
        float64 for float64 tensors and for ranges that float32 cannot count, float32 otherwise (also for half types).
    """
    wide = max(-quant_min, quant_max, quant_max - quant_min) >= EXACT_FLOAT32_LEVELS
    return torch.float64 if wide or dtype == torch.float64 else torch.float32


@functools.lru_cache(maxsize=256)
def bounds(quant_min: int, quant_max: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Give the bounds of the integers as tensors, made once.

    Args:
        quant_min: Lowest integer.
        quant_max: Highest integer.
        dtype: Type of the tensor to quantize.
        device: Its device.

    Returns:
        Two tensors of shape [] in the type to compute in.
    """
    work = work_dtype(dtype, quant_min, quant_max)
    with torch.inference_mode(False):  # to serve in all modes
        return tuple(torch.tensor(v, dtype=work, device=device) for v in (quant_min, quant_max))


@functools.lru_cache(maxsize=256)
def number(value: float, device: torch.device) -> Tensor:
    """Give a number as a float32 tensor of shape [], made once.

    Args:
        value: The number.
        device: Device of the tensor.
    """
    with torch.inference_mode(False):  # to serve in all modes
        return torch.tensor(value, dtype=torch.float32, device=device)


def integer_dtype(quant_min: int, quant_max: int) -> torch.dtype:
    """Choose the integer type of quantized values and zero points: int32, or int64 where that is too small."""
    info = torch.iinfo(torch.int32)
    return torch.int32 if info.min <= quant_min and quant_max <= info.max else torch.int64


def channel_shape(x: Tensor, param: Tensor, ch_axis: int) -> list[int]:
    """Give the shape in which a parameter of several channels broadcasts against a tensor.

    Args:
        x: The tensor, any shape.
        param: Scale or zero point, shape [C].
        ch_axis: Dimension of the channels in ``x``.

    Returns:
        ``[1, ..., C, ..., 1]``.

    Raises:
        ValueError: The tensor does not have C channels.
    """
    if not 0 <= ch_axis < x.dim() or param.shape != (x.shape[ch_axis],):
        raise ValueError(
            f'scale and zero_point of shape {tuple(param.shape)} do not fit a tensor of shape {tuple(x.shape)} '
            f'with ch_axis={ch_axis}; allowed: one value, or one per channel'
        )
    shape = [1] * x.dim()
    shape[ch_axis] = -1
    return shape


def broadcastable(x: Tensor, scale: Tensor, zero_point: Tensor, ch_axis: int) -> tuple[Tensor, Tensor]:
    """Reshape scale and zero point, of one element, of shape [C] or of all dimensions, to broadcast against ``x``."""
    if scale.numel() == 1:
        return scale.reshape(()), zero_point.reshape(())
    if scale.dim() == x.dim() > 1:
        return scale, zero_point
    shape = channel_shape(x, scale, ch_axis)
    return scale.reshape(shape), zero_point.reshape(shape)


class Grid(NamedTuple):
    """The numbers of a formula, in the type to compute in, the first three broadcastable against the values.

    Computed before the formula: compiled code would repeat a division for every few elements.

    Args:
        scale: Distance of the grid's points.
        inverse: ``1 / scale``.
        shift: Integer that value zero is on; or, for a learned offset, the value that integer zero is on.
        low: Lowest integer, shape [].
        high: Highest integer, shape [].
    """

    scale: Tensor
    inverse: Tensor
    shift: Tensor
    low: Tensor
    high: Tensor


def make_grid(x: Tensor, scale: Tensor, shift: Tensor, quant_min: int, quant_max: int) -> Grid:
    """Make a grid for the values ``x``; scale and shift of any shape, which the grid keeps."""
    low, high = bounds(quant_min, quant_max, x.dtype, x.device)
    scale = scale.to(low.dtype)
    return Grid(scale, 1.0 / scale, shift.to(low.dtype), low, high)


def broadcast_grid(x: Tensor, grid: Grid, ch_axis: int) -> Grid:
    """Give the grid whose numbers, of one element or of shape [C], broadcast against ``x``."""
    scale, inverse = broadcastable(x, grid.scale, grid.inverse, ch_axis)
    return grid._replace(scale=scale, inverse=inverse, shift=broadcastable(x, grid.shift, grid.shift, ch_axis)[0])


def integers(x: Tensor, inverse: Tensor, zero_point: Tensor) -> Tensor:
    """Round to the grid without clipping: ``round(x * inverse) + zero_point``.

    Args:
        x: Values, any floating-point type.
        inverse: ``1 / scale``, broadcastable, the type to compute in.
        zero_point: Broadcastable, the type to compute in.

    Returns:
        New tensor of whole numbers in the type of ``inverse`` and shape of ``x``; NaN where ``x`` is NaN.
    """
    return torch.mul(x.to(inverse.dtype), inverse).round_().add_(zero_point)


def forward_formula(x: Tensor, scale: Tensor, inverse: Tensor, zero_point: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Quantize and dequantize.

    Args:
        x: Values, any floating-point type and shape.
        scale: See :class:`Grid`, and so the others.
        inverse: ``1 / scale``.
        zero_point: Integer of value zero.
        low: Lowest integer.
        high: Highest integer.

    Returns:
        ``(clamp(round(x * inverse) + zero_point, low, high) - zero_point) * scale`` in type and shape of ``x``.
    """
    return integers(x, inverse, zero_point).clamp_(low, high).sub_(zero_point).mul_(scale).to(x.dtype)


def shifted_formula(x: Tensor, scale: Tensor, inverse: Tensor, offset: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Quantize and dequantize on a grid that an offset moves, by any amount (Bhalgat et al. 2020, eq. 1 and 2).

    Args:
        x: Values, any floating-point type and shape.
        scale: See :class:`Grid`, and so the others.
        inverse: ``1 / scale``.
        offset: Value of integer zero.
        low: Lowest integer.
        high: Highest integer.

    Returns:
        ``clamp(round((x - offset) * inverse), low, high) * scale + offset`` in type and shape of ``x``.
    """
    q = (x.to(low.dtype) - offset).mul_(inverse).round_().clamp_(low, high)
    return q.mul_(scale).add_(offset).to(x.dtype)


def backward_formula(
    grad: Tensor, x: Tensor, scale: Tensor, inverse: Tensor, zero_point: Tensor, low: Tensor, high: Tensor
) -> Tensor:
    """Straight-through gradient: ``grad`` where the clip left ``x`` alone, times 0 elsewhere (also for NaN).

    Args:
        grad: Gradient of the result, shape and type of ``x``.
        x: As in :func:`forward_formula`, and so the others.
        scale: Not needed.
        inverse: ``1 / scale``.
        zero_point: Integer of value zero.
        low: Lowest integer.
        high: Highest integer.

    Returns:
        Gradient of ``x``.
    """
    q = integers(x, inverse, zero_point)
    return grad * ((q >= low) & (q <= high))


def shift(x: Tensor, offset: Tensor, ch_axis: int = -1) -> Tensor:
    """Add an offset of shape [], [1] or [C] to a tensor with its channels in dimension ``ch_axis``."""
    return x + broadcastable(x, offset, offset, ch_axis)[0]


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int, ch_axis: int = -1) -> Tensor:
    """Quantize to integers.

    Args:
        x: Floating-point values of any shape.
        scale: Shape [], [1] or [C]; or the dimensions of ``x``, those that share a scale of size 1.
        zero_point: Integers, shape as ``scale``.
        quant_min: Lowest integer.
        quant_max: Highest integer.
        ch_axis: Dimension of the channels; -1: per tensor.

    Returns:
        ``clamp(round(x * (1 / scale)) + zero_point, quant_min, quant_max)`` in the shape of ``x``: int32, or int64
        where the range does not fit int32.
    """
    grid = broadcast_grid(x, make_grid(x, scale, zero_point, quant_min, quant_max), ch_axis)
    q = integers(x, grid.inverse, grid.shift).clamp_(grid.low, grid.high)
    return q.to(integer_dtype(quant_min, quant_max))


def dequantize(q: Tensor, scale: Tensor, zero_point: Tensor, ch_axis: int = -1) -> Tensor:
    """Turn integers back into values.

    Args:
        q: Integers of any shape, up to 32 bits.
        scale: As for :func:`quantize`; its type is that of the result.
        zero_point: Integers, shape as ``scale``.
        ch_axis: Dimension of the channels; -1: per tensor.

    Returns:
        ``(q - zero_point) * scale`` in the type of ``scale`` and shape of ``q``.
    """
    scale, zero_point = broadcastable(q, scale, zero_point, ch_axis)
    steps = q.to(torch.int64) - zero_point.to(torch.int64)
    # In float64, where up to 33 bits times 24 are exact enough to be rounded once.
    return (steps.to(torch.float64) * scale.to(torch.float64)).to(scale.dtype)
