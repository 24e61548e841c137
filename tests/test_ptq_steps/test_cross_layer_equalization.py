"""Cross-layer equalization: exact for the float network, whatever is between the layers, and ranges do get even."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from small_models import Net, calibrate, error, images, qconfig, quantized, trained
from torch import nn

from mmrazor_quant.graph.chains import find_chains
from mmrazor_quant.graph.channel_clip import ChannelClip
from mmrazor_quant.ptq_steps import CrossLayerEqualization, StepContext

CONFIG = qconfig(w=8, a=8, w_qscheme=dict(bit=8, is_per_channel=False))


class Padded(nn.Conv2d):
    """Pads by itself."""

    def forward(self, x):
        return F.conv2d(F.pad(x, (1, 1, 1, 1)), self.weight, self.bias)


class Normalizing(nn.Conv2d):
    """Undoes factors of its input."""

    def forward(self, x):
        return super().forward(x / x.amax((2, 3), keepdim=True).clamp(min=1e-3))


def sequential(*modules):
    return nn.Sequential(*modules)


def conv(a, b, **kwargs):
    return nn.Conv2d(a, b, 3, padding=1, **kwargs)


PAIRS = {
    'norms': (1, lambda: sequential(
        conv(3, 6, bias=False), nn.BatchNorm2d(6), nn.ReLU(), conv(6, 4), nn.BatchNorm2d(4)
    )),
    'bias and norm': (1, lambda: sequential(conv(3, 6), nn.BatchNorm2d(6), nn.ReLU(inplace=True), conv(6, 4))),
    'no norms': (2, lambda: sequential(conv(3, 6), nn.ReLU(), conv(6, 4), nn.LeakyReLU(0.2), conv(4, 4))),
    'linear activation': (1, lambda: sequential(conv(3, 6), nn.Identity(), conv(6, 4))),
    'PReLU': (1, lambda: sequential(conv(3, 6), nn.PReLU(6), conv(6, 4))),
    'functions': (2, lambda: Net(
        lambda m, x: m.c(F.relu(m.b(m.a(x).relu_()))), a=conv(3, 6), b=conv(6, 6), c=conv(6, 2)
    )),
    'depthwise': (2, lambda: sequential(
        conv(3, 8, bias=False), nn.BatchNorm2d(8), nn.ReLU6(), conv(8, 8, groups=8, bias=False), nn.BatchNorm2d(8),
        nn.ReLU6(), conv(8, 4, bias=False), nn.BatchNorm2d(4),
    )),
    'depthwise with multiplier': (2, lambda: sequential(
        conv(3, 4), nn.ReLU(), conv(4, 12, groups=4), nn.ReLU(), conv(12, 4)
    )),
    'grouped': (2, lambda: sequential(
        conv(3, 8), nn.ReLU(), conv(8, 12, groups=2), nn.BatchNorm2d(12), nn.ReLU(), conv(12, 6, groups=3)
    )),
    'transposed': (3, lambda: sequential(
        conv(3, 8), nn.ReLU(), nn.ConvTranspose2d(8, 6, 3, stride=2), nn.BatchNorm2d(6), nn.ReLU(),
        nn.ConvTranspose2d(6, 4, 2, groups=2), nn.ReLU(), conv(4, 4),
    )),
    'linear': (1, lambda: sequential(
        nn.Flatten(), nn.Linear(192, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(), nn.Linear(12, 5)
    )),
    'linear over the last of three dimensions': (1, lambda: Net(
        lambda m, x: m.b(F.relu(m.a(x.flatten(2)))), a=nn.Linear(64, 12), b=nn.Linear(12, 5)
    )),
    'pooled and flattened': (1, lambda: sequential(
        conv(3, 6), nn.ReLU(), nn.MaxPool2d(2), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(24, 5)
    )),
    'global pooling': (1, lambda: Net(
        lambda m, x: m.b(F.adaptive_avg_pool2d(F.relu(m.a(x)), 1).view(x.size(0), -1)), a=conv(3, 6), b=nn.Linear(6, 5)
    )),
    '1d': (1, lambda: Net(
        lambda m, x: m.b(F.relu(m.a(x.flatten(2)))), a=nn.Conv1d(3, 6, 3), b=nn.Conv1d(6, 4, 3)
    )),
    '3d': (1, lambda: Net(
        lambda m, x: m.b(F.relu(m.a(x.unsqueeze(2)))), a=nn.Conv3d(3, 6, 1), b=nn.Conv3d(6, 4, 1)
    )),
    'clip to other bounds': (1, lambda: sequential(conv(3, 6), nn.Hardtanh(-0.4, 0.3), conv(6, 4))),
    'clip behind linear': (1, lambda: sequential(nn.Flatten(), nn.Linear(192, 9), nn.ReLU6(), nn.Linear(9, 5))),
    'subclass': (2, lambda: sequential(Padded(3, 6, 3), nn.ReLU(), Padded(6, 6, 3), nn.ReLU(), Padded(6, 4, 3))),
    'pair called twice': (1, lambda: Net(
        lambda m, x: (m.b(F.relu(m.a(x))), m.b(F.relu(m.a(x[..., ::2, ::2])))), a=conv(3, 6), b=conv(6, 4)
    )),
}  # fmt: skip

ALONE = {
    'output read twice': lambda: Net(lambda m, x: m.b(m.a(x)) + m.a(x), a=conv(3, 4), b=conv(4, 4)),
    'read behind the activation': lambda: Net(
        lambda m, x: (lambda y: m.b(y) + y)(F.relu(m.a(x))), a=conv(3, 4), b=conv(4, 4)
    ),
    'not homogeneous': lambda: sequential(conv(3, 4), nn.Sigmoid(), conv(4, 4)),
    'hard swish': lambda: sequential(conv(3, 4), nn.Hardswish(), conv(4, 4)),
    'clip as a function': lambda: Net(lambda m, x: m.b(F.relu6(m.a(x))), a=conv(3, 4), b=conv(4, 4)),
    'clip of two layers': lambda: Net(
        lambda m, x: m.b(m.act(m.a(x))) + m.act(x[:, :1]), a=conv(3, 4), b=conv(4, 4), act=nn.ReLU6()
    ),
    'clip over another dimension': lambda: Net(
        lambda m, x: m.b(m.act(m.a(x.flatten(2)))), a=nn.Linear(64, 12), b=nn.Linear(12, 5), act=nn.ReLU6()
    ),
    'norm without parameters': lambda: sequential(conv(3, 4), nn.BatchNorm2d(4, affine=False), nn.ReLU(), conv(4, 4)),
    'second layer reads more': lambda: Net(
        lambda m, x: m.b(F.relu(m.a(x))) + m.b(x.repeat(1, 2, 1, 1)), a=conv(3, 6), b=conv(6, 4)
    ),
    'first layer before two others': lambda: Net(
        lambda m, x: m.b(F.relu(m.a(x))) + m.c(F.relu(m.a(x + 1))), a=conv(3, 4), b=conv(4, 4), c=conv(4, 4)
    ),
    'weight read elsewhere': lambda: Net(
        lambda m, x: m.b(F.relu(m.a(x))) + m.b.weight.mean(), a=conv(3, 4), b=conv(4, 4)
    ),
    'forward of its own': lambda: sequential(conv(3, 4), nn.ReLU(), Normalizing(4, 4, 3)),
    'linear over rows of images': lambda: Net(lambda m, x: m.b(F.relu(m.a(x))), a=conv(3, 8), b=nn.Linear(8, 4)),
    'pooling over channels': lambda: Net(
        lambda m, x: m.b(F.max_pool1d(m.a(x.flatten(2)), 2)), a=nn.Linear(64, 12), b=nn.Linear(6, 5)
    ),
    'concatenated': lambda: Net(
        lambda m, x: m.b(torch.cat([F.relu(m.a(x)), x], 1)), a=conv(3, 3), b=conv(6, 4)
    ),
}  # fmt: skip


def tied():
    model = sequential(conv(3, 3), nn.ReLU(), conv(3, 3), nn.ReLU(), conv(3, 3))
    model[2].weight = model[0].weight
    model[4].weight = model[0].weight
    return model


ALONE['tied weights'] = tied


def uneven(model, seed=0):
    """Gives the channels of all layers, and so of all activations, very different ranges."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in trained(model).modules():
            if isinstance(module, (nn.modules.conv._ConvNd, nn.Linear)) and type(module.weight) is nn.Parameter:
                for axis in (0, 1):
                    shape = [-1 if d == axis else 1 for d in range(module.weight.dim())]
                    factors = torch.empty(module.weight.shape[axis]).uniform_(-2, 2, generator=generator)
                    module.weight *= torch.exp2(factors).reshape(shape)
    return model


