# YOLOX-nano of mmdet, evaluated on 94 validation images of COCO, calibrated and trained on 160 training images of long
# side 416. The images are read from archives in the folder that MMRAZOR_QUANT_DATA names or, without that variable, in
# shared/data beside the checkout.
_base_ = 'mmdet::yolox/yolox_nano_8xb8-300e_coco.py'
import os  # noqa: E402

data_root = os.path.abspath(os.environ.get('MMRAZOR_QUANT_DATA') or '{{ fileDirname }}/../../../../shared/data')
custom_imports = dict(imports=['mmrazor_quant.datasets.tar_backend'])
float_checkpoint = f'{data_root}/weights/yolox_nano_coco_mmdet.pth'

val_annotations = f'{data_root}/coco_val94/instances_val94.json'
val_images = dict(img=f'tar://{data_root}/coco_val94/images.tar/val2017/')
train_annotations = f'{data_root}/coco_train160/instances_train160.json'
train_images = dict(img=f'tar://{data_root}/coco_train160/images.tar/train2017/')

# Nothing of the stock dataset but its pipeline for testing is used. Mosaic, affine and mix-up are for long trainings.
train_pipeline = [
    dict(type='YOLOXHSVRandomAug'),
    dict(type='RandomFlip', prob=0.5),
    dict(type='Resize', scale=(416, 416), keep_ratio=True),
    dict(type='Pad', pad_to_square=True, pad_val=dict(img=(114.0, 114.0, 114.0))),
    dict(type='FilterAnnotations', min_gt_bbox_wh=(1, 1), keep_empty=False),
    dict(type='PackDetInputs'),
]
calibrate_dataloader = dict(
    batch_size=8,
    num_workers=2,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(
        type='CocoDataset',
        ann_file=train_annotations,
        data_prefix=train_images,
        test_mode=True,
        pipeline=_base_.test_pipeline,
    ),
)
train_dataloader = dict(
    batch_size=8,
    num_workers=2,
    dataset=dict(
        dataset=dict(data_root='', ann_file=train_annotations, data_prefix=train_images), pipeline=train_pipeline
    ),
)
val_dataloader = dict(num_workers=2, dataset=dict(data_root='', ann_file=val_annotations, data_prefix=val_images))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=val_annotations)
test_evaluator = val_evaluator
default_hooks = dict(checkpoint=dict(interval=1, max_keep_ckpts=2))
randomness = dict(seed=0)
