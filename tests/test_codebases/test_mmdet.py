"""What is known of mmdet: examples that detectors run on in every mode."""

from __future__ import annotations

import pytest
import torch
from mmdet.models import SSDHead
from mmengine.config import ConfigDict
from mmengine.registry import MODELS, DefaultScope
from torch import nn

from mmrazor_quant.codebases import build_examples, codebase_of, mmdet, run_mode
from mmrazor_quant.codebases.base import UNKNOWN


def retinanet():
    """The config of a RetinaNet of two levels."""
    return ConfigDict(
        type='RetinaNet',
        backbone=dict(type='ResNet', depth=18, base_channels=4, num_stages=2, strides=(1, 2), dilations=(1, 1),
                      out_indices=(0, 1)),
        neck=dict(type='FPN', in_channels=[4, 8], out_channels=8, num_outs=2),
        bbox_head=dict(
            type='RetinaHead', num_classes=3, in_channels=8, feat_channels=8, stacked_convs=1,
            anchor_generator=dict(type='AnchorGenerator', octave_base_scale=4, scales_per_octave=1,
                                  ratios=[1.0], strides=[4, 8]),
        ),
        train_cfg=dict(assigner=dict(type='MaxIoUAssigner', pos_iou_thr=0.5, neg_iou_thr=0.4, min_pos_iou=0,
                                     ignore_iof_thr=-1),
                       sampler=dict(type='PseudoSampler'), allowed_border=-1, pos_weight=-1),
        test_cfg=dict(nms_pre=1000, score_thr=0.999, min_bbox_size=0, nms=dict(type='nms', iou_threshold=0.5),
                      max_per_img=100),
    )  # fmt: skip


def built(config):
    with DefaultScope.overwrite_default_scope('mmdet'):
        return MODELS.build(config)


@pytest.fixture(scope='module')
def detector():
    return built(retinanet())


def test_only_models_of_mmdet_are_its_own(detector):
    assert codebase_of(detector) is mmdet.CODEBASE
    assert codebase_of(nn.Linear(2, 2)) is UNKNOWN


def test_samples_fit_their_image(detector):
    samples = mmdet.samples(detector, (2, 3, 40, 60))

    assert len(samples) == 2
    for sample in samples:
        boxes = sample.gt_instances.bboxes
        assert sample.img_shape == (40, 60)
        assert (boxes[:, 2:] > boxes[:, :2]).all() and (boxes[:, 2] <= 60).all() and (boxes[:, 3] <= 40).all()
        assert sample.gt_instances.labels.max() <= 2
        assert 'masks' not in sample.gt_instances
        assert sample.gt_sem_seg.shape == (40, 60)


def test_padding_is_for_models_whose_layers_are_told_of_it(detector, monkeypatch):
    assert mmdet.padded_samples(detector, (2, 3, 40, 60)) is None

    monkeypatch.setattr(mmdet, 'DetectionTransformer', type(detector))
    padded, full = mmdet.padded_samples(detector, (2, 3, 40, 60))

    assert padded.img_shape == (20, 30) and full.img_shape == (40, 60)
    for sample in (padded, full):
        assert sample.batch_input_shape == sample.pad_shape == sample.gt_sem_seg.shape == (40, 60)
    assert (padded.gt_instances.bboxes * 2 == full.gt_instances.bboxes).all()


def test_proposals_are_for_models_without_a_network_for_them(monkeypatch):
    two_stage = mmdet.TwoStageDetector(backbone=retinanet().backbone, init_cfg=None)
    assert not two_stage.with_rpn
    proposals = mmdet.samples(two_stage, (1, 3, 40, 60))[0].proposals
    assert len(proposals.bboxes) == len(proposals.scores) > 0

    monkeypatch.setattr(two_stage, 'rpn_head', nn.Conv2d(1, 1, 1), raising=False)
    assert 'proposals' not in mmdet.samples(two_stage, (1, 3, 40, 60))[0]


@pytest.mark.parametrize('own', [None, nn.CrossEntropyLoss(), 'a value'])
def test_heads_of_ssd_have_a_loss_or_none(own):
    anchors = dict(type='SSDAnchorGenerator', input_size=300, strides=[16], ratios=[[2]], min_sizes=[9], max_sizes=[9])
    with DefaultScope.overwrite_default_scope('mmdet'):
        head = SSDHead(in_channels=(4,), anchor_generator=anchors)
    assert head.loss_cls is None

    if own is not None:
        head.loss_cls = own

    assert head.loss_cls is own


def test_masks_are_for_models_that_learn_them(detector, monkeypatch):
    monkeypatch.setattr(detector, 'mask_head', nn.Conv2d(1, 1, 1), raising=False)

    masks = mmdet.samples(detector, (1, 3, 40, 60))[0].gt_instances.masks.masks

    assert masks.shape == (3, 40, 60) and (masks.sum((1, 2)) > 0).all()


def test_noise_is_detected_with_the_settings_and_they_are_restored(detector):
    before = dict(detector.test_cfg)
    sample = mmdet.samples(detector, (1, 3, 64, 64))
    detector.eval()

    def detections():
        with torch.no_grad():
            return len(detector(torch.zeros(1, 3, 64, 64), sample, mode='predict')[0].pred_instances)

    few = detections()
    with mmdet.settings(detector):
        many = detections()

    assert few == 0 < many <= mmdet.MAX_DETECTIONS
    assert dict(detector.test_cfg) == before


def test_examples_run_every_mode(detector):
    modes = []
    handle = detector.register_forward_pre_hook(
        lambda m, args, kwargs: modes.append((kwargs['mode'], m.training)), with_kwargs=True
    )

    complete = build_examples(detector, (3, 64, 64))[0].run()

    handle.remove()
    assert complete is True
    assert modes[-3:] == [('predict', False), ('tensor', False), ('loss', True)]


def test_an_example_that_cannot_predict_says_so(detector, monkeypatch):
    example = build_examples(detector, (3, 64, 64))[0]
    monkeypatch.setattr(detector.bbox_head, 'predict', lambda *args, **kwargs: [][0])

    assert example.run() is False


def test_a_student_learns_from_its_teacher():
    model = built(
        ConfigDict(
            type='SemiBaseDetector',
            detector=retinanet(),
            semi_train_cfg=dict(cls_pseudo_thr=0.0, min_pseudo_bbox_wh=(0, 0)),
            semi_test_cfg=dict(predict_on='teacher'),
        )
    )
    ran = []
    for part in (model.student, model.teacher):
        part.backbone.register_forward_hook(lambda module, args, out, part=part: ran.append(part))

    with codebase_of(model).settings(model):
        losses = run_mode(model.train(), (2, 3, 64, 64), 'loss')

    assert {name.partition('_')[0] for name in losses} == {'sup', 'unsup'}
    assert [part is model.student for part in ran] == [True, False, True]
