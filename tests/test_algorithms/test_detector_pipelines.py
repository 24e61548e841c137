"""What detectors are trained and tested with beside a plain pipeline."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.registry import DefaultScope
from small_detectors import AUGMENTED, MOSAIC, SIZES, runner_of, write_config

from mmrazor_quant.reconstruction import islands
from mmrazor_quant.tracing.island import islands_of

TEST = Path(__file__).resolve().parents[2] / 'tools' / 'test.py'


class Notes(Hook):
    """Note in each iteration whether there is the loss of the last epochs, and whether mosaic is off."""

    def __init__(self) -> None:
        self.seen: list[tuple[bool, bool]] = []

    def after_train_iter(self, runner, *_, **__) -> None:
        skipped = runner.train_dataloader.dataset._skip_type_keys or ()
        self.seen.append((runner.model.bbox_head.use_l1, 'Mosaic' in skipped))


def test_yolox_trains_with_mosaic_synchronised_norms_averages_and_its_hooks_and_resumes(boxes, tmp_path):
    """The loss of the last epoch, the dataset without mosaic, and averaged weights are those of a stock training."""
    with DefaultScope.overwrite_default_scope('mmdet'):
        trained = runner_of('yolox', boxes, tmp_path / 'trained', MOSAIC)
        notes = Notes()
        trained.register_hook(notes)
        trained.train()

        per_epoch = len(trained.train_dataloader)
        # mmdet's hook switches one epoch earlier than its argument says.
        assert notes.seen == [(False, False)] * per_epoch + [(True, True)] * 2 * per_epoch
        assert all(value.isfinite().all() for value in trained.model.state_dict().values())

        resumed = runner_of(
            'yolox', boxes, tmp_path / 'resumed', MOSAIC, resume=True, load_from=str(tmp_path / 'trained/epoch_1.pth')
        )
        resumed.train()
        for key, value in trained.model.state_dict().items():
            assert torch.equal(resumed.model.state_dict()[key], value), key
        paths = [tmp_path / name / 'epoch_3.pth' for name in ('trained', 'resumed')]
        averages = [torch.load(path, weights_only=False)['ema_state_dict'] for path in paths]
        assert averages[0].keys() == averages[1].keys()
        assert all(torch.equal(averages[0][key], averages[1][key]) for key in averages[0])


@pytest.mark.parametrize('name', ['retinanet', 'yolox', 'faster-rcnn', 'detr'])
def test_images_of_different_sizes_calibrate_and_reconstruct(name, boxes, tmp_path, monkeypatch):
    widths = []
    group_calls = islands.group_calls

    def noting(calls):
        groups = group_calls(calls)
        widths.append({group.calls[0].inputs[0].shape[-1] for group in groups})
        return groups

    monkeypatch.setattr(islands, 'group_calls', noting)
    with DefaultScope.overwrite_default_scope('mmdet'):
        runner = runner_of(name, boxes, tmp_path, SIZES, log_level='INFO')
        metrics = runner.test()

    assert {'coco/bbox_mAP', 'float/coco/bbox_mAP'} <= set(metrics)
    # Batches of 64 x 64, of both sizes padded to 96 x 96, and of 96 x 96.
    assert {64, 96} in widths
    # DETR's encoder and decoder get a mask with the images that are padded, and none with the others.
    reconstructed = [unit['unit'] for unit in json.loads((tmp_path / 'reconstruction.json').read_text())]
    for path in islands_of(runner.model.architecture):
        assert any(unit.startswith(path) for unit in reconstructed), path
    (log,) = tmp_path.rglob('*.log')
    text = log.read_text()
    assert 'Reconstruction [1/' in text and 'Reconstruction leaves' not in text and 'leaves out' not in text
    assert all(value.isfinite().all() for value in runner.model.state_dict().values() if value.is_floating_point())


def run(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, str(TEST), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_augmentation_in_testing(boxes, tmp_path):
    """A quantized checkpoint is tested on several sizes and flips; what is not quantized, or has no augmentation, is
    refused."""
    config = write_config('retinanet', boxes, tmp_path, AUGMENTED)
    options = ['--work-dir', tmp_path / 'work']

    early = run(config, '--tta', *options)
    calibrated = run(config, *options)
    augmented = run(config, tmp_path / 'work/quantized.pth', '--tta', '--out', tmp_path / 'tta.json', *options)
    without = run(tmp_path / 'quantized.py', tmp_path / 'work/quantized.pth', '--tta', *options)

    assert calibrated.returncode == 0, calibrated.stderr
    assert augmented.returncode == 0, augmented.stderr
    assert 'coco/bbox_mAP' in json.loads((tmp_path / 'tta.json').read_text())
    assert early.returncode != 0 and 'not calibrated' in early.stderr
    assert without.returncode != 0 and 'no tta_model and no tta_pipeline' in without.stderr
