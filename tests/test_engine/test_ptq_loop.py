"""PTQLoop: what it calibrates on, what it saves, what it refuses."""

from __future__ import annotations

import os

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.runner import load_checkpoint
from toy import BASE, ToyImages, act_scales, dataloader, quant_state

from mmrazor_quant.engine import PTQLoop

QUANTIZED = (False, True, False, True)
FLOAT = (False, False, False, False)


class Recorder(Hook):
    """Remember the calls of hooks, with the state that the model is in."""

    def __init__(self):
        self.calls = []

    def __getattribute__(self, name):
        if name.startswith(('before_test', 'after_test')):
            return lambda runner, **kwargs: self.calls.append((name, quant_state(runner.model), kwargs))
        return super().__getattribute__(name)


def seen_batches(runner) -> list[dict]:
    """Have a runner's model remember the batches it is tested on, and the state it is in then."""
    batches, test_step = [], runner.model.test_step

    def remember(data):
        batches.append({**data, 'state': quant_state(runner.model)})
        return test_step(data)

    runner.model.test_step = remember
    return batches


def labels_of(batch: dict) -> list[int]:
    return [sample.label for sample in batch['data_samples']]


def augmented(batch: dict) -> bool:
    (answer,) = {sample.augmented for sample in batch['data_samples']}
    return answer


def test_calibrates_saves_and_evaluates_both(make_runner, tmp_path, log):
    runner = make_runner()
    lines = log(runner)
    metrics = runner.test()
    assert set(metrics) == {'toy/accuracy', 'float/toy/accuracy'}
    assert runner.model.is_calibrated and quant_state(runner.model) == QUANTIZED
    table = next(line for line in lines if 'quantized' in line and 'difference' in line).splitlines()
    assert table[1].split() == ['metric', 'float', 'quantized', 'difference']
    difference = metrics['toy/accuracy'] - metrics['float/toy/accuracy']
    row = [
        'toy/accuracy',
        f'{metrics["float/toy/accuracy"]:.4f}',
        f'{metrics["toy/accuracy"]:.4f}',
        f'{difference:+.4f}',
    ]
    assert table[2].split() == row
    assert any('Calibration [3/3]  eta: 0:00:00' in line for line in lines)
    assert (tmp_path / 'quantized.pth').is_file()


def test_order_of_states_and_hooks(make_runner):
    runner, recorder = make_runner(), Recorder()
    runner.register_hook(recorder)
    batches = seen_batches(runner)
    metrics = runner.test()
    states = [batch['state'] for batch in batches]
    assert states == [(False, False, True, False)] * 3 + [FLOAT] * 4 + [QUANTIZED] * 4
    names = [name for name, _, _ in recorder.calls]
    middle = ['before_test_iter', 'after_test_iter'] * 4
    assert names == ['before_test', 'before_test_epoch', *middle, 'after_test_epoch', 'after_test']
    assert {state for _, state, _ in recorder.calls} == {QUANTIZED}
    assert recorder.calls[-2][2]['metrics'] == metrics


def test_weights_can_be_quantized_while_observing(make_runner):
    runner = make_runner(test_cfg__calibrate_weights_quantized=True)
    batches = seen_batches(runner)
    runner.test()
    assert batches[0]['state'] == (False, True, True, False)


def test_quantized_checkpoint_is_only_evaluated(make_runner, tmp_path, log):
    first = make_runner()
    metrics = first.test()
    # No training data are needed any more.
    runner = make_runner(load_from=str(tmp_path / 'quantized.pth'), train_dataloader=None, train_cfg=None,
                         optim_wrapper=None, param_scheduler=None)  # fmt: skip
    lines, batches = log(runner), seen_batches(runner)
    assert runner.test() == {'toy/accuracy': metrics['toy/accuracy']}
    assert len(batches) == 4
    assert any('evaluating only' in line for line in lines)
    for (name, value), (_, other) in zip(first.model.state_dict().items(), runner.model.state_dict().items()):
        assert torch.equal(value, other), name


def test_quantized_checkpoint_is_one_of_mmengine(make_runner, tmp_path):
    runner = make_runner()
    runner.test()
    checkpoint = torch.load(tmp_path / 'quantized.pth', weights_only=True)
    assert set(checkpoint) == {'meta', 'state_dict'}
    assert checkpoint['meta']['dataset_meta'] == {'classes': tuple('abcd')}
    assert checkpoint['meta']['seed'] == 0
    assert 'mmrazor.PTQLoop' in checkpoint['meta']['cfg']
    model = make_runner().model
    load_checkpoint(model, str(tmp_path / 'quantized.pth'), strict=True)
    assert model.is_calibrated


