"""Optimizer groups of learned quantization parameters."""

from __future__ import annotations

import pytest
import torch
from mmengine.optim import build_optim_wrapper
from small_models import calibrate, images, qconfig, quantized
from torch import nn

from mmrazor_quant.fake_quants import LearnedFakeQuantize, PACTFakeQuantize
from mmrazor_quant.registry import OPTIM_WRAPPER_CONSTRUCTORS

SGD = dict(type='SGD', lr=0.1, momentum=0.9, weight_decay=0.01)


def network():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 3)
    )


def model_of(weights='LSQ', activations='LSQ', module=None):
    fields = {f'{k}_fake_quant': dict(type=f'mmrazor.{n}FakeQuantize') for k, n in (('w', weights), ('a', activations))}
    return quantized(module or network(), qconfig(w=4, a=4, **fields))


def build(model, optimizer=None, **paramwise):
    config = dict(
        type='OptimWrapper', constructor='mmrazor.QuantOptimWrapperConstructor', optimizer=dict(optimizer or SGD)
    )
    if paramwise:
        config['paramwise_cfg'] = paramwise
    return build_optim_wrapper(model, config).optimizer


def learned_of(model, kind=LearnedFakeQuantize):
    return {p for module in model.modules() if isinstance(module, kind) for p in module.learned_parameters()}


def options(optimizer, parameter):
    """The group of a parameter, without its parameters; there is one."""
    (group,) = [g for g in optimizer.param_groups if any(p is parameter for p in g['params'])]
    return {key: value for key, value in group.items() if key != 'params'}


def test_is_registered():
    assert 'QuantOptimWrapperConstructor' in OPTIM_WRAPPER_CONSTRUCTORS.module_dict


def test_scales_are_apart_and_without_decay():
    model = model_of()
    optimizer = build(model)
    assert len(optimizer.param_groups) == 2
    learned = learned_of(model)
    assert len(learned) == 6
    for parameter in model.parameters():
        found = options(optimizer, parameter)
        assert found['weight_decay'] == (0 if parameter in learned else 0.01)
        assert found['lr'] == 0.1 and found['momentum'] == 0.9


def test_every_parameter_is_there_once():
    for model in (model_of(), model_of('LSQPlus', 'DSQ'), model_of('TQT', 'PACT'), model_of('', '')):
        optimizer = build(model)
        given = [id(p) for group in optimizer.param_groups for p in group['params']]
        assert sorted(given) == sorted(map(id, model.parameters()))


def test_ranges_of_pact_decay():
    model = model_of('LSQ', 'PACT')
    optimizer = build(model)
    ranges = learned_of(model, PACTFakeQuantize)
    assert len(ranges) == 6
    assert {options(optimizer, p)['weight_decay'] for p in ranges} == {0.01}
    assert {options(optimizer, p)['weight_decay'] for p in learned_of(model) - ranges} == {0.0}
    assert len(optimizer.param_groups) == 3


def test_multipliers():
    model = model_of('LSQ', 'PACT')
    optimizer = build(model, scale_lr_mult=0.5, scale_decay_mult=2)
    for parameter in model.parameters():
        found = options(optimizer, parameter)
        learned = parameter in learned_of(model)
        assert found['lr'] == pytest.approx(0.05 if learned else 0.1)
        assert found['weight_decay'] == pytest.approx(0.02 if learned else 0.01), 'of PACT too'
    assert len(optimizer.param_groups) == 2


def test_offsets_have_a_learning_rate_of_their_own():
    model = model_of('LSQPlus', 'LSQPlus')
    offsets = {p for name, p in model.named_parameters() if name.endswith('.offset')}
    assert len(offsets) == 3, 'of activations; weights are symmetric'
    for paramwise, rates in [
        (dict(offset_lr_mult=0.01), (0.1, 0.001)),
        (dict(scale_lr_mult=0.5), (0.05, 0.05)),
        (dict(scale_lr_mult=0.5, offset_lr_mult=0), (0.05, 0)),
    ]:
        optimizer = build(model, **paramwise)
        for parameter in learned_of(model):
            found = options(optimizer, parameter)
            assert found['lr'] == pytest.approx(rates[parameter in offsets]) and found['weight_decay'] == 0


