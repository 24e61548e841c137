"""Detectors of every kind, small, from stock configs of mmdet: through both loops, to a checkpoint and back."""

from __future__ import annotations

import pytest
import torch
from mmengine.registry import DefaultScope
from small_detectors import DETECTORS, predictions, runner_of


@pytest.mark.parametrize('name', list(DETECTORS))
def test_detectors_go_through_both_loops_and_checkpoints(name, boxes, tmp_path):
    with DefaultScope.overwrite_default_scope('mmdet'):
        tested = runner_of(name, boxes, tmp_path / 'ptq')
        metrics = tested.test()
        report = tested.model.capture_report()

        assert report.outside == {} and report.layers_alone == [] and report.layers_total > 10
        assert {'coco/bbox_mAP', 'float/coco/bbox_mAP'} <= set(metrics)
        assert tested.model.is_calibrated

        again = runner_of(name, boxes, tmp_path / 'again', load_from=str(tmp_path / 'ptq' / 'quantized.pth'))
        again.load_or_resume()
        again.model.set_quant_state(act_fake_quant=True, weight_fake_quant=True)
        found, expected = predictions(again.model.architecture), predictions(tested.model.architecture)
        assert sum(len(boxes) for boxes in expected) > 0
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))

        trained = runner_of(name, boxes, tmp_path / 'qat')
        trained.train()
        assert trained.iter == 2
        assert all(value.isfinite().all() for value in trained.model.state_dict().values())

        resumed = runner_of(
            name, boxes, tmp_path / 'resumed', resume=True, load_from=str(tmp_path / 'qat' / 'iter_1.pth')
        )
        resumed.train()
        for key, value in trained.model.state_dict().items():
            assert torch.equal(resumed.model.state_dict()[key], value), key
