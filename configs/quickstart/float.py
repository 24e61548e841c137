# A small float network on real data: the handwritten digits of scikit-learn, 8 x 8 pixels.
# This is an ordinary mmcls config; nothing in it knows of quantization.
_base_ = ['mmcls::_base_/default_runtime.py']

# Registers the dataset. A module of your own is named in the same way.
custom_imports = dict(imports=['mmrazor_quant.datasets.digits'])

work_dir = 'work_dirs/quickstart/float'
randomness = dict(seed=0)

model = dict(
    type='ImageClassifier',
    backbone=dict(
        type='ResNet_CIFAR',
        depth=18,
        in_channels=1,
        stem_channels=4,
        base_channels=4,
        num_stages=3,
        strides=(1, 2, 2),
        dilations=(1, 1, 1),
        out_indices=(2,),
    ),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(type='LinearClsHead', num_classes=10, in_channels=16, loss=dict(type='CrossEntropyLoss'), topk=(1,)),
)
data_preprocessor = dict(num_classes=10, mean=[4.88], std=[6.02], to_rgb=False)

train_dataloader = dict(
    batch_size=50,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(type='Digits', split='train', pipeline=[dict(type='PackClsInputs')]),
)
val_dataloader = dict(
    batch_size=50,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(type='Digits', split='val', pipeline=[dict(type='PackClsInputs')]),
)
test_dataloader = dict(
    batch_size=50,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(type='Digits', split='test', pipeline=[dict(type='PackClsInputs')]),
)
val_evaluator = dict(type='Accuracy', topk=(1,))
test_evaluator = val_evaluator

optim_wrapper = dict(optimizer=dict(type='SGD', lr=0.1, momentum=0.9, weight_decay=5e-4))
param_scheduler = dict(type='CosineAnnealingLR', T_max=30)
train_cfg = dict(by_epoch=True, max_epochs=30, val_interval=5)
val_cfg = dict()
test_cfg = dict()
default_hooks = dict(logger=dict(interval=20), checkpoint=dict(interval=30))
