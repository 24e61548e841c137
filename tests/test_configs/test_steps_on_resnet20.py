"""What the further steps of post-training quantization claim, on a trained network and real images."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
from mmcls.utils import register_all_modules
from mmengine.config import Config
from mmengine.runner import Runner

ROOT = Path(__file__).resolve().parents[2] / 'configs' / 'ptq' / 'benchmark'


@pytest.fixture(scope='module')
def top1(tmp_path_factory):
    """Run a config, with 256 images to calibrate and every tenth image to evaluate on; gives both accuracies."""
    register_all_modules(init_default_scope=False)

    @functools.cache
    def run(name: str) -> tuple[float, float]:
        cfg = Config.fromfile(ROOT / f'{name}.py')
        cfg.work_dir, cfg.experiment_name = str(tmp_path_factory.mktemp(name)), name
        cfg.test_cfg.calibrate_steps = 4
        cfg.train_dataloader.num_workers = cfg.test_dataloader.num_workers = 0
        cfg.test_dataloader.dataset.indices = list(range(0, 10_000, 10))
        metrics = Runner.from_cfg(cfg).test()
        return metrics['float/accuracy/top1'], metrics['accuracy/top1']

    return run


@pytest.mark.slow
@pytest.mark.parametrize('step', ['bc', 'mse-range'])
def test_step_recovers_accuracy_at_3_bits(data_root, top1, step):
    plain_float, plain = top1('resnet20_w3a8_cifar10')
    step_float, found = top1(f'resnet20_{step}_w3a8_cifar10')

    assert step_float == plain_float > 85
    assert plain < plain_float - 8
    assert found > plain + 3
