"""Folding batch norms: exact in eval, and invisible to what the norms learn."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from small_models import Net, calibrate, error, images, qconfig, quantized, trained
from torch import nn

from mmrazor_quant.graph.fold import find_foldable, fold
from mmrazor_quant.graph.layers import folded_bias, folded_weight, is_linear_in_weight, quantized_layer_norm
from mmrazor_quant.tracing import CustomTracer
from mmrazor_quant.tracing.code import compile_graph


class Padded(nn.Conv2d):
    """Pads by itself, as TensorFlow's layers do."""

    def forward(self, x):
        return F.conv2d(F.pad(x, (0, 1, 0, 1)), self.weight, self.bias, self.stride)


class Standardized(nn.Conv2d):
    """Standardizes its weight: what the norm multiplies the weight with would get lost."""

    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        weight = weight / weight.std((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias)


class Doubled(nn.BatchNorm2d):
    """A batch norm that does more."""

    def forward(self, x):
        return super().forward(x) * 2


def net(layer, norm, images_to=lambda x: x):
    return Net(lambda m, x: m.norm(m.layer(images_to(x))), layer=layer, norm=norm)


FOLDED = {
    'conv': lambda: net(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)),
    'conv without bias': lambda: net(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)),
    'norm without affine': lambda: net(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False)),
    'strided, dilated, padded': lambda: net(
        nn.Conv2d(3, 4, 3, stride=2, dilation=2, padding=3, padding_mode='reflect'), nn.BatchNorm2d(4)
    ),
    'same padding': lambda: net(nn.Conv2d(3, 4, 3, padding='same'), nn.BatchNorm2d(4, eps=0.1)),
    'depthwise': lambda: net(nn.Conv2d(3, 6, 3, groups=3), nn.BatchNorm2d(6)),
    'grouped': lambda: Net(
        lambda m, x: m.norm(m.layer(x.repeat(1, 2, 1, 1))),
        layer=nn.Conv2d(6, 4, 3, groups=2, bias=False), norm=nn.BatchNorm2d(4)
    ),
    'transposed': lambda: net(nn.ConvTranspose2d(3, 4, 3, stride=2), nn.BatchNorm2d(4)),
    'transposed with output size': lambda: Net(
        lambda m, x: m.norm(m.layer(x, output_size=[18, 18])),
        layer=nn.ConvTranspose2d(3, 4, 3, stride=2, bias=False), norm=nn.BatchNorm2d(4)
    ),
    'linear': lambda: net(nn.Linear(192, 5), nn.BatchNorm1d(5), lambda x: x.flatten(1)),
    'conv1d': lambda: net(nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4), lambda x: x.flatten(2)),
    'conv3d': lambda: net(nn.Conv3d(3, 4, 1), nn.BatchNorm3d(4), lambda x: x.unsqueeze(2)),
    'sync': lambda: net(nn.Conv2d(3, 4, 3), nn.SyncBatchNorm(4)),
    'subclass': lambda: net(Padded(3, 4, 3), nn.BatchNorm2d(4)),
    'subclass without bias': lambda: net(Padded(3, 4, 3, bias=False), nn.BatchNorm2d(4)),
}  # fmt: skip

NOT_FOLDED = {
    'norm over another dimension': lambda: net(nn.Linear(64, 3), nn.BatchNorm1d(3), lambda x: x.flatten(2)),
    'norm without statistics': lambda: net(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)),
    'norm with a forward of its own': lambda: net(nn.Conv2d(3, 4, 3), Doubled(4)),
    'weight standardization': lambda: net(Standardized(3, 4, 3), nn.BatchNorm2d(4)),
    'grouped transposed': lambda: Net(
        lambda m, x: m.norm(m.layer(x.repeat(1, 2, 1, 1))),
        layer=nn.ConvTranspose2d(6, 4, 3, groups=2), norm=nn.BatchNorm2d(4)
    ),
    'output used twice': lambda: Net(
        lambda m, x: (lambda y: m.norm(y) + y)(m.layer(x)), layer=nn.Conv2d(3, 4, 3), norm=nn.BatchNorm2d(4)
    ),
    'layer called twice': lambda: Net(
        lambda m, x: m.norm(m.layer(x)) + m.layer(x + 1), layer=nn.Conv2d(3, 4, 3), norm=nn.BatchNorm2d(4)
    ),
    'norm after something else too': lambda: Net(
        lambda m, x: m.norm(m.layer(x)) + m.norm(x[:, :1].repeat(1, 4, 1, 1))[..., 1:-1, 1:-1],
        layer=nn.Conv2d(3, 4, 3), norm=nn.BatchNorm2d(4)
    ),
    'norm only in train': lambda: Net(
        lambda m, x: m.norm(m.layer(x)) if m.training else m.layer(x), layer=nn.Conv2d(3, 4, 3), norm=nn.BatchNorm2d(4)
    ),
    'weight read elsewhere': lambda: Net(
        lambda m, x: m.norm(m.layer(x)) + m.layer.weight.mean(), layer=nn.Conv2d(3, 4, 3), norm=nn.BatchNorm2d(4)
    ),
    'bias read elsewhere': lambda: Net(
        lambda m, x: m.norm(m.layer(x)) + m.layer.bias.sum(), layer=nn.Conv2d(3, 4, 3), norm=nn.BatchNorm2d(4)
    ),
    'instance norm': lambda: net(nn.Conv2d(3, 4, 3), nn.InstanceNorm2d(4, track_running_stats=True)),
}  # fmt: skip