def test_default_data_are_the_training_split_without_augmentation_in_mixed_order(make_runner):
    runner = make_runner()
    batches = seen_batches(runner)
    runner.test()
    train = {item['inputs'].tobytes() for item in ToyImages(pipeline=[]).load_data_list()}
    images = [image.numpy().tobytes() for batch in batches[:3] for image in batch['inputs']]
    assert len(set(images)) == 24 and set(images) <= train
    assert not any(map(augmented, batches[:3]))
    assert len(set(labels_of(batches[0]))) > 1
    again = make_runner()
    repeated = seen_batches(again)
    again.test()
    assert all(torch.equal(one['inputs'], other['inputs']) for one, other in zip(batches[:3], repeated[:3]))


def test_order_depends_on_its_own_seed_alone(make_runner):
    orders = {}
    for seed, calibrate_seed in ((0, 0), (1, 0), (0, 1)):
        runner = make_runner(randomness__seed=seed, test_cfg__calibrate_seed=calibrate_seed)
        batches = seen_batches(runner)
        runner.test()
        orders[seed, calibrate_seed] = [labels_of(batch) for batch in batches[:3]]
    assert orders[0, 0] == orders[1, 0] != orders[0, 1]


@pytest.mark.parametrize('wrapper', [
    {'type': 'RepeatDataset', 'times': 3},
    {'type': 'ConcatDataset'},
    {'type': 'RepeatDataset', 'times': 2, 'dataset': {'type': 'ClassBalancedDataset', 'oversample_thr': 0.9}},
])  # fmt: skip
def test_transforms_are_replaced_inside_of_wrappers(make_runner, wrapper):
    inner = BASE['train_dataloader']['dataset']
    if wrapper['type'] == 'ConcatDataset':
        wrapped = {**wrapper, 'datasets': [inner, inner]}
    elif 'dataset' in wrapper:
        wrapped = {**wrapper, 'dataset': {**wrapper['dataset'], 'dataset': inner}}
    else:
        wrapped = {**wrapper, 'dataset': inner}
    runner = make_runner(train_dataloader__dataset=wrapped)
    batches = seen_batches(runner)
    runner.test()
    assert not any(map(augmented, batches[:3]))


def test_own_calibration_data_are_taken_as_they_are(make_runner):
    loader = dataloader(shuffle=False, augment=True, seed=5)
    runner = make_runner(test_cfg__calibrate_dataloader=loader, train_dataloader=None, train_cfg=None,
                         optim_wrapper=None, param_scheduler=None)  # fmt: skip
    batches = seen_batches(runner)
    runner.test()
    assert all(map(augmented, batches[:3]))
    assert labels_of(batches[0]) == [0] * 8


def test_fewer_data_than_steps_is_said(make_runner, log):
    runner = make_runner(test_cfg__calibrate_steps=100)
    lines = log(runner)
    runner.test()
    assert any('4 batches, fewer than the 100 asked for' in line for line in lines)


def test_calibrating_on_the_test_data_is_warned_of(make_runner, log):
    runner = make_runner(train_dataloader=dataloader(shuffle=True, augment=True, seed=1))
    lines = log(runner)
    runner.test()
    assert any('data that the model is evaluated on' in line for line in lines)


def test_interrupted_evaluation_keeps_the_calibration(make_runner, tmp_path):
    runner = make_runner()

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    runner.test_loop._evaluate_float = interrupt
    with pytest.raises(KeyboardInterrupt):
        runner.test()
    resumed = make_runner(load_from=str(tmp_path / 'quantized.pth'))
    assert set(resumed.test()) == {'toy/accuracy'}


@pytest.mark.parametrize('update_buffers', [False, True])
def test_ema_hook_does_not_swap_the_calibration_away(make_runner, tmp_path, update_buffers):
    plain = make_runner(work_dir=tmp_path / 'plain')
    plain_metrics = plain.test()
    float_path = tmp_path / 'float.pth'
    torch.save({'state_dict': plain.model.architecture.state_dict()}, float_path)
    ema = make_runner(custom_hooks=[{'type': 'EMAHook', 'update_buffers': update_buffers}])
    ema.model.architecture.load_state_dict(plain.model.architecture.state_dict())
    assert ema.test() == plain_metrics
    assert ema.model.is_calibrated
    assert torch.equal(act_scales(ema.model), act_scales(plain.model))


