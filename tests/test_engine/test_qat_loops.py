"""QAT loops: what is switched on when, and what is refused."""

from __future__ import annotations

import pytest
import torch
from mmengine.hooks import Hook
from toy import act_scales, dataloader, quant_state

from mmrazor_quant.engine.checkpoint import ATOMIC_BACKEND

QAT = (True, True, True, True)
QUANTIZED = (False, True, False, True)


class States(Hook):
    """Remember the state of the model in each iteration of training and of validation."""

    priority = 'LOWEST'

    def __init__(self):
        self.train, self.val, self.frozen, self.calibrated, self.scales = [], [], [], [], []

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        self.batch = data_batch

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        model = runner.model
        self.train.append(quant_state(model))
        self.frozen.append(not model.architecture.backbone.bn.training)
        self.calibrated.append(model.is_calibrated)
        self.scales.append(act_scales(model)[0].item())

    def after_val_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.val.append(quant_state(runner.model))


def train(make_runner, **changes) -> tuple[object, States]:
    runner, states = make_runner(**changes), States()
    runner.register_hook(states)
    runner.train()
    return runner, states


def iter_based(max_iters: int = 8, **fields) -> dict:
    return {
        'train_cfg': {'type': 'mmrazor.QATIterBasedLoop', 'max_iters': max_iters, 'val_interval': 3, **fields},
        'train_dataloader': dataloader(shuffle=True, augment=True, sampler='InfiniteSampler'),
        'default_hooks': {'checkpoint': {'type': 'CheckpointHook', 'by_epoch': False, 'interval': 4}},
    }


@pytest.mark.parametrize('by_iter', [False, True])
def test_default_trains_quantized_and_validates_without_observing(make_runner, by_iter):
    runner, states = train(make_runner, **(iter_based() if by_iter else {}))
    assert states.train == [QAT] * 8
    assert set(states.val) == {QUANTIZED}
    assert runner.model.is_calibrated
    assert quant_state(runner.model) == QUANTIZED
    assert (act_scales(runner.model) != 1).all()


def test_schedule_in_epochs(make_runner):
    fields = {'max_epochs': 4, 'observe_begin': 0, 'observe_end': 2, 'weight_quant_begin': 1, 'act_quant_begin': 2,
              'freeze_bn_begin': 3}  # fmt: skip
    runner, states = train(make_runner, train_cfg={'type': 'mmrazor.QATEpochBasedLoop', **fields})
    observe_only, weights = (True, False, True, False), (True, True, True, False)
    per_epoch = [observe_only, weights, QUANTIZED, QUANTIZED]
    assert states.train == [state for state in per_epoch for _ in range(4)]
    assert states.frozen == [False] * 12 + [True] * 4
    assert states.calibrated == [False] * 8 + [True] * 8
    # What the observers saw becomes the scale when quantization begins, and stays.
    assert states.scales[7] == 1 and len(set(states.scales[8:])) == 1 and states.scales[8] != 1
    assert states.val == [(False, *state[1:2], False, *state[3:]) for state in per_epoch for _ in range(4)]


def test_epoch_based_schedule_in_iterations(make_runner):
    _, states = train(make_runner, train_cfg={'type': 'mmrazor.QATEpochBasedLoop', 'max_epochs': 2,
                                              'act_quant_begin': 6, 'schedule_by_epoch': False})  # fmt: skip
    assert states.train == [(True, True, True, False)] * 6 + [QAT] * 2


def test_schedule_in_iterations(make_runner):
    fields = {'act_quant_begin': 2, 'observe_end': 5, 'freeze_bn_begin': 4, 'weight_quant_begin': 1}
    _, states = train(make_runner, **iter_based(**fields))
    expected = [(True, False, True, False), (True, True, True, False), QAT, QAT, QAT, QUANTIZED, QUANTIZED, QUANTIZED]
    assert states.train == expected
    assert states.frozen == [False] * 4 + [True] * 4
    assert len(set(states.scales[4:])) == 1 and len(set(states.scales[:5])) > 1


