# imagenet_val650 to evaluate on, and 200 other images of ImageNet, of short side 256, to calibrate on.
_base_ = './imagenet_val650.py'

calibrate_dataloader = dict(
    batch_size=25,
    num_workers=2,
    collate_fn=dict(type='default_collate'),
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(
        type='ImageNet',
        ann_file=f'{_base_.data_root}/imagenet_calib200/calib.txt',
        data_prefix=f'tar://{_base_.data_root}/imagenet_calib200/images.tar/calib',
        pipeline=_base_.test_pipeline,
    ),
)
