"""The zoo coverage tool and the measurements behind it."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.model import BaseModel
from mmengine.structures import BaseDataElement
from torch import nn

from mmrazor_quant.analysis import coverage

SCRIPT = Path(__file__).resolve().parents[1] / 'tools' / 'zoo_coverage.py'
KEYS = [
    'family', 'config', 'ran_float', 'captured', 'islands', 'layers_total', 'layers_inside', 'layers_alone', 'outside',
    'custom_ops', 'training_only', 'equal_eval', 'equal_train', 'equal_resized', 'seconds', 'reason',
]  # fmt: skip


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location('zoo_coverage', SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules['zoo_coverage'] = module
    yield spec.loader.exec_module(module) or module
    del sys.modules['zoo_coverage']


def run(*arguments, package='mmcls'):
    command = [sys.executable, str(SCRIPT), '--package', package, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_one_family_is_measured_and_kept_on_resume(tmp_path):
    out = tmp_path / 'zoo.json'

    done = run('--families', 'lenet', '--out', out)

    assert done.returncode == 0, done.stdout + done.stderr
    (record,) = json.loads(out.read_text())
    assert list(record) == KEYS
    assert record['config'] == 'lenet/lenet5_mnist.py'
    assert record['ran_float'] and record['captured']
    assert (record['layers_inside'], record['layers_total'], record['layers_alone']) == (5, 5, 0)
    assert (record['equal_eval'], record['equal_train'], record['equal_resized']) == (True, True, None)
    assert 'takes no images of (2, 1, 64, 64)' in record['reason']
    assert 'island' in (tmp_path / 'zoo.json.logs' / 'lenet.log').read_text()
    assert done.stdout.splitlines()[-1].startswith('mmcls: 1 families, 1 ran, 1 captured with 5/5 layers')

    again = run('--families', 'lenet', '--out', out, '--resume')

    assert again.returncode == 0
    assert 'resuming: 1 families are in' in again.stdout
    assert json.loads(out.read_text()) == [record]


@pytest.mark.slow
def test_a_family_of_detectors_is_measured(tmp_path):
    done = run('--families', 'rtmdet', '--out', tmp_path / 'zoo.json', package='mmdet')

    assert done.returncode == 0, done.stdout + done.stderr
    (record,) = json.loads((tmp_path / 'zoo.json').read_text())
    assert record['ran_float'] and record['captured'], record
    assert (record['layers_inside'], record['layers_alone'], record['outside']) == (record['layers_total'], 0, [])
    assert (record['equal_eval'], record['equal_train'], record['equal_resized']) == (True, True, True)


@pytest.mark.slow
def test_family_that_runs_out_of_time_says_so_and_the_next_one_is_tried(tmp_path):
    out = tmp_path / 'zoo.json'

    done = run('--families', 'lenet,vgg', '--out', out, '--timeout', '0.1')

    assert done.returncode == 0
    records = json.loads(out.read_text())
    assert [r['family'] for r in records] == ['lenet', 'vgg']
    assert all('timed out after 0.1 s' in r['reason'] and not r['captured'] for r in records)
    assert done.stdout.splitlines()[-1].endswith('not captured: lenet, vgg')


def test_unknown_family_is_refused_with_the_known_ones(tmp_path):
    done = run('--families', 'lenet,lenett', '--out', tmp_path / 'zoo.json')

    assert done.returncode == 2
    assert 'mmcls ships no lenett; it has arcface, beit' in done.stderr


def test_worker_that_dies_keeps_what_it_knew(script, tmp_path):
    with (tmp_path / 'log').open('w') as log:
        ended = script.run_until([sys.executable, '-c', 'import os; os.kill(os.getpid(), 9)'], log, timeout=60)
        well = script.run_until([sys.executable, '-c', 'print(1)'], log, timeout=60)

    assert ended == 'the worker ended with status -9'
    assert well == ''


def test_family_without_a_config_that_can_be_built_gives_the_exceptions(script, tmp_path, monkeypatch):
    (tmp_path / 'broken').mkdir()
    (tmp_path / 'broken' / 'net.py').write_text("default_scope = 'mmcls'\nmodel = dict(type='NoSuchClassifier')\n")
    monkeypatch.setattr(script, 'configs_folder', lambda package: tmp_path)

    script.run_worker('mmcls', 'broken', tmp_path / 'record.json')

    record = json.loads((tmp_path / 'record.json').read_text())
    assert list(record) == KEYS
    assert not record['ran_float'] and not record['captured']
    assert 'broken/net.py: KeyError' in record['reason'] and 'NoSuchClassifier' in record['reason']


def test_config_without_a_default_scope_gets_that_of_its_package(script):
    path = script.configs_folder('mmcls') / 'eva' / 'eva-l-p14_headless.py'

    config = script.load_config('mmcls', path)

    assert 'default_scope' not in config
    assert script.count_parameters(config) > 3e8


def test_families_are_the_folders_of_the_installed_package(script):
    families = script.list_families('mmcls')

    assert '_base_' not in families
    assert set(families) == {p.name for p in script.configs_folder('mmcls').glob('[!_.]*') if p.is_dir()}


def test_smallest_config_has_the_fewest_parameters_and_is_no_deployed_one(script):
    name, config = script.smallest_config('mmcls', 'repvgg')

    assert name == 'repvgg/repvgg-A0_8xb32_in1k.py'
    assert script.count_parameters(config) == sum(p.numel() for p in script.build_model(config).parameters())


def test_config_that_imports_a_module_and_one_in_a_subfolder(script):
    name, _ = script.smallest_config('mmcls', 'replknet')

    assert name == 'replknet/replknet-31B_32xb64_in1k.py'


def test_image_shape_comes_from_the_test_pipeline_then_the_training_one(script):
    package = script.PACKAGES['mmcls']
    resize, crop = dict(type='Resize', scale=(64, 32)), dict(type='CenterCrop', crop_size=24)
    model = dict(backbone=dict(in_channels=1))

    def shape(test, train=()):
        loaders = {
            'test_dataloader': dict(dataset=dict(pipeline=list(test))),
            'train_dataloader': dict(dataset=dict(type='RepeatDataset', dataset=dict(pipeline=list(train)))),
        }
        return script.input_shape(package, Config(dict(model=model, **loaders)))

    assert shape([resize, crop]) == (1, 24, 24)
    assert shape([resize]) == (1, 32, 64)
    assert shape([], [crop]) == (1, 24, 24)
    assert shape([]) is None


class Toy(BaseModel):
    """A model with OpenMMLab's modes, a batch norm and randomness in training."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.5)

    def forward(self, inputs, data_samples=None, mode='tensor'):
        if mode == 'loss' and data_samples is None:
            raise ValueError('loss wants data_samples')
        out = self.drop(self.norm(self.conv(inputs)))
        return [BaseDataElement(out=out)] if mode == 'predict' else out


