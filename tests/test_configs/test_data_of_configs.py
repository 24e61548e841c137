"""Where configs look for their data, and what they read there."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import mmdet.utils
import numpy as np
import pytest
from mmcls.registry import DATASETS
from mmcls.utils import register_all_modules
from mmdet.registry import DATASETS as MMDET_DATASETS
from mmengine.config import Config
from mmengine.registry import DefaultScope

ROOT = Path(__file__).resolve().parents[2]
CIFAR10 = 'ptq/benchmark/resnet20_w8a8_cifar10.py'
IMAGENET = 'ptq/benchmark/mobilenet-v2_w8a8_imagenet650.py'


def load(name: str) -> Config:
    """Load a config."""
    return Config.fromfile(ROOT / 'configs' / name)


def build_dataset(config: dict):
    """Build a dataset of a config."""
    register_all_modules(init_default_scope=False)
    return DATASETS.build(copy.deepcopy(config))


@pytest.mark.parametrize('name', [CIFAR10, IMAGENET])
def test_data_lie_beside_the_checkout(name, tmp_path, monkeypatch):
    monkeypatch.delenv('MMRAZOR_QUANT_DATA', raising=False)
    monkeypatch.chdir(tmp_path)

    cfg = load(name)

    assert cfg.data_root == str(ROOT.parent / 'shared' / 'data')
    assert cfg.test_dataloader.dataset.data_prefix.startswith(f'tar://{cfg.data_root}/')
    assert cfg.model.float_checkpoint.startswith(cfg.data_root)


@pytest.mark.parametrize('name', [CIFAR10, IMAGENET])
def test_variable_names_the_folder(name, tmp_path, monkeypatch):
    monkeypatch.setenv('MMRAZOR_QUANT_DATA', str(tmp_path))

    cfg = load(name)

    assert cfg.data_root == str(tmp_path)
    with pytest.raises(FileNotFoundError, match=f'{tmp_path}.*MMRAZOR_QUANT_DATA'):
        build_dataset(dict(cfg.test_dataloader.dataset, ann_file=''))


@pytest.mark.parametrize(('loader', 'per_class'), [('train_dataloader', 2000), ('test_dataloader', 1000)])
def test_cifar10(data_root, loader, per_class):
    dataset = build_dataset(load(CIFAR10)[loader].dataset)

    assert np.bincount(dataset.get_gt_labels()).tolist() == [per_class] * 10
    assert dataset.CLASSES[0] == 'airplane'
    assert dataset.CLASSES[9] == 'truck'
    assert dataset[len(dataset) - 1]['inputs'].shape == (3, 32, 32)


def test_imagenet(data_root):
    cfg = load(IMAGENET)
    test = build_dataset(cfg.test_dataloader.dataset)
    calibration = build_dataset(cfg.test_cfg.calibrate_dataloader.dataset)

    assert (len(test), len(calibration)) == (650, 200)
    assert test[649]['inputs'].shape == calibration[199]['inputs'].shape == (3, 224, 224)
    assert calibration.CLASSES[calibration[0]['data_samples'].gt_label.label] == 'goldfish, Carassius auratus'


def run_tool(tool: str, config: str, cwd: Path, *arguments: str) -> str:
    """Run a tool in another folder than the checkout; returns what it printed."""
    command = [sys.executable, str(ROOT / 'tools' / f'{tool}.py'), str(ROOT / 'configs' / config), *arguments]
    environment = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout + done.stderr


def test_images_and_boxes_of_coco(data_root):
    mmdet.utils.register_all_modules(init_default_scope=False)
    cfg = load('ptq/benchmark/yolox-nano_w8a8_coco94.py')
    with DefaultScope.overwrite_default_scope('mmdet'):
        evaluated, calibrated, trained = (
            MMDET_DATASETS.build(copy.deepcopy(cfg[name].dataset))
            for name in ('test_dataloader', 'calibrate_dataloader', 'train_dataloader')
        )
        samples = [evaluated[0], calibrated[0], trained[0]]

    assert (len(evaluated), len(calibrated), len(trained)) == (94, 160, 160)
    assert {tuple(sample['inputs'].shape) for sample in samples} == {(3, 416, 416)}
    assert len(samples[2]['data_samples'].gt_instances.bboxes) > 0
    ids = [{each['img_id'] for each in (d.get_data_info(i) for i in range(len(d)))} for d in (evaluated, calibrated)]
    assert ids[0].isdisjoint(ids[1])


FEW = ['train_dataloader.dataset.indices=128', 'test_dataloader.dataset.indices=300']


@pytest.mark.slow
def test_benchmark_runs_from_any_folder(data_root, tmp_path):
    options = ['--out', 'metrics.json', '--cfg-options', *FEW]

    run_tool('test', 'ptq/benchmark/resnet20_w4a4_cifar10.py', tmp_path, *options)

    metrics = json.loads((tmp_path / 'metrics.json').read_text())
    assert metrics['float/accuracy/top1'] > 80
    assert abs(metrics['accuracy/top1'] - metrics['float/accuracy/top1']) < 8


@pytest.mark.slow
def test_own_backbone_is_trained_and_quantized(data_root, tmp_path):
    train = ['train_cfg.max_epochs=1', 'val_dataloader.dataset.indices=100']
    run_tool('train', 'examples/tinynet_cifar10.py', tmp_path, '--cfg-options', *FEW, *train)
    checkpoint = tmp_path / 'work_dirs' / 'tinynet_cifar10' / 'epoch_1.pth'

    printed = run_tool('test', 'examples/tinynet_w8a8_cifar10.py', tmp_path, str(checkpoint), '--cfg-options', *FEW)

    assert 'float' in printed
    assert (tmp_path / 'work_dirs' / 'tinynet_w8a8_cifar10' / 'quantized.pth').is_file()
