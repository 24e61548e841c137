"""Ranges computed at run time: per tensor, sample and token, against NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small_models import Net, calibrate, error, images, qconfig, quantized, trained
from torch import nn

from mmrazor_quant import ops
from mmrazor_quant.fake_quants import DynamicFakeQuantize
from mmrazor_quant.observers import MinMaxObserver
from mmrazor_quant.qscheme import QScheme
from mmrazor_quant.quantizers import CustomQuantizer

DYNAMIC = dict(type='mmrazor.DynamicFakeQuantize')
SCHEMES = {
    'symmetric': QScheme(bit=4),
    'restricted': QScheme(bit=4, is_symmetric_range=True),
    'asymmetric': QScheme(bit=4, is_symmetry=False),
    'power of two': QScheme(bit=4, is_symmetry=False, is_pot_scale=True),
    '8 bits': QScheme(bit=8, is_symmetry=False),
}


def build(scheme, **kwargs):
    return DynamicFakeQuantize(MinMaxObserver, **scheme.observer_params(), **kwargs)


def row_in_numpy(row, scheme):
    """Scale, zero point and result of the values that share a range."""
    low, high = min(row.min(), 0.0), max(row.max(), 0.0)
    levels = scheme.quant_max - scheme.quant_min
    scale = max(-low, high) / (levels / 2) if scheme.is_symmetry else (high - low) / levels
    scale = np.float64(np.float32(scale)) if scale > 0 else 1.0
    if scheme.is_pot_scale:
        scale = 2.0 ** np.round(np.log2(scale))
    zero = 0 if scheme.is_symmetry else np.clip(
        scheme.quant_min - np.rint(low / scale), scheme.quant_min, scheme.quant_max)  # fmt: skip
    q = np.clip(np.rint(row / scale) + zero, scheme.quant_min, scheme.quant_max)
    return scale, zero, (q - zero) * scale


def in_numpy(x, scheme, share):
    """The whole tensor, row by row."""
    values = x.detach().numpy().astype(np.float64)
    rows = {'tensor': values.reshape(1, -1), 'sample': values.reshape(len(values), -1),
            'token': values.reshape(-1, values.shape[-1])}[share]  # fmt: skip
    scales, zeros, result = zip(*(row_in_numpy(row, scheme) for row in rows))
    return np.array(scales), np.array(zeros), np.stack(result).reshape(values.shape)


def assert_same(found, expected, scales):
    """Equal, but for ties that float32 rounds the other way: one step, in one element of a hundred at most."""
    difference = np.abs(found.detach().numpy() - expected)
    flips = difference > 1e-5 * np.abs(expected).max()
    assert flips.mean() <= 0.01 and difference.max() <= 1.01 * scales.max()


@pytest.mark.parametrize('share', ops.SHARES)
@pytest.mark.parametrize('scheme', SCHEMES.values(), ids=SCHEMES)
@pytest.mark.parametrize('shape', [(3, 5, 6, 7), (4, 10, 16), (8, 12)])
def test_equals_numpy(shape, scheme, share):
    x = torch.randn(shape) * torch.rand(shape[0], *[1] * (len(shape) - 1)) * 3 + 0.5
    quantizer = build(scheme, share=share)
    scales, zeros, expected = in_numpy(x, scheme, share)

    y = quantizer(x)

    assert_same(y, expected, scales)
    scale, zero_point = quantizer.dynamic_qparams(x)
    np.testing.assert_allclose(scale.reshape(-1).numpy(), scales, rtol=1e-6)
    assert np.abs(zero_point.reshape(-1).numpy() - zeros).max() == 0
    kept = {'tensor': [1] * len(shape), 'sample': [shape[0], *[1] * (len(shape) - 1)], 'token': [*shape[:-1], 1]}
    assert list(scale.shape) == list(zero_point.shape) == kept[share]


@pytest.mark.parametrize('share', ops.SHARES)
def test_each_range_is_its_own(share):
    """One extreme value coarsens only what shares its range."""
    x = torch.rand(4, 6, 8)
    quantizer = build(SCHEMES['8 bits'], share=share)
    before = quantizer(x)
    spoiled = x.clone()
    spoiled[1, 2, 3] = 1000.0
    same = (quantizer(spoiled) == before).all(-1)
    rows = {'tensor': 24, 'sample': 6, 'token': 1}[share]
    assert (~same).sum() == rows


@pytest.mark.parametrize('share', ops.SHARES)
@pytest.mark.parametrize('arrange', [
    lambda x: x.contiguous(memory_format=torch.channels_last), lambda x: x.permute(2, 3, 0, 1),
    lambda x: x.transpose(0, 3), lambda x: x[:, ::2], lambda x: x[:1].expand(4, -1, -1, -1)])  # fmt: skip
def test_memory_formats(arrange, share):
    x = arrange(torch.randn(3, 4, 5, 6))
    quantizer = build(SCHEMES['asymmetric'], share=share)
    assert torch.equal(quantizer(x), quantizer(x.contiguous()))


@pytest.mark.parametrize('share', ops.SHARES)
def test_large_tensors(compile_now, share):
    x = torch.randn(40, 10, 8, 64)
    quantizer = build(SCHEMES['asymmetric'], share=share)
    y = quantizer(x)
    with ops.eager_mode():
        assert torch.equal(quantizer(x), y)


@pytest.fixture
def compile_now(monkeypatch):
    monkeypatch.setattr(ops.compiled.switch, 'on', True)
    monkeypatch.setattr(ops.compiled.switch, 'patience', 0)


def test_constant_and_zero_rows():
    x = torch.tensor([[0.0, 0.0, 0.0], [2.0, 2.0, 2.0], [-3.0, -3.0, -3.0]])
    for scheme in SCHEMES.values():
        y = build(scheme, share='token')(x)
        assert torch.isfinite(y).all() and (y[0] == 0).all()
        assert ((y - x).abs() <= x.abs() * (0.5 if scheme.is_pot_scale else 0.07)).all()


@pytest.mark.parametrize('share', ops.SHARES)
def test_gradient_passes_straight_through(share):
    x = torch.randn(4, 5, 6, requires_grad=True)
    grad = torch.randn(4, 5, 6)
    build(SCHEMES['asymmetric'], share=share)(x).backward(grad)
    assert torch.equal(x.grad, grad)


def test_observer_plays_no_part():
    quantizer = build(SCHEMES['asymmetric'])
    x = torch.randn(100)
    quantizer(x)
    assert quantizer.activation_post_process.min_val.isinf()
    scale, zero_point = quantizer.calculate_qparams()
    assert torch.equal(scale, quantizer.dynamic_qparams(x)[0]) and torch.equal(zero_point, quantizer.zero_point)
    quantizer.compute_qparams()
    assert torch.equal(quantizer.scale, scale) and quantizer.is_dynamic
    quantizer.disable_fake_quant()
    assert quantizer(x) is x


def test_empty_tensors():
    for share in ops.SHARES:
        assert build(SCHEMES['asymmetric'], share=share)(torch.zeros(0, 4)).shape == (0, 4)


@pytest.mark.parametrize('share', ['tensor', 'sample', 'token'])
def test_empty_tensors_in_converted_models(share):
    """A detector's second stage without proposals."""
    config = qconfig(a=8, a_fake_quant=dict(DYNAMIC, share=share))
    model = calibrate(quantized(nn.Sequential(nn.Conv2d(3, 4, 3)), config))
    assert model(images(0)).shape == (0, 4, 6, 6)
    assert model.convert()(images(0)).shape == (0, 4, 6, 6)


