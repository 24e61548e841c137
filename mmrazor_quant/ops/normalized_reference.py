"""Batch norm in training, activation and fake quantization as one formula, and its gradients.

Views of shape [N, C, L] with the channels in the middle. With m and v the mean and variance of the batch, the batch
norm is a * x + b with a = weight / sqrt(v + eps) and b = bias - a * m; an activation that clamps follows, then the
formula of :mod:`.reference`. Nothing between is kept for the backward: it is cheaper to compute again than to read.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .learned_reference import step_terms
from .reference import Grid, forward_formula


class Norm(NamedTuple):
    """What a batch norm does to its input in one training step.

    Args:
        mean: Of the batch, shape [C].
        inverse_std: ``1 / sqrt(variance + eps)``, shape [C].
        factor: What the input is multiplied with, shape [C].
        offset: What is added then, shape [C].
    """

    mean: Tensor
    inverse_std: Tensor
    factor: Tensor
    offset: Tensor


def batch_norm(
    x: Tensor, weight: Tensor, bias: Tensor, running_mean: Tensor, running_var: Tensor, momentum: Tensor, eps: Tensor
) -> tuple[Tensor, ...]:
    """Compute the numbers of a batch norm in one walk over its input.

    The sums are those of the distances from the running mean: with sums of squares, what is far from zero would lose
    its digits.

    Args:
        x: Shape [N, C, L].
        weight: Shape [C].
        bias: Shape [C].
        running_mean: Shape [C].
        running_var: Shape [C].
        momentum: Weight of this batch in the running statistics, shape [].
        eps: Added to the variance, shape [].

    Returns:
        The four of :class:`Norm`, and the new running mean and variance.
    """
    count = x.shape[0] * x.shape[2]
    distance = x - _over_channels(running_mean)
    shift = _sum(distance) / count
    variance = (_sum(distance * distance) / count - shift * shift).clamp_min(0.0)
    mean, inverse_std = running_mean + shift, torch.rsqrt(variance + eps)
    factor = weight * inverse_std
    unbiased = variance * (count / (count - 1))
    running = running_mean + momentum * shift, running_var + momentum * (unbiased - running_var)
    return mean, inverse_std, factor, bias - factor * mean, *running


def batch_norm_range(x: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
    """Compute :func:`batch_norm`, and the least and the greatest value of its result, each of shape []."""
    result = batch_norm(x, *parameters)
    _, _, factor, offset, *_ = result
    ends = [factor * extreme + offset for extreme in (x.amin(2).amin(0), x.amax(2).amax(0))]
    return *result, torch.minimum(*ends).amin(), torch.maximum(*ends).amax()


def activated(x: Tensor, factor: Tensor, offset: Tensor, low: Tensor, high: Tensor, *other: Tensor) -> Tensor:
    """Normalize, add another tensor if there is one, and clamp.

    Args:
        x: Shape [N, C, L].
        factor: See :class:`Norm`, and so the next.
        offset: Added.
        low: Lower end of the activation, shape [].
        high: Upper end of the activation, shape [].
        *other: At most one tensor of the shape of ``x``.

    Returns:
        Shape [N, C, L].
    """
    return clamped_sum(x * _over_channels(factor) + _over_channels(offset), low, high, *other)


def clamped_sum(x: Tensor, low: Tensor, high: Tensor, *other: Tensor) -> Tensor:
    """Add another tensor if there is one, and clamp; the arguments are those of :func:`activated`."""
    for term in other:
        x = x + term
    return torch.minimum(torch.maximum(x, low), high)


def activated_range(*args: Tensor) -> tuple[Tensor, ...]:
    """Compute :func:`activated`, and its least and greatest value, each of shape []."""
    y = activated(*args)
    return y, y.amin(2).amin(), y.amax(2).amax()


def quantized(*args: Tensor) -> Tensor:
    """Compute :func:`activated` and fake-quantize; the arguments of that, then those of a :class:`.Grid`."""
    return forward_formula(activated(*args[:-_GRID]), *args[-_GRID:])


def quantized_and_plain(*args: Tensor) -> tuple[Tensor, Tensor]:
    """Compute :func:`quantized` and :func:`activated`."""
    y = activated(*args[:-_GRID])
    return forward_formula(y, *args[-_GRID:]), y


def gradients(
    grad: Tensor, x: Tensor, mean: Tensor, inverse_std: Tensor, factor: Tensor, offset: Tensor, *rest: Tensor
) -> tuple[Tensor, ...]:
    """Compute the sums of the backward, for an activation that is quantized and not used otherwise.

    Args:
        grad: Gradient of the result, shape [N, C, L].
        x: Input of the batch norm, likewise.
        mean: See :class:`Norm`, and so the next three.
        inverse_std: Of the batch.
        factor: Multiplied with.
        offset: Added.
        *rest: Ends of the activation, then the numbers of a :class:`.Grid`.

    Returns:
        Gradients of weight and bias of the norm, shape [C], and of the scale, shape [1]; then two numbers per channel
        for :func:`input_gradient`.
    """
    inner, of_scale = _inner(grad, x, factor, offset, *rest)
    return _sums(inner, of_scale, x, mean, inverse_std, factor)


def input_gradient(
    grad: Tensor, x: Tensor, mean: Tensor, factor: Tensor, offset: Tensor, first: Tensor, second: Tensor, *rest: Tensor
) -> Tensor:
    """Compute the gradient of the input, with the numbers of :func:`gradients`; its other arguments are the same."""
    inner, _ = _inner(grad, x, factor, offset, *rest)
    return norm_gradient(inner, x, mean, factor, first, second)


def gradients_through(
    grad: Tensor, y: Tensor, x: Tensor, mean: Tensor, inverse_std: Tensor, factor: Tensor, *rest: Tensor
) -> tuple[Tensor, ...]:
    """Compute :func:`gradients` where the activation ``y`` was kept.

    Args:
        grad: Gradient of the quantized activation, shape [N, C, L].
        y: The activation, likewise.
        x: Input of the batch norm, likewise.
        mean: See :class:`Norm`, and so the next two.
        inverse_std: Of the batch.
        factor: Multiplied with.
        *rest: Ends of the activation, the numbers of a :class:`.Grid`, and, where there is one, the gradient of the
            activation as it is.

    Returns:
        As :func:`gradients`; then the gradient of what goes into the activation.
    """
    low, high, *grid = rest[: 2 + _GRID]
    inner, (of_scale,) = step_terms(grad, y, *grid)
    for plain in rest[2 + _GRID :]:
        inner = inner + plain
    inner = _clamp_gradient(inner, y, low, high)
    return *_sums(inner, of_scale, x, mean, inverse_std, factor), inner


def norm_gradient(
    inner: Tensor, x: Tensor, mean: Tensor, factor: Tensor, first: Tensor, second: Tensor
) -> Tensor:  # fmt: skip
    """Compute the gradient of a batch norm's input from that of its result and the numbers of :func:`gradients`."""
    distance = x - _over_channels(mean)
    return _over_channels(factor) * inner - _over_channels(first) - distance * _over_channels(second)