def test_amp_evaluation(make_runner):
    runner = make_runner(test_cfg__fp16=True)
    dtypes = set()
    runner.model.architecture.backbone.dropout.register_forward_hook(lambda module, args, out: dtypes.add(out.dtype))
    metrics = runner.test()
    device = next(runner.model.parameters()).device.type
    assert dtypes == {torch.float32, torch.get_autocast_dtype(device)}
    assert set(metrics) == {'toy/accuracy', 'float/toy/accuracy'}


# -- refusals ----------------------------------------------------------------------------------------------------------


def expect_error(make_runner, error, match, **changes):
    runner = make_runner(**changes)
    batches = seen_batches(runner) if hasattr(runner.model, 'is_calibrated') else []
    with pytest.raises(error, match=match):
        runner.test()
    assert batches == [], 'the error must come before any work'
    assert not os.path.exists(os.path.join(runner.work_dir, 'quantized.pth'))


def test_float_model_is_refused(make_runner):
    expect_error(make_runner, TypeError, r"test_cfg\.type='mmrazor.PTQLoop' needs .*mmrazor.GeneralQuant.*is a ToyNet",
                 model={'type': 'ToyNet'})  # fmt: skip


def test_no_training_data_is_refused(make_runner):
    expect_error(make_runner, ValueError, r'test_cfg\.calibrate_dataloader is not given and the config has no train_da',
                 train_dataloader=None, train_cfg=None, optim_wrapper=None, param_scheduler=None)  # fmt: skip


def test_missing_training_files_are_named(make_runner):
    match = r'train_dataloader: .*nowhere/train.*; .* unless test_cfg\.calibrate_dataloader gives other data'
    expect_error(make_runner, RuntimeError, match, train_dataloader__dataset__file='nowhere/train')


def test_missing_own_calibration_files_are_named(make_runner):
    loader = dataloader(shuffle=False, augment=False, file='nowhere/calib')
    match = r'^test_cfg\.calibrate_dataloader: .*nowhere/calib\W*$'
    expect_error(make_runner, RuntimeError, match, test_cfg__calibrate_dataloader=loader)


def test_built_dataset_with_transforms_is_refused(make_runner):
    dataset = ToyImages(pipeline=[{'type': 'ToyNoise'}, {'type': 'ToyPack'}])
    runner = make_runner()
    runner.test_loop.runner.cfg._cfg_dict['train_dataloader'] = {'dataset': dataset, 'batch_size': 8}
    with pytest.raises(ValueError, match=r'built ToyImages.*set test_cfg\.calibrate_dataloader'):
        runner.test_loop.run()


@pytest.mark.parametrize('changes, match', [
    ({'calibrate_steps': 0}, r'test_cfg\.calibrate_steps: got 0, allowed: integers from 1 up'),
    ({'calibrate_steps': 2.5}, r'test_cfg\.calibrate_steps: got 2\.5, allowed: integers from 1 up'),
    ({'calibrate_seed': -1}, r'test_cfg\.calibrate_seed'),
    ({'calibrate_step': 3}, r"test_cfg of PTQLoop has no field 'calibrate_step'; known are .*calibrate_steps"),
    ({'reconstruct': {'type': 'AdaRound'}}, r"has no field 'reconstruct'"),
])  # fmt: skip
def test_wrong_arguments_are_refused(make_runner, changes, match):
    expect_error(make_runner, ValueError, match, **{f'test_cfg__{key}': value for key, value in changes.items()})


def test_empty_calibration_set_is_refused(make_runner):
    loader = dataloader(shuffle=False, augment=False, size=0)
    expect_error(make_runner, ValueError, r'test_cfg\.calibrate_dataloader gives no data',
                 test_cfg__calibrate_dataloader=loader)  # fmt: skip


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_data_that_are_not_finite_are_refused_by_name(make_runner, tmp_path, value):
    runner = make_runner(test_cfg__calibrate_dataloader=dataloader(False, False, scale=value))
    with pytest.raises(ValueError, match=r'backbone'):
        runner.test()
    assert not runner.model.is_calibrated
    assert not (tmp_path / 'quantized.pth').exists()


def test_signature_lists_no_runner():
    with pytest.raises(ValueError, match='known are dataloader, evaluator, fp16, calibrate_dataloader'):
        PTQLoop(None, None, None, wrong=1)
