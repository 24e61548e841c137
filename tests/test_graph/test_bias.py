"""Biases as int32 with the product of the scales of input and weight, in calls, gradients and converted models."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_models import Net, calibrate, error, images, qconfig, quantized, trained
from torch import nn

from mmrazor_quant import ops
from mmrazor_quant.graph import layers
from mmrazor_quant.graph.bias import BIAS_MAX, BIAS_MIN, bias_scale, quantized_bias, rounded_bias
from mmrazor_quant.graph.layers import call_layer, folded_bias
from mmrazor_quant.quantizers import CustomQuantizer
from mmrazor_quant.tracing import Island

BITS = qconfig(w=4, a=4)


def with_bias(model, config=None, inputs=(), **quantizer):
    return calibrate(quantized(model, config or BITS, quantize_bias=True, **quantizer), *inputs)


def integers(bias, input_scale, weight_scale):
    """round(b / (s_in s_w)) in float64, the weight's scales repeated over the groups."""
    scale = np.float64(np.float32(input_scale)) * np.asarray(weight_scale, dtype=np.float64)
    scale = np.tile(scale, bias.numel() // scale.size)
    return np.rint(bias.detach().numpy().astype(np.float64) / scale), scale


def assert_rounded(found, bias, input_quantizer, weight_quantizer):
    """The bias is on its grid, at the nearest point."""
    q, scale = integers(bias, input_quantizer.scale_in_use().item(), weight_quantizer.scale_in_use().numpy())
    assert (np.abs(q) < 2**31).all()
    # The product of scales is rounded to float32 and so is the bias.
    np.testing.assert_allclose(found.detach().numpy(), q * scale, rtol=2e-7, atol=1e-12)


def bias_seen(model, layer_path):
    """The bias that a layer runs with."""
    layer, seen = model.architecture.get_submodule(layer_path), []

    def spy(called, x, weight, bias, *args, **kwargs):
        if called is layer:
            seen.append(bias.detach().clone())
        return call_layer(called, x, weight, bias, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layers, 'call_layer', spy)
        model(images())
    return seen[-1]


LAYERS = {
    'convolution': lambda: nn.Conv2d(3, 4, 3),
    'grouped': lambda: nn.Conv2d(3, 6, 3, groups=3),
    'transposed': lambda: nn.ConvTranspose2d(3, 5, 3),
    'grouped transposed': lambda: nn.ConvTranspose2d(3, 6, 3, groups=3),
    'linear': lambda: nn.Linear(8, 6),
}


@pytest.mark.parametrize('per_channel', [False, True])
@pytest.mark.parametrize('name', LAYERS)
def test_the_bias_of_a_layer(name, per_channel):
    config = dict(BITS, w_qscheme=dict(bit=4, is_per_channel=per_channel))
    model = with_bias(nn.Sequential(LAYERS[name]()), config)
    layer = model.architecture[0]
    converted = model.convert()
    for bias in (bias_seen(model, '0'), converted[0].bias):
        assert_rounded(bias, layer.bias, layer.input_fake_quant, layer.weight_fake_quant)
        assert not torch.equal(bias, layer.bias)
    assert torch.allclose(converted(images()), model(images()), atol=1e-5)


def test_groups_of_a_transposed_convolution_repeat_the_scales():
    """Its scales are those of the channels of a group; output channel g * n + j has that of j."""
    model = with_bias(nn.Sequential(nn.ConvTranspose2d(3, 6, 3, groups=3)))
    layer = model.architecture[0]
    scale = bias_scale(layer.input_fake_quant, layer.weight_fake_quant, 6)
    assert layer.weight_fake_quant.scale.numel() == 2
    expected = layer.input_fake_quant.scale * layer.weight_fake_quant.scale[[0, 1, 0, 1, 0, 1]]
    assert torch.equal(scale, expected)


def test_the_integers_are_int32_and_clip():
    model = with_bias(nn.Sequential(nn.Conv2d(3, 2, 1)))
    layer = model.architecture[0]
    scale = bias_scale(layer.input_fake_quant, layer.weight_fake_quant, 2)
    bias = scale * torch.tensor([3e9, -3e9])
    found = quantized_bias(bias, layer.input_fake_quant, layer.weight_fake_quant)
    torch.testing.assert_close(found, scale * torch.tensor([float(BIAS_MAX), float(BIAS_MIN)]))
    q = ops.quantize(bias, scale, torch.zeros(2, dtype=torch.int32), BIAS_MIN, BIAS_MAX, 0)
    assert q.dtype == torch.int32 and q.tolist() == [BIAS_MAX, BIAS_MIN]


def test_large_integers_are_exact():
    """Up to 2^31, which float32 cannot count."""
    s_in, s_w = torch.tensor([2.0**-20]), torch.tensor([2.0**-8, 2.0**-7])
    bias = torch.tensor([7.0 + 2.0**-18, -13.123456])
    found = rounded_bias(bias, s_in, s_w)
    assert torch.equal(found, bias), 'finer than float32'


def test_folded_batch_norm():
    model = with_bias(trained(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))))
    layer, norm = model.architecture[0], model.architecture[1]
    expected = folded_bias(layer, norm)
    for bias in (bias_seen(model, '0'), model.convert()[0].bias):
        assert_rounded(bias, expected, layer.input_fake_quant, layer.weight_fake_quant)


