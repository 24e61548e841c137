# 650 validation images of ImageNet, 227x227, read from an archive: to measure differences to the float model with.
# The folder is that of MMRAZOR_QUANT_DATA or, without that variable, shared/data beside the checkout.
_base_ = []  # without it, mmengine takes a config that imports a module for one of its other syntax
import os  # noqa: E402

data_root = os.path.abspath(os.environ.get('MMRAZOR_QUANT_DATA') or '{{ fileDirname }}/../../../../shared/data')
custom_imports = dict(imports=['mmrazor_quant.datasets.tar_backend'])

test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='CenterCrop', crop_size=224),
    dict(type='PackClsInputs'),
]
test_dataloader = dict(
    batch_size=50,
    num_workers=2,
    collate_fn=dict(type='default_collate'),
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type='ImageNet',
        ann_file=f'{data_root}/imagenet_val650/val.txt',
        data_prefix=f'tar://{data_root}/imagenet_val650/images.tar/val',
        pipeline=test_pipeline,
    ),
)
test_evaluator = dict(type='Accuracy', topk=(1, 5))