def prepared(build):
    return quantized(uneven(build()).double(), CONFIG)


def equalize(model, **arguments):
    CrossLayerEqualization(**arguments).run(StepContext(model, [], 1))
    return model


def outputs(model, x):
    with torch.no_grad():
        found = model(x)
    return torch.cat([each.flatten() for each in found]) if isinstance(found, tuple) else found


def weight_of(layer, norm):
    """The folded weight with output channels first, looked at plainly; not of grouped layers."""
    weight = layer.weight.detach().abs()
    if norm is None:
        return weight
    factor = norm.weight.detach() / (norm.running_var + norm.eps).sqrt()
    return weight * factor.abs().reshape(-1, *[1] * (weight.dim() - 1))


def ranges(model):
    """For each pair, the largest weight per output channel of the first and per input channel of the second layer."""
    chains = find_chains(model.architecture)
    found = []
    for link in chains.links:
        first, second = (weight_of(layer, chains.norms[layer]) for layer in (link.first, link.second))
        is_depthwise = second.shape[1] == 1
        columns = second.flatten(1) if is_depthwise else second.transpose(0, 1).flatten(1)
        found.append((first.flatten(1).amax(1), columns.amax(1)))
    return found


@pytest.mark.parametrize('name', PAIRS)
def test_float_network_is_the_same(name):
    count, build = PAIRS[name]
    model, x = prepared(build), 5 * images(4).double()
    assert len(find_chains(model.architecture).links) == count
    state, before = copy.deepcopy(model.state_dict()), outputs(model, x)

    equalize(model)

    after = model.state_dict()
    changed = {key for key in state if not torch.equal(state[key], after[key])}
    assert changed and not any('running' in key or 'scale' in key for key in changed)
    assert all(key.rpartition('.')[2] in ('clip_lower', 'clip_upper') for key in set(after) - set(state))
    assert error(outputs(model, x), before) < 1e-13