def test_without_a_bias_there_is_nothing_to_do():
    model = with_bias(nn.Sequential(nn.Conv2d(3, 4, 3, bias=False)))
    assert model.convert()[0].bias is None
    assert torch.allclose(model.convert()(images()), model(images()), atol=1e-6)


def test_off_by_default():
    model = calibrate(quantized(nn.Sequential(nn.Conv2d(3, 4, 3)), BITS))
    assert torch.equal(bias_seen(model, '0'), model.architecture[0].bias)
    assert torch.equal(model.convert()[0].bias, model.architecture[0].bias)


@pytest.mark.parametrize('state', [(False, False, False, True), (False, True, False, False), (False,) * 4])
def test_where_input_or_weight_are_float_now_the_bias_is_too(state):
    model = with_bias(nn.Sequential(nn.Conv2d(3, 4, 3)))
    model.set_quant_state(*state)
    assert torch.equal(bias_seen(model, '0'), model.architecture[0].bias)


def test_float_inputs_or_weights_leave_the_bias_float():
    for config in (qconfig(w=4, a='float'), qconfig(w='float', a=4)):
        model = with_bias(nn.Sequential(nn.Conv2d(3, 4, 3)), config)
        assert torch.equal(model.convert()[0].bias, model.architecture[0].bias)
        assert torch.allclose(model.convert()(images()), model(images()), atol=1e-5)


def test_gradient_passes_straight_through():
    model = with_bias(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))).train()
    model(images()).sum().backward()
    grad = model.architecture[2].bias.grad
    assert torch.equal(grad, torch.full((2,), 2.0 * 4 * 4))
    quantizer = model.architecture[2].weight_fake_quant
    assert not isinstance(quantizer.scale, nn.Parameter)


def test_gradient_of_folded_batch_norms():
    module = trained(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))).eval()
    model = with_bias(copy.deepcopy(module)).train()
    model.freeze_bn()
    for each in (module, model):
        each(images()).sum().backward()
    for layer in (0, 1):
        torch.testing.assert_close(model.architecture[layer].bias.grad, module[layer].bias.grad)


def test_learned_scales_have_no_gradient_from_the_bias():
    config = dict(BITS, w_fake_quant=dict(type='mmrazor.LSQFakeQuantize'),
                  a_fake_quant=dict(type='mmrazor.LSQFakeQuantize'))  # fmt: skip
    model = with_bias(nn.Sequential(nn.Conv2d(3, 4, 3)), config).train()
    model(images()).sum().backward()
    bias = model.architecture[0].bias
    assert torch.equal(bias.grad, torch.full((4,), 72.0))