def test_frozen_batch_norm_keeps_its_statistics(make_runner):
    runner, _ = train(make_runner, train_cfg__freeze_bn_begin=0)
    assert torch.equal(runner.model.architecture.backbone.bn.running_mean, torch.zeros(8))


@pytest.mark.parametrize('by_iter', [False, True])
def test_calibrates_first_if_asked(make_runner, by_iter, log):
    changes = iter_based() if by_iter else {}
    changes.setdefault('train_cfg', {'type': 'mmrazor.QATEpochBasedLoop', 'max_epochs': 2})
    # The ranges are those of calibration, for nothing is observed later.
    changes['train_cfg'].update(calibrate_steps=2, observe_end=0)
    runner, states = train(make_runner, **changes)
    assert states.train == [QUANTIZED] * 8
    assert len(set(states.scales)) == 1 and states.scales[0] != 1
    assert all(states.calibrated)


def test_calibration_does_not_change_the_data_of_training(make_runner, tmp_path):
    batches = {}
    for steps in (0, 2):
        runner, states = make_runner(work_dir=tmp_path / str(steps), **iter_based(1, calibrate_steps=steps)), States()
        runner.register_hook(states)
        runner.train()
        batches[steps] = states.batch['inputs']
    assert torch.equal(batches[0], batches[2])


def test_starts_from_a_quantized_checkpoint(make_runner, tmp_path, log):
    calibrated = make_runner()
    calibrated.test()
    expected = act_scales(calibrated.model)
    runner, states = make_runner(load_from=str(tmp_path / 'quantized.pth'), train_cfg__calibrate_steps=2,
                                 train_cfg__observe_end=0, optim_wrapper__optimizer__lr=0.0), States()  # fmt: skip
    lines = log(runner)
    runner.register_hook(states)
    runner.train()
    assert any('calibrated already' in line for line in lines)
    assert torch.equal(act_scales(runner.model), expected)


@pytest.mark.parametrize('fields', [
    {'observe_begin': 1},
    {'observe_end': 0},
])  # fmt: skip
def test_quantizing_what_was_never_observed_is_refused(make_runner, fields):
    runner = make_runner(**{f'train_cfg__{key}': value for key, value in fields.items()})
    with pytest.raises(ValueError, match=r'train_cfg\.observe_begin=.*before any were observed.*calibrate_steps'):
        runner.train()


@pytest.mark.parametrize('fields, match', [
    ({'act_quant_begin': -1}, r'train_cfg\.act_quant_begin must be an int >= 0 \(epochs\), but got -1'),
    ({'act_quant_begin': 2}, r'train_cfg\.act_quant_begin=2 is never reached: training ends after 2 epochs'),
    ({'observe_begin': 1, 'observe_end': 0}, r'train_cfg\.observe_end=0 is before'),
    ({'calibrate_steps': -1}, r'train_cfg\.calibrate_steps: got -1, allowed: integers from 0 up'),
    ({'freeze_bn': 3}, r"train_cfg of QATEpochBasedLoop has no field 'freeze_bn'; known are .*freeze_bn_begin"),
])  # fmt: skip
def test_wrong_arguments_are_refused(make_runner, fields, match):
    runner = make_runner(**{f'train_cfg__{key}': value for key, value in fields.items()})
    with pytest.raises(ValueError, match=match):
        runner.train()


@pytest.mark.parametrize('kind', ['QATEpochBasedLoop', 'QATIterBasedLoop'])
def test_float_model_is_refused(make_runner, kind):
    length = {'max_epochs': 1} if 'Epoch' in kind else {'max_iters': 1}
    runner = make_runner(model={'type': 'ToyNet'}, train_cfg={'type': f'mmrazor.{kind}', **length})
    with pytest.raises(TypeError, match=rf"train_cfg\.type='mmrazor\.{kind}' needs a quantized model"):
        runner.train()


def test_unknown_field_of_the_iteration_loop_is_refused(make_runner):
    with pytest.raises(ValueError, match="QATIterBasedLoop has no field 'schedule_by_epoch'"):
        make_runner(**iter_based(schedule_by_epoch=True)).train()