@pytest.mark.parametrize('multiplier', [0, 0.0])
def test_a_multiplier_of_zero_is_not_none(multiplier):
    model = model_of('LSQ', 'PACT')
    optimizer = build(model, scale_lr_mult=multiplier, scale_decay_mult=multiplier)
    for parameter in learned_of(model):
        assert options(optimizer, parameter)['lr'] == 0 and options(optimizer, parameter)['weight_decay'] == 0


def test_the_fields_of_mmengine_still_work():
    model = model_of()
    optimizer = build(model, norm_decay_mult=0.0, bias_lr_mult=2.0, custom_keys={'5': dict(lr_mult=3.0)})
    architecture = model.architecture
    assert options(optimizer, architecture[1].weight)['weight_decay'] == 0
    assert options(optimizer, architecture[0].bias)['lr'] == pytest.approx(0.2)
    assert options(optimizer, architecture[5].weight)['lr'] == pytest.approx(0.3)
    assert options(optimizer, architecture[0].weight) == {**options(optimizer, architecture[3].weight)}
    assert options(optimizer, architecture[3].weight_fake_quant.scale)['weight_decay'] == 0


def test_parameters_with_equal_options_share_a_group():
    model = model_of()
    sizes = [len(group['params']) for group in build(model, norm_decay_mult=0.0, scale_lr_mult=0.1).param_groups]
    assert sorted(sizes) == [2, 6, 6]
    sizes = [len(group['params']) for group in build(model, norm_decay_mult=0.0).param_groups]
    assert sorted(sizes) == [6, 8], 'norms are like scales'


def test_without_weight_decay_and_with_other_optimizers():
    model = model_of('LSQ', 'PACT')
    optimizer = build(model, dict(type='AdamW', lr=1e-3))
    assert {options(optimizer, p)['weight_decay'] for p in model.parameters()} == {1e-2}, "AdamW's own"
    optimizer = build(model, dict(type='AdamW', lr=1e-3, weight_decay=0.05), scale_lr_mult=10)
    for parameter in learned_of(model):
        assert options(optimizer, parameter)['lr'] == pytest.approx(1e-2)


def test_without_a_learning_rate_in_the_config():
    optimizer = build(model_of(), dict(type='Adadelta'))
    assert {group['lr'] for group in optimizer.param_groups} == {1.0}


def test_frozen_parameters_are_left_out():
    model = model_of()
    scale, weight = model.architecture[0].weight_fake_quant.scale, model.architecture[3].weight
    scale.requires_grad_(False)
    weight.requires_grad_(False)
    given = {p for group in build(model).param_groups for p in group['params']}
    assert scale not in given and weight not in given and len(given) == len(list(model.parameters())) - 2


def test_a_float_model():
    optimizer = build(network(), scale_lr_mult=0.5)
    assert len(optimizer.param_groups) == 1 and optimizer.param_groups[0]['lr'] == 0.1


class Shared(nn.Module):
    """One layer under two names."""

    def __init__(self):
        super().__init__()
        self.first = self.second = nn.Conv2d(3, 3, 1)
        self.third = nn.ModuleList([self.first])

    def forward(self, x):
        return self.third[0](self.second(self.first(x)))


@pytest.mark.parametrize('paramwise', [{}, dict(bypass_duplicate=True)])
def test_a_layer_of_several_names(paramwise):
    model = model_of(module=Shared())
    optimizer = build(model, **paramwise)
    given = [id(p) for group in optimizer.param_groups for p in group['params']]
    assert sorted(given) == sorted(map(id, model.parameters()))


def test_a_layer_of_several_names_with_options_of_their_own():
    """As in mmengine: it has to be told to pass over what is there already."""
    model = model_of(module=Shared())
    options = dict(custom_keys={'third': dict(lr_mult=2.0)})
    with pytest.raises(ValueError, match='more than one parameter group'):
        build(model, **options)
    build(model, **options, bypass_duplicate=True)


@pytest.mark.parametrize('name', ['scale_lr_mult', 'offset_lr_mult', 'scale_decay_mult'])
@pytest.mark.parametrize('value', [-1, True, '2', [1.0], float('nan')])
def test_refusals(name, value):
    with pytest.raises(ValueError, match=rf'optim_wrapper\.paramwise_cfg\.{name}: got .*, allowed: numbers >= 0'):
        build(model_of(), **{name: value})


def test_a_step_moves_scales_by_their_own_rate():
    model = calibrate(model_of()).train()
    optimizer = build(model, scale_lr_mult=0.0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model(images()).pow(2).sum().backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        assert torch.equal(before[name], parameter) == (parameter in learned_of(model)), name