# -- functions ---------------------------------------------------------------------------------------------------------


FUNCTIONS = {
    'linear': (lambda m, x: F.linear(x, m.a.weight, m.a.bias), lambda: nn.Linear(8, 6)),
    'linear by name': (lambda m, x: F.linear(x, weight=m.a.weight, bias=m.a.bias), lambda: nn.Linear(8, 6)),
    'conv2d': (lambda m, x: F.conv2d(x, m.a.weight, m.a.bias, padding=1), lambda: nn.Conv2d(3, 4, 3)),
    'conv_transpose2d': (lambda m, x: F.conv_transpose2d(x, m.a.weight, m.a.bias), lambda: nn.ConvTranspose2d(3, 4, 3)),
    'no bias': (lambda m, x: F.linear(x, m.a.weight), lambda: nn.Linear(8, 6)),
    'computed bias': (lambda m, x: F.linear(x, m.a.weight, m.a.bias * 2 + 1), lambda: nn.Linear(8, 6)),
    'computed weight': (lambda m, x: F.linear(x, m.a.weight * 2, m.a.bias), lambda: nn.Linear(8, 6)),
}  # fmt: skip


@pytest.mark.parametrize('name', FUNCTIONS)
def test_functions(name):
    forward, make = FUNCTIONS[name]
    layer = make()
    model = with_bias(Net(forward, a=copy.deepcopy(layer)))
    plain = calibrate(quantized(Net(forward, a=copy.deepcopy(layer)), BITS))
    converted = model.convert()
    x = images(seed=1)
    assert torch.allclose(converted(x), model(x), rtol=1e-5, atol=1e-5)
    assert torch.equal(plain(x), model(x)) == (name == 'no bias')
    used = [node.target for graph in Island.of(converted).graphs() for node in graph.nodes]
    assert quantized_bias not in used
    assert used.count(rounded_bias) == (name != 'no bias')


@pytest.mark.parametrize('name', ['linear', 'conv2d', 'conv_transpose2d', 'computed bias', 'computed weight'])
def test_gradient_of_the_bias_of_a_function(name):
    forward, make = FUNCTIONS[name]
    float_model = Net(forward, a=make())
    model = with_bias(copy.deepcopy(float_model)).train()
    for each in (float_model, model):
        each(images()).sum().backward()
    torch.testing.assert_close(model.architecture.a.bias.grad, float_model.a.bias.grad)


def test_a_function_equals_the_layer():
    layer = nn.Linear(8, 6)
    function = with_bias(Net(lambda m, x: F.linear(x, m.a.weight, m.a.bias), a=layer))
    module = with_bias(Net(lambda m, x: m.a(x), a=nn.Linear(8, 6)))
    module.load_state_dict({**module.state_dict(), 'a.weight': layer.weight, 'a.bias': layer.bias})
    calibrate(module)
    torch.testing.assert_close(function(images()), module(images()))


class Attention(nn.Module):
    def __init__(self, **kwargs):
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True, **kwargs)
        self.other = nn.Linear(8, kwargs.get('kdim') or 8)
        with torch.no_grad():
            for bias in (self.attn.in_proj_bias, self.attn.out_proj.bias):
                bias.normal_()

    def forward(self, x):
        x = x.flatten(1, 2)
        other = self.other(x)
        return self.attn(x, other, other, need_weights=False)[0]


@pytest.mark.parametrize('kwargs', [{}, dict(kdim=6, vdim=6)])
def test_multihead_attention(kwargs):
    """Packed projections: one bias, quantized with the scale of each projection's own input."""
    model = with_bias(Attention(**kwargs))
    plain = calibrate(quantized(Attention(**kwargs), BITS))
    calls = [node for graph in Island.of(model.architecture).graphs() for node in graph.nodes
             if node.op == 'call_function' and node.target is quantized_bias]  # fmt: skip
    assert len(calls) >= 4
    x = images(seed=2)
    assert torch.allclose(model.convert()(x), model(x), rtol=1e-5, atol=1e-5)
    plain.architecture.load_state_dict(model.architecture.state_dict())
    assert 0 < error(model(x), plain(x)) < 0.3
    model.train()(x).sum().backward()
    assert model.architecture.attn.in_proj_bias.grad.abs().sum() > 0


