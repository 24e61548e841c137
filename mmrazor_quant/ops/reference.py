"""Quantization formulas written out in eager torch: what the fast path has to equal, and its fall-back.

The arithmetic is torch's own (``torch.fake_quantize_per_{tensor,channel}_affine``): multiplication by the reciprocal
of the scale, rounding half to even, then the zero point, then the clip.
"""

from __future__ import annotations

import torch
from torch import Tensor

EXACT_FLOAT32_LEVELS = 2**24
"""Integers up to this are exact in float32; wider ranges are computed in float64."""


def work_dtype(dtype: torch.dtype, quant_min: int, quant_max: int) -> torch.dtype:
    """Choose the type that the arithmetic is done in.

    Args:
        dtype: Type of the tensor to quantize.
        quant_min: Lowest integer.
        quant_max: Highest integer.

    Returns:
        float64 for float64 tensors and for ranges that float32 cannot count, float32 otherwise (also for half types).
    """
    wide = max(-quant_min, quant_max, quant_max - quant_min) >= EXACT_FLOAT32_LEVELS
    return torch.float64 if wide or dtype == torch.float64 else torch.float32


def channel_shape(x: Tensor, param: Tensor, ch_axis: int) -> list[int]:
    """Give the shape in which a per-channel parameter broadcasts against a tensor.

    Args:
        x: The tensor, any shape.
        param: Scale or zero point, shape [] or [1] (per tensor) or [C].
        ch_axis: Dimension of the channels in ``x``; -1: per tensor.

    Returns:
        ``[1, ..., C, ..., 1]``, or ``[]`` for one value.

    Raises:
        ValueError: ``param`` has neither one element nor one per channel.
    """
    if param.numel() == 1:
        return []
    if not 0 <= ch_axis < x.dim() or param.shape != (x.shape[ch_axis],):
        raise ValueError(
            f'scale and zero_point of shape {tuple(param.shape)} do not fit a tensor of shape {tuple(x.shape)} '
            f'with ch_axis={ch_axis}; allowed: one value, or one per channel'
        )
    shape = [1] * x.dim()
    shape[ch_axis] = -1
    return shape


def integers(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Round to the grid without clipping: ``round(x * (1 / scale)) + zero_point``, in floating point.

    Args:
        x: Values, in the type to compute in.
        scale: Broadcastable, the same type.
        zero_point: Broadcastable, the same type.

    Returns:
        Whole numbers in the type and shape of ``x``; NaN where ``x`` is NaN.
    """
    return torch.round(x * (1.0 / scale)) + zero_point


def fake_quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int, ch_axis: int = -1
) -> Tensor:
    """Quantize and dequantize; see :func:`mmrazor_quant.ops.fake_quantize`. Not differentiable by itself."""
    work = work_dtype(x.dtype, quant_min, quant_max)
    shape = channel_shape(x, scale, ch_axis)
    s, z = scale.to(work).reshape(shape), zero_point.to(work).reshape(shape)
    q = integers(x.to(work), s, z).clamp(quant_min, quant_max)
    return ((q - z) * s).to(x.dtype)


def inside(x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int, ch_axis: int = -1) -> Tensor:
    """Tell which values the clip leaves alone: where the straight-through gradient is 1.

    Args:
        x: Values of any shape.
        scale: Shape [], [1] or [C].
        zero_point: Shape as ``scale``.
        quant_min: Lowest integer.
        quant_max: Highest integer.
        ch_axis: Dimension of the channels; -1: per tensor.

    Returns:
        bool, shape of ``x``; False where ``x`` is NaN.
    """
    work = work_dtype(x.dtype, quant_min, quant_max)
    shape = channel_shape(x, scale, ch_axis)
    q = integers(x.to(work), scale.to(work).reshape(shape), zero_point.to(work).reshape(shape))
    return (q >= quant_min) & (q <= quant_max)


def fake_quantize_backward(
    grad: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int, ch_axis: int = -1
) -> Tensor:
    """Straight-through gradient: ``grad`` inside the clip range, 0 outside.

    Args:
        grad: Gradient of the result, shape of ``x``.
        x: What was quantized.
        scale: Shape [], [1] or [C].
        zero_point: Shape as ``scale``.
        quant_min: Lowest integer.
        quant_max: Highest integer.
        ch_axis: Dimension of the channels; -1: per tensor.

    Returns:
        Gradient of ``x``, shape and type of ``x``.
    """
    return grad * inside(x, scale, zero_point, quant_min, quant_max, ch_axis)


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int, ch_axis: int = -1) -> Tensor:
    """Quantize to integers.

    Args:
        x: Floating-point values of any shape.
        scale: Shape [], [1] or [C].
        zero_point: Integers, shape as ``scale``.
        quant_min: Lowest integer.
        quant_max: Highest integer.
        ch_axis: Dimension of the channels; -1: per tensor.

    Returns:
        ``clamp(round(x * (1 / scale)) + zero_point, quant_min, quant_max)`` in the shape of ``x``: int32, or int64
        where the range does not fit int32.
    """
    work = work_dtype(x.dtype, quant_min, quant_max)
    shape = channel_shape(x, scale, ch_axis)
    q = integers(x.to(work), scale.to(work).reshape(shape), zero_point.to(work).reshape(shape))
    return q.clamp(quant_min, quant_max).to(integer_dtype(quant_min, quant_max))


def dequantize(q: Tensor, scale: Tensor, zero_point: Tensor, ch_axis: int = -1) -> Tensor:
    """Turn integers back into values.

    Args:
        q: Integers of any shape.
        scale: Shape [], [1] or [C], the type of the result.
        zero_point: Integers, shape as ``scale``.
        ch_axis: Dimension of the channels; -1: per tensor.

    Returns:
        ``(q - zero_point) * scale`` in the type of ``scale`` and shape of ``q``.
    """
    shape = channel_shape(q, scale, ch_axis)
    steps = (q.to(torch.int64) - zero_point.to(torch.int64).reshape(shape)).to(torch.float64)
    return (steps * scale.to(torch.float64).reshape(shape)).to(scale.dtype)


def integer_dtype(quant_min: int, quant_max: int) -> torch.dtype:
    """Choose the integer type of quantized values and zero points: int32, or int64 where that is too small."""
    bounds = torch.iinfo(torch.int32)
    return torch.int32 if bounds.min <= quant_min and quant_max <= bounds.max else torch.int64
