# RetinaNet with ResNet-18, of random weights, to compare what is deployed with what is computed in PyTorch: trained
# weights are not among the data of the benchmarks. Quantizers are where ONNX Runtime has them.
_base_ = [
    'mmdet::retinanet/retinanet_r18_fpn_1x_coco.py',
    '../../_base_/qconfigs/w8a8_minmax.py',
]
import os  # noqa: E402

data_root = os.path.abspath(os.environ.get('MMRAZOR_QUANT_DATA') or '{{ fileDirname }}/../../../../shared/data')
custom_imports = dict(imports=['mmrazor_quant.datasets.tar_backend'])

architecture = _base_.model
architecture.backbone.init_cfg = None
# What a prior of one in a hundred makes of random weights.
architecture.test_cfg.score_thr = 0.0

model = dict(
    _delete_=True,
    type='mmrazor.GeneralQuant',
    architecture=architecture,
    quantizer=dict(type='mmrazor.CustomQuantizer', backend='onnxruntime', qconfig=_base_.qconfig),
)
pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(640, 640), keep_ratio=False),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')),
]
annotations = f'{data_root}/coco_val94/instances_val94.json'
dataset = dict(
    data_root='',
    ann_file=annotations,
    data_prefix=dict(img=f'tar://{data_root}/coco_val94/images.tar/val2017/'),
    pipeline=pipeline,
    indices=8,
)
calibration = dict(
    dataset,
    type='CocoDataset',
    test_mode=True,
    indices=16,
    ann_file=f'{data_root}/coco_train160/instances_train160.json',
    data_prefix=dict(img=f'tar://{data_root}/coco_train160/images.tar/train2017/'),
)
calibrate_dataloader = dict(
    batch_size=4, num_workers=2, sampler=dict(type='DefaultSampler', shuffle=True), dataset=calibration
)
val_dataloader = dict(num_workers=2, dataset=dataset)
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=annotations)
test_evaluator = val_evaluator
test_cfg = dict(type='mmrazor.PTQLoop', calibrate_dataloader=calibrate_dataloader, calibrate_steps=4)
randomness = dict(seed=0)
