"""Quantization formulas in eager torch: what the compiled path runs as well, and its fall-back.

The arithmetic is torch's own (``torch.fake_quantize_per_{tensor,channel}_affine``): multiplication by the reciprocal
of the scale, rounding half to even, then the zero point, then the clip. Bounds come as tensors, so that one compiled
function serves all bit widths; their type is the one to compute in.
"""

from __future__ import annotations

import functools

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


def integers(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Round to the grid without clipping: ``round(x * (1 / scale)) + zero_point``.

    Args:
        x: Values, any floating-point type.
        scale: Broadcastable, the type to compute in.
        zero_point: Broadcastable, the type to compute in.

    Returns:
        New tensor of whole numbers in the type of ``scale`` and shape of ``x``; NaN where ``x`` is NaN.
    """
    return torch.mul(x.to(scale.dtype), 1.0 / scale).round_().add_(zero_point)


def forward_formula(x: Tensor, scale: Tensor, zero_point: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Quantize and dequantize.

    Args:
        x: Values, any floating-point type and shape.
        scale: Broadcastable, any floating-point type.
        zero_point: Broadcastable, any type.
        low: Lowest integer, shape [], in the type to compute in.
        high: Highest integer, likewise.

    Returns:
        ``(clamp(round(x * (1 / scale)) + zero_point, low, high) - zero_point) * scale`` in type and shape of ``x``.
    """
    s, z = scale.to(low.dtype), zero_point.to(low.dtype)
    return integers(x, s, z).clamp_(low, high).sub_(z).mul_(s).to(x.dtype)


def shifted_formula(x: Tensor, scale: Tensor, offset: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Quantize and dequantize on a grid that an offset moves, by any amount (Bhalgat et al. 2020, eq. 1 and 2).

    Args:
        x: Values, any floating-point type and shape.
        scale: Broadcastable.
        offset: Broadcastable: the value of integer 0.
        low: Lowest integer, shape [], in the type to compute in.
        high: Highest integer, likewise.

    Returns:
        ``clamp(round((x - offset) * (1 / scale)), low, high) * scale + offset`` in type and shape of ``x``.
    """
    s, b = scale.to(low.dtype), offset.to(low.dtype)
    return (x.to(low.dtype) - b).mul_(1.0 / s).round_().clamp_(low, high).mul_(s).add_(b).to(x.dtype)


def backward_formula(grad: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Straight-through gradient: ``grad`` where the clip left ``x`` alone, times 0 elsewhere (also for NaN).

    Args:
        grad: Gradient of the result, shape and type of ``x``.
        x: As in :func:`forward_formula`, and so the others.
        scale: Broadcastable.
        zero_point: Broadcastable.
        low: Lowest integer.
        high: Highest integer.

    Returns:
        Gradient of ``x``.
    """
    q = integers(x, scale.to(low.dtype), zero_point.to(low.dtype))
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
    scale, zero_point = broadcastable(x, scale, zero_point, ch_axis)
    low, high = bounds(quant_min, quant_max, x.dtype, x.device)
    q = integers(x, scale.to(low.dtype), zero_point.to(low.dtype)).clamp_(low, high)
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
