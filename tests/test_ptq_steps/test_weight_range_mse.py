"""Ranges of weights: never a larger error than before, and as small as a plain search finds it."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from small_models import calibrate, images, qconfig, quantized, trained
from torch import nn

from mmrazor_quant import ops
from mmrazor_quant.graph.taps import tapped
from mmrazor_quant.ptq_steps import StepContext, WeightRangeMSE

DATA = {'inputs': images(8).abs()}
MIN_MAX = dict(type='mmrazor.MinMaxObserver')
SCHEMES = {
    'per channel': dict(bit=3, is_per_channel=True),
    'per tensor': dict(bit=4, is_per_channel=False),
    'asymmetric': dict(bit=3, is_symmetry=False, is_per_channel=True),
    'asymmetric per tensor': dict(bit=3, is_symmetry=False, is_per_channel=False),
    'powers of two': dict(bit=4, is_per_channel=True, is_pot_scale=True),
}


def build():
    """Always the same network, with weights of long tails."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 5, padding=2), nn.BatchNorm2d(6), nn.ReLU(), nn.ConvTranspose2d(6, 4, 5, padding=2),
        nn.Flatten(), nn.Linear(4 * 64, 5),
    )  # fmt: skip
    with torch.no_grad():
        for layer in (model[0], model[3], model[5]):
            layer.weight.copy_(torch.distributions.Laplace(0.0, 0.1).sample(layer.weight.shape))
    return trained(model)


def prepared(**changes):
    return calibrate(quantized(build(), qconfig(**{'w_observer': MIN_MAX, **changes})))


def set_ranges(model, **arguments):
    WeightRangeMSE(**arguments).run(StepContext(model, [DATA], 1))
    return model


@torch.no_grad()
def errors(model):
    """For each weight, the squared error per channel, or of the tensor."""
    model.set_quant_state(False, True, False, True)
    found = []
    for site in model.inserted.weights:
        quantizer, weight = model.architecture.get_submodule(site.quantizer), site.value(model.architecture)
        difference = (quantizer(weight) - weight).square()
        axis = quantizer.ch_axis
        found.append(difference.sum() if axis < 0 else difference.movedim(axis, 0).flatten(1).sum(1))
    return found


@torch.no_grad()
def output_errors(model, data):
    """For each layer, the squared error per channel of its output on float inputs, computed as plainly as possible."""
    float_inputs, found = {}, []
    model.set_quant_state(False, False, False, False)
    with tapped(model.architecture, input_tap=lambda layer, x: float_inputs.setdefault(layer, x)):
        model.test_step(data)
    for site in model.inserted.weights:
        layer = copy.deepcopy(model.architecture.get_submodule(site.layer))
        x = float_inputs[model.architecture.get_submodule(site.layer)]
        weight, quantizer = site.value(model.architecture), layer.weight_fake_quant
        quantizer.enable_fake_quant()
        results = []
        for value in (weight, quantizer(weight)):
            layer.weight = nn.Parameter(value.clone())
            results.append(layer(x))
        found.append((results[0] - results[1]).square().movedim(1, 0).flatten(1).sum(1))
    model.set_quant_state(False, True, False, True)
    return found


def total(values):
    return sum(float(value.sum()) for value in values)


@pytest.mark.parametrize('scheme', SCHEMES)
def test_no_error_of_a_weight_grows_and_most_shrink(scheme):
    model = prepared(w_qscheme=SCHEMES[scheme])
    before = errors(model)

    after = errors(set_ranges(model, error='weight'))

    for old, new in zip(before, after):
        assert bool((new <= old * (1 + 1e-5)).all())
    assert total(after) < 0.9 * total(before)


@pytest.mark.parametrize('scheme', SCHEMES)
def test_no_error_of_an_output_grows_and_most_shrink(scheme):
    model, other = (prepared(w_qscheme=SCHEMES[scheme]) for _ in range(2))
    before = output_errors(model, DATA)

    after = output_errors(set_ranges(model), DATA)

    by_weight = output_errors(set_ranges(other, error='weight'), DATA)
    for old, new, other in zip(before, after, by_weight):
        per_tensor = not SCHEMES[scheme]['is_per_channel']
        old, new, other = (each.sum()[None] if per_tensor else each for each in (old, new, other))
        assert bool((new <= old * (1 + 1e-3)).all())
        assert bool((new <= other * (1 + 1e-3)).all())
    assert total(after) < 0.9 * total(before)