# -- shared layers -----------------------------------------------------------------------------------------------------


def test_a_layer_called_with_inputs_of_different_scales():
    """Each call has its own integers; a converted layer has one bias, which stays float and says so."""
    model = with_bias(Net(lambda m, x: m.a(m.a(x) * 3), a=nn.Conv2d(3, 3, 1)))
    with pytest.warns(UserWarning, match='a has inputs of different scales; its bias stays float'):
        converted = model.convert()
    assert torch.equal(converted.a.bias, model.architecture.a.bias)
    first, second = model.architecture.a.input_fake_quant, model.architecture.a.input_1_fake_quant
    tolerance = 3 * (first.scale + second.scale) * model.architecture.a.weight_fake_quant.scale.max()
    assert (converted(images()) - model(images())).abs().max() <= 20 * tolerance


def test_a_bias_that_a_layer_and_a_function_use():
    model = with_bias(Net(lambda m, x: m.a(x) + 2 * F.linear(x * 2, m.a.weight, m.a.bias), a=nn.Linear(8, 8)))
    with pytest.warns(UserWarning, match='a has a bias that functions read too; its bias stays float'):
        converted = model.convert()
    layer = model.architecture.a
    step = bias_scale(layer.input_fake_quant, layer.weight_fake_quant, 8)
    difference = (converted(images()) - model(images())).abs()
    assert (difference <= 0.51 * step + 1e-5).all(), 'only the layer is without its rounding of half a step'


def test_layers_that_share_an_input():
    model = with_bias(Net(lambda m, x: m.a(x) + m.b(x), a=nn.Conv2d(3, 3, 1), b=nn.Conv2d(3, 3, 1)))
    for path in ('a', 'b'):
        layer = model.architecture.get_submodule(path)
        assert_rounded(bias_seen(model, path) if path == 'b' else model.convert().a.bias, layer.bias,
                       model.architecture.a.input_fake_quant, layer.weight_fake_quant)  # fmt: skip
    assert torch.allclose(model.convert()(images()), model(images()), atol=1e-5)


def test_saving_and_loading_keeps_the_result():
    model = with_bias(nn.Sequential(nn.Conv2d(3, 4, 3)))
    other = quantized(nn.Sequential(nn.Conv2d(3, 4, 3)), BITS, quantize_bias=True)
    other.load_state_dict(model.state_dict())
    other.set_quant_state(False, True, False, True)
    assert torch.equal(other(images()), model(images()))


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('config, match', [
    (dict(a_qscheme=dict(bit=8, is_per_channel=True)),
     r'qconfig\.a_qscheme\.is_per_channel: got True, allowed with quantizer\.quantize_bias: False'),
    (dict(a_fake_quant=dict(type='mmrazor.DynamicFakeQuantize')),
     r'qconfig\.a_fake_quant\.type: got DynamicFakeQuantize, allowed with quantizer\.quantize_bias: static'),
    (dict(overrides=[dict(name='0', a_qscheme=dict(bit=8, is_per_channel=True))]),
     r'qconfig\.overrides\[0\]\.a_qscheme\.is_per_channel'),
    (dict(overrides=[dict(order='last', a_fake_quant=dict(type='mmrazor.DynamicFakeQuantize', share='token'))]),
     r'qconfig\.overrides\[0\]\.a_fake_quant\.type'),
])  # fmt: skip
def test_inputs_without_one_scale_are_refused(config, match):
    CustomQuantizer(qconfig=config)
    with pytest.raises(ValueError, match=match):
        CustomQuantizer(qconfig=config, quantize_bias=True)
