"""Quantizing a weight with a batch norm folded in and out again is quantizing the product, divided."""

from __future__ import annotations

import pytest
import torch

from mmrazor_quant import ops
from mmrazor_quant.ops import compiled

SHAPES = {'convolution': ((12, 5, 3, 3), 0), 'linear': ((12, 40), 0), 'transposed': ((5, 12, 3, 3), 1)}


def straight_through(x):
    return x + (x.round() - x).detach()


def formula(x, scale, zero_point, factor, low, high):
    """In float64, with the two copies; channels of factor 0 stay."""
    q = torch.clamp(straight_through(x * factor / scale) + zero_point, low, high)
    quantized = (q - zero_point) * scale / torch.where(factor == 0, 1.0, factor)
    return torch.where(factor == 0, x, quantized)


def values(shape, axis, channels_of_scale):
    generator = torch.Generator().manual_seed(1)
    channels = shape[axis]
    x = torch.randn(shape, generator=generator)
    factor = torch.randn(channels, generator=generator)
    factor[3] = 0.0
    scale = torch.rand(channels_of_scale or 1, generator=generator) * 0.3 + 0.05
    return x, factor, scale, torch.randn(shape, generator=generator)


@pytest.fixture(params=['eager', 'compiled'])
def way(request, monkeypatch):
    if request.param == 'eager':
        with ops.eager_mode():
            yield
        return
    monkeypatch.setattr(compiled.switch, 'patience', 0)
    yield
    if not compiled.switch.on:
        pytest.skip('torch.compile does not work here')


@pytest.mark.parametrize('per_channel', [True, False])
@pytest.mark.parametrize('name', SHAPES)
@pytest.mark.parametrize('bounds, zero_point', [((-8, 7), 0), ((-7, 7), 0), ((0, 15), 6)])
def test_values_and_gradients(way, name, per_channel, bounds, zero_point):
    shape, axis = SHAPES[name]
    x, factor, scale, grad = values(shape, axis, shape[axis] if per_channel else 0)
    x.requires_grad_(), scale.requires_grad_()
    zero = torch.full(scale.shape, zero_point, dtype=torch.int32)

    y = ops.fake_quantize_folded(x, scale, zero, factor, *bounds, axis, grad_factor=0.5)
    y.backward(grad)

    exact_x, exact_scale = (t.detach().double().requires_grad_() for t in (x, scale))
    broadcast = [1] * len(shape)
    broadcast[axis] = -1
    expected = formula(
        exact_x, exact_scale.reshape(broadcast if per_channel else 1), zero_point, factor.double().reshape(broadcast),
        *bounds,
    )  # fmt: skip
    expected.backward(grad.double())
    assert y.shape == x.shape
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(x.grad.double(), exact_x.grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(scale.grad.double(), 0.5 * exact_scale.grad, rtol=1e-4, atol=1e-4)


def test_a_fixed_scale_has_no_gradient():
    x, factor, scale, grad = values((12, 40), 0, 12)
    x.requires_grad_()

    ops.fake_quantize_folded(x, scale, torch.zeros(12, dtype=torch.int32), factor, -8, 7, 0).backward(grad)

    assert x.grad is not None and scale.grad is None


def test_power_of_two_scales():
    x, factor, scale, _ = values((12, 40), 0, 12)
    zero = torch.zeros(12, dtype=torch.int32)

    y = ops.fake_quantize_folded(x, scale, zero, factor, -8, 7, 0, is_pot_scale=True)

    rounded = ops.round_to_power_of_two(scale)
    assert torch.equal(y, ops.fake_quantize_folded(x, rounded, zero, factor, -8, 7, 0))
    assert not torch.equal(y, ops.fake_quantize_folded(x, scale, zero, factor, -8, 7, 0))
