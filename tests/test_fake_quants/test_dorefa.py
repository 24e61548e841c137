"""DoReFa: weights through a hyperbolic tangent."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_models import Net, calibrate, error, images, qconfig, quantized, trained
from torch import nn

from mmrazor_quant.fake_quants import DoReFaFakeQuantize
from mmrazor_quant.observers import MinMaxObserver
from mmrazor_quant.qscheme import QScheme
from mmrazor_quant.quantizers import CustomQuantizer

DOREFA = dict(type='mmrazor.DoReFaFakeQuantize')


def build(scheme, channels=None, **kwargs):
    quantizer = DoReFaFakeQuantize(observer=MinMaxObserver, **scheme.observer_params(), **kwargs)
    if channels is not None:
        quantizer.set_channels(channels)
    return quantizer


def in_numpy(weight, scheme, rescale):
    """eq. 9 of Zhou et al. 2016, with the grid of the scheme in place of 2 quantize(w / 2 + 1 / 2) - 1."""
    w = weight.detach().numpy().astype(np.float64)
    axes = tuple(d for d in range(w.ndim) if not scheme.is_per_channel or d != scheme.ch_axis)
    t = np.tanh(w)
    t = t / np.abs(t).max(axes, keepdims=True)
    largest = np.abs(w).max(axes, keepdims=True) if rescale else np.ones_like(np.abs(w).max(axes, keepdims=True))
    levels = scheme.quant_max - scheme.quant_min
    scale = 2 * largest / levels
    if scheme.is_pot_scale:
        scale = 2.0 ** np.round(np.log2(scale))
    zero = 0 if scheme.is_symmetry else scheme.quant_min - np.rint(-largest / scale)
    q = np.clip(np.rint(t * largest / scale) + zero, scheme.quant_min, scheme.quant_max)
    return (q - zero) * scale, scale


@pytest.mark.parametrize('rescale', [True, False])
@pytest.mark.parametrize('fields', [
    dict(), dict(is_symmetric_range=True), dict(is_symmetry=False), dict(is_pot_scale=True),
    dict(is_per_channel=True), dict(is_per_channel=True, ch_axis=1, is_symmetric_range=True)])  # fmt: skip
@pytest.mark.parametrize('bit', [2, 4, 8])
def test_equals_numpy(bit, fields, rescale):
    scheme = QScheme(bit=bit, **fields)
    weight = torch.randn(6, 4, 3, 3)
    quantizer = build(scheme, weight.shape[scheme.ch_axis] if scheme.is_per_channel else None, rescale=rescale)
    expected, scale = in_numpy(weight, scheme, rescale)

    found = quantizer(weight).numpy()

    np.testing.assert_allclose(quantizer.scale.numpy(), scale.reshape(-1), rtol=1e-6)
    # The largest weight is on a tie of the unrestricted symmetric range, which either neighbour clips to.
    flips = np.abs(found - expected) > 1e-5 * np.abs(expected).max()
    assert flips.mean() < 0.03 and (np.abs(found - expected) <= 1.01 * scale).all()


def test_gradient_is_that_of_the_tangent():
    weight = torch.randn(40, dtype=torch.float64, requires_grad=True)
    quantizer = build(QScheme(bit=4, is_symmetric_range=True))
    grad = torch.randn(40, dtype=torch.float64)
    quantizer(weight).backward(grad)
    found, weight.grad = weight.grad, None
    t = torch.tanh(weight)
    (t / t.abs().max() * weight.detach().abs().max()).backward(grad)
    torch.testing.assert_close(found, weight.grad)


def test_follows_the_weights_without_an_observer():
    quantizer = build(QScheme(bit=8, is_symmetric_range=True))
    quantizer.disable_observer()
    for factor in (1.0, 0.01, 5.0):
        weight = factor * torch.randn(1000)
        quantizer(weight)
        assert quantizer.scale.item() == pytest.approx(weight.abs().max().item() / 127)
    assert quantizer.activation_post_process.min_val.isinf()


def test_rescaled_small_weights_stay_what_they_are():
    """tanh is the identity near zero, so a pretrained network survives."""
    weight = 0.1 * torch.randn(1000)
    assert error(build(QScheme(bit=8))(weight), weight) < 0.03
    assert error(build(QScheme(bit=8), rescale=False)(weight), weight) > 1


def test_zero_weights_and_off():
    quantizer = build(QScheme(bit=4, is_per_channel=True), 2)
    weight = torch.zeros(2, 3)
    weight[1] = 1.0
    y = quantizer(weight.requires_grad_())
    assert torch.isfinite(y).all() and (y[0] == 0).all()
    y.sum().backward()
    assert torch.isfinite(weight.grad).all()
    quantizer.disable_fake_quant()
    assert quantizer(weight) is weight


def test_called_twice_before_backward():
    quantizer = build(QScheme(bit=4))
    weight = torch.randn(30, requires_grad=True)
    (quantizer(weight).sum() + quantizer(2 * weight).sum()).backward()
    assert torch.isfinite(weight.grad).all()


CONFIG = qconfig(w=4, a=8, w_fake_quant=DOREFA)
MODELS = {
    'layers': lambda: trained(
        nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ConvTranspose2d(4, 2, 3), nn.Flatten(), nn.Linear(128, 3)
        )
    ),
    'function': lambda: Net(lambda m, x: F.conv2d(x, m.a.weight, m.a.bias), a=nn.Conv2d(3, 2, 1)),
    'computed weight': lambda: Net(lambda m, x: F.conv2d(x, m.a.weight * 2), a=nn.Conv2d(3, 2, 1)),
}


@pytest.mark.parametrize('quantize_bias', [False, True])
@pytest.mark.parametrize('rescale', [True, False])
@pytest.mark.parametrize('name', MODELS)
def test_models(name, rescale, quantize_bias):
    config = dict(CONFIG, w_fake_quant=dict(DOREFA, rescale=rescale))
    model = calibrate(quantized(MODELS[name](), config, quantize_bias=quantize_bias))
    converted = model.convert()
    x = images(seed=3)
    torch.testing.assert_close(converted(x), model(x), rtol=1e-5, atol=1e-5)
    model.train()(x).pow(2).sum().backward()
    gradients = [p.grad for key, p in model.named_parameters() if key.endswith('weight')]
    assert all(g is not None and torch.isfinite(g).all() for g in gradients)


@pytest.mark.parametrize('qconfig, match', [
    (dict(a_fake_quant=DOREFA), r'qconfig\.a_fake_quant\.type: DoReFaFakeQuantize is not for activations; allowed: '),
    (dict(overrides=[dict(type='Linear', a_fake_quant=DOREFA)]),
     r'qconfig\.overrides\[0\]\.a_fake_quant\.type: DoReFaFakeQuantize is not for activations'),
    (dict(w_fake_quant=dict(DOREFA, rescal=True)), r'qconfig\.w: DoReFaFakeQuantize with MinMaxObserver: .*rescal'),
])  # fmt: skip
def test_refusals(qconfig, match):
    with pytest.raises(ValueError, match=match):
        CustomQuantizer(qconfig=qconfig)