def folds(model):
    return {site.norm for site in model.inserted.weights} != {None}


@pytest.mark.parametrize('name', FOLDED)
def test_folding_is_exact_in_eval(name):
    reference = trained(FOLDED[name]()).double().eval()

    model = calibrate(quantized(copy.deepcopy(reference), qconfig(w=32, a='float')), images().double())

    assert folds(model)
    with torch.no_grad():
        assert error(model(images().double()), reference(images().double())) < 1e-8


@pytest.mark.parametrize('name', NOT_FOLDED)
def test_what_cannot_be_folded_exactly_is_not(name):
    reference = NOT_FOLDED[name]().eval()
    if 'without statistics' not in name and 'instance' not in name:
        trained(reference)

    model = calibrate(quantized(copy.deepcopy(reference)))

    assert not folds(model)
    with torch.no_grad():
        assert error(model(images()), reference(images())) < 1e-3


def test_a_layer_shared_by_several_norms_keeps_them():
    """As the heads of detectors do that share convolutions, but not norms, over the levels."""
    reference = trained(
        Net(lambda m, x: m.first(m.layer(x)) + m.second(m.layer(x * 2)), layer=nn.Conv2d(3, 4, 3),
            first=nn.BatchNorm2d(4), second=nn.BatchNorm2d(4))
    ).eval()  # fmt: skip

    model = calibrate(quantized(copy.deepcopy(reference)))

    assert not folds(model)
    assert len(model.inserted.weights) == 1
    assert len(model.inserted.activations) == 2
    with torch.no_grad():
        assert error(model(images()), reference(images())) < 1e-3


TRAINED = {
    'bias, relu, depthwise, linear': lambda: nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=4, bias=False), nn.BatchNorm2d(4),
        nn.ReLU(), nn.Flatten(), nn.Linear(64, 5), nn.BatchNorm1d(5),
    ),
    'transposed': lambda: nn.Sequential(nn.ConvTranspose2d(3, 4, 3, stride=2), nn.BatchNorm2d(4, momentum=None)),
    'without affine': lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False), nn.ReLU()),
    'gamma zero or tiny': lambda: with_gamma(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), [0.0, 1e-6, -2, 1]),
    'frozen': lambda: Frozen(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()),
}  # fmt: skip


class Frozen(nn.Sequential):
    """Its norms stay in eval, as with mmcls' ``norm_eval``."""

    def train(self, mode=True):
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self


def with_gamma(model, gamma):
    trained(model)
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor(gamma))
    return model


@pytest.mark.parametrize('name', TRAINED)
def test_training_is_that_of_the_float_model_when_quantization_is_fine(name):
    reference = TRAINED[name]().double()
    if 'gamma' not in name:
        trained(reference)
    model = calibrate(quantized(copy.deepcopy(reference), qconfig(w=22, a='float')), images().double())
    assert folds(model)
    model.set_quant_state(True, True, True, True)
    model.train()
    reference.train()

    for step in range(2):
        x = images(4, seed=step).double()
        expected, found = reference(x), model(x)
        assert error(found, expected) < 1e-5
        upstream = torch.linspace(-1, 2, expected.numel()).reshape(expected.shape)
        expected.backward(upstream)
        found.backward(upstream)

    for (key, p), q in zip(reference.named_parameters(), model.architecture.parameters()):
        assert torch.allclose(q.grad, p.grad, rtol=1e-3, atol=1e-3), key
    state = model.state_dict()
    for key, value in reference.named_buffers():
        assert torch.allclose(state[key].double(), value.double(), rtol=1e-4, atol=1e-4), key