def test_output_errors_are_summed_over_batches():
    """The ranges of two batches are those of one batch of all their images."""
    one, two = prepared(), prepared()
    halves = [{'inputs': half} for half in DATA['inputs'].chunk(2)]

    set_ranges(one)
    WeightRangeMSE(batches=2).run(StepContext(two, halves, 2))

    for (_, a), (_, b) in zip(one.weight_quantizers(), two.weight_quantizers()):
        assert torch.equal(a.scale, b.scale)


class Functional(nn.Module):
    """A weight that a function reads, behind a layer."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.weight = nn.Parameter(torch.distributions.Laplace(0.0, 0.1).sample((5, 192)))

    def forward(self, x):
        return F.linear(self.conv(x).flatten(1), self.weight)


def test_weights_read_by_functions_get_the_range_of_least_weight_error():
    model = calibrate(quantized(Functional(), qconfig(w_qscheme=dict(bit=3), w_observer=MIN_MAX)))
    before, by_weight = errors(model), copy.deepcopy(model)

    found = errors(set_ranges(model))
    expected = errors(set_ranges(by_weight, error='weight'))

    assert not torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1]) and total(found[1:]) < 0.9 * total(before[1:])


def test_scales_of_the_input_channels_get_the_range_of_least_weight_error():
    """No output depends on one of them only."""
    by_output, by_weight, before = (prepared(w_qscheme=dict(bit=3, ch_axis=0)) for _ in range(3))
    transposed = (found[1] for found in map(errors, (set_ranges(by_output), set_ranges(by_weight, error='weight'))))

    assert torch.equal(*transposed)
    assert (errors(by_weight)[1] < errors(before)[1]).any()


@pytest.mark.parametrize('scheme', ['per channel', 'per tensor'])
def test_symmetric_ranges_are_as_good_as_a_dense_search(scheme):
    model = set_ranges(prepared(w_qscheme=SCHEMES[scheme]), error='weight')

    for site, found in zip(model.inserted.weights, errors(model)):
        quantizer, weight = model.architecture.get_submodule(site.quantizer), site.value(model.architecture).detach()
        axis = quantizer.ch_axis
        rows = weight.movedim(axis, 0).flatten(1) if axis >= 0 else weight.flatten()[None]
        best = torch.full((len(rows),), float('inf'))
        for share in torch.linspace(0.2, 1.2, 1000):
            scale = rows.abs().amax(1) * share / (quantizer.quant_max - quantizer.quant_min) * 2
            grid = ops.fake_quantize(rows, scale, torch.zeros_like(scale, dtype=torch.int32), quantizer.quant_min,
                                     quantizer.quant_max, 0)  # fmt: skip
            best = best.minimum((grid - rows).square().sum(1))
        assert bool((found.reshape(-1) <= 1.03 * best).all())


def test_ranges_hold_whatever_the_observer_says():
    """A range of the config that is best already stays; a bad one goes."""
    wide = dict(type='mmrazor.FixedRangeObserver', min_val=-100.0, max_val=100.0)
    schemes = dict(w_qscheme=SCHEMES['per tensor'])
    one = errors(set_ranges(prepared(w_observer=wide, **schemes), error='weight'))
    other = errors(set_ranges(prepared(**schemes), error='weight'))

    assert all(torch.allclose(a, b, rtol=0.01) for a, b in zip(one, other))


@pytest.mark.parametrize('kind', ['LSQFakeQuantize', 'LSQPlusFakeQuantize', 'TQTFakeQuantize'])
def test_learned_scales_start_from_the_result(kind):
    scheme = dict(w_qscheme=dict(bit=3, is_per_channel=True, is_pot_scale=kind == 'TQTFakeQuantize'))
    plain = set_ranges(prepared(**scheme))
    learned = set_ranges(prepared(w_fake_quant=dict(type=f'mmrazor.{kind}'), **scheme))

    for one, other in zip(errors(plain), errors(learned)):
        assert torch.allclose(one, other, rtol=1e-3)


def test_quantizers_of_torch():
    from torch.ao.quantization import FakeQuantize, MinMaxObserver

    config = dict(w_fake_quant=dict(type=FakeQuantize), w_observer=dict(type=MinMaxObserver))
    model = prepared(w_qscheme=dict(bit=4, is_per_channel=False), **config)
    before = errors(model)

    after = errors(set_ranges(model, error='weight'))

    assert all(bool(new <= old) for old, new in zip(before, after)) and total(after) < 0.9 * total(before)


def test_weights_that_compute_their_range_are_left():
    model = prepared(w_fake_quant=dict(type='mmrazor.DoReFaFakeQuantize'))
    state = copy.deepcopy(model.state_dict())

    set_ranges(model)
    model.set_quant_state(False, True, False, True)

    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert model(images()).isfinite().all()
