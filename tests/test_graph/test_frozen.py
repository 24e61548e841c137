"""Weights computed once for many forward passes are those of each pass, and only while they cannot change."""

from __future__ import annotations

import pytest
import torch
from small_models import Net, calibrate, error, images, quantized, trained
from torch import nn

from mmrazor_quant.engine.calibration import calibrate as calibrate_with_data
from mmrazor_quant.graph.frozen import frozen_weights


def forward(m, x):
    x = m.act(m.norm(m.conv(x)))
    return m.linear(m.conv2(x).mean((2, 3)))


def model(**quantizer) -> nn.Module:
    torch.manual_seed(0)
    layers = {'conv': nn.Conv2d(3, 8, 3, bias=False), 'conv2': nn.Conv2d(8, 8, 3), 'linear': nn.Linear(8, 5)}
    net = trained(Net(forward, norm=nn.BatchNorm2d(8), act=nn.ReLU(), **layers))
    return calibrate(quantized(net, **quantizer))


def count_calls(network: nn.Module) -> list[str]:
    """Note the calls of the weight quantizers, which have hooks then."""
    seen: list[str] = []
    for name, module in network.named_modules():
        if name.endswith('weight_fake_quant'):
            module.register_forward_hook(lambda *_, name=name: seen.append(name))
    return seen


@pytest.mark.parametrize('quantize_bias', [False, True])
@torch.no_grad()
def test_computed_once(quantize_bias):
    network = model(quantize_bias=quantize_bias)
    batches = [images(seed=seed) for seed in range(3)]
    expected = [network(batch) for batch in batches]
    calls = count_calls(network)
    with frozen_weights(network):
        found = [network(batch) for batch in batches]
    assert len(calls) == len(set(calls)) == 3
    assert all(torch.equal(a, b) for a, b in zip(found, expected))


@torch.no_grad()
def test_computed_anew_afterwards():
    network = model()
    with frozen_weights(network):
        before = network(images())
    network.architecture.linear.weight.mul_(2)
    assert not torch.equal(network(images()), before)


@torch.no_grad()
def test_each_context_computes_its_own():
    network = model()
    results = []
    for _ in range(2):
        with frozen_weights(network):
            results.append(network(images()))
        network.architecture.conv.weight.mul_(0.5)
    assert not torch.equal(*results)


def test_nothing_is_left_after_an_error():
    network = model()
    attributes = {name: set(vars(module)) for name, module in network.named_modules()}
    with pytest.raises(RuntimeError, match='stop'), frozen_weights(network):
        raise RuntimeError('stop')
    assert {name: set(vars(module)) for name, module in network.named_modules()} == attributes


def test_not_with_gradients():
    network = model()
    with frozen_weights(network):
        for _ in range(2):
            network(images()).sum().backward()
    assert network.architecture.conv.weight.grad is not None


@torch.no_grad()
def test_a_layer_used_with_two_norms():
    def two_norms(m, x):
        return m.norm(m.conv(x)) + m.norm2(m.conv(x))

    norms = {'norm': nn.BatchNorm2d(8), 'norm2': nn.BatchNorm2d(8)}
    network = calibrate(quantized(trained(Net(two_norms, conv=nn.Conv2d(3, 8, 3), **norms))))
    expected = network(images())
    with frozen_weights(network):
        assert torch.equal(network(images()), expected) and torch.equal(network(images()), expected)


def test_calibration_sees_what_the_float_network_computes():
    """Ranges observed behind folded weights are those of layer and norm, up to rounding."""
    network = model()
    batches = [images(seed=seed) for seed in range(3)]
    network.reset_observers()
    network.test_step = network.forward
    calibrate_with_data(network, batches, 3, 'batches')
    found = {name: module.scale for name, module in network.named_modules() if hasattr(module, 'scale')}
    calibrate(network, *batches)
    for name, module in network.named_modules():
        if hasattr(module, 'scale'):
            assert error(found[name], module.scale) < 1e-5, name


@torch.no_grad()
def test_parameters_of_one_call_are_not_kept():
    """Guards of a graph are tried on tensors without data."""
    network = model()
    expected = network(images())
    others = {name: torch.zeros_like(p) for name, p in network.architecture.named_parameters()}
    with frozen_weights(network):
        torch.func.functional_call(network.architecture, others, (images(),))
        assert torch.equal(network(images()), expected)
        zeros = torch.func.functional_call(network.architecture, others, (images(),))
        assert torch.equal(network(images()), expected) and not torch.equal(zeros, expected)
