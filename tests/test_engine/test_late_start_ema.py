"""Averaged models of learned quantization parameters that get their start values in the middle of training."""

from __future__ import annotations

import pytest
import torch
from mmengine.hooks import EMAHook, Hook
from toy import dataloader

from mmrazor_quant.fake_quants import LearnedFakeQuantize

MOMENTUM = 1e-3
"""So little that an average with values of before the start would be far from those of the model."""


def model(name='LSQ', activations=None):
    qconfig = {
        'w_fake_quant': {'type': f'mmrazor.{name}FakeQuantize'},
        'a_fake_quant': {'type': f'mmrazor.{activations or name}FakeQuantize'},
        'a_qscheme': {'bit': 4, 'is_symmetry': name == 'TQT'},
        'w_qscheme': {'bit': 4, 'is_per_channel': True},
    }
    return {
        'type': 'mmrazor.GeneralQuant',
        'architecture': {'type': 'ToyNet'},
        'quantizer': {'type': 'mmrazor.CustomQuantizer', 'qconfig': qconfig},
        'input_shape': (3, 8, 8),
    }


class Compare(Hook):
    """Note, after each iteration, how far the learned parameters of the average are from those of the model."""

    priority = 'LOWEST'

    def __init__(self):
        self.distance, self.started, self.buffers = [], [], []

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        (ema,) = [hook for hook in runner.hooks if isinstance(hook, EMAHook)]
        own, averaged = runner.model, ema.ema_model.module
        distances, buffers = [0.0], True
        for path, quantizer in own.named_modules():
            if isinstance(quantizer, LearnedFakeQuantize):
                other = averaged.get_submodule(path)
                pairs = zip(quantizer.learned_parameters(), other.learned_parameters())
                # An offset may be zero: then the scale tells what is far.
                size = quantizer.scale_in_use()
                distances += [((p - q).abs() / torch.maximum(p.abs(), size)).max().item() for p, q in pairs]
                buffers &= torch.equal(quantizer.initialized, other.initialized)
                buffers &= torch.equal(quantizer.zero_point, other.zero_point)
        self.distance.append(max(distances))
        self.buffers.append(buffers)
        self.started.append({p for p, q in own.named_modules() if getattr(q, 'is_initialized', False)})


def train(make_runner, **changes):
    changes = {'optim_wrapper': {'optimizer': {'type': 'SGD', 'lr': 0.01}}, **changes}
    runner, compare = make_runner(**changes), Compare()
    runner.register_hook(compare)
    runner.train()
    return runner, compare


def ema_hook(**kwargs):
    return [{'type': 'EMAHook', 'momentum': MOMENTUM, **kwargs}]


@pytest.mark.parametrize('update_buffers', [False, True])
@pytest.mark.parametrize('name', ['LSQ', 'LSQPlus', 'DSQ', 'TQT'])
def test_values_of_before_the_start_are_not_averaged_in(make_runner, name, update_buffers):
    runner, compare = train(
        make_runner, model=model(name), custom_hooks=ema_hook(update_buffers=update_buffers),
        train_cfg__act_quant_begin=1,
    )  # fmt: skip
    assert len(compare.started[3]) == 2 and len(compare.started[4]) == 4, 'weights first'
    assert max(compare.distance) < 0.2, 'the average follows'
    assert all(compare.buffers)


def test_the_average_lags_behind_what_is_learned(make_runner):
    """It is an average, not a copy."""
    _, compare = train(make_runner, model=model(), custom_hooks=ema_hook(), train_cfg__act_quant_begin=1)
    assert compare.distance[-1] > 0


@pytest.mark.parametrize('kwargs', [{}, {'begin_epoch': 1}])
def test_started_before_or_while_the_average_begins(make_runner, kwargs):
    _, compare = train(make_runner, model=model(), custom_hooks=ema_hook(**kwargs))
    assert max(compare.distance) < 0.2 and all(compare.buffers)


def test_started_by_a_calibration(make_runner):
    _, compare = train(make_runner, model=model(), custom_hooks=ema_hook(), train_cfg__calibrate_steps=2)
    assert len(compare.started[0]) == 4
    assert max(compare.distance) < 0.2 and all(compare.buffers)


def test_the_averaged_model_is_evaluated_quantized(make_runner, tmp_path):
    runner, _ = train(
        make_runner, model=model('LSQPlus'), custom_hooks=ema_hook(update_buffers=True), train_cfg__act_quant_begin=1
    )
    saved = torch.load(tmp_path / 'epoch_2.pth', weights_only=True)
    scales = {k: v for k, v in saved['state_dict'].items() if k.endswith('fake_quant.scale')}
    assert len(scales) == 4
    assert all((v != 1).all() for v in scales.values())
    other = make_runner(model=model('LSQPlus'), load_from=str(tmp_path / 'epoch_2.pth'))
    assert set(other.test()) == {'toy/accuracy'}
    assert all(q.is_initialized for q in other.model.modules() if isinstance(q, LearnedFakeQuantize))


def test_resumed_in_the_middle(make_runner, tmp_path):
    """Interrupted after the weights and before the activations have started."""
    changes = dict(model=model(), custom_hooks=ema_hook(update_buffers=True), train_cfg__act_quant_begin=2)
    whole, _ = train(make_runner, **changes, train_cfg__max_epochs=3, work_dir=tmp_path / 'whole')
    resumed, compare = train(
        make_runner, **changes, train_cfg__max_epochs=3, work_dir=tmp_path / 'resumed', resume=True,
        load_from=str(tmp_path / 'whole' / 'epoch_1.pth'),
    )  # fmt: skip
    assert max(compare.distance) < 0.2 and all(compare.buffers)
    one, two = (torch.load(tmp_path / d / 'epoch_3.pth', weights_only=True)['state_dict'] for d in ('whole', 'resumed'))
    assert all(name.endswith('observer_enabled') or torch.equal(value, two[name]) for name, value in one.items())


def test_iteration_based_training(make_runner):
    _, compare = train(
        make_runner, model=model(), custom_hooks=ema_hook(),
        train_cfg={'type': 'mmrazor.QATIterBasedLoop', 'max_iters': 8, 'val_interval': 4, 'act_quant_begin': 3,
                   'weight_quant_begin': 1},
        train_dataloader=dataloader(shuffle=True, augment=True, sampler='InfiniteSampler'),
        default_hooks={'checkpoint': {'type': 'CheckpointHook', 'by_epoch': False, 'interval': 8}},
    )  # fmt: skip
    assert [len(s) for s in compare.started[:5]] == [2, 2, 2, 4, 4]
    assert max(compare.distance) < 0.2 and all(compare.buffers)