def test_equal_models_compare_equal_in_eval_and_train():
    model = Toy()
    twin = coverage.eager_copy(model)

    assert coverage.compare(model, twin, (2, 3, 8, 8), False).equal is True
    assert coverage.compare(model, twin, (2, 3, 8, 8), True).equal is True
    assert torch.equal(model.norm.running_mean, torch.zeros(4))


def test_a_difference_in_the_last_bit_is_seen_inside_data_elements():
    model = Toy().eval()
    twin = coverage.eager_copy(model)
    twin.conv.bias.data[0] = torch.nextafter(twin.conv.bias.data[0], torch.tensor(9.0))

    assert coverage.compare(model, twin, (2, 3, 8, 8), False).equal is False


def test_modes_that_the_float_model_lacks_are_noted_and_a_failing_capture_counts():
    model, broken = Toy(), Toy()
    broken.conv = nn.Conv2d(5, 4, 1)

    alike = coverage.compare(model, coverage.eager_copy(model), (2, 3, 8, 8), True)
    failing = coverage.compare(model, broken, (2, 3, 8, 8), False)
    impossible = coverage.compare(model, model, (2, 4, 8, 8), False)

    assert alike.equal is True
    assert alike.notes == ['the float model cannot run mode loss (ValueError: loss wants data_samples)']
    assert failing.equal is False and 'the captured model fails in mode tensor' in failing.notes[0]
    assert impossible.equal is None


def test_features_are_compared_where_the_float_model_runs_no_mode():
    class Distilled(Toy):
        def forward(self, inputs, data_samples=None, mode='tensor'):
            raise NotImplementedError('distillation')

        def extract_feat(self, inputs):
            return self.conv(inputs)

    model = Distilled()
    other = coverage.eager_copy(model)
    other.conv.bias.data += 1

    alike = coverage.compare(model, coverage.eager_copy(model), (2, 3, 8, 8), True)
    different = coverage.compare(model, other, (2, 3, 8, 8), True)

    assert (alike.equal, different.equal) == (True, False)
    assert len(alike.notes) == 2 and 'NotImplementedError: distillation' in alike.notes[0]


def test_randomize_moves_every_parameter_and_statistic_and_is_repeatable():
    first, second = Toy(), Toy()
    coverage.randomize(first)
    second.load_state_dict(Toy().state_dict())
    second.conv.load_state_dict(first.conv.state_dict())
    values = [*first.norm.parameters(), first.norm.running_mean, first.norm.running_var]

    assert all(v.unique().numel() == v.numel() for v in values)
    assert all(v.isfinite().all() for v in first.state_dict().values())
