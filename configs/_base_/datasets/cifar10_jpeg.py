# CIFAR-10 as JPEG, read from two archives: 20,000 images to train and calibrate on, all 10,000 test images.
# The folder is that of MMRAZOR_QUANT_DATA or, without that variable, shared/data beside the checkout.
_base_ = []  # without it, mmengine takes a config that imports a module for one of its other syntax
import os  # noqa: E402

data_root = os.path.abspath(os.environ.get('MMRAZOR_QUANT_DATA') or '{{ fileDirname }}/../../../../shared/data')
custom_imports = dict(imports=['mmrazor_quant.datasets.tar_backend'])

metainfo = dict(
    classes=['airplane', 'automobile', 'bird', 'cat', 'deer', 'dog', 'frog', 'horse', 'ship', 'truck'],
)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='RandomCrop', crop_size=32, padding=4),
    dict(type='RandomFlip', prob=0.5, direction='horizontal'),
    dict(type='PackClsInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='PackClsInputs'),
]

train_dataloader = dict(
    batch_size=64,
    num_workers=2,
    collate_fn=dict(type='default_collate'),
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(
        type='CustomDataset',
        data_prefix=f'tar://{data_root}/cifar10_jpeg/train20k.tar.xz/train',
        metainfo=metainfo,
        pipeline=train_pipeline,
    ),
)
test_dataloader = dict(
    batch_size=100,
    num_workers=2,
    collate_fn=dict(type='default_collate'),
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type='CustomDataset',
        data_prefix=f'tar://{data_root}/cifar10_jpeg/test.tar.xz/test',
        metainfo=metainfo,
        pipeline=test_pipeline,
    ),
)
val_dataloader = test_dataloader
test_evaluator = dict(type='Accuracy', topk=(1,))
val_evaluator = test_evaluator
