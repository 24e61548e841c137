"""Converted models: the fake-quantized result from baked weights and explicit quantize and dequantize operations."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from small_models import Net, calibrate, error, images, qconfig, quantized, trained
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from mmrazor_quant import ops
from mmrazor_quant.compat import FakeQuantizeBase
from mmrazor_quant.tracing import Island


def shared(first, second):
    second.weight = first.weight
    return dict(a=first, b=second)


MODELS = {
    'conv, norm, linear': lambda: nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=4, bias=False), nn.BatchNorm2d(4),
        nn.Flatten(), nn.Linear(64, 3)
    ),
    'transposed': lambda: nn.Sequential(nn.ConvTranspose2d(3, 4, 3), nn.BatchNorm2d(4), nn.ConvTranspose2d(4, 2, 1)),
    'functional': lambda: Net(lambda m, x: F.conv2d(x, m.a.weight), a=nn.Conv2d(3, 2, 1)),
    'module and function': lambda: Net(lambda m, x: m.a(x) + F.conv2d(x * 2, m.a.weight), a=nn.Conv2d(3, 2, 1)),
    'computed weight': lambda: Net(lambda m, x: F.conv2d(x, m.a.weight * 2), a=nn.Conv2d(3, 2, 1)),
    'matmul of a parameter that is also added': lambda: Net(
        lambda m, x: m.p @ m.a(x) + m.p * 3, a=nn.Conv2d(3, 2, 1), p=nn.Parameter(torch.randn(8, 8))
    ),
    'matmul of a buffer': lambda: with_buffer(Net(lambda m, x: m.p @ m.a(x), a=nn.Conv2d(3, 2, 1))),
    'tied weights, one with a norm': lambda: Net(
        lambda m, x: m.b(m.norm(m.a(x))), **shared(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)), norm=nn.BatchNorm2d(3)
    ),
    'parametrized weight': lambda: nn.Sequential(weight_norm(nn.Conv2d(3, 4, 3)), nn.ReLU(), nn.Conv2d(4, 2, 1)),
    'attention': lambda: Net(
        lambda m, x: F.scaled_dot_product_attention(*m.qkv(x.flatten(2)).chunk(3, -1)), qkv=nn.Linear(64, 24)
    ),
    'shared layer': lambda: Net(lambda m, x: m.a(m.a(x)), a=nn.Conv2d(3, 3, 1)),
}  # fmt: skip


def with_buffer(model):
    model.register_buffer('p', torch.randn(8, 8))
    return model


def converted_of(name, config):
    model = calibrate(quantized(trained(MODELS[name]()), config))
    return model, model.convert()


@pytest.mark.parametrize('name', MODELS)
def test_the_converted_model_computes_what_the_fake_quantized_one_does(name):
    model, converted = converted_of(name, qconfig(w=4, a=4))

    with torch.no_grad():
        for seed in range(2):
            found, expected = converted(images(seed=seed)), model(images(seed=seed))
            assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize('name', MODELS)
def test_no_fake_quantizer_is_called_and_every_quantization_is_explicit(name):
    model, converted = converted_of(name, qconfig(w=4, a=4))
    calls = []
    for module in converted.modules():
        if isinstance(module, FakeQuantizeBase):
            module.register_forward_hook(lambda *_: calls.append(1))

    with torch.no_grad():
        converted(images())

    assert not calls
    for graph in Island.of(converted).graphs():
        targets = [node.target for node in graph.nodes if node.op == 'call_function']
        assert targets.count(ops.quantize) == targets.count(ops.dequantize) > 0


def test_weights_are_on_the_integer_grid():
    model, converted = converted_of('conv, norm, linear', qconfig(w=4, a=4))

    for site in model.inserted.weights:
        scale = model.architecture.get_submodule(site.quantizer).scale
        weight = converted.get_submodule(site.layer).weight
        integers = weight / scale.reshape(-1, *[1] * (weight.dim() - 1))
        assert torch.allclose(integers, integers.round(), atol=1e-4)
        assert integers.abs().max().round() <= 7
    assert not [n for n, _ in converted.named_modules() if n.endswith('weight_fake_quant')]
    assert isinstance(converted[1], nn.Identity)


def test_the_model_itself_is_left_as_it_is():
    model = calibrate(quantized(trained(MODELS['tied weights, one with a norm']()), qconfig(w=4, a=4)))
    before = copy.deepcopy(model.state_dict())
    expected = model(images())

    model.convert()

    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(model(images()), expected)


def test_converting_a_parametrized_model_leaves_its_parametrization():
    model, converted = converted_of('parametrized weight', qconfig(w=4, a=4))

    assert hasattr(model.architecture[0], 'parametrizations')
    assert not hasattr(converted[0], 'parametrizations')
    model.architecture[0](images())


def test_the_switches_do_not_matter():
    model = calibrate(quantized(trained(MODELS['conv, norm, linear']()), qconfig(w=4, a=4)))
    expected = model(images())
    model.set_quant_state(False, False, False, False)

    found = model.convert()(images())

    assert torch.allclose(found, expected, atol=1e-5)


def test_weight_only_and_activation_only():
    for config in (qconfig(w=4, a='float'), qconfig(w='float', a=4)):
        model, converted = converted_of('conv, norm, linear', config)
        assert torch.allclose(converted(images()), model(images()), atol=1e-5)


def test_an_uncalibrated_model_is_refused():
    with pytest.raises(RuntimeError, match='calibrated'):
        quantized(nn.Sequential(nn.Conv2d(3, 2, 1))).convert()


def test_a_converted_model_runs_at_other_sizes():
    model, converted = converted_of('transposed', qconfig(w=4, a=4))

    x = images(3, (3, 11, 9))

    assert torch.allclose(converted(x), model(x), atol=1e-4)


class Half(nn.Module):
    """A layer, with or without a norm behind it."""

    def __init__(self, layer, norm=None):
        super().__init__()
        self.layer, self.norm = layer, norm or nn.Identity()

    def forward(self, x):
        return self.norm(self.layer(x))


class SharedByIslands(nn.Module):
    """Two islands, because what is between them depends on data, with one layer."""

    def __init__(self):
        super().__init__()
        layer = nn.Conv2d(3, 3, 1)
        self.first, self.second = Half(layer, nn.BatchNorm2d(3)), Half(layer)

    def forward(self, x):
        x = self.first(x)
        return self.second(x if x.sum() > -1e9 else -x)


def test_a_layer_of_two_islands_has_one_weight():
    reference = trained(SharedByIslands()).eval()

    model = calibrate(quantized(copy.deepcopy(reference)))

    assert list(model.findings.islands) == ['first', 'second']
    assert {site.norm for site in model.inserted.weights} == {None}
    with torch.no_grad():
        assert error(model(images()), reference(images())) < 1e-3
        assert torch.equal(model.convert()(images()), model(images()))
