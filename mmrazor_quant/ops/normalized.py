"""Batch norm in training, activation and fake quantization in one, in few walks over memory.

Autograd function over the compiled formulas of :mod:`.normalized_reference`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from . import compiled
from . import normalized_reference as formulas
from .dispatch import like_strided
from .qparams import effective_scale, gradient_of_scale
from .reference import Grid, forward_formula, make_grid, number, work_dtype

MIN_NUMEL = 2**15
"""Smaller tensors are left to the operations one by one."""

_WORK = 2**5
"""What of :class:`compiled.switch`'s patience a call uses up per element; less than its operations, since there are
several functions to compile."""

_EXAMPLES = {'v': (32, 64, 784), 'c': (64,), 'n': ()}
"""Example shapes of values, of what there is one of a channel, and of numbers."""

_GRID = 'n' * len(Grid._fields)


@dataclass(frozen=True)
class BatchNorm:
    """The parameters of a batch norm.

    Args:
        weight: Shape [C].
        bias: Shape [C].
        running_mean: Shape [C]; updated.
        running_var: Shape [C]; updated.
        momentum: Weight of a batch in the running statistics.
        eps: Added to the variance.
    """

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor
    momentum: float
    eps: float


@dataclass(frozen=True)
class Quantization:
    """How a fake quantizer would treat a tensor.

    Args:
        scale: Shape [1].
        zero_point: Whole number, shape [1].
        quant_min: Lowest integer.
        quant_max: Highest integer.
        grad_factor: Factor of the gradient of the scale; None: it is not learned.
        is_pot_scale: Whether the scale is rounded to a power of two.
        from_range: Gives scale and zero point for a tensor, from its least and greatest value (shape []); None: those
            above.
    """

    scale: Tensor
    zero_point: Tensor
    quant_min: int
    quant_max: int
    grad_factor: float | None = None
    is_pot_scale: bool = False
    from_range: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None


def usable(x: Tensor, other: Tensor | None, quantization: Quantization) -> bool:
    """Tell whether :func:`fake_quantize_normalized` takes these; asking counts as work done without it.

    Args:
        x: Input of the batch norm.
        other: What is added before the activation.
        quantization: How it is quantized.

    Returns:
        True in training for contiguous float32 tensors of three dimensions or more that are large enough, up to 24
        bits per tensor, once compiling has become worthwhile.
    """
    if not (torch.is_grad_enabled() and x.requires_grad and compiled.usable(x, MIN_NUMEL)):
        return False
    if quantization.scale.numel() != 1 or not _fits(x) or x.shape[1] == x.numel():
        return False
    if other is not None and not (other.shape == x.shape and _fits(other)):
        return False
    wide = work_dtype(x.dtype, quantization.quant_min, quantization.quant_max) != x.dtype
    return not (wide or torch.is_autocast_enabled(x.device.type)) and compiled.switch.is_due(usable, x.numel() * _WORK)


def _fits(x: Tensor) -> bool:
    return x.dtype == torch.float32 and x.dim() >= 3 and x.is_contiguous()


def _run(function: Callable[..., Any], kinds: str, *tensors: Tensor) -> Any:
    """Run a formula; in eager if compiling fails at this late moment."""
    result = compiled.call(function, tuple([_EXAMPLES[kind] for kind in kinds]), *tensors)
    return function(*tensors) if result is None else result


def _rows(x: Tensor) -> Tensor:
    """View values as [N, C, L]."""
    samples, channels, *_ = x.shape
    return x.as_strided((samples, channels, x.numel() // (samples * channels)), (x.stride(0), x.stride(1), 1))


class _Normalized(torch.autograd.Function):
    """Keeps the input and, where it is made anyway, the activation."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, other: Tensor | None, weight: Tensor, bias: Tensor, scale: Tensor, norm: BatchNorm,
        ends: tuple[float, float], quantization: Quantization, has_plain: bool,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        clamp = tuple([number(end, x.device) for end in ends])
        others = () if other is None else (_rows(other),)
        observes = quantization.from_range is not None
        numbers, extremes = _normalize(_rows(x), weight, bias, norm, observes and not others)
        inputs = (_rows(x), numbers.factor, numbers.offset, *clamp, *others)
        plain = None
        if observes and others:
            plain, *extremes = _run(formulas.activated_range, 'vccnnv', *inputs)
        if observes:
            new = quantization.from_range(*(torch.clamp(extreme, *ends) for extreme in extremes))
            quantization = replace(quantization, scale=new[0], zero_point=new[1])
        step, grid = unit_grid(x, quantization)
        result, plain = _quantize(inputs, plain, grid, keeps=has_plain or bool(others))
        for made in (result, plain):
            if made is not None:
                made.as_strided_(x.shape, x.stride())
        ctx.save_for_backward(x, plain, scale, step, *numbers, *clamp, *grid)
        ctx.quantization, ctx.has_other = quantization, bool(others)
        ctx.set_materialize_grads(False)
        return result, plain if has_plain else None

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor | None, of_plain: Tensor | None) -> tuple[Tensor | None, ...]:
        x, plain, scale, step, *numbers = ctx.saved_tensors
        grad = _rows(torch.zeros_like(x) if grad is None else like_strided(grad, x))
        if plain is None:
            of_x, of_other, of_weight, of_bias, of_step = _backward(grad, _rows(x), *numbers)
        else:
            more = () if of_plain is None else (_rows(like_strided(of_plain, x)),)
            of_x, of_other, of_weight, of_bias, of_step = _backward_kept(grad, _rows(plain), _rows(x), more, *numbers)
        for made in (of_x, of_other):
            if made is not None:
                made.as_strided_(x.shape, x.stride())
        of_scale = None
        if ctx.needs_input_grad[4]:
            q = ctx.quantization
            of_scale = gradient_of_scale(of_step, scale, step, q.grad_factor, q.is_pot_scale)
        return of_x, of_other if ctx.has_other else None, of_weight, of_bias, of_scale, None, None, None, None