@pytest.mark.parametrize('name', PAIRS)
def test_in_training_mode_too(name):
    model, x = prepared(PAIRS[name][1]), 5 * images(8).double()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    other = equalize(copy.deepcopy(model))

    assert error(outputs(other.train(), x), outputs(model.train(), x)) < 1e-12


def test_bounds_hold_while_quantized_weights_are_trained(monkeypatch):
    """Where batch norm, clip and quantizer would run as one operation, that knows nothing of bounds per channel."""
    monkeypatch.setattr('mmrazor_quant.ops.normalized.usable', lambda *_: True)
    float_model, x = uneven(PAIRS['depthwise'][1]()), images(8)
    for place in (1, 4):
        float_model[place].weight.data *= 8
    model = calibrate(equalize(quantized(float_model, CONFIG)), x).train()
    one_by_one, clipped = copy.deepcopy(model), []
    for module in one_by_one.modules():
        # What has a hook runs as a module of its own.
        if isinstance(module, ChannelClip):
            module.register_forward_hook(lambda clip, _, y: clipped.append(y.amax((0, 2, 3)) == clip.clip_upper))

    assert error(model(x), one_by_one(x)) < 1e-6
    assert len(clipped) == 2 and bool(torch.cat(clipped).any())


@pytest.mark.parametrize('name', ALONE)
def test_pairs_that_cannot_be_equalized_exactly_are_left(name):
    model, x = prepared(ALONE[name]), 5 * images(4).double()
    before = outputs(model, x)
    chains = find_chains(model.architecture)
    assert not chains.links
    assert set(chains.reasons) == {model.architecture.get_submodule(site.layer) for site in model.inserted.weights}

    equalize(model)

    assert torch.equal(outputs(model, x), before)


@pytest.mark.parametrize('name', ['norms', 'no norms', 'linear', 'depthwise'])
def test_ranges_of_a_pair_become_equal(name):
    model = prepared(PAIRS[name][1])
    assert max(float((first / second).max()) for first, second in ranges(model)) > 2

    equalize(model, iterations=100)

    for first, second in ranges(model):
        assert torch.allclose(first, second, rtol=0.01)


def test_three_layers_share_the_range_of_a_depthwise_channel():
    """With the depthwise layer between, all three ranges of a channel become their geometric mean."""
    model = prepared(PAIRS['depthwise'][1])
    (first, middle), (_, last) = ranges(model)
    expected = (first * middle * last) ** (1 / 3)

    equalize(model, iterations=100)

    (first, middle), (_, last) = ranges(model)
    for found in (first, middle, last):
        assert torch.allclose(found, expected, rtol=0.02)


def test_channels_without_weights_do_not_widen_a_tensor():
    """An output that is not used can have any range; a constant one is not made larger than others are."""
    model, x = prepared(PAIRS['no norms'][1]), images().double()
    with torch.no_grad():
        model.architecture[0].weight[2] = 0
        model.architecture[0].bias[2] = 0.5
        model.architecture[2].weight[:, 2] *= 1e6
        model.architecture[0].weight[3] *= 1e6
        model.architecture[2].weight[:, 3] = 0
        model.architecture[2].weight[1] = 0
        model.architecture[4].weight[:, 1] = 0
    before = outputs(model, x)
    activations = model.architecture[1](model.architecture[0](x)).amax((0, 2, 3))

    equalize(model)

    (first, _), _ = ranges(model)
    scaled = model.architecture[1](model.architecture[0](x)).amax((0, 2, 3)) / activations
    assert error(outputs(model, x), before) < 1e-13
    assert first[3] < first.median() * 1.5 and first[2] == 0
    assert scaled[2] <= 1.01 * scaled[[0, 1, 4, 5]].max()


