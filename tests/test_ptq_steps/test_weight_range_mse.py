"""Ranges of weights: never a larger error than before, and as small as a plain search finds it."""

from __future__ import annotations

import copy

import pytest
import torch
from small_models import calibrate, images, qconfig, quantized, trained
from torch import nn

from mmrazor_quant import ops
from mmrazor_quant.ptq_steps import StepContext, WeightRangeMSE

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
    return calibrate(quantized(build(), qconfig(**{'w_observer': dict(type='mmrazor.MinMaxObserver'), **changes})))


def set_ranges(model, **arguments):
    WeightRangeMSE(**arguments).run(StepContext(model, [], 1))
    return model


@torch.no_grad()
def errors(model, p=2.0):
    """For each weight, the error per channel, or of the tensor."""
    found = []
    for site in model.inserted.weights:
        quantizer, weight = model.architecture.get_submodule(site.quantizer), site.value(model.architecture)
        difference = (quantizer(weight) - weight).abs() ** p
        axis = quantizer.ch_axis
        found.append(difference.sum() if axis < 0 else difference.movedim(axis, 0).flatten(1).sum(1))
    return found


@pytest.mark.parametrize('scheme', SCHEMES)
@pytest.mark.parametrize('p', [2.0, 2.4])
def test_no_error_grows_and_most_shrink(scheme, p):
    model = prepared(w_qscheme=SCHEMES[scheme])
    before = errors(model, p)

    after = errors(set_ranges(model, p=p), p)

    for old, new in zip(before, after):
        assert bool((new <= old * (1 + 1e-5)).all())
    assert sum(map(float, map(torch.sum, after))) < 0.9 * sum(map(float, map(torch.sum, before)))


@pytest.mark.parametrize('scheme', ['per channel', 'per tensor'])
def test_symmetric_ranges_are_as_good_as_a_dense_search(scheme):
    model = set_ranges(prepared(w_qscheme=SCHEMES[scheme]))

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
    one = errors(set_ranges(prepared(w_observer=wide, **schemes)))
    other = errors(set_ranges(prepared(**schemes)))

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

    after = errors(set_ranges(model))

    assert all(bool(new <= old) for old, new in zip(before, after)) and sum(after) < 0.9 * sum(before)


def test_weights_that_compute_their_range_are_left():
    model = prepared(w_fake_quant=dict(type='mmrazor.DoReFaFakeQuantize'))
    state = copy.deepcopy(model.state_dict())

    set_ranges(model)

    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert model(images()).isfinite().all()
