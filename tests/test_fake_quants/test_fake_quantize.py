"""The fake quantizer as a module: switches, state, copies, shapes, torch's observers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.ao.quantization import HistogramObserver, MovingAverageMinMaxObserver, PerChannelMinMaxObserver
from torch.ao.quantization import disable_observer as torch_disable_observer

from mmrazor_quant import ops
from mmrazor_quant.compat import FakeQuantizeBase
from mmrazor_quant.fake_quants import FakeQuantize, build_fake_quant
from mmrazor_quant.observers import EMAMinMaxObserver, MinMaxObserver
from mmrazor_quant.qscheme import QScheme

ASYMMETRIC = QScheme(bit=4, is_symmetry=False)
CHANNELS = QScheme(bit=4, is_per_channel=True)


def build(scheme=ASYMMETRIC, observer=MinMaxObserver, **kwargs):
    return FakeQuantize(observer=observer, **scheme.observer_params(), **kwargs)


def off(quantizer):
    quantizer.disable_observer()
    quantizer.disable_fake_quant()
    return quantizer


def test_is_a_torch_fake_quantizer():
    quantizer = build()
    assert isinstance(quantizer, FakeQuantizeBase)
    assert quantizer.scale.shape == quantizer.zero_point.shape == (1,)
    assert quantizer.scale.dtype == torch.float32 and quantizer.zero_point.dtype == torch.int32
    assert quantizer.fake_quant_enabled.dtype == quantizer.observer_enabled.dtype == torch.uint8


def test_switches():
    x = torch.randn(100)
    quantizer = off(build())
    assert quantizer(x) is x and quantizer.activation_post_process.min_val.isinf()
    quantizer.enable_observer()
    assert quantizer(x) is x
    assert quantizer.activation_post_process.min_val == x.min() and quantizer.scale == 1
    quantizer.compute_qparams()
    quantizer.disable_observer()
    quantizer.enable_fake_quant()
    expected = ops.fake_quantize(x, quantizer.scale, quantizer.zero_point, 0, 15)
    assert torch.equal(quantizer(x), expected) and not torch.equal(expected, x)
    quantizer(10 * x)
    assert quantizer.activation_post_process.min_val == x.min()
    quantizer.enable_observer()
    quantizer(10 * x)
    assert quantizer.activation_post_process.min_val == 10 * x.min()
    assert torch.equal(quantizer.scale, quantizer.calculate_qparams()[0]), 'refreshed as both are on'
    torch_disable_observer(quantizer)
    quantizer(100 * x)
    assert quantizer.activation_post_process.min_val == 10 * x.min()


@pytest.mark.parametrize('scheme', [ASYMMETRIC, CHANNELS])
def test_forward_never_reads_a_value(monkeypatch, scheme):
    quantizer = build(scheme, EMAMinMaxObserver)
    if scheme.is_per_channel:
        quantizer.set_channels(8)

    def refuse(*args):
        raise AssertionError('a tensor was converted to a Python value')

    x = torch.randn(8, 20, requires_grad=True)
    with monkeypatch.context() as patch:
        for name in ('item', 'tolist', '__bool__', '__float__', '__int__'):
            patch.setattr(torch.Tensor, name, refuse)
        quantizer(x).sum().backward()
        quantizer(x)


@pytest.mark.parametrize('scheme', [ASYMMETRIC, CHANNELS])
@pytest.mark.parametrize('prepared', [True, False])
@pytest.mark.parametrize('assign', [True, False])
def test_saving_and_loading(scheme, prepared, assign):
    x = torch.randn(6, 30)
    one = build(scheme)
    one(x)
    one.compute_qparams()
    one.disable_observer()
    two = build(scheme)
    if prepared and scheme.is_per_channel:
        two.set_channels(6)
    keys = two.load_state_dict(copy.deepcopy(one.state_dict()), assign=assign)
    assert not keys.missing_keys and not keys.unexpected_keys
    assert torch.equal(one(10 * x), two(10 * x)), 'the switches are loaded too'
    assert torch.equal(two.scale, one.scale)
    two.disable_fake_quant()
    two.load_state_dict(one.state_dict())
    assert torch.equal(one(x), two(x))


def test_copies_keep_switches_and_are_independent():
    one = off(build())
    two = copy.deepcopy(one)
    x = torch.randn(50)
    assert two(x) is x
    two.enable_observer()
    two.enable_fake_quant()
    assert two(x) is not x and one(x) is x


def test_set_channels():
    quantizer = build(CHANNELS)
    quantizer.set_channels(5)
    assert quantizer.scale.shape == quantizer.zero_point.shape == (5,)
    assert quantizer.activation_post_process.min_val.shape == (5,)
    x = torch.randn(5, 3, 2, 2)
    y = quantizer(x)
    for i in range(5):
        single = build(QScheme(bit=4))
        assert torch.equal(single(x[i]), y[i])
    with pytest.raises(ValueError, match='set_channels: got 5'):
        build().set_channels(5)


def test_per_channel_quantizer_without_channels_quantizes_per_tensor():
    quantizer = build(CHANNELS)
    quantizer.disable_observer()
    x = torch.randn(5, 3)
    assert torch.equal(quantizer(x), x.round())


def test_axis_of_the_scheme():
    x = torch.randn(4, 6, 5) * torch.arange(1, 7).view(1, 6, 1)
    quantizer = build(QScheme(is_per_channel=True, ch_axis=1))
    quantizer(x)
    assert quantizer.scale.shape == (6,)
    expected = x.abs().amax((0, 2)) / 127.5
    torch.testing.assert_close(quantizer.scale, expected)


def test_module_that_is_called_twice_before_backward():
    """A head shared by several feature maps: the second call refreshes scale before the first is differentiated."""
    quantizer = build(observer=EMAMinMaxObserver)
    x = torch.randn(100, requires_grad=True)
    y = quantizer(x) + quantizer(2 * x)
    y.sum().backward()
    assert torch.isfinite(x.grad).all() and x.grad.max() == 3


def test_modes():
    quantizer = build(CHANNELS)
    x = torch.randn(5, 30)
    with torch.inference_mode():
        quantizer(x)
    quantizer(x)
    quantizer.compute_qparams()
    quantizer.disable_observer()
    expected = quantizer(x)
    state = dict(quantizer.named_buffers())
    assert torch.equal(torch.func.functional_call(quantizer, state, (x,)), expected)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        assert torch.equal(quantizer(x), expected)


def test_bad_data_are_refused_when_parameters_are_computed():
    quantizer = build()
    with pytest.raises(ValueError, match='no data'):
        quantizer.compute_qparams()
    quantizer(torch.tensor([1.0, float('nan')]))
    with pytest.raises(ValueError, match='NaN'):
        quantizer.compute_qparams()


@pytest.mark.parametrize('observer', [MovingAverageMinMaxObserver, HistogramObserver, PerChannelMinMaxObserver])
def test_observers_of_torch(observer):
    scheme = CHANNELS if observer is PerChannelMinMaxObserver else ASYMMETRIC
    quantizer = build_fake_quant({'type': 'mmrazor.FakeQuantize'}, {'type': observer}, scheme, 'qconfig.a')
    x = torch.randn(7, 50, requires_grad=True)
    y = quantizer(x)
    y.sum().backward()
    assert (y - x).abs().max() < 0.5
    quantizer.compute_qparams()
    assert quantizer.scale.shape == (7 if scheme.is_per_channel else 1,)


def test_wide_zero_points():
    quantizer = build(QScheme(bit=32, is_symmetry=False))
    x = torch.randn(1000)
    assert (quantizer(x) - x).abs().max() < 1e-6
    assert quantizer.zero_point.dtype == torch.int64


def test_qat_step_moves_weights():
    class Layer(nn.Linear):
        def __init__(self):
            super().__init__(10, 4)
            self.quantizer = build(CHANNELS)

        def forward(self, x):
            return nn.functional.linear(x, self.quantizer(self.weight), self.bias)

    layer = Layer()
    x, target = torch.randn(64, 10), torch.randn(64, 4)
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    losses = []
    for _ in range(30):
        loss = (layer(x) - target).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_repr():
    quantizer = off(build(CHANNELS))
    quantizer.set_channels(3)
    assert '4 bit, [-8, 7], 3 channels of axis 0, scale=1, fake_quant=off, observer=off' in repr(quantizer)
    assert 'per tensor' in repr(build())
