# ResNet-20 on CIFAR-10 (float: 88.50 %): 2 bits with learned scales and offsets (LSQ+).
_base_ = [
    '../../_base_/models/resnet20_cifar.py',
    '../../_base_/datasets/cifar10_jpeg.py',
    '../../_base_/schedules/cifar10_lsq_10e.py',
    '../../_base_/qconfigs/lsq_plus_w2a2.py',
    '../../_base_/default_runtime.py',
]

model = dict(
    _delete_=True,
    type='mmrazor.GeneralQuant',
    architecture=_base_.model,
    quantizer=dict(type='mmrazor.CustomQuantizer', qconfig=_base_.qconfig),
    float_checkpoint=f'{_base_.data_root}/weights/resnet20_cifar10jpeg_mmcls.pth',
)
# Offsets move the zeros that padding relies on, and on one side of zero they clip half of what is behind a ReLU: at the
# learning rate of the weights they do not converge.
optim_wrapper = dict(paramwise_cfg=dict(offset_lr_mult=0.1))
