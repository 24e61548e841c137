"""Detectors of every kind, small, from stock configs of mmdet: through both loops, to a checkpoint and back."""

from __future__ import annotations

import pytest
import torch
from mmengine.registry import MODELS, DefaultScope
from small_detectors import DETECTORS, config_of, predictions, runner_of

from mmrazor_quant.codebases import codebase_of, run_mode
from mmrazor_quant.engine.launch import register_codebase
from mmrazor_quant.tracing.island import Island, islands_of
from mmrazor_quant.tracing.state import seeded

SEMI_SUPERVISED = """
_base_ = ['./quantized.py']
detector = _base_.model.architecture
model = dict(
    architecture=dict(
        _delete_=True, type='SemiBaseDetector', detector=detector, data_preprocessor=detector.data_preprocessor,
        semi_test_cfg=dict(predict_on='teacher'),
        semi_train_cfg=dict(cls_pseudo_thr=0.0, min_pseudo_bbox_wh=(0, 0)),
    )
)
"""
TWO_STAGE_PATTERNS = ['rpn_head.rpn_???', 'roi_head.bbox_head.fc_*']
TWO_STAGE = {'rpn_head.rpn_cls', 'rpn_head.rpn_reg', 'roi_head.bbox_head.fc_cls', 'roi_head.bbox_head.fc_reg'}
PREDICTIONS = {
    'retinanet': (['bbox_head.retina_*'], {'bbox_head.retina_cls', 'bbox_head.retina_reg'}),
    'faster-rcnn': (TWO_STAGE_PATTERNS, TWO_STAGE),
    'mask-rcnn': (
        [*TWO_STAGE_PATTERNS, 'roi_head.mask_head.conv_logits'],
        {*TWO_STAGE, 'roi_head.mask_head.conv_logits'},
    ),
    'detr': (['bbox_head.fc_*'], {'bbox_head.fc_cls', 'bbox_head.fc_reg'}),
    'rtmdet': (['bbox_head.rtm_*'], {f'bbox_head.rtm_{part}.{i}' for part in ('cls', 'reg') for i in range(3)}),
    'yolox': (
        ['bbox_head.multi_level_conv_*'],
        {f'bbox_head.multi_level_conv_{part}.{i}' for part in ('cls', 'reg', 'obj') for i in range(3)},
    ),
    'ssdlite': (
        ['bbox_head.*_convs.?.1'],
        {f'bbox_head.{part}_convs.{i}.1' for part in ('cls', 'reg') for i in range(6)},
    ),
}
"""Patterns of docs/detectors.md for the layers that predict, and those layers."""


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
            assert same(resumed.model.state_dict()[key], value), key


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    # On a GPU sums of gradients are not added up in the same order each time.
    return torch.allclose(one, other, rtol=1e-3, atol=1e-5) if one.is_cuda else torch.equal(one, other)


def prepared(name, boxes, folder, **changes):
    register_codebase('mmdet')
    with DefaultScope.overwrite_default_scope('mmdet'):
        return MODELS.build(config_of(name, boxes, folder, **changes).model)


def test_a_batch_with_padding_is_prepared_for(boxes, tmp_path):
    model = prepared('detr', boxes, tmp_path).architecture
    islands = {path: Island.of(module) for path, module in islands_of(model).items()}
    before = {path: [len(v.unique()) for v in island.variants] for path, island in islands.items()}
    assert len(before['encoder']) == len(before['decoder']) == 2

    for padded in (True, False):
        with seeded(), torch.no_grad(), codebase_of(model).settings(model):
            run_mode(model.eval(), (3, 3, 96, 64), 'predict', padded)

    assert {path: [len(v.unique()) for v in island.variants] for path, island in islands.items()} == before


def test_the_last_layer_of_a_two_stage_detector_is_of_its_second_stage(boxes, tmp_path):
    called = prepared('faster-rcnn', boxes, tmp_path).findings.called

    assert called[-1].startswith('roi_head.')
    assert called.index('rpn_head.rpn_cls') < called.index('roi_head.bbox_head.fc_cls')


@pytest.mark.parametrize('name', list(PREDICTIONS))
def test_patterns_name_the_layers_that_predict(name, boxes, tmp_path):
    patterns, expected = PREDICTIONS[name]
    overrides = [dict(name=pattern, w_qscheme='float', a_qscheme='float') for pattern in patterns]

    model = prepared(name, boxes, tmp_path, **{'model.quantizer.qconfig': dict(overrides=overrides)})

    quantized = {site.layer for site in model.inserted.weights}
    assert {layer for layer in model.findings.called if layer not in quantized} == expected


@pytest.mark.parametrize('name', ['retinanet', 'faster-rcnn'])
def test_training_is_refused_where_only_a_frozen_teacher_is_quantized(name, boxes, tmp_path):
    with DefaultScope.overwrite_default_scope('mmdet'):
        runner = runner_of(name, boxes, tmp_path / 'teacher', SEMI_SUPERVISED)
        with pytest.raises(ValueError, match=r'model\.architecture: got a SemiBaseDetector that trains student'):
            runner.train()
        assert 'coco/bbox_mAP' in runner.test()

        changes = {'model.architecture.semi_test_cfg': dict(predict_on='student', forward_on='student')}
        runner = runner_of(name, boxes, tmp_path / 'student', SEMI_SUPERVISED, **changes)
        floats = runner.model.capture_report().training_only
        assert floats and all(path.startswith('teacher.') for path in floats)
        assert runner.build_train_loop(runner._train_loop).iter == 0