_GRID = len(Grid._fields)


def _inner(
    grad: Tensor, x: Tensor, factor: Tensor, offset: Tensor, low: Tensor, high: Tensor, *grid: Tensor
) -> tuple[Tensor, Tensor]:
    """Give the gradient of the norm's result, and the terms of that of the scale."""
    y = activated(x, factor, offset, low, high)
    inner, (of_scale,) = step_terms(grad, y, *grid)
    return _clamp_gradient(inner, y, low, high), of_scale


def _clamp_gradient(grad: Tensor, y: Tensor, low: Tensor, high: Tensor) -> Tensor:
    return torch.where((y > low) & (y < high), grad, 0.0)


def _sums(
    inner: Tensor, of_scale: Tensor, x: Tensor, mean: Tensor, inverse_std: Tensor, factor: Tensor
) -> tuple[Tensor, ...]:
    count = x.shape[0] * x.shape[2]
    of_bias = _sum(inner)
    of_weight = _sum(inner * (x - _over_channels(mean))) * inverse_std
    first, second = factor * of_bias / count, factor * inverse_std * of_weight / count
    return of_weight, of_bias, _sum(of_scale).sum().reshape(1), first, second


def _over_channels(p: Tensor) -> Tensor:
    return p.reshape(1, -1, 1)


def _sum(x: Tensor) -> Tensor:
    """Sum all but the channels: row by row first, which keeps more digits than one long sum."""
    return x.sum(2).sum(0)
