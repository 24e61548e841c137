# A backbone of one's own (tinynet.py), float:
#   python tools/train.py configs/examples/tinynet_cifar10.py
_base_ = [
    '../_base_/datasets/cifar10_jpeg.py',
    '../_base_/default_runtime.py',
]
import sys  # noqa: E402

# Finds tinynet.py beside this file, from wherever the tools are called. A backbone in an installed package, or in a
# folder of PYTHONPATH, needs no such line.
sys.path.append('{{ fileDirname }}')
custom_imports = dict(imports=['tinynet', 'mmrazor_quant.datasets.tar_backend'])

model = dict(
    type='ImageClassifier',
    data_preprocessor=dict(num_classes=10, mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True),
    backbone=dict(type='TinyNet', widths=(32, 64, 128)),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(type='LinearClsHead', num_classes=10, in_channels=128, loss=dict(type='CrossEntropyLoss')),
)
optim_wrapper = dict(optimizer=dict(type='SGD', lr=0.1, momentum=0.9, weight_decay=5e-4))
param_scheduler = dict(type='CosineAnnealingLR', T_max=20, by_epoch=True, convert_to_iter_based=True)
train_cfg = dict(by_epoch=True, max_epochs=20)
val_cfg = dict()
test_cfg = dict()
