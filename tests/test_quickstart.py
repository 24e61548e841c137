"""The quickstart, its dataset and configs, and the size of models that it reports."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from torch import nn

from mmrazor_quant.algorithms import GeneralQuant
from mmrazor_quant.analysis.size import model_size, packed_bytes

pytest.importorskip('sklearn', reason='the digits ship with scikit-learn')

REPOSITORY = Path(__file__).resolve().parents[1]
SCRIPT = REPOSITORY / 'tools' / 'quickstart.py'
CONFIGS = REPOSITORY / 'configs' / 'quickstart'


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location('quickstart', SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules['quickstart'] = module
    yield spec.loader.exec_module(module) or module
    del sys.modules['quickstart']


@pytest.mark.slow
def test_reduced_quickstart_ends_with_the_table(tmp_path):
    stale = tmp_path / 'work_dirs' / 'quickstart' / 'stale.pth'
    stale.parent.mkdir(parents=True)
    stale.write_text('of an earlier run')

    command = [sys.executable, str(SCRIPT), '--folder', str(tmp_path), '--epochs', '1']
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)

    assert done.returncode == 0, done.stdout + done.stderr
    assert 'removing the results of an earlier run' in done.stdout
    assert not stale.exists()
    rows = done.stdout.partition('top-1 %')[2].splitlines()[1:5]
    sizes = [int(row.split()[-3].replace(',', '')) for row in rows]
    assert [row.split()[0] for row in rows] == ['float', 'PTQ,', 'PTQ,', 'QAT,']
    top1 = [[row.split()[-5], row.split()[-4]] for row in rows]
    assert top1[0][1] == '-'
    assert all(abs(float(torch_) - float(deployed)) <= 1 for torch_, deployed in top1[1:])
    assert sizes[0] / 4 < sizes[1] < sizes[0] / 3
    assert sizes[2] == sizes[3] < sizes[1]
    assert (tmp_path / 'work_dirs/quickstart/ptq_w8a8/quantized.pth').is_file()
    assert (tmp_path / 'work_dirs/quickstart/qat_w4a4.train.log').stat().st_size > 0


def test_failing_command_is_named_with_its_log(script, tmp_path):
    quickstart = script.Quickstart(tmp_path, epochs=None)
    quickstart.start_afresh()

    with pytest.raises(script.CommandError) as error:
        quickstart.command(script.SETTINGS[0], 'test.py', tmp_path / 'missing.py')

    assert 'test.py missing.py' in str(error.value)
    assert 'there is no file missing.py' in str(error.value)
    assert str(tmp_path / 'work_dirs/quickstart/float.test.log') in str(error.value)


def test_progress_shows_epochs_calibration_and_metrics_only(script):
    log = [
        '11/23 23:15:57 - mmengine - INFO - Epoch(train) [1][20/20]  lr: 1.0e-01  eta: 0:00:03  time: 0.1  loss: 0.2\n',
        '11/23 23:15:57 - mmengine - INFO - Epoch(train) [2][20/20]  lr: 1.0e-01  eta: 0:00:01  time: 0.1  loss: 0.1\n',
        '11/23 23:15:58 - mmengine - INFO - Exp name: float\n',
        '11/23 23:15:58 - mmengine - INFO - Calibration [10/10]  eta: 0:00:00  time: 0.0100\n',
        '11/23 23:15:58 - mmengine - INFO - Epoch(test) [6/6]    accuracy/top1: 98.0000  data_time: 0.1  time: 0.1\n',
    ]

    assert list(script.progress_of(iter(log))) == [
        'Epoch(train) [1][20/20]  lr: 1.0e-01  eta: 0:00:03  loss: 0.2',
        'Calibration [10/10]  eta: 0:00:00',
        'Epoch(test) [6/6]    accuracy/top1: 98.0000',
    ]


@pytest.mark.parametrize('name', ['float', 'ptq_w8a8', 'ptq_w4a4', 'qat_w4a4'])
def test_configs_read_their_data_from_any_folder(name, tmp_path, monkeypatch):
    from mmcls.registry import DATASETS

    monkeypatch.chdir(tmp_path)
    cfg = Config.fromfile(str(CONFIGS / f'{name}.py'))

    sample = DATASETS.build({**cfg.test_dataloader.dataset, '_scope_': 'mmcls'})[0]

    assert sample['inputs'].shape == (1, 8, 8)
    assert cfg.work_dir == f'work_dirs/quickstart/{name}'


def test_splits_are_stratified_and_share_no_image():
    from mmrazor_quant.datasets.digits import SIZES, Digits

    infos = {split: list(Digits(split, serialize_data=False)) for split in SIZES}
    shares = {s: np.bincount([d['gt_label'] for d in data]) / len(data) for s, data in infos.items()}

    assert {split: len(data) for split, data in infos.items()} == SIZES
    assert sum(SIZES.values()) == 1797
    assert np.abs(shares['train'] - shares['test']).max() < 0.005
    with pytest.raises(ValueError, match="dataset.split: one of 'train', 'val', 'test' wanted, got 'dev'"):
        Digits('dev')


def test_size_of_a_float_model_is_its_state_dict():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))

    size = model_size(model)

    assert (size.integers, size.qparams) == (0, 0)
    assert size.total == size.floats == 4 * (3 * 8 * 9 + 8) + 4 * 4 * 8 + 8


def test_size_of_a_quantized_model_counts_packed_integers_and_folded_norms():
    network = nn.Sequential(nn.Conv2d(3, 7, 3, bias=False), nn.BatchNorm2d(7), nn.Flatten(), nn.Linear(7, 5))
    qconfig = dict(
        w_qscheme=dict(bit=3, is_symmetry=True, is_per_channel=True),
        a_qscheme=dict(bit=8, is_symmetry=False, is_per_channel=False),
    )
    model = GeneralQuant(network, dict(type='mmrazor.CustomQuantizer', qconfig=qconfig), input_shape=(3, 3, 3))

    size = model_size(model)

    assert size.integers == -(-3 * 7 * 27 // 8) + -(-3 * 35 // 8)
    assert size.qparams == 4 * (7 + 5) + 2 * (4 + 4)
    assert size.floats == 4 * 7 + 4 * 5
    assert size.total == size.integers + size.qparams + size.floats


@pytest.mark.parametrize(('elements', 'bit', 'expected'), [(8, 1, 1), (9, 1, 2), (3, 4, 2), (5, 8, 5)])
def test_packed_integers_leave_no_gaps(elements, bit, expected):
    assert packed_bytes(elements, bit) == expected


def test_shared_weight_is_stored_once():
    first = nn.Linear(4, 4)
    second = nn.Linear(4, 4)
    second.weight = first.weight

    assert model_size(nn.Sequential(first, second)).total == 4 * (16 + 4 + 4)
    assert torch.equal(first.weight, second.weight)