def test_plain_test_loop_after_training(make_runner, tmp_path):
    runner, _ = train(make_runner, test_cfg={})
    batches, before = [], {k: v.clone() for k, v in runner.model.state_dict().items()}
    test_step = runner.model.test_step
    runner.model.test_step = lambda data: batches.append(quant_state(runner.model)) or test_step(data)
    assert set(runner.test()) == {'toy/accuracy'}
    assert set(batches) == {QUANTIZED}
    for name, value in runner.model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_plain_test_loop_needs_a_calibrated_model(make_runner):
    runner = make_runner(test_cfg={}, custom_hooks=[{'type': 'mmrazor.QuantEvalHook'}])
    with pytest.raises(ValueError, match=r'not calibrated.*mmrazor\.PTQLoop'):
        runner.test()


def test_checkpoint_of_the_middle_is_evaluated_only(make_runner, tmp_path):
    train(make_runner)
    assert set(make_runner(load_from=str(tmp_path / 'epoch_1.pth')).test()) == {'toy/accuracy'}


@pytest.mark.parametrize('update_buffers', [False, True])
def test_ema_hook(make_runner, update_buffers):
    hooks = [{'type': 'EMAHook', 'momentum': 0.1, 'update_buffers': update_buffers}]
    runner, states = train(make_runner, custom_hooks=hooks)
    assert states.train == [QAT] * 8
    assert set(states.val) == {QUANTIZED}
    ema = next(hook for hook in runner.hooks if type(hook).__name__ == 'EMAHook').ema_model.module
    assert not torch.equal(ema.architecture.head.weight, runner.model.architecture.head.weight)
    assert ema.is_calibrated


def test_checkpoints_are_atomic_unless_told_otherwise(make_runner):
    runner, _ = train(make_runner, default_hooks={'checkpoint': {'type': 'CheckpointHook', 'max_keep_ckpts': 1}})
    hook = next(hook for hook in runner.hooks if type(hook).__name__ == 'CheckpointHook')
    assert hook.backend_args['backend'] == ATOMIC_BACKEND
    own = {'checkpoint': {'type': 'CheckpointHook', 'backend_args': {'backend': 'local'}}}
    runner, _ = train(make_runner, default_hooks=own)
    hook = next(hook for hook in runner.hooks if type(hook).__name__ == 'CheckpointHook')
    assert hook.backend_args == {'backend': 'local'}


def test_only_the_last_checkpoint_is_kept_if_asked(make_runner, tmp_path):
    train(make_runner, train_cfg__max_epochs=3,
          default_hooks={'checkpoint': {'type': 'CheckpointHook', 'max_keep_ckpts': 1}})  # fmt: skip
    assert [path.name for path in tmp_path.glob('*.pth')] == ['epoch_3.pth']


def test_persistent_workers_are_switched_off(make_runner, log):
    loader = {**dataloader(shuffle=True, augment=True, workers=1), 'persistent_workers': True}
    runner = make_runner(train_dataloader=loader, train_cfg__max_epochs=1)
    lines = log(runner)
    runner.train()
    assert any('persistent_workers is switched off' in line for line in lines)
    assert not runner.train_dataloader.persistent_workers


@pytest.mark.parametrize('by_iter', [False, True])
def test_averaged_model_has_the_quantization_buffers_of_the_model(make_runner, tmp_path, by_iter):
    changes = iter_based(8, act_quant_begin=4) if by_iter else {'train_cfg__act_quant_begin': 1}
    runner, _ = train(
        make_runner, custom_hooks=[{'type': 'EMAHook', 'momentum': 0.1, 'update_buffers': True}], **changes
    )
    name = 'iter_8.pth' if by_iter else 'epoch_2.pth'
    saved = torch.load(tmp_path / name, weights_only=True)['state_dict']
    state = runner.model.state_dict()
    assert saved['quant_calibrated'].item() == 1
    for path, quantizer in runner.model.act_quantizers():
        for name, value in quantizer.named_buffers():
            assert name.endswith('enabled') or torch.equal(saved[f'{path}.{name}'], value), (path, name)
    assert not torch.equal(saved['backbone.bn.running_mean'], state['backbone.bn.running_mean'])