def test_a_channel_with_gamma_zero_can_learn_again():
    """Its folded weight is all zero; quantizing with that must not silence the gradient of gamma."""
    model = calibrate(quantized(with_gamma(nn.Sequential(nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2)), [0.0, 1.0])))
    norm = model.architecture[1]

    model.train()
    model(images(4)).backward(torch.linspace(-1, 2, 4 * 2 * 36).reshape(4, 2, 6, 6))

    assert norm.weight.grad[0].abs() > 1e-3
    assert torch.isfinite(model.architecture[0].weight.grad).all()


def test_while_it_learns_the_norm_gets_the_gradient_of_the_norm_alone():
    """The rounding of the folded weight is no path for the gradient of gamma and the statistics."""
    model = calibrate(quantized(trained(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))), qconfig(w=2, a='float')))
    conv, norm = model.architecture[0], model.architecture[1]
    alone = copy.deepcopy(norm).train()
    factor = (norm.weight / (norm.running_var + norm.eps).sqrt()).detach().reshape(-1, 1, 1, 1)
    weight = (conv.weight_fake_quant(conv.weight * factor) / factor).detach()
    upstream = torch.linspace(-1, 2, 4 * 4 * 36).reshape(4, 4, 6, 6)

    expected = alone(F.conv2d(images(4), weight, conv.bias))
    expected.backward(upstream)
    found = model.train()(images(4))
    found.backward(upstream)

    assert torch.allclose(found, expected, atol=1e-4)
    assert torch.allclose(norm.weight.grad, alone.weight.grad, rtol=1e-3, atol=1e-3)


def test_the_weight_that_is_quantized_is_the_folded_one():
    model = calibrate(quantized(trained(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))), qconfig(w=4, a='float')))
    conv, norm = model.architecture[0], model.architecture[1]
    folded = conv.weight * (norm.weight / (norm.running_var + norm.eps).sqrt()).reshape(-1, 1, 1, 1)
    bias = norm.bias + (conv.bias - norm.running_mean) * norm.weight / (norm.running_var + norm.eps).sqrt()

    assert torch.allclose(conv.weight_fake_quant.scale * 7, folded.abs().amax((1, 2, 3)), rtol=1e-5)
    expected = F.conv2d(images(), conv.weight_fake_quant(folded), bias)
    assert torch.allclose(model(images()), expected, atol=1e-5)


def test_folded_weight_and_bias_are_the_layer_and_the_norm():
    conv, norm = nn.Conv2d(3, 4, 3).double(), nn.BatchNorm2d(4).double()
    trained(norm)
    x = images().double()

    found = F.conv2d(x, folded_weight(conv, norm), folded_bias(conv, norm))

    assert torch.allclose(found, norm.eval()(conv(x)), rtol=1e-12)


def test_quantization_off_is_the_layer_and_the_norm_bit_for_bit():
    model = quantized(trained(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))))
    conv, norm = model.architecture[0], model.architecture[1]

    assert torch.equal(quantized_layer_norm(conv, norm, images()), norm(conv(images())))


@pytest.mark.parametrize(
    ('layer', 'linear'),
    [
        (nn.Conv2d(3, 4, 3), True),
        (nn.Linear(3, 4), True),
        (Padded(3, 4, 3), True),
        (Padded(3, 4, 3, bias=False), True),
        (Standardized(3, 4, 3), False),
    ],
)
def test_is_linear_in_weight(layer, linear):
    before = [p.clone() for p in layer.parameters()]

    assert is_linear_in_weight(layer) == linear
    assert all(torch.equal(a, b) for a, b in zip(before, layer.parameters()))


def test_fold_leaves_its_argument_and_runs():
    module = trained(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())).eval()
    graph = CustomTracer().capture(module, (images(),), {})
    code = graph.python_code('self').src

    pairs = find_foldable([graph], module)
    folded = fold(graph, module, pairs)

    assert pairs == {'0': '1'}
    assert graph.python_code('self').src == code
    assert [n.target for n in folded.nodes if n.op == 'call_module'] == ['0', '2']
    # without a quantized call behind it, what is left is the layer alone
    assert torch.equal(compile_graph(folded)(module, images()), module[0](images()).relu())
