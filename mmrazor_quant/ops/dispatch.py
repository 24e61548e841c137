"""Choice between the eager formulas and the compiled ones, and their gradient."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from . import reference


@contextlib.contextmanager
def eager_mode() -> Iterator[None]:
    """Use the eager formulas inside this context."""
    yield


class _FakeQuantize(torch.autograd.Function):
    """Fake quantization with the straight-through gradient; keeps only the input and the parameters."""

    @staticmethod
    def forward(ctx, x, scale, zero_point, quant_min, quant_max, ch_axis):
        ctx.save_for_backward(x, scale, zero_point)
        ctx.spec = (quant_min, quant_max, ch_axis)
        return reference.fake_quantize(x, scale, zero_point, *ctx.spec)

    @staticmethod
    def backward(ctx, grad):
        return (reference.fake_quantize_backward(grad, *ctx.saved_tensors, *ctx.spec), *[None] * 5)


def fake_quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int, ch_axis: int = -1
) -> Tensor:
    """Quantize and dequantize."""
    return _FakeQuantize.apply(x, scale, zero_point, quant_min, quant_max, ch_axis)
