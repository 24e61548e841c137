"""Small detectors of stock configs of mmdet, and data for them, for the tests that train and evaluate."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import torch
from mmengine.config import Config
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
SYNCED = "norm_cfg=dict(type='SyncBN', momentum=0.03, eps=0.001)"
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
    'ssdlite': (
        'ssd/ssdlite_mobilenetv2-scratch_8xb24-600e_coco.py',
        "backbone=dict(widen_factor=0.125),"
        " neck=dict(in_channels=(16, 1280), out_channels=(16, 1280, 16, 8, 8, 8)),"
        " bbox_head=dict(in_channels=(16, 1280, 16, 8, 8, 8), num_classes=2)",
    ),
    'yolox': (
        'yolox/yolox_tiny_8xb8-300e_coco.py',
        f"data_preprocessor=dict(batch_augments=[dict(type='BatchSyncRandomResize', random_size_range=(64, 96),"
        f" size_divisor=32, interval=1)]), backbone=dict(widen_factor=0.125, {SYNCED}),"
        f" neck=dict(in_channels=[32, 64, 128], out_channels=16, {SYNCED}),"
        f" bbox_head=dict(num_classes=2, in_channels=16, feat_channels=16, {SYNCED})",
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
MOSAIC = """
_base_ = ['./quantized.py']
scale = ({size}, {size})
train_dataloader = dict(
    dataset=dict(
        _delete_=True,
        type='MultiImageMixDataset',
        dataset=dict(
            _base_.data,
            pipeline=[dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', with_bbox=True)],
        ),
        pipeline=[
            dict(type='Mosaic', img_scale=scale, pad_val=114.0),
            dict(type='RandomAffine', scaling_ratio_range=(0.5, 1.5), border=(-{size} // 2, -{size} // 2)),
            dict(type='MixUp', img_scale=scale, ratio_range=(0.8, 1.6), pad_val=114.0),
            dict(type='YOLOXHSVRandomAug'),
            dict(type='RandomFlip', prob=0.5),
            dict(type='Resize', scale=scale, keep_ratio=True),
            dict(type='Pad', pad_to_square=True, pad_val=dict(img=(114.0, 114.0, 114.0))),
            dict(type='FilterAnnotations', min_gt_bbox_wh=(1, 1), keep_empty=False),
            dict(type='PackDetInputs'),
        ],
    ),
)
train_cfg = dict(_delete_=True, type='mmrazor.QATEpochBasedLoop', max_epochs=3, val_interval=3, calibrate_steps=2)
custom_hooks = [
    dict(type='YOLOXModeSwitchHook', num_last_epochs=1, priority=48),
    dict(type='SyncNormHook', priority=48),
    dict(type='EMAHook', ema_type='ExpMomentumEMA', momentum=0.0001, update_buffers=True, priority=49),
]
default_hooks = dict(checkpoint=dict(_delete_=True, type='CheckpointHook', interval=1))
"""
SIZES = """
_base_ = ['./quantized.py']
learned = dict(
    w_fake_quant=dict(type='mmrazor.AdaRoundFakeQuantize'), a_fake_quant=dict(type='mmrazor.QDropFakeQuantize')
)
model = dict(quantizer=dict(qconfig=learned))
pipelines = [
    [
        dict(type='LoadImageFromFile'),
        dict(type='Resize', scale=(size, size), keep_ratio=True),
        dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')),
    ]
    for size in ({size}, 96)
]
calibrate_dataloader = dict(
    batch_size=3, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type='ConcatDataset', datasets=[dict(_base_.data, test_mode=True, pipeline=each) for each in pipelines]
    ),
)
test_cfg = dict(
    type='mmrazor.PTQLoop', calibrate_steps=3, calibrate_dataloader=calibrate_dataloader,
    reconstruction=dict(type='mmrazor.QDrop', iters=3, batch_size=2),
)
"""
AUGMENTED = """
_base_ = ['./quantized.py']
tta_model = dict(type='DetTTAModel', tta_cfg=dict(nms=dict(type='nms', iou_threshold=0.5), max_per_img=100))
tta_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(
        type='TestTimeAug',
        transforms=[
            [dict(type='Resize', scale=(size, size), keep_ratio=True) for size in ({size}, 96)],
            [dict(type='RandomFlip', prob=1.0), dict(type='RandomFlip', prob=0.0)],
            [dict(type='LoadAnnotations', with_bbox=True)],
            [
                dict(
                    type='PackDetInputs',
                    meta_keys=(
                        'img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor', 'flip', 'flip_direction'
                    ),
                )
            ],
        ],
    ),
]
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


def write_boxes(root: Path) -> None:
    """Write a set of images with one dark and one bright rectangle each, annotated as COCO is."""
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


def write_config(name: str, root: Path, folder: Path, more: str | None = None) -> Path:
    """Write the configs of a small detector, as a user would.

    Args:
        name: Key of :data:`DETECTORS`.
        root: Folder of :func:`write_boxes`.
        folder: Where to.
        more: Text of a config that inherits the quantized one; its ``{size}`` is filled in.

    Returns:
        Path of the last config.
    """
    stock, model = DETECTORS[name]
    folder.mkdir(exist_ok=True)
    with_mask = name == 'mask-rcnn'
    texts = {'float.py': FLOAT.format(stock=stock, changes=model, size=SIZE, root=root, with_mask=with_mask)}
    texts['quantized.py'] = QUANTIZED.format(size=SIZE)
    if more is not None:
        texts['more.py'] = more.format(size=SIZE)
    for file, text in texts.items():
        (folder / file).write_text(text)
    return folder / next(reversed(texts))


def config_of(name: str, root: Path, folder: Path, more: str | None = None, **changes) -> Config:
    """Write the configs of a small detector, and load the last one; see :func:`write_config`."""
    cfg = Config.fromfile(write_config(name, root, folder, more))
    cfg.merge_from_dict(dict(work_dir=str(folder), experiment_name=f'{name}_{folder.name}', log_level='ERROR'))
    cfg.merge_from_dict(changes)
    return cfg


def runner_of(*args, **changes) -> Runner:
    """Build the runner of a small detector; see :func:`config_of`."""
    register_codebase('mmdet')
    return Runner.from_cfg(config_of(*args, **changes))


def predictions(model: torch.nn.Module) -> list[torch.Tensor]:
    """Return boxes and scores on noise."""
    with seeded(), torch.no_grad(), codebase_of(model).settings(model):
        samples = run_mode(model.eval(), (2, 3, SIZE, SIZE), 'predict')
    return [value for s in samples for value in (s.pred_instances.bboxes, s.pred_instances.scores)]
