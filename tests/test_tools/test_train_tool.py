"""``tools/train.py`` trains quantized and float models, resumes, and says what is wrong."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
FLOAT = {
    'model': {'type': 'ToyNet'},
    'train_cfg': {'by_epoch': True, 'max_epochs': 4},
    'test_cfg': {},
}


@pytest.fixture
def work(tmp_path):
    return tmp_path / 'work'


def weights(path) -> dict:
    return torch.load(path, weights_only=True)['state_dict']


def assert_same(one: dict, other: dict) -> None:
    assert list(one) == list(other)
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def test_trains_and_tests_a_quantized_model(write_config, run_tool, work):
    config = write_config()
    assert run_tool('train', config) is None
    assert weights(work / 'epoch_2.pth')['quant_calibrated'].item() == 1
    assert run_tool('test', config, work / 'epoch_2.pth') is None
    assert not (work / 'quantized.pth').exists()


def test_from_float_training_to_quantized_training(write_config, run_tool, work, tmp_path):
    """The three steps of a project: train float, PTQ, QAT from the result."""
    assert run_tool('train', write_config('float.py', **FLOAT)) is None
    assert run_tool('test', write_config('ptq.py'), work / 'epoch_4.pth', '--out', tmp_path / 'ptq.json') is None
    qat = write_config('qat.py', load_from=str(work / 'quantized.pth'), work_dir=tmp_path / 'qat')
    assert run_tool('train', qat) is None
    assert (tmp_path / 'qat' / 'epoch_2.pth').is_file()


def test_resumes(write_config, run_tool, work, tmp_path, capfd):
    config = write_config()
    assert run_tool('train', config, '--resume') is None
    assert 'No complete checkpoint' in ''.join(capfd.readouterr())
    full = weights(work / 'epoch_2.pth')
    (work / 'epoch_2.pth').unlink()
    assert run_tool('train', config, '--resume') is None
    assert f'Resuming from {work / "epoch_1.pth"}' in ''.join(capfd.readouterr())
    assert_same(weights(work / 'epoch_2.pth'), full)
    other = ['--work-dir', tmp_path / 'other', '--resume', work / 'epoch_1.pth']
    assert run_tool('train', config, *other) is None
    assert_same(weights(tmp_path / 'other' / 'epoch_2.pth'), full)


def test_resuming_without_checkpoint_still_loads_the_weights_to_start_from(write_config, run_tool, work, tmp_path):
    assert run_tool('test', write_config()) is None
    quantized = {'load_from': str(work / 'quantized.pth')}
    assert run_tool('train', write_config('one.py', work_dir=tmp_path / 'one', **quantized)) is None
    assert run_tool('train', write_config('two.py', work_dir=tmp_path / 'two', **quantized), '--resume') is None
    assert_same(weights(tmp_path / 'one' / 'epoch_2.pth'), weights(tmp_path / 'two' / 'epoch_2.pth'))


def test_killed_in_another_process_and_folder(write_config, tmp_path, work, run_tool):
    """The whole way: a process killed in the middle, the same command with ``--resume``, from any folder."""
    hook = tmp_path / 'killer.py'
    hook.write_text(
        'import os, signal\n'
        'from mmengine.hooks import Hook\n'
        'from mmengine.registry import HOOKS\n'
        '@HOOKS.register_module()\n'
        'class Killer(Hook):\n'
        '    def before_train_iter(self, runner, batch_idx, data_batch=None):\n'
        '        if runner.iter == 6 and os.environ.get("KILL"):\n'
        '            os.kill(os.getpid(), signal.SIGKILL)\n'
    )
    config = write_config(custom_hooks=[{'type': 'Killer'}])
    with open(config, 'a') as file:
        file.write("custom_imports['imports'].append('killer')\n")
    paths = [str(ROOT), str(ROOT / 'tests' / 'test_engine'), str(tmp_path)]
    command = [sys.executable, str(ROOT / 'tools' / 'train.py'), config]
    environment = {**os.environ, 'PYTHONPATH': os.pathsep.join(paths), 'OMP_NUM_THREADS': '1'}
    killed = subprocess.run(command, env={**environment, 'KILL': '1'}, cwd='/', capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    resumed = subprocess.run([*command, '--resume'], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert resumed.returncode == 0, resumed.stderr[-2000:]
    assert f'Resuming from {work / "epoch_1.pth"}' in resumed.stdout + resumed.stderr
    assert run_tool('train', write_config('whole.py', work_dir=tmp_path / 'whole')) is None
    assert_same(weights(work / 'epoch_2.pth'), weights(tmp_path / 'whole' / 'epoch_2.pth'))


def test_no_validation(write_config, run_tool, work, capfd):
    assert run_tool('train', write_config(), '--no-validate') is None
    assert 'Epoch(val)' not in ''.join(capfd.readouterr())


def test_float_loop_is_refused_for_a_quantized_model(write_config, expect_error):
    message = expect_error('train', write_config(train_cfg=FLOAT['train_cfg']))
    assert 'train_cfg: EpochBasedTrainLoop does not train quantized models' in message
    assert 'mmrazor.QATEpochBasedLoop' in message


def test_quantized_loop_is_refused_for_a_float_model(write_config, expect_error):
    message = expect_error('train', write_config(model={'type': 'ToyNet'}))
    assert 'needs a quantized model' in message


def test_amp_needs_an_accelerator(write_config, expect_error):
    if torch.cuda.is_available():
        pytest.skip('there is one')
    assert 'only available' in expect_error('train', write_config(), '--amp')


def test_amp_refuses_other_wrappers(write_config, expect_error):
    config = write_config(optim_wrapper={'type': 'OtherWrapper', 'optimizer': {'type': 'SGD', 'lr': 0.1}})
    assert "--amp needs optim_wrapper.type OptimWrapper or AmpOptimWrapper, but it is 'OtherWrapper'" in expect_error(
        'train', config, '--amp'
    )


def test_learning_rate_is_scaled_only_with_a_base(write_config, expect_error, run_tool, capfd):
    assert '--auto-scale-lr needs auto_scale_lr' in expect_error('train', write_config(), '--auto-scale-lr')
    assert run_tool('train', write_config(auto_scale_lr={'base_batch_size': 16}), '--auto-scale-lr') is None
    assert 'LR is set based on batch size of 16' in ''.join(capfd.readouterr())


def test_missing_checkpoint_to_resume_from(write_config, expect_error):
    assert '--resume: there is no file gone.pth' in expect_error('train', write_config(), '--resume', 'gone.pth')


def test_bug_shows_its_traceback(write_config, run_tool, monkeypatch):
    from toy import ToyNet

    monkeypatch.setattr(ToyNet, 'loss', lambda self, inputs, data_samples: {}['no such key'])
    with pytest.raises(KeyError, match='no such key'):
        run_tool('train', write_config())


def test_debug_variable_shows_the_traceback(write_config, run_tool, monkeypatch):
    monkeypatch.setenv('MMRAZOR_DEBUG', '1')
    with pytest.raises(ValueError, match='is never reached'):
        run_tool('train', write_config(train_cfg__act_quant_begin=99))
