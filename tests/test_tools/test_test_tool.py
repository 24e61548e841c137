"""``tools/test.py`` calibrates, evaluates, and says what is wrong."""

from __future__ import annotations

import json
import pickle

import pytest
import torch


@pytest.fixture
def work(tmp_path):
    return tmp_path / 'work'


def test_calibrates_saves_and_evaluates(write_config, run_tool, work, tmp_path):
    config, out = write_config(), tmp_path / 'metrics.json'
    assert run_tool('test', config, '--out', out) is None
    metrics = json.loads(out.read_text())
    assert set(metrics) == {'toy/accuracy', 'float/toy/accuracy'}
    assert run_tool('test', config, work / 'quantized.pth', '--out', out) is None
    assert json.loads(out.read_text()) == {'toy/accuracy': metrics['toy/accuracy']}


def test_calibrates_a_float_checkpoint(write_config, run_tool, tmp_path, work):
    from toy import ToyNet

    torch.manual_seed(3)
    net = ToyNet()
    torch.save({'state_dict': net.state_dict()}, tmp_path / 'float.pth')
    assert run_tool('test', write_config(), tmp_path / 'float.pth') is None
    state = torch.load(work / 'quantized.pth', weights_only=True)['state_dict']
    for name, value in net.state_dict().items():
        assert torch.equal(state[name], value), name


def test_work_dir_and_options_of_the_command_line(write_config, run_tool, tmp_path, monkeypatch, work):
    monkeypatch.chdir(tmp_path)
    config = write_config()
    options = ['--cfg-options', 'test_cfg.save_as=q.pth', 'test_cfg.calibrate_steps=1']
    assert run_tool('test', config, '--work-dir', 'elsewhere', *options) is None
    assert (tmp_path / 'elsewhere' / 'q.pth').is_file()
    assert not work.exists()


def test_default_work_dir_is_named_after_the_config(write_config, run_tool, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_tool('test', write_config('my_model.py'), '--cfg-options', 'work_dir=None') is None
    assert (tmp_path / 'work_dirs' / 'my_model' / 'quantized.pth').is_file()


def test_predictions_are_those_of_the_quantized_model(write_config, run_tool, tmp_path, work):
    config = write_config()
    assert run_tool('test', config, '--out', tmp_path / 'both.pkl') is None
    assert run_tool('test', config, work / 'quantized.pth', '--out', tmp_path / 'quantized.pkl') is None
    both, quantized = (pickle.loads((tmp_path / name).read_bytes()) for name in ('both.pkl', 'quantized.pkl'))
    assert len(both) == 32
    assert [each['prediction'] for each in both] == [each['prediction'] for each in quantized]


def test_float_model(write_config, run_tool, expect_error, tmp_path):
    from toy import ToyNet

    torch.save(ToyNet().state_dict(), tmp_path / 'float.pth')
    config = write_config(model={'type': 'ToyNet'}, test_cfg={}, train_cfg={'by_epoch': True, 'max_epochs': 1})
    assert run_tool('test', config, tmp_path / 'float.pth', '--out', tmp_path / 'm.json') is None
    assert set(json.loads((tmp_path / 'm.json').read_text())) == {'toy/accuracy'}
    assert 'checkpoint: a float model is tested with weights' in expect_error('test', config)


def test_plain_test_loop(write_config, run_tool, expect_error, work):
    assert run_tool('test', write_config()) is None
    plain = write_config('plain.py', test_cfg={})
    assert run_tool('test', plain, work / 'quantized.pth') is None
    assert "set test_cfg=dict(type='mmrazor.PTQLoop')" in expect_error('test', plain)


def test_missing_config(expect_error):
    assert 'config: there is no file no/such.py' in expect_error('test', 'no/such.py')


def test_config_without_model(expect_error, tmp_path):
    (tmp_path / 'base.py').write_text('a = 1\n')
    assert 'has no field model' in expect_error('test', tmp_path / 'base.py')


def test_config_without_test_data(write_config, expect_error):
    config = write_config(test_dataloader=None, test_cfg=None, test_evaluator=None)
    assert 'has no test_dataloader' in expect_error('test', config)


def test_missing_checkpoint_is_named_before_any_work(write_config, expect_error, work):
    assert 'checkpoint: there is no file nothing.pth' in expect_error('test', write_config(), 'nothing.pth')
    assert 'load_from: there is no file gone.pth' in expect_error('test', write_config(load_from='gone.pth'))
    config = write_config(model__float_checkpoint='float.pth')
    assert 'model.float_checkpoint: there is no file float.pth' in expect_error('test', config)
    assert not work.exists()


def test_truncated_checkpoint_is_named(write_config, expect_error, tmp_path):
    path = tmp_path / 'cut.pth'
    torch.save({'weight': torch.zeros(1000)}, path)
    path.write_bytes(path.read_bytes()[:2000])
    message = expect_error('test', write_config(), path)
    assert f'checkpoint: {path} cannot be read; it is truncated' in message
    assert 'zipfile' not in message


def test_checkpoint_of_another_network(write_config, expect_error, tmp_path, work):
    torch.save({'state_dict': {'other.weight': torch.zeros(3)}}, tmp_path / 'other.pth')
    message = expect_error('test', write_config(), tmp_path / 'other.pth')
    assert 'does not belong to this model' in message
    assert not (work / 'quantized.pth').exists()


def test_unknown_codebase(write_config, expect_error):
    assert "default_scope='mmnothing': cannot import" in expect_error('test', write_config(default_scope='mmnothing'))


def test_wrong_field_of_the_loop(write_config, expect_error):
    message = expect_error('test', write_config(test_cfg__calibrate_steps=0))
    assert 'test_cfg.calibrate_steps: got 0, allowed: integers from 1 up' in message
    assert '(traceback in ' in message


def test_random_weights_are_warned_of(write_config, run_tool, capfd):
    assert run_tool('test', write_config()) is None
    assert 'it is random weights that are quantized' in ''.join(capfd.readouterr())


def test_wrong_output_name_is_refused(write_config, run_tool, capsys):
    assert run_tool('test', write_config(), '--out', 'result.txt') == 2
    assert '--out must end in .pkl (predictions) or .json (metrics)' in capsys.readouterr().err