@pytest.mark.parametrize('share', ops.SHARES)
def test_a_model_needs_no_data(share):
    network = trained(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3))).eval()
    expected = network(images(seed=5))
    model = quantized(network, qconfig(a=12, w=12, a_fake_quant=dict(DYNAMIC, share=share)))
    model.observe_weights()
    model.compute_act_qparams()
    model.mark_calibrated()
    model.set_quant_state(False, True, False, True)
    found = model(images(seed=5))
    assert 0 < error(found, expected) < 5e-3
    assert torch.allclose(model.convert()(images(seed=5)), found, atol=1e-5)


def test_matrix_products():
    layers = dict(a=nn.Linear(8, 8), b=nn.Linear(8, 8))
    network = Net(lambda m, x: m.a(x) @ m.b(x).transpose(-1, -2), **layers)
    model = quantized(network, qconfig(a=8, a_fake_quant=dict(DYNAMIC, share='token')), input_shape=(5, 8))
    calibrate(model, torch.randn(2, 5, 8))
    x = torch.randn(2, 5, 8)
    torch.testing.assert_close(model.convert()(x), model(x))


def test_refusals():
    with pytest.raises(ValueError, match="share: got 'row', allowed: 'tensor', 'sample', 'token'"):
        build(QScheme(), share='row')
    with pytest.raises(ValueError, match='is_per_channel: got True, allowed with DynamicFakeQuantize: False'):
        build(QScheme(is_per_channel=True))


@pytest.mark.parametrize('qconfig, match', [
    (dict(w_fake_quant=DYNAMIC),
     r'qconfig\.w_fake_quant\.type: DynamicFakeQuantize is not for weights; allowed: .*mmrazor\.LSQFakeQuantize'),
    (dict(w_fake_quant=dict(type='mmrazor.PACTFakeQuantize')),
     r'qconfig\.w_fake_quant\.type: PACTFakeQuantize is not for weights'),
    (dict(a_fake_quant=DYNAMIC, a_qscheme=dict(bit=8, is_per_channel=True)),
     r'qconfig\.a: DynamicFakeQuantize with EMAMinMaxObserver: is_per_channel: got True, .*see share'),
    (dict(a_fake_quant=dict(DYNAMIC, share='channel')), r"qconfig\.a_fake_quant\.share: got 'channel'"),
    (dict(overrides=[dict(name='*', w_fake_quant=DYNAMIC)]),
     r'qconfig\.overrides\[0\]\.w_fake_quant\.type: DynamicFakeQuantize is not for weights'),
])  # fmt: skip
def test_what_a_qconfig_may_not_say(qconfig, match):
    with pytest.raises(ValueError, match=match):
        CustomQuantizer(qconfig=qconfig)
    allowed = str(pytest.raises(ValueError, CustomQuantizer, qconfig=dict(w_fake_quant=DYNAMIC)).value).split('allowed')
    assert 'Dynamic' not in allowed[1] and 'PACT' not in allowed[1]
