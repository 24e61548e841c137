"""Converted models of every kind of fake quantizer compute what the fake-quantized ones do."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from small_models import Net, calibrate, images, quantized, trained
from torch import nn

from mmrazor_quant import ops
from mmrazor_quant.compat import FakeQuantizeBase
from mmrazor_quant.fake_quants import DoReFaFakeQuantize, LearnedFakeQuantize
from mmrazor_quant.tracing import Island

STATIC = {
    'plain': dict(type='mmrazor.FakeQuantize'),
    'LSQ': dict(type='mmrazor.LSQFakeQuantize'),
    'LSQ+': dict(type='mmrazor.LSQPlusFakeQuantize'),
    'PACT': dict(type='mmrazor.PACTFakeQuantize'),
    'DSQ': dict(type='mmrazor.DSQFakeQuantize'),
    'TQT': dict(type='mmrazor.TQTFakeQuantize'),
}
DYNAMIC = {f'dynamic {share}': dict(type='mmrazor.DynamicFakeQuantize', share=share) for share in ops.SHARES}
ACTIVATIONS = {**STATIC, **DYNAMIC}
WEIGHTS = {**{k: v for k, v in STATIC.items() if k != 'PACT'}, 'DoReFa': dict(type='mmrazor.DoReFaFakeQuantize')}

MODELS = {
    'layers': lambda: nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=4, bias=False), nn.BatchNorm2d(4),
        nn.ConvTranspose2d(4, 5, 3), nn.Flatten(), nn.Linear(180, 3),
    ),
    'functions': lambda: Net(
        lambda m, x: F.linear(F.conv2d(x, m.a.weight, m.a.bias).flatten(1), m.b.weight * 2, m.b.bias),
        a=nn.Conv2d(3, 2, 3), b=nn.Linear(72, 5),
    ),
    'products': lambda: Net(lambda m, x: m.a(x) @ m.b(x).transpose(-1, -2), a=nn.Linear(8, 6), b=nn.Linear(8, 6)),
}  # fmt: skip


def scheme(name, bit=4, **fields):
    return dict(bit=bit, is_symmetry=name == 'TQT', **fields)


def config(weights, activations, per_channel=False, pot=False):
    return dict(
        w_fake_quant=WEIGHTS[weights], a_fake_quant=ACTIVATIONS[activations],
        a_observer=dict(type='mmrazor.MinMaxObserver'),
        w_qscheme=dict(bit=4, is_per_channel=True, is_pot_scale=pot),
        a_qscheme=scheme(activations, is_per_channel=per_channel, is_pot_scale=pot),
    )  # fmt: skip


def trained_a_little(model):
    """Learned parameters away from where they started, a scale or two below zero."""
    with torch.no_grad():
        for quantizer in model.modules():
            if isinstance(quantizer, LearnedFakeQuantize):
                for parameter in quantizer.learned_parameters():
                    parameter.mul_(1 + 0.2 * torch.rand_like(parameter)).add_(0.01)
    return model


def assert_converts(model):
    converted = model.convert()
    x = images(3, seed=7)
    with torch.no_grad():
        found, expected = converted(x), model(x)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
    for graph in Island.of(converted).graphs():
        called = [converted.get_submodule(node.target) for node in graph.nodes if node.op == 'call_module']
        quantizers = [module for module in called if isinstance(module, FakeQuantizeBase)]
        assert all(isinstance(module, DoReFaFakeQuantize) for module in quantizers)
    return converted


@pytest.mark.parametrize('quantize_bias', [False, True])
@pytest.mark.parametrize('name', MODELS)
@pytest.mark.parametrize('kind', ACTIVATIONS)
def test_activations(kind, name, quantize_bias):
    if quantize_bias and kind in DYNAMIC:
        with pytest.raises(ValueError, match='quantize_bias'):
            quantized(MODELS[name](), config('plain', kind), quantize_bias=True)
        return
    model = quantized(trained(MODELS[name]()), config('plain', kind), quantize_bias=quantize_bias)
    assert_converts(trained_a_little(calibrate(model)))


@pytest.mark.parametrize('quantize_bias', [False, True])
@pytest.mark.parametrize('name', MODELS)
@pytest.mark.parametrize('kind', WEIGHTS)
def test_weights(kind, name, quantize_bias):
    activations = kind if kind in STATIC else 'plain'
    model = quantized(trained(MODELS[name]()), config(kind, activations), quantize_bias=quantize_bias)
    assert_converts(trained_a_little(calibrate(model)))


@pytest.mark.parametrize('pot', [False, True])
@pytest.mark.parametrize('kind', STATIC)
def test_activations_per_channel(kind, pot):
    model = quantized(trained(MODELS['layers']()), config('LSQ', kind, per_channel=True, pot=pot))
    assert_converts(trained_a_little(calibrate(model)))


@pytest.mark.parametrize('kind', ACTIVATIONS)
def test_power_of_two_scales_on_weights_and_activations(kind):
    weights = kind if kind in WEIGHTS else 'TQT'
    model = quantized(trained(MODELS['layers']()), config(weights, kind, pot=True), quantize_bias=kind not in DYNAMIC)
    converted = assert_converts(trained_a_little(calibrate(model)))
    for site in model.inserted.weights:
        scale = model.architecture.get_submodule(site.quantizer).scale_in_use()
        layer = converted.get_submodule(site.layer)
        steps = layer.weight / scale.reshape([-1 if d == (site.layer == '5') else 1 for d in range(layer.weight.dim())])
        torch.testing.assert_close(steps, steps.round(), atol=1e-4, rtol=0)


@pytest.mark.parametrize('kind', ['LSQ', 'LSQ+'])
def test_scales_that_an_optimizer_made_negative(kind):
    model = calibrate(quantized(trained(MODELS['layers']()), config(kind, kind)))
    with torch.no_grad():
        model.architecture[3].weight_fake_quant.scale[1:3] = torch.tensor([-0.1, 0.0])
        model.architecture[5].input_fake_quant.scale.fill_(-1.0)
    converted = assert_converts(model)
    assert all(torch.isfinite(p).all() for p in converted.parameters())


def test_the_offset_of_lsq_plus_is_explicit():
    """Inputs without zero in their range: what is subtracted before is added behind."""
    model = quantized(nn.Sequential(nn.Conv2d(3, 2, 1)), config('plain', 'LSQ+'))
    calibrate(model, images().abs() + 5)
    assert model.architecture[0].input_fake_quant.offset > 4
    x = images(seed=1).abs() + 5
    converted = model.convert()
    assert torch.allclose(converted(x), model(x), atol=1e-5)
    functions = [node.target for graph in Island.of(converted).graphs() for node in graph.nodes]
    assert functions.count(ops.shift) == 2 and functions.count(ops.quantize) == 1


def test_a_state_dict_of_a_converted_model_loads_into_another():
    models = [calibrate(quantized(trained(MODELS['layers']()), config('LSQ', 'LSQ+'))) for _ in range(2)]
    trained_a_little(models[0])
    one, two = (model.convert() for model in models)
    two.load_state_dict(one.state_dict())
    assert torch.equal(two(images()), one(images()))


@pytest.mark.parametrize('kind', ['LSQ', 'TQT', 'DSQ', 'DoReFa'])
def test_batch_folded_models(kind):
    activations = kind if kind in STATIC else 'plain'
    model = quantized(trained(MODELS['layers']()), config(kind, activations), bn_folding='batch', quantize_bias=True)
    calibrate(model).train()(images(4)).sum().backward()
    assert_converts(model.eval())