def _normalize(
    x: Tensor, weight: Tensor, bias: Tensor, norm: BatchNorm, has_range: bool
) -> tuple[formulas.Norm, list[Tensor]]:
    """Compute the numbers of the batch norm, and the range of its result if asked for; update its statistics."""
    function = formulas.batch_norm_range if has_range else formulas.batch_norm
    constants = (number(norm.momentum, x.device), number(norm.eps, x.device))
    parameters = (weight, bias, norm.running_mean, norm.running_var, *constants)
    mean, inverse_std, factor, offset, running_mean, running_var, *extremes = _run(function, 'vccccnn', x, *parameters)
    norm.running_mean.copy_(running_mean)
    norm.running_var.copy_(running_var)
    return formulas.Norm(mean, inverse_std, factor, offset), extremes


def unit_grid(x: Tensor, quantization: Quantization) -> tuple[Tensor, Grid]:
    """Give the scale in use, shape [1], and the grid, of numbers of shape []."""
    q = quantization
    step = effective_scale(q.scale, q.is_pot_scale)
    grid = make_grid(x, step.reshape(()), q.zero_point.reshape(()), q.quant_min, q.quant_max)
    return step, grid


def _quantize(
    inputs: tuple[Tensor, ...], plain: Tensor | None, grid: Grid, keeps: bool
) -> tuple[Tensor, Tensor | None]:
    """Compute the quantized activation; and the activation, if there is one already or it is to be kept."""
    if plain is not None:
        return _run(forward_formula, 'v' + _GRID, plain, *grid), plain
    kinds = 'vccnn' + 'v' * (len(inputs) - 5) + _GRID
    if keeps:
        return _run(formulas.quantized_and_plain, kinds, *inputs, *grid)
    return _run(formulas.quantized, kinds, *inputs, *grid), None


def _backward(grad: Tensor, x: Tensor, *numbers: Tensor) -> tuple[Tensor | None, ...]:
    """Give gradients of input, other, weight, bias and scale from those of the quantized activation alone."""
    mean, _, factor, offset, *rest = numbers
    *sums, first, second = _run(formulas.gradients, 'vvccccnn' + _GRID, grad, x, *numbers)
    of_x = _run(
        formulas.input_gradient, 'vvcccccnn' + _GRID, grad, x, mean, factor, offset, first, second, *rest
    )  # fmt: skip
    return of_x, None, *sums


def _backward_kept(
    grad: Tensor, plain: Tensor, x: Tensor, of_plain: tuple[Tensor, ...], *numbers: Tensor
) -> tuple[Tensor | None, ...]:
    """Give the same where the activation was kept, and maybe used as it is."""
    mean, inverse_std, factor, _, *rest = numbers
    kinds = 'vvvcccnn' + _GRID + 'v' * len(of_plain)
    *sums, first, second, inner = _run(
        formulas.gradients_through, kinds, grad, plain, x, mean, inverse_std, factor, *rest, *of_plain
    )
    of_x = _run(formulas.norm_gradient, 'vvcccc', inner, x, mean, factor, first, second)
    return of_x, inner, *sums


def fake_quantize_normalized(
    x: Tensor, other: Tensor | None, norm: BatchNorm, ends: tuple[float, float], quantization: Quantization,
    has_plain: bool = False,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Normalize with the statistics of the batch, add, clamp, and fake-quantize.

    Equal to the operations one by one up to rounding. It has no gradient of gradients (:func:`.dispatch.eager_mode`
    keeps a model from using it).

    Args:
        x: Shape [N, C, ...]; see :func:`usable`.
        other: Added before the activation, shape of ``x``; None: nothing.
        norm: The batch norm, whose running statistics are updated.
        ends: What the activation clamps to: (0, inf) is ReLU, (-inf, inf) none.
        quantization: How the result is quantized. Its scale gets a gradient if it is learned.
        has_plain: Whether the result is needed unquantized too.

    Returns:
        The quantized result, and the unquantized one or None.
    """
    return _Normalized.apply(x, other, norm.weight, norm.bias, quantization.scale, norm, ends, quantization, has_plain)