def test_quantization_per_tensor_gets_better():
    model, x = prepared(PAIRS['depthwise'][1]), images(8).double()
    before = outputs(model, x)
    plain = error(outputs(calibrate(copy.deepcopy(model), x), x), before)

    equalized = error(outputs(calibrate(equalize(model), x), x), before)

    assert equalized < plain / 2


def test_pairs_with_a_clip_can_be_skipped():
    model = prepared(PAIRS['depthwise'][1])
    state = copy.deepcopy(model.state_dict())

    equalize(model, clips='skip')

    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_bounds_are_saved_and_loaded():
    build = PAIRS['depthwise'][1]
    model, x = calibrate(equalize(prepared(build)), images().double()), 5 * images(4).double()
    other = quantized(build().double(), CONFIG)

    other.load_state_dict(model.state_dict())
    other.set_quant_state(False, True, False, True)

    assert sum(isinstance(module, ChannelClip) for module in other.modules()) == 2
    assert torch.equal(outputs(other, x), outputs(model, x))
    assert torch.equal(outputs(copy.deepcopy(model), x), outputs(model, x))


def test_loading_a_float_checkpoint_brings_the_plain_clip_back():
    build = PAIRS['depthwise'][1]
    reference = uneven(build()).double().eval()
    model, x = equalize(prepared(build)), 5 * images(4).double()

    missing = model.load_state_dict(reference.state_dict(), strict=False)

    assert not [key for key in missing.missing_keys if 'clip' in key] and not missing.unexpected_keys
    assert [type(module) for module in model.modules() if isinstance(module, nn.Hardtanh)] == [nn.ReLU6] * 2
    assert error(outputs(model, x), outputs(reference, x)) == 0


def test_equalizing_twice_changes_next_to_nothing():
    model, x = equalize(prepared(PAIRS['depthwise'][1]), iterations=100), 5 * images(4).double()
    before, result = ranges(model), outputs(model, x)

    equalize(model, iterations=100)

    assert len(before) == 2
    assert error(outputs(model, x), result) < 1e-13
    for old, new in zip(before, ranges(model)):
        assert torch.allclose(torch.cat(old), torch.cat(new), rtol=0.02)


def test_new_input_sizes_are_captured_with_bounds():
    model, x = prepared(PAIRS['depthwise'][1]), 5 * images(3, (3, 13, 9)).double()
    before = outputs(model, x)

    assert error(outputs(equalize(model), x), before) < 1e-13


def test_convert_keeps_the_bounds():
    model, x = quantized(uneven(PAIRS['depthwise'][1]()), CONFIG), images(4)
    converted = calibrate(equalize(model), x).convert()

    assert sum(isinstance(module, ChannelClip) for module in converted.modules()) == 2
    assert error(outputs(converted, x), outputs(model, x)) < 1e-5


class Outside(nn.Module):
    """Uses a weight of what can be captured in code that cannot: it depends on the data."""

    def __init__(self):
        super().__init__()
        self.block = sequential(conv(3, 6), nn.ReLU6(), conv(6, 4))

    def forward(self, x):
        y = self.block(x)
        return y.mean() + nn.functional.conv2d(x, self.block[0].weight).mean() if y.sum() > -1e9 else y


class CalledFromOutside(Outside):
    """Calls the layer itself: it is an island of its own then, and no part of a pair."""

    def forward(self, x):
        y = self.block(x)
        return y.mean() + self.block[0](x).mean() if y.sum() > -1e9 else y


def test_layers_that_are_called_from_outside_of_their_island_are_in_no_pair():
    model = prepared(CalledFromOutside)

    assert find_chains(model.architecture).links == []


def test_pairs_that_code_outside_of_graphs_uses_are_given_back():
    model, x = prepared(Outside), 5 * images(4).double()
    assert len(find_chains(model.architecture).links) == 1
    state, before = copy.deepcopy(model.state_dict()), outputs(model, x)

    CrossLayerEqualization().run(StepContext(model, [{'inputs': x}], 1))

    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert torch.equal(outputs(model, x), before)


def test_check_of_the_outputs_lets_an_exact_change_through():
    model, x = prepared(PAIRS['depthwise'][1]), 5 * images(4).double()

    CrossLayerEqualization().run(StepContext(model, [{'inputs': x}], 1))

    assert sum(isinstance(module, ChannelClip) for module in model.modules()) == 2
