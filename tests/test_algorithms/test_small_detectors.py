"""Detectors of every kind, small, from stock configs of mmdet: through both loops, to a checkpoint and back."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmengine.runner import Runner

import mmrazor_quant  # noqa: F401
from mmrazor_quant.codebases import codebase_of, run_mode
from mmrazor_quant.engine.launch import register_codebase
from mmrazor_quant.tracing.state import seeded

SIZE = 64
IMAGES = 4

RESNET = 'backbone=dict(depth=18, base_channels=8, init_cfg=None)'
FPN = 'neck=dict(in_channels=[8, 16, 32, 64], out_channels=16)'
RPN = (
    'rpn_head=dict(in_channels=16, feat_channels=16),'
    'train_cfg=dict(rpn_proposal=dict(nms_pre=50, max_per_img=20)), test_cfg=dict(rpn=dict(nms_pre=50, max_per_img=20))'
)
BOXES = 'bbox_roi_extractor=dict(out_channels=16), bbox_head=dict(in_channels=16, fc_out_channels=16, num_classes=2)'
ATTENTION = 'self_attn_cfg=dict(embed_dims=16, num_heads=2), ffn_cfg=dict(embed_dims=16, feedforward_channels=16)'
DETECTORS = {
    'retinanet': (
        'retinanet/retinanet_r18_fpn_1x_coco.py',
        f"{RESNET}, {FPN}, bbox_head=dict(num_classes=2, in_channels=16, feat_channels=16)",
    ),
    'faster-rcnn': (
        'faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py',
        f"{RESNET}, {FPN}, {RPN}, roi_head=dict({BOXES})",
    ),
    'mask-rcnn': (
        'mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py',
        f"{RESNET}, {FPN}, {RPN}, roi_head=dict({BOXES}, mask_roi_extractor=dict(out_channels=16),"
        " mask_head=dict(in_channels=16, conv_out_channels=16, num_classes=2))",
    ),
    'detr': (
        'detr/detr_r50_8xb2-150e_coco.py',
        f"{RESNET}, neck=dict(in_channels=[64], out_channels=16), num_queries=20, test_cfg=dict(max_per_img=10),"
        f" encoder=dict(num_layers=1, layer_cfg=dict({ATTENTION})),"
        f" decoder=dict(num_layers=2, layer_cfg=dict({ATTENTION}, cross_attn_cfg=dict(embed_dims=16, num_heads=2))),"
        " positional_encoding=dict(num_feats=8), bbox_head=dict(num_classes=2, embed_dims=16)",
    ),
    'rtmdet': (
        'rtmdet/rtmdet_tiny_8xb32-300e_coco.py',
        "backbone=dict(widen_factor=0.0625, init_cfg=None),"
        " neck=dict(in_channels=[16, 32, 64], out_channels=16),"
        " bbox_head=dict(num_classes=2, in_channels=16, feat_channels=16, exp_on_reg=True)",
    ),
}  # fmt: skip

FLOAT = """
_base_ = ['mmdet::{stock}']
model = dict({changes})
metainfo = dict(classes=('dark', 'bright'))
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=({size}, {size}), keep_ratio=True),
    dict(type='LoadAnnotations', with_bbox=True, with_mask={with_mask}),
    dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')),
]
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True, with_mask={with_mask}),
    dict(type='RandomChoiceResize', scales=[({size}, {size}), (96, 96)], keep_ratio=True),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackDetInputs'),
]
data = dict(
    type='CocoDataset', metainfo=metainfo, data_root='{root}/', ann_file='boxes.json', data_prefix=dict(img='images/')
)
train_dataloader = dict(
    _delete_=True, batch_size=2, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(data, pipeline=train_pipeline),
)
test_dataloader = dict(
    _delete_=True, batch_size=2, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(data, test_mode=True, pipeline=test_pipeline),
)
val_dataloader = test_dataloader
test_evaluator = dict(_delete_=True, type='CocoMetric', ann_file='{root}/boxes.json', metric='bbox')
val_evaluator = test_evaluator
"""
QUANTIZED = """
_base_ = ['./float.py']
model = dict(
    _delete_=True, type='mmrazor.GeneralQuant', architecture=_base_.model, input_shape=(3, {size}, {size}),
    quantizer=dict(type='mmrazor.CustomQuantizer'),
)
test_cfg = dict(type='mmrazor.PTQLoop', calibrate_steps=2)
train_cfg = dict(
    _delete_=True, type='mmrazor.QATIterBasedLoop', max_iters=2, val_interval=2, calibrate_steps=1,
)
optim_wrapper = dict(_delete_=True, optimizer=dict(type='SGD', lr=0.0001))
param_scheduler = []
custom_hooks = []
randomness = dict(seed=0)
default_hooks = dict(checkpoint=dict(_delete_=True, type='CheckpointHook', by_epoch=False, interval=1))
"""


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """A set of images with one dark and one bright rectangle each, annotated as COCO is."""
    root = tmp_path_factory.mktemp('boxes')
    (root / 'images').mkdir()
    rng = np.random.default_rng(0)
    images, annotations = [], []
    for i in range(IMAGES):
        picture = rng.integers(90, 160, (SIZE, SIZE, 3), dtype=np.uint8)
        for category, (x, y, value) in enumerate([(4 + i, 6, 20), (34, 30 + i, 230)], start=1):
            picture[y : y + 24, x : x + 22] = value
            corners = [x, y, x + 22, y, x + 22, y + 24, x, y + 24]
            annotations.append(
                dict(id=len(annotations) + 1, image_id=i + 1, category_id=category, bbox=[x, y, 22, 24], area=528,
                     iscrowd=0, segmentation=[corners])
            )  # fmt: skip
        cv2.imwrite(str(root / 'images' / f'{i}.png'), picture)
        images.append(dict(id=i + 1, file_name=f'{i}.png', width=SIZE, height=SIZE))
    categories = [dict(id=1, name='dark'), dict(id=2, name='bright')]
    (root / 'boxes.json').write_text(json.dumps(dict(images=images, annotations=annotations, categories=categories)))
    return root


def config_of(name: str, root: Path, folder: Path, **changes) -> Config:
    """Write the configs of a small detector, as a user would, and load the quantized one."""
    stock, model = DETECTORS[name]
    folder.mkdir(exist_ok=True)
    with_mask = name == 'mask-rcnn'
    (folder / 'float.py').write_text(
        FLOAT.format(stock=stock, changes=model, size=SIZE, root=root, with_mask=with_mask)
    )
    (folder / 'quantized.py').write_text(QUANTIZED.format(size=SIZE))
    cfg = Config.fromfile(folder / 'quantized.py')
    cfg.merge_from_dict(dict(work_dir=str(folder), experiment_name=f'{name}_{folder.name}', log_level='ERROR'))
    cfg.merge_from_dict(changes)
    return cfg


def runner_of(*args, **changes) -> Runner:
    register_codebase('mmdet')
    return Runner.from_cfg(config_of(*args, **changes))


def predictions(model: torch.nn.Module) -> list[torch.Tensor]:
    """Return boxes and scores on noise."""
    with seeded(), torch.no_grad(), codebase_of(model).settings(model):
        samples = run_mode(model.eval(), (2, 3, SIZE, SIZE), 'predict')
    return [value for s in samples for value in (s.pred_instances.bboxes, s.pred_instances.scores)]


@pytest.mark.parametrize('name', list(DETECTORS))
def test_detectors_go_through_both_loops_and_checkpoints(name, data, tmp_path):
    with DefaultScope.overwrite_default_scope('mmdet'):
        tested = runner_of(name, data, tmp_path / 'ptq')
        metrics = tested.test()
        report = tested.model.capture_report()

        assert report.outside == {} and report.layers_alone == [] and report.layers_total > 10
        assert {'coco/bbox_mAP', 'float/coco/bbox_mAP'} <= set(metrics)
        assert tested.model.is_calibrated

        again = runner_of(name, data, tmp_path / 'again', load_from=str(tmp_path / 'ptq' / 'quantized.pth'))
        again.load_or_resume()
        again.model.set_quant_state(act_fake_quant=True, weight_fake_quant=True)
        found, expected = predictions(again.model.architecture), predictions(tested.model.architecture)
        assert sum(len(boxes) for boxes in expected) > 0
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))

        trained = runner_of(name, data, tmp_path / 'qat')
        trained.train()
        assert trained.iter == 2
        assert all(value.isfinite().all() for value in trained.model.state_dict().values())

        resumed = runner_of(
            name, data, tmp_path / 'resumed', resume=True, load_from=str(tmp_path / 'qat' / 'iter_1.pth')
        )
        resumed.train()
        for key, value in trained.model.state_dict().items():
            assert torch.equal(resumed.model.state_dict()[key], value), key
