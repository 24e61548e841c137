"""Fake quantization of all but some elements against the formula in autograd, in float64."""

from __future__ import annotations

import pytest
import torch

from mmrazor_quant import ops


def reference(x, scale, zero_point, kept, low, high):
    """The formula, straight through the rounding."""
    u = x / scale
    rounded = u + (u.round() - u).detach()
    quantized = ((rounded + zero_point).clamp(low, high) - zero_point) * scale
    return torch.where(kept, x, quantized)


@pytest.mark.parametrize('shape', [(3, 5), (2, 4, 6, 6), (2, 16, 40, 40)])
@pytest.mark.parametrize('channels_last', [False, True])
@pytest.mark.parametrize('immediate', [False, pytest.param(True, marks=pytest.mark.slow)])
def test_values_and_gradients(shape, channels_last, immediate):
    if channels_last and len(shape) != 4:
        pytest.skip('only images have channels last')
    generator = torch.Generator().manual_seed(1)
    dtype = torch.float32 if immediate else torch.float64
    x = torch.randn(shape, generator=generator, dtype=dtype) * 3
    kept = torch.rand(shape, generator=generator) < 0.5
    if channels_last:
        x, kept = (t.contiguous(memory_format=torch.channels_last) for t in (x, kept))
    scale, zero_point = torch.tensor([0.3], dtype=dtype), torch.tensor([5], dtype=torch.int32)
    grad = torch.randn(shape, generator=generator, dtype=dtype)
    results = []
    for function in (ops.fake_quantize_dropped, reference):
        a, s = x.clone(memory_format=torch.preserve_format).requires_grad_(), scale.clone().requires_grad_()
        with ops.immediate_mode() if immediate else ops.eager_mode():
            out = function(a, s, zero_point, kept, 0, 15)
            results.append((out.detach(), *torch.autograd.grad(out, (a, s), grad)))

    found, expected = results
    tolerance = 1e-3 if immediate else 1e-9
    assert all(torch.allclose(one, other, rtol=tolerance, atol=tolerance) for one, other in zip(found, expected))
    assert torch.equal(found[0][kept], x[kept])
